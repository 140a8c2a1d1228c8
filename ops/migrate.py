"""`ducat migrate`: brings the schemas of every room to the version of this checkout."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from runtime.migrations import migrate_all
from runtime.settings import Settings

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("migrate", help="bring the database schemas to this version")
    parser.add_argument("--database-url", default="", help="default: DUCAT_DATABASE_URL")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    url = args.database_url or Settings.load().database_url
    if not url:
        print("migrate: no database; set DUCAT_DATABASE_URL or give --database-url", file=sys.stderr)
        return 2
    asyncio.run(migrate_all(url))
    print("the schemas are up to date")
    return 0
