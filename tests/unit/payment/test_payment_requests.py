"""Requests: every violation with its path, and the hash that tells a repeat from other content."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kernel.errors import InvalidArgument
from kernel.money import AMOUNT_MINOR_MAX
from payment.domain.bank_account import BankAccount, PostalAddress
from payment.domain.notification import Notification, NotificationKind
from payment.domain.payment import Buyer
from payment.domain.payout import PayoutState
from payment.domain.requests import (
    SCHEDULE_AHEAD_MAX,
    OrderSpec,
    PaymentRequest,
    PayoutRequest,
    check_payment,
    check_payout,
    choose_provider,
    new_payment,
    new_payout,
    payment_hash,
    payout_hash,
    used_order_violations,
)
from payment.service.page_token import page_token_of, position_of

NOW = datetime(2025, 7, 21, tzinfo=UTC)
PROVIDERS = {"sandbox": frozenset[str](), "eur_only": frozenset({"EUR"})}
ORDER = OrderSpec("ORD-1", "SELL-1", "USD", 7500)
REQUEST = PaymentRequest("CH-1", Buyer("B-1", "Jane", "jane@example.com"), (ORDER,))
PAYOUT = PayoutRequest(
    "PO-1",
    "SELL-1",
    "USD",
    750,
    BankAccount("Jane Doe", "US", "aba_routing_number", "021000021", "1234567890", address=PostalAddress("Main St 1")),
    "work",
)


def paths(*orders: OrderSpec, orders_max: int = 100) -> list[str]:
    return [each.field for each in check_payment(replace(REQUEST, orders=orders), PROVIDERS, orders_max)]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"amount_minor": 0}, "amount.amount_minor"),
        ({"amount_minor": -1}, "amount.amount_minor"),
        ({"amount_minor": AMOUNT_MINOR_MAX + 1}, "amount.amount_minor"),
        ({"currency_code": "ZZZ"}, "amount.currency_code"),
        ({"currency_code": "usd"}, "amount.currency_code"),
        ({"psp": "nobody"}, "psp"),
        ({"psp": "eur_only"}, "psp"),
    ],
)
def test_each_rule_names_its_path(change: dict[str, Any], path: str) -> None:
    assert paths(replace(ORDER, **change)) == [f"payment_orders[0].{path}"]


def test_good_orders_pass() -> None:
    assert paths(ORDER, replace(ORDER, payment_order_id="ORD-2", currency_code="EUR", psp="eur_only")) == []
    assert paths(replace(ORDER, amount_minor=AMOUNT_MINOR_MAX)) == []


def test_all_violations_are_collected_not_only_the_first() -> None:
    found = paths(
        replace(ORDER, amount_minor=0, currency_code="ZZZ"),
        ORDER,
        replace(ORDER, payment_order_id="ORD-3", psp="nobody"),
    )
    assert found == [
        "payment_orders[0].amount.currency_code",
        "payment_orders[0].amount.amount_minor",
        "payment_orders[1].payment_order_id",
        "payment_orders[2].psp",
    ]


def test_number_of_orders_is_bounded() -> None:
    assert paths() == ["payment_orders"]
    many = [replace(ORDER, payment_order_id=f"ORD-{n}") for n in range(4)]
    assert paths(*many, orders_max=3) == ["payment_orders"]
    assert paths(*many, orders_max=4) == []


def test_a_currency_that_no_provider_takes_is_refused() -> None:
    found = check_payment(REQUEST, {"eur_only": frozenset({"EUR"})}, 100)
    assert [each.field for each in found] == ["payment_orders[0].psp"]


def test_used_order_ids_are_named_by_index() -> None:
    request = replace(REQUEST, orders=(ORDER, replace(ORDER, payment_order_id="ORD-2")))
    assert [each.field for each in used_order_violations(request, ["ORD-2", "ORD-9"])] == [
        "payment_orders[1].payment_order_id"
    ]


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, checkout_id="CH-2"),
        replace(REQUEST, buyer=Buyer("B-2", "Jane", "jane@example.com")),
        replace(REQUEST, buyer=Buyer("B-1", "Jane", "joe@example.com")),
        replace(REQUEST, orders=(replace(ORDER, amount_minor=7501),)),
        replace(REQUEST, orders=(replace(ORDER, currency_code="EUR"),)),
        replace(REQUEST, orders=(replace(ORDER, seller_account="SELL-2"),)),
        replace(REQUEST, orders=(replace(ORDER, psp="sandbox"),)),
        replace(REQUEST, orders=(ORDER, replace(ORDER, payment_order_id="ORD-2"))),
    ],
)
def test_other_content_has_another_hash(other: PaymentRequest) -> None:
    assert payment_hash(other) != payment_hash(REQUEST)


def test_hashes_never_change_between_versions() -> None:
    """They are stored: a new form needs a new tag, and the old one kept for old rows."""
    assert payment_hash(REQUEST).hex() == "25b114b51140934fca7b816409c15eae6033ef4e8fde99efbf2f754aaa95a929"
    assert payout_hash(PAYOUT).hex() == "ee07e6865a3f94ab7e64d547aadea2af8c8b799a5c384cef2b0570782c227c05"


def test_moving_text_between_fields_changes_the_hash() -> None:
    one = replace(REQUEST, buyer=Buyer("B", "ab", "c"))
    two = replace(REQUEST, buyer=Buyer("B", "a", "bc"))
    assert payment_hash(one) != payment_hash(two)


def test_order_of_the_orders_is_content() -> None:
    second = replace(ORDER, payment_order_id="ORD-2")
    assert payment_hash(replace(REQUEST, orders=(ORDER, second))) != payment_hash(
        replace(REQUEST, orders=(second, ORDER))
    )


@pytest.mark.parametrize(
    "other",
    [
        replace(PAYOUT, reference="PO-2"),
        replace(PAYOUT, amount_minor=751),
        replace(PAYOUT, purpose="play"),
        replace(PAYOUT, schedule_time=NOW),
        replace(PAYOUT, recipient=replace(PAYOUT.recipient, account_number="1234567891")),
        replace(PAYOUT, recipient=replace(PAYOUT.recipient, address=None)),
    ],
)
def test_other_payout_content_has_another_hash(other: PayoutRequest) -> None:
    assert payout_hash(other) != payout_hash(PAYOUT)


def test_the_same_numbers_written_with_spaces_are_the_same_payout() -> None:
    spaced = replace(PAYOUT, recipient=replace(PAYOUT.recipient, account_number="123 456 7890", bank_code="0210-00021"))
    normalized, violations = check_payout(spaced, PROVIDERS, NOW)
    assert violations == []
    assert payout_hash(normalized) == payout_hash(PAYOUT)


def test_all_violations_of_a_payout_are_collected() -> None:
    bad = replace(
        PAYOUT,
        amount_minor=0,
        purpose=" ",
        psp="nobody",
        recipient=replace(PAYOUT.recipient, bank_code="021000022"),
        schedule_time=NOW + SCHEDULE_AHEAD_MAX + timedelta(seconds=1),
    )
    assert [each.field for each in check_payout(bad, PROVIDERS, NOW)[1]] == [
        "amount.amount_minor",
        "recipient.aba_routing_number",
        "purpose",
        "psp",
        "schedule_time",
    ]


def test_provider_of_a_payout() -> None:
    assert choose_provider("", "USD", PROVIDERS) == "sandbox"
    assert choose_provider("eur_only", "EUR", PROVIDERS) == "eur_only"
    assert choose_provider("", "USD", {"eur_only": frozenset({"EUR"})}) == ""


def test_a_schedule_time_that_has_passed_means_now() -> None:
    for offset, state in ((-1, PayoutState.HOLDING), (0, PayoutState.HOLDING), (1, PayoutState.SCHEDULED)):
        request = replace(PAYOUT, schedule_time=NOW + timedelta(seconds=offset))
        assert new_payout(request, "sandbox", NOW, "").state is state


def test_page_token_comes_back_and_refuses_other_filters_and_damage() -> None:
    position = (NOW + timedelta(microseconds=123456), "CH-ü")
    token = page_token_of(position, "payments/B-1//0")
    assert position_of(token, "payments/B-1//0") == position
    assert position_of("", "anything") is None
    for bad, scope in (
        (token, "payments/B-2//0"),
        (token[:-2], "payments/B-1//0"),
        ("A" + token[1:], "payments/B-1//0"),
        ("!!!", "payments/B-1//0"),
        ("é", "payments/B-1//0"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            position_of(bad, scope)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


def test_text_that_the_database_cannot_hold_is_refused_by_field() -> None:
    request = replace(REQUEST, buyer=Buyer("B\0", "J\0", "e\0"))
    assert [each.field for each in check_payment(request, PROVIDERS, 100)] == [
        "buyer_info.buyer_id",
        "buyer_info.name",
        "buyer_info.email",
    ]
    recipient = replace(PAYOUT.recipient, bank_name="x\0", address=PostalAddress(city="\0"))
    payout = replace(PAYOUT, purpose="a\0", recipient=recipient)
    assert [each.field for each in check_payout(payout, PROVIDERS, NOW)[1]] == [
        "recipient.bank_name",
        "recipient.address.city",
        "purpose",
    ]


def test_a_new_payment_has_its_orders_in_the_order_of_the_request() -> None:
    request = replace(REQUEST, orders=(replace(ORDER, payment_order_id="ORD-9"), ORDER))
    payment = new_payment(request, NOW, "trace", "ab" * 16)
    assert [order.payment_order_id for order in payment.orders] == ["ORD-9", "ORD-1"]
    assert {order.traceparent for order in payment.orders} == {"trace"}
    assert (payment.is_done, payment.page_key) == (False, "ab" * 16)


def test_causes_and_failures_are_words_for_people() -> None:
    told = Notification("sandbox", "evt_1", NotificationKind.ORDER_FAILED, psp_type="payment_intent.failed")
    assert told.cause == "notification evt_1 (payment_intent.failed)"
    assert replace(told, psp_event_id="").cause == "found at sandbox: order_failed"
    assert told.failure == "order failed"
    assert replace(told, reason="no money", code="card_declined").failure == "no money (card_declined)"
