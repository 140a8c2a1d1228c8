"""One HTTP exchange: what a request is, what a response is, and how a body is read within its bounds. Plain ASGI.

There is no framework in between: a routing layer with middlewares costs more CPU than everything that the gateway
itself does for a call (docs/rest.md has the figures).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias

from gateway.adapters.views import encode
from kernel.errors import DucatError, InvalidArgument
from runtime import trace
from runtime.errors import RETRY_AFTER_KEY, http_status_of

__all__ = [
    "BODIES_BYTES_MAX",
    "BODY_TIMEOUT_S",
    "RETRY_AFTER_S",
    "BodyReader",
    "HttpProblem",
    "Receive",
    "Request",
    "Response",
    "Scope",
    "Send",
    "html",
    "json_response",
    "problem",
    "problem_of",
    "retry_after",
]

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header: TypeAlias = tuple[bytes, bytes]

BODY_TIMEOUT_S = 10.0
"""How long a client may take to send its body."""
BODIES_BYTES_MAX = 32 * 1024 * 1024
"""Of all bodies of one kind of request (webhooks, calls) that are arriving at once."""
BODIES_BYTES_PER_ADDRESS_MAX = BODIES_BYTES_MAX // 4
RETRY_AFTER_S = 2
"""What we ask of callers that may try again (429, 503, 504)."""

_JSON: Header = (b"content-type", b"application/json")
_PROBLEM: Header = (b"content-type", b"application/problem+json")
_HTML: Header = (b"content-type", b"text/html; charset=utf-8")
_RETRIED = frozenset({429, 503, 504})


@dataclass(slots=True)
class Request:
    """What a handler gets. ``argument`` is the variable part of the path, such as the checkout_id."""

    path: str
    argument: str
    headers: dict[bytes, bytes]
    scope: Scope
    receive: Receive
    body: bytes = b""


@dataclass(slots=True)
class Response:
    """What a handler gives."""

    status: int
    body: bytes
    headers: tuple[Header, ...] = ()


@dataclass(slots=True)
class HttpProblem(Exception):
    """A request that HTTP itself refuses (405, 413, 415, …), with the reason that comes nearest."""

    status: int
    detail: str
    reason: str = "INVALID_ARGUMENT"
    headers: tuple[Header, ...] = field(default=())


def json_response(status: int, value: Any, *headers: Header) -> Response:
    """A JSON answer."""
    return Response(status, encode(value), (_JSON, *headers))


def html(status: int, text: str, *headers: Header) -> Response:
    """An HTML page."""
    return Response(status, text.encode(), (_HTML, *headers))


def problem(
    status: int, reason: str, detail: str, instance: str, violations: tuple[dict[str, str], ...] = (), *headers: Header
) -> Response:
    """An RFC 9457 problem document. ``type`` names the reason, which is the same as in the gRPC API."""
    document: dict[str, Any] = {
        "type": f"urn:ducat:problem:{reason.lower().replace('_', '-')}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "reason": reason,
        "trace_id": trace.trace_id(),
    }
    if violations:
        document["violations"] = violations
    if status in _RETRIED and not any(name == b"retry-after" for name, _ in headers):
        headers = (*headers, retry_after(RETRY_AFTER_S))
    return Response(status, encode(document), (_PROBLEM, *headers))


def problem_of(error: DucatError | HttpProblem, instance: str) -> Response:
    """The problem document of an error."""
    if isinstance(error, HttpProblem):
        return problem(error.status, error.reason, error.detail, instance, (), *error.headers)
    violations: tuple[dict[str, str], ...] = ()
    if isinstance(error, InvalidArgument):
        violations = tuple({"field": each.field, "description": each.description} for each in error.violations)
    status = http_status_of(error)
    headers: tuple[Header, ...] = ((b"www-authenticate", b"Bearer"),) if status == 401 else ()
    if status in _RETRIED and error.metadata.get(RETRY_AFTER_KEY, "").isdecimal():
        headers = (retry_after(int(error.metadata[RETRY_AFTER_KEY])),)
    return problem(status, error.reason, error.message, instance, violations, *headers)


def retry_after(seconds: float) -> Header:
    """The header that asks a caller to wait: whole seconds, at least one."""
    return (b"retry-after", str(max(1, math.ceil(seconds))).encode())


class BodyReader:
    """Reads bodies: each within ``bytes_max`` and BODY_TIMEOUT_S, all that arrive at once within BODIES_BYTES_MAX, and those
    of one address within BODIES_BYTES_PER_ADDRESS_MAX.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held = 0
        self._held_by_address: dict[str, int] = {}

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises HttpProblem: 413 for one that is too large, 408 for a client that is too slow, 400 for one
        that is gone, 429 while too many bodies arrive from its address, 503 while too many arrive in all.
        """
        client = request.scope.get("client")
        address = client[0] if client else ""
        declared = request.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._bytes_max:
            raise self._too_large()
        held: list[int] = []
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read_all(request.receive, held, address)
        except TimeoutError:
            raise HttpProblem(408, f"the body did not come within {BODY_TIMEOUT_S:.0f} s", headers=(_CLOSE,)) from None
        finally:
            self._hold(address, -sum(held))

    def _hold(self, address: str, count: int) -> None:
        self._held += count
        left = self._held_by_address.get(address, 0) + count
        if left:
            self._held_by_address[address] = left
        else:
            self._held_by_address.pop(address, None)

    async def _read_all(self, receive: Receive, held: list[int], address: str) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HttpProblem(400, "the connection closed before the end of the body")
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self._bytes_max:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join((*parts, part)) if parts else part
            if not part:
                continue
            self._hold(address, len(part))
            held.append(len(part))
            if self._held_by_address[address] > BODIES_BYTES_PER_ADDRESS_MAX:
                raise HttpProblem(429, "too many bodies arrive at once from you; try again", "OVERLOADED", (_CLOSE,))
            if self._held > BODIES_BYTES_MAX:
                raise HttpProblem(503, "too many bodies arrive at once; try again", "OVERLOADED", (_CLOSE,))
            parts.append(part)

    def _too_large(self) -> HttpProblem:
        return HttpProblem(413, f"the body may have at most {self._bytes_max} bytes", headers=(_CLOSE,))


_CLOSE: Header = (b"connection", b"close")
