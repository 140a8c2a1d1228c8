"""Inbox: a message takes effect once, however often the bus delivers it; and the proof of what was applied (runtime/feed).

The table, copied into each consuming room's migrations (`payment` stands for the room's schema):

    CREATE TABLE payment.inbox (
        consumer    text        NOT NULL,
        message_id  text        NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now(),
        position    bigint      NOT NULL DEFAULT 0,
        PRIMARY KEY (consumer, message_id)
    );
    CREATE INDEX inbox_create_time ON payment.inbox USING brin (create_time);

Use: in the transaction of the effect, `fresh = await first_seen(connection, "payment", ids)`, then apply only the messages whose id is
in `fresh`. A rollback forgets the ids together with the effect.

Handlers that are idempotent in another way, and messages that mean nothing to a handler, are recorded by an `InboxRecorder` a moment
after the handler returned. A crash in between forgets the record and not the effect, so such a message may be handled once more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import timedelta

from runtime.bus import Message
from runtime.logs import get_logger
from runtime.postgres import Connection, Pool

__all__ = ["PRUNE_BATCH", "RETENTION", "InboxRecorder", "first_seen", "keep_pruned", "prune"]

RETENTION = timedelta(days=31)
"""How long ids are kept, longer than the feed keeps its entries: while an entry can be compared, its id must be known."""
PRUNE_BATCH = 10_000
PRUNE_INTERVAL_S = 3_600.0
PRUNE_BATCHES_MAX = 100
"""Batches of one round, so that it cannot keep the database busy; the rest waits for the next."""
RECORD_INTERVAL_S = 0.5
"""How long a handled message may wait to be recorded, together with others."""
RECORD_BATCH = 2_048
ID_LENGTH_MAX = 512
"""Longer ids are nobody's of ours, and no index takes them."""
RECORD_PENDING_MAX = 65_536
"""Messages that wait to be recorded while the database is away; more are forgotten: the feed follower then hands them out again."""

_logger = get_logger("runtime.inbox")

_FIRST_SEEN = """
INSERT INTO inbox (consumer, message_id) SELECT $1, unnest($2::text[])
ON CONFLICT DO NOTHING RETURNING message_id
"""
_RECORD = """
INSERT INTO inbox (consumer, message_id, position)
SELECT $1, t.message_id, t.position FROM unnest($2::text[], $3::bigint[]) AS t (message_id, position) ON CONFLICT DO NOTHING
"""
# What was recorded after the last complete comparison with a feed may still be asked for by the next one.
_PRUNE = """
DELETE FROM inbox WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM inbox WHERE create_time < now() - $1::interval
    AND create_time < coalesce((SELECT min(caught_up_time) FROM feed_cursor), now()) - interval '1 hour' LIMIT $2))
"""


async def first_seen(connection: Connection, consumer: str, message_ids: Iterable[str]) -> set[str]:
    """The ids of `message_ids` that this consumer has not taken before, and takes now; one round trip.

    A concurrent transaction with the same id waits for this one's end. Ids are inserted in sorted order, so two batches cannot deadlock.
    """
    ids = sorted(set(message_ids))
    if not ids:
        return set()
    return {row[0] for row in await connection.fetch(_FIRST_SEEN, consumer, ids)}


async def prune(connection: Connection, retention: timedelta = RETENTION) -> int:
    """Forget ids older than `retention`, at most PRUNE_BATCH of them; the number forgotten. Call again while it is PRUNE_BATCH."""
    status: str = await connection.execute(_PRUNE, retention, PRUNE_BATCH)
    return int(status.rpartition(" ")[2])


async def keep_pruned(pool: Pool, retention: timedelta = RETENTION) -> None:
    """Prunes the inbox of the pool's schema now and then each hour, until cancelled. Spawn it once a process."""
    while True:
        try:
            async with pool.acquire() as connection:
                for _ in range(PRUNE_BATCHES_MAX):
                    if await prune(connection, retention) < PRUNE_BATCH:
                        break
        except Exception:
            _logger.exception("pruning failed; it runs again", interval_s=PRUNE_INTERVAL_S)
        await asyncio.sleep(PRUNE_INTERVAL_S)


class InboxRecorder:
    """Records what a consumer has handled, in batches, a moment later. Spawn `run()`, and `flush()` before the pool is closed.

    `along(connection)` runs in each transaction before its commit: for what must be as durable as the record.
    """

    def __init__(
        self, pool: Pool, consumer: str, *, along: Callable[[Connection], Awaitable[None]] | None = None
    ) -> None:
        self.consumer = consumer
        self._pool = pool
        self._along = along
        self._pending: dict[str, int] = {}
        self._some = asyncio.Event()
        self._flushing = asyncio.Lock()

    def note(self, messages: Sequence[Message]) -> None:
        """These messages have been handled. Those without a position are in no feed, so nobody will ask for them."""
        for message in messages:
            if message.position > 0 and "\x00" not in message.message_id and len(message.message_id) <= ID_LENGTH_MAX:
                self._pending[message.message_id] = message.position
        if len(self._pending) > RECORD_PENDING_MAX:
            for message_id in list(self._pending)[: len(self._pending) - RECORD_PENDING_MAX]:
                del self._pending[message_id]
        self._some.set()

    def each(self, handler: Callable[[Message], Awaitable[None]]) -> Callable[[Message], Awaitable[None]]:
        """`handler`, and a note when it has returned."""

        async def handle(message: Message) -> None:
            await handler(message)
            self.note((message,))

        return handle

    def batches(
        self, handler: Callable[[Sequence[Message]], Awaitable[None]]
    ) -> Callable[[Sequence[Message]], Awaitable[None]]:
        """`handler`, and a note when it has returned."""

        async def handle(messages: Sequence[Message]) -> None:
            await handler(messages)
            self.note(messages)

        return handle

    async def run(self) -> None:
        """Records what was noted, until cancelled."""
        is_failing = False
        while True:
            await self._some.wait()
            await asyncio.sleep(RECORD_INTERVAL_S)
            try:
                await self.flush()
                is_failing = False
            except Exception as error:
                if not is_failing:
                    _logger.warning(
                        "what was handled cannot be recorded; it is tried again",
                        consumer=self.consumer,
                        pending=len(self._pending),
                        error=f"{type(error).__name__}: {error}",
                    )
                is_failing = True

    async def flush(self) -> None:
        """Records everything that was noted before this call. Raises what the database raises, and forgets nothing then."""
        async with self._flushing:
            while self._pending:
                batch = sorted(
                    list(self._pending.items())[:RECORD_BATCH]
                )  # in one order, so that two processes cannot deadlock
                ids, positions = [message_id for message_id, _ in batch], [position for _, position in batch]
                async with self._pool.acquire() as connection:
                    if self._along is None:
                        await connection.execute(_RECORD, self.consumer, ids, positions)
                    else:
                        async with connection.transaction():
                            await connection.execute(_RECORD, self.consumer, ids, positions)
                            await self._along(connection)
                for message_id in ids:
                    self._pending.pop(message_id, None)
            self._some.clear()
