"""The wallet engine alone: one thread, no log, no network.

    python -m loadtest.bench.engine --accounts 10000 --transfers 2000000 [--json]

Opens the accounts, applies random transfers in batches of 8,190, replays the events into a fresh engine, takes an image
while transfers go on, loads it, and checks digests and balances after each. Times are of the engine's calls through its
Python face, which copies the events out of the engine's buffer once more than the shard host does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import TransferResult

clock = time.thread_time if "--cpu" in sys.argv else time.perf_counter
BATCH = 8_190
EVENT_BYTES = 48
START_MS = 1_800_000_000_000


def transfer_ids(count: int, per_ms: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """UUIDs version 7, `per_ms` of them in each millisecond, the rest random."""
    ids = random.integers(0, 256, (count, 16), dtype=np.uint8)
    ms = (START_MS + np.arange(count, dtype=np.uint64) // per_ms).astype(">u8").view(np.uint8).reshape(count, 8)
    ids[:, :6] = ms[:, 2:]
    ids[:, 6] = 0x70 | ids[:, 6] & 0x0F
    ids[:, 8] = 0x80 | ids[:, 8] & 0x3F
    return ids


class Timed:
    """Wall time of many short pieces."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def __enter__(self) -> None:
        self.start = clock()

    def __exit__(self, *_: object) -> None:
        self.laps.append(clock() - self.start)

    @property
    def total(self) -> float:
        return sum(self.laps)

    def ms(self, quantile: float) -> float:
        return sorted(self.laps)[min(len(self.laps) - 1, int(quantile * len(self.laps)))] * 1000


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def run(accounts: int, transfers: int, per_ms: int, image: bool) -> dict[str, Any]:
    random = np.random.default_rng(1)
    account_ids = random.integers(0, 256, (accounts, 16), dtype=np.uint8)
    engine = Engine()
    now = START_MS * 1_000_000
    figures: dict[str, Any] = {"accounts": accounts, "transfers": transfers}
    frames: list[tuple[int, int, bytes]] = []  # first sequence, timestamp, events

    before = resident_bytes()
    opening = Timed()
    may_overdraw = np.full(BATCH, 4, dtype="<u2").tobytes()
    for start in range(0, accounts, BATCH):
        ids = account_ids[start : start + BATCH].tobytes()
        count = len(ids) // 16
        with opening:
            results, events = engine.open_accounts(ids, b"USD\0" * count, now, flags=may_overdraw[: 2 * count])
        assert set(results) == {1}
        frames.append((start + 1, now, events))
    figures["opened_per_second"] = accounts / opening.total
    figures["opening_batch_ms_max"] = opening.ms(1)
    figures["bytes_per_account_committed"] = (engine.status().memory_bytes - Engine().status().memory_bytes) / accounts
    events_bytes = sum(len(frame[2]) for frame in frames)
    figures["bytes_per_account_resident"] = (resident_bytes() - before - events_bytes) / accounts

    applying = Timed()
    sequence = accounts + 1
    done = 0
    while done < transfers:  # columns of 100 batches at a time, so that they need little memory
        count = min(100 * BATCH, transfers - done)
        ids = transfer_ids(count, per_ms, random)
        ids[:, :6] = transfer_time(done, count, per_ms)
        debit = random.integers(0, accounts, count)
        credit = (debit + random.integers(1, accounts, count)) % accounts
        columns = (ids.tobytes(), account_ids[debit].tobytes(), account_ids[credit].tobytes())
        amounts = random.integers(1, 1000, count, dtype="<i8").tobytes()
        for start in range(0, count, BATCH):
            rows = min(BATCH, count - start)
            batch = [column[16 * start : 16 * (start + rows)] for column in columns]
            part = amounts[8 * start : 8 * (start + rows)]
            now = (START_MS + (done + start + rows) // per_ms) * 1_000_000
            with applying:
                results, events = engine.transfers(*batch, part, now)
            assert results.count(TransferResult.OK) == rows
            frames.append((sequence, now, events))
            sequence += rows
        done += count
    figures["transfers_per_second"] = transfers / applying.total
    figures["batch_ms"] = {"p50": applying.ms(0.5), "p99": applying.ms(0.99), "max": applying.ms(1)}
    assert engine.verify_digest()
    assert engine.currency_totals()["USD"].balance == 0

    replayed = Engine()
    replaying = Timed()
    for first, moment, events in frames:
        with replaying:
            replayed.replay_frame(events, first, moment)
    figures["replayed_events_per_second"] = (accounts + transfers) / replaying.total
    assert replayed.state_digest() == engine.state_digest()
    del replayed, frames

    if image:
        figures["image"] = image_beside_transfers(engine, account_ids, now, random)
    return figures


def transfer_time(first: int, count: int, per_ms: int) -> np.ndarray[Any, Any]:
    ms = START_MS + (first + np.arange(count, dtype=np.uint64)) // per_ms
    return ms.astype(">u8").view(np.uint8).reshape(count, 8)[:, 2:]


def image_beside_transfers(
    engine: Engine, account_ids: np.ndarray[Any, Any], now: int, random: np.random.Generator
) -> dict[str, Any]:
    """Batches go on while the image is read, one piece between two batches, as a reader of half the machine would."""
    accounts = len(account_ids)
    count = 200 * BATCH
    ids = transfer_ids(count, 5000, random)
    ids[:, :6] = np.frombuffer((now // 1_000_000).to_bytes(6, "big"), dtype=np.uint8)
    debit = random.integers(0, accounts, count)
    credit = (debit + random.integers(1, accounts, count)) % accounts
    columns = (ids.tobytes(), account_ids[debit].tobytes(), account_ids[credit].tobytes())
    amounts = random.integers(1, 1000, count, dtype="<i8").tobytes()
    digest = engine.state_digest()
    beginning, applying, reading = Timed(), Timed(), Timed()
    with beginning:
        engine.image_begin()
    pieces: list[bytes] = []
    more = True
    for start in range(0, count, BATCH):
        batch = [column[16 * start : 16 * (start + BATCH)] for column in columns]
        with applying:
            engine.transfers(*batch, amounts[8 * start : 8 * (start + BATCH)], now)
        with reading:
            more = more and bool(piece := engine.image_piece())
            if more:
                pieces.append(piece)
    while more:
        with reading:
            more = bool(piece := engine.image_piece())
            if more:
                pieces.append(piece)
    ending = Timed()
    with ending:
        engine.image_end()
    loading = Timed()
    loaded = Engine()
    for piece in pieces:
        with loading:
            loaded.load(piece)
    with loading:
        loaded.loaded()
    assert loaded.state_digest() == digest
    size = sum(map(len, pieces))
    return {
        "begin_ms": beginning.total * 1000,
        "end_ms": ending.total * 1000,
        "batch_ms_while_reading": {"p50": applying.ms(0.5), "p99": applying.ms(0.99), "max": applying.ms(1)},
        "bytes": size,
        "read_bytes_per_second": size / reading.total,
        "load_seconds": loading.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--accounts", type=int, default=10_000)
    parser.add_argument("--transfers", type=int, default=2_000_000)
    parser.add_argument("--per-ms", type=int, default=5_000, help="transfer ids of one millisecond")
    parser.add_argument("--no-image", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the thread, for a machine that others use")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = run(arguments.accounts, arguments.transfers, arguments.per_ms, not arguments.no_image)
    if arguments.json:
        json.dump(figures, sys.stdout)
        print()
        return
    for name, value in figures.items():
        print(f"{name:32} {value:,.1f}" if isinstance(value, int | float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()
