"""Words of the shard host: its configuration, what it answers, and what it refuses.

ShardHostError
├── BatchInvalid(field, reason)     the caller's columns do not fit together; nothing was applied
├── HostBusy                        the bound on rows or bytes under way is reached; wait for completions
├── HostClosed                      not started, closed, or stopped by a poisoned shard
├── ShardFailed(shard, reason)      an engine gave up; the process must stop and recover
├── RecoveryFailed(file, offset, sequence_number, reason)   snapshot and log do not give their state
└── (identity.py) ShardMissing, ShardForeign, ShardBehind, ShardsMismatch, DataFileDamaged(file, reason): the data folder is not the one
    that it should be; nothing is opened
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wallet_core.service.balance_check import Link, ShardCut
from wallet_core.service.port import (
    AccountRow,
    AccountState,
    EventPage,
    ShardLink,
    ShardStatus,
    SnapshotInfo,
    TransferRow,
    WriterTimes,
    slot_of,
)

if TYPE_CHECKING:
    from wallet_core.event_log.kafka import KafkaLogConfig  # the driver is loaded by who uses it

__all__ = [
    "MESSAGE_BYTES_MAX",
    "ROWS_MAX",
    "SLOT_COUNT",
    "AccountRow",
    "AccountState",
    "AccountsResult",
    "BatchInvalid",
    "CurrencyTotals",
    "EventPage",
    "HostBusy",
    "HostClosed",
    "ReadResult",
    "RecoveryFailed",
    "RowsResult",
    "ShardFailed",
    "ShardFigures",
    "ShardHostConfig",
    "ShardHostError",
    "ShardLink",
    "ShardPosition",
    "ShardStatus",
    "SnapshotInfo",
    "TransferRow",
    "WriterTimes",
    "default_shard_map",
    "shard_folder",
    "slot_of",
    "unpack_cut",
    "unpack_holds",
]

ROWS_MAX = 8190  # rows of one message: 8190 * 48 bytes of events stay below 384 KiB
MESSAGE_BYTES_MAX = 1 << 20  # of one serialized batch; all columns of 8,190 rows have 655,200
assert MESSAGE_BYTES_MAX > 80 * ROWS_MAX
SLOT_COUNT = 4096


class ShardHostError(Exception):
    """Anything the shard host refuses or fails at."""


class BatchInvalid(ShardHostError):
    """The batch as a whole is malformed. Nothing was applied."""

    def __init__(self, field_name: str, reason: str) -> None:
        super().__init__(f"{field_name}: {reason}")
        self.field, self.reason = field_name, reason


class HostBusy(ShardHostError):
    """Too many rows or bytes are under way. Take completions, then submit again."""


class HostClosed(ShardHostError):
    """The host takes no work."""


class ShardFailed(ShardHostError):
    """A shard's engine failed; its state is not to be trusted any more. The process must stop."""

    def __init__(self, shard: int, reason: str) -> None:
        super().__init__(f"shard {shard} failed: {reason}; restart to recover it from snapshot and log")
        self.shard, self.reason = shard, reason


class RecoveryFailed(ShardHostError):
    """The log, though undamaged, does not lead to the state that it says it leads to."""

    def __init__(self, file: str, offset: int, sequence_number: int, reason: str) -> None:
        super().__init__(f"{file} at byte {offset}, event {sequence_number}: {reason}")
        self.file, self.offset, self.sequence_number, self.reason = file, offset, sequence_number, reason


def default_shard_map(shard_count: int) -> list[int]:
    """Slot → shard, in equal contiguous ranges."""
    return [slot * shard_count // SLOT_COUNT for slot in range(SLOT_COUNT)]


def shard_folder(data_dir: Path, shard: int) -> Path:
    """Where one shard keeps its log and snapshots."""
    return data_dir / f"shard-{shard:04d}"


@dataclass(frozen=True, slots=True)
class ShardHostConfig:
    """One process's shards. `shard_ids` empty = all of `shard_count`."""

    data_dir: Path
    shard_count: int = 1
    shard_ids: tuple[int, ...] = ()
    shard_map: tuple[int, ...] = ()  # slot → shard; empty = equal ranges
    segment_bytes: int = 256 * 1024 * 1024
    reserve_bytes: int = 256 * 1024 * 1024
    kafka: KafkaLogConfig | None = None  # where frames become durable; None: in the local files
    sync: bool = True  # False only for measurements: without it nothing is durable
    direct_io: bool = True  # past the page cache where the file system can; False costs CPU
    id_window_ms: int = 7 * 24 * 3600 * 1000
    id_count_max: int = 1 << 26
    generation_ids: int = 1 << 20
    room_ids: int = 0  # a shard's memory for so many transfer ids is touched beforehand (30 bytes each)
    snapshots_kept: int = 2
    snapshot_events: int = 5_000_000  # since the last snapshot, then another is taken; 0 = only when asked for
    keep_history: bool = False  # True: no segment is ever deleted, so that any past balance can be told
    rows_in_flight_max: int = 64 * ROWS_MAX
    bytes_in_flight_max: int = 64 * 1024 * 1024
    engine_options: dict[str, int] = field(default_factory=dict)  # further engine parameters, by name


class ShardPosition(NamedTuple):
    """A place in one shard's log: the number of the last event that is included."""

    shard: int
    sequence_number: int


class RowsResult(NamedTuple):
    """`codes`: one TransferResult a row."""

    codes: bytes
    positions: tuple[ShardPosition, ...]
    replayed_count: int


class AccountsResult(NamedTuple):
    """`codes`: one AccountResult a row."""

    codes: bytes
    positions: tuple[ShardPosition, ...]


class ReadResult(NamedTuple):
    """`accounts`: one a wanted id, None where there is none."""

    accounts: tuple[AccountState | None, ...]
    positions: tuple[ShardPosition, ...]


class CurrencyTotals(NamedTuple):
    """Sums over all owned shards. Σ balance + in_flight = 0 for every currency once nothing crosses to other
    processes."""

    currency: str
    account_count: int
    balance: int
    in_flight: int
    held_out: int
    held_in: int


@dataclass(frozen=True, slots=True)
class ShardFigures(ShardStatus):
    """A shard's status with its inner figures."""

    hold_count: int
    id_count: int
    unsettled_count: int
    memory_bytes: int
    sync_count: int
    frame_count: int
    queued_count: int
    now_ns: int


_HOLD = struct.Struct("<16s16s16sQqQHxxxxxx")
_CUT_HEAD, _CUT_BOOK = struct.Struct("<QQ"), struct.Struct("<4sIqq")
_CUT_LINK, _CUT_SEND, _CUT_REFUSAL = struct.Struct("<QQQQQQ"), struct.Struct("<q4sI"), struct.Struct("<QQ")


def unpack_holds(packed: bytes) -> tuple[int, list[tuple[bytes, bytes, bytes, int]]]:
    """What `submit_chain_holds` gives: where to go on (0 = the end), and (id, debit account, credit account, amount) of holds."""
    holds = [(one[0], one[1], one[2], one[4]) for one in _HOLD.iter_unpack(packed[8:])]
    return int.from_bytes(packed[:8], "little"), holds


def unpack_cut(shard: int, packed: bytes) -> ShardCut:
    """What `submit_cut` gives (the layout is in _chains.pxi)."""
    sequence, count = _CUT_HEAD.unpack_from(packed, 0)
    at = _CUT_HEAD.size
    books: dict[str, list[int]] = {}
    for _ in range(count):
        currency, _, balance, in_flight = _CUT_BOOK.unpack_from(packed, at)
        books[_name(currency)] = [balance, in_flight]
        at += _CUT_BOOK.size
    links: dict[int, Link] = {}
    while at < len(packed):
        peer, settled, sent, received, sends, refusals = _CUT_LINK.unpack_from(packed, at)
        at += _CUT_LINK.size
        end = at + sends * _CUT_SEND.size
        sent_rows = [(amount, _name(currency)) for amount, currency, _ in _CUT_SEND.iter_unpack(packed[at:end])]
        at, end = end, end + refusals * _CUT_REFUSAL.size
        refused = {number for number, _ in _CUT_REFUSAL.iter_unpack(packed[at:end])}
        at = end
        links[peer] = Link(settled, sent, received, sent_rows, refused)
    return ShardCut(shard, sequence, books, links)


def _name(currency: bytes) -> str:
    return currency.rstrip(b"\0").decode("ascii")
