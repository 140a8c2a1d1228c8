"""A Valkey connection for the bus: commands out, replies in order, many callers on one connection.

The wire format is hiredis's, in C. redis.asyncio would do the same at three to four times the CPU for a command (measured in docs/bus.md),
and the bus sends about thirty commands for a checkout. Everything that is not the bus uses redis.asyncio.

Replies come back in the order of the commands, so the state is one queue of waiting calls. A connection that is lost fails every call that
waits, with ConnectionError: whether the server executed them is unknown. There is no reconnect here: `Link` opens the next one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from kernel.errors import NotPermitted, Unavailable

__all__ = ["Address", "Link", "ReplyError", "RespConnection", "parse_url"]

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 15.0
WATCH_INTERVAL_S = 2.0
Command = tuple[str | int | float | bytes | memoryview, ...]


class ReplyError(Exception):
    """The server's error reply to a command, such as `BUSYGROUP …`."""


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL says: `unix://:password@/path?db=0`, `redis://user:password@host:port/0`, `rediss://…` with TLS."""

    path: str = ""
    host: str = ""
    port: int = 6379
    user: str = ""
    password: str = ""
    database: int = 0
    tls: bool = False


def parse_url(url: str) -> Address:
    """Raises ValueError for a URL that is none of Address's forms."""
    parts = urlsplit(url)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.scheme == "unix":
        database = parse_qs(parts.query).get("db", ["0"])[0]
        return Address(path=unquote(parts.path), user=user, password=password, database=int(database))
    if parts.scheme not in ("redis", "rediss", "valkey", "valkeys"):
        raise ValueError(
            "redis_url: expected unix://, redis://, rediss://, valkey:// or valkeys://, got " + repr(parts.scheme)
        )
    return Address(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or 6379,
        user=user,
        password=password,
        database=int(parts.path.strip("/") or 0),
        tls=parts.scheme in ("rediss", "valkeys"),
    )


class RespConnection(asyncio.Protocol):
    """One connection. `call` sends commands in one write and returns their replies, errors as values of ReplyError."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(protocolError=ConnectionError, replyError=ReplyError)
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int, float]] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._replies: list[Any] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._lost: Exception | None = None
        self.client_id = 0

    @property
    def is_open(self) -> bool:
        """False from the moment the connection is lost or closed."""
        return self._lost is None and self._transport is not None

    def send(self, commands: Sequence[Command], timeout_s: float = CALL_TIMEOUT_S) -> asyncio.Future[list[Any]]:
        """Write commands at once; the future has their replies. It fails with ConnectionError when the connection is lost first, or
        closed because the replies took longer than `timeout_s`: later replies would be misread.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._lost is not None or self._transport is None:
            future.set_exception(self._lost or ConnectionError("not connected"))
            return future
        self._waiting.append((future, len(commands), self._loop.time() + timeout_s))
        pack: Any = hiredis.pack_command  # its stub says a tuple of one
        self._transport.write(b"".join([pack(command) for command in commands]))
        return future

    async def call(self, commands: Sequence[Command], timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """The replies of commands; raises ConnectionError as `send` does."""
        return await self.send(commands, timeout_s)

    def close(self, reason: Exception | None = None) -> None:
        """Close at once; calls that wait fail."""
        self._fail(reason or ConnectionError("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._look_for_silence()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                replies = self._replies
                replies.append(reply)
                future, count, _ = self._waiting[0]
                if len(replies) == count:
                    self._waiting.popleft()
                    self._replies = []
                    if not future.done():
                        future.set_result(replies)
        except Exception as error:  # not the protocol, or more replies than commands
            self.close(ConnectionError(f"Valkey sent what is no reply: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(ConnectionError(f"the connection to Valkey was lost{f': {error}' if error else ''}"))

    def _look_for_silence(self) -> None:
        """One timer a connection instead of one a call."""
        if self._waiting and self._waiting[0][2] < self._loop.time():
            self.close(ConnectionError("Valkey did not answer in time"))
        else:
            self._watch = self._loop.call_later(WATCH_INTERVAL_S, self._look_for_silence)

    def _fail(self, error: Exception) -> None:
        if self._lost is not None:
            return
        self._lost = error
        if self._watch is not None:
            self._watch.cancel()
        for future, _, _ in self._waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # a caller that was cancelled will not look
        self._waiting.clear()


class Link:
    """One shared connection that is opened when it is needed and opened again after it was lost."""

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._connection: RespConnection | None = None
        self._opening = asyncio.Lock()

    async def get(self) -> RespConnection:
        """The open connection. Raises Unavailable."""
        connection = self._connection
        if connection is not None and connection.is_open:
            return connection
        async with self._opening:
            if self._connection is None or not self._connection.is_open:
                self._connection = await open_connection(self._address, self._name)
            return self._connection

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """The replies of commands on the shared connection. Raises Unavailable or ConnectionError: then their effect is unknown."""
        return await (await self.get()).call(commands)

    @property
    def opened(self) -> RespConnection | None:
        """The connection if it is open now."""
        connection = self._connection
        return connection if connection is not None and connection.is_open else None

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        if self._connection is not None:
            self._connection.close()


_NOT_PERMITTED = ("WRONGPASS", "NOAUTH", "NOPERM", "ERR AUTH", "ERR invalid password", "ERR Client sent AUTH")


async def open_connection(address: Address, name: str) -> RespConnection:
    """Connect, authenticate, select. Raises Unavailable when the server is not there or not ready, NotPermitted when it refuses."""
    loop = asyncio.get_running_loop()
    connection: RespConnection | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            if address.path:
                _, connection = await loop.create_unix_connection(RespConnection, address.path)
            else:
                context = ssl.create_default_context() if address.tls else None
                _, connection = await loop.create_connection(RespConnection, address.host, address.port, ssl=context)
            hello: list[Command] = []
            if address.password:
                hello.append(("AUTH", address.user, address.password) if address.user else ("AUTH", address.password))
            if address.database:
                hello.append(("SELECT", address.database))
            hello += [("CLIENT", "SETNAME", name), ("CLIENT", "ID"), ("PING",)]
            replies = await connection.send(hello)
    except (OSError, TimeoutError) as error:
        if connection is not None:
            connection.close()
        where = address.path or f"{address.host}:{address.port}"
        raise Unavailable(
            f"Valkey does not answer at {where} ({type(error).__name__}: {error}); check DUCAT_REDIS_URL"
        ) from error
    for reply in replies:
        if isinstance(reply, ReplyError):
            connection.close()
            kind = NotPermitted if str(reply).startswith(_NOT_PERMITTED) else Unavailable
            raise kind(f"Valkey refuses the connection: {reply}")
    connection.client_id = int(replies[-2])
    return connection
