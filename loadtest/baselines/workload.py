"""One workload for every contender: uniform transfers between accounts that are spread over two shards."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["ACCOUNT_COUNT", "OPENING_BALANCE", "SHARD_COUNT", "run_and_kill", "run_to_end", "transfers"]

ACCOUNT_COUNT = 10_000
SHARD_COUNT = 2
OPENING_BALANCE = 1_000_000
KILL_AFTER_S = 3.0
RUN_S_MAX = 300.0


def transfers(count: int, seed: int = 1) -> Iterator[tuple[int, int, int]]:
    """(debit account, credit account, amount) `count` times; an account's shard is its number modulo SHARD_COUNT."""
    dice = random.Random(seed)
    for _ in range(count):
        debit = dice.randrange(ACCOUNT_COUNT)
        credit = (debit + dice.randrange(1, ACCOUNT_COUNT)) % ACCOUNT_COUNT
        yield debit, credit, dice.randrange(1, 100)


def run_to_end(module: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Runs a contender's load in a process of its own and returns the JSON object that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(plan)], capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def run_and_kill(module: str, plan: dict[str, Any]) -> None:
    """Runs a contender's load and kills it (SIGKILL) in the middle: the coordinator or client is gone, the servers
    stay.
    """
    child = subprocess.Popen([sys.executable, "-m", module, json.dumps(plan)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while child.stdout.readline().strip() != "loading":
        if child.poll() is not None:
            raise RuntimeError(f"{module} ended before it began")
    time.sleep(KILL_AFTER_S)
    child.send_signal(signal.SIGKILL)
    child.wait()
