"""Transactional outbox: what a transaction says, the bus will hear, exactly when the transaction commits.

The table, copied into each publishing room's first migration (`payment` stands for the room's schema):

    CREATE TABLE payment.outbox (
        position    bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        topic       text        NOT NULL,
        key         text        NOT NULL,
        message_id  text        NOT NULL,
        payload     bytea       NOT NULL,
        traceparent text        NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT now()
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 1000000);

    transaction: effect + outbox rows ── commit ──► wake ──► relay: SELECT, publish, DELETE

Two ways to wake: `insert` sends a NOTIFY with the commit, which reaches the active relay wherever it runs. But PostgreSQL lets one
notifying transaction commit at a time, so with eight writers a commit took 2.3 times as long and 0.4 ms more CPU (measured). The cheap
way is `insert(..., notify=False)` and `relay.wake()` after the commit: an active relay of this process looks at once, one that stands by
sends a single NOTIFY for all that came meanwhile. A wake that a crash swallows costs SAFETY_INTERVAL_S, never a message.

Rules:
- A row leaves the table only after the broker has it durably. Between publish and delete a crash publishes twice: inboxes see to that.
- Messages of a key are published in the order of `position`. Take the row lock that the key stands for (its order, its payout) before
  the insert, so that this is also the order of the commits.
- No cursor is kept: a position that commits late is simply found by the next SELECT. Nothing can be skipped.
- One relay a schema is active: it holds a session lock on the very connection that it reads and deletes with, so that a relay that
  lost its connection has lost its right too. Another process's relay takes over within `TAKEOVER_INTERVAL_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any

import asyncpg
import structlog

from runtime.bus import Bus, Message
from runtime.postgres import Connection, Pool

__all__ = ["BATCH_MAX", "OutboxRelay", "insert"]

BATCH_MAX = 256
"""Messages of one publish."""
SAFETY_INTERVAL_S = 1.0
"""How long a message can wait whose NOTIFY was lost."""
DELETE_DELAY_S = 0.05
"""How long a published row may stay: the next look deletes it, and a busy relay looks sooner than that. So a message costs one
statement and not two; a crash within this time publishes twice."""
TAKEOVER_INTERVAL_S = 1.0
"""How often a relay that stands by asks for the lock."""
BACKOFF_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_LOCK_NAMESPACE = 0x0D0C  # first half of the two-part advisory lock; the second is a hash of the schema

_INSERT = """
INSERT INTO outbox (topic, key, message_id, payload, traceparent)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::text[])
"""
_INSERT_AND_NOTIFY = f"WITH inserted AS ({_INSERT}) SELECT pg_notify(current_schema() || '_outbox', '')"

# Deletes the last batch and reads the next one in one round trip. Both see the same snapshot, so the read leaves out what is deleted.
_ADVANCE = """
WITH gone AS (DELETE FROM {schema}.outbox WHERE position = ANY($1::bigint[]))
SELECT position, topic, key, message_id, payload, traceparent
FROM {schema}.outbox WHERE position <> ALL($1::bigint[]) ORDER BY position LIMIT $2
"""

_log = structlog.get_logger("runtime.outbox")


async def insert(connection: Connection, messages: Sequence[Message], *, notify: bool = True) -> None:
    """Add messages to the outbox of the connection's schema, in the caller's transaction; one round trip.

    With `notify=False` call `OutboxRelay.wake` after the commit.
    """
    if not messages:
        return
    await connection.execute(
        _INSERT_AND_NOTIFY if notify else _INSERT,
        [message.topic for message in messages],
        [message.key for message in messages],
        [message.message_id for message in messages],
        [message.payload for message in messages],
        [message.traceparent for message in messages],
    )


class OutboxRelay:
    """Moves a schema's outbox to the bus. Spawn `run()` once a process; it returns only by cancellation."""

    def __init__(self, pool: Pool, schema: str, bus: Bus) -> None:
        if not schema.isidentifier():
            raise ValueError(f"schema: expected a plain identifier, got {schema!r}")
        self._pool = pool
        self._schema = schema
        self._bus = bus
        self._wake = asyncio.Event()
        self._advance = _ADVANCE.format(schema=schema)
        self.is_active = False
        """True while this relay holds the schema's lock."""
        self.published_count = 0
        """Messages that this relay has published since it started."""

    def wake(self) -> None:
        """Look into the outbox now, here or where the active relay runs. For code that committed with `notify=False`."""
        self._wake.set()

    async def run(self) -> None:
        """Relay until cancelled, through restarts of the database and of the bus."""
        failures = 0
        while True:
            published_before = self.published_count
            try:
                async with self._pool.acquire() as pooled:
                    await self._run_on(pooled)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if self.published_count > published_before:
                    failures = 0
                delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                _log.warning(
                    "outbox relay starts again",
                    schema=self._schema,
                    error=f"{type(error).__name__}: {error}",
                    delay_s=delay,
                )
                if isinstance(error, asyncpg.InterfaceError) and self._pool.is_closing():
                    raise
                await asyncio.sleep(delay * (0.5 + random.random()))  # noqa: S311 - jitter, not a secret
            finally:
                self.is_active = False

    async def _run_on(self, connection: Any) -> None:
        await self._become_active(connection)
        await connection.add_listener(f"{self._schema}_outbox", self._on_notify)
        try:
            # A lost delete only publishes again; waiting for the disk here would gain nothing.
            await connection.execute("SET synchronous_commit = off")
            await self._relay(connection)
        finally:
            # After a cancel in the middle of a query the connection cannot be trusted; closing it also frees the lock at once.
            # The pool has let it go already where the server closed it: then there is nothing to end, and a cancel must get through.
            with contextlib.suppress(asyncpg.InterfaceError):
                connection.terminate()

    async def _become_active(self, connection: Any) -> None:
        ask = "SELECT pg_try_advisory_lock($1, hashtext($2))"
        while not await connection.fetchval(ask, _LOCK_NAMESPACE, self._schema):
            if await self._woken_within(TAKEOVER_INTERVAL_S):
                await connection.execute("SELECT pg_notify($1, '')", f"{self._schema}_outbox")
        self.is_active = True
        _log.info("outbox relay is active", schema=self._schema)

    async def _relay(self, connection: Any) -> None:
        published: list[int] = []
        while True:
            self._wake.clear()  # before the look: what commits from here on wakes again
            rows = await connection.fetch(self._advance, published, BATCH_MAX)
            published = []
            if rows:
                await self._bus.publish(
                    [
                        Message(row["topic"], row["key"], row["message_id"], row["payload"], row["traceparent"])
                        for row in rows
                    ]
                )
                self.published_count += len(rows)
                published = [row["position"] for row in rows]
                if len(rows) == BATCH_MAX:
                    continue
            await self._woken_within(DELETE_DELAY_S if published else SAFETY_INTERVAL_S)

    async def _woken_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    def _on_notify(self, *_: object) -> None:
        self._wake.set()
