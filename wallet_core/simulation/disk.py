"""A shard's disk: what is written is visible at once, what is synced is safe, and between the two anything
may happen.

The files are real, in a folder in memory, because the native log writer and the real recovery work on them.
This class knows what of them is *durable*. Before a group of frames is written it reads the bytes that the
write will touch, and after it the new ones. Until the sync has returned, a crash decides sector by sector
(512 bytes, written whole or not at all) what the disk holds: the old, the new, a prefix, any mixture.

The durable mark is written after the sync and is synced itself only now and then: a power cut may bring
either of its slots back to an older state. A segment is renamed into place between the sync of the one
before and the first write: a crash may find it there or not.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wallet_core.event_log import FileLog
from wallet_core.event_log._file import read_mark
from wallet_core.event_log.file import open_reader, segments
from wallet_core.simulation.world import World
from wallet_core.snapshot import snapshot_files

__all__ = ["SECTOR_BYTES", "SimulatedDisk"]

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
MARK_BYTES = 1024  # two slots, a sector each
WRITE_FAULTS: tuple[tuple[Literal["write", "fdatasync"], int, str], ...] = (
    ("fdatasync", errno.EIO, "sync failed"),
    ("write", errno.EIO, "write failed"),
    ("write", errno.ENOSPC, "write met a full disk"),
    ("write", 0, "write was short"),
)


@dataclass(slots=True)
class _Write:
    """Bytes of one file that are written and not synced."""

    file: str
    offset: int
    old: bytes
    new: bytes


class SimulatedDisk:
    """The disk under one shard's folder."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self.folder = folder
        self.log_folder = folder / "log"
        self.snapshot_folder = folder / "snapshots"
        self._mark = str(self.log_folder / "durable.mark")
        self._files: dict[str, int] = {}
        self._writes: list[_Write] = []
        self._writing = False
        self._length = 0
        self._file = ""  # the segment being written, and where in it the durable frames end
        self._tail = 0
        self._mark_before = b""
        self._mark_durable = b""

    # The life of a write.

    def opened(self, log: FileLog) -> None:
        """The log has been opened: what it holds is durable, so is the mark."""
        _, self._file, self._tail, _ = log.position
        self._mark_durable = self._read(self._mark, 0, MARK_BYTES)

    def begin(self, length: int) -> None:
        """A group of at most `length` bytes of frames is about to be written."""
        file, offset = self._file, self._tail
        start = offset - offset % BLOCK_BYTES
        length = offset - start + length
        length += -length % BLOCK_BYTES
        self._length = length
        self._writes = [_Write(file, start, self._read(file, start, length), b"")]
        self._mark_before = self._read(self._mark, 0, MARK_BYTES)
        self._writing = True

    def written(self, position: tuple[int, str, int, bytes]) -> None:
        """It was written (or failed), the log is at `position`; the sync has not returned as far as anybody
        knows."""
        first = self._writes[0]
        first.new = self._read(first.file, first.offset, len(first.old))
        _, file, self._tail, _ = position
        if file != first.file:  # the log went on in a new segment
            self._file = file
            new = self._read(file, 0, self._length)
            self._writes.append(_Write(file, 0, bytes(len(new)), new))

    def synced(self) -> None:
        """The sync has returned: everything written is durable, the mark is written (not synced)."""
        self._writes.clear()
        self._writing = False

    # Faults.

    def fail_write(self, log: FileLog, length: int) -> None:
        """Let the next write or sync of the log fail."""
        world = self._world
        call, error_number, kind = WRITE_FAULTS[world.random.randrange(len(WRITE_FAULTS))]
        short_bytes = world.random.randrange(0, length + BLOCK_BYTES, SECTOR_BYTES) if not error_number else 0
        log.inject(call, 1, error_number, short_bytes)
        world.fault(kind)
        world.note("disk:", kind, self.folder.name)

    def crash(self, *, power: bool) -> None:
        """The process is gone, with `power` the machine too. Decide what the disk holds."""
        world = self._world
        if self._writing:
            # The mark is written after the sync: it cannot have been.
            self._put(self._mark, 0, self._mark_before)
            rolled = len(self._writes) > 1
            reached = world.random.randrange(3) if rolled else 0
            if rolled and reached < 2:  # the new segment's name is not there yet
                self._drop(self._writes[1].file)
            for at, write in enumerate(self._writes):
                if rolled and at == 0 and reached > 0:
                    continue  # was synced before the new segment was begun
                if at == 0 or reached == 2:
                    self._tear(write, power)
            self._writes.clear()
            self._writing = False
        if power:
            self._lose_mark()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _tear(self, write: _Write, power: bool) -> None:
        world = self._world
        old, new = write.old, write.new
        if old == new:
            return
        count = len(new) // SECTOR_BYTES
        choice = world.chance()
        if choice < 0.12:
            left = old
        elif choice < 0.24:
            left = new
        elif choice < 0.6 or not power:
            cut = world.random.randrange(count + 1) * SECTOR_BYTES
            left = new[:cut] + old[cut:]
        else:
            picked = world.random.getrandbits(count)
            left = b"".join(
                (new if picked >> i & 1 else old)[SECTOR_BYTES * i : SECTOR_BYTES * (i + 1)] for i in range(count)
            )
        if left == old:
            world.fault("unsynced write lost")
        elif left == new:
            world.fault("unsynced write survived")
        else:
            world.fault("torn write")
        self._put(write.file, write.offset, left)

    def _lose_mark(self) -> None:
        now = self._read(self._mark, 0, MARK_BYTES)
        before = self._mark_durable
        if now == before:
            return
        slots = [(now if self._world.chance() < 0.5 else before)[i : i + SECTOR_BYTES] for i in (0, SECTOR_BYTES)]
        left = b"".join(slots)
        if left != now:
            self._world.fault("durable mark went back")
            self._put(self._mark, 0, left)

    def flip_log_bit(self, shard: int) -> tuple[str, int, int] | None:
        """Flip one bit of a frame that recovery must read and that is known to be durable from what the
        disk holds. Returns where (file, offset, the byte before), None if there is no such frame."""
        snapshots = snapshot_files(self.snapshot_folder)
        above = snapshots[0].sequence if snapshots else 0
        mark = read_mark(self.log_folder)
        if mark is None or mark[0] <= above or not segments(self.log_folder):
            return None
        found: list[tuple[str, int, int]] = []
        reader = open_reader(self.log_folder, shard, above + 1)
        assert reader is not None
        while (row := reader.read(mark[0])) is not None:
            body = row[8]
            found.append((reader.file, row[10], 96 + len(body) + -len(body) % 8))
        if not found:
            return None
        file, offset, length = found[self._world.random.randrange(len(found))]
        offset += self._world.random.randrange(length)
        return self._flip(file, offset)

    def flip_snapshot_bit(self, taken: int) -> tuple[str, int, int] | None:
        """Flip one bit of the newest snapshot. `taken`: how many there should be; with fewer than two there
        may be nothing to fall back to but the whole log, and then it must be there."""
        found = snapshot_files(self.snapshot_folder)
        if not found or (taken < 2 and segments(self.log_folder)[0] > 1):
            return None
        return self._flip(str(found[0].path), self._world.random.randrange(found[0].size_bytes))

    def _flip(self, file: str, offset: int) -> tuple[str, int, int]:
        before = self._read(file, offset, 1)[0]
        self._put(file, offset, bytes([before ^ 1 << self._world.random.randrange(8)]))
        return file, offset, before

    def restore_byte(self, file: str, offset: int, before: int) -> None:
        """What an operator does with a good copy."""
        self._put(file, offset, bytes([before]))

    # Files.

    def _descriptor(self, file: str) -> int:
        descriptor = self._files.get(file)
        if descriptor is None:
            descriptor = self._files[file] = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        return descriptor

    def _read(self, file: str, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor(file), length, offset)

    def _put(self, file: str, offset: int, data: bytes) -> None:
        os.pwrite(self._descriptor(file), data, offset)

    def _drop(self, file: str) -> None:
        os.close(self._files.pop(file))
        os.unlink(file)
