"""Statement and trial balance arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ledger.domain.accounts import AccountKind, Side, balance_minor

__all__ = ["CurrencySums", "Movement", "Statement", "StatementLine", "TrialBalance", "statement_of", "trial_balance_of"]


@dataclass(frozen=True, slots=True)
class CurrencySums:
    """All debits and all credits of one currency, minor units."""

    currency_code: str
    debit_minor: int
    credit_minor: int


@dataclass(frozen=True, slots=True)
class TrialBalance:
    """One line a currency, by code. ``balanced``: debits equal credits everywhere, and the accounts' running sums say
    the same.
    """

    lines: tuple[CurrencySums, ...]
    balanced: bool


@dataclass(frozen=True, slots=True)
class Movement:
    """One posting to an account, as the journal has it. Times are unix microseconds."""

    journal_entry_id: str
    merchant_reference: str
    description: str
    side: Side
    amount_minor: int
    occur_time_us: int


@dataclass(frozen=True, slots=True)
class StatementLine:
    """A movement and the balance after it."""

    movement: Movement
    balance_minor: int


@dataclass(frozen=True, slots=True)
class Statement:
    """Balances are on the account's own side, minor units; lines are oldest first."""

    account_name: str
    currency_code: str
    opening_balance_minor: int
    closing_balance_minor: int
    lines: tuple[StatementLine, ...]


def statement_of(
    account_name: str,
    kind: AccountKind,
    currency_code: str,
    opening_debit_minor: int,
    opening_credit_minor: int,
    movements: Iterable[Movement],
) -> Statement:
    """Running balances over ``movements`` (oldest first), from the sums of everything before them."""
    opening = balance = balance_minor(kind, opening_debit_minor, opening_credit_minor)
    lines = []
    for movement in movements:
        amount = movement.amount_minor
        debit, credit = (amount, 0) if movement.side is Side.DEBIT else (0, amount)
        balance += balance_minor(kind, debit, credit)
        lines.append(StatementLine(movement, balance))
    return Statement(account_name, currency_code, opening, balance, tuple(lines))


def trial_balance_of(from_postings: Sequence[CurrencySums], from_accounts: Sequence[CurrencySums]) -> TrialBalance:
    """The trial balance of the postings, checked against the accounts' running sums; both must come from one database
    snapshot.

    The lines are those of the postings: they are the record, the running sums only a copy of it.
    """
    lines = tuple(sorted(from_postings, key=lambda sums: sums.currency_code))
    equal = all(sums.debit_minor == sums.credit_minor for sums in lines)
    return TrialBalance(lines, equal and _by_currency(from_postings) == _by_currency(from_accounts))


def _by_currency(all_sums: Sequence[CurrencySums]) -> Mapping[str, tuple[int, int]]:
    return {sums.currency_code: (sums.debit_minor, sums.credit_minor) for sums in all_sums}
