"""`ducat wallet rebuild`: empties the read model, so that the projector fills it again from the logs."""

from __future__ import annotations

from redis.asyncio import Redis

from runtime.postgres import connect
from runtime.settings import Settings
from wallet_core.adapters.read_model import reset_postgres, reset_valkey

__all__ = ["reset_read_model"]


async def reset_read_model(settings: Settings) -> int:
    """Valkey first: the projector, told by PostgreSQL, then finds both empty. Returns how many Valkey keys
    there were."""
    client = Redis.from_url(settings.redis_url)
    try:
        count = await reset_valkey(client)
    finally:
        await client.aclose()
    connection = await connect(settings.database_url, "wallet")
    try:
        await reset_postgres(connection, range(settings.wallet_shard_count))
    finally:
        await connection.close()
    return count
