"""Inbox: a message takes effect once, however often the bus delivers it.

The table, copied into each consuming room's first migration (`payment` stands for the room's schema):

    CREATE TABLE payment.inbox (
        consumer    text        NOT NULL,
        message_id  text        NOT NULL,
        create_time timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (consumer, message_id)
    );
    CREATE INDEX inbox_create_time ON payment.inbox USING brin (create_time);

Use: in the transaction of the effect, `fresh = await first_seen(connection, "payment", ids)`, then apply only the messages whose id is
in `fresh`. A rollback forgets the ids together with the effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import timedelta

from runtime.logs import get_logger
from runtime.postgres import Connection, Pool

__all__ = ["PRUNE_BATCH", "RETENTION", "first_seen", "keep_pruned", "prune"]

RETENTION = timedelta(days=30)
"""How long ids are kept: far longer than the bus can still redeliver a message."""
PRUNE_BATCH = 10_000
PRUNE_INTERVAL_S = 3_600.0
PRUNE_BATCHES_MAX = 100
"""Batches of one round, so that it cannot keep the database busy; the rest waits for the next."""

_logger = get_logger("runtime.inbox")

_FIRST_SEEN = """
INSERT INTO inbox (consumer, message_id) SELECT $1, unnest($2::text[])
ON CONFLICT DO NOTHING RETURNING message_id
"""
_PRUNE = """
DELETE FROM inbox WHERE ctid = ANY(ARRAY(SELECT ctid FROM inbox WHERE create_time < now() - $1::interval LIMIT $2))
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


async def keep_pruned(pool: Pool) -> None:
    """Prunes the inbox of the pool's schema now and then each hour, until cancelled. Spawn it once a process."""
    while True:
        try:
            async with pool.acquire() as connection:
                for _ in range(PRUNE_BATCHES_MAX):
                    if await prune(connection) < PRUNE_BATCH:
                        break
        except Exception:
            _logger.exception("pruning failed; it runs again", interval_s=PRUNE_INTERVAL_S)
        await asyncio.sleep(PRUNE_INTERVAL_S)
