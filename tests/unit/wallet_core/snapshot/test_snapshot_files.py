"""A snapshot is whole or refused: every byte flipped, every length cut, a crash at any point of writing."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from wallet_core.event_log import crc32c
from wallet_core.snapshot import (
    SnapshotDamaged,
    SnapshotWriter,
    check,
    delete_older,
    read_header,
    read_pieces,
    snapshot_files,
)

PIECES = [b"a", b"bcdefgh", bytes(range(64)), b"x" * 9]
DIGEST, HASH = bytes(range(16)), bytes(range(16, 32))
GOLDEN = Path(__file__).parent / "golden" / "snapshot-v1.snap"


def write(folder: Path, sequence: int, pieces: list[bytes]) -> Path:
    writer = SnapshotWriter(folder, 3)
    writer.begin(sequence, 123_456_789, 7, DIGEST)
    for piece in pieces:
        writer.add(piece)
    return writer.finish(HASH)


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    rng = random.Random(1)
    pieces = [rng.randbytes(rng.choice((1, 8, 4095, 4096, 4097, 1 << 20, (1 << 20) + 64))) for _ in range(40)]
    path = write(tmp_path, 42, pieces)
    assert [bytes(piece) for piece in read_pieces(path)] == pieces
    header = check(path)
    assert (header.shard, header.sequence, header.epoch, header.timestamp_ns) == (3, 42, 7, 123_456_789)
    assert (header.digest, header.frame_hash, header.piece_count) == (DIGEST, HASH, 40)
    assert header.file_bytes == path.stat().st_size


def test_an_image_without_pieces_is_a_snapshot_too(tmp_path: Path) -> None:
    assert list(read_pieces(write(tmp_path, 1, []))) == []


def test_golden_file_of_format_version_1() -> None:
    """Read by an independent reader, written from docs/event-log-format.md with struct alone."""
    data = GOLDEN.read_bytes()
    magic, version, header_bytes, shard, flags, epoch, sequence, timestamp_ns = struct.unpack_from("<4sHHHHIQQ", data)
    assert (magic, version, header_bytes, shard, flags, epoch) == (b"DUCS", 1, 128, 3, 0, 7)
    assert (sequence, timestamp_ns, data[32:48], data[48:64]) == (42, 123_456_789, DIGEST, HASH)
    count, size, _ = struct.unpack_from("<QQQ", data, 64)
    assert (count, size) == (4, len(data))
    assert struct.unpack_from("<I", data, 124) == (crc32c(data[:124]),)
    at, sums = 128, b""
    for piece in PIECES:
        length, crc = struct.unpack_from("<II", data, at)
        assert data[at + 8 : at + 8 + length] == piece
        assert crc == crc32c(piece)
        sums += crc.to_bytes(4, "little")
        at += 8 + (length + 7) // 8 * 8
    assert struct.unpack_from("<I", data, 120) == (crc32c(sums),)
    zero, crc, end, all_crc, count, size = struct.unpack_from("<II4sIQQ", data, at)
    assert (zero, end, all_crc, count, size) == (0, b"DUCE", crc32c(sums), 4, len(data))
    assert crc == crc32c(data[at + 8 :])
    assert [bytes(piece) for piece in read_pieces(GOLDEN)] == PIECES


def test_the_writer_still_writes_the_golden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_800_000_000_000_000_000)
    assert write(tmp_path, 42, PIECES).read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("xor", [0x01, 0x80])
def test_every_byte_flipped_is_noticed(tmp_path: Path, xor: int) -> None:
    path = write(tmp_path, 42, PIECES)
    data = path.read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= xor
        path.write_bytes(changed)
        with pytest.raises(SnapshotDamaged) as refused:
            check(path)
        assert refused.value.file == str(path)


def test_every_length_cut_and_anything_appended_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 42, PIECES)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(SnapshotDamaged):
            check(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(SnapshotDamaged):
        check(path)


def test_pieces_in_another_order_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 42, [b"1" * 8, b"2" * 8])
    data = bytearray(path.read_bytes())
    data[128:144], data[144:160] = data[144:160], data[128:144]
    path.write_bytes(data)
    with pytest.raises(SnapshotDamaged):
        check(path)


def test_an_unfinished_snapshot_is_invisible_and_swept(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path, 3)
    writer.begin(9, 1, 1, DIGEST)
    writer.add(b"abc")
    assert snapshot_files(tmp_path) == []
    del writer  # the process dies here
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".building"]
    write(tmp_path, 10, PIECES)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{10:020d}.snap"]


def test_an_abandoned_snapshot_leaves_nothing(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path, 3)
    writer.begin(9, 1, 1, DIGEST)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_at_least_two_snapshots_are_kept(tmp_path: Path) -> None:
    assert delete_older(tmp_path, 2) == 0
    for sequence in (5, 6, 7, 8):
        write(tmp_path, sequence, PIECES)
    assert delete_older(tmp_path, 3) == 6
    assert delete_older(tmp_path, 0) == 7
    assert [one.sequence for one in snapshot_files(tmp_path)] == [8, 7]


def test_the_header_alone_is_cheap_to_read(tmp_path: Path) -> None:
    path = write(tmp_path, 42, PIECES)
    assert read_header(path).sequence == 42
    os.truncate(path, 127)
    with pytest.raises(SnapshotDamaged, match="127 bytes"):
        read_header(path)
