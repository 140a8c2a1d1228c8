"""Risk: a report of the executor or the wallet is lost, has its effect twice, or lands on something else."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from kernel.clock import FixedClock
from kernel.errors import NotFound
from kernel.state_table import TransitionRefused
from payment.domain import reports
from payment.domain.bank_account import BankAccount
from payment.domain.facts import FactKind
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from payment.domain.payout import Payout, PayoutState
from payment.domain.refund import Refund, RefundState
from payment.domain.reports import (
    FundsHeld,
    FundsRefused,
    OrderRegistered,
    OrderRejected,
    OutcomeFound,
    PayoutRejected,
    PayoutSubmitted,
    RefundFundsHeld,
    RefundFundsRefused,
    Report,
)
from payment.service.notifications import Notifications
from payment.service.ports import PspObjectTaken, Subject
from payment.service.reports import Reports
from tests.unit.payment.memory_store import MemoryStore

NOW = datetime(2025, 7, 21, tzinfo=UTC)
S, P, K = PaymentOrderState, PayoutState, NotificationKind
HOLD = b"hold-id-16-bytes"


def order(order_id: str = "A", state: PaymentOrderState = S.NOT_STARTED, **values: Any) -> PaymentOrder:
    return PaymentOrder(order_id, "CH-1", "SELL-1", "USD", 100, state, NOW, NOW, stored_state=state, **values)


def payout(state: PayoutState = P.HOLDING, **values: Any) -> Payout:
    account = BankAccount("Jane Doe", "US", "aba_routing_number", "021000021", "1234567890")
    return Payout("PO-1", "SELL-1", "USD", 750, account, "work", "sandbox", state, NOW, NOW, **values)


def refund() -> Refund:
    made = Refund("sandbox:re_1", "A", "CH-1", "SELL-1", "USD", 60, RefundState.SUCCEEDED, "sandbox", "re_1", NOW, NOW)
    made.begin("told", NOW)
    made.facts.clear()
    made.stored_revision = made.revision
    return made


def found(kind: NotificationKind = K.ORDER_SUCCEEDED, **values: Any) -> OutcomeFound:
    values = {"psp_object_id": "pi_A", "merchant_reference": "A", "currency_code": "USD", "amount_minor": 100} | values
    return OutcomeFound(Notification("sandbox", "", kind, **values))


class World:
    """Reports over a store in memory."""

    def __init__(self, *subjects: Subject) -> None:
        clock = FixedClock()
        self.store = MemoryStore(subjects)
        self.reported: list[tuple[Outcome, str]] = []
        self.notifications = Notifications(self.store, None, clock, self._report)  # type: ignore[arg-type]
        self.reports = Reports(self.store, self.notifications, clock, self._report)  # type: ignore[arg-type]

    def _report(self, outcome: Outcome, notification: Notification, _subject: Subject | None) -> None:
        self.reported.append((outcome, notification.merchant_reference))

    async def take(self, *taken: Report, consumer: str = "executor.events", first: int = 1) -> None:
        await self.reports.apply(consumer, [(f"m{number}", each) for number, each in enumerate(taken, first)])


REGISTERED = OrderRegistered("A", "sandbox", "pi_A", "http://pay")
EFFECTS: list[tuple[Report, Subject, int, list[FactKind]]] = [
    (REGISTERED, order(), S.EXECUTING, []),
    (OrderRejected("A", "sandbox", "declined", "no"), order(), S.FAILED, [FactKind.ORDER_CLOSED]),
    (found(), order(), S.SUCCESS, [FactKind.ORDER_SUCCEEDED]),
    (FundsHeld("PO-1", HOLD), payout(), P.PENDING, [FactKind.EXECUTE_PAYOUT]),
    (FundsRefused("PO-1", "INSUFFICIENT_FUNDS"), payout(), P.FAILED, []),
    (PayoutSubmitted("PO-1", "sandbox", "po_1"), payout(P.PENDING), P.PENDING, []),
    (PayoutRejected("PO-1", "sandbox", "x", "no", False), payout(P.PENDING), P.FAILED, [FactKind.PAYOUT_RELEASED]),
    (PayoutRejected("PO-1", "sandbox", "aml", "no", True), payout(P.PENDING), P.REJECTED, [FactKind.PAYOUT_RELEASED]),
    (RefundFundsHeld("sandbox:re_1", HOLD), refund(), RefundState.SUCCEEDED, [FactKind.REFUND_COMPLETED]),
    (
        RefundFundsRefused("sandbox:re_1", "INSUFFICIENT_FUNDS", 0),
        refund(),
        RefundState.SUCCEEDED,
        [FactKind.REFUND_CLAIMED],
    ),
    (
        found(K.PAYOUT_COMPLETED, psp_object_id="po_1", merchant_reference="PO-1", amount_minor=750),
        payout(P.PROCESSING),
        P.COMPLETED,
        [FactKind.PAYOUT_COMPLETED],
    ),
]


def test_every_report_has_an_effect_below_and_is_a_value() -> None:
    assert {type(report) for report, *_ in EFFECTS} == set(get_args(Report))
    assert set(reports.__all__) == {cls.__name__ for cls in get_args(Report)} | {"Report"}
    for report, *_ in EFFECTS:
        assert replace(report) == report
        with pytest.raises(FrozenInstanceError):
            setattr(report, fields(report)[0].name, "other")


@pytest.mark.parametrize(
    ("report", "subject", "state", "facts"), EFFECTS, ids=lambda value: type(value).__name__ if value else ""
)
async def test_each_has_its_effect_once_however_often_it_comes(
    report: Report, subject: Subject, state: int, facts: list[FactKind]
) -> None:
    world = World(subject)
    for _ in range(3):
        await world.take(report, report)
    after = next(iter((*world.store.orders.values(), *world.store.payouts.values(), *world.store.refunds.values())))
    assert after.state == state
    assert [fact.kind for fact in world.store.facts] == facts
    assert world.store.messages == {("executor.events", "m1"), ("executor.events", "m2")}
    assert world.store.write_count == 1, "what was taken before is not written again"
    if isinstance(after, Payout) and isinstance(report, FundsRefused):
        assert after.failure_reason == "the wallet refused: insufficient funds"
    if isinstance(after, Payout) and isinstance(report, PayoutSubmitted):
        assert after.psp_payout_id == "po_1"


async def test_a_batch_is_one_transaction_and_its_facts_keep_the_order_of_the_reports() -> None:
    world = World(order("A"), order("B"), order("C"))
    await world.take(
        OrderRejected("C", "sandbox", "", ""), OrderRegistered("B", "sandbox", "pi_B", "u"), found(), first=7
    )
    assert [fact.kind for fact in world.store.facts] == [FactKind.ORDER_CLOSED, FactKind.ORDER_SUCCEEDED]
    assert world.store.write_count == 1
    assert world.store.orders["C"].failure_reason == "rejected by the provider"
    await world.take()
    assert world.store.write_count == 1


async def test_the_same_message_id_of_another_topic_is_another_message() -> None:
    world = World(order(), payout())
    await world.take(REGISTERED)
    await world.take(FundsHeld("PO-1", HOLD), consumer="wallet.events")
    assert world.store.payouts["PO-1"].state is P.PENDING


async def test_one_about_nothing_of_ours_or_that_cannot_be_raises_and_writes_nothing() -> None:
    world = World(order(), payout())
    for stray in (OrderRegistered("Z", "sandbox", "pi_Z", "u"), FundsHeld("PO-9", HOLD)):
        with pytest.raises(NotFound, match=f"{type(stray).__name__} is about"):
            await world.take(REGISTERED, stray)
    with pytest.raises(TransitionRefused):
        await world.take(PayoutSubmitted("PO-1", "sandbox", "po_1"))
    assert (world.store.write_count, world.store.messages) == (0, set())


async def test_an_outcome_that_fits_nothing_or_contradicts_is_told_to_an_operator_and_taken() -> None:
    world = World(order())
    await world.take(found(merchant_reference="Z", psp_object_id="pi_Z"), found(amount_minor=99), found(K.UNKNOWN))
    assert world.reported == [(Outcome.PARKED, "Z"), (Outcome.FLAGGED, "A")]
    assert world.store.orders["A"].state is S.NOT_STARTED
    assert "99 USD" in world.store.orders["A"].attention
    assert len(world.store.messages) == 3


async def test_an_outcome_by_the_payment_of_another_order_is_flagged_not_credited() -> None:
    world = World(order("A"), order("B", S.EXECUTING, psp="sandbox", psp_token="pi_B"))
    await world.take(found(psp_object_id="pi_B"))
    assert world.reported == [(Outcome.FLAGGED, "A")]
    assert world.store.facts == []
    assert "the payment of order B" in world.store.orders["A"].attention


async def test_a_psp_that_gives_one_id_to_two_orders_ends_as_an_error_that_names_it() -> None:
    world = World(order("A"), order("B", S.EXECUTING, psp="sandbox", psp_token="pi_A"))
    with pytest.raises(PspObjectTaken, match="pi_A"):
        await world.take(REGISTERED)


async def test_a_webhook_that_came_before_the_psps_id_was_known_is_applied_with_the_report() -> None:
    world = World(order())
    early = Notification("sandbox", "evt_1", K.ORDER_SUCCEEDED, "pi_A", "", "USD", 100)
    await world.notifications.apply([early])
    assert world.reported == [(Outcome.PARKED, "")]
    world.store.notifications["sandbox", "evt_1"] = replace(
        world.store.notifications["sandbox", "evt_1"], notification=replace(early, merchant_reference="A")
    )  # found by the PSP's id, as the real store does
    await world.take(REGISTERED)
    assert world.store.orders["A"].state is S.SUCCESS
