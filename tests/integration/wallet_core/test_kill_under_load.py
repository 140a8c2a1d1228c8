"""Kill −9 under load, again and again on the same folder: acknowledged ⊆ recovered ⊆ sent, and every way of
recovering leads to the same digests. DUCAT_KILL_ROUNDS sets the number of rounds (8; the long form is 200 and more).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from load_process import BATCH_ROWS, batch_id, config

from wallet_core.engine.codes import EventKind, TransferResult
from wallet_core.event_log import read_frames
from wallet_core.shard import ShardHost, open_host, rebuild
from wallet_core.shard.port import shard_folder

ROUNDS = int(os.environ.get("DUCAT_KILL_ROUNDS", "8"))
ROOT = Path(__file__).resolve().parents[3]


def run_and_kill(folder: Path, shards: int, round_number: int, after_s: float) -> tuple[int, list[str]]:
    """One life of the wallet: its id time and what it said before it was killed."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "load_process.py"), str(folder), str(shards), str(round_number)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    try:
        ready = child.stdout.readline().decode()
        assert ready.startswith("ready "), ready
        deadline = time.monotonic() + after_s
        os.set_blocking(child.stdout.fileno(), False)
        said = b""
        while time.monotonic() < deadline:
            said += child.stdout.read() or b""
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    os.set_blocking(child.stdout.fileno(), True)
    said += child.stdout.read()
    child.stdout.close()
    lines = said.decode().split("\n")
    return int(ready.split()[1]), lines[:-1]  # the last piece may be cut off


def recovered_ids(folder: Path, shards: int) -> list[bytes]:
    found = []
    for shard in range(shards):
        for frame in read_frames(shard_folder(folder, shard) / "log", shard, first_kept(folder, shard)):
            for at in range(0, len(frame.body), 48):
                if frame.body[at + 46] in (EventKind.MONEY_MOVED, EventKind.MONEY_SENT):
                    found.append(frame.body[at : at + 16])
    return found


def first_kept(folder: Path, shard: int) -> int:
    return min(int(path.stem) for path in (shard_folder(folder, shard) / "log").glob("*.seg"))


def settle(host: ShardHost) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        figures = host.shards()
        if sum(one.unsettled_count + one.queued_count for one in figures) == 0:
            return
        time.sleep(0.005)
    raise AssertionError("sagas never settled after the restart")


@pytest.mark.timeout(60 + 10 * ROUNDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_kill_under_load(tmp_path: Path, shards: int) -> None:
    seed = int(os.environ.get("DUCAT_KILL_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    applied: dict[bytes, int] = {}  # id → its round; what recoveries so far have shown
    rounds = ROUNDS if shards == 1 else max(2, ROUNDS // 2)
    acknowledged_total = 0
    for round_number in range(rounds):
        where = f"round {round_number} of seed {seed} with {shards} shards"
        time_ms, said = run_and_kill(tmp_path, shards, round_number, rng.uniform(0.02, 0.4))
        sent: set[bytes] = set()
        acknowledged: set[bytes] = set()
        for line in said:
            word = line.split()
            if word[0] == "S":
                sent |= {batch_id(round_number, int(word[1]), row, time_ms) for row in range(BATCH_ROWS)}
            elif word[0] == "A":
                for row, code in enumerate(bytes.fromhex(word[2])):
                    assert code == TransferResult.OK, f"{where}: {TransferResult(code).name}"
                    acknowledged.add(batch_id(round_number, int(word[1]), row, time_ms))
        acknowledged_total += len(acknowledged)

        host = open_host(config(tmp_path, shards))
        digests = {one.shard: one.digest for one in host.shards()}
        for shard in range(shards):
            if first_kept(tmp_path, shard) == 1:
                engine, _ = rebuild(config(tmp_path, shards), shard, from_scratch=True)
                assert engine.state_digest() == digests[shard], f"{where}: snapshot + log differ from the whole log"
        host.start()
        settle(host)
        assert host.check_digests() == dict.fromkeys(range(shards), True), where
        for total in host.totals():
            assert total.balance + total.in_flight == 0, f"{where}: money was made or lost"
        ordered = sorted(acknowledged)
        for at in range(0, len(ordered), 8000):
            host.submit_results(at, ordered[at : at + 8000])
            codes: bytes = b""
            while not codes:
                for _, answer in host.completions():
                    codes = answer
            assert set(codes) == {TransferResult.OK}, f"{where}: an acknowledged transfer is not remembered"
        host.close()

        found = recovered_ids(tmp_path, shards)
        assert len(found) == len(set(found)), f"{where}: a transfer was applied twice"
        now = {one for one in found if one not in applied}
        kept_everything = all(first_kept(tmp_path, shard) == 1 for shard in range(shards))
        if kept_everything:
            assert acknowledged <= now, f"{where}: {len(acknowledged - now)} acknowledged transfers were lost"
        assert now <= sent, f"{where}: {len(now - sent)} transfers were recovered that nobody sent"
        applied.update(dict.fromkeys(now, round_number))
    assert acknowledged_total > 0
