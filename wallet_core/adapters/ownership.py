"""One process at a time owns a shard, whatever folder it has: a lock of PostgreSQL, held for as long as the process runs.

The lock file in a shard's folder keeps two processes from one folder. It says nothing about a copy of the folder: its identity is right
and its log is long enough, so both would serve, and each payment would land in one of two logs.

    start   take    before a log is opened for appending; waits for a process that is just ending, then refuses
    runs    keep    takes it again as soon as PostgreSQL is back; another owner then is an error, and this process stops

While PostgreSQL is away nobody can start, so nothing is lost by going on without the lock. Once it is back an owner that runs comes
first: a start that finds a server which has just come up waits for `OWNER_BACK_S`, unless the shards are new. With
`wallet_log = kafka` the brokers fence an old owner, and taking a shard over from a living one is allowed: there it is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from kernel.errors import Unavailable
from runtime.postgres import CONNECT_ERRORS, connect
from wallet_core.shard.identity import ShardForeign

if TYPE_CHECKING:
    from runtime.postgres import Connection

__all__ = ["Ownership", "ShardTaken"]

LOCK = 0x44554341
"""With the shard's number, the two keys of an advisory lock."""
TAKE_TIMEOUT_S = 15.0
"""A process that was told to stop has ended by then, and a killed one's connection is closed."""
OWNER_BACK_S = 3.0
LOOK_S = 5.0
LOOK_TIMEOUT_S = 10.0
RETRY_S = 0.2
CONNECT_WAIT_S = 60.0
WARN_AFTER_S = 60.0

_TRY = "SELECT pg_try_advisory_lock($1, $2)"
_HOLDER = """
SELECT pid, coalesce(application_name, '') AS name, coalesce(host(client_addr), 'this machine') AS place
FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND classid = $1::bigint::oid AND objid = $2::bigint::oid AND objsubid = 2 AND granted
  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
_JUST_UP = """
SELECT exists(SELECT FROM wallet.shard WHERE shard = ANY($1::smallint[])) AND clock_timestamp() - $2::interval < coalesce(
    (SELECT max(backend_start) FROM pg_stat_activity WHERE backend_type = 'walwriter'), pg_postmaster_start_time())
"""
_SESSION = """
SET idle_session_timeout = 0; SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3
"""

_log = structlog.get_logger("wallet.ownership")


class ShardTaken(ShardForeign):
    """Another process owns the shard; `holder` is its name in PostgreSQL."""

    holder = ""


class Ownership:
    """The locks of the shards of this process."""

    def __init__(self, dsn: str, shards: Iterable[int]) -> None:
        self._dsn, self._shards = dsn, sorted(shards)
        self._name = f"ducat-wallet-owner {os.getpid()} {socket.gethostname()}"[:63].encode("ascii", "replace").decode()
        self._connection: Connection | None = None
        self._lost = asyncio.Event()

    async def take(self, wait_s: float = TAKE_TIMEOUT_S) -> None:
        """All of them. Raises ShardTaken, Unavailable."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            try:
                if await self._is_just_up():
                    await asyncio.sleep(RETRY_S)
                    continue
                taken: Exception | None = await self._try()
            except Unavailable:
                raise
            except CONNECT_ERRORS as error:
                taken = Unavailable(f"PostgreSQL went away while the shards' locks were taken: {error}")
            if taken is None:
                return
            if loop.time() > deadline:
                raise taken
            await asyncio.sleep(RETRY_S)

    async def keep(self) -> None:
        """Looks after the connection. Raises ShardTaken where another process has become the owner; goes on in any other case."""
        loop = asyncio.get_running_loop()
        warned = loop.time()
        while True:
            try:
                if self._connection is not None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._lost.wait(), LOOK_S)
                    await self._connection.execute("SELECT 1", timeout=LOOK_TIMEOUT_S)
                elif (taken := await self._try(wait_s=0)) is not None:
                    if taken.holder != self._name:
                        raise taken
                    await asyncio.sleep(RETRY_S)  # PostgreSQL has not noticed yet that the connection is lost
            except ShardTaken:
                raise
            except Exception as error:
                await self.close()
                if loop.time() - warned > WARN_AFTER_S:
                    warned = loop.time()
                    _log.warning(
                        "the shards' locks in PostgreSQL are lost until it is back",
                        error=f"{type(error).__name__}: {error}",
                    )
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Lets the locks go."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _is_just_up(self) -> bool:
        connection = await self._connected(CONNECT_WAIT_S)
        found: bool = await connection.fetchval(_JUST_UP, self._shards, timedelta(seconds=OWNER_BACK_S))
        return found

    async def _connected(self, wait_s: float) -> Connection:
        connection = self._connection
        if connection is None or connection.is_closed():
            self._lost.clear()
            connection = await connect(self._dsn, "wallet", application_name=self._name, wait_s=wait_s)
            connection.add_termination_listener(lambda _: self._lost.set())
            self._connection = connection
            await connection.execute(_SESSION)
        return connection

    async def _try(self, wait_s: float = CONNECT_WAIT_S) -> ShardTaken | None:
        """None once all are ours; whose one of them is otherwise, and none of them is kept."""
        connection = await self._connected(wait_s)
        for shard in self._shards:
            if not await connection.fetchval(_TRY, LOCK, shard):
                holder = await connection.fetchrow(_HOLDER, LOCK, shard)
                await self.close()
                pid, name, place = holder or ("PID", "?", "?")  # gone since
                taken = ShardTaken(
                    f"shard {shard}: another process serves it: {name}, from {place}. One process owns a shard, also where it has a copy "
                    f"of the folder: stop that one first, or correct DUCAT_WALLET_SHARDS. If its machine is gone for good and PostgreSQL "
                    f"has not noticed yet: SELECT pg_terminate_backend({pid})"
                )
                taken.holder = name
                return taken
        return None
