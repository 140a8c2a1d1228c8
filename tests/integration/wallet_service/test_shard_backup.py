"""Risk: shards that are copied while they work come back damaged, or at moments that do not fit together: money is then doubled, or
gone."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.errors import FailedPrecondition
from kernel.ids import account_id, uuid7
from runtime.backup import FolderStore, ShardBackup
from wallet_core.adapters.backup import Mark, WantedCut, choose_cut, lay_shard, read_marks, store_shard, verify_shard
from wallet_core.adapters.restore import Cut, restore_shard
from wallet_core.event_log import read_frames
from wallet_core.service.port import AccountRow, TransferRow, slot_of
from wallet_core.shard import ShardHostConfig, WalletHost
from wallet_core.shard.port import default_shard_map
from wallet_core.shard.recovery import rebuild

SHARDS = 3
NAMES = [f"seller/S-{number}/USD" for number in range(24)]
ACCOUNTS = [account_id(name) for name in NAMES]


def config(folder: Path) -> ShardHostConfig:
    return ShardHostConfig(folder, shard_count=SHARDS, segment_bytes=1 << 20, reserve_bytes=0, keep_history=True)


async def work(host: WalletHost, seed: int, batches: int) -> None:
    """Transfers between accounts of all shards, most of them across."""
    dice = random.Random(seed)
    for batch in range(batches):
        rows = []
        for _ in range(dice.randrange(1, 60)):
            debit, credit = dice.sample(ACCOUNTS, 2)
            rows.append(
                TransferRow(uuid7(time.time_ns() // 10**6, dice.randbytes(10)), debit, credit, dice.randrange(1, 100))
            )
        await host.transfers(rows)
        if batch % 3 == 0:
            await asyncio.sleep(0)


async def copy(store: FolderStore, at: ShardHostConfig, shards: list[ShardBackup]) -> dict[int, Mark]:
    before, missing = read_marks(at)
    assert missing == []
    after, _ = read_marks(at)
    for one in shards:
        await asyncio.to_thread(store_shard, store, "one", at, one, after[one.shard], before[one.shard].sequence)
    return before


def fresh() -> list[ShardBackup]:
    return [ShardBackup(shard, 0, 0, 0, 0, "") for shard in range(SHARDS)]


async def total(folder: Path) -> int:
    """What all accounts and the money in flight come to."""
    host = await WalletHost.open(config(folder))
    try:
        for _ in range(200):
            totals = await host.totals()
            if all(one.in_flight == 0 for one in totals):
                break
            await asyncio.sleep(0.02)
        assert all(one.in_flight == 0 for one in totals), totals
        assert all((await host.check_digests()).values())
        return sum(one.balance for one in totals)
    finally:
        await host.close()


async def test_shards_copied_under_load_come_back_at_any_cut(tmp_path: Path) -> None:
    assert len({default_shard_map(SHARDS)[slot_of(one)] for one in ACCOUNTS}) == SHARDS
    live, store, shards = config(tmp_path / "live"), FolderStore(tmp_path / "store"), fresh()
    host = await WalletHost.open(live)
    await host.create_accounts([AccountRow(one, "USD", 4) for one in ACCOUNTS])  # may overdraw
    await work(host, 1, 20)
    await host.snapshot(0)
    await host.snapshot(1)
    points = []
    for number in range(3):  # a backup, then two extensions, each while the shards work
        working = asyncio.create_task(work(host, 10 + number, 60))
        await asyncio.sleep(0.02)
        points.append((await copy(store, live, shards), time.time_ns()))
        await working
    last = await copy(store, live, shards)
    await host.close()
    laid = tmp_path / "laid"
    for one in shards:
        lay_shard(store, one, laid)
        assert verify_shard(one, laid) == ""
        assert one.sequence == last[one.shard].sequence
    dice = random.Random(5)
    first, end = points[0][0], last
    wanted = [{shard: WantedCut(mark.sequence) for shard, mark in marks.items()} for marks, _ in points]
    wanted += [{shard: WantedCut(first[shard].sequence, time_ns) for shard in range(SHARDS)} for _, time_ns in points]
    wanted += [  # one far ahead, the others behind: those must be rolled forward
        {shard: WantedCut(dice.choice([first, end])[shard].sequence) for shard in range(SHARDS)} for _ in range(6)
    ]
    for number, one_wanted in enumerate(wanted):
        cuts = choose_cut(config(laid), one_wanted)
        assert all(cuts[shard] >= one.sequence_min for shard, one in one_wanted.items())
        engines = {shard: rebuild(config(laid), shard, upto_sequence=cut)[0] for shard, cut in cuts.items()}
        for source in range(SHARDS):
            assert engines[source].status().sequence == cuts[source]
            for other in range(SHARDS):
                if source != other:
                    settled, sent = engines[source].sent(other)
                    assert settled <= engines[other].cursor(source) <= sent
        target = tmp_path / f"target-{number}"
        if number in (0, 4, len(wanted) - 1):
            for shard, cut in cuts.items():
                report = restore_shard(config(target), laid, shard, dry_run=False, cut=Cut(cut), whole_log=True)
                assert report["sequence_number"] == cut
                assert report["digest"] == engines[shard].state_digest().hex()
            assert await total(target) == 0


async def test_an_extension_that_is_interrupted_changes_nothing(tmp_path: Path) -> None:
    live, store, shards = config(tmp_path / "live"), FolderStore(tmp_path / "store"), fresh()
    host = await WalletHost.open(live)
    await host.create_accounts([AccountRow(one, "USD", 4) for one in ACCOUNTS])
    await work(host, 1, 10)
    await copy(store, live, shards)
    kept = [replace(one, files=[replace(file, parts=list(file.parts)) for file in one.files]) for one in shards]
    await work(host, 2, 10)
    await copy(store, live, [replace(one, files=list(one.files)) for one in kept])  # of which no manifest tells
    await work(host, 3, 10)
    for one in kept:
        lay_shard(store, one, tmp_path / "laid")
        assert verify_shard(one, tmp_path / "laid") == ""
    await copy(store, live, kept)
    await host.close()
    for one in kept:
        lay_shard(store, one, tmp_path / "again")
        assert verify_shard(one, tmp_path / "again") == ""


async def test_a_log_that_does_not_continue_the_copy_is_refused(tmp_path: Path) -> None:
    live, store, shards = config(tmp_path / "live"), FolderStore(tmp_path / "store"), fresh()
    host = await WalletHost.open(live)
    await host.create_accounts([AccountRow(one, "USD", 4) for one in ACCOUNTS])
    await work(host, 1, 5)
    await host.close()
    shutil.copytree(live.data_dir, tmp_path / "older")
    host = await WalletHost.open(live)
    await work(host, 2, 5)
    await host.close()
    await copy(store, live, shards)
    older = config(tmp_path / "older")
    with pytest.raises(FailedPrecondition, match="restored to an earlier state"):
        await copy(store, older, shards)
    host = await WalletHost.open(older)  # the same length again, other events
    await work(host, 3, 40)
    await host.close()
    with pytest.raises(FailedPrecondition, match="is another one than the backup holds"):
        await copy(store, older, shards)
    for path in (live.data_dir / "shard-0000" / "log").glob("*.seg"):
        path.rename(path.with_name(f"{10**9:020d}.seg"))
    with pytest.raises(FailedPrecondition, match="wallet_keep_history"):
        await copy(store, live, shards)


async def test_a_cut_that_the_copy_does_not_reach_is_refused(tmp_path: Path) -> None:
    live, store, shards = config(tmp_path / "live"), FolderStore(tmp_path / "store"), fresh()
    host = await WalletHost.open(live)
    await host.create_accounts([AccountRow(one, "USD", 4) for one in ACCOUNTS])
    await work(host, 1, 5)
    await copy(store, live, shards)
    await host.close()
    for one in shards:
        lay_shard(store, one, tmp_path / "laid")
    wanted = {one.shard: WantedCut(one.sequence + (one.shard == 1)) for one in shards}
    with pytest.raises(FailedPrecondition, match="shard 1 in the backup ends before event"):
        choose_cut(config(tmp_path / "laid"), wanted)


async def test_damage_in_a_copy_is_found(tmp_path: Path) -> None:
    live, store, shards = config(tmp_path / "live"), FolderStore(tmp_path / "store"), fresh()
    host = await WalletHost.open(live)
    await host.create_accounts([AccountRow(one, "USD", 4) for one in ACCOUNTS])
    await work(host, 1, 5)
    await host.snapshot(0)
    await copy(store, live, shards)
    await host.close()
    lay_shard(store, shards[0], tmp_path / "laid")
    assert verify_shard(shards[0], tmp_path / "laid") == ""
    for path, words in (("snapshots/*.snap", "snap"), ("log/*.seg", "seg")):
        (file,) = (tmp_path / "laid" / "shard-0000").glob(path)
        good = file.read_bytes()
        file.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
        assert words in verify_shard(shards[0], tmp_path / "laid")
        file.write_bytes(good)
    short = replace(shards[0], sequence=shards[0].sequence + 1)
    assert "ends with event" in verify_shard(short, tmp_path / "laid")


async def test_no_shard_that_was_never_used_is_in_the_way(tmp_path: Path) -> None:
    live, store, shards = config(tmp_path / "live"), FolderStore(tmp_path / "store"), fresh()
    host = await WalletHost.open(live)
    await copy(store, live, shards)
    await host.close()
    for one in shards:
        lay_shard(store, one, tmp_path / "laid")
        assert verify_shard(one, tmp_path / "laid") == ""
    assert choose_cut(config(tmp_path / "laid"), {one.shard: WantedCut(0) for one in shards}) == {0: 0, 1: 0, 2: 0}
    (tmp_path / "live" / "shard-0002").rename(tmp_path / "unmounted")
    assert read_marks(live)[1] == [2]
    assert list(read_frames(tmp_path / "laid" / "shard-0000" / "log", 0)) == []
