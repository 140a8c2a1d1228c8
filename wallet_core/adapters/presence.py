"""What PostgreSQL knows of the shards (`wallet.shard`): who they are, and how far each was durable once.

    start   known_shards    → `WalletHost.open(known=…)` refuses what is missing, foreign or behind, before anything is served
            adopt           a shard that is new here, or of the version before identities, gets its row
    runs    Presence.keep   each second at most, only what has moved; Presence.along in the transactions that write the inbox, so that
                            an inbox row never refers to an event beyond what the row of its shard says
    stop    Presence.close  once more
    mend    rebind          go on with a log that ends earlier: everything that is derived from the log goes back to its end, and the
                            messages that were applied after it are forgotten, so that the feed brings them again

What PostgreSQL has acknowledged is kept beside the log too, a little later (SEEN_LAG_S): one that knows less at a start was restored to an
older state (wallet_core/shard/identity.py).

Numbers here only ever grow, but for `rebind`. Valkey is no witness: it is a read model that may be lost, or older, at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import structlog

from runtime.feed import rewind
from wallet_core.adapters.bus import CONSUMER, TOPIC
from wallet_core.engine.codes import EventKind, TransferResult
from wallet_core.shard.identity import KnownShard, ShardForeign, write_seen

if TYPE_CHECKING:
    from runtime.postgres import Connection, Pool
    from wallet_core.shard import WalletHost

__all__ = [
    "REBIND_MARGIN",
    "Lacking",
    "Presence",
    "Rebound",
    "adopt",
    "known_shards",
    "lacking",
    "lost_transfers",
    "note_seen",
    "other_wallets",
    "rebind",
]

NOTE_INTERVAL_S = 1.0
NOTE_TIMEOUT_S = 5.0
SEEN_LAG_S = 10.0
"""How much later what PostgreSQL has seen is written beside the log: more than a server without synchronous commits loses in a crash."""
WARN_INTERVAL_S = 60.0
REBIND_MARGIN = timedelta(minutes=10)
"""Messages recorded so long before the log's last event are applied again too: the machine's clock and the database's may differ, and
shards keep their own time across steps of a clock (docs/wallet.md, The machine's clock)."""
REBIND_TIMEOUT_S = 3600.0

_log = structlog.get_logger("wallet.presence")

_KNOWN = """
SELECT shard, coalesce(shard.identity::text, '') AS identity,
       greatest(coalesce(shard.sequence_number, 0), coalesce(projection.sequence_number, 0)) AS sequence_number
FROM wallet.shard FULL JOIN wallet.projection USING (shard)
"""
_NOTE = """
INSERT INTO wallet.shard AS kept (shard, identity, sequence_number)
SELECT * FROM unnest($1::smallint[], $2::uuid[], $3::bigint[]) AS one (shard, identity, sequence_number) ORDER BY shard
ON CONFLICT (shard) DO UPDATE SET sequence_number = EXCLUDED.sequence_number, update_time = now()
WHERE kept.identity = EXCLUDED.identity AND kept.sequence_number < EXCLUDED.sequence_number
"""
_IDENTITIES = "SELECT shard, identity::text FROM wallet.shard WHERE shard = ANY($1::smallint[])"
_SEEN = "SELECT sequence_number FROM wallet.shard WHERE shard = $1 FOR UPDATE"
_REBIND = """
INSERT INTO wallet.shard AS kept (shard, identity, sequence_number) VALUES ($1, $2, $3)
ON CONFLICT (shard) DO UPDATE SET identity = EXCLUDED.identity, sequence_number = EXCLUDED.sequence_number, update_time = now()
"""
_DROP_TRANSFERS = "DELETE FROM wallet.transfer WHERE shard = $1 AND sequence_number > $2"
_LOWER_PROJECTION = """
UPDATE wallet.projection SET sequence_number = $2, update_time = now() WHERE shard = $1 AND sequence_number > $2
"""
_LOST = """
SELECT sequence_number, transfer_id, debit_account_id, credit_account_id, amount_minor, kind, result, code, time_ns
FROM wallet.transfer WHERE shard = $1 AND sequence_number > $2 ORDER BY sequence_number
"""
_COUNT_TRANSFERS = "SELECT count(*) FROM wallet.transfer WHERE shard = $1 AND sequence_number > $2"
_COUNT_MESSAGES = "SELECT count(*) FROM wallet.inbox WHERE consumer = $1 AND create_time >= $2"
_WALLETS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'ducat-wallet' AND pid <> pg_backend_pid()
"""
_HAS_TABLE = "SELECT to_regclass($1) IS NOT NULL"
_IN_SCHEMA = "SELECT set_config('search_path', 'wallet', true)"


class Lacking(NamedTuple):
    """What PostgreSQL knows of a shard that is not in its log: the last event that was seen (None: it has never heard of the shard),
    rows of the read model behind the log's end, and messages that `rebind` would have applied again."""

    seen_sequence: int | None
    transfers: int
    messages: int


class Rebound(NamedTuple):
    """What `rebind` did: the last event that was seen before, rows of the read model that went with the log's end, and messages that
    will be applied again."""

    seen_sequence: int
    transfers: int
    messages: int


async def known_shards(pool: Pool | Connection) -> dict[int, KnownShard]:
    """Every shard that the database has heard of."""
    return {row["shard"]: KnownShard(row["identity"], row["sequence_number"]) for row in await pool.fetch(_KNOWN)}


async def note_seen(connection: Connection | Pool, positions: Sequence[tuple[int, str, int]]) -> None:
    """(shard, identity, durable sequence number) of shards of this process. A row with another identity, or a higher number, stays."""
    if positions:
        shards, identities, sequences = zip(*sorted(positions), strict=True)
        await connection.execute(_NOTE, list(shards), [UUID(one) for one in identities], list(sequences))


async def adopt(pool: Pool, positions: Sequence[tuple[int, str, int]]) -> None:
    """`note_seen` for shards that were just opened, before anything is served. Raises ShardForeign where another process has made the
    same shard meanwhile."""
    await note_seen(pool, positions)
    found = dict(await pool.fetch(_IDENTITIES, [shard for shard, _, _ in positions]))
    for shard, identity, _ in positions:
        if found[shard] != identity:
            raise ShardForeign(
                f"shard {shard}: it was opened here with the identity {identity}, PostgreSQL expects {found[shard]}: another process has "
                f"made this shard at the same time. One process owns a shard; correct DUCAT_WALLET_SHARDS"
            )


class Presence:
    """Notes how far the shards of this process are durable. `identities`: shard → identity; `folders`: shard → its folder."""

    def __init__(
        self, host: WalletHost, pool: Pool, identities: Mapping[int, str], folders: Mapping[int, Path] | None = None
    ) -> None:
        self._host, self._pool, self._identities = host, pool, dict(identities)
        self._folders = dict(folders or {})
        self._seen: dict[int, int] = {}
        self._settling: dict[int, int] = {}
        self._settle_s = 0.0
        self._noted: dict[int, int] = {}
        self._warned = -WARN_INTERVAL_S

    def positions(self) -> list[tuple[int, str, int]]:
        """(shard, identity, durable sequence number) of each shard, as of now."""
        return [(shard, self._identities[shard], self._host.durable_sequence(shard)) for shard in self._host.shard_ids]

    async def along(self, connection: Connection) -> None:
        """For a transaction that records messages as applied: whatever they did is durable below what is noted here."""
        await note_seen(connection, self._moved())

    async def keep(self) -> None:
        """Notes what has moved, each second at most, until cancelled. The database may be away: the shards go on."""
        while True:
            await asyncio.sleep(NOTE_INTERVAL_S)
            await self._note()
            now_s = asyncio.get_running_loop().time()
            if now_s - self._settle_s >= SEEN_LAG_S:
                settled, self._settling, self._settle_s = self._settling, dict(self._noted), now_s
                await self._keep_seen(settled)

    async def close(self) -> None:
        """The last word before the shards close."""
        await self._note()
        await self._keep_seen(self._noted)

    async def _keep_seen(self, settled: Mapping[int, int]) -> None:
        for shard, sequence in settled.items():
            if sequence > self._seen.get(shard, 0) and shard in self._folders:
                try:
                    await asyncio.to_thread(write_seen, self._folders[shard], self._identities[shard], sequence)
                except OSError as error:
                    _log.warning("what PostgreSQL has seen cannot be kept", shard=shard, error=str(error))
                else:
                    self._seen[shard] = sequence

    async def _note(self) -> None:
        moved = self._moved()
        if not moved:
            return
        try:
            async with asyncio.timeout(NOTE_TIMEOUT_S):
                await note_seen(self._pool, moved)
        except Exception as error:
            now = asyncio.get_running_loop().time()
            if now - self._warned >= WARN_INTERVAL_S:
                self._warned = now
                _log.warning("how far the shards are cannot be noted", error=f"{type(error).__name__}: {error}")
        else:
            self._noted.update((shard, sequence) for shard, _, sequence in moved)

    def _moved(self) -> list[tuple[int, str, int]]:
        return [one for one in self.positions() if one[2] > self._noted.get(one[0], -1)]


async def other_wallets(connection: Connection) -> int:
    """Connections of wallet processes to this database."""
    found: int = await connection.fetchval(_WALLETS)
    return found


async def lost_transfers(connection: Connection, shard: int, after: int) -> AsyncIterator[dict[str, Any]]:
    """What the read model has of a shard behind event `after`: what `rebind` removes from it."""
    async with connection.transaction():
        async for row in connection.cursor(_LOST, shard, after):
            yield {
                "shard": shard,
                **{name: value.hex() if isinstance(value, bytes) else value for name, value in row.items()},
                "kind": EventKind(row["kind"]).name.lower(),
                "result": TransferResult(row["result"]).name,
            }


async def lacking(connection: Connection, shard: int, *, sequence: int, time_ns: int) -> Lacking:
    """What is known here of a shard and not in its log, which ends with event `sequence`, of the time `time_ns`. Changes nothing."""
    known = (await known_shards(connection)).get(shard)
    transfers: int = await connection.fetchval(_COUNT_TRANSFERS, shard, sequence)
    seen = known.sequence if known is not None else None
    messages = 0
    if ((seen or 0) > sequence or transfers) and await connection.fetchval(_HAS_TABLE, "wallet.feed_cursor"):
        messages = await connection.fetchval(_COUNT_MESSAGES, CONSUMER, _since(time_ns), timeout=REBIND_TIMEOUT_S)
    return Lacking(seen, transfers, messages)


async def rebind(connection: Connection, shard: int, *, identity: str, sequence: int, time_ns: int) -> Rebound:
    """Go on with a shard's log that ends with event `sequence`, of the time `time_ns` (0: an empty one), under a new identity.

    In one transaction: the row of the shard, the read model's rows and cursor go back to the log's end; where events were lost, the
    messages that the wallet recorded since shortly before that time are forgotten (`runtime.feed.rewind`), so that they are applied
    again. Transfer ids are derived, so those that the log has already change nothing. No process of the wallet may run meanwhile
    (`other_wallets`): they share the inbox and the cursors. Transfers that came over gRPC are not brought back by anything.
    """
    async with connection.transaction():
        seen: int = await connection.fetchval(_SEEN, shard) or 0
        dropped = _count(await connection.execute(_DROP_TRANSFERS, shard, sequence, timeout=REBIND_TIMEOUT_S))
        lowered = _count(await connection.execute(_LOWER_PROJECTION, shard, sequence))
        await connection.execute(_REBIND, shard, UUID(identity), sequence)
        forgotten = 0
        if (seen > sequence or lowered or dropped) and await connection.fetchval(_HAS_TABLE, "wallet.feed_cursor"):
            await connection.execute(_IN_SCHEMA)
            forgotten = await rewind(connection, topic=TOPIC, consumer=CONSUMER, time=_since(time_ns))
    return Rebound(seen, dropped, forgotten)


def _since(time_ns: int) -> datetime:
    """From when on the wallet's messages may be missing in a log that ends at `time_ns`."""
    if not time_ns:
        return datetime(1970, 1, 1, tzinfo=UTC)
    return datetime.fromtimestamp(time_ns // 10**9, UTC) - REBIND_MARGIN


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])
