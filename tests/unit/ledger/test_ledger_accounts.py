"""Risk: an account on the wrong side of the balance sheet, or a name that means two things."""

from __future__ import annotations

import pytest

from kernel.names import payout_clearing, psp_clearing, seller_disputes, seller_wallet
from ledger.domain import AccountKind, AccountNameInvalid, account_of_name, balance_minor


@pytest.mark.parametrize(
    ("name", "kind", "currency_code"),
    [
        (psp_clearing("sandbox", "USD"), AccountKind.ASSET, "USD"),
        (payout_clearing("sandbox", "JPY"), AccountKind.ASSET, "JPY"),
        (seller_wallet("SELL-XYZ-1", "KWD"), AccountKind.LIABILITY, "KWD"),
        (seller_disputes("SELL-XYZ-1", "USD"), AccountKind.ASSET, "USD"),
        ("psp/sandbox/fees/EUR", AccountKind.EXPENSE, "EUR"),
        ("fees/EUR", AccountKind.REVENUE, "EUR"),
    ],
)
def test_every_row_of_the_chart_by_the_names_that_all_rooms_share(
    name: str, kind: AccountKind, currency_code: str
) -> None:
    assert account_of_name(name) == (kind, currency_code)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "seller/USD",
        "seller//USD",
        "seller/a/b/USD",
        "seller/a/usd",
        "seller/a/XXX",
        "seller/a/USD\n",
        "seller/a\0/USD",
        "psp/x/clearing",
        "psp/x/other/USD",
        "bank/x/USD",
        f"seller/{'a' * 200}/USD",
    ],
)
def test_a_name_outside_the_chart_is_refused(name: str) -> None:
    with pytest.raises(AccountNameInvalid, match="chart of accounts"):
        account_of_name(name)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (AccountKind.ASSET, 30),
        (AccountKind.EXPENSE, 30),
        (AccountKind.LIABILITY, -30),
        (AccountKind.REVENUE, -30),
    ],
)
def test_balance_is_on_the_own_side(kind: AccountKind, expected: int) -> None:
    assert balance_minor(kind, debit_minor=100, credit_minor=70) == expected
