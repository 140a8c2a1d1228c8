"""Reports and notifications of a payout: the hold ends once, and money that left is never forgotten."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.state_table import TransitionRefused
from payment.domain.bank_account import BankAccount
from payment.domain.facts import FactKind
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payout import Payout, PayoutState

NOW = datetime(2025, 7, 21, tzinfo=UTC)
HOLD = b"h" * 16
S, K = PayoutState, NotificationKind


def payout(state: PayoutState = S.HOLDING, **values: Any) -> Payout:
    if state not in (S.HOLDING, S.SCHEDULED, S.AWAITING_APPROVAL, S.CANCELED):
        values.setdefault("hold_id", HOLD)
    account = BankAccount("Jane Doe", "US", "aba_routing_number", "021000021", "1234567890")
    return Payout("PO-1", "SELL-1", "USD", 750, account, "work", "sandbox", state, NOW, NOW, **values)


def told(kind: NotificationKind, **values: Any) -> Notification:
    values = {"psp_object_id": "po_1", "currency_code": "USD", "amount_minor": 750, **values}
    return Notification(values.pop("psp", "sandbox"), "evt_1", kind, merchant_reference="PO-1", **values)


def facts(each: Payout) -> list[tuple[FactKind, bytes]]:
    return [(fact.kind, fact.hold_id) for fact in each.facts]


def test_held_submitted_processed_completed() -> None:
    each = payout()
    assert each.hold(HOLD, NOW)
    assert facts(each) == [(FactKind.EXECUTE_PAYOUT, b"")]
    assert each.submit("po_1", NOW)
    assert not each.hold(HOLD, NOW)
    assert each.notify(told(K.PAYOUT_PROCESSING), NOW) is Outcome.APPLIED
    assert not each.submit("po_1", NOW)
    assert each.notify(told(K.PAYOUT_COMPLETED), NOW) is Outcome.APPLIED
    assert (each.state, each.psp_payout_id, each.is_changed) == (S.COMPLETED, "po_1", True)
    assert facts(each)[1:] == [(FactKind.PAYOUT_COMPLETED, HOLD)]


def test_submission_reported_after_the_webhooks_keeps_the_id() -> None:
    each = payout(S.PROCESSING)
    assert each.submit("po_1", NOW)
    assert (each.state, each.psp_payout_id) == (S.PROCESSING, "po_1")


def test_funds_refused_needs_no_release() -> None:
    each = payout()
    assert each.refuse_funds("EXCEEDS_BALANCE", NOW)
    assert (each.state, each.failure_reason, each.facts) == (S.FAILED, "the wallet refused: exceeds balance", [])
    assert not each.refuse_funds("EXCEEDS_BALANCE", NOW)


@pytest.mark.parametrize("compliance", [True, False])
def test_refused_by_the_psp_releases_the_hold(compliance: bool) -> None:
    each = payout(S.PENDING)
    assert each.reject("sanctions", "on a list", compliance, NOW)
    assert each.state is (S.REJECTED if compliance else S.FAILED)
    assert each.failure_reason == "on a list (sanctions)"
    assert facts(each) == [(FactKind.PAYOUT_RELEASED, HOLD)]
    assert each.facts[0].state == each.state.name
    assert not each.reject("sanctions", "again", compliance, NOW)
    assert len(each.facts) == 1


@pytest.mark.parametrize(
    ("kind", "state"),
    [(K.PAYOUT_FAILED, S.FAILED), (K.PAYOUT_REJECTED, S.REJECTED), (K.PAYOUT_RETURNED, S.RETURNED)],
)
def test_ended_without_completion_releases_the_hold(kind: NotificationKind, state: PayoutState) -> None:
    for before in (S.PENDING, S.PROCESSING):
        each = payout(before)
        assert each.notify(told(kind, reason="no"), NOW) is Outcome.APPLIED
        assert (each.state, facts(each)) == (state, [(FactKind.PAYOUT_RELEASED, HOLD)])
        assert each.notify(told(kind), NOW) is Outcome.IGNORED


@pytest.mark.parametrize("kind", [K.PAYOUT_RETURNED, K.PAYOUT_FAILED])
def test_money_back_after_completion_is_returned(kind: NotificationKind) -> None:
    each = payout(S.COMPLETED)
    assert each.notify(told(kind, reason="account closed"), NOW) is Outcome.APPLIED
    assert (each.state, facts(each)) == (S.RETURNED, [(FactKind.PAYOUT_RETURNED, b"")])
    assert each.notify(told(K.PAYOUT_COMPLETED), NOW) is Outcome.IGNORED


@pytest.mark.parametrize("state", [S.FAILED, S.REJECTED, S.CANCELED])
def test_completion_after_the_release_is_flagged(state: PayoutState) -> None:
    each = payout(state)
    assert each.notify(told(K.PAYOUT_COMPLETED), NOW) is Outcome.FLAGGED
    assert (each.state, each.facts) == (state, [])
    assert "its hold is released" in each.attention
    revision = each.revision
    assert each.notify(told(K.PAYOUT_COMPLETED), NOW) is Outcome.FLAGGED
    assert each.revision == revision


@pytest.mark.parametrize("wrong", [{"amount_minor": 749}, {"currency_code": "EUR"}, {"psp": "sandbox2"}])
def test_completion_that_contradicts_us_is_flagged(wrong: dict[str, Any]) -> None:
    each = payout(S.PROCESSING)
    assert each.notify(told(K.PAYOUT_COMPLETED, **wrong), NOW) is Outcome.FLAGGED
    assert (each.state, each.facts) == (S.PROCESSING, [])
    assert each.attention


@pytest.mark.parametrize("kind", [K.PAYOUT_FAILED, K.PAYOUT_RETURNED, K.PAYOUT_COMPLETED])
@pytest.mark.parametrize("state", [S.PENDING, S.PROCESSING, S.COMPLETED])
def test_what_becomes_of_a_second_payout_at_the_psp_is_flagged_and_moves_no_money(
    state: PayoutState, kind: NotificationKind
) -> None:
    each = payout(state, psp_payout_id="po_1")
    assert each.notify(told(kind, psp_object_id="po_2"), NOW) is Outcome.FLAGGED
    assert (each.state, each.facts, each.psp_payout_id) == (state, [], "po_1")
    assert "po_2" in each.attention


def test_completion_before_the_hold_is_parked_and_a_foreign_kind_ignored() -> None:
    each = payout(S.HOLDING)
    assert each.notify(told(K.PAYOUT_COMPLETED), NOW) is Outcome.PARKED
    assert each.notify(told(K.ORDER_SUCCEEDED), NOW) is Outcome.IGNORED
    assert each.notify(told(K.PAYOUT_PROCESSING, amount_minor=None), NOW) is Outcome.PARKED
    assert not each.is_changed


def test_cancel_while_the_hold_is_under_way_releases_it_when_it_comes() -> None:
    each = payout()
    assert each.cancel("", NOW)
    assert (each.state, each.facts, each.failure_reason) == (S.CANCELED, [], "canceled by the caller")
    assert not each.cancel("again", NOW)
    assert each.hold(HOLD, NOW)
    assert facts(each) == [(FactKind.PAYOUT_RELEASED, HOLD)]
    assert not each.hold(HOLD, NOW)
    assert not each.refuse_funds("X", NOW)


@pytest.mark.parametrize("state", [S.PENDING, S.PROCESSING, S.COMPLETED, S.FAILED, S.REJECTED, S.RETURNED])
def test_cancel_is_refused_once_the_psp_may_have_it(state: PayoutState) -> None:
    with pytest.raises(TransitionRefused):
        payout(state).cancel("late", NOW)


def test_scheduled_asks_for_its_hold_when_due() -> None:
    each = payout(S.SCHEDULED)
    assert each.due(NOW)
    assert (each.state, facts(each)) == (S.HOLDING, [(FactKind.PAYOUT_REQUESTED, b"")])
    assert not each.due(NOW)


PSP_KINDS = [kind for kind in K if kind.subject == "payout"]


@given(st.lists(st.sampled_from(["hold", "cancel", "submit", "refuse", "reject", *PSP_KINDS]), max_size=14))
def test_any_order_of_any_facts_ends_the_hold_at_most_once(steps: list[Any]) -> None:
    each = payout()
    for step in steps:
        try:
            if step == "hold":
                each.hold(HOLD, NOW)
            elif step == "cancel":
                each.cancel("", NOW)
            elif step == "submit":
                each.submit("po_1", NOW)
            elif step == "refuse":
                each.refuse_funds("X", NOW)
            elif step == "reject":
                each.reject("c", "r", False, NOW)
            else:
                each.notify(told(step), NOW)
        except TransitionRefused:
            continue
    ends = [kind for kind, _ in facts(each) if kind in (FactKind.PAYOUT_COMPLETED, FactKind.PAYOUT_RELEASED)]
    assert len(ends) <= 1
    assert all(hold == HOLD for kind, hold in facts(each) if kind in ends)
    if each.state is S.COMPLETED:
        assert ends == [FactKind.PAYOUT_COMPLETED]
    if each.state in (S.FAILED, S.REJECTED) and each.hold_id:
        assert ends == [FactKind.PAYOUT_RELEASED]
    returned = [kind for kind, _ in facts(each) if kind is FactKind.PAYOUT_RETURNED]
    assert len(returned) <= (ends == [FactKind.PAYOUT_COMPLETED])
