"""Transactional outbox and feed: what a transaction says is kept in order, and the bus hears of it, exactly when the transaction commits.

The tables, copied into each publishing room's migrations (`payment` stands for the room's schema):

    CREATE TABLE payment.outbox (
        position    bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        topic       text        NOT NULL,
        key         text        NOT NULL,
        message_id  text        NOT NULL,
        payload     bytea       NOT NULL,
        traceparent text        NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT now()
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_threshold = 1000000);
    CREATE TABLE payment.feed (
        topic       text        NOT NULL,
        position    bigint      NOT NULL CHECK (position >= 1),
        message_id  text        NOT NULL,
        key         text        NOT NULL,
        payload     bytea       NOT NULL,
        traceparent text        NOT NULL DEFAULT '',
        create_time timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (topic, position)
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000, autovacuum_analyze_threshold = 1000000);
    CREATE TABLE payment.feed_head (
        topic              text   PRIMARY KEY,
        feed_id            text   NOT NULL DEFAULT gen_random_uuid(),
        position           bigint NOT NULL DEFAULT 0,
        published_position bigint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 20);

    transaction: effect + outbox rows ── commit ──► wake ──► relay: move outbox → feed (numbered, durable) ──► publish ──► note

The outbox is where concurrent transactions put rows without waiting for each other; the feed is the order that they got, and the truth:
consumers compare what they have applied with it, and fetch what the bus lost (runtime/feed). Only the one active relay numbers rows, so
positions of a topic are 1, 2, 3, … without gaps, and cost no lock that writers would share.

Two ways to wake: `insert` sends a NOTIFY with the commit, which reaches the active relay wherever it runs. But PostgreSQL lets one
notifying transaction commit at a time, so with eight writers a commit took 2.3 times as long and 0.4 ms more CPU (measured). The cheap
way is `insert(..., notify=False)` and `relay.wake()` after the commit: an active relay of this process looks at once, one that stands by
sends a single NOTIFY for all that came meanwhile. A wake that a crash swallows costs SAFETY_INTERVAL_S, never a message.

Rules:
- The move is durable before anything is published (synchronous_commit): a position that consumers have seen must never be given again to
  another message. So a relay waits for the disk once a batch.
- Messages of a key get positions in the order of `outbox.position`. Take the row lock that the key stands for (its order, its payout)
  before the insert, so that this is also the order of the commits. Nothing can be skipped: a row that commits late is simply moved later.
- Positions are published in order. How far is noted once a second (SAFETY_INTERVAL_S); a relay that starts publishes
  from the note on. So a crash publishes the last second again: inboxes see to that.
- A bus that is away or slow holds up nothing but publishing: rows go on into the feed, where consumers find them, and what does not fit
  in memory (BACKLOG_MAX) is read back from there.
- One relay a schema is active: it holds a session lock on the very connection that it moves with, so that a relay that lost its
  connection has lost its right too. Another process's relay takes over within `TAKEOVER_INTERVAL_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import asyncpg
import structlog

from runtime.bus import Bus, Message, is_transient
from runtime.postgres import Connection, Pool

__all__ = ["BATCH_MAX", "OutboxRelay", "insert"]

BATCH_MAX = 256
"""Rows of one move, and messages of one publish."""
BACKLOG_MAX = 1_024
"""Messages that wait in memory for the bus; more are read back from the feed when it takes them again."""
SAFETY_INTERVAL_S = 1.0
"""How long a message can wait whose NOTIFY was lost, and how long the note of what was published may wait for company."""
PUBLISH_PATIENCE_S = 0.25
"""How long moving waits for a publish, so that the rows that come meanwhile go as one batch. A slower bus is not waited for."""
TAKEOVER_INTERVAL_S = 1.0
"""How often a relay that stands by asks for the lock."""
STALLED_S = 30.0
"""How old a row of the outbox may get while another relay holds the lock, before that is an error."""
BACKOFF_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_LOCK_NAMESPACE = 0x0D0C  # first half of the two-part advisory lock; the second is a hash of the schema

_INSERT = """
INSERT INTO outbox (topic, key, message_id, payload, traceparent)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::text[])
"""
_INSERT_AND_NOTIFY = f"WITH inserted AS ({_INSERT}) SELECT pg_notify(current_schema() || '_outbox', '')"

# Positions go on from $3, the last of each topic, which this relay alone gives. Another relay that did, against all rules, would break
# the primary key and start again.
_MOVE = """
WITH moved AS (
    DELETE FROM {schema}.outbox WHERE position = ANY(ARRAY(SELECT position FROM {schema}.outbox ORDER BY position LIMIT $1))
    RETURNING position AS place, topic, key, message_id, payload, traceparent
), numbered AS (
    SELECT m.*, row_number() OVER (PARTITION BY topic ORDER BY place)
                + coalesce(($3::bigint[])[array_position($2::text[], topic)], 0) AS position
    FROM moved AS m
), kept AS (
    INSERT INTO {schema}.feed (topic, position, message_id, key, payload, traceparent)
    SELECT topic, position, message_id, key, payload, traceparent FROM numbered
)
SELECT topic, key, message_id, payload, traceparent, position FROM numbered ORDER BY place
"""
_NOTE = """
INSERT INTO {schema}.feed_head AS h (topic, position, published_position)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[])
ON CONFLICT (topic) DO UPDATE SET position = excluded.position, published_position = excluded.published_position
"""
# The head is noted a little later than it moves; what the feed holds is always right, and never all pruned before that.
_OLDEST = """
SELECT extract(epoch FROM now() - (SELECT create_time FROM {schema}.outbox ORDER BY position LIMIT 1))::float8 AS seconds,
       (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1::bigint::oid
        AND objid = (hashtext($2)::bigint & 4294967295)::oid LIMIT 1) AS pid
"""
_HEADS = """
SELECT topic, published_position,
       greatest(position, (SELECT max(f.position) FROM {schema}.feed AS f WHERE f.topic = h.topic)) AS position
FROM {schema}.feed_head AS h
UNION ALL
SELECT topic, 0, max(position) FROM {schema}.feed AS f
WHERE NOT EXISTS (SELECT FROM {schema}.feed_head AS h WHERE h.topic = f.topic) GROUP BY topic
"""
_READ_BACK = """
SELECT topic, key, message_id, payload, traceparent, position FROM {schema}.feed
WHERE topic = $1 AND position > $2 ORDER BY position LIMIT $3
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
    """Moves a schema's outbox into its feed and on to the bus. Spawn `run()` once a process; it returns only by cancellation."""

    def __init__(self, pool: Pool, schema: str, bus: Bus) -> None:
        if not schema.isidentifier():
            raise ValueError(f"schema: expected a plain identifier, got {schema!r}")
        self._pool = pool
        self._schema = schema
        self._bus = bus
        self._wake = asyncio.Event()
        self._move = _MOVE.format(schema=schema)
        self._moved: dict[str, int] = {}
        self._published: dict[str, int] = {}
        self._noted: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._note_after_s = 0.0
        self._backlog: deque[Message] = deque()
        self._reads_back = False
        self._moving = asyncio.Lock()
        self._publishing_since_s = math.inf
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
            moved_before = dict(self._moved)
            try:
                async with self._pool.acquire() as pooled:
                    await self._run_on(pooled)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if self._moved != moved_before:
                    failures = 0
                delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                _log.warning(
                    "outbox relay starts again",
                    schema=self._schema,
                    error=f"{type(error).__name__}: {error}",
                    delay_s=delay,
                    exc_info=None if failures > 1 or is_transient(error) else error,
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
            # The move must be on disk before the bus hears of it, whatever the database's default is.
            await connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
            )
            await self._begin(connection)
            await self._relay(connection)
        finally:
            # After a cancel in the middle of a query the connection cannot be trusted; closing it also frees the lock at once.
            # The pool has let it go already where the server closed it: then there is nothing to end, and a cancel must get through.
            with contextlib.suppress(asyncpg.InterfaceError):
                connection.terminate()

    async def _become_active(self, connection: Any) -> None:
        ask = "SELECT pg_try_advisory_lock($1, hashtext($2))"
        loop = asyncio.get_running_loop()
        look_s = loop.time() + STALLED_S
        while not await connection.fetchval(ask, _LOCK_NAMESPACE, self._schema):
            if await self._woken_within(TAKEOVER_INTERVAL_S):
                await connection.execute("SELECT pg_notify($1, '')", f"{self._schema}_outbox")
            if loop.time() >= look_s:
                look_s = loop.time() + STALLED_S
                await self._look_for_stall(connection)
        self.is_active = True
        _log.info("outbox relay is active", schema=self._schema)

    async def _look_for_stall(self, connection: Any) -> None:
        """Another relay has the lock. Where it moves nothing, nobody publishes: its process is stopped, or its connection is half open."""
        oldest = await connection.fetchrow(_OLDEST.format(schema=self._schema), _LOCK_NAMESPACE, self._schema)
        if (oldest["seconds"] or 0) >= STALLED_S:
            _log.error(
                "the outbox is not moved: the session that holds its relay's lock stands still; end it with pg_terminate_backend",
                schema=self._schema,
                oldest_s=round(oldest["seconds"]),
                pid=oldest["pid"],
            )

    async def _begin(self, connection: Any) -> None:
        """Where the feed and its publishing stand. What another relay has moved and not noted as published is published again."""
        self._backlog.clear()
        self._publishing_since_s = math.inf
        self._moved, self._published = {}, {}
        for row in await connection.fetch(_HEADS.format(schema=self._schema)):
            self._moved[row["topic"]] = row["position"]
            self._published[row["topic"]] = row["published_position"]
        self._noted = (dict(self._moved), dict(self._published))
        self._note_after_s = 0.0
        self._reads_back = self._moved != self._published

    async def _relay(self, connection: Any) -> None:
        """Moves and publishes until either fails: the one who moves notices a lost connection while the other waits for the bus."""
        loop = asyncio.get_running_loop()
        parts = {
            loop.create_task(self._move_and_publish(connection)),
            loop.create_task(self._move_meanwhile(connection)),
        }
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _move_and_publish(self, connection: Any) -> None:
        while True:
            self._wake.clear()  # before the look: what commits from here on wakes again
            async with self._moving:
                await self._note(connection)
                moved_count = await self._move_rows(connection)
                batch = await self._next_batch(connection)
            if batch:
                await self._publish(batch)
            if moved_count < BATCH_MAX and not self._backlog and not self._reads_back:
                await self._woken_within(SAFETY_INTERVAL_S)

    async def _move_meanwhile(self, connection: Any) -> None:
        """Goes on moving while the bus takes its time."""
        while True:
            await asyncio.sleep(PUBLISH_PATIENCE_S)
            if asyncio.get_running_loop().time() - self._publishing_since_s > PUBLISH_PATIENCE_S:
                async with self._moving:
                    while await self._move_rows(connection) == BATCH_MAX:
                        pass
                    await self._note(connection)
                await asyncio.sleep(SAFETY_INTERVAL_S - PUBLISH_PATIENCE_S)

    async def _move_rows(self, connection: Any) -> int:
        """Moves a batch into the feed; the number of rows moved."""
        rows = await connection.fetch(self._move, BATCH_MAX, list(self._moved), list(self._moved.values()))
        for row in rows:
            self._moved[row["topic"]] = row["position"]
        if self._reads_back:
            pass  # they come with the others
        elif len(self._backlog) + len(rows) > BACKLOG_MAX:
            self._backlog.clear()
            self._reads_back = True
        else:
            self._backlog.extend(_message(row) for row in rows)
        return len(rows)

    async def _note(self, connection: Any) -> None:
        """Notes how far the feed and its publishing are, where that has changed, at most once a second."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._note_after_s or self._noted == (self._moved, self._published):
            return
        moved, published = dict(self._moved), dict(self._published)
        note = _NOTE.format(schema=self._schema)
        await connection.execute(note, list(moved), list(moved.values()), [published.get(topic, 0) for topic in moved])
        self._noted = (moved, published)
        self._note_after_s = now_s + SAFETY_INTERVAL_S

    async def _next_batch(self, connection: Any) -> list[Message]:
        """What the bus gets next, in the order of positions; empty where it has everything."""
        if not self._reads_back:
            return [self._backlog.popleft() for _ in range(min(BATCH_MAX, len(self._backlog)))]
        for topic, moved in self._moved.items():
            published = self._published.get(topic, 0)
            if published < moved:
                read = _READ_BACK.format(schema=self._schema)
                rows = await connection.fetch(read, topic, published, BATCH_MAX)
                if rows:
                    return [_message(row) for row in rows]
                self._published[topic] = moved  # pruned meanwhile, so every consumer has it
        self._reads_back = False
        return []

    async def _publish(self, batch: list[Message]) -> None:
        """Publishes a batch, however long the bus takes."""
        failures = 0
        self._publishing_since_s = asyncio.get_running_loop().time()
        while True:
            try:
                await self._bus.publish(batch)
                break
            except Exception as error:
                delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                _log.warning(
                    "the bus does not take messages; consumers find them in the feed",
                    schema=self._schema,
                    error=f"{type(error).__name__}: {error}",
                    delay_s=delay,
                )
                await asyncio.sleep(delay * (0.5 + random.random()))  # noqa: S311 - jitter, not a secret
        self._publishing_since_s = math.inf
        self.published_count += len(batch)
        for message in batch:
            self._published[message.topic] = message.position

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


def _message(row: Any) -> Message:
    return Message(row["topic"], row["key"], row["message_id"], row["payload"], row["traceparent"], row["position"])
