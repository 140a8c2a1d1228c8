"""A copy of a running PostgreSQL: a base backup, and the write-ahead log behind it, which a physical replication slot keeps for us.

    slot ─ base backup ─ restore point ─ log up to it     (create)
                       … restore point ─ log up to it     (extend, as often as wanted)

The server's own programs do it (pg_basebackup, pg_receivewal, pg_verifybackup). The slot is moved on only when what it
kept is safe in the store. After each restore point a commit is logged: recovery to a time stops at the first commit
after it, and so there always is one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg

from kernel.errors import FailedPrecondition, Unavailable
from runtime.backup.manifest import Backup, BackupDamaged, PostgresBackup, StoredFile, time_text
from runtime.backup.store import Store
from runtime.backup.transfer import read_part, store_parts
from runtime.embedded.postgres import client_environment, installation

__all__ = [
    "SourceServer",
    "add_wal",
    "check_same_server",
    "drop_slot",
    "lay_base",
    "lay_wal",
    "make_restore_point",
    "missing_wal",
    "prepare_recovery",
    "release_wal",
    "settle_recovered",
    "slot_name",
    "store_base",
    "verify_base",
]

SEGMENTS_AT_ONCE = 16
"""Log segments that lie on the local disk before they are stored."""
RECEIVE_TIMEOUT_S = 600.0
"""For so many segments."""
STDERR_LINES = 5
_XLOG_ID_BYTES = 1 << 32
_RECOVERY_BEGIN, _RECOVERY_END = "# ducat backup restore: begin", "# ducat backup restore: end"
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")


@dataclass(frozen=True, slots=True)
class SourceServer:
    """The server that is copied. `embedded`: one of our own."""

    dsn: str
    embedded: bool

    async def connect(self) -> Any:
        """A connection. Raises Unavailable."""
        try:
            return await asyncpg.connect(self.dsn)
        except (OSError, asyncpg.PostgresError) as error:
            raise Unavailable(f"PostgreSQL does not answer: {error}; start it (`ducat up`) and try again") from error


def slot_name(backup_name: str) -> str:
    """The replication slot that keeps the log for one backup."""
    return f"ducat_backup_{re.sub('[^a-z0-9_]', '_', backup_name.lower())}"[:63]


async def store_base(store: Store, name: str, source: SourceServer, connection: Any) -> PostgresBackup:
    """Makes the slot, then stores a base backup. Raises FailedPrecondition, Unavailable; the slot is then dropped."""
    import asyncio

    version = int(await connection.fetchval("SHOW server_version_num")) // 10_000
    await _check_server(connection)
    programs = _Programs.find(source, version)
    slot = slot_name(name)
    try:
        await connection.fetchval("SELECT pg_create_physical_replication_slot($1, true)::text", slot)
    except asyncpg.DuplicateObjectError:
        raise FailedPrecondition(
            f"a replication slot {slot!r} exists: a backup of that name was begun before; choose another --name, "
            "or remove what is left of it with `ducat backup prune`"
        ) from None
    except asyncpg.PostgresError as error:
        raise FailedPrecondition(f"PostgreSQL makes no replication slot: {error}; {_RIGHTS}") from error
    try:
        identity = await connection.fetchrow(
            "SELECT s.system_identifier::text, pg_walfile_name(r.restart_lsn) AS segment "
            "FROM pg_control_system() s, pg_replication_slots r WHERE r.slot_name = $1",
            slot,
        )
        segment_bytes = await _segment_bytes(connection)
        base = StoredFile("base.tar")
        arguments = ["-F", "tar", "-D", "-", "-X", "none", "-c", "fast", "--no-password"]
        with programs.run("pg_basebackup", arguments) as process:
            out = cast("IO[bytes]", process.stdout)
            base.parts = await asyncio.to_thread(store_parts, store, f"{name}/postgres/base.tar", out.read)
    except BaseException:
        await drop_slot(connection, slot)
        raise
    return PostgresBackup(
        system_identifier=identity["system_identifier"],
        major=version,
        timeline=int(identity["segment"][:8], 16),
        embedded=source.embedded,
        wal_segment_bytes=segment_bytes,
        slot=slot,
        next_segment=_number_of(identity["segment"], segment_bytes),
        base=base,
    )


_RIGHTS = (
    "the user needs REPLICATION, pg_switch_wal() and pg_create_restore_point() (docs/backup.md, A server of your own)"
)


async def _check_server(connection: Any) -> None:
    level = await connection.fetchval("SHOW wal_level")
    if level == "minimal":
        raise FailedPrecondition(
            "PostgreSQL runs with wal_level = minimal, which allows no backup; set wal_level = replica, max_wal_senders ≥ 2 and "
            "max_replication_slots ≥ 1, and restart it (an embedded one: restart `ducat up`)"
        )
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        raise FailedPrecondition("PostgreSQL is a standby; back up the primary")


async def drop_slot(connection: Any, slot: str) -> bool:
    """Lets go of the log that was kept for a backup; whether there was such a slot."""
    with contextlib.suppress(asyncpg.PostgresError):
        found = await connection.fetchval(
            "SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE slot_name = $1", slot
        )
        return bool(found)
    return False


async def make_restore_point(connection: Any, name: str) -> tuple[int, str]:
    """(unix ns by the server's clock, LSN); a commit follows it."""
    try:
        time_ns = await connection.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint * 1000")
        lsn = await connection.fetchval("SELECT pg_create_restore_point($1)::text", name)
        await connection.fetchval("SELECT pg_logical_emit_message(true, 'ducat', $1)::text", name)
    except asyncpg.PostgresError as error:
        raise FailedPrecondition(f"PostgreSQL makes no restore point: {error}; {_RIGHTS}") from error
    return time_ns, lsn


async def add_wal(store: Store, backup: Backup, source: SourceServer, connection: Any) -> None:
    """Stores the log from `next_segment` up to now. The slot stays where it is: `release_wal` moves it, once the manifest is stored."""
    import asyncio

    postgres = backup.postgres
    await check_same_server(connection, backup)
    try:
        end = _lsn(await connection.fetchval("SELECT pg_switch_wal()::text"))
    except asyncpg.PostgresError as error:
        raise FailedPrecondition(f"PostgreSQL does not end its log segment: {error}; {_RIGHTS}") from error
    size = postgres.wal_segment_bytes
    programs = _Programs.find(source, postgres.major)
    last = (end - 1) // size
    while postgres.next_segment <= last:
        upto = min(last, postgres.next_segment + SEGMENTS_AT_ONCE - 1)
        await asyncio.to_thread(_receive, store, backup, programs, upto, min(end, (upto + 1) * size - 1))


async def check_same_server(connection: Any, backup: Backup) -> None:
    """That the log goes on where the backup ends. Raises FailedPrecondition."""
    postgres = backup.postgres
    system, segment = await connection.fetchrow(
        "SELECT system_identifier::text, pg_walfile_name(pg_current_wal_lsn()) FROM pg_control_system()"
    )
    timeline = int(segment[:8], 16)
    if (system, timeline) != (postgres.system_identifier, postgres.timeline):
        raise FailedPrecondition(
            f"backup {backup.name} is of another PostgreSQL, or of this one before it was restored (system "
            f"{postgres.system_identifier} timeline {postgres.timeline}, here {system} timeline {timeline}); make a new one: "
            "`ducat backup create`"
        )
    slot = await connection.fetchrow(
        "SELECT wal_status, pg_walfile_name(restart_lsn) AS segment FROM pg_replication_slots WHERE slot_name = $1",
        postgres.slot,
    )
    if (
        slot is None
        or slot["wal_status"] == "lost"
        or _number_of(slot["segment"], postgres.wal_segment_bytes) > postgres.next_segment
    ):
        why = (
            "its replication slot is gone"
            if slot is None
            else "it was not extended for so long that PostgreSQL had to let go of the log (max_slot_wal_keep_size)"
        )
        raise FailedPrecondition(
            f"backup {backup.name} cannot be extended: {why}; make a new one: `ducat backup create`. "
            f"What it holds stays good, up to {time_text(backup.last_time_ns) if backup.points else 'nothing'}"
        )


async def release_wal(connection: Any, backup: Backup) -> None:
    """Lets the server remove the log that the backup holds."""
    postgres = backup.postgres
    lsn = postgres.next_segment * postgres.wal_segment_bytes
    with contextlib.suppress(asyncpg.PostgresError):  # the next time, then
        current = _lsn(await connection.fetchval("SELECT pg_current_wal_flush_lsn()::text"))
        to = min(lsn, current)
        await connection.fetchval(
            "SELECT pg_replication_slot_advance($1, $2::text::pg_lsn)::text", postgres.slot, _lsn_text(to)
        )


def _receive(store: Store, backup: Backup, programs: _Programs, upto: int, end: int) -> None:
    postgres = backup.postgres
    names = [_segment_name(postgres, number) for number in range(postgres.next_segment, upto + 1)]
    with tempfile.TemporaryDirectory(prefix="ducat-backup-") as made:
        folder = Path(made)
        (folder / f"{names[0]}.partial").touch()  # which tells pg_receivewal where to begin
        arguments = ["-D", made, "--no-loop", "--endpos", _lsn_text(end), "--no-password"]
        with programs.run("pg_receivewal", arguments) as process:
            try:
                process.communicate(timeout=RECEIVE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise Unavailable(
                    f"PostgreSQL did not send its log up to {_lsn_text(end)} in {RECEIVE_TIMEOUT_S:g} s"
                ) from None
        for name in names:
            path = folder / name
            if not path.exists():  # the last one ends with the log so far, and zeros
                path = folder / f"{name}.partial"
            if not path.exists() or path.stat().st_size != postgres.wal_segment_bytes:
                raise Unavailable(f"PostgreSQL sent no whole log segment {name}; try again")
            with open(path, "rb") as file:
                parts = store_parts(store, f"{backup.name}/postgres/wal/{name}", file.read)
            postgres.wal.append(StoredFile(name, parts, postgres.wal_segment_bytes))
            postgres.next_segment += 1


def lay_base(store: Store, postgres: PostgresBackup, data: Path, note: Callable[[int], None] = lambda at: None) -> None:
    """Unpacks the base backup into the folder `data`."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    stream = _Stream(_noted(_parts_of(store, postgres.base), note))
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
            for member in archive:
                tarfile.data_filter(member, str(data))  # raises where it would leave the folder
                if not (member.isdir() or member.isreg()):
                    raise FailedPrecondition(
                        f"the base backup has {member.name}, which is neither a file nor a folder: tablespaces are not restored"
                    )
                archive.extract(member, data, filter="data")
    except tarfile.TarError as error:
        raise BackupDamaged(f"{postgres.base.parts[0].object}: not a tar archive of a base backup ({error})") from error
    stream.drain()  # so that the last checksums are looked at
    for folder, _, names in os.walk(data):
        os.chmod(folder, 0o700)
        for name in names:
            os.chmod(os.path.join(folder, name), 0o600)


def lay_wal(store: Store, postgres: PostgresBackup, data: Path, note: Callable[[int], None] = lambda at: None) -> None:
    """Puts every log segment into `data`/pg_wal."""
    folder = data / "pg_wal"
    folder.mkdir(mode=0o700, exist_ok=True)
    done = 0
    for file in postgres.wal:
        with open(folder / file.path, "xb") as target:
            for piece in _parts_of(store, file):
                target.write(piece)
                done += len(piece)
                note(done)
        os.chmod(folder / file.path, 0o600)


def missing_wal(postgres: PostgresBackup) -> str:
    """What is wrong with the row of log segments; empty where it has no hole."""
    numbers = [_number_of(file.path, postgres.wal_segment_bytes) for file in postgres.wal]
    if not numbers or numbers != list(range(numbers[0], postgres.next_segment)):
        return "the write-ahead log has a hole: some of its segments are not in the backup"
    return ""


def prepare_recovery(data: Path, target: Mapping[str, str]) -> None:
    """So that the next start of a server on `data` recovers up to `target` (recovery_target_name, …_time) and then goes on as a primary."""
    settings = {"restore_command": "false", "recovery_target_action": "promote", "hot_standby": "off", **target}
    lines = [f"{name} = '{value}'" for name, value in settings.items()]
    with open(data / "postgresql.auto.conf", "a") as file:
        file.write("\n".join(["", _RECOVERY_BEGIN, *lines, _RECOVERY_END, ""]))
    (data / "recovery.signal").touch(mode=0o600)
    for name in ("postgresql.auto.conf", "recovery.signal"):
        os.chmod(data / name, 0o600)


def settle_recovered(data: Path) -> None:
    """Takes back what `prepare_recovery` wrote, once the server has recovered."""
    file = data / "postgresql.auto.conf"
    lines = file.read_text().splitlines()
    if _RECOVERY_BEGIN in lines:
        del lines[lines.index(_RECOVERY_BEGIN) : lines.index(_RECOVERY_END) + 1]
        with open(file, "w") as opened:  # the same file, for it may belong to the server's user
            opened.write("\n".join([*lines, ""]))


def verify_base(store: Store, postgres: PostgresBackup, folder: Path) -> str:
    """Unpacks the base backup into `folder` and runs pg_verifybackup; what is wrong with it, empty where nothing is."""
    lay_base(store, postgres, folder)
    program = installation() / "bin" / "pg_verifybackup"
    done = subprocess.run(  # noqa: S603
        [str(program), "--no-parse-wal", "--exit-on-error", str(folder)],
        capture_output=True,
        text=True,
        env=client_environment(),
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.strip()


def _parts_of(store: Store, file: StoredFile) -> Iterator[bytes]:
    for part in file.parts:
        yield from read_part(store, part)


def _noted(pieces: Iterable[bytes], note: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    for piece in pieces:
        done += len(piece)
        note(done)
        yield piece


class _Stream:
    """Pieces of bytes as a file to read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._ready = b""

    def read(self, size: int) -> bytes:
        found = []
        while size > 0:
            if not self._ready:
                self._ready = next(self._pieces, b"")
                if not self._ready:
                    break
            found.append(self._ready[:size])
            self._ready = self._ready[size:]
            size -= len(found[-1])
        return b"".join(found)

    def drain(self) -> None:
        for _ in self._pieces:
            pass


@dataclass(frozen=True, slots=True)
class _Programs:
    """PostgreSQL's client programs, and how they reach the server."""

    folder: str
    """Empty: the ones on PATH."""
    dsn: str
    environment: dict[str, str]

    @classmethod
    def find(cls, source: SourceServer, server_major: int) -> _Programs:
        """For a server of one's own those on PATH come first: they know its TLS and its ways to log in. Raises FailedPrecondition."""
        dsn, password = _without_password(source.dsn)
        secret = {"PGPASSWORD": password} if password else {}
        tried = []
        on_path = shutil.which("pg_basebackup")
        if on_path and not source.embedded and shutil.which("pg_receivewal"):
            major = _major_of(on_path, dict(os.environ))
            if major >= server_major:
                return cls(os.path.dirname(on_path), dsn, {**os.environ, **secret})
            tried.append(f"{on_path} is of version {major}")
        folder = installation() / "bin"
        major = _major_of(str(folder / "pg_basebackup"), client_environment())
        if major >= server_major:
            return cls(str(folder), dsn, {**client_environment(), **secret})
        tried.append(f"the embedded ones are of version {major}")
        raise FailedPrecondition(
            f"the server is PostgreSQL {server_major}, and no pg_basebackup and pg_receivewal of that version or a newer one were found "
            f"({'; '.join(tried)}); install PostgreSQL's client programs of version {server_major} and put them on PATH"
        )

    @contextlib.contextmanager
    def run(self, program: str, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        """The program, its output to read. Raises Unavailable with what it said where it fails; it never outlives the block."""
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(  # noqa: S603
                [os.path.join(self.folder, program), "-d", self.dsn, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=self.environment,
            )
            try:
                yield process
                process.wait(RECEIVE_TIMEOUT_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                cast("IO[bytes]", process.stdout).close()
            if process.returncode != 0:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()[-STDERR_LINES:]
                raise Unavailable(f"{program} failed: {' / '.join(lines) or f'exit code {process.returncode}'}")


def _major_of(program: str, environment: dict[str, str]) -> int:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    found = _VERSION.search(done.stdout)
    return int(found.group(1)) if found else 0


def _without_password(dsn: str) -> tuple[str, str]:
    """What stands in a command line shows in `ps`."""
    parts = urlsplit(dsn)
    if parts.password is None:
        return dsn, ""
    credentials, _, place = parts.netloc.rpartition("@")
    user = credentials.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}@{place}")), unquote(parts.password)


async def _segment_bytes(connection: Any) -> int:
    return int(await connection.fetchval("SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'"))


def _lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def _lsn_text(value: int) -> str:
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"


def _number_of(name: str, segment_bytes: int) -> int:
    return int(name[8:16], 16) * (_XLOG_ID_BYTES // segment_bytes) + int(name[16:24], 16)


def _segment_name(postgres: PostgresBackup, number: int) -> str:
    per_id = _XLOG_ID_BYTES // postgres.wal_segment_bytes
    return f"{postgres.timeline:08X}{number // per_id:08X}{number % per_id:08X}"
