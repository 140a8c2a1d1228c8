"""Risk: a bit flips where no start reads it, and is found when the last good copy is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from host_fixtures import Driver, account, config, transfer_id

from wallet_core.event_log import delete_segments_below, segments
from wallet_core.service.port import TransferRow
from wallet_core.shard import Damage, Scrubber, ScrubStatus, ShardHost, ShardHostConfig, open_host
from wallet_core.shard.port import shard_folder
from wallet_core.shard.scrub import read_shard
from wallet_core.snapshot import SnapshotWriter, snapshot_files


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """A shard with sealed segments, a snapshot above most of them, and events behind it."""
    driver = Driver(config(tmp_path, 1))
    driver.fund([account(0), account(1)], 10**9, account(10**6))
    for start in range(0, 56_000, 8000):
        driver.transfers([TransferRow(transfer_id(start + n), account(0), account(1), 1) for n in range(8000)])
    driver.host.image(0, SnapshotWriter(shard_folder(tmp_path, 0) / "snapshots", 0))
    driver.transfers([TransferRow(transfer_id(10**6 + n), account(0), account(1), 1) for n in range(10)])
    yield driver  # type: ignore[misc]
    driver.close()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def scrub(folder: Path, durable: int, start: float = 0.0) -> tuple[int, list[Damage]]:
    read = list(read_shard(shard_folder(folder, 0), 0, durable, start=start))
    return sum(one for one in read if isinstance(one, int)), [one for one in read if isinstance(one, Damage)]


@pytest.mark.parametrize("start", [0.0, 0.4, 0.7, 0.999])
def test_whole_files_are_read_whole_and_in_small_pieces(driver: Driver, tmp_path: Path, start: float) -> None:
    durable = driver.host.durable_sequence(0)
    count, damage = scrub(tmp_path, durable, start)
    assert damage == []
    snapshot = snapshot_files(tmp_path / "shard-0000" / "snapshots")[0]
    assert count >= durable * 48 + snapshot.size_bytes - 4096
    assert max(one for one in read_shard(shard_folder(tmp_path, 0), 0, durable) if isinstance(one, int)) <= 1 << 20


@pytest.mark.parametrize("where", ["header", "body", "other body", "snapshot", "snapshot header", "open segment"])
def test_a_flipped_bit_below_the_snapshot_is_found(driver: Driver, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "shard-0000"
    log = folder / "log"
    first, second, *_, last = segments(log)
    snapshot = snapshot_files(folder / "snapshots")[0].path
    place, offset = {
        "header": (log / f"{first:020d}.seg", 20),
        "body": (log / f"{first:020d}.seg", 10_000),
        "other body": (log / f"{second:020d}.seg", 300_000),
        "snapshot": (snapshot, snapshot.stat().st_size // 2),
        "snapshot header": (snapshot, 40),
        "open segment": (log / f"{last:020d}.seg", 500),
    }[where]
    durable = driver.host.durable_sequence(0)
    flip(place, offset)
    if where != "open segment":
        other = open_host_beside(config(tmp_path, 1), tmp_path) if where in ("header", "body") else None
        assert other is None or other == durable  # a start does not see it
    for start in (0.0, 0.5):
        _, damage = scrub(tmp_path, durable, start)
        assert [one.file for one in damage] == [str(place)]
        assert damage[0].offset <= offset
        assert damage[0].reason


def open_host_beside(_: ShardHostConfig, folder: Path) -> int:
    """How far a start of a copy gets."""
    import shutil

    copy = folder.parent / f"{folder.name}-copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("lock"))
    host: ShardHost = open_host(config(copy, 1))
    try:
        return host.durable_sequence(0)
    finally:
        host.close()


def test_a_missing_segment_in_the_middle_is_found(driver: Driver, tmp_path: Path) -> None:
    log = tmp_path / "shard-0000" / "log"
    second = segments(log)[1]
    (log / f"{second:020d}.seg").unlink()
    _, [damage] = scrub(tmp_path, driver.host.durable_sequence(0))
    assert f"ends with event {second - 1}" in damage.reason


def test_an_empty_log_and_a_log_that_is_gone(tmp_path: Path) -> None:
    open_host(config(tmp_path, 1)).close()
    assert scrub(tmp_path, 0) == (0, [])
    for path in (tmp_path / "shard-0000" / "log").glob("*.seg"):
        path.unlink()
    assert scrub(tmp_path, 0) == (0, [])
    assert [one.reason for one in scrub(tmp_path, 7)[1]] == ["there are no segments, events up to 7 are durable"]


def test_segments_that_retention_removes_meanwhile_are_no_damage(driver: Driver, tmp_path: Path) -> None:
    durable = driver.host.durable_sequence(0)
    pieces = read_shard(shard_folder(tmp_path, 0), 0, durable)
    first = next(pieces)
    delete_segments_below(tmp_path / "shard-0000" / "log", durable)
    assert [one for one in (first, *pieces) if isinstance(one, Damage)] == []


async def test_the_scrub_keeps_to_its_rate_and_tells_each_damage_once(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    rounds: list[ScrubStatus] = []
    told: list[Damage] = []
    over = asyncio.Event()
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real_sleep(0)

    def on_round(shard: int, status: ScrubStatus) -> None:
        rounds.append(status)
        if len(rounds) == 2:
            over.set()

    class Host:
        shard_ids = (0,)
        config = config(tmp_path, 1)

        def durable_sequence(self, shard: int) -> int:
            return driver.host.durable_sequence(shard)

    log = tmp_path / "shard-0000" / "log"
    flip(log / f"{segments(log)[1]:020d}.seg", 200_000)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    scrubber = Scrubber(
        Host(), bytes_per_s=1000, interval_s=5.0, on_damage=lambda _, damage: told.append(damage), on_round=on_round
    )
    task = asyncio.ensure_future(scrubber.run())
    await asyncio.wait_for(over.wait(), 20)
    task.cancel()
    assert len(told) == 1
    assert rounds[0].damage == rounds[1].damage == scrubber.status(0).damage == tuple(told)
    assert rounds[1].end_time_ns > rounds[0].end_time_ns > 0
    assert sum(slept) * 1000 >= 2 * 40_000 * 48  # so many bytes, paid for with time
