"""Empties the read model, so that the projectors fill it again from the logs (`ducat wallet rebuild`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from kernel.errors import Unavailable
from runtime.bus import RetryLater
from runtime.postgres import Pool, connect
from wallet_core.adapters.patience import answered_within
from wallet_core.adapters.read_model import REBUILD_CHANNEL, reset_postgres, reset_valkey
from wallet_core.service.projector import Projector

__all__ = ["ReadModelReset", "follow_resets"]

POSTGRES_TIMEOUT_S = 10.0
VALKEY_TIMEOUT_S = 300.0
"""Every key is removed; Valkey does some hundred thousand a second."""
LOOK_S = 30.0
"""How often it is asked whether the connection that listens still is one."""
LOOK_TIMEOUT_S = 5.0


class ReadModelReset:
    """Both stores, all shards: a striped account's balance in Valkey is a sum over the shards of all processes."""

    def __init__(self, pool: Pool, valkey: Redis, shards: Sequence[int], projector: Projector) -> None:
        self._pool, self._valkey, self._shards, self._projector = pool, valkey, tuple(shards), projector

    async def reset(self) -> int:
        """Valkey first: the projectors, told by PostgreSQL, then find both empty. How many Valkey keys there were. Raises Unavailable where
        a store does not answer; doing it again is harmless.
        """
        try:
            count = await answered_within(VALKEY_TIMEOUT_S, reset_valkey(self._valkey))
        except (RedisError, OSError, RetryLater) as error:
            raise _unavailable("Valkey", error) from error
        try:
            await answered_within(POSTGRES_TIMEOUT_S, reset_postgres(self._pool, self._shards))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise _unavailable("PostgreSQL", error) from error
        self._projector.reload(is_empty=True)  # the other processes are told by PostgreSQL
        return count


def _unavailable(store: str, error: Exception) -> Unavailable:
    return Unavailable(
        f"the read model in {store} could not be emptied ({type(error).__name__}: {error}); run it again",
        metadata={"dependency": store.lower()},
    )


async def follow_resets(dsn: str, projector: Projector) -> None:
    """Tells the projector when the read model was emptied by any process, and after each connection, for one may have been missed.
    Runs until the database does not answer, and raises then."""
    lost = asyncio.Event()
    connection = await connect(dsn, "wallet", application_name="ducat-wallet-rebuild")
    try:
        connection.add_termination_listener(lambda _: lost.set())
        await connection.add_listener(REBUILD_CHANNEL, lambda *_: projector.reload(is_empty=True))
        projector.reload()
        while not lost.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await lost.wait()
            except TimeoutError:
                await connection.execute("SELECT 1", timeout=LOOK_TIMEOUT_S)
        raise ConnectionError("PostgreSQL closed the connection that listens for resets")
    finally:
        connection.terminate()
