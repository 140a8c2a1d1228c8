"""A payment service in memory behind a real gRPC server of the runtime: its validation, errors and health."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ducat.payment.v1 import finding_pb2, payment_pb2, payment_service_pb2_grpc, payout_pb2
from gateway.adapters.app import GatewayApp
from gateway.adapters.payment import SERVICE_NAME, PaymentClient
from gateway.bootstrap import limits_of
from kernel.errors import AlreadyExists, DucatError, NotFound, PermissionDenied
from runtime.channel import open_channel
from runtime.grpc_server import GrpcServer
from runtime.http_server import make_server
from runtime.metrics import RpcMetrics
from runtime.settings import Settings

GOOD_SIGNATURE = "t=1,v1=good"


class FakePayment(payment_service_pb2_grpc.PaymentServiceServicer):
    """Keeps payments and payouts as the real one would answer them. ``failure`` is raised by every call where set."""

    def __init__(self) -> None:
        self.payments: dict[str, payment_pb2.Payment] = {}
        self.payouts: dict[str, payout_pb2.Payout] = {}
        self.requests: dict[str, Any] = {}
        self.findings: dict[str, finding_pb2.Finding] = {}
        self.finding_queries: list[finding_pb2.ListFindingsRequest] = []
        self.notifications: list[payment_pb2.RecordNotificationRequest] = []
        self.failure: DucatError | None = None

    async def CreatePayment(self, request: payment_pb2.CreatePaymentRequest, context: Any) -> Any:
        self._fail()
        replayed = self._replayed(f"payment {request.checkout_id}", request)
        if not replayed:
            self.payments[request.checkout_id] = _payment_of(request)
        return payment_pb2.CreatePaymentResponse(payment=self.payments[request.checkout_id], replayed=replayed)

    async def GetPayment(self, request: payment_pb2.GetPaymentRequest, context: Any) -> Any:
        self._fail()
        if request.checkout_id not in self.payments:
            raise NotFound(f"no payment {request.checkout_id!r}")
        return payment_pb2.GetPaymentResponse(payment=self.payments[request.checkout_id])

    async def GetCheckoutPage(self, request: payment_pb2.GetCheckoutPageRequest, context: Any) -> Any:
        self._fail()
        for payment in self.payments.values():
            if payment.checkout_url.endswith(f"/{request.page_key}"):
                return payment_pb2.GetCheckoutPageResponse(payment=payment)
        raise NotFound("no page has this address")

    async def ListFindings(self, request: finding_pb2.ListFindingsRequest, context: Any) -> Any:
        self._fail()
        self.finding_queries.append(request)
        return finding_pb2.ListFindingsResponse(findings=self.findings.values(), next_page_token="next")

    async def ResolveFinding(self, request: finding_pb2.ResolveFindingRequest, context: Any) -> Any:
        self._fail()
        finding = self.findings.get(request.finding_id)
        if finding is None:
            raise NotFound(f"no finding {request.finding_id!r}")
        finding.reason, finding.resolved_by = request.reason, request.resolved_by
        finding.resolve_time.FromMilliseconds(1_753_056_000_000)
        return finding_pb2.ResolveFindingResponse(finding=finding)

    async def CreatePayout(self, request: payout_pb2.CreatePayoutRequest, context: Any) -> Any:
        self._fail()
        replayed = self._replayed(f"payout {request.reference}", request)
        if not replayed:
            self.payouts[request.reference] = _payout_of(request)
        return payout_pb2.CreatePayoutResponse(payout=self.payouts[request.reference], replayed=replayed)

    async def GetPayout(self, request: payout_pb2.GetPayoutRequest, context: Any) -> Any:
        self._fail()
        if request.reference not in self.payouts:
            raise NotFound(f"no payout {request.reference!r}")
        return payout_pb2.GetPayoutResponse(payout=self.payouts[request.reference])

    async def RecordNotification(self, request: payment_pb2.RecordNotificationRequest, context: Any) -> Any:
        self._fail()
        if request.psp != "sandbox":
            raise NotFound(f"no provider {request.psp!r}", reason="PROVIDER_UNKNOWN")
        if request.headers.get("sandbox-signature") != GOOD_SIGNATURE:
            raise PermissionDenied("the signature does not hold", reason="SIGNATURE_INVALID")
        self.notifications.append(request)
        return payment_pb2.RecordNotificationResponse(applied_count=1)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _replayed(self, key: str, request: Any) -> bool:
        known = self.requests.setdefault(key, request)
        if known is not request and known != request:
            raise AlreadyExists(f"{key} was asked for before with other content")
        return known is not request


def page_key_of(checkout_id: str) -> str:
    """The real one is random."""
    return hashlib.sha256(checkout_id.encode()).hexdigest()[:32]


def _payment_of(request: payment_pb2.CreatePaymentRequest) -> payment_pb2.Payment:
    payment = payment_pb2.Payment(
        checkout_id=request.checkout_id,
        buyer_info=request.buyer_info,
        checkout_url=f"http://127.0.0.1:8080/checkout/{page_key_of(request.checkout_id)}",
        payment_orders=[
            payment_pb2.PaymentOrder(
                payment_order_id=spec.payment_order_id,
                checkout_id=request.checkout_id,
                seller_account=spec.seller_account,
                amount=spec.amount,
                state="PAYMENT_ORDER_STATE_NOT_STARTED",
                psp=spec.psp,
            )
            for spec in request.payment_orders
        ],
    )
    payment.create_time.FromMilliseconds(1_753_056_000_000)
    payment.update_time.FromMilliseconds(1_753_056_000_000)
    return payment


def _payout_of(request: payout_pb2.CreatePayoutRequest) -> payout_pb2.Payout:
    payout = payout_pb2.Payout(
        reference=request.reference,
        seller_account=request.seller_account,
        amount=request.amount,
        recipient=request.recipient,
        purpose=request.purpose,
        psp=request.psp or "sandbox",
        state="PAYOUT_STATE_HOLDING",
    )
    payout.recipient.account_number = payout.recipient.account_number[-4:]
    if payout.recipient.iban:
        payout.recipient.iban = payout.recipient.iban[-4:]
    payout.create_time.FromMilliseconds(1_753_056_000_000)
    payout.update_time.FromMilliseconds(1_753_056_000_000)
    return payout


@asynccontextmanager
async def gateway_over(fake: FakePayment, *, is_down: bool = False, **overrides: Any) -> AsyncIterator[GatewayApp]:
    """The real gateway application over a real channel to ``fake``, or to a port where nobody listens."""
    settings = Settings.load(overrides, environ={})
    metrics = RpcMetrics(registry=None)
    add = payment_service_pb2_grpc.add_PaymentServiceServicer_to_server
    methods = [name for name in dir(payment_service_pb2_grpc.PaymentServiceServicer) if name[0].isupper()]
    scopes = {f"/{SERVICE_NAME}/{name}": "payments.write" for name in methods}
    scopes[f"/{SERVICE_NAME}/RecordNotification"] = "notifications.write"
    server = GrpcServer(
        settings.model_copy(update={"auth_tokens_file": ""}), [(fake, add, SERVICE_NAME)], scopes, (), metrics, ()
    )
    address = await server.start("127.0.0.1:0")
    channel = open_channel("127.0.0.1:1" if is_down else address, settings)
    try:
        yield GatewayApp(settings, PaymentClient(channel), RpcMetrics("http", registry=None))
    finally:
        await channel.close()
        await server.stop()


@asynccontextmanager
async def serving(fake: FakePayment, *, is_down: bool = False, **overrides: Any) -> AsyncIterator[str]:
    """The gateway's URL: the real application behind the real HTTP server."""
    async with gateway_over(fake, is_down=is_down, **overrides) as app:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        server = make_server(app, limits=limits_of(Settings.load(overrides, environ={}), app))
        running = asyncio.get_running_loop().create_task(server.serve(sockets=[listening]))
        await server.is_listening.wait()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running
            listening.close()
