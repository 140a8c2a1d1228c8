"""The inbox takes each id once; transactions are tried again when PostgreSQL asks for it."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
import pytest

from kernel.errors import Unavailable
from runtime import inbox
from runtime.inbox import first_seen
from runtime.postgres import Pool, create_pool, transaction


async def test_id_is_fresh_once_for_each_consumer(pool: Pool) -> None:
    async with pool.acquire() as connection:
        assert await first_seen(connection, "a", ["1", "2", "2"]) == {"1", "2"}
        assert await first_seen(connection, "a", ["2", "3"]) == {"3"}
        assert await first_seen(connection, "b", ["2"]) == {"2"}
        assert await first_seen(connection, "a", []) == set()


async def test_rollback_forgets_the_id_with_the_effect(pool: Pool) -> None:
    async def fail(connection: asyncpg.Connection) -> None:
        assert await first_seen(connection, "a", ["1"]) == {"1"}
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await transaction(pool, fail)
    async with pool.acquire() as connection:
        assert await first_seen(connection, "a", ["1"]) == {"1"}


async def test_two_deliveries_at_once_take_effect_once(pool: Pool) -> None:
    """Many transactions race for overlapping ids in opposite orders: each id is fresh exactly once, nobody deadlocks."""
    ids = [f"id-{n}" for n in range(40)]
    taken: list[str] = []

    async def take(order: list[str]) -> None:
        async def work(connection: asyncpg.Connection) -> set[str]:
            fresh = await first_seen(connection, "a", order)
            await asyncio.sleep(0.005)
            return fresh

        taken.extend(await transaction(pool, work))

    await asyncio.gather(*(take(ids if n % 2 else ids[::-1]) for n in range(10)))
    assert sorted(taken) == sorted(ids)


async def test_prune_forgets_only_the_old(pool: Pool) -> None:
    async with pool.acquire() as connection:
        await first_seen(connection, "a", ["old", "new"])
        await connection.execute("UPDATE inbox SET create_time = now() - interval '32 days' WHERE message_id = 'old'")
        assert await inbox.prune(connection) == 1
        assert await inbox.prune(connection, timedelta(days=1)) == 0
        assert await first_seen(connection, "a", ["old", "new"]) == {"old"}


async def test_deadlock_is_tried_again(pool: Pool) -> None:
    await pool.execute(
        "CREATE TABLE counter (id int PRIMARY KEY, value int); INSERT INTO counter VALUES (1, 0), (2, 0)"
    )
    both_hold_one = asyncio.Barrier(2)
    tries = 0

    async def work(order: tuple[int, int]) -> None:
        first_try = True

        async def add(connection: asyncpg.Connection) -> None:
            nonlocal tries, first_try
            tries += 1
            await connection.execute("SET LOCAL deadlock_timeout = '20ms'")
            await connection.execute("UPDATE counter SET value = value + 1 WHERE id = $1", order[0])
            if first_try:
                first_try = False
                await both_hold_one.wait()
            await connection.execute("UPDATE counter SET value = value + 1 WHERE id = $1", order[1])

        await transaction(pool, add)

    await asyncio.gather(work((1, 2)), work((2, 1)))
    assert [row[0] for row in await pool.fetch("SELECT value FROM counter ORDER BY id")] == [2, 2]
    assert tries == 3


async def test_conflicts_end_after_a_bounded_number_of_tries(pool: Pool) -> None:
    tries = 0

    async def conflict(connection: asyncpg.Connection) -> None:
        nonlocal tries
        tries += 1
        await connection.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'serialization_failure'; END $$")

    with pytest.raises(Unavailable, match="3 times in a row"):
        await transaction(pool, conflict, try_count_max=3)
    assert tries == 3


async def test_other_errors_are_not_tried_again(pool: Pool) -> None:
    tries = 0

    async def fail(connection: asyncpg.Connection) -> None:
        nonlocal tries
        tries += 1
        await connection.execute("SELECT 1 / 0")

    with pytest.raises(asyncpg.DivisionByZeroError):
        await transaction(pool, fail)
    assert tries == 1


async def test_pool_sees_only_its_schema_and_forgets_no_setting(pool: Pool) -> None:
    async with pool.acquire() as connection:
        assert await connection.fetchval("SHOW search_path") == "room"
        assert await connection.fetchval("SHOW jit") == "off"
        assert await connection.fetchval("SHOW application_name") == "ducat-room"


async def test_missing_server_is_unavailable_after_the_wait() -> None:
    with pytest.raises(Unavailable, match="DUCAT_DATABASE_URL"):
        await create_pool("postgresql://ducat@127.0.0.1:1/ducat", "room", wait_s=0.3)
