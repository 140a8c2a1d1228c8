"""What is remembered of ids is bounded, and what is forgotten is refused, never applied twice."""

from __future__ import annotations

from tests.unit.wallet_core.engine.harness import MS, NOW, AccountRow, Pair, account_id, transfer_id
from wallet_core.engine.codes import TransferFlags, TransferResult
from wallet_core.engine.twin import Row

R = TransferResult
BANK, ANN = map(account_id, range(2))


def opened(**parameters: int) -> Pair:
    pair = Pair(parameters=parameters)
    pair.open([AccountRow(BANK, flags=4), AccountRow(ANN)])
    return pair


def row(number: int, ms: int) -> Row:
    return Row(transfer_id(number, NOW // MS + ms), BANK, ANN, 1)


def test_ids_beyond_the_count_are_refused_not_applied_twice() -> None:
    pair = opened(generation_ids=4, id_count_max=12)
    rows = [row(i, i) for i in range(40)]
    assert pair.transfers(rows) == [R.OK] * 40
    status = pair.engine.status()
    assert (status.generation_count, status.id_count) == (3, 12)
    assert status.floor_ms == NOW // MS + 27
    again = pair.transfers(rows)
    assert again == [R.ID_TOO_OLD] * 28 + [R.OK] * 12
    assert pair.engine.account(ANN).balance == 40  # type: ignore[union-attr]
    pair.check_replay()


def test_ids_beyond_the_window_are_refused() -> None:
    pair = opened(id_window_ms=1000, generation_ids=4, id_count_max=400)
    assert pair.transfers([row(i, 0) for i in range(6)]) == [R.OK] * 6
    assert pair.transfer(row(0, 0), NOW + 999 * MS) == R.OK
    assert pair.transfer(row(0, 0), NOW + 1000 * MS) == R.ID_TOO_OLD
    assert pair.engine.status().generation_count == 1
    assert pair.transfer(row(50, 1), NOW + 1000 * MS) == R.OK


def test_ids_out_of_order_are_found_in_any_generation() -> None:
    pair = opened(generation_ids=8, id_count_max=8000)
    rows = [row(i, (i * 37) % 200) for i in range(400)]
    assert pair.transfers(rows) == [R.OK] * 400
    assert pair.transfers(rows) == [R.OK] * 400
    assert pair.engine.account(ANN).balance == 400  # type: ignore[union-attr]
    other = [Row(r.id, ANN, BANK, 1) for r in rows]
    assert pair.transfers(other) == [R.ID_REUSED] * 400


def test_a_hold_outlives_the_memory_of_its_id() -> None:
    pair = opened(generation_ids=2, id_count_max=4)
    hold = Row(transfer_id(1), BANK, ANN, 5, TransferFlags.HOLD)
    assert pair.transfer(hold) == R.OK
    assert pair.transfers([row(10 + i, 1 + i) for i in range(9)]) == [R.OK] * 9
    assert pair.engine.result(hold.id) == 0
    post = Row(transfer_id(2, NOW // MS + 20), bytes(16), bytes(16), 0, TransferFlags.POST, hold.id)
    assert pair.transfer(post) == R.OK
    void = Row(transfer_id(3, NOW // MS + 20), bytes(16), bytes(16), 0, TransferFlags.VOID, hold.id)
    assert pair.transfer(void) == R.HOLD_NOT_FOUND
    pair.check_image()
    pair.check_replay()


def test_memory_of_dropped_generations_is_used_again() -> None:
    pair = opened(generation_ids=64, id_count_max=256)
    native = pair.engine
    empty = native.status().memory_bytes
    for batch in range(30):
        assert set(pair.transfers([row(batch * 50 + i, batch * 50 + i) for i in range(50)])) == {R.OK}
        if batch % 3 == 0 and native.memory_wanted():
            native.prepare_memory()
    generation_bytes = 24 * 64 + 4 * (64 + 64 // 2 + 32)
    assert native.status().memory_bytes <= empty + (4 + 2) * generation_bytes, "four, one ready, one to be cleaned"


def test_room_that_was_asked_for_is_there_before_it_is_needed() -> None:
    pair = opened(generation_ids=64, id_count_max=1024, room_ids=300)
    native = pair.engine
    generation_bytes = 24 * 64 + 4 * (64 + 64 // 2 + 32)
    assert native.room_wanted()
    before = native.status().memory_bytes
    while native.room_wanted():
        native.prepare_memory()
    assert native.status().memory_bytes == before + 5 * generation_bytes, "300 ids in generations of 64"
    full = native.status().memory_bytes
    for batch in range(3):
        assert set(pair.transfers([row(batch * 64 + i, 1 + i) for i in range(64)])) == {R.OK}
    assert native.status().memory_bytes == full, "nothing new was asked for"
    assert native.room_wanted()
    assert not native.memory_wanted(), "two still stand ready: no hurry"
    assert set(pair.transfers([row(192 + i, 1 + i) for i in range(64)])) == {R.OK}
    assert native.memory_wanted()
    while native.room_wanted():
        native.prepare_memory()
    assert native.status().memory_bytes == full + 4 * generation_bytes
    pair.check_replay()


def test_ids_that_fall_into_full_buckets_are_found_again() -> None:
    pair = opened(generation_ids=4096, id_count_max=3 * 4096)
    rows = [row(i, 1 + i % 50) for i in range(4096)]
    assert set(pair.transfers(rows)) == {R.OK}
    assert set(pair.transfers(rows[::-1])) == {R.OK}, "each is known"
    assert pair.engine.status().repeated_count == 4096
    pair.check_image()
    pair.check_replay()
