"""Migrations: applied once, by several at the same time, told apart by schema."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from runtime import migrations
from runtime.migrations import MigrationFailed, dbmate_url, migrate, migrate_all, pending, rooms_with_migrations


@pytest.fixture
def two_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(migrations, "_ROOT", tmp_path)
    for room, package in (("payment", "payment"), ("wallet", "wallet_core")):
        folder = tmp_path / package / "adapters" / "migrations"
        folder.mkdir(parents=True)
        (folder / "0001_first.sql").write_text(
            f"-- migrate:up\nCREATE SCHEMA IF NOT EXISTS {room};\nCREATE TABLE {room}.thing (id int);\nSELECT pg_sleep(0.2);\n"
            f"-- migrate:down\nDROP TABLE {room}.thing;\n"
        )
        (folder / "0002_second.sql").write_text(
            f"-- migrate:up\nINSERT INTO {room}.thing VALUES (7);\n-- migrate:down\nDELETE FROM {room}.thing;\n"
        )
    return tmp_path


async def test_concurrent_runs_apply_each_migration_once(two_rooms: Path, empty_postgres_dsn: str) -> None:
    assert rooms_with_migrations() == ["payment", "wallet"]
    assert await pending(empty_postgres_dsn, "payment") == ["0001_first.sql", "0002_second.sql"]
    await asyncio.gather(*(migrate_all(empty_postgres_dsn) for _ in range(3)))
    assert await pending(empty_postgres_dsn, "payment") == []
    connection = await asyncpg.connect(empty_postgres_dsn)
    for room in ("payment", "wallet"):
        assert await connection.fetchval(f"SELECT count(*) FROM {room}.thing") == 1
        assert await connection.fetchval(f"SELECT count(*) FROM {room}.schema_migrations") == 2
    await connection.close()
    await migrate(empty_postgres_dsn, "payment")


async def test_broken_migration_changes_nothing_and_says_why(two_rooms: Path, empty_postgres_dsn: str) -> None:
    file = two_rooms / "payment/adapters/migrations/0002_second.sql"
    file.write_text("-- migrate:up\nCREATE TABLE payment.other (id int);\nSELECT nonsense;\n-- migrate:down\n")
    with pytest.raises(MigrationFailed, match="nonsense"):
        await migrate(empty_postgres_dsn, "payment")
    assert await pending(empty_postgres_dsn, "payment") == ["0002_second.sql"]
    connection = await asyncpg.connect(empty_postgres_dsn)
    assert await connection.fetchval("SELECT to_regclass('payment.other')") is None
    await connection.close()


async def test_every_room_of_this_checkout_migrates(postgres_dsn: str) -> None:
    assert rooms_with_migrations()
    for room in rooms_with_migrations():
        assert await pending(postgres_dsn, room) == []


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://u@/d?host=/run/pg&port=5433", "postgres://u@/d?socket=%2Frun%2Fpg&sslmode=disable&port=5433"),
        ("postgresql://u:p%40@127.0.0.1:1/d", "postgres://u:p%40@127.0.0.1:1/d?sslmode=disable"),
        ("postgresql://u:p@db.example/d", "postgres://u:p@db.example:5432/d?sslmode=require"),
        (
            "postgresql://u:p@db.example/d?sslmode=verify-full&sslrootcert=/ca",
            "postgres://u:p@db.example:5432/d?sslmode=verify-full&sslrootcert=%2Fca",
        ),
    ],
)
def test_dsn_is_translated(dsn: str, expected: str) -> None:
    assert dbmate_url(dsn) == expected
