"""The client: one object that opens channels as they are needed, with TLS, token, deadlines, keepalive and safe
retries.

    with ducat.Client(payment_address="payments.internal:443", token=token, tls=ducat.TLS(ca="ca.pem")) as client:
        payment = client.payments.get_payment(checkout_id="CHK-1").payment

Channels are opened by the first call of a service, never by the import or the constructor, so that a client may be
made before a fork and used under gevent. A client may be shared by threads. `ducat.aio.Client` is the same for
asyncio.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc

from ducat.config import TLS, Config, Retry
from ducat.services import Executor, Ledger, Payments, Shards, Wallet

__all__ = ["Client"]

_Channel = TypeVar("_Channel")


class BaseClient(ABC, Generic[_Channel]):
    """What both clients share: what they were told, and one channel an address.

    ``address`` serves every service that has no address of its own; with no address at all, those of `ducat up` are
    used. ``token`` is a token, or a function that returns one (for tokens that change). ``timeout_s`` is the deadline
    of a unary call, all tries together; each call may have its own. ``retry=ducat.Retry(count_max=0)`` turns retries
    off. ``use_proxy`` lets calls beyond loopback go through the proxy of the environment (grpc_proxy, https_proxy); it needs ``tls``.

    Raises ValueError where a token would leave this machine, or a proxy would be used, without TLS.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        payment_address: str | None = None,
        wallet_address: str | None = None,
        ledger_address: str | None = None,
        executor_address: str | None = None,
        token: str | Callable[[], str] = "",
        tls: TLS | None = None,
        timeout_s: float = 10.0,
        retry: Retry | None = None,
        use_proxy: bool = False,
    ) -> None:
        self._config = Config.of(
            address=address,
            addresses={
                "payment": payment_address,
                "wallet": wallet_address,
                "ledger": ledger_address,
                "executor": executor_address,
            },
            token=token,
            tls=tls,
            timeout_s=timeout_s,
            retry=retry,
            use_proxy=use_proxy,
        )
        self._channels: dict[str, _Channel] = {}
        self._lock = threading.Lock()
        self._closed = False

    def channel(self, service: str) -> _Channel:
        """The channel of ``payment``, ``wallet``, ``ledger`` or ``executor``, for what the methods here do not cover.

        Its calls carry no token and no deadline of their own: add `metadata()`.
        """
        address = self._config.address_of(service)
        with self._lock:
            if self._closed:
                raise ValueError("the client is closed")
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = self._open(address)
            return channel

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The token and a new trace, for a call on `channel`."""
        import os

        return self._config.metadata(os.urandom(16).hex())

    @abstractmethod
    def _open(self, address: str) -> _Channel:
        """A channel to the address: what the sync and the asyncio client do differently."""

    def _service(self, cls: type[Any], name: str, service: str) -> Any:
        return cls(name, lambda: self.channel(service), self._config)

    def _forget(self) -> list[_Channel]:
        with self._lock:
            self._closed = True
            channels, self._channels = list(self._channels.values()), {}
        return channels


class Client(BaseClient[grpc.Channel]):
    """The blocking client. See `BaseClient` for its arguments."""

    @cached_property
    def payments(self) -> Payments:
        """Checkouts, refunds, payouts."""
        service: Payments = self._service(Payments, "ducat.payment.v1.PaymentService", "payment")
        return service

    @cached_property
    def executor(self) -> Executor:
        """What PSPs were asked, and which there are."""
        service: Executor = self._service(Executor, "ducat.executor.v1.ExecutorService", "executor")
        return service

    @cached_property
    def wallet(self) -> Wallet:
        """Accounts and transfers."""
        service: Wallet = self._service(Wallet, "ducat.wallet.v1.WalletService", "wallet")
        return service

    @cached_property
    def shards(self) -> Shards:
        """Shards and their snapshots."""
        service: Shards = self._service(Shards, "ducat.wallet.v1.ShardService", "wallet")
        return service

    @cached_property
    def ledger(self) -> Ledger:
        """Journal, trial balance, statements, breaks."""
        service: Ledger = self._service(Ledger, "ducat.ledger.v1.LedgerService", "ledger")
        return service

    def close(self) -> None:
        """Closes every channel; running calls are cancelled."""
        for channel in self._forget():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, address: str) -> grpc.Channel:
        options = self._config.options(address)
        if self._config.tls is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, self._config.tls.credentials(), options=options)
