"""Findings, buyers' pages and refunds that were made at the PSP, over a real database."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ducat.event.v1.event_pb2 import Envelope
from ducat.payment.v1 import finding_pb2, payment_pb2, payout_pb2
from kernel.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from kernel.ids import derived_event_id
from payment.adapters import postgres
from payment.adapters.bus import report_of
from payment.adapters.grpc import PaymentServicer
from payment.domain.finding import FindingKind, FindingSubject
from payment.domain.notification import Notification, NotificationKind
from payment.domain.payment_order import PaymentOrderState
from payment.domain.reports import FundsHeld, RefundFundsHeld, RefundFundsRefused
from payment.service.findings import Findings
from payment.service.ports import FindingFilter, PaymentFilter, Resolution
from tests.integration.payment.conftest import HOLD, Service, checkout, paid, payout_request

S, K = PaymentOrderState, NotificationKind
CONTEXT: Any = None


def findings_of(service: Service) -> Findings:
    return Findings(service.store, service.clock)


def servicer(service: Service) -> PaymentServicer:
    return PaymentServicer(
        service.payments, service.payouts, service.notifications, findings_of(service), "http://gate/"
    )


def refunded(event_id: str, amount: int, refund: str = "re_1", **values: Any) -> Notification:
    values = {"kind": K.REFUND_SUCCEEDED, "psp_payment_id": "pi_A", "psp_type": "refund.succeeded"} | values
    return Notification("sandbox", event_id, psp_object_id=refund, currency_code="USD", amount_minor=amount, **values)


async def sold(service: Service, amount: int = 7500) -> None:
    """Order A is paid; what was published so far is gone."""
    await service.payments.create(checkout(("A", amount)))
    await service.register("A")
    await service.tell(paid("A", amount))
    await service.pool.execute("DELETE FROM payment.outbox")


async def events(service: Service) -> list[Envelope]:
    return [envelope for _, envelope in await service.outbox()]


# --- refunds that were made at the PSP


async def test_a_refund_is_booked_with_what_the_wallet_has_and_claimed_for_the_rest(service: Service) -> None:
    await sold(service)
    await service.tell(refunded("evt_1", 2500))
    order = (await service.payments.get("CH-1")).orders[0]
    assert (order.state, order.refunded_minor) == (S.PARTIALLY_REFUNDED, 2500)
    (asked,) = await events(service)
    body = asked.refund_requested
    assert (body.refund_id, body.payment_order_id, body.seller_account) == ("sandbox:re_1", "A", "SELL-A")
    assert (body.amount.amount_minor, body.psp, body.hold_reference) == (2500, "sandbox", "")
    assert asked.event_id == derived_event_id("refund_requested", "sandbox:re_1")
    assert {row[0] for row in await service.pool.fetch("SELECT key FROM payment.outbox")} == {"CH-1"}

    await service.reports.apply(
        "wallet.events", [("w1", RefundFundsRefused("sandbox:re_1", "INSUFFICIENT_FUNDS", 1000))]
    )
    again = (await events(service))[1].refund_requested
    assert (again.refund_id, again.amount.amount_minor, again.hold_reference) == (
        "sandbox:re_1",
        1000,
        "sandbox:re_1/2",
    )
    await service.reports.apply("wallet.events", [("w2", RefundFundsHeld("sandbox:re_1/2", HOLD))])
    _, _, completed, claimed = await events(service)
    assert (completed.refund_completed.amount.amount_minor, completed.refund_completed.hold_id) == (1000, HOLD)
    assert completed.refund_completed.succeeded
    assert claimed.refund_claimed.amount.amount_minor == 1500

    got = await servicer(service).GetPayment(payment_pb2.GetPaymentRequest(checkout_id="CH-1"), CONTEXT)
    (refund,) = got.payment.payment_orders[0].refunds
    assert (refund.refund_id, refund.amount.amount_minor, refund.claimed.amount_minor) == ("sandbox:re_1", 2500, 1500)
    assert (refund.state, refund.made_at_psp) == (payment_pb2.REFUND_STATE_SUCCEEDED, True)
    listed = await servicer(service).ListPayments(payment_pb2.ListPaymentsRequest(), CONTEXT)
    assert listed.payments[0] == got.payment

    await service.pool.execute("DELETE FROM payment.outbox")
    await service.tell(refunded("evt_9", 2500, kind=K.REFUND_FAILED))
    given_back, withdrawn = (each.refund_reversed for each in await events(service))
    assert [(each.amount.amount_minor, each.claimed) for each in (given_back, withdrawn)] == [
        (1000, False),
        (1500, True),
    ]
    order = (await service.payments.get("CH-1")).orders[0]
    assert (order.state, order.refunded_minor) == (S.SUCCESS, 0)


async def test_the_same_refund_told_by_many_at_once_in_two_processes_is_booked_once(service: Service) -> None:
    await sold(service)
    other = service.another()
    told = [refunded(f"evt_{number}", 2500) for number in range(20)]
    await asyncio.gather(
        *(each.notifications.apply([one]) for number, one in enumerate(told) for each in [(service, other)[number % 2]])
    )
    order = (await service.payments.get("CH-1")).orders[0]
    assert order.refunded_minor == 2500
    assert await service.said() == ["refund_requested"]


async def test_two_refunds_of_one_amount_are_two_and_a_third_that_is_too_much_is_a_finding(service: Service) -> None:
    await sold(service)
    await service.tell(*(refunded(f"evt_{number}", 3000, f"re_{number}") for number in range(3)))
    payment = await service.payments.get("CH-1")
    assert (payment.orders[0].refunded_minor, len(payment.refunds)) == (6000, 2)
    (found,) = payment.findings
    assert (found.kind, found.reference, found.theirs["amount_minor"]) == (FindingKind.REFUND_TOO_LARGE, "A", "3000")
    assert found.ours["refunded_minor"] == "6000"
    assert payment.orders[0].attention == found.text


async def test_a_dispute_takes_only_what_refunds_have_left(service: Service) -> None:
    await sold(service)
    await service.tell(refunded("evt_1", 2500))
    await service.tell(paid("A", 7500, "evt_2", kind=K.DISPUTE_OPENED), paid("A", 7500, "evt_3", kind=K.DISPUTE_WON))
    opened, closed = (await events(service))[1:]
    assert opened.dispute_opened.amount.amount_minor == closed.dispute_closed.amount.amount_minor == 5000
    (found,) = (await service.payments.get("CH-1")).findings
    assert found.kind is FindingKind.DISPUTE_MISMATCH
    await service.tell(paid("A", 7500, "evt_4", kind=K.DISPUTE_LOST))
    await service.pool.execute("DELETE FROM payment.outbox")
    await service.tell(refunded("evt_5", 5000, "re_2"))
    assert await service.said() == [], "the dispute took it already"
    assert {each.kind for each in (await service.payments.get("CH-1")).findings} >= {FindingKind.REFUND_OF_DISPUTED}


def test_refund_reports_of_the_wallet_are_understood() -> None:
    envelope = Envelope()
    envelope.funds_held.purpose, envelope.funds_held.reference, envelope.funds_held.hold_id = 2, "R/2", HOLD
    assert report_of(envelope.SerializeToString()) == RefundFundsHeld("R/2", HOLD)
    envelope = Envelope()
    envelope.funds_refused.purpose, envelope.funds_refused.reference, envelope.funds_refused.result = 2, "R", "X"
    envelope.funds_refused.available.amount_minor = 7
    assert report_of(envelope.SerializeToString()) == RefundFundsRefused("R", "X", 7)


# --- findings


async def test_findings_are_all_kept_shown_filtered_and_resolved(service: Service) -> None:
    """Risk: "paid 1 USD" is replaced by "paid 0 usd", and nobody ever hears of it."""
    serving = servicer(service)
    await service.payments.create(checkout(("A", 7500), ("B", 100)))
    await service.register("A", "B")
    for number, (amount, currency) in enumerate([(100, "USD"), (0, "usd"), (100, "USD")]):
        service.clock.advance(seconds=1)
        await service.tell(paid("A", amount, f"evt_{number}", currency_code=currency))
    payment = (await serving.GetPayment(payment_pb2.GetPaymentRequest(checkout_id="CH-1"), CONTEXT)).payment
    assert [dict(each.theirs)["amount_minor"] for each in payment.findings] == ["100", "0"]
    assert [each.psp_event_id for each in payment.findings] == ["evt_0", "evt_1"]
    assert "0 usd" in payment.payment_orders[0].attention

    async def listed(**filter: Any) -> list[str]:
        answer = await serving.ListFindings(finding_pb2.ListFindingsRequest(**filter), CONTEXT)
        return [dict(each.theirs)["amount_minor"] for each in answer.findings]

    assert await listed() == ["0", "100"]
    for filter, count in (
        ({"kind": finding_pb2.FINDING_KIND_AMOUNT_MISMATCH}, 2),
        ({"kind": finding_pb2.FINDING_KIND_PAID_TWICE}, 0),
        ({"psp": "sandbox"}, 2),
        ({"psp": "other"}, 0),
        ({"seller_account": "SELL-A"}, 2),
        ({"seller_account": "SELL-B"}, 0),
        ({"subject": finding_pb2.FINDING_SUBJECT_ORDER, "reference": "A"}, 2),
        ({"subject": finding_pb2.FINDING_SUBJECT_PAYOUT}, 0),
        ({"checkout_id": "CH-1"}, 2),
        ({"start_time": payment.findings[1].create_time}, 1),
        ({"end_time": payment.findings[1].create_time}, 1),
    ):
        assert len(await listed(**filter)) == count, filter
    first = await serving.ListFindings(finding_pb2.ListFindingsRequest(page_size=1), CONTEXT)
    token = first.next_page_token
    assert len(await listed(page_size=1, page_token=token)) == 1
    with pytest.raises(InvalidArgument):
        await listed(page_size=1, page_token=token, open_only=True)
    assert [each.checkout_id for each in (await service.payments.list(PaymentFilter(has_findings=True), 0, ""))[0]] == [
        "CH-1"
    ]

    newest, oldest = payment.findings[1].finding_id, payment.findings[0].finding_id
    request = finding_pb2.ResolveFindingRequest(
        finding_id=newest, reason="a test of the PSP", request_id="R-1", resolved_by="jane"
    )
    service.clock.advance(seconds=1)
    answers = await asyncio.gather(*(serving.ResolveFinding(request, CONTEXT) for _ in range(4)))
    assert {each.finding.resolved_by for each in answers} == {"jane"}
    assert len({each.finding.resolve_time.ToNanoseconds() for each in answers}) == 1
    assert await listed(open_only=True) == ["100"]
    order = (await service.payments.get("CH-1")).orders[0]
    assert "100 USD" in order.attention
    await service.tell(paid("A", 0, "evt_8", currency_code="usd"))
    assert await listed(open_only=True) == ["100"], "told again, it stays resolved"
    assert "100 USD" in (await service.payments.get("CH-1")).orders[0].attention

    findings = findings_of(service)
    with pytest.raises(InvalidArgument, match="reason"):
        await findings.resolve(oldest, Resolution(" \t\n", "joe", "R-2"))
    with pytest.raises(FailedPrecondition, match="jane"):
        await findings.resolve(newest, Resolution("other", "joe", "R-2"))
    for finding_id, reason in ((newest, "other"), (oldest, "a test of the PSP")):
        with pytest.raises(AlreadyExists):
            await findings.resolve(finding_id, Resolution(reason, "joe", "R-1"))
    for unknown in ("nobody", "a\0"):
        with pytest.raises(NotFound):
            await findings.resolve(unknown, Resolution("x", "", "R-3"))
    await findings.resolve(oldest, Resolution("settled", "joe", "R-4"))
    assert (await service.payments.get("CH-1")).orders[0].attention == ""
    assert (await service.payments.list(PaymentFilter(has_findings=True), 0, ""))[0] == []
    assert (await findings.open_counts())[FindingKind.AMOUNT_MISMATCH] == 0
    await service.tell(paid("A", 7500, "evt_9"))
    assert (await service.payments.get("CH-1")).orders[0].state is S.SUCCESS


async def test_findings_of_payouts_are_shown_with_them(service: Service) -> None:
    await service.payouts.create(payout_request())
    await service.reports.apply("wallet.events", [("w1", FundsHeld("PO-1", HOLD))])
    told = Notification("sandbox", "evt_1", K.PAYOUT_COMPLETED, "po_1", "PO-1", "USD", 999)
    await service.tell(told, replace(told, psp_event_id="evt_2", psp="sandbox2"))
    got = await servicer(service).GetPayout(payout_pb2.GetPayoutRequest(reference="PO-1"), CONTEXT)
    assert {each.kind for each in got.payout.findings} == {
        finding_pb2.FINDING_KIND_AMOUNT_MISMATCH,
        finding_pb2.FINDING_KIND_PAYOUT_OTHER_PSP,
    }
    listed = await servicer(service).ListPayouts(payout_pb2.ListPayoutsRequest(), CONTEXT)
    assert listed.payouts[0] == got.payout
    page, _ = await findings_of(service).list(FindingFilter(subject=FindingSubject.PAYOUT), 0, "")
    assert [each.seller_account for each in page] == ["SELL-1", "SELL-1"]
    assert got.payout.attention in {each.text for each in page}


async def test_a_notification_that_gave_up_is_listed(service: Service) -> None:
    told = refunded("evt_1", 100, psp_payment_id="pi_nobody")
    await service.tell(told)
    for _ in range(45):
        service.clock.advance(seconds=7 * 3600)
        await service.notifications.retry_parked()
    page, _ = await findings_of(service).list(FindingFilter(open_only=True), 0, "")
    assert [(each.kind, each.subject, each.reference) for each in page] == [
        (FindingKind.NOTIFICATION_GIVEN_UP, FindingSubject.NOTIFICATION, "evt_1")
    ]


async def test_a_flood_of_findings_does_not_make_a_payment_too_large_to_read(service: Service) -> None:
    await service.payments.create(checkout(("A", 7500)))
    await service.register("A")
    count = postgres.FINDINGS_SHOWN_MAX + 20
    await service.tell(*(paid("A", amount, f"evt_{amount}") for amount in range(1, count + 1)))
    payment = await service.payments.get("CH-1")
    assert len(payment.findings) == postgres.FINDINGS_SHOWN_MAX
    assert (await findings_of(service).open_counts())[FindingKind.AMOUNT_MISMATCH] == count
    seen, token = 0, ""
    while True:
        page, token = await findings_of(service).list(FindingFilter(checkout_id="CH-1"), 50, token)
        seen += len(page)
        if not token:
            break
    assert seen == count


async def test_the_same_finding_is_one_also_after_the_order_moved_on(service: Service) -> None:
    await service.payments.create(checkout(("A", 7500)))
    await service.register("A")
    await service.tell(paid("A", 100, "evt_1"))
    service.clock.advance(seconds=2 * 86_400)
    await service.timers.expire_unpaid()
    await service.tell(paid("A", 100, "evt_2"), refunded("evt_3", 100))
    assert sorted(each.kind for each in (await service.payments.get("CH-1")).findings) == [
        FindingKind.AMOUNT_MISMATCH,
        FindingKind.REFUND_OF_UNPAID,
    ]


async def test_a_finding_that_was_settled_by_itself_is_resolved_with_its_order(service: Service) -> None:
    await service.payments.create(checkout(("A", 7500)))
    await service.register("A")
    await service.tell(refunded("evt_1", 100))
    order = (await service.payments.get("CH-1")).orders[0]
    assert "not paid here" in order.attention
    await service.tell(paid("A", 7500, "evt_2"))
    await service.notifications.retry_parked(["re_1"])
    payment = await service.payments.get("CH-1")
    assert [(each.kind, each.is_open, each.resolved_by) for each in payment.findings] == [
        (FindingKind.REFUND_OF_UNPAID, False, "payment")
    ]
    order = payment.orders[0]
    assert (order.state, order.refunded_minor, order.attention) == (S.PARTIALLY_REFUNDED, 100, "")


# --- buyers' pages


async def test_a_page_is_found_by_its_key_alone(service: Service) -> None:
    payment, _ = await service.payments.create(checkout(("A", 1)))
    replayed, _ = await service.payments.create(checkout(("A", 1)))
    other, _ = await service.payments.create(checkout(("B", 1), checkout_id="CH-2"))
    assert payment.page_key == replayed.page_key != other.page_key
    assert (await service.payments.page(payment.page_key)).checkout_id == "CH-1"
    got = await servicer(service).GetCheckoutPage(
        payment_pb2.GetCheckoutPageRequest(page_key=payment.page_key), CONTEXT
    )
    assert got.payment.checkout_url.endswith(f"/checkout/{payment.page_key}")
    near = payment.page_key[:-1] + ("0" if payment.page_key[-1] != "0" else "1")
    wrong = ["CH-1", "A", "", near, payment.page_key.upper() + " ", f" {payment.page_key}", "\0", "ж", "a" * 128]
    told = set()
    for key in wrong:
        with pytest.raises(NotFound) as caught:
            await service.payments.page(key)
        told.add((caught.value.message, str(caught.value.metadata)))
    assert len(told) == 1, "every wrong key gets the same answer"
    (command, _) = [envelope.execute_order for _, envelope in await service.outbox()]
    assert command.page_key == payment.page_key


async def test_what_was_stored_before_gets_its_key_and_its_finding(service: Service) -> None:
    """Down and up again: rows of the version before keep working."""
    sql = (Path(postgres.__file__).parent / "migrations" / "0004_findings_pages_refunds.sql").read_text()
    up, _, down = sql.partition("-- migrate:down")
    await service.payments.create(checkout(("A", 7500), ("B", 100)))
    await service.payouts.create(payout_request())
    await service.pool.execute(down)
    await service.pool.execute(
        "UPDATE payment.payment_order SET attention = 'paid 1 USD', state = 9 WHERE payment_order_id = 'A'"
    )
    await service.pool.execute("UPDATE payment.payout SET attention = 'paid twice'")
    await service.pool.execute(up)
    fresh = service.another()
    payment = await fresh.payments.get("CH-1")
    assert (await fresh.payments.page(payment.page_key)).checkout_id == "CH-1"
    assert [(each.kind, each.text, each.seller_account) for each in payment.findings] == [
        (FindingKind.EARLIER, "paid 1 USD", "SELL-A")
    ]
    assert [order.disputed_minor for order in payment.orders] == [7500, 0]
    assert [each.text for each in (await fresh.payouts.get("PO-1")).findings] == ["paid twice"]
    assert not (await fresh.payments.create(checkout(("C", 1), checkout_id="CH-2")))[1]
