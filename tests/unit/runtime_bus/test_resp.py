"""The Valkey connection against a server that answers byte by byte, late, wrongly or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kernel.errors import Unavailable
from runtime.bus import _resp
from runtime.bus._resp import Address, ReplyError, RespConnection, open_connection, parse_url

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def connected(tmp_path: Path, answer: Answer) -> tuple[asyncio.Server, RespConnection]:
    path = str(tmp_path / "s")
    server = await asyncio.start_unix_server(answer, path)
    _, connection = await asyncio.get_running_loop().create_unix_connection(RespConnection, path)
    return server, connection


async def test_replies_meet_their_calls_however_they_are_cut(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        for byte in b"+OK\r\n:7\r\n$5\r\nab\r\nc\r\n*2\r\n:1\r\n-ERR inner\r\n-ERR outer\r\n$-1\r\n":
            writer.write(bytes([byte]))
            await writer.drain()
        writer.close()

    server, connection = await connected(tmp_path, answer)
    first, second, third = (
        connection.send([("A",), ("B",)]),
        connection.send([("C",)]),
        connection.send([("D",), ("E",), ("F",)]),
    )
    assert await first == [b"OK", 7]
    assert await second == [b"ab\r\nc"]
    array, outer, nil = await third
    assert array[0] == 1
    assert isinstance(array[1], ReplyError)
    assert str(outer) == "ERR outer"
    assert nil is None
    server.close()


async def test_lost_connection_fails_every_call_that_waits(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"+ONE\r\n")
        writer.close()

    server, connection = await connected(tmp_path, answer)
    first, second = connection.send([("A",)]), connection.send([("B",)])
    assert await first == [b"ONE"]
    with pytest.raises(ConnectionError, match="lost"):
        await second
    assert not connection.is_open
    with pytest.raises(ConnectionError):
        await connection.call([("C",)])
    server.close()


async def test_server_that_sends_nonsense_is_left(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server, connection = await connected(tmp_path, answer)
    with pytest.raises(ConnectionError, match="no reply"):
        await connection.call([("A",)])
    assert not connection.is_open
    server.close()


async def test_silent_server_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resp, "WATCH_INTERVAL_S", 0.01)
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    server, connection = await connected(tmp_path, answer)
    with pytest.raises(ConnectionError, match="in time"):
        await connection.call([("A",)], timeout_s=0.02)
    await ended.wait()
    server.close()


async def test_refused_password_is_said(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"-WRONGPASS invalid username-password pair\r\n+OK\r\n:3\r\n+PONG\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(answer, str(tmp_path / "s"))
    with pytest.raises(Unavailable, match="WRONGPASS"):
        await open_connection(Address(path=str(tmp_path / "s"), password="x"), "test")
    server.close()


async def test_missing_server_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="DUCAT_REDIS_URL"):
        await open_connection(Address(path=str(tmp_path / "nobody")), "test")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix://:p%40ss@/run/v.sock?db=2", Address(path="/run/v.sock", password="p@ss", database=2)),
        ("unix:///run/v.sock", Address(path="/run/v.sock")),
        ("redis://127.0.0.1:7000/3", Address(host="127.0.0.1", port=7000, database=3)),
        ("rediss://u:p@valkey.example", Address(host="valkey.example", user="u", password="p", tls=True)),
    ],
)
def test_url_forms(url: str, address: Address) -> None:
    assert parse_url(url) == address


def test_other_urls_are_refused() -> None:
    with pytest.raises(ValueError, match="expected unix"):
        parse_url("http://127.0.0.1")
