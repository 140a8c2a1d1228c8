"""A payment servicer that does what a test tells it to, and servers and channels on loopback around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from ducat.payment.v1 import payment_pb2, payment_service_pb2_grpc
from ducat.wallet.v1 import wallet_pb2, wallet_service_pb2_grpc
from runtime.channel import Channel, open_channel
from runtime.grpc_server import GrpcServer
from runtime.metrics import RpcMetrics
from runtime.settings import Settings

SERVICE = "ducat.payment.v1.PaymentService"
WALLET = "ducat.wallet.v1.WalletService"
SCOPES = {
    f"/{SERVICE}/GetPayment": "payments.read",
    f"/{SERVICE}/ListPayments": "payments.read",
    f"/{SERVICE}/CancelPayment": "payments.write",
    f"/{SERVICE}/WatchPayment": "payments.read",
    f"/{WALLET}/SubmitTransfers": "wallet.write",
    f"/{WALLET}/CreateTransfers": "wallet.write",
}


class PaymentServicer(payment_service_pb2_grpc.PaymentServiceServicer):
    """Get, List, Cancel and WatchPayment run `behaviour`; CreateRefund has no scope; nothing else is served."""

    def __init__(self, behaviour: Callable[[Any, Any], Awaitable[Any]] | None = None) -> None:
        self.behaviour = behaviour
        self.calls = 0

    async def _run(self, request: Any, context: Any) -> Any:
        self.calls += 1
        return None if self.behaviour is None else await self.behaviour(request, context)

    async def GetPayment(self, request: Any, context: Any) -> payment_pb2.GetPaymentResponse:
        await self._run(request, context)
        return payment_pb2.GetPaymentResponse(payment=payment_pb2.Payment(checkout_id=request.checkout_id))

    async def ListPayments(self, request: Any, context: Any) -> payment_pb2.ListPaymentsResponse:
        await self._run(request, context)
        return payment_pb2.ListPaymentsResponse()

    async def CancelPayment(self, request: Any, context: Any) -> payment_pb2.CancelPaymentResponse:
        await self._run(request, context)
        return payment_pb2.CancelPaymentResponse()

    async def CreateRefund(self, request: Any, context: Any) -> payment_pb2.CreateRefundResponse:
        return payment_pb2.CreateRefundResponse()

    async def WatchPayment(self, request: Any, context: Any) -> AsyncIterator[payment_pb2.WatchPaymentResponse]:
        for _ in range(2):
            yield payment_pb2.WatchPaymentResponse(payment=payment_pb2.Payment(checkout_id=request.checkout_id))
        await self._run(request, context)


class WalletServicer(wallet_service_pb2_grpc.WalletServiceServicer):
    """Only there for the methods that raw handlers take over."""


async def submit_raw(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    """Answers each message with its length, so that a test sees that raw bytes came through."""
    async for raw in requests:
        assert isinstance(raw, bytes)
        if raw == wallet_pb2.SubmitTransfersRequest().SerializeToString():
            raise RuntimeError("an empty batch")
        yield wallet_pb2.SubmitTransfersResponse(
            result=wallet_pb2.TransferBatchResult(batch_id=len(raw))
        ).SerializeToString()


RAW = grpc.method_handlers_generic_handler(
    WALLET, {"SubmitTransfers": grpc.stream_stream_rpc_method_handler(submit_raw)}
)


def load(**overrides: Any) -> Settings:
    """Settings of a test: nothing of this machine's environment."""
    return Settings.load({"shutdown_grace_ms": 2000, **overrides}, environ={})


@asynccontextmanager
async def serving(
    servicer: PaymentServicer, settings: Settings, metrics: RpcMetrics | None = None, **named: Any
) -> AsyncIterator[GrpcServer]:
    """A server of `servicer` on a free port."""
    server = GrpcServer(
        settings,
        [
            (servicer, payment_service_pb2_grpc.add_PaymentServiceServicer_to_server, SERVICE),
            (WalletServicer(), wallet_service_pb2_grpc.add_WalletServiceServicer_to_server, WALLET),
        ],
        SCOPES,
        [RAW],
        metrics,
        **named,
    )
    await server.start("127.0.0.1:0")
    try:
        yield server
    finally:
        await server.stop(0.2)


@asynccontextmanager
async def served(
    servicer: PaymentServicer, settings: Settings, **named: Any
) -> AsyncIterator[tuple[payment_service_pb2_grpc.PaymentServiceAsyncStub, GrpcServer, Channel]]:
    """A stub of our own channel to a server of `servicer`, with the same settings on both sides."""
    async with serving(servicer, settings, **named) as server, open_channel(server.address, settings) as channel:
        yield payment_service_pb2_grpc.PaymentServiceStub(channel), server, channel  # type: ignore[misc]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Waits for a condition that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
