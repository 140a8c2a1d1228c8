"""Posting rules as a table: what each fact debits and credits.

fact               purpose         debit              credit
capture            capture         psp clearing       seller wallet
refund completed   refund          seller wallet      psp clearing
payout completed   payout          seller wallet      psp payouts
payout returned    payout_return   psp payouts        seller wallet
dispute opened     dispute         seller disputes    psp clearing     the PSP takes the money back at once
dispute won        dispute_won     psp clearing       seller disputes  and gives it back
refund claimed     refund_claim    seller disputes    psp clearing     what the seller's wallet did not cover
refund reversed    refund_return   psp clearing       seller wallet    it failed after all
… what was claimed refund_unclaim  psp clearing       seller disputes
refund failed, payout released, dispute lost: no money moves, no entry

A dispute, and what a seller's wallet does not cover of a refund, is a claim on the seller, in an account of its own: the wallet
may be empty by then, and no wallet goes below zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from kernel.ids import derived_event_id
from kernel.names import payout_clearing, psp_clearing, seller_disputes, seller_wallet
from ledger.domain.accounts import Side
from ledger.domain.journal import JournalEntry, Posting

__all__ = ["RULES", "Fact", "FactKind", "PostingRule", "entry_of"]


class FactKind(Enum):
    """The facts of the payment service that the ledger knows."""

    CAPTURE = 1
    REFUND_COMPLETED = 2
    REFUND_FAILED = 3
    PAYOUT_COMPLETED = 4
    PAYOUT_RELEASED = 5
    PAYOUT_RETURNED = 6
    DISPUTE_OPENED = 7
    DISPUTE_WON = 8
    DISPUTE_LOST = 9
    REFUND_CLAIMED = 10
    REFUND_RETURNED = 11
    REFUND_UNCLAIMED = 12


@dataclass(frozen=True, slots=True)
class Fact:
    """One business fact. ``merchant_reference`` is the payment_order_id, refund_id or payout reference. ``occurrence`` tells apart
    facts that can happen to it more than once (a dispute after a dispute that was won); else it is empty.
    """

    kind: FactKind
    merchant_reference: str
    seller_account: str
    psp: str
    currency_code: str
    amount_minor: int
    occur_time_us: int
    occurrence: str = ""


@dataclass(frozen=True, slots=True)
class PostingRule:
    """One row of the table. ``purpose`` is also the kind of the entry's id: UUIDv5 of
    ``{purpose}/{merchant_reference}``, with ``/{occurrence}`` where there is one.
    """

    purpose: str
    debit: Callable[[Fact], str]
    credit: Callable[[Fact], str]
    description: str


def _seller(fact: Fact) -> str:
    return seller_wallet(fact.seller_account, fact.currency_code)


def _disputes(fact: Fact) -> str:
    return seller_disputes(fact.seller_account, fact.currency_code)


def _clearing(fact: Fact) -> str:
    return psp_clearing(fact.psp, fact.currency_code)


def _payouts(fact: Fact) -> str:
    return payout_clearing(fact.psp, fact.currency_code)


RULES: Mapping[FactKind, PostingRule | None] = MappingProxyType(
    {
        FactKind.CAPTURE: PostingRule("capture", _clearing, _seller, "Order {} captured by {}"),
        FactKind.REFUND_COMPLETED: PostingRule("refund", _seller, _clearing, "Refund {} paid back by {}"),
        FactKind.REFUND_FAILED: None,
        FactKind.PAYOUT_COMPLETED: PostingRule("payout", _seller, _payouts, "Payout {} sent by {}"),
        FactKind.PAYOUT_RELEASED: None,
        FactKind.PAYOUT_RETURNED: PostingRule("payout_return", _payouts, _seller, "Payout {} returned to {}"),
        FactKind.DISPUTE_OPENED: PostingRule("dispute", _disputes, _clearing, "Order {} disputed at {}"),
        FactKind.DISPUTE_WON: PostingRule("dispute_won", _clearing, _disputes, "Dispute of order {} won at {}"),
        FactKind.DISPUTE_LOST: None,
        FactKind.REFUND_CLAIMED: PostingRule(
            "refund_claim", _disputes, _clearing, "Refund {} paid back by {}, owed by the seller"
        ),
        FactKind.REFUND_RETURNED: PostingRule("refund_return", _clearing, _seller, "Refund {} failed at {} after all"),
        FactKind.REFUND_UNCLAIMED: PostingRule(
            "refund_unclaim", _clearing, _disputes, "Refund {} failed at {} after all, owed no more"
        ),
    }
)
"""Every kind of fact has its row. A description takes our reference and the PSP."""


def entry_of(fact: Fact) -> JournalEntry | None:
    """The entry that a fact makes, or None where no money moves. Raises EntryInvalid or AccountNameInvalid for a
    malformed fact.
    """
    rule = RULES[fact.kind]
    if rule is None:
        return None
    natural = f"{fact.merchant_reference}/{fact.occurrence}" if fact.occurrence else fact.merchant_reference
    return JournalEntry(
        journal_entry_id=derived_event_id(rule.purpose, natural),
        purpose=rule.purpose,
        merchant_reference=fact.merchant_reference,
        description=rule.description.format(fact.merchant_reference, fact.psp),
        occur_time_us=fact.occur_time_us,
        postings=(
            Posting(rule.debit(fact), Side.DEBIT, fact.currency_code, fact.amount_minor),
            Posting(rule.credit(fact), Side.CREDIT, fact.currency_code, fact.amount_minor),
        ),
    )
