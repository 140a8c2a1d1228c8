"""The feed: what the bus loses is applied from it, once and in order; positions are never given twice; nothing is skipped in silence."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from kernel.errors import NotFound
from runtime import inbox, outbox
from runtime.bus import Message, RetryLater
from runtime.feed import FeedFollower, FeedFollowerServicer, FeedServicer, follower, prune_feed, rewind
from runtime.inbox import InboxRecorder
from runtime.outbox import OutboxRelay
from runtime.postgres import Pool, transaction

SCHEMA = "room"
TOPIC = "t"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "GAP_WAIT_S", 0.05)
    monkeypatch.setattr(follower, "TRY_BASE_S", 0)
    monkeypatch.setattr(inbox, "RECORD_INTERVAL_S", 0.01)
    monkeypatch.setattr(outbox, "SAFETY_INTERVAL_S", 0.2)


class LossyBus:
    """Says that it has everything, and keeps nothing."""

    def __init__(self) -> None:
        self.published: list[Message] = []
        self.hangs = False

    async def publish(self, messages: Sequence[Message]) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        self.published += messages


@dataclass
class Room:
    """A publisher and its consumers in one schema."""

    pool: Pool
    bus: LossyBus
    channel: grpc.aio.Channel
    relay: OutboxRelay
    applied: list[str] = field(default_factory=list)
    fails: Callable[[Message], Exception | None] = lambda message: None

    async def say(self, count: int, *, start: int = 0, key: str = "k") -> None:
        messages = [Message(TOPIC, key, f"id-{n}", f"p-{n}".encode(), "") for n in range(start, start + count)]
        await transaction(self.pool, lambda connection: outbox.insert(connection, messages))
        async with asyncio.timeout(30):
            while await self.pool.fetchval("SELECT count(*) FROM outbox"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def handle(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if error := self.fails(message):
                raise error
        self.applied += [message.message_id for message in messages]

    def follower(self, recorder: InboxRecorder | None = None, **named: Any) -> FeedFollower:
        recorder = recorder or InboxRecorder(self.pool, "c")
        settings: dict[str, Any] = {
            "topic": TOPIC,
            "consumer": "c",
            "handler": recorder.batches(self.handle),
            "interval_s": 0.1,
            "grace_s": 0.0,
            **named,
        }
        return FeedFollower(self.pool, recorder, self.channel, **settings)

    async def cursor(self) -> dict[str, Any]:
        return dict(await self.pool.fetchrow("SELECT * FROM feed_cursor WHERE topic = $1", TOPIC))

    async def missing(self) -> list[tuple[int, int]]:
        rows = await self.pool.fetch("SELECT position, try_count FROM feed_missing ORDER BY position")
        return [(row[0], row[1]) for row in rows]

    async def proven(self, position: int) -> None:
        await until(lambda: self._is_proven(position))

    async def _is_proven(self, position: int) -> bool:
        return bool(await self.pool.fetchval("SELECT max(proven_position) FROM feed_cursor") == position)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(*parts: OutboxRelay | FeedFollower) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def room(pool: Pool) -> AsyncIterator[Room]:
    await pool.execute("INSERT INTO feed_head (topic) VALUES ('t')")
    server = grpc.aio.server()
    feed_pb2_grpc.add_FeedServiceServicer_to_server(FeedServicer(pool, grace_s=0.0), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    bus = LossyBus()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Room(pool, bus, channel, OutboxRelay(pool, SCHEMA, bus))  # type: ignore[arg-type]
    await server.stop(None)


# --- the publisher


async def test_concurrent_writers_get_positions_without_gaps_and_keys_keep_their_order(room: Room) -> None:
    async def write(key: str) -> None:
        for n in range(25):
            message = Message(TOPIC if n % 2 else "other", key, f"{key}-{n}", b"x", "")
            await transaction(room.pool, lambda connection, message=message: outbox.insert(connection, [message]))

    async with running(room.relay):
        await asyncio.gather(*(write(f"k{n}") for n in range(8)))
        await room.say(0)
    for topic in (TOPIC, "other"):
        rows = await room.pool.fetch(
            "SELECT position, key, message_id FROM feed WHERE topic = $1 ORDER BY position", topic
        )
        assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
        for key in {row["key"] for row in rows}:
            numbers = [int(row["message_id"].partition("-")[2]) for row in rows if row["key"] == key]
            assert numbers == sorted(numbers)


async def test_a_relay_killed_between_move_and_publish_publishes_after_its_restart(room: Room) -> None:
    room.bus.hangs = True
    async with running(room.relay):
        await room.say(3)
    assert room.bus.published == []
    room.bus.hangs = False
    async with running(OutboxRelay(room.pool, SCHEMA, room.bus)):  # type: ignore[arg-type]
        await room.say(2, start=3)
        await until(lambda: _is(len(room.bus.published) == 5))
    assert [(m.message_id, m.position) for m in room.bus.published] == [(f"id-{n}", n + 1) for n in range(5)]


async def test_a_relay_killed_between_publish_and_note_publishes_again_under_the_same_positions(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(connection: object) -> None:
        pass

    monkeypatch.setattr(room.relay, "_note", die)
    async with running(room.relay):
        await room.say(3)
        await until(lambda: _is(len(room.bus.published) == 3))
    async with running(OutboxRelay(room.pool, SCHEMA, room.bus)):  # type: ignore[arg-type]
        await until(lambda: _is(len(room.bus.published) == 6))
    assert room.bus.published[:3] == room.bus.published[3:]


async def test_a_bus_that_hangs_holds_up_neither_the_feed_nor_memory(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PUBLISH_PATIENCE_S", 0.05)
    monkeypatch.setattr(outbox, "BACKLOG_MAX", 10)
    room.bus.hangs = True
    async with running(room.relay):
        await room.say(1)
        for start in range(1, 41, 5):
            await room.say(5, start=start)
        assert await room.pool.fetchval("SELECT count(*) FROM feed") == 41
        assert len(room.relay._backlog) <= 10
    room.bus.hangs = False
    async with running(OutboxRelay(room.pool, SCHEMA, room.bus)):  # type: ignore[arg-type]
        await until(lambda: _is(len(room.bus.published) == 41))
    assert [m.position for m in room.bus.published] == list(range(1, 42))


async def test_a_bus_that_comes_back_gets_everything_in_order(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PUBLISH_PATIENCE_S", 0.02)
    monkeypatch.setattr(outbox, "SAFETY_INTERVAL_S", 0.05)
    monkeypatch.setattr(outbox, "BACKLOG_MAX", 10)
    refusing = True
    publish = room.bus.publish

    async def refuse(messages: Sequence[Message]) -> None:
        if refusing:
            raise ConnectionError("away")
        await publish(messages)

    room.bus.publish = refuse  # type: ignore[method-assign]
    async with running(room.relay):
        for start in range(0, 40, 5):
            await room.say(5, start=start)
        refusing = False
        await room.say(5, start=40)
        await until(lambda: _is(len(room.bus.published) == 45))
    assert [m.position for m in room.bus.published] == list(range(1, 46))


async def test_pruning_waits_for_every_consumer_and_forgetting_lets_it_go(room: Room) -> None:
    async with running(room.relay):
        await room.say(10)
    await until(lambda: _noted(room, 10))
    await room.pool.execute("UPDATE feed SET create_time = now() - interval '40 days' WHERE position <= 8")
    await room.pool.execute(
        "INSERT INTO feed_consumer (topic, consumer, proven_position) VALUES ('t', 'a', 9), ('t', 'b', 2)"
    )
    assert await prune_feed(room.pool, timedelta(days=30)) == 2
    stub: Any = feed_pb2_grpc.FeedServiceStub(room.channel)
    await stub.ForgetFeedConsumer(feed_pb2.ForgetFeedConsumerRequest(topic=TOPIC, consumer="b"))
    assert await prune_feed(room.pool, timedelta(days=30)) == 6
    feed = await stub.GetFeed(feed_pb2.GetFeedRequest(topic=TOPIC))
    assert (feed.first_position, feed.head_position) == (9, 10)
    with pytest.raises(NotFound, match="no consumer 'b'"):
        await FeedServicer(room.pool, grace_s=0).ForgetFeedConsumer(
            feed_pb2.ForgetFeedConsumerRequest(topic=TOPIC, consumer="b"), None
        )


async def test_what_waits_in_the_outbox_is_not_applied(room: Room) -> None:
    """A relay that cannot move: nobody has applied what is committed, so no consumer may be shown as being at the head."""
    async with running(room.relay):
        await room.say(3)
    await room.pool.execute("INSERT INTO feed_consumer (topic, consumer, proven_position) VALUES ('t', 'c', 3)")
    stub: Any = feed_pb2_grpc.FeedServiceStub(room.channel)
    waiting = [Message(TOPIC, "k", f"id-{n}", b"", "") for n in (3, 4)]
    for count in (0, 2):
        await transaction(room.pool, lambda connection: outbox.insert(connection, waiting[:count]))  # noqa: B023
        (consumer,) = (await stub.ListFeedConsumers(feed_pb2.ListFeedConsumersRequest())).consumers
        assert (consumer.proven_position, consumer.head_position) == (3, 3 + count)


async def test_a_relay_that_waits_for_one_that_stands_still_says_so(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "STALLED_S", 0.05)
    monkeypatch.setattr(outbox, "TAKEOVER_INTERVAL_S", 0.02)
    async with room.pool.acquire() as stopped:
        await stopped.execute("SELECT pg_advisory_lock($1, hashtext($2))", outbox._LOCK_NAMESPACE, SCHEMA)
        await outbox.insert(stopped, [Message(TOPIC, "k", "id-0", b"", "")])
        pid = await stopped.fetchval("SELECT pg_backend_pid()")
        with capture_logs() as logs:

            async def is_told() -> bool:
                return any(line.get("pid") == pid and line["log_level"] == "error" for line in logs)

            async with running(room.relay):
                await until(is_told)
        await stopped.execute("SELECT pg_advisory_unlock_all()")


async def _noted(room: Room, position: int) -> bool:
    async with running(OutboxRelay(room.pool, SCHEMA, room.bus)):  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
    return bool(await room.pool.fetchval("SELECT published_position FROM feed_head") == position)


async def test_an_answer_with_payloads_ends_before_it_is_too_large(room: Room) -> None:
    big = [Message(TOPIC, "k", f"id-{n}", bytes(900_000), "") for n in range(6)]
    async with running(room.relay):
        await transaction(room.pool, lambda connection: outbox.insert(connection, big))
        await room.say(0)
        async with running(room.follower()):
            await room.proven(6)
    assert room.applied == [f"id-{n}" for n in range(6)]


# --- the consumer


async def test_everything_that_the_bus_loses_is_applied_once_and_in_order(room: Room) -> None:
    async with running(room.relay, room.follower()):
        await room.say(300)
        await room.proven(300)
        await room.say(5, start=300)
        await room.proven(305)
    assert room.applied == [f"id-{n}" for n in range(305)]
    async with running(room.follower()):  # a restart applies nothing again
        await asyncio.sleep(0.3)
    assert len(room.applied) == 305
    told = await room.pool.fetchrow("SELECT proven_position, missing_count, problem FROM feed_consumer")
    assert tuple(told) == (305, 0, "")


async def test_what_came_by_the_bus_is_not_fetched(room: Room) -> None:
    one = room.follower()
    by_bus = one.batches(one._recorder.batches(room.handle))
    async with running(room.relay, one):
        await room.say(50)
        await by_bus([m for m in room.bus.published if m.position % 10])
        await room.proven(50)
    assert sorted(room.applied) == sorted(f"id-{n}" for n in range(50))
    assert len(room.applied) == 50
    assert one.applied.prefix == 50


async def test_a_poison_message_ends_alone_and_its_key_goes_on(room: Room) -> None:
    room.fails = lambda message: ValueError("poison") if message.message_id == "id-3" else None
    one = room.follower()
    async with running(room.relay, one):
        await room.say(6)
        await room.say(4, start=6, key="other")
        await until(lambda: _is(len(room.applied) == 9))
        await until(lambda: _missing_is(room, [(4, follower.TRY_COUNT_MAX)]))
        await room.proven(3)
        assert (await room.cursor())["proven_position"] == 3
        assert (await room.cursor())["compared_position"] == 10
        assert [i for i in room.applied if i in ("id-2", "id-4", "id-5")] == ["id-2", "id-4", "id-5"]
        servicer = FeedFollowerServicer(room.pool, [one])
        listed = await servicer.ListMissingEntries(feed_pb2.ListMissingEntriesRequest(), None)
        assert [(e.position, e.error, e.HasField("next_try_time")) for e in listed.entries] == [
            (4, "ValueError: poison", False)
        ]
        room.fails = lambda message: None
        assert (await servicer.RetryMissingEntries(feed_pb2.RetryMissingEntriesRequest(), None)).entry_count == 1
        await room.proven(10)
    assert sorted(room.applied) == sorted(f"id-{n}" for n in range(10))


async def test_a_message_that_kills_the_process_is_counted_first(room: Room) -> None:
    """A crash in the handler, over and over: the tries come to an end, and what stood beside it is applied."""

    class Killed(BaseException):
        pass

    def kill(message: Message) -> None:
        if message.message_id == "id-1":
            raise Killed

    room.fails = kill  # type: ignore[assignment]
    async with running(room.relay):
        await room.say(3)
    for _ in range(follower.TRY_COUNT_MAX + 1):
        one = room.follower()
        await one.start()
        with contextlib.suppress(Killed):
            await one._round()
            one._gap_s = one._gap_s or 0
    async with running(room.follower()):
        await until(lambda: _missing_is(room, [(2, follower.TRY_COUNT_MAX)]))
    assert sorted(room.applied) == ["id-0", "id-2"]


async def test_an_outage_of_the_handler_uses_up_no_tries(room: Room) -> None:
    is_down = True
    room.fails = lambda message: RetryLater("down") if is_down else None
    async with running(room.relay, room.follower()):
        await room.say(5)
        await asyncio.sleep(0.5)
        await until(
            lambda: _missing_is(room, [(n, 0) for n in range(1, 6)])
        )  # a try that is under way counts until it ends
        is_down = False
        await room.proven(5)
    assert room.applied == [f"id-{n}" for n in range(5)]


async def test_a_failing_message_holds_back_its_key_alone(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "TRY_BASE_S", 1)
    failures = iter([ValueError("first"), ValueError("alone")])
    room.fails = lambda message: next(failures, None) if message.message_id == "id-0" else None
    async with running(room.relay, room.follower()):
        await room.say(3)
        await room.say(1, start=3, key="other")
        await until(lambda: _is(room.applied == ["id-3"]))
        await room.proven(4)
    assert room.applied == ["id-3", "id-0", "id-1", "id-2"]


async def test_two_processes_of_a_consumer_apply_each_its_own(room: Room) -> None:
    def taker(remainder: int, taken: list[int]) -> FeedFollower:
        recorder = InboxRecorder(room.pool, "c")

        async def handle(messages: Sequence[Message]) -> None:
            mine = [m for m in messages if m.position % 2 == remainder]
            taken.extend(m.position for m in mine)
            recorder.note(mine)

        return room.follower(recorder, handler=handle, owns=lambda message: message.position % 2 == remainder)

    odd: list[int] = []
    even: list[int] = []
    one, two = taker(1, odd), taker(0, even)
    async with running(room.relay, one):
        await room.say(20)
        await until(lambda: _is(len(odd) == 10))
        await until(lambda: _is(one.applied.prefix == 20))
        await room.proven(1)
        assert (await room.cursor())["proven_position"] == 1, "the other one's is missing until it comes"
        async with running(two):
            await room.proven(20)
            await until(lambda: _is(two.applied.prefix == 20))
    assert (sorted(odd), sorted(even)) == (list(range(1, 21, 2)), list(range(2, 21, 2)))


async def test_two_executors_share_the_work(room: Room) -> None:
    async with running(room.relay, room.follower(), room.follower(), room.follower()):
        await room.say(200)
        await room.proven(200)
    assert sorted(room.applied) == sorted(f"id-{n}" for n in range(200))
    assert len(room.applied) == 200


async def test_a_publisher_that_is_away_stops_nothing(room: Room) -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as nobody:
        one = FeedFollower(
            room.pool,
            InboxRecorder(room.pool, "c"),
            nobody,
            topic=TOPIC,
            consumer="c",
            handler=room.handle,
            interval_s=0.05,
            grace_s=0.0,
        )
        task = asyncio.create_task(one.run())
        await asyncio.sleep(0.4)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("change", ["shorter", "other id", "other content", "pruned"])
async def test_a_feed_that_is_another_one_is_told_and_accepted(room: Room, change: str) -> None:
    async with running(room.relay, room.follower()):
        await room.say(20)
        await room.proven(20)
    if change == "shorter":
        await room.pool.execute("DELETE FROM feed WHERE position > 15; UPDATE feed_head SET position = 15")
    elif change == "other id":
        await room.pool.execute("UPDATE feed_head SET feed_id = 'other'")
    elif change == "other content":
        await room.pool.execute(
            "DELETE FROM feed WHERE position > 15; UPDATE feed_head SET position = 15, published_position = 15"
        )
    else:
        await room.pool.execute("UPDATE feed_cursor SET compared_position = 3, proven_position = 3, digest = ''")
        await room.pool.execute("DELETE FROM feed WHERE position <= 10; DELETE FROM inbox WHERE message_id = 'id-12'")
    relay = OutboxRelay(room.pool, SCHEMA, room.bus)  # type: ignore[arg-type]
    if change == "other content":
        async with running(relay):
            await room.say(10, start=100)
    one = room.follower()
    async with running(relay, one):
        await until(lambda: _has_problem(room))
        before = list(room.applied)
        await room.say(1, start=200)
        await asyncio.sleep(0.3)
        assert room.applied == before, "nothing is applied from a feed that is not ours"
        servicer = FeedFollowerServicer(room.pool, [one])
        assert (await servicer.AcceptFeed(feed_pb2.AcceptFeedRequest(topic=TOPIC), None)).consumer_count == 1
        head = await room.pool.fetchval("SELECT max(position) FROM feed")
        await room.proven(head)
        with pytest.raises(NotFound):
            await servicer.AcceptFeed(feed_pb2.AcceptFeedRequest(topic=TOPIC), None)
    kept = [row[0] for row in await room.pool.fetch("SELECT message_id FROM feed ORDER BY position")]
    assert set(kept) <= set(room.applied)
    assert [i for i in room.applied if room.applied.count(i) > 1] == (["id-12"] * 2 if change == "pruned" else [])


async def test_entries_that_are_gone_from_the_middle_hold_back_no_others_and_are_told(room: Room) -> None:
    async with running(room.relay):
        await room.say(12)
    aside = await room.pool.fetchrow("DELETE FROM feed WHERE position = 4 RETURNING *")
    await room.pool.execute("DELETE FROM feed WHERE position IN (8, 9, 10)")
    one = room.follower()
    servicer = FeedFollowerServicer(room.pool, [one])
    async with running(room.relay, one):
        await until(lambda: _missing_is(room, [(4, 8), (8, 8)]))
        await room.say(1, start=12)
        await until(lambda: _is(len(room.applied) == 9))
        problem = "SELECT problem FROM feed_consumer WHERE missing_count = 2 AND proven_position = 3"
        await until(lambda: _begins(room.pool.fetchval(problem), "2 messages are not applied and not tried any more: "))
        missing = (await servicer.ListMissingEntries(feed_pb2.ListMissingEntriesRequest(), None)).entries
        assert [each.error for each in missing] == ["not in the feed", "not in the feed, nor are the entries up to 10"]
        await servicer.RetryMissingEntries(feed_pb2.RetryMissingEntriesRequest(), None)
        await until(lambda: _missing_is(room, [(4, 8), (8, 8)]))
        await room.pool.execute("INSERT INTO feed VALUES ($1, $2, $3, $4, $5, $6, $7)", *aside)
        await servicer.RetryMissingEntries(feed_pb2.RetryMissingEntriesRequest(), None)
        await until(lambda: _missing_is(room, [(8, 8)]))
        assert (await servicer.AcceptFeed(feed_pb2.AcceptFeedRequest(topic=TOPIC), None)).consumer_count == 1
        await room.proven(13)
    assert sorted(room.applied) == sorted(f"id-{n}" for n in range(13) if n not in (7, 8, 9))
    assert not (await room.cursor())["problem"]


async def test_a_store_restored_to_an_older_state_is_filled_again(room: Room) -> None:
    async with running(room.relay, room.follower()):
        await room.say(10)
        await room.proven(10)
        moment = datetime.now(UTC)
        await room.say(10, start=10)
        await room.proven(20)
    await transaction(room.pool, lambda connection: rewind(connection, topic=TOPIC, consumer="c", time=moment))
    await room.proven(10)
    assert (await room.cursor())["proven_position"] == 10
    async with running(room.follower()):
        await room.proven(20)
    assert room.applied == [f"id-{n}" for n in [*range(20), *range(10, 20)]]


@pytest.mark.parametrize(
    ("unknown", "compared", "feed_id"), [(False, 4, "kept"), (True, 0, "")], ids=["positions", "one without a position"]
)
async def test_what_is_rewound_is_found_again(room: Room, unknown: bool, compared: int, feed_id: str) -> None:
    """Another inbox name than the follower's; what waited as missing; a message that was recorded without its position."""
    moment = datetime.now(UTC)
    rows = [("c-inbox", "id-6", 7), ("c-inbox", "id-8", 9), ("other", "id-0", 1)]
    rows += [("c-inbox", "id-1", 0)] if unknown else []
    await room.pool.executemany("INSERT INTO inbox (consumer, message_id, position) VALUES ($1, $2, $3)", rows)
    await room.pool.execute(
        "INSERT INTO inbox (consumer, message_id, position, create_time) VALUES ('c-inbox', 'id-2', 3, $1)",
        moment - timedelta(hours=1),
    )
    await room.pool.execute(
        "INSERT INTO feed_cursor (topic, consumer, feed_id, compared_position, proven_position, digest)"
        " VALUES ($1, 'c', 'kept', 9, 4, 'x'), ('another', 'c', 'kept', 9, 9, 'x')",
        TOPIC,
    )
    await room.pool.execute(
        "INSERT INTO feed_missing (topic, consumer, position, message_id, key, try_count) VALUES ($1, 'c', 5, 'id-4', 'k', 8)",
        TOPIC,
    )
    count = await transaction(
        room.pool,
        lambda connection: rewind(connection, topic=TOPIC, consumer="c", recorded_as="c-inbox", time=moment),
    )
    assert count == len(rows) - 1
    left = await room.pool.fetch("SELECT message_id FROM inbox ORDER BY message_id")
    assert [row[0] for row in left] == ["id-0", "id-2"]
    assert await room.missing() == []
    found = await room.pool.fetchrow(
        "SELECT compared_position, proven_position, feed_id, digest, digest_after FROM feed_cursor WHERE topic = $1",
        TOPIC,
    )
    assert tuple(found) == (compared, compared, feed_id, b"", compared)
    assert await room.pool.fetchval("SELECT compared_position FROM feed_cursor WHERE topic = 'another'") == 9


async def test_a_message_without_a_position_is_looked_for_in_a_pruned_feed(room: Room) -> None:
    """To begin again before the feed's first entry is no divergence."""
    async with running(room.relay, room.follower()):
        await room.say(10)
        await room.proven(10)
    await room.pool.execute("DELETE FROM feed WHERE position <= 4; DELETE FROM inbox WHERE position <= 4")
    await room.pool.execute("UPDATE inbox SET position = 0 WHERE message_id = 'id-7'")
    moment = await room.pool.fetchval("SELECT create_time FROM inbox WHERE message_id = 'id-7'")
    await transaction(room.pool, lambda connection: rewind(connection, topic=TOPIC, consumer="c", time=moment))
    async with running(room.follower()):
        await room.proven(10)
    assert not await _has_problem(room)
    assert room.applied.count("id-7") == 2


async def test_a_bus_at_work_is_not_raced(room: Room) -> None:
    one = room.follower(grace_s=60.0, interval_s=60.0)
    feed = feed_pb2.GetFeedResponse(head_position=100, settled_position=90, first_position=1)
    assert one._settled(feed, after_gap=False) == 90, "a bus that is silent has had its chance"
    await one.batches(room.handle)([Message(TOPIC, "k", "id", b"", "", 40)])
    assert one._settled(feed, after_gap=False) == 40, "what is behind that may still come"
    one.on_gap()
    assert one._settled(feed, after_gap=True) == 40, "the bus has a moment"
    one._gap_s = one._seen_s = one._gap_s - 1.0
    assert one._settled(feed, after_gap=True) == 100, "nothing more came: everything that was published counts"


async def test_what_was_applied_is_known_again_after_a_restart(room: Room) -> None:
    room.fails = lambda message: ValueError("poison") if message.message_id == "id-3" else None
    one = room.follower()
    async with running(room.relay, one):
        await room.say(8)
        await until(lambda: _is(len(room.applied) == 7))
    again = room.follower()
    await again.start()
    assert again.applied.ranges() == ((1, 3), (5, 8))
    assert again.applied.extras() == (5, 6, 7, 8)


async def _is(value: bool) -> bool:
    return value


async def _begins(value: Awaitable[str | None], text: str) -> bool:
    return (await value or "").startswith(text)


async def _missing_is(room: Room, expected: list[tuple[int, int]]) -> bool:
    return await room.missing() == expected


async def _has_problem(room: Room) -> bool:
    return bool((await room.cursor())["problem"])
