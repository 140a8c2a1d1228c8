"""The feed: what a service publishes stays in its database as one ordered feed a topic, and every consumer proves that it has all of it.

The bus is the fast path, the feed is the truth: a lost bus costs seconds, not messages. See docs/bus.md and docs/decisions/0006-feeds.md.

    publisher   runtime/outbox.py numbers and keeps · FeedServicer serves · keep_feed_pruned prunes
    both        Feeds puts them into a process
    consumer    InboxRecorder records what was handled · FeedFollower compares, fetches, proves · FeedFollowerServicer shows it
"""

from __future__ import annotations

from runtime.feed.follower import FeedFollower, rewind
from runtime.feed.follower_service import FOLLOWER_SCOPES, FOLLOWER_SERVICE, FeedFollowerServicer
from runtime.feed.positions import AppliedPositions
from runtime.feed.process import Feeds
from runtime.feed.publisher import FEED_SCOPES, FEED_SERVICE, FeedServicer, keep_feed_pruned, prune_feed

__all__ = [
    "FEED_SCOPES",
    "FEED_SERVICE",
    "FOLLOWER_SCOPES",
    "FOLLOWER_SERVICE",
    "AppliedPositions",
    "FeedFollower",
    "FeedFollowerServicer",
    "FeedServicer",
    "Feeds",
    "keep_feed_pruned",
    "prune_feed",
    "rewind",
]
