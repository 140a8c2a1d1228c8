"""The shard host without threads and disks: real engines, frames in memory. One call is one frame, durable
at once."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence

from ducat.wallet.v1 import wallet_pb2
from kernel.clock import FixedClock
from kernel.errors import FailedPrecondition, FieldViolation, InvalidArgument
from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import AccountFlags, AccountResult, TransferResult
from wallet_core.service.history import ArchivedFrame, VerifyProgress
from wallet_core.service.port import (
    SLOT_COUNT,
    AccountRow,
    AccountState,
    EventPage,
    NamedAccount,
    ShardLink,
    ShardStatus,
    SnapshotInfo,
    TransferItem,
    TransferRow,
    slot_of,
)
from wallet_core.shard.port import RowsResult, ShardPosition

ZERO = bytes(16)


class MemoryHost:
    """`owned`: the shards that it has; all by default. Counts what it is asked in `transfer_row_count`."""

    def __init__(
        self,
        clock: FixedClock,
        shard_count: int = 2,
        owned: Sequence[int] | None = None,
        id_window_ms: int = 7 * 86_400_000,
    ) -> None:
        self.clock = clock
        self.shard_count = shard_count
        self.shard_ids = tuple(range(shard_count) if owned is None else owned)
        self.engines = {shard: Engine(shard, id_window_ms=id_window_ms) for shard in self.shard_ids}
        self.digests: dict[int, list[bytes]] = {shard: [] for shard in self.shard_ids}
        self.log: dict[int, list[ArchivedFrame]] = {shard: [] for shard in self.shard_ids}
        self.transfer_row_count = 0
        self.account_call_count = 0
        self.fail_next: Exception | None = None
        self._moved = asyncio.Event()

    def shard_of(self, key: bytes) -> int:
        return slot_of(key) * self.shard_count // SLOT_COUNT

    def _log(self, shard: int, events: bytes) -> None:
        engine = self.engines[shard]
        count = len(events) // 48
        if count:
            first = engine.status().sequence - count + 1
            self.log[shard].append(ArchivedFrame(first, count, engine.status().now_ns, events))
            self.digests[shard].append(engine.state_digest())
            self._moved.set()
            self._moved = asyncio.Event()

    async def transfers(self, rows: Sequence[TransferRow]) -> bytes:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.transfer_row_count += len(rows)
        results = bytearray(len(rows))
        by_shard: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_shard.setdefault(self._route(row), []).append(place)
        for shard, places in by_shard.items():
            if shard not in self.engines:
                for place in places:
                    results[place] = TransferResult.WRONG_SHARD
                continue
            some = [rows[place] for place in places]
            count = len(some)
            found, events = self.engines[shard].transfers(
                b"".join(row.id for row in some),
                b"".join(row.debit_id for row in some),
                b"".join(row.credit_id for row in some),
                struct.pack(f"<{count}q", *(row.amount_minor for row in some)),
                self.clock.now_ns(),
                flags=struct.pack(f"<{count}H", *(row.flags for row in some)),
                pending_ids=b"".join(row.pending_id for row in some),
                timeouts_s=struct.pack(f"<{count}I", *(row.timeout_s for row in some)),
                codes=struct.pack(f"<{count}H", *(row.code for row in some)),
            )
            self._log(shard, events)
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return bytes(results)

    def transfer_call(self, message: bytes) -> None:
        return None  # every row is looked at

    async def account_message(self, message: bytes) -> None:
        return None

    async def read_message(self, message: bytes) -> None:
        return None

    async def transfer_rows(self, rows: Sequence[TransferRow]) -> RowsResult:
        codes = await self.transfers(rows)
        positions = ((shard, engine.status().sequence) for shard, engine in self.engines.items())
        return RowsResult(codes, tuple(ShardPosition(*position) for position in positions), 0)

    def _route(self, row: TransferRow) -> int:
        for account in (row.debit_id, row.credit_id):
            if account != ZERO and not self._is_striped(account):
                return self.shard_of(account)
        return self.shard_of(row.id)

    def _is_striped(self, account: bytes) -> bool:
        view = next(iter(self.engines.values())).account(account)
        return view is not None and bool(view.flags & AccountFlags.STRIPED)

    async def transfer_batch(self, message: bytes, *, wrapped: bool = False) -> bytes:
        if wrapped:
            batch = wallet_pb2.SubmitTransfersRequest.FromString(message).batch
        else:
            batch = wallet_pb2.TransferBatch.FromString(message)
        rows, left = divmod(len(batch.ids), 16)
        for field, size, width in (
            ("ids", len(batch.ids), 16),
            ("debit_account_ids", len(batch.debit_account_ids), 16),
            ("credit_account_ids", len(batch.credit_account_ids), 16),
            ("amounts_minor", len(batch.amounts_minor), 1),
        ):
            if size != width * rows or left:
                text = f"expected {width * rows} bytes, got {size}"
                raise InvalidArgument(
                    f"{field}: {text}",
                    violations=[FieldViolation(field, text)],
                    reason="BATCH_INVALID",
                    metadata={"field": field},
                )
        results = await self.transfers([_row_at(batch, row) for row in range(rows)])
        failed = [row for row, result in enumerate(results) if result != 1]
        result = wallet_pb2.TransferBatchResult(
            batch_id=batch.batch_id,
            row_count=rows,
            failed_rows=failed,
            failed_results=bytes(results[row] for row in failed),
            positions=[
                wallet_pb2.ShardPosition(shard=shard, sequence_number=engine.status().sequence)
                for shard, engine in self.engines.items()
            ],
        )
        if wrapped:
            return wallet_pb2.SubmitTransfersResponse(result=result).SerializeToString()
        return result.SerializeToString()

    async def create_accounts(self, rows: Sequence[AccountRow], *, update: bool = False) -> bytes:
        self.account_call_count += 1
        results = bytearray()
        for row in rows:
            home = self.shard_of(row.id)
            shards = self.shard_ids if row.flags & AccountFlags.STRIPED else (home,)
            result = int(AccountResult.WRONG_SHARD)
            for shard in shards:
                if shard not in self.engines:
                    continue
                now = self.clock.now_ns()
                fields = {
                    "flags": struct.pack("<H", row.flags),
                    "overdraft_limits": struct.pack("<q", row.overdraft_limit),
                    "balance_limits": struct.pack("<q", row.balance_limit),
                }
                engine = self.engines[shard]
                if update:
                    found, events = engine.update_accounts(row.id, now, **fields)
                else:
                    currency = row.currency.encode().ljust(4, b"\0")[:4]
                    found, events = engine.open_accounts(row.id, currency, now, **fields)
                result = found[0]
                self._log(shard, events)
            results.append(result)
        return bytes(results)

    async def accounts(self, ids: Sequence[bytes]) -> list[AccountState | None]:
        return [self._account(account) for account in ids]

    def accounts_here(self, ids: Sequence[bytes]) -> list[bytes]:
        return [one for one in ids if self.shard_of(one) in self.engines or self._is_striped(one)]

    def _account(self, account: bytes) -> AccountState | None:
        parts = [view for engine in self.engines.values() if (view := engine.account(account)) is not None]
        if not parts:
            if self.shard_of(account) not in self.engines:
                raise FailedPrecondition("not ours", reason="WRONG_SHARD")
            return None
        first = parts[0]
        return AccountState(
            account,
            first.currency,
            sum(part.balance for part in parts),
            sum(part.held_out for part in parts),
            sum(part.held_in for part in parts),
            first.overdraft_limit,
            first.balance_limit,
            first.flags,
        )

    def account_keys(self, shard: int, ordinals: Sequence[int]) -> list[tuple[bytes, str]]:
        views = [self.engines[shard].account_by_ordinal(ordinal) for ordinal in ordinals]
        return [(view.id, view.currency) for view in views]

    def shards(self) -> list[ShardStatus]:
        return [
            ShardStatus(
                shard, "serving", 1, status.sequence, status.sequence, 0, engine.state_digest(), status.account_count, 0
            )
            for shard, engine in self.engines.items()
            if (status := engine.status())
        ]

    def links(self, shard: int) -> list[ShardLink]:
        engine = self.engines[shard]
        peers = [peer for peer in range(self.shard_count) if peer != shard]
        return [ShardLink(peer, *reversed(engine.sent(peer)), engine.cursor(peer), "") for peer in peers]

    def durable_sequence(self, shard: int) -> int:
        return int(self.engines[shard].status().sequence)

    async def wait_durable(self, shard: int, above: int, timeout_s: float) -> int:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.durable_sequence(shard) <= above:
                    await self._moved.wait()
        return self.durable_sequence(shard)

    def read_events(self, shard: int, from_sequence: int, limit: int) -> list[EventPage]:
        pages: list[EventPage] = []
        total = 0
        for frame in self.log[shard]:
            if frame.first_sequence + frame.count <= from_sequence:
                continue
            if total >= limit:
                break
            pages.append(EventPage(frame.first_sequence, frame.count, frame.timestamp_ns, frame.body))
            total += frame.count
        return pages

    def first_sequence(self, shard: int) -> int:
        return 1

    async def snapshot(self, shard: int) -> SnapshotInfo:
        raise NotImplementedError

    def snapshots(self, shard: int) -> list[SnapshotInfo]:
        return []

    def totals(self) -> dict[str, int]:
        """Σ balances + in flight of each currency over all shards."""
        sums: dict[str, int] = {}
        for engine in self.engines.values():
            for currency, total in engine.currency_totals().items():
                sums[currency] = sums.get(currency, 0) + total.balance + total.in_flight
        return sums

    # Archive

    def state(self, shard: int, upto_sequence: int, upto_time_ns: int) -> tuple[Engine, int]:
        return Engine(shard), 0

    def verify(self, shard: int, end: int, note: Callable[[int], bool]) -> VerifyProgress:
        engine, at = Engine(shard), 0
        for frame, digest in zip(self.log[shard], self.digests[shard], strict=True):
            engine.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
            at = frame.first_sequence + frame.count - 1
            if engine.state_digest() != digest:
                return VerifyProgress(at, end, done=True, problem=f"after event {at} the digests differ")
            note(at)
        return VerifyProgress(at, end, done=True, ok=at == end)

    def frames(self, shard: int, after: int, upto: int) -> Iterator[ArchivedFrame]:
        for frame in self.log[shard]:
            if frame.first_sequence + frame.count - 1 > after and frame.first_sequence <= upto:
                yield frame


def _row_at(batch: wallet_pb2.TransferBatch, row: int) -> TransferRow:
    at = slice(16 * row, 16 * row + 16)
    return TransferRow(
        batch.ids[at],
        batch.debit_account_ids[at],
        batch.credit_account_ids[at],
        batch.amounts_minor[row],
        int.from_bytes(batch.flags[2 * row : 2 * row + 2], "little"),
        batch.pending_ids[at] or ZERO,
        batch.timeouts_s[row] if batch.timeouts_s else 0,
        int.from_bytes(batch.codes[2 * row : 2 * row + 2], "little"),
    )


class MemoryDirectory:
    """Names in a dictionary."""

    def __init__(self) -> None:
        self.entries: dict[bytes, NamedAccount] = {}
        self.add_count = 0

    async def add(self, accounts: Sequence[NamedAccount]) -> None:
        self.add_count += 1
        for account in accounts:
            self.entries.setdefault(account.id, account)

    async def names(self, ids: Sequence[bytes]) -> dict[bytes, str]:
        return {key: self.entries[key].name for key in ids if key in self.entries}

    async def page(self, prefix: str, after: str, limit: int) -> list[NamedAccount]:
        found = sorted((entry for entry in self.entries.values()), key=lambda entry: entry.name)
        return [entry for entry in found if entry.name.startswith(prefix) and entry.name > after][:limit]


class NoReadModel:
    """Has nothing, and is at the beginning."""

    async def by_id(self, ids: Sequence[bytes]) -> list[TransferItem]:
        return []

    async def of_account(
        self, account_id: bytes, before: tuple[int, int, int] | None, limit: int
    ) -> list[TransferItem]:
        return []

    def problem(self, shard: int) -> str:
        return ""

    def projected(self, shard: int) -> int:
        return 0

    async def wait(self, shard: int, sequence: int, timeout_s: float) -> bool:
        return sequence == 0
