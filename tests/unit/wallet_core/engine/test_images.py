"""Images beside a busy writer are consistent; damaged ones are refused; memory that runs out poisons, never corrupts."""

from __future__ import annotations

import struct
import threading
from random import Random

import pytest

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
from wallet_core.engine.codes import TransferFlags
from wallet_core.engine.twin import Row
from wallet_core.engine.views import EnginePoisoned, EngineRefused

F = TransferFlags
Z = bytes(16)


def busy(accounts: int, **parameters: int) -> Engine:
    engine = Engine(**parameters)
    for start in range(0, accounts, 5000):
        ids = b"".join(account_id(i) for i in range(start, min(accounts, start + 5000)))
        engine.open_accounts(ids, b"USD\0" * (len(ids) // 16), NOW, flags=b"\4\0" * (len(ids) // 16))
    return engine


def batch(engine: Engine, random: Random, accounts: int, number: int, count: int = 500) -> tuple[int, int, bytes]:
    """Transfers, holds, and ends of some holds; returns the frame."""
    rows = []
    for i in range(count):
        debit = random.randrange(accounts)
        credit = (debit + 1 + random.randrange(accounts - 1)) % accounts
        flags = F.HOLD if i % 3 == 0 else 0
        id_ = transfer_id(number + i, NOW // MS + (number + i) // 100)
        rows.append(Row(id_, account_id(debit), account_id(credit), 1 + i, flags))
        if i % 6 == 5:
            rows[-1] = Row(id_, Z, Z, 0, F.POST if i % 12 == 5 else F.VOID, rows[i - 2].id)
    first = engine.status().sequence + 1
    results, events = engine.transfers(
        b"".join(r.id for r in rows),
        b"".join(r.debit_id for r in rows),
        b"".join(r.credit_id for r in rows),
        struct.pack(f"<{count}q", *(r.amount for r in rows)),
        NOW,
        flags=struct.pack(f"<{count}H", *(r.flags for r in rows)),
        pending_ids=b"".join(r.pending_id for r in rows),
    )
    assert set(results) == {1}
    return first, NOW, events


def test_an_image_beside_a_busy_writer_in_another_thread() -> None:
    """The reader has no lock: whatever it sees, the loaded image is the state at its beginning."""
    accounts, random = 40_000, Random(1)
    engine = busy(accounts, generation_ids=1000, id_count_max=20_000)
    number = 0
    for _ in range(3):
        batch(engine, random, accounts, number)
        number += 500
    for _ in range(4):
        digest, status = engine.state_digest(), engine.status()
        engine.image_begin()
        pieces: list[bytes] = []
        reader = threading.Thread(target=lambda: pieces.extend(read_pieces(engine)))  # noqa: B023
        reader.start()
        frames = []
        while reader.is_alive() or len(frames) < 3:
            frames.append(batch(engine, random, accounts, number))
            number += 500
        reader.join()
        engine.image_end()
        loaded = load_pieces(pieces)
        assert loaded.state_digest() == digest
        ignored = {"memory_bytes": 0, "repeated_count": 0}
        assert loaded.status()._replace(**ignored) == status._replace(**ignored)
        for first, timestamp, events in frames:
            loaded.replay_frame(events, first, timestamp)
        assert loaded.state_digest() == engine.state_digest()
        assert loaded.verify_digest()


def test_memory_is_prepared_beside_a_busy_writer() -> None:
    accounts, random = 1000, Random(2)
    engine = busy(accounts, generation_ids=256, id_count_max=1024)
    done = threading.Event()

    def prepare() -> None:
        while not done.is_set():
            if engine.memory_wanted():
                engine.prepare_memory()

    helper = threading.Thread(target=prepare)
    helper.start()
    frames = [batch(engine, random, accounts, 500 * i) for i in range(40)]
    done.set()
    helper.join()
    plain = busy(accounts, generation_ids=256, id_count_max=1024)
    for first, timestamp, events in frames:
        plain.replay_frame(events, first, timestamp)
    assert plain.state_digest() == engine.state_digest()
    assert plain.status().id_count == engine.status().id_count


def test_only_one_image_at_a_time_and_it_may_be_given_up() -> None:
    engine = busy(10)
    engine.image_begin()
    with pytest.raises(EngineRefused):
        engine.image_begin()
    engine.image_piece()
    engine.image_end()
    engine.image_end()
    with pytest.raises(EngineRefused):
        engine.image_piece()
    engine.image_begin()
    assert load_pieces(read_pieces(engine)).state_digest() == engine.state_digest()


def image_of_everything() -> list[bytes]:
    pair = Pair(parameters={"generation_ids": 4, "id_count_max": 40})
    pair.open([AccountRow(account_id(i), flags=4) for i in range(5)])
    pair.transfers([Row(transfer_id(i), account_id(0), account_id(1), 9, F.HOLD, timeout_s=i) for i in range(9)])
    pair.transfers([Row(transfer_id(10 + i), account_id(0), account_id(7), 9, credit_shard=1) for i in range(3)])
    pair.credits(2, 1, [(transfer_id(50), account_id(99), 1, b"USD\0", 0)])
    pair.engine.image_begin()
    pair.transfers([Row(transfer_id(20), Z, Z, 0, F.POST, transfer_id(2))])
    pieces = read_pieces(pair.engine)
    pair.engine.image_end()
    assert {piece[4] for piece in pieces} == set(range(1, 10)), "every kind of piece"
    return pieces


def test_a_damaged_image_is_refused() -> None:
    pieces = image_of_everything()
    load_pieces(pieces)
    for index in range(len(pieces)):
        with pytest.raises(EngineRefused):
            load_pieces(pieces[:index] + pieces[index + 1 :])
        with pytest.raises(EngineRefused):
            load_pieces([*pieces[:index], pieces[index], *pieces[index:]])
        with pytest.raises(EngineRefused):
            load_pieces([*pieces[:index], pieces[index][:-1], *pieces[index + 1 :]])
        with pytest.raises(EngineRefused):
            load_pieces([*pieces[:index], b"\0" + pieces[index][1:], *pieces[index + 1 :]])
    with pytest.raises(EngineRefused):
        load_pieces(pieces, shard=1)


def test_a_changed_balance_in_an_image_is_noticed() -> None:
    pieces = image_of_everything()
    at = next(i for i, piece in enumerate(pieces) if piece[4] == 2)
    for byte in range(32, 32 + 62):  # the first account's fields that mean something
        piece = bytearray(pieces[at])
        piece[byte + 3 * 64] ^= 1
        with pytest.raises(EngineRefused):
            load_pieces([*pieces[:at], bytes(piece), *pieces[at + 1 :]])


def test_any_flipped_byte_of_an_image_never_crashes() -> None:
    """The snapshot's checksum finds it first; should it not, the engine refuses or loads, but stays whole."""
    pieces = image_of_everything()
    random = Random(3)
    for _ in range(400):
        at = random.randrange(len(pieces))
        piece = bytearray(pieces[at])
        piece[random.randrange(len(piece))] ^= 1 << random.randrange(8)
        try:
            engine = load_pieces([*pieces[:at], bytes(piece), *pieces[at + 1 :]])
        except (EngineRefused, EnginePoisoned):
            continue
        engine.expire(NOW + 10**12)
        engine.currency_totals()


def test_memory_that_runs_out_poisons_and_nothing_else() -> None:
    """Every allocation of a history in turn: the engine refuses from then on, and its log up to there replays."""
    needed = history(Engine()).status().memory_bytes
    empty = Engine().status().memory_bytes
    poisoned = 0
    for limit in range(empty, needed + 1, max(1, (needed - empty) // 40)):
        engine = Engine(memory_bytes_max=limit)
        frames: list[tuple[int, int, bytes]] = []
        try:
            history(engine, frames)
        except EnginePoisoned:
            poisoned += 1
            with pytest.raises(EnginePoisoned):
                engine.expire(NOW)
            with pytest.raises(EnginePoisoned):
                engine.open_accounts(account_id(1), b"USD\0", NOW)
            with pytest.raises(EnginePoisoned):
                engine.image_begin()
        fresh = Engine()
        for first, timestamp, events in frames:
            fresh.replay_frame(events, first, timestamp)
        assert fresh.verify_digest()
    assert poisoned > 10
    with pytest.raises(MemoryError):
        Engine(memory_bytes_max=100)


def history(engine: Engine, frames: list[tuple[int, int, bytes]] | None = None) -> Engine:
    frames = [] if frames is None else frames
    random = Random(4)
    for start in range(0, 3000, 100):
        ids = b"".join(account_id(i) for i in range(start, start + 100))
        _, events = engine.open_accounts(ids, b"USD\0" * 100, NOW, flags=b"\4\0" * 100)
        frames.append((start + 1, NOW, events))
    for i in range(8):
        frames.append(batch(engine, random, 3000, 500 * i))
    return engine


def test_parameters_are_checked() -> None:
    for bad in (
        {"shard": 256},
        {"generation_ids": 0},
        {"generation_ids": (1 << 20) + 1},
        {"generation_ids": 10, "id_count_max": 19},
        {"id_window_ms": 0},
        {"accounts_max": 0},
        {"holds_max": (1 << 30) + 1},
        {"unsettled_max": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad)) if len(bad) == 1 else "id_count_max"):
            Engine(**bad)
    assert MS
