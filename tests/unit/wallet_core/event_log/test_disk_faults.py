"""Failing syncs, short writes, a full disk: the log stops or refuses; a restart finds all that was acknowledged."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from wallet_core.event_log import DiskNearlyFull, FileLog, LogPoisoned, open_log, read_frames

SEGMENT = 65536


def append(log: FileLog, count: int = 10) -> None:
    first = log.next_sequence
    log.append(first, count, first, bytes(16), b"\x5a" * (48 * count))


def events(folder: Path) -> int:
    return sum(frame.count for frame in read_frames(folder, 0))


def test_the_first_failed_sync_poisons_the_log_for_good(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    append(log)
    log.sync()
    log.inject("fdatasync", 1, errno.EIO)
    append(log)
    with pytest.raises(LogPoisoned, match=r"fdatasync failed \(Input/output error\)") as failed:
        log.sync()
    assert failed.value.file.endswith(".seg")
    assert log.durable_sequence == 10
    with pytest.raises(LogPoisoned):  # the next sync would succeed, and would lie
        log.sync()
    with pytest.raises(LogPoisoned):
        append(log)
    log.close()
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    assert log.next_sequence in (11, 21)
    log.close()


@pytest.mark.parametrize("short_bytes", [0, 1, 100, 512, 4096, 5000])
def test_a_short_write_poisons_and_the_tail_is_cut(tmp_path: Path, short_bytes: int) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    append(log)
    log.sync()
    log.inject("write", 1, 0, short_bytes)
    append(log, 200)
    with pytest.raises(LogPoisoned, match="short write"):
        log.sync()
    log.close()
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    assert log.next_sequence == 11
    append(log)
    log.sync()
    log.close()
    assert events(tmp_path) == 20


def test_a_write_error_poisons(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    log.inject("write", 1, errno.ENOSPC)
    append(log)
    with pytest.raises(LogPoisoned, match="No space left"):
        log.sync()
    log.close()


def test_a_nearly_full_disk_refuses_before_anything_is_applied_and_recovers(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    log.inject("fallocate", 1, errno.ENOSPC)
    refused_at = None
    for _ in range(120):
        append(log)
        log.sync()
        log.wait_prepared()
        if log.nearly_full:
            refused_at = log.next_sequence
            break
    assert refused_at is not None
    assert 0.7 * SEGMENT < log.position[2] < SEGMENT, "the flag must rise while the current segment still has room"
    log.inject("fallocate", 0)
    log.recheck_space()
    log.wait_prepared()
    assert not log.nearly_full
    for _ in range(120):
        append(log)
        log.sync()
    log.close()
    assert events(tmp_path) == refused_at - 1 + 1200


def test_a_truly_full_disk_poisons_at_the_roll_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    log.inject("fallocate", 1, errno.ENOSPC)
    with pytest.raises(LogPoisoned, match="fallocate failed"):  # noqa: PT012 - which append fails depends on the size
        for _ in range(1000):
            append(log)
            log.sync()
    durable = log.durable_sequence
    log.close()
    assert events(tmp_path) >= durable > 1000


def test_too_little_room_for_the_first_segment_is_a_typed_refusal(tmp_path: Path) -> None:
    with pytest.raises(DiskNearlyFull) as refused:
        open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=2**60)
    assert refused.value.free_bytes > 0
    open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0).close()  # the lock was let go


def test_the_reserve_carries_what_was_applied_already(tmp_path: Path) -> None:
    """Above the reserve new work is refused; frames of applied work still find a segment, from the reserve."""
    open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0).close()
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=2**60)
    for _ in range(300):
        append(log)
        log.sync()
    log.wait_prepared()
    log.close()
    assert events(tmp_path) == 3000


def test_nothing_is_durable_before_the_sync_returns(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    log.hold_sync(True)
    append(log)
    thread = threading.Thread(target=log.sync)
    thread.start()
    assert log.durable_sequence == 0
    log.hold_sync(False)
    thread.join(10)
    assert log.durable_sequence == 10
    log.close()


def test_buffered_io_works_where_direct_io_is_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0, direct=False)
    for _ in range(200):
        append(log)
        log.sync()
    log.close()
    assert events(tmp_path) == 2000


def test_a_segment_that_was_prepared_before_a_restart_does_not_take_up_room(tmp_path: Path) -> None:
    """On a disk that is nearly full the next one could not be had for it, and the shard came back read-only."""
    open_log(tmp_path, 0, segment_bytes=65536, reserve_bytes=0).close()
    for name in ("next.ready", "next.building"):
        (tmp_path / name).write_bytes(bytes(65536))
    log = open_log(tmp_path, 0, segment_bytes=65536, reserve_bytes=0)
    assert not list(tmp_path.glob("next.*"))
    log.close()
