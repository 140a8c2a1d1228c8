"""Risk: a stored file that is damaged, cut short, swapped or longer is taken for the file."""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.errors import DucatError, NotFound
from runtime.backup import (
    Backup,
    BackupDamaged,
    FolderStore,
    Part,
    Point,
    PostgresBackup,
    ShardBackup,
    StoredFile,
    read_manifest,
    read_part,
    store_parts,
    transfer,
    write_manifest,
)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def stored(store: FolderStore, data: bytes, limit: int | None = None) -> list[Part]:
    return store_parts(store, "file", io.BytesIO(data).read, limit)


def read(store: FolderStore, parts: list[Part]) -> bytes:
    return b"".join(piece for part in parts for piece in read_part(store, part))


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3000, 100_000])
@pytest.mark.parametrize("part_bytes", [1000, 1 << 30])
def test_a_file_comes_back(store: FolderStore, monkeypatch: pytest.MonkeyPatch, size: int, part_bytes: int) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES_MAX", part_bytes)
    data = random.Random(size).randbytes(size)
    parts = stored(store, data)
    assert read(store, parts) == data
    assert all(part.bytes <= part_bytes for part in parts)
    assert len({part.object for part in parts}) == len(parts)
    assert sum(part.bytes for part in parts) == size


def test_what_unpacks_to_much_more_comes_back_in_pieces(store: FolderStore) -> None:
    parts = stored(store, bytes(50_000_000))
    pieces = [len(piece) for part in parts for piece in read_part(store, part)]
    assert sum(pieces) == 50_000_000
    assert max(pieces) <= transfer.CHUNK_BYTES


def test_no_more_than_the_limit_is_taken(store: FolderStore) -> None:
    assert read(store, stored(store, b"x" * 5000, 1234)) == b"x" * 1234
    assert read(store, stored(store, b"", 0)) == b""


DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    (
        "a flipped bit in the middle",
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    ),
    ("a flipped bit in the end", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ("the end is missing", lambda data: data[:-1]),
    ("all is missing", lambda data: b""),
    ("more behind it", lambda data: data + b"x"),
    ("another file", lambda data: zlib.compress(b"y" * 70_000, wbits=31)),
    ("no gzip at all", lambda data: b"z" * len(data)),
]


@pytest.mark.parametrize(("what", "damage"), DAMAGES, ids=[what for what, _ in DAMAGES])
def test_damage_is_found_and_named(
    store: FolderStore, tmp_path: Path, what: str, damage: Callable[[bytes], bytes]
) -> None:
    (part,) = stored(store, random.Random(7).randbytes(70_000))
    path = tmp_path / part.object
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BackupDamaged, match=part.object):
        read(store, [part])


def test_a_missing_object_is_named(store: FolderStore) -> None:
    (part,) = stored(store, b"x")
    store.delete([part.object])
    with pytest.raises(NotFound, match=part.object):
        read(store, [part])


def backup() -> Backup:
    file = StoredFile("a", [Part("one/a.0.gz", 5, 25, "00")], 5)
    postgres = PostgresBackup("7714101848080103260", 18, 1, True, 1 << 24, "slot", 4, file, [file])
    points = [Point("p.0", 1_000_000_000, "0/3000060", {"0": 7}), Point("p.1", 2_000_000_000, "0/3000090", {"0": 9})]
    return Backup("one", 1, 2, 1, "file", postgres, [ShardBackup(0, 9, 1, 1, 96, "ab", [file])], points)


def test_a_manifest_comes_back(store: FolderStore) -> None:
    write_manifest(store, backup())
    assert read_manifest(store, "one") == backup()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00" * 50,
        lambda text: text.replace('"sequence":9', '"sequence":8'),
        lambda text: text.replace('"format":1', '"format":2'),
        lambda text: json.dumps({**json.loads(text), "backup": {}}),
        lambda text: json.dumps({**json.loads(text), "sha256": None}),
    ],
)
def test_a_manifest_that_is_none_is_refused(store: FolderStore, tmp_path: Path, change: Callable[[str], str]) -> None:
    write_manifest(store, backup())
    path = tmp_path / "one" / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(BackupDamaged, match=r"one/manifest\.json"):
        read_manifest(store, "one")


@pytest.mark.parametrize("name", ["other", "", "../one", "one/..", "a/b"])
def test_a_backup_that_is_not_there_is_said(store: FolderStore, name: str) -> None:
    write_manifest(store, backup())
    with pytest.raises(DucatError, match="ducat backup list"):
        read_manifest(store, name)
