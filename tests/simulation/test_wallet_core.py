"""The wallet core under crashes, torn writes and a bad network: it keeps its rules, and a failure can be
replayed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import ops.simulate
from ops.__main__ import main
from tests.simulation.planted import AcknowledgesBeforeSync, TwinShard
from wallet_core.simulation import Options, run_seed

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 120
#: What must really have happened, or the seeds prove nothing.
WANTED = (
    "all shards crashed at once",
    "chain across shards applied",
    "chain across shards refused",
    "chain ended by another",
    "chain repeated",
    "chain step without an answer",
    "clock jumped",
    "crash between write and sync",
    "crash during a snapshot",
    "delivery with a gap ignored",
    "durable mark went back",
    "log bit flipped",
    "message delayed",
    "message doubled",
    "message lost",
    "message lost in a partition",
    "message reordered",
    "message to a dead shard",
    "partition",
    "power cut",
    "process killed",
    "request repeated",
    "slow shard",
    "snapshot bit flipped",
    "snapshot taken during load",
    "sync failed",
    "torn tail cut off",
    "torn write",
    "unsettled sends delivered again",
    "unsynced write lost",
    "unsynced write survived",
    "write failed",
    "write met a full disk",
    "write was short",
)


def test_every_rule_holds_under_every_fault() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        outcome = run_seed(seed)
        assert outcome.violation is None, "\n".join((str(outcome.violation), *outcome.trace, outcome.command))
        counts.update(outcome.counts)
    assert not [kind for kind in WANTED if not counts[kind]], counts


@pytest.mark.parametrize("shards", [1, 2, 6])
def test_any_number_of_shards(shards: int) -> None:
    for seed in range(5):
        outcome = run_seed(seed, Options(shards=shards, steps=300))
        assert outcome.violation is None, "\n".join((str(outcome.violation), *outcome.trace, outcome.command))


def test_full_segments_retention_and_a_full_disk() -> None:
    counts: Counter[str] = Counter()
    for seed in range(12):
        outcome = run_seed(seed, Options(heavy_share=1.0))
        assert outcome.violation is None, "\n".join((str(outcome.violation), *outcome.trace, outcome.command))
        counts.update(outcome.counts)
    assert counts["segments deleted by retention"]
    assert counts["disk full"]


def test_a_seed_is_the_same_in_every_process() -> None:
    """Steps, counts and trace: nothing may depend on the machine's clock, on hashes or on threads."""
    program = (
        "import sys; from tests.simulation.planted import AcknowledgesBeforeSync as planted\n"
        "from wallet_core.simulation import run_seed\n"
        "for one in (*(run_seed(seed) for seed in range(3)), run_seed(0, shard_class=planted)):\n"
        "    print(one.steps, sorted(one.counts.items()), one.transfers, one.violation, one.trace)"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert "lost acknowledgement" in printed[0]


def test_the_twin_can_stand_in_for_the_engine() -> None:
    """So a mistake planted in the twin is found for its own sake."""
    for seed in range(8):
        outcome = run_seed(seed, shard_class=TwinShard)
        assert outcome.violation is None, str(outcome.violation)


def test_the_command_prints_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--seeds", "3", "--jobs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seeds"] == 3
    assert report["failures"] == []
    assert report["counts"]["message reordered"] > 0
    assert report["seeds_per_second"] > 0


def test_a_failure_prints_the_command_that_replays_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.simulate, "run_seed", partial(run_seed, shard_class=AcknowledgesBeforeSync))
    assert main(["simulate", "--seeds", "4", "--jobs", "1", "--shards", "3", "--steps", "400"]) == 1
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("replay it: "))
    words = line.removeprefix("replay it: ").split()
    assert words[0] == "ducat"
    assert main(words[1:]) == 1
    again = capsys.readouterr().out
    assert "lost acknowledgement" in again
    assert line in again


def test_wrong_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--shards", "0"]) == 2
    assert "--shards" in capsys.readouterr().err
