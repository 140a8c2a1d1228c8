"""Risk: a shard that is not where it was becomes a new, empty one, or another one, and money is acknowledged into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from host_fixtures import Driver, account, config, transfer_id

from wallet_core.adapters.accept import accept_shard, look_at
from wallet_core.event_log import LogDamaged
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import (
    DatabaseBehind,
    DataFileDamaged,
    KnownShard,
    Progress,
    ShardBehind,
    ShardForeign,
    ShardHostConfig,
    ShardMissing,
    ShardsMismatch,
    open_host,
)
from wallet_core.shard.identity import new_identity, read_identity, read_manifest, read_numbers, write_seen
from wallet_core.shard.port import shard_folder

COUNT = 2
Harm = Callable[[Path], None]


def settings(folder: Path, **options: object) -> ShardHostConfig:
    return config(folder, COUNT, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with accounts and transfers, closed cleanly."""
    driver = Driver(settings(tmp_path / "wallet"))
    driver.fund([account(n) for n in range(8)], 100, account(10**6))
    driver.host.close()
    return tmp_path / "wallet"


def known_of(folder: Path) -> dict[int, KnownShard]:
    """What PostgreSQL would know after a clean stop."""
    found = {}
    for shard in range(COUNT):
        own = read_identity(shard_folder(folder, shard))
        assert own is not None
        found[shard] = KnownShard(own.identity, look_at(settings(folder), shard).sequence)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def remove(*names: str) -> Harm:
    def harm(folder: Path) -> None:
        for name in names:
            for path in folder.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


def empty(name: str) -> Harm:
    def harm(folder: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return harm


def swap(folder: Path) -> None:
    (folder / "shard-0000").rename(folder / "aside")
    (folder / "shard-0001").rename(folder / "shard-0000")
    (folder / "aside").rename(folder / "shard-0001")


def other_system(folder: Path) -> None:
    Driver(settings(folder.parent / "other")).host.close()
    shutil.rmtree(folder / "shard-0001")
    shutil.copytree(folder.parent / "other" / "shard-0001", folder / "shard-0001")


def other_system_whole(folder: Path) -> None:
    Driver(settings(folder.parent / "other")).host.close()
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "other", folder)


def only_snapshots(folder: Path) -> None:
    log = folder / "shard-0000" / "log"
    (folder / "shard-0000" / "snapshots").mkdir(exist_ok=True)
    (folder / "shard-0000" / "snapshots" / f"{5:020d}.snap").write_bytes(b"")
    shutil.rmtree(log)


FORMS: dict[str, tuple[Harm, type[Exception], str]] = {
    "folder missing": (remove("shard-0000"), ShardMissing, "shard 0: expected its log .* does not exist"),
    "other folder missing": (remove("shard-0001"), ShardMissing, "shard 1: .* does not exist"),
    "folder empty": (empty("shard-0000"), ShardMissing, "has no log segments"),
    "no segments, mark left": (remove("shard-0000/log/*.seg"), ShardMissing, "has no log segments"),
    "log folder missing": (remove("shard-0000/log"), ShardMissing, "has no log segments"),
    "only snapshots": (only_snapshots, ShardMissing, "has snapshots and no log segments"),
    "manifest alone": (remove("shard-*"), ShardMissing, "does not exist"),
    "manifest and one folder missing": (remove("wallet.json", "shard-0000"), ShardMissing, "shard 0"),
    "folders swapped": (swap, ShardForeign, "is the folder of shard 1 .* moved or renamed"),
    "folder of another system": (other_system, ShardForeign, "shard of another system"),
    "identity missing": (remove("shard-0001/identity.json"), ShardForeign, "has a log and no identity.json"),
    "mark missing": (
        remove("shard-0000/log/durable.mark"),
        DataFileDamaged,
        "durable.mark: the durable mark is missing",
    ),
}


@pytest.mark.parametrize("with_database", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_the_shard_is_refused_and_nothing_is_changed(folder: Path, form: str, with_database: bool) -> None:
    harm, error, text = FORMS[form]
    known = known_of(folder) if with_database else None
    harm(folder)
    before = files_of(folder)
    for _ in range(2):  # a refusal does not make the next start a first one
        with pytest.raises(error, match=text) as refused:
            open_host(settings(folder), known=known)
        assert "ducat wallet" in str(refused.value) or "right names" in str(refused.value)
        assert files_of(folder) == before


@pytest.mark.parametrize(
    ("harm", "error"),
    [(shutil.rmtree, ShardMissing), (remove("*"), ShardMissing), (other_system_whole, ShardForeign)],
    ids=["data folder missing", "data folder empty", "data folder of another system"],
)
def test_the_database_knows_a_wallet_whose_whole_folder_is_gone(
    folder: Path, harm: Harm, error: type[Exception]
) -> None:
    known = known_of(folder)
    harm(folder)
    for _ in range(2):
        with pytest.raises(error, match="PostgreSQL"):
            open_host(settings(folder), known=known)
    assert error is ShardForeign or not folder.exists() or not list(folder.iterdir())


def test_an_empty_folder_is_a_first_start_without_a_database_and_with_one_that_knows_nothing(tmp_path: Path) -> None:
    for known in (None, {}):
        place = tmp_path / str(known)
        place.mkdir()
        open_host(settings(place), known=known).close()
        manifest = read_manifest(place)
        assert manifest is not None
        own = [read_identity(shard_folder(place, shard)) for shard in range(COUNT)]
        assert [manifest.shards[shard] for shard in range(COUNT)] == [one.identity for one in own if one]


def test_a_log_that_ends_before_what_was_seen_is_refused(folder: Path) -> None:
    known = known_of(folder)
    open_host(settings(folder), known=known).close()
    ahead = known | {1: KnownShard(known[1].identity, known[1].sequence + 1)}
    before = files_of(folder / "shard-0001")
    with pytest.raises(ShardBehind, match=rf"PostgreSQL has seen event {known[1].sequence + 1} .* ends with event"):
        open_host(settings(folder), known=ahead)
    assert files_of(folder / "shard-0001") == before
    open_host(settings(folder), known=known).close()


def test_an_older_copy_of_a_log_is_refused_by_what_was_seen(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    driver = Driver(settings(folder))
    rows = [TransferRow(transfer_id(n), account(n % 8), account((n + 1) % 8), 1) for n in range(50)]
    assert set(driver.transfers(rows)) == {1}
    driver.close()
    known = known_of(folder)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    with pytest.raises(ShardBehind):
        open_host(settings(folder), known=known)


def test_a_database_that_has_seen_less_than_before_is_refused_until_the_shard_is_accepted(folder: Path) -> None:
    known = known_of(folder)
    for shard, one in known.items():
        write_seen(shard_folder(folder, shard), one.identity, one.sequence)
    open_host(settings(folder), known=known).close()
    older = known | {0: KnownShard(known[0].identity, known[0].sequence - 1)}
    for database in (older, {1: known[1]}):  # restored; another one
        before = files_of(folder)
        with pytest.raises(DatabaseBehind, match=r"has seen event \d+ of shard 0, and had seen event \d+: "):
            open_host(settings(folder), known=database)
        assert files_of(folder) == before
    (shard_folder(folder, 1) / "seen.json").write_text(
        "{"
    )  # one that is broken is no witness, and no reason to stand still
    accepted = accept_shard(settings(folder), look_at(settings(folder), 0))
    open_host(settings(folder), known=known | {0: KnownShard(accepted.identity, accepted.sequence)}).close()


def test_newest_segments_that_are_gone_are_refused_by_the_mark(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, 1))
    driver.fund([account(0), account(1)], 10**6, account(10**6))
    for start in range(0, 30_000, 3000):
        driver.transfers([TransferRow(transfer_id(start + n), account(0), account(1), 1) for n in range(3000)])
    driver.close()
    newest = max((tmp_path / "shard-0000" / "log").glob("*.seg"))
    assert newest.stem != f"{1:020d}"
    newest.unlink()
    with pytest.raises(LogDamaged, match="durable up to"):
        open_host(config(tmp_path, 1))


def test_data_of_the_version_before_are_adopted_once(folder: Path) -> None:
    (folder / "wallet.json").write_text('{"format": 1, "shard_count": 2}\n')
    for path in folder.glob("shard-*/identity.json"):
        path.unlink()
    known = {shard: KnownShard("", 1) for shard in range(COUNT)}  # the read model's cursors
    open_host(settings(folder), known=known).close()
    found = known_of(folder)
    assert all(one.identity for one in found.values())
    open_host(settings(folder), known=found).close()
    assert known_of(folder) == found


def test_data_of_the_version_before_with_a_missing_shard_are_refused(folder: Path) -> None:
    (folder / "wallet.json").write_text('{"format": 1, "shard_count": 2}\n')
    for path in folder.glob("shard-*/identity.json"):
        path.unlink()
    shutil.rmtree(folder / "shard-0001")
    with pytest.raises(ShardMissing, match="shard 1"):
        open_host(settings(folder))


def test_a_lost_manifest_is_made_anew_where_all_shards_are_there(folder: Path) -> None:
    before = read_manifest(folder)
    (folder / "wallet.json").unlink()
    open_host(settings(folder)).close()
    assert read_manifest(folder) == before


@pytest.mark.parametrize("left", ["identity", "log folder", "other shard"])
def test_a_first_start_that_was_killed_goes_on(tmp_path: Path, left: str) -> None:
    open_host(settings(tmp_path)).close()
    (tmp_path / "wallet.json").write_text('{"format": 1, "shard_count": 2, "shards": {}}\n')
    if left == "identity":
        shutil.rmtree(tmp_path / "shard-0000" / "log")
    elif left == "log folder":
        for path in (tmp_path / "shard-0000" / "log").iterdir():
            path.unlink()
    else:
        shutil.rmtree(tmp_path / "shard-0001")
    open_host(settings(tmp_path), known={}).close()


def test_processes_that_share_a_folder_make_only_their_own_shards(tmp_path: Path) -> None:
    open_host(settings(tmp_path, shard_ids=(0,))).close()
    assert not (tmp_path / "shard-0001").exists()
    open_host(settings(tmp_path, shard_ids=(1,))).close()
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert sorted(manifest.shards) == [0, 1]
    shutil.rmtree(tmp_path / "shard-0001")
    open_host(settings(tmp_path, shard_ids=(0,))).close()
    with pytest.raises(ShardMissing):
        open_host(settings(tmp_path, shard_ids=(1,)))


def test_another_number_of_shards_is_refused_even_without_the_manifest(folder: Path) -> None:
    (folder / "wallet.json").unlink()
    with pytest.raises(ShardsMismatch, match="2 shards, 3 are configured"):
        open_host(config(folder, 3))


GARBAGE = [b"", b"\x00\xff\xfe", b"{", b"[]", b"null", b'"x"', b"[" * 50_000, b" " * 100_000]
WRONG = [
    b"{}",
    b'{"format": 2, "shard_count": 2}',
    b'{"format": 1, "shard_count": "2"}',
    b'{"format": 1, "shard_count": true}',
    b'{"format": 1, "shard_count": 0}',
    b'{"format": 1, "shard_count": 2, "shards": []}',
    b'{"format": 1, "shard_count": 2, "shards": {"x": null}}',
    b'{"format": 1, "shard_count": 2, "shards": {"9": null}}',
    b'{"format": 1, "shard_count": 2, "shards": {"0": 7}}',
    b'{"format": 1, "shard_count": 2, "shards": {"0": "no-uuid"}}',
]


@pytest.mark.parametrize("data", [*GARBAGE, *WRONG])
def test_a_broken_manifest_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "wallet.json").write_bytes(data)
    with pytest.raises(DataFileDamaged, match=r"wallet\.json: .*move it away"):
        open_host(settings(tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        *GARBAGE,
        b'{"format": 1, "shard": "0", "shard_count": 2, "identity": "x"}',
        b'{"format": 1, "shard": 0, "shard_count": 2, "identity": 5}',
    ],
)
def test_a_broken_identity_is_named(folder: Path, data: bytes) -> None:
    (folder / "shard-0001" / "identity.json").write_bytes(data)
    with pytest.raises(DataFileDamaged, match=r"shard-0001/identity\.json: .*accept --shard 1"):
        open_host(settings(folder))


@pytest.mark.parametrize("data", [*GARBAGE, b'{"1": "x"}', b'{"1": -1}', b'{"x": 1}', b'{"1": null}'])
def test_broken_numbers_for_peers_are_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "sent.json").write_bytes(data)
    with pytest.raises(DataFileDamaged, match=r"sent\.json: .*remove the file"):
        read_numbers(tmp_path / "sent.json")


@pytest.mark.parametrize("name", ["wallet.json", "shard-0000/identity.json"])
def test_a_small_file_that_is_a_folder_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(DataFileDamaged, match=f"{name}: it cannot be read"):
        open_host(settings(folder))


def test_garbage_in_the_mark_is_named(folder: Path) -> None:
    (folder / "shard-0000" / "log" / "durable.mark").write_bytes(b"garbage" * 100)
    with pytest.raises(DataFileDamaged, match=r"durable\.mark: the durable mark is missing or damaged"):
        open_host(settings(folder))


def test_a_cut_tail_is_told_with_file_offset_bytes_and_copy(tmp_path: Path) -> None:
    open_host(config(tmp_path, 1)).close()
    driver = Driver(config(tmp_path, 1))
    driver.open_accounts([AccountRow(account(1), "USD")])
    driver.close()
    segment = tmp_path / "shard-0000" / "log" / f"{1:020d}.seg"
    offset = len(segment.read_bytes().rstrip(b"\0")) + 7 & ~7
    with open(segment, "r+b") as file:
        file.seek(offset)
        file.write(b"half a frame")
    told: list[Progress] = []
    open_host(config(tmp_path, 1), progress=told.append).close()
    [cut] = [one for one in told if one.stage == "cut"]
    assert (cut.shard, cut.done) == (0, offset)
    assert str(segment) in cut.problem
    assert f"{cut.total - cut.done} bytes" in cut.problem
    assert ".seg.damaged-1" in cut.problem


# ---- ways out ----


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("folders swapped", "only snapshots")])
def test_accept_goes_on_with_what_is_there(folder: Path, form: str) -> None:
    known = known_of(folder)
    FORMS[form][0](folder)
    (folder / "wallet.json").unlink(missing_ok=True)
    for shard in range(COUNT):
        found = look_at(settings(folder), shard)
        done = accept_shard(settings(folder), found)
        assert done.identity not in (known[shard].identity, "")
        assert done.sequence == found.sequence
        known[shard] = KnownShard(done.identity, done.sequence)
    open_host(settings(folder), known=known).close()


def test_the_disk_that_turns_up_after_accept_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "shard-0000").rename(tmp_path / "lost disk")
    done = accept_shard(settings(folder), look_at(settings(folder), 0))
    shutil.rmtree(folder / "shard-0000")
    (tmp_path / "lost disk").rename(folder / "shard-0000")
    with pytest.raises(ShardForeign, match="from before the shard was restored or accepted"):
        open_host(settings(folder))
    assert json.loads((folder / "wallet.json").read_text())["shards"]["0"] == done.identity


def test_accept_of_a_log_that_ends_below_its_mark_keeps_the_mark(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder / "shard-0000" / "log", old)
    driver = Driver(settings(folder))
    assert set(driver.transfers([TransferRow(transfer_id(n), account(n % 8), account(7), 1) for n in range(7)])) == {1}
    driver.close()
    log = folder / "shard-0000" / "log"
    for path in old.glob("*.seg"):
        shutil.copy(path, log)
    with pytest.raises(LogDamaged, match="durable up to"):
        open_host(settings(folder))
    done = accept_shard(settings(folder), look_at(settings(folder), 0))
    assert (log / "durable.mark.replaced-1").is_file()
    open_host(settings(folder), known={0: KnownShard(done.identity, done.sequence)}).close()


def test_identities_are_random() -> None:
    assert new_identity() != new_identity()
