"""Snapshots of a shard: the file format, writing beside a running shard, reading back with every check."""

from wallet_core.snapshot.file import (
    SnapshotFile,
    SnapshotWriter,
    check,
    check_slowly,
    delete_older,
    read_header,
    read_pieces,
    set_aside,
    snapshot_files,
)
from wallet_core.snapshot.format import SnapshotDamaged, SnapshotHeader

__all__ = [
    "SnapshotDamaged",
    "SnapshotFile",
    "SnapshotHeader",
    "SnapshotWriter",
    "check",
    "check_slowly",
    "delete_older",
    "read_header",
    "read_pieces",
    "set_aside",
    "snapshot_files",
]
