"""`ducat token create|list|revoke`: the tokens that callers send (docs/security.md).

The tokens file holds hashes only. A running process sees a change within a second, without a restart.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import Any

from runtime.security import create_token, list_tokens, revoke_token
from runtime.settings import Settings

__all__ = ["add_parser", "run"]

TOKENS_FILE = "tokens.toml"
"""Where tokens go when neither --file nor the settings name a file."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("token", help="make, list and revoke the tokens that callers send")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "--file",
            default="",
            help=f"the tokens file (default: auth_tokens_file of the settings, else {TOKENS_FILE})",
        )
        return action

    create = add("create", "add a token to the file and print it, this once")
    create.add_argument("--name", required=True, help="whose token it is, such as shop; unique in the file")
    create.add_argument("--scopes", required=True, help="what it may do, such as payments.*,payouts.read")
    create.add_argument("--expires", metavar="TIME", help="such as 2027-01-01T00:00:00Z (default: never)")
    add("list", "names, scopes and ends; never the tokens themselves")
    revoke = add("revoke", "take a token out of the file")
    revoke.add_argument("--name", required=True, help="as `list` shows it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs one action; the exit code: 0 done, 2 wrong use. Raises SettingsInvalid for a bad name, scope or file."""
    path: str = args.file or Settings.load().auth_tokens_file or TOKENS_FILE
    if args.action == "list":
        for caller in list_tokens(path):
            end = "" if caller.expire_s == float("inf") else f"  until {datetime.fromtimestamp(caller.expire_s, UTC)}"
            print(f"{caller.name}  {','.join(sorted(caller.scopes))}{end}")
        return 0
    if args.action == "revoke":
        revoke_token(path, args.name)
        print(f"revoked {args.name} in {path}", file=sys.stderr)
        return 0
    expire_time = None
    if args.expires:
        try:
            expire_time = datetime.fromisoformat(args.expires)
        except ValueError:
            expire_time = None
        if expire_time is None or expire_time.tzinfo is None:
            print(
                f"token create: --expires {args.expires}: expected a time with an offset, such as 2027-01-01T00:00:00Z",
                file=sys.stderr,
            )
            return 2
    scopes = [scope.strip() for scope in args.scopes.split(",") if scope.strip()]
    if not scopes:
        print("token create: --scopes: at least one, such as payments.read", file=sys.stderr)
        return 2
    token = create_token(path, args.name, scopes, expire_time)
    print(token)  # alone on stdout, so that it can go straight into a file
    print(f"added {args.name} to {path}; the token is shown this once", file=sys.stderr)
    return 0
