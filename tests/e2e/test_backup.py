"""Risk: what is restored is not what was, or wallet, ledger and payment disagree in it.

A backup of the running platform under load, extended under load, and restored to a moment in the middle. With
DUCAT_TEST_BACKUP_LARGE=1 for longer, and to the end as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ops.demo import pay_checkout
from ops.platform import Platform
from runtime.embedded import EmbeddedPostgres
from tests.e2e.checkouts import checkout

IS_LARGE = bool(os.environ.get("DUCAT_TEST_BACKUP_LARGE"))
LOAD_S = 15.0 if IS_LARGE else 0.5
AT_ONCE = 2
PAUSE_S = 0.2

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def ducat_backup(*words: str) -> Any:
    """The JSON object that it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ops", "backup", *words, "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, said = await process.communicate()
    assert process.returncode == 0, f"{out.decode()}\n{said.decode()}"
    return json.loads(out.decode().strip().splitlines()[-1])


async def orders_of(dsn: str) -> dict[str, str]:
    """Order → state, as payment has it."""
    connection = await asyncpg.connect(dsn)
    try:
        return {
            row["payment_order_id"]: row["state"]
            for row in await connection.fetch(
                "SELECT payment_order_id, state::text AS state FROM payment.payment_order"
            )
        }
    finally:
        await connection.close()


async def restored_orders(folder: Path) -> dict[str, str]:
    server = EmbeddedPostgres(folder / "postgres", is_durable=False)
    dsn = await asyncio.to_thread(server.start)
    try:
        return await orders_of(dsn)
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.timeout(600)
async def test_a_backup_under_load_is_restored_to_a_moment_in_it(platform: Platform, tmp_path: Path) -> None:
    store, stop = str(tmp_path / "store"), asyncio.Event()
    from_here = ["--data-dir", str(platform.data_dir), "--to", store]
    done = 0

    async def load() -> None:
        nonlocal done
        async with platform.http_session() as http, platform.client() as client:
            while not stop.is_set():
                await pay_checkout(platform, http, client, checkout(2, sellers=10), log=lambda line: None)
                done += 1
                await asyncio.sleep(PAUSE_S)

    async def under_load(*words: str) -> Any:
        stop.clear()
        buyers = [asyncio.create_task(load()) for _ in range(AT_ONCE)]
        await asyncio.sleep(LOAD_S)
        said = await ducat_backup(*words, *from_here)
        await asyncio.sleep(LOAD_S)
        stop.set()
        await asyncio.gather(*buyers)
        return said

    created = await under_load("create", "--name", "one")
    middle, then = datetime.now(UTC), await orders_of(platform.database_url)
    extended = await under_load("extend")
    assert created["restorable_to"] < middle.isoformat() < extended["restorable_to"]
    assert len(await orders_of(platform.database_url)) > len(then) > 0
    targets = {"middle": ["--at", middle.isoformat()]} | ({"end": []} if IS_LARGE else {})
    for name, words in targets.items():
        said = await ducat_backup("restore", "--from", store, "--to", str(tmp_path / name), *words)
        print(f"{done} checkouts; {name}: {json.dumps(said)}")
        assert said["ok"], said
        assert {name: one["verdict"] for name, one in said["checks"].items()} == dict.fromkeys(
            ("wallet", "ledger", "wallet_against_ledger", "feeds"), "ok"
        )
        assert {one["consumer"] for one in said["checks"]["feeds"]["consumers"]} == {"ledger", "wallet", "payment"}
    assert await restored_orders(tmp_path / "middle") == then
