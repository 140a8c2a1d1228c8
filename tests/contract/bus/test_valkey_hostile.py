"""A Valkey that loses its data, or into which somebody else writes: no consumer dies of it, and what may be missing is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from kernel.errors import Unavailable
from runtime.bus import BusPolicy, Message
from runtime.bus.dead_letter import list_dead_letters
from runtime.bus.valkey import ValkeyBus
from tests.contract.bus.conftest import Gaps, Seen, eventually, messages_of, publish_surely

POLICY = BusPolicy(
    claim_idle_ms=300, trim_interval_ms=100, partition_count=2, retry_base_ms=10, retry_cap_ms=50, delivery_count_max=2
)
STREAMS = ("bus:{t}:0", "bus:{t}:1")
Client = redis.asyncio.Redis
Harm = Callable[[Client], Awaitable[object]]


@pytest.fixture
async def client(valkey_url: str) -> AsyncIterator[Client]:
    async with Client.from_url(valkey_url) as opened:
        yield opened


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[ValkeyBus]:
    opened = await ValkeyBus.open(valkey_url, policy=POLICY)
    yield opened
    await opened.close()


async def flush(client: Client) -> None:
    await client.flushall()


async def delete_streams(client: Client) -> None:
    await client.delete(*STREAMS)


async def destroy_groups(client: Client) -> None:
    for stream in STREAMS:
        await client.xgroup_destroy(stream, "g")


async def destroy_one_group(client: Client) -> None:
    await client.xgroup_destroy(STREAMS[1], "g")


async def cut_connections(client: Client) -> None:
    await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def forget_members(client: Client) -> None:
    await client.delete("bus:{t}:g:members", "bus:{t}:g:leases")


@pytest.mark.parametrize(
    "harm", [flush, delete_streams, destroy_groups, destroy_one_group, cut_connections, forget_members]
)
@pytest.mark.parametrize("is_busy", [False, True])
async def test_lost_data_is_told_and_the_consumer_goes_on(
    bus: ValkeyBus, client: Client, harm: Harm, is_busy: bool
) -> None:
    seen, gaps, started, go = Seen(), Gaps(), asyncio.Event(), asyncio.Event()

    async def handle(messages: Sequence[Message]) -> None:
        started.set()
        await go.wait()
        seen.add(*messages)

    if not is_busy:
        go.set()
    task = asyncio.create_task(bus.consume("t", "g", handle, on_gap=gaps.note))
    await publish_surely(bus, messages_of("t", 10, key_count=10))
    await started.wait()
    if not is_busy:
        await seen.has([f"id-{n}" for n in range(10)])
    assert gaps.count == 0
    await harm(client)
    await gaps.told()
    go.set()
    await publish_surely(bus, messages_of("t", 10, key_count=10, start=10))
    await seen.has([f"id-{n}" for n in range(10, 20)])
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (STREAMS[0], "no stream"),
        ("bus:{t}:g:leases", "no leases"),
        ("bus:{t}:g:members", "no members"),
        ("bus:{t}:partitions", "many"),
        ("bus:{t}:partitions", "0"),
        ("bus:{t}:partitions", "99999999999"),
    ],
)
async def test_key_that_holds_something_else_is_named_and_no_reason_to_die(
    bus: ValkeyBus, client: Client, key: str, value: str
) -> None:
    seen = Seen()
    await bus.publish(messages_of("t", 4, key_count=4))
    await client.rename(key, "kept") if key == "bus:{t}:partitions" else await client.delete(key)
    await client.set(key, value)
    bus.forget_topic("t")
    with capture_logs() as logs:
        task = asyncio.create_task(bus.consume("t", "g", seen.batch))

        async def is_named() -> bool:
            return any("bus:{t}" in entry.get("error", "") or "WRONGTYPE" in entry.get("error", "") for entry in logs)

        await eventually(is_named)
    assert not task.done()
    if "g:" not in key:
        with pytest.raises(Unavailable, match="bus:"):
            await bus.publish(messages_of("t", 4, key_count=4, start=4))
    await client.delete(key)
    await publish_surely(bus, messages_of("t", 4, key_count=4, start=8))
    await seen.has([f"id-{n}" for n in range(8, 12)])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_member_that_is_no_text_does_not_stop_the_others(bus: ValkeyBus, client: Client) -> None:
    """Anybody can write into the hash and the set of the members."""
    await client.zadd("bus:{t}:g:members", {b"\xff\xfe": 1e300})
    await client.hset("bus:{t}:g:leases", mapping={b"c:\xff\xfe": b"\xff", b"\xff": b"\xff"})
    seen = Seen()
    await bus.publish(messages_of("t", 64, key_count=64))
    task = asyncio.create_task(bus.consume("t", "g", seen.batch))
    await seen.has([f"id-{n}" for n in range(64)])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_poison_stays_until_the_dead_letters_take_it(bus: ValkeyBus, client: Client) -> None:
    """Acknowledged only behind its dead letter, also where that key holds something else."""
    seen = Seen()
    await client.set("bus:{t}:dead-letter", "no stream")
    await bus.topic("t")
    await client.execute_command("XADD", STREAMS[0], "*", "k", b"\xff")
    with capture_logs() as logs:
        task = asyncio.create_task(bus.consume_each("t", "g", seen.each))

        async def is_refused() -> bool:
            return any("WRONGTYPE" in entry.get("error", "") for entry in logs)

        await eventually(is_refused)
        assert (await client.xpending(STREAMS[0], "g"))["pending"] == 1
        await client.delete("bus:{t}:dead-letter")

        async def is_buried() -> bool:
            return bool(await list_dead_letters(bus, "t"))

        await eventually(is_buried)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_strangers_dead_letters_are_shown(bus: ValkeyBus, client: Client) -> None:
    for fields in ([b"a", b"b"], [b"k", b"\xff", b"raw", b"\xff", b"deliveries", b"many"], [b"raw", b"*1\r\n:1\r\n"]):
        await client.execute_command("XADD", "bus:{t}:dead-letter", "*", *fields)
    await client.execute_command("XADD", b"bus:{\xff}:dead-letter", "*", "a", "b")
    letters = await list_dead_letters(bus, "t")
    assert [letter.delivery_count for letter in letters] == [0, 0, 0]
    assert len(await list_dead_letters(bus)) == 3
    for letter in letters:
        await bus.republish_dead_letter(letter)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}, []),
        ({"appendonly": "no", "appendfsync": "always", "maxmemory-policy": "noeviction"}, ["a restart of the server"]),
        (
            {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "allkeys-lru"},
            ["a power cut", "throws streams"],
        ),
        ({"appendonly": None, "appendfsync": "always", "maxmemory-policy": "noeviction"}, ["appendonly is unknown"]),
    ],
)
async def test_what_the_servers_settings_cost_is_said(
    bus: ValkeyBus, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str | None], said: list[str]
) -> None:
    from runtime.bus._resp import ReplyError

    async def call(commands: Sequence[tuple[str, ...]]) -> list[object]:
        return [
            [name.encode(), value.encode()] if (value := settings[name]) else ReplyError("NOPERM")
            for _, _, name in commands
        ]

    monkeypatch.setattr(bus.link, "call", call)
    found = await bus.weaknesses()
    assert len(found) == len(said)
    assert all(part.lower() in sentence.lower() for part, sentence in zip(said, found, strict=True))


async def test_embedded_servers_settings_are_as_they_should_be(bus: ValkeyBus) -> None:
    assert await bus.weaknesses() == []


async def test_message_that_was_deleted_before_its_acknowledgement_is_told(bus: ValkeyBus, client: Client) -> None:
    seen, gaps = Seen(), Gaps()
    await bus.topic("t")
    await client.xgroup_create(STREAMS[0], "g", "0", mkstream=True)
    entry = await client.xadd(STREAMS[0], {"k": "k", "i": "i", "p": "p"})
    await client.xreadgroup("g", "somebody", {STREAMS[0]: ">"})
    await client.xdel(STREAMS[0], entry)
    task = asyncio.create_task(bus.consume("t", "g", seen.batch, on_gap=gaps.note))
    await gaps.told()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
