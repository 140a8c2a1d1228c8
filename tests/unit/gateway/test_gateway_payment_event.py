"""Risk: a wrong amount that looks right, a wrong field that is not named, a rule that differs from the contract's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain import PaymentEvent, PaymentOrderSpec, decimal_text, parse_payment_event
from gateway.domain.payment_event import ORDERS_MAX
from kernel.errors import FieldViolation
from kernel.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS

SAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "payment_event.json"
EVENT: dict[str, Any] = json.loads(SAMPLE.read_bytes())
REMOVED = object()


def parse(event: Any, **named: Any) -> PaymentEvent | list[FieldViolation]:
    return parse_payment_event(json.dumps(event).encode(), **named)


def with_field(path: str, value: Any) -> dict[str, Any]:
    """The sample with one field changed: ``payment_orders.1.amount``."""
    event = copy.deepcopy(EVENT)
    *outer, last = path.split(".")
    inner: Any = event
    for part in outer:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    key = int(last) if last.isdigit() else last
    if value is REMOVED:
        del inner[key]
    else:
        inner[key] = value
    return event


def fields_of(result: PaymentEvent | list[FieldViolation]) -> list[str]:
    assert isinstance(result, list)
    return [violation.field for violation in result]


def test_the_sample_of_the_requirements() -> None:
    event = parse_payment_event(SAMPLE.read_bytes())
    assert isinstance(event, PaymentEvent)
    assert event.checkout_id == "CHCKT-20250721-ABCD-1234"
    assert event.buyer_info.email == "jane.doe@example.com"
    assert event.payment_orders == (
        PaymentOrderSpec("ORD-123-A", "SELL-XYZ-1", "USD", 7500, ""),
        PaymentOrderSpec("ORD-123-B", "SELL-ABC-2", "USD", 2500, ""),
    )


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [
        ("75", "USD", 7500),
        ("75.00", "USD", 7500),
        ('"75.00"', "USD", 7500),
        ("75.0000", "USD", 7500),
        ("0.01", "USD", 1),
        ("7.5e1", "USD", 7500),
        ('"1E2"', "USD", 10000),
        ("75", "JPY", 75),
        ("75.000", "KWD", 75000),
        ("0.0001", "CLF", 1),
        ("10000000000000.00", "USD", AMOUNT_MINOR_MAX),
    ],
)
def test_amounts_are_exact(amount: str, currency: str, minor: int) -> None:
    body = json.dumps(with_field("payment_orders.0.currency", currency)).replace("75.0", amount, 1)
    event = parse_payment_event(body.encode())
    assert isinstance(event, PaymentEvent), event
    assert event.payment_orders[0].amount_minor == minor


@pytest.mark.parametrize(
    ("amount", "currency", "message"),
    [
        ("0", "USD", "more than zero"),
        ("-0", "USD", "more than zero"),
        ("0.00", "USD", "more than zero"),
        ("-1", "USD", "more than zero"),
        ("75.001", "USD", "more decimals than USD"),
        ("75.0000000000000000000001", "USD", "more decimals than USD"),
        ("75.00000000000000000000000000000000001", "USD", "at most"),
        ("0.5", "JPY", "more decimals than JPY"),
        ("1.0001", "KWD", "more decimals than KWD"),
        ("10000000000000.01", "USD", "must not be more than"),
        ("9223372036854775808", "JPY", "must not be more than"),
        ("1e999999", "USD", "must not be more than"),
        ("1e-999999", "USD", "more decimals"),
        ("1e99999999999999999999", "USD", "exponent"),
        ('"1,000.00"', "USD", "decimal number"),
        ('"٧٥"', "USD", "decimal number"),
        ('" 75"', "USD", "decimal number"),
        ('"75\\n"', "USD", "decimal number"),
        ('"Infinity"', "USD", "decimal number"),
        ('""', "USD", "decimal number"),
        ("true", "USD", "decimal number"),
        ("null", "USD", "decimal number"),
        ("[75]", "USD", "decimal number"),
        ("-5", "XXX", "more than zero"),
    ],
)
def test_an_amount_that_is_no_money_is_named(amount: str, currency: str, message: str) -> None:
    body = json.dumps(with_field("payment_orders.1.currency", currency)).replace("25.0", amount, 1)
    violations = parse_payment_event(body.encode())
    assert isinstance(violations, list)
    assert [
        each.description
        for each in violations
        if each.field == "payment_orders[1].amount" and message in each.description
    ]


@given(st.sampled_from(sorted(CURRENCY_EXPONENTS)), st.integers(1, AMOUNT_MINOR_MAX), st.booleans())
def test_every_amount_survives_the_way_there_and_back(currency: str, minor: int, as_text: bool) -> None:
    amount = decimal_text(minor, currency)
    event = with_field("payment_orders.0.currency", currency)
    event["payment_orders"][0]["amount"] = "AMOUNT"
    body = json.dumps(event).replace('"AMOUNT"', f'"{amount}"' if as_text else amount)
    parsed = parse_payment_event(body.encode())
    assert isinstance(parsed, PaymentEvent), parsed
    assert parsed.payment_orders[0].amount_minor == minor


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("checkout_id", REMOVED, "checkout_id"),
        ("checkout_id", "", "checkout_id"),
        ("checkout_id", 5, "checkout_id"),
        ("checkout_id", "a b", "checkout_id"),
        ("checkout_id", "a/b", "checkout_id"),
        ("checkout_id", "ok\n", "checkout_id"),
        ("checkout_id", "x" * 129, "checkout_id"),
        ("buyer_info", REMOVED, "buyer_info"),
        ("buyer_info", [], "buyer_info"),
        ("buyer_info.buyer_id", REMOVED, "buyer_info.buyer_id"),
        ("buyer_info.buyer_id", "", "buyer_info.buyer_id"),
        ("buyer_info.name", "Jane\0Doe", "buyer_info.name"),
        ("buyer_info.name", "\ud800", "buyer_info.name"),
        ("buyer_info.name", "x" * 201, "buyer_info.name"),
        ("buyer_info.name", None, "buyer_info.name"),
        ("buyer_info.email", "x" * 255, "buyer_info.email"),
        ("buyer_info.age", 3, "buyer_info.age"),
        ("payment_orders", REMOVED, "payment_orders"),
        ("payment_orders", [], "payment_orders"),
        ("payment_orders", {}, "payment_orders"),
        ("payment_orders.1", "x", "payment_orders[1]"),
        ("payment_orders.1.payment_order_id", REMOVED, "payment_orders[1].payment_order_id"),
        ("payment_orders.1.payment_order_id", "ORD-123-A", "payment_orders[1].payment_order_id"),
        ("payment_orders.1.seller_account", "a/b", "payment_orders[1].seller_account"),
        ("payment_orders.1.amount", REMOVED, "payment_orders[1].amount"),
        ("payment_orders.1.currency", REMOVED, "payment_orders[1].currency"),
        ("payment_orders.1.currency", "usd", "payment_orders[1].currency"),
        ("payment_orders.1.currency", "XYZ", "payment_orders[1].currency"),
        ("payment_orders.1.currency", 840, "payment_orders[1].currency"),
        ("payment_orders.1.psp", 1, "payment_orders[1].psp"),
        ("payment_orders.1.fee", 1, "payment_orders[1].fee"),
        ("extra", 1, "extra"),
    ],
)
def test_one_wrong_field_is_named_alone(path: str, value: Any, field: str) -> None:
    assert fields_of(parse(with_field(path, value))) == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    event = with_field("payment_orders.0.amount", "-1")
    event["payment_orders"][1].update(amount="1.001", currency="USD", payment_order_id="ORD 1")
    event["buyer_info"]["buyer_id"] = ""
    event["checkout_id"] = None
    event["surprise"] = {}
    assert fields_of(parse(event)) == [
        "surprise",
        "checkout_id",
        "buyer_info.buyer_id",
        "payment_orders[0].amount",
        "payment_orders[1].payment_order_id",
        "payment_orders[1].amount",
    ]


def test_a_repeated_key_is_refused_where_it_is() -> None:
    body = json.dumps(EVENT).replace('"amount": 25.0', '"amount": 25.0, "amount": 1.0')
    assert fields_of(parse_payment_event(body.encode())) == ["payment_orders[1].amount"]


def test_the_number_of_orders_is_bounded() -> None:
    def event_of(count: int) -> dict[str, Any]:
        orders = [{**EVENT["payment_orders"][0], "payment_order_id": f"O-{number}"} for number in range(count)]
        return {**EVENT, "payment_orders": orders}

    assert isinstance(parse(event_of(ORDERS_MAX)), PaymentEvent)
    assert fields_of(parse(event_of(ORDERS_MAX + 1))) == ["payment_orders"]
    assert isinstance(parse(event_of(3), orders_max=3), PaymentEvent)
    assert fields_of(parse(event_of(4), orders_max=3)) == ["payment_orders"]
    assert fields_of(parse(event_of(ORDERS_MAX + 1), orders_max=1000)) == ["payment_orders"]


def test_an_answer_is_bounded_however_much_is_wrong() -> None:
    event = {f"field {number}": number for number in range(1000)} | {"\ud800" * 500: 1}
    violations = parse(event)
    assert isinstance(violations, list)
    assert len(violations) == 100
    assert all(len(each.field) < 60 for each in violations)
    json.dumps([each.field for each in violations]).encode()


@pytest.mark.parametrize("body", [b"[]", b'["a"]', b"null", b"1", b'"x"', b"true"])
def test_a_document_that_is_no_object(body: bytes) -> None:
    assert fields_of(parse_payment_event(body)) == ["$"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(
        [
            "checkout_id",
            "buyer_info",
            "buyer_info.name",
            "payment_orders",
            "payment_orders.0",
            "payment_orders.1.amount",
        ]
    ),
    json_values,
)
def test_any_value_anywhere_is_taken_or_refused_by_path(path: str, value: Any) -> None:
    result = parse(with_field(path, value))
    if isinstance(result, list):
        assert result
        assert all(each.field and each.description for each in result)
