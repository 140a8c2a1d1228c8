"""The sandbox's state in one SQLite file: objects, and tasks that are due (webhook deliveries, payouts that move on).

Write-ahead log without a sync a commit: the state survives a killed process, not a power cut, which is right for a sandbox. An answer
leaves only after its commit. One thread: a statement takes some ten microseconds, less than handing it to another thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.private_folder import close_folder

__all__ = ["Store", "Stored", "Task"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS object (
    id TEXT PRIMARY KEY,
    psp TEXT NOT NULL,
    kind TEXT NOT NULL,
    reference TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint BLOB NOT NULL,
    status TEXT NOT NULL,
    body TEXT NOT NULL,
    private TEXT NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS object_by_key ON object (psp, kind, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS object_by_reference ON object (psp, kind, reference);
CREATE TABLE IF NOT EXISTS task (
    id INTEGER PRIMARY KEY,
    due_ms INTEGER NOT NULL,
    psp TEXT NOT NULL,
    object_id TEXT NOT NULL,
    url TEXT NOT NULL,
    payload TEXT NOT NULL,
    try_count INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS fault (psp TEXT PRIMARY KEY, body TEXT NOT NULL);
"""

encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


@dataclass(slots=True)
class Stored:
    """One intent, refund or payout. `body` is what a caller sees, without `status`; `private` is what only the sandbox knows."""

    id: str
    psp: str
    kind: str
    reference: str
    idempotency_key: str | None
    fingerprint: bytes
    status: str
    body: dict[str, Any]
    private: dict[str, Any] = field(default_factory=dict)

    def to_json(self, status: str = "") -> dict[str, Any]:
        return {"id": self.id, "object": self.kind, "status": status or self.status, **self.body}


@dataclass(slots=True)
class Task:
    """`url` set: deliver `payload` there. `url` empty: move the object on to the status that `payload` names."""

    id: int
    due_ms: int
    psp: str
    object_id: str
    url: str
    payload: str
    try_count: int = 0


class Store:
    """Opens or creates the file. Use one store a file."""

    def __init__(self, path: Path) -> None:
        close_folder(path.parent)
        self._db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA wal_autocheckpoint=4000")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Several statements, all or none."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add(self, stored: Stored) -> bool:
        """False where the same PSP has another object of this kind under the same idempotency key."""
        cursor = self._db.execute(
            "INSERT INTO object VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT DO NOTHING",
            (
                stored.id,
                stored.psp,
                stored.kind,
                stored.reference,
                stored.idempotency_key,
                stored.fingerprint,
                stored.status,
                encode(stored.body),
                encode(stored.private),
            ),
        )
        return cursor.rowcount == 1

    def update(self, stored: Stored) -> None:
        self._db.execute(
            "UPDATE object SET status = ?, body = ?, private = ? WHERE id = ?",
            (stored.status, encode(stored.body), encode(stored.private), stored.id),
        )

    def get(self, psp: str, kind: str, object_id: str) -> Stored | None:
        return self._one("psp = ? AND kind = ? AND id = ?", (psp, kind, object_id))

    def by_key(self, psp: str, kind: str, key: str) -> Stored | None:
        return self._one("psp = ? AND kind = ? AND idempotency_key = ?", (psp, kind, key))

    def by_reference(self, psp: str, kind: str, reference: str) -> list[Stored]:
        """At most ten, newest first is not promised."""
        return list(
            map(
                _stored,
                self._db.execute(
                    "SELECT * FROM object WHERE psp = ? AND kind = ? AND reference = ? AND status <> 'refused' LIMIT 10",
                    (psp, kind, reference),
                ),
            )
        )

    def count(self) -> dict[str, int]:
        """How many objects of each kind and status."""
        rows = self._db.execute("SELECT kind || ' ' || status, count(*) FROM object GROUP BY kind, status")
        return dict(rows.fetchall())

    def add_task(self, due_ms: int, psp: str, object_id: str, url: str, payload: str) -> Task:
        cursor = self._db.execute(
            "INSERT INTO task (due_ms, psp, object_id, url, payload) VALUES (?,?,?,?,?)",
            (due_ms, psp, object_id, url, payload),
        )
        assert cursor.lastrowid is not None
        return Task(cursor.lastrowid, due_ms, psp, object_id, url, payload)

    def tasks(self) -> list[Task]:
        return [Task(*row) for row in self._db.execute("SELECT * FROM task ORDER BY due_ms, id")]

    def postpone(self, task: Task) -> None:
        self._db.execute(
            "UPDATE task SET due_ms = ?, try_count = ? WHERE id = ?", (task.due_ms, task.try_count, task.id)
        )

    def done(self, task_ids: Iterable[int]) -> None:
        ids = list(task_ids)
        if len(ids) == 1:
            self._db.execute("DELETE FROM task WHERE id = ?", ids)
        elif ids:
            with self.transaction():
                self._db.executemany("DELETE FROM task WHERE id = ?", [(task_id,) for task_id in ids])

    def faults(self) -> dict[str, dict[str, Any]]:
        return {psp: json.loads(body) for psp, body in self._db.execute("SELECT psp, body FROM fault")}

    def set_faults(self, psp: str, body: dict[str, Any] | None) -> None:
        if body is None:
            self._db.execute("DELETE FROM fault WHERE ?1 IN ('', psp)", (psp,))
        else:
            self._db.execute("INSERT OR REPLACE INTO fault VALUES (?,?)", (psp, encode(body)))

    def _one(self, where: str, values: tuple[str, ...]) -> Stored | None:
        row = self._db.execute("SELECT * FROM object WHERE " + where, values).fetchone()  # noqa: S608 - constants of this file
        return None if row is None else _stored(row)


def _stored(row: tuple[Any, ...]) -> Stored:
    object_id, psp, kind, reference, key, fingerprint, status, body, private = row
    return Stored(object_id, psp, kind, reference, key, fingerprint, status, json.loads(body), json.loads(private))
