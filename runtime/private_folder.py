"""Folders of data that nobody but their owner may enter."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from runtime.logs import get_logger

__all__ = ["close_folder", "sync_folder"]

_logger = get_logger("runtime")


def close_folder(folder: Path) -> bool:
    """Make `folder` where it is missing, and give it mode 700 where it has another; whether it has it then.

    A folder of somebody else's (a mounted volume) cannot be closed by us: it stays as it is, with a warning.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if stat.S_IMODE(found.st_mode) == 0o700:
        return True
    if found.st_uid == os.geteuid():
        try:
            folder.chmod(0o700)
        except OSError:
            pass  # a file system without modes
        else:
            return True
    _logger.warning(
        "a folder of data is open to others; let it belong to the user of this process, with mode 700",
        folder=str(folder),
        mode=f"{stat.S_IMODE(found.st_mode):o}",
        owner=found.st_uid,
    )
    return False


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
