"""What was appended comes back, byte for byte, through both readers, over segments and restarts."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

from wallet_core.event_log import (
    FrameInvalid,
    LogGap,
    LogLocked,
    LogTail,
    crc32c,
    delete_segments_below,
    durable_position,
    frame_hash,
    open_log,
    pack_frame,
    read_frames,
    segments,
    unpack_frame,
)
from wallet_core.event_log._file import crc32c_software, read_mark

HERE = Path(__file__).parent
SEGMENT = 65536
_spec = importlib.util.spec_from_file_location("frame_reader", HERE / "frame_reader.py")
assert _spec is not None
assert _spec.loader is not None
frame_reader = importlib.util.module_from_spec(_spec)
sys.modules["frame_reader"] = frame_reader
_spec.loader.exec_module(frame_reader)


def body(sequence: int, count: int) -> bytes:
    return b"".join((sequence + i).to_bytes(8, "little") * 6 for i in range(count))


def fill(folder: Path, counts: list[int], **options: object) -> list[tuple[int, int, bytes]]:
    """Append one frame a count, each synced; returns (first sequence, count, body) of each."""
    log = open_log(folder, 3, segment_bytes=SEGMENT, reserve_bytes=0, **options)  # type: ignore[arg-type]
    written = []
    for count in counts:
        first = log.next_sequence
        data = body(first, count)
        log.append(first, count, 1_000_000_000 + first, first.to_bytes(16, "little"), data)
        log.sync()
        written.append((first, count, data))
    log.close()
    return written


def read_back(folder: Path, from_sequence: int = 1) -> list[tuple[int, int, bytes]]:
    return [(f.first_sequence, f.count, f.body) for f in read_frames(folder, 3, from_sequence)]


def test_crc32c_matches_its_check_value_in_hardware_and_software() -> None:
    assert crc32c(b"123456789") == crc32c_software(b"123456789") == 0xE3069283
    noise = random.Random(7).randbytes(50_000)
    for start, length in ((0, 50_000), (1, 49_999), (3, 6144), (5, 6143), (7, 6145), (2, 100), (9, 0), (11, 18_437)):
        part = noise[start : start + length]
        assert crc32c(part) == crc32c_software(part)
        assert crc32c(part[length // 3 :], crc32c(part[: length // 3])) == crc32c(part)
    assert frame_reader.crc32c(noise[:3000]) == crc32c(noise[:3000])


def test_frames_read_back_over_several_segments(tmp_path: Path) -> None:
    rng = random.Random(1)
    written = fill(tmp_path, [rng.randint(1, 400) for _ in range(60)])
    assert len(segments(tmp_path)) > 5
    assert read_back(tmp_path) == written


def test_an_independent_reader_agrees(tmp_path: Path) -> None:
    written = fill(tmp_path, [1, 2, 300, 5])
    frames = frame_reader.read_file(tmp_path / f"{1:020d}.seg")
    assert [(f["first_sequence"], f["count"], f["body"]) for f in frames] == written
    assert [f["durable_sequence"] for f in frames] == [0, 1, 3, 303]


def test_golden_file_of_format_version_1() -> None:
    data = (HERE / "golden" / "frames-v1.seg").read_bytes()
    frames = frame_reader.read_segment(data)
    assert [(f["first_sequence"], f["count"], f["epoch"], f["shard"]) for f in frames] == [
        (1, 1, 1, 3), (2, 3, 1, 3), (5, 2, 2, 3),
    ]  # fmt: skip
    offset = 0
    for expected in frames:
        frame, offset = unpack_frame(data, offset)
        assert (frame.body, frame.hash, frame.digest) == (expected["body"], expected["hash"], expected["digest"])


def test_the_writer_still_writes_the_golden_file(tmp_path: Path) -> None:
    fill(tmp_path, [1, 3])
    fill(tmp_path, [2])
    golden = (HERE / "golden" / "frames-v1.seg").read_bytes()
    assert (tmp_path / f"{1:020d}.seg").read_bytes()[: len(golden)] == golden


def test_python_packing_equals_the_native_writer(tmp_path: Path) -> None:
    fill(tmp_path, [4])
    data = (tmp_path / f"{1:020d}.seg").read_bytes()
    packed = pack_frame(
        shard=3, epoch=1, first_sequence=1, count=4, timestamp_ns=1_000_000_001, durable_sequence=0,
        previous_hash=bytes(16), digest=(1).to_bytes(16, "little"), body=body(1, 4),
    )  # fmt: skip
    assert data[: len(packed)] == packed
    assert unpack_frame(packed)[0].hash == frame_hash(packed[:96])
    with pytest.raises(FrameInvalid):
        unpack_frame(packed[:-1])


def test_a_restart_continues_sequence_epoch_and_chain(tmp_path: Path) -> None:
    written = fill(tmp_path, [5, 6]) + fill(tmp_path, [7]) + fill(tmp_path, [900, 1])
    assert read_back(tmp_path) == written
    assert [f.epoch for f in read_frames(tmp_path, 3)] == [1, 1, 2, 3, 3]


def test_opening_alone_spends_an_epoch(tmp_path: Path) -> None:
    fill(tmp_path, [])
    fill(tmp_path, [])
    log = open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0)
    assert log.epoch == 3
    log.close()


def test_group_commit_is_one_write_and_one_sync(tmp_path: Path) -> None:
    log = open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0)
    for _ in range(10):
        log.append(log.next_sequence, 2, 5, bytes(16), body(log.next_sequence, 2))
    assert log.durable_sequence == 0
    position = durable_position_of(log)
    assert position == 0
    log.sync()
    assert (log.durable_sequence, log.sync_count) == (20, 1)
    assert durable_position(log).offset == 10 * (96 + 96)
    log.close()


def durable_position_of(log: object) -> int:
    return durable_position(log).sequence  # type: ignore[arg-type]


def test_reading_from_the_middle_and_below_retention(tmp_path: Path) -> None:
    written = fill(tmp_path, [300] * 20)
    assert read_back(tmp_path, 3001) == [w for w in written if w[0] + w[1] > 3001]
    gone = delete_segments_below(tmp_path, 3000)
    assert gone
    assert read_back(tmp_path, 3001) == [w for w in written if w[0] + w[1] > 3001]
    with pytest.raises(LogGap) as refused:
        read_back(tmp_path, 1)
    assert refused.value.first_sequence == segments(tmp_path)[0]
    assert fill(tmp_path, [1])[0][0] == 6001  # a log without its beginning still opens for appending


def test_retention_never_deletes_the_newest_segment(tmp_path: Path) -> None:
    fill(tmp_path, [10, 10])
    assert delete_segments_below(tmp_path, 10**9) == []


def test_a_frame_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path) -> None:
    written = fill(tmp_path, [1, 5000, 1])
    assert read_back(tmp_path) == written


def test_a_tail_follows_the_live_log(tmp_path: Path) -> None:
    log = open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0)
    tail = LogTail(tmp_path, 3, 1)
    seen: list[int] = []
    for count in (1, 2, 700, 3, 800, 900, 1):
        first = log.next_sequence
        log.append(first, count, 5, bytes(16), body(first, count))
        assert tail.poll(log.durable_sequence) == []  # staged is not durable
        log.sync()
        frames = tail.poll(log.durable_sequence)
        seen += [f.first_sequence for f in frames]
        assert frames[-1].body == body(first, count)
    assert seen == [1, 2, 4, 704, 707, 1507, 2407]
    log.close()


def test_a_second_opener_is_refused_and_told_why(tmp_path: Path) -> None:
    log = open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0)
    with pytest.raises(LogLocked, match=f"process {os.getpid()}"):
        open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0)
    log.close()
    open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0).close()


def test_a_log_of_another_shard_is_refused(tmp_path: Path) -> None:
    from wallet_core.event_log import LogDamaged

    fill(tmp_path, [1])
    with pytest.raises(LogDamaged, match="another shard"):
        open_log(tmp_path, 4, segment_bytes=SEGMENT, reserve_bytes=0)


def test_wrong_sequence_or_length_is_the_callers_mistake(tmp_path: Path) -> None:
    log = open_log(tmp_path, 3, segment_bytes=SEGMENT, reserve_bytes=0)
    with pytest.raises(ValueError, match="next sequence number is 1"):
        log.append(2, 1, 5, bytes(16), body(2, 1))
    with pytest.raises(ValueError, match="48 bytes were announced"):
        log.append(1, 2, 5, bytes(16), body(1, 1))
    log.close()


def test_the_mark_names_the_last_durable_frame(tmp_path: Path) -> None:
    fill(tmp_path, [3, 4])
    mark = read_mark(tmp_path)
    assert mark is not None
    assert mark[:4] == (7, 1, 1, 2 * 96 + 7 * 48)
