"""`ducat config`: the effective settings, where each comes from, with secrets masked."""

from __future__ import annotations

import argparse
import json
from typing import Any

from runtime.settings import Settings

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("config", help="print the effective settings, secrets masked")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = Settings.load()
    if args.json:
        print(json.dumps(settings.masked(), default=str, indent=2))
        return 0
    for line in settings.describe():
        print(f"{line.name} = {line.value!r:<40} # {line.source}: {line.help}")
    return 0
