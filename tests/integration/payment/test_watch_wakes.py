"""A change that a watcher is never told of, because the writer took it that nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from payment.adapters.changes import LOCK, PaymentChanges
from runtime.postgres import connect

CHANGE = "SELECT payment.apply(now(), '', $1::jsonb)"
DOCUMENT = '{"changed": ["CHK-1"]}'


@pytest.fixture
async def two(postgres_dsn: str) -> AsyncIterator[tuple[Any, PaymentChanges]]:
    writer = await connect(postgres_dsn, "payment")
    changes = PaymentChanges(lambda: connect(postgres_dsn, "payment"))
    yield writer, changes
    await changes.close()
    await writer.close()


async def notified(dsn: str, writer: asyncpg.Connection) -> int:
    """How many notifications the writer's next commit sends."""
    listener = await connect(dsn, "payment")
    heard: list[str] = []
    await listener.add_listener("payment_changed", lambda *told: heard.append(str(told[3])))
    await writer.execute(CHANGE, DOCUMENT)
    await listener.execute("SELECT 1")
    await listener.close()
    return len(heard)


async def test_a_watcher_hears_of_every_change(two: tuple[Any, PaymentChanges]) -> None:
    writer, changes = two
    watching = changes.watch("CHK-1")
    await anext(watching)
    for _ in range(3):
        await writer.execute(CHANGE, DOCUMENT)
        async with asyncio.timeout(5):
            await anext(watching)


async def test_nobody_is_told_where_nobody_watches(two: tuple[Any, PaymentChanges], postgres_dsn: str) -> None:
    writer, changes = two
    assert await notified(postgres_dsn, writer) == 0
    watching = changes.watch("CHK-2")
    await anext(watching)
    assert await notified(postgres_dsn, writer) == 1


async def test_who_begins_to_watch_reads_after_the_change_under_way(two: tuple[Any, PaymentChanges]) -> None:
    writer, changes = two
    transaction = writer.transaction()
    await transaction.start()
    await writer.execute(CHANGE, DOCUMENT)
    assert await writer.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1", LOCK[0])
    watching = changes.watch("CHK-1")
    first = asyncio.ensure_future(anext(watching))
    done, _ = await asyncio.wait({first}, timeout=0.3)
    assert not done  # it would read the state before the change, and never hear of it
    await transaction.commit()
    async with asyncio.timeout(5):
        await first
