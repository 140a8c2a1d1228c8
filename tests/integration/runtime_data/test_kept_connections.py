"""A pool that runs dry, or a broken connection that is used again, because a store keeps its connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from runtime.postgres import KeptConnections, Pool, create_pool


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    opened = await create_pool(postgres_dsn, "payment", max_size=5)
    yield opened
    await opened.close()


async def test_kept_connections(pool: Pool) -> None:
    kept = KeptConnections(pool)
    # More at once than there are connections: each gets its turn, and some stay for others.
    values = await asyncio.gather(*(kept.fetchval("SELECT $1::int", number) for number in range(40)))
    assert values == list(range(40))
    assert pool.get_size() - pool.get_idle_size() <= pool.get_max_size() - KeptConnections.LEFT_MIN

    assert await kept.execute("UPDATE payment.outbox SET key = key") == "UPDATE 0"  # the tag says how many rows
    assert await kept.fetchrow("SELECT 1 WHERE false") is None
    with pytest.raises(asyncpg.DivisionByZeroError):
        await kept.fetch("SELECT 1 / 0")
    assert await kept.fetchval("SELECT 2") == 2

    # Given up in the middle: that connection is not used again with half an answer in it.
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await kept.fetch("SELECT pg_sleep(30)")
    assert await kept.fetchval("SELECT 3") == 3

    pid = await kept.fetchval("SELECT pg_backend_pid()")
    async with pool.acquire() as other:
        await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
    for _ in range(2):
        try:
            assert await kept.fetchval("SELECT 4") == 4
            break
        except (asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.InterfaceError):
            continue
    else:
        pytest.fail("a connection that the server ended was used twice")
    await kept.close()
    assert pool.get_idle_size() == pool.get_size()
