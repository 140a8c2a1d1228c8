"""Risk: data that anybody on the machine can read, or a process that does not start on a volume that is not its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from runtime.private_folder import close_folder
from sandbox.store import Store


def mode_of(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_a_folder_of_an_older_version_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "sandbox"
    folder.mkdir(mode=0o755)
    Store(folder / "sandbox.sqlite").close()
    assert mode_of(folder) == 0o700
    assert close_folder(tmp_path / "new" / "one")
    assert mode_of(tmp_path / "new" / "one") == 0o700


def test_a_folder_of_somebody_else_stays_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o2775)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert not close_folder(tmp_path)
    assert mode_of(tmp_path) == 0o2775


def test_a_file_system_without_modes_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)

    def refused(*_: object) -> None:
        raise PermissionError("no modes here")

    with monkeypatch.context() as during:
        during.setattr(Path, "chmod", refused)
        assert not close_folder(tmp_path)
    tmp_path.chmod(0o700)
    assert close_folder(tmp_path)
