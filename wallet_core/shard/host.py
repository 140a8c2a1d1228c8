"""The asyncio face of a process's shards: awaitables, bounded back-pressure, one native batch per loop
iteration.

Transfers that are submitted in one iteration of the event loop travel to the shards as one batch, so that
many single transfers share a frame and a sync. A caller that is cancelled does not stop its transfers: they
were sent; sending them again with the same ids tells what became of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kernel.errors import (
    DucatError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    OutOfRange,
    Unavailable,
)
from wallet_core.engine.codes import AccountFlags, AccountResult, TransferFlags, TransferResult
from wallet_core.event_log import DiskNearlyFull, LogGap, LogTail, delete_segments_below, segments
from wallet_core.service.chain_rules import MARKS, RESERVED, ChainMark
from wallet_core.shard._host import AccountsRead, ShardClock, ShardHost
from wallet_core.shard.identity import KnownShard
from wallet_core.shard.port import (
    MESSAGE_BYTES_MAX,
    ROWS_MAX,
    AccountRow,
    AccountsResult,
    AccountState,
    BatchInvalid,
    CurrencyTotals,
    EventPage,
    HostBusy,
    HostClosed,
    ReadResult,
    RowsResult,
    ShardHostConfig,
    ShardLink,
    ShardStatus,
    SnapshotInfo,
    TransferRow,
    shard_folder,
    unpack_holds,
)
from wallet_core.shard.recovery import Progress, open_host
from wallet_core.snapshot import SnapshotDamaged, SnapshotWriter, delete_older, read_header, snapshot_files

__all__ = ["WalletHost"]

_SPEC_BYTES, _ID_FIELD_BYTES = 20, 18  # least of a row of account_message, of read_message
_TAILS_KEPT = 32  # open positions in logs, for readers that come back for more
_LINKED = int(TransferFlags.LINKED)
_STRIPED = int(AccountFlags.STRIPED)
RunChain = Callable[
    [Sequence[TransferRow], Sequence[tuple[int, int]]], Coroutine[Any, Any, tuple[bytes, Sequence[tuple[int, int]]]]
]
_Steps = list[tuple[Sequence[TransferRow], "asyncio.Future[RowsResult]"]]
_CALLS_SEEN = 16  # the last so many single calls …
_CALLS_WITHIN_S = 0.016  # … within this time, and not one after the other, are a crowd
_BESIDE_MIN = 0.2
_GATHER_S = 0.001
_GATHER_S_MAX = 0.005
_GATHER_ROWS_MAX = 1024
_SNAPSHOT_LOOK_S = 1.0
_SNAPSHOT_BUSY_FACTOR = 4
_SNAPSHOT_RETRY_S = 60.0  # after one that failed: most often the disk is full


class WalletHost:
    """The shards of this process (satisfies `wallet_core.service.port.Host`). Create with `await
    WalletHost.open(config)` and use from that event loop. `on_failure(error)` is called once when a shard is
    poisoned: nothing will be acknowledged any more, the process must stop."""

    def __init__(self, native: ShardHost, config: ShardHostConfig) -> None:
        self._native, self._config = native, config
        self._loop = asyncio.get_running_loop()
        self._ticket = 0
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._callers: dict[int, list[asyncio.Future[bytes]]] = {}  # of requests that carry many calls
        self._called_rows = 0  # gathered and not submitted, as the native side counts them
        self._called_look = (0, 0.0)
        self._gathered: list[tuple[Sequence[TransferRow], asyncio.Future[RowsResult]]] = []
        self._gathered_rows = 0
        self._steps: dict[int, _Steps] = {}  # of chains across shards, by shard
        self._calls: deque[float] = deque(maxlen=_CALLS_SEEN)  # when the last single calls came
        self._calls_again = False  # a timer is set
        self._calls_beside = 0.0  # the share of them that found others not answered yet, the last ones count most
        self._turn: deque[asyncio.Future[None]] = deque()
        self._striping: set[asyncio.Future[Any]] = set()  # striped accounts that are being opened
        self._durable_waiters: list[tuple[int, int, asyncio.Future[int]]] = []
        self._tails: dict[tuple[int, int], LogTail] = {}
        self._tails_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="wallet-image")
        self._snapshot_locks = {shard: asyncio.Lock() for shard in native.shard_ids}
        self._snapshot_sequences = {one.shard: one.snapshot_sequence for one in native.shards()}
        self._snapshots_task: asyncio.Task[None] | None = None
        self._closed = False
        self._failure: Exception | None = None
        self.on_failure: Callable[[Exception], None] | None = None
        self.on_snapshot_failure: Callable[[int, Exception], None] | None = None  # of one that was taken by itself
        self.on_outbound: Callable[[list[Any]], None] | None = None  # takes what `native.outbound` gives, for the relay
        self.on_rewound: Callable[[int, ShardLink], None] | None = None  # a shard was restored from an old copy
        self._rewound_seen = 0
        self._rewound_told: dict[tuple[int, int], str] = {}
        self.on_chain: RunChain | None = None  # coordinates chains across shards; None: they are refused
        self._reserved: set[bytes] = set()  # accounts that only coordinators open, update and name
        self._chain_tasks: set[asyncio.Task[None]] = set()
        self.retain: Callable[[int], int] | None = None  # shard → last event that readers of its log are done with

    @classmethod
    async def open(
        cls,
        config: ShardHostConfig,
        *,
        clock: ShardClock | None = None,
        progress: Callable[[Progress], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        known: Mapping[int, KnownShard] | None = None,
    ) -> WalletHost:
        """Recover all shards (in threads; `progress` is called there) and start. `known`: see `open_host`."""
        native = await asyncio.get_running_loop().run_in_executor(
            None, lambda: open_host(config, clock=clock, progress=progress, known=known)
        )
        host = cls(native, config)
        host.on_failure = on_failure
        host.start()
        return host

    def start(self) -> None:
        """Start the shards' threads and listen for completions."""
        self._native.start()
        self._loop.add_reader(self._native.fileno(), self._drain)
        if self._config.snapshot_events:
            self._snapshots_task = self._loop.create_task(self._take_snapshots(self._config.snapshot_events))

    async def close(self) -> None:
        """Refuse new work, wait for what is under way, sync, stop the threads."""
        if self._closed:
            return
        self._flush()  # what was taken is sent
        self._submit_calls()
        self._closed = True
        if self._snapshots_task is not None:
            self._snapshots_task.cancel()
        _refuse(self._turn, _unavailable("the wallet is shutting down"))
        under_way = [*self._futures.values(), *chain.from_iterable(self._callers.values())]
        if under_way and not self._native.failed:
            await asyncio.wait(under_way, timeout=10)
        self._native.stop_images()
        await self._loop.run_in_executor(None, self._threads.shutdown)
        self._loop.remove_reader(self._native.fileno())
        await self._loop.run_in_executor(None, self._native.close)
        self._give_up(_unavailable("the wallet was shut down; send again with the same ids"))

    @property
    def native(self) -> ShardHost:
        """The pipeline beneath (status, tests, the relay)."""
        return self._native

    @property
    def config(self) -> ShardHostConfig:
        """What the host was opened with."""
        return self._config

    @property
    def shard_count(self) -> int:
        """Shards of the whole system."""
        return self._native.shard_count

    @property
    def shard_ids(self) -> tuple[int, ...]:
        """Shards of this process, ascending."""
        return tuple(sorted(self._native.shard_ids))

    # ---- transfers and accounts ----

    async def transfer_batch(self, message: bytes | memoryview, *, wrapped: bool = False) -> bytes:
        """A serialized TransferBatch in, a serialized TransferBatchResult out, once everything in it is
        durable (and settled, unless the message says DURABLE). wrapped: SubmitTransfersRequest and -Response
        around them. Raises InvalidArgument BATCH_INVALID, Unavailable SHARD_READ_ONLY."""
        if len(message) > MESSAGE_BYTES_MAX:  # before it waits for its turn, and is kept meanwhile
            raise _mapped(BatchInvalid("message", f"{len(message)} bytes, at most {MESSAGE_BYTES_MAX} are allowed"))
        rows = len(message) // 56 + 1  # an upper bound: a row has at least 56 bytes
        if self._must_wait(min(rows, ROWS_MAX), len(message)):
            await self._wait_turn(min(rows, ROWS_MAX), len(message))
        while self._striping:
            await asyncio.wait(self._striping)
        future = self._future()
        try:
            self._native.submit_message(self._ticket, message, wrapped=wrapped)
        except Exception as error:
            raise self._forget(error) from None
        if self._native.has_chains:
            self._run_chains()
        result: bytes = await future
        return result

    async def transfers(self, rows: Sequence[TransferRow]) -> bytes:
        """One TransferResult byte a row (at most 8,190 rows). Linked chains stay whole. Raises
        InvalidArgument BATCH_INVALID."""
        return (await self.transfer_rows(rows)).codes

    async def transfer_rows(self, rows: Sequence[TransferRow]) -> RowsResult:
        """As `transfers`, with the positions in the shards' logs that include the rows."""
        count = len(rows)
        if self._must_wait(count, 128 * count):
            await self._wait_turn(count, 128 * count)
        while self._striping:
            await asyncio.wait(self._striping)
        if count == 0 or count > 256 or any(row[4:5] and row[4] & _LINKED for row in rows):
            # an open chain must not reach into somebody else's rows, and nobody else waits for one that crosses shards
            return await self._submit_rows(rows)
        if self._gathered_rows + count > ROWS_MAX:
            self._flush()
        if not self._gathered:
            self._schedule_flush(self._flush)
        self._came(self._loop.time())
        future: asyncio.Future[RowsResult] = self._loop.create_future()
        self._gathered.append((rows, future))
        self._gathered_rows += count
        return await future

    def transfer_call(self, message: bytes) -> asyncio.Future[bytes] | None:
        """A serialized CreateTransfersRequest in, a serialized CreateTransfersResponse out: the short way for up to 256 plain
        rows, without an object a row. None where it is not for that: a row is linked or malformed, the answer need not wait
        for sagas, there is no room, a striped account is being opened, or the host is stopping."""
        if (
            self._failure is not None
            or self._closed
            or self._striping
            or self._must_wait(len(message) // 32, 4 * len(message))
        ):
            return None
        future: asyncio.Future[bytes] = self._loop.create_future()
        rows = self._native.gather_call(message, future)
        if not rows:
            return None
        now = self._loop.time()
        self._came(now)
        if not self._called_rows:
            self._called_look = (rows, now)
            self._schedule_flush(self._flush_calls)
        self._called_rows += rows
        return future

    def coordinate(self, on_chain: RunChain) -> None:
        """Chains across shards go to `on_chain(rows, routes)`, which gives one TransferResult byte a row and positions. From now on
        the accounts of `chain_rules.RESERVED` are the coordinators' own."""
        self.on_chain = on_chain
        self._reserved = set(RESERVED)
        self._native.coordinate(list(RESERVED))

    async def apply_step(self, shard: int, rows: Sequence[TransferRow]) -> RowsResult:
        """As `transfer_rows`, for a step of a chain across shards: rows of one shard, never set aside again, which may have the
        flag CHAIN. Never waits for room: the request that it belongs to holds some, and would hold it for ever. Steps of one
        iteration of the loop for the same shard share a batch; with those of another shard they would share its full disk."""
        if not rows or (rows[-1][4:5] and rows[-1][4] & _LINKED):  # it would reach into the next step of its batch
            raise _mapped(BatchInvalid("rows", "a step ends with a row that is not linked"))
        while self._striping:
            await asyncio.wait(self._striping)
        if sum(len(part) for part, _ in self._steps.get(shard, ())) + len(rows) > ROWS_MAX:
            self._flush_steps()
        if not self._steps:
            self._loop.call_soon(self._flush_steps)
        future: asyncio.Future[RowsResult] = self._loop.create_future()
        self._steps.setdefault(shard, []).append((rows, future))
        return await future

    def _flush_steps(self) -> None:
        by_shard, self._steps = self._steps, {}
        for steps in by_shard.values():
            self._submit_steps(steps)

    def _submit_steps(self, steps: _Steps) -> None:
        try:
            done = self._future(closing=True)
            self._native.submit_rows(self._ticket, [row for rows, _ in steps for row in rows], chain_steps=True)
        except BatchInvalid as error:
            mapped = self._forget(error)
            if len(steps) == 1:
                _refuse((one for _, one in steps), mapped)
            else:
                for step in steps:  # only the chain whose step is wrong hears of it
                    self._submit_steps([step])
        except Exception as error:
            _refuse((one for _, one in steps), self._forget(error))
        else:
            done.add_done_callback(lambda done: _share(done, steps))

    async def chain_marks(self, shard: int) -> list[ChainMark]:
        """Every mark of a chain across shards with the holds that it stands for; decisions have none."""
        found: list[ChainMark] = []
        at = 0
        while True:
            future = self._future()
            try:
                self._native.submit_chain_holds(self._ticket, shard, MARKS, at)
            except Exception as error:
                raise self._forget(error) from None
            at, holds = unpack_holds(await future)
            waiting: list[tuple[bytes, bytes, bytes]] = []
            for id_, debit_id, credit_id, amount in holds:
                if debit_id == MARKS:
                    found.append(ChainMark(shard, id_, tuple(waiting), len(waiting) == amount - 1))
                    waiting = []
                else:
                    waiting.append((id_, debit_id, credit_id))
            if at == 0:
                return found

    async def cut(self, shard: int) -> bytes:
        """A shard's sums and its links to the others after one event, durable: for `port.unpack_cut`. Scans all accounts."""
        future = self._future()
        try:
            self._native.submit_cut(self._ticket, shard)
        except Exception as error:
            raise self._forget(error) from None
        packed: bytes = await future
        return packed

    async def create_accounts(self, rows: Sequence[AccountRow], *, update: bool = False, always: bool = False) -> bytes:
        """One AccountResult byte a row; a striped account is opened on every shard of this process. Until that is done nobody
        knows where its transfers go, so whatever comes meanwhile waits: its id would be remembered on the wrong shard.
        always: from a coordinator of chains, without waiting for room, as `apply_step`; what it opens is reserved for it. Of
        others, rows that name a reserved account are ID_INVALID."""
        if self._reserved and not always and any(row[0] in self._reserved for row in rows):
            return await self._create_others(rows, update=update)
        if not always:
            await self._wait_for_room(len(rows))
        await self._after_what_came()
        future = self._future()
        try:
            self._native.submit_accounts(self._ticket, rows, update=update, always=always)
        except Exception as error:
            raise self._forget(error) from None
        if self._native.shard_count > 1 and not update and any(row[2:3] and row[2] & _STRIPED for row in rows):
            self._striping.add(future)
            future.add_done_callback(self._striping.discard)
        result: AccountsResult = await asyncio.shield(future)
        if always and self._reserved:
            self._reserve([row[0] for row, code in zip(rows, result.codes, strict=True) if code == AccountResult.OK])
        return result.codes

    async def _create_others(self, rows: Sequence[AccountRow], *, update: bool) -> bytes:
        others = [row for row in rows if row[0] not in self._reserved]
        codes = iter(await self.create_accounts(others, update=update) if others else b"")
        return bytes(AccountResult.ID_INVALID if row[0] in self._reserved else next(codes) for row in rows)

    def _reserve(self, ids: Sequence[bytes]) -> None:
        new = [one for one in ids if one not in self._reserved]
        self._reserved.update(new)
        self._native.reserve(new)

    async def account_message(self, message: bytes) -> bytes | None:
        """A serialized CreateAccountsRequest in, a serialized CreateAccountsResponse out: `create_accounts` without an object a
        row. None where it is not for that: a row has a name or no id, is striped or malformed."""
        await self._wait_for_room(min(len(message) // _SPEC_BYTES + 1, ROWS_MAX))
        await self._after_what_came()
        result: bytes | None = await self._message(self._native.submit_account_message, message)
        return result

    async def read_message(self, message: bytes) -> AccountsRead | None:
        """The accounts of a serialized GetAccountsRequest. None where it has anything but ids, or one of another process."""
        await self._wait_for_room(min(len(message) // _ID_FIELD_BYTES + 1, ROWS_MAX))
        result: AccountsRead | None = await self._message(self._native.submit_read_message, message)
        return result

    async def _wait_for_room(self, account_count: int) -> None:
        if self._must_wait(account_count, 64 * account_count):
            await self._wait_turn(account_count, 64 * account_count)

    async def _after_what_came(self) -> None:
        """What came before is submitted before, and striped accounts that are being opened are open."""
        while self._striping:
            await asyncio.wait(self._striping)
        self._flush()
        self._submit_calls()
        self._flush_steps()

    async def _message(self, submit: Callable[[int, bytes], bool], message: bytes) -> Any:
        """What the shards answer; None where they do not take it."""
        future = self._future()
        try:
            is_taken = submit(self._ticket, message)
        except Exception as error:
            raise self._forget(error) from None
        if not is_taken:
            del self._futures[self._ticket]
            return None
        return await future

    async def accounts(self, ids: Sequence[bytes], *, always: bool = False) -> list[AccountState | None]:
        """Accounts as they durably stand, None where there is none. Raises FailedPrecondition WRONG_SHARD. always: without
        waiting for room, as `apply_step`."""
        return list((await self.read_accounts(ids, always=always)).accounts)

    async def read_accounts(self, ids: Sequence[bytes], *, always: bool = False) -> ReadResult:
        """As `accounts`, with the positions that were seen. Any number of ids."""
        found: list[AccountState | None] = []
        positions: dict[int, Any] = {}
        for at in range(0, len(ids), ROWS_MAX):
            part = ids[at : at + ROWS_MAX]
            self._owned(part)
            if not always:
                await self._wait_for_room(len(part))
            future = self._future()
            try:
                self._native.submit_read(self._ticket, part, always=always)
            except Exception as error:
                raise self._forget(error) from None
            result: ReadResult = await future
            found += result.accounts
            positions.update((position.shard, position) for position in result.positions)
        return ReadResult(tuple(found), tuple(positions.values()))

    def accounts_here(self, ids: Sequence[bytes]) -> list[bytes]:
        """Those that `accounts` does not refuse: of this process's slots, or striped."""
        if len(self.shard_ids) == self.shard_count:
            return list(ids)
        return [id_ for id_ in ids if self._native.foreign_shard((id_,)) < 0]

    async def transfer_results(self, ids: Sequence[bytes]) -> bytes:
        """What became of transfers, as far as the shards here remember: one TransferResult byte an id, 0 =
        not remembered."""
        codes = b""
        for at in range(0, len(ids), ROWS_MAX):
            future = self._future()
            try:
                self._native.submit_results(self._ticket, ids[at : at + ROWS_MAX])
            except Exception as error:
                raise self._forget(error) from None
            codes += await future
        return codes

    async def totals(self) -> list[CurrencyTotals]:
        """Sums by currency over the shards of this process. Scans all accounts."""
        future = self._future()
        try:
            self._native.submit_totals(self._ticket)
        except Exception as error:
            raise self._forget(error) from None
        result: list[CurrencyTotals] = await future
        return result

    async def check_digests(self) -> dict[int, bool]:
        """Recompute every shard's state digest from its accounts."""
        future = self._future()
        try:
            self._native.submit_check(self._ticket)
        except Exception as error:
            raise self._forget(error) from None
        result: dict[int, bool] = await future
        return result

    def account_keys(self, shard: int, ordinals: Sequence[int]) -> list[tuple[bytes, str]]:
        """(id, currency) of accounts by their ordinals on a shard. Raises LookupError."""
        return self._native.account_keys(shard, ordinals)

    # ---- status, events ----

    def shards(self) -> list[ShardStatus]:
        """Where each shard stands."""
        return list(self._native.shards())

    def links(self, shard: int) -> list[ShardLink]:
        """How a shard stands with every other shard of the system."""
        return self._native.links(shard)

    def durable_sequence(self, shard: int) -> int:
        """The number of the last durable event of a shard."""
        return self._native.durable_sequence(shard)

    async def wait_durable(self, shard: int, above: int, timeout_s: float) -> int:
        """The durable sequence number once it is above `above`, or as it is after `timeout_s`. Raises Unavailable once a
        shard has failed: there will be no more."""
        now = self._native.durable_sequence(shard)
        if now > above or timeout_s <= 0:
            return now
        if self._failure is not None:
            raise _mapped(self._failure)
        future: asyncio.Future[int] = self._loop.create_future()
        entry = (shard, above, future)
        self._durable_waiters.append(entry)
        self._native.watch(True)
        self._loop.call_soon(self._drain)  # it may have moved before the watch began
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return self._native.durable_sequence(shard)
        finally:
            if entry in self._durable_waiters:
                self._durable_waiters.remove(entry)
            if not self._durable_waiters:
                self._native.watch(False)

    def read_events(self, shard: int, from_sequence: int, limit: int) -> list[EventPage]:
        """Durable events from `from_sequence` on, whole frames (the first one cut at from_sequence) until
        `limit` events are reached. Blocks on the disk: call it in a thread. Raises OutOfRange
        SEQUENCE_OUT_OF_RANGE."""
        durable = self._native.durable_sequence(shard)
        with self._tails_lock:
            tail = self._tails.pop((shard, from_sequence), None)
        if tail is None:
            tail = LogTail(self._log_folder(shard), shard, from_sequence)
        pages: list[EventPage] = []
        total = 0
        following = from_sequence
        try:
            while total < limit:
                frames = tail.poll(durable, 1)
                if not frames:
                    break
                frame = frames[0]
                skip = max(0, from_sequence - frame.first_sequence)
                record = len(frame.body) // frame.count
                pages.append(
                    EventPage(
                        frame.first_sequence + skip, frame.count - skip, frame.timestamp_ns, frame.body[skip * record :]
                    )
                )
                total += frame.count - skip
                following = frame.last_sequence + 1
        except LogGap as error:
            raise OutOfRange(str(error), reason="SEQUENCE_OUT_OF_RANGE") from None
        with self._tails_lock:
            self._tails[(shard, following)] = tail
            while len(self._tails) > _TAILS_KEPT:
                del self._tails[next(iter(self._tails))]
        return pages

    def first_sequence(self, shard: int) -> int:
        """The number of the oldest event that the log still has."""
        return segments(self._log_folder(shard))[0]

    # ---- snapshots ----

    async def snapshot(self, shard: int) -> SnapshotInfo:
        """Write a snapshot beside the running shard, then let go of snapshots and segments that are no
        longer needed."""
        async with self._snapshot_locks[shard]:
            taken = await self._loop.run_in_executor(self._threads, self._write_snapshot, shard)
            self._snapshot_sequences[shard] = taken.sequence
            return taken

    async def _take_snapshots(self, events: int) -> None:
        """So that the log, and the replay after a start, stay bounded: a snapshot of a shard `events` events after its last
        one, one shard at a time. It costs commits some of the disk, so it waits for a moment when nothing is under way,
        until there are four times as many events; and it is done at most a tenth of the time."""
        pause_s = _SNAPSHOT_LOOK_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = _SNAPSHOT_LOOK_S
            behind, shard = max(
                (self._native.durable_sequence(one) - self._snapshot_sequences[one], one) for one in self.shard_ids
            )
            busy = self._native.rows_in_flight > 0
            if behind < (_SNAPSHOT_BUSY_FACTOR * events if busy else events) or self._failure is not None:
                continue
            began = self._loop.time()
            try:
                await self.snapshot(shard)
            except Exception as error:
                if self._closed or self._failure is not None:
                    return
                pause_s = _SNAPSHOT_RETRY_S
                if self.on_snapshot_failure is not None:
                    self.on_snapshot_failure(shard, error)
            else:
                pause_s = max(pause_s, 9 * (self._loop.time() - began))

    def snapshots(self, shard: int) -> list[SnapshotInfo]:
        """Snapshots on disk, newest first; those whose header does not read back are left out."""
        found = []
        for one in snapshot_files(self._snapshot_folder(shard)):
            try:
                found.append(_info(one.path))
            except SnapshotDamaged:
                continue
        return found

    def _write_snapshot(self, shard: int) -> SnapshotInfo:
        folder = self._snapshot_folder(shard)
        writer = SnapshotWriter(folder, shard, reserve_bytes=self._config.reserve_bytes)
        try:
            self._native.image(shard, writer)
        except BaseException:
            writer.abandon()
            raise
        oldest = delete_older(folder, self._config.snapshots_kept)
        if oldest and self.retain is not None:
            oldest = min(oldest, self.retain(shard))
        if oldest and not self._config.keep_history:
            delete_segments_below(self._log_folder(shard), oldest)
        return replace(_info(snapshot_files(folder)[0].path), writer=self._native.writer_times(shard))

    # ---- inside ----

    def _log_folder(self, shard: int) -> Path:
        return shard_folder(self._config.data_dir, shard) / "log"

    def _snapshot_folder(self, shard: int) -> Path:
        return shard_folder(self._config.data_dir, shard) / "snapshots"

    def _owned(self, ids: Sequence[bytes]) -> None:
        try:
            foreign = self._native.foreign_shard(ids)
        except BatchInvalid as error:
            raise _mapped(error) from None
        if foreign >= 0:
            raise FailedPrecondition(
                f"an account lives on shard {foreign}, this process owns {list(self.shard_ids)}; ask ListShards",
                reason="WRONG_SHARD",
                metadata={"shard": str(foreign)},
            )

    def _future(self, *, closing: bool = False) -> asyncio.Future[Any]:
        """Of the next ticket. A refused one has a ticket too: `_forget` must not take somebody else's. closing: what began
        before the host was closed may go on."""
        self._ticket += 1
        if self._failure is not None:
            raise _mapped(self._failure)
        if self._closed and not closing:
            raise _unavailable("the wallet is shutting down")
        future = self._futures[self._ticket] = self._loop.create_future()
        return future

    def _forget(self, error: Exception) -> DucatError:
        """The last ticket was refused."""
        self._futures.pop(self._ticket, None)
        return _mapped(error)

    def _must_wait(self, rows: int, size: int) -> bool:
        native = self._native
        held = native.rows_in_flight
        return bool(self._turn) or (
            (
                held + self._gathered_rows + self._called_rows + rows > native.rows_in_flight_max
                or native.bytes_in_flight + size > native.bytes_in_flight_max
            )
            and held > 0
        )

    async def _wait_turn(self, rows: int, size: int) -> None:
        """First come, first served, until there is room."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._turn.append(waiter)
        try:
            while True:
                await waiter
                native = self._native
                if native.rows_in_flight == 0 or (
                    native.rows_in_flight + self._gathered_rows + self._called_rows + rows <= native.rows_in_flight_max
                    and native.bytes_in_flight + size <= native.bytes_in_flight_max
                ):
                    return
                fresh: asyncio.Future[None] = self._loop.create_future()
                self._turn[self._turn.index(waiter)] = fresh
                waiter = fresh
        finally:
            if waiter in self._turn:
                self._turn.remove(waiter)
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        if self._turn and not self._turn[0].done():
            native = self._native
            if (
                native.rows_in_flight < native.rows_in_flight_max
                and native.bytes_in_flight < native.bytes_in_flight_max
            ):
                self._turn[0].set_result(None)

    def _schedule_flush(self, flush: Callable[[], None]) -> None:
        """At once; but where calls crowd, a little later, so that more of them share a frame, a sync and a wake-up of three
        threads."""
        calls = self._calls
        if (
            self._calls_beside > _BESIDE_MIN
            and len(calls) == _CALLS_SEEN
            and self._loop.time() - calls[0] <= _CALLS_WITHIN_S
        ):
            self._loop.call_later(_GATHER_S, flush)
        else:
            self._loop.call_soon(flush)

    def _came(self, now: float) -> None:
        """A single call has come."""
        self._calls.append(now)
        beside = bool(self._called_rows or self._gathered_rows or self._callers)
        self._calls_beside += (beside - self._calls_beside) / _CALLS_SEEN

    def _flush_calls(self) -> None:
        """Gathered calls become one native batch, once a turn of the loop (in a crowd: a millisecond) has brought no further
        one, or they have waited long enough."""
        rows = self._called_rows
        seen, since = self._called_look
        if not rows:
            return
        if seen < rows < _GATHER_ROWS_MAX and self._loop.time() - since < _GATHER_S_MAX:
            self._called_look = (rows, since)
            self._schedule_flush(self._flush_calls)
            return
        self._submit_calls()

    def _submit_calls(self) -> None:
        if not self._called_rows:
            return
        if self._striping:
            self._submit_calls_later()
            return
        self._ticket += 1
        try:
            self._callers[self._ticket] = self._native.submit_calls(self._ticket)
        except HostBusy:
            self._submit_calls_later()
            return
        except Exception as error:
            _refuse(self._native.drop_calls(), _mapped(error))
        self._called_rows = 0

    def _submit_calls_later(self) -> None:
        """One timer, however many find that it cannot be done now."""
        if not self._calls_again:
            self._calls_again = True
            self._loop.call_later(0.001, self._submit_calls_again)

    def _submit_calls_again(self) -> None:
        self._calls_again = False
        self._submit_calls()

    def _flush(self) -> None:
        """Everything gathered in this iteration of the loop becomes one native batch."""
        gathered = self._gathered
        if not gathered:
            return
        self._gathered, self._gathered_rows = [], 0
        if len(gathered) == 1:
            self._submit_alone(*gathered[0])
            return
        rows = [row for part, _ in gathered for row in part]
        try:
            future = self._future()
            self._native.submit_rows(self._ticket, rows)
        except HostBusy:
            self._futures.pop(self._ticket, None)
            self._loop.call_later(0.001, self._again, gathered)
        except BatchInvalid:
            self._futures.pop(self._ticket, None)
            for part, one in gathered:  # only the caller whose row is wrong hears of it
                self._submit_alone(part, one)
        except Exception as error:
            _refuse((one for _, one in gathered), self._forget(error))
        else:
            future.add_done_callback(lambda done: _share(done, gathered))

    def _again(self, gathered: list[tuple[Sequence[TransferRow], asyncio.Future[RowsResult]]]) -> None:
        if self._striping:
            self._loop.call_later(0.001, self._again, gathered)
            return
        for part, one in gathered:
            self._gathered.append((part, one))
            self._gathered_rows += len(part)
            if self._gathered_rows > ROWS_MAX - 256:
                self._flush()
        self._flush()

    def _submit_alone(self, rows: Sequence[TransferRow], one: asyncio.Future[RowsResult]) -> None:
        if self._striping:
            self._loop.call_later(0.001, self._submit_alone, rows, one)
            return
        try:
            future = self._future()
            self._native.submit_rows(self._ticket, rows)
        except HostBusy:
            self._futures.pop(self._ticket, None)
            self._loop.call_later(0.001, self._submit_alone, rows, one)
        except Exception as error:
            _refuse((one,), self._forget(error))
        else:
            future.add_done_callback(lambda done: _share(done, [(rows, one)]))

    async def _submit_rows(self, rows: Sequence[TransferRow]) -> RowsResult:
        self._flush()  # what came before stays before
        self._submit_calls()
        future = self._future()
        try:
            self._native.submit_rows(self._ticket, rows)
        except Exception as error:
            raise self._forget(error) from None
        if self._native.has_chains:
            self._run_chains()
        result: RowsResult = await future
        return result

    def _drain(self) -> None:
        """The eventfd is readable: hand out what is done."""
        for ticket, result in self._native.completions():
            if (callers := self._callers.pop(ticket, None)) is not None:
                _answer(callers, result)
                continue
            future = self._futures.pop(ticket, None)
            if future is None or future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(_mapped(result))
            else:
                future.set_result(result)
        if self._native.has_chains:
            self._run_chains()
        if self._durable_waiters:
            for shard, above, waiting in self._durable_waiters:
                now = self._native.durable_sequence(shard)
                if now > above and not waiting.done():
                    waiting.set_result(now)
        if self._turn:
            self._next_turn()
        if self._native.rewound_count != self._rewound_seen and self.on_rewound is not None:
            self._tell_rewound(self.on_rewound)
        if self.on_outbound is not None and (deliveries := self._native.outbound()):
            self.on_outbound(deliveries)
        if self._native.failed and self._failure is None:
            self._fail(self._native.failure() or HostClosed("a shard stopped"))

    def _tell_rewound(self, on_rewound: Callable[[int, ShardLink], None]) -> None:
        """Each finding once."""
        self._rewound_seen = self._native.rewound_count
        for shard in self.shard_ids:
            for link in self._native.links(shard):
                if link.problem and self._rewound_told.get((shard, link.peer)) != link.problem:
                    self._rewound_told[shard, link.peer] = link.problem
                    on_rewound(shard, link)

    def _run_chains(self) -> None:
        """Chains across shards that the last batch had: the batch is answered when they are."""
        for token, first, rows, routes in self._native.chains():
            task = self._loop.create_task(self._run_chain(token, first, rows, routes))
            self._chain_tasks.add(task)
            task.add_done_callback(self._chain_tasks.discard)

    async def _run_chain(
        self, token: int, first: int, rows: Sequence[TransferRow], routes: Sequence[tuple[int, int]]
    ) -> None:
        codes = bytes([TransferResult.IN_FLIGHT]) * len(rows)
        positions: Sequence[tuple[int, int]] = ()
        try:
            assert self.on_chain is not None
            codes, positions = await self.on_chain(rows, routes)
        finally:
            self._native.finish_chain(token, first, codes, positions)

    def _fail(self, error: Exception) -> None:
        """Nothing that is under way will be acknowledged: its outcome is unknown until the restart."""
        self._failure, mapped = error, _mapped(error)
        self._give_up(mapped)
        _refuse((one for _, one in self._gathered), mapped)
        self._gathered, self._gathered_rows = [], 0
        _refuse(self._turn, mapped)
        _refuse((waiting for _, _, waiting in self._durable_waiters), mapped)
        if self.on_failure is not None:
            self.on_failure(error)

    def _give_up(self, error: DucatError) -> None:
        """Everything that is under way."""
        dropped = self._native.drop_calls()
        self._called_rows = 0
        _refuse((*self._futures.values(), *chain.from_iterable(self._callers.values()), *dropped), error)
        self._futures.clear()
        self._callers.clear()


def _refuse(futures: Iterable[asyncio.Future[Any]], error: Exception) -> None:
    """Everybody who still waits hears of the error."""
    for one in futures:
        if not one.done():
            one.set_exception(error)


def _answer(callers: Sequence[asyncio.Future[bytes]], result: list[bytes] | Exception) -> None:
    """Each caller of a request its own part."""
    if isinstance(result, Exception):
        _refuse(callers, _mapped(result))
        return
    for one, answer in zip(callers, result, strict=True):
        if not one.done():
            one.set_result(answer)


def _share(
    done: asyncio.Future[Any], gathered: Sequence[tuple[Sequence[TransferRow], asyncio.Future[RowsResult]]]
) -> None:
    """Cut one batch's result into its callers' parts."""
    error = done.exception()
    at = 0
    for rows, one in gathered:
        if not one.done():
            if error is not None:
                one.set_exception(error)
            else:
                result: RowsResult = done.result()
                one.set_result(RowsResult(result.codes[at : at + len(rows)], result.positions, 0))
        at += len(rows)


def _info(path: Path) -> SnapshotInfo:
    header = read_header(path)
    return SnapshotInfo(
        shard=header.shard,
        sequence=header.sequence,
        file_name=path.name,
        size_bytes=header.file_bytes,
        digest=header.digest,
        create_time_ns=header.create_time_ns,
    )


def _unavailable(message: str) -> Unavailable:
    return Unavailable(message, reason="UNAVAILABLE")


def _mapped(error: Exception) -> DucatError:
    """The one border between the shards' errors and those that callers see."""
    if isinstance(error, DucatError):
        return error
    if isinstance(error, BatchInvalid):
        return InvalidArgument(
            f"the batch is malformed: {error}",
            violations=[FieldViolation(error.field, error.reason)],
            reason="BATCH_INVALID",
        )
    if isinstance(error, DiskNearlyFull):
        return Unavailable(str(error), reason="SHARD_READ_ONLY")
    if isinstance(error, HostBusy):
        return Unavailable(str(error), reason="OVERLOADED")
    if isinstance(error, MemoryError | TypeError | ValueError):
        return Internal(f"{type(error).__name__}: {error}")
    return _unavailable(str(error))
