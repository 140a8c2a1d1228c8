"""uvicorn's HTTP protocol with what it leaves open bounded: the head of a request has a size and a time to arrive in. What is
refused before the application sees it (no HTTP, too many connections, a head without end) is a problem document like any other.

Body size and time are bounded by the application (exchange.py), idle connections by uvicorn's keep-alive timeout.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.adapters.exchange import Receive, Response, Scope, Send, problem
from runtime import trace

__all__ = ["CONNECTIONS_MAX", "HEAD_BYTES_MAX", "HEAD_TIMEOUT_S", "BoundedHttpProtocol"]

CONNECTIONS_MAX = 4_096
"""Connections at once, idle ones included; above that every request gets a 503."""
HEAD_BYTES_MAX = 65_536
"""Bytes of a request's head that may be waiting for its end."""
HEAD_TIMEOUT_S = 10.0
"""How long a request's head may take to arrive, counted from the connection or from its first byte."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._is_in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._application = self.app
        self._concurrency_max, self.limit_concurrency = self.limit_concurrency, None  # uvicorn's own 503 is plain text

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_in_head:
            self._cancel_timer()
        elif not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(431)
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        crowd, limit = max(len(self.connections), len(self.tasks)), self._concurrency_max
        self.app = _overloaded if limit is not None and crowd >= limit else self._application
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400)

    def _refuse(self, status: int) -> None:
        self._cancel_timer()
        if not self.transport.is_closing():
            refusal, trace_id = _refusal(status)
            headers = (*refusal.headers, *_headers(refusal, trace_id), (b"connection", b"close"))
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], lines, refusal.body))
            self.transport.close()

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


_DETAILS = {
    400: ("INVALID_ARGUMENT", "this is not HTTP/1.1 as RFC 9112 defines it"),
    408: ("INVALID_ARGUMENT", "the head of the request did not come within {seconds:g} s"),
    431: ("INVALID_ARGUMENT", f"the head of a request may have at most {HEAD_BYTES_MAX} bytes"),
    503: ("OVERLOADED", "too many connections are open; try again"),
}


def _refusal(status: int) -> tuple[Response, bytes]:
    """The problem document, and the trace that it names: one of its own, since no request was read."""
    reason, detail = _DETAILS[status]
    with trace.bind():
        return problem(status, reason, detail.format(seconds=HEAD_TIMEOUT_S), "/"), trace.trace_id().encode()


def _headers(refusal: Response, trace_id: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (b"content-length", str(len(refusal.body)).encode()),
        (b"x-trace-id", trace_id),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    )


async def _overloaded(_scope: Scope, _receive: Receive, send: Send) -> None:
    """The application of requests that come while too many connections are open."""
    refusal, trace_id = _refusal(503)
    headers = [*refusal.headers, *_headers(refusal, trace_id), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": refusal.body})
