"""The outbox: nothing lost, nothing before its commit, order kept, one relay at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import asyncpg
import pytest

from kernel.errors import Unavailable
from runtime import outbox
from runtime.bus import Message
from runtime.embedded import EmbeddedPostgres
from runtime.outbox import OutboxRelay
from runtime.postgres import Pool, transaction

SCHEMA = "room"


class FakeBus:
    """A bus that keeps what it is given, and refuses while it is told to."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.batches: list[int] = []
        self.refusals_left = 0
        self._changed = asyncio.Event()

    async def publish(self, messages: Sequence[Message]) -> None:
        if self.refusals_left:
            self.refusals_left -= 1
            raise Unavailable("the bus is away")
        self.messages += messages
        self.batches.append(len(messages))
        self._changed.set()

    async def has(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(set(self.ids)) < count:
                self._changed.clear()
                await self._changed.wait()

    @property
    def ids(self) -> list[str]:
        return [message.message_id for message in self.messages]


def messages_of(count: int, *, start: int = 0, key: str = "k") -> list[Message]:
    return [Message("t", key, f"id-{n}", f"p-{n}".encode(), "") for n in range(start, start + count)]


async def say(pool: Pool, messages: Sequence[Message]) -> None:
    await transaction(pool, lambda connection: outbox.insert(connection, messages))


async def emptied(pool: Pool) -> None:
    async with asyncio.timeout(60):
        while await pool.fetchval("SELECT count(*) FROM outbox"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(relay: OutboxRelay) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(relay.run())
    yield task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_committed_messages_arrive_in_order_and_leave_the_table(pool: Pool) -> None:
    bus = FakeBus()
    sent = [Message("t", "k", "id-0", b"\x00\xff", "00-trace"), *messages_of(599, start=1)]
    await say(pool, sent[:300])
    async with running(OutboxRelay(pool, SCHEMA, bus)):
        for begin in range(300, 600, 100):
            await say(pool, sent[begin : begin + 100])
        await bus.has(600)
        assert bus.messages == [replace(each, position=n) for n, each in enumerate(sent, 1)]
        assert max(bus.batches) <= outbox.BATCH_MAX
        await emptied(pool)


async def test_notify_wakes_the_relay_at_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SAFETY_INTERVAL_S", 600.0)  # nothing but the NOTIFY can wake it
    bus = FakeBus()
    relay = OutboxRelay(pool, SCHEMA, bus)
    async with running(relay):
        await say(pool, messages_of(1))
        await bus.has(1)
        await say(pool, messages_of(1, start=1))
        await bus.has(2)


async def test_wake_reaches_the_active_relay_here_and_elsewhere(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a NOTIFY in the transaction: the relay's own wake, or one NOTIFY by a relay that stands by."""
    monkeypatch.setattr(outbox, "SAFETY_INTERVAL_S", 600.0)
    monkeypatch.setattr(outbox, "TAKEOVER_INTERVAL_S", 600.0)
    bus = FakeBus()
    active, standby = OutboxRelay(pool, SCHEMA, bus), OutboxRelay(pool, SCHEMA, bus)

    async def say_quietly(start: int) -> None:
        await transaction(pool, lambda connection: outbox.insert(connection, messages_of(1, start=start), notify=False))

    async with running(active):
        await say(pool, messages_of(1))
        await bus.has(1)
        async with running(standby):
            await say_quietly(1)
            active.wake()
            await bus.has(2)
            await say_quietly(2)
            standby.wake()
            await bus.has(3)
            assert not standby.is_active


async def test_lost_notify_only_delays(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SAFETY_INTERVAL_S", 0.1)
    bus = FakeBus()
    async with running(OutboxRelay(pool, SCHEMA, bus)):
        await pool.execute("INSERT INTO outbox (topic, key, message_id, payload) VALUES ('t', 'k', 'id-0', 'x')")
        await bus.has(1)


async def test_rolled_back_messages_are_never_published(pool: Pool) -> None:
    bus = FakeBus()

    async def fail(connection: asyncpg.Connection) -> None:
        await outbox.insert(connection, messages_of(3))
        raise ValueError("no")

    async with running(OutboxRelay(pool, SCHEMA, bus)):
        with pytest.raises(ValueError, match="no"):
            await transaction(pool, fail)
        await say(pool, messages_of(1, start=10))
        await bus.has(1)
        assert bus.ids == ["id-10"]


async def test_transaction_that_commits_late_is_not_skipped(pool: Pool) -> None:
    bus = FakeBus()
    async with running(OutboxRelay(pool, SCHEMA, bus)):
        async with pool.acquire() as slow, slow.transaction():
            await outbox.insert(slow, messages_of(1, key="slow"))  # takes the lower position
            await say(pool, messages_of(1, start=1, key="fast"))
            await bus.has(1)
            await emptied(pool)
        await bus.has(2)
        assert bus.ids == ["id-1", "id-0"]


async def test_bus_outage_loses_nothing_and_keeps_order(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BACKOFF_S", (0.02,))
    bus = FakeBus()
    bus.refusals_left = 4
    async with running(OutboxRelay(pool, SCHEMA, bus)):
        await say(pool, messages_of(20))
        await say(pool, messages_of(20, start=20))
        await bus.has(40)
        assert bus.ids == [f"id-{n}" for n in range(40)]
        await emptied(pool)


async def test_one_relay_is_active_and_the_other_takes_over(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "TAKEOVER_INTERVAL_S", 0.05)
    first_bus, second_bus = FakeBus(), FakeBus()
    first, second = OutboxRelay(pool, SCHEMA, first_bus), OutboxRelay(pool, SCHEMA, second_bus)
    first_task = asyncio.create_task(first.run())
    await say(pool, messages_of(10))
    await first_bus.has(10)
    async with running(second):
        await say(pool, messages_of(10, start=10))
        await first_bus.has(20)
        assert (first.is_active, second.is_active) == (True, False)
        first_task.cancel()
        await asyncio.gather(first_task, return_exceptions=True)
        await say(pool, messages_of(10, start=20))
        async with asyncio.timeout(60):
            while "id-29" not in second_bus.ids:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert second.is_active
        await emptied(pool)


async def test_killed_database_connections_are_replaced(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "BACKOFF_S", (0.05,))
    bus = FakeBus()
    async with running(OutboxRelay(pool, SCHEMA, bus)):
        for round_number in range(3):
            await say(pool, messages_of(10, start=10 * round_number))
            await bus.has(10 * round_number + 10)
            kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            await pool.execute(kill)
        await say(pool, messages_of(10, start=30))
        await bus.has(40)
        await emptied(pool)


async def test_database_restart_is_survived(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the whole server, with durable settings: every committed message arrives, in order."""
    from runtime.postgres import create_pool
    from tests.integration.runtime_data.conftest import ddl_of

    monkeypatch.setattr(outbox, "BACKOFF_S", (0.05,))
    server = EmbeddedPostgres(tmp_path_factory.mktemp("pg"))
    dsn = await asyncio.to_thread(server.start)
    try:
        pool = await create_pool(dsn, SCHEMA, max_size=4)
        await pool.execute(f"CREATE SCHEMA {SCHEMA}; {ddl_of(outbox.__doc__ or '')}")
        bus = FakeBus()
        async with running(OutboxRelay(pool, SCHEMA, bus)):
            for round_number in range(2):
                await say(pool, messages_of(50, start=50 * round_number))
                server.kill()
                await asyncio.to_thread(server.start)
                async with asyncio.timeout(60):
                    while True:
                        try:
                            await pool.fetchval("SELECT 1")
                            break
                        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                            await asyncio.sleep(0.05)
            await bus.has(100)
            assert list(dict.fromkeys(bus.ids)) == [f"id-{n}" for n in range(100)]
            await emptied(pool)
        await pool.close()
    finally:
        await asyncio.to_thread(server.stop)
