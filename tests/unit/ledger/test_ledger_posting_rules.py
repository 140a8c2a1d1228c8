"""Risk: money booked on the wrong side, a fact without a rule, an id that changes at a replay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernel.ids import derived_event_id
from ledger.domain import RULES, AccountNameInvalid, EntryInvalid, Fact, FactKind, Side, entry_of

CLEARING = "psp/sandbox/clearing/USD"
PAYOUTS = "psp/sandbox/payouts/USD"
SELLER = "seller/SELL-XYZ-1/USD"
DISPUTES = "seller/SELL-XYZ-1/disputes/USD"

# What each fact must do: purpose, debited account, credited account. None: nothing.
EXPECTED: dict[FactKind, tuple[str, str, str] | None] = {
    FactKind.CAPTURE: ("capture", CLEARING, SELLER),
    FactKind.REFUND_COMPLETED: ("refund", SELLER, CLEARING),
    FactKind.REFUND_FAILED: None,
    FactKind.PAYOUT_COMPLETED: ("payout", SELLER, PAYOUTS),
    FactKind.PAYOUT_RELEASED: None,
    FactKind.PAYOUT_RETURNED: ("payout_return", PAYOUTS, SELLER),
    FactKind.DISPUTE_OPENED: ("dispute", DISPUTES, CLEARING),
    FactKind.DISPUTE_WON: ("dispute_won", CLEARING, DISPUTES),
    FactKind.DISPUTE_LOST: None,
    FactKind.REFUND_CLAIMED: ("refund_claim", DISPUTES, CLEARING),
    FactKind.REFUND_RETURNED: ("refund_return", CLEARING, SELLER),
    FactKind.REFUND_UNCLAIMED: ("refund_unclaim", CLEARING, DISPUTES),
}


def fact(kind: FactKind, amount_minor: int = 7500, seller_account: str = "SELL-XYZ-1") -> Fact:
    return Fact(kind, "REF-1", seller_account, "sandbox", "USD", amount_minor, 1_753_056_000_000_001)


def test_every_kind_of_fact_has_a_rule_and_an_expectation() -> None:
    assert set(RULES) == set(FactKind) == set(EXPECTED)


@pytest.mark.parametrize("kind", FactKind, ids=lambda kind: kind.name)
def test_every_rule_debits_and_credits_what_it_must(kind: FactKind) -> None:
    entry = entry_of(fact(kind))
    expected = EXPECTED[kind]
    if expected is None:
        assert entry is None
        return
    assert entry is not None
    purpose, debited, credited = expected
    assert [(p.account_name, p.side, p.amount_minor, p.currency_code) for p in entry.postings] == [
        (debited, Side.DEBIT, 7500, "USD"),
        (credited, Side.CREDIT, 7500, "USD"),
    ]
    assert entry.purpose == purpose
    assert entry.merchant_reference == "REF-1"
    assert entry.journal_entry_id == derived_event_id(purpose, "REF-1")
    assert entry.occur_time_us == 1_753_056_000_000_001
    assert "REF-1" in entry.description
    assert "sandbox" in entry.description
    assert entry_of(fact(kind)) == entry


def test_purposes_differ_so_that_ids_do() -> None:
    purposes = [rule.purpose for rule in RULES.values() if rule is not None]
    assert len(set(purposes)) == len(purposes)


def test_what_is_undone_comes_back_to_zero() -> None:
    for done, undone in (
        (FactKind.CAPTURE, FactKind.REFUND_COMPLETED),
        (FactKind.PAYOUT_COMPLETED, FactKind.PAYOUT_RETURNED),
        (FactKind.DISPUTE_OPENED, FactKind.DISPUTE_WON),
    ):
        balances: dict[str, int] = {}
        for kind in (done, undone):
            entry = entry_of(fact(kind))
            assert entry is not None
            for posting in entry.postings:
                signed = posting.amount_minor if posting.side is Side.DEBIT else -posting.amount_minor
                balances[posting.account_name] = balances.get(posting.account_name, 0) + signed
        assert set(balances.values()) == {0}


def test_a_second_dispute_of_an_order_is_an_entry_of_its_own() -> None:
    first, second = (entry_of(replace(fact(FactKind.DISPUTE_OPENED), occurrence=each)) for each in ("e1", "e2"))
    assert first is not None
    assert second is not None
    assert first.journal_entry_id != second.journal_entry_id
    assert first.merchant_reference == second.merchant_reference == "REF-1"


def test_a_malformed_fact_raises_and_makes_no_entry() -> None:
    with pytest.raises(EntryInvalid):
        entry_of(fact(FactKind.CAPTURE, amount_minor=0))
    with pytest.raises(AccountNameInvalid):
        entry_of(fact(FactKind.CAPTURE, seller_account=""))
