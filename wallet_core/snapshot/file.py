"""Snapshots on disk: written atomically beside a running shard, listed, checked, read back, and not too many
of them."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wallet_core.event_log import DiskNearlyFull, crc32c
from wallet_core.event_log.file import make_folder, sync_folder
from wallet_core.snapshot.format import (
    HEADER_BYTES,
    PIECE_BYTES_MAX,
    PIECE_HEADER,
    TRAILER_BYTES,
    SnapshotDamaged,
    SnapshotHeader,
    pack_header,
    pack_trailer,
    unpack_header,
)

_BLOCK = 4096
_BUFFER_BYTES = 256 * 1024  # one write; short enough for a log's sync to pass between two of them
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One finished snapshot in a folder, not yet checked."""

    path: Path
    sequence: int
    size_bytes: int


def snapshot_files(folder: Path) -> list[SnapshotFile]:
    """Finished snapshots, newest first."""
    found = []
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.suffix == ".snap" and len(entry.stem) == 20 and entry.stem.isdigit():
                found.append(SnapshotFile(entry, int(entry.stem), entry.stat().st_size))
    return sorted(found, key=lambda one: -one.sequence)


class SnapshotWriter:
    """Writes one snapshot: `begin`, `add` each piece, `finish`. Nothing is visible before `finish` returns; `abandon`
    (or a crash) leaves at most a `.building` file, which the next writer removes. Raises DiskNearlyFull rather than eat
    into the reserve that the event log needs. Past the page cache where possible, so that a gigabyte of snapshot does
    not push a server's memory out. Use one writer a folder at a time."""

    def __init__(self, folder: Path, shard: int, *, reserve_bytes: int = 0) -> None:
        self._folder, self._shard, self._reserve_bytes = folder, shard, reserve_bytes
        self._descriptor = -1
        self._path = folder
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._written = 0
        self._pieces = 0
        self._pieces_crc = 0
        self._first_block = b""
        self._begun: tuple[int, int, int, bytes] | None = None
        self.file_bytes = 0

    def begin(self, sequence: int, timestamp_ns: int, epoch: int, digest: bytes) -> None:
        """The state that the pieces will be of."""
        if not self._folder.is_dir():
            make_folder(self._folder)
        for left in self._folder.glob("*.building"):
            left.unlink()
        self._begun = (sequence, timestamp_ns, epoch, digest)
        self._path = self._folder / f"{sequence:020d}.building"
        self._descriptor = _open_direct(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._put(bytes(HEADER_BYTES))

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece of the image (at most 8 MiB)."""
        length = len(piece)
        if not 0 < length <= PIECE_BYTES_MAX:
            raise ValueError(f"a piece has 1 to {PIECE_BYTES_MAX} bytes, not {length}")
        crc = crc32c(piece)
        self._put(PIECE_HEADER.pack(length, crc))
        self._put(piece)
        self._put(bytes(-length % 8))
        self._pieces_crc = crc32c(crc.to_bytes(4, "little"), self._pieces_crc)
        self._pieces += 1

    def finish(self, frame_hash: bytes) -> Path:
        """Header, sync, rename, sync of the folder. Returns the snapshot's path."""
        assert self._begun is not None, "begin comes first"
        sequence, timestamp_ns, epoch, digest = self._begun
        size = self._written + self._filled + TRAILER_BYTES
        self._put(pack_trailer(self._pieces, size, self._pieces_crc))
        header = pack_header(
            SnapshotHeader(
                *(self._shard, epoch, sequence, timestamp_ns, digest, frame_hash, self._pieces, size),
                *(time.time_ns(), self._pieces_crc),
            )
        )
        self._flush(last=True)
        final = self._folder / f"{sequence:020d}.snap"
        descriptor = os.open(self._path, os.O_RDWR)  # the header is no whole block: through the page cache
        try:
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, header, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(self._path, final)
        sync_folder(self._folder)
        self.file_bytes = size
        self._close()
        return final

    def abandon(self) -> None:
        """Give up; removes what was written."""
        if self._descriptor >= 0:
            self._close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    def _put(self, data: bytes | memoryview) -> None:
        at = 0
        while at < len(data):
            part = min(len(data) - at, _BUFFER_BYTES - self._filled)
            self._view[self._filled : self._filled + part] = data[at : at + part]
            self._filled += part
            at += part
            if self._filled == _BUFFER_BYTES:
                self._flush()

    def _flush(self, *, last: bool = False) -> None:
        length = self._filled
        if last and length % _BLOCK:
            padded = length + -length % _BLOCK
            self._view[length:padded] = bytes(padded - length)
            length = padded
        space = os.statvfs(self._folder)
        free_bytes = space.f_bavail * space.f_frsize
        if free_bytes < self._reserve_bytes + length:
            raise DiskNearlyFull(str(self._folder), free_bytes, self._reserve_bytes)
        done = 0
        while done < length:
            done += os.pwrite(self._descriptor, self._view[done:length], self._written + done)
        self._written += length
        self._filled = 0

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        self._view.release()
        self._buffer.close()


def read_header(path: Path) -> SnapshotHeader:
    """The header alone. Raises SnapshotDamaged."""
    with open(path, "rb") as file:
        return unpack_header(file.read(HEADER_BYTES), str(path))


def read_pieces(path: Path) -> Iterator[memoryview]:
    """Every piece in order, each checked before it is given out; a view lives until the next one. The next
    pieces are read and checked in a thread beside. The trailer is checked after the last piece. Raises SnapshotDamaged."""
    header = read_header(path)
    size = path.stat().st_size
    if size != header.file_bytes:
        raise SnapshotDamaged(
            str(path), min(size, header.file_bytes), f"{size} bytes, the header says {header.file_bytes}"
        )
    reader = _PieceReader(path, header)
    thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
    try:
        left = header.piece_count
        coming = thread.submit(reader.block) if left else None
        while coming is not None:
            pieces, damage = coming.result()
            left -= len(pieces)
            coming = thread.submit(reader.block) if left and damage is None else None
            yield from pieces
            pieces.clear()
            if damage is not None:
                raise damage
        reader.check_trailer()
    finally:
        thread.shutdown()
        reader.close()


class _PieceReader:
    """Reads blocks that begin with a piece into two buffers in turn."""

    def __init__(self, path: Path, header: SnapshotHeader) -> None:
        self._name, self._header = str(path), header
        self._at, self._left, self._pieces_crc = HEADER_BYTES, header.piece_count, 0
        length = min(2 * PIECE_BYTES_MAX, header.file_bytes + -header.file_bytes % _BLOCK)
        self._buffers = [mmap.mmap(-1, length), mmap.mmap(-1, length)]
        self._views = [memoryview(buffer) for buffer in self._buffers]
        self._turn = 0
        self._descriptor = _open_direct(path, os.O_RDONLY)

    def block(self) -> tuple[list[memoryview], SnapshotDamaged | None]:
        """The next pieces that lie in the file one after the other, at least one, and what is wrong with the one behind
        them. The views live until the next call but one."""
        pieces: list[memoryview] = []
        try:
            base, data = self._read(PIECE_HEADER.size)
            while self._left:
                at = self._at - base
                if at + PIECE_HEADER.size > len(data):
                    break
                length, crc = PIECE_HEADER.unpack_from(data, at)
                if not 0 < length <= PIECE_BYTES_MAX:
                    raise SnapshotDamaged(self._name, self._at, f"a piece of {length} bytes cannot be")
                at += PIECE_HEADER.size
                end = at + length + -length % 8
                if end > len(data):
                    if not pieces and base + len(data) == self._header.file_bytes:
                        raise SnapshotDamaged(self._name, self._at, "the file ends inside a piece")
                    break
                piece = data[at : at + length]
                if crc32c(piece) != crc:
                    raise SnapshotDamaged(self._name, self._at, "a piece does not match its checksum")
                if any(data[at + length : end]):
                    raise SnapshotDamaged(self._name, self._at, "padding that is not zero")
                self._pieces_crc = crc32c(crc.to_bytes(4, "little"), self._pieces_crc)
                pieces.append(piece)
                self._at, self._left = base + end, self._left - 1
        except SnapshotDamaged as damage:
            return pieces, damage
        return pieces, None

    def check_trailer(self) -> None:
        """After the last piece. Raises SnapshotDamaged."""
        base, data = self._read(TRAILER_BYTES)
        trailer = bytes(data[self._at - base : self._at - base + TRAILER_BYTES])
        header = self._header
        if (
            self._pieces_crc != header.pieces_crc
            or trailer != pack_trailer(header.piece_count, header.file_bytes, self._pieces_crc)
            or self._at + TRAILER_BYTES != header.file_bytes
        ):
            raise SnapshotDamaged(self._name, self._at, "the trailer does not match the pieces")

    def close(self) -> None:
        """Let go of file and buffers."""
        os.close(self._descriptor)
        with contextlib.suppress(BufferError):  # a caller may still hold the last view
            for view, buffer in zip(self._views, self._buffers, strict=True):
                view.release()
                buffer.close()

    def _read(self, needed: int) -> tuple[int, memoryview]:
        """A buffer full from the block on that holds the next piece's first byte: its offset in the file, and the bytes."""
        if self._at + needed > self._header.file_bytes:
            raise SnapshotDamaged(self._name, self._at, "the file ends inside a piece")
        base = self._at - self._at % _BLOCK
        view = self._views[self._turn]
        self._turn ^= 1
        wanted = min(len(view), self._header.file_bytes - base)
        filled = 0
        while filled < wanted:
            got = os.preadv(self._descriptor, [view[filled:]], base + filled)
            if got == 0:
                raise SnapshotDamaged(self._name, base + filled, "the file ends inside a piece")
            filled += got
        return base, view[: min(filled, wanted)]


def check(path: Path, progress: Callable[[int, int], None] | None = None) -> SnapshotHeader:
    """Read a whole snapshot and check every checksum; `progress(bytes done, bytes of all)`. Raises
    SnapshotDamaged."""
    header = read_header(path)
    done = HEADER_BYTES
    for piece in read_pieces(path):
        done += len(piece)
        if progress is not None:
            progress(done, header.file_bytes)
    return header


def check_slowly(path: Path, bytes_max: int) -> Iterator[int]:
    """As `check`, at the caller's pace: yields after each `bytes_max` bytes at most, without a thread and without keeping the file in
    the page cache. Raises SnapshotDamaged, OSError."""
    header = read_header(path)
    name, size = str(path), path.stat().st_size
    if size != header.file_bytes:
        raise SnapshotDamaged(name, min(size, header.file_bytes), f"{size} bytes, the header says {header.file_bytes}")
    pieces_crc = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        at = HEADER_BYTES

        def take(length: int) -> bytes:
            nonlocal at
            data = file.read(length)
            if len(data) != length:
                raise SnapshotDamaged(name, at, "the file ends inside a piece")
            os.posix_fadvise(file.fileno(), at - at % _BLOCK, length, os.POSIX_FADV_DONTNEED)
            at += length
            return data

        for _ in range(header.piece_count):
            begin = at
            length, crc = PIECE_HEADER.unpack(take(PIECE_HEADER.size))
            if not 0 < length <= PIECE_BYTES_MAX or at + length + TRAILER_BYTES > size:
                raise SnapshotDamaged(name, begin, f"a piece of {length} bytes cannot be")
            found, left = 0, length
            while left:
                part = take(min(left, bytes_max))
                found = crc32c(part, found)
                left -= len(part)
                yield len(part)
            if found != crc:
                raise SnapshotDamaged(name, begin, "a piece does not match its checksum")
            if any(take(-length % 8)):
                raise SnapshotDamaged(name, begin, "padding that is not zero")
            pieces_crc = crc32c(crc.to_bytes(4, "little"), pieces_crc)
        end = at
        if (
            pieces_crc != header.pieces_crc
            or take(TRAILER_BYTES) != pack_trailer(header.piece_count, header.file_bytes, pieces_crc)
            or at != size
        ):
            raise SnapshotDamaged(name, end, "the trailer does not match the pieces")
    yield TRAILER_BYTES


def set_aside(damaged: Sequence[Path]) -> None:
    """Rename snapshots that did not load to `<sequence>.damaged`: they are kept for whoever wants to know why, but no longer
    count as something to fall back to. Only for the owner of the shard."""
    for path in damaged:
        os.rename(path, path.with_suffix(".damaged"))
    for folder in {path.parent for path in damaged}:
        sync_folder(folder)


def delete_older(folder: Path, keep: int) -> int:
    """Keep the newest `keep` snapshots (at least 2, because a bad one falls back to the one before). Returns
    the sequence number of the oldest one kept, 0 if fewer than `keep` exist: the log must reach back to
    it."""
    keep = max(keep, 2)
    files = snapshot_files(folder)
    for old in files[keep:]:
        old.path.unlink()
    if len(files) > keep:
        sync_folder(folder)
    return files[keep - 1].sequence if len(files) >= keep else 0


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _O_DIRECT | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)
