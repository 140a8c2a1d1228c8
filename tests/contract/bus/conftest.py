"""One harness a backend: the same tests run over a real Valkey and a real Kafka broker."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import redis.asyncio
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from kernel.errors import Unavailable
from runtime.bus import Bus, BusPolicy, Message, open_bus
from runtime.bus.groups import Group, GroupStore
from runtime.embedded import EmbeddedValkey
from tests.kafka_broker import KafkaBroker

CONSUMER_PROCESS = Path(__file__).with_name("consumer_process.py")
ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 45.0
SESSION_TIMEOUT_MS = 2_000

_number = itertools.count(1)


class Harness:
    """Opens buses, starts consumers that end with the test, and waits with patience."""

    def __init__(self, backend: str, address: str, *, server: EmbeddedValkey | KafkaBroker | None = None) -> None:
        self.backend = backend
        self.address = address
        self.server = server
        self._buses: list[Bus] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: list[asyncio.subprocess.Process] = []

    def topic(self) -> str:
        """A topic that nobody has used."""
        return f"test.{os.getpid()}.{next(_number)}"

    async def open(self, **policy: int) -> Bus:
        limits = {
            "claim_idle_ms": 900,
            "retry_base_ms": 20,
            "retry_cap_ms": 100,
            "trim_interval_ms": 200,
            "delivery_count_max": 3,
        }
        bus = await open_bus(
            self.backend,
            redis_url=self.address,
            kafka_bootstrap=self.address,
            policy=BusPolicy(**{**limits, **policy}),
            name="contract",
        )
        self._buses.append(bus)
        return bus

    def start(self, coroutine: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.append(task)
        return task

    async def stop(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def start_process(
        self, topic: str, group: str, mode: str, delivery_count_max: int = 3
    ) -> asyncio.subprocess.Process:
        """A consumer in a process of its own that says `took <id>` on stdout; `mode` is hang, die or handle."""
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                str(CONSUMER_PROCESS),
                self.backend,
                self.address,
                topic,
                group,
                mode,
                str(delivery_count_max),
                str(SESSION_TIMEOUT_MS),
            ),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
        )
        self._processes.append(process)
        return process

    async def groups(self, bus: Bus, topic: str) -> list[Group]:
        return await cast("GroupStore", bus).groups(topic)

    async def write_garbage(self, topic: str) -> int:
        """What strangers may write into the broker; the number of entries that are no messages."""
        if self.backend == "valkey":
            async with redis.asyncio.Redis.from_url(self.address) as client:
                for n, fields in enumerate(GARBAGE_ENTRIES):
                    await client.execute_command("XADD", f"bus:{{{topic}}}:{n % 8}", "*", *fields)
            return len(GARBAGE_ENTRIES)

        def produce() -> int:
            producer = Producer({"bootstrap.servers": self.address})
            for n, (key, value, headers) in enumerate(GARBAGE_RECORDS):
                producer.produce(topic, value, key, partition=n % 8, headers=headers)
            assert producer.flush(30) == 0
            return len(GARBAGE_RECORDS)

        return await asyncio.to_thread(produce)

    async def delete_topic(self, topic: str) -> None:
        """An operator, or a server that lost its disk."""
        if self.backend == "valkey":
            async with redis.asyncio.Redis.from_url(self.address) as client:
                await client.delete(*[f"bus:{{{topic}}}:{n}" for n in range(8)], f"bus:{{{topic}}}:partitions")
            return
        admin = AdminClient({"bootstrap.servers": self.address})
        await asyncio.wrap_future(admin.delete_topics([topic])[topic])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        for bus in self._buses:
            await bus.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


GARBAGE_ENTRIES: list[list[bytes]] = [
    [b"k", b"\xff"],
    [b"k", b"\xff", b"i", b"1", b"p", b"x"],
    [b"k", b"key", b"i", b"\xfe\xff", b"p", b"x"],
    [b"i", b"1", b"p", b"x"],
    [b"k", b"key", b"p", b"x"],
    [b"k", b"key", b"i", b"", b"p", b"x"],
    [b"k", b"key", b"i", b"1"],
    [b"k", b"key", b"i", b"1", b"p", b"x", b"n", b"many"],
    [b"k", b"key", b"i", b"1", b"p", b"x", b"n", b"-1"],
    [b"k", b"key", b"i", b"1", b"p", b"x", b"n", b"9" * 5_000],
    [b"k", b"key\0", b"i", b"1", b"p", b"x"],
    [b"k", b"k" * 1_000_000, b"i", b"1", b"p", b"x"],
    [b"k", b"key", b"i", b"1" * 10_000, b"p", b"x"],
    [b"\xff", b"\xff"],
    [b"", b""],
]
GARBAGE_RECORDS: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]] = [
    (None, None, []),
    (None, b"x", [("message-id", b"id")]),
    (b"key", None, [("message-id", b"id")]),
    (b"\xff", b"x", [("message-id", b"id")]),
    (b"key", b"x", []),
    (b"key", b"x", [("message-id", None)]),
    (b"key", b"x", [("message-id", b"\xff")]),
    (b"key", b"x", [("message-id", b"id"), ("position", b"many")]),
    (b"k" * 500_000, b"x", [("message-id", b"id")]),
]


class Gaps:
    """Counts what `on_gap` says."""

    def __init__(self) -> None:
        self.count = 0
        self._told = asyncio.Event()

    def note(self) -> None:
        self.count += 1
        self._told.set()

    async def told(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._told.wait()


class Seen:
    """What handlers were given, and a way to wait for it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._changed = asyncio.Event()

    def add(self, *messages: Message) -> None:
        self.messages += messages
        self._changed.set()

    @property
    def ids(self) -> list[str]:
        return [message.message_id for message in self.messages]

    def ids_of(self, key: str) -> list[str]:
        """First sights only, in order: redeliveries are allowed."""
        return list(dict.fromkeys(message.message_id for message in self.messages if message.key == key))

    async def batch(self, messages: Sequence[Message]) -> None:
        self.add(*messages)

    async def each(self, message: Message) -> None:
        self.add(message)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def has(self, ids: Sequence[str]) -> None:
        wanted = set(ids)
        try:
            await self.until(lambda: wanted <= set(self.ids))
        except TimeoutError:
            raise AssertionError(
                f"never seen: {sorted(wanted - set(self.ids))[:10]}; seen {len(self.messages)}"
            ) from None


async def publish_surely(bus: Bus, messages: Sequence[Message]) -> None:
    """Publish as the outbox does: again until it is durable."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await bus.publish(messages)
            except Unavailable:
                await asyncio.sleep(0.05)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a state of the broker that nothing announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def messages_of(topic: str, count: int, *, key_count: int = 1, start: int = 0) -> list[Message]:
    return [
        Message(topic, f"key-{n % key_count}", f"id-{n}", f"payload-{n}".encode()) for n in range(start, start + count)
    ]


@pytest.fixture
def short_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kafka group waits so long for a member that died, or whose broker did: it is most of such a test's time."""
    monkeypatch.setattr("runtime.bus.kafka.SESSION_TIMEOUT_MS_MIN", SESSION_TIMEOUT_MS)


@pytest.fixture(params=["valkey", pytest.param("kafka", marks=pytest.mark.kafka)])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    if request.param == "valkey":
        server = request.getfixturevalue("valkey_server")
        made = Harness("valkey", request.getfixturevalue("valkey_url"), server=server)
    else:
        made = Harness(
            "kafka", request.getfixturevalue("kafka_bootstrap"), server=request.getfixturevalue("kafka_broker")
        )
    yield made
    await made.close()
