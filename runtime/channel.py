"""Channels to other processes: token, trace, deadline, TLS and keepalive on every call.

grpc.aio's client interceptors make a task and an interceptor object a call; this wrapper adds the same metadata in
about a microsecond, by standing in front of the channel's own multicallables. Errors stay grpc.RpcError: see
errors.from_rpc_error.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from runtime import telemetry, trace
from runtime.logs import get_logger
from runtime.security import RELOAD_INTERVAL_S, channel_credentials
from runtime.settings import Settings, SettingsInvalid, is_loopback

__all__ = ["CHANNEL_OPTIONS", "Channel", "open_channel", "proxy_option"]

KEEPALIVE_TIME_MS = 30_000
"""A ping after so much silence. The server allows one each 10 s (grpc_server.KEEPALIVE_MIN_MS)."""

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_logger = get_logger("channel")


def proxy_option(address: str, settings: Settings) -> tuple[str, int]:
    """Whether a channel looks at the proxies of the environment: only with ``grpc_proxy``, and never on loopback."""
    return ("grpc.enable_http_proxy", int(settings.grpc_proxy and not is_loopback(address)))


def open_channel(address: str, settings: Settings) -> Channel:
    """A channel to ``address`` with the token, certificates and limits of ``settings``. Connects at the first call."""
    options = (
        *CHANNEL_OPTIONS,
        proxy_option(address, settings),
        ("grpc.max_receive_message_length", settings.grpc_message_bytes_max),
        ("grpc.max_send_message_length", settings.grpc_message_bytes_max),
    )
    return Channel(address, settings, options)


class Channel(grpc.aio.Channel):
    """A grpc.aio.Channel for the generated stubs. Unary calls without a timeout get request_deadline_ms; streams get
    none.

    Where certificates are used and their files change, the next call opens a new connection with the new ones; calls
    that run stay on the old one, which is closed at the rotation after.
    """

    def __init__(self, address: str, settings: Settings, options: Sequence[tuple[str, int | str]]) -> None:
        self._address = address
        self._settings = settings
        self._options = list(options)
        self._timeout_s = settings.request_deadline_ms / 1000
        token = settings.auth_token.get_secret_value()
        if token and not settings.tls_ca_file and not is_loopback(address):
            raise SettingsInvalid(f"{address}: auth_token would cross the network in the clear; set tls_ca_file")
        self._fixed_metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {token}"),) if token else ()
        self._certificate_files = [
            path
            for path in (settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file)
            if path and settings.tls_ca_file
        ]
        self._certificate_version = self._read_certificate_version()
        self._look_again_s = time.monotonic() + RELOAD_INTERVAL_S
        self._retired: grpc.aio.Channel | None = None
        self._closing: asyncio.Future[None] | None = None
        self._inner = self._open()

    def _open(self) -> grpc.aio.Channel:
        credentials = channel_credentials(self._settings)
        if credentials is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        return grpc.aio.secure_channel(self._address, credentials, options=self._options)

    def _read_certificate_version(self) -> tuple[int, ...]:
        return tuple(os.stat(path).st_mtime_ns for path in self._certificate_files if os.path.exists(path))

    def look_for_certificates_again(self) -> None:
        """Lets the next call look at the files at once, instead of within RELOAD_INTERVAL_S."""
        self._look_again_s = 0.0

    def reload_certificates(self) -> bool:
        """Opens a new connection where the files of our certificates have changed; calls that run keep the old one."""
        version = self._read_certificate_version()
        if version == self._certificate_version:
            return False
        try:
            fresh = self._open()
        except SettingsInvalid as error:
            _logger.warning("certificate not reloaded, the old one stays in force", reason=str(error))
            return False
        self._certificate_version = version
        before, self._retired, self._inner = self._retired, self._inner, fresh
        if before is not None:  # two rotations ago: what still runs there has had its time
            self._closing = asyncio.ensure_future(before.close())
        return True

    def current(self) -> grpc.aio.Channel:
        """The channel below. Looks for new certificates, where they are used, at most every RELOAD_INTERVAL_S."""
        if self._certificate_files and time.monotonic() >= self._look_again_s:
            self._look_again_s = time.monotonic() + RELOAD_INTERVAL_S
            self.reload_certificates()
        return self._inner

    def metadata(self, traceparent: str, extra: Any) -> tuple[tuple[str, str | bytes], ...]:
        """What goes out with a call: trace, token, and what the caller gave."""
        return (("traceparent", traceparent), *self._fixed_metadata, *(extra or ()))

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        return _Call(self, "unary_unary", method, arguments, named, self._timeout_s)

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        return _Call(self, "unary_stream", method, arguments, named, None)

    def stream_unary(self, method: str, *arguments: Any, **named: Any) -> Any:
        return _Call(self, "stream_unary", method, arguments, named, None)

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Any:
        return _Call(self, "stream_stream", method, arguments, named, None)

    async def close(self, grace: float | None = None) -> None:
        if self._retired is not None:
            await self._retired.close(grace)
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(None)


class _Call:
    """One method of one channel: adds metadata and the default deadline, then calls through."""

    __slots__ = ("_arguments", "_bound_to", "_channel", "_kind", "_method", "_multicallable", "_named", "_timeout_s")

    def __init__(
        self,
        channel: Channel,
        kind: str,
        method: str,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        timeout_s: float | None,
    ) -> None:
        self._channel = channel
        self._kind = kind
        self._method = method
        self._arguments = arguments
        self._named = named
        self._timeout_s = timeout_s
        self._bind()

    def _bind(self) -> None:
        self._bound_to = self._channel.current()
        self._multicallable = getattr(self._bound_to, self._kind)(self._method, *self._arguments, **self._named)

    def __call__(self, *request: Any, timeout: float | None = None, metadata: Any = None, **named: Any) -> Any:
        if self._bound_to is not self._channel.current():
            self._bind()
        finish = None
        if telemetry.spans is None:
            traceparent = trace.child()
        else:
            traceparent, finish = telemetry.spans.client(self._method)
        call = self._multicallable(
            *request,
            timeout=self._timeout_s if timeout is None else timeout,
            metadata=self._channel.metadata(traceparent, metadata),
            **named,
        )
        if finish is not None:
            call.add_done_callback(finish)
        return call
