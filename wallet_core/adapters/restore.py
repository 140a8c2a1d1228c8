"""Restores a shard offline: from a snapshot and log segments that lie elsewhere into an empty place of a data folder.

    find      snapshots and segments in the source: a data folder, a shard's folder, or one flat folder with both
    choose    the newest snapshot whose every checksum holds, and the segments from there on
    stage     copy them beside the target, synced
    recover   exactly as a starting wallet does: load, replay, compare every digest, settle the tail by the log's rules
    publish   rename into place

Nothing appears under its final name before all of that went well. A dry run replays the source where it lies.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernel.errors import FailedPrecondition, NotFound
from wallet_core.event_log import EventLogError, LogDamaged, read_frames
from wallet_core.event_log.file import make_folder, open_reader, sync_folder
from wallet_core.shard.identity import (
    DataFileDamaged,
    ShardsMismatch,
    check_manifest,
    new_identity,
    record_identities,
    write_identity,
)
from wallet_core.shard.port import ShardHostConfig, ShardHostError, shard_folder
from wallet_core.shard.recovery import Progress, rebuild, recover_shard
from wallet_core.snapshot import SnapshotDamaged, check

__all__ = ["END", "Cut", "restore_shard"]

_CHUNK_BYTES = 4 * 1024 * 1024
_MARK = "durable.mark"
_FOREVER = 2**64 - 2
Note = Callable[[str, int, int], None]
"""Told what goes on, how far it is, and where it ends (0 = unknown)."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What is there: (sequence, path) of snapshots, newest first; (first sequence, path) of segments,
    ascending."""

    snapshots: list[tuple[int, Path]]
    segments: list[tuple[int, Path]]
    mark: Path | None


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a restored shard is to end: with the last whole frame at or before event `sequence`, and `time_ns` (unix). A frame is
    a batch, all or nothing: an event inside one is no place to end, so the shard ends before it."""

    sequence: int = _FOREVER
    time_ns: int = _FOREVER

    @property
    def is_end(self) -> bool:
        """Whether it is wherever the log ends."""
        return self.sequence == self.time_ns == _FOREVER


END = Cut()


def restore_shard(
    config: ShardHostConfig,
    source: Path,
    shard: int,
    *,
    dry_run: bool,
    cut: Cut = END,
    whole_log: bool = False,
    move: bool = False,
    note: Note = lambda what, at, end: None,
) -> dict[str, Any]:
    """Restores one shard into `config.data_dir`, or says what that would do.

    `cut`: how far. `whole_log`: also the segments before the snapshot, which only looks into the past need. `move`: the
    source's files are not needed any more and on the same disk.

    Returns {"steps": lines for people, "shard", "snapshot", "segments", "copied_bytes", "sequence_number",
    "digest", "identity", "time_ns"}; the last two are for `rebind`, without which the wallet's database refuses the
    shard. Raises NotFound (nothing to restore from), FailedPrecondition (the target is not empty, or the source does
    not lead to a state, or not as far as the cut).
    """
    target = shard_folder(config.data_dir, shard)
    if target.exists() and any(path.is_file() for path in target.rglob("*")):
        raise _not_empty(target)
    found = _find(source, shard)
    for data_dir in (source, source.absolute().parent, config.data_dir):
        try:
            check_manifest(data_dir, config.shard_count)
        except (ShardsMismatch, DataFileDamaged) as error:
            raise FailedPrecondition(str(error)) from error
    steps: list[str] = []
    snapshot = _choose_snapshot(found, shard, cut, steps, note)
    begin = snapshot[0] + 1 if snapshot else 1
    segments = _needed_segments(found, begin, source)
    if whole_log:
        segments = found.segments
    segments = [one for one in segments if one[0] <= cut.sequence] or segments[:1]
    files = [path for _, path in segments] + ([snapshot[1]] if snapshot else []) + ([found.mark] if found.mark else [])
    size = sum(path.stat().st_size for path in files)
    if snapshot:
        steps.append(f"load snapshot {snapshot[1].name} (event {snapshot[0]})")
    else:
        steps.append("begin with an empty shard, there is no snapshot")
    steps.append(f"copy {len(segments)} log segments, {size / 2**20:,.1f} MiB in all, to {target}")
    with _Staging(config, shard, keep_near_target=not dry_run) as staging:
        staged = replace(config, data_dir=staging.folder, shard_ids=(shard,), kafka=None)  # no owner is disturbed
        if dry_run:
            staging.link(snapshot, segments, found.mark)
            sequence, digest = _replay_in_place(staged, shard, cut, steps, note)
            identity, time_ns = "", 0
        else:
            if move:
                staging.move(snapshot, segments)
            else:
                staging.copy(snapshot, segments, found.mark, lambda at: note("copy", at, size))
            if not cut.is_end:
                steps.append(_cut_log(shard_folder(staging.folder, shard) / "log", shard, cut))
            sequence, digest, time_ns = _recover(staged, shard, steps, note)
            identity = new_identity()  # the disk that was lost may turn up again: it is not this shard any more
            write_identity(staged, shard, identity)
            staging.publish(target)
            record_identities(config.data_dir, config.shard_count, {shard: identity}, others_unknown=True)
    replayed = sequence - begin + 1
    steps.append(f"replay {replayed:,} events, up to event {sequence}: state digest {digest.hex()}")
    return {
        "steps": steps,
        "dry_run": dry_run,
        "shard": shard,
        "snapshot": snapshot[1].name if snapshot else None,
        "segments": [path.name for _, path in segments],
        "copied_bytes": 0 if dry_run else size,
        "sequence_number": sequence,
        "digest": digest.hex(),
        "identity": identity,
        "time_ns": time_ns,
    }


def _not_empty(target: Path) -> FailedPrecondition:
    return FailedPrecondition(f"{target} is not empty; move it away first, nothing is ever written over")


def _find(source: Path, shard: int) -> _Source:
    folder = shard_folder(source, shard)
    if not folder.is_dir():
        folder = source
    snapshots_in = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    log_in = folder / "log" if (folder / "log").is_dir() else folder
    snapshots = _numbered(snapshots_in, ".snap")[::-1]
    segments = _numbered(log_in, ".seg")
    if not snapshots and not segments:
        raise NotFound(f"{folder}: no snapshots (*.snap) and no log segments (*.seg) there")
    mark = log_in / _MARK
    return _Source(snapshots, segments, mark if mark.is_file() else None)


def _numbered(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    return sorted(
        (int(path.stem), path) for path in folder.glob(f"*{suffix}") if len(path.stem) == 20 and path.stem.isdigit()
    )


def _choose_snapshot(found: _Source, shard: int, cut: Cut, steps: list[str], note: Note) -> tuple[int, Path] | None:
    for sequence, path in found.snapshots:
        if sequence > cut.sequence:
            continue
        try:
            header = check(path, lambda at, end: note("check the snapshot", at, end))
        except (SnapshotDamaged, OSError) as error:
            steps.append(f"pass over {path.name}: {error}")
            continue
        if header.shard != shard:
            steps.append(f"pass over {path.name}: it is of shard {header.shard}")
            continue
        if header.timestamp_ns > cut.time_ns:
            continue
        return sequence, path
    return None


def _needed_segments(found: _Source, begin: int, source: Path) -> list[tuple[int, Path]]:
    """From the one that holds event `begin` on. None at all is well where a snapshot is there."""
    below = [first for first, _ in found.segments if first <= begin]
    if not below:
        if begin > 1 and not found.segments:
            return []
        oldest = found.segments[0][0] if found.segments else "none"
        raise FailedPrecondition(
            f"{source}: event {begin} is the first that is needed, the oldest segment begins at {oldest};"
            " add older segments or a newer snapshot"
        )
    return [(first, path) for first, path in found.segments if first >= below[-1]]


class _Staging:
    """A folder with the layout of a data folder: beside the target, or (dry run) a temporary one with
    links."""

    def __init__(self, config: ShardHostConfig, shard: int, *, keep_near_target: bool) -> None:
        self._shard = shard
        self._near = keep_near_target
        self._data_dir = config.data_dir
        self.folder = Path()

    def __enter__(self) -> _Staging:
        if self._near:
            make_folder(self._data_dir)
        self.folder = Path(tempfile.mkdtemp(prefix=".restore-", dir=self._data_dir if self._near else None))
        for name in ("log", "snapshots"):
            make_folder(self._place(name))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, name: str) -> Path:
        return shard_folder(self.folder, self._shard) / name

    def _pairs(
        self, snapshot: tuple[int, Path] | None, segments: list[tuple[int, Path]], mark: Path | None
    ) -> list[tuple[Path, Path]]:
        pairs = [(path, self._place("log") / path.name) for _, path in segments]
        if snapshot:
            pairs.append((snapshot[1], self._place("snapshots") / snapshot[1].name))
        if mark:
            pairs.append((mark, self._place("log") / mark.name))
        return pairs

    def link(self, snapshot: tuple[int, Path] | None, segments: list[tuple[int, Path]], mark: Path | None) -> None:
        for source, place in self._pairs(snapshot, segments, mark):
            place.symlink_to(source.absolute())

    def copy(
        self,
        snapshot: tuple[int, Path] | None,
        segments: list[tuple[int, Path]],
        mark: Path | None,
        note: Callable[[int], None],
    ) -> None:
        done = 0
        for source, place in self._pairs(snapshot, segments, mark):
            with open(source, "rb") as reading, open(place, "xb") as writing:
                while chunk := reading.read(_CHUNK_BYTES):
                    writing.write(chunk)
                    done += len(chunk)
                    note(done)
                writing.flush()
                os.fsync(writing.fileno())
        for name in ("log", "snapshots"):
            sync_folder(self._place(name))

    def move(self, snapshot: tuple[int, Path] | None, segments: list[tuple[int, Path]]) -> None:
        for source, place in self._pairs(snapshot, segments, None):
            source.rename(place)
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for name in ("log", "snapshots"):
            sync_folder(self._place(name))

    def publish(self, target: Path) -> None:
        """Only ever into a place without files: a wallet that was started meanwhile may write there by now."""
        made = shard_folder(self.folder, self._shard)
        sync_folder(made)
        try:
            for folder in sorted((path for path in target.rglob("*") if path.is_dir()), reverse=True):
                folder.rmdir()
            made.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise _not_empty(target) from error
        sync_folder(target.parent)


def _cut_log(folder: Path, shard: int, cut: Cut) -> str:
    """Ends the log in `folder` with the last whole frame within the cut. The durable mark goes: it may be of an event behind that."""
    firsts = [first for first, _ in _numbered(folder, ".seg")]
    if not firsts:
        return "the log has no segments, nothing to cut"
    try:
        reader = open_reader(folder, shard, firsts[0])
        assert reader is not None
        segment, offset, last = firsts[0], 0, firsts[0] - 1
        while (row := reader.read(cut.sequence)) is not None:
            frame_last = row[0] + row[1] - 1
            if frame_last > cut.sequence or row[2] > cut.time_ns:
                break
            segment, offset, last = reader.segment_first, reader.offset, frame_last
        if row is None and reader.damage is not None:  # a torn tail, or worse: recovery tells, by the log's rules
            if cut.sequence < _FOREVER:
                raise LogDamaged(reader.file, reader.offset, reader.damage)
            return "the log ends before the wanted time"
        is_over = row is None and reader.read() is None
    except EventLogError as error:
        raise FailedPrecondition(f"the source does not lead to a state: {error}") from error
    _check_reached(cut, last, firsts[0], is_over)
    for first in firsts:
        if first > segment:
            (folder / f"{first:020d}.seg").unlink()
    with open(folder / f"{segment:020d}.seg", "r+b") as file:
        left = file.seek(0, os.SEEK_END) - offset
        file.seek(offset)
        while left > 0:  # real zeros, as in every segment: then appending changes no metadata
            left -= file.write(bytes(min(left, _CHUNK_BYTES)))
        file.flush()
        os.fsync(file.fileno())
    (folder / _MARK).unlink(missing_ok=True)
    sync_folder(folder)
    return f"end the log with event {last}, the last of its batch"


def _check_reached(cut: Cut, last: int, first: int, is_over: bool) -> None:
    """`last`: where the cut ends; `is_over`: nothing follows in the source."""
    if last < first:
        raise FailedPrecondition("the source has no event at or before the wanted end; it begins later")
    if is_over and last < cut.sequence < _FOREVER:
        raise FailedPrecondition(f"the source ends with event {last}, before the wanted event {cut.sequence}")


def _recover(config: ShardHostConfig, shard: int, steps: list[str], note: Note) -> tuple[int, bytes, int]:
    try:
        recovered = recover_shard(config, shard, progress=_noting(note))
    except (EventLogError, ShardHostError, SnapshotDamaged) as error:
        raise FailedPrecondition(f"the source does not lead to a state: {error}") from error
    recovered.log.close()
    if recovered.tail_kept:
        steps.append(f"cut a torn tail that was never acknowledged, kept as {Path(recovered.tail_kept).name}")
    status = recovered.engine.status()
    return status.sequence, recovered.engine.state_digest(), status.now_ns


def _replay_in_place(config: ShardHostConfig, shard: int, cut: Cut, steps: list[str], note: Note) -> tuple[int, bytes]:
    try:
        engine, _ = rebuild(
            config, shard, upto_sequence=cut.sequence, upto_timestamp_ns=cut.time_ns, progress=_noting(note)
        )
    except LogDamaged as damage:
        last = _last_good(config, shard, damage)
        steps.append(
            f"settle the tail of {Path(damage.file).name} at byte {damage.offset} by the log's rule"
            f" (refused where it was acknowledged, else cut and kept): {damage.reason}"
        )
        engine = last
    except (EventLogError, ShardHostError, SnapshotDamaged) as error:
        raise FailedPrecondition(f"the source does not lead to a state: {error}") from error
    sequence = engine.status().sequence
    if not cut.is_end:
        folder = shard_folder(config.data_dir, shard) / "log"
        following = next(read_frames(folder, shard, sequence + 1), None)
        _check_reached(cut, sequence, 1, following is None)
    return sequence, engine.state_digest()


def _last_good(config: ShardHostConfig, shard: int, damage: LogDamaged) -> Any:
    """The state before the damage."""
    last = 0
    try:
        for frame in read_frames(shard_folder(config.data_dir, shard) / "log", shard, _first(config, shard)):
            last = frame.last_sequence
    except EventLogError:
        pass
    if last == 0:
        raise FailedPrecondition(f"the source does not lead to a state: {damage}") from damage
    return rebuild(config, shard, upto_sequence=last)[0]


def _first(config: ShardHostConfig, shard: int) -> int:
    return _numbered(shard_folder(config.data_dir, shard) / "log", ".seg")[0][0]


def _noting(note: Note) -> Callable[[Progress], None]:
    return lambda progress: note(progress.stage, progress.done, progress.total)
