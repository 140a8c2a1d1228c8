"""What notifications and reports do to an order: no money lost, none twice, nothing credited that contradicts us."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.state_table import TransitionRefused
from payment.domain.facts import FactKind
from payment.domain.finding import FindingKind
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment import Buyer, Payment
from payment.domain.payment_order import OPEN_STATES, PAID_STATES, PaymentOrder, PaymentOrderState

NOW = datetime(2025, 7, 21, tzinfo=UTC)
S, K = PaymentOrderState, NotificationKind


def order(state: PaymentOrderState = S.NOT_STARTED, **values: Any) -> PaymentOrder:
    if state is not S.NOT_STARTED:
        values = {"psp": "sandbox", "psp_token": "pi_1", **values}
    return PaymentOrder("ORD-1", "CH-1", "SELL-1", "USD", 7500, state, NOW, NOW, stored_state=state, **values)


def told(kind: NotificationKind, event_id: str = "evt_1", **values: Any) -> Notification:
    values = {
        "psp_object_id": "pi_1",
        "merchant_reference": "ORD-1",
        "currency_code": "USD",
        "amount_minor": 7500,
        **values,
    }
    return Notification(values.pop("psp", "sandbox"), event_id, kind, **values)


def kinds(each: PaymentOrder) -> list[FactKind]:
    return [fact.kind for fact in each.facts]


def test_registered_then_paid() -> None:
    each = order()
    assert each.register("sandbox", "pi_1", "http://pay", NOW)
    assert (each.state, each.hosted_page_url, each.facts) == (S.EXECUTING, "http://pay", [])
    assert each.notify(told(K.ORDER_SUCCEEDED), NOW) is Outcome.APPLIED
    assert (each.state, each.hosted_page_url, each.revision) == (S.SUCCESS, "", 3)
    assert each.is_closed_now
    assert [(fact.kind, fact.psp, fact.psp_object_id) for fact in each.facts] == [
        (FactKind.ORDER_SUCCEEDED, "sandbox", "pi_1")
    ]
    assert [(change.state, change.cause) for change in each.changes] == [
        (S.EXECUTING, "order_registered"),
        (S.SUCCESS, "notification evt_1"),
    ]


def test_a_second_event_object_for_the_same_success_does_nothing() -> None:
    each = order(S.SUCCESS)
    assert each.notify(told(K.ORDER_SUCCEEDED, "evt_2"), NOW) is Outcome.IGNORED
    assert (each.is_changed, each.facts) == (False, [])


def test_webhook_that_overtakes_the_registration_is_credited_and_the_registration_changes_nothing() -> None:
    each = order()
    assert each.notify(told(K.ORDER_SUCCEEDED), NOW) is Outcome.APPLIED
    assert not each.register("sandbox", "pi_1", "http://pay", NOW)
    assert (each.state, each.psp, each.psp_token, each.hosted_page_url) == (S.SUCCESS, "sandbox", "pi_1", "")


@pytest.mark.parametrize("state", [S.FAILED, S.CANCELED, S.EXPIRED])
def test_late_success_is_credited_and_counts_as_closed_only_once(state: PaymentOrderState) -> None:
    each = order(state, failure_reason="declined")
    assert each.notify(told(K.ORDER_SUCCEEDED), NOW) is Outcome.APPLIED
    assert (each.state, each.failure_reason, kinds(each)) == (S.SUCCESS, "", [FactKind.ORDER_SUCCEEDED])
    assert not each.is_closed_now


@pytest.mark.parametrize("kind", [K.ORDER_FAILED, K.ORDER_CANCELED, K.ORDER_EXPIRED, K.ORDER_PENDING])
def test_end_of_an_unpaid_intent_after_success_changes_nothing(kind: NotificationKind) -> None:
    each = order(S.SUCCESS)
    assert each.notify(told(kind), NOW) is Outcome.IGNORED
    assert not each.is_changed


@pytest.mark.parametrize(
    "wrong", [{"amount_minor": 7499}, {"amount_minor": 75}, {"currency_code": "EUR"}, {"amount_minor": 0}]
)
@pytest.mark.parametrize("state", [S.NOT_STARTED, S.EXECUTING, S.FAILED])
def test_success_with_another_amount_or_currency_is_never_credited(
    state: PaymentOrderState, wrong: dict[str, Any]
) -> None:
    each = order(state)
    assert each.notify(told(K.ORDER_SUCCEEDED, **wrong), NOW) is Outcome.FLAGGED
    assert (each.state, each.facts) == (state, [])
    assert "not credited" in each.attention
    assert each.failure_reason == each.attention
    assert each.is_changed
    assert each.notify(told(K.ORDER_SUCCEEDED, "evt_2"), NOW) is Outcome.APPLIED
    assert each.failure_reason == ""
    assert "not credited" in each.attention, "the wrong payment is still to be looked at"
    assert [found.kind for found in each.new_findings] == [FindingKind.AMOUNT_MISMATCH]


def test_success_without_an_amount_is_taken() -> None:
    each = order(S.EXECUTING)
    assert each.notify(told(K.ORDER_SUCCEEDED, amount_minor=None, currency_code=""), NOW) is Outcome.APPLIED


def test_paid_twice_at_two_intents_is_flagged_not_credited_again() -> None:
    each = order(S.SUCCESS)
    second = told(K.ORDER_SUCCEEDED, psp="sandbox2", psp_object_id="pi_9")
    assert each.notify(second, NOW) is Outcome.FLAGGED
    assert (each.state, each.psp, each.facts, each.failure_reason) == (S.SUCCESS, "sandbox", [], "")
    assert "paid twice" in each.attention


def test_end_of_another_intent_says_nothing_but_its_success_does() -> None:
    each = order(S.EXECUTING)
    other = {"psp": "sandbox2", "psp_object_id": "pi_9"}
    assert each.notify(told(K.ORDER_FAILED, **other), NOW) is Outcome.IGNORED
    assert each.state is S.EXECUTING
    assert each.notify(told(K.ORDER_SUCCEEDED, "evt_2", **other), NOW) is Outcome.APPLIED
    assert (each.psp, each.psp_token) == ("sandbox2", "pi_9")
    assert [(fact.kind, fact.psp, fact.psp_object_id) for fact in each.facts] == [
        (FactKind.CANCEL_ORDER, "sandbox", "pi_1"),
        (FactKind.ORDER_SUCCEEDED, "sandbox2", "pi_9"),
    ]


def test_another_psp_that_names_no_intent_does_not_speak_for_ours() -> None:
    each = order(S.EXECUTING)
    other = {"psp": "sandbox2", "psp_object_id": ""}
    assert each.notify(told(K.ORDER_FAILED, **other), NOW) is Outcome.IGNORED
    assert each.state is S.EXECUTING
    assert each.notify(told(K.ORDER_SUCCEEDED, "evt_2", **other), NOW) is Outcome.APPLIED
    assert (each.psp, each.psp_token) == ("sandbox2", "")  # never the other one's name on our intent
    assert FactKind.CANCEL_ORDER in kinds(each)


@pytest.mark.parametrize(
    ("kind", "state"),
    [(K.ORDER_FAILED, S.FAILED), (K.ORDER_CANCELED, S.CANCELED), (K.ORDER_EXPIRED, S.EXPIRED)],
)
def test_unpaid_ends_say_why(kind: NotificationKind, state: PaymentOrderState) -> None:
    each = order(S.EXECUTING, hosted_page_url="http://pay")
    assert each.notify(told(kind, code="card_declined", reason="no money"), NOW) is Outcome.APPLIED
    assert (each.state, each.failure_reason, each.hosted_page_url) == (state, "no money (card_declined)", "")
    assert [(fact.kind, fact.state, fact.reason) for fact in each.facts] == [
        (FactKind.ORDER_CLOSED, state.name, each.failure_reason)
    ]
    bare = order()
    bare.notify(told(kind), NOW)
    assert bare.failure_reason == kind.name.lower().replace("_", " ")
    assert bare.psp == "sandbox"


def test_rejected_by_every_provider() -> None:
    each = order()
    assert each.reject("sandbox", "currency_unsupported", "", NOW)
    assert (each.state, each.failure_reason) == (S.FAILED, "rejected by the provider (currency_unsupported)")
    assert kinds(each) == [FactKind.ORDER_CLOSED]
    assert not each.reject("sandbox", "x", "y", NOW)
    assert not order(S.EXECUTING).reject("sandbox", "x", "late", NOW)


def test_cancel_before_and_after_the_psp_has_it() -> None:
    early = order()
    assert early.cancel("", NOW)
    assert (early.state, early.failure_reason, kinds(early)) == (
        S.CANCELED,
        "canceled by the caller",
        [FactKind.ORDER_CLOSED],
    )
    late = order(S.EXECUTING)
    assert late.cancel("changed my mind", NOW)
    assert (late.state, kinds(late)) == (S.EXECUTING, [FactKind.CANCEL_ORDER])
    assert late.changes[-1].cause == "cancel requested: changed my mind"
    assert not late.cancel("again", NOW)
    assert not order(S.SUCCESS).cancel("too late", NOW)
    assert late.notify(told(K.ORDER_CANCELED), NOW) is Outcome.APPLIED
    assert late.state is S.CANCELED


@pytest.mark.parametrize("close", [lambda each: each.cancel("no", NOW), lambda each: each.time_out(NOW)])
def test_intent_that_becomes_known_after_the_end_is_canceled_at_the_psp(close: Any) -> None:
    each = order()
    close(each)
    each.facts.clear()
    assert each.register("sandbox", "pi_1", "http://pay", NOW)
    assert (each.hosted_page_url, each.psp_token) == ("", "pi_1")
    assert [(fact.kind, fact.psp_object_id) for fact in each.facts] == [(FactKind.CANCEL_ORDER, "pi_1")]
    assert not each.register("sandbox", "pi_1", "http://pay", NOW)


def test_intent_that_becomes_known_after_a_failure_is_kept_and_nothing_is_sent() -> None:
    each = order()
    each.notify(told(K.ORDER_FAILED, psp_object_id=""), NOW)
    each.facts.clear()
    assert each.register("sandbox", "pi_1", "http://pay", NOW)
    assert (each.state, each.psp_token, each.facts) == (S.FAILED, "pi_1", [])


def test_unpaid_in_time_expires_and_the_intent_is_canceled() -> None:
    each = order(S.EXECUTING)
    assert each.time_out(NOW)
    assert (each.state, each.failure_reason) == (S.EXPIRED, "not paid in time")
    assert kinds(each) == [FactKind.ORDER_CLOSED, FactKind.CANCEL_ORDER]
    assert not each.time_out(NOW)
    asked = order(S.EXECUTING, cancel_requested=True)
    asked.time_out(NOW)
    assert kinds(asked) == [FactKind.ORDER_CLOSED]


def test_disputes_end_where_the_refunds_left_the_order() -> None:
    for refunded, won_state in ((0, S.SUCCESS), (500, S.PARTIALLY_REFUNDED), (7500, S.REFUNDED)):
        each = order(S.SUCCESS)
        if refunded:
            each.add_refund(refunded, "refund R-1", NOW)
        assert each.notify(told(K.DISPUTE_OPENED), NOW) is Outcome.APPLIED
        assert each.notify(told(K.DISPUTE_OPENED, "evt_2"), NOW) is Outcome.IGNORED
        assert each.notify(told(K.DISPUTE_WON, "evt_3"), NOW) is Outcome.APPLIED
        assert each.state is won_state
        left = 7500 - refunded
        assert [(fact.kind, fact.won, fact.amount_minor) for fact in each.facts] == (
            [(FactKind.DISPUTE_OPENED, False, left), (FactKind.DISPUTE_CLOSED, True, left)] if left else []
        ), "a dispute takes no more than refunds have left"
        assert [found.kind for found in each.new_findings] == [FindingKind.DISPUTE_MISMATCH] * bool(refunded)


def test_a_lost_dispute_is_never_marked_won() -> None:
    each = order(S.SUCCESS)
    assert each.notify(told(K.DISPUTE_LOST), NOW) is Outcome.APPLIED
    assert each.notify(told(K.DISPUTE_WON, "evt_2"), NOW) is Outcome.PARKED
    assert each.notify(told(K.DISPUTE_OPENED, "evt_3"), NOW) is Outcome.IGNORED
    assert each.state is S.DISPUTE_LOST


@pytest.mark.parametrize("opening_comes", [True, False])
def test_a_lost_dispute_takes_the_money_once_whether_its_opening_came_or_not(opening_comes: bool) -> None:
    """Risk: a loss whose opening never came is booked nowhere, though the PSP has taken the money."""
    each = order(S.SUCCESS)
    if opening_comes:
        each.notify(told(K.DISPUTE_OPENED), NOW)
    each.notify(told(K.DISPUTE_LOST, "evt_2"), NOW)
    each.notify(told(K.DISPUTE_OPENED, "evt_3"), NOW)
    assert [(fact.kind, fact.won) for fact in each.facts] == [
        (FactKind.DISPUTE_OPENED, False),
        (FactKind.DISPUTE_CLOSED, False),
    ]


@pytest.mark.parametrize("state", [S.NOT_STARTED, S.EXECUTING, S.FAILED, S.SUCCESS])
def test_a_success_by_the_payment_of_another_order_is_flagged_and_moves_nothing(state: PaymentOrderState) -> None:
    each = order(state)
    assert each.notify(told(K.ORDER_SUCCEEDED, psp_object_id="pi_9"), NOW, "ORD-9") is Outcome.FLAGGED
    assert (each.state, each.facts, each.psp_token in ("", "pi_1")) == (state, [], True)
    assert each.attention == "sandbox says paid by pi_9, which is the payment of order ORD-9: not credited"


def test_another_psp_that_names_no_payment_does_not_inherit_the_id_of_the_first() -> None:
    each = order(S.EXECUTING)
    assert each.notify(told(K.ORDER_SUCCEEDED, psp="sandbox2", psp_object_id=""), NOW) is Outcome.APPLIED
    assert (each.psp, each.psp_token) == ("sandbox2", "")


def test_dispute_before_the_success_is_parked_and_a_foreign_kind_ignored() -> None:
    each = order(S.EXECUTING)
    assert each.notify(told(K.DISPUTE_OPENED), NOW) is Outcome.PARKED
    assert each.notify(told(K.PAYOUT_COMPLETED), NOW) is Outcome.IGNORED
    assert not each.is_changed


def test_refunds_never_exceed_the_capture_and_survive_a_dispute() -> None:
    each = order(S.SUCCESS)
    each.add_refund(500, "refund R-1", NOW)
    assert (each.state, each.refunded_minor) == (S.PARTIALLY_REFUNDED, 500)
    each.notify(told(K.DISPUTE_OPENED), NOW)
    each.add_refund(7000, "refund R-2", NOW)
    assert (each.state, each.refunded_minor) == (S.DISPUTED, 7500)
    for amount in (1, 0, -5):
        with pytest.raises(ValueError):
            each.add_refund(amount, "refund R-3", NOW)
    with pytest.raises(TransitionRefused):
        order(S.EXECUTING).add_refund(1, "refund R-4", NOW)


def test_payment_changes_when_its_last_order_does() -> None:
    later = datetime(2025, 7, 22, tzinfo=UTC)
    second = order()
    second.cancel("no", later)
    assert Payment("CH-1", Buyer("B"), [order(), second], False, NOW).update_time == later
    assert Payment("CH-1", Buyer("B"), [], False, NOW).update_time == NOW


STEPS = st.lists(
    st.sampled_from(
        ["register", "reject", "cancel", "time_out", *[kind for kind in K if kind.subject in ("order", "")]]
    ),
    max_size=14,
)


@given(STEPS)
def test_any_order_of_any_facts_credits_exactly_when_a_success_came(steps: list[Any]) -> None:
    each = order()
    closed_count = 0
    for number, step in enumerate(steps):
        before = each.state
        if step == "register":
            each.register("sandbox", "pi_1", "http://pay", NOW)
        elif step == "reject":
            each.reject("sandbox", "code", "reason", NOW)
        elif step == "cancel":
            each.cancel("reason", NOW)
        elif step == "time_out":
            each.time_out(NOW)
        else:
            each.notify(told(step, f"evt_{number}"), NOW)
        closed_count += before in OPEN_STATES and each.state not in OPEN_STATES
    succeeded = kinds(each).count(FactKind.ORDER_SUCCEEDED)
    assert succeeded == (K.ORDER_SUCCEEDED in steps)
    assert (each.state in PAID_STATES) == (succeeded == 1)
    assert closed_count <= 1
    assert kinds(each).count(FactKind.ORDER_CLOSED) <= 1
    assert each.is_changed == bool(each.changes or each.revision > 1)
