"""A sandbox that takes what a real PSP refuses hides our mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.faults import NAMES, Faults, faults_from
from sandbox.rules import ApiError, Card, card_of, intent_from, object_from_json, payout_from, refund_from

INTENT: dict[str, Any] = {
    "amount": 10000,
    "currency": "usd",
    "payment_method_types": ["card"],
    "description": "Payment for order ORD-123-A",
    "metadata": {"payment_order_id": "ORD-123-A"},
    "return_url": "https://yourdomain.com/payment/return",
    "statement_descriptor": "Your Shop Name",
}
PAYOUT: dict[str, Any] = {
    "amount": {"value": 750, "currency": "USD"},
    "recipient_details": {
        "type": "bank_account",
        "account_holder_name": "Jane Doe",
        "account_number": "1234567890",
        "bank_name": "Anytown National Bank",
        "routing_number": "021000021",
        "address": {},
    },
    "purpose": "Freelance project payment for Order #456",
    "your_reference_id": "PAYOUT-ABC-789",
    "callback_url": "https://your_service.com/webhooks/payout_status",
}
NOTHING = object()


def changed(params: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    result = dict(params)
    if rest:
        result[head] = changed(params[head], rest, value)
    elif value is NOTHING:
        del result[head]
    else:
        result[head] = value
    return result


def test_the_calls_of_the_requirements_are_good() -> None:
    assert intent_from(INTENT)["amount"] == 10000
    fields = payout_from(PAYOUT)
    assert fields["recipient"] == {"type": "bank_account", "bank": "routing_number", "last4": "7890"}
    assert "1234567890" not in str(fields)


@pytest.mark.parametrize("body", [b"[" * 60_000, b'{"description": "\\ud800"}', b"\xff", b"[]", b"nothing"])
def test_what_is_no_json_object_is_the_callers_mistake(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        object_from_json(body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("amount", 0, "amount"),
        ("amount", -1, "amount"),
        ("amount", 75.0, "amount"),
        ("amount", True, "amount"),
        ("amount", "75", "amount"),
        ("amount", 10**15 + 1, "amount"),
        ("amount", NOTHING, "amount"),
        ("currency", "USD", "currency"),
        ("currency", "usx", "currency"),
        ("currency", NOTHING, "currency"),
        ("payment_method_types", ["cash"], "payment_method_types"),
        ("metadata", {"a": 1}, "metadata.a"),
        ("metadata", {str(n): "" for n in range(51)}, "metadata"),
        ("return_url", "javascript:alert(1)", "return_url"),
        ("return_url", "http://[", "return_url"),
        ("return_url", "http://x/\r\nSet-Cookie: a", "return_url"),
        ("return_url", NOTHING, "return_url"),
        ("statement_descriptor", "x" * 23, "statement_descriptor"),
        ("card_number", "4242424242424242", "card_number"),
    ],
)
def test_bad_intents(path: str, value: object, param: str) -> None:
    with pytest.raises(ApiError) as bad:
        intent_from(changed(INTENT, path, value))
    assert (bad.value.status, bad.value.param) == (400, param)


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("amount.value", 7.5, "amount.value"),
        ("amount.currency", "usd", "amount.currency"),
        ("amount", 750, "amount"),
        ("recipient_details", NOTHING, "recipient_details"),
        ("recipient_details.type", "card", "recipient_details.type"),
        ("recipient_details.account_holder_name", "", "recipient_details.account_holder_name"),
        ("recipient_details.routing_number", "123456789", "recipient_details.routing_number"),
        ("recipient_details.routing_number", "000000000", "recipient_details.routing_number"),
        ("recipient_details.routing_number", NOTHING, "recipient_details.routing_number"),
        ("recipient_details.iban", "DE89370400440532013000", "recipient_details.routing_number"),
        ("recipient_details.account_number", NOTHING, "recipient_details.account_number"),
        ("purpose", "", "purpose"),
        ("your_reference_id", NOTHING, "your_reference_id"),
        ("callback_url", "ftp://x", "callback_url"),
    ],
)
def test_bad_payouts(path: str, value: object, param: str) -> None:
    with pytest.raises(ApiError) as bad:
        payout_from(changed(PAYOUT, path, value))
    assert (bad.value.status, bad.value.param) == (400, param)


@pytest.mark.parametrize(
    "bank",
    [
        {"iban": "DE89370400440532013000"},
        {"sort_code": "089999", "account_number": "66374958"},
        {"bsb": "062000", "account_number": "12345678"},
        {"ifsc": "SBIN0005943", "account_number": "12345678901"},
    ],
)
def test_banks_of_other_countries(bank: dict[str, str]) -> None:
    details = {"type": "bank_account", "account_holder_name": "Jane Doe", **bank}
    assert payout_from(changed(PAYOUT, "recipient_details", details))["recipient"]["last4"]


def test_refund_needs_its_payment() -> None:
    with pytest.raises(ApiError):
        refund_from({"amount": 5})
    assert refund_from({"payment_intent": "pi_1"})["amount"] is None


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"\xff", b"{"])
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(ApiError):
        object_from_json(body)


def test_cards() -> None:
    assert card_of("4242 4242 4242 4242") == Card()
    declined, no_funds = card_of("4000000000000002"), card_of("4000-0000-0000-9995")
    assert isinstance(declined, Card)
    assert isinstance(no_funds, Card)
    assert declined.final
    assert not no_funds.final
    for number in ("", "1", "4242424242424241", "x" * 16, "٤٢٤٢٤٢٤٢٤٢٤٢٤٢٤٢"):
        assert isinstance(card_of(number), str)
    assert "never a real card" in str(card_of("4111111111111111"))


class TestFaults:
    def test_by_reference_header_and_metadata(self) -> None:
        faults = Faults()
        assert faults.of("ORD-fault-error-after-1", "", {}) == {"error_after"}
        assert faults.of("ord-FAULT-decline", "", {}) == {"decline"}
        assert faults.of("ORD-1", "decline, slow,nonsense", {}) == {"decline", "slow"}
        assert faults.of("ORD-1", "", {"sandbox_fault": "timeout"}) == {"timeout"}
        assert faults.of("ORD-1", "", {}) == frozenset()
        for name in NAMES:
            assert name in faults.of(f"X-fault-{name}", "", {})

    def test_rates_are_drawn_the_same_each_time(self) -> None:
        faults = faults_from({"decline": 0.25, "seed": 7})
        met = [bool(faults.of(f"ORD-{number}", "", {})) for number in range(2000)]
        assert met == [bool(faults.of(f"ORD-{number}", "", {})) for number in range(2000)]
        assert 400 < sum(met) < 600

    @pytest.mark.parametrize(
        "bad", [{"declien": 1}, {"decline": 2}, {"decline": "1"}, {"slow_ms": -1}, {"decline": True}]
    )
    def test_a_misspelt_switch_is_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ApiError):
            faults_from(bad)
