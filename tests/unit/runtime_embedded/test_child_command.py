"""Risk: where the interpreter cannot be used to give up root, the server runs as root instead."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from runtime.embedded import ServerFailed
from runtime.embedded._server import Owner, child_command


def test_root_is_never_kept_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(65534, 65534, may_search=False)
    assert child_command(["/bin/true"], signal.SIGTERM, owner)[0] == sys.executable
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(ServerFailed, match="must not run as root"):
        child_command(["/bin/true"], signal.SIGTERM, owner)
    assert child_command(["/bin/true"], signal.SIGTERM) == ["/bin/true"]
