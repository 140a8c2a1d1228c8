"""Carries durable events from the logs into the read model: one task for each shard and store, in order, in batches.

It only ever follows: the writer never waits for it, and it keeps no more than one read of events in memory.
Each store keeps its own cursor together with what it stores, so a crash, or a store that was emptied,
resumes exactly where that store is. A store whose cursor was moved by somebody else (`ducat wallet rebuild`)
is read again and followed from there.

Nothing that a store does or says ends a task: it is a *problem* of that store and shard, is said, and is tried
again until it is gone. The other store and the other shards go on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import structlog

from kernel.errors import FailedPrecondition, Unavailable
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
LOG_INTERVAL_S = 60.0
"""How often a problem that lasts is logged."""
READER_PATIENCE = 2
"""Failures in a row after which a reader is told at once instead of waiting; the first may be a connection that was cut."""
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


class _Follower:
    """How far one store is with one shard."""

    def __init__(self, shard: int, store: Store) -> None:
        self.shard, self.store = shard, store
        self.cursor = 0
        self.is_reset = False  # its cursor may have been moved by somebody else
        self.failures = 0
        self.problem = ""
        self.told_s = 0.0
        self.moved = asyncio.Event()  # the cursor, or the problem
        self.wanted = asyncio.Event()  # a reader waits, or the cursor was moved

    def note(self) -> None:
        """Wakes who waits for it."""
        self.moved.set()
        self.moved = asyncio.Event()


class _Ahead:
    """What was last read of a shard's log: two stores at the same place share the reading and the folding."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.batches: list[list[EventPage]] = []
        self.changes: Changes | None = None


class Projector:
    """Follows the shards of this process into the stores."""

    def __init__(
        self,
        host: Host,
        stores: Sequence[Store],
        *,
        on_progress: Callable[[int, int, int], None] = lambda shard, projected, durable: None,
        on_failure: Callable[[int, str, str], None] = lambda shard, store, problem: None,
        on_well: Callable[[int, str], None] = lambda shard, store: None,
        gather_s: float = GATHER_S,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`on_failure(shard, store, problem)` is called for each try that failed, `on_well(shard, store)` once the problem is gone."""
        self._host = host
        self._on_progress, self._on_failure, self._on_well = on_progress, on_failure, on_well
        self._gather_s = gather_s
        self._is_busy = is_busy
        self._followers = {shard: [_Follower(shard, store) for store in stores] for shard in host.shard_ids}
        self._ahead = {shard: _Ahead() for shard in host.shard_ids}

    def projected(self, shard: int, store: str = "") -> int:
        """The number of the last event that all stores have, or the one that is named."""
        return min((one.cursor for one in self._of(shard, store)), default=0)

    def problem(self, shard: int) -> str:
        """What keeps the stores from following a shard, and in which; empty where nothing does."""
        return "; ".join(f"{one.store.name}: {one.problem}" for one in self._followers.get(shard, ()) if one.problem)

    async def wait(self, shard: int, sequence: int, timeout_s: float, store: str = "") -> bool:
        """Whether all stores have that event, at the latest after `timeout_s`. Where a store is named, only that one is waited for;
        raises Unavailable, at once, while it has a problem that lasts.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for one in self._of(shard, store):
                    while one.cursor < sequence:
                        if store and one.failures >= READER_PATIENCE:
                            raise Unavailable(
                                f"the read model in {store} does not follow shard {shard}; try again later ({one.problem})",
                                metadata={"shard": str(shard), "sequence_number": str(one.cursor)},
                            )
                        moved = one.moved
                        one.wanted.set()
                        await moved.wait()
        return self.projected(shard, store) >= sequence

    def reload(self, *, is_empty: bool = False) -> None:
        """The stores may have been reset, or certainly were: their cursors are read again before the next batch."""
        for followers in self._followers.values():
            for one in followers:
                one.is_reset = True
                if is_empty:
                    one.cursor = 0
                one.wanted.set()

    async def run(self) -> None:
        """Follows until cancelled."""
        async with asyncio.TaskGroup() as group:
            for followers in self._followers.values():
                for one in followers:
                    group.create_task(self._follow(one))

    def _of(self, shard: int, store: str) -> list[_Follower]:
        return [one for one in self._followers.get(shard, ()) if store in ("", one.store.name)]

    async def _follow(self, one: _Follower) -> None:
        while True:
            try:
                await self._load_cursor(one)
                while not one.is_reset:
                    await self._step(one)
                one.is_reset = False
            except Exception as error:  # whatever it is: the core goes on, and so do the other stores
                delay_s = RETRY_S[min(one.failures, len(RETRY_S) - 1)]
                self._note_failure(one, error, delay_s)
                await self._is_wanted(one, asyncio.ensure_future(asyncio.sleep(delay_s)), only_reset=True)

    def _note_failure(self, one: _Follower, error: Exception, delay_s: float) -> None:
        problem = str(error) if isinstance(error, FailedPrecondition) else f"{type(error).__name__}: {error}"
        one.failures += 1
        now_s = asyncio.get_running_loop().time()
        if problem != one.problem or now_s - one.told_s >= LOG_INTERVAL_S:
            one.told_s = now_s
            log = (
                _log.error if isinstance(error, FailedPrecondition) or one.failures > READER_PATIENCE else _log.warning
            )
            log("read model waits", store=one.store.name, shard=one.shard, problem=problem, retry_s=delay_s)
        one.problem = problem
        self._on_failure(one.shard, one.store.name, problem)
        one.note()

    def _note_progress(self, one: _Follower) -> None:
        if one.failures:
            one.failures, one.problem = 0, ""
            _log.info("read model follows again", store=one.store.name, shard=one.shard, at_event=one.cursor)
            self._on_well(one.shard, one.store.name)
        one.note()
        self._on_progress(one.shard, self.projected(one.shard), self._host.durable_sequence(one.shard))

    async def _load_cursor(self, one: _Follower) -> None:
        shard, store = one.shard, one.store
        oldest = self._host.first_sequence(shard)
        cursor = await store.cursor(shard)
        durable = self._host.durable_sequence(shard)
        if cursor > durable:
            raise FailedPrecondition(
                f"the read model in {store.name} has event {cursor} of shard {shard}, the log ends at {durable}: the log is an"
                " older copy. Restore a newer one (docs/wallet.md, A shard went back in time); if it is to go on with this one,"
                " run `ducat wallet rebuild`"
            )
        if cursor == 0 or cursor + 1 < oldest:
            _log.info("read model begins again", store=store.name, shard=shard, oldest_event=oldest)
            cursor = await store.rebase(shard, oldest)
        one.cursor = cursor
        if cursor >= durable:
            self._note_progress(one)
        else:
            one.note()

    async def _step(self, one: _Follower) -> None:
        """Waits for events and applies one batch of them."""
        durable = self._host.durable_sequence(one.shard)
        if durable <= one.cursor:
            durable = await self._wait_for_events(one)
            if durable <= one.cursor or one.is_reset:
                return
        begin_s = asyncio.get_running_loop().time()
        changes = await self._next_changes(one.shard, one.cursor)
        if not await one.store.apply(changes):
            one.is_reset = True
            return
        if one.is_reset:
            return
        one.cursor = changes.upto
        self._note_progress(one)
        if changes.upto + EVENT_COUNT_MAX < durable and self._is_busy():
            spent_s = asyncio.get_running_loop().time() - begin_s
            await asyncio.sleep(spent_s * (1 - BUSY_SHARE) / BUSY_SHARE)

    async def _wait_for_events(self, one: _Follower) -> int:
        """Until there is an event behind the cursor, a little longer so that others can join it, or until a
        reset."""
        waiting = asyncio.ensure_future(self._host.wait_durable(one.shard, one.cursor, IDLE_S))
        hurry = False
        try:
            while not waiting.done():
                hurry = await self._is_wanted(one, waiting) or hurry
                if one.is_reset:
                    return one.cursor
        finally:
            waiting.cancel()
        if waiting.result() > one.cursor and not hurry:
            await self._is_wanted(one, asyncio.ensure_future(asyncio.sleep(self._gather_s)))
        return self._host.durable_sequence(one.shard)

    async def _is_wanted(self, one: _Follower, until: asyncio.Future[Any], *, only_reset: bool = False) -> bool:
        """Waits for `until`; True as soon as a reader waits for this store, or the cursor was moved."""
        while True:
            wanted = asyncio.ensure_future(one.wanted.wait())
            try:
                await asyncio.wait([until, wanted], return_when=asyncio.FIRST_COMPLETED)
                is_wanted = wanted.done()
                if is_wanted:
                    one.wanted.clear()
                if until.done() or not only_reset or one.is_reset:
                    return is_wanted
            finally:
                wanted.cancel()

    async def _next_changes(self, shard: int, after: int) -> Changes:
        """The next batch of events behind `after`, folded."""
        ahead = self._ahead[shard]
        async with ahead.lock:
            if ahead.changes is not None and ahead.changes.after == after:
                return ahead.changes
            batch = _batch_of(ahead.batches, after + 1)
            if batch is None:
                pages = await asyncio.to_thread(self._host.read_events, shard, after + 1, EVENT_COUNT_MAX)
                ahead.batches = list(_batches(pages))
                batch = _batch_of(ahead.batches, after + 1)
            if batch is None:
                raise FailedPrecondition(f"the log of shard {shard} does not give event {after + 1}")
            ahead.changes = self._fold(shard, after, batch)
            return ahead.changes

    def _fold(self, shard: int, after: int, pages: Sequence[EventPage]) -> Changes:
        plain = [(page.first_sequence, page.timestamp_ns, page.body) for page in pages]
        ordinals = list(ordinals_of(plain))
        keys: dict[int, AccountKey] = {}
        if ordinals:
            keys = dict(zip(ordinals, self._host.account_keys(shard, ordinals), strict=True))
        return fold(shard, after, plain, keys.__getitem__)


def _batch_of(batches: Sequence[list[EventPage]], sequence: int) -> list[EventPage] | None:
    """The pages of the batch that has an event, from the page that has it on."""
    for batch in batches:
        if batch[0].first_sequence <= sequence <= batch[-1].last_sequence:
            return [page for page in batch if page.last_sequence >= sequence]
    return None


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
