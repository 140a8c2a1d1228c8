"""A wallet under load, to be killed: says on stdout what it is about to send and what was acknowledged.

python load_process.py FOLDER SHARDS ROUND [nodirect] [nosync]

Lines: "ready", "S <batch>" before a batch is submitted, "A <batch> <codes, hex>"
after it was acknowledged, "N <shard> <sequence>" after a snapshot. Each line is one write to the pipe.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
import time
from pathlib import Path

from kernel.ids import account_id, uuid7
from wallet_core.engine.codes import AccountFlags
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardHostConfig, WalletHost

BATCH_ROWS = 40
PEOPLE = [account_id(f"kill/{n}") for n in range(64)]
SOURCE = account_id("kill/source")


def config(folder: Path, shards: int, *words: str) -> ShardHostConfig:
    return ShardHostConfig(
        data_dir=folder,
        shard_count=shards,
        segment_bytes=1 << 18,
        reserve_bytes=0,
        generation_ids=1 << 16,
        direct_io="nodirect" not in words,
        sync="nosync" not in words,
    )


def batch_id(round_number: int, batch: int, row: int, time_ms: int) -> bytes:
    return uuid7(time_ms, hashlib.sha256(f"{round_number}/{batch}/{row}".encode()).digest()[:10])


def batch_rows(round_number: int, batch: int, time_ms: int) -> list[TransferRow]:
    rng = random.Random(f"{round_number}/{batch}")
    rows = []
    for row in range(BATCH_ROWS):
        debit, credit = rng.sample(PEOPLE, 2)
        rows.append(TransferRow(batch_id(round_number, batch, row, time_ms), debit, credit, rng.randint(1, 9)))
    return rows


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


async def main(folder: Path, shards: int, round_number: int, *words: str) -> None:
    time_ms = time.time_ns() // 1_000_000
    host = await WalletHost.open(config(folder, shards, *words))
    source = AccountRow(SOURCE, "USD", int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED))
    await host.create_accounts([source, *(AccountRow(one, "USD", 0, 1_000_000) for one in PEOPLE)])
    say(f"ready {time_ms}")
    following = iter(range(10**9))

    async def client() -> None:
        for batch in following:
            say(f"S {batch}")
            codes = await host.transfers(batch_rows(round_number, batch, time_ms))
            say(f"A {batch} {codes.hex()}")

    async def snapshots() -> None:
        while True:
            for shard in host.shard_ids:
                taken = await host.snapshot(shard)
                say(f"N {shard} {taken.sequence}")
            await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(16)), snapshots())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
