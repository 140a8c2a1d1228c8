"""The chart of accounts: an account's kind follows from its name, so no account has to be set up by hand.

    psp/{psp}/clearing/{currency}   ASSET      captured by a PSP and not settled yet
    psp/{psp}/payouts/{currency}    ASSET      paid out by a PSP for us (its balance is below zero until it is settled)
    psp/{psp}/fees/{currency}       EXPENSE    what a PSP charges us
    seller/{seller}/{currency}      LIABILITY  what we owe a seller
    seller/{seller}/disputes/{currency}  ASSET  what a seller owes us for disputed payments that a PSP took back
    fees/{currency}                 REVENUE    what we charge sellers

The names themselves are made by kernel/names.py; the wallet uses the same ones.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache

from kernel.money import CURRENCY_EXPONENTS

__all__ = [
    "ACCOUNT_NAME_LENGTH_MAX",
    "CHART",
    "CHART_PREFIXES",
    "AccountKind",
    "AccountNameInvalid",
    "Side",
    "account_of_name",
    "balance_minor",
]

ACCOUNT_NAME_LENGTH_MAX = 200
NAME_CACHE_SIZE = 8_192


class AccountKind(Enum):
    """Which side raises the balance."""

    ASSET = 1
    LIABILITY = 2
    REVENUE = 3
    EXPENSE = 4


class Side(Enum):
    """Which side of an entry."""

    DEBIT = 1
    CREDIT = 2


class AccountNameInvalid(ValueError):
    """A name that the chart of accounts does not have."""


CHART: tuple[tuple[re.Pattern[str], AccountKind], ...] = (
    (re.compile(r"psp/[^/]+/clearing/([A-Z]{3})"), AccountKind.ASSET),
    (re.compile(r"psp/[^/]+/payouts/([A-Z]{3})"), AccountKind.ASSET),
    (re.compile(r"psp/[^/]+/fees/([A-Z]{3})"), AccountKind.EXPENSE),
    (re.compile(r"seller/[^/]+/([A-Z]{3})"), AccountKind.LIABILITY),
    (re.compile(r"seller/[^/]+/disputes/([A-Z]{3})"), AccountKind.ASSET),
    (re.compile(r"fees/([A-Z]{3})"), AccountKind.REVENUE),
)

CHART_PREFIXES = ("fees/", "psp/", "seller/")
"""Every name of the chart begins with one of these; ascending."""

_DEBIT_RAISES = frozenset({AccountKind.ASSET, AccountKind.EXPENSE})


@lru_cache(maxsize=NAME_CACHE_SIZE)
def account_of_name(name: str) -> tuple[AccountKind, str]:
    """Kind and currency of an account: ``seller/SELL-XYZ-1/USD`` → (LIABILITY, "USD"). Raises AccountNameInvalid."""
    if len(name) <= ACCOUNT_NAME_LENGTH_MAX and name.isprintable():
        for pattern, kind in CHART:
            match = pattern.fullmatch(name)
            if match is not None and match[1] in CURRENCY_EXPONENTS:
                return kind, match[1]
    raise AccountNameInvalid(f"account name {name!r} is not in the chart of accounts (ledger/domain/accounts.py)")


def balance_minor(kind: AccountKind, debit_minor: int, credit_minor: int) -> int:
    """Balance on the own side: debits − credits of an asset or expense, credits − debits of the others."""
    return debit_minor - credit_minor if kind in _DEBIT_RAISES else credit_minor - debit_minor
