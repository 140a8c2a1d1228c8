"""What a backup is made of: `manifest.json`, written last, so that a backup without one was interrupted.

    <name>/manifest.json
    <name>/postgres/base.tar.0.gz                       the base backup, a stream of tar
    <name>/postgres/wal/000000010000000000000003.0.gz   the write-ahead log since then, a file a segment
    <name>/wallet/shard-0000/log/<first>.seg.<offset>.0.gz   a segment, or what was added to it since the last time
    <name>/wallet/shard-0000/snapshots/<sequence>.snap.0.gz

A file is the contents of its parts, one behind the other; every part is an object of its own (gzip), with size and
SHA-256 of what is stored. To extend a backup adds objects and then replaces the manifest: until then the backup is what
it was before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kernel.errors import DucatError, FailedPrecondition, NotFound
from runtime.backup.store import Store

__all__ = [
    "MANIFEST",
    "Backup",
    "BackupDamaged",
    "Part",
    "Point",
    "PostgresBackup",
    "ShardBackup",
    "StoredFile",
    "read_manifest",
    "time_text",
    "write_manifest",
]

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES_MAX = 256 * 1024 * 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class BackupDamaged(FailedPrecondition):
    """What is stored is not what was written; the message names the object."""


@dataclass(frozen=True, slots=True)
class Part:
    """One object. `bytes`: of the file that it holds; `size`, `sha256`: of the object as it is stored."""

    object: str
    bytes: int
    size: int
    sha256: str


@dataclass(slots=True)
class StoredFile:
    """A file in parts. `path`: where it belongs, relative to the data it is of. `full_bytes`: of the file on disk,
    where it ended in zeros that are not stored."""

    path: str
    parts: list[Part] = field(default_factory=list)
    full_bytes: int = 0

    @property
    def bytes(self) -> int:
        """What its parts hold."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Point:
    """A moment that can be restored exactly. `time`: unix ns by PostgreSQL's clock. `lsn`: of PostgreSQL's restore
    point `name`. `positions`: of each shard, the last durable event just before it."""

    name: str
    time_ns: int
    lsn: str
    positions: dict[str, int]


@dataclass(slots=True)
class PostgresBackup:
    """The base backup and the log behind it."""

    system_identifier: str
    major: int
    timeline: int
    embedded: bool
    wal_segment_bytes: int
    slot: str
    next_segment: int
    """Number of the first log segment that is not here."""
    base: StoredFile
    wal: list[StoredFile] = field(default_factory=list)


@dataclass(slots=True)
class ShardBackup:
    """One shard's files. The log is here up to the durable event `sequence`, which ends in segment `segment` at `offset`."""

    shard: int
    sequence: int
    epoch: int
    segment: int
    offset: int
    mark_hash: str
    files: list[StoredFile] = field(default_factory=list)


@dataclass(slots=True)
class Backup:
    """One backup. Times are unix ns. `missing_shards`: shards of the system whose folders were not on the machine."""

    name: str
    create_time_ns: int
    extend_time_ns: int
    shard_count: int
    wallet_log: str
    postgres: PostgresBackup
    shards: list[ShardBackup] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    missing_shards: list[int] = field(default_factory=list)

    @property
    def first_time_ns(self) -> int:
        """The first moment that can be restored."""
        return self.points[0].time_ns

    @property
    def last_time_ns(self) -> int:
        """The last one."""
        return self.points[-1].time_ns

    def files(self) -> list[StoredFile]:
        """Every file of it."""
        shards = [file for shard in self.shards for file in shard.files]
        return [self.postgres.base, *self.postgres.wal, *shards]

    @property
    def size(self) -> int:
        """Bytes that it takes in the store."""
        return sum(part.size for file in self.files() for part in file.parts)


def write_manifest(store: Store, backup: Backup) -> None:
    """Replaces the manifest; from then on the backup is what `backup` says."""
    text = json.dumps(dataclasses.asdict(backup), separators=(",", ":"))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    document = f'{{"format":{FORMAT},"sha256":"{checksum}","backup":{text}}}\n'
    store.put(f"{backup.name}/{MANIFEST}", io.BytesIO(document.encode()))


def read_manifest(store: Store, name: str) -> Backup:
    """Raises NotFound where there is no finished backup of that name, BackupDamaged where its manifest does not read back."""
    where = f"{store.place}/{name}/{MANIFEST}"
    if not NAME.fullmatch(name):
        raise NotFound(f"{name!r} is no name of a backup; `ducat backup list` shows them")
    try:
        with store.open(f"{name}/{MANIFEST}") as source:
            document = source.read(MANIFEST_BYTES_MAX)
    except NotFound as error:
        raise NotFound(
            f"{store.place} has no finished backup {name!r}; `ducat backup list` shows what there is"
        ) from error
    try:
        outer = json.loads(document)
        version = outer["format"]
        text = json.dumps(outer["backup"], separators=(",", ":"))
        if version == FORMAT and hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise BackupDamaged(f"{where}: its checksum does not hold; take another backup, and look at the disk")
        if version == FORMAT:
            return _backup(outer["backup"])
    except DucatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupDamaged(f"{where}: not a manifest ({type(error).__name__}: {error})") from error
    raise BackupDamaged(f"{where}: format {version}, this program reads format {FORMAT}; use the version that wrote it")


def _backup(data: dict[str, Any]) -> Backup:
    postgres = data["postgres"]
    return Backup(
        **{
            **data,
            "postgres": PostgresBackup(
                **{**postgres, "base": _file(postgres["base"]), "wal": [_file(one) for one in postgres["wal"]]}
            ),
            "shards": [
                ShardBackup(**{**shard, "files": [_file(one) for one in shard["files"]]}) for shard in data["shards"]
            ],
            "points": [Point(**point) for point in data["points"]],
        }
    )


def _file(data: dict[str, Any]) -> StoredFile:
    return StoredFile(data["path"], [Part(**part) for part in data["parts"]], data["full_bytes"])


def time_text(time_ns: int) -> str:
    """2026-01-31T12:00:00.123456Z."""
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % 1_000_000_000 // 1000:06}Z"
