"""A data folder that `ducat backup restore` is still making, or was stopped while it made it, is nobody's data folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kernel.errors import FailedPrecondition
from runtime.private_folder import sync_folder

__all__ = ["check_finished", "mark_finished", "mark_unfinished"]

MARKER = "restore-unfinished"


def mark_unfinished(data_dir: Path, text: str) -> None:
    """Before anything else is in it. `text` says whose the folder is, and the way on."""
    with (data_dir / MARKER).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(data_dir)


def mark_finished(data_dir: Path) -> None:
    """Once all of it is there."""
    (data_dir / MARKER).unlink(missing_ok=True)
    sync_folder(data_dir)


def check_finished(data_dir: Path) -> None:
    """Raises FailedPrecondition for a folder whose restore has not ended."""
    text = None
    with contextlib.suppress(OSError):
        text = (data_dir / MARKER).read_text(errors="replace").strip()
    if text is not None:
        raise FailedPrecondition(f"{data_dir.absolute()} is half a data folder: {text}")
