"""Trimming a Valkey stream: what every group has handled goes, nothing else does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import redis.asyncio

from runtime.bus import BusPolicy, Message
from runtime.bus.valkey import ValkeyBus
from tests.contract.bus.conftest import PATIENCE_S, Seen, eventually, messages_of

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


async def test_group_that_never_started_still_gets_everything(valkey_url: str, client: redis.asyncio.Redis) -> None:
    """The ledger is down from the first day on; the wallet handles everything; then the ledger starts."""
    
    bus, wallet, ledger = await ValkeyBus.open(valkey_url, policy=POLICY, groups=groups), Seen(), Seen()
    sent = messages_of("t", 50, key_count=10)
    await bus.publish(sent)
    ids = [message.message_id for message in sent]
    tasks = [asyncio.create_task(bus.consume("t", "wallet", wallet.batch))]
    await wallet.has(ids)
    await asyncio.sleep(5 * POLICY.trim_interval_ms / 1000)
    tasks.append(asyncio.create_task(bus.consume("t", "ledger", ledger.batch)))
    await ledger.has(ids)
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
