"""Risk: a refund that was made at the PSP is not booked, booked twice, or takes money that a dispute took already."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest

from kernel.clock import FixedClock
from payment.domain.facts import FactKind
from payment.domain.finding import FindingKind
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from payment.domain.refund import HOLD_TRIES_MAX, RefundBooking, RefundState, told_refund_id
from payment.domain.reports import OutcomeFound, RefundFundsHeld, RefundFundsRefused
from payment.service import notifications
from payment.service.notifications import Notifications
from payment.service.ports import Subject
from payment.service.reports import Reports
from tests.unit.payment.memory_store import MemoryStore

NOW = datetime(2025, 7, 21, tzinfo=UTC)
S, K, B, F = PaymentOrderState, NotificationKind, RefundBooking, FactKind
HOLD = b"hold-id-16-bytes"


def order(state: PaymentOrderState = S.SUCCESS, **values: Any) -> PaymentOrder:
    values = {"psp": "sandbox", "psp_token": "pi_1"} | values
    return PaymentOrder("ORD-1", "CH-1", "SELL-1", "USD", 7500, state, NOW, NOW, stored_state=state, **values)


def told(event_id: str, amount: int | None = 7500, refund: str = "re_1", **values: Any) -> Notification:
    values = {"kind": K.REFUND_SUCCEEDED, "currency_code": "USD", "psp_payment_id": "pi_1"} | values
    return Notification("sandbox", event_id, psp_object_id=refund, amount_minor=amount, **values)


class World:
    def __init__(self, *subjects: Subject) -> None:
        clock = FixedClock()
        self.store = MemoryStore(subjects or [order()])
        self.reported: list[tuple[Outcome, str]] = []
        self.notifications = Notifications(self.store, None, clock, self._report)  # type: ignore[arg-type]
        self.reports = Reports(self.store, self.notifications, clock, self._report)  # type: ignore[arg-type]
        self.report_count = 0

    def _report(self, outcome: Outcome, notification: Notification, _subject: Subject | None) -> None:
        self.reported.append((outcome, notification.psp_event_id))

    async def tell(self, *notifications: Notification) -> None:
        for each in notifications:
            await self.notifications.apply([each])

    async def answer(self, report: RefundFundsHeld | RefundFundsRefused) -> None:
        self.report_count += 1
        await self.reports.apply("wallet.events", [(f"m{self.report_count}", report)])

    @property
    def order(self) -> PaymentOrder:
        return self.store.orders["ORD-1"]

    def refund(self, refund_id: str = "sandbox:re_1") -> Any:
        return self.store.refunds[refund_id]

    def said(self) -> list[tuple[FactKind, int]]:
        return [(fact.kind, fact.amount_minor) for fact in self.store.facts]

    def findings(self) -> list[FindingKind]:
        return [each.kind for each in self.store.findings.values()]


async def test_a_refund_is_booked_once_however_often_and_under_whatever_event_it_is_told() -> None:
    world = World()
    await world.tell(told("evt_1", 2500), told("evt_2", 2500), told("evt_1", 2500))
    await world.notifications.apply([told("evt_3", 2500), told("evt_4", 2500)])
    assert (world.order.state, world.order.refunded_minor) == (S.PARTIALLY_REFUNDED, 2500)
    assert world.said() == [(F.REFUND_REQUESTED, 2500)]
    for _ in range(2):
        await world.answer(RefundFundsHeld("sandbox:re_1", HOLD))
    assert world.said() == [(F.REFUND_REQUESTED, 2500), (F.REFUND_COMPLETED, 2500)]
    assert (world.store.facts[1].succeeded, world.store.facts[1].hold_id) == (True, HOLD)
    assert (world.refund().state, world.refund().booking) == (RefundState.SUCCEEDED, B.BOOKED)
    assert world.findings() == []


async def test_two_refunds_of_the_same_amount_are_two() -> None:
    world = World()
    await world.notifications.apply([told("evt_1", 2500), told("evt_2", 2500, "re_2")])
    await world.tell(told("evt_3", 2500, "re_3"))
    assert (world.order.state, world.order.refunded_minor) == (S.REFUNDED, 7500)
    assert world.said() == [(F.REFUND_REQUESTED, 2500)] * 3


async def test_what_the_wallet_does_not_cover_is_claimed_and_nothing_more() -> None:
    world = World()
    await world.tell(told("evt_1", 7500))
    await world.answer(RefundFundsRefused("sandbox:re_1", "INSUFFICIENT_FUNDS", 6000))
    assert world.store.facts[-1].reference == "sandbox:re_1/2"
    await world.answer(RefundFundsRefused("sandbox:re_1", "INSUFFICIENT_FUNDS", 6000))  # an old answer, again
    await world.answer(RefundFundsHeld("sandbox:re_1/2", HOLD))
    assert world.said() == [
        (F.REFUND_REQUESTED, 7500),
        (F.REFUND_REQUESTED, 6000),
        (F.REFUND_COMPLETED, 6000),
        (F.REFUND_CLAIMED, 1500),
    ]
    assert world.refund().claimed_minor == 1500


@pytest.mark.parametrize("available", [0, 10])
async def test_a_wallet_that_never_has_enough_owes_the_whole(available: int) -> None:
    world = World()
    await world.tell(told("evt_1"))
    for _ in range(2 * HOLD_TRIES_MAX):
        await world.answer(RefundFundsRefused(world.refund().hold_reference, "INSUFFICIENT_FUNDS", available))
    assert world.said()[-1] == (F.REFUND_CLAIMED, 7500)
    assert len(world.said()) == (1 + HOLD_TRIES_MAX if available else 2)
    assert world.refund().claimed_minor == 7500


@pytest.mark.parametrize("held", [0, 3000, 7500])
async def test_a_refund_that_fails_after_all_gives_back_what_it_took(held: int) -> None:
    world = World()
    await world.tell(told("evt_1"))
    if held < 7500:
        await world.answer(RefundFundsRefused("sandbox:re_1", "INSUFFICIENT_FUNDS", held))
    if held:
        await world.answer(RefundFundsHeld(world.refund().hold_reference, HOLD))
    world.store.facts.clear()
    for event_id in ("evt_2", "evt_3"):
        await world.tell(told(event_id, kind=K.REFUND_FAILED, reason="account closed"))
    assert (world.order.state, world.order.refunded_minor) == (S.SUCCESS, 0)
    assert [(fact.amount_minor, fact.claimed) for fact in world.store.facts] == [
        *([(held, False)] if held else []),
        *([(7500 - held, True)] if held < 7500 else []),
    ]
    assert {fact.kind for fact in world.store.facts} == {F.REFUND_REVERSED}
    assert (world.refund().state, world.refund().failure_reason) == (RefundState.FAILED, "account closed")


@pytest.mark.parametrize("is_held", [True, False])
async def test_a_refund_that_fails_before_the_wallet_answered_leaves_nothing_behind(is_held: bool) -> None:
    world = World()
    await world.tell(told("evt_1"), told("evt_2", kind=K.REFUND_FAILED))
    if is_held:
        await world.answer(RefundFundsHeld("sandbox:re_1", HOLD))
        assert (world.store.facts[-1].kind, world.store.facts[-1].succeeded) == (F.REFUND_COMPLETED, False)
    else:
        await world.answer(RefundFundsRefused("sandbox:re_1", "INSUFFICIENT_FUNDS", 100))
        assert world.said() == [(F.REFUND_REQUESTED, 7500)]
    assert world.order.state is S.SUCCESS


async def test_a_failure_that_overtakes_its_success_books_nothing_and_says_so() -> None:
    world = World()
    await world.tell(told("evt_2", kind=K.REFUND_FAILED), told("evt_1"))
    assert (world.order.state, world.said(), world.findings()) == (S.SUCCESS, [], [FindingKind.REFUND_UNCLEAR])
    assert world.refund().state is RefundState.FAILED


@pytest.mark.parametrize(
    ("given", "notification", "outcome", "kind"),
    [
        (order(), told("e", 7501), Outcome.FLAGGED, FindingKind.REFUND_TOO_LARGE),
        (order(refunded_minor=7000), told("e", 501), Outcome.FLAGGED, FindingKind.REFUND_TOO_LARGE),
        (order(), told("e", currency_code="EUR"), Outcome.FLAGGED, FindingKind.REFUND_UNCLEAR),
        (order(), told("e", None), Outcome.FLAGGED, FindingKind.REFUND_UNCLEAR),
        (order(), told("e", 0), Outcome.FLAGGED, FindingKind.REFUND_UNCLEAR),
        (order(), told("e", -5), Outcome.FLAGGED, FindingKind.REFUND_UNCLEAR),
        (order(), told("e", refund=""), Outcome.FLAGGED, FindingKind.REFUND_UNCLEAR),
        (order(S.EXECUTING), told("e"), Outcome.PARKED, FindingKind.REFUND_OF_UNPAID),
        (order(S.EXPIRED), told("e"), Outcome.PARKED, FindingKind.REFUND_OF_UNPAID),
        (order(S.DISPUTED), told("e"), Outcome.FLAGGED, FindingKind.REFUND_OF_DISPUTED),
        (order(S.DISPUTE_LOST), told("e"), Outcome.FLAGGED, FindingKind.REFUND_OF_DISPUTED),
    ],
)
async def test_what_does_not_agree_is_never_booked_and_never_silent(
    given: PaymentOrder, notification: Notification, outcome: Outcome, kind: FindingKind
) -> None:
    world = World(given)
    before = given.state, given.refunded_minor
    await world.tell(notification)
    assert (world.order.state, world.order.refunded_minor) == before
    assert (world.said(), world.store.refunds) == ([], {})
    assert world.findings() == [kind]
    assert world.store.notifications["sandbox", "e"].outcome is outcome
    assert world.reported == [(Outcome.FLAGGED, "e")]
    assert "not booked" in world.order.attention


async def test_a_refund_whose_order_is_unknown_is_parked_as_before() -> None:
    world = World()
    await world.tell(told("evt_1", psp_payment_id="pi_9"), told("evt_2", psp_payment_id=""))
    assert {each.outcome for each in world.store.notifications.values()} == {Outcome.PARKED}
    assert world.findings() == []


SUCCEEDED = Notification("sandbox", "evt_2", K.ORDER_SUCCEEDED, "pi_1", "ORD-1", "USD", 7500)
OPENED = Notification("sandbox", "evt_3", K.DISPUTE_OPENED, "pi_1", "ORD-1", "USD", 7500)


async def test_a_refund_told_before_the_success_is_booked_when_it_is_tried_again() -> None:
    world = World(order(S.EXECUTING))
    await world.tell(told("evt_1"))
    world.notifications._early.clear()  # another process took the success
    await world.tell(SUCCEEDED)
    assert world.order.state is S.SUCCESS
    await world.notifications.retry_parked()
    assert world.order.state is S.REFUNDED
    assert [kind for kind, _ in world.said()] == [F.ORDER_SUCCEEDED, F.REFUND_REQUESTED]


async def test_what_was_said_of_an_unpaid_order_is_resolved_once_the_refund_is_looked_at_again() -> None:
    for amount, kinds in ((7500, []), (9000, [FindingKind.REFUND_TOO_LARGE])):
        world = World(order(S.EXECUTING))
        await world.tell(told("evt_1", amount))
        assert [each.is_open for each in world.store.findings.values()] == [True]
        await world.tell(SUCCEEDED)
        await world.notifications.retry_parked()
        resolved = [each for each in world.store.findings.values() if not each.is_open]
        assert [each.kind for each in resolved] == [FindingKind.REFUND_OF_UNPAID]
        assert resolved[0].resolved_by == "payment"
        assert [each.kind for each in world.store.findings.values() if each.is_open] == kinds


async def test_a_refund_of_an_unpaid_order_that_failed_gave_nothing_back_and_is_no_finding() -> None:
    world = World(order(S.EXECUTING))
    await world.tell(told("evt_1", kind=K.REFUND_FAILED))
    assert world.findings() == []
    assert world.store.notifications["sandbox", "evt_1"].outcome is Outcome.PARKED
    await world.tell(SUCCEEDED, told("evt_2"))
    await world.notifications.retry_parked()
    assert (world.order.state, world.order.refunded_minor, world.findings()) == (S.SUCCESS, 0, [])


@pytest.mark.parametrize("way", ["webhook", "one webhook", "found by asking", "with a token of its own"])
@pytest.mark.parametrize("early", [told("evt_1"), OPENED], ids=["refund", "dispute"])
async def test_what_is_told_before_the_success_waits_for_nothing_but_it(early: Notification, way: str) -> None:
    """Not for the schedule, which is up to two minutes later."""
    token = "" if way == "with a token of its own" else "pi_1"
    world = World(order(S.EXECUTING, psp_token=token))
    if way == "one webhook":
        await world.notifications.apply([early, SUCCEEDED])
    else:
        await world.tell(early, early)
        if way == "found by asking":
            await world.reports.apply("executor.events", [("m1", OutcomeFound(SUCCEEDED))])
        else:
            await world.tell(SUCCEEDED)
    while (worker := world.notifications._worker) is not None:
        await worker
    kind, state = {
        K.REFUND_SUCCEEDED: (F.REFUND_REQUESTED, S.REFUNDED),
        K.DISPUTE_OPENED: (F.DISPUTE_OPENED, S.DISPUTED),
    }[early.kind]
    assert world.order.state is state
    assert [each for each, _ in world.said()] == [F.ORDER_SUCCEEDED, kind]
    assert world.notifications._early == {}


async def test_what_wakes_and_fails_stays_parked_for_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(order(S.EXECUTING))
    await world.tell(told("evt_1"))
    apply, writes = world.store.apply, 0

    async def fails_after_the_success(changes: Any) -> bool:
        nonlocal writes
        writes += 1
        if writes == 2:
            raise OSError("no database")
        return await apply(changes)

    monkeypatch.setattr(world.store, "apply", fails_after_the_success)
    await world.tell(SUCCEEDED)
    while (worker := world.notifications._worker) is not None:
        await worker
    assert (world.order.state, writes) == (S.SUCCESS, 2)
    await world.notifications.retry_parked()
    assert world.order.state is S.REFUNDED


async def test_early_notifications_of_many_orders_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "EARLY_MAX", 3)
    world = World(order(S.EXECUTING))
    for n in range(9):
        await world.tell(told(f"evt_{n}", psp_payment_id=f"pi_{n}", refund=f"re_{n}"))
    assert len(world.notifications._early) == 3


async def test_a_refund_that_is_told_with_another_amount_later_changes_nothing() -> None:
    world = World()
    await world.tell(told("evt_1", 100), told("evt_2", 200), told("evt_3", 200, kind=K.REFUND_FAILED))
    assert (world.order.refunded_minor, world.said()) == (100, [(F.REFUND_REQUESTED, 100)])
    assert world.findings() == [FindingKind.REFUND_UNCLEAR] * 2


async def test_a_refund_is_not_mistaken_for_an_order_that_has_its_reference() -> None:
    world = World(order(), PaymentOrder("ORD-2", "CH-1", "SELL-2", "USD", 7500, S.SUCCESS, NOW, NOW))
    await world.tell(told("evt_1", psp_payment_id="pi_9", merchant_reference="ORD-2"))
    assert world.said() == []
    assert world.store.notifications["sandbox", "evt_1"].outcome is Outcome.PARKED


async def test_a_notification_that_is_given_up_becomes_a_finding() -> None:
    world = World()
    await world.tell(told("evt_1", psp_payment_id="pi_9", attempt_count=40))
    assert world.findings() == [FindingKind.NOTIFICATION_GIVEN_UP]
    assert world.store.notifications["sandbox", "evt_1"].next_attempt_time is None
    assert world.reported == [(Outcome.FLAGGED, "evt_1")]


async def test_the_same_finding_is_kept_once_and_different_ones_all() -> None:
    """Risk: "paid 1 USD" is replaced by "paid 0 usd", told later."""
    world = World(order(S.EXECUTING))

    def paid(event_id: str, amount: int, currency: str = "USD") -> Notification:
        return Notification("sandbox", event_id, K.ORDER_SUCCEEDED, "pi_1", "ORD-1", currency, amount)

    await world.tell(paid("1", 100), paid("2", 0, "usd"), paid("3", 100), paid("4", 7499))
    assert world.findings() == [FindingKind.AMOUNT_MISMATCH] * 3
    told_amounts = [each.theirs["amount_minor"] for each in world.store.findings.values()]
    assert sorted(told_amounts) == ["0", "100", "7499"]
    assert {each.ours["amount_minor"] for each in world.store.findings.values()} == {"7500"}


def test_every_refund_of_a_psp_has_an_id_of_its_own_that_the_contract_takes() -> None:
    assert told_refund_id("sandbox", "re_1") == "sandbox:re_1"
    assert len(told_refund_id("p" * 64, "r" * 255)) <= 128
    odd = ["re 1", "re/1", "r" * 61, "r" * 255, "ж", "re\u0000"]
    ids = [told_refund_id("sandbox", each) for each in odd]
    assert len(set(ids)) == len(odd)
    assert all(len(each) <= 128 and each.isascii() and "/" not in each for each in ids)


@pytest.mark.parametrize("seed", range(60))
async def test_any_order_of_any_facts_books_what_the_psp_said_last(seed: int) -> None:
    """What is taken, claimed and given back adds up to what the PSP refunded, whatever comes in which order."""
    draw = random.Random(seed)
    world = World()
    amounts = {f"re_{number}": draw.randint(1, 3500) for number in range(1, 4)}
    notifications = [
        told(f"{refund}-{number}", amount, refund, kind=K.REFUND_FAILED if number == 2 else K.REFUND_SUCCEEDED)
        for refund, amount in amounts.items()
        for number in range(draw.choice([2, 3]))
    ]
    available = draw.randint(0, 7500)
    held = 0

    async def answer_all() -> None:
        nonlocal available, held
        while (refund := next((r for r in world.store.refunds.values() if r.booking is B.HOLDING), None)) is not None:
            if refund.held_minor <= available:
                available -= refund.held_minor
                await world.answer(RefundFundsHeld(refund.hold_reference, HOLD))
            else:
                await world.answer(RefundFundsRefused(refund.hold_reference, "INSUFFICIENT_FUNDS", available))

    for each in notifications:
        await world.tell(each)
        if draw.random() < 0.5:
            await answer_all()
    await answer_all()
    moved = 0
    for fact in world.store.facts:
        if fact.kind is F.REFUND_CLAIMED or (fact.kind is F.REFUND_COMPLETED and fact.succeeded):
            moved += fact.amount_minor
        elif fact.kind is F.REFUND_REVERSED:
            moved -= fact.amount_minor
    assert moved == world.order.refunded_minor
    succeeded = [each for each in world.store.refunds.values() if each.state is RefundState.SUCCEEDED]
    assert world.order.refunded_minor == sum(each.amount_minor for each in succeeded)
