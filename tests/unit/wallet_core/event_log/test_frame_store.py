"""Frames that become durable in a store: before the local copy and before any result, in order, once; a failing store ends the log."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from wallet_core.event_log import FileLog, LogNotCommitted, open_log, pack_frame, read_frames, unpack_frame
from wallet_core.shard import ShardHost, ShardHostConfig
from wallet_core.shard.port import default_shard_map
from wallet_core.shard.recovery import new_engine

SEGMENT = 65536


class MemoryStore:
    """A FrameStore that keeps what it is given, looks at the local copy meanwhile, and fails when told."""

    place = "memory"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups: list[bytes] = []
        self.local: list[int] = []  # last event that the local segments had at each append
        self.is_failing = self.is_closed = False
        self.may_commit = threading.Event()
        self.may_commit.set()

    def append(self, frames: memoryview) -> int:
        assert frames.readonly
        self.may_commit.wait(10)
        if self.is_failing:
            raise LogNotCommitted(self.place, "told so")
        self.local.append(max((frame.last_sequence for frame in read_frames(self.folder, 0)), default=0))
        self.groups.append(bytes(frames))
        return len(self.groups)

    def close(self) -> None:
        self.is_closed = True

    def frames(self) -> list[tuple[int, int]]:
        found = []
        for group in self.groups:
            at = 0
            while at < len(group):
                frame, at = unpack_frame(group, at)
                found.append((frame.first_sequence, frame.count))
        return found


def opened(folder: Path) -> tuple[FileLog, MemoryStore]:
    store = MemoryStore(folder)
    return open_log(folder, 0, segment_bytes=SEGMENT, reserve_bytes=0, sync=False, store=store), store


def append(log: FileLog, count: int = 10) -> None:
    first = log.next_sequence
    log.append(first, count, first, bytes(16), b"\x5a" * (48 * count))


def local_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes().rstrip(b"\0") for path in sorted(folder.glob("*.seg")))


def test_the_store_has_a_group_before_the_local_copy_has_it(tmp_path: Path) -> None:
    log, store = opened(tmp_path)
    for _ in range(3):
        append(log)
        append(log, 3)
        log.sync()
    assert store.local == [0, 13, 26]
    assert [len(group) for group in store.groups] == [2 * 96 + 13 * 48] * 3
    assert b"".join(store.groups).rstrip(b"\0") == local_bytes(tmp_path)
    log.close()
    assert store.is_closed


def test_a_group_over_the_end_of_a_segment_is_stored_once(tmp_path: Path) -> None:
    log, store = opened(tmp_path)
    for _ in range(30):
        append(log, 100)  # 144 KiB in segments of 64
    log.sync()
    log.close()
    assert store.frames() == [(first, 100) for first in range(1, 3001, 100)]
    assert [(one.first_sequence, one.count) for one in read_frames(tmp_path, 0)] == store.frames()


def test_a_failing_store_ends_the_log_and_leaves_the_local_copy_behind(tmp_path: Path) -> None:
    log, store = opened(tmp_path)
    append(log)
    log.sync()
    store.is_failing = True
    append(log)
    for _ in range(2):
        with pytest.raises(LogNotCommitted, match="told so"):
            log.sync()
        store.is_failing = False  # it would work again, but nobody knows what became of the first try
    with pytest.raises(LogNotCommitted):
        append(log)
    assert log.poisoned
    assert log.durable_sequence == 10
    assert len(store.groups) == 1
    log.close()
    assert [one.last_sequence for one in read_frames(tmp_path, 0)] == [10]


def test_results_wait_for_the_store(tmp_path: Path) -> None:
    log, store = opened(tmp_path)
    config = ShardHostConfig(data_dir=tmp_path, generation_ids=1 << 16)
    host = ShardHost([(0, new_engine(config, 0), log)], shard_count=1, shard_map=default_shard_map(1))
    host.start()
    store.may_commit.clear()
    host.submit_accounts(1, [(b"\x11" * 16, "USD", 0, 0, 0)])
    host.submit_read(2, [b"\x11" * 16])  # a read waits for what it has seen
    threading.Event().wait(0.2)
    assert host.completions() == []
    assert host.durable_sequence(0) == 0
    store.may_commit.set()
    answers: dict[int, object] = {}
    for _ in range(1000):
        answers.update(host.completions())
        if len(answers) == 2:
            break
        threading.Event().wait(0.005)
    assert set(answers) == {1, 2}
    assert host.durable_sequence(0) == 1
    host.close()


def test_a_copied_frame_is_the_same_bytes_and_must_continue_the_chain(tmp_path: Path) -> None:
    log, store = opened(tmp_path / "a")
    append(log)
    append(log, 3)
    append(log)
    log.sync()
    log.close()
    [group] = store.groups
    frames, at = [], 0
    while at < len(group):
        _, behind = unpack_frame(group, at)
        frames.append(group[at:behind])
        at = behind
    copy = open_log(tmp_path / "b", 0, segment_bytes=SEGMENT, reserve_bytes=0, sync=False)
    with pytest.raises(ValueError, match="does not continue the log of shard 0 at event 1"):
        copy.append_copy(frames[1])
    copy.append_copy(frames[0])
    with pytest.raises(ValueError, match="does not continue"):
        copy.append_copy(frames[0])
    for at in (0, 30, 60, 95, 100, len(frames[1]) - 1):
        flipped = bytearray(frames[1])
        flipped[at] ^= 1
        with pytest.raises(ValueError, match="no frame"):
            copy.append_copy(flipped)
    for short in (b"", frames[1][:95], frames[1][:-8], frames[1] + bytes(8)):
        with pytest.raises(ValueError, match="no frame"):
            copy.append_copy(short)
    foreign = pack_frame(
        shard=1, epoch=1, first_sequence=11, count=1, timestamp_ns=1, durable_sequence=0, previous_hash=bytes(16),
        digest=bytes(16), body=bytes(48),
    )  # fmt: skip
    with pytest.raises(ValueError, match="shard 1"):
        copy.append_copy(foreign)
    copy.append_copy(frames[1])
    copy.append_copy(frames[2])
    copy.sync()
    copy.close()
    assert local_bytes(tmp_path / "b") == local_bytes(tmp_path / "a")
