"""Damage anywhere: every acknowledged event comes back, or the log refuses, naming file and offset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from wallet_core.event_log import FileLog, LogDamaged, open_log, read_frames, segments

SEGMENT = 65536
COUNTS = (1, 3, 2, 1)


def write(folder: Path, *, unacknowledged: int = 0) -> int:
    """A small log of four acknowledged frames, and frames written but never synced behind them. Returns its bytes."""
    log = open_log(folder, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    for count in COUNTS:
        append(log, count)
        log.sync()
    end = log.position[2]
    if unacknowledged:
        log.inject("fdatasync", 1, 5)
        append(log, unacknowledged)
        with pytest.raises(Exception, match="fdatasync failed"):
            log.sync()
    log.close()
    return int(end)


def append(log: FileLog, count: int) -> None:
    first = log.next_sequence
    log.append(first, count, first, first.to_bytes(16, "big"), bytes([first & 255]) * 48 * count)


def acknowledged(folder: Path) -> int:
    """Open (settles the tail), then count events from the start."""
    log = open_log(folder, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    log.close()
    total = 0
    for frame in read_frames(folder, 0):
        assert frame.first_sequence == total + 1
        total += frame.count
    return total


def damaged_copy(source: Path, target: Path, *, with_mark: bool) -> Path:
    target.mkdir()
    shutil.copyfile(source / f"{1:020d}.seg", target / f"{1:020d}.seg")
    if with_mark:
        shutil.copyfile(source / "durable.mark", target / "durable.mark")
    return target / f"{1:020d}.seg"


def outcome(folder: Path) -> tuple[str, int]:
    try:
        return "recovered", acknowledged(folder)
    except LogDamaged as error:
        named = error.file.endswith((".seg", "durable.mark")) and f"byte {error.offset}" in str(error)
        return "refused" if named else "refused without naming file and offset", error.offset


@pytest.mark.parametrize("xor", [0x01, 0xFF])
def test_every_byte_flipped(tmp_path: Path, xor: int) -> None:
    end = write(tmp_path / "log")
    total = sum(COUNTS)
    for at in range(end + 64):
        folder = tmp_path / "case"
        segment = damaged_copy(tmp_path / "log", folder, with_mark=True)
        with open(segment, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ xor]))
        kind, value = outcome(folder)
        if at < end:
            assert kind == "refused", f"byte {at} flipped: {kind} {value}"
            assert value <= at
        else:
            assert (kind, value) == ("recovered", total), f"byte {at} behind the tail flipped: {kind} {value}"
        shutil.rmtree(folder)


def test_every_length_truncated(tmp_path: Path) -> None:
    end = write(tmp_path / "log")
    total = sum(COUNTS)
    for length in range(end + 9):
        folder = tmp_path / "case"
        segment = damaged_copy(tmp_path / "log", folder, with_mark=True)
        with open(segment, "r+b") as file:
            file.truncate(length)
        kind, value = outcome(folder)
        if length < end:
            assert kind == "refused", f"cut at {length}: {kind} {value}"
        else:
            assert (kind, value) == ("recovered", total)
        shutil.rmtree(folder)


def test_without_the_mark_file_later_frames_still_prove_what_was_durable(tmp_path: Path) -> None:
    end = write(tmp_path / "log")
    last_frame = end - (96 + COUNTS[-1] * 48)
    for at in range(0, end, 5):
        folder = tmp_path / "case"
        segment = damaged_copy(tmp_path / "log", folder, with_mark=False)
        with open(segment, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))
        kind, value = outcome(folder)
        # only the very last frame has nobody left to vouch for it
        assert kind == ("refused" if at < last_frame else "recovered"), f"byte {at}: {kind} {value}"
        shutil.rmtree(folder)


def test_every_byte_of_a_torn_tail(tmp_path: Path) -> None:
    """A last group that reached the disk in part and was never acknowledged: cut off, kept aside, nothing else lost."""
    end = write(tmp_path / "log", unacknowledged=2)
    whole = end + 96 + 2 * 48
    total = sum(COUNTS)
    for at in range(end, whole):
        folder = tmp_path / "case"
        segment = damaged_copy(tmp_path / "log", folder, with_mark=True)
        with open(segment, "r+b") as file:
            file.seek(at)
            tail = file.read(whole - at)
            file.seek(at)
            file.write(bytes(len(tail)))  # zeros from here on
        kind, value = outcome(folder)
        torn = any(tail)
        assert kind == "recovered"
        assert value == (total if torn else total + 2)
        kept = list(folder.glob("*.damaged-*"))
        with open(segment, "rb") as file:
            file.seek(end)
            rest = file.read()
        if torn and at > end:
            assert len(kept) == 1
            assert kept[0].read_bytes().startswith(b"DUCF"[: at - end])
            assert not any(rest), "the torn tail must be zeros now"
        shutil.rmtree(folder)


def test_an_unacknowledged_but_whole_tail_may_be_recovered(tmp_path: Path) -> None:
    write(tmp_path, unacknowledged=2)
    assert acknowledged(tmp_path) == sum(COUNTS) + 2


def test_a_frame_lost_in_the_middle_of_an_unsynced_group_is_a_torn_tail(tmp_path: Path) -> None:
    end = write(tmp_path)
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    for _ in range(3):
        append(log, 1)
    log.inject("fdatasync", 1, 5)
    with pytest.raises(Exception, match="fdatasync"):
        log.sync()
    log.close()
    with open(tmp_path / f"{1:020d}.seg", "r+b") as file:  # blocks of one group reach the disk in any order
        file.seek(end)
        file.write(bytes(144))
    assert acknowledged(tmp_path) == sum(COUNTS)
    assert list(tmp_path.glob("*.damaged-1"))


def test_damage_in_an_older_segment_is_refused_even_without_the_mark(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    for _ in range(5):
        append(log, 600)
        log.sync()
    log.close()
    assert len(segments(tmp_path)) > 2
    (tmp_path / "durable.mark").unlink()
    victim = tmp_path / f"{segments(tmp_path)[1]:020d}.seg"
    with open(victim, "r+b") as file:
        file.seek(5000)
        file.write(b"\xaa")
    with pytest.raises(LogDamaged) as refused:
        open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    assert refused.value.file == str(victim)


def test_a_missing_newest_segment_is_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    for _ in range(5):
        append(log, 600)
        log.sync()
    log.close()
    (tmp_path / f"{segments(tmp_path)[-1]:020d}.seg").unlink()
    with pytest.raises(LogDamaged, match="durable up to 3000"):
        open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)


def test_all_segments_gone_but_the_mark_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / f"{1:020d}.seg").unlink()
    with pytest.raises(LogDamaged, match="no segments"):
        open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)


def test_a_damaged_mark_file_alone_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "durable.mark").write_bytes(b"\xff" * 1024)
    assert acknowledged(tmp_path) == sum(COUNTS)


def test_damage_behind_the_last_frame_of_a_segment_does_not_cut_off_the_segments_after_it(tmp_path: Path) -> None:
    """Without the mark file the log went on there, and the later segment was lost without a word."""
    log = open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    while len(segments(tmp_path)) < 3:
        append(log, 100)
        log.sync()
        log.wait_prepared()
    log.close()
    (tmp_path / "durable.mark").unlink()
    older, newest = segments(tmp_path)[-2:]
    end = sum(96 + 48 * frame.count for frame in read_frames(tmp_path, 0, older) if frame.first_sequence < newest)
    assert end < SEGMENT
    with open(tmp_path / f"{older:020d}.seg", "r+b") as segment:
        segment.seek(end)
        assert segment.read(1) == bytes(1)
        segment.seek(end)
        segment.write(b"x")
    with pytest.raises(LogDamaged, match=f"a later segment begins at {newest}") as refused:
        open_log(tmp_path, 0, segment_bytes=SEGMENT, reserve_bytes=0)
    assert (refused.value.file, refused.value.offset) == (str(tmp_path / f"{older:020d}.seg"), end)
