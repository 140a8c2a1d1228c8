"""Carries durable events from the logs into the read model: one task a shard, in order, in batches.

It only ever follows: the writer never waits for it, and it keeps no more than one batch of events in memory.
Each store keeps its own cursor together with what it stores, so a crash, or a store that was emptied,
resumes exactly where that store is. A store whose cursor was moved by somebody else (`ducat wallet rebuild`)
is read again and followed from there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import structlog

from kernel.errors import FailedPrecondition
from wallet_core.projection import RECORD_BYTES, AccountKey, Changes, fold, ordinals_of
from wallet_core.service.port import EventPage, Host

__all__ = ["Projector", "Store"]

EVENT_COUNT_MAX = 512
"""Events in one batch: folding and encoding them holds the event loop for a few milliseconds."""
GATHER_S = 0.5
"""How long the first event after a pause waits for more, unless a reader waits for it: a batch costs about a
millisecond, whether it has one event or a hundred."""
IDLE_S = 60.0
RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
BUSY_SHARE = 0.5
"""While it is far behind, the projector works at most this share of the time, so that a bulk load keeps the
processor."""

_log = structlog.get_logger("wallet.projector")


class Store(Protocol):
    """One side of the read model."""

    name: str

    async def cursor(self, shard: int) -> int:
        """The number of the last event that the store has."""

    async def rebase(self, shard: int, oldest: int) -> int:
        """Begins again: drops what events from `oldest` on (the first that the log has) gave, gets what came
        before them where the store needs it, and returns the new cursor. Raises where there is no such
        beginning.
        """

    async def apply(self, changes: Changes) -> bool:
        """Writes changes and cursor as one. False, and nothing written, where the cursor is not at
        `changes.after`."""


class Projector:
    """Follows the shards of this process into the stores."""

    def __init__(
        self,
        host: Host,
        stores: Sequence[Store],
        *,
        is_transient: Callable[[BaseException], bool],
        on_progress: Callable[[int, int, int], None] = lambda shard, projected, durable: None,
        gather_s: float = GATHER_S,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._host = host
        self._stores = list(stores)
        self._is_transient = is_transient
        self._on_progress = on_progress
        self._gather_s = gather_s
        self._is_busy = is_busy
        self._cursors: dict[int, list[int]] = {}
        self._moved: dict[int, asyncio.Event] = {shard: asyncio.Event() for shard in host.shard_ids}
        self._wanted: dict[int, asyncio.Event] = {shard: asyncio.Event() for shard in host.shard_ids}
        self._reload: dict[int, bool] = dict.fromkeys(host.shard_ids, False)

    def projected(self, shard: int) -> int:
        """The number of the last event that all stores have."""
        return min(self._cursors.get(shard, [0]), default=0)

    async def wait(self, shard: int, sequence: int, timeout_s: float) -> bool:
        """Whether all stores have that event, at the latest after `timeout_s`."""
        if self.projected(shard) >= sequence:
            return True
        self._wanted[shard].set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.projected(shard) < sequence:
                    await self._moved[shard].wait()
        return self.projected(shard) >= sequence

    def reload(self) -> None:
        """The stores may have been reset: their cursors are read again before the next batch."""
        for shard in self._reload:
            self._reload[shard] = True
            self._wanted[shard].set()

    async def run(self) -> None:
        """Follows until cancelled. Raises for what no retry can mend (a store that is ahead of its log)."""
        async with asyncio.TaskGroup() as group:
            for shard in self._host.shard_ids:
                group.create_task(self._follow(shard))

    async def _follow(self, shard: int) -> None:
        failures = 0
        while True:
            try:
                await self._load_cursors(shard)
                while not self._reload[shard]:
                    await self._step(shard)
                    failures = 0
                self._reload[shard] = False
            except Exception as error:
                if not self._is_transient(error):
                    raise
                delay = RETRY_S[min(failures, len(RETRY_S) - 1)]
                failures += 1
                _log.warning("read model waits", shard=shard, error=f"{type(error).__name__}: {error}", retry_s=delay)
                await asyncio.sleep(delay)

    async def _load_cursors(self, shard: int) -> None:
        durable = self._host.durable_sequence(shard)
        oldest = self._host.first_sequence(shard)
        cursors = []
        for store in self._stores:
            cursor = await store.cursor(shard)
            if cursor > durable:
                raise FailedPrecondition(
                    f"the read model in {store.name} has event {cursor} of shard {shard}, the log ends at {durable}:"
                    " the log is an older copy; run `ducat wallet rebuild`"
                )
            if cursor == 0 or cursor + 1 < oldest:
                _log.info("read model begins again", store=store.name, shard=shard, oldest_event=oldest)
                cursor = await store.rebase(shard, oldest)
            cursors.append(cursor)
        self._cursors[shard] = cursors
        self._note(shard)

    async def _step(self, shard: int) -> None:
        """Waits for events and applies one batch of them."""
        at = self.projected(shard)
        durable = self._host.durable_sequence(shard)
        if durable <= at:
            durable = await self._wait_for_events(shard, at)
            if durable <= at:
                return
        pages = await asyncio.to_thread(self._host.read_events, shard, at + 1, EVENT_COUNT_MAX)
        for batch in _batches(pages):
            begin = asyncio.get_running_loop().time()
            changes = self._fold(shard, self.projected(shard), batch)
            for place, store in enumerate(self._stores):
                await self._apply(shard, place, store, changes, batch)
            self._note(shard)
            if self._reload[shard]:
                return
            if changes.upto + EVENT_COUNT_MAX < durable and self._is_busy():
                spent = asyncio.get_running_loop().time() - begin
                await asyncio.sleep(spent * (1 - BUSY_SHARE) / BUSY_SHARE)

    async def _wait_for_events(self, shard: int, at: int) -> int:
        """Until there is an event after `at`, a little longer so that others can join it, or until a
        reset."""
        waiting = asyncio.ensure_future(self._host.wait_durable(shard, at, IDLE_S))
        hurry = False
        try:
            while not waiting.done():
                hurry = await self._is_wanted(shard, waiting) or hurry
                if self._reload[shard]:
                    return at
        finally:
            waiting.cancel()
        if waiting.result() > at and not hurry:
            await self._is_wanted(shard, asyncio.ensure_future(asyncio.sleep(self._gather_s)))
        return self._host.durable_sequence(shard)

    async def _is_wanted(self, shard: int, until: asyncio.Future[Any]) -> bool:
        """Waits for `until`; True as soon as a reader waits for this shard."""
        wanted = asyncio.ensure_future(self._wanted[shard].wait())
        try:
            await asyncio.wait([until, wanted], return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                self._wanted[shard].clear()
            return wanted.done()
        finally:
            wanted.cancel()

    def _fold(self, shard: int, after: int, pages: Sequence[EventPage]) -> Changes:
        plain = [(page.first_sequence, page.timestamp_ns, page.body) for page in pages]
        ordinals = list(ordinals_of(plain))
        keys: dict[int, AccountKey] = {}
        if ordinals:
            keys = dict(zip(ordinals, self._host.account_keys(shard, ordinals), strict=True))
        return fold(shard, after, plain, keys.__getitem__)

    async def _apply(self, shard: int, place: int, store: Store, changes: Changes, pages: Sequence[EventPage]) -> None:
        cursors = self._cursors[shard]
        if cursors[place] >= changes.upto:
            return
        if cursors[place] != changes.after:
            changes = self._fold(shard, cursors[place], _from(pages, cursors[place]))
        if await store.apply(changes):
            cursors[place] = changes.upto
        else:
            self._reload[shard] = True

    def _note(self, shard: int) -> None:
        self._on_progress(shard, self.projected(shard), self._host.durable_sequence(shard))
        self._moved[shard].set()
        self._moved[shard] = asyncio.Event()


def _batches(pages: Sequence[EventPage]) -> Iterator[list[EventPage]]:
    """The same events in batches of at most EVENT_COUNT_MAX: a frame of a bulk load has thousands."""
    batch: list[EventPage] = []
    room = EVENT_COUNT_MAX
    for page in pages:
        at = 0
        while at < page.count:
            count = min(room, page.count - at)
            body = page.body[at * RECORD_BYTES : (at + count) * RECORD_BYTES]
            batch.append(EventPage(page.first_sequence + at, count, page.timestamp_ns, body))
            at += count
            room -= count
            if room == 0:
                yield batch
                batch, room = [], EVENT_COUNT_MAX
    if batch:
        yield batch


def _from(pages: Sequence[EventPage], after: int) -> list[EventPage]:
    """The pages that hold events behind `after`."""
    return [page for page in pages if page.last_sequence > after]
