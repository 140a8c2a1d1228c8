"""The publisher's side: serves a schema's feed, remembers how far consumers have proven it, prunes what nobody needs.

The table, copied into each publishing room's migrations beside those of runtime/outbox.py (`payment` stands for the room's schema). Its
rows for the consumers that belong to Ducat are made by the migration, so that pruning waits for one that has not started yet:

    CREATE TABLE payment.feed_consumer (
        topic           text        NOT NULL,
        consumer        text        NOT NULL,
        proven_position bigint      NOT NULL DEFAULT 0,
        missing_count   bigint      NOT NULL DEFAULT 0,
        problem         text        NOT NULL DEFAULT '',
        update_time     timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (topic, consumer)
    ) WITH (fillfactor = 20);
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from kernel.errors import NotFound
from runtime.logs import get_logger
from runtime.metrics import gauge
from runtime.postgres import Pool

__all__ = ["FEED_SCOPES", "FEED_SERVICE", "FeedServicer", "keep_feed_pruned", "prune_feed"]

FEED_SERVICE = "ducat.event.v1.FeedService"
FEED_SCOPES = {
    **{f"/{FEED_SERVICE}/{method}": "feed.read" for method in ("GetFeed", "ListFeedEntries", "ListFeedConsumers")},
    f"/{FEED_SERVICE}/ForgetFeedConsumer": "feed.admin",
}
"""The scope that each method needs."""

ENTRY_COUNT_DEFAULT = 1_024
ANSWER_BYTES_MAX = 2 * 1024 * 1024
"""Payloads of one answer; the first entry is always in."""
PRUNE_INTERVAL_S = 3_600.0
PRUNE_BATCH = 5_000
PRUNE_BATCHES_MAX = 200
"""Batches of one round and topic, so that it cannot keep the database busy; the rest waits for the next."""
HELD_GRACE = timedelta(days=1)
"""Entries may be so much older than the retention before a consumer that holds them back is reported."""

_GET = """
SELECT h.feed_id,
       greatest(h.position, (SELECT max(position) FROM feed WHERE topic = $1)) AS head,
       (SELECT position FROM feed WHERE topic = $1 AND create_time <= now() - $2::interval ORDER BY position DESC LIMIT 1) AS settled,
       (SELECT min(position) FROM feed WHERE topic = $1) AS first
FROM feed_head AS h WHERE h.topic = $1
"""
_TELL = """
INSERT INTO feed_consumer AS c (topic, consumer, proven_position, missing_count, problem) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (topic, consumer) DO UPDATE
SET proven_position = excluded.proven_position, missing_count = excluded.missing_count, problem = excluded.problem, update_time = now()
"""
# The sum of the payloads before an entry decides whether it still fits; the window stops at the limit of rows.
_LIST = """
SELECT position, message_id, key, payload, traceparent, create_time FROM (
    SELECT *, sum(octet_length(payload)) OVER (ORDER BY position) - octet_length(payload) AS bytes_before FROM (
        SELECT * FROM feed WHERE topic = $1 AND position > $2 ORDER BY position LIMIT $3) AS page) AS sized
WHERE bytes_before < $4 ORDER BY position
"""
_LIST_IDS = "SELECT position, message_id, key FROM feed WHERE topic = $1 AND position > $2 ORDER BY position LIMIT $3"
# What waits in the outbox gets the next positions: a consumer that lacks it has not applied everything that was published.
_CONSUMERS = """
SELECT c.*, greatest(h.position, (SELECT max(position) FROM feed AS f WHERE f.topic = c.topic), 0)
            + (SELECT count(*) FROM outbox AS o WHERE o.topic = c.topic) AS head
FROM feed_consumer AS c LEFT JOIN feed_head AS h USING (topic) ORDER BY c.topic, c.consumer
"""
_PRUNE = """
DELETE FROM feed WHERE topic = $1 AND position <= $2 AND position = ANY(ARRAY(
    SELECT position FROM feed WHERE topic = $1 AND position <= $2 AND create_time < now() - $3::interval ORDER BY position LIMIT $4))
"""
# The last entry stays: it says where the feed is.
_PROVEN_BY_ALL = """
SELECT h.topic, least(h.position - 1, min(c.proven_position)) AS position
FROM feed_head AS h LEFT JOIN feed_consumer AS c USING (topic) GROUP BY h.topic, h.position
"""
_HELD_BACK = """
SELECT c.consumer, c.proven_position FROM feed_consumer AS c WHERE c.topic = $1 AND EXISTS (
    SELECT FROM feed AS f WHERE f.topic = c.topic AND f.position = c.proven_position + 1 AND f.create_time < now() - $2::interval)
"""

_held_gauge = gauge(
    "ducat_feed_held_back",
    "1: the consumer lags by more than the feed's retention, so nothing is pruned.",
    ("topic", "consumer"),
)
_logger = get_logger("runtime.feed")


class FeedServicer(feed_pb2_grpc.FeedServiceServicer):
    """ducat.event.v1.FeedService over the feed of the pool's schema. Errors are kernel.errors."""

    def __init__(self, pool: Pool, *, grace_s: float) -> None:
        """`grace_s`: how long the bus may take before an entry counts as settled."""
        self._pool = pool
        self._grace = timedelta(seconds=grace_s)

    async def GetFeed(self, request: feed_pb2.GetFeedRequest, context: Any) -> feed_pb2.GetFeedResponse:
        row = await self._pool.fetchrow(_GET, request.topic, self._grace)
        if row is None:
            known = [each[0] for each in await self._pool.fetch("SELECT topic FROM feed_head ORDER BY topic")]
            raise NotFound(f"topic {request.topic!r} is not published here; there are: {', '.join(known) or 'none'}")
        if request.consumer:
            await self._pool.execute(
                _TELL, request.topic, request.consumer, request.proven_position, request.missing_count, request.problem
            )
        head, first = row["head"], row["first"]
        return feed_pb2.GetFeedResponse(
            feed_id=row["feed_id"],
            head_position=head,
            settled_position=row["settled"] or (head if first is None else first - 1),
            first_position=head + 1 if first is None else first,
        )

    async def ListFeedEntries(
        self, request: feed_pb2.ListFeedEntriesRequest, context: Any
    ) -> feed_pb2.ListFeedEntriesResponse:
        count_max = request.entry_count_max or ENTRY_COUNT_DEFAULT
        response = feed_pb2.ListFeedEntriesResponse()
        if request.ids_only:
            for position, message_id, key in await self._pool.fetch(
                _LIST_IDS, request.topic, request.after_position, count_max
            ):
                response.entries.add(position=position, message_id=message_id, key=key)
            return response
        for row in await self._pool.fetch(_LIST, request.topic, request.after_position, count_max, ANSWER_BYTES_MAX):
            entry = response.entries.add(
                position=row["position"],
                message_id=row["message_id"],
                key=row["key"],
                payload=row["payload"],
                traceparent=row["traceparent"],
            )
            entry.create_time.FromDatetime(row["create_time"])
        return response

    async def ListFeedConsumers(
        self, request: feed_pb2.ListFeedConsumersRequest, context: Any
    ) -> feed_pb2.ListFeedConsumersResponse:
        response = feed_pb2.ListFeedConsumersResponse()
        for row in await self._pool.fetch(_CONSUMERS):
            consumer = response.consumers.add(
                topic=row["topic"],
                consumer=row["consumer"],
                proven_position=row["proven_position"],
                head_position=row["head"],
                missing_count=row["missing_count"],
                problem=row["problem"],
            )
            consumer.update_time.FromDatetime(row["update_time"])
        return response

    async def ForgetFeedConsumer(
        self, request: feed_pb2.ForgetFeedConsumerRequest, context: Any
    ) -> feed_pb2.ForgetFeedConsumerResponse:
        status = await self._pool.execute(
            "DELETE FROM feed_consumer WHERE topic = $1 AND consumer = $2", request.topic, request.consumer
        )
        if status.endswith(" 0"):
            raise NotFound(
                f"no consumer {request.consumer!r} of topic {request.topic!r} is known here; see `ducat feed`"
            )
        _logger.warning("a consumer of a feed was forgotten", topic=request.topic, consumer=request.consumer)
        return feed_pb2.ForgetFeedConsumerResponse()


async def keep_feed_pruned(pool: Pool, retention: timedelta) -> None:
    """Prunes the feed of the pool's schema now and then each hour, until cancelled. Spawn it once a process."""
    while True:
        try:
            await prune_feed(pool, retention)
        except Exception:
            _logger.exception("pruning the feed failed; it runs again", interval_s=PRUNE_INTERVAL_S)
        await asyncio.sleep(PRUNE_INTERVAL_S)


async def prune_feed(pool: Pool, retention: timedelta) -> int:
    """Deletes entries that are older than `retention` and proven by every known consumer; how many. Reports who holds back others."""
    count = 0
    for topic, proven in await pool.fetch(_PROVEN_BY_ALL):
        for _ in range(PRUNE_BATCHES_MAX):
            deleted = int((await pool.execute(_PRUNE, topic, proven, retention, PRUNE_BATCH)).rpartition(" ")[2])
            count += deleted
            if deleted < PRUNE_BATCH:
                break
        held = {
            row["consumer"]: row["proven_position"]
            for row in await pool.fetch(_HELD_BACK, topic, retention + HELD_GRACE)
        }
        for consumer in [
            row[0] for row in await pool.fetch("SELECT consumer FROM feed_consumer WHERE topic = $1", topic)
        ]:
            _held_gauge.labels(topic, consumer).set(consumer in held)
        for consumer, position in held.items():
            _logger.error(
                "a consumer lags by more than the feed's retention, so nothing is pruned: start it, or `ducat feed forget` it",
                topic=topic,
                consumer=consumer,
                proven_position=position,
            )
    return count
