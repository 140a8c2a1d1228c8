# ruff: noqa: ASYNC240 - small files
"""Risk: after the loss of a disk the shard that comes back is not the shard that was."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.errors import FailedPrecondition, InvalidArgument, NotFound
from kernel.ids import account_id, uuid7
from ops.wallet import add_parser
from wallet_core.adapters.archive import FileArchive
from wallet_core.adapters.restore import Cut, restore_shard
from wallet_core.event_log import read_frames
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardHostConfig, ShardsMismatch, WalletHost, open_host

CLEARING, SELLER = account_id("psp/sandbox/clearing/USD"), account_id("seller/A/USD")


def config(folder: Path) -> ShardHostConfig:
    return ShardHostConfig(folder, shard_count=1, segment_bytes=1 << 20, reserve_bytes=0)


async def pay(host: WalletHost, count: int, label: int) -> None:
    rows = [
        TransferRow(uuid7(time.time_ns() // 10**6, bytes([label]) + row.to_bytes(9, "big")), CLEARING, SELLER, 1)
        for row in range(count)
    ]
    for start in range(0, count, 1000):
        assert set(await host.transfers(rows[start : start + 1000])) == {1}


@pytest.fixture
async def source(tmp_path: Path) -> Path:
    """A shard with three snapshots behind it and events after the last; several segments."""
    host = await WalletHost.open(config(tmp_path / "source"))
    await host.create_accounts([AccountRow(CLEARING, "USD", 12), AccountRow(SELLER, "USD")])
    for label in range(1, 4):
        await pay(host, 25_000, label)
        await host.snapshot(0)
    await pay(host, 10_000, 9)
    await host.close()
    return tmp_path / "source"


async def state_of(folder: Path) -> tuple[int, bytes, int]:
    host = await WalletHost.open(config(folder))
    try:
        status = host.shards()[0]
        account = (await host.accounts([SELLER]))[0]
        assert account is not None
        return status.sequence, status.digest, account.balance
    finally:
        await host.close()


async def test_a_restored_shard_is_the_shard_and_goes_on(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    seen: set[str] = set()
    plan = restore_shard(config(target), source, 0, dry_run=True)
    assert not target.exists()
    assert list(tmp_path.iterdir()) == [source]
    report = restore_shard(config(target), source, 0, dry_run=False, note=lambda what, at, end: seen.add(what))
    assert seen >= {"copy", "check the snapshot", "snapshot"}
    assert [plan[key] for key in ("snapshot", "segments", "sequence_number", "digest")] == [
        report[key] for key in ("snapshot", "segments", "sequence_number", "digest")
    ]
    sequence, digest, balance = await state_of(target)
    assert (sequence, balance) == (report["sequence_number"], 85_000)
    assert digest.hex() == report["digest"]
    assert (sequence, digest, balance) == await state_of(source)
    assert [path.name for path in target.iterdir() if path.name.startswith(".restore")] == []
    host = await WalletHost.open(config(target))
    await pay(host, 5, 20)
    await host.close()
    end = FileArchive(config(target)).verify(0, sequence + 5, lambda at: True)
    assert (end.ok, end.problem) == (True, "")


async def test_a_damaged_snapshot_falls_back_to_the_one_before(source: Path, tmp_path: Path) -> None:
    newest = max((source / "shard-0000" / "snapshots").glob("*.snap"))
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    report = restore_shard(config(tmp_path / "target"), source, 0, dry_run=False)
    assert report["snapshot"] != newest.name
    assert f"pass over {newest.name}" in report["steps"][0]
    assert (await state_of(tmp_path / "target"))[2] == 85_000


async def test_a_flat_folder_of_copies_is_enough(source: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in [*source.rglob("*.snap"), *source.rglob("*.seg")]:
        shutil.copy(path, flat)
    restore_shard(config(tmp_path / "target"), flat, 0, dry_run=False)
    assert (await state_of(tmp_path / "target"))[2] == 85_000


async def test_a_missing_segment_is_named_and_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for path in source.rglob("*.snap"):
        path.unlink()
    with pytest.raises(FailedPrecondition, match="event 1 is the first that is needed, the oldest segment begins at"):
        restore_shard(config(target), source, 0, dry_run=False)
    assert not target.exists() or list(target.iterdir()) == []


async def test_a_flipped_byte_in_the_log_is_refused_by_file_and_offset(source: Path, tmp_path: Path) -> None:
    segment = min((source / "shard-0000" / "log").glob("*.seg"))
    data = bytearray(segment.read_bytes())
    newest = max((source / "shard-0000" / "snapshots").glob("*.snap"))
    for path in (source / "shard-0000" / "snapshots").glob("*.snap"):
        if path != newest:
            continue
        path.unlink()
    segment = sorted((source / "shard-0000" / "log").glob("*.seg"))[-2]
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(FailedPrecondition, match=rf"{segment.name}.*at byte \d+"):
        restore_shard(config(tmp_path / "target"), source, 0, dry_run=False)
    assert list((tmp_path / "target").glob("shard-*")) == []


async def test_nothing_is_ever_written_over(source: Path, tmp_path: Path) -> None:
    restore_shard(config(tmp_path / "target"), source, 0, dry_run=False)
    with pytest.raises(FailedPrecondition, match="is not empty"):
        restore_shard(config(tmp_path / "target"), source, 0, dry_run=False)
    with pytest.raises(NotFound, match=r"no snapshots .* and no log segments"):
        restore_shard(config(tmp_path / "other"), tmp_path / "nowhere", 0, dry_run=False)


async def test_the_command_says_what_it_would_do(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setenv("DUCAT_WALLET_SHARD_COUNT", "1")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    words = ["wallet", "restore", "--shard", "0", "--from", str(source), "--to", str(tmp_path / "target")]
    args = parser.parse_args([*words, "--dry-run"])
    assert args.run(args) == 0
    assert "would replay" in capsys.readouterr().out
    assert not (tmp_path / "target").exists()
    args = parser.parse_args([*words, "--json"])
    assert args.run(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert (await state_of(tmp_path / "target"))[1].hex() == report["digest"]


def test_a_shard_that_came_to_be_meanwhile_is_not_written_over(source: Path, tmp_path: Path) -> None:
    """Somebody starts the wallet while a long restore runs: what it has begun to write must survive."""
    target = tmp_path / "target"
    written = target / "shard-0000" / "log" / f"{1:020d}.seg"

    def start_the_wallet(what: str, at: int, end: int) -> None:
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(b"acknowledged")

    with pytest.raises(FailedPrecondition, match="not empty"):
        restore_shard(config(target), source, 0, dry_run=False, note=start_the_wallet)
    assert written.read_bytes() == b"acknowledged"
    assert [path.name for path in target.iterdir()] == ["shard-0000"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_shard_of_another_number_of_shards_is_refused(source: Path, tmp_path: Path, dry_run: bool) -> None:
    """Its accounts would be looked for on other shards."""
    four = replace(config(tmp_path / "target"), shard_count=4)
    for place in (source, source / "shard-0000"):
        with pytest.raises(FailedPrecondition, match="1 shards, 4 are configured"):
            restore_shard(four, place, 0, dry_run=dry_run)
    restore_shard(config(tmp_path / "target"), source, 0, dry_run=False)
    with pytest.raises(ShardsMismatch):
        open_host(four)


@pytest.fixture
async def whole_source(tmp_path: Path) -> Path:
    """A shard that has kept its log from the first event, over three segments, with a snapshot in the middle."""
    host = await WalletHost.open(replace(config(tmp_path / "source"), keep_history=True))
    await host.create_accounts([AccountRow(CLEARING, "USD", 12), AccountRow(SELLER, "USD")])
    await pay(host, 24_000, 1)
    await host.snapshot(0)
    await pay(host, 24_000, 2)
    await host.close()
    return tmp_path / "source"


def borders(folder: Path) -> list[tuple[int, int, str]]:
    """(last event, time, digest) of every frame."""
    frames = read_frames(folder / "shard-0000" / "log", 0)
    return [(frame.last_sequence, frame.timestamp_ns, frame.digest.hex()) for frame in frames]


async def test_a_shard_ends_where_it_was_chosen(whole_source: Path, tmp_path: Path) -> None:
    source = whole_source
    frames = borders(source)
    early, late = len(frames) // 4, 3 * len(frames) // 4
    wanted = [(Cut(sequence=frames[0][0]), 0)]
    for at in (early, late):
        last, time_ns, _ = frames[at]
        wanted += [
            (Cut(sequence=last), at),
            (Cut(sequence=last + 1), at),  # inside the next batch
            (Cut(time_ns=time_ns), at),
            (Cut(time_ns=frames[at + 1][1] - 1), at),
        ]
    wanted.append((Cut(time_ns=time.time_ns()), len(frames) - 1))
    for number, (cut, at) in enumerate(wanted):
        target = tmp_path / f"target-{number}"
        for dry_run in (True, False):
            report = restore_shard(config(target), source, 0, dry_run=dry_run, cut=cut)
            assert (report["sequence_number"], report["digest"]) == (frames[at][0], frames[at][2]), cut
    target = tmp_path / "target-5"  # and it goes on from there
    host = await WalletHost.open(config(target))
    await pay(host, 5, 30)
    await host.close()
    last = (await state_of(target))[0]
    end = FileArchive(config(target)).verify(0, last, lambda at: True)
    assert (end.ok, end.problem, last) == (True, "", frames[late][0] + 5)


async def test_an_end_that_is_not_in_the_source_is_refused(whole_source: Path, tmp_path: Path) -> None:
    frames = borders(whole_source)
    for cut, words in (
        (Cut(sequence=frames[-1][0] + 1), f"ends with event {frames[-1][0]}, before the wanted event"),
        (Cut(time_ns=frames[0][1] - 1), "no event at or before"),
    ):
        for dry_run in (True, False):
            with pytest.raises(FailedPrecondition, match=words):
                restore_shard(config(tmp_path / "target"), whole_source, 0, dry_run=dry_run, cut=cut)
    assert not list(tmp_path.glob("target/shard-*"))


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(words)
    args.run(args)


def test_the_command_takes_an_event_or_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["--to-event", "0"], "numbered from 1"),
        (["--at", "yesterday"], "expected a time such as"),
        (["--to-event", "1", "--at", "2026-01-31T12:00:00Z"], "not allowed with"),
    ):
        with pytest.raises((InvalidArgument, SystemExit)) as caught:
            main(["wallet", "restore", "--shard", "0", "--from", str(tmp_path), *words])
        assert said in f"{caught.value} {capsys.readouterr().err}"
