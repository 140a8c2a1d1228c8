"""Which shards a data folder has, and that they are the ones that it should have.

    wallet.json                {"format": 1, "shard_count": 2, "shards": {"0": "5f0c…", "1": null}}
    shard-0000/identity.json   {"format": 1, "shard": 0, "shard_count": 2, "identity": "5f0c…"}
    shard-0000/seen.json       {"identity": "5f0c…", "sequence_number": 42}

A shard is created once, by a first start. It gets a random identity, which is kept in three places, written in this order: its own
folder, then (once its log is durable) the manifest, then PostgreSQL (`wallet.shard`, by the wallet's bootstrap). So a crash in between
leaves a folder that the others do not know yet, which is adopted; what the others know and the folder lacks is never such a crash.
It is a disk that is not mounted, or the wrong one, and is refused. A manifest that names no shard is written before anything else: shards
without a manifest are no first start.

In the manifest null means: this shard may have existed, its identity is not known. A manifest of the version before identities says
that of every shard, and so does one that had to be made anew. A shard that is not named was never in this folder.

The other way round, `seen.json` holds what PostgreSQL had seen of the shard some time ago. A PostgreSQL that has seen less was restored to
an older state: what it has forgotten and the wallet has booked would be booked again, under other ids, when it is told again.

With a log in Kafka the folder may be lost at any time: the partition is the truth, and what is refused is a partition that ends too
early (`recover_shard`'s check).
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from wallet_core.event_log import segments
from wallet_core.event_log._file import read_mark
from wallet_core.event_log.file import make_folder, sync_folder
from wallet_core.shard.port import ShardHostConfig, ShardHostError, shard_folder
from wallet_core.snapshot import snapshot_files

__all__ = [
    "DataFileDamaged",
    "DatabaseBehind",
    "KnownShard",
    "Manifest",
    "ShardBehind",
    "ShardForeign",
    "ShardMissing",
    "ShardsMismatch",
    "check_manifest",
    "check_reach",
    "new_identity",
    "prepare_shards",
    "read_identity",
    "read_manifest",
    "read_numbers",
    "record_identities",
    "write_identity",
    "write_seen",
    "write_whole",
]

IDENTITY_FILE = "identity.json"
MANIFEST_FILE = "wallet.json"
SEEN_FILE = "seen.json"
_FILE_BYTES_MAX = 64 * 1024
_SHARDS_MAX = 4096
_WAYS_OUT = (
    "Nothing was changed. Ways out: mount the disk, or correct DUCAT_DATA_DIR; bring the shard back from a copy with "
    "`ducat wallet restore --shard {shard} --from …`; or go on with what is there: `ducat wallet accept --shard {shard}` says what "
    "would be lost"
)


class ShardsMismatch(ShardHostError):
    """The folder was made with another number of shards."""


class ShardMissing(ShardHostError):
    """A shard that existed before is not here."""


class ShardForeign(ShardHostError):
    """What is in a shard's folder is another shard, or the shard of another system."""


class ShardBehind(ShardHostError):
    """A shard's log ends before an event that was seen of it."""


class DatabaseBehind(ShardHostError):
    """PostgreSQL has seen less of a shard than it had before."""


class DataFileDamaged(ShardHostError):
    """A small file of the data folder cannot be read, or does not say what it should. `file` is its path."""

    def __init__(self, file: Path, reason: str, way_out: str) -> None:
        super().__init__(f"{file}: {reason}. {way_out}")
        self.file, self.reason = str(file), reason


@dataclass(frozen=True, slots=True)
class KnownShard:
    """What PostgreSQL knows of a shard. `identity` "": it is of the version before identities. `sequence`: an event up to which the
    shard was durable once."""

    identity: str
    sequence: int


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What a shard's own folder says."""

    shard: int
    shard_count: int
    identity: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the data folder says of all its shards."""

    shard_count: int
    shards: dict[int, str | None] = field(default_factory=dict)


def new_identity() -> str:
    """Of a shard that is created, or that goes on with less than it had."""
    return str(uuid.uuid4())


# ---- the files ----


def read_manifest(data_dir: Path) -> Manifest | None:
    """None where there is none. Raises DataFileDamaged."""
    path = data_dir / MANIFEST_FILE
    way_out = "Put the file back from a copy, or move it away: the next start makes it anew from the shards' folders if they are all there"
    found = _read_json(path, way_out)
    if found is None:
        return None
    count, listed = found.get("shard_count"), found.get("shards", None)
    if found.get("format") != 1 or not _is_number(count) or not 1 <= count <= _SHARDS_MAX:
        raise DataFileDamaged(path, f'expected {{"format": 1, "shard_count": N, …}}, got {_short(found)}', way_out)
    if listed is None:  # of the version before identities
        return Manifest(count, dict.fromkeys(range(count)))
    shards: dict[int, str | None] = {}
    if not isinstance(listed, dict):
        raise DataFileDamaged(path, f'"shards": expected an object, got {_short(listed)}', way_out)
    for number, identity in listed.items():
        if not (number.isascii() and number.isdigit() and int(number) < count):
            raise DataFileDamaged(path, f'"shards": expected numbers below {count}, got {_short(number)}', way_out)
        if identity is not None and not _is_identity(identity):
            raise DataFileDamaged(path, f'"shards": expected identities, got {_short(identity)}', way_out)
        shards[int(number)] = identity
    return Manifest(count, shards)


def check_manifest(data_dir: Path, shard_count: int) -> Manifest | None:
    """The manifest; None where there is none. Raises ShardsMismatch, DataFileDamaged."""
    manifest = read_manifest(data_dir)
    if manifest is not None and manifest.shard_count != shard_count:
        raise ShardsMismatch(_mismatch(data_dir, manifest.shard_count, shard_count))
    return manifest


def read_identity(folder: Path) -> ShardIdentity | None:
    """Of a shard's folder; None where it has none. Raises DataFileDamaged."""
    path = folder / IDENTITY_FILE
    number = folder.name.removeprefix("shard-").lstrip("0") or "0"
    way_out = (
        f"Put it back from a copy; if this is the right folder, `ducat wallet accept --shard {number}` writes it anew"
    )
    found = _read_json(path, way_out)
    if found is None:
        return None
    shard, count, identity = found.get("shard"), found.get("shard_count"), found.get("identity")
    if found.get("format") != 1 or not _is_number(shard) or not _is_number(count) or not _is_identity(identity):
        expected = '{"format": 1, "shard": N, "shard_count": N, "identity": "…"}'
        raise DataFileDamaged(path, f"expected {expected}, got {_short(found)}", way_out)
    return ShardIdentity(shard, count, identity)


def read_numbers(path: Path) -> dict[str, int]:
    """`sent.json`: peer → number, both whole; empty where there is no file. Raises DataFileDamaged."""
    way_out = (
        "It holds what this shard had sent when it started last. If it is certain that the shard's log is whole (docs/wallet.md, "
        "A shard went back in time), remove the file and start again"
    )
    found = _read_json(path, way_out) or {}
    for peer, number in found.items():
        if not (peer.isascii() and peer.isdigit()) or not _is_number(number) or number < 0:
            raise DataFileDamaged(path, f"expected shard numbers with counts, got {_short({peer: number})}", way_out)
    return found


def write_identity(config: ShardHostConfig, shard: int, identity: str) -> None:
    """Durable. Raises OSError."""
    folder = shard_folder(config.data_dir, shard)
    make_folder(folder)
    told = {"format": 1, "shard": shard, "shard_count": config.shard_count, "identity": identity}
    write_whole(folder / IDENTITY_FILE, json.dumps(told) + "\n")


def write_seen(folder: Path, identity: str, sequence: int) -> None:
    """What PostgreSQL has seen of the shard that has this identity. Raises OSError."""
    write_whole(folder / SEEN_FILE, json.dumps({"identity": identity, "sequence_number": sequence}) + "\n")


def _read_seen(folder: Path, identity: str) -> int:
    """0 where nothing is known; a file that is broken is no reason to stand still."""
    with suppress(DataFileDamaged):
        found = _read_json(folder / SEEN_FILE, "") or {}
        sequence = found.get("sequence_number")
        if found.get("identity") == identity and _is_number(sequence):
            return sequence
    return 0


def record_identities(
    data_dir: Path, shard_count: int, identities: Mapping[int, str], *, others_unknown: bool = False
) -> None:
    """Writes shards into the manifest, which is made where it is missing. Processes that share a folder take turns.
    others_unknown: a manifest that is made now says of every other shard that it may have existed. Raises ShardsMismatch,
    DataFileDamaged, OSError."""
    make_folder(data_dir)
    turn = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        found = check_manifest(data_dir, shard_count)
        shards = dict(found.shards) if found else dict.fromkeys(range(shard_count)) if others_unknown else {}
        shards.update(identities)
        if found is None or shards != found.shards or not _names_shards(data_dir):
            listed = {str(shard): shards[shard] for shard in sorted(shards)}
            told = {"format": 1, "shard_count": shard_count, "shards": listed}
            write_whole(data_dir / MANIFEST_FILE, json.dumps(told) + "\n")
    finally:
        os.close(turn)


def write_whole(path: Path, text: str) -> None:
    """A small file, durable, and never seen in part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_folder(path.parent)


# ---- the rules ----


def prepare_shards(config: ShardHostConfig, known: Mapping[int, KnownShard] | None) -> dict[int, str]:
    """Whether this process's shards are those that they should be; their identities, which their folders then have. Looks at all
    before it writes anything. `known`: what PostgreSQL knows; None where there is none. Raises ShardMissing, ShardForeign,
    ShardsMismatch, DataFileDamaged, OSError."""
    manifest = check_manifest(config.data_dir, config.shard_count)
    shards = config.shard_ids or tuple(range(config.shard_count))
    entries: Mapping[int, str | None] = manifest.shards if manifest else {}
    is_lost = manifest is None and _shards_there(config.data_dir)
    if is_lost:
        entries = dict.fromkeys(range(config.shard_count))  # each of them may have existed
    found = {
        shard: _Look(config, shard, shard in entries, entries.get(shard), (known or {}).get(shard)) for shard in shards
    }
    identities = {shard: look.identity() for shard, look in found.items()}
    if known is not None:
        _check_database(list(found.values()))
    if manifest is None:
        record_identities(config.data_dir, config.shard_count, {}, others_unknown=is_lost)
    for shard, look in found.items():
        if look.own is None:
            write_identity(config, shard, identities[shard])
    return identities


def check_reach(shard: int, folder: Path, known: KnownShard | None) -> Callable[[int], None]:
    """Takes the number of the last event that a recovery found. Raises ShardBehind where more was seen."""

    def check(sequence: int) -> None:
        if known is not None and sequence < known.sequence:
            raise ShardBehind(
                f"shard {shard}: PostgreSQL has seen event {known.sequence} of it, the log of {folder} ends with event {sequence}: an "
                f"older copy, or segments are missing. Acknowledged transfers would be lost. {_WAYS_OUT.format(shard=shard)}"
            )

    return check


class _Look:
    """What there is of one shard, and what others know of it."""

    def __init__(
        self, config: ShardHostConfig, shard: int, is_listed: bool, listed: str | None, known: KnownShard | None
    ) -> None:
        self.shard, self.listed, self.known = shard, listed, known
        self.folder = shard_folder(config.data_dir, shard)
        self.is_stored_elsewhere = config.kafka is not None
        self.existed = is_listed or known is not None
        self.own = read_identity(self.folder)
        log = self.folder / "log"
        self.has_log = log.is_dir() and bool(segments(log))
        self.has_snapshots = bool(snapshot_files(self.folder / "snapshots"))
        self.has_mark = read_mark(log) is not None if log.is_dir() else False
        if self.own is not None and self.own.shard == shard and self.own.shard_count != config.shard_count:
            raise ShardsMismatch(_mismatch(self.folder, self.own.shard_count, config.shard_count))

    def identity(self) -> str:
        """The identity to go on with. Raises ShardMissing, ShardForeign, DataFileDamaged."""
        self._check_whose()
        if not self.has_log and not self.is_stored_elsewhere:
            self._check_first()
        if self.has_log and self.existed and not self.has_mark and not self.is_stored_elsewhere:
            raise DataFileDamaged(
                self.folder / "log" / "durable.mark",
                "the durable mark is missing or damaged, so nothing says how far the log must reach",
                f"Put it back from a copy; if the log is whole, `ducat wallet accept --shard {self.shard}` writes it anew",
            )
        if self.own is not None:
            return self.own.identity
        return self.listed or (self.known.identity if self.known else "") or new_identity()

    def seen(self) -> tuple[int, int]:
        """The last event that PostgreSQL has seen of the shard: before, and now."""
        before = _read_seen(self.folder, self.own.identity) if self.own is not None else 0
        return before, self.known.sequence if self.known is not None else 0

    def _check_whose(self) -> None:
        own, way_out = self.own, _WAYS_OUT.format(shard=self.shard)
        if own is not None and own.shard != self.shard:
            raise ShardForeign(
                f"shard {self.shard}: {self.folder} is the folder of shard {own.shard} ({IDENTITY_FILE} says so): it was moved or "
                f"renamed. Nothing was changed. Give the folders their right names"
            )
        expected = [
            ("the manifest wallet.json", self.listed),
            ("PostgreSQL", self.known.identity if self.known else None),
        ]
        for where, identity in expected:
            if not identity:
                continue
            if own is not None and own.identity != identity:
                raise ShardForeign(
                    f"shard {self.shard}: {self.folder} has the identity {own.identity}, {where} expects {identity}: it is the shard of "
                    f"another system, or a copy from before the shard was restored or accepted. {way_out}"
                )
            if own is None and self.has_log and not self.is_stored_elsewhere:
                raise ShardForeign(
                    f"shard {self.shard}: {self.folder} has a log and no {IDENTITY_FILE}, {where} expects the identity {identity}: it is "
                    f"a copy that is older than the identity, or another system's. {way_out}"
                )

    def _check_first(self) -> None:
        """There are no segments: well only for a shard that never was."""
        where = ["PostgreSQL knows it" if self.known else "", "the data folder has had it" if self.existed else ""]
        knows = " and ".join(one for one in where if one)
        what = "does not exist" if not self.folder.is_dir() else "has no log segments"
        if self.has_snapshots:
            what = "has snapshots and no log segments"
            knows = knows or "a snapshot is never without a log"
        if knows:
            seen = f" up to event {self.known.sequence} at least" if self.known and self.known.sequence else ""
            raise ShardMissing(
                f"shard {self.shard}: expected its log in {self.folder / 'log'}{seen} ({knows}), but {self.folder} {what}: the disk is "
                f"not mounted, or the folder was moved or emptied. {_WAYS_OUT.format(shard=self.shard)}"
            )


def _check_database(looks: Sequence[_Look]) -> None:
    """Raises DatabaseBehind, which names every shard of which PostgreSQL had seen more."""
    behind = [(look, *seen) for look in looks if (seen := look.seen())[1] < seen[0]]
    if not behind:
        return
    what = "; ".join(f"event {now} of shard {look.shard}, and had seen event {before}" for look, before, now in behind)
    restores = ", ".join(
        f"`ducat wallet restore --shard {look.shard} --from THERE --to-event {now}`" for look, _, now in behind
    )
    raise DatabaseBehind(
        f"PostgreSQL has seen {what}: it was restored to an older state, or is another one. What it has forgotten and the wallet has "
        f"booked would be booked once more when it is told again. Nothing was changed. Ways out: bring PostgreSQL back as it was; or take "
        f"the shards back to what it knows, with `ducat backup restore --wallet-only` where there is a backup, else move their folders "
        f"away (keep them) and {restores}; or go on with both as they are (`ducat wallet accept --shard {behind[0][0].shard}`) and settle "
        f"by hand what `ducat check` then says"
    )


def check_partition(config: ShardHostConfig, shard: int, known: KnownShard | None) -> Callable[[int], None]:
    """`check_reach` for a log in Kafka, where an empty partition may not be taken for a first start. Call it before the recovery."""
    folder = shard_folder(config.data_dir, shard)
    manifest = read_manifest(config.data_dir)
    log = folder / "log"
    is_lost = (
        known is None and manifest is not None and shard in manifest.shards and not (log.is_dir() and segments(log))
    )
    reach = check_reach(shard, folder, known)

    def check(sequence: int) -> None:
        reach(sequence)
        if is_lost and sequence == 0:
            raise ShardMissing(
                f"shard {shard}: its partition is empty and its folder {folder} has no log, but the data folder has had it: the topic "
                f"was made anew. {_WAYS_OUT.format(shard=shard)}"
            )

    return check


def _shards_there(data_dir: Path) -> bool:
    """Any shard's folder with something in it."""
    with suppress(FileNotFoundError):
        for folder in data_dir.glob("shard-*"):
            if (
                any(folder.glob("log/*.seg"))
                or any(folder.glob("snapshots/*.snap"))
                or (folder / IDENTITY_FILE).is_file()
            ):
                return True
    return False


def _mismatch(place: Path, made_for: int, configured: int) -> str:
    return (
        f"{place} was made for {made_for} shards, {configured} are configured; the number is fixed once data exist "
        f"(DUCAT_WALLET_SHARD_COUNT={made_for})"
    )


def _names_shards(data_dir: Path) -> bool:
    return "shards" in (_read_json(data_dir / MANIFEST_FILE, "") or {})


def _read_json(path: Path, way_out: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataFileDamaged(path, f"it cannot be read ({error.strerror})", way_out) from error
    if len(data) > _FILE_BYTES_MAX:
        raise DataFileDamaged(path, f"expected a small JSON object, got more than {_FILE_BYTES_MAX} bytes", way_out)
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        what = f"{len(data)} bytes that are none ({error})" if data else "an empty file"
        raise DataFileDamaged(path, f"expected a JSON object, got {what}", way_out) from error
    if not isinstance(found, dict):
        raise DataFileDamaged(path, f"expected a JSON object, got {_short(found)}", way_out)
    return found


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_identity(value: object) -> TypeGuard[str]:
    try:
        return isinstance(value, str) and str(uuid.UUID(value)) == value
    except ValueError:
        return False


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
