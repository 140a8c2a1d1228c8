"""Risk: a stranger's bytes that are neither head nor body fill the memory of a process, become headers, or keep its connections.

Every kind is tried on every HTTP server that Ducat has: the gateway, the sandbox and the metrics endpoint, as real processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtime import http_server
from runtime.http_server import HttpLimits, make_server

ROOT = Path(__file__).resolve().parents[3]
BLOCK = 65_536
CONNECTIONS = 16
SENT_MAX = 2 * 1024 * 1024
"""Of one connection; more than any limit."""
CLOSE_S = 5.0
"""Within this a server must have closed a connection of endless input; its own timeouts are longer."""
GROWTH_MAX = 20 * 1024 * 1024

CHUNKED = b"POST /webhooks/sandbox HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "no newline": (b"", b"a" * BLOCK),
    "request line": (b"GET /", b"a" * BLOCK),
    "one header": (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", b"a" * BLOCK),
    "one header name": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"a" * BLOCK),
    "many headers": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n" * (BLOCK // 8)),
    "folded header": (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\r\n", b" c\r\n" * (BLOCK // 4)),
    "chunk extension": (CHUNKED + b"1;", b"a=b;" * (BLOCK // 4)),
    "chunk extension value": (CHUNKED + b'1;a="', b"b" * BLOCK),
    "chunk extensions": (CHUNKED, (b"1;" + b"a" * 1_000 + b"\r\nx\r\n") * (BLOCK // 1_000)),
    "trailers": (CHUNKED + b"0\r\n", b"X-A: b\r\n" * (BLOCK // 8)),
    "one trailer": (CHUNKED + b"0\r\nX-A: ", b"b" * BLOCK),
    "tiny chunks": (CHUNKED, b"1\r\nx\r\n" * (BLOCK // 6)),
    "zeros of a chunk size": (CHUNKED, b"0" * BLOCK),
    "large chunks": (CHUNKED, b"%x\r\n%b\r\n" % (BLOCK, b"x" * BLOCK)),
    "body that nobody wants": (b"GET /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"x" * BLOCK),
    "pipeline": (b"", GET * (BLOCK // len(GET))),
    "after an upgrade": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"\x81\xfe" * (BLOCK // 2),
    ),
    "after close": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", GET * (BLOCK // len(GET))),
}

MALFORMED: dict[str, bytes] = {
    "HTTP/0.9": b"GET /\r\n\r\n",
    "both lengths": CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\n") + b"0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "negative length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "length with a sign": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx",
    "endless length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
    "negative chunk": CHUNKED + b"-1\r\nx\r\n",
    "chunk size over 64 bits": CHUNKED + b"1" + b"0" * 16 + b"\r\n",
    "chunk size that is none": CHUNKED + b"g\r\n",
    "chunked, not last": CHUNKED.replace(b"chunked", b"chunked, identity") + b"0\r\n\r\n",
    "lone line feeds": b"POST / HTTP/1.1\nHost: x\nContent-Length: 1\n\nx",
    "lone carriage return": b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\rX-B: c\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost: x\r\nX-A : b\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "the same Host twice": b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n",
    "two Hosts in one": b"GET / HTTP/1.1\r\nHost: x, y\r\n\r\n",
    "Host with a path": b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "Host with a user": b"GET / HTTP/1.1\r\nHost: a@x\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: x\r\nX-A: \x00\r\n\r\n",
}


@dataclass
class Served:
    """A process under fire: where it listens, and its memory."""

    addresses: dict[str, str]
    pids: dict[str, int]

    def rss(self, server: str) -> int:
        return int(Path(f"/proc/{self.pids[server]}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DUCAT_")}
    environment |= {
        "DUCAT_DATA_DIR": str(folder),
        "DUCAT_GATEWAY_LISTEN": "127.0.0.1:0",
        "DUCAT_SANDBOX_LISTEN": "127.0.0.1:0",
        "DUCAT_METRICS_LISTEN_GATEWAY": "127.0.0.1:0",
        "DUCAT_PAYMENT_ADDRESS": "127.0.0.1:1",
        "DUCAT_GATEWAY_ADDRESS_RATE_MAX": "0",
    }
    processes = []
    found = Served({}, {})
    try:
        for name in ("gateway", "sandbox"):
            log = folder / f"{name}.log"
            with log.open("wb") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", name], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors
                )
            processes.append(process)
            assert process.stdout is not None
            found.addresses[name] = process.stdout.readline().decode().split()[2]
            found.pids[name] = process.pid
            if name == "gateway":
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                found.addresses["metrics"] = next(line["address"] for line in lines if line["event"] == "metrics")
                found.pids["metrics"] = process.pid
        yield found
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def drain(reader: asyncio.StreamReader) -> bytes:
    kept = b""
    while part := await reader.read(BLOCK):
        kept = (kept + part)[:BLOCK]
    return kept


async def send(address: str, head: bytes, blocks: Iterable[bytes] = ()) -> bytes:
    """Sends until the server closes, or there is no more, and returns what it said. Raises TimeoutError where it does not close."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    said = asyncio.ensure_future(drain(reader))
    try:
        async with asyncio.timeout(CLOSE_S):
            for block in (head, *blocks):
                writer.write(block)
                await writer.drain()
                if said.done():
                    break
            return await said
    except ConnectionError:
        return b""  # it closed while we were still sending: what it said is lost
    finally:
        said.cancel()
        writer.close()


def statuses(said: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


@pytest.mark.parametrize("server", ["gateway", "sandbox", "metrics"])
async def test_endless_input_of_every_kind_is_cut_off_and_memory_stays_flat(served: Served, server: str) -> None:
    address = served.addresses[server]

    async def fire(kind: str, connections: int) -> None:
        head, block = ENDLESS[kind]
        blocks = [block] * (SENT_MAX // len(block))
        try:
            answers = await asyncio.gather(*(send(address, head, blocks) for _ in range(connections)))
        except TimeoutError:
            pytest.fail(f"{kind}: not closed")
        for said in answers:
            assert not {status for status in statuses(said) if status >= 500}, (kind, said[:300])

    for kind in ENDLESS:  # allocators warm up
        await fire(kind, 2)
    before = peak = served.rss(server)
    for kind in ENDLESS:
        await fire(kind, CONNECTIONS)
        peak = max(peak, served.rss(server))
    assert peak - before < GROWTH_MAX, f"{(peak - before) / 2**20:.1f} MB"
    said = await send(address, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert statuses(said)[0] in (200, 404), "it serves as before"


@pytest.mark.parametrize("server", ["gateway", "sandbox", "metrics"])
async def test_what_two_servers_could_read_in_two_ways_is_refused(served: Served, server: str) -> None:
    for kind, request in MALFORMED.items():
        said = await send(served.addresses[server], request)
        assert statuses(said) == [400], (kind, said[:300])
        assert b"connection: close" in said.lower()


# --- one server in this process, whose limits are made small


class Echo:
    """Reads the body and answers with what it got; ``hold`` makes it wait."""

    def __init__(self) -> None:
        self.requests: list[tuple[list[tuple[bytes, bytes]], bytes]] = []
        self.hold: asyncio.Event | None = None
        self.answer = b"ok"

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        body = b""
        if scope["method"] == "POST":
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
        self.requests.append((list(scope["headers"]), body))
        if self.hold is not None:
            await self.hold.wait()
        length = str(len(self.answer)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": self.answer})


@asynccontextmanager
async def listening(app: Any, limits: HttpLimits | None = None) -> AsyncIterator[tuple[str, Any]]:
    import socket

    sock = socket.create_server(("127.0.0.1", 0))
    server = make_server(app, limits=limits)
    running = asyncio.ensure_future(server.serve(sockets=[sock]))
    await server.is_listening.wait()
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}", server
    finally:
        server.should_exit = True
        server.force_exit = True
        await running


async def test_a_trailer_never_becomes_a_header_of_this_or_the_next_request() -> None:
    """Before: a webhook whose signature came only in a trailer was accepted."""
    echo = Echo()
    async with listening(echo) as (address, _):
        last = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        said = await send(address, CHUNKED + b"2\r\nhi\r\n0\r\nSignature: forged\r\nX-B: c\r\n\r\n" + last)
    assert statuses(said) == [200, 200]
    assert [body for _, body in echo.requests] == [b"hi", b""]
    assert {name for headers, _ in echo.requests for name, _ in headers} == {
        b"host",
        b"transfer-encoding",
        b"connection",
    }


async def test_honest_framing_is_taken() -> None:
    echo = Echo()
    chunks = b"".join(b"10;a=b\r\n%b\r\n" % (b"x" * 16) for _ in range(1_000))
    async with listening(echo) as (address, _):
        for head in (CHUNKED, CHUNKED.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")):
            said = await send(address, head + chunks + b"0\r\n\r\nGET / HTTP/1.0\r\n\r\n", [])
            assert [status for status in statuses(said) if status != 100] == [200, 200]
        pipelined = GET * 10 + GET.replace(b"Host", b"Connection: close\r\nHost")
        assert statuses(await send(address, pipelined)) == [200] * 11
    assert echo.requests[0][1] == b"x" * 16_000


async def test_every_phase_of_a_request_has_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then keeps no connection: head, body, chunk, trailer, the rest that nobody reads."""
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S", "DRAIN_TIMEOUT_S"):
        monkeypatch.setattr(http_server, name, 0.2)
    drip = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    beginnings = {
        b"GET /": [408],
        b"GET / HTTP/1.1\r\nX-A": [408],
        drip: [408],
        CHUNKED + b"1": [408],
        CHUNKED + b"1;a": [408],
        CHUNKED + b"0\r\nX-A: ": [408],
        drip.replace(b"POST", b"GET"): [200],
    }

    async def slowly(address: str, beginning: bytes, expected: list[int]) -> None:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        said = asyncio.ensure_future(reader.read())
        writer.write(beginning)
        async with asyncio.timeout(5):
            while not said.done():
                await asyncio.sleep(0.03)
                writer.write(b"a")
        assert statuses(said.result() if not said.exception() else b"") in (expected, []), beginning
        writer.close()

    async with listening(Echo()) as (address, server):
        await asyncio.gather(*(slowly(address, *each) for each in beginnings.items()))
        assert not server.server_state.connections


async def test_a_refusal_is_never_the_answer_to_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = Echo()
    echo.hold = asyncio.Event()
    async with listening(echo) as (address, _):
        sending = asyncio.ensure_future(send(address, GET + b"NONSENSE\r\n\r\n"))
        assert await sending == b"", "the first request is still running: 400 would be taken for its answer"
        echo.hold.set()


async def test_a_client_that_never_reads_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "WRITE_TIMEOUT_S", 0.2)
    echo = Echo()
    echo.answer = b"x" * 16_000_000
    async with listening(echo) as (address, server):
        host, port = address.split(":")
        for last in (b"keep-alive", b"close"):
            _, writer = await asyncio.open_connection(host, int(port), limit=1024)
            writer.write(GET.replace(b"Host", b"Connection: " + last + b"\r\nHost"))
            async with asyncio.timeout(5):
                while not echo.requests or server.server_state.connections:  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(0.02)
            echo.requests.clear()
            writer.transport.abort()


async def test_connections_above_the_reserve_are_closed_at_once_and_none_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_RESERVED", 2)
    shed: list[int] = []
    limits = HttpLimits(connections_max=2, always=frozenset({"/healthz"}), on_shed=shed.append)
    async with listening(Echo(), limits) as (address, server):
        host, port = address.split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        assert statuses(await send(address, GET)) == [200]
        assert statuses(await send(address, GET.replace(b"healthz", b"v1"))) == [503]
        idle.append(await asyncio.open_connection(host, int(port)))
        assert await send(address, GET) == b""
        assert shed == [503, 503]
        for _, writer in idle:
            writer.close()
        async with asyncio.timeout(5):
            while server.server_state.connections:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
        assert not limits.by_address
