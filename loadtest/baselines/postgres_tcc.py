"""Wallets in two PostgreSQL databases with Try, Confirm, Cancel: a coordinator reserves on both sides, then confirms
on both.

As the module's process: argv[1] is {"urls": [...], "transfers": n}; prints `loading`, then one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg

from loadtest.baselines.workload import (
    ACCOUNT_COUNT,
    OPENING_BALANCE,
    SHARD_COUNT,
    run_and_kill,
    run_to_end,
    transfers,
)
from runtime.embedded.postgres import EmbeddedPostgres

__all__ = ["compare"]

CONNECTION_COUNT = 16
MODULE = "loadtest.baselines.postgres_tcc"
TRANSFERS_MAX = 20_000

SCHEMA = """
DROP TABLE IF EXISTS step, account;
CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL, reserved bigint NOT NULL DEFAULT 0, CHECK (balance
>= reserved)); CREATE TABLE step (transfer bigint, account int, amount bigint NOT NULL, state text NOT NULL, PRIMARY
KEY (transfer, account)); CREATE OR REPLACE FUNCTION try_step(t bigint, a int, n bigint) RETURNS boolean LANGUAGE
plpgsql AS $$ BEGIN
  IF n < 0 THEN
    UPDATE account SET reserved = reserved - n WHERE id = a AND balance - reserved >= -n;
    IF NOT FOUND THEN RETURN false; END IF;
  END IF;
  INSERT INTO step VALUES (t, a, n, 'try');
  RETURN true;
END $$;
CREATE OR REPLACE FUNCTION end_step(t bigint, a int, confirm boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE n bigint;
BEGIN
  UPDATE step SET state = CASE WHEN confirm THEN 'confirm' ELSE 'cancel' END
    WHERE transfer = t AND account = a AND state = 'try' RETURNING amount INTO n;
  IF n IS NULL THEN RETURN; END IF;
  UPDATE account SET balance = balance + CASE WHEN confirm THEN n ELSE 0 END,
    reserved = reserved - CASE WHEN n < 0 THEN -n ELSE 0 END WHERE id = a;
END $$;
"""


def compare(folder: Path, count: int) -> dict[str, Any]:
    """Transfers a second, and what is in doubt after the coordinator was killed in mid-run."""
    count = min(count, TRANSFERS_MAX)
    servers = [EmbeddedPostgres(folder / f"postgres-{number}") for number in range(SHARD_COUNT)]
    urls = [server.start() for server in servers]
    try:
        asyncio.run(_open_accounts(urls))
        report = run_to_end(MODULE, {"urls": urls, "transfers": count})
        asyncio.run(_open_accounts(urls))
        run_and_kill(MODULE, {"urls": urls, "transfers": 100 * count})
        return {
            "transfers_per_second": report["transfers"] / report["seconds"],
            "after_kill": asyncio.run(_what_is_left(urls)),
        }
    finally:
        for server in servers:
            server.stop()


async def _open_accounts(urls: list[str]) -> None:
    for shard, url in enumerate(urls):
        connection = await asyncpg.connect(url)
        await connection.execute(SCHEMA)
        await connection.execute(
            "INSERT INTO account SELECT number, $1 FROM generate_series($2::int, $3::int, $4::int) AS number",
            OPENING_BALANCE,
            shard,
            ACCOUNT_COUNT - 1,
            SHARD_COUNT,
        )
        await connection.close()


async def _what_is_left(urls: list[str]) -> dict[str, Any]:
    """Σ balances against what was opened, transfers that were tried and not ended, and the money that they hold."""
    total, locked, in_doubt = 0, 0, 0
    for url in urls:
        connection = await asyncpg.connect(url)
        row = await connection.fetchrow(
            "SELECT sum(balance)::bigint AS total, sum(reserved)::bigint AS locked FROM account"
        )
        total += row["total"]
        locked += row["locked"]
        in_doubt += await connection.fetchval("SELECT count(*) FROM step WHERE state = 'try'")
        await connection.close()
    return {
        "money_missing_minor": ACCOUNT_COUNT * OPENING_BALANCE - total,
        "in_doubt": in_doubt,
        "money_locked_minor": locked,
    }


async def _load(plan: dict[str, Any]) -> dict[str, Any]:
    size = CONNECTION_COUNT // SHARD_COUNT
    pools = [await asyncpg.create_pool(url, min_size=size, max_size=size) for url in plan["urls"]]
    work = enumerate(transfers(plan["transfers"]))
    print("loading", flush=True)
    started, done = time.perf_counter(), 0

    async def coordinator() -> None:
        nonlocal done
        for number, (debit, credit, amount) in work:
            sides = [(pools[debit % SHARD_COUNT], debit, -amount), (pools[credit % SHARD_COUNT], credit, amount)]
            tried = await asyncio.gather(
                *(pool.fetchval("SELECT try_step($1, $2, $3)", number, account, n) for pool, account, n in sides)
            )
            confirm = all(tried)
            await asyncio.gather(
                *(pool.execute("SELECT end_step($1, $2, $3)", number, account, confirm) for pool, account, _ in sides)
            )
            done += 1

    await asyncio.gather(*(coordinator() for _ in range(CONNECTION_COUNT)))
    seconds = time.perf_counter() - started
    for pool in pools:
        await pool.close()
    return {"transfers": done, "seconds": seconds}


def main() -> None:
    import uvloop

    print(json.dumps(uvloop.run(_load(json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
