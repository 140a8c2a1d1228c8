"""Trimming a Valkey stream: what every group has handled goes, nothing else does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import prometheus_client
import pytest
import redis.asyncio
from structlog.testing import capture_logs

from runtime.bus import BusPolicy, Message
from runtime.bus.valkey import ValkeyBus
from tests.contract.bus.conftest import PATIENCE_S, Gaps, Seen, eventually, messages_of

POLICY = BusPolicy(claim_idle_ms=300, trim_interval_ms=100, partition_count=2)


@pytest.fixture
async def client(valkey_url: str):
    async with redis.asyncio.Redis.from_url(valkey_url) as opened:
        yield opened


async def lengths(client: redis.asyncio.Redis, topic: str) -> int:
    return sum([await client.xlen(f"bus:{{{topic}}}:{partition}") for partition in range(2)])


async def test_what_all_groups_handled_is_trimmed(valkey_url: str, client: redis.asyncio.Redis) -> None:
    bus, first, second = await ValkeyBus.open(valkey_url, policy=POLICY), Seen(), Seen()
    tasks = [
        asyncio.create_task(bus.consume("t", "a", first.batch)),
        asyncio.create_task(bus.consume("t", "b", second.batch)),
    ]
    sent = messages_of("t", 100, key_count=10)
    await bus.publish(sent)
    ids = [message.message_id for message in sent]
    await first.has(ids)
    await second.has(ids)

    async def is_empty() -> bool:
        return await lengths(client, "t") == 0

    await eventually(is_empty)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await bus.close()


async def test_unread_and_unacknowledged_messages_stay(valkey_url: str, client: redis.asyncio.Redis) -> None:
    bus = await ValkeyBus.open(valkey_url, policy=POLICY)
    fast, slow, release = Seen(), Seen(), asyncio.Event()

    async def handle(messages: Sequence[Message]) -> None:
        await release.wait()
        slow.add(*messages)

    tasks = [
        asyncio.create_task(bus.consume("t", "fast", fast.batch)),
        asyncio.create_task(bus.consume("t", "slow", handle, batch_max=5)),
    ]
    sent = messages_of("t", 100, key_count=10)
    await bus.publish(sent)
    ids = [message.message_id for message in sent]
    await fast.has(ids)
    await asyncio.sleep(5 * POLICY.trim_interval_ms / 1000)  # several trims
    assert await lengths(client, "t") == 100
    release.set()
    await slow.has(ids)

    async def is_empty() -> bool:
        return await lengths(client, "t") == 0

    await eventually(is_empty)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await bus.close()


async def test_message_delivered_to_a_reader_that_lost_its_partition_is_found(
    valkey_url: str, client: redis.asyncio.Redis
) -> None:
    """A reader that was frozen for longer than its membership reads once more: the present reader claims what it took."""
    bus, seen = await ValkeyBus.open(valkey_url, policy=POLICY), Seen()
    task = asyncio.create_task(bus.consume("t", "g", seen.batch))
    await bus.publish(messages_of("t", 1))
    await seen.has(["id-0"])
    partition = (await bus.topic("t")).stream_of("zombie-key")
    pipe = client.pipeline(transaction=True)
    pipe.xadd(partition, {"k": "zombie-key", "i": "stolen", "p": b"x"})
    pipe.xreadgroup("g", "zombie", {partition: ">"})
    await pipe.execute()
    async with asyncio.timeout(PATIENCE_S):
        await seen.has(["stolen"])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await bus.close()


async def test_group_without_readers_holds_back_trimming_for_its_time_only(
    valkey_url: str, client: redis.asyncio.Redis
) -> None:
    bus, first, second = await ValkeyBus.open(valkey_url, policy=POLICY), Seen(), Seen()
    task = asyncio.create_task(bus.consume("t", "a", first.batch))
    gone = asyncio.create_task(bus.consume("t", "wallet-1", second.batch))
    sent = messages_of("t", 100, key_count=10)
    await bus.publish(sent[:10])
    await second.has([message.message_id for message in sent[:10]])
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await bus.publish(sent[10:])
    await first.has([message.message_id for message in sent])
    await asyncio.sleep(5 * POLICY.trim_interval_ms / 1000)  # several trims
    assert await lengths(client, "t") >= 90
    (state,) = [group for group in await bus.groups("t") if group.name == "wallet-1"]
    assert (state.members, state.lag) == (0, 90)
    assert state.idle_s is not None
    assert 0.4 < state.idle_s < PATIENCE_S

    time_s, _ = await client.time()
    with capture_logs() as logs:
        for name in ("last-delivered", "seen"):  # both say that it was a while ago
            if name == "seen":
                await client.hset("bus:{t}:wallet-1:leases", "seen", (time_s - POLICY.group_idle_max_s - 5) * 1000)
            else:
                for partition in range(2):
                    await client.xgroup_setid(f"bus:{{t}}:{partition}", "wallet-1", "0")

        async def is_empty() -> bool:
            return await lengths(client, "t") == 0

        await eventually(is_empty)
    said = [entry for entry in logs if "no longer holds back trimming" in entry["event"]]
    assert [entry["group"] for entry in said] == ["wallet-1"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await bus.close()


async def test_stream_that_nobody_reads_is_bounded_and_its_reader_hears_of_the_gap(
    valkey_url: str, client: redis.asyncio.Redis
) -> None:
    policy = BusPolicy(claim_idle_ms=300, trim_interval_ms=100, partition_count=1, stream_length_max=200)
    bus, gaps, started, go = await ValkeyBus.open(valkey_url, policy=policy), Gaps(), asyncio.Event(), asyncio.Event()
    await bus.topic("t")
    await client.xgroup_create("bus:{t}:0", "g", "0", mkstream=True)
    for begin in range(0, 3_000, 500):
        await bus.publish(messages_of("t", 500, key_count=10, start=begin))
    assert await client.xlen("bus:{t}:0") < 500

    async def handle(messages: Sequence[Message]) -> None:
        started.set()
        await go.wait()

    task = asyncio.create_task(bus.consume("t", "g", handle, batch_max=1, on_gap=gaps.note))
    await started.wait()
    await gaps.told()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await bus.close()


async def test_group_that_lags_is_measured_and_said(
    valkey_url: str, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.bus.groups.LAG_WARN_S", 0.05)
    bus, seen = await ValkeyBus.open(valkey_url, policy=POLICY), Seen()
    await bus.topic("lagging")
    for partition in range(2):
        await client.xgroup_create(f"bus:{{lagging}}:{partition}", "old", "0", mkstream=True)
    await client.hset("bus:{lagging}:old:leases", "seen", (await client.time())[0] * 1000)
    with capture_logs() as logs:
        task = asyncio.create_task(bus.consume("lagging", "g", seen.batch))
        await bus.publish(messages_of("lagging", 30, key_count=10))
        await seen.has([f"id-{n}" for n in range(30)])

        async def is_said() -> bool:
            return any(entry["event"] == "a group lags" and entry["group"] == "old" for entry in logs)

        await eventually(is_said)
    labels = {"topic": "lagging", "group": "old"}
    assert prometheus_client.REGISTRY.get_sample_value("ducat_bus_group_lag", labels) == 30
    await bus.remove_group("lagging", "old")

    async def is_forgotten() -> bool:
        return prometheus_client.REGISTRY.get_sample_value("ducat_bus_group_lag", labels) is None

    await eventually(is_forgotten)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await bus.close()
