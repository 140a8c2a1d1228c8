"""Wallets in sharded Valkey: a Lua script moves money within one server; between two servers there are two scripts
and no atomicity.

As the module's process: argv[1] is {"urls": [...], "transfers": n}; prints `loading`, then one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import redis

from loadtest.baselines.workload import (
    ACCOUNT_COUNT,
    OPENING_BALANCE,
    SHARD_COUNT,
    run_and_kill,
    run_to_end,
    transfers,
)
from runtime.embedded.valkey import EmbeddedValkey

__all__ = ["compare"]

PIPELINE = 1_000
MODULE = "loadtest.baselines.valkey_lua"

MOVE = """
local balance = tonumber(redis.call('GET', KEYS[1]))
local amount = tonumber(ARGV[1])
if balance < amount then return 0 end
redis.call('DECRBY', KEYS[1], amount)
redis.call('INCRBY', KEYS[2], amount)
return 1
"""
DEDUCT = """
local balance = tonumber(redis.call('GET', KEYS[1]))
local amount = tonumber(ARGV[1])
if balance < amount then return 0 end
redis.call('DECRBY', KEYS[1], amount)
return 1
"""


def compare(folder: Path, count: int) -> dict[str, Any]:
    """Transfers a second with every write synced, and the money that is missing after the client was killed in
    mid-run.
    """
    servers = [EmbeddedValkey(folder / f"valkey-{number}", appendfsync="always") for number in range(SHARD_COUNT)]
    urls = [server.start() for server in servers]
    try:
        clients = [redis.Redis.from_url(url) for url in urls]
        _open_accounts(clients)
        report = run_to_end(MODULE, {"urls": urls, "transfers": count})
        _open_accounts(clients)
        run_and_kill(MODULE, {"urls": urls, "transfers": 100 * count})
        missing = ACCOUNT_COUNT * OPENING_BALANCE - _total(clients)
        return {
            "transfers_per_second": report["transfers"] / report["seconds"],
            "after_kill": {"money_missing_minor": missing, "in_doubt": None},
        }
    finally:
        for server in servers:
            server.stop()


def _open_accounts(clients: list[Any]) -> None:
    for shard, client in enumerate(clients):
        client.mset({f"a{number}": OPENING_BALANCE for number in range(shard, ACCOUNT_COUNT, SHARD_COUNT)})


def _total(clients: list[Any]) -> int:
    return sum(
        int(value)
        for shard, client in enumerate(clients)
        for value in client.mget([f"a{number}" for number in range(shard, ACCOUNT_COUNT, SHARD_COUNT)])
    )


def main() -> None:
    plan = json.loads(sys.argv[1])
    clients = [redis.Redis.from_url(url) for url in plan["urls"]]
    move = [client.script_load(MOVE) for client in clients]
    deduct = [client.script_load(DEDUCT) for client in clients]
    print("loading", flush=True)
    started, done = time.perf_counter(), 0
    batch: list[tuple[int, int, int]] = []
    for transfer in transfers(plan["transfers"]):
        batch.append(transfer)
        if len(batch) == PIPELINE:
            done += _apply(clients, move, deduct, batch)
            batch.clear()
    done += _apply(clients, move, deduct, batch)
    print(json.dumps({"transfers": done, "seconds": time.perf_counter() - started}))


def _apply(clients: list[Any], move: list[str], deduct: list[str], batch: list[tuple[int, int, int]]) -> int:
    """One pipeline a server for what stays within it and for the deductions, then one a server for the credits of
    the others.
    """
    first = [client.pipeline(transaction=False) for client in clients]
    crossing: list[list[tuple[int, int, int]]] = [[] for _ in clients]
    for debit, credit, amount in batch:
        shard = debit % SHARD_COUNT
        if shard == credit % SHARD_COUNT:
            first[shard].evalsha(move[shard], 2, f"a{debit}", f"a{credit}", amount)
        else:
            first[shard].evalsha(deduct[shard], 1, f"a{debit}", amount)
            crossing[shard].append((len(first[shard]) - 1, credit, amount))
    second = [client.pipeline(transaction=False) for client in clients]
    for shard, pipeline in enumerate(first):
        results = pipeline.execute()
        for index, credit, amount in crossing[shard]:
            if results[index]:
                second[credit % SHARD_COUNT].incrby(f"a{credit}", amount)
    for pipeline in second:
        pipeline.execute()
    return len(batch)


if __name__ == "__main__":
    main()
