"""The dispatcher alone, with no broker: order, tries, dead letters, revocation, backpressure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from runtime.bus import BusPolicy, Message, RetryLater
from runtime.bus._dispatch import CRASH_FACTOR, Delivery, Dispatcher

QUICK = BusPolicy(retry_base_ms=1, retry_cap_ms=2, delivery_count_max=3)


class Fixture:
    """A dispatcher with a broker that only remembers."""

    def __init__(
        self,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        *,
        batch_max: int = 64,
        concurrency: int = 1,
        policy: BusPolicy = QUICK,
    ) -> None:
        self.done: list[int] = []
        self.buried: list[tuple[int, str]] = []
        self.bury_failures_left = 0
        self._changed = asyncio.Event()
        self.dispatcher = Dispatcher(
            "topic",
            "group",
            handler,
            batch_max=batch_max,
            concurrency=concurrency,
            policy=policy,
            now_ms=lambda: 1,
            done=self._done,
            bury=self._bury,
        )

    def _done(self, delivery: Delivery) -> None:
        self.done.append(delivery.position)
        self._changed.set()

    async def _bury(self, delivery: Delivery, error: str) -> None:
        if self.bury_failures_left:
            self.bury_failures_left -= 1
            raise ConnectionError("the broker is away")
        self.buried.append((delivery.position, error))
        self._changed.set()

    async def settled(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.done) + len(self.buried) < count:
                self._changed.clear()
                await self._changed.wait()
        await asyncio.sleep(0)  # the bookkeeping after the last callback

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Dispatcher]:
        task = asyncio.create_task(self.dispatcher.run())
        try:
            yield self.dispatcher
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def delivery(position: int, key: str = "k", partition: int = 0, **more: int) -> Delivery:
    return Delivery(Message("topic", key, str(position), b""), partition, position, **more)


async def test_batches_follow_each_other_in_order() -> None:
    batches: list[list[str]] = []

    async def handle(messages: Sequence[Message]) -> None:
        batches.append([message.message_id for message in messages])

    fixture = Fixture(handle, batch_max=4)
    async with fixture.running() as dispatcher:
        dispatcher.offer(delivery(n) for n in range(10))
        await fixture.settled(10)
    assert batches == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9"]]
    assert fixture.done == list(range(10))
    assert dispatcher.in_flight == 0


async def test_poison_in_a_batch_is_isolated() -> None:
    handled: list[str] = []

    async def handle(messages: Sequence[Message]) -> None:
        if any(message.message_id == "2" for message in messages):
            raise ValueError("poison")
        handled.extend(message.message_id for message in messages)

    fixture = Fixture(handle)
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0, "a"), delivery(1, "b"), delivery(2, "a"), delivery(3, "b"), delivery(4, "a")])
        await fixture.settled(5)
        assert fixture.buried == [(2, "ValueError: poison")]
        assert [n for n in handled if n in "024"] == ["0", "4"]
        assert [n for n in handled if n in "13"] == ["1", "3"]
        assert dispatcher.in_flight == 0
        assert dispatcher.wants


async def test_message_behind_a_failed_one_joins_its_queue_even_from_a_later_batch() -> None:
    handled: list[str] = []
    may_pass = asyncio.Event()

    async def handle(messages: Sequence[Message]) -> None:
        if messages[0].key == "bad" and not may_pass.is_set():
            raise RetryLater("not yet")
        handled.extend(message.message_id for message in messages)

    fixture = Fixture(handle)
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0, "bad")])
        await asyncio.sleep(0.01)
        dispatcher.offer([delivery(1, "bad"), delivery(2, "good"), delivery(3, "bad")])
        await fixture.settled(1)
        assert handled == ["2"]
        may_pass.set()
        await fixture.settled(4)
    assert handled == ["2", "0", "1", "3"]


async def test_outage_never_uses_up_the_tries() -> None:
    tries = 0

    async def handle(messages: Sequence[Message]) -> None:
        nonlocal tries
        tries += 1
        if tries < 10:
            raise ConnectionError("gone")

    fixture = Fixture(handle)
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0)])
        await fixture.settled(1)
    assert fixture.buried == []
    assert tries == 10


async def test_dead_letter_is_repeated_until_the_broker_takes_it() -> None:
    async def handle(messages: Sequence[Message]) -> None:
        raise ValueError("poison")

    fixture = Fixture(handle)
    fixture.bury_failures_left = 3
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0)])
        await fixture.settled(1)
        assert fixture.buried == [(0, "ValueError: poison")]
        assert dispatcher.in_flight == 0


async def test_suspected_killer_goes_alone_and_a_proven_one_is_buried_unseen() -> None:
    batches: list[list[str]] = []

    async def handle(messages: Sequence[Message]) -> None:
        batches.append([message.message_id for message in messages])

    fixture = Fixture(handle)
    suspect, proven = QUICK.delivery_count_max + 1, CRASH_FACTOR * QUICK.delivery_count_max + 1
    async with fixture.running() as dispatcher:
        dispatcher.offer(
            [
                delivery(0, "a"),
                delivery(1, "b", delivered_count=suspect),
                delivery(2, "c", delivered_count=proven),
                delivery(3, "d"),
            ]
        )
        await fixture.settled(4)
    assert ["1"] in batches
    assert ["0", "3"] in batches
    assert [position for position, _ in fixture.buried] == [2]


async def test_backpressure_batches_ask_only_when_idle_and_keys_up_to_their_limit() -> None:
    go = asyncio.Event()

    async def handle(messages: Sequence[Message]) -> None:
        await go.wait()

    batches = Fixture(handle)
    async with batches.running() as dispatcher:
        assert dispatcher.wants
        dispatcher.offer([delivery(0)])
        assert not dispatcher.wants
        go.set()
        await batches.settled(1)
        async with asyncio.timeout(60):
            await dispatcher.wait_until_wants()
    go.clear()
    keys = Fixture(handle, batch_max=1, concurrency=2)
    async with keys.running() as dispatcher:
        dispatcher.offer(delivery(n, f"k{n}") for n in range(63))
        assert dispatcher.wants
        dispatcher.offer([delivery(63, "k63")])
        assert not dispatcher.wants


async def test_revoked_partition_finishes_what_runs_and_forgets_the_rest() -> None:
    started, go, handled = asyncio.Event(), asyncio.Event(), []

    async def handle(messages: Sequence[Message]) -> None:
        started.set()
        await go.wait()
        handled.append(messages[0].message_id)

    fixture = Fixture(handle, batch_max=1, concurrency=2)
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0, "a", 1), delivery(1, "a", 1), delivery(2, "b", 2)])
        await started.wait()
        revoking = asyncio.create_task(dispatcher.revoke([1]))
        await asyncio.sleep(0.01)
        assert not revoking.done()
        go.set()
        await revoking
        await fixture.settled(2)
        assert sorted(fixture.done) == [0, 2]
        assert dispatcher.in_flight == 0


async def test_revoked_batch_that_fails_is_not_tried_again() -> None:
    started, go, tries = asyncio.Event(), asyncio.Event(), []

    async def handle(messages: Sequence[Message]) -> None:
        tries.append([message.message_id for message in messages])
        started.set()
        await go.wait()
        raise ValueError("late")

    fixture = Fixture(handle)
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0, "a", 1), delivery(1, "b", 1)])
        await started.wait()
        revoking = asyncio.create_task(dispatcher.revoke([1]))
        await asyncio.sleep(0)
        go.set()
        await revoking
        await asyncio.sleep(0.02)
        assert tries == [["0", "1"]]
        assert dispatcher.in_flight == 0
        assert fixture.done == fixture.buried == []


async def test_revoking_does_not_wait_for_a_backoff() -> None:
    async def handle(messages: Sequence[Message]) -> None:
        raise ValueError("poison")

    fixture = Fixture(handle, policy=BusPolicy(retry_base_ms=60_000, retry_cap_ms=60_000))
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0, "a", 1), delivery(1, "a", 1)])
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1):
            await dispatcher.revoke([1])
        assert dispatcher.in_flight == 0


@settings(deadline=None, max_examples=60)
@given(
    keys=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    failures=st.dictionaries(st.integers(0, 59), st.integers(1, 4), max_size=10),
    cut=st.lists(st.integers(1, 20), max_size=6),
    concurrency=st.sampled_from([0, 1, 3, 8]),
)
def test_any_history_keeps_order_and_settles_everything(
    keys: list[int], failures: dict[int, int], cut: list[int], concurrency: int
) -> None:
    """Whatever fails how often: each key's messages begin in order, each is done or buried once, nothing is left in flight."""

    async def play() -> None:
        left = dict(failures)
        handled: list[int] = []
        running: set[str] = set()

        async def handle(messages: Sequence[Message]) -> None:
            here = {message.key for message in messages}
            assert not here & running
            running.update(here)
            await asyncio.sleep(0)
            running.difference_update(here)
            for message in messages:
                if left.get(int(message.message_id), 0):
                    if len(messages) == 1:
                        left[int(message.message_id)] -= 1
                    raise ValueError("scripted")
            handled.extend(int(message.message_id) for message in messages)

        policy = BusPolicy(retry_base_ms=1, retry_cap_ms=1, delivery_count_max=3)
        batch_max = 1 if concurrency else 7
        fixture = Fixture(handle, batch_max=batch_max, concurrency=concurrency or 1, policy=policy)
        deliveries = [delivery(n, f"k{key}", key % 2) for n, key in enumerate(keys)]
        async with fixture.running() as dispatcher:
            begin = 0
            for size in [*cut, len(deliveries)]:
                dispatcher.offer(deliveries[begin : begin + size])
                begin += size
                await asyncio.sleep(0)
            await fixture.settled(len(deliveries))
            assert dispatcher.in_flight == 0
        buried = {position for position, _ in fixture.buried}
        assert buried == {n for n, count in failures.items() if count >= 3 and n < len(keys)}
        assert sorted([*fixture.done, *buried]) == list(range(len(keys)))
        for key in set(keys):
            of_key = [n for n in range(len(keys)) if keys[n] == key and n not in buried]
            assert [n for n in handled if keys[n] == key] == of_key

    with capture_logs():
        asyncio.run(play())


def test_policy_refuses_limits_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="retry_cap_ms"):
        BusPolicy(retry_base_ms=100, retry_cap_ms=10)
    with pytest.raises(ValueError, match="at least 1"):
        BusPolicy(delivery_count_max=0)
    with pytest.raises(ValueError, match="claim_idle_ms"):
        BusPolicy(claim_idle_ms=1)


def test_backoff_grows_to_its_cap() -> None:
    policy = BusPolicy(retry_base_ms=100, retry_cap_ms=1_000)
    assert [policy.backoff_s(n) for n in (1, 2, 3, 4, 5, 99)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


@pytest.mark.parametrize(("batch_max", "concurrency"), [(64, 1), (1, 4)])
async def test_what_is_no_message_is_buried_without_a_try_and_its_key_goes_on(batch_max: int, concurrency: int) -> None:
    handled: list[str] = []

    async def handle(messages: Sequence[Message]) -> None:
        handled.extend(message.message_id for message in messages)

    fixture = Fixture(handle, batch_max=batch_max, concurrency=concurrency)
    refused = delivery(1)
    refused.refusal = "this is no message"
    fixture.bury_failures_left = 2
    async with fixture.running() as dispatcher:
        dispatcher.offer([delivery(0), refused, delivery(2)])
        await fixture.settled(3)
        assert dispatcher.in_flight == 0
    assert fixture.buried == [(1, "Undecodable: this is no message")]
    assert handled == ["0", "2"]
