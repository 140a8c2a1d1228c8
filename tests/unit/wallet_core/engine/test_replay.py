"""A log that contradicts itself stops the replay, naming the record; a good one gives the state back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.wallet_core.engine.harness import MS, NOW, AccountRow, Pair, account_id, transfer_id
from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import EventKind, TransferFlags
from wallet_core.engine.events import Event, pack_event, unpack_events
from wallet_core.engine.twin import Row, Twin
from wallet_core.engine.views import EnginePoisoned, EngineRefused

F = TransferFlags
Z = bytes(16)
LATE = NOW + 3_000 * MS


@pytest.fixture(scope="module")
def history() -> tuple[list[Event], list[tuple[int, int]], bytes]:
    """One log with every kind of event: its events, (first sequence, timestamp) of its frames, and the digest."""
    pair = Pair()
    pair.open([AccountRow(account_id(0), flags=4), AccountRow(account_id(1)), AccountRow(account_id(2))])
    pair.transfer(Row(transfer_id(1), account_id(0), account_id(1), 100, code=9))
    pair.transfers([Row(transfer_id(i), account_id(1), account_id(2), 10, F.HOLD, timeout_s=2) for i in (2, 3, 4)])
    pair.transfer(Row(transfer_id(5), Z, Z, 4, F.POST, transfer_id(2)))
    pair.transfer(Row(transfer_id(6), Z, Z, 0, F.VOID, transfer_id(3)))
    pair.transfer(Row(transfer_id(7), account_id(2), account_id(1), 1000))
    pair.transfers([Row(transfer_id(30), account_id(1), account_id(2), 7, F.HOLD | F.CHAIN)], chain_steps=True)
    pair.transfers([Row(transfer_id(31), Z, Z, 0, F.VOID | F.CHAIN, transfer_id(30))], chain_steps=True)
    pair.transfers([Row(transfer_id(i), account_id(1), account_id(9), 5, credit_shard=1) for i in (8, 9)])
    pair.update([AccountRow(account_id(2), balance_limit=500)])
    credit = (transfer_id(20), account_id(2), 3, b"USD\0", 1)
    pair.credits(2, 1, [credit, (transfer_id(21), account_id(9), 3, b"USD\0", 1)])
    pair.outcomes(1, 2, [(2, 18)], LATE)
    events = [event for frame in pair.frames for event in unpack_events(frame.body, frame.first_sequence)]
    assert {event.kind for event in events} == set(EventKind)
    return events, [(f.first_sequence, f.timestamp_ns) for f in pair.frames], pair.engine.state_digest()


def replay(engine: Engine | Twin, events: list[Event], frames: list[tuple[int, int]]) -> None:
    for index, (first, timestamp) in enumerate(frames):
        end = frames[index + 1][0] if index + 1 < len(frames) else len(events) + 1
        engine.replay_frame(b"".join(pack_event(e) for e in events[first - 1 : end - 1]), first, timestamp)


@pytest.mark.parametrize("make", [Engine, Twin])
def test_every_kind_of_event(
    make: type[Engine] | type[Twin], history: tuple[list[Event], list[tuple[int, int]], bytes]
) -> None:
    events, frames, digest = history
    engine = make()
    replay(engine, events, frames)
    assert engine.state_digest() == digest


def first(events: list[Event], kind: EventKind) -> int:
    return next(i for i, event in enumerate(events) if event.kind is kind)


LIES: list[tuple[EventKind, Callable[[Event], Event], str]] = [
    (EventKind.ACCOUNT_OPENED, lambda e: replace(e, ordinal=e.ordinal + 1), "ordinal"),
    (EventKind.ACCOUNT_OPENED, lambda e: replace(e, flags=2), "account"),
    (EventKind.ACCOUNT_UPDATED, lambda e: replace(e, ordinal=1), "update"),
    (EventKind.ACCOUNT_UPDATED, lambda e: replace(e, balance_limit=-1), "update"),
    (EventKind.MONEY_MOVED, lambda e: replace(e, amount=-1), "amount"),
    (EventKind.MONEY_MOVED, lambda e: replace(e, debit_ordinal=77), "accounts"),
    (EventKind.MONEY_MOVED, lambda e: replace(e, debit_ordinal=1), "accounts"),
    (EventKind.MONEY_MOVED, lambda e: replace(e, debit_ordinal=2), "funds"),
    (EventKind.MONEY_MOVED, lambda e: replace(e, id=Z), "transfer id"),
    (EventKind.MONEY_MOVED, lambda e: replace(e, flags=2), "flags"),
    (EventKind.HOLD_PLACED, lambda e: replace(e, amount=101), "funds"),
    (EventKind.HOLD_PLACED, lambda e: replace(e, deadline_ms=1), "deadline"),
    (EventKind.HOLD_PLACED, lambda e: replace(e, id=transfer_id(1)), "there before"),
    (EventKind.HOLD_POSTED, lambda e: replace(e, amount=11), "amount"),
    (EventKind.HOLD_POSTED, lambda e: replace(e, hold_sequence=1), "not found"),
    (EventKind.HOLD_POSTED, lambda e: replace(e, debit_ordinal=0), "accounts"),
    (EventKind.HOLD_VOIDED, lambda e: replace(e, amount=9), "amount"),
    (EventKind.HOLD_VOIDED, lambda e: replace(e, flags=4), "flags"),
    (EventKind.HOLD_VOIDED, lambda e: replace(e, flags=F.VOID | F.CHAIN), "flags"),
    (EventKind.HOLD_POSTED, lambda e: replace(e, flags=F.POST | F.CHAIN), "flags"),
    (EventKind.HOLD_PLACED, lambda e: replace(e, flags=F.HOLD | F.CHAIN), "flags or deadline"),
    (EventKind.HOLD_PLACED, lambda e: replace(e, flags=F.HOLD | F.CHAIN | F.BALANCING_DEBIT, deadline_ms=0), "flags"),
    (EventKind.HOLD_EXPIRED, lambda e: replace(e, id=transfer_id(3)), "id"),
    (EventKind.TRANSFER_REFUSED, lambda e: replace(e, result=1), "result"),
    (EventKind.TRANSFER_REFUSED, lambda e: replace(e, id=transfer_id(1)), "there before"),
    (EventKind.MONEY_SENT, lambda e: replace(e, amount=1000), "funds"),
    (EventKind.MONEY_SENT, lambda e: replace(e, shard=0), "accounts"),
    (EventKind.MONEY_RECEIVED, lambda e: replace(e, number=2), "saga number"),
    (EventKind.MONEY_RECEIVED, lambda e: replace(e, debit_ordinal=1), "in-flight"),
    (EventKind.CREDIT_REFUSED, lambda e: replace(e, number=1), "saga number"),
    (EventKind.CREDIT_REFUSED, lambda e: replace(e, result=1), "result"),
    (EventKind.MONEY_RETURNED, lambda e: replace(e, number=3), "saga number"),
    (EventKind.MONEY_RETURNED, lambda e: replace(e, amount=4), "sent"),
    (EventKind.MONEY_RETURNED, lambda e: replace(e, credit_ordinal=0), "sent"),
    (EventKind.SAGA_SETTLED, lambda e: replace(e, number=3), "saga number"),
    (EventKind.SAGA_SETTLED, lambda e: replace(e, number=1), "saga number"),
]


@pytest.mark.parametrize(("kind", "lie", "reason"), LIES, ids=[f"{i}-{lie[0].name}" for i, lie in enumerate(LIES)])
def test_a_record_that_contradicts_the_state_is_named(
    history: tuple[list[Event], list[tuple[int, int]], bytes],
    kind: EventKind,
    lie: Callable[[Event], Event],
    reason: str,
) -> None:
    events, frames, _ = history
    at = first(events, kind)
    forged = [*events[:at], lie(events[at]), *events[at + 1 :]]
    engine = Engine()
    with pytest.raises(EngineRefused, match=rf"event {events[at].sequence} .*{reason}"):
        replay(engine, forged, frames)
    with pytest.raises(EnginePoisoned):
        engine.expire(NOW)
    assert engine.status().poisoned


def test_a_callers_void_of_a_hold_of_a_chain_is_named(
    history: tuple[list[Event], list[tuple[int, int]], bytes],
) -> None:
    events, frames, _ = history
    at = next(i for i, event in enumerate(events) if event.id == transfer_id(31))
    forged = [*events[:at], replace(events[at], flags=int(F.VOID)), *events[at + 1 :]]
    with pytest.raises(EngineRefused, match=f"event {events[at].sequence} .*flags"):
        replay(Engine(), forged, frames)


@pytest.mark.parametrize("make", [Engine, Twin])
def test_a_gap_in_sequence_numbers(
    make: type[Engine] | type[Twin], history: tuple[list[Event], list[tuple[int, int]], bytes]
) -> None:
    events, _, _ = history
    with pytest.raises(EngineRefused, match=r"event 2 .*sequence"):
        make().replay_frame(pack_event(events[0]), 2, NOW)


def test_an_unknown_kind_and_a_broken_length() -> None:
    with pytest.raises(EngineRefused, match="unknown kind"):
        Engine().replay_frame(bytes(46) + b"\x63\0", 1, NOW)
    for broken in (lambda b: Engine().replay_frame(b, 1, NOW), lambda b: unpack_events(b, 1)):
        with pytest.raises(ValueError, match="47"):
            broken(bytes(47))
    with pytest.raises(ValueError, match="unknown kind 99"):
        unpack_events(bytes(46) + b"\x63\0", 1)


def test_any_flipped_bit_is_noticed(history: tuple[list[Event], list[tuple[int, int]], bytes]) -> None:
    """By a pair assertion, or at the latest by the digest."""
    events, frames, digest = history
    body = bytearray(b"".join(pack_event(event) for event in events))
    ends = [first_ for first_, _ in frames[1:]] + [len(events) + 1]
    for bit in range(0, 8 * len(body), 7):
        body[bit // 8] ^= 1 << bit % 8
        engine = Engine()
        try:
            for (start, timestamp), end in zip(frames, ends, strict=True):
                engine.replay_frame(bytes(body[48 * (start - 1) : 48 * (end - 1)]), start, timestamp)
        except EngineRefused:
            pass
        else:
            assert engine.state_digest() != digest, f"bit {bit}"
        body[bit // 8] ^= 1 << bit % 8


def test_records_survive_packing(history: tuple[list[Event], list[tuple[int, int]], bytes]) -> None:
    for event in history[0]:
        assert unpack_events(pack_event(event), event.sequence) == [event]
