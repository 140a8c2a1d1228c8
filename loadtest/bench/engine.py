"""The wallet engine alone: one thread, no log, no network.

    python -m loadtest.bench.engine --accounts 10000 --transfers 2000000 [--json]

Opens the accounts, applies random transfers in batches of 8,190, replays the events into a fresh engine, takes an image
while transfers go on, loads it, and checks digests and balances after each. Times are of the engine's calls through its
Python face, which copies the events out of the engine's buffer once more than the shard host does. As in the shard host,
another thread touches the memory for the next ids ahead of time.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import AccountResult, TransferResult

clock = time.thread_time if "--cpu" in sys.argv else time.perf_counter
BATCH = 8_190
EVENT_BYTES = 48
START_MS = 1_800_000_000_000


def transfer_ids(first: int, count: int, per_ms: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """UUIDs version 7, `per_ms` of them in each millisecond, the rest random."""
    ids = random.integers(0, 256, (count, 16), dtype=np.uint8)
    ms = START_MS + (first + np.arange(count, dtype=np.uint64)) // per_ms
    ids[:, :6] = ms.astype(">u8").view(np.uint8).reshape(count, 8)[:, 2:]
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


class Log:
    """Frames, in one buffer: bytes objects of every batch would be new memory, which costs more than the engine."""

    def __init__(self, events: int) -> None:
        self.buffer = np.zeros(events * EVENT_BYTES, dtype=np.uint8)
        self.buffer[::4096] = 1
        self.frames: list[tuple[int, int, int, int]] = []
        self.length = 0

    def append(self, now: int, events: bytes) -> None:
        end = self.length + len(events)
        self.buffer[self.length : end] = np.frombuffer(events, dtype=np.uint8)
        self.frames.append((self.length // EVENT_BYTES + 1, now, self.length, end))
        self.length = end

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        for first, now, start, end in self.frames:
            yield first, now, self.buffer[start:end].tobytes()


class Preparing:
    """Touches an engine's next memory in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.done.wait(0.005):
            if self.engine.memory_wanted():
                self.engine.prepare_memory()

    def __enter__(self) -> None:
        self.engine.prepare_memory()
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def run(accounts: int, transfers: int, per_ms: int, image: bool) -> dict[str, Any]:
    random = np.random.default_rng(1)
    account_ids = random.integers(0, 256, (accounts, 16), dtype=np.uint8)
    log = Log(accounts + transfers)
    engine = Engine()
    engine.prepare_memory()  # the first ids' memory is no account's
    before = resident_bytes()
    empty = engine.status().memory_bytes
    figures: dict[str, Any] = {"accounts": accounts, "transfers": transfers}

    now = START_MS * 1_000_000
    opening = Timed()
    may_overdraw = np.full(BATCH, 4, dtype="<u2").tobytes()
    with Preparing(engine):
        for start in range(0, accounts, BATCH):
            ids = account_ids[start : start + BATCH].tobytes()
            count = len(ids) // 16
            with opening:
                results, events = engine.open_accounts(ids, b"USD\0" * count, now, flags=may_overdraw[: 2 * count])
            assert results.count(AccountResult.OK) == count
            log.append(now, events)
    figures["opened_per_second"] = accounts / opening.total
    figures["opening_batch_ms_max"] = opening.ms(1)
    figures["bytes_per_account_committed"] = (engine.status().memory_bytes - empty) / accounts
    figures["bytes_per_account_resident"] = (resident_bytes() - before) / accounts

    applying = Timed()
    done = 0
    with Preparing(engine):
        while done < transfers:  # the columns of 100 batches at a time, so that they need little memory
            count = min(100 * BATCH, transfers - done)
            columns, amounts = random_columns(account_ids, transfer_ids(done, count, per_ms, random), random)
            for start in range(0, count, BATCH):
                rows = min(BATCH, count - start)
                batch = [column[16 * start : 16 * (start + rows)] for column in columns]
                part = amounts[8 * start : 8 * (start + rows)]
                now = (START_MS + (done + start + rows) // per_ms) * 1_000_000
                with applying:
                    results, events = engine.transfers(*batch, part, now)
                assert results.count(TransferResult.OK) == rows
                log.append(now, events)
            done += count
    figures["transfers_per_second"] = transfers / applying.total
    figures["transfers_per_second_median_batch"] = min(BATCH, transfers) / applying.ms(0.5) * 1000
    figures["batch_ms"] = {"p50": applying.ms(0.5), "p99": applying.ms(0.99), "max": applying.ms(1)}
    assert engine.verify_digest()
    assert engine.currency_totals()["USD"].balance == 0

    replayed = Engine()
    reopening, replaying = Timed(), Timed()
    with Preparing(replayed):
        for first, moment, events in log:
            with reopening if first <= accounts else replaying:
                replayed.replay_frame(events, first, moment)
    figures["replayed_accounts_per_second"] = accounts / reopening.total
    figures["replayed_transfers_per_second"] = transfers / replaying.total
    assert replayed.state_digest() == engine.state_digest()
    del replayed, log

    if image:
        figures["image"] = image_beside_transfers(engine, account_ids, now, random)
    return figures


def random_columns(
    account_ids: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], random: np.random.Generator
) -> tuple[list[bytes], bytes]:
    """Transfers between two different accounts each: the three id columns, and the amounts."""
    count, accounts = len(ids), len(account_ids)
    debit = random.integers(0, accounts, count)
    credit = (debit + random.integers(1, accounts, count)) % accounts
    columns = [ids.tobytes(), account_ids[debit].tobytes(), account_ids[credit].tobytes()]
    return columns, random.integers(1, 1000, count, dtype="<i8").tobytes()


def image_beside_transfers(
    engine: Engine, account_ids: np.ndarray[Any, Any], now: int, random: np.random.Generator
) -> dict[str, Any]:
    """Batches go on while the image is read, one piece between two batches, as a reader of half the machine would."""
    count = 200 * BATCH
    first = (now // 1_000_000 - START_MS + 1) * 5000
    columns, amounts = random_columns(account_ids, transfer_ids(first, count, 5000, random), random)
    digest = engine.state_digest()
    beginning, applying, reading = Timed(), Timed(), Timed()
    pieces: list[bytes] = []
    with beginning:
        engine.image_begin()
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
