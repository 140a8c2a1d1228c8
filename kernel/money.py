"""Money as integer minor units, and the ISO 4217 table that says how many decimals a currency has.

Source of the exponents: ISO 4217 list one. A PSP may use other exponents for its own API: that table belongs to the
PSP's adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

__all__ = ["AMOUNT_MINOR_MAX", "CURRENCY_EXPONENTS", "AmountInvalid", "Money", "minor_from_decimal"]

AMOUNT_MINOR_MAX = 10**15
"""Largest amount of one order, refund or payout, in minor units; a wallet balance may grow to 2**62 - 1."""

_ZERO = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_THREE = "BHD IQD JOD KWD LYD OMR TND"
_FOUR = "CLF UYW"
_TWO = (
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP CRC "
    "CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD "
    "KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO "
    "NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL "
    "THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD YER ZAR ZMW ZWG"
)

CURRENCY_EXPONENTS: dict[str, int] = {
    **dict.fromkeys(_ZERO.split(), 0),
    **dict.fromkeys(_TWO.split(), 2),
    **dict.fromkeys(_THREE.split(), 3),
    **dict.fromkeys(_FOUR.split(), 4),
}
"""Decimals of each currency, by ISO 4217 code."""


class AmountInvalid(ValueError):
    """An amount that cannot be money; the message says why."""


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in the minor unit of its currency: ``Money("USD", 7500)`` is 75.00 dollars."""

    currency_code: str
    amount_minor: int

    def __str__(self) -> str:
        exponent = CURRENCY_EXPONENTS.get(self.currency_code, 2)
        sign = "-" if self.amount_minor < 0 else ""
        digits = str(abs(self.amount_minor)).rjust(exponent + 1, "0")
        if exponent == 0:
            return f"{sign}{digits} {self.currency_code}"
        return f"{sign}{digits[:-exponent]}.{digits[-exponent:]} {self.currency_code}"


def minor_from_decimal(amount: Decimal, currency_code: str) -> int:
    """The amount in minor units: ``minor_from_decimal(Decimal("75.00"), "USD") == 7500``.

    Raises AmountInvalid for an unknown currency, for more decimals than the currency has (``75.001 USD``), for zero,
    for less than zero and for more than AMOUNT_MINOR_MAX.
    """
    exponent = CURRENCY_EXPONENTS.get(currency_code)
    if exponent is None:
        raise AmountInvalid(f"unknown currency {currency_code!r}: use an ISO 4217 code in upper case, such as USD")
    if not amount.is_finite():
        raise AmountInvalid("must be a finite number")
    if amount <= 0:
        raise AmountInvalid("must be more than zero")
    if amount.adjusted() + exponent > 18:
        raise AmountInvalid(f"must not be more than {Money(currency_code, AMOUNT_MINOR_MAX)}")
    # By its digits, not by Decimal arithmetic, which rounds to its context's 28 digits.
    _, digits, scale = amount.as_tuple()
    assert isinstance(scale, int)
    shift = scale + exponent
    kept, rest = (digits, ()) if shift >= 0 else (digits[:shift], digits[shift:])
    if any(rest):
        raise AmountInvalid(f"has more decimals than {currency_code} allows ({exponent})")
    minor = int("".join(map(str, kept)) or "0") * int(10 ** max(shift, 0))
    if minor > AMOUNT_MINOR_MAX:
        raise AmountInvalid(f"must not be more than {Money(currency_code, AMOUNT_MINOR_MAX)}")
    return minor
