"""HTTP calls to one origin, for callers that must know whether a request left.

    pool = HttpPool("https://api.psp.example", timeout_s=10)
    reply = await pool.request("POST", "/v1/payment_intents", {"Authorization": …}, body)

`NotSent` says that the request certainly never left; `NoReply` that it may have left and no whole answer came: its outcome is
unknown.

A kept-alive connection that the peer closes just as we write on it gave no answer and took, in all likelihood, no request: the
request is sent once more, on a new connection. So callers send only what is safe to send twice: a GET, or a POST with an idempotency
key.

The wire format is httptools', which is llhttp in C; around it is one `asyncio.Protocol` with one exchange at a time. A general client
does the same exchange at three to four times the CPU (docs/checkout-cpu.md), and each checkout makes four of them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

__all__ = ["HttpPool", "NoReply", "NotSent", "Reply"]

CONNECTION_COUNT_MAX = 64
KEEPALIVE_S = 20.0
"""Idle connections older than this are not used again; servers close theirs after 30 s or more."""
BODY_BYTES_MAX = 1_048_576
HEAD_BYTES_MAX = 65_536
"""Bytes of an answer that may come before its body, interim answers (1xx) included."""
CONNECT_SHARE = 0.9
"""Part of the timeout that a connect may take."""

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BODILESS = frozenset({204, 304})


class NotSent(Exception):
    """No connection; the request never left."""


class NoReply(Exception):
    """The request left, at least in part, and no whole answer came."""


@dataclass(slots=True)
class Reply:
    """A whole answer: any status from 200 on. Header names in lower case."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class HttpPool:
    """Connections to one origin, such as ``http://127.0.0.1:8080``. A path in the base URL goes before every target."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        connection_count_max: int = CONNECTION_COUNT_MAX,
        body_bytes_max: int = BODY_BYTES_MAX,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url: expected http://host[:port][/path] or https://…, got {base_url!r}")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._origin = f"{self._host}:{self._port}"
        self._path = parts.path.rstrip("/")
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._host_header = f"{host}:{parts.port}" if parts.port else host
        _check_printable(self._path, self._host_header)
        self._timeout_s = timeout_s
        self._body_bytes_max = body_bytes_max
        self._count_max = connection_count_max
        self._count = 0
        """Connections that are open, or being opened."""
        self._idle: list[_Connection] = []
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_closed = False

    async def request(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None) -> Reply:
        """One exchange within the timeout. `target` is percent-encoded. Raises NotSent, NoReply; ValueError for a method, header or
        target that could not be sent as it is.
        """
        request = self._encode(method, target, headers, body)
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        connection = await self._take(deadline)
        is_repeat = False
        while True:
            try:
                return await connection.exchange(request, deadline)
            except _ClosedUnused as error:
                if is_repeat:
                    raise NoReply(f"no whole answer from {self._origin} ({error})") from error
            except _Broken as error:
                raise NoReply(f"no whole answer from {self._origin} ({error})") from error
            except TimeoutError as error:
                raise NoReply(f"no whole answer from {self._origin} within {self._timeout_s:g} s") from error
            finally:
                self._give(connection)
            is_repeat = True  # the first one may have arrived: from here on nothing is certainly not sent
            try:
                connection = await self._take(deadline, fresh=True)
            except NotSent as error:
                raise NoReply(str(error)) from error

    async def close(self) -> None:
        """Closes every idle connection; those in use are closed after their exchange."""
        self._is_closed = True
        while self._idle:
            self._drop(self._idle.pop())

    def _encode(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        if method not in _METHODS:
            raise ValueError(f"method: expected one of {', '.join(sorted(_METHODS))}, got {method!r}")
        _check_printable(target, *headers, *headers.values())
        if " " in target:
            raise ValueError(f"target: not percent-encoded: {target!r}")
        head = f"{method} {self._path}{target} HTTP/1.1\r\nHost: {self._host_header}\r\n"
        for name, value in headers.items():
            head += f"{name}: {value}\r\n"
        if body is not None or method != "GET":
            head += f"Content-Length: {len(body or b'')}\r\n"
        return f"{head}\r\n".encode("ascii") + (body or b"")

    # --- connections

    async def _take(self, deadline: float, *, fresh: bool = False) -> _Connection:
        """A connection for one exchange; a new one where it must be `fresh`."""
        loop = asyncio.get_running_loop()
        while True:
            while self._idle and not fresh:
                connection = self._idle.pop()  # the one used last, so that those that are not needed grow old
                if connection.is_usable and loop.time() - connection.idle_since < KEEPALIVE_S:
                    return connection
                self._drop(connection)
            if self._count >= self._count_max and self._idle:
                self._drop(self._idle.pop(0))
            if self._count < self._count_max:
                self._count += 1
                try:
                    return await self._open(deadline)
                except BaseException:
                    self._count -= 1
                    self._wake_one()
                    raise
            await self._wait_for_place(deadline)

    async def _wait_for_place(self, deadline: float) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout_at(deadline):
                await place
        except BaseException as error:
            if place in self._waiting:
                self._waiting.remove(place)
            else:
                self._wake_one()  # it was our turn, but we go
            if isinstance(error, TimeoutError):
                raise NotSent(f"no free connection to {self._origin} within {self._timeout_s:g} s") from error
            raise

    async def _open(self, deadline: float) -> _Connection:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        try:
            async with asyncio.timeout_at(begin + (deadline - begin) * CONNECT_SHARE):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._body_bytes_max), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            why = getattr(error, "strerror", None) or error
            raise NotSent(f"no connection to {self._origin} ({type(error).__name__}: {why})") from error
        return connection

    def _give(self, connection: _Connection) -> None:
        if connection.is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            self._drop(connection)
        self._wake_one()

    def _drop(self, connection: _Connection) -> None:
        self._count -= 1
        connection.abort()

    def _wake_one(self) -> None:
        if self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)


class _Broken(Exception):
    """The exchange ended without a whole answer."""


class _ClosedUnused(_Broken):
    """A kept-alive connection ended without a byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. Whatever is not a whole answer in its bounds ends the connection."""

    def __init__(self, body_bytes_max: int) -> None:
        self.is_usable = False
        """Whether another exchange may begin."""
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._body_bytes_max = body_bytes_max
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Reply] | None = None
        self._is_kept = False
        self._head_bytes = self._body_bytes = 0
        self._is_in_head = True
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    async def exchange(self, request: bytes, deadline: float) -> Reply:
        """Sends a request, returns its answer. Raises _ClosedUnused, _Broken, TimeoutError."""
        if self._transport is None or not self.is_usable:
            raise _ClosedUnused("the connection was closed")
        self.is_usable = False
        self._head_bytes = self._body_bytes = 0
        self._is_in_head = True
        self._headers, self._body = {}, []
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._waiter = waiter
        self._transport.write(request)
        timer = self._loop.call_at(deadline, self._expire)
        try:
            return await waiter
        finally:
            timer.cancel()
            self._waiter = None
            self._is_kept = True
            self.idle_since = self._loop.time()
            if not self.is_usable:
                self.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
        self.is_usable = False
        if self._transport is not None:
            self._transport.abort()

    def _expire(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError())

    def _fail(self, error: _Broken) -> None:
        self.is_usable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # --- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.is_usable = True

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        unused = self._is_kept and not self._head_bytes
        self._fail((_ClosedUnused if unused else _Broken)(f"the connection was closed{f': {error}' if error else ''}"))

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():  # nobody asked
            self.abort()
            return
        if self._is_in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(_Broken(f"{type(error).__name__}: {error.__context__ or error}"))
            return
        if self._is_in_head and self._head_bytes > HEAD_BYTES_MAX:
            self._fail(_Broken(f"more than {HEAD_BYTES_MAX} bytes without the end of the headers"))

    # --- the parser's callbacks; what they raise comes out of feed_data

    def on_message_begin(self) -> None:
        self.is_usable = False  # where an answer was complete: more than was asked for
        self._headers = {}
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > HEAD_BYTES_MAX:
            raise _Broken(f"headers of more than {HEAD_BYTES_MAX} bytes")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self._is_in_head = False
        headers = self._headers
        if not (status in _BODILESS or "content-length" in headers or "transfer-encoding" in headers):
            raise _Broken("an answer of unknown length: it may be cut off")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._body_bytes_max:
            raise _Broken(f"an answer of more than {self._body_bytes_max} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 or self._waiter is None or self._waiter.done():  # interim, or more than was asked for
            return
        self.is_usable = self._parser.should_keep_alive()
        self._waiter.set_result(Reply(status, b"".join(self._body), self._headers))


def _check_printable(*texts: str) -> None:
    for text in texts:
        if not (text.isascii() and text.isprintable()):
            raise ValueError(f"not a request line or header: {text[:40]!r}…")
