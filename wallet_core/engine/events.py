"""Event records in plain Python: 48 bytes, little endian. The layouts are drawn in docs/event-records.md."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from wallet_core.engine.codes import EventKind

__all__ = ["EVENT_BYTES", "Event", "pack_event", "unpack_events"]

EVENT_BYTES: Final = 48

_ACCOUNT = struct.Struct("<16sqqI4sHxxxxBB")  # kinds 1, 2
_MONEY = struct.Struct("<16sqIIIHHIHBB")  # 3-8, 10-13: u48 fields as two parts
_SENT = struct.Struct("<16sqI16sHBB")  # kind 9


@dataclass(frozen=True, slots=True)
class Event:
    """One event. Fields that its kind does not have are 0, empty or None.

    Amounts in minor units. `flags` are AccountFlags for kinds 1 and 2 and TransferFlags for 3 to 6 and 8.
    `shard` is the other shard of a saga. `number` is the saga number (9: not in the record; it counts up per
    destination).
    """

    sequence: int
    kind: EventKind
    id: bytes = b""
    amount: int = 0
    debit_ordinal: int = 0
    credit_ordinal: int = 0
    deadline_ms: int = 0
    hold_sequence: int = 0
    number: int = 0
    result: int = 0
    code: int = 0
    fingerprint: int = 0
    flags: int = 0
    shard: int = 0
    ordinal: int = 0
    currency: str = ""
    overdraft_limit: int = 0
    balance_limit: int = 0
    credit_id: bytes = b""


def unpack_events(body: bytes | bytearray | memoryview, first_sequence: int) -> list[Event]:
    """The events of a frame body. Raises ValueError where it is no whole number of records or a kind is
    unknown."""
    if len(body) % EVENT_BYTES:
        raise ValueError(f"frame body: {len(body)} bytes are no multiple of {EVENT_BYTES}")
    view = memoryview(body)
    return [
        _unpack(view[start : start + EVENT_BYTES], first_sequence + start // EVENT_BYTES)
        for start in range(0, len(body), EVENT_BYTES)
    ]


def _unpack(record: memoryview, sequence: int) -> Event:
    try:
        kind = EventKind(record[46])
    except ValueError:
        raise ValueError(f"event {sequence}: unknown kind {record[46]}") from None
    if kind in (EventKind.ACCOUNT_OPENED, EventKind.ACCOUNT_UPDATED):
        account_id, overdraft, balance_limit, ordinal, currency, flags, _, _ = _ACCOUNT.unpack(record)
        return Event(
            sequence,
            kind,
            id=account_id,
            overdraft_limit=overdraft,
            balance_limit=balance_limit,
            ordinal=ordinal,
            currency=currency.rstrip(b"\0").decode("ascii"),
            flags=flags,
        )
    if kind is EventKind.MONEY_SENT:
        transfer_id, amount, debit, credit_id, code, _, shard = _SENT.unpack(record)
        return Event(
            sequence,
            kind,
            id=transfer_id,
            amount=amount,
            debit_ordinal=debit,
            credit_id=credit_id,
            code=code,
            shard=shard,
        )
    transfer_id, amount, debit, credit, low, middle, code, fp_low, fp_high, _, last = _MONEY.unpack(record)
    aux = low | middle << 32
    fingerprint = fp_low | fp_high << 32
    if kind is EventKind.TRANSFER_REFUSED:
        return Event(
            sequence, kind, id=transfer_id, amount=amount, result=aux, code=code, fingerprint=fingerprint, flags=last
        )
    if kind in (EventKind.MONEY_MOVED, EventKind.HOLD_PLACED):
        return Event(
            sequence,
            kind,
            id=transfer_id,
            amount=amount,
            debit_ordinal=debit,
            credit_ordinal=credit,
            deadline_ms=aux,
            code=code,
            fingerprint=fingerprint,
            flags=last,
        )
    if kind in (EventKind.HOLD_POSTED, EventKind.HOLD_VOIDED, EventKind.HOLD_EXPIRED):
        return Event(
            sequence,
            kind,
            id=transfer_id,
            amount=amount,
            debit_ordinal=debit,
            credit_ordinal=credit,
            hold_sequence=aux,
            code=code,
            fingerprint=fingerprint,
            flags=last,
        )
    return Event(
        sequence,
        kind,
        id=transfer_id,
        amount=amount,
        debit_ordinal=debit,
        credit_ordinal=credit,
        number=aux,
        result=fingerprint,
        code=code,
        shard=last,
    )


def pack_event(event: Event) -> bytes:
    """The record of an event; the inverse of `unpack_events`."""
    if event.kind in (EventKind.ACCOUNT_OPENED, EventKind.ACCOUNT_UPDATED):
        currency = event.currency.encode("ascii").ljust(4, b"\0")
        return _ACCOUNT.pack(
            event.id, event.overdraft_limit, event.balance_limit, event.ordinal, currency, event.flags, event.kind, 0
        )
    if event.kind is EventKind.MONEY_SENT:
        return _SENT.pack(
            event.id, event.amount, event.debit_ordinal, event.credit_id, event.code, event.kind, event.shard
        )
    fingerprint, last = event.fingerprint, event.flags
    if event.kind is EventKind.TRANSFER_REFUSED:
        aux = event.result
    elif event.kind in (EventKind.MONEY_MOVED, EventKind.HOLD_PLACED):
        aux = event.deadline_ms
    elif event.kind in (EventKind.HOLD_POSTED, EventKind.HOLD_VOIDED, EventKind.HOLD_EXPIRED):
        aux = event.hold_sequence
    else:
        aux, fingerprint, last = event.number, event.result, event.shard
    return _MONEY.pack(
        event.id,
        event.amount,
        event.debit_ordinal,
        event.credit_ordinal,
        aux & 0xFFFFFFFF,
        aux >> 32,
        event.code,
        fingerprint & 0xFFFFFFFF,
        fingerprint >> 32,
        event.kind,
        last,
    )
