"""Folds event records into what the read model stores. Pure: records in, changes out.

A page of events becomes `Changes`: one item an event that is about a transfer, and the sums by which
accounts change. The end of a hold releases what the hold took, which its own record does not say (a post may
move less): it is named by the sequence number of its HoldPlaced, and the store that keeps balances also
keeps the amounts of open holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from wallet_core.engine.codes import EventKind, TransferResult, in_flight_account_id

__all__ = ["RECORD_BYTES", "AccountKey", "Changes", "EndedHold", "Item", "fold", "ordinals_of"]

RECORD_BYTES = 48
_RECORD = struct.Struct(
    "<16sqIIIHHIHBB"
)  # docs/event-records.md: id, amount, debit, credit, u48, code, u48, kind, last
assert _RECORD.size == RECORD_BYTES

_OPENED, _UPDATED = int(EventKind.ACCOUNT_OPENED), int(EventKind.ACCOUNT_UPDATED)
_MOVED, _PLACED, _POSTED = int(EventKind.MONEY_MOVED), int(EventKind.HOLD_PLACED), int(EventKind.HOLD_POSTED)
_VOIDED, _EXPIRED = int(EventKind.HOLD_VOIDED), int(EventKind.HOLD_EXPIRED)
_REFUSED, _SENT = int(EventKind.TRANSFER_REFUSED), int(EventKind.MONEY_SENT)
_RECEIVED, _CREDIT_REFUSED = int(EventKind.MONEY_RECEIVED), int(EventKind.CREDIT_REFUSED)
_SETTLED, _RETURNED = int(EventKind.SAGA_SETTLED), int(EventKind.MONEY_RETURNED)
_BOTH_SIDES = frozenset({_MOVED, _PLACED, _POSTED, _VOIDED, _EXPIRED, _RECEIVED, _RETURNED})
_OK = int(TransferResult.OK)

AccountKey = tuple[bytes, str]
"""An account's id and currency."""
Item = tuple[int, bytes, bytes | None, bytes | None, int, int, int, int, int]
"""sequence, transfer id, debit id, credit id, amount, kind, result, code, time_ns"""
EndedHold = tuple[int, bytes, bytes]
"""sequence number of the HoldPlaced, debit id, credit id"""


@dataclass(slots=True)
class Changes:
    """What events `after + 1` to `upto` of a shard change.

    `balances`: account id → [balance, held out, held in] to add. `placed`: (sequence, amount) of new holds.
    `ended`: holds that are over. `opened`: account id → currency.
    """

    shard: int
    after: int
    upto: int
    items: list[Item] = field(default_factory=list)
    balances: dict[bytes, list[int]] = field(default_factory=dict)
    placed: list[tuple[int, int]] = field(default_factory=list)
    ended: list[EndedHold] = field(default_factory=list)
    opened: dict[bytes, str] = field(default_factory=dict)


Page = tuple[int, int, bytes]
"""first sequence, timestamp_ns, records"""


def ordinals_of(pages: Iterable[Page]) -> set[int]:
    """The ordinals of the accounts that events name."""
    found: set[int] = set()
    for _, _, body in pages:
        for _, _, debit, credit, _, _, _, _, _, kind, _ in _RECORD.iter_unpack(body):
            if kind in _BOTH_SIDES:
                found.add(debit)
                found.add(credit)
            elif kind == _SENT:
                found.add(debit)
    return found


def fold(shard: int, after: int, pages: Sequence[Page], accounts: Callable[[int], AccountKey]) -> Changes:
    """The changes of consecutive pages that begin at event `after + 1`; earlier events of the first page are
    skipped.

    `accounts` gives an account's key by its ordinal. Raises ValueError for a gap or an unknown kind.
    """
    changes = Changes(shard, after, after)
    items, balances = changes.items, changes.balances
    expected = after + 1
    for first, timestamp_ns, whole in pages:
        body: bytes | memoryview = whole
        if first < expected:
            body, first = memoryview(whole)[(expected - first) * RECORD_BYTES :], expected
        if first != expected:
            raise ValueError(f"shard {shard}: expected event {expected}, the page begins at {first}")
        sequence = first
        for record in _RECORD.iter_unpack(body):
            record_id, amount, debit, credit, low, middle, code, other, _, kind, _ = record
            if kind in _BOTH_SIDES:
                debit_id, credit_id = accounts(debit)[0], accounts(credit)[0]
                result = other if kind == _RETURNED else _OK
                items.append((sequence, record_id, debit_id, credit_id, amount, kind, result, code, timestamp_ns))
                if kind == _PLACED:
                    _sums(balances, debit_id)[1] += amount
                    _sums(balances, credit_id)[2] += amount
                    changes.placed.append((sequence, amount))
                else:
                    if kind in (_POSTED, _VOIDED, _EXPIRED):
                        changes.ended.append((low | middle << 32, debit_id, credit_id))
                    if kind not in (_VOIDED, _EXPIRED):
                        _sums(balances, debit_id)[0] -= amount
                        _sums(balances, credit_id)[0] += amount
            elif kind == _REFUSED:
                items.append((sequence, record_id, None, None, amount, kind, low, code, timestamp_ns))
            elif kind == _SENT:
                at = (sequence - first) * RECORD_BYTES
                debit_id, currency = accounts(debit)
                credit_id = bytes(body[at + 28 : at + 44])
                sent_code = body[at + 44] | body[at + 45] << 8
                items.append((sequence, record_id, debit_id, credit_id, amount, kind, _OK, sent_code, timestamp_ns))
                _sums(balances, debit_id)[0] -= amount
                _sums(balances, in_flight_account_id(currency.encode("ascii"), shard))[0] += amount
            elif kind == _CREDIT_REFUSED:
                items.append((sequence, record_id, None, None, amount, kind, other, code, timestamp_ns))
            elif kind == _OPENED:
                at = (sequence - first) * RECORD_BYTES
                changes.opened[record_id] = bytes(body[at + 36 : at + 39]).decode("ascii")
            elif kind not in (_UPDATED, _SETTLED):
                raise ValueError(f"shard {shard}: event {sequence} has an unknown kind {kind}")
            sequence += 1
        expected = sequence
    changes.upto = expected - 1
    return changes


def _sums(balances: dict[bytes, list[int]], account_id: bytes) -> list[int]:
    found = balances.get(account_id)
    if found is None:
        found = balances[account_id] = [0, 0, 0]
    return found
