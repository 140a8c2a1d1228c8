"""Risk: a machine that loses power during the first start never starts again, for a file that is there and empty."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from runtime.embedded._server import kept_port, kept_secret


@pytest.mark.parametrize("torn", ["", "18", "x", "99999"])
def test_a_torn_port_is_replaced(torn: str, tmp_path: Path) -> None:
    (tmp_path / "port").write_text(torn)
    port = kept_port(tmp_path / "port")
    assert port >= 1024
    assert kept_port(tmp_path / "port") == port


def test_a_password_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "password"

    def power_cut(_descriptor: Any) -> None:
        raise OSError("the power is gone")

    with monkeypatch.context() as during:
        during.setattr(os, "fsync", power_cut)
        with pytest.raises(OSError, match="power"):
            kept_secret(file)
    assert not file.exists()
    secret = kept_secret(file)
    assert len(secret) == 32
    assert kept_secret(file) == secret
    assert file.stat().st_mode & 0o777 == 0o600
