"""The event log as the shard sees it: append frames, make them durable, read them back.

EventLogError
├── LogDamaged(file, offset, reason)   bytes at or below the last durable mark do not read back
│   └── StoreDamaged(place, offset, …) the same of a store beyond this machine
├── LogPoisoned(file, call, errno)     a write or sync failed: what the disk holds is unknown until a restart
├── DiskNearlyFull(folder, free, …)    writes refused while reads go on; clears when room is made
├── LogLocked(folder)                  another opener, in this process or another, owns the shard folder
├── LogGap(file, wanted, found)        the wanted sequence number is below what retention kept
├── LogFenced(place)                   another owner has taken the shard over: this one must stop
├── LogNotCommitted(place, reason)     the store did not say that frames are durable: unknown until a restart
└── StoreUnusable(place, reason)       the store cannot be reached, or is not set up so that a log is safe in it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class EventLogError(Exception):
    """Anything the event log refuses or fails at."""


class LogDamaged(EventLogError):
    """Events known to be durable cannot be read back. Restore from a snapshot and a good copy of the
    segment."""

    def __init__(self, file: str, offset: int, reason: str) -> None:
        super().__init__(
            f"event log {file} is damaged at byte {offset}: {reason}; acknowledged events would be lost, so the shard "
            f"stays closed. Restore this segment from a copy, or the shard from a snapshot and good segments."
        )
        self.file, self.offset, self.reason = file, offset, reason


class StoreDamaged(LogDamaged):
    """What a store holds does not continue the shard's history. `file` is the place in the store."""

    def __init__(self, place: str, offset: int, reason: str) -> None:
        EventLogError.__init__(
            self,
            f"{place} at offset {offset}: {reason}; acknowledged events would be lost or changed, so the shard stays "
            f"closed and nothing was changed on disk.",
        )
        self.file, self.offset, self.reason = place, offset, reason


class LogPoisoned(EventLogError):
    """A write or sync failed. Nothing after the durable sequence number may be acknowledged; the process
    must stop."""

    def __init__(self, file: str, call: str, error_number: int) -> None:
        what = os.strerror(error_number) if error_number else "short write"
        super().__init__(
            f"event log {file}: {call} failed ({what}); the page cache may lie now, so this process must stop and "
            f"re-read the log on restart"
        )
        self.file, self.call, self.error_number = file, call, error_number


class DiskNearlyFull(EventLogError):
    """No room for another segment above the reserve. Nothing was applied; make room and send again with the
    same ids."""

    def __init__(self, folder: str, free_bytes: int, reserve_bytes: int) -> None:
        super().__init__(
            f"event log {folder}: {free_bytes} bytes free, which leaves no room for the next segment above the "
            f"reserve of {reserve_bytes}; writes are refused until there is room"
        )
        self.folder, self.free_bytes, self.reserve_bytes = folder, free_bytes, reserve_bytes


class LogLocked(EventLogError):
    """The shard folder has an owner already."""

    def __init__(self, folder: str, owner: str) -> None:
        super().__init__(f"shard folder {folder} is in use by {owner or 'another process'}; one writer owns a shard")
        self.folder, self.owner = folder, owner


class LogGap(EventLogError):
    """The log does not reach back to the wanted sequence number."""

    def __init__(self, file: str, wanted_sequence: int, first_sequence: int) -> None:
        super().__init__(
            f"event log {file}: sequence number {wanted_sequence} was asked for, the oldest kept is {first_sequence}"
        )
        self.file, self.wanted_sequence, self.first_sequence = file, wanted_sequence, first_sequence


class LogFenced(EventLogError):
    """Another process owns the shard now. What was not acknowledged here was not written."""

    def __init__(self, place: str) -> None:
        super().__init__(
            f"{place}: another owner has taken this shard over; this process may not write to it any more and must stop"
        )
        self.place = place


class LogNotCommitted(EventLogError):
    """The store did not answer that frames are durable. They may be or not; the next opening finds out."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(
            f"{place}: frames were not made durable ({reason}); whether they are is unknown, so this process must stop; "
            f"a restart finds out"
        )
        self.place, self.reason = place, reason


class StoreUnusable(EventLogError):
    """The store is out of reach, or its settings would let it lose acknowledged events."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason = place, reason


@dataclass(frozen=True, slots=True)
class Frame:
    """One durable batch of events. `body` is `count` fixed-size records; sequence number = first_sequence +
    index."""

    shard: int
    epoch: int
    first_sequence: int
    count: int
    timestamp_ns: int
    durable_sequence: int
    previous_hash: bytes
    digest: bytes
    body: bytes
    hash: bytes

    @property
    def last_sequence(self) -> int:
        """Sequence number of the frame's last event."""
        return self.first_sequence + self.count - 1


@dataclass(frozen=True, slots=True)
class DurablePosition:
    """What is certainly on disk."""

    sequence: int
    file: str
    offset: int
    hash: bytes


class FrameStore(Protocol):
    """Where one shard's frames become durable when that is not the local disk. The local segments are then the copy that
    readers read: a frame is written to them after `append` has returned, never before."""

    @property
    def place(self) -> str:
        """The place for people, such as "topic ducat.wallet.log, partition 3"."""

    def append(self, frames: memoryview) -> int:
        """Make whole frames, one behind the other, durable in order, all or none; returns the offset of the last. One call at
        a time, one a group commit; the memory is only valid during the call. Raises LogFenced, LogNotCommitted, after
        which only `close` is allowed."""

    def close(self) -> None:
        """Let go of threads and connections."""


class EventLog(Protocol):
    """One shard's log. One thread appends and syncs; any thread may read what is durable."""

    @property
    def next_sequence(self) -> int:
        """The sequence number that the next appended event must have."""

    @property
    def durable_sequence(self) -> int:
        """The last sequence number known to be durable."""

    def append(self, first_sequence: int, count: int, timestamp_ns: int, digest: bytes, body: bytes) -> None:
        """Take one frame. It is not durable, and may not be acknowledged, before `sync` has returned."""

    def sync(self) -> DurablePosition:
        """Make everything appended durable. Raises LogPoisoned, after which only `close` is allowed."""

    def read(self, from_sequence: int) -> Iterator[Frame]:
        """Durable frames, beginning with the one that holds `from_sequence`. Raises LogGap, LogDamaged."""

    def close(self) -> None:
        """Let go of files, threads and the lock. Appended frames that were not synced are not promised."""
