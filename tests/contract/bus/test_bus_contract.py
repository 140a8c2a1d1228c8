"""What every bus promises; each test runs over each backend."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from kernel.errors import FailedPrecondition, NotFound, Unavailable
from runtime.bus import Message, RetryLater, groups, open_bus
from runtime.bus.dead_letter import discard, list_dead_letters, retry, retry_all
from tests.contract.bus.conftest import Gaps, Harness, Seen, eventually, messages_of, publish_surely


async def test_order_within_a_key_survives_batches_and_two_consumers(harness: Harness) -> None:
    topic, seen = harness.topic(), Seen()
    first, second, publisher = await harness.open(), await harness.open(), await harness.open()
    sent = messages_of(topic, 600, key_count=17)
    await publisher.publish(sent[:200])
    harness.start(first.consume(topic, "g", seen.batch))
    harness.start(second.consume(topic, "g", seen.batch))
    for begin in range(200, 600, 50):
        await publisher.publish(sent[begin : begin + 50])
    await seen.has([message.message_id for message in sent])
    for key in range(17):
        assert seen.ids_of(f"key-{key}") == [message.message_id for message in sent if message.key == f"key-{key}"]


async def test_message_arrives_whole(harness: Harness) -> None:
    topic, seen = harness.topic(), Seen()
    bus = await harness.open()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    sent = Message(topic, "schlüssel/1", "id-é", bytes(range(256)) + b"\r\n", trace, position=2**62)
    await bus.publish([sent, Message(topic, "k", "empty", b"")])
    harness.start(bus.consume(topic, "g", seen.batch))
    await seen.has(["id-é", "empty"])
    assert next(message for message in seen.messages if message.message_id == "id-é") == sent
    assert next(message for message in seen.messages if message.message_id == "empty").position == 0


async def test_keys_run_in_parallel_and_one_key_never_does(harness: Harness) -> None:
    topic, bus = harness.topic(), await harness.open()
    running: Counter[str] = Counter()
    most_at_once, done = 0, Seen()
    all_started = asyncio.Event()

    async def handle(message: Message) -> None:
        nonlocal most_at_once
        running[message.key] += 1
        assert running[message.key] == 1, f"{message.key} is handled twice at the same time"
        most_at_once = max(most_at_once, sum(running.values()))
        if most_at_once == 5:
            all_started.set()
        async with asyncio.timeout(60):
            await all_started.wait()  # only passes when all five keys run at the same time
        running[message.key] -= 1
        done.add(message)

    sent = messages_of(topic, 25, key_count=5)
    await bus.publish(sent)
    harness.start(bus.consume_each(topic, "g", handle, concurrency=8))
    await done.has([message.message_id for message in sent])
    assert most_at_once == 5
    for key in range(5):
        assert done.ids_of(f"key-{key}") == [message.message_id for message in sent if message.key == f"key-{key}"]


async def test_concurrency_has_its_limit(harness: Harness) -> None:
    topic, bus, done = harness.topic(), await harness.open(), Seen()
    running = most_at_once = 0

    async def handle(message: Message) -> None:
        nonlocal running, most_at_once
        running += 1
        most_at_once = max(most_at_once, running)
        await asyncio.sleep(0.005)
        running -= 1
        done.add(message)

    sent = messages_of(topic, 60, key_count=60)
    await bus.publish(sent)
    harness.start(bus.consume_each(topic, "g", handle, concurrency=3))
    await done.has([message.message_id for message in sent])
    assert most_at_once == 3


@pytest.mark.usefixtures("short_sessions")
async def test_killed_consumer_loses_nothing(harness: Harness) -> None:
    """SIGKILL between delivery and acknowledgement: another consumer of the group gets the messages, in order."""
    topic, seen, bus = harness.topic(), Seen(), await harness.open()
    sent = messages_of(topic, 30, key_count=3)
    await bus.publish(sent)
    child = await harness.start_process(topic, "g", "hang")
    assert child.stdout is not None
    async with asyncio.timeout(60):
        while not (await child.stdout.readline()).startswith(b"took"):
            pass
    child.kill()
    await child.wait()
    harness.start(bus.consume(topic, "g", seen.batch))
    await seen.has([message.message_id for message in sent])
    for key in range(3):
        assert seen.ids_of(f"key-{key}") == [message.message_id for message in sent if message.key == f"key-{key}"]


async def test_slow_consumer_keeps_its_message(harness: Harness) -> None:
    """A handler that runs longer than claim_idle_ms in a living consumer: nobody else gets its message."""
    topic, bus, other = harness.topic(), await harness.open(), await harness.open()
    taken: list[str] = []
    finished = asyncio.Event()

    async def slow(message: Message) -> None:
        taken.append(message.message_id)
        await asyncio.sleep(2.5)
        finished.set()

    await bus.publish(messages_of(topic, 1))
    harness.start(bus.consume_each(topic, "g", slow))
    async with asyncio.timeout(60):
        while not taken:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    harness.start(other.consume_each(topic, "g", slow))
    async with asyncio.timeout(60):
        await finished.wait()
    await asyncio.sleep(1.0)
    assert taken == ["id-0"]


async def test_two_groups_each_get_everything(harness: Harness) -> None:
    topic, bus, wallet, ledger = harness.topic(), await harness.open(), Seen(), Seen()
    sent = messages_of(topic, 100, key_count=9)
    await bus.publish(sent[:50])
    harness.start(bus.consume(topic, "wallet", wallet.batch))
    await wallet.has([message.message_id for message in sent[:50]])
    harness.start(bus.consume(topic, "ledger", ledger.batch, batch_max=7))
    await bus.publish(sent[50:])
    ids = [message.message_id for message in sent]
    await wallet.has(ids)
    await ledger.has(ids)


async def test_batches_respect_their_limit_and_hold_several(harness: Harness) -> None:
    topic, bus, seen, sizes = harness.topic(), await harness.open(), Seen(), []

    async def handle(messages: Sequence[Message]) -> None:
        sizes.append(len(messages))
        seen.add(*messages)

    sent = messages_of(topic, 200, key_count=11)
    await bus.publish(sent)
    harness.start(bus.consume(topic, "g", handle, batch_max=16))
    await seen.has([message.message_id for message in sent])
    assert max(sizes) <= 16
    assert len(sizes) < 100


async def test_bursts_to_new_topics_lose_nothing_that_was_acknowledged(harness: Harness) -> None:
    topics, seen = [harness.topic() for _ in range(12)], Seen()
    for topic in topics:
        bus, sent = await harness.open(), messages_of(topic, 100, key_count=11)
        publishing = []
        for begin in range(0, 100, 10):
            publishing.append(asyncio.ensure_future(bus.publish(sent[begin : begin + 10])))
            await asyncio.sleep(0.002)  # several requests under way while the new partitions get their leaders
        await asyncio.gather(*publishing)
        harness.start(bus.consume(topic, f"g-{topic}", seen.batch))
    wanted = {(topic, f"id-{n}") for topic in topics for n in range(100)}
    await seen.until(lambda: wanted <= {(message.topic, message.message_id) for message in seen.messages})


async def test_restarted_consumer_resumes_behind_what_was_acknowledged(harness: Harness) -> None:
    topic, publisher = harness.topic(), await harness.open()
    sent = messages_of(topic, 40, key_count=4)
    before, after = Seen(), Seen()
    bus = await harness.open()
    await publisher.publish(sent[:20])
    task = harness.start(bus.consume(topic, "g", before.batch))
    await before.has([message.message_id for message in sent[:20]])
    await asyncio.sleep(0.3)  # the acknowledgement follows the handler
    await harness.stop(task)
    await publisher.publish(sent[20:])
    harness.start(bus.consume(topic, "g", after.batch))
    await after.has([message.message_id for message in sent[20:]])
    assert not set(after.ids) & {message.message_id for message in sent[:20]}


async def test_cancelled_handler_gets_its_message_again(harness: Harness) -> None:
    topic, bus, seen = harness.topic(), await harness.open(), Seen()
    started = asyncio.Event()

    async def stuck(messages: Sequence[Message]) -> None:
        started.set()
        await asyncio.sleep(600)

    await bus.publish(messages_of(topic, 3))
    task = harness.start(bus.consume(topic, "g", stuck))
    async with asyncio.timeout(60):
        await started.wait()
    await harness.stop(task)
    harness.start(bus.consume(topic, "g", seen.batch))
    await seen.has(["id-0", "id-1", "id-2"])
    assert seen.ids_of("key-0") == ["id-0", "id-1", "id-2"]


@pytest.mark.parametrize("mode", ["consume", "consume_each"])
async def test_poison_becomes_a_dead_letter_and_others_pass(harness: Harness, mode: str) -> None:
    topic, bus, seen, tries = harness.topic(), await harness.open(), Seen(), 0

    async def handle(message: Message) -> None:
        nonlocal tries
        if message.message_id == "id-3":
            tries += 1
            raise ValueError("cannot be understood")
        seen.add(message)

    async def handle_batch(messages: Sequence[Message]) -> None:
        if any(message.message_id == "id-3" for message in messages) and len(messages) > 1:
            raise ValueError("one of the batch cannot be understood")
        for message in messages:
            await handle(message)

    sent = messages_of(topic, 12, key_count=3)
    await bus.publish(sent)
    if mode == "consume":
        harness.start(bus.consume(topic, "g", handle_batch))
    else:
        harness.start(bus.consume_each(topic, "g", handle))
    others = [message.message_id for message in sent if message.message_id != "id-3"]
    await seen.has(others)

    async def is_buried() -> bool:
        return bool(await list_dead_letters(bus, topic))

    await eventually(is_buried)
    (letter,) = await list_dead_letters(bus, topic)
    assert letter.message == sent[3]
    assert letter.group == "g"
    assert letter.error == "ValueError: cannot be understood"
    assert letter.delivery_count == tries == 3
    assert 0 < letter.first_failed_ms <= letter.last_failed_ms
    assert topic in await bus.dead_letter_topics()
    for key in range(3):
        wanted = [
            message.message_id for message in sent if message.key == f"key-{key}" and message.message_id != "id-3"
        ]
        assert seen.ids_of(f"key-{key}") == wanted


async def test_failing_message_holds_only_its_own_key(harness: Harness) -> None:
    """While a message waits for its next try, later ones of its key wait too and other keys go on."""
    topic, bus, seen = harness.topic(), await harness.open(retry_base_ms=1500, retry_cap_ms=1500), Seen()
    failed_once = False

    async def handle(messages: Sequence[Message]) -> None:
        nonlocal failed_once
        if any(message.message_id == "id-0" for message in messages):
            if len(messages) > 1:
                raise ValueError("not now")
            if not failed_once:
                failed_once = True
                raise ValueError("not yet")
        seen.add(*messages)

    sent = messages_of(topic, 20, key_count=4)
    await bus.publish(sent)
    harness.start(bus.consume(topic, "g", handle))
    await seen.has([message.message_id for message in sent if message.key != "key-0"])
    assert seen.ids_of("key-0") == []
    await seen.has([message.message_id for message in sent])
    assert seen.ids_of("key-0") == ["id-0", "id-4", "id-8", "id-12", "id-16"]
    assert await list_dead_letters(bus, topic) == []


@pytest.mark.parametrize("error", [ConnectionError("database gone"), RetryLater("busy")])
async def test_outage_makes_no_dead_letters(harness: Harness, error: Exception) -> None:
    topic, bus, seen, tries = harness.topic(), await harness.open(), Seen(), 0

    async def handle(message: Message) -> None:
        nonlocal tries
        tries += 1
        if tries <= 7:  # more than delivery_count_max
            raise error
        seen.add(message)

    await bus.publish(messages_of(topic, 1))
    harness.start(bus.consume_each(topic, "g", handle))
    await seen.has(["id-0"])
    assert await list_dead_letters(bus, topic) == []


async def test_dead_letters_can_be_retried(harness: Harness) -> None:
    topic, bus, seen = harness.topic(), await harness.open(delivery_count_max=1), Seen()
    is_broken = True

    async def handle(message: Message) -> None:
        if is_broken:
            raise ValueError("broken")
        seen.add(message)

    sent = [replace(message, position=n + 1) for n, message in enumerate(messages_of(topic, 3, key_count=3))]
    await bus.publish(sent)
    harness.start(bus.consume_each(topic, "g", handle))

    async def all_buried() -> bool:
        return len(await list_dead_letters(bus, topic)) == 3

    await eventually(all_buried)
    is_broken = False
    letters = await list_dead_letters(bus, topic)
    first = next(letter for letter in letters if letter.message.message_id == "id-1")
    with pytest.raises(NotFound, match="no dead letter"):
        await retry(bus, topic, ["no-such-id", first.id])
    assert len(await list_dead_letters(bus, topic)) == 3
    await retry(bus, topic, [first.id])
    await seen.has(["id-1"])
    assert {letter.message.message_id for letter in await list_dead_letters(bus, topic)} == {"id-0", "id-2"}
    assert len(await retry_all(bus, topic)) == 2
    await seen.has(["id-0", "id-1", "id-2"])
    assert await list_dead_letters(bus, topic) == []
    assert sorted(seen.messages, key=lambda message: message.position) == sent


@pytest.mark.parametrize("mode", ["consume", "consume_each"])
async def test_what_is_no_message_becomes_a_dead_letter_and_the_rest_passes(harness: Harness, mode: str) -> None:
    """Whatever a stranger writes into the broker: no crash, no loop, its raw form is kept, it can be listed and retried."""
    topic, bus, seen = harness.topic(), await harness.open(), Seen()
    await bus.publish(messages_of(topic, 5, key_count=5))
    garbage_count = await harness.write_garbage(topic)
    await bus.publish(messages_of(topic, 5, key_count=5, start=5))
    if mode == "consume":
        harness.start(bus.consume(topic, "g", seen.batch))
    else:
        harness.start(bus.consume_each(topic, "g", seen.each))
    await seen.has([f"id-{n}" for n in range(10)])

    async def all_buried() -> bool:
        return len(await list_dead_letters(bus, topic)) == garbage_count

    await eventually(all_buried)
    letters = await list_dead_letters(bus, topic)
    assert all(letter.raw and letter.group == "g" for letter in letters)
    assert all(letter.error.startswith("Undecodable: this is no message of the bus: ") for letter in letters)
    assert {message.message_id for message in seen.messages} == {f"id-{n}" for n in range(10)}

    assert await retry(bus, topic, [letters[0].id]) == letters[:1]

    async def is_buried_again() -> bool:
        again = await list_dead_letters(bus, topic)
        return len(again) == garbage_count and letters[0].id not in {letter.id for letter in again}

    await eventually(is_buried_again)
    again = (await list_dead_letters(bus, topic))[-1]
    assert (again.raw, again.error) == (letters[0].raw, letters[0].error)

    assert await retry_all(bus, topic) == []  # each group would bury it again: there would be more each time
    assert await discard(bus, topic, [again.id]) == [again]
    assert len(await list_dead_letters(bus, topic)) == garbage_count - 1


async def test_new_group_may_begin_at_the_end(harness: Harness) -> None:
    topic, bus, seen = harness.topic(), await harness.open(), Seen()
    await bus.publish(messages_of(topic, 20, key_count=20))
    task = harness.start(bus.consume(topic, "late", seen.batch, from_end=True))

    async def exists() -> bool:
        return any(group.name == "late" and group.members for group in await harness.groups(bus, topic))

    await eventually(exists)
    await bus.publish(messages_of(topic, 20, key_count=20, start=20))
    await seen.has([f"id-{n}" for n in range(20, 40)])
    await harness.stop(task)
    await bus.publish(messages_of(topic, 20, key_count=20, start=40))
    harness.start(bus.consume(topic, "late", seen.batch, from_end=True))  # it exists: it goes on where it was
    await seen.has([f"id-{n}" for n in range(20, 60)])
    assert not set(seen.ids) & {f"id-{n}" for n in range(20)}


async def test_groups_are_listed_and_removed(harness: Harness) -> None:
    topic, bus, seen = harness.topic(), await harness.open(), Seen()
    task = harness.start(bus.consume(topic, f"old-{topic}", seen.batch))
    await bus.publish(messages_of(topic, 3))
    await seen.has(["id-0", "id-1", "id-2"])

    async def state() -> tuple[int, int, int]:
        found = [group for group in await harness.groups(bus, topic) if group.name == f"old-{topic}"]
        return (found[0].members, found[0].lag, found[0].pending) if found else (0, 0, 0)

    async def has_nothing_left() -> bool:
        return await state() == (1, 0, 0)

    await eventually(has_nothing_left)
    with pytest.raises(FailedPrecondition, match="1 living members"):
        await groups.remove(bus, topic, f"old-{topic}")
    await harness.stop(task)
    await bus.publish(messages_of(topic, 4, start=3))

    async def lags() -> bool:
        return await state() == (0, 4, 0)

    await eventually(lags)
    assert (await groups.remove(bus, topic, f"old-{topic}")).lag == 4
    assert await harness.groups(bus, topic) == []
    with pytest.raises(NotFound, match="has no group"):
        await groups.remove(bus, topic, f"old-{topic}")


async def test_one_broker_alone_is_said_on_kafka(harness: Harness) -> None:
    if harness.backend == "valkey" or harness.server is None:
        pytest.skip("Valkey's settings: test_valkey_hostile.py; somebody's own brokers may be as they should be")
    with capture_logs() as logs:
        bus = await open_bus("kafka", kafka_bootstrap=harness.address, name="contract", examine=True)
        await bus.close()
    (said,) = [entry for entry in logs if entry["event"] == "the bus may forget"]
    assert "1 brokers" in said["detail"]
    assert "payment.events" in said["detail"]


async def test_topic_that_was_deleted_comes_back_and_the_gap_is_told(harness: Harness) -> None:
    topic, bus, seen, gaps = harness.topic(), await harness.open(), Seen(), Gaps()
    harness.start(bus.consume(topic, "g", seen.batch, on_gap=gaps.note))
    await bus.publish(messages_of(topic, 10, key_count=5))
    await seen.has([f"id-{n}" for n in range(10)])
    assert gaps.count == 0
    await harness.delete_topic(topic)
    await gaps.told()
    await publish_surely(bus, messages_of(topic, 10, key_count=5, start=10))
    await seen.has([f"id-{n}" for n in range(20)])


async def test_message_that_kills_its_consumers_ends_as_a_dead_letter(harness: Harness) -> None:
    if harness.backend == "kafka":
        pytest.skip(
            "Kafka counts no deliveries: a message that kills its process is an operator's case there (docs/bus.md)"
        )
    topic, bus, seen = harness.topic(), await harness.open(delivery_count_max=1), Seen()
    await bus.publish(messages_of(topic, 1))
    for _ in range(4):  # CRASH_FACTOR × delivery_count_max
        child = await harness.start_process(topic, "g", "die", delivery_count_max=1)
        async with asyncio.timeout(60):
            await child.wait()
    harness.start(bus.consume(topic, "g", seen.batch))

    async def is_buried() -> bool:
        return bool(await list_dead_letters(bus, topic))

    await eventually(is_buried)
    assert seen.messages == []


@pytest.mark.usefixtures("short_sessions")
async def test_a_broker_that_goes_away_and_comes_back_loses_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged survives SIGKILL of the broker and reaches a consumer that was there before, in order; what cannot be
    published is refused and never shows up later."""
    monkeypatch.setattr("runtime.bus.kafka.MESSAGE_TIMEOUT_MS", 2_000)
    if harness.server is None:
        pytest.skip("the broker is somebody's own: this suite does not kill it")
    topic, bus, seen, gaps = harness.topic(), await harness.open(), Seen(), Gaps()
    harness.start(bus.consume(topic, "g", seen.batch, on_gap=gaps.note))
    for start in (0, 10):
        await publish_surely(bus, messages_of(topic, 10, key_count=3, start=start))
        if start:
            await seen.has([f"id-{start}"])
        harness.server.kill()
        try:
            if start:
                with pytest.raises(Unavailable):
                    await bus.publish(messages_of(topic, 5, start=100))
        finally:
            harness.server.start()
    await publish_surely(bus, messages_of(topic, 10, key_count=3, start=20))
    await seen.has([f"id-{n}" for n in range(30)])
    assert not set(seen.ids) & {f"id-{n}" for n in range(100, 105)}
    for key in range(3):
        assert seen.ids_of(f"key-{key}") == [f"id-{n}" for n in range(30) if n % 3 == key]
    await gaps.told()


async def test_partitions_that_left_during_a_long_handler_come_back_to_life(harness: Harness) -> None:
    """A handler runs for seconds, a second consumer joins and leaves meanwhile: afterwards the first one gets everything again."""
    topic, bus, other = harness.topic(), await harness.open(), await harness.open()
    seen, other_seen, started, go = Seen(), Seen(), asyncio.Event(), asyncio.Event()

    async def handle(messages: Sequence[Message]) -> None:
        seen.add(*messages)
        if messages[0].message_id == "id-0":
            started.set()
            await go.wait()

    await bus.publish(messages_of(topic, 1))
    harness.start(bus.consume(topic, "g", handle))
    async with asyncio.timeout(60):
        await started.wait()
    joined = harness.start(other.consume(topic, "g", other_seen.batch))
    keys = 40
    await bus.publish(messages_of(topic, keys, key_count=keys, start=1))
    await asyncio.sleep(2.5)
    go.set()
    await other_seen.until(lambda: len(other_seen.messages) > 0)
    await harness.stop(joined)
    second = messages_of(topic, keys, key_count=keys, start=100)
    await bus.publish(second)
    await seen.has([message.message_id for message in second])
