"""Risk: a backup is taken for one and is none: interrupted, with a hole in the log, of another server, or removed while it is the last.
`ducat backup` over a real PostgreSQL and real shards, without the platform (tests/e2e/test_backup.py has it all)."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import asyncpg
import pytest

from kernel.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from kernel.ids import account_id, uuid7
from ops.__main__ import main
from runtime.backup import FolderStore, read_manifest
from runtime.embedded import EmbeddedPostgres
from runtime.migrations import migrate_all
from runtime.unfinished import check_finished
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardHostConfig, WalletHost

FEES, SELLER = account_id("fees/USD"), account_id("seller/A/USD")


class System:
    """What is backed up: a data folder with shards in it, and a server with a table of ours."""

    def __init__(self, folder: Path, server: EmbeddedPostgres) -> None:
        self.data_dir, self.store = folder / "live", folder / "store"
        self.server = server
        self.wallet = ShardHostConfig(self.data_dir / "wallet", shard_count=2, segment_bytes=1 << 20, reserve_bytes=0)

    def note(self, text: str) -> str:
        """A row, committed; the server's time just after."""

        async def go() -> str:
            connection = await asyncpg.connect(self.server.dsn)
            try:
                await connection.execute("INSERT INTO note VALUES ($1)", text)
                found: datetime = await connection.fetchval("SELECT clock_timestamp()")
                await connection.execute("SELECT pg_sleep(0.01)")
                return found.astimezone(UTC).isoformat()
            finally:
                await connection.close()

        return asyncio.run(go())

    def query(self, statement: str, dsn: str = "") -> Any:
        async def go() -> Any:
            connection = await asyncpg.connect(dsn or self.server.dsn)
            try:
                return [row[0] for row in await connection.fetch(statement)]
            finally:
                await connection.close()

        return asyncio.run(go())

    def pay(self, count: int) -> None:
        async def go() -> None:
            host = await WalletHost.open(self.wallet)
            try:
                await host.create_accounts([AccountRow(FEES, "USD", 12), AccountRow(SELLER, "USD")])
                rows = [
                    TransferRow(uuid7(time.time_ns() // 10**6, os.urandom(10)), FEES, SELLER, 1) for _ in range(count)
                ]
                await host.transfers(rows)
            finally:
                await host.close()

        asyncio.run(go())

    def slots(self) -> list[str]:
        found: list[str] = self.query("SELECT slot_name FROM pg_replication_slots ORDER BY 1")
        return found


@pytest.fixture(scope="module")
def migrated(postgres_server: EmbeddedPostgres) -> None:
    """The database that embedded servers have, with every room's tables."""
    asyncio.run(migrate_all(postgres_server.dsn))


@pytest.fixture
def system(
    tmp_path: Path, postgres_server: EmbeddedPostgres, migrated: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[System]:
    monkeypatch.chdir(tmp_path)
    found = System(tmp_path, postgres_server)
    monkeypatch.setenv("DUCAT_DATA_DIR", str(found.data_dir))
    monkeypatch.setenv("DUCAT_DATABASE_URL", postgres_server.dsn)
    monkeypatch.setenv("DUCAT_BACKUP_TARGET", str(found.store))
    found.query("CREATE TABLE IF NOT EXISTS note (text text)")
    found.query("TRUNCATE note")
    found.pay(3)
    yield found
    found.query("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def backup(*words: str) -> int:
    return main(["backup", *words])


def record(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_every_moment_from_the_backup_to_its_last_extension(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system.note("before")
    assert backup("create", "--name", "one") == 0
    times = [(["before"], record_time(system, "one"))]
    system.pay(5)
    times.append((["before", "first"], system.note("first")))
    assert backup("extend") == 0
    times.append((["before", "first", "second"], system.note("second")))
    system.note("third")
    system.pay(7)
    assert backup("extend", "--json") == 0
    said = record(capsys)
    assert said["name"] == "one"
    assert said["seconds"] > 0
    times.append((["before", "first", "second", "third"], said["restorable_to"]))
    system.note("never backed up")
    assert backup("verify") == 0
    for number in (1, 3):
        notes, moment = times[number]
        target = tmp_path / f"target-{number}"
        as_embedded(system, "one")
        assert backup("restore", "--to", str(target), "--at", moment, "--no-check", "--json") == 0
        cuts = record(capsys)["cuts"]
        server = EmbeddedPostgres(target / "postgres", is_durable=False)
        dsn = server.start()
        try:
            assert system.query("SELECT text FROM note", dsn) == notes
            assert system.query("SELECT pg_is_in_recovery()", dsn) == [False]
            assert "recovery_target" not in (server.data / "postgresql.auto.conf").read_text()
        finally:
            server.stop()
        assert balance(target) == {1: 8, 3: 15}[number], cuts
    assert (tmp_path / "target-1").stat().st_mode & 0o777 == 0o700
    with pytest.raises(FailedPrecondition, match="is not empty"):
        run("restore", "--to", str(target))


def record_time(system: System, name: str) -> str:
    from runtime.backup import time_text

    return time_text(read_manifest(FolderStore(system.store), name).last_time_ns)


def as_embedded(system: System, name: str) -> None:
    """The tests' server is reached by its URL, as a server of one's own would be; its backup can be restored as an embedded one's."""
    from runtime.backup import write_manifest

    found = read_manifest(FolderStore(system.store), name)
    found.postgres.embedded = True
    write_manifest(FolderStore(system.store), found)


def balance(data_dir: Path) -> int:
    async def go() -> int:
        config = ShardHostConfig(data_dir / "wallet", shard_count=2, segment_bytes=1 << 20, reserve_bytes=0)
        host = await WalletHost.open(config)
        try:
            for _ in range(200):
                found = (await host.accounts([SELLER]))[0]
                totals = await host.totals()
                if all(one.in_flight == 0 for one in totals):
                    break
                await asyncio.sleep(0.02)
            assert sum(one.balance for one in totals) == 0
            return found.balance if found else 0
        finally:
            await host.close()

    return asyncio.run(go())


def run(*words: str) -> int:
    """As `backup`, but errors come through."""
    import argparse

    from ops.backup import add_parser

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["backup", *words])
    code: int = args.run(args)
    return code


class Interrupted(Exception):
    """What happens in the middle."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The next object whose name has these words is not stored; nothing is cleaned up afterwards, as after a SIGKILL."""
    put, delete = FolderStore.put, FolderStore.delete

    def at(words: str) -> None:
        def failing(self: FolderStore, name: str, source: BinaryIO) -> None:
            if words in name:
                monkeypatch.setattr(FolderStore, "put", put)
                monkeypatch.setattr(FolderStore, "delete", lambda self, names: None)
                raise Interrupted(name)
            put(self, name, source)

        monkeypatch.setattr(FolderStore, "delete", delete)
        monkeypatch.setattr(FolderStore, "put", failing)

    return at


@pytest.mark.parametrize("where", ["base.tar", "manifest.json"])
def test_an_interrupted_backup_is_never_one(
    system: System,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[[str], None],
    where: str,
) -> None:
    delete = FolderStore.delete
    interrupt(where)
    with pytest.raises(Interrupted):
        run("create", "--name", "half")
    monkeypatch.setattr(FolderStore, "delete", delete)
    assert system.slots() == []  # no log is kept for it
    for words in (["verify"], ["restore", "--to", "x"], ["extend"], ["verify", "--name", "half"]):
        with pytest.raises(NotFound, match="no finished backup"):
            run(*words)
    assert run("list") == 0
    if FolderStore(system.store).objects():
        assert "half  interrupted" in capsys.readouterr().out
        with pytest.raises(InvalidArgument, match="choose another"):
            run("create", "--name", "half")
        assert run("prune", "--keep", "1") == 0  # too young: it may still be under way
        assert FolderStore(system.store).objects()
        assert run("prune", "--keep", "1", "--interrupted-after", "0") == 0
    assert FolderStore(system.store).objects() == []


def test_an_interrupted_extension_leaves_what_was(
    system: System,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[[str], None],
) -> None:
    delete = FolderStore.delete
    assert run("create", "--name", "one") == 0
    before = read_manifest(FolderStore(system.store), "one")
    for where in ("shard-0001", "wal/", "manifest.json"):
        system.pay(4)
        interrupt(where)
        with pytest.raises(Interrupted):
            run("extend")
        monkeypatch.setattr(FolderStore, "delete", delete)
        assert read_manifest(FolderStore(system.store), "one") == before
        assert run("verify", "--quick") == 0
    assert run("extend") == 0  # and again, from where it was
    assert run("verify") == 0
    assert run("prune", "--keep", "1", "--interrupted-after", "0") == 0
    assert run("verify", "--quick") == 0
    after = read_manifest(FolderStore(system.store), "one")
    named = {part.object for file in after.files() for part in file.parts} | {"one/manifest.json"}
    assert {one.name for one in FolderStore(system.store).objects()} == named


def test_damage_is_found_by_name(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("create", "--name", "one") == 0
    found = read_manifest(FolderStore(system.store), "one")
    for file in (found.postgres.base, found.postgres.wal[0], found.shards[0].files[0]):
        path = system.store / file.parts[0].object
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
        capsys.readouterr()
        assert run("verify", *([] if file is found.postgres.base else ["--quick"])) == 1
        assert file.parts[0].object in capsys.readouterr().out
        path.write_bytes(good[:-1])  # what is missing is seen without reading it
        assert run("list") == 1
        assert f"NOT GOOD: {file.parts[0].object}" in capsys.readouterr().out
        with pytest.raises(NotFound, match="no finished backup that is whole"):
            run("restore", "--to", "x")
        path.write_bytes(good)
    assert run("list") == 0
    lines = (system.store / "one" / "manifest.json").read_text()
    (system.store / "one" / "manifest.json").write_text(lines.replace('"next_segment":', '"next_segment":1'))
    assert run("list") == 1


def test_the_last_good_one_stays(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert run("create", "--name", name) == 0
    assert system.slots() == ["ducat_backup_two"]
    with pytest.raises(FailedPrecondition, match="its replication slot is gone"):
        run("extend", "--name", "one")
    assert run("prune", "--older-than", "1") == 0
    assert "nothing to remove" in capsys.readouterr().out
    found = read_manifest(FolderStore(system.store), "two")
    (
        system.store / found.postgres.wal[0].parts[0].object
    ).unlink()  # the newer one is not good: the older one is the last
    assert run("prune", "--older-than", "0.0000001") == 0
    assert run("prune", "--keep", "1") == 0
    assert run("verify", "--name", "one", "--quick") == 0
    assert run("create", "--name", "three") == 0
    capsys.readouterr()
    assert run("prune", "--keep", "1", "--dry-run", "--json") == 0
    assert record(capsys) == {
        "name": "one",
        "why": "old",
        "objects": len(FolderStore(system.store).objects("one/")),
        "removed": False,
    }
    assert run("prune", "--keep", "1") == 0
    assert {one.name.partition("/")[0] for one in FolderStore(system.store).objects()} == {"two", "three"}
    for words in (["prune"], ["prune", "--keep", "1", "--older-than", "1"], ["prune", "--keep", "-1"]):
        assert run(*words) == 2


def test_what_cannot_be_is_said(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("create", "--name", "one") == 0
    for at, words in (
        ("2001-01-01T00:00:00Z", "no backup in .* holds 2001"),
        ("2101-01-01T00:00:00Z", "no backup in .* holds 2101"),
    ):
        with pytest.raises(NotFound, match=words):
            run("restore", "--to", str(tmp_path / "x"), "--at", at)
        with pytest.raises(FailedPrecondition, match="does not hold"):
            run("restore", "--to", str(tmp_path / "x"), "--at", at, "--name", "one")
    with pytest.raises(InvalidArgument, match="expected a time such as"):
        run("restore", "--to", str(tmp_path / "x"), "--at", "noon")
    with pytest.raises(InvalidArgument, match="letters, digits"):
        run("create", "--name", "a/b")
    with pytest.raises(InvalidArgument, match="choose another"):
        run("create", "--name", "one")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(FailedPrecondition, match="no folder can be made there"):
            run("restore", "--to", str(target))
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("DUCAT_WALLET_SHARD_COUNT", "3")
    with pytest.raises(FailedPrecondition, match="is of 2 shards, 3 are configured"):
        run("extend")
    monkeypatch.setenv("DUCAT_DATABASE_URL", "")
    with pytest.raises(Unavailable, match="no PostgreSQL runs on the data folder"):
        run("create")


def test_a_shard_that_is_not_here_is_told(system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = system.data_dir / "wallet" / "shard-0001"
    assert run("create", "--name", "whole") == 0
    gone.rename(tmp_path / "unmounted")
    with pytest.raises(FailedPrecondition, match="the folders of shards 1 are gone"):
        run("extend")
    assert run("create", "--name", "part") == 1
    assert "NOT WHOLE: shards 1" in capsys.readouterr().err
    with pytest.raises(FailedPrecondition, match="NOT WHOLE: shards 1"):
        run("restore", "--name", "part", "--to", str(tmp_path / "x"))
    assert run("list") == 1


def test_a_server_of_ones_own_is_laid_out(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system.note("before")
    assert run("create", "--name", "one") == 0
    capsys.readouterr()
    target = tmp_path / "target"
    assert run("restore", "--to", str(target)) == 0
    said = capsys.readouterr().out
    assert "start the server on it" in said
    assert "--wallet-only" in said
    assert (target / "postgres" / "data" / "recovery.signal").exists()
    assert "recovery_target_name" in (target / "postgres" / "data" / "postgresql.auto.conf").read_text()
    assert not (target / "wallet").exists()
    for words in (["up"], ["backup", "create"], ["wallet", "accept", "--shard", "0"]):  # on what is not whole yet
        monkeypatch.setenv("DUCAT_DATA_DIR", str(target))
        assert main(words) == 1
        assert "is half a data folder: a restore of backup one began" in capsys.readouterr().err
    assert run("restore", "--to", str(target), "--wallet-only") == 0  # beside the server of database_url
    check_finished(target)
    assert balance(target) == 3


def test_one_backup_at_a_time(system: System) -> None:
    async def go() -> None:
        connection = await asyncpg.connect(system.server.dsn)
        try:
            await connection.fetchval("SELECT pg_advisory_lock(hashtext('ducat backup'))")
            with pytest.raises(FailedPrecondition, match="another `ducat backup` works"):
                await asyncio.to_thread(run, "create")
        finally:
            await connection.close()

    asyncio.run(go())
    assert not system.store.exists()
