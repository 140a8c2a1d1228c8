"""What the sandbox accepts, pure: parameters checked as a strict PSP would, cards, states.

An `ApiError` is what a caller sees: HTTP status and ``{"error": {"type", "code", "message", "param"}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stdnum import iban, luhn
from stdnum.us import rtn

from kernel.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS

__all__ = [
    "CARD_TRY_COUNT_MAX",
    "FINAL",
    "INITIAL_STATUS",
    "ApiError",
    "Card",
    "card_of",
    "intent_from",
    "object_from_json",
    "payout_from",
    "refund_from",
]

INITIAL_STATUS = {"payment_intent": "requires_payment", "refund": "pending", "payout": "pending"}
FINAL = frozenset({"succeeded", "failed", "canceled", "completed", "rejected", "returned"})
CARD_TRY_COUNT_MAX = 5
"""So many soft declines end an intent."""
METADATA_COUNT_MAX = 50
TEXT_LENGTH_MAX = 1000
DESCRIPTOR_LENGTH_MAX = 22
REFERENCE_LENGTH_MAX = 128

Json = dict[str, Any]


class ApiError(Exception):
    """An answer outside 2xx."""

    def __init__(
        self, status: int, error_type: str, code: str, message: str, *, param: str = "", retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> Json:
        error: Json = {"type": self.error_type, "code": self.code, "message": self.message}
        if self.param:
            error["param"] = self.param
        return {"error": error}


def invalid(param: str, message: str, code: str = "parameter_invalid") -> ApiError:
    return ApiError(400, "invalid_request_error", code, f"{param}: {message}", param=param)


def object_from_json(body: bytes) -> Json:
    """The body as a JSON object."""
    try:
        value = json.loads(body)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could not be stored
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_request_error", "body_invalid", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_request_error", "body_invalid", "the body must be a JSON object")
    return value


_INTENT = frozenset(
    [
        "amount",
        "currency",
        "payment_method_types",
        "description",
        "metadata",
        "return_url",
        "statement_descriptor",
        "receipt_email",
    ]
)
_REFUND = frozenset(["payment_intent", "amount", "reason", "metadata"])
_PAYOUT = frozenset(["amount", "recipient_details", "purpose", "your_reference_id", "callback_url"])
_RECIPIENT = frozenset(
    [
        "type",
        "account_holder_name",
        "account_number",
        "bank_name",
        "routing_number",
        "sort_code",
        "bsb",
        "ifsc",
        "iban",
        "bic",
        "country",
        "address",
    ]
)


def intent_from(params: Json) -> Json:
    """A new payment intent's fields. Raises ApiError naming the first wrong parameter."""
    _only(params, _INTENT)
    amount = _amount(params.get("amount"), "amount")
    currency = _currency(params.get("currency"), "currency")
    types = params.get("payment_method_types", ["card"])
    if not isinstance(types, list) or "card" not in types:
        raise invalid("payment_method_types", 'expected a list with "card", the only method of the sandbox')
    descriptor = _text(params, "statement_descriptor", "", DESCRIPTOR_LENGTH_MAX)
    return {
        "amount": amount,
        "currency": currency,
        "description": _text(params, "description", "", TEXT_LENGTH_MAX),
        "metadata": _metadata(params.get("metadata", {})),
        "return_url": _url(params.get("return_url"), "return_url"),
        "statement_descriptor": descriptor,
    }


def refund_from(params: Json) -> Json:
    """A new refund's fields; `amount` None means all that is left."""
    _only(params, _REFUND)
    amount = params.get("amount")
    return {
        "payment_intent": _text(params, "payment_intent", None, REFERENCE_LENGTH_MAX),
        "amount": None if amount is None else _amount(amount, "amount"),
        "reason": _text(params, "reason", "", TEXT_LENGTH_MAX),
        "metadata": _metadata(params.get("metadata", {})),
    }


def payout_from(params: Json) -> Json:
    """A new payout's fields. Of the recipient only the bank's identifier and the last four characters are kept."""
    _only(params, _PAYOUT)
    money = params.get("amount")
    if not isinstance(money, dict):
        raise invalid("amount", 'expected an object such as {"value": 750, "currency": "USD"}')
    _only(money, frozenset({"value", "currency"}), "amount.")
    value = _amount(money.get("value"), "amount.value")
    currency = money.get("currency")
    if not isinstance(currency, str) or currency not in CURRENCY_EXPONENTS:
        raise invalid("amount.currency", f"expected an ISO 4217 code in upper case, got {currency!r}")
    details = params.get("recipient_details")
    if not isinstance(details, dict):
        raise invalid("recipient_details", "expected an object")
    return {
        "amount": {"value": value, "currency": currency},
        "recipient": _recipient(details),
        "purpose": _text(params, "purpose", None, TEXT_LENGTH_MAX),
        "your_reference_id": _text(params, "your_reference_id", None, REFERENCE_LENGTH_MAX),
        "callback_url": _url(params.get("callback_url"), "callback_url"),
    }


def _recipient(details: Json) -> Json:
    at = "recipient_details."
    _only(details, _RECIPIENT, at)
    if details.get("type") != "bank_account":
        raise invalid(f"{at}type", f'expected "bank_account", got {details.get("type")!r}')
    _text(details, "account_holder_name", None, 200, at)
    number = _text(details, "account_number", "", 34, at)
    _text(details, "bank_name", "", 200, at)
    if not isinstance(details.get("address", {}), dict):
        raise invalid(f"{at}address", "expected an object")
    given = [name for name in _BANK_RULES if details.get(name)]
    if len(given) != 1:
        raise invalid(
            f"{at}routing_number",
            f"expected exactly one of {', '.join(_BANK_RULES)}, got {', '.join(given) or 'none'}",
            "bank_details_invalid",
        )
    kind = given[0]
    identifier = _text(details, kind, None, 42, at)
    if not _BANK_RULES[kind](identifier):
        raise invalid(f"{at}{kind}", "this bank does not exist: wrong format or check digit", "bank_details_invalid")
    if kind != "iban" and not re.fullmatch(r"[A-Za-z0-9]{3,34}", number):
        raise invalid(f"{at}account_number", "expected 3 to 34 letters and digits", "bank_details_invalid")
    return {"type": "bank_account", "bank": kind, "last4": (number if kind != "iban" else identifier)[-4:]}


_BANK_RULES: dict[str, Callable[[str], bool]] = {
    "iban": lambda text: bool(iban.is_valid(text)),
    "routing_number": lambda text: bool(rtn.is_valid(text)) and text != "000000000",
    "sort_code": lambda text: re.fullmatch(r"\d{6}", text) is not None,
    "bsb": lambda text: re.fullmatch(r"\d{6}", text) is not None,
    "ifsc": lambda text: re.fullmatch(r"[A-Z]{4}0[A-Z0-9]{6}", text) is not None,
}


@dataclass(frozen=True, slots=True)
class Card:
    """What a card number does. `code` empty: pays. `final`: the order is refused for good, else another card may be tried."""

    code: str = ""
    message: str = ""
    final: bool = False


_CARDS = {
    "4242424242424242": Card(),
    "5555555555554444": Card(),
    "4000000000000002": Card("card_declined", "Your bank declined this card.", final=True),
    "4000000000009995": Card("insufficient_funds", "This card has insufficient funds. Try another card."),
    "4000000000000069": Card("expired_card", "This card has expired. Try another card."),
}


def card_of(number: str) -> Card | str:
    """What this card does, or, in words for the buyer, why it is no card."""
    digits = re.sub(r"[ -]", "", number)
    if not digits:
        return "Enter a card number."
    if not re.fullmatch(r"[0-9]{12,19}", digits) or not luhn.is_valid(digits):
        return "This is not a card number. Check the digits."
    return _CARDS.get(digits, "This is a sandbox: use one of the test cards below, never a real card.")


def _only(params: Json, known: frozenset[str], prefix: str = "") -> None:
    for name in params:
        if name not in known:
            raise invalid(
                f"{prefix}{name}"[:200], f"unknown parameter; known: {', '.join(sorted(known))}", "parameter_unknown"
            )


def _amount(value: Any, param: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise invalid(param, "expected a whole number of minor units", "amount_invalid")
    if not 0 < value <= AMOUNT_MINOR_MAX:
        raise invalid(param, f"expected 1 to {AMOUNT_MINOR_MAX}, got {value}", "amount_invalid")
    return value


def _currency(value: Any, param: str) -> str:
    if not isinstance(value, str) or value.upper() not in CURRENCY_EXPONENTS or value != value.lower():
        raise invalid(param, f"expected an ISO 4217 code in lower case, got {value!r}", "currency_invalid")
    return value


def _text(params: Json, name: str, default: str | None, length_max: int, prefix: str = "") -> str:
    value = params.get(name, default)
    if value is None or (value == "" and default is None):
        raise invalid(f"{prefix}{name}", "missing", "parameter_missing")
    if not isinstance(value, str) or len(value) > length_max:
        raise invalid(f"{prefix}{name}", f"expected text of at most {length_max} characters")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > METADATA_COUNT_MAX:
        raise invalid("metadata", f"expected an object of at most {METADATA_COUNT_MAX} texts")
    for name, text in value.items():
        if not isinstance(text, str) or len(text) > 500 or len(name) > 40:
            raise invalid(f"metadata.{name[:40]}", "expected text of at most 500 characters under a name of at most 40")
    return value


def _url(value: Any, param: str) -> str:
    if not isinstance(value, str) or len(value) > 2048 or not re.fullmatch(r"[!-~]+", value):
        raise invalid(param, "expected a URL", "url_invalid")
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    if not good:
        raise invalid(param, "expected an http or https URL", "url_invalid")
    return value
