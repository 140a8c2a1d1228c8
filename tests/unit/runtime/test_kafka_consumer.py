"""Risk: a consumer of Kafka sits in its group without a partition for ever."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from runtime.bus import BusPolicy, kafka


class Library:
    """A broker that lost its disk: the first consumer loses its partition and is never given it back."""

    made: int = 0
    ensured: int = 0
    settings: dict[str, Any] = {}  # noqa: RUF012 - read only
    policy = BusPolicy()

    def consumer(self, settings: dict[str, Any]) -> Any:
        self.made += 1
        return Member(is_first=self.made == 1)

    async def ensure_topics(self, topics: list[str]) -> None:
        self.ensured += 1

    def forget_topic(self, topic: str) -> None:
        pass


class Member:
    def __init__(self, *, is_first: bool) -> None:
        self.is_first = is_first
        self.calls: list[Any] = []

    def subscribe(self, topics: list[str], *, on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        self.calls = [on_assign, on_lost] if self.is_first else [on_assign]

    def poll(self, timeout: float) -> None:
        if self.calls:
            self.calls.pop(0)(self, [TopicPartition("t", 0)])
        time.sleep(0.01)

    def resume(self, partitions: Any) -> None:
        pass

    def close(self) -> None:
        pass


async def test_partitions_that_were_lost_and_do_not_come_back_are_asked_for_by_a_new_consumer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Library()
    monkeypatch.setattr(kafka, "Consumer", library.consumer)
    monkeypatch.setattr(kafka, "LOST_S", 0.2)

    async def handle(messages: Any) -> None:
        pass

    gaps: list[int] = []
    consumer = kafka._Consumer(
        library,  # type: ignore[arg-type]
        "t",
        "g",
        handle,
        batch_max=1,
        concurrency=1,
        from_end=False,
        on_gap=lambda: gaps.append(1),
    )
    task = asyncio.create_task(consumer.run())
    async with asyncio.timeout(10):
        while library.made < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    assert (library.made, library.ensured) == (2, 2), "one new consumer, after the topic was made sure of"
    assert len(gaps) == 3, "lost, not back, assigned again"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
