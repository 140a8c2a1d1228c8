"""The payout call of docs/rest.md: JSON → PayoutRequest, or everything that is wrong with it.

Bank details are checked for shape here (text, length, exactly one way to name the bank); check digits and countries are
the payment service's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway.domain.document import read_document
from gateway.domain.fields import ID_PATTERN, VIOLATIONS_MAX, Fields, TextRule
from kernel.errors import FieldViolation

__all__ = [
    "ADDRESS_FIELDS",
    "BANK_IDENTIFIERS",
    "TEXT_RULES",
    "Address",
    "PayoutRequest",
    "Recipient",
    "parse_payout_request",
]

_ID = TextRule(128, is_required=True, pattern=ID_PATTERN, expected="letters, digits and . _ : - only")
_COUNTRY = re.compile(r"([A-Z]{2})?")

TEXT_RULES: dict[str, TextRule] = {
    "reference": _ID,
    "seller_account": _ID,
    "purpose": TextRule(200, is_required=True),
    "psp": TextRule(64),
    "recipient.account_holder_name": TextRule(200, is_required=True),
    "recipient.bank_name": TextRule(200),
    "recipient.account_number": TextRule(34),
    "recipient.bic": TextRule(11),
    "recipient.address.line1": TextRule(200),
    "recipient.address.line2": TextRule(200),
    "recipient.address.city": TextRule(100),
    "recipient.address.region": TextRule(100),
    "recipient.address.postal_code": TextRule(20),
    "recipient.address.country_code": TextRule(2, pattern=_COUNTRY, expected="an ISO 3166-1 code such as US"),
}
"""The rules of the text fields, by their path in the .proto."""

_COUNTRY_RULE = TextRule(2, is_required=True, pattern=re.compile(r"[A-Z]{2}"), expected="an ISO 3166-1 code such as US")
_IDENTIFIER_RULE = TextRule(64, is_required=True)

BANK_IDENTIFIERS: dict[str, tuple[str, str]] = {
    "ifsc": ("ifsc", "IN"),
    "routing_number": ("aba_routing_number", "US"),
    "sort_code": ("sort_code", "GB"),
    "bsb": ("bsb", "AU"),
    "iban": ("iban", ""),
}
"""JSON field → (field of the .proto, the country that it stands for; an IBAN begins with its own)."""

ADDRESS_FIELDS = ("line1", "line2", "city", "region", "postal_code", "country_code")
_PAYOUT_FIELDS = ("seller_account", "amount", "recipient_details", "purpose", "your_reference_id", "psp")
_RECIPIENT_FIELDS = (
    "type",
    "account_holder_name",
    "account_number",
    "bank_name",
    "country_code",
    *BANK_IDENTIFIERS,
    "bic",
    "address",
)


@dataclass(frozen=True, slots=True)
class Address:
    """A postal address; every part may be empty."""

    line1: str
    line2: str
    city: str
    region: str
    postal_code: str
    country_code: str


@dataclass(frozen=True, slots=True)
class Recipient:
    """A bank account. ``identifier_field`` is the .proto's name of ``identifier``; numbers are text, zeros matter."""

    account_holder_name: str
    account_number: str
    bank_name: str
    country_code: str
    identifier_field: str
    identifier: str
    bic: str
    address: Address | None


@dataclass(frozen=True, slots=True)
class PayoutRequest:
    """A payout, as asked for."""

    reference: str
    seller_account: str
    currency_code: str
    amount_minor: int
    recipient: Recipient
    purpose: str
    psp: str


def parse_payout_request(body: bytes) -> PayoutRequest | list[FieldViolation]:
    """The payout in ``body``, or every violation with its JSON path, such as ``recipient_details.iban``."""
    document = read_document(body)
    if isinstance(document, list):
        return document
    violations: list[FieldViolation] = []
    if isinstance(document, dict) and "callback_url" in document:
        description = "is not taken: the PSP is given the gateway's own webhook; leave it out"
        violations.append(FieldViolation("callback_url", description))
        del document["callback_url"]
    fields = Fields(document, "", _PAYOUT_FIELDS, violations)
    if not isinstance(document, dict):
        return violations
    reference = fields.text("your_reference_id", _ID)
    seller_account = fields.text("seller_account", _ID)
    amount_minor, currency_code = _amount(fields)
    recipient = _recipient(fields)
    purpose = fields.text("purpose", TEXT_RULES["purpose"])
    psp = fields.text("psp", TEXT_RULES["psp"])
    if violations or recipient is None:
        return violations[:VIOLATIONS_MAX]
    return PayoutRequest(reference, seller_account, currency_code, amount_minor, recipient, purpose, psp)


def _amount(payout: Fields) -> tuple[int, str]:
    if "amount" not in payout.value:
        payout.refuse("amount", "is required")
        return 0, ""
    fields = Fields(payout.value["amount"], "amount", ("value", "currency"), payout.violations)
    return fields.money("value", "currency") if isinstance(payout.value["amount"], dict) else (0, "")


def _recipient(payout: Fields) -> Recipient | None:
    value = payout.value.get("recipient_details")
    if "recipient_details" not in payout.value:
        payout.refuse("recipient_details", "is required")
        return None
    fields = Fields(value, "recipient_details", _RECIPIENT_FIELDS, payout.violations)
    if not isinstance(value, dict):
        return None
    if value.get("type", "bank_account") != "bank_account":
        fields.refuse("type", 'expected "bank_account"')
    holder = fields.text("account_holder_name", TEXT_RULES["recipient.account_holder_name"])
    number = fields.text("account_number", TEXT_RULES["recipient.account_number"])
    bank_name = fields.text("bank_name", TEXT_RULES["recipient.bank_name"])
    bic = fields.text("bic", TEXT_RULES["recipient.bic"])
    identifier_name, identifier = _identifier(fields)
    country_code = _country(fields, identifier_name, identifier)
    identifier_field = BANK_IDENTIFIERS[identifier_name][0] if identifier_name else ""
    address = _address(fields)
    return Recipient(holder, number, bank_name, country_code, identifier_field, identifier, bic, address)


def _identifier(recipient: Fields) -> tuple[str, str]:
    """The one way to name the bank: JSON field and value."""
    given = [name for name in BANK_IDENTIFIERS if name in recipient.value]
    if len(given) != 1:
        what = "is missing" if not given else f"must be one only, got {', '.join(given)}"
        names = ", ".join(BANK_IDENTIFIERS)
        recipient.refuse(given[1] if given else "iban", f"the bank's identifier ({names}) {what}")
        return "", ""
    return given[0], recipient.text(given[0], _IDENTIFIER_RULE)


def _country(recipient: Fields, identifier_name: str, identifier: str) -> str:
    """As given, else the country that the identifier stands for."""
    if "country_code" in recipient.value:
        return recipient.text("country_code", _COUNTRY_RULE)
    implied = BANK_IDENTIFIERS[identifier_name][1] if identifier_name else ""
    country_code = implied or identifier[:2].upper()
    if identifier and _COUNTRY_RULE.pattern is not None and _COUNTRY_RULE.pattern.fullmatch(country_code) is None:
        recipient.refuse("country_code", "is required: the IBAN does not begin with a country")
    return country_code


def _address(recipient: Fields) -> Address | None:
    if "address" not in recipient.value:
        return None
    path = f"{recipient.path}address"
    fields = Fields(recipient.value["address"], path, ADDRESS_FIELDS, recipient.violations)
    parts = [fields.text(name, TEXT_RULES[f"recipient.address.{name}"]) for name in ADDRESS_FIELDS]
    return Address(*parts)
