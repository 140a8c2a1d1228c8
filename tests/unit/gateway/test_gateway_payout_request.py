"""Risk: money sent to another account than the one that was meant; a wrong field that is not named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from gateway.domain import Address, PayoutRequest, parse_payout_request
from kernel.errors import FieldViolation

PAYOUT: dict[str, Any] = {
    "seller_account": "SELL-XYZ-1",
    "amount": {"value": "37.50", "currency": "USD"},
    "recipient_details": {
        "type": "bank_account",
        "account_holder_name": "Jane Doe",
        "account_number": "0001234567",
        "bank_name": "Anytown National Bank",
        "routing_number": "021000021",
        "address": {"line1": "1 Main Street", "city": "Anytown", "country_code": "US"},
    },
    "purpose": "Freelance project payment for Order #456",
    "your_reference_id": "PAYOUT-ABC-789",
}


def parse(changes: dict[str, Any] | None = None, **recipient: Any) -> PayoutRequest | list[FieldViolation]:
    payout = {**copy.deepcopy(PAYOUT), **(changes or {})}
    for name, value in recipient.items():
        if value is None:
            payout["recipient_details"].pop(name, None)
        else:
            payout["recipient_details"][name] = value
    return parse_payout_request(json.dumps(payout).encode())


def fields_of(result: PayoutRequest | list[FieldViolation]) -> list[str]:
    assert isinstance(result, list), result
    return [violation.field for violation in result]


def test_the_call_of_the_requirements() -> None:
    payout = parse()
    assert isinstance(payout, PayoutRequest)
    assert (payout.reference, payout.seller_account) == ("PAYOUT-ABC-789", "SELL-XYZ-1")
    assert (payout.amount_minor, payout.currency_code) == (3750, "USD")
    recipient = payout.recipient
    assert (recipient.identifier_field, recipient.identifier) == ("aba_routing_number", "021000021")
    assert recipient.account_number == "0001234567"
    assert recipient.country_code == "US"
    assert recipient.address == Address("1 Main Street", "", "Anytown", "", "", "US")


@pytest.mark.parametrize(
    ("identifier", "value", "proto_field", "country_code"),
    [
        ("ifsc", "HDFC0000001", "ifsc", "IN"),
        ("routing_number", "021000021", "aba_routing_number", "US"),
        ("sort_code", "089999", "sort_code", "GB"),
        ("bsb", "062000", "bsb", "AU"),
        ("iban", "DE89370400440532013000", "iban", "DE"),
        ("iban", "fr1420041010050500013M02606", "iban", "FR"),
    ],
)
def test_the_country_follows_from_the_identifier(
    identifier: str, value: str, proto_field: str, country_code: str
) -> None:
    payout = parse(**{"routing_number": None, identifier: value})
    assert isinstance(payout, PayoutRequest)
    assert payout.recipient.identifier_field == proto_field
    assert payout.recipient.identifier == value
    assert payout.recipient.country_code == country_code


def test_a_country_that_is_given_is_kept() -> None:
    payout = parse(country_code="PR")
    assert isinstance(payout, PayoutRequest)
    assert payout.recipient.country_code == "PR"


@pytest.mark.parametrize(
    ("changes", "recipient", "field"),
    [
        ({"callback_url": "https://x/y"}, {}, "callback_url"),
        ({"your_reference_id": "a b"}, {}, "your_reference_id"),
        ({"seller_account": ""}, {}, "seller_account"),
        ({"purpose": ""}, {}, "purpose"),
        ({"purpose": "x" * 201}, {}, "purpose"),
        ({"amount": 5}, {}, "amount"),
        ({"amount": {"value": "0", "currency": "USD"}}, {}, "amount.value"),
        ({"amount": {"value": "1.005", "currency": "USD"}}, {}, "amount.value"),
        ({"amount": {"value": "1", "currency": "US"}}, {}, "amount.currency"),
        ({"amount": {"value": "1", "currency": "USD", "unit": 1}}, {}, "amount.unit"),
        ({"recipient_details": None}, {}, "recipient_details"),
        ({}, {"type": "card"}, "recipient_details.type"),
        ({}, {"type": ["bank_account"]}, "recipient_details.type"),
        ({}, {"account_holder_name": None}, "recipient_details.account_holder_name"),
        ({}, {"account_number": 1234567890}, "recipient_details.account_number"),
        ({}, {"routing_number": None}, "recipient_details.iban"),
        ({}, {"routing_number": ""}, "recipient_details.routing_number"),
        ({}, {"iban": "DE89370400440532013000"}, "recipient_details.iban"),
        ({}, {"routing_number": None, "iban": "8937"}, "recipient_details.country_code"),
        ({}, {"country_code": "usa"}, "recipient_details.country_code"),
        ({}, {"country_code": ""}, "recipient_details.country_code"),
        ({}, {"bic": "x" * 12}, "recipient_details.bic"),
        ({}, {"swift": "X"}, "recipient_details.swift"),
        ({}, {"address": "1 Main Street"}, "recipient_details.address"),
        ({}, {"address": {"street": "1 Main Street"}}, "recipient_details.address.street"),
        ({}, {"address": {"country_code": "us"}}, "recipient_details.address.country_code"),
    ],
)
def test_one_wrong_field_is_named_alone(changes: dict[str, Any], recipient: dict[str, Any], field: str) -> None:
    payout = {**copy.deepcopy(PAYOUT), **changes}
    if changes.get("recipient_details", payout) is None:
        assert fields_of(parse_payout_request(json.dumps(payout).encode())) == [field]
        return
    assert fields_of(parse(changes, **recipient)) == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    assert fields_of(parse_payout_request(b"{}")) == [
        "your_reference_id",
        "seller_account",
        "amount",
        "recipient_details",
        "purpose",
    ]


@pytest.mark.parametrize("body", [b"[]", b"nonsense", b"\xff"])
def test_a_document_that_is_no_object(body: bytes) -> None:
    assert fields_of(parse_payout_request(body)) == ["$"]
