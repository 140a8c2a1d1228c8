"""The past of a shard: balances as of a time or an event, and the proof that the log gives the state that it
claims.

Both start an engine of their own from a snapshot (or empty), replay the log into it and never touch the live
one. Replaying is the only way in which a state ever comes to be, so an as-of balance is exact by
construction. They run in threads, one at a time: an engine is as large as the shard.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from kernel.clock import Clock
from kernel.errors import FailedPrecondition, InvalidArgument, OutOfRange
from wallet_core.engine.codes import AccountFlags
from wallet_core.engine.views import AccountView
from wallet_core.service.port import SLOT_COUNT, AccountState, Host, slot_of

__all__ = ["Archive", "ArchivedFrame", "History", "Past", "Replayer", "VerifyProgress"]

PROGRESS_INTERVAL_S = 0.5
RECORD_BYTES = 48
TIME_MAX_NS = 2**64 - 1


class Replayer(Protocol):
    """The part of an engine that the past needs."""

    def replay_frame(self, records: bytes, first_sequence: int, timestamp_ns: int) -> None:
        """Applies records; raises EngineError where they contradict the state."""

    def account(self, account_id: bytes) -> AccountView | None:
        """An account."""


@dataclass(frozen=True, slots=True)
class ArchivedFrame:
    """One frame of a log."""

    first_sequence: int
    count: int
    timestamp_ns: int
    body: bytes


class Archive(Protocol):
    """Snapshots and logs of the shards that this process owns. Every call blocks on the disk, and on the
    replay."""

    def state(self, shard: int, upto_sequence: int, upto_time_ns: int) -> tuple[Replayer, int]:
        """A fresh engine after the last whole frame that is not above either bound, and the number of its
        last event. Raises OutOfRange where neither snapshot nor log reaches back so far.
        """

    def frames(self, shard: int, after: int, upto: int) -> Iterator[ArchivedFrame]:
        """Frames from the one that holds event `after + 1` to the one that holds `upto`. Raises
        EventLogError."""

    def verify(self, shard: int, end: int, note: Callable[[int], bool]) -> VerifyProgress:
        """Replays everything that is kept up to event `end` and compares the digest after each frame with
        the one that the frame names. `note(sequence)` is told how far it is, and ends it by False.
        """


@dataclass(frozen=True, slots=True)
class Past:
    """An account as it stood, and where: (shard, last event included)."""

    state: AccountState
    positions: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far a verification is; `ok` and `problem` are meant once `done`."""

    sequence: int
    end_sequence: int
    done: bool = False
    ok: bool = False
    problem: str = ""


class History:
    """Reads the past of the shards of this process."""

    def __init__(self, host: Host, archive: Archive, clock: Clock) -> None:
        self._host = host
        self._clock = clock
        self._archive = archive
        self._one = asyncio.Semaphore(1)

    async def at_time(self, account: bytes, time_ns: int) -> Past | None:
        """The account after the last event at or before a time; None where it did not exist yet. A striped
        account is the sum of its parts at that time. Raises OutOfRange for a time that is no longer, or not
        yet, in the log.
        """
        if time_ns > self._clock.now_ns():
            raise OutOfRange("the time is in the future: what will have happened by then is not known yet")
        live = await self._host.accounts([account])
        striped = live[0] is not None and live[0].has(AccountFlags.STRIPED)
        shards = list(self._host.shard_ids) if striped else [self._shard_of(account)]
        parts: list[AccountView] = []
        positions: list[tuple[int, int]] = []
        async with self._one:
            for shard in shards:
                durable = self._host.durable_sequence(shard)
                part, at = await asyncio.to_thread(self._replay, shard, account, durable, time_ns)
                positions.append((shard, at))
                if part is not None:
                    parts.append(part)
        return _past(parts, positions)

    async def at_position(self, account: bytes, shard: int, sequence: int) -> Past | None:
        """The account right after an event of its shard; of a striped one the part on that shard. None where
        it did not exist yet. Raises OutOfRange, InvalidArgument where the account lives on another shard.
        """
        if shard not in self._host.shard_ids:
            raise FailedPrecondition(
                f"shard {shard} is not owned by this process", reason="WRONG_SHARD", metadata={"shard": str(shard)}
            )
        durable = self._host.durable_sequence(shard)
        if not 0 < sequence <= durable:
            raise OutOfRange(f"shard {shard} has events up to {durable}; {sequence} was asked for")
        home = self._shard_of(account)
        live = await self._host.accounts([account])
        if home != shard and live[0] is not None and not live[0].has(AccountFlags.STRIPED):
            raise InvalidArgument(f"position.shard: the account lives on shard {home}, not on {shard}")
        async with self._one:
            part, at = await asyncio.to_thread(self._replay, shard, account, sequence, None)
        return _past([] if part is None else [part], [(shard, at)])

    def _shard_of(self, account: bytes) -> int:
        return slot_of(account) * self._host.shard_count // SLOT_COUNT

    def _replay(self, shard: int, account: bytes, upto: int, time_ns: int | None) -> tuple[AccountView | None, int]:
        """The account after event `upto`, or after the last frame at or before `time_ns`. Runs in a
        thread."""
        engine, at = self._archive.state(shard, upto, TIME_MAX_NS if time_ns is None else time_ns)
        for frame in self._archive.frames(shard, at, upto) if at < upto else ():
            if time_ns is not None and frame.timestamp_ns > time_ns:
                break
            body, first = _rest(frame, at)
            count = min(len(body) // RECORD_BYTES, upto - at)
            engine.replay_frame(body[: count * RECORD_BYTES], first, frame.timestamp_ns)
            at += count
        return engine.account(account), at

    async def verify(self, shard: int) -> AsyncIterator[VerifyProgress]:
        """Replays everything that is kept and compares the digest after each frame with the one that the
        live engine wrote there. Yields progress about twice a second; the last has `done`.
        """
        end = self._host.durable_sequence(shard)
        state = _Running(0, end)
        async with self._one:
            work = asyncio.get_running_loop().run_in_executor(None, self._verify, shard, state)
            try:
                while not work.done():
                    await asyncio.wait([work], timeout=PROGRESS_INTERVAL_S)
                    if not work.done():
                        yield VerifyProgress(state.sequence, end)
                yield await work
            finally:
                state.stop.set()
                await asyncio.wait([work])

    def _verify(self, shard: int, running: _Running) -> VerifyProgress:
        return self._archive.verify(shard, running.end, running.note)


@dataclass(slots=True)
class _Running:
    """Shared between the thread that verifies and the loop that reports."""

    sequence: int
    end: int
    stop: threading.Event = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.stop = threading.Event()

    def note(self, sequence: int) -> bool:
        self.sequence = sequence
        return not self.stop.is_set()


def _rest(frame: ArchivedFrame, at: int) -> tuple[bytes, int]:
    """The records of a frame that come after event `at`, and the number of the first."""
    skip = max(0, at + 1 - frame.first_sequence)
    return (frame.body[skip * RECORD_BYTES :] if skip else frame.body), frame.first_sequence + skip


def _past(parts: list[AccountView], positions: list[tuple[int, int]]) -> Past | None:
    if not parts:
        return None
    first = parts[0]
    state = AccountState(
        first.id,
        first.currency,
        first.balance,
        first.held_out,
        first.held_in,
        first.overdraft_limit,
        first.balance_limit,
        first.flags,
    )
    for part in parts[1:]:
        state = replace(
            state,
            balance=state.balance + part.balance,
            held_out=state.held_out + part.held_out,
            held_in=state.held_in + part.held_in,
        )
    return Past(state, tuple(positions))
