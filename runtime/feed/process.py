"""What a process has to do with feeds, put together once for all bootstraps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

import grpc.aio

from ducat.event.v1 import feed_pb2_grpc
from runtime import inbox
from runtime.bus import Message
from runtime.feed.follower import TRY_BATCH, FeedFollower
from runtime.feed.follower_service import FOLLOWER_SCOPES, FOLLOWER_SERVICE, FeedFollowerServicer
from runtime.feed.positions import AppliedPositions
from runtime.feed.publisher import FEED_SCOPES, FEED_SERVICE, FeedServicer, keep_feed_pruned
from runtime.grpc_server import Servicer
from runtime.inbox import InboxRecorder
from runtime.postgres import Pool
from runtime.process import Process

__all__ = ["Feeds"]


class Feeds:
    """The feeds of one process: those that it follows, and the one that its room publishes. Make it after the pool and before the
    server; it prunes inbox and feed from then on."""

    def __init__(self, process: Process, pool: Pool, *, publishes: bool) -> None:
        self._process = process
        self._pool = pool
        self._followers: list[FeedFollower] = []
        settings = process.settings
        retention = timedelta(days=settings.feed_retention_days)
        process.keep(lambda: inbox.keep_pruned(pool, retention + timedelta(days=1)), name="inbox pruning")
        self.servicers: list[Servicer] = [
            (
                FeedFollowerServicer(pool, self._followers),
                feed_pb2_grpc.add_FeedFollowerServiceServicer_to_server,
                FOLLOWER_SERVICE,
            )
        ]
        """For `Process.serve_grpc`."""
        self.scopes = dict(FOLLOWER_SCOPES)
        """For `Process.serve_grpc`."""
        if publishes:
            process.keep(lambda: keep_feed_pruned(pool, retention), name="feed pruning")
            feed = FeedServicer(pool, grace_s=settings.feed_grace_s)
            self.servicers.append((feed, feed_pb2_grpc.add_FeedServiceServicer_to_server, FEED_SERVICE))
            self.scopes |= FEED_SCOPES

    def follow(
        self,
        channel: grpc.aio.Channel,
        recorder: InboxRecorder,
        *,
        topic: str,
        consumer: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        owns: Callable[[Message], bool] = lambda message: True,
        batch_max: int = TRY_BATCH,
        applied: AppliedPositions | None = None,
    ) -> FeedFollower:
        """A follower that runs as long as the process. See FeedFollower for what it takes."""
        settings = self._process.settings
        follower = FeedFollower(
            self._pool,
            recorder,
            channel,
            topic=topic,
            consumer=consumer,
            handler=handler,
            interval_s=settings.feed_check_interval_s,
            grace_s=settings.feed_grace_s,
            owns=owns,
            batch_max=batch_max,
            applied=applied,
        )
        self._followers.append(follower)
        self._process.on_close(f"inbox records of {topic}", recorder.flush)
        self._process.keep(follower.run, name=f"feed of {topic}")
        return follower
