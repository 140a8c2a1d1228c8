"""`ducat wallet accept`: go on with a shard as its folder is now, although others know of more.

The shard gets a new identity: the folder that was expected may turn up again, and is then refused. What PostgreSQL keeps of the shard
goes back to the log's end (`wallet_core.adapters.presence.rebind`), which the caller does with the values returned here. Until then no
wallet opens the shard: PostgreSQL still expects the old identity.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kernel.errors import FailedPrecondition, InvalidArgument
from wallet_core.event_log import EventLogError, LogLocked, lock_folder, segments
from wallet_core.event_log._file import read_mark
from wallet_core.event_log.file import sync_folder
from wallet_core.shard.identity import DataFileDamaged, new_identity, read_identity, record_identities, write_identity
from wallet_core.shard.port import ShardHostConfig, ShardHostError, shard_folder
from wallet_core.shard.recovery import rebuild, recover_shard
from wallet_core.snapshot import SnapshotDamaged, snapshot_files

__all__ = ["Found", "accept_shard", "check_stopped", "look_at"]

_MARK = "durable.mark"


@dataclass(frozen=True, slots=True)
class Found:
    """What a shard's folder leads to. `time_ns` 0: nothing. `identity` "": it has none, or it was not changed."""

    shard: int
    folder: Path
    sequence: int
    time_ns: int
    identity: str
    what: str


def check_stopped(config: ShardHostConfig, shard: int) -> None:
    """Raises FailedPrecondition where a process has the shard open, or its folder cannot be written."""
    folder = shard_folder(config.data_dir, shard)
    if folder.is_dir():
        try:
            os.close(lock_folder(folder))
        except LogLocked as error:
            raise FailedPrecondition(f"{error}; stop the wallet first") from error
        except OSError as error:
            raise FailedPrecondition(f"{folder}: {error.strerror}; it must be writable") from error


def look_at(config: ShardHostConfig, shard: int) -> Found:
    """Reads the shard's folder and changes nothing. With a log in Kafka that is the local copy. Raises FailedPrecondition where it does
    not lead to a state, InvalidArgument for a number that is no shard."""
    if not 0 <= shard < config.shard_count:
        raise InvalidArgument(f"--shard {shard}: expected a number below wallet_shard_count = {config.shard_count}")
    folder = shard_folder(config.data_dir, shard)
    try:
        own = read_identity(folder)
    except DataFileDamaged:
        own = None  # it is written anew
    if own is not None and own.shard != shard:
        raise FailedPrecondition(
            f"{folder} is the folder of shard {own.shard}; give the folders their right names first"
        )
    log = folder / "log"
    has_log = log.is_dir() and bool(segments(log))
    snapshots = snapshot_files(folder / "snapshots")
    if not has_log and not snapshots:
        return Found(shard, folder, 0, 0, own.identity if own else "", "an empty shard")
    try:
        engine, end = rebuild(config, shard, as_found=True)
    except (EventLogError, ShardHostError, SnapshotDamaged, OSError) as error:
        raise FailedPrecondition(
            f"{folder} does not lead to a state: {error}. Bring the shard back with `ducat wallet restore`, or move the folder away to "
            f"begin with an empty one"
        ) from error
    status = engine.status()
    ahead = [one.path.name for one in snapshots if one.sequence >= end.next_sequence]
    if ahead and has_log:
        raise FailedPrecondition(
            f"{folder}: the log ends with event {end.next_sequence - 1}, its snapshots {', '.join(sorted(ahead))} are of later ones. "
            f"Add the segments that lead there, or move these snapshots away"
        )
    what = "the log as it is" if has_log else f"the snapshot {snapshots[0].path.name}, without the log that led to it"
    return Found(shard, folder, status.sequence, status.now_ns, own.identity if own else "", what)


def accept_shard(config: ShardHostConfig, found: Found) -> Found:
    """Makes the folder one that a wallet opens: recovers it as a start does, cuts a torn tail, writes mark and identity and the manifest.
    A durable mark that is beyond the log is kept as `durable.mark.replaced-<n>`. Raises FailedPrecondition."""
    shard, folder = found.shard, found.folder
    log = folder / "log"
    check_stopped(config, shard)
    if config.kafka is None and log.is_dir():
        _replace_mark(log, found.sequence)
    try:
        recovered = recover_shard(replace(config, shard_ids=(shard,)), shard)
    except LogLocked as error:
        raise FailedPrecondition(f"{error}; stop the wallet first") from error
    except (EventLogError, ShardHostError, SnapshotDamaged) as error:
        raise FailedPrecondition(
            f"{folder} cannot be accepted: {error}. Bring the shard back with `ducat wallet restore`, or move the folder away to begin "
            f"with an empty one"
        ) from error
    recovered.log.close()
    status = recovered.engine.status()
    identity = new_identity()
    write_identity(config, shard, identity)
    record_identities(config.data_dir, config.shard_count, {shard: identity}, others_unknown=True)
    return replace(found, sequence=status.sequence, time_ns=status.now_ns if status.sequence else 0, identity=identity)


def _replace_mark(log: Path, sequence: int) -> None:
    mark = log / _MARK
    slot = read_mark(log)
    if not mark.exists() or (slot is not None and slot[0] <= sequence):
        return
    number = 1
    while (kept := mark.with_name(f"{_MARK}.replaced-{number}")).exists():
        number += 1
    mark.rename(kept)
    sync_folder(log)
