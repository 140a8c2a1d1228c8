"""The past of this process's shards from their folders: snapshots and log segments, replayed natively."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kernel.errors import OutOfRange
from wallet_core.engine._engine import Engine
from wallet_core.event_log import EventLogError, LogGap, read_frames, segments
from wallet_core.event_log.file import open_reader
from wallet_core.service.history import ArchivedFrame, Replayer, VerifyProgress
from wallet_core.shard._host import replay_frames
from wallet_core.shard.port import ShardHostConfig, ShardHostError, shard_folder
from wallet_core.shard.recovery import load_snapshot, new_engine, rebuild
from wallet_core.snapshot import SnapshotDamaged, snapshot_files

__all__ = ["FileArchive", "verify_folder"]

STEP_BYTES = 16 * 1024 * 1024
"""Log that is replayed between two looks at the progress."""


class FileArchive:
    """Reads beside the live shards; changes and locks nothing."""

    def __init__(self, config: ShardHostConfig) -> None:
        self._config = config

    def state(self, shard: int, upto_sequence: int, upto_time_ns: int) -> tuple[Replayer, int]:
        """A fresh engine after the last whole frame that is not above either bound, and the number of its
        last event."""
        try:
            engine, _ = rebuild(
                self._config, shard, upto_sequence=upto_sequence, upto_timestamp_ns=max(upto_time_ns, 0)
            )
        except LogGap as error:
            raise OutOfRange(
                f"shard {shard}: no snapshot and no log segment reaches back that far: {error}",
                metadata={"shard": str(shard)},
            ) from error
        return engine, engine.status().sequence

    def frames(self, shard: int, after: int, upto: int) -> Iterator[ArchivedFrame]:
        """Frames from the one that holds event `after + 1` to the one that holds `upto`."""
        folder = shard_folder(self._config.data_dir, shard) / "log"
        for frame in read_frames(folder, shard, after + 1, upto_sequence=upto):
            yield ArchivedFrame(frame.first_sequence, frame.count, frame.timestamp_ns, frame.body)

    def verify(self, shard: int, end: int, note: Callable[[int], bool]) -> VerifyProgress:
        """Replays everything that is kept up to event `end`."""
        return verify_folder(self._config, shard, end, note)


def verify_folder(config: ShardHostConfig, shard: int, end: int, note: Callable[[int], bool]) -> VerifyProgress:
    """Replays from the first event, or from the oldest snapshot where the log does not reach back that far.
    Every frame must continue the hash chain, follow from the state, and leave it with the digest that it
    names.
    """
    folder = shard_folder(config.data_dir, shard)
    engine = new_engine(config, shard)
    at = 0
    try:
        from_hash = None
        if segments(folder / "log")[0] > 1:
            engine, at, from_hash = _oldest_snapshot(config, shard)
        reader = open_reader(folder / "log", shard, at + 1, from_hash=from_hash)
        more = at < end
        while reader is not None and more:
            _, _, more = replay_frames(engine, reader, upto_sequence=end, bytes_max=STEP_BYTES)
            at = engine.status().sequence
            if not note(at):
                return VerifyProgress(at, end, done=True, problem="stopped")
        if reader is not None and reader.damage is not None:
            return VerifyProgress(at, end, done=True, problem=f"{reader.file} at byte {reader.offset}: {reader.damage}")
    except (EventLogError, ShardHostError, SnapshotDamaged, OSError) as error:
        return VerifyProgress(engine.status().sequence, end, done=True, problem=str(error))
    if at < end:
        return VerifyProgress(at, end, done=True, problem=f"the log ends at event {at}; {end} was durable")
    if not engine.verify_digest():
        return VerifyProgress(at, end, done=True, problem="the digest differs from one made of all accounts")
    return VerifyProgress(at, end, done=True, ok=True)


def _oldest_snapshot(config: ShardHostConfig, shard: int) -> tuple[Engine, int, bytes]:
    """From the oldest snapshot that reads back: engine, number of its last event, hash of the frame that
    ends there."""
    problems = []
    for one in reversed(snapshot_files(shard_folder(config.data_dir, shard) / "snapshots")):
        engine = new_engine(config, shard)
        try:
            header = load_snapshot(one.path, engine)
        except SnapshotDamaged as error:
            problems.append(str(error))
            continue
        return engine, header.sequence, header.frame_hash
    raise ShardHostError(f"the log does not begin at event 1 and no snapshot reads back: {'; '.join(problems)}")
