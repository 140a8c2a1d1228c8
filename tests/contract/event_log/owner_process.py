"""An owner of all shards under load, to be killed.

python owner_process.py FOLDER SHARDS [BOOTSTRAP TOPIC]

Says "S <id>" for each transfer before it is submitted and "A <id>" after it was acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from kernel.ids import account_id, uuid7
from wallet_core.engine.codes import AccountFlags, TransferResult
from wallet_core.event_log.kafka import KafkaLogConfig
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardHostConfig, WalletHost

PEOPLE = [account_id(f"kill/{n}") for n in range(32)]
SOURCE = account_id("kill/source")
ROWS = 16


def config(folder: Path, shards: int, *where: str) -> ShardHostConfig:
    return ShardHostConfig(
        data_dir=folder,
        shard_count=shards,
        segment_bytes=1 << 18,
        reserve_bytes=0,
        generation_ids=1 << 16,
        kafka=KafkaLogConfig(where[0], topic=where[1]) if where else None,
    )


async def main(folder: Path, shards: int, *where: str) -> None:
    host = await WalletHost.open(config(folder, shards, *where))
    source = AccountRow(SOURCE, "USD", int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED))
    await host.create_accounts([source, *(AccountRow(one, "USD") for one in PEOPLE)])

    async def client(number: int) -> None:
        for batch in range(10**9):
            ids = [uuid7(time.time_ns() // 1_000_000, os.urandom(10)) for _ in range(ROWS)]
            rows = [TransferRow(one, SOURCE, PEOPLE[(number + batch + n) % 32], 1) for n, one in enumerate(ids)]
            os.write(1, "".join(f"S {one.hex()}\n" for one in ids).encode())
            codes = await host.transfers(rows)
            assert set(codes) == {TransferResult.OK}, codes
            os.write(1, "".join(f"A {one.hex()}\n" for one in ids).encode())

    await asyncio.gather(*(client(n) for n in range(8)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
