"""What the ledger's use cases need from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ledger.domain import AccountKind, CurrencySums, JournalEntry, Movement

__all__ = ["AccountRow", "EntryRow", "Journal", "Received"]


@dataclass(frozen=True, slots=True)
class Received:
    """An entry and the message that caused it. ``feed_position`` is the message's place in the feed; 0 = it has none."""

    message_id: str
    entry: JournalEntry
    feed_position: int = 0


@dataclass(frozen=True, slots=True)
class AccountRow:
    """An account with its running sums, minor units."""

    name: str
    kind: AccountKind
    currency_code: str
    debit_minor: int
    credit_minor: int


@dataclass(frozen=True, slots=True)
class EntryRow:
    """A stored entry. ``position`` grows with each entry written; times are unix microseconds."""

    position: int
    entry: JournalEntry
    create_time_us: int


class Journal(Protocol):
    """The store of entries and accounts. Entries are only ever added."""

    async def post(self, received: Sequence[Received]) -> None:
        """Writes what is new of a batch, all or nothing, in one transaction: inbox, entries, postings, running sums.

        ``received`` has each entry id once. A known message or a known entry changes nothing; a known entry id with
        other content, and a sum that overflows, raise and change nothing.
        """
        ...

    async def account(self, name: str) -> AccountRow | None:
        """One account, or None."""
        ...

    async def accounts(self, name_prefix: str, after_name: str, limit: int) -> list[AccountRow]:
        """Accounts by name, after ``after_name``."""
        ...

    async def entries(
        self, merchant_reference: str, account_name: str, before_position: int, limit: int
    ) -> list[EntryRow]:
        """Entries, newest first, below ``before_position``; empty filters match all."""
        ...

    async def sums(self) -> tuple[list[CurrencySums], list[CurrencySums]]:
        """The sums of all postings and the sums of all accounts by currency, both of one snapshot."""
        ...

    async def movements(
        self, account_name: str, start_us: int | None, end_us: int | None, limit: int
    ) -> tuple[int, int, list[Movement]]:
        """Debits and credits before ``start_us`` and the postings of the period, oldest first, of one snapshot."""
        ...
