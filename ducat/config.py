"""How a client reaches the services: addresses, TLS, token, deadline, retries."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

__all__ = ["TLS", "Config", "Retry"]

SERVICES = ("payment", "wallet", "ledger", "executor")
DEVELOPMENT_ADDRESSES = {
    "payment": "127.0.0.1:50051",
    "executor": "127.0.0.1:50052",
    "wallet": "127.0.0.1:50053",
    "ledger": "127.0.0.1:50054",
}
"""Where `ducat up` listens; used where no address is given at all."""
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
KEEPALIVE_TIME_MS = 30_000
"""Servers allow a ping each 10 s."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Certificates, each as PEM bytes or as the path of a PEM file.

    ``ca`` is the authority of the servers (None: the system's). ``cert`` and ``key`` are ours, for mTLS; both or
    neither.
    """

    ca: bytes | str | os.PathLike[str] | None = None
    cert: bytes | str | os.PathLike[str] | None = None
    key: bytes | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS: cert and key belong together; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel; reads the files."""
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.cert))


def _pem(value: bytes | str | os.PathLike[str] | None) -> bytes | None:
    return value if value is None or isinstance(value, bytes) else Path(value).read_bytes()


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, and how patiently, a call is tried again where that is safe. Pauses grow twofold, with full jitter."""

    count_max: int = 5
    base_s: float = 0.1
    cap_s: float = 1.0

    def __post_init__(self) -> None:
        if self.count_max < 0 or self.base_s <= 0 or self.cap_s < self.base_s:
            raise ValueError("Retry: expected count_max >= 0 and 0 < base_s <= cap_s")

    def pause_s(self, failures: int, random: float) -> float:
        """Seconds before the next try after so many failures; ``random`` is in [0, 1)."""
        return min(self.cap_s, self.base_s * 2.0 ** (failures - 1)) * (0.1 + 0.9 * random)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that a client was told, checked."""

    addresses: Mapping[str, str]
    token: str | Callable[[], str]
    tls: TLS | None
    timeout_s: float
    retry: Retry
    use_proxy: bool = False
    message_bytes_max: int = MESSAGE_BYTES_MAX

    @classmethod
    def of(
        cls,
        *,
        address: str | None,
        addresses: Mapping[str, str | None],
        token: str | Callable[[], str],
        tls: TLS | None,
        timeout_s: float,
        retry: Retry | None,
        use_proxy: bool = False,
    ) -> Config:
        """Raises ValueError where a token would leave this machine in the clear, and for a deadline that is none."""
        found = {name: given or address or "" for name, given in addresses.items()}
        if not any(found.values()):
            found = dict(DEVELOPMENT_ADDRESSES)
        if timeout_s <= 0:
            raise ValueError(f"timeout_s: expected more than 0, got {timeout_s}")
        if token and tls is None:
            for name, each in found.items():
                if each and not is_loopback(each):
                    raise ValueError(
                        f"{name}_address {each}: a token would cross the network in the clear; "
                        "give tls=ducat.TLS(ca=…), or ducat.TLS() for the system's authorities"
                    )
        if use_proxy and tls is None:
            raise ValueError(
                "use_proxy: the proxy would read every message in the clear; "
                "give tls=ducat.TLS(ca=…), or ducat.TLS() for the system's authorities"
            )
        return cls(found, token, tls, timeout_s, retry or Retry(), use_proxy)

    def address_of(self, service: str) -> str:
        """Raises ValueError where the client was given no address for this service."""
        address = self.addresses[service]
        if not address:
            raise ValueError(f"this client has no address for {service}: give {service}_address=… or address=…")
        return address

    def options(self, address: str) -> list[tuple[str, int | str]]:
        """Of a channel to ``address``. The proxies of the environment are looked at only with use_proxy, and never on loopback."""
        return [
            ("grpc.enable_http_proxy", int(self.use_proxy and not is_loopback(address))),
            ("grpc.primary_user_agent", "ducat-python"),
            ("grpc.max_receive_message_length", self.message_bytes_max),
            ("grpc.max_send_message_length", self.message_bytes_max),
            ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]

    def metadata(self, trace_id: str) -> tuple[tuple[str, str], ...]:
        """Sent with each try of a call: the trace (one of a call, a span of each try) and the token."""
        trace = ("traceparent", f"00-{trace_id}-{os.urandom(8).hex()}-01")
        token = self.token() if callable(self.token) else self.token
        return (trace, ("authorization", f"Bearer {token}")) if token else (trace,)


def is_loopback(address: str) -> bool:
    """Whether a gRPC target cannot leave this machine."""
    host = address.rpartition(":")[0].strip("[]")
    return (
        address.startswith("unix:")
        or host in {"localhost", "::1"}
        or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
    )
