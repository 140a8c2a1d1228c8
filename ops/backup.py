"""`ducat backup …`: copies of a running system, and the way back.

    create      a full copy: PostgreSQL, its log, the wallet's shards
    extend      what came since then into the same copy: every moment in between can be restored
    list        what there is, and which moments each can restore
    verify      read it all back: checksums, pg_verifybackup, frames and hash chains
    restore     into an empty folder, to the end or to a time; then check that wallet, ledger and payment agree
    prune       remove old ones and what interrupted ones left, never the last good one

Order is what makes the parts agree (docs/backup.md, What agrees, and why):

    marks of the shards ─ restore point in PostgreSQL's log ─ marks again ─ copy the shards up to these ─ copy the log
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from ops.check import DIFFERS, EXIT_CODES, OK, Verdict, lines_of, record_of, run_checks, verdict_of
from ops.terminal import printable
from runtime.backup import (
    MANIFEST,
    Backup,
    BackupDamaged,
    ObjectInfo,
    Point,
    ShardBackup,
    Store,
    open_store,
    read_manifest,
    time_text,
    verify_part,
    write_manifest,
)
from runtime.embedded import EmbeddedPostgres, ServerFailed
from runtime.private_folder import close_folder
from runtime.settings import Settings
from runtime.unfinished import check_finished, mark_finished, mark_unfinished

if TYPE_CHECKING:
    from runtime.backup.postgres import SourceServer
    from wallet_core.adapters.backup import Mark
    from wallet_core.shard.port import ShardHostConfig

__all__ = ["add_parser", "run"]

LOCK = "hashtext('ducat backup')"
"""Of the database: one backup at a time."""
INTERRUPTED_AFTER_H = 24.0
RECOVERY_TIMEOUT_S = 6 * 3600.0
"""Until PostgreSQL has replayed its log."""
START_TRIES_MAX = 3
SETTLE_TIMEOUT_S = 120.0
"""Until what is restored has applied what it had not yet."""
EMPTY_SEGMENT_BYTES = 1024 * 1024
_NS = 1_000_000_000


def add_parser(subparsers: Any) -> None:
    """`ducat backup` and its sub-commands."""
    parser = subparsers.add_parser("backup", help="copy a running system, and restore it")
    commands = parser.add_subparsers(dest="backup_command", required=True, metavar="COMMAND")

    def add(name: str, text: str, place: str, about: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            place,
            dest="store",
            metavar="PLACE",
            default="",
            help=f"{about}: a folder, or s3://bucket/prefix (default: backup_target of the settings)",
        )
        command.add_argument("--json", action="store_true", help="one JSON object")
        return command

    for name, text in (
        ("create", "copy the running system"),
        ("extend", "add to a backup what came since: any moment in between can then be restored"),
    ):
        command = add(name, text, "--to", "where backups are kept")
        command.add_argument(
            "--data-dir", default="", help="data folder of the running system (default: the settings')"
        )
        what = "name of the new backup (default: the time)" if name == "create" else "which (default: the newest)"
        command.add_argument("--name", default="", help=what)
    add("list", "show what there is", "--from", "where backups are kept")
    verify = add("verify", "read a backup and check all of it", "--from", "where backups are kept")
    verify.add_argument("--name", default="", help="which (default: the newest)")
    verify.add_argument("--quick", action="store_true", help="only sizes and checksums; needs no room on this disk")
    restore = add("restore", "restore into an empty folder", "--from", "where backups are kept")
    restore.add_argument("--to", dest="target", type=Path, required=True, help="data folder to make")
    restore.add_argument("--name", default="", help="which (default: the newest that reaches the time)")
    restore.add_argument("--at", default="", metavar="TIME", help="such as 2026-01-31T12:00:00Z (default: the end)")
    restore.add_argument(
        "--no-check", action="store_true", help="do not start it to compare wallet, ledger and payment"
    )
    restore.add_argument(
        "--wallet-only",
        action="store_true",
        help="only the wallet, to what database_url of the settings holds (a PostgreSQL of your own, restored before)",
    )
    prune = add("prune", "remove old backups, never the last good one", "--from", "where backups are kept")
    prune.add_argument("--keep", type=int, default=0, metavar="N", help="keep the newest N good ones")
    prune.add_argument(
        "--older-than", type=float, default=0.0, metavar="DAYS", help="remove those that end before that"
    )
    prune.add_argument(
        "--interrupted-after",
        type=float,
        default=INTERRUPTED_AFTER_H,
        metavar="HOURS",
        help=f"what an interrupted backup left is removed when it is so old (default {INTERRUPTED_AFTER_H:g})",
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command: 0 done, 1 failed or not all is well, 2 wrong use. Raises DucatError."""
    settings = Settings.load()
    store = open_store(settings, args.store)
    return asyncio.run(_COMMANDS[args.backup_command](_Session(args, settings, store)))


@dataclass
class _Session:
    """One command."""

    args: argparse.Namespace
    settings: Settings
    store: Store
    began: float = field(default_factory=time.monotonic)

    def step(self, text: str) -> None:
        """What goes on, for people."""
        print(f"{time.monotonic() - self.began:7.1f} s  {printable(text)}", file=sys.stderr, flush=True)

    def show(self, record: dict[str, Any], text: str) -> None:
        print(json.dumps(record) if self.args.json else printable(text, keep="\n"), flush=True)

    @property
    def data_dir(self) -> Path:
        return Path(self.args.data_dir or self.settings.data_dir).absolute()


# --- create, extend


async def _create(session: _Session) -> int:
    from runtime.backup.manifest import NAME
    from runtime.backup.postgres import drop_slot, store_base

    name = session.args.name or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"--name: letters, digits, '.', '_' and '-', at most 100, got {name!r}")
    if session.store.objects(f"{name}/"):
        raise InvalidArgument(
            f"--name: {session.store.place} has a backup {name!r} or what is left of one; choose another"
        )
    config = _wallet_config(session)
    async with _source(session) as (source, connection):
        try:
            session.step("PostgreSQL: base backup")
            postgres = await store_base(session.store, name, source, connection)
            backup = Backup(
                name=name,
                create_time_ns=time.time_ns(),
                extend_time_ns=0,
                shard_count=config.shard_count,
                wallet_log=session.settings.wallet_log,
                postgres=postgres,
            )
            await _add(session, backup, config, source, connection)
        except BaseException:
            with _quiet():
                await drop_slot(connection, _slot_of(name))
            with _quiet():
                session.store.delete([one.name for one in session.store.objects(f"{name}/")])
            raise
        for other in _names(session.store.objects()):  # the log is kept for the newest alone
            if other != name:
                await drop_slot(connection, _slot_of(other))
    return _report(session, backup)


async def _extend(session: _Session) -> int:
    from runtime.backup.postgres import check_same_server

    backup = _find(session.store, session.args.name)
    config = _wallet_config(session)
    if config.shard_count != backup.shard_count:
        raise FailedPrecondition(
            f"backup {backup.name} is of {backup.shard_count} shards, {config.shard_count} are configured"
        )
    async with _source(session) as (source, connection):
        await check_same_server(connection, backup)
        await _add(session, backup, config, source, connection)
    return _report(session, backup)


async def _add(
    session: _Session, backup: Backup, config: ShardHostConfig, source: SourceServer, connection: Any
) -> None:
    """Brings the backup up to now; from the replaced manifest on, it holds it."""
    from runtime.backup.postgres import add_wal, make_restore_point, release_wal
    from wallet_core.adapters.backup import read_marks

    before, _ = read_marks(config)
    point_name = f"{backup.name}.{len(backup.points)}"[-63:]
    time_ns, lsn = await make_restore_point(connection, point_name)
    after, missing = read_marks(config)
    _check_present(backup, missing)
    await asyncio.to_thread(_add_shards, session, backup, config, before, after)
    session.step("PostgreSQL: its log")
    await add_wal(session.store, backup, source, connection)
    positions = {str(shard): mark.sequence for shard, mark in before.items()}
    backup.points.append(Point(point_name, time_ns, lsn, positions))
    backup.missing_shards = missing
    backup.extend_time_ns = time.time_ns()
    write_manifest(session.store, backup)
    await release_wal(connection, backup)


def _check_present(backup: Backup, missing: list[int]) -> None:
    gone = sorted(set(missing) & {shard.shard for shard in backup.shards})
    if gone:
        raise FailedPrecondition(
            f"the folders of shards {', '.join(map(str, gone))} are gone, which backup {backup.name} holds; mount the disk first"
        )


def _add_shards(
    session: _Session, backup: Backup, config: ShardHostConfig, before: dict[int, Mark], after: dict[int, Mark]
) -> None:
    from wallet_core.adapters.backup import store_shard

    copied = {shard.shard: shard for shard in backup.shards}
    for shard, mark in after.items():
        if shard not in copied and backup.points:
            raise FailedPrecondition(
                f"shard {shard} is not in backup {backup.name}; make a new one: `ducat backup create`"
            )
        one = copied.get(shard) or ShardBackup(shard, 0, 0, 0, 0, "")
        session.step(f"wallet: shard {shard} up to event {mark.sequence}")
        upto = before[shard].sequence if shard in before else 0
        store_shard(session.store, backup.name, config, one, mark, upto)
        copied[shard] = one
    backup.shards = [copied[shard] for shard in sorted(copied)]


def _report(session: _Session, backup: Backup) -> int:
    record = {**_record(backup), "seconds": round(time.monotonic() - session.began, 2)}
    session.show(record, f"{backup.name}: {_summary(backup)}, in {record['seconds']} s")
    if backup.missing_shards:
        print(_missing_text(backup), file=sys.stderr)
        return 1
    return 0


def _missing_text(backup: Backup) -> str:
    shards = ", ".join(map(str, backup.missing_shards))
    return (
        f"NOT WHOLE: shards {shards} are not in backup {backup.name}, their folders are not on this machine. Mount them below "
        "data_dir/wallet, or run the backup where all shards are (docs/backup.md, Limits)"
    )


def _wallet_config(session: _Session) -> ShardHostConfig:
    from wallet_core.bootstrap import host_config

    return replace(host_config(session.settings), data_dir=session.data_dir / "wallet")


def _slot_of(name: str) -> str:
    from runtime.backup.postgres import slot_name

    return slot_name(name)


class _quiet:  # noqa: N801 - reads like contextlib.suppress
    """What goes wrong while one cleans up hides nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, Exception):
            print(f"cleaning up: {error}", file=sys.stderr)
            return True
        return False


@asynccontextmanager
async def _source(session: _Session) -> AsyncIterator[tuple[SourceServer, Any]]:
    """The system's PostgreSQL, with the lock that one backup at a time holds."""
    from runtime.backup.postgres import SourceServer

    check_finished(session.data_dir)
    dsn = session.settings.database_url
    if not dsn:
        dsn = EmbeddedPostgres(session.data_dir / "postgres").running_dsn()
        if not dsn:
            raise Unavailable(
                f"no PostgreSQL runs on the data folder {session.data_dir}; start `ducat up`, or set DUCAT_DATA_DIR (--data-dir) or "
                "DUCAT_DATABASE_URL to where it runs"
            )
    source = SourceServer(dsn, embedded=not session.settings.database_url)
    connection = await source.connect()
    try:
        if not await connection.fetchval(f"SELECT pg_try_advisory_lock({LOCK})"):
            raise FailedPrecondition("another `ducat backup` works on this system; wait until it has ended")
        yield source, connection
    finally:
        await connection.close()


# --- list, verify, prune


def _names(objects: list[ObjectInfo]) -> dict[str, list[ObjectInfo]]:
    """Name of each backup, finished or not → its objects."""
    found: dict[str, list[ObjectInfo]] = {}
    for one in objects:
        name, slash, _ = one.name.partition("/")
        if slash:
            found.setdefault(name, []).append(one)
    return found


@dataclass
class _Found:
    """What lies under one name. Without `backup`: interrupted (`problem` is empty), or damaged."""

    name: str
    objects: list[ObjectInfo]
    backup: Backup | None = None
    problem: str = ""

    @property
    def is_good(self) -> bool:
        return self.backup is not None and not self.problem


def _look(store: Store) -> list[_Found]:
    """Everything in the store, oldest first. Every object that a manifest names must be there with its size."""
    found = []
    for name, objects in _names(store.objects()).items():
        one = _Found(name, objects)
        if any(each.name == f"{name}/{MANIFEST}" for each in objects):
            try:
                one.backup = read_manifest(store, name)
            except (BackupDamaged, NotFound) as error:
                one.problem = str(error)
            else:
                one.problem = _missing_object(one.backup, objects)
        found.append(one)
    return sorted(found, key=lambda one: (one.backup.last_time_ns if one.backup else 0, one.name))


def _missing_object(backup: Backup, objects: list[ObjectInfo]) -> str:
    sizes = {one.name: one.size for one in objects}
    for file in backup.files():
        for part in file.parts:
            if sizes.get(part.object) != part.size:
                return f"{part.object}: {sizes.get(part.object, 'nothing')} bytes are there, {part.size} were written"
    return _missing_text(backup) if backup.missing_shards else ""


def _find(store: Store, name: str, time_ns: int = 0) -> Backup:
    """The named one, else the newest good one (that holds the time). Raises NotFound."""
    if name:
        return read_manifest(store, name)
    good = [one.backup for one in _look(store) if one.backup is not None and one.is_good]
    if not good:
        raise NotFound(f"{store.place} has no finished backup that is whole; `ducat backup list` shows what there is")
    if not time_ns:
        return good[-1]
    for one in reversed(good):
        if one.first_time_ns <= time_ns <= one.last_time_ns:
            return one
    raise NotFound(
        f"no backup in {store.place} holds {time_text(time_ns)}; `ducat backup list` shows what each can restore"
    )


def _record(backup: Backup) -> dict[str, Any]:
    return {
        "name": backup.name,
        "create_time": time_text(backup.create_time_ns),
        "extend_time": time_text(backup.extend_time_ns),
        "restorable_from": time_text(backup.first_time_ns),
        "restorable_to": time_text(backup.last_time_ns),
        "size_bytes": backup.size,
        "wal_segments": len(backup.postgres.wal),
        "shards": {str(shard.shard): shard.sequence for shard in backup.shards},
        "missing_shards": backup.missing_shards,
    }


def _summary(backup: Backup) -> str:
    return (
        f"restorable from {time_text(backup.first_time_ns)} to {time_text(backup.last_time_ns)}, "
        f"{backup.size / 2**20:,.1f} MiB, {len(backup.shards)} shards"
    )


async def _list(session: _Session) -> int:
    code = 0
    found = list(_look(session.store))
    if not found and not session.args.json:
        print(f"no backups in {session.store.place}")
    for one in found:
        if one.backup is not None:
            record = {**_record(one.backup), "state": "damaged" if one.problem else "good", "problem": one.problem}
            text = f"{one.name}  {_summary(one.backup)}"
        else:
            state = "damaged" if one.problem else "interrupted"
            size = sum(each.size for each in one.objects)
            record = {"name": one.name, "state": state, "size_bytes": size, "problem": one.problem}
            text = f"{one.name}  {state}, {size / 2**20:,.1f} MiB; `ducat backup prune` removes what is left of it"
        if one.problem:
            text += f"\n    NOT GOOD: {one.problem}"
            code = 1
        session.show(record, text)
    return code


async def _verify(session: _Session) -> int:
    backup = _find(session.store, session.args.name)
    problems = await asyncio.to_thread(_problems, session, backup)
    record = {"name": backup.name, "ok": not problems, "problems": problems, "size_bytes": backup.size}
    text = f"{backup.name}: every file reads back, {_summary(backup)}"
    session.show(record, text if not problems else "\n".join(f"{backup.name}: NOT GOOD: {one}" for one in problems))
    return 1 if problems else 0


def _problems(session: _Session, backup: Backup) -> list[str]:
    from runtime.backup.postgres import missing_wal, verify_base
    from wallet_core.adapters.backup import lay_shard, verify_shard

    store, problems = session.store, []

    def note(look: Callable[[], str]) -> None:
        try:
            problem = look()
        except (BackupDamaged, NotFound) as error:
            problem = str(error)
        if problem:
            problems.append(problem)

    def stored(parts: list[Any]) -> str:
        for part in parts:
            verify_part(store, part)
        return ""

    if backup.missing_shards:
        problems.append(_missing_text(backup))
    note(lambda: missing_wal(backup.postgres))
    for file in backup.postgres.wal:
        note(lambda file=file: stored(file.parts))  # type: ignore[misc]
    if session.args.quick:
        for file in (backup.postgres.base, *(file for shard in backup.shards for file in shard.files)):
            note(lambda file=file: stored(file.parts))  # type: ignore[misc]
        return problems
    session.step("PostgreSQL: base backup")
    with tempfile.TemporaryDirectory(prefix="ducat-verify-") as folder:
        note(lambda: verify_base(store, backup.postgres, Path(folder) / "data"))
    for shard in backup.shards:
        session.step(f"wallet: shard {shard.shard}")
        with tempfile.TemporaryDirectory(prefix="ducat-verify-") as folder:

            def look(shard: ShardBackup = shard, at: Path = Path(folder)) -> str:
                lay_shard(store, shard, at)
                return verify_shard(shard, at)

            note(look)
    return problems


async def _prune(session: _Session) -> int:
    args = session.args
    if (args.keep < 1) == (args.older_than <= 0):
        print("backup prune: give --keep N (at least 1) or --older-than DAYS", file=sys.stderr)
        return 2
    found = _look(session.store)
    good = [one for one in found if one.is_good]
    limit_ns = time.time_ns() - int(args.older_than * 86_400 * _NS)
    old = good[: -args.keep] if args.keep else [one for one in good[:-1] if _ended(one) < limit_ns]
    interrupted = time.time() - args.interrupted_after * 3600
    doomed: list[tuple[str, str, list[str]]] = []
    for one in found:
        names = [each.name for each in one.objects]
        if one in old:
            doomed.append((one.name, "old", names))
        elif one.backup is None and not one.problem and max(each.time for each in one.objects) < interrupted:
            doomed.append((one.name, "interrupted", names))
        elif one.backup is not None:
            wanted = {part.object for file in one.backup.files() for part in file.parts} | {f"{one.name}/{MANIFEST}"}
            left = [each.name for each in one.objects if each.name not in wanted and each.time < interrupted]
            if left:
                doomed.append((one.name, "left by an interrupted extension", left))
    for name, why, names in doomed:
        if not args.dry_run:
            manifest = f"{name}/{MANIFEST}"
            if manifest in names:  # first: without it nobody takes the rest for a backup
                session.store.delete([manifest])
            session.store.delete(names)
            if why != "left by an interrupted extension":
                await _let_go(session, name)
        session.show(
            {"name": name, "why": why, "objects": len(names), "removed": not args.dry_run},
            f"{'would remove' if args.dry_run else 'removed'} {name} ({why}, {len(names)} objects)",
        )
    if not doomed and not args.json:
        print("nothing to remove")
    return 0


def _ended(one: _Found) -> int:
    assert one.backup is not None
    return one.backup.last_time_ns


async def _let_go(session: _Session, name: str) -> None:
    """PostgreSQL need keep no log for it any more, where it can be told so."""
    from runtime.backup.postgres import SourceServer, drop_slot

    session.args.data_dir = getattr(session.args, "data_dir", "")
    dsn = session.settings.database_url or EmbeddedPostgres(session.data_dir / "postgres").running_dsn()
    if not dsn:
        return
    with _quiet():
        connection = await SourceServer(dsn, embedded=False).connect()
        try:
            await drop_slot(connection, _slot_of(name))
        finally:
            await connection.close()


# --- restore


async def _restore(session: _Session) -> int:
    args = session.args
    time_ns = _moment(args.at) if args.at else 0
    backup = _find(session.store, args.name, time_ns)
    point, recovery = _target(backup, time_ns)
    if backup.missing_shards:
        raise FailedPrecondition(_missing_text(backup))
    target: Path = args.target.absolute()
    steps = _Restore(session, backup, target, point, time_ns or backup.last_time_ns)
    if args.wallet_only:
        await steps.wallet_beside_own_server()
    else:
        await asyncio.to_thread(steps.lay_postgres, recovery)
        if not backup.postgres.embedded:
            print(_own_server_text(session, backup, target), flush=True)
            return 0
        await steps.recover_all()
    record: dict[str, Any] = {
        "name": backup.name,
        "to": str(target),
        "time": time_text(steps.time_ns),
        "cuts": {str(shard): sequence for shard, sequence in steps.cuts.items()},
        "seconds": round(time.monotonic() - session.began, 2),
    }
    found: list[Verdict] = []
    if not args.no_check and not args.wallet_only:
        found = await steps.check()
        record["checks"] = record_of(found)
        record["seconds_with_checks"] = round(time.monotonic() - session.began, 2)
    verdict = verdict_of(found)
    record |= {"ok": verdict == OK, "verdict": verdict}
    where = ", ".join(f"shard {shard} event {sequence}" for shard, sequence in steps.cuts.items())
    lines = [f"restored {backup.name} as of {record['time']} into {target} ({where}) in {record['seconds']} s"]
    lines += lines_of(found)
    if verdict != OK:
        lines.append("the checks failed: do not take payments on this folder (docs/backup.md, When a check fails)")
    elif not args.wallet_only:
        lines.append(f"start it: ducat up --data-dir {target}")
    session.show(record, "\n".join(lines))
    return EXIT_CODES[verdict]


def _moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(f"--at {text}: expected a time such as 2026-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        moment = moment.astimezone()
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _NS + since.microseconds * 1000


def _target(backup: Backup, time_ns: int) -> tuple[Point | None, dict[str, str]]:
    """The point to restore to exactly, where it is one, and what PostgreSQL is told. Raises FailedPrecondition for a
    time that the backup does not hold."""
    if not time_ns:
        time_ns = backup.last_time_ns
    if not backup.first_time_ns <= time_ns <= backup.last_time_ns:
        raise FailedPrecondition(f"backup {backup.name} does not hold {time_text(time_ns)}: {_summary(backup)}")
    for point in backup.points:
        if point.time_ns == time_ns:
            return point, {"recovery_target_name": point.name}
    moment = datetime.fromtimestamp(time_ns // _NS, UTC)
    text = f"{moment:%Y-%m-%d %H:%M:%S}.{time_ns % _NS // 1000:06}+00"
    return None, {"recovery_target_time": text}


def _own_server_text(session: _Session, backup: Backup, target: Path) -> str:
    at = f" --at {session.args.at}" if session.args.at else ""
    return "\n".join(
        [
            f"PostgreSQL's data folder lies in {target / 'postgres' / 'data'}, ready to recover. Now:",
            f"  1. Give it to the user of your PostgreSQL {backup.postgres.major}, start the server on it, and wait until it takes writes",
            "     (SELECT pg_is_in_recovery() is false).",
            "  2. Set DUCAT_DATABASE_URL to it, then restore the wallet to what it holds:",
            f"       ducat backup restore --from {session.store.place} --name {backup.name}{at} --to {target} --wallet-only",
            "  3. Start the platform with an empty Valkey (Redis) and run `ducat check`.",
        ]
    )


@dataclass
class _Restore:
    """The steps of a restore."""

    session: _Session
    backup: Backup
    target: Path
    point: Point | None
    time_ns: int
    cuts: dict[int, int] = field(default_factory=dict)

    def lay_postgres(self, recovery: dict[str, str]) -> None:
        from runtime.backup.postgres import lay_base, lay_wal, missing_wal, prepare_recovery

        if problem := missing_wal(self.backup.postgres):
            raise BackupDamaged(problem)
        try:
            if self.target.exists() and any(self.target.iterdir()):
                check_finished(self.target)
                raise FailedPrecondition(
                    f"{self.target} is not empty; choose another folder, nothing is ever written over"
                )
            self.target.mkdir(mode=0o700, parents=True, exist_ok=True)
            mark_unfinished(self.target, self._unfinished_text())
        except OSError as error:
            raise FailedPrecondition(f"--to {self.target}: no folder can be made there: {error.strerror}") from error
        data = self.target / "postgres" / "data"
        self.session.step("PostgreSQL: base backup")
        lay_base(self.session.store, self.backup.postgres, data)
        self.session.step(f"PostgreSQL: {len(self.backup.postgres.wal)} log segments")
        lay_wal(self.session.store, self.backup.postgres, data)
        prepare_recovery(data, recovery)

    def _unfinished_text(self) -> str:
        began = f"a restore of backup {self.backup.name} began in it at {time_text(time.time_ns())} and has not ended"
        if not self.backup.postgres.embedded:
            return f"{began}; `ducat backup restore … --wallet-only` does that (remove the folder's wallet/ first where it is there)"
        return f"{began}; if none runs any more, remove the folder and restore again"

    async def recover_all(self) -> None:
        """PostgreSQL recovers; then the wallet is restored to what it holds."""
        from runtime.backup.postgres import settle_recovered

        self.session.step("PostgreSQL: recover")
        server = EmbeddedPostgres(self.target / "postgres", start_timeout_s=RECOVERY_TIMEOUT_S)
        server.adopt_data()
        try:
            try:
                dsn = await asyncio.to_thread(server.start)
            except ServerFailed as error:
                raise FailedPrecondition(f"PostgreSQL does not recover from the backup: {error}") from error
            settle_recovered(server.data)
            await self._wallet(dsn, password=(server.folder / "password").read_text())
        finally:
            await asyncio.to_thread(server.stop)
        mark_finished(self.target)

    async def wallet_beside_own_server(self) -> None:
        dsn = self.session.settings.database_url
        if not dsn:
            raise InvalidArgument("--wallet-only needs database_url in the settings: the PostgreSQL that was restored")
        if (self.target / "wallet").exists():
            raise FailedPrecondition(
                f"{self.target / 'wallet'} is there already; if it is what an interrupted restore left, remove it, then try again"
            )
        close_folder(self.target)
        mark_unfinished(self.target, self._unfinished_text())
        await self._wallet(dsn)
        mark_finished(self.target)

    async def _wallet(self, dsn: str, password: str = "") -> None:
        import asyncpg

        connection = await asyncpg.connect(dsn)
        try:
            if await connection.fetchval("SELECT pg_is_in_recovery()"):
                raise FailedPrecondition("PostgreSQL still recovers; wait until it takes writes, then try again")
            if password:  # of the TCP port: a folder has its own
                user = await connection.fetchval("SELECT quote_ident(current_user)")
                await connection.execute(f"ALTER USER {user} PASSWORD '{password}'")
            seen = await _seen(connection)
            reports = await asyncio.to_thread(self._restore_shards, seen)
            await _rebind(connection, reports)
        finally:
            await connection.close()

    def _config(self) -> ShardHostConfig:
        from wallet_core.bootstrap import host_config

        config = host_config(self.session.settings)
        return replace(
            config,
            data_dir=self.target / "wallet",
            shard_count=self.backup.shard_count,
            shard_ids=tuple(range(self.backup.shard_count)),
            kafka=None,
        )

    def _restore_shards(self, seen: dict[int, int]) -> list[dict[str, Any]]:
        from wallet_core.adapters.backup import WantedCut, choose_cut, lay_shard
        from wallet_core.adapters.restore import END, Cut, restore_shard
        from wallet_core.event_log.file import make_folder
        from wallet_core.shard.port import shard_folder

        config = self._config()
        make_folder(config.data_dir)
        with tempfile.TemporaryDirectory(prefix=".restore-", dir=self.target) as made:
            folder = Path(made)
            for one in self.backup.shards:
                self.session.step(f"wallet: shard {one.shard}")
                lay_shard(self.session.store, one, folder)
            positions = self._positions()
            time_ns = 0 if self.point is not None else self.time_ns
            wanted = {
                one.shard: WantedCut(max(seen.get(one.shard, 0), positions.get(str(one.shard), 0)), time_ns)
                for one in self.backup.shards
            }
            self.cuts = choose_cut(replace(config, data_dir=folder), wanted)
            reports = []
            for shard, sequence in self.cuts.items():
                self.session.step(f"wallet: shard {shard} up to event {sequence}")
                if not sequence:
                    _empty_shard(shard_folder(folder, shard))
                cut = Cut(sequence) if sequence else END
                reports.append(restore_shard(config, folder, shard, dry_run=False, cut=cut, whole_log=True, move=True))
            return reports

    def _positions(self) -> dict[str, int]:
        """What the wallet held for certain: at the point, or at the last one before the time."""
        found: dict[str, int] = {}
        for point in self.backup.points:
            if point.time_ns <= self.time_ns:
                found = point.positions
        return found

    async def check(self) -> list[Verdict]:
        """What `ducat check` finds. Starts what is restored, by itself: no executor (it would call PSPs), no gateway, a bus of its own."""
        from ops.platform import Platform, ProcessFailed

        self.session.step("start it, to check")
        for tries in range(1, START_TRIES_MAX + 1):
            platform = Platform(self.target, env=_alone(self.backup))
            platform.names = [name for name in platform.names if name in ("wallet", "ledger", "payment")]
            try:
                await platform.start()
                break
            except ProcessFailed as error:
                # A port that was free when it was chosen: the next try has others.
                if "cannot listen on" not in str(error) or tries == START_TRIES_MAX:
                    return [Verdict("start", DIFFERS, f"what was restored does not start: {error}")]
        try:
            return await run_checks(platform.settings, wait_s=SETTLE_TIMEOUT_S, without=("executor",))
        finally:
            await platform.stop()


def _alone(backup: Backup) -> dict[str, str]:
    """Settings under which a restored folder meets nobody: neither the real servers nor the real processes."""
    from runtime.embedded import free_port
    from runtime.settings import PROCESSES

    environment = {name: value for name, value in os.environ.items() if name.startswith("DUCAT_")}
    for process in PROCESSES:
        address = f"127.0.0.1:{free_port()}"
        environment[f"DUCAT_{process.upper()}_LISTEN"] = address
        if f"{process}_address" in Settings.model_fields:
            environment[f"DUCAT_{process.upper()}_ADDRESS"] = address
        if f"metrics_listen_{process}" in Settings.model_fields:
            environment[f"DUCAT_METRICS_LISTEN_{process.upper()}"] = ""
    return environment | {
        "DUCAT_DATABASE_URL": "",
        "DUCAT_REDIS_URL": "",
        "DUCAT_BUS": "valkey",
        "DUCAT_WALLET_LOG": "file",
        "DUCAT_WALLET_SHARDS": "",
        "DUCAT_WALLET_PEERS": "",
        "DUCAT_WALLET_SHARD_COUNT": str(backup.shard_count),
        "DUCAT_WALLET_ALONE": "false",
        "DUCAT_OTEL_ENDPOINT": "",
        "DUCAT_FEED_CHECK_INTERVAL_S": "1",
    }


async def _seen(connection: Any) -> dict[int, int]:
    """The last event of each shard that PostgreSQL knows of."""
    seen: dict[int, int] = {}
    for table in ("wallet.projection", "wallet.shard"):
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", table):
            for row in await connection.fetch(f"SELECT shard, sequence_number FROM {table}"):  # noqa: S608
                seen[row["shard"]] = max(seen.get(row["shard"], 0), row["sequence_number"])
    return seen


async def _rebind(connection: Any, reports: list[dict[str, Any]]) -> None:
    """PostgreSQL learns which shards it has now, and where they end."""
    from wallet_core.adapters.presence import rebind

    for report in reports:
        await rebind(
            connection,
            report["shard"],
            identity=report["identity"],
            sequence=report["sequence_number"],
            time_ns=report["time_ns"],
        )


def _empty_shard(folder: Path) -> None:
    """A log without an event, whatever lies there."""
    from wallet_core.event_log.file import segment_file

    for path in (*folder.glob("log/*.seg"), *folder.glob("snapshots/*.snap")):
        path.unlink()
    segment_file(folder / "log", 1).write_bytes(bytes(EMPTY_SEGMENT_BYTES))


_COMMANDS: dict[str, Callable[[_Session], Coroutine[Any, Any, int]]] = {
    "create": _create,
    "extend": _extend,
    "list": _list,
    "verify": _verify,
    "restore": _restore,
    "prune": _prune,
}
