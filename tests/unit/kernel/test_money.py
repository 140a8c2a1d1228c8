"""Risk: an amount that is rounded, scaled by the wrong exponent, or accepted though it is no money."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS, AmountInvalid, Money, minor_from_decimal


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [("75.00", "USD", 7500), ("75", "USD", 7500), ("75", "JPY", 75), ("75.000", "KWD", 75000), ("0.0001", "CLF", 1),
     ("7.5E1", "USD", 7500), ("12.10", "HUF", 1210), ("5", "ISK", 5), ("5", "UGX", 5),
     ("75.0000000000000000000000000000000000", "USD", 7500)],
)  # fmt: skip
def test_scale_is_the_currencys_own(amount: str, currency: str, minor: int) -> None:
    assert minor_from_decimal(Decimal(amount), currency) == minor


@pytest.mark.parametrize(
    ("amount", "currency", "why"),
    [("75.001", "USD", "more decimals"), ("1.5", "JPY", "more decimals"), ("0", "USD", "more than zero"),
     ("-1", "USD", "more than zero"), ("1e999999", "USD", "must not be more"), ("NaN", "USD", "finite"),
     ("Infinity", "USD", "finite"), ("1", "XXX", "unknown currency"), ("1", "usd", "unknown currency"),
     ("10000000000000.01", "USD", "must not be more"), ("1e-999999", "USD", "more decimals"),
     ("75.0000000000000000000000000000000001", "USD", "more decimals")],
)  # fmt: skip
def test_what_is_no_money_is_refused_with_the_reason(amount: str, currency: str, why: str) -> None:
    with pytest.raises(AmountInvalid, match=why):
        minor_from_decimal(Decimal(amount), currency)


@given(st.sampled_from(sorted(CURRENCY_EXPONENTS)), st.integers(1, AMOUNT_MINOR_MAX))
def test_text_and_back_is_exact(currency: str, minor: int) -> None:
    text, code = str(Money(currency, minor)).split()
    assert code == currency
    assert minor_from_decimal(Decimal(text), currency) == minor


def test_negative_amounts_read_well() -> None:
    assert str(Money("USD", -5)) == "-0.05 USD"
    assert str(Money("JPY", -5)) == "-5 JPY"


def test_exponents_that_are_easy_to_get_wrong() -> None:
    assert [CURRENCY_EXPONENTS[code] for code in ["HUF", "TWD", "COP", "IDR"]] == [2, 2, 2, 2]
    assert [CURRENCY_EXPONENTS[code] for code in ["JPY", "KRW", "VND", "CLP", "ISK", "UGX"]] == [0] * 6
    assert [CURRENCY_EXPONENTS[code] for code in ["BHD", "JOD", "KWD", "OMR", "TND", "IQD", "LYD"]] == [3] * 7
