"""Risk: a migration back to an older version, and forth again, loses or reorders what was published and not yet applied."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from runtime.migrations import ROOMS, _versions

PUBLISHERS = {"payment": "payment.events", "executor": "executor.events", "wallet": "wallet.events"}


class Schema:
    """A room's schema; its migrations are run as dbmate runs them, each in a transaction, without a process for each."""

    def __init__(self, connection: Any, room: str) -> None:
        self.connection, self.room = connection, room
        parts = [version.file.read_text().split("-- migrate:down") for version in _versions(room)]
        self.steps = [(up.removeprefix("-- migrate:up"), down) for up, down in parts]

    async def run(self, statements: str) -> None:
        async with self.connection.transaction():
            await self.connection.execute(statements)

    async def down(self, *, keep: int = 0) -> None:
        for _, down in reversed(self.steps[keep:]):
            await self.run(down)

    async def up(self, *, kept: int = 0) -> None:
        for up, _ in self.steps[kept:]:
            await self.run(up)

    async def say(self, table: str, *rows: tuple[object, ...]) -> None:
        topic = PUBLISHERS[self.room]
        columns = "topic, position, message_id, key, payload" if table == "feed" else "topic, message_id, key, payload"
        for row in rows:
            values = [topic, *row, b"payload"]
            places = ", ".join(f"${n + 1}" for n in range(len(values)))
            await self.connection.execute(f"INSERT INTO {self.room}.{table} ({columns}) VALUES ({places})", *values)

    async def heads(self, position: int, published: int, **proven: int) -> None:
        topic = PUBLISHERS[self.room]
        await self.connection.execute(
            f"UPDATE {self.room}.feed_head SET position = $2, published_position = $3 WHERE topic = $1",
            topic,
            position,
            published,
        )
        for consumer, at in proven.items():
            await self.connection.execute(
                f"UPDATE {self.room}.feed_consumer SET proven_position = $3 WHERE topic = $1 AND consumer = $2",
                topic,
                consumer,
                at,
            )

    async def outbox(self) -> list[str]:
        rows = await self.connection.fetch(f"SELECT message_id FROM {self.room}.outbox ORDER BY position")
        return [row[0] for row in rows]


@pytest.fixture
async def connection(postgres_dsn: str) -> AsyncIterator[Any]:
    """With the schemas of this checkout, which the test may take apart."""
    opened = await asyncpg.connect(postgres_dsn)
    yield opened
    await opened.close()


@pytest.mark.parametrize("room", ROOMS)
async def test_all_the_way_back_and_forth_again(connection: Any, room: str) -> None:
    schema = Schema(connection, room)
    before = await shape(connection, room)
    await schema.down(keep=1)
    await schema.up(kept=1)
    assert await shape(connection, room) == before


async def shape(connection: Any, room: str) -> list[tuple[object, ...]]:
    rows = await connection.fetch(
        "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
        " WHERE table_schema = $1 ORDER BY table_name, column_name",
        room,
    )
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(("room", "reader"), [("payment", "wallet"), ("executor", "payment")])
async def test_what_was_published_and_not_applied_goes_back_to_the_outbox_in_its_order(
    connection: Any, room: str, reader: str
) -> None:
    """Applied is 1; published and not proven 2; moved and not published 3; moved after the head was noted 4; waiting 5 and 6."""
    schema = Schema(connection, room)
    await schema.say("feed", *((n, f"id-{n}", f"key-{n % 2}") for n in range(1, 5)))
    await schema.say("outbox", ("id-5", "key-1"), ("id-6", "key-0"))
    await schema.heads(3, 2, **dict.fromkeys(("wallet", "ledger", "payment"), 2) | {reader: 1})
    first_of_feed = next(n for n, (up, _) in enumerate(schema.steps) if ".feed (" in up)
    await schema.down(keep=first_of_feed)
    left = [f"id-{n}" for n in range(2, 7)]
    assert await schema.outbox() == left
    await schema.up(kept=first_of_feed)
    assert await schema.outbox() == left, "the relay numbers them anew"
    assert await connection.fetchval(f"SELECT count(*) FROM {room}.feed") == 0


@pytest.mark.parametrize("room", ["payment", "executor"])
async def test_back_by_one_step_and_forth_again_loses_nothing(connection: Any, room: str) -> None:
    schema = Schema(connection, room)
    await schema.say("feed", (1, "id-1", "a"), (2, "id-2", "b"))
    await schema.say("outbox", ("id-3", "a"))
    await schema.heads(1, 1)
    last = len(schema.steps) - 1
    await schema.down(keep=last)
    await schema.up(kept=last)
    rows = await connection.fetch(f"SELECT position, message_id FROM {room}.feed ORDER BY position")
    assert [tuple(row) for row in rows] == [(1, "id-1"), (2, "id-2"), (3, "id-3")]
    head = await connection.fetchrow(
        f"SELECT position, published_position FROM {room}.feed_head WHERE topic = $1", PUBLISHERS[room]
    )
    assert tuple(head) == (3, 0), "the relay publishes what nobody has proven once more"
    assert await schema.outbox() == []


@pytest.mark.parametrize("what", ["waits", "moved", "not proven"])
async def test_the_wallet_does_not_go_back_over_answers_that_are_only_here(connection: Any, what: str) -> None:
    """The version before has no outbox to put them into."""
    schema = Schema(connection, "wallet")
    if what == "waits":
        await schema.say("outbox", ("id-1", "a"))
    else:
        await schema.say("feed", (1, "id-1", "a"))
        published = int(what == "not proven")
        await schema.heads(published, published, payment=0)
    with pytest.raises(asyncpg.RaiseError, match="let wallet and payment run until `ducat feed` shows no lag"):
        await schema.down(keep=1)
    assert (
        await connection.fetchval("SELECT count(*) FROM (SELECT FROM wallet.feed UNION ALL SELECT FROM wallet.outbox)")
        == 1
    )
    await connection.execute("DELETE FROM wallet.outbox")
    await schema.heads(1, 1, payment=1)
    await schema.down(keep=1)
    await schema.up(kept=1)
    assert await connection.fetchval("SELECT count(*) FROM wallet.outbox") == 0


@pytest.mark.parametrize(("room", "old"), [("payment", 2), ("executor", 1)])
async def test_what_waits_in_the_version_before_the_feed_stays(connection: Any, room: str, old: int) -> None:
    schema = Schema(connection, room)
    await schema.down(keep=old)
    await schema.say("outbox", ("id-1", "a"), ("id-2", "a"))
    await schema.up(kept=old)
    assert await schema.outbox() == ["id-1", "id-2"]


async def test_the_ledger_knows_what_it_applied_after_the_way_back(connection: Any) -> None:
    """It publishes nothing; its follower compares from the feed's first entry on, so what it forgot would be posted again."""
    schema = Schema(connection, "ledger")
    await connection.execute("INSERT INTO ledger.inbox (consumer, message_id, position) VALUES ('ledger', 'id-1', 1)")
    await schema.down(keep=1)
    await schema.up(kept=1)
    rows = await connection.fetch("SELECT consumer, message_id, position FROM ledger.inbox")
    assert [tuple(row) for row in rows] == [("ledger", "id-1", 0)]
