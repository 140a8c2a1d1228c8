"""Backups of a running system: where they lie (store), what they are made of (manifest), files in parts (transfer),
PostgreSQL (postgres).

The wallet's part is `wallet_core.adapters.backup`; `ops.backup` puts both together, in the order that makes them agree.
"""

from __future__ import annotations

from runtime.backup.manifest import (
    MANIFEST,
    Backup,
    BackupDamaged,
    Part,
    Point,
    PostgresBackup,
    ShardBackup,
    StoredFile,
    read_manifest,
    time_text,
    write_manifest,
)
from runtime.backup.store import FolderStore, ObjectInfo, S3Store, Store, open_store
from runtime.backup.transfer import read_part, store_parts, verify_part

__all__ = [
    "MANIFEST",
    "Backup",
    "BackupDamaged",
    "FolderStore",
    "ObjectInfo",
    "Part",
    "Point",
    "PostgresBackup",
    "S3Store",
    "ShardBackup",
    "Store",
    "StoredFile",
    "open_store",
    "read_manifest",
    "read_part",
    "store_parts",
    "time_text",
    "verify_part",
    "write_manifest",
]
