"""What the wallet's use cases need from outside: the shard host, the directory of names, the read model."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from wallet_core.engine.codes import AccountFlags

__all__ = [
    "ID_NONE",
    "ROW_COUNT_MAX",
    "SLOT_COUNT",
    "AccountRow",
    "AccountState",
    "AccountsRead",
    "Directory",
    "EventPage",
    "Host",
    "NamedAccount",
    "ReadModel",
    "RowsAnswer",
    "ShardLink",
    "ShardStatus",
    "SnapshotInfo",
    "TransferItem",
    "TransferRow",
    "WriterTimes",
    "slot_of",
]

ROW_COUNT_MAX = 8_190
"""Rows that one batch of transfers or accounts may have."""
SLOT_COUNT = 4_096
"""Slots that account ids fall into; each belongs to one shard."""
ID_NONE = bytes(16)
"""Stands for no id in a row."""


def slot_of(account_id: bytes) -> int:
    """The slot of an account id (16 bytes)."""
    return ((account_id[14] << 8) | account_id[15]) & (SLOT_COUNT - 1)


class TransferRow(NamedTuple):
    """One transfer. Ids are 16 bytes, ID_NONE where there is none; `flags` are TransferFlags."""

    id: bytes
    debit_id: bytes
    credit_id: bytes
    amount_minor: int
    flags: int = 0
    pending_id: bytes = ID_NONE
    timeout_s: int = 0
    code: int = 0


class AccountRow(NamedTuple):
    """One account to open or update; `flags` are AccountFlags."""

    id: bytes
    currency: str
    flags: int = 0
    overdraft_limit: int = 0
    balance_limit: int = 0


@dataclass(frozen=True, slots=True)
class AccountState:
    """An account as it stands, in minor units; of a striped one the sums of the parts that this process
    owns."""

    id: bytes
    currency: str
    balance: int
    held_out: int
    held_in: int
    overdraft_limit: int
    balance_limit: int
    flags: int

    @property
    def available(self) -> int:
        """What can be spent. For an account that may overdraw: balance less held, with no floor under it."""
        return self.balance - self.held_out + self.overdraft_limit

    def has(self, flag: AccountFlags) -> bool:
        """Whether a flag is set."""
        return bool(self.flags & flag)


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """Where one shard stands. `state`: restoring, serving, read-only, rewound or poisoned."""

    shard: int
    state: str
    epoch: int
    sequence: int
    durable_sequence: int
    snapshot_sequence: int
    digest: bytes
    account_count: int
    log_bytes: int


class ShardLink(NamedTuple):
    """How a shard stands with another: the numbers of the last transfer that it has sent there, of the last one that it knows
    to be done, and of the last one received from there. `problem`: why the two cannot both be right; empty = they can."""

    peer: int
    sent: int
    settled: int
    received: int
    problem: str


@dataclass(frozen=True, slots=True)
class WriterTimes:
    """What a shard's writer did in some time. Batches are those of at least 256 transfers; `cpu` is of the writer's thread
    alone, without what it waited for. `pause`: what it did for nothing but a snapshot, to begin and to end its image."""

    batches: int
    rows: int
    apply_cpu_ns: int
    apply_cpu_ns_max: int
    apply_ns_max: int
    commits: int
    commit_ns_max: int
    pause_ns: int
    pause_ns_max: int


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot on disk. `writer`: what the shard's writer did since the snapshot before, and beside this one; None of
    one that was there already."""

    shard: int
    sequence: int
    file_name: str
    size_bytes: int
    digest: bytes
    create_time_ns: int
    writer: tuple[WriterTimes, WriterTimes] | None = None


@dataclass(frozen=True, slots=True)
class EventPage:
    """Consecutive durable event records of one shard with one timestamp (one frame, or the rest of one)."""

    first_sequence: int
    count: int
    timestamp_ns: int
    body: bytes

    @property
    def last_sequence(self) -> int:
        """Sequence number of the page's last event."""
        return self.first_sequence + self.count - 1


class RowsAnswer(Protocol):
    """What became of rows."""

    @property
    def codes(self) -> bytes:
        """One TransferResult a row."""

    @property
    def positions(self) -> Sequence[tuple[int, int]]:
        """(shard, sequence number)"""


class AccountsRead(Protocol):
    """Accounts that were read and wait for their names."""

    @property
    def ids(self) -> list[bytes]:
        """Those that exist, in the order of the request."""

    def message(self, names: dict[bytes, str]) -> bytes | None:
        """A serialized GetAccountsResponse. None where a figure, summed over shards, does not fit."""


class Host(Protocol):
    """The shards that this process owns. Whatever it answers is durable."""

    @property
    def shard_count(self) -> int:
        """Shards of the whole system."""

    @property
    def shard_ids(self) -> tuple[int, ...]:
        """Shards that this process owns, ascending."""

    def transfer_batch(self, message: bytes, *, wrapped: bool = False) -> Awaitable[bytes]:
        """A serialized TransferBatch in, a serialized TransferBatchResult out; `wrapped`: a
        SubmitTransfersRequest in, a SubmitTransfersResponse out. Raises InvalidArgument BATCH_INVALID naming
        the column; nothing is applied then.
        """

    def transfer_call(self, message: bytes) -> Awaitable[bytes] | None:
        """A serialized CreateTransfersRequest in, a serialized CreateTransfersResponse out, settled. None where the rows must
        be looked at one by one: `transfer_rows`."""

    def transfer_rows(self, rows: Sequence[TransferRow]) -> Awaitable[RowsAnswer]:
        """One TransferResult byte a row, settled, and the positions that include them."""

    def transfers(self, rows: Sequence[TransferRow]) -> Awaitable[bytes]:
        """One TransferResult byte a row."""

    def create_accounts(self, rows: Sequence[AccountRow], *, update: bool = False) -> Awaitable[bytes]:
        """One AccountResult byte a row. A striped account is opened on every shard."""

    def account_message(self, message: bytes) -> Awaitable[bytes | None]:
        """A serialized CreateAccountsRequest in, a serialized CreateAccountsResponse out. None where the rows must be looked
        at one by one: `create_accounts`."""

    def read_message(self, message: bytes) -> Awaitable[AccountsRead | None]:
        """The accounts that a serialized GetAccountsRequest asks for. None where it asks for more than ids: `accounts`."""

    def accounts(self, ids: Sequence[bytes]) -> Awaitable[list[AccountState | None]]:
        """Each account as it durably stands; None where there is none. Raises FailedPrecondition
        WRONG_SHARD."""

    def accounts_here(self, ids: Sequence[bytes]) -> list[bytes]:
        """Those of which this process can own all or a part: `accounts` does not refuse them."""

    def account_keys(self, shard: int, ordinals: Sequence[int]) -> list[tuple[bytes, str]]:
        """The ids of accounts by their ordinals on a shard; raises LookupError for one that does not exist
        yet."""

    def shards(self) -> list[ShardStatus]:
        """Where each shard stands."""

    def links(self, shard: int) -> list[ShardLink]:
        """How a shard stands with every other shard of the system."""

    def durable_sequence(self, shard: int) -> int:
        """The number of the last event that is durable."""

    async def wait_durable(self, shard: int, above: int, timeout_s: float) -> int:
        """The durable sequence number once it is above `above`, or as it is after `timeout_s`."""

    def read_events(self, shard: int, from_sequence: int, limit: int) -> list[EventPage]:
        """Durable events from `from_sequence` on, about `limit` of them at most; blocks on the disk: call it
        in a thread. Raises OutOfRange where the log does not reach back that far."""

    def first_sequence(self, shard: int) -> int:
        """The number of the oldest event that the log still has (1 after nothing was deleted)."""

    async def snapshot(self, shard: int) -> SnapshotInfo:
        """Writes a snapshot now."""

    def snapshots(self, shard: int) -> list[SnapshotInfo]:
        """The snapshots of a shard, newest first."""


@dataclass(frozen=True, slots=True)
class NamedAccount:
    """A name that an account was opened by."""

    id: bytes
    name: str
    currency: str


class Directory(Protocol):
    """Which account has which name. A name is written before its account is opened, so no account lacks its
    name."""

    async def add(self, accounts: Sequence[NamedAccount]) -> None:
        """Adds names; those that are there stay."""

    async def names(self, ids: Sequence[bytes]) -> dict[bytes, str]:
        """The names of those ids that have one."""

    async def page(self, prefix: str, after: str, limit: int) -> list[NamedAccount]:
        """Names that begin with `prefix` and sort after `after`, in order."""


@dataclass(frozen=True, slots=True)
class TransferItem:
    """One transfer of the past, as the read model has it. `kind` is an EventKind, `result` a TransferResult
    (1 = OK)."""

    shard: int
    sequence: int
    id: bytes
    debit_id: bytes
    credit_id: bytes
    amount: int
    kind: int
    result: int
    code: int
    time_ns: int


class ReadModel(Protocol):
    """What the projector has written."""

    async def by_id(self, ids: Sequence[bytes]) -> list[TransferItem]:
        """Everything that is recorded under these transfer ids, in the order of time."""

    async def of_account(
        self, account_id: bytes, before: tuple[int, int, int] | None, limit: int
    ) -> list[TransferItem]:
        """Transfers of an account, newest first, that come before the key (time_ns, shard, sequence)."""

    def projected(self, shard: int) -> int:
        """The number of the last event that the read model has."""

    def problem(self, shard: int) -> str:
        """What keeps the read model from following a shard; empty where nothing does."""

    async def wait(self, shard: int, sequence: int, timeout_s: float) -> bool:
        """Whether the read model has that event, at the latest after `timeout_s`."""
