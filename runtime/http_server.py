"""The HTTP server of every process: uvicorn on httptools, with everything bounded that comes before the application.

Whatever a stranger sends costs a bounded number of bytes and seconds, and is refused with a problem document (RFC 9457):

    head        HEAD_BYTES_MAX, HEADER_COUNT_MAX, HEAD_TIMEOUT_S                        → 431, 408
    framing     what is neither head nor body (chunk sizes and extensions, trailers): FRAMING_BYTES_MAX → 400
    Host        exactly one, and a host's name; HTTP/1.0 may do without                 → 400
    trailers    dropped: nothing that a client sends after the body becomes a header
    pipelining  PIPELINE_MAX requests that wait behind one on a connection              → closed
    body        BODY_TIMEOUT_S until its end, whoever reads it                           → 408
    rest        of a body that nobody reads, after its answer: DRAIN_BYTES_MAX, DRAIN_TIMEOUT_S → closed
    reading     a client that does not take its answer: WRITE_TIMEOUT_S                 → closed
    connections `HttpLimits`: in all, and from one address; CONNECTIONS_RESERVED more are looked at, so that the paths of
                `HttpLimits.always` (health) are answered; above them                   → 503, 429, closed

The size of a body, and a shorter time for it, are the application's to bound: it knows what the body is for.
docs/decisions/0009-http-edge.md says why this is httptools and not h11.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from runtime import trace

__all__ = ["BoundedHttpProtocol", "HttpLimits", "make_server"]

HEAD_BYTES_MAX = 65_536
"""Of a request's head."""
HEADER_COUNT_MAX = 128
HEAD_TIMEOUT_S = 10.0
"""How long a request's head may take to arrive, counted from the connection or from its first byte."""
FRAMING_BYTES_MAX = 16_384
"""Bytes between a request's head and its end that are not body."""
PIPELINE_MAX = 16
BODY_TIMEOUT_S = 30.0
DRAIN_BYTES_MAX = 262_144
DRAIN_TIMEOUT_S = 2.0
WRITE_TIMEOUT_S = 20.0
KEEPALIVE_S = 30
HANDSHAKE_TIMEOUT_S = 10.0
"""Of TLS: before it is done a connection counts nowhere else."""
CONNECTIONS_MAX = 4_096
CONNECTIONS_RESERVED = 256
OPEN_FILES_WANTED = 16_384
RETRY_AFTER_S = 2
"""What we ask of a client that came when there were too many connections."""

_VERSIONS = ("1.1", "1.0")
_HOST = re.compile(rb"[\w.~!$&'()*+;=%:\[\]-]*", re.ASCII)
"""RFC 9112 §3.2: one Host, and nothing in it that another server could read as a second one."""


@dataclass(slots=True)
class HttpLimits:
    """How many connections one server takes, and which are open."""

    connections_max: int = CONNECTIONS_MAX
    connections_per_address_max: int = 0
    """From one remote address; 0 = as many as there are in all."""
    always: frozenset[str] = frozenset()
    """Paths that are answered, on a connection of their own, when there are too many connections."""
    unlimited_addresses: Callable[[str], bool] = lambda _address: False
    """Remote addresses that stand for many clients: our own proxies."""
    on_shed: Callable[[int], None] = lambda _status: None
    """Told of each connection or request that was refused for the number of connections."""
    by_address: dict[str, int] = field(default_factory=dict)


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, limits: HttpLimits | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits or HttpLimits()
        self._application = self.app
        self._address = ""
        self._is_in_head = True
        self._is_in_body = False
        self._is_deaf = False
        """Whatever still comes is thrown away."""
        self._has_new_message = False
        self._head_bytes = 0
        """Of the head that is arriving, as raw bytes; and of its parts, as the parser gives them."""
        self._head_parts_bytes = 0
        self._body_bytes = 0
        self._framing_bytes = 0
        self._unread_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # --- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self._limits
        self._address = self.client[0] if self.client else ""
        limits.by_address[self._address] = limits.by_address.get(self._address, 0) + 1
        if len(self.connections) > limits.connections_max + CONNECTIONS_RESERVED:
            limits.on_shed(503)
            self._is_deaf = True
            transport.abort()
            return
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_deaf = True
        self._cancel_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        left = self._limits.by_address.get(self._address, 0) - 1
        if left > 0:
            self._limits.by_address[self._address] = left
        else:
            self._limits.by_address.pop(self._address, None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()

    def _excess(self) -> int:
        """The status for a request that comes while too many connections are open, or 0."""
        limits = self._limits
        if len(self.connections) > limits.connections_max:
            return 503
        most = limits.connections_per_address_max
        if most and limits.by_address.get(self._address, 0) > most and not limits.unlimited_addresses(self._address):
            return 429
        return 0

    # --- what comes in

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        body_bytes = self._body_bytes
        self._has_new_message = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._end_after_this()  # this server has no other protocol, and the parser no longer knows this one
        except httptools.HttpParserCallbackError as error:
            refusal = error.__context__
            self._refuse(refusal.status if isinstance(refusal, _Refused) else 400)
        except httptools.HttpParserError:
            self._refuse(400)
        if self._is_deaf or self.transport.is_closing():
            return
        if self._is_in_head:
            self._count_head(len(data))
            return
        if self._is_in_body and self._timer is None:
            self._timer = self.loop.call_later(BODY_TIMEOUT_S, self._refuse, 408)
        if (
            not self._has_new_message
        ):  # the parser does not say where in `data` a message began: one read is not counted
            self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
            if self._framing_bytes > FRAMING_BYTES_MAX:
                self._refuse(400)

    def _count_head(self, count: int) -> None:
        if not self._has_new_message or not self._body_bytes:
            self._head_bytes += count
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(431)
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINE_MAX:
            raise _Refused(400)
        self._is_in_head = self._has_new_message = True
        self._is_in_body = False
        self._head_bytes = self._head_parts_bytes = self._body_bytes = self._framing_bytes = self._unread_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_parts_bytes += len(url)
        if self._head_parts_bytes > HEAD_BYTES_MAX:
            raise _Refused(431)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return  # a trailer
        self._head_parts_bytes += len(name) + len(value) + 4
        if self._head_parts_bytes > HEAD_BYTES_MAX or len(self.headers) >= HEADER_COUNT_MAX:
            raise _Refused(431)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in _VERSIONS:
            raise _Refused(400)
        hosts = [value for name, value in self.headers if name == b"host"]
        if (
            len(hosts) > 1
            or not all(map(_HOST.fullmatch, hosts))
            or (not hosts and self.parser.get_http_version() != "1.0")
        ):
            raise _Refused(400)
        self._cancel_timer()
        status = self._excess()
        path = self.url.partition(b"?")[0].decode("latin-1")
        self.app = self._application
        if status and path not in self._limits.always:
            self._limits.on_shed(status)
            self.app = partial(_shed, status)
        super().on_headers_complete()
        self._is_in_head = False
        self._is_in_body = True
        if status:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.cycle.response_complete:
            self._unread_bytes += len(body)
            if self._unread_bytes > DRAIN_BYTES_MAX:
                self._close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._cancel_timer()
        super().on_message_complete()
        if not self.cycle.keep_alive:
            self._is_deaf = True

    def _end_after_this(self) -> None:
        self._is_deaf = True
        if self.cycle is not None:
            self.cycle.keep_alive = False
            self.on_message_complete()

    # --- what goes out

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif self._is_in_body and self.cycle.response_complete:
            self._cancel_timer()
            self._timer = self.loop.call_later(DRAIN_TIMEOUT_S, self._close)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # it has read nothing all that time
        else:
            self._close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400)

    def _close(self) -> None:
        """Ends the connection; a client that does not take what was written has WRITE_TIMEOUT_S."""
        self._is_deaf = True
        self._cancel_timer()
        self._unset_keepalive_if_required()
        self.transport.close()
        if self.transport.get_write_buffer_size() and self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def _refuse(self, status: int) -> None:
        """Ends the connection, with a problem document where that cannot be taken for the answer to another request."""
        if self._is_deaf or self.transport.is_closing():
            return
        cycle = self.cycle
        is_answering = cycle is not None and not cycle.response_complete
        is_about_it = self._is_in_body and not self.pipeline and cycle is not None and not cycle.response_started
        if (not is_answering and not self._is_in_body) or (is_answering and is_about_it):
            self.transport.write(_refusal_bytes(status, "body" if self._is_in_body else "head"))
        if is_answering:
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        self._close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Refused(Exception):
    """A head or a message that is over a limit; raised through the parser."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_DETAILS = {
    400: ("INVALID_ARGUMENT", "this is not HTTP/1.1 as RFC 9112 defines it, or holds more framing than content"),
    408: ("INVALID_ARGUMENT", "the {part} of the request did not come within {seconds:g} s"),
    429: ("OVERLOADED", "too many connections are open from this address; close some, or use one for many requests"),
    431: (
        "INVALID_ARGUMENT",
        f"the head of a request may have at most {HEAD_BYTES_MAX} bytes and {HEADER_COUNT_MAX} headers",
    ),
    503: ("OVERLOADED", "too many connections are open; try again"),
}


def _refusal(status: int, part: str = "head") -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of the problem document; it names a trace of its own, since no request was read."""
    reason, detail = _DETAILS[status]
    trace_id = trace.new()[3:35]
    document = {
        "type": f"urn:ducat:problem:{reason.lower().replace('_', '-')}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail.format(part=part, seconds=HEAD_TIMEOUT_S if part == "head" else BODY_TIMEOUT_S),
        "instance": "/",
        "reason": reason,
        "trace_id": trace_id,
    }
    body = json.dumps(document, separators=(",", ":")).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-trace-id", trace_id.encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"connection", b"close"),
    ]
    if status in (429, 503):
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    return headers, body


def _refusal_bytes(status: int, part: str) -> bytes:
    headers, body = _refusal(status, part)
    return b"%b%b\r\n%b" % (STATUS_LINE[status], b"".join(b"%b: %b\r\n" % header for header in headers), body)


async def _shed(status: int, _scope: Any, _receive: Any, send: Any) -> None:
    """The application of requests that come while too many connections are open."""
    headers, body = _refusal(status)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    """uvicorn's server on sockets of ours: signals are the process's own, and a TLS handshake has a time limit."""

    capture_signals = contextlib.nullcontext  # type: ignore[assignment]

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        for each in sockets or ():
            each.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )  # accepted ones inherit it; asyncio sets it only for some
        handshake_s = HANDSHAKE_TIMEOUT_S if config.ssl else None

        def create_protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            return make(config=config, server_state=self.server_state, app_state={}, _loop=loop)  # type: ignore[no-any-return]

        self.servers = [
            await loop.create_server(
                create_protocol,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=handshake_s,
            )
            for each in sockets or ()
        ]
        self.started = True
        self.is_listening.set()


def make_server(
    app: Any,
    *,
    limits: HttpLimits | None = None,
    grace_s: float = 5.0,
    trusted_proxies: str = "",
    cert_file: str = "",
    key_file: str = "",
    client_ca_file: str = "",
) -> _Server:
    """A server for an ASGI application; run it with ``await server.serve(sockets=[…])``, end it with ``should_exit``.

    ``trusted_proxies`` are addresses or networks, separated by commas, whose X-Forwarded-For is believed. ``client_ca_file`` makes
    callers show a certificate of that authority.
    """
    _raise_open_files()
    config = uvicorn.Config(
        app,
        http=partial(BoundedHttpProtocol, limits=limits or HttpLimits()),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=trusted_proxies or None,
        timeout_keep_alive=KEEPALIVE_S,
        timeout_graceful_shutdown=max(1, int(grace_s)),
        ssl_certfile=cert_file or None,
        ssl_keyfile=key_file or None,
        ssl_ca_certs=client_ca_file or None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if client_ca_file else ssl.CERT_NONE,
    )
    config.load()
    return _Server(config)


def _raise_open_files() -> None:
    """As many open files as the connections need, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(OPEN_FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
