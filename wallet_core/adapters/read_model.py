"""The two stores of the read model: past transfers in PostgreSQL, balances and recent transfers in Valkey.

PostgreSQL `wallet.transfer`, cursor in `wallet.projection`, one statement for both.

Valkey, one script for all of it, so that a batch is there or not:

    wallet:resetting                token of who empties all of this; nothing is written while it is there
    wallet:{shard}:cursor           number of the last event
    wallet:{shard}:holds            hash: sequence number of a HoldPlaced → its amount, while it is open
    wallet:balance:<account id>     hash: balance, held_out, held_in, currency; shards add to it, so a striped
                                    account is a sum; "overflow" from where a sum left 64 bits
    wallet:recent:<account id>      list, newest first: JSON [kind, transfer id, amount, other account, shard,
                                    sequence, time_ns]
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from kernel.errors import FailedPrecondition
from runtime.bus import RetryLater
from runtime.postgres import Pool
from wallet_core.adapters.patience import Patience, answered_within
from wallet_core.adapters.snapshot_base import SnapshotBase
from wallet_core.engine.codes import EventKind
from wallet_core.projection import Changes
from wallet_core.service.port import TransferItem
from wallet_core.service.projector import Projector

__all__ = ["PostgresStore", "ReadModelReader", "ValkeyStore", "past_results", "reset_postgres", "reset_valkey"]

RECENT_COUNT_MAX = 20
"""Transfers that Valkey keeps of an account."""
REBUILD_CHANNEL = "wallet_rebuild"
REBASE_TIMEOUT_S = 3600
STORE_TIMEOUT_S = 40.0
"""How long the projector waits for a store; above what the drivers take by themselves."""
RESET_TAKEOVER_S = 10.0
"""After so long a reset that somebody else began and did not end is done here."""
POSTGRESQL = "PostgreSQL"
_SENT = int(EventKind.MONEY_SENT)

_CURSOR = "SELECT sequence_number FROM wallet.projection WHERE shard = $1"
_FIRST = "INSERT INTO wallet.projection (shard) VALUES ($1) ON CONFLICT DO NOTHING"
_DROP = "DELETE FROM wallet.transfer WHERE shard = $1 AND sequence_number >= $2"
_SET = "UPDATE wallet.projection SET sequence_number = $2, update_time = now() WHERE shard = $1"
_APPLY = """
WITH moved AS (
    UPDATE wallet.projection SET sequence_number = $3, update_time = now()
    WHERE shard = $1 AND sequence_number = $2 RETURNING shard
), stored AS (
    INSERT INTO wallet.transfer (shard, sequence_number, transfer_id, debit_account_id, credit_account_id,
                                 amount_minor, kind, result, code, time_ns)
    SELECT moved.shard, row.*
    FROM moved, unnest($4::bigint[], $5::bytea[], $6::bytea[], $7::bytea[], $8::bigint[],
                       $9::smallint[], $10::smallint[], $11::integer[], $12::bigint[]) AS row
)
SELECT count(*) FROM moved
"""
_COLUMNS = (
    "shard, sequence_number, transfer_id, debit_account_id, credit_account_id, amount_minor, kind, result, code, "
    "time_ns"
)
_WITHIN_A_SHARD = [
    int(kind)
    for kind in (
        EventKind.MONEY_MOVED,
        EventKind.HOLD_PLACED,
        EventKind.HOLD_POSTED,
        EventKind.HOLD_VOIDED,
        EventKind.TRANSFER_REFUSED,
    )
]
"""Of a transfer between shards one event does not say what became of it."""
_RESULTS = "SELECT transfer_id, result FROM wallet.transfer WHERE transfer_id = ANY($1::bytea[]) AND kind = ANY($2::smallint[])"
_BY_ID = f"""
SELECT {_COLUMNS} FROM wallet.transfer WHERE transfer_id = ANY($1::bytea[]) ORDER BY time_ns, shard, sequence_number
"""  # noqa: S608 - constants
_OF_ACCOUNT = f"""
(SELECT {_COLUMNS} FROM wallet.transfer
 WHERE debit_account_id = $1 AND (time_ns, shard, sequence_number) < ($2, $3, $4)
 ORDER BY time_ns DESC, shard DESC, sequence_number DESC LIMIT $5)
UNION ALL
(SELECT {_COLUMNS} FROM wallet.transfer
 WHERE credit_account_id = $1 AND kind <> {_SENT} AND (time_ns, shard, sequence_number) < ($2, $3, $4)
 ORDER BY time_ns DESC, shard DESC, sequence_number DESC LIMIT $5)
ORDER BY time_ns DESC, shard DESC, sequence_number DESC LIMIT $5
"""  # noqa: S608 - constants
_END = (2**63 - 1, 2**15 - 1, 2**63 - 1)


def past_results(pool: Pool) -> Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, int]]]:
    """Results of transfers within a shard, by id: those that the read model has. Raises Unavailable."""
    patience = Patience("the read model (PostgreSQL)")

    async def read(ids: Sequence[bytes]) -> Mapping[bytes, int]:
        return dict(await patience.answer(pool.fetch(_RESULTS, list(ids), _WITHIN_A_SHARD)))

    return read


class PostgresStore:
    """Every transfer, for statements."""

    name = POSTGRESQL

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def cursor(self, shard: int) -> int:
        """The number of the last event that the store has."""
        found = await answered_within(STORE_TIMEOUT_S, self._pool.fetchval(_CURSOR, shard))
        if found is None:
            await answered_within(STORE_TIMEOUT_S, self._pool.execute(_FIRST, shard))
        return found or 0

    async def rebase(self, shard: int, oldest: int) -> int:
        """Keeps the rows before event `oldest`, which the log no longer has, drops the others, and goes on
        from there."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(_DROP, shard, oldest, timeout=REBASE_TIMEOUT_S)
            await connection.execute(_SET, shard, oldest - 1)
        return oldest - 1

    async def apply(self, changes: Changes) -> bool:
        """Writes rows and cursor in one statement. False where the cursor is not at `changes.after`."""
        columns: Sequence[Any] = [list(column) for column in zip(*changes.items, strict=True)] or [[]] * 9
        statement = self._pool.fetchval(_APPLY, changes.shard, changes.after, changes.upto, *columns)
        return bool(await answered_within(STORE_TIMEOUT_S, statement))


_APPLY_SCRIPT = """
local cursor, holds = KEYS[1], KEYS[2]
if redis.call('EXISTS', KEYS[3]) == 1 then return -1 end
if (redis.call('GET', cursor) or '0') ~= ARGV[1] then return 0 end
local i = 4
local function take() i = i + 1; return ARGV[i - 1] end
local function add(key, field, delta)
  if type(redis.pcall('HINCRBY', key, field, delta)) == 'table' then redis.call('HSET', key, field, 'overflow') end
end
for _ = 1, take() do
  local key = 'wallet:balance:' .. take()
  redis.call('HSET', key, 'currency', take())
end
for _ = 1, take() do
  local key = 'wallet:balance:' .. take()
  for _, field in ipairs({'balance', 'held_out', 'held_in'}) do
    local delta = take()
    if delta ~= '0' then add(key, field, delta) end
  end
end
for _ = 1, take() do
  local sequence = take()
  redis.call('HSET', holds, sequence, take())
end
for _ = 1, take() do
  local sequence, debit, credit = take(), take(), take()
  local amount = redis.call('HGET', holds, sequence)
  if amount then
    add('wallet:balance:' .. debit, 'held_out', '-' .. amount)
    add('wallet:balance:' .. credit, 'held_in', '-' .. amount)
    redis.call('HDEL', holds, sequence)
  end
end
for _ = 1, take() do
  local key = 'wallet:recent:' .. take()
  for _ = 1, take() do redis.call('LPUSH', key, take()) end
  redis.call('LTRIM', key, 0, ARGV[3] - 1)
end
redis.call('SET', cursor, ARGV[2])
return 1
"""


# Only whoever holds the token removes anything, so two at a time, or one that comes late, do no harm.
_REMOVE_SCRIPT = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #KEYS do redis.call('UNLINK', KEYS[i]) end
if ARGV[2] == 'end' then redis.call('DEL', KEYS[1]) end
return 1
"""
_RESETTING = "wallet:resetting"
_REMOVE_COUNT = 1000


class ValkeyStore:
    """Balances and recent transfers, for quick looks. Everything in one script, so a batch is there once or
    not."""

    name = "Valkey"

    def __init__(
        self,
        client: Redis,
        find_base: Callable[[int, int | None], SnapshotBase | None],
        *,
        recent_count_max: int = RECENT_COUNT_MAX,
    ) -> None:
        """`find_base(shard, sequence)`: the newest snapshot, or the one of an event; blocks on the disk."""
        self._client = client
        self._script = client.register_script(_APPLY_SCRIPT)
        self._find_base = find_base
        self._recent = recent_count_max
        self._refused_since_s = 0.0

    async def cursor(self, shard: int) -> int:
        """The number of the last event that the store has; 0 while a snapshot is being loaded into it."""
        text = await self._cursor_text(shard)
        return 0 if "/" in text else int(text)

    async def _cursor_text(self, shard: int) -> str:
        """A number, or ``<sequence of the snapshot>/<steps that are in>`` while one is being loaded."""
        if await self._client.exists(_RESETTING):
            await self._wait_for_reset()
        self._refused_since_s = 0.0
        found = await self._client.get(f"wallet:{shard}:cursor")
        return found.decode() if isinstance(found, bytes) else found or "0"

    async def rebase(self, shard: int, oldest: int) -> int:
        """From nothing to a state from which the log can be followed: nothing where the log is whole, else a
        snapshot. Resumes a load that was cut off.
        """
        text = await self._cursor_text(shard)
        sequence, loading, steps_done = text.partition("/")
        if not loading:
            if text != "0":
                raise FailedPrecondition(
                    f"the read model in Valkey has shard {shard} up to event {text}, the log begins at {oldest}:"
                    " run `ducat wallet rebuild`"
                )
            if oldest == 1:
                return 0
        base = await asyncio.to_thread(self._find_base, shard, int(sequence) if loading else None)
        if base is None or base.sequence + 1 < oldest:
            raise FailedPrecondition(
                f"the log of shard {shard} begins at event {oldest} and no snapshot reaches it:"
                " restore older segments, or run `ducat wallet rebuild` after `ducat wallet snapshot`"
            )
        steps = base.steps()
        number = 0
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            number += 1
            if loading and number <= int(steps_done):
                continue
            if not await self._write(step, text, f"{base.sequence}/{number}"):
                raise RetryLater(f"somebody else loads shard {shard} into Valkey")
            text = f"{base.sequence}/{number}"
        if not await self._write(Changes(shard, 0, 0), text, str(base.sequence)):
            raise RetryLater(f"somebody else loads shard {shard} into Valkey")
        return base.sequence

    async def apply(self, changes: Changes) -> bool:
        """Writes sums, holds, lists and cursor in one script. False where the cursor is not at
        `changes.after`."""
        return await self._write(changes, str(changes.after), str(changes.upto))

    async def _write(self, changes: Changes, expected: str, following: str) -> bool:
        shard = changes.shard
        arguments: list[Any] = [expected, following, self._recent]
        arguments.append(len(changes.opened))
        for account, currency in changes.opened.items():
            arguments += (account.hex(), currency)
        arguments.append(len(changes.balances))
        for account, sums in changes.balances.items():
            arguments += (account.hex(), *sums)
        arguments.append(len(changes.placed))
        for placed in changes.placed:
            arguments += placed
        arguments.append(len(changes.ended))
        for sequence, debit, credit in changes.ended:
            arguments += (sequence, debit.hex(), credit.hex())
        recent = self._recent_of(changes)
        arguments.append(len(recent))
        for account, lines in recent.items():
            arguments += (account.hex(), len(lines), *lines)
        keys = [f"wallet:{shard}:cursor", f"wallet:{shard}:holds", _RESETTING]
        return bool(await self._script(keys=keys, args=arguments) == 1)

    async def _wait_for_reset(self) -> None:
        """Raises RetryLater while somebody empties Valkey; ends it where they seem to have died."""
        now_s = asyncio.get_running_loop().time()
        self._refused_since_s = self._refused_since_s or now_s
        if now_s - self._refused_since_s < RESET_TAKEOVER_S:
            raise RetryLater("the read model in Valkey is being emptied")
        await reset_valkey(self._client)

    def _recent_of(self, changes: Changes) -> dict[bytes, list[str]]:
        """The newest entries of each account that a batch touches, oldest first."""
        recent: dict[bytes, list[str]] = {}
        for sequence, transfer, debit, credit, amount, kind, _, _, time_ns in reversed(changes.items):
            if debit is None or credit is None:
                continue
            for account, other, signed in ((debit, credit, -amount), (credit, debit, amount)):
                lines = recent.setdefault(account, [])
                if len(lines) < self._recent and not (kind == _SENT and account == credit):
                    lines.append(
                        f'[{kind},"{transfer.hex()}",{signed},"{other.hex()}",{changes.shard},{sequence},{time_ns}]'
                    )
        return {account: lines[::-1] for account, lines in recent.items() if lines}


class ReadModelReader:
    """Reads past transfers from PostgreSQL, and waits for the projector (the ReadModel port). Raises Unavailable, soon, while PostgreSQL
    does not answer; a Valkey that does not answer keeps no reader waiting."""

    def __init__(self, pool: Pool, projector: Projector) -> None:
        self._pool = pool
        self._projector = projector
        self._patience = Patience("the read model (PostgreSQL)")

    async def by_id(self, ids: Sequence[bytes]) -> list[TransferItem]:
        """Everything that is recorded under these transfer ids, in the order of time."""
        rows = await self._patience.answer(self._pool.fetch(_BY_ID, list(ids)))
        return [_item(row) for row in rows]

    async def of_account(
        self, account_id: bytes, before: tuple[int, int, int] | None, limit: int
    ) -> list[TransferItem]:
        """Transfers of an account, newest first, that come before the key (time_ns, shard, sequence)."""
        rows = await self._patience.answer(self._pool.fetch(_OF_ACCOUNT, account_id, *(before or _END), limit))
        return [_item(row) for row in rows]

    def projected(self, shard: int) -> int:
        """The number of the last event that the read model has."""
        return self._projector.projected(shard)

    def problem(self, shard: int) -> str:
        """What keeps the read model from following a shard; empty where nothing does."""
        return self._projector.problem(shard)

    async def wait(self, shard: int, sequence: int, timeout_s: float) -> bool:
        """Whether the read model has that event, at the latest after `timeout_s`."""
        return await self._projector.wait(shard, sequence, timeout_s, POSTGRESQL)


def _item(row: Any) -> TransferItem:
    shard, sequence, transfer, debit, credit, amount, kind, result, code, time_ns = row
    return TransferItem(shard, sequence, transfer, debit or b"", credit or b"", amount, kind, result, code, time_ns)


async def reset_postgres(pool: Pool, shards: Sequence[int]) -> None:
    """Sets the cursors of these shards back to the beginning, and tells every running wallet. The projector
    itself drops the rows that the logs still have, and keeps older ones.
    """
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "UPDATE wallet.projection SET sequence_number = 0 WHERE shard = ANY($1::smallint[])", list(shards)
        )
        await connection.execute("SELECT pg_notify($1, '')", REBUILD_CHANNEL)


async def reset_valkey(client: Redis) -> int:
    """Removes every key of the read model; how many there were. All shards: their balances are sums over shards. No projector writes
    meanwhile, or a sum could lose what was added to it. Raises RetryLater where somebody else began after this one.
    """
    token = secrets.token_hex(16)
    remove = client.register_script(_REMOVE_SCRIPT)
    await client.set(_RESETTING, token)
    count = 0
    batch: list[bytes] = []

    async def flush(*, end: bool = False) -> None:
        if not await remove(keys=[_RESETTING, *batch], args=[token, "end" if end else ""]):
            raise RetryLater("somebody else empties the read model in Valkey")
        batch.clear()

    async for key in client.scan_iter(match="wallet:*", count=_REMOVE_COUNT):
        if key != _RESETTING.encode():
            batch.append(key)
            count += 1
        if len(batch) >= _REMOVE_COUNT:
            await flush()
    await flush(end=True)
    return count
