"""Risk: a statement that does not add up, a trial balance that looks balanced and is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ledger.domain import AccountKind, CurrencySums, Movement, Side, balance_minor, statement_of, trial_balance_of


def movement(side: Side, amount_minor: int) -> Movement:
    return Movement("id", "ref", "words", side, amount_minor, 1)


def test_running_balances_of_a_liability() -> None:
    movements = [movement(Side.CREDIT, 100), movement(Side.DEBIT, 30)]
    statement = statement_of("seller/S/USD", AccountKind.LIABILITY, "USD", 5, 20, movements)
    assert statement.opening_balance_minor == 15
    assert [line.balance_minor for line in statement.lines] == [115, 85]
    assert statement.closing_balance_minor == 85


def test_a_period_without_movement_closes_as_it_opened() -> None:
    statement = statement_of("psp/p/clearing/USD", AccountKind.ASSET, "USD", 100, 40, [])
    assert (statement.opening_balance_minor, statement.closing_balance_minor, statement.lines) == (60, 60, ())


@given(
    st.sampled_from(AccountKind),
    st.lists(st.tuples(st.sampled_from(Side), st.integers(1, 10**15)), max_size=20),
    st.integers(0, 20),
)
def test_a_statement_may_be_cut_anywhere(kind: AccountKind, rows: list[tuple[Side, int]], cut: int) -> None:
    movements = [movement(side, amount) for side, amount in rows]

    def sums(some: list[Movement]) -> tuple[int, int]:
        return (
            sum(each.amount_minor for each in some if each.side is Side.DEBIT),
            sum(each.amount_minor for each in some if each.side is Side.CREDIT),
        )

    whole = statement_of("a", kind, "USD", 0, 0, movements)
    first = statement_of("a", kind, "USD", 0, 0, movements[:cut])
    second = statement_of("a", kind, "USD", *sums(movements[:cut]), movements[cut:])
    assert first.closing_balance_minor == second.opening_balance_minor
    assert first.lines + second.lines == whole.lines
    assert whole.closing_balance_minor == balance_minor(kind, *sums(movements))


def test_trial_balance_lines_are_by_currency() -> None:
    sums = [CurrencySums("USD", 5, 5), CurrencySums("EUR", 7, 7)]
    balance = trial_balance_of(sums, list(reversed(sums)))
    assert balance.balanced
    assert [line.currency_code for line in balance.lines] == ["EUR", "USD"]
    assert trial_balance_of([], []).balanced


def test_trial_balance_sees_each_kind_of_damage() -> None:
    good = [CurrencySums("USD", 5, 5)]
    assert not trial_balance_of([CurrencySums("USD", 5, 4)], [CurrencySums("USD", 5, 4)]).balanced
    assert not trial_balance_of(good, [CurrencySums("USD", 5, 6)]).balanced
    assert not trial_balance_of(good, []).balanced
    assert not trial_balance_of(good, [*good, CurrencySums("EUR", 1, 1)]).balanced
    # Each currency for itself: a surplus in one does not pay for another's lack.
    mixed = [CurrencySums("EUR", 6, 5), CurrencySums("USD", 5, 6)]
    assert not trial_balance_of(mixed, mixed).balanced
