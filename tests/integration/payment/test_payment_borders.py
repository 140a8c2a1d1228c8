"""The borders: protobuf messages in and out, envelopes of the bus, and what is never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from ducat.common.v1.common_pb2 import Money
from ducat.event.v1 import event_pb2
from ducat.executor.v1 import executor_pb2
from ducat.payment.v1 import payment_pb2, payment_service_pb2, payout_pb2
from kernel.errors import Unimplemented
from payment.adapters.bus import report_of, reports_handler
from payment.adapters.executor_client import ExecutorClient, kind_of
from payment.adapters.grpc import SCOPES, PaymentServicer
from payment.domain.notification import NotificationKind
from payment.domain.payment_order import PaymentOrderState
from payment.service.findings import Findings
from runtime.bus import Message

if TYPE_CHECKING:
    from tests.integration.payment.conftest import Service

from tests.integration.payment.conftest import HOLD, paid

CONTEXT: Any = None


def servicer(service: Service) -> PaymentServicer:
    return PaymentServicer(
        service.payments, service.payouts, service.notifications, Findings(service.store, service.clock), "http://gate/"
    )


def create_request() -> payment_pb2.CreatePaymentRequest:
    return payment_pb2.CreatePaymentRequest(
        checkout_id="CH-1",
        buyer_info=payment_pb2.BuyerInfo(buyer_id="B-1", name="Jane", email="j@example.com"),
        payment_orders=[
            payment_pb2.PaymentOrderSpec(
                payment_order_id=order_id,
                seller_account="S",
                amount=Money(currency_code="USD", amount_minor=amount),
            )
            for order_id, amount in (("A", 7500), ("B", 2500))
        ],
    )


def payout_message(**values: Any) -> payout_pb2.CreatePayoutRequest:
    return payout_pb2.CreatePayoutRequest(
        reference="PO-1",
        seller_account="S",
        amount=Money(currency_code="USD", amount_minor=750),
        recipient=payout_pb2.BankAccount(
            account_holder_name="Jane Doe",
            account_number="1234567890",
            country_code="US",
            aba_routing_number="021000021",
            address=payout_pb2.PostalAddress(line1="Main St 1", country_code="US"),
        ),
        purpose="work",
        **values,
    )


def envelope(message_id: str = "m1", **body: Any) -> Message:
    payload = event_pb2.Envelope(event_id=message_id, **body).SerializeToString()
    return Message("executor.events", "key", message_id, payload)


async def test_a_payment_over_the_contract(service: Service) -> None:
    serving = servicer(service)
    created = await serving.CreatePayment(create_request(), CONTEXT)
    assert not created.replayed
    base, _, page_key = created.payment.checkout_url.rpartition("/")
    assert (base, len(bytes.fromhex(page_key))) == ("http://gate/checkout", 16)
    got = await serving.GetPayment(payment_pb2.GetPaymentRequest(checkout_id="CH-1"), CONTEXT)
    assert got.payment == created.payment
    assert (await serving.CreatePayment(create_request(), CONTEXT)).replayed

    handle = reports_handler(service.reports, "executor.events")
    await handle(
        [
            envelope(
                f"m-{each}",
                order_registered=event_pb2.OrderRegistered(
                    payment_order_id=each, psp="sandbox", psp_token=f"pi_{each}", hosted_page_url="http://pay"
                ),
            )
            for each in "AB"
        ]
    )
    service.executor.notifications = [paid("A", 7500), paid("B", 2500)]
    recorded = await serving.RecordNotification(
        payment_pb2.RecordNotificationRequest(psp="sandbox", body=b"{}", headers={"sandbox-signature": "t=1"}), CONTEXT
    )
    assert (recorded.applied_count, recorded.duplicate_count, recorded.ignored_count) == (2, 0, 0)
    payment = (await serving.GetPayment(payment_pb2.GetPaymentRequest(checkout_id="CH-1"), CONTEXT)).payment
    assert payment.is_payment_done
    order = payment.payment_orders[0]
    assert order.state == payment_pb2.PAYMENT_ORDER_STATE_SUCCESS
    assert (order.amount.amount_minor, order.refunded.currency_code, order.revision) == (7500, "USD", 3)
    assert [change.state for change in order.history] == [1, 2, 3]
    listed = await serving.ListPayments(payment_pb2.ListPaymentsRequest(), CONTEXT)
    assert list(listed.payments) == [payment]
    watched = [
        each async for each in serving.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CH-1"), CONTEXT)
    ]
    assert [each.payment for each in watched] == [payment]
    canceled = await serving.CancelPayment(payment_pb2.CancelPaymentRequest(checkout_id="CH-1"), CONTEXT)
    assert canceled.payment == payment


async def test_a_page_of_large_payments_ends_before_it_is_too_large_to_send(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Risk: a list of large payments answers RESOURCE_EXHAUSTED, whatever its caller does but ask for less."""
    monkeypatch.setattr("payment.service.pages.CHUNK_COUNT", 4)
    serving = servicer(service)
    for number in range(13):
        request = create_request()
        request.checkout_id = f"CH-{number:02}"
        count = 40 if number == 6 else 2  # one that is too large for any page stands alone
        del request.payment_orders[:]
        for order in range(count):
            amount = Money(currency_code="USD", amount_minor=1)
            request.payment_orders.add(payment_order_id=f"{number}-{order}", seller_account="S" * 60, amount=amount)
        await serving.CreatePayment(request, CONTEXT)
        service.clock.advance(seconds=1)
    whole = await serving.ListPayments(payment_pb2.ListPaymentsRequest(), CONTEXT)
    assert len(whole.payments) == 13
    assert whole.next_page_token == ""
    usual = min(payment.ByteSize() for payment in whole.payments)
    largest = max(payment.ByteSize() for payment in whole.payments)
    bytes_max = 5 * usual + 100
    assert largest > bytes_max
    monkeypatch.setattr("payment.adapters.grpc.PAGE_BYTES_MAX", bytes_max)
    pages, token = [], ""
    while not pages or token:
        page = await serving.ListPayments(payment_pb2.ListPaymentsRequest(page_size=500, page_token=token), CONTEXT)
        assert len(page.payments) == 1 or page.ByteSize() - len(page.next_page_token) - 2 <= bytes_max
        pages.append(list(page.payments))
        token = page.next_page_token
    for payment in whole.payments:
        if payment.ByteSize() == largest:
            for listed in payment.payment_orders:
                assert listed.history
                listed.ClearField("history")
            assert payment.ByteSize() < largest
    assert [payment for page in pages for payment in page] == list(whole.payments)
    assert [len(page) for page in pages] == [5, 1, 1, 5, 1]


async def test_a_page_of_large_payouts_ends_before_it_is_too_large_to_send(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payment.service.pages.CHUNK_COUNT", 2)
    monkeypatch.setattr("payment.adapters.grpc.PAGE_BYTES_MAX", 1_000)
    serving = servicer(service)
    for number in range(9):
        request = payout_message()
        request.reference = f"PO-{number}"
        await serving.CreatePayout(request, CONTEXT)
        service.clock.advance(seconds=1)
    pages, token = [], ""
    while not pages or token:
        page = await serving.ListPayouts(payout_pb2.ListPayoutsRequest(page_token=token), CONTEXT)
        pages.append([payout.reference for payout in page.payouts])
        token = page.next_page_token
        assert page.ByteSize() - len(token) - 2 <= 1_000
    assert [reference for page in pages for reference in page] == [f"PO-{number}" for number in reversed(range(9))]
    assert 1 < len(pages) < 9


async def test_bank_details_are_shown_masked_except_to_the_executor(service: Service) -> None:
    serving = servicer(service)
    created = await serving.CreatePayout(payout_message(), CONTEXT)
    got = await serving.GetPayout(payout_pb2.GetPayoutRequest(reference="PO-1"), CONTEXT)
    listed = await serving.ListPayouts(payout_pb2.ListPayoutsRequest(state=payout_pb2.PAYOUT_STATE_HOLDING), CONTEXT)
    canceled = await serving.CancelPayout(payout_pb2.CancelPayoutRequest(reference="PO-1"), CONTEXT)
    for payout in (created.payout, got.payout, listed.payouts[0], canceled.payout):
        assert payout.recipient.account_number == "****7890"
        assert b"1234567890" not in payout.SerializeToString()
        assert payout.recipient.address.line1 == "Main St 1"
    instruction = await serving.GetPayoutInstruction(payout_pb2.GetPayoutInstructionRequest(reference="PO-1"), CONTEXT)
    assert instruction.recipient.account_number == "1234567890"
    assert instruction.recipient.aba_routing_number == "021000021"
    assert instruction.state == payout_pb2.PAYOUT_STATE_CANCELED
    sent = b"".join(each.SerializeToString() for _, each in await service.outbox())
    assert b"1234567890" not in sent


async def test_a_schedule_time_comes_back_as_it_was_given(service: Service) -> None:
    serving = servicer(service)
    time = Timestamp(seconds=service.clock.now_ns() // 1_000_000_000 + 3600)
    created = await serving.CreatePayout(payout_message(schedule_time=time), CONTEXT)
    assert created.payout.state == payout_pb2.PAYOUT_STATE_SCHEDULED
    got = await serving.GetPayout(payout_pb2.GetPayoutRequest(reference="PO-1"), CONTEXT)
    assert got.payout.schedule_time == time


async def test_refunds_say_that_they_are_not_served(service: Service) -> None:
    serving = servicer(service)
    for method in (serving.CreateRefund, serving.GetRefund, serving.ListRefunds):
        with pytest.raises(Unimplemented, match="refunds are not served yet"):
            await method(None, CONTEXT)


async def test_wallet_events_reach_the_payout_and_foreign_messages_are_passed_over(service: Service) -> None:
    await servicer(service).CreatePayout(payout_message(), CONTEXT)
    handle = reports_handler(service.reports, "wallet.events")
    await handle(
        [
            envelope("w1", wallet_credited=event_pb2.WalletCredited(payment_order_id="A")),
            envelope(
                "w2",
                funds_held=event_pb2.FundsHeld(reference="R-1", hold_id=HOLD),
            ),
            envelope("w3"),
            envelope(
                "w4",
                funds_held=event_pb2.FundsHeld(purpose=event_pb2.FUNDS_PURPOSE_PAYOUT, reference="PO-1", hold_id=HOLD),
            ),
        ]
    )
    assert await service.said() == ["payout_requested", "execute_payout"]


def test_every_report_of_the_bus_is_understood() -> None:
    """Field by field, so that none is mixed up with its neighbour."""

    def report(**body: Any) -> tuple[Any, ...]:
        found = report_of(event_pb2.Envelope(**body).SerializeToString())
        assert found is not None
        return tuple(getattr(found, name) for name in found.__slots__)

    assert report(order_rejected=event_pb2.OrderRejected(payment_order_id="A", psp="p", code="c", reason="r")) == (
        "A",
        "p",
        "c",
        "r",
    )
    assert report(payout_submitted=event_pb2.PayoutSubmitted(reference="A", psp="p", psp_payout_id="i")) == (
        "A",
        "p",
        "i",
    )
    assert report(
        payout_rejected=event_pb2.PayoutRejected(reference="A", psp="p", code="c", reason="r", compliance=True)
    ) == ("A", "p", "c", "r", True)
    assert report(
        funds_refused=event_pb2.FundsRefused(purpose=event_pb2.FUNDS_PURPOSE_PAYOUT, reference="A", result="R")
    ) == ("A", "R")
    (found,) = report(
        outcome_found=event_pb2.OutcomeFound(
            psp="p",
            psp_object_id="i",
            merchant_reference="A",
            object_kind="order",
            kind="order_succeeded",
            amount=Money(currency_code="USD", amount_minor=5),
            code="c",
            reason="r",
        )
    )
    assert (found.psp, found.psp_object_id, found.merchant_reference, found.kind) == (
        "p",
        "i",
        "A",
        NotificationKind.ORDER_SUCCEEDED,
    )
    assert (found.currency_code, found.amount_minor, found.code, found.reason) == ("USD", 5, "c", "r")
    (found,) = report(outcome_found=event_pb2.OutcomeFound(psp="p", kind="made_up"))
    assert (found.kind, found.amount_minor) == (NotificationKind.UNKNOWN, None)


async def test_notifications_of_the_executor_are_read_field_by_field() -> None:
    message = executor_pb2.Notification(
        psp_event_id="evt",
        kind=executor_pb2.NOTIFICATION_KIND_ORDER_FAILED,
        psp_object_id="pi",
        merchant_reference="A",
        amount=Money(currency_code="USD", amount_minor=5),
        code="c",
        reason="r",
        occur_time=Timestamp(seconds=1),
        psp_type="t",
        psp_payment_id="pi_0",
    )

    class FakeChannel:
        def unary_unary(self, method: str, *_: Any, **__: Any) -> Any:
            async def call(request: executor_pb2.VerifyNotificationRequest) -> Any:
                assert (request.psp, request.body, request.headers["h"], request.channel) == ("sandbox", b"b", "v", 2)
                return executor_pb2.VerifyNotificationResponse(notifications=[message, executor_pb2.Notification()])

            return call

    client = ExecutorClient(FakeChannel())  # type: ignore[arg-type]
    full, bare = await client.verify("sandbox", b"b", {"h": "v"}, 2)
    assert (full.psp, full.psp_event_id, full.kind, full.psp_object_id) == (
        "sandbox",
        "evt",
        NotificationKind.ORDER_FAILED,
        "pi",
    )
    assert (full.merchant_reference, full.currency_code, full.amount_minor) == ("A", "USD", 5)
    assert (full.code, full.reason, full.psp_type) == ("c", "r", "t")
    assert full.occur_time is not None
    assert full.occur_time.timestamp() == 1
    assert (bare.amount_minor, bare.occur_time, bare.kind) == (None, None, NotificationKind.UNKNOWN)
    assert kind_of(99) is NotificationKind.UNKNOWN


def test_every_method_of_the_contract_has_a_scope() -> None:
    methods = payment_service_pb2.DESCRIPTOR.services_by_name["PaymentService"].methods
    assert {f"/ducat.payment.v1.PaymentService/{method.name}" for method in methods} == set(SCOPES)
    assert len(PaymentOrderState) == 10
