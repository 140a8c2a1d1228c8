"""Dead letters: messages that no try could handle, kept until somebody retries them.

A dead letter belongs to one group of one topic. A retry publishes it to its topic again, then removes it: every group of the topic sees it
once more, and the inboxes of those that handled it before ignore it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kernel.errors import NotFound
from runtime.bus import Message

__all__ = ["LIST_MAX", "DeadLetter", "DeadLetterStore", "discard", "list_dead_letters", "retry", "retry_all"]

LIST_MAX = 1_000
"""Dead letters that one look returns of a topic."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that its group could not handle. `id` names it within its topic."""

    id: str
    message: Message
    group: str
    error: str
    delivery_count: int
    first_failed_ms: int
    last_failed_ms: int
    raw: bytes = b""
    """What the broker held, in the engine's own form, where that was no message: `message` is only fit to be shown then, and a retry
    publishes the raw form."""


class DeadLetterStore(Protocol):
    """What each engine offers beside Bus."""

    async def dead_letter_topics(self) -> list[str]:
        """Topics that have had dead letters, sorted; the name is the topic's own, without suffix."""

    async def dead_letters(self, topic: str, *, limit: int = LIST_MAX) -> list[DeadLetter]:
        """The oldest dead letters of a topic."""

    async def republish_dead_letter(self, letter: DeadLetter) -> None:
        """Publish it to its topic again, then remove it. A crash between the two publishes it twice at the next retry."""

    async def remove_dead_letter(self, letter: DeadLetter) -> None:
        """Remove it."""


async def list_dead_letters(store: DeadLetterStore, topic: str = "", *, limit: int = LIST_MAX) -> list[DeadLetter]:
    """The oldest dead letters of one topic, or of every topic."""
    topics = [topic] if topic else await store.dead_letter_topics()
    return [letter for name in topics for letter in await store.dead_letters(name, limit=limit)]


async def retry(store: DeadLetterStore, topic: str, ids: Sequence[str]) -> list[DeadLetter]:
    """Retry the named dead letters of a topic, oldest first. Raises NotFound, before any effect, when one does not exist."""
    found = await _named(store, topic, ids)
    for letter in found:
        await store.republish_dead_letter(letter)
    return found


async def discard(store: DeadLetterStore, topic: str, ids: Sequence[str]) -> list[DeadLetter]:
    """Remove the named dead letters of a topic. Raises NotFound, before any effect, when one does not exist."""
    found = await _named(store, topic, ids)
    for letter in found:
        await store.remove_dead_letter(letter)
    return found


async def retry_all(store: DeadLetterStore, topic: str) -> list[DeadLetter]:
    """Retry every dead letter that the topic has now, oldest first; one that fails again during this is not retried twice.

    What is no message is passed over: a retry gives it to every group of the topic, none can decode it, and there are more than before.
    """
    letters = [letter for letter in await store.dead_letters(topic, limit=2**31) if not letter.raw]
    for letter in letters:
        await store.republish_dead_letter(letter)
    return letters


async def _named(store: DeadLetterStore, topic: str, ids: Sequence[str]) -> list[DeadLetter]:
    wanted = set(ids)
    found = [letter for letter in await store.dead_letters(topic, limit=2**31) if letter.id in wanted]
    missing = wanted - {letter.id for letter in found}
    if missing:
        raise NotFound(
            f"topic {topic} has no dead letter {', '.join(sorted(missing))}; see `ducat bus dead-letter list`"
        )
    return found
