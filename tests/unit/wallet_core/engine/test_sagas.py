"""Transfers across shards: exactly once on the credit shard, money back where it is refused, nothing lost in between."""

from __future__ import annotations

import pytest

from tests.unit.wallet_core.engine.harness import (
    NOW,
    AccountRow,
    Pair,
    account_id,
    load_pieces,
    read_pieces,
    transfer_columns,
    transfer_id,
)
from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import AMOUNT_MAX, EventKind, TransferFlags, TransferResult, in_flight_account_id
from wallet_core.engine.events import unpack_events
from wallet_core.engine.twin import Row

R = TransferResult
BANK, ANN = account_id(0), account_id(1)
BOB, FROZEN, YEN = account_id(100), account_id(101), account_id(102)
HOUSE = account_id(2)
IN_FLIGHT = in_flight_account_id(b"USD\0", 0)


@pytest.fixture
def shards() -> tuple[Pair, Pair]:
    a, b = Pair(0), Pair(1)
    a.open([AccountRow(BANK, flags=4), AccountRow(ANN)])
    b.open([AccountRow(BOB), AccountRow(FROZEN, flags=1), AccountRow(YEN, b"JPY\0")])
    a.transfer(Row(transfer_id(1), BANK, ANN, 100))
    return a, b


def send(number: int, credit: bytes = BOB, amount: int = 10) -> Row:
    return Row(transfer_id(number), ANN, credit, amount, code=7, credit_shard=1)


def balance(pair: Pair, id_: bytes) -> int:
    account = pair.engine.account(id_)
    return account.balance if account else 0


def sends_of(a: Pair, first: int = 1, limit: int = 100) -> list[tuple[bytes, bytes, int, bytes, int]]:
    sends = a.engine.sends(1, first, limit)
    return [(s.id, s.credit_id, s.amount, s.currency.encode() + b"\0", s.code) for s in sends]


def in_flight(*pairs: Pair) -> int:
    return sum(pair.engine.currency_totals()["USD"].in_flight for pair in pairs)


def test_the_whole_way(shards: tuple[Pair, Pair]) -> None:
    a, b = shards
    assert a.transfers([send(2), send(3, amount=5)]) == [R.IN_FLIGHT, R.IN_FLIGHT]
    assert (balance(a, ANN), balance(a, IN_FLIGHT), in_flight(a, b)) == (85, 15, 15)
    assert [event.kind for event in unpack_events(a.frames[-1].body, 1)] == [
        EventKind.ACCOUNT_OPENED,
        EventKind.MONEY_SENT,
        EventKind.MONEY_SENT,
    ]
    views = a.engine.sends(1, 1, 10)
    assert [(v.number, v.id, v.credit_id, v.amount, v.code) for v in views] == [
        (1, transfer_id(2), BOB, 10, 7),
        (2, transfer_id(3), BOB, 5, 7),
    ]
    assert views[1].sequence == a.engine.status().sequence
    assert b.credits(0, 1, sends_of(a)) == [R.OK, R.OK]
    assert (balance(b, BOB), in_flight(a, b)) == (15, 0)
    assert a.transfer(send(2)) == R.IN_FLIGHT
    a.outcomes(1, 2, [])
    assert a.engine.sent(1) == (2, 2)
    assert a.engine.sends(1, 0, 10) == []
    assert a.transfers([send(2), send(3, amount=5)]) == [R.OK, R.OK]
    assert a.transfer(send(2, amount=11)) == R.ID_REUSED
    for pair in shards:
        pair.check_agreement()
        pair.check_replay()
        pair.check_image()


def test_a_refused_credit_comes_back(shards: tuple[Pair, Pair]) -> None:
    a, b = shards
    a.transfers([send(2), send(3, FROZEN), send(4, account_id(999)), send(5, YEN)])
    results = b.credits(0, 1, sends_of(a))
    assert results == [R.OK, R.CREDIT_ACCOUNT_FROZEN, R.CREDIT_ACCOUNT_NOT_FOUND, R.CURRENCY_MISMATCH]
    refused = b.engine.refusals(0, 1, 10)
    assert refused == [(2, 23), (3, 18), (4, 19)]
    assert in_flight(a, b) == 30
    events = a.outcomes(1, 4, refused)
    assert events is not None
    kinds = [event.kind for event in unpack_events(events, 1)]
    assert kinds == [EventKind.MONEY_RETURNED] * 3 + [EventKind.SAGA_SETTLED]
    assert (balance(a, ANN), balance(b, BOB), in_flight(a, b)) == (90, 10, 0)
    assert a.transfers([send(2), send(3, FROZEN), send(4, account_id(999)), send(5, YEN)]) == results
    for pair in shards:
        pair.check_replay()


def test_credits_and_outcomes_again_change_nothing(shards: tuple[Pair, Pair]) -> None:
    a, b = shards
    a.transfers([send(2), send(3, FROZEN), send(4)])
    rows = sends_of(a)
    assert b.credits(0, 1, rows[:2]) == [R.OK, R.CREDIT_ACCOUNT_FROZEN]
    sequence = b.engine.status().sequence
    assert b.credits(0, 1, rows[:2]) == [R.OK, R.CREDIT_ACCOUNT_FROZEN]
    assert b.engine.status().sequence == sequence
    assert b.credits(0, 2, rows[1:]) == [R.CREDIT_ACCOUNT_FROZEN, R.OK], "half known, half new"
    assert balance(b, BOB) == 20
    refused = b.engine.refusals(0, 1, 10)
    assert a.outcomes(1, 2, refused)
    assert a.outcomes(1, 2, refused) == b""
    assert a.outcomes(1, 1, []) == b""
    assert a.outcomes(1, 3, refused), "a refusal that is settled already is passed over"
    assert balance(a, ANN) == 80


def test_gaps_and_lies_are_refused_as_a_whole(shards: tuple[Pair, Pair]) -> None:
    a, b = shards
    a.transfers([send(2), send(3)])
    rows = sends_of(a)
    assert b.credits(0, 2, rows[1:]) is None
    assert b.credits(0, 0, rows) is None
    assert b.credits(1, 1, rows) is None, "from itself"
    assert b.credits(256, 1, rows) is None
    assert a.outcomes(1, 3, []) is None, "more than was sent"
    assert a.outcomes(1, 2, [(2, 18), (1, 18)]) is None, "not ascending"
    assert a.outcomes(1, 1, [(2, 18)]) is None, "beyond what is settled"
    assert a.outcomes(1, 2, [(1, 1)]) is None, "a refusal that is none"
    assert a.outcomes(1, 2, [(0, 18)]) is None
    assert not a.engine.status().poisoned
    assert b.credits(0, 1, rows) == [R.OK, R.OK]


def test_a_credit_with_a_bad_amount_is_refused(shards: tuple[Pair, Pair]) -> None:
    _, b = shards
    rows = [(transfer_id(2), BOB, 0, b"USD\0", 0), (transfer_id(3), BOB, -5, b"USD\0", 0)]
    assert b.credits(0, 1, rows) == [R.AMOUNT_INVALID, R.AMOUNT_INVALID]
    assert b.engine.cursor(0) == 2


def test_money_comes_back_even_to_a_frozen_account(shards: tuple[Pair, Pair]) -> None:
    a, b = shards
    a.transfer(send(2, FROZEN, amount=100))
    assert a.update([AccountRow(ANN, flags=3)]) == [1]
    a.relay(b)
    assert balance(a, ANN) == 100
    a.check_replay()


def test_money_comes_back_to_an_account_that_has_been_filled_again() -> None:
    """The return has no guard, so room for it is kept when the money goes."""
    a = Pair(0)
    other = account_id(2)
    a.open([AccountRow(BANK, flags=4), AccountRow(other, flags=4), AccountRow(ANN)])
    assert a.transfer(Row(transfer_id(1), BANK, ANN, (1 << 63) - 11)) == R.AMOUNT_INVALID
    assert a.transfer(Row(transfer_id(1), BANK, ANN, AMOUNT_MAX)) == R.OK
    assert a.transfer(send(2, amount=1000)) == R.IN_FLIGHT
    assert a.transfer(Row(transfer_id(3), other, ANN, 1000)) == R.OK
    assert a.transfer(Row(transfer_id(4), other, ANN, 1)) == R.BALANCE_OVERFLOW
    assert a.outcomes(1, 1, [(1, R.CREDIT_ACCOUNT_FROZEN)])
    assert balance(a, ANN) == AMOUNT_MAX + 1000
    assert a.transfer(Row(transfer_id(5), other, ANN, 1)) == R.BALANCE_OVERFLOW, "full until something goes"
    assert a.transfer(Row(transfer_id(6), ANN, other, AMOUNT_MAX)) == R.OK
    assert a.transfer(Row(transfer_id(7), other, ANN, 1)) == R.OK
    a.check_agreement()
    a.check_replay()
    a.check_image()


def test_money_comes_back_to_an_account_that_waits_for_much() -> None:
    """What is held for an account that owes much may be twice the greatest amount: only the sum with its balance is bounded."""
    a, b = Pair(0), Pair(1)
    a.open([AccountRow(BANK, flags=4), AccountRow(ANN, flags=4)])
    b.open([AccountRow(BOB)])
    assert a.transfer(send(2, account_id(999), AMOUNT_MAX)) == R.IN_FLIGHT
    for number in (3, 4):
        assert a.transfer(Row(transfer_id(number), BANK, ANN, AMOUNT_MAX // 2, TransferFlags.HOLD)) == R.OK
    assert a.open([AccountRow(HOUSE, flags=4)]) == [1]
    assert a.transfer(Row(transfer_id(7), HOUSE, ANN, AMOUNT_MAX - 2, TransferFlags.HOLD)) == R.OK
    a.relay(b)
    assert (balance(a, ANN), balance(a, IN_FLIGHT)) == (0, 0)
    assert a.engine.account(ANN).held_in > AMOUNT_MAX  # type: ignore[union-attr]
    a.check_agreement()
    a.check_replay()


def test_all_that_may_be_under_way_comes_back_at_once() -> None:
    """The worst case of both accounts that a return touches; and the bound holds after a replay and in an image."""
    a = Pair(0)
    bank, rich, poor, filler = (account_id(i) for i in range(4))
    a.open([AccountRow(bank, flags=4), AccountRow(rich), AccountRow(poor), AccountRow(filler, flags=4)])

    def receive(number: int, credit: bytes, amount: int) -> list[int] | None:
        return a.credits(2, number, [(transfer_id(100 + number), credit, amount, b"USD\0", 0)])

    assert receive(1, rich, AMOUNT_MAX + 1) == [R.AMOUNT_INVALID]
    assert receive(2, rich, AMOUNT_MAX) == [R.OK]
    assert receive(3, poor, 1) == [R.BALANCE_OVERFLOW], "the in-flight account has no more to give"
    to_nobody = {"credit_id": account_id(999), "credit_shard": 1}
    assert a.transfer(Row(transfer_id(1), rich, amount=AMOUNT_MAX, **to_nobody)) == R.IN_FLIGHT  # type: ignore[arg-type]
    assert a.transfer(Row(transfer_id(2), bank, amount=1, **to_nobody)) == R.IN_FLIGHT  # type: ignore[arg-type]
    one_more = Row(transfer_id(3), bank, account_id(999), 1, credit_shard=3)
    loaded = load_pieces_of(a)
    replayed, _ = a.fresh()
    for frame in a.frames:
        replayed.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
    for engine in (loaded, replayed):
        assert engine.transfers(timestamp_ns=NOW, **transfer_columns([one_more]))[0] == bytes([R.BALANCE_OVERFLOW])
    assert a.transfer(one_more) == R.BALANCE_OVERFLOW
    assert receive(4, poor, AMOUNT_MAX) == [R.OK]
    assert receive(5, filler, 1) == [R.OK]
    assert balance(a, IN_FLIGHT) == -AMOUNT_MAX
    assert a.transfer(Row(transfer_id(4), filler, rich, AMOUNT_MAX)) == R.OK
    assert a.outcomes(1, 2, [(1, R.CREDIT_ACCOUNT_NOT_FOUND), (2, R.CREDIT_ACCOUNT_NOT_FOUND)])
    assert balance(a, rich) == 2 * AMOUNT_MAX
    assert balance(a, IN_FLIGHT) == -(1 << 63) + 1
    a.check_agreement()
    a.check_replay()
    a.check_image()
    again = Row(transfer_id(5), rich, account_id(999), AMOUNT_MAX, credit_shard=1)
    assert a.transfer(again) == R.IN_FLIGHT, "settled sends are no longer under way"


def load_pieces_of(pair: Pair) -> Engine:
    pair.engine.image_begin()
    pieces = read_pieces(pair.engine)
    pair.engine.image_end()
    return load_pieces(pieces, pair.shard)


def test_too_much_under_way_is_an_answer_that_may_change() -> None:
    a, b = Pair(0, {"unsettled_max": 2}), Pair(1)
    a.open([AccountRow(ANN, flags=4)])
    b.open([AccountRow(BOB)])
    assert a.transfers([send(2), send(3), send(4)]) == [R.IN_FLIGHT, R.IN_FLIGHT, R.TOO_MANY_PENDING]
    a.relay(b)
    assert a.transfer(send(4)) == R.IN_FLIGHT


def test_forgotten_refusals_are_gone_and_the_rest_stays(shards: tuple[Pair, Pair]) -> None:
    a, b = shards
    a.transfers([send(2 + i, FROZEN, 1) for i in range(100)])
    b.credits(0, 1, sends_of(a, limit=100))
    for engine in (b.engine, b.twin):
        engine.forget(0, 97)
        assert engine.refusals(0, 0, 10) == [(98, 23), (99, 23), (100, 23)]
        assert engine.status().refusal_count == 3


def test_thousands_of_sends_over_three_shards_settle() -> None:
    """Chunks of the queue are made, passed and freed; an image taken meanwhile keeps what it needs."""
    pairs = [Pair(i) for i in range(3)]
    accounts = [account_id(100 * i) for i in range(3)]
    for pair in pairs:
        pair.open([AccountRow(accounts[pair.shard], flags=4)])
    number = 0
    for round_ in range(6):
        for pair in pairs:
            rows = []
            for i in range(500):
                other = (pair.shard + 1 + i % 2) % 3
                to = accounts[other] if i % 10 else account_id(999)
                rows.append(Row(transfer_id(number), accounts[pair.shard], to, 1 + i, credit_shard=other))
                number += 1
            assert set(pair.transfers(rows)) == {R.IN_FLIGHT}
        for pair in pairs:
            for other_pair in pairs:
                if pair is not other_pair and (round_ + pair.shard) % 3:
                    pair.relay(other_pair, limit=400)
        pairs[0].check_image()
    more = [Row(transfer_id(number + i), accounts[2], accounts[0], 1, credit_shard=0) for i in range(5000)]
    pairs[2].transfers(more[:2500])
    engine = pairs[2].engine
    digest, pending = engine.state_digest(), engine.sends(0, 0, 100_000)
    assert len(pending) > 1024, "more than a chunk will be settled while the image waits"
    engine.image_begin()
    for pair in pairs:
        for other_pair in pairs:
            while pair is not other_pair and pair.engine.sent(other_pair.shard) != (
                pair.engine.sent(other_pair.shard)[1],
                pair.engine.sent(other_pair.shard)[1],
            ):
                pair.relay(other_pair, limit=700)
    pairs[2].transfers(more[2500:])
    loaded = load_pieces(read_pieces(engine), 2)
    engine.image_end()
    assert loaded.state_digest() == digest
    assert loaded.sends(0, 0, 100_000) == pending
    pairs[2].relay(pairs[0], limit=5000)
    assert in_flight(*pairs) == 0
    assert sum(balance(pair, accounts[pair.shard]) for pair in pairs) == 0
    for pair in pairs:
        assert pair.engine.status().unsettled_count == 0
        pair.check_agreement()
        pair.check_image()
