"""The consumer's side: proves that everything of a feed has been applied, and fetches what has not.

The tables, copied into each consuming room's migrations beside the inbox (`payment` stands for the room's schema):

    CREATE TABLE payment.feed_cursor (
        topic             text        NOT NULL,
        consumer          text        NOT NULL,
        feed_id           text        NOT NULL DEFAULT '',
        compared_position bigint      NOT NULL DEFAULT 0,
        proven_position   bigint      NOT NULL DEFAULT 0,
        digest_after      bigint      NOT NULL DEFAULT 0,
        digest            bytea       NOT NULL DEFAULT '',
        problem           text        NOT NULL DEFAULT '',
        caught_up_time    timestamptz NOT NULL DEFAULT now(),
        update_time       timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (topic, consumer)
    ) WITH (fillfactor = 20);
    CREATE TABLE payment.feed_missing (
        topic         text        NOT NULL,
        consumer      text        NOT NULL,
        position      bigint      NOT NULL,
        message_id    text        NOT NULL,
        key           text        NOT NULL,
        try_count     integer     NOT NULL DEFAULT 0,
        next_try_time timestamptz NOT NULL DEFAULT now(),
        error         text        NOT NULL DEFAULT '',
        create_time   timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (topic, consumer, position)
    );
    CREATE INDEX feed_missing_key ON payment.feed_missing (topic, consumer, key, position);

One round, each `interval_s` and when the bus says that it may have lost something:

    GetFeed ── is it still the feed that we know? (id, head, digest of the entries compared last)
      │ yes                                                    └ no ► a problem: told, kept, nothing more is compared until it is accepted
      ▼
    compare: ids behind `compared_position`, up to what is settled, with the inbox ► what is not there goes into `feed_missing`
      ▼
    try: what is missing and due, in the order of positions ► fetch ► count the try ► handler ► record ► out of `feed_missing`
      ▼
    proven_position = what is compared, up to the first that is missing

Rules:
- An entry is settled when it is older than the time in which the bus normally delivers, and, while the bus brings messages at all, when
  later ones have come. So a follower does not race with a bus that lags. After a gap the bus is given GAP_WAIT_S instead.
- Compared is not proven: a message that cannot be applied keeps back the proof, and the publisher's pruning, but not the comparison.
- Messages of a key are tried in the order of their positions. One that waits for its next try holds back the later ones of its key; one
  that is not tried any more (TRY_COUNT_MAX) does not, as a dead letter of the bus does not.
- A try is counted before it is made: a message that kills the process comes to its end too. What failed once is tried alone.
- An entry that the feed lacks (somebody deleted it) is missing and not tried: the first of a run of them stands for all. Put back, it is
  applied by a retry; `ducat feed accept` goes on without it.
- Processes of one consumer share cursor, inbox and missing entries; each step is one statement that finds out that it came too late.
  What belongs to another process (`owns`) is left to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
import grpc.aio

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from kernel.errors import DucatError
from runtime import trace
from runtime.bus import Message, is_transient
from runtime.errors import from_rpc_error
from runtime.feed.positions import AppliedPositions
from runtime.inbox import InboxRecorder
from runtime.logs import get_logger
from runtime.metrics import counter, gauge
from runtime.postgres import Connection, Pool

__all__ = ["FeedFollower", "rewind"]

COMPARE_BATCH = 2_048
"""Ids of one comparison."""
MISSING_MAX = 10_000
"""Missing entries of a consumer; with more the comparison waits until some are applied."""
TRY_BATCH = 256
"""Entries that are fetched and tried together."""
TRY_COUNT_MAX = 8
TRY_BASE_S = 10
TRY_CAP_S = 3_600
"""Wait after the n-th try: TRY_BASE_S, three times longer each time, up to TRY_CAP_S."""
FETCH_GAP_MAX = 16
"""Positions between two missing ones that are fetched along rather than asked around."""
DIGEST_COUNT = 64
"""Entries whose digest is kept, to know the feed again."""
DIGEST_INTERVAL_S = 60.0
"""How often the digest is compared where nothing new has come."""
GAP_WAIT_S = 1.5
"""How long the bus may deliver what it still has, and handled messages be recorded, before a comparison after a gap."""
FAILURE_TELL_S = 60.0
"""How often the same failure is logged."""
REWIND_TIMEOUT_S = 3600.0
"""An inbox of a month is some ten million rows."""
GONE = "not in the feed"
"""Begins the error of what the publisher no longer has, though it never pruned it."""
NOT_MINE_MAX = 2 * MISSING_MAX
"""Positions that are remembered as another process's."""

_labels = ("topic", "consumer")
_head_gauge = gauge("ducat_feed_head", "The last position of the feed.", _labels)
_proven_gauge = gauge("ducat_feed_proven", "Every entry up to this position is proven to be applied.", _labels)
_missing_gauge = gauge("ducat_feed_missing", "Entries that are compared and not applied.", _labels)
_given_up_gauge = gauge("ducat_feed_given_up", "Missing entries that are not tried any more.", _labels)
_diverged_gauge = gauge("ducat_feed_diverged", "1: the feed is not the one that was followed before.", _labels)
_fetched_counter = counter("ducat_feed_fetched", "Entries that were applied from the feed, not from the bus.", _labels)
_logger = get_logger("runtime.feed")

_CURSOR = """
INSERT INTO feed_cursor (topic, consumer) VALUES ($1, $2) ON CONFLICT DO NOTHING
"""
_READ = """
SELECT c.feed_id, c.compared_position, c.proven_position, c.digest_after, c.digest, c.problem,
       (SELECT count(*) FROM feed_missing AS m WHERE m.topic = c.topic AND m.consumer = c.consumer) AS missing_count,
       (SELECT count(*) FROM feed_missing AS m WHERE m.topic = c.topic AND m.consumer = c.consumer AND m.try_count >= $3) AS given_up
FROM feed_cursor AS c WHERE c.topic = $1 AND c.consumer = $2
"""
# Another process of this consumer may have been first: then nothing is changed.
_COMPARE = """
WITH moved AS (
    UPDATE feed_cursor SET feed_id = $4, compared_position = $5, digest_after = $6, digest = $7, update_time = now()
    WHERE topic = $1 AND consumer = $2 AND compared_position = $3 AND problem = '' RETURNING topic, consumer
), missing AS (
    INSERT INTO feed_missing (topic, consumer, position, message_id, key)
    SELECT moved.topic, moved.consumer, e.position, e.message_id, e.key
    FROM unnest($8::bigint[], $9::text[], $10::text[]) AS e (position, message_id, key), moved
    WHERE NOT EXISTS (SELECT FROM inbox AS i WHERE i.consumer = $11 AND i.message_id = e.message_id)
    ON CONFLICT DO NOTHING RETURNING position
), gone AS (
    INSERT INTO feed_missing (topic, consumer, position, message_id, key, try_count, error)
    SELECT moved.topic, moved.consumer, e.position, '', '', $14, e.error
    FROM unnest($12::bigint[], $13::text[]) AS e (position, error), moved
    ON CONFLICT DO NOTHING
)
SELECT (SELECT count(*) FROM moved) AS moved, ARRAY(SELECT position FROM missing) AS missing
"""
_CAUGHT_UP = """
UPDATE feed_cursor SET caught_up_time = now()
WHERE topic = $1 AND consumer = $2 AND compared_position >= $3 AND caught_up_time < now() - interval '1 minute'
"""
_ARRIVED = """
DELETE FROM feed_missing AS m USING inbox AS i
WHERE m.topic = $1 AND m.consumer = $2 AND i.consumer = $3 AND i.message_id = m.message_id RETURNING m.position
"""
_DUE = """
SELECT m.position, m.message_id, m.key, m.try_count FROM feed_missing AS m
WHERE m.topic = $1 AND m.consumer = $2 AND m.try_count < $3 AND m.next_try_time <= now() AND m.position <> ALL($4::bigint[])
  AND NOT EXISTS (SELECT FROM feed_missing AS e WHERE e.topic = $1 AND e.consumer = $2 AND e.key = m.key AND e.position < m.position
                  AND e.try_count < $3 AND e.next_try_time > now())
ORDER BY m.position LIMIT $5
"""
_CLAIM = """
UPDATE feed_missing AS m SET try_count = m.try_count + 1,
    next_try_time = now() + least($5::float8 * power(3, least(m.try_count, 20)), $6::float8) * interval '1 second'
FROM unnest($3::bigint[], $4::integer[]) AS t (position, try_count)
WHERE m.topic = $1 AND m.consumer = $2 AND m.position = t.position AND m.try_count = t.try_count RETURNING m.position
"""
# What was claimed and not tried, or failed for no fault of its own: its try does not count.
_GIVE_BACK = """
UPDATE feed_missing SET try_count = greatest(try_count - 1, 0), next_try_time = now() + $4::float8 * interval '1 second', error = $5
WHERE topic = $1 AND consumer = $2 AND position = ANY($3::bigint[])
"""
_GONE = "UPDATE feed_missing SET try_count = $4, error = $5 WHERE topic = $1 AND consumer = $2 AND position = ANY($3::bigint[])"
_FAILED = "UPDATE feed_missing SET error = $4 WHERE topic = $1 AND consumer = $2 AND position = $3"
_PROVE = """
WITH first AS (SELECT min(position) AS position FROM feed_missing WHERE topic = $1 AND consumer = $2)
UPDATE feed_cursor AS c SET proven_position = least(c.compared_position, first.position - 1), update_time = now()
FROM first WHERE c.topic = $1 AND c.consumer = $2
    AND c.proven_position IS DISTINCT FROM least(c.compared_position, first.position - 1)
"""
_BEGIN_AT = """
UPDATE feed_cursor SET feed_id = $3, compared_position = $4, proven_position = $4, digest_after = $4, update_time = now()
WHERE topic = $1 AND consumer = $2 AND feed_id = ''
"""
_PROBLEM = (
    "UPDATE feed_cursor SET problem = $3, update_time = now() WHERE topic = $1 AND consumer = $2 AND problem <> $3"
)
_BACK = "UPDATE feed_missing SET message_id = $4, key = $5 WHERE topic = $1 AND consumer = $2 AND position = $3"
_HOLES = "SELECT position FROM feed_missing WHERE topic = $1 AND consumer = $2 AND position <= $3"
_BEYOND = """
SELECT i.position FROM inbox AS i WHERE i.consumer = $3 AND i.position > $4
AND i.create_time >= (SELECT caught_up_time FROM feed_cursor WHERE topic = $1 AND consumer = $2) - interval '1 hour'
"""
# A message without a position (0) may stand anywhere, so it is looked for from the feed's first entry on, as AcceptFeed does.
_REWIND = """
WITH gone AS (DELETE FROM inbox WHERE consumer = $3 AND create_time >= $4 RETURNING position),
     missing AS (DELETE FROM feed_missing WHERE topic = $1 AND consumer = $2 RETURNING position),
     least AS (SELECT min(position) AS position FROM (SELECT position FROM gone UNION ALL SELECT position FROM missing) AS one),
     back AS (UPDATE feed_cursor AS c SET
         feed_id = CASE WHEN l.position < 1 THEN '' ELSE c.feed_id END,
         compared_position = greatest(l.position - 1, 0), proven_position = least(c.proven_position, greatest(l.position - 1, 0)),
         digest_after = greatest(l.position - 1, 0), digest = '', update_time = now()
         FROM least AS l WHERE c.topic = $1 AND c.consumer = $2 AND c.compared_position >= l.position)
SELECT count(*) FROM gone
"""


async def rewind(
    connection: Connection, *, topic: str, consumer: str, time: datetime, recorded_as: str | None = None
) -> int:
    """Forgets what `consumer` has recorded since `time`, so that its follower applies it again from the feed; how many messages.

    For a store that was restored to an older state. Take the time of that state less a margin: what was applied before `time` and is
    not in the store would stay missing. Run it while the consumer's processes stand still, in the transaction of the restore, on a
    connection whose search_path is the consumer's schema. `recorded_as`: the consumer's name in the inbox, where it is another one.
    """
    count: int = await connection.fetchval(
        _REWIND, topic, consumer, recorded_as or consumer, time, timeout=REWIND_TIMEOUT_S
    )
    return count


@dataclass(frozen=True, slots=True)
class _Cursor:
    feed_id: str
    compared: int
    proven: int
    digest_after: int
    digest: bytes
    problem: str
    missing_count: int
    given_up: int


class FeedFollower:
    """One consumer of one topic. Wrap the bus's handler with `batches` or `each`, give `on_gap` to the bus, spawn `run()`.

    handler      the same effects as from the bus, and the recorder's note when it returned; gets batches in the order of positions
    recorder     of the inbox that proves; its consumer name is the inbox's
    channel      to the publisher
    owns         False for a message that another process of this consumer has to apply
    """

    def __init__(
        self,
        pool: Pool,
        recorder: InboxRecorder,
        channel: grpc.aio.Channel,
        *,
        topic: str,
        consumer: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        interval_s: float,
        grace_s: float,
        owns: Callable[[Message], bool] = lambda message: True,
        batch_max: int = TRY_BATCH,
        applied: AppliedPositions | None = None,
    ) -> None:
        self.topic = topic
        self.consumer = consumer
        self.applied = applied or AppliedPositions()
        """What has been applied here, or belongs to another process. Right once `start` has returned."""
        self._pool = pool
        self._recorder = recorder
        self._stub: Any = feed_pb2_grpc.FeedServiceStub(channel)
        self._handler = handler
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._owns = owns
        self._batch_max = min(batch_max, TRY_BATCH)
        self._name = (topic, consumer)
        self._wake = asyncio.Event()
        self._gap_s = -math.inf
        self._seen_position = 0
        self._seen_s = -math.inf
        self._digest_seen_s = -math.inf
        self._not_mine: set[int] = set()
        self._told_failure = ""
        self._told_failure_s = 0.0
        self._told_full = False
        self._told_given_up = 0

    # --- what the bus tells

    def on_gap(self) -> None:
        """The bus may have lost messages: look soon, and do not wait for entries to settle."""
        self._gap_s = _now_s()
        self._wake.set()

    def look(self) -> None:
        """Begin a round now."""
        self._wake.set()

    def batches(
        self, handler: Callable[[Sequence[Message]], Awaitable[None]]
    ) -> Callable[[Sequence[Message]], Awaitable[None]]:
        """The bus's handler, watched: how far the bus is says what it may still bring."""

        async def handle(messages: Sequence[Message]) -> None:
            await handler(messages)
            self._saw(messages)

        return handle

    def each(self, handler: Callable[[Message], Awaitable[None]]) -> Callable[[Message], Awaitable[None]]:
        """The same for a handler of single messages."""

        async def handle(message: Message) -> None:
            await handler(message)
            self._saw((message,))

        return handle

    def _saw(self, messages: Sequence[Message]) -> None:
        self._seen_s = _now_s()
        for message in messages:
            if message.position > self._seen_position:
                self._seen_position = message.position
            self.applied.add(message.position)

    # --- rounds

    async def start(self) -> None:
        """Reads what was applied before. `run` does it too; call it before where `applied` is asked for at once."""
        await self._pool.execute(_CURSOR, *self._name)
        cursor = await self._read()
        holes = [row[0] for row in await self._pool.fetch(_HOLES, *self._name, cursor.compared)]
        beyond = await self._pool.fetch(_BEYOND, *self._name, self._recorder.consumer, cursor.compared)
        before = self.applied.ranges()
        self.applied.load(cursor.compared, holes)
        for first, last in [*before, *((row[0], row[0]) for row in beyond)]:
            for position in range(first, last + 1):
                self.applied.add(position)

    async def run(self) -> None:
        """Follows until cancelled, whatever the publisher and the databases do."""
        recording = asyncio.get_running_loop().create_task(self._recorder.run())
        self._gap_s = _now_s()  # nobody knows what the bus lost while we were not there
        try:
            is_started = False
            while True:
                trace.set_current("")
                self._wake.clear()
                gap_s = self._gap_s
                try:
                    if not is_started:
                        await self.start()
                        is_started = True
                    await self._round()
                    self._told_failure = ""
                except Exception as error:
                    self._tell_failure(error)
                if self._gap_s != gap_s:  # one more while we looked
                    continue
                await self._wait()
        finally:
            recording.cancel()
            await asyncio.gather(recording, return_exceptions=True)

    async def _wait(self) -> None:
        """Until the next round: the interval, less where the bus told of a gap, which then has time to deliver what it has."""
        if (
            _now_s() - self._gap_s < GAP_WAIT_S + self._grace_s
        ):  # what came right before the gap settles meanwhile: look often
            await asyncio.sleep(GAP_WAIT_S)
            return
        try:
            async with asyncio.timeout(self._interval_s * random.uniform(0.9, 1.0)):  # noqa: S311 - so that processes spread out
                await self._wake.wait()
        except TimeoutError:
            return
        await asyncio.sleep(max(0.0, self._gap_s + GAP_WAIT_S - _now_s()))

    def _tell_failure(self, error: Exception) -> None:
        if isinstance(error, grpc.RpcError):
            error = from_rpc_error(error)
        text = f"{type(error).__name__}: {error}"
        is_known = text == self._told_failure
        if is_known and _now_s() - self._told_failure_s < FAILURE_TELL_S:
            return
        self._told_failure, self._told_failure_s = text, _now_s()
        expected = is_transient(error) or isinstance(error, DucatError)
        log = _logger.warning if is_transient(error) else _logger.error
        log(
            "a feed cannot be followed now; it is tried again",
            topic=self.topic,
            consumer=self.consumer,
            error=text,
            exc_info=None if expected or is_known else error,
        )

    async def _round(self) -> None:
        cursor = await self._read()
        after_gap = _now_s() - self._gap_s < GAP_WAIT_S + self._grace_s + self._interval_s
        feed = await self._stub.GetFeed(
            feed_pb2.GetFeedRequest(
                topic=self.topic,
                consumer=self.consumer,
                proven_position=cursor.proven,
                missing_count=cursor.missing_count,
                problem=_problem_of(cursor)[:1000],
            )
        )
        _head_gauge.labels(*self._name).set(feed.head_position)
        cursor = await self._recognized(cursor, feed)
        _diverged_gauge.labels(*self._name).set(1 if cursor.problem else 0)
        fetched = 0
        if not cursor.problem:
            compared = await self._compare(cursor, self._settled(feed, after_gap=after_gap))
            if compared >= feed.settled_position:
                await self._pool.execute(_CAUGHT_UP, *self._name, feed.settled_position)
            if compared > cursor.compared or cursor.missing_count:
                fetched = await self._try_missing()
            if compared > cursor.proven:
                await self._pool.execute(_PROVE, *self._name)
                cursor = await self._read()
        self.applied.advance(cursor.proven)
        _proven_gauge.labels(*self._name).set(cursor.proven)
        _missing_gauge.labels(*self._name).set(cursor.missing_count)
        _given_up_gauge.labels(*self._name).set(cursor.given_up)
        if fetched:
            _logger.warning(
                "the bus had lost messages; they were applied from the feed",
                topic=self.topic,
                consumer=self.consumer,
                count=fetched,
                proven_position=cursor.proven,
            )
        if cursor.given_up > self._told_given_up:
            _logger.error(
                "messages cannot be applied and are not tried any more: see `ducat feed missing`, mend the cause, then `ducat feed retry`",
                topic=self.topic,
                consumer=self.consumer,
                count=cursor.given_up,
            )
        self._told_given_up = cursor.given_up

    async def _read(self) -> _Cursor:
        row = await self._pool.fetchrow(_READ, *self._name, TRY_COUNT_MAX)
        if row is None:
            await self._pool.execute(_CURSOR, *self._name)
            return _Cursor("", 0, 0, 0, b"", "", 0, 0)
        return _Cursor(*row)

    def _settled(self, feed: feed_pb2.GetFeedResponse, *, after_gap: bool) -> int:
        """Up to where the bus has had its chance."""
        now_s = _now_s()
        if after_gap and now_s - self._gap_s >= GAP_WAIT_S:
            quiet_s, settled = GAP_WAIT_S, feed.head_position
        else:
            quiet_s, settled = self._grace_s, feed.settled_position
        if now_s - self._seen_s < quiet_s:  # the bus is at work: what it has passed only
            settled = min(settled, self._seen_position)
        return settled

    # --- is it the feed that we know?

    async def _recognized(self, cursor: _Cursor, feed: feed_pb2.GetFeedResponse) -> _Cursor:
        """The cursor to go on with. One with a problem stays until somebody accepts the feed as it is."""
        if cursor.problem:
            return cursor
        if not cursor.feed_id:
            begin = feed.first_position - 1
            await self._pool.execute(_BEGIN_AT, *self._name, feed.feed_id, begin)
            self.applied.load(begin, ())
            return await self._read()
        problem = ""
        if feed.feed_id != cursor.feed_id:
            problem = f"it is another feed now (id {feed.feed_id}, known is {cursor.feed_id})"
        elif feed.head_position < cursor.compared:
            problem = f"it ends at {feed.head_position}, {cursor.compared} was compared"
        elif cursor.compared < feed.first_position - 1:
            problem = (
                f"it begins at {feed.first_position}, only {cursor.compared} was compared: entries between were pruned"
            )
        elif (
            cursor.digest
            and cursor.digest_after >= feed.first_position - 1
            and _now_s() - self._digest_seen_s > DIGEST_INTERVAL_S
        ):
            ids = await self._list_ids(cursor.digest_after, cursor.compared - cursor.digest_after)
            if _digest([(e.position, e.message_id) for e in ids]) != cursor.digest:
                problem = f"its entries {cursor.digest_after + 1} to {cursor.compared} are others than those that were compared"
            self._digest_seen_s = _now_s()
        if not problem:
            return cursor
        await self._has_diverged(problem)
        return await self._read()

    async def _has_diverged(self, problem: str) -> None:
        text = f"the feed of {self.topic} is not the one that was followed before: {problem}. Was the publisher restored to an older state?"
        await self._pool.execute(_PROBLEM, *self._name, text)
        _logger.error(
            "a feed has diverged; nothing more is proven until `ducat feed accept` has it compared from its first entry on",
            topic=self.topic,
            consumer=self.consumer,
            problem=problem,
        )

    async def _list_ids(self, after: int, count: int) -> list[feed_pb2.FeedEntry]:
        if count <= 0:
            return []
        answer = await self._stub.ListFeedEntries(
            feed_pb2.ListFeedEntriesRequest(
                topic=self.topic, after_position=after, entry_count_max=count, ids_only=True
            )
        )
        return list(answer.entries)

    # --- comparing

    async def _compare(self, cursor: _Cursor, limit: int) -> int:
        """Compares up to `limit`; how far it got."""
        compared = cursor.compared
        missing_count = cursor.missing_count
        if compared < limit:
            await self._recorder.flush()
        while compared < limit:
            if missing_count >= MISSING_MAX:
                if not self._told_full:
                    _logger.error(
                        "too many entries of a feed are missing; the comparison waits until some are applied",
                        topic=self.topic,
                        consumer=self.consumer,
                        count=missing_count,
                    )
                self._told_full = True
                return compared
            self._told_full = False
            # The entries compared last are read again: their digest says that what follows is what follows them.
            overlap = compared - cursor.digest_after if cursor.digest else 0
            entries = await self._list_ids(compared - overlap, overlap + min(limit - compared, COMPARE_BATCH))
            known, new = entries[:overlap], [e for e in entries[overlap:] if e.position > compared]
            if overlap and _digest([(e.position, e.message_id) for e in known]) != cursor.digest:
                first = compared - overlap + 1
                await self._has_diverged(f"its entries {first} to {compared} are others than those that were compared")
                return compared
            if not new:
                return compared  # restored between two calls: the next round sees what it is
            last = new[-1].position
            gone = _runs_between(compared, [e.position for e in new])
            if gone:
                feed = await self._stub.GetFeed(feed_pb2.GetFeedRequest(topic=self.topic))
                if feed.feed_id != cursor.feed_id or feed.first_position > gone[0][0]:
                    return compared  # pruned, or restored, between two calls: the next round sees what it is
            # Without what is before a hole: the digest holds where the lost entry is put back.
            kept = [e for e in entries if not gone or e.position > gone[-1][1]][-DIGEST_COUNT:]
            digest = _digest([(e.position, e.message_id) for e in kept])
            row = await self._pool.fetchrow(
                _COMPARE,
                *self._name,
                compared,
                cursor.feed_id,
                last,
                kept[0].position - 1,
                digest,
                [e.position for e in new],
                [e.message_id for e in new],
                [e.key for e in new],
                self._recorder.consumer,
                [first for first, _ in gone],
                [GONE if first == end else f"{GONE}, nor are the entries up to {end}" for first, end in gone],
                TRY_COUNT_MAX,
            )
            if not row["moved"]:
                return compared  # another process of this consumer was first
            missing = set(row["missing"])
            missing_count += len(missing) + len(gone)
            for entry in new:
                if entry.position not in missing:
                    self.applied.add(entry.position)
            self._digest_seen_s = _now_s()
            compared = last
            cursor = _Cursor(
                cursor.feed_id, last, cursor.proven, kept[0].position - 1, digest, "", missing_count, cursor.given_up
            )
        return compared

    # --- what is missing

    async def _try_missing(self) -> int:
        """Applies what is missing and due; how many."""
        await self._recorder.flush()
        await self._take_out_arrived()
        fetched = 0
        while True:
            due = await self._pool.fetch(_DUE, *self._name, TRY_COUNT_MAX, list(self._not_mine), TRY_BATCH)
            if not due:
                return fetched
            messages, gone = await self._fetch([row["position"] for row in due])
            if gone:
                await self._pool.execute(_GONE, *self._name, gone, TRY_COUNT_MAX, GONE)
            mine: list[tuple[Message, int]] = []
            for row in due:
                message = messages.get(row["position"])
                if message is None:
                    continue
                if not row["message_id"]:
                    await self._pool.execute(_BACK, *self._name, message.position, message.message_id, message.key)
                elif message.message_id != row["message_id"]:
                    await self._has_diverged(f"entry {row['position']} is another one than before")
                    return fetched
                if self._is_mine(message):
                    mine.append((message, row["try_count"]))
            if not messages and not gone:
                return fetched
            applied, goes_on = await self._try(mine)
            fetched += applied
            if not goes_on:
                return fetched

    def _is_mine(self, message: Message) -> bool:
        try:
            is_mine = self._owns(message)
        except Exception:
            return True  # nobody can read it: the handler says why
        if not is_mine:
            if len(self._not_mine) >= NOT_MINE_MAX:
                self._not_mine.clear()
            self._not_mine.add(message.position)
            self.applied.add(message.position)
        return is_mine

    async def _fetch(self, positions: Sequence[int]) -> tuple[dict[int, Message], list[int]]:
        """The entries at these positions, as many as one answer each of a few calls has; and the positions that the feed does not have."""
        found: dict[int, Message] = {}
        gone: list[int] = []
        wanted = set(positions)
        begin = 0
        for at in range(1, len(positions) + 1):
            if at < len(positions) and positions[at] - positions[at - 1] <= FETCH_GAP_MAX:
                continue
            first, last = positions[begin], positions[at - 1]
            begin = at
            answer = await self._stub.ListFeedEntries(
                feed_pb2.ListFeedEntriesRequest(
                    topic=self.topic, after_position=first - 1, entry_count_max=min(last - first + 1, 4_096)
                )
            )
            for entry in answer.entries:
                if entry.position in wanted:
                    found[entry.position] = Message(
                        self.topic, entry.key, entry.message_id, entry.payload, entry.traceparent, entry.position
                    )
            reached = answer.entries[-1].position if answer.entries else last  # an answer has a limit of bytes
            gone += [each for each in wanted if first <= each <= min(last, reached) and each not in found]
        return found, gone

    async def _try(self, due: Sequence[tuple[Message, int]]) -> tuple[int, bool]:
        """Hands messages to the handler: new ones in batches, what failed before alone. How many were applied, and False where the
        surroundings failed, so that others would fail too."""
        held = {message.key for message, try_count in due if try_count}
        fresh = [message for message, _ in due if message.key not in held]
        applied = 0
        for start in range(0, len(fresh), self._batch_max):
            batch = await self._claim(fresh[start : start + self._batch_max], 0)
            if not batch:
                continue
            try:
                await self._handler(batch)
            except Exception as error:
                if is_transient(error):
                    await self._give_back(batch, TRY_BASE_S, error)
                    return applied, False
                applied += await self._try_alone(batch)
            else:
                applied += await self._applied(batch)
        for key in held:
            for message, try_count in due:
                if message.key == key:
                    done = await self._try_alone(await self._claim([message], try_count))
                    applied += done
                    if not done:
                        break
        return applied, True

    async def _try_alone(self, claimed: Sequence[Message]) -> int:
        """Each message for itself; a key whose message failed waits. How many were applied."""
        applied: list[Message] = []
        failed_keys: set[str] = set()
        for message in claimed:
            if message.key in failed_keys:
                await self._give_back([message], 0, None)
                continue
            try:
                with trace.bind(message.traceparent):
                    await self._handler([message])
            except Exception as error:
                failed_keys.add(message.key)
                text = f"{type(error).__name__}: {error}"[:2_000]
                _logger.warning(
                    "a message from the feed failed",
                    topic=self.topic,
                    consumer=self.consumer,
                    key=message.key,
                    message_id=message.message_id,
                    position=message.position,
                    error=text,
                )
                if is_transient(error):
                    await self._give_back([message], TRY_BASE_S, error)
                else:
                    await self._pool.execute(_FAILED, *self._name, message.position, text)
            else:
                applied.append(message)
        return await self._applied(applied) if applied else 0

    async def _claim(self, messages: Sequence[Message], try_count: int) -> list[Message]:
        """Counts a try of each; those that no other process has taken."""
        rows = await self._pool.fetch(
            _CLAIM,
            *self._name,
            [message.position for message in messages],
            [try_count] * len(messages),
            float(TRY_BASE_S),
            float(TRY_CAP_S),
        )
        claimed = {row[0] for row in rows}
        return [message for message in messages if message.position in claimed]

    async def _give_back(self, messages: Sequence[Message], delay_s: float, error: Exception | None) -> None:
        text = "" if error is None else f"{type(error).__name__}: {error}"[:2_000]
        await self._pool.execute(_GIVE_BACK, *self._name, [each.position for each in messages], float(delay_s), text)

    async def _applied(self, messages: Sequence[Message]) -> int:
        await self._recorder.flush()
        await self._take_out_arrived()
        for message in messages:
            self.applied.add(message.position)
        _fetched_counter.labels(*self._name).inc(len(messages))
        return len(messages)

    async def _take_out_arrived(self) -> None:
        """What is in the inbox by now is no longer missing."""
        for row in await self._pool.fetch(_ARRIVED, *self._name, self._recorder.consumer):
            self.applied.add(row[0])
            self._not_mine.discard(row[0])


def _problem_of(cursor: _Cursor) -> str:
    """Why a consumer cannot go on by itself, and the way out."""
    if not cursor.problem and cursor.given_up:
        return (
            f"{cursor.given_up} messages are not applied and not tried any more: `ducat feed missing` says which and why; mend that, then "
            f"`ducat feed retry`"
        )
    return cursor.problem


def _runs_between(after: int, positions: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run that is lacking among ascending positions behind `after`."""
    before = [after, *positions]
    return [(one + 1, next_ - 1) for one, next_ in zip(before, positions, strict=False) if next_ > one + 1]


def _digest(entries: Sequence[tuple[int, str]]) -> bytes:
    return hashlib.sha256("\n".join(f"{position} {message_id}" for position, message_id in entries).encode()).digest()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
