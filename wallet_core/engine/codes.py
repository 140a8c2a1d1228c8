"""Numbers that the engine, its twin, the event records and the wire share. They never change their
meaning."""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "AMOUNT_MAX",
    "HOLDS_EXPIRED_MAX",
    "ID_AHEAD_MS",
    "ID_EARLY_MS",
    "SHARD_COUNT_MAX",
    "SHARD_LOCAL",
    "AccountFlags",
    "AccountResult",
    "EventKind",
    "TransferFlags",
    "TransferResult",
    "in_flight_account_id",
]

#: A transfer id may be this far ahead of the engine's time, not more.
ID_AHEAD_MS = 5 * 60 * 1000
#: Ids further ahead than this are remembered apart from the others, and refused as ID_AHEAD where they are too many.
ID_EARLY_MS = 1000
#: A shard number fits one byte of an event record.
SHARD_COUNT_MAX = 256
#: Holds that end by their deadline with one command; the rest with the next, so that a frame stays small.
HOLDS_EXPIRED_MAX = 8190
#: Greatest amount of one transfer, and how far from 0 a command may bring a balance with what is held: 2^62 - 1.
#: The rest of int64 is kept for money that comes back from another shard (docs/event-records.md, Limits).
AMOUNT_MAX = (1 << 62) - 1
#: Value of the credit_shards column for a credit account on the same shard.
SHARD_LOCAL = 0xFFFF


class TransferFlags(IntFlag):
    """What a transfer is. At most one of HOLD, POST, VOID; balancing with neither POST nor VOID.

    CHAIN is for the coordinator of chains across shards, with HOLD, POST or VOID and never balancing: such holds are posted
    and voided by rows that have it as well, and have no deadline. From anybody else it is FLAGS_INVALID.
    """

    LINKED = 1
    HOLD = 2
    POST = 4
    VOID = 8
    BALANCING_DEBIT = 16
    BALANCING_CREDIT = 32
    CHAIN = 64


class AccountFlags(IntFlag):
    """STRIPED needs MAY_OVERDRAW and no limits. IN_FLIGHT is the engine's own and refused from outside."""

    FROZEN = 1
    CLOSED = 2
    MAY_OVERDRAW = 4
    STRIPED = 8
    IN_FLIGHT = 16


class TransferResult(IntEnum):
    """Results in the order of the guards: the first guard that fails names the result.

    2 to 10 and 28 to 32 depend on the row alone (or on the moment) and are not remembered; 28 to 32 are
    checked right after 10. 11 to 27 are remembered with the id and logged, so that the same id answers the
    same within the id window.
    """

    OK = 1
    ID_INVALID = 2
    ID_TOO_OLD = 3
    ID_AHEAD = 4
    ID_REUSED = 5
    FLAGS_INVALID = 6
    AMOUNT_INVALID = 7  # also above AMOUNT_MAX
    PENDING_ID_INVALID = 8
    TIMEOUT_INVALID = 9
    ACCOUNTS_SAME = 10
    HOLD_NOT_FOUND = 11
    HOLD_ALREADY_POSTED = 12
    HOLD_ALREADY_VOIDED = 13
    HOLD_EXPIRED = 14
    HOLD_MISMATCH = 15
    HOLD_AMOUNT_EXCEEDED = 16
    DEBIT_ACCOUNT_NOT_FOUND = 17
    CREDIT_ACCOUNT_NOT_FOUND = 18
    CURRENCY_MISMATCH = 19
    DEBIT_ACCOUNT_CLOSED = 20
    CREDIT_ACCOUNT_CLOSED = 21
    DEBIT_ACCOUNT_FROZEN = 22
    CREDIT_ACCOUNT_FROZEN = 23
    INSUFFICIENT_FUNDS = 24
    BALANCE_LIMIT_EXCEEDED = 25
    BALANCE_OVERFLOW = 26  # the account, or what is under way between shards, would hold more than AMOUNT_MAX
    LINKED_FAILED = 27
    CHAIN_OPEN = 28
    WRONG_SHARD = 29
    CROSS_SHARD_UNSUPPORTED = 30
    IN_FLIGHT = 31
    TOO_MANY_PENDING = 32


class AccountResult(IntEnum):
    """Results of opening and updating accounts, in the order of the guards."""

    OK = 1
    ID_INVALID = 2
    ALREADY_EXISTS = 3
    CURRENCY_INVALID = 4
    FLAGS_INVALID = 5
    LIMIT_INVALID = 6
    NOT_FOUND = 7
    BALANCE_NOT_ZERO = 8
    WRONG_SHARD = 9
    TOO_MANY_ACCOUNTS = 10


class EventKind(IntEnum):
    """Byte 46 of an event record."""

    ACCOUNT_OPENED = 1
    ACCOUNT_UPDATED = 2
    MONEY_MOVED = 3
    HOLD_PLACED = 4
    HOLD_POSTED = 5
    HOLD_VOIDED = 6
    HOLD_EXPIRED = 7
    TRANSFER_REFUSED = 8
    MONEY_SENT = 9
    MONEY_RECEIVED = 10
    CREDIT_REFUSED = 11
    SAGA_SETTLED = 12
    MONEY_RETURNED = 13


def in_flight_account_id(currency: bytes, shard: int) -> bytes:
    """The id of a shard's in-flight account: ``in-flight:`` + three letters + NUL + shard as big-endian
    u16."""
    return b"in-flight:" + currency[:3] + b"\0" + shard.to_bytes(2, "big")
