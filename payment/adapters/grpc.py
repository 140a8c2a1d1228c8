"""The gRPC servicer: messages in, use cases, messages out. Errors are raised as they are; the server maps them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, Generic, NoReturn, Protocol, TypeVar, cast

from ducat.payment.v1 import finding_pb2, payment_pb2, payment_service_pb2_grpc, payout_pb2
from kernel.errors import FieldViolation, InvalidArgument, Unimplemented
from payment.domain.bank_account import BANK_SCHEMES, BankAccount, PostalAddress
from payment.domain.finding import Finding, FindingKind, FindingSubject
from payment.domain.payment import Buyer, Payment
from payment.domain.payment_order import PaymentOrder
from payment.domain.payout import Payout, PayoutState
from payment.domain.refund import Refund
from payment.domain.requests import OrderSpec, PaymentRequest, PayoutRequest
from payment.service.findings import Findings
from payment.service.notifications import Notifications
from payment.service.payments import Payments
from payment.service.payouts import Payouts
from payment.service.ports import FindingFilter, PaymentFilter, PayoutFilter, Resolution, Subject
from runtime import trace
from runtime.logs import get_logger
from runtime.security import current_caller

__all__ = ["SCOPES", "SERVICE", "PaymentServicer"]

SERVICE = "ducat.payment.v1.PaymentService"
SCOPES = {
    f"/{SERVICE}/{method}": scope
    for scope, methods in {
        "payments.read": "GetPayment GetCheckoutPage ListPayments WatchPayment GetRefund ListRefunds ListFindings",
        "payments.write": "CreatePayment CancelPayment CreateRefund ResolveFinding",
        "payouts.read": "GetPayout ListPayouts",
        "payouts.write": "CreatePayout CancelPayout",
        "payouts.instruct": "GetPayoutInstruction",
        "notifications.write": "RecordNotification",
    }.items()
    for method in methods.split()
}
"""The scope that each method needs."""

PAGE_BYTES_MAX = 3 * 1024 * 1024
"""A page of a list ends before the item that would make it larger, were it not the first: gRPC's own limit of a message is 4 MiB in
every language, where nobody sets another.
"""
_FRAME_BYTES = 6
"""At most, before each item of a repeated field: its tag and its length."""

_logger = get_logger("payment")

Item = TypeVar("Item")


class _Sized(Protocol):
    def ByteSize(self) -> int: ...


Sized = TypeVar("Sized", bound=_Sized)


class _Page(Generic[Item, Sized]):
    """The messages of a page, as many as PAGE_BYTES_MAX lets in. One that alone is larger is made `shorter`."""

    def __init__(self, message_of: Callable[[Item], Sized], shorter: Callable[[Sized], None]) -> None:
        self.messages: list[Sized] = []
        self._message_of = message_of
        self._shorter = shorter
        self._bytes = 0

    def fits(self, item: Item) -> bool:
        message = self._message_of(item)
        size = message.ByteSize() + _FRAME_BYTES
        if size > PAGE_BYTES_MAX:
            self._shorter(message)
            size = message.ByteSize() + _FRAME_BYTES
        if self.messages and self._bytes + size > PAGE_BYTES_MAX:
            return False
        self._bytes += size
        self.messages.append(message)
        return True

    def left_count(self) -> int:
        return max(PAGE_BYTES_MAX - self._bytes, 0) * len(self.messages) // max(self._bytes, 1)


class PaymentServicer(payment_service_pb2_grpc.PaymentServiceServicer):
    """Serves ducat.payment.v1.PaymentService. Requests were validated against the field rules of the contract
    before.
    """

    def __init__(
        self,
        payments: Payments,
        payouts: Payouts,
        notifications: Notifications,
        findings: Findings,
        gateway_url: str,
    ) -> None:
        self._payments = payments
        self._payouts = payouts
        self._notifications = notifications
        self._findings = findings
        self._checkout_base = f"{gateway_url.rstrip('/')}/checkout/"

    # --- payments

    async def CreatePayment(
        self, request: payment_pb2.CreatePaymentRequest, context: Any
    ) -> payment_pb2.CreatePaymentResponse:
        """Creates a payment; idempotent by checkout_id."""
        payment, replayed = await self._payments.create(_payment_request(request), trace.current())
        _logger.info("payment created", checkout_id=payment.checkout_id, orders=len(payment.orders), replayed=replayed)
        return payment_pb2.CreatePaymentResponse(payment=self._payment(payment), replayed=replayed)

    async def GetPayment(self, request: payment_pb2.GetPaymentRequest, context: Any) -> payment_pb2.GetPaymentResponse:
        """Reads one payment."""
        return payment_pb2.GetPaymentResponse(payment=self._payment(await self._payments.get(request.checkout_id)))

    async def GetCheckoutPage(
        self, request: payment_pb2.GetCheckoutPageRequest, context: Any
    ) -> payment_pb2.GetCheckoutPageResponse:
        """Reads the payment of a buyer's page."""
        return payment_pb2.GetCheckoutPageResponse(payment=self._payment(await self._payments.page(request.page_key)))

    async def ListPayments(
        self, request: payment_pb2.ListPaymentsRequest, context: Any
    ) -> payment_pb2.ListPaymentsResponse:
        """Lists payments, newest first."""
        wanted = PaymentFilter(request.buyer_id, request.seller_account, request.open_only, request.has_findings)
        page = _Page(self._payment, _without_histories)
        _, token = await self._payments.list(wanted, request.page_size, request.page_token, page)
        return payment_pb2.ListPaymentsResponse(payments=page.messages, next_page_token=token)

    async def CancelPayment(
        self, request: payment_pb2.CancelPaymentRequest, context: Any
    ) -> payment_pb2.CancelPaymentResponse:
        """Cancels every order that is not paid yet."""
        payment = await self._payments.cancel(request.checkout_id, request.reason)
        _logger.info("payment cancel requested", checkout_id=request.checkout_id)
        return payment_pb2.CancelPaymentResponse(payment=self._payment(payment))

    async def WatchPayment(
        self, request: payment_pb2.WatchPaymentRequest, context: Any
    ) -> AsyncIterator[payment_pb2.WatchPaymentResponse]:
        """Streams the payment at once and after each change until it is done."""
        async for payment in self._payments.watch(request.checkout_id):
            yield payment_pb2.WatchPaymentResponse(payment=self._payment(payment))

    # --- refunds: part of the contract, not served yet

    async def CreateRefund(self, request: Any, context: Any) -> NoReturn:
        """Not served yet."""
        raise _refunds_unimplemented("CreateRefund")

    async def GetRefund(self, request: Any, context: Any) -> NoReturn:
        """Not served yet."""
        raise _refunds_unimplemented("GetRefund")

    async def ListRefunds(self, request: Any, context: Any) -> NoReturn:
        """Not served yet."""
        raise _refunds_unimplemented("ListRefunds")

    # --- payouts

    async def CreatePayout(
        self, request: payout_pb2.CreatePayoutRequest, context: Any
    ) -> payout_pb2.CreatePayoutResponse:
        """Asks for a payout; idempotent by reference."""
        payout, replayed = await self._payouts.create(_payout_request(request), trace.current())
        _logger.info("payout created", reference=payout.reference, state=payout.state.name, replayed=replayed)
        return payout_pb2.CreatePayoutResponse(payout=_payout(payout), replayed=replayed)

    async def GetPayout(self, request: payout_pb2.GetPayoutRequest, context: Any) -> payout_pb2.GetPayoutResponse:
        """Reads one payout, bank details masked."""
        return payout_pb2.GetPayoutResponse(payout=_payout(await self._payouts.get(request.reference)))

    async def ListPayouts(self, request: payout_pb2.ListPayoutsRequest, context: Any) -> payout_pb2.ListPayoutsResponse:
        """Lists payouts, newest first, bank details masked."""
        wanted = PayoutFilter(request.seller_account, PayoutState(request.state) if request.state else None)
        page = _Page(_payout, _without_history)
        _, token = await self._payouts.list(wanted, request.page_size, request.page_token, page)
        return payout_pb2.ListPayoutsResponse(payouts=page.messages, next_page_token=token)

    async def CancelPayout(
        self, request: payout_pb2.CancelPayoutRequest, context: Any
    ) -> payout_pb2.CancelPayoutResponse:
        """Cancels a payout that the PSP does not have yet."""
        payout = await self._payouts.cancel(request.reference, request.reason)
        _logger.info("payout canceled", reference=payout.reference)
        return payout_pb2.CancelPayoutResponse(payout=_payout(payout))

    async def GetPayoutInstruction(
        self, request: payout_pb2.GetPayoutInstructionRequest, context: Any
    ) -> payout_pb2.GetPayoutInstructionResponse:
        """The only answer with unmasked bank details; each reading is logged."""
        payout = await self._payouts.get(request.reference)
        _logger.info("payout instruction read", reference=payout.reference, state=payout.state.name)
        response = payout_pb2.GetPayoutInstructionResponse(
            reference=payout.reference,
            recipient=_bank_account(payout.recipient),
            purpose=payout.purpose,
            psp=payout.psp,
            state=payout.state,  # type: ignore[arg-type]
        )
        response.amount.currency_code, response.amount.amount_minor = payout.currency_code, payout.amount_minor
        return response

    # --- notifications

    async def RecordNotification(
        self, request: payment_pb2.RecordNotificationRequest, context: Any
    ) -> payment_pb2.RecordNotificationResponse:
        """Verifies, stores and applies one webhook call; answers after the commit."""
        counts = await self._notifications.record(request.psp, request.body, request.headers, request.channel)
        for subject in counts.subjects:
            if subject.is_changed:
                with trace.bind(subject.traceparent):
                    _logger.info(
                        "notification applied", psp=request.psp, reference=_id_of(subject), state=subject.state.name
                    )
        return payment_pb2.RecordNotificationResponse(
            applied_count=counts.applied, duplicate_count=counts.duplicate, ignored_count=counts.ignored
        )

    # --- findings

    async def ListFindings(
        self, request: finding_pb2.ListFindingsRequest, context: Any
    ) -> finding_pb2.ListFindingsResponse:
        """Lists findings, newest first."""
        wanted = FindingFilter(
            request.open_only,
            FindingKind(request.kind) if request.kind else None,
            request.psp,
            request.seller_account,
            FindingSubject(request.subject) if request.subject else None,
            request.reference,
            request.checkout_id,
            _time(request, "start_time"),
            _time(request, "end_time"),
        )
        page = _Page(_finding, _without_sides)
        _, token = await self._findings.list(wanted, request.page_size, request.page_token, page)
        return finding_pb2.ListFindingsResponse(findings=page.messages, next_page_token=token)

    async def ResolveFinding(
        self, request: finding_pb2.ResolveFindingRequest, context: Any
    ) -> finding_pb2.ResolveFindingResponse:
        """Closes a finding with a reason; idempotent by request_id."""
        caller = current_caller()
        resolution = Resolution(request.reason, request.resolved_by or caller, request.request_id)
        finding = await self._findings.resolve(request.finding_id, resolution)
        _logger.info(
            "finding resolved",
            finding_id=finding.finding_id,
            reference=finding.reference,
            resolved_by=finding.resolved_by,
            caller=caller,
        )
        return finding_pb2.ResolveFindingResponse(finding=_finding(finding))

    # --- out

    def _payment(self, payment: Payment) -> payment_pb2.Payment:
        buyer = payment.buyer
        message = payment_pb2.Payment(
            checkout_id=payment.checkout_id,
            buyer_info=payment_pb2.BuyerInfo(buyer_id=buyer.buyer_id, name=buyer.name, email=buyer.email),
            payment_orders=[_order(order) for order in payment.orders],
            is_payment_done=payment.is_done,
            checkout_url=self._checkout_base + payment.page_key,
            create_time=payment.create_time,
            update_time=payment.update_time,
        )
        if payment.findings:
            message.findings.extend(map(_finding, payment.findings))
        if payment.refunds:
            of_order = {order.payment_order_id: order for order in message.payment_orders}
            for refund in payment.refunds:
                _fill_refund(of_order[refund.payment_order_id].refunds.add(), refund)
        return message


def _refunds_unimplemented(method: str) -> Unimplemented:
    return Unimplemented(
        f"{method} is part of the contract, but refunds are not served yet; refund at the provider until they are",
        metadata={"method": method},
    )


def _id_of(subject: Subject) -> str:
    return subject.reference if isinstance(subject, Payout) else subject.payment_order_id


def _finding(finding: Finding) -> finding_pb2.Finding:
    return finding_pb2.Finding(
        finding_id=finding.finding_id,
        kind=finding.kind,  # type: ignore[arg-type]
        subject=finding.subject,  # type: ignore[arg-type]
        reference=finding.reference,
        checkout_id=finding.checkout_id,
        seller_account=finding.seller_account,
        psp=finding.psp,
        psp_event_id=finding.psp_event_id,
        text=finding.text,
        ours=finding.ours,
        theirs=finding.theirs,
        create_time=finding.create_time,
        resolve_time=finding.resolve_time,
        resolved_by=finding.resolved_by,
        reason=finding.reason,
    )


def _without_sides(message: finding_pb2.Finding) -> None:
    message.ClearField("ours")
    message.ClearField("theirs")


def _fill_refund(message: payment_pb2.Refund, refund: Refund) -> None:
    message.refund_id, message.payment_order_id = refund.refund_id, refund.payment_order_id
    message.state = refund.state  # type: ignore[assignment]
    message.psp, message.psp_refund_id = refund.psp, refund.psp_refund_id
    message.made_at_psp = refund.made_at_psp
    message.reason, message.failure_reason = refund.reason, refund.failure_reason
    message.amount.currency_code, message.amount.amount_minor = refund.currency_code, refund.amount_minor
    message.claimed.currency_code, message.claimed.amount_minor = refund.currency_code, refund.claimed_minor
    message.create_time.FromDatetime(refund.create_time)
    message.update_time.FromDatetime(refund.update_time)


def _order(order: PaymentOrder) -> payment_pb2.PaymentOrder:
    message = payment_pb2.PaymentOrder(
        payment_order_id=order.payment_order_id,
        checkout_id=order.checkout_id,
        seller_account=order.seller_account,
        state=order.state,  # type: ignore[arg-type]
        psp=order.psp,
        psp_token=order.psp_token,
        hosted_page_url=order.hosted_page_url,
        failure_reason=order.failure_reason,
        create_time=order.create_time,
        update_time=order.update_time,
        revision=order.revision,
        attention=order.attention,
    )
    message.amount.currency_code, message.amount.amount_minor = order.currency_code, order.amount_minor
    message.refunded.currency_code, message.refunded.amount_minor = order.currency_code, order.refunded_minor
    for change in order.history:
        line = message.history.add(state=change.state, cause=change.cause)
        line.time.FromMilliseconds(change.time_ms)
    return message


def _without_histories(message: payment_pb2.Payment) -> None:
    for order in message.payment_orders:
        order.ClearField("history")


def _without_history(message: payout_pb2.Payout) -> None:
    message.ClearField("history")


def _payout(payout: Payout) -> payout_pb2.Payout:
    message = payout_pb2.Payout(
        reference=payout.reference,
        seller_account=payout.seller_account,
        recipient=_bank_account(payout.recipient.masked()),
        purpose=payout.purpose,
        state=payout.state,  # type: ignore[arg-type]
        psp=payout.psp,
        psp_payout_id=payout.psp_payout_id,
        failure_reason=payout.failure_reason,
        create_time=payout.create_time,
        update_time=payout.update_time,
        schedule_time=payout.schedule_time,
        revision=payout.revision,
        attention=payout.attention,
        findings=map(_finding, payout.findings),
    )
    message.amount.currency_code, message.amount.amount_minor = payout.currency_code, payout.amount_minor
    for change in payout.history:
        line = message.history.add(state=change.state, cause=change.cause)
        line.time.FromMilliseconds(change.time_ms)
    return message


def _bank_account(account: BankAccount) -> payout_pb2.BankAccount:
    message = payout_pb2.BankAccount(
        account_holder_name=account.account_holder_name,
        bank_name=account.bank_name,
        account_number=account.account_number,
        country_code=account.country_code,
        bic=account.bic,
    )
    if account.scheme:
        setattr(message, account.scheme, account.bank_code)
    address = account.address
    if address is not None:
        message.address.CopyFrom(
            payout_pb2.PostalAddress(
                line1=address.line1,
                line2=address.line2,
                city=address.city,
                region=address.region,
                postal_code=address.postal_code,
                country_code=address.country_code,
            )
        )
    return message


# --- in


def _payment_request(request: payment_pb2.CreatePaymentRequest) -> PaymentRequest:
    buyer = request.buyer_info
    return PaymentRequest(
        request.checkout_id,
        Buyer(buyer.buyer_id, buyer.name, buyer.email),
        tuple(
            OrderSpec(
                spec.payment_order_id,
                spec.seller_account,
                spec.amount.currency_code,
                spec.amount.amount_minor,
                spec.psp,
            )
            for spec in request.payment_orders
        ),
    )


def _payout_request(request: payout_pb2.CreatePayoutRequest) -> PayoutRequest:
    return PayoutRequest(
        reference=request.reference,
        seller_account=request.seller_account,
        currency_code=request.amount.currency_code,
        amount_minor=request.amount.amount_minor,
        recipient=_recipient(request.recipient),
        purpose=request.purpose,
        psp=request.psp,
        schedule_time=_time(request, "schedule_time"),
    )


def _time(request: Any, field: str) -> datetime | None:
    if not request.HasField(field):
        return None
    try:
        return cast("datetime", getattr(request, field).ToDatetime(UTC))
    except (ValueError, OverflowError):  # protobuf lets any number of seconds and nanoseconds through
        violation = FieldViolation(field, "must be a time of the years 1 to 9999")
        raise InvalidArgument(f"{field} is not a time", violations=[violation]) from None


def _recipient(message: payout_pb2.BankAccount) -> BankAccount:
    scheme = message.WhichOneof("bank_identifier") or ""
    assert scheme == "" or scheme in BANK_SCHEMES
    address = None
    if message.HasField("address"):
        given = message.address
        address = PostalAddress(
            given.line1, given.line2, given.city, given.region, given.postal_code, given.country_code
        )
    return BankAccount(
        account_holder_name=message.account_holder_name,
        country_code=message.country_code,
        scheme=scheme,
        bank_code=getattr(message, scheme) if scheme else "",
        account_number=message.account_number,
        bic=message.bic,
        bank_name=message.bank_name,
        address=address,
    )
