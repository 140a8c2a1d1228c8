"""Checks of the fields of an object, collecting every violation with its JSON path instead of stopping at the first."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from gateway.domain.document import JsonObject, NumberText, kind_of
from kernel.errors import FieldViolation
from kernel.money import CURRENCY_EXPONENTS, AmountInvalid, minor_from_decimal

__all__ = [
    "AMOUNT_LENGTH_MAX",
    "ID_PATTERN",
    "UNPRINTABLE",
    "VIOLATIONS_MAX",
    "Fields",
    "TextRule",
    "decimal_text",
    "is_id",
]

VIOLATIONS_MAX = 100
"""Most violations in one answer."""
AMOUNT_LENGTH_MAX = 28
"""Longest amount as text: as many digits as decimal arithmetic keeps exactly."""
QUOTED_LENGTH_MAX = 40

ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]+")
_ID_LENGTH_MAX = 128
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\u0080-\u009f\ud800-\udfff]")
_AMOUNT = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CURRENCY = re.compile(r"[A-Z]{3}")


@dataclass(frozen=True, slots=True)
class TextRule:
    """What a text field may hold. The same as in the .proto; a contract test compares them."""

    length_max: int
    is_required: bool = False
    pattern: re.Pattern[str] | None = None
    expected: str = ""


def is_id(text: str) -> bool:
    """Whether ``text`` can be one of our ids at all."""
    return len(text) <= _ID_LENGTH_MAX and ID_PATTERN.fullmatch(text) is not None


def decimal_text(amount_minor: int, currency_code: str) -> str:
    """The amount in the currency's own unit: ``decimal_text(7500, "USD") == "75.00"``."""
    exponent = CURRENCY_EXPONENTS.get(currency_code, 2)
    if exponent == 0:
        return str(amount_minor)
    sign = "-" if amount_minor < 0 else ""
    digits = str(abs(amount_minor)).rjust(exponent + 1, "0")
    return f"{sign}{digits[:-exponent]}.{digits[-exponent:]}"


def quoted(text: str) -> str:
    """What came, fit for a message: bounded, nothing unprintable."""
    shown = UNPRINTABLE.sub("\ufffd", text[:QUOTED_LENGTH_MAX])
    return f'"{shown}…"' if len(text) > QUOTED_LENGTH_MAX else f'"{shown}"'


class Fields:
    """The fields of one object. ``path`` is the object's own path with a dot, empty at the top.

    Every method returns a value of the right type, also for a wrong field; ``violations`` then has an entry more.
    """

    __slots__ = ("path", "value", "violations")

    def __init__(self, value: Any, path: str, known: Collection[str], violations: list[FieldViolation]) -> None:
        self.path = f"{path}." if path else ""
        self.violations = violations
        if not isinstance(value, dict):
            violations.append(FieldViolation(path or "$", f"expected an object, got {kind_of(value)}"))
            self.value: dict[str, Any] = {}
            return
        self.value = value
        if type(value) is JsonObject:
            for key in value.repeated:
                self.refuse(_safe_key(key), "is given more than once")
        for key in value:
            if key not in known:
                self.refuse(_safe_key(key), f"is not known here; the fields are {', '.join(known)}")

    def refuse(self, field: str, description: str) -> None:
        """Adds one violation."""
        self.violations.append(FieldViolation(f"{self.path}{field}", description))

    def text(self, field: str, rule: TextRule) -> str:
        """A text field; empty where it is missing and may be."""
        value = self.value.get(field)
        if type(value) is not str:
            if field in self.value:
                self.refuse(field, f"expected text, got {kind_of(value)}")
            elif rule.is_required:
                self.refuse(field, "is required")
            return ""
        if not value and not rule.is_required:
            return ""
        if len(value) > rule.length_max:
            self.refuse(field, f"may have at most {rule.length_max} characters, has {len(value)}")
        elif not value:
            self.refuse(field, "must not be empty")
        elif rule.pattern is not None and rule.pattern.fullmatch(value) is None:
            self.refuse(field, f"expected {rule.expected}, got {quoted(value)}")
        elif UNPRINTABLE.search(value) is not None:
            self.refuse(field, "has a control character or half of a surrogate pair")
        else:
            return value
        return ""

    def money(self, amount_field: str, currency_field: str) -> tuple[int, str]:
        """Amount in minor units and currency code, from a decimal amount (a number or text) and a code beside it."""
        code = self._currency(currency_field)
        value = self.value.get(amount_field)
        if type(value) is not NumberText and type(value) is not str:
            if amount_field in self.value:
                self.refuse(amount_field, f"expected a decimal number such as 75.00, got {kind_of(value)}")
            else:
                self.refuse(amount_field, "is required")
            return 0, code
        try:
            return _minor_of(value, code), code
        except AmountInvalid as error:
            self.refuse(amount_field, f"{error}, got {quoted(value)}")
            return 0, code

    def _currency(self, field: str) -> str:
        value = self.value.get(field)
        if type(value) is str:
            if value in CURRENCY_EXPONENTS:
                return value
            hint = " (in upper case)" if value.upper() in CURRENCY_EXPONENTS else ""
            self.refuse(field, f"expected an ISO 4217 code such as USD{hint}, got {quoted(value)}")
        elif field in self.value:
            self.refuse(field, f"expected an ISO 4217 code such as USD, got {kind_of(value)}")
        else:
            self.refuse(field, "is required")
        return ""


def _minor_of(text: str, currency_code: str) -> int:
    """Without a currency the decimals cannot be judged, all else still is. Raises AmountInvalid."""
    if len(text) > AMOUNT_LENGTH_MAX:
        raise AmountInvalid(f"may have at most {AMOUNT_LENGTH_MAX} characters")
    if _AMOUNT.fullmatch(text) is None:
        raise AmountInvalid("must be a decimal number such as 75.00")
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise AmountInvalid("has an exponent out of range") from None
    return minor_from_decimal(amount, currency_code) if currency_code else _positive(amount)


def _positive(amount: Decimal) -> int:
    if amount <= 0:
        raise AmountInvalid("must be more than zero")
    return 0


def _safe_key(key: str) -> str:
    shown = UNPRINTABLE.sub("\ufffd", key[:QUOTED_LENGTH_MAX])
    return f"{shown}…" if len(key) > QUOTED_LENGTH_MAX else shown
