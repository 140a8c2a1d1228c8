"""Groups: who reads what, and how far behind. The same picture for both engines, for `ducat bus groups` and for the metric.

A group that nobody reads any more, such as one of an older map of shards, is not deleted by itself: that its readers are gone for good is
known to people only. On Valkey it holds back trimming for `BusPolicy.group_idle_max_s`, then it is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import structlog

from kernel.errors import FailedPrecondition, NotFound
from runtime.metrics import gauge

__all__ = ["LAG_WARN_S", "Group", "GroupStore", "LagReport", "remove"]

LAG_WARN_S = 300.0
"""A group whose oldest message waits for longer than this is reported."""
COMPLAIN_INTERVAL_S = 600.0
"""How often one group is reported."""

_lag = gauge("ducat_bus_group_lag", "Messages of a topic that a group has not handled.", ("topic", "group"))
_log = structlog.get_logger("runtime.bus.groups")


@dataclass(frozen=True, slots=True)
class Group:
    """A group of a topic at this moment, over all partitions."""

    topic: str
    name: str
    members: int
    """Consumers that live."""
    pending: int
    """Messages delivered and not acknowledged. Kafka does not tell: 0, they are part of `lag`."""
    lag: int
    """Messages not delivered yet."""
    last_delivered_ms: int
    """When the newest delivered message was published; 0 where none was, or where that is unknown (Kafka)."""
    idle_s: float | None
    """Seconds since it had a living member; 0 while it has one, None where that is unknown."""
    waiting_s: float
    """Age of its oldest message that is not handled; 0 where there is none, or where that is unknown (Kafka)."""


class GroupStore(Protocol):
    """What each engine offers beside Bus."""

    async def groups(self, topic: str) -> list[Group]:
        """The groups of a topic, sorted. Raises Unavailable."""

    async def all_groups(self) -> tuple[list[Group], dict[str, str]]:
        """The groups of every topic, sorted; and topic → why, for those whose groups cannot be read. Raises Unavailable."""

    async def remove_group(self, topic: str, group: str) -> None:
        """Remove it, whoever reads in it. Raises FailedPrecondition where the engine cannot."""


async def remove(store: GroupStore, topic: str, group: str, *, force: bool = False) -> Group:
    """Remove a group. Raises NotFound, and FailedPrecondition when it has living members and `force` is not given."""
    found = next((known for known in await store.groups(topic) if known.name == group), None)
    if found is None:
        raise NotFound(f"topic {topic} has no group {group}; see `ducat bus groups`")
    if found.members and not force:
        raise FailedPrecondition(
            f"group {group} of {topic} has {found.members} living members; stop them first, or give --force: they then"
            " make it anew and go on"
        )
    await store.remove_group(topic, group)
    return found


class LagReport:
    """The metric and the warnings of one topic, from one look after the other."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._known: set[str] = set()
        self._complain_at: dict[str, float] = {}

    def note(self, groups: list[Group], now_s: float) -> None:
        """Take one look at all groups of the topic; `now_s` is any clock that only goes forward."""
        for name in self._known - {group.name for group in groups}:
            _lag.remove(self._topic, name)
            self._complain_at.pop(name, None)
        self._known = {group.name for group in groups}
        for group in groups:
            _lag.labels(self._topic, group.name).set(group.lag + group.pending)
            if group.waiting_s > LAG_WARN_S and now_s >= self._complain_at.get(group.name, now_s):
                self._complain_at[group.name] = now_s + COMPLAIN_INTERVAL_S
                _log.warning(
                    "a group lags",
                    topic=self._topic,
                    group=group.name,
                    members=group.members,
                    lag=group.lag,
                    pending=group.pending,
                    waiting_s=round(group.waiting_s),
                    advice="" if group.members else "nobody reads in it; `ducat bus groups remove` if that is for good",
                )
