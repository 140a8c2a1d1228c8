"""A wallet's shards into a backup beside the running processes, and back at a cut that is consistent over all shards.

Copying needs no stop: a log only grows, and what lies below the durable mark never changes. For each shard: read the
mark, store the snapshots at or below it (once), then the segments up to it. The next time goes on where this one ended.

A cut is one event a shard, such that no effect is without its cause (as in service/balance_check.py): no shard has received
more from another
than that one has sent, none has settled more than the other has received. Where the wanted events are not such a cut, shards are rolled
*forward*: what is added happened before something that is in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kernel.errors import FailedPrecondition, Unavailable
from runtime.backup import BackupDamaged, ShardBackup, Store, StoredFile, read_part, store_parts
from wallet_core.engine.codes import EventKind
from wallet_core.engine.events import unpack_events
from wallet_core.event_log import Frame, read_frames, segments
from wallet_core.event_log._file import read_mark
from wallet_core.event_log.file import make_folder, segment_file
from wallet_core.shard.port import ShardHostConfig, shard_folder
from wallet_core.shard.recovery import rebuild
from wallet_core.snapshot import SnapshotDamaged, check, snapshot_files

__all__ = ["Mark", "WantedCut", "choose_cut", "lay_shard", "read_marks", "store_shard", "verify_shard"]

SNAPSHOTS_MAX = 2
"""The newest good one, and one to fall back to."""
TRIES_MAX = 5
"""Of one shard, when retention removes files while they are copied."""
ROUNDS_MAX = 1_000_000
"""Frames that shards are rolled forward at most."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a shard's log is durable: event `sequence` of `epoch`, which ends in `segment` at `offset`."""

    sequence: int = 0
    epoch: int = 0
    segment: int = 0
    offset: int = 0
    hash: bytes = b""


def read_marks(config: ShardHostConfig) -> tuple[dict[int, Mark], list[int]]:
    """The durable marks of the shards whose folders are here, and the shards that are not."""
    marks, missing = {}, []
    for shard in range(config.shard_count):
        folder = shard_folder(config.data_dir, shard) / "log"
        if not folder.is_dir():
            missing.append(shard)
            continue
        marks[shard] = Mark(*(read_mark(folder) or ()))
    return marks, missing


def store_shard(
    store: Store, name: str, config: ShardHostConfig, copied: ShardBackup, mark: Mark, snapshots_upto: int
) -> None:
    """Brings a shard's copy up to `mark`. The first time (nothing is copied yet) with snapshots at or below event
    `snapshots_upto`, and with everything that the log still holds. Raises FailedPrecondition where the log does not
    continue the copy."""
    folder = shard_folder(config.data_dir, copied.shard)
    for number in range(1, TRIES_MAX + 1):
        attempt = replace(copied, files=[replace(file, parts=list(file.parts)) for file in copied.files])
        try:
            if copied.sequence:
                _check_continues(folder, attempt, mark)
            elif not copied.files:
                attempt.files += _store_snapshots(store, name, folder, copied.shard, snapshots_upto)
            _store_segments(store, name, folder, attempt, mark)
        except FileNotFoundError as error:  # retention was quicker
            if number == TRIES_MAX:
                raise Unavailable(f"shard {copied.shard}: {error.filename} was removed while it was copied") from error
            continue
        copied.files = attempt.files
        copied.sequence, copied.epoch, copied.mark_hash = mark.sequence, mark.epoch, mark.hash.hex()
        copied.segment, copied.offset = mark.segment, mark.offset
        return


def _store_snapshots(store: Store, name: str, folder: Path, shard: int, upto: int) -> list[StoredFile]:
    stored: list[StoredFile] = []
    for one in snapshot_files(folder / "snapshots"):
        if one.sequence > upto or len(stored) == SNAPSHOTS_MAX:
            continue
        with contextlib.suppress(SnapshotDamaged):
            if check(one.path).shard == shard:
                path = f"{folder.name}/snapshots/{one.path.name}"
                stored.append(_store_file(store, f"{name}/wallet/{path}", one.path, path))
    return stored


def _check_continues(folder: Path, copied: ShardBackup, mark: Mark) -> None:
    way_out = "make a new backup: `ducat backup create`; what this one holds stays good"
    if mark.sequence < copied.sequence:
        raise FailedPrecondition(
            f"shard {copied.shard}: its log ends with event {mark.sequence}, the backup holds {copied.sequence}: it was restored to an "
            f"earlier state; {way_out}"
        )
    if copied.segment not in segments(folder / "log"):
        raise FailedPrecondition(
            f"shard {copied.shard}: the log segment with event {copied.sequence} is gone (wallet_keep_history is off); {way_out}"
        )
    frame = next(iter(read_frames(folder / "log", copied.shard, copied.sequence, upto_sequence=mark.sequence)), None)
    if frame is None or frame.last_sequence != copied.sequence or frame.hash.hex() != copied.mark_hash:
        raise FailedPrecondition(
            f"shard {copied.shard}: event {copied.sequence} is another one than the backup holds: the shard was restored since; {way_out}"
        )


def _store_segments(store: Store, name: str, folder: Path, copied: ShardBackup, mark: Mark) -> None:
    files = {file.path: file for file in copied.files}
    for first in segments(folder / "log"):
        if first < copied.segment or first > mark.segment:
            continue
        path = segment_file(folder / "log", first)
        place = f"{folder.name}/log/{path.name}"
        file = files.get(place) or StoredFile(place)
        size = path.stat().st_size
        end = mark.offset if first == mark.segment else size
        begin = file.bytes
        if end > begin:
            with open(path, "rb") as source:
                source.seek(begin)
                file.parts += store_parts(store, f"{name}/wallet/{place}.{begin}", source.read, end - begin)
            if file.bytes != end:
                raise Unavailable(f"{path} became shorter while it was copied")
        file.full_bytes = size
        if place not in files:
            copied.files.append(file)


def _store_file(store: Store, object_name: str, path: Path, place: str) -> StoredFile:
    with open(path, "rb") as source:
        parts = store_parts(store, object_name, source.read)
    file = StoredFile(place, parts)
    file.full_bytes = file.bytes
    return file


def _lay_file(store: Store, file: StoredFile, folder: Path, note: Callable[[int], None]) -> None:
    path = folder / file.path
    if ".." in path.parts or not path.is_relative_to(folder):
        raise BackupDamaged(f"{file.path}: no path of a wallet")
    make_folder(path.parent)
    with open(path, "xb") as target:
        for part in file.parts:
            for piece in read_part(store, part):
                target.write(piece)
                note(len(piece))
        target.truncate(max(file.full_bytes, target.tell()))
    path.chmod(0o600)


def lay_shard(store: Store, shard: ShardBackup, folder: Path, note: Callable[[int], None] = lambda count: None) -> None:
    """A shard's files below `folder`, as in a data folder, but for the durable mark (what is to be the end is not known
    yet) and the identity (it will be another shard); `note(bytes)` for each piece. Raises BackupDamaged."""
    make_folder(shard_folder(folder, shard.shard) / "log")
    for file in shard.files:
        _lay_file(store, file, folder, note)


def verify_shard(shard: ShardBackup, folder: Path) -> str:
    """What is wrong with a shard as `lay_shard` laid it: frames, hash chain, checksums of snapshots; empty where nothing is."""
    at = shard_folder(folder, shard.shard)
    for one in snapshot_files(at / "snapshots"):
        try:
            check(one.path)
        except SnapshotDamaged as error:
            return str(error)
    firsts = segments(at / "log")
    if not firsts:
        return f"shard {shard.shard}: no log segment" if shard.sequence else ""
    last = None
    try:
        for frame in read_frames(at / "log", shard.shard, firsts[0]):
            last = frame
    except Exception as error:
        return f"shard {shard.shard}: {error}"
    if shard.sequence and (last is None or last.last_sequence != shard.sequence):
        return f"shard {shard.shard}: the log ends with event {last.last_sequence if last else 0}, not {shard.sequence}"
    return ""


@dataclass(frozen=True, slots=True)
class WantedCut:
    """Of one shard: every frame up to `time_ns`, and at least up to event `sequence_min`."""

    sequence_min: int
    time_ns: int = 0


@dataclass(slots=True)
class _Link:
    settled: int = 0
    sent: int = 0
    received: int = 0


def choose_cut(config: ShardHostConfig, wanted: Mapping[int, WantedCut]) -> dict[int, int]:
    """The last event of each shard: the smallest consistent cut that holds all that is wanted. `config.data_dir` has
    the shards as `lay_shard` laid them. Raises FailedPrecondition where the logs do not reach so far."""
    cuts, links = {}, {}
    for shard, one in wanted.items():
        cuts[shard], links[shard] = _start(config, shard, one, wanted.keys())
    ahead: dict[int, Iterator[Frame]] = {}
    for _ in range(ROUNDS_MAX):
        behind = _behind(links)
        if behind is None:
            return cuts
        shard, why = behind
        if shard not in ahead:
            ahead[shard] = read_frames(shard_folder(config.data_dir, shard) / "log", shard, cuts[shard] + 1)
        frame = next(ahead[shard], None)
        if frame is None:
            raise FailedPrecondition(f"the log of shard {shard} ends with event {cuts[shard]}, before {why}")
        _roll_forward(links[shard], frame)
        cuts[shard] = frame.last_sequence
    raise FailedPrecondition(f"no consistent cut within {ROUNDS_MAX:,} frames of what was wanted")


def _start(config: ShardHostConfig, shard: int, wanted: WantedCut, shards: object) -> tuple[int, dict[int, _Link]]:
    engine, _ = rebuild(config, shard, upto_timestamp_ns=wanted.time_ns)
    if engine.status().sequence < wanted.sequence_min:
        folder = shard_folder(config.data_dir, shard) / "log"
        frame = next(read_frames(folder, shard, wanted.sequence_min), None) if segments(folder) else None
        if frame is None:
            raise FailedPrecondition(
                f"the log of shard {shard} in the backup ends before event {wanted.sequence_min}, which PostgreSQL has seen"
            )
        engine, _ = rebuild(config, shard, upto_sequence=frame.last_sequence)
    links = {}
    for peer in range(config.shard_count):
        if peer != shard:
            settled, sent = engine.sent(peer)
            links[peer] = _Link(settled, sent, engine.cursor(peer))
    return engine.status().sequence, links


def _behind(links: Mapping[int, dict[int, _Link]]) -> tuple[int, str] | None:
    """A shard that must go on, and until when."""
    for source, towards in links.items():
        for shard, link in towards.items():
            if shard not in links:
                continue
            received = links[shard][source].received
            if received > link.sent:
                return source, f"transfer {received} to shard {shard}, which that one has received"
            if received < link.settled:
                return shard, f"transfer {link.settled} from shard {source}, which that one has settled"
    return None


def _roll_forward(links: dict[int, _Link], frame: Frame) -> None:
    for event in unpack_events(frame.body, frame.first_sequence):
        if event.kind == EventKind.MONEY_SENT:
            links[event.shard].sent += 1
        elif event.kind in (EventKind.MONEY_RECEIVED, EventKind.CREDIT_REFUSED):
            links[event.shard].received = event.number
        elif event.kind == EventKind.SAGA_SETTLED:
            links[event.shard].settled = event.number
