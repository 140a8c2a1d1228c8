"""PostgreSQL for every process: the pool, and transactions that are tried again when PostgreSQL asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import asyncpg
import structlog

from kernel.errors import NotPermitted, Unavailable

__all__ = ["CONNECT_ERRORS", "Connection", "KeptConnections", "Pool", "connect", "create_pool", "transaction"]

Connection: TypeAlias = asyncpg.Connection
Pool: TypeAlias = asyncpg.Pool

Result = TypeVar("Result")

STATEMENT_CACHE_SIZE = 512
TRANSACTION_TRY_COUNT_MAX = 8
RETRY_BASE_S = 0.002
CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 30.0
CONNECT_BACKOFF_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.0)

CONNECT_ERRORS: tuple[type[BaseException], ...] = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InternalClientError,
)
"""The server is not there, not ready, or went away: worth another try."""

_REFUSALS = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)


_CONFLICTS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
_log = structlog.get_logger("runtime.postgres")


def _server_settings(schema: str, application_name: str) -> dict[str, str]:
    return {
        "search_path": schema,
        "application_name": application_name,
        "jit": "off",  # our statements are short; compiling one costs more than it saves
        "timezone": "UTC",
        "idle_in_transaction_session_timeout": "60000",
        "lock_timeout": "10000",
    }


async def create_pool(
    dsn: str,
    schema: str,
    *,
    min_size: int = 1,
    max_size: int = 10,
    application_name: str = "",
    wait_s: float = 60.0,
    init: Callable[[Connection], Awaitable[None]] | None = None,
    server_settings: Mapping[str, str] | None = None,
) -> Pool:
    """A pool whose connections see only `schema`. Waits with backoff up to `wait_s` for the server, then raises Unavailable.

    `server_settings` are added to our own, such as planner settings that a room needs.
    """

    async def attempt() -> Pool:
        pool: Pool = await asyncpg.create_pool(
            dsn,
            min_size=min_size,
            max_size=max_size,
            max_inactive_connection_lifetime=300.0,
            statement_cache_size=STATEMENT_CACHE_SIZE,
            max_cached_statement_lifetime=0,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            server_settings=_server_settings(schema, application_name or f"ducat-{schema}")
            | dict(server_settings or {}),
            init=init,
            reset=_reset,
        )
        return pool

    return await _with_backoff(attempt, wait_s)


async def connect(dsn: str, schema: str, *, application_name: str = "", wait_s: float = 60.0) -> Connection:
    """One connection of its own with the settings of the pool's, for LISTEN and session locks."""

    async def attempt() -> Connection:
        return await asyncpg.connect(
            dsn,
            statement_cache_size=STATEMENT_CACHE_SIZE,
            max_cached_statement_lifetime=0,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=COMMAND_TIMEOUT_S,
            server_settings=_server_settings(schema, application_name or f"ducat-{schema}"),
        )

    return await _with_backoff(attempt, wait_s)


async def transaction(
    pool: Pool,
    fn: Callable[[Connection], Awaitable[Result]],
    *,
    isolation: str = "read_committed",
    try_count_max: int = TRANSACTION_TRY_COUNT_MAX,
) -> Result:
    """Run `fn(connection)` in a transaction and commit it.

    Serialization failures and deadlocks are tried again, at most `try_count_max` times, with a growing wait: `fn` must have no effect
    outside the connection. Whatever `fn` raises rolls back and passes through. A connection lost before the commit was sent raises the
    driver's error; one lost while COMMIT was under way leaves the outcome unknown, and the caller's idempotency key decides.
    """
    failures = 0
    while True:
        try:
            async with pool.acquire() as connection, connection.transaction(isolation=isolation):
                return await fn(connection)
        except _CONFLICTS as error:
            failures += 1
            if failures >= try_count_max:
                raise Unavailable(
                    f"the database transaction met conflicts {failures} times in a row ({type(error).__name__}); try again",
                    reason="UNAVAILABLE",
                ) from error
            await asyncio.sleep(RETRY_BASE_S * (1 << failures))


class KeptConnections:
    """A few connections of a pool that stay with a store between statements. Close it before the pool.

    For stores whose every statement is a transaction of its own, so that nothing has to be cleaned up in between: the pool's acquire
    and release (a task, a shield and a timeout each) cost about as much CPU as the statement itself, measured 75 µs against 30 µs.
    """

    KEPT_MAX = 4
    LEFT_MIN = 3
    """Connections of the pool that are never kept: the outbox relay's, and what timers borrow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kept_max = max(0, min(self.KEPT_MAX, pool.get_max_size() - self.LEFT_MIN))
        self._waiting = 0
        self._free: list[Any] = []

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        """The rows of a statement."""
        rows: list[Any] = await self._run("fetch", statement, arguments)
        return rows

    async def fetchrow(self, statement: str, *arguments: Any) -> Any:
        """The first row, or None."""
        rows = await self.fetch(statement, *arguments)
        return rows[0] if rows else None

    async def fetchval(self, statement: str, *arguments: Any) -> Any:
        """The first column of the first row, which must be there."""
        return (await self.fetch(statement, *arguments))[0][0]

    async def execute(self, statement: str, *arguments: Any) -> str:
        """A statement without rows; its command tag, such as ``UPDATE 1``."""
        return str(await self._run("execute", statement, arguments))

    async def close(self) -> None:
        """Gives the connections back."""
        while self._free:
            await self._pool.release(self._free.pop())

    async def _run(self, method: str, statement: str, arguments: Sequence[Any]) -> Any:
        connection = await self._take()
        try:
            answer = await getattr(connection, method)(statement, *arguments)
        except BaseException as error:
            await self._after_error(connection, error)
            raise
        await self._give(connection)
        return answer

    async def _take(self) -> Any:
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed():
                return connection
            await self._pool.release(connection)
        self._waiting += 1
        try:
            return await self._pool.acquire()
        finally:
            self._waiting -= 1

    async def _give(self, connection: Any) -> None:
        if not self._waiting and len(self._free) < self._kept_max:  # who waits, waits at the pool
            self._free.append(connection)
        else:
            await self._pool.release(connection)

    async def _after_error(self, connection: Any, error: BaseException) -> None:
        if isinstance(error, asyncpg.PostgresError) and not connection.is_closed():
            await self._give(connection)  # the server refused the statement; the connection is fine
        else:
            await self._pool.release(connection)


async def _with_backoff(attempt: Callable[[], Awaitable[Result]], wait_s: float) -> Result:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    tries = 0
    while True:
        try:
            return await attempt()
        except _REFUSALS as error:
            raise NotPermitted(f"PostgreSQL refuses the connection: {error}; check DUCAT_DATABASE_URL") from error
        except CONNECT_ERRORS as error:
            delay = CONNECT_BACKOFF_S[min(tries, len(CONNECT_BACKOFF_S) - 1)]
            tries += 1
            if loop.time() + delay > deadline:
                raise Unavailable(
                    f"PostgreSQL does not answer after {tries} tries in {wait_s:g} s ({type(error).__name__}: {error});"
                    " check DUCAT_DATABASE_URL and that the server is up"
                ) from error
            if tries in (3, 8) or tries % 20 == 0:
                _log.warning("waiting for PostgreSQL", tries=tries, error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(delay)


async def _reset(connection: Any) -> None:
    """What the pool does when a connection comes back, beside a ROLLBACK of a forgotten transaction: nothing on the wire.

    asyncpg's own reset (UNLISTEN, CLOSE ALL, RESET ALL, advisory unlock) costs a round trip each time. Rooms never use session state on
    pooled connections: session locks and LISTEN live on connections of `connect`.
    """
