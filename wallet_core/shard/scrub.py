"""Reads what lies on the disk and is not read otherwise, slowly, so that a bit that flips is found while another copy exists.

A start replays the log behind the newest snapshot alone: damage in an older frame, or in an older snapshot, is seen on the day on which
it is needed. A round reads each segment up to the last durable event (checksums, sequence, hash chain, also from one segment to the
next) and each snapshot (checksums), in pieces, at a bounded rate, in one thread, past the page cache. It begins anywhere: a process that is
often started again comes to every part of the log too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from wallet_core.event_log import FrameReader, segments
from wallet_core.event_log.file import segment_file
from wallet_core.shard.port import ShardHostConfig, shard_folder
from wallet_core.snapshot import SnapshotDamaged, check_slowly, snapshot_files

__all__ = ["Damage", "ScrubStatus", "Scrubber", "read_shard"]

PIECE_BYTES = 256 * 1024
"""Read at once (a frame that is larger: whole); a log's sync passes between two of them."""
ROUND_PAUSE_S_MIN = 1.0

_log = structlog.get_logger("wallet.scrub")


@dataclass(frozen=True, slots=True)
class Damage:
    """What does not read back."""

    file: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} at byte {self.offset}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ScrubStatus:
    """Of one shard. `end_time_ns`: when the last round ended, 0 where none has yet. `damage`: found in that round, or in the one that is
    under way."""

    end_time_ns: int = 0
    damage: tuple[Damage, ...] = ()


class Shards(Protocol):
    """What the scrub asks of a host."""

    @property
    def shard_ids(self) -> tuple[int, ...]: ...

    @property
    def config(self) -> ShardHostConfig: ...

    def durable_sequence(self, shard: int) -> int:
        """The number of the last durable event."""


class Scrubber:
    """Scrubs the shards of a host, one after the other. `bytes_per_s` bounds the reading; a round begins `interval_s` after the
    one before began, or when that has ended. `on_damage(shard, damage)`: each place once until it reads back. `on_round(shard,
    status)`: a round of a shard has ended."""

    def __init__(
        self,
        host: Shards,
        *,
        bytes_per_s: int,
        interval_s: float,
        on_damage: Callable[[int, Damage], None] = lambda shard, damage: None,
        on_round: Callable[[int, ScrubStatus], None] = lambda shard, status: None,
    ) -> None:
        self._host, self._bytes_per_s, self._interval_s = host, bytes_per_s, interval_s
        self._on_damage, self._on_round = on_damage, on_round
        self._status = {shard: ScrubStatus() for shard in host.shard_ids}

    def status(self, shard: int) -> ScrubStatus:
        """Where the scrub of a shard stands."""
        return self._status[shard]

    async def run(self) -> None:
        """Rounds until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="wallet-scrub") as thread:
            while True:
                began = loop.time()
                for shard in self._host.shard_ids:
                    try:
                        await self._round(shard, thread)
                    except Exception:  # of the scrub alone: shards go on
                        _log.exception("a round of the scrub failed; the next one tries again", shard=shard)
                await asyncio.sleep(max(ROUND_PAUSE_S_MIN, began + self._interval_s - loop.time()))

    async def _round(self, shard: int, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        before = self._status[shard]
        found: list[Damage] = []
        folder = shard_folder(self._host.config.data_dir, shard)
        pieces = read_shard(folder, shard, self._host.durable_sequence(shard), start=random.random())  # noqa: S311
        while (read := await loop.run_in_executor(thread, next, pieces, None)) is not None:
            if isinstance(read, Damage):
                found.append(read)
                if read not in self._status[shard].damage:
                    self._on_damage(shard, read)
                    self._status[shard] = ScrubStatus(before.end_time_ns, (*self._status[shard].damage, read))
            else:
                await asyncio.sleep(read / self._bytes_per_s)
        self._status[shard] = ScrubStatus(time.time_ns(), tuple(found))
        self._on_round(shard, self._status[shard])


def read_shard(folder: Path, shard: int, durable: int, *, start: float = 0.0) -> Iterator[int | Damage]:
    """Everything of a shard once, events up to `durable`: yields the number of bytes after each piece, and what is damaged. `start`: where
    to begin, from 0 to 1. Files that retention removes meanwhile are passed over."""
    log = folder / "log"
    firsts = [first for first in segments(log) if first <= durable]
    if durable and not firsts:
        yield Damage(str(log), 0, f"there are no segments, events up to {durable} are durable")
    ends = [*(first - 1 for first in firsts[1:]), durable][: len(firsts)]
    parts: list[tuple[int, int] | Path] = [*zip(firsts, ends, strict=True)]
    parts += [one.path for one in snapshot_files(folder / "snapshots")]
    turn = int(start * len(parts))
    chain: tuple[int, bytes | None] = (0, None)  # the next event, and the hash of the frame before it
    for part in (*parts[turn:], *parts[:turn]):
        try:
            if isinstance(part, Path):
                yield from check_slowly(part, PIECE_BYTES)
                continue
            first, end = part
            reader = FrameReader(
                log,
                shard=shard,
                first_segment=first,
                from_sequence=first,
                from_hash=chain[1] if chain[0] == first else None,
            )
            yield from _read_segment(reader, end, is_sealed=end != durable)
            chain = (reader.next_sequence, reader.last_hash)
        except FileNotFoundError:
            continue
        except SnapshotDamaged as error:
            yield Damage(error.file, error.offset, error.reason)
        except OSError as error:
            name = part if isinstance(part, Path) else segment_file(log, part[0])
            yield Damage(str(name), 0, f"it cannot be read ({error.strerror})")


def _read_segment(reader: FrameReader, end: int, *, is_sealed: bool) -> Iterator[int | Damage]:
    first, before = reader.segment_first, 0
    path = Path(reader.file)
    more = True
    while more:
        more = reader.skip(end, PIECE_BYTES)
        yield reader.bytes_read - before
        before = reader.bytes_read
    if reader.damage is None and is_sealed and reader.next_sequence > end and reader.segment_first == first:
        reader.check_end()
    if reader.damage is not None:
        yield Damage(str(path), reader.offset, f"{reader.damage} (event {reader.next_sequence})")
    elif reader.next_sequence <= end:
        yield Damage(
            str(path), reader.offset, f"it ends with event {reader.next_sequence - 1}, events up to {end} are durable"
        )
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
