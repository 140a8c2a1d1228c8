"""The payment service, as the gateway calls it: values in, protobuf messages out, typed errors with the JSON's own
field paths.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ducat.common.v1 import common_pb2
from ducat.payment.v1 import finding_pb2, payment_pb2, payment_service_pb2_grpc, payout_pb2
from gateway.domain import Address, FindingQuery, PaymentEvent, PayoutRequest, Resolution
from kernel.errors import FieldViolation, InvalidArgument, Unavailable
from runtime.errors import from_rpc_error

__all__ = ["PaymentClient"]

SERVICE_NAME = "ducat.payment.v1.PaymentService"
HEALTH_TIMEOUT_S = 2.0

_Answer = TypeVar("_Answer")


class PaymentClient:
    """One channel to the payment service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._payment = payment_service_pb2_grpc.PaymentServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    async def create_payment(self, event: PaymentEvent) -> tuple[payment_pb2.Payment, bool]:
        """The payment, and whether it was there before. Raises AlreadyExists for the same id with other content."""
        buyer = event.buyer_info
        request = payment_pb2.CreatePaymentRequest(
            checkout_id=event.checkout_id,
            buyer_info=payment_pb2.BuyerInfo(buyer_id=buyer.buyer_id, name=buyer.name, email=buyer.email),
            payment_orders=[
                payment_pb2.PaymentOrderSpec(
                    payment_order_id=order.payment_order_id,
                    seller_account=order.seller_account,
                    amount=common_pb2.Money(currency_code=order.currency_code, amount_minor=order.amount_minor),
                    psp=order.psp,
                )
                for order in event.payment_orders
            ],
        )
        answer = await _called(self._payment.CreatePayment(request), _payment_path)
        return answer.payment, answer.replayed

    async def get_payment(self, checkout_id: str) -> payment_pb2.Payment:
        """Raises NotFound."""
        request = payment_pb2.GetPaymentRequest(checkout_id=checkout_id)
        return (await _called(self._payment.GetPayment(request))).payment

    async def get_page(self, page_key: str) -> payment_pb2.Payment:
        """The payment of a buyer's page. Raises NotFound, the same for every wrong key."""
        request = payment_pb2.GetCheckoutPageRequest(page_key=page_key)
        return (await _called(self._payment.GetCheckoutPage(request))).payment

    async def list_findings(self, query: FindingQuery) -> finding_pb2.ListFindingsResponse:
        """One page, newest first."""
        request = finding_pb2.ListFindingsRequest(
            page_size=query.page_size,
            page_token=query.page_token,
            open_only=query.open_only,
            kind=finding_pb2.FindingKind.Value(f"FINDING_KIND_{query.kind}") if query.kind else 0,  # type: ignore[arg-type]
            psp=query.psp,
            seller_account=query.seller_account,
            subject=finding_pb2.FindingSubject.Value(f"FINDING_SUBJECT_{query.subject}") if query.subject else 0,  # type: ignore[arg-type]
            reference=query.reference,
            checkout_id=query.checkout_id,
            start_time=query.start_time,
            end_time=query.end_time,
        )
        return await _called(self._payment.ListFindings(request))

    async def resolve_finding(self, finding_id: str, resolution: Resolution, resolved_by: str) -> finding_pb2.Finding:
        """Raises NotFound, FailedPrecondition for one that is resolved already, AlreadyExists for another use of the key."""
        request = finding_pb2.ResolveFindingRequest(
            finding_id=finding_id,
            reason=resolution.reason,
            request_id=resolution.request_id,
            resolved_by=resolved_by,
        )
        return (await _called(self._payment.ResolveFinding(request))).finding

    async def create_payout(self, payout: PayoutRequest) -> tuple[payout_pb2.Payout, bool]:
        """The payout, and whether it was there before. Raises AlreadyExists where its content was another one."""
        request = payout_pb2.CreatePayoutRequest(
            reference=payout.reference,
            seller_account=payout.seller_account,
            amount=common_pb2.Money(currency_code=payout.currency_code, amount_minor=payout.amount_minor),
            recipient=_bank_account(payout),
            purpose=payout.purpose,
            psp=payout.psp,
        )
        answer = await _called(self._payment.CreatePayout(request), _payout_path)
        return answer.payout, answer.replayed

    async def get_payout(self, reference: str) -> payout_pb2.Payout:
        """Raises NotFound."""
        return (await _called(self._payment.GetPayout(payout_pb2.GetPayoutRequest(reference=reference)))).payout

    async def record_notification(
        self, psp: str, body: bytes, headers: Mapping[str, str], *, is_payout: bool
    ) -> payment_pb2.RecordNotificationResponse:
        """Returns only after the notification is committed. Raises PermissionDenied for a bad signature."""
        channel = payment_pb2.NOTIFICATION_CHANNEL_PAYOUT if is_payout else payment_pb2.NOTIFICATION_CHANNEL_PAYMENT
        request = payment_pb2.RecordNotificationRequest(psp=psp, body=body, headers=headers, channel=channel)
        return await _called(self._payment.RecordNotification(request))

    async def check_health(self) -> None:
        """Raises Unavailable unless the payment service says that it serves."""
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        answer = await _called(self._health.Check(request, timeout=HEALTH_TIMEOUT_S))
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unavailable("the payment service does not serve yet; retry with backoff")


async def _called(call: Awaitable[_Answer], path_of: Callable[[str], str] | None = None) -> _Answer:
    """The answer of a call, or its error as the type that the payment service raised."""
    try:
        return await call
    except grpc.RpcError as error:
        typed = from_rpc_error(error)
        if isinstance(typed, InvalidArgument) and path_of is not None:
            typed.violations = tuple(FieldViolation(path_of(each.field), each.description) for each in typed.violations)
        raise typed from error


def _bank_account(payout: PayoutRequest) -> payout_pb2.BankAccount:
    recipient = payout.recipient
    account = payout_pb2.BankAccount(
        account_holder_name=recipient.account_holder_name,
        bank_name=recipient.bank_name,
        account_number=recipient.account_number,
        country_code=recipient.country_code,
        bic=recipient.bic,
        address=_postal_address(recipient.address),
    )
    setattr(account, recipient.identifier_field, recipient.identifier)
    return account


def _postal_address(address: Address | None) -> payout_pb2.PostalAddress | None:
    if address is None:
        return None
    return payout_pb2.PostalAddress(
        line1=address.line1,
        line2=address.line2,
        city=address.city,
        region=address.region,
        postal_code=address.postal_code,
        country_code=address.country_code,
    )


# --- field paths of the .proto → those of the JSON

_ORDER_AMOUNT = re.compile(r"\.amount\.(amount_minor|currency_code)$")


def _payment_path(path: str) -> str:
    return _ORDER_AMOUNT.sub(lambda match: ".amount" if match[1] == "amount_minor" else ".currency", path)


_PAYOUT_PATHS = {
    "reference": "your_reference_id",
    "amount.amount_minor": "amount.value",
    "amount.currency_code": "amount.currency",
    "recipient": "recipient_details",
    "recipient.bank_identifier": "recipient_details",
    "recipient.aba_routing_number": "recipient_details.routing_number",
}


def _payout_path(path: str) -> str:
    known = _PAYOUT_PATHS.get(path)
    if known is not None:
        return known
    return f"recipient_details.{path[10:]}" if path.startswith("recipient.") else path
