"""Snapshots beside a running shard; restore from snapshot + log; fall back; the state as of a number or a time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from host_fixtures import NOW_NS, Driver, account, config, on_shard, transfer_id

from wallet_core.event_log import LogDamaged, delete_segments_below
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import Progress, RecoveryFailed, ShardHost, rebuild, recover_shard
from wallet_core.shard.port import shard_folder
from wallet_core.snapshot import SnapshotWriter, delete_older, snapshot_files

SOURCE = account(1_000_000)
PEOPLE = [account(n) for n in range(10)]


def rows(count: int, first: int = 0) -> list[TransferRow]:
    return [TransferRow(transfer_id(first + n), PEOPLE[n % 10], PEOPLE[(n + 1) % 10], 1) for n in range(count)]


def opened(folder: Path, **options: object) -> Driver:
    driver = Driver(config(folder, **options))
    if driver.host.durable_sequence(0) == 0:
        driver.fund(PEOPLE, 1000, SOURCE)
    return driver


def snapshot(host: ShardHost, folder: Path, shard: int = 0) -> int:
    return host.image(shard, SnapshotWriter(shard_folder(folder, shard) / "snapshots", shard, reserve_bytes=1 << 30))


class Held(SnapshotWriter):
    """Waits with the first piece until it may go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 0)
        self.begun, self.release = threading.Event(), threading.Event()

    def add(self, piece: bytes | memoryview) -> None:
        self.begun.set()
        assert self.release.wait(30)
        super().add(piece)


def test_restore_from_snapshot_and_the_log_behind_it(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    driver.transfers(rows(500))
    sequence = snapshot(driver.host, tmp_path)
    assert sequence == driver.host.durable_sequence(0)
    driver.transfers(rows(300, 1000))
    digests, balances = driver.digests(), driver.balances(PEOPLE)
    driver.close()
    recovered = recover_shard(config(tmp_path), 0)
    assert (recovered.snapshot_sequence, recovered.replayed_events) == (sequence, 300)
    assert recovered.engine.state_digest() == digests[0]
    recovered.log.close()
    again = opened(tmp_path)
    assert again.balances(PEOPLE) == balances
    assert again.wait(again.submit(rows(500))).replayed_count == 500  # ids come back with the snapshot
    assert again.host.shards()[0].snapshot_sequence == sequence
    again.close()


def test_a_snapshot_under_load_is_consistent(tmp_path: Path) -> None:
    driver = opened(tmp_path, segment_bytes=1 << 22)
    done: list[int] = []
    stop = threading.Event()

    def take() -> None:
        while not stop.is_set():
            done.append(snapshot(driver.host, tmp_path))

    thread = threading.Thread(target=take)
    thread.start()
    for n in range(60):
        assert set(driver.transfers(rows(500, 1000 * n))) == {1}
    stop.set()
    thread.join(30)
    assert len(set(done)) > 3
    digests = driver.digests()
    driver.close()
    for one in snapshot_files(shard_folder(tmp_path, 0) / "snapshots"):
        for newer in snapshot_files(shard_folder(tmp_path, 0) / "snapshots"):
            if newer.sequence > one.sequence:
                newer.path.unlink()
        recovered = recover_shard(config(tmp_path), 0)
        assert recovered.snapshot_sequence == one.sequence
        assert recovered.engine.state_digest() == digests[0]
        assert recovered.engine.verify_digest()
        recovered.log.close()


def test_a_snapshot_is_not_finished_before_its_events_are_durable(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    driver.host.log(0).hold_sync(True)
    ticket = driver.submit(rows(5))
    thread = threading.Thread(target=snapshot, args=(driver.host, tmp_path))
    thread.start()
    driver.take(100)
    assert snapshot_files(shard_folder(tmp_path, 0) / "snapshots") == []
    driver.host.log(0).hold_sync(False)
    assert set(driver.wait(ticket).codes) == {1}
    thread.join(10)
    assert len(snapshot_files(shard_folder(tmp_path, 0) / "snapshots")) == 1
    driver.close()


def test_a_bad_snapshot_falls_back_to_the_one_before(tmp_path: Path) -> None:
    driver = opened(tmp_path, segment_bytes=65536)
    first = snapshot(driver.host, tmp_path)
    driver.transfers(rows(2000))
    snapshot(driver.host, tmp_path)
    driver.transfers(rows(2000, 5000))
    digests = driver.digests()
    driver.close()
    delete_segments_below(shard_folder(tmp_path, 0) / "log", first)
    newest, older = snapshot_files(shard_folder(tmp_path, 0) / "snapshots")
    data = bytearray(newest.path.read_bytes())
    data[len(data) // 2] ^= 1
    newest.path.write_bytes(data)
    recovered = recover_shard(config(tmp_path), 0)
    assert recovered.snapshot_sequence == older.sequence == first
    assert len(recovered.skipped) == 1
    assert str(newest.path) in recovered.skipped[0]
    assert recovered.engine.state_digest() == digests[0]
    recovered.log.close()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_bad_snapshot_is_not_counted_as_one_to_fall_back_to(tmp_path: Path) -> None:
    """Good, bad, then another bad one: if the first bad one counted, the good one and its log would be gone by then."""
    folder, log = shard_folder(tmp_path, 0) / "snapshots", shard_folder(tmp_path, 0) / "log"
    options: dict[str, Any] = {"segment_bytes": 65536}

    def taken(driver: Driver) -> int:
        sequence = snapshot(driver.host, tmp_path)
        oldest = delete_older(folder, 2)
        if oldest:
            delete_segments_below(log, oldest)
        return sequence

    driver = opened(tmp_path, **options)
    driver.transfers(rows(2000))
    good = taken(driver)
    driver.transfers(rows(2000, 5000))
    bad = taken(driver)
    driver.close()
    damage(folder / f"{bad:020d}.snap")

    rebuild(config(tmp_path, **options), 0)
    assert [one.sequence for one in snapshot_files(folder)] == [bad, good]  # a tool that only reads renames nothing

    told: list[Progress] = []
    recovered = recover_shard(config(tmp_path, **options), 0, progress=told.append)
    recovered.log.close()
    assert [one.sequence for one in snapshot_files(folder)] == [good]
    assert (folder / f"{bad:020d}.damaged").exists()
    assert [one.problem for one in told if one.stage == "damaged"] == list(recovered.skipped)

    driver = opened(tmp_path, **options)
    driver.transfers(rows(2000, 10000))
    newest = taken(driver)
    digests = driver.digests()
    driver.close()
    damage(folder / f"{newest:020d}.snap")
    recovered = recover_shard(config(tmp_path, **options), 0)
    assert (recovered.snapshot_sequence, recovered.engine.state_digest()) == (good, digests[0])
    recovered.log.close()


def test_a_recovery_that_fails_leaves_the_snapshots_as_they_are(tmp_path: Path) -> None:
    driver = opened(tmp_path, segment_bytes=65536)
    driver.transfers(rows(3000))
    sequence = snapshot(driver.host, tmp_path)
    driver.close()
    damage(shard_folder(tmp_path, 0) / "snapshots" / f"{sequence:020d}.snap")
    (shard_folder(tmp_path, 0) / "log" / f"{1:020d}.seg").unlink()
    with pytest.raises(LogDamaged):
        recover_shard(config(tmp_path), 0)
    assert [one.sequence for one in snapshot_files(shard_folder(tmp_path, 0) / "snapshots")] == [sequence]


def test_without_any_good_snapshot_the_whole_log_must_be_there(tmp_path: Path) -> None:
    driver = opened(tmp_path, segment_bytes=65536)
    driver.transfers(rows(3000))
    snapshot(driver.host, tmp_path)
    digests = driver.digests()
    driver.close()
    (only,) = snapshot_files(shard_folder(tmp_path, 0) / "snapshots")
    only.path.write_bytes(only.path.read_bytes()[:-1])
    recovered = recover_shard(config(tmp_path), 0)
    assert (recovered.snapshot_sequence, recovered.engine.state_digest()) == (0, digests[0])
    recovered.log.close()
    (shard_folder(tmp_path, 0) / "log" / f"{1:020d}.seg").unlink()
    with pytest.raises(LogDamaged, match="no snapshot reads back"):
        recover_shard(config(tmp_path), 0)


def test_a_snapshot_of_another_history_is_refused(tmp_path: Path) -> None:
    """A snapshot copied into the wrong folder: the frame that ends at its number has another hash."""
    for name, amount in (("one", 1), ("two", 2)):
        driver = opened(tmp_path / name)
        driver.transfers([row._replace(amount_minor=amount) for row in rows(50)])
        snapshot(driver.host, tmp_path / name)
        driver.transfers(rows(50, 1000))
        driver.close()
    (good,) = snapshot_files(shard_folder(tmp_path / "one", 0) / "snapshots")
    (foreign,) = snapshot_files(shard_folder(tmp_path / "two", 0) / "snapshots")
    good.path.write_bytes(foreign.path.read_bytes())
    with pytest.raises(LogDamaged, match="hash chain"):
        recover_shard(config(tmp_path / "one"), 0)


def test_a_log_whose_events_do_not_lead_to_its_digest_is_refused(tmp_path: Path) -> None:
    """Frames rewritten with valid checksums and chain, but another amount: the state's digest gives it away."""
    import hashlib
    import struct

    from wallet_core.event_log import pack_frame, unpack_frame

    driver = opened(tmp_path)
    driver.transfers(rows(5))
    driver.close()
    path = shard_folder(tmp_path, 0) / "log" / f"{1:020d}.seg"
    data = path.read_bytes()
    out, at, previous = b"", 0, bytes(16)
    while any(data[at : at + 96]):
        frame, at = unpack_frame(data, at)
        body = bytearray(frame.body)
        if frame.count == 5:
            struct.pack_into("<q", body, 16, 2)
        out += pack_frame(
            shard=0, epoch=frame.epoch, first_sequence=frame.first_sequence, count=frame.count,
            timestamp_ns=frame.timestamp_ns, durable_sequence=frame.durable_sequence, previous_hash=previous,
            digest=frame.digest, body=bytes(body),
        )  # fmt: skip
        previous = hashlib.sha256(out[-len(frame.body) - 96 :][:96]).digest()[:16]
    path.write_bytes(out + data[len(out) :])
    with pytest.raises(RecoveryFailed) as refused:
        recover_shard(config(tmp_path), 0)
    assert refused.value.file == str(path)
    assert refused.value.offset > 0


def test_the_state_as_of_a_number_and_as_of_a_time(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    seen = []
    for n in range(6):
        driver.clock.set(NOW_NS + n * 1_000_000_000)
        driver.transfers(rows(10, 100 * n))
        if n == 2:
            snapshot(driver.host, tmp_path)
        seen.append((driver.host.durable_sequence(0), driver.digests()[0]))
    for n, (sequence, digest) in enumerate(seen):  # beside the live server
        engine, end = rebuild(config(tmp_path), 0, upto_sequence=sequence)
        assert (engine.state_digest(), end.next_sequence) == (digest, sequence + 1)
        engine, end = rebuild(config(tmp_path), 0, upto_timestamp_ns=NOW_NS + n * 1_000_000_000 + 500)
        assert (engine.state_digest(), end.next_sequence) == (digest, sequence + 1)
    engine, _ = rebuild(config(tmp_path), 0, from_scratch=True)
    assert engine.state_digest() == seen[-1][1]
    driver.close()


def test_a_look_far_back_starts_from_the_nearest_snapshot_that_is_kept(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    folder = shard_folder(tmp_path, 0) / "snapshots"
    taken, at = [], []
    for turn in range(4):
        driver.transfers(rows(200, 1000 * turn))
        taken.append(snapshot(driver.host, tmp_path))
        driver.transfers(rows(50, 1000 * turn + 500))
        at.append((driver.host.durable_sequence(0), driver.digests()[0]))
    delete_older(folder, 3)
    driver.close()
    for turn, (sequence, digest) in enumerate(at):
        told: list[Progress] = []
        engine, _ = rebuild(config(tmp_path), 0, upto_sequence=sequence, progress=told.append)
        assert engine.state_digest() == digest
        assert told[-1].done == (50 if turn else sequence)  # the first one's snapshot is gone: from event 1
        assert engine.status().sequence - told[-1].done == (taken[turn] if turn else 0)


def test_the_writer_tells_what_it_did_beside_a_snapshot_and_before(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    driver.transfers(rows(300))
    sink = Held(shard_folder(tmp_path, 0) / "snapshots")
    thread = threading.Thread(target=driver.host.image, args=(0, sink))
    thread.start()
    assert sink.begun.wait(30)
    for turn in range(1, 3):
        driver.transfers(rows(300, 1000 * turn))
    driver.transfers(rows(10, 9000))  # too few to be counted as a batch
    sink.release.set()
    thread.join(30)
    before, beside = driver.host.writer_times(0)
    assert (before.batches, before.rows) == (1, 300)
    assert (beside.batches, beside.rows) == (2, 600)
    assert beside.commits >= 3
    assert before.pause_ns == 0
    assert 0 < beside.pause_ns_max < beside.pause_ns  # the image was begun and ended
    for times in (before, beside):
        assert 0 < times.apply_cpu_ns_max <= times.apply_cpu_ns
        assert times.commit_ns_max > 0
    snapshot(driver.host, tmp_path)
    assert driver.host.writer_times(0)[0].batches == 0  # counted from the last one on
    driver.close()


def test_progress_is_told(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    driver.transfers(rows(100))
    snapshot(driver.host, tmp_path)
    driver.transfers(rows(100, 1000))
    driver.close()
    told: list[Progress] = []
    recovered = recover_shard(config(tmp_path), 0, progress=told.append)
    recovered.log.close()
    assert {one.stage for one in told} == {"snapshot", "replay"}
    assert told[-1].done == 100


def test_sagas_under_way_survive_in_a_snapshot(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, 2))
    debit, credit = on_shard(0, 2), on_shard(1, 2)
    assert driver.open_accounts([AccountRow(debit, "USD", 0, 10_000), AccountRow(credit, "USD")]) == [1, 1]
    driver.host.log(1).hold_sync(True)
    sent = [TransferRow(transfer_id(n), debit, credit, 1) for n in range(100)]
    driver.transfers(sent, settled=False)
    assert driver.host.shards()[0].unsettled_count == 100
    snapshot(driver.host, tmp_path, 0)
    driver.host.log(1).inject("fdatasync", 1, 5)
    driver.host.log(1).hold_sync(False)
    for _ in range(100):
        if driver.host.failed:
            break
        driver.take(20)
    driver.close()
    again = Driver(config(tmp_path, 2))
    for _ in range(200):
        if again.host.shards()[0].unsettled_count == 0 and again.host.shards()[0].snapshot_sequence:
            break
        again.take(5)
    assert again.balances([debit, credit]) == [-100, 100]
    assert again.host.shards()[0].unsettled_count == 0
    again.close()


def test_only_one_image_a_shard_at_a_time(tmp_path: Path) -> None:
    driver = opened(tmp_path)

    class Nosy:
        def begin(self, sequence: int, timestamp_ns: int, epoch: int, digest: bytes) -> None:
            with pytest.raises(RuntimeError, match="being taken already"):
                snapshot(driver.host, tmp_path)

        def add(self, piece: memoryview) -> None:
            pass

        def finish(self, frame_hash: bytes) -> None:
            pass

    driver.host.image(0, Nosy())
    driver.close()
