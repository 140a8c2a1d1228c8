"""Risk: a file that the code reads is in the checkout and not in the wheel, so that only those who install it meet the crash."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = (".py", ".pyc", ".pyx", ".pxd", ".pxi", ".h", ".so")
"""Modules, and what they are compiled from."""


def test_every_data_file_of_a_package_is_in_the_wheel() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["package-data"]["*"]
    packages = [name.rstrip("*") for name in tool["packages"]["find"]["include"]]
    data = [
        path for name in packages for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix not in SOURCES
    ]
    assert {"page.css", "page.js", "payment_event.json", "0001_payment.sql"} <= {path.name for path in data}
    left_out = [
        str(path.relative_to(ROOT)) for path in data if not any(fnmatch.fnmatch(path.name, each) for each in patterns)
    ]
    assert left_out == []
