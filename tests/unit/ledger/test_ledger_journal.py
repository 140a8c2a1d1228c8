"""Risk: an unbalanced entry, a posting of nothing, a contradiction that looks like a repetition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.domain import EntryInvalid, JournalEntry, Posting, Side


def entry(
    *postings: Posting, purpose: str = "capture", reference: str = "ORD-1", description: str = ""
) -> JournalEntry:
    return JournalEntry("id-1", purpose, reference, description, 1, postings)


def debit(amount_minor: int, account: str = "psp/sandbox/clearing/USD", currency_code: str = "USD") -> Posting:
    return Posting(account, Side.DEBIT, currency_code, amount_minor)


def credit(amount_minor: int, account: str = "seller/S/USD", currency_code: str = "USD") -> Posting:
    return Posting(account, Side.CREDIT, currency_code, amount_minor)


def test_debits_may_be_split() -> None:
    assert len(entry(debit(70), debit(30, "psp/sandbox/fees/USD"), credit(100)).postings) == 3


@pytest.mark.parametrize(
    ("postings", "expected"),
    [
        ((), "two postings"),
        ((debit(1),), "two postings"),
        ((debit(100), credit(99)), "'USD': 1"),
        ((debit(100), debit(100)), "'USD': 200"),
        ((debit(100), credit(100, "seller/S/EUR", "EUR")), "'USD': 100, 'EUR': -100"),
    ],
)
def test_an_unbalanced_entry_cannot_be_built(postings: tuple[Posting, ...], expected: str) -> None:
    with pytest.raises(EntryInvalid, match=expected):
        entry(*postings)


@pytest.mark.parametrize("amount_minor", [0, -1, 2**63])
def test_a_posting_is_more_than_zero_and_fits(amount_minor: int) -> None:
    with pytest.raises(EntryInvalid, match="amount_minor"):
        debit(amount_minor)


def test_a_posting_is_in_its_accounts_currency() -> None:
    with pytest.raises(EntryInvalid, match="not in EUR"):
        debit(1, currency_code="EUR")


@given(st.lists(st.integers(1, 2**62), min_size=1, max_size=8), st.integers(-3, 3))
def test_balance_is_exact_for_any_amounts(amounts: list[int], error: int) -> None:
    total = sum(amounts) + error
    if not 0 < total < 2**63:
        return
    postings = (*map(debit, amounts), credit(total))
    if error == 0:
        entry(*postings)
    else:
        with pytest.raises(EntryInvalid):
            entry(*postings)


def test_digest_tells_content_apart_and_words_not() -> None:
    same = entry(debit(100), credit(100))
    assert same.content_digest() == entry(debit(100), credit(100), description="other words").content_digest()
    others = [
        entry(debit(101), credit(101)),
        entry(debit(100), credit(100), purpose="refund"),
        entry(debit(100), credit(100), reference="ORD-2"),
        entry(debit(100), credit(100, "seller/T/USD")),
        entry(credit(100), debit(100)),
    ]
    digests = {each.content_digest() for each in (same, *others)}
    assert len(digests) == 6
    assert {len(digest) for digest in digests} == {16}
