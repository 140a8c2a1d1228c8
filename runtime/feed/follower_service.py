"""ducat.event.v1.FeedFollowerService: what this process's consumers lack, for operators (`ducat feed missing|retry|accept`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from kernel.errors import NotFound
from runtime.feed.follower import GONE, TRY_COUNT_MAX, FeedFollower
from runtime.logs import get_logger
from runtime.postgres import Pool

__all__ = ["FOLLOWER_SCOPES", "FOLLOWER_SERVICE", "FeedFollowerServicer"]

FOLLOWER_SERVICE = "ducat.event.v1.FeedFollowerService"
FOLLOWER_SCOPES = {
    f"/{FOLLOWER_SERVICE}/ListMissingEntries": "feed.read",
    f"/{FOLLOWER_SERVICE}/RetryMissingEntries": "feed.admin",
    f"/{FOLLOWER_SERVICE}/AcceptFeed": "feed.admin",
}
"""The scope that each method needs."""

ENTRY_COUNT_DEFAULT = 1_000

_LIST = "SELECT *, count(*) OVER () AS total FROM feed_missing ORDER BY topic, consumer, position LIMIT $1"
_RETRY = """
UPDATE feed_missing SET try_count = 0, next_try_time = now() WHERE ($1 = '' OR topic = $1) AND ($2 = 0::bigint OR position = $2)
"""
# What is missing is compared again, so it comes back; what is known here is in the inbox. What the feed does not have is let go.
_ACCEPT = """
WITH accepted AS (
    UPDATE feed_cursor SET feed_id = '', compared_position = 0, proven_position = 0, digest_after = 0, digest = '', problem = '',
        update_time = now()
    WHERE topic = $1 AND problem <> '' RETURNING topic, consumer
), missing AS (
    DELETE FROM feed_missing AS m WHERE m.topic = $1
        AND (starts_with(m.error, $2) OR EXISTS (SELECT FROM accepted AS a WHERE a.consumer = m.consumer)) RETURNING m.consumer
)
SELECT count(*) FROM (SELECT consumer FROM accepted UNION SELECT consumer FROM missing) AS each
"""

_logger = get_logger("runtime.feed")


class FeedFollowerServicer(feed_pb2_grpc.FeedFollowerServiceServicer):
    """Over the followers of this process and the schema of its pool. Errors are kernel.errors."""

    def __init__(self, pool: Pool, followers: Sequence[FeedFollower]) -> None:
        self._pool = pool
        self._followers = followers

    async def ListMissingEntries(
        self, request: feed_pb2.ListMissingEntriesRequest, context: Any
    ) -> feed_pb2.ListMissingEntriesResponse:
        response = feed_pb2.ListMissingEntriesResponse()
        for row in await self._pool.fetch(_LIST, request.entry_count_max or ENTRY_COUNT_DEFAULT):
            response.total_count = row["total"]
            entry = response.entries.add(
                topic=row["topic"],
                consumer=row["consumer"],
                position=row["position"],
                message_id=row["message_id"],
                key=row["key"],
                try_count=row["try_count"],
                error=row["error"],
            )
            if row["try_count"] < TRY_COUNT_MAX:
                entry.next_try_time.FromDatetime(row["next_try_time"])
        return response

    async def RetryMissingEntries(
        self, request: feed_pb2.RetryMissingEntriesRequest, context: Any
    ) -> feed_pb2.RetryMissingEntriesResponse:
        status = await self._pool.execute(_RETRY, request.topic, request.position)
        self._look()
        return feed_pb2.RetryMissingEntriesResponse(entry_count=int(status.rpartition(" ")[2]))

    async def AcceptFeed(self, request: feed_pb2.AcceptFeedRequest, context: Any) -> feed_pb2.AcceptFeedResponse:
        count = await self._pool.fetchval(_ACCEPT, request.topic, GONE)
        if not count:
            raise NotFound(f"no consumer here has a problem with a feed of {request.topic!r}; see `ducat feed`")
        _logger.warning("a feed was accepted as it is", topic=request.topic)
        self._look()
        return feed_pb2.AcceptFeedResponse(consumer_count=count)

    def _look(self) -> None:
        for follower in self._followers:
            follower.look()
