"""A request taken for sent that never left, or for answered that was not; answers mixed up between requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop

from runtime.http_client import HttpPool, NoReply, NotSent

Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\r\n\r\nhi"


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return request.param()


class Server:
    """A scripted server: `handle` gets each request's head."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.connection_count = 0
        self.url = ""


@asynccontextmanager
async def serving(handle: Handler) -> AsyncIterator[Server]:
    seen = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connection_count += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.requests.append(head)
                await handle(head, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    seen.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base"
    yield seen
    server.close()


def saying(*answers: bytes) -> Handler:
    left = list(answers)

    async def handle(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if not answer:
            raise ConnectionError
        writer.write(answer)

    return handle


async def test_request_and_reply() -> None:
    async with serving(saying(OK)) as server:
        pool = HttpPool(server.url, timeout_s=5)
        for _ in range(3):
            reply = await pool.request("GET", "/a?b=c", {"X-Key": "v"})
            assert (reply.status, reply.body, reply.headers["x-a"]) == (200, b"hi", "b")
        await pool.close()
    assert server.connection_count == 1
    assert server.requests[0].startswith(b"GET /base/a?b=c HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-Key: v\r\n" in server.requests[0]


async def test_chunked_early_hints_and_close() -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\nhi\r\n3\r\nyou\r\n0\r\n\r\n"
    )
    async with serving(saying(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + chunked)) as server:
        pool = HttpPool(server.url, timeout_s=5)
        for _ in range(2):
            assert (await pool.request("GET", "/", {})).body == b"hiyou"
    assert server.connection_count == 2


async def test_each_request_gets_its_own_answer() -> None:
    async def echo(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = head.split(b" ", 2)[1]
        body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        await asyncio.sleep(0.001 * (len(body) % 3))
        answer = target + b"=" + body
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))

    async with serving(echo) as server:
        pool = HttpPool(server.url, timeout_s=5, connection_count_max=4)
        replies = await asyncio.gather(*(pool.request("POST", f"/{n}", {}, b"x" * n) for n in range(50)))
        assert [reply.body for reply in replies] == [b"/base/%d=%b" % (n, b"x" * n) for n in range(50)]
        await pool.close()
    assert server.connection_count <= 4


async def test_no_connection_is_not_sent() -> None:
    with pytest.raises(NotSent):
        await HttpPool("http://127.0.0.1:1", timeout_s=5).request("GET", "/", {})
    with pytest.raises(NotSent):
        await HttpPool("http://no-such-host.invalid", timeout_s=5).request("GET", "/", {})


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\n\r\nhi",
        b"HTTP/1.1 2",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000,
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_half_an_answer_is_none(answer: bytes) -> None:
    async def cut(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with serving(cut) as server:
        with pytest.raises(NoReply):
            await HttpPool(server.url, timeout_s=5, body_bytes_max=1000).request("GET", "/", {})
    assert len(server.requests) <= 2  # what is safe to send twice is sent at most twice


async def test_silence_is_no_reply_and_its_connection_is_not_used_again() -> None:
    async def late(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/slow" in head:
            await asyncio.sleep(1.0)
            writer.write(OK.replace(b"hi", b"no"))
        else:
            writer.write(OK)

    async with serving(late) as server:
        pool = HttpPool(server.url, timeout_s=0.5)
        with pytest.raises(NoReply):
            await pool.request("GET", "/slow", {})
        assert (await pool.request("GET", "/fast", {})).body == b"hi"
        await pool.close()
    assert server.connection_count == 2


async def test_no_free_connection_in_time_is_not_sent() -> None:
    async def late(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3.0)
        writer.write(OK)

    async with serving(late) as server:
        pool = HttpPool(server.url, timeout_s=2, connection_count_max=1)
        first, second = await asyncio.gather(*(pool.request("GET", "/", {}) for _ in range(2)), return_exceptions=True)
        assert isinstance(first, NoReply)
        assert isinstance(second, NotSent)
        await pool.close()
    assert len(server.requests) == 1


async def test_more_than_was_asked_for_is_never_an_answer() -> None:
    async with serving(saying(OK + OK.replace(b"hi", b"no"))) as server:
        pool = HttpPool(server.url, timeout_s=5)
        for _ in range(2):
            assert (await pool.request("GET", "/", {})).body == b"hi"
        await pool.close()
    assert server.connection_count == 2


async def test_a_cancelled_request_leaves_no_half_read_connection() -> None:
    async def late(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"/slow" in head:
            await asyncio.sleep(0.05)
            writer.write(OK.replace(b"hi", b"no"))
        else:
            writer.write(OK)

    async with serving(late) as server:
        pool = HttpPool(server.url, timeout_s=5, connection_count_max=1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.request("GET", "/slow", {}), 0.01)
        assert (await pool.request("GET", "/fast", {})).body == b"hi"
        await pool.close()


async def test_a_kept_connection_that_the_peer_closed_is_replaced_once() -> None:
    async with serving(saying(OK, b"", OK)) as server:
        pool = HttpPool(server.url, timeout_s=5)
        assert (await pool.request("GET", "/", {})).status == 200
        assert (await pool.request("GET", "/", {})).status == 200
        await pool.close()
    assert server.connection_count == 2
    async with serving(saying(b"")) as server:
        with pytest.raises(NoReply):
            await HttpPool(server.url, timeout_s=5).request("GET", "/", {})
    assert len(server.requests) <= 2  # what is safe to send twice is sent at most twice


@pytest.mark.parametrize("bad", [{"X": "a\r\nY: b"}, {"X\n": "a"}, {"X": "ü"}])
async def test_nothing_is_smuggled_into_a_header(bad: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not a request line"):
        await HttpPool("http://127.0.0.1:1", timeout_s=1).request("GET", "/", bad)
    with pytest.raises(ValueError, match="not percent-encoded"):
        await HttpPool("http://127.0.0.1:1", timeout_s=1).request("GET", "/a b", {})
    with pytest.raises(ValueError, match="base_url"):
        HttpPool("ftp://x", timeout_s=1)


async def test_a_repeat_that_finds_nobody_is_no_reply_because_the_first_may_have_arrived() -> None:
    """Risk: the PSP acts, dies before it answers, and its order is taken for never sent, so another PSP gets it too."""

    async def act_and_die(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        writer.close()

    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        await act_and_die(received[-1], reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = HttpPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=5)
    try:
        with pytest.raises(NoReply):
            await pool.request("POST", "/v1/payment_intents", {"Idempotency-Key": "ORD-1"}, b"")
    finally:
        await pool.close()
    assert len(received) == 1
