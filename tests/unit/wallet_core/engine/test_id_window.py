"""What is remembered of ids is bounded, and what is forgotten is refused, never applied twice."""

from __future__ import annotations

from tests.unit.wallet_core.engine.harness import (
    MS,
    NOW,
    AccountRow,
    Pair,
    account_id,
    load_pieces,
    read_pieces,
    transfer_id,
)
from wallet_core.engine._engine import Engine
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
        rows = [row(batch * 50 + i, batch * 50 + i) for i in range(50)]
        assert set(pair.transfers(rows, NOW + batch * 50 * MS)) == {R.OK}
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


def test_room_is_for_no_more_ids_than_are_remembered_and_not_at_the_cost_of_a_memory_limit() -> None:
    for parameters, generations in (
        ({"room_ids": 1 << 30}, 4),
        ({"room_ids": 1 << 30, "memory_bytes_max": 1 << 26}, 1),
    ):
        native = Engine(0, generation_ids=64, id_count_max=4 * 64, **parameters)
        before = native.status().memory_bytes
        while native.room_wanted():
            native.prepare_memory()
        assert native.status().memory_bytes == before + generations * (24 * 64 + 4 * (64 + 64 // 2 + 32))


def test_ids_that_fall_into_full_buckets_are_found_again() -> None:
    pair = opened(generation_ids=4096, id_count_max=3 * 4096)
    rows = [row(i, 1 + i % 50) for i in range(4096)]
    assert set(pair.transfers(rows)) == {R.OK}
    assert set(pair.transfers(rows[::-1])) == {R.OK}, "each is known"
    assert pair.engine.status().repeated_count == 4096
    pair.check_image()
    pair.check_replay()


def test_a_client_whose_clock_is_ahead_does_not_lift_the_floor_above_the_ids_of_the_others() -> None:
    """One of eight ids comes 290 s early, and memory turns over in two seconds."""
    pair = opened(generation_ids=64, id_count_max=16 * 64)
    early: list[Row] = []
    honest: list[Row] = []
    refused = 0
    for step in range(400):  # 10 ms each
        now = NOW + step * 10 * MS
        batch = [row(8 * step + i, step * 10 - 5 + (290_000 if i == 0 else 0)) for i in range(8)]
        results = pair.transfers(batch, now)
        assert results[1:] == [R.OK] * 7, f"honest ids are refused at step {step}"
        assert results[0] in (R.OK, R.ID_AHEAD)
        refused += results[0] == R.ID_AHEAD
        honest += batch[1:]
        early += [batch[0]] if results[0] == R.OK else []
    assert len(early) == 256 + 1, "a quarter of the memory, and the very first id"
    assert refused == 400 - 257
    now = NOW + 4000 * MS
    balance = pair.engine.account(ANN).balance  # type: ignore[union-attr]
    assert pair.transfers(early, now) == [R.OK] * 257, "repeated, although no new one is taken"
    assert set(pair.transfers(honest, now)) == {R.OK, R.ID_TOO_OLD}
    assert pair.engine.account(ANN).balance == balance  # type: ignore[union-attr]
    assert pair.engine.status().floor_ms < now // MS - 900, "a retry after nine tenths of a second still finds its id"
    pair.check_agreement()
    pair.check_image()
    pair.check_replay()


def test_early_ids_are_let_go_of_when_their_time_has_come() -> None:
    pair = opened(generation_ids=4, id_count_max=32)
    assert pair.transfer(row(0, 0)) == R.OK
    assert pair.transfers([row(1 + i, 60_000 + i) for i in range(9)]) == [R.OK] * 8 + [R.ID_AHEAD]
    assert pair.transfer(row(9, 60_008), NOW + 60_010 * MS) == R.OK, "it is not early any more"
    assert pair.transfers([row(20 + i, 60_020 + i) for i in range(40)], NOW + 60_100 * MS) == [R.OK] * 40
    assert pair.transfers([row(1 + i, 60_000 + i) for i in range(9)], NOW + 60_100 * MS) == [R.ID_TOO_OLD] * 9
    assert pair.transfers([row(70 + i, 120_000 + i) for i in range(9)], NOW + 60_100 * MS) == [R.OK] * 8 + [R.ID_AHEAD]
    pair.check_agreement()
    pair.check_replay()


def test_an_early_member_without_room_breaks_its_chain() -> None:
    pair = opened(generation_ids=2, id_count_max=16)
    assert pair.transfer(row(0, 0)) == R.OK
    assert pair.transfers([row(1 + i, 60_000) for i in range(4)]) == [R.OK] * 4
    first, last = row(10, 1), row(11, 60_000)
    first.flags = TransferFlags.LINKED
    assert pair.transfers([first, last]) == [R.LINKED_FAILED, R.ID_AHEAD]
    assert pair.engine.account(ANN).balance == 5  # type: ignore[union-attr]
    pair.check_replay()


def test_the_server_is_a_little_behind_all_of_its_clients() -> None:
    """All ids are early: nothing is refused as long as what is to come fits a quarter of the memory."""
    pair = opened(generation_ids=16, id_count_max=256)
    for step in range(200):
        rows = [row(4 * step + i, step * 1000 + 10_000) for i in range(4)]
        assert pair.transfers(rows, NOW + step * 1000 * MS) == [R.OK] * 4
        assert pair.transfers(rows, NOW + step * 1000 * MS) == [R.OK] * 4
    pair.check_agreement()
    pair.check_image()
    pair.check_replay()


def test_an_image_of_version_1_is_read() -> None:
    """It has a word less in its header, and no early ids apart."""
    pair = opened(generation_ids=8, id_count_max=80)
    rows = [row(i, i) for i in range(30)]
    assert pair.transfers(rows) == [R.OK] * 30
    pair.engine.image_begin()
    pieces = read_pieces(pair.engine)
    pair.engine.image_end()
    header = bytearray(pieces[0][:-8])
    header[24:32] = (17).to_bytes(8, "little")
    header[32:40] = (1).to_bytes(8, "little")
    loaded = load_pieces([bytes(header), *pieces[1:]])
    assert loaded.state_digest() == pair.engine.state_digest()
    assert [loaded.result(r.id) for r in rows] == [R.OK] * 30
    assert loaded.status()._replace(memory_bytes=0, repeated_count=0) == pair.engine.status()._replace(
        memory_bytes=0, repeated_count=0
    )


def test_the_window_may_change_with_a_restart_and_the_floor_never_sinks() -> None:
    pair = opened(id_window_ms=1000, generation_ids=4, id_count_max=400)
    assert pair.transfer(row(1, 0)) == R.OK
    assert pair.transfer(row(2, 5000), NOW + 5000 * MS) == R.OK
    engine = pair.engine
    floor = engine.status().floor_ms
    engine.set_id_window(10_000)
    engine.expire(NOW + 6000 * MS)
    assert engine.status().floor_ms == floor, "what was forgotten is not let in again"
    engine.expire(NOW + 20_000 * MS)
    assert engine.status().floor_ms == NOW // MS + 10_000
    engine.set_id_window(1000)
    engine.expire(NOW + 20_001 * MS)
    assert engine.status().floor_ms == NOW // MS + 19_001
