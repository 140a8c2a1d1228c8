"""Journal entries. One that is not balanced cannot be built: it is checked here, and by the database again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ledger.domain.accounts import Side, account_of_name

__all__ = ["POSTING_AMOUNT_MINOR_MAX", "EntryInvalid", "JournalEntry", "Posting"]

POSTING_AMOUNT_MINOR_MAX = 2**63 - 1


class EntryInvalid(ValueError):
    """An entry that breaks double entry; a bug of whoever built it."""


@dataclass(frozen=True, slots=True)
class Posting:
    """One side of an entry. ``amount_minor`` is more than zero: the side says where it goes."""

    account_name: str
    side: Side
    currency_code: str
    amount_minor: int

    def __post_init__(self) -> None:
        if not 0 < self.amount_minor <= POSTING_AMOUNT_MINOR_MAX:
            raise EntryInvalid(
                f"posting to {self.account_name}: amount_minor must be 1 to 2^63 - 1, got {self.amount_minor}"
            )
        if account_of_name(self.account_name)[1] != self.currency_code:
            raise EntryInvalid(f"posting to {self.account_name}: the account is not in {self.currency_code}")


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """Two or more postings whose debits equal their credits in every currency.

    ``journal_entry_id`` is deterministic: the same fact makes the same entry at every replay. ``occur_time_us`` is
    when the fact happened, in unix microseconds.
    """

    journal_entry_id: str
    purpose: str
    merchant_reference: str
    description: str
    occur_time_us: int
    postings: tuple[Posting, ...]

    def __post_init__(self) -> None:
        if len(self.postings) < 2:
            raise EntryInvalid(f"entry {self.journal_entry_id}: needs two postings or more, has {len(self.postings)}")
        over: dict[str, int] = {}
        for posting in self.postings:
            signed = posting.amount_minor if posting.side is Side.DEBIT else -posting.amount_minor
            over[posting.currency_code] = over.get(posting.currency_code, 0) + signed
        wrong = {currency_code: minor for currency_code, minor in over.items() if minor}
        if wrong:
            raise EntryInvalid(
                f"entry {self.journal_entry_id}: debits − credits must be 0 in every currency, are {wrong}"
            )

    def content_digest(self) -> bytes:
        """16 bytes over what the entry does. The same id with another digest is a contradiction and must never be
        swallowed.
        """
        lines = "".join(
            f"\n{posting.account_name} {posting.side.name} {posting.currency_code} {posting.amount_minor}"
            for posting in self.postings
        )
        return hashlib.sha256(f"{self.purpose} {self.merchant_reference}{lines}".encode()).digest()[:16]
