"""Opening a shard's log folder: lock, sync, read to the end, settle the tail, go on appending.

The rules, in the order they are applied (docs/event-log-format.md says why):

1. One opener owns the folder (`lock`, flock). A second one is refused.
2. The newest segments are synced once before anything is read.
3. Frames are read from the segment that holds the wanted sequence number; each must pass every check.
4. The durable mark is the highest of: the side file `durable.mark`, what frame headers name, what intact headers
   behind the damage name, and the name of any later segment (a segment is begun only after the one before is durable).
5. Damage, or an end, at or below the mark: LogDamaged(file, offset, reason). Nothing is changed.
6. Damage above the mark, in the last segment, is a torn tail that nobody was told of: a copy is kept as
   `<segment>.damaged-<n>`, the rest of the segment becomes zeros and is synced. In an earlier one: LogDamaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from wallet_core.event_log._file import FileLog, FrameReader, read_mark
from wallet_core.event_log.port import DurablePosition, Frame, FrameStore, LogDamaged, LogGap, LogLocked

SEGMENT_BYTES = 256 * 1024 * 1024
RESERVE_BYTES = 256 * 1024 * 1024
RECORD_BYTES = 48
FOLDER_MODE = 0o700
_HASH_ZERO = bytes(16)


def segments(folder: Path) -> list[int]:
    """First sequence numbers of the segment files, ascending."""
    found: list[int] = []
    for entry in folder.iterdir():
        if entry.suffix == ".seg" and len(entry.stem) == 20 and entry.stem.isdigit():
            found.append(int(entry.stem))
    return sorted(found)


def segment_file(folder: Path, first_sequence: int) -> Path:
    """The path of one segment."""
    return folder / f"{first_sequence:020d}.seg"


def lock_folder(folder: Path) -> int:
    """Take the folder's advisory lock; returns the descriptor that holds it. Raises LogLocked."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise LogLocked(str(folder), owner) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()}\n".encode("ascii"), 0)
    return descriptor


@dataclass(frozen=True, slots=True)
class LogEnd:
    """What reading a log to its end found."""

    next_sequence: int
    hash: bytes
    epoch: int
    timestamp_ns: int
    segment_first: int  # 0: there is no segment yet
    offset: int
    tail_kept: str | None  # the copy of a torn tail, if one was cut off


def open_reader(
    folder: Path,
    shard: int,
    from_sequence: int,
    *,
    from_hash: bytes | None = None,
    direct: bool = True,
    ahead: bool = False,
) -> FrameReader | None:
    """A reader at the segment that holds `from_sequence`; None if the folder has no segments. Raises
    LogGap."""
    firsts = segments(folder)
    if not firsts:
        return None
    below = [first for first in firsts if first <= from_sequence]
    if not below:
        raise LogGap(str(segment_file(folder, firsts[0])), from_sequence, firsts[0])
    return FrameReader(
        folder,
        shard=shard,
        first_segment=below[-1],
        from_sequence=from_sequence,
        from_hash=from_hash,
        direct=direct,
        ahead=ahead,
    )


def settle_end(
    folder: Path,
    shard: int,
    *,
    from_sequence: int = 1,
    from_hash: bytes | None = None,
    visit: Callable[[FrameReader], None] | None = None,
    repair: bool = True,
    direct: bool = True,
) -> LogEnd:
    """Read the log from `from_sequence` to its end and apply rules 2-6. `visit` may consume the reader
    (recovery replays there); what it leaves is read and checked. `from_hash` is the hash of the frame that
    ends at from_sequence - 1 (from a snapshot): it must match. With repair=False a torn tail is reported in
    `tail_kept` as "" and left alone."""
    for first in segments(folder)[-2:]:
        _sync_file(segment_file(folder, first))
    mark = read_mark(folder)
    mark_sequence, mark_epoch = (mark[0], mark[1]) if mark else (0, 0)
    reader = open_reader(folder, shard, from_sequence, from_hash=from_hash, direct=direct, ahead=visit is not None)
    if reader is None:
        if mark_sequence >= from_sequence:
            reason = f"there are no segments, but events up to {mark_sequence} were durable"
            raise LogDamaged(str(folder / "durable.mark"), 0, reason)
        return LogEnd(from_sequence, from_hash or _HASH_ZERO, mark_epoch, 0, 0, 0, None)
    if visit is not None:
        visit(reader)
    if reader.skip_all():
        reader.check_end()
    durable = max(mark_sequence, reader.mark, from_sequence - 1)
    later = [first for first in segments(folder) if first > reader.segment_first]
    if later:
        durable = max(durable, later[-1] - 1)
    if reader.damage is not None:
        durable = max(durable, reader.later_mark())
        if later:  # no torn tail: this segment was whole when the next one was begun, and that one would be lost
            raise LogDamaged(reader.file, reader.offset, f"{reader.damage}, and a later segment begins at {later[0]}")
    if reader.next_sequence <= durable:
        reason = reader.damage or "the log ends here"
        raise LogDamaged(
            reader.file, reader.offset, f"{reason} (event {reader.next_sequence}; durable up to {durable})"
        )
    kept = None
    if reader.damage is not None:
        kept = _cut_tail(Path(reader.file), reader.offset) if repair else ""
    return LogEnd(
        reader.next_sequence,
        reader.last_hash or from_hash or _HASH_ZERO,
        max(reader.epoch, mark_epoch),
        reader.timestamp_ns,
        reader.segment_first,
        reader.offset,
        kept,
    )


def open_log(
    folder: Path,
    shard: int,
    *,
    end: LogEnd | None = None,
    lock: int | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    reserve_bytes: int = RESERVE_BYTES,
    record_bytes: int = RECORD_BYTES,
    sync: bool = True,
    direct: bool = True,
    store: FrameStore | None = None,
) -> FileLog:
    """Open a folder for appending (it is created if missing). `end` and `lock` come from a recovery that has
    read the log already; without them the log is locked and checked here. With a `store` frames become durable there and
    the folder is the readable copy (sync=False then). Raises LogDamaged, LogLocked, DiskNearlyFull, OSError."""
    if not folder.is_dir():
        make_folder(folder)
    descriptor = lock_folder(folder) if lock is None else lock
    try:
        if end is None:
            firsts = segments(folder)
            end = settle_end(folder, shard, from_sequence=firsts[0] if firsts else 1, direct=direct)
        return FileLog(
            folder,
            shard=shard,
            epoch=end.epoch + 1,
            record_bytes=record_bytes,
            next_sequence=end.next_sequence,
            previous_hash=end.hash,
            segment_first=end.segment_first,
            end_offset=end.offset,
            lock_fd=descriptor,
            segment_bytes=segment_bytes,
            reserve_bytes=reserve_bytes,
            sync=sync,
            direct=direct,
            store=store,
        )
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def make_folder(folder: Path) -> None:
    """Create a folder, for its owner alone, and sync every parent that was touched."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    for made in reversed(missing):
        made.mkdir(FOLDER_MODE, exist_ok=True)
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that new and renamed names in it are durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_frames(folder: Path, shard: int, from_sequence: int = 1, *, upto_sequence: int = 2**64 - 2) -> Iterator[Frame]:
    """Frames in order, beginning with the one that holds `from_sequence`, up to the end or `upto_sequence`.
    Raises LogGap, LogDamaged (also for a torn tail: open the log to settle it)."""
    reader = open_reader(folder, shard, from_sequence)
    while reader is not None:
        frame = _frame(reader, upto_sequence)
        if frame is None:
            return
        yield frame


class LogTail:
    """Follows a live log: `poll` gives the frames that became durable since. Any thread, one at a time."""

    def __init__(self, folder: Path, shard: int, from_sequence: int) -> None:
        self._folder, self._shard, self._from = folder, shard, from_sequence
        self._reader: FrameReader | None = None

    def poll(self, durable_sequence: int, frame_limit: int = 256) -> list[Frame]:
        """At most `frame_limit` further frames, none of them above `durable_sequence`. Raises LogGap (also where
        retention has overtaken the reader), LogDamaged."""
        if durable_sequence < self._from:
            return []
        if self._reader is None:
            try:
                self._reader = open_reader(self._folder, self._shard, self._from)
            except FileNotFoundError:  # retention was quicker
                raise self._gap(self._from) from None
            if self._reader is None:
                return []
        else:
            self._reader.refresh()
        found: list[Frame] = []
        while len(found) < frame_limit:
            frame = _frame(self._reader, durable_sequence)
            if frame is None:
                break
            found.append(frame)
        if not found and self._reader.next_sequence <= durable_sequence:
            gap = self._gap(self._reader.next_sequence)
            if gap.first_sequence > gap.wanted_sequence:
                raise gap
        return found

    def _gap(self, wanted: int) -> LogGap:
        oldest = segments(self._folder)[0]
        return LogGap(str(segment_file(self._folder, oldest)), wanted, oldest)


def delete_segments_below(folder: Path, sequence: int) -> list[Path]:
    """Retention: delete segments all of whose events are at or below `sequence`; the newest segment stays."""
    firsts = segments(folder)
    gone: list[Path] = []
    for first, following in pairwise(firsts):
        if following <= sequence + 1:
            path = segment_file(folder, first)
            path.unlink()
            gone.append(path)
    if gone:
        sync_folder(folder)
    return gone


def durable_position(log: FileLog) -> DurablePosition:
    """What is certainly on disk."""
    return DurablePosition(*log.position)


def _frame(reader: FrameReader, upto_sequence: int) -> Frame | None:
    row = reader.read(upto_sequence)
    if row is None:
        if reader.damage is not None:
            raise LogDamaged(reader.file, reader.offset, reader.damage)
        return None
    first, count, timestamp_ns, durable, epoch, _, previous_hash, digest, body, own_hash, _ = row
    return Frame(
        shard=reader.shard,
        epoch=epoch,
        first_sequence=first,
        count=count,
        timestamp_ns=timestamp_ns,
        durable_sequence=durable,
        previous_hash=previous_hash,
        digest=digest,
        body=body,
        hash=own_hash,
    )


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _cut_tail(path: Path, offset: int) -> str:
    """Keep a copy of everything from the damage on, then make it zeros."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    size = path.stat().st_size
    with open(path, "rb") as source, open(copy, "xb") as target:
        source.seek(offset)
        shutil.copyfileobj(source, target, 1024 * 1024)
        kept = target.tell()
        target.flush()
        while kept and kept % 4096 == 0 and _is_zero(copy, kept - 4096):  # most of a segment is zeros: drop them
            kept -= 4096
        target.truncate(kept)
        os.fsync(target.fileno())
    sync_folder(path.parent)
    with open(path, "r+b") as segment:
        segment.seek(offset)
        left = size - offset
        while left > 0:
            left -= segment.write(bytes(min(left, 1024 * 1024)))
        segment.flush()
        os.fdatasync(segment.fileno())
    return str(copy)


def _is_zero(path: Path, offset: int) -> bool:
    with open(path, "rb") as file:
        file.seek(offset)
        return not any(file.read(4096))
