"""The client for asyncio: as `ducat.Client`, with awaitable methods.

async with ducat.aio.Client() as client:
    payment = (await client.payments.get_payment(checkout_id="CHK-1")).payment
    async with client.payments.watch_payment(checkout_id="CHK-1") as changes:
        async for change in changes:
            ...
"""

from __future__ import annotations

from functools import cached_property
from types import TracebackType

import grpc.aio

from ducat.client import BaseClient
from ducat.services import AsyncExecutor, AsyncLedger, AsyncPayments, AsyncShards, AsyncWallet

__all__ = ["Client"]


class Client(BaseClient[grpc.aio.Channel]):
    """The asyncio client; use it from one event loop. See `ducat.client.BaseClient` for its arguments."""

    @cached_property
    def payments(self) -> AsyncPayments:
        """Checkouts, refunds, payouts."""
        service: AsyncPayments = self._service(AsyncPayments, "ducat.payment.v1.PaymentService", "payment")
        return service

    @cached_property
    def executor(self) -> AsyncExecutor:
        """What PSPs were asked, and which there are."""
        service: AsyncExecutor = self._service(AsyncExecutor, "ducat.executor.v1.ExecutorService", "executor")
        return service

    @cached_property
    def wallet(self) -> AsyncWallet:
        """Accounts and transfers."""
        service: AsyncWallet = self._service(AsyncWallet, "ducat.wallet.v1.WalletService", "wallet")
        return service

    @cached_property
    def shards(self) -> AsyncShards:
        """Shards and their snapshots."""
        service: AsyncShards = self._service(AsyncShards, "ducat.wallet.v1.ShardService", "wallet")
        return service

    @cached_property
    def ledger(self) -> AsyncLedger:
        """Journal, trial balance, statements, breaks."""
        service: AsyncLedger = self._service(AsyncLedger, "ducat.ledger.v1.LedgerService", "ledger")
        return service

    async def close(self) -> None:
        """Closes every channel; running calls are cancelled."""
        for channel in self._forget():
            await channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self, address: str) -> grpc.aio.Channel:
        options = self._config.options(address)
        if self._config.tls is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, self._config.tls.credentials(), options=options)
