"""Use case: take a batch of facts, write what they mean as journal entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ledger.domain import Fact, JournalEntry, entry_of
from ledger.service.ports import Journal, Received

__all__ = ["EntryContradicted", "PostFacts"]


class EntryContradicted(Exception):
    """Two messages make the same entry id with different content: never pick one silently."""


class PostFacts:
    """Writes each fact's entry once, however often and in whatever order the facts come."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def handle(
        self, facts: Iterable[tuple[str, Fact]], positions: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """``facts``: pairs of message id and fact; ``positions``: the places of messages in the feed, by id. All facts are written, or
        none.
        """
        entries: dict[str, Received] = {}
        for message_id, fact in facts:
            entry = entry_of(fact)
            if entry is None:
                continue
            received = Received(message_id, entry, positions.get(message_id, 0))
            first = entries.setdefault(entry.journal_entry_id, received)
            if first.entry is not entry:
                _check_same(first.entry, entry)
        if entries:
            await self._journal.post(list(entries.values()))


def _check_same(first: JournalEntry, second: JournalEntry) -> None:
    if first.content_digest() != second.content_digest():
        raise EntryContradicted(
            f"entry {first.journal_entry_id} ({first.purpose} of {first.merchant_reference}) came twice, different: "
            f"{first.postings} and {second.postings}"
        )
