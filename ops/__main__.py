"""`ducat`: one command for everything that an operator or a developer does."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.metadata import version

from kernel.errors import DucatError
from ops.terminal import printable
from runtime.settings import SettingsInvalid

__all__ = ["main"]

COMMANDS = (
    "up",
    "demo",
    "loadtest",
    "migrate",
    "config",
    "token",
    "bus",
    "feed",
    "payment",
    "wallet",
    "check",
    "backup",
    "bench",
    "simulate",
)
"""Each is a module of this package with `add_parser(subparsers)`; its parser sets `run`."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong use."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="ducat", description="Moves money for marketplaces.")
    parser.add_argument("--version", action="version", version=f"ducat {version('ducat-payments')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = [name for name in COMMANDS if words[:1] == [name]] or COMMANDS
    for name in wanted:  # Only the module of the command given is imported: a start stays quick.
        import_module(f"ops.{name}").add_parser(subparsers)
    args = parser.parse_args(words)
    try:
        code: int = args.run(args)
    except DucatError as error:
        print(printable(f"ducat {args.command}: {error} ({error.reason})", keep="\n"), file=sys.stderr)
        return 1
    except SettingsInvalid as error:
        print(f"ducat {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
