"""The wallet core under the same workload: two shards, half of the transfers cross, killed in mid-run and started again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

import ducat
from ducat.wallet.v1 import wallet_pb2
from loadtest.baselines.workload import ACCOUNT_COUNT, KILL_AFTER_S, SHARD_COUNT
from loadtest.bench.client import BATCH_ROWS, Plan, account_ids
from loadtest.bench.wallet import Client, Server, load, serving

__all__ = ["compare"]

SETTLE_S_MAX = 30.0


def compare(folder: Path, count: int) -> dict[str, Any]:
    """Transfers a second, settled, and what is missing or in flight after the server was killed and started again."""
    first, second = folder / "ducat-load", folder / "ducat-kill"
    first.mkdir()
    second.mkdir()
    with serving(first, SHARD_COUNT) as server:
        report = load(server, Plan(server.address, "", ACCOUNT_COUNT, count))
    killed = Server(second, SHARD_COUNT)
    client = Client(Plan(killed.address, "", ACCOUNT_COUNT, 10_000_000, check_balances=False), quiet=True)
    client.wait_for("started")
    client.go_on()
    time.sleep(KILL_AFTER_S)
    killed.child.kill()
    killed.child.wait()
    client.child.kill()
    client.child.wait()
    with serving(second, SHARD_COUNT) as again:
        total = _settled_total(again.address)
    return {
        "transfers_per_second": report["transfers"] / report["seconds"],
        "after_kill": {"money_missing_minor": -total, "in_doubt": 0 if total == 0 else None},
        "balances_right": report["failed"] == 0 and report["balances"],
    }


def _settled_total(address: str) -> int:
    """Σ balances of all accounts (they were opened at zero), once what was in flight has arrived."""
    ids = account_ids(np.arange(ACCOUNT_COUNT, dtype=np.uint64))
    deadline = time.monotonic() + SETTLE_S_MAX
    with ducat.Client(wallet_address=address) as client:
        while True:
            total = 0
            for start in range(0, ACCOUNT_COUNT, BATCH_ROWS):
                rows = [row.tobytes() for row in ids[start : start + BATCH_ROWS]]
                answer = client.wallet.get_accounts(wallet_pb2.GetAccountsRequest(account_ids=rows))
                total += sum(account.balance_minor for account in answer.accounts)
            if total == 0 or time.monotonic() > deadline:
                return total
            time.sleep(0.2)
