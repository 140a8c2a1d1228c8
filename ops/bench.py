"""`ducat bench`: measured figures, each with the machine's own limits from the same run."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run_checkout", "run_compare", "run_wallet"]


def add_parser(subparsers: Any) -> None:
    from loadtest.bench.wallet import SCENARIOS

    parser = subparsers.add_parser("bench", help="benchmarks, as ratios to the machine's own limits")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    wallet = kinds.add_parser("wallet", help="the wallet core over loopback gRPC, durable")
    wallet.add_argument("--scenario", action="append", choices=sorted(SCENARIOS), help="may be repeated; default: all")
    wallet.add_argument("--json", action="store_true", help="print one JSON object a scenario")
    wallet.add_argument("--transfers", type=int, help="another count of transfers")
    wallet.add_argument("--accounts", type=int, help="another count of accounts")
    wallet.add_argument("--smoke", action="store_true", help="small counts: shows that it works, not how fast")
    wallet.add_argument("--data-dir", help="folder for the log (default: a temporary one)")
    wallet.set_defaults(run=run_wallet)
    compare = kinds.add_parser(
        "compare", help="sharded Valkey, Try-Confirm-Cancel and the wallet core, each killed in mid-run"
    )
    compare.add_argument(
        "--transfers", type=int, default=200_000, help="how many each (default 200,000; PostgreSQL fewer)"
    )
    compare.add_argument("--json", action="store_true", help="print one JSON object")
    compare.set_defaults(run=run_compare)
    checkout = kinds.add_parser("checkout", help="CPU of a two-order checkout over all processes")
    checkout.add_argument("--checkouts", type=int, default=500, help="how many (default 500)")
    checkout.add_argument("--at-once", type=int, default=16, help="how many at a time (default 16)")
    checkout.add_argument("--executors", type=int, default=1, help="executor processes side by side")
    checkout.add_argument("--json", action="store_true", help="print one JSON object")
    checkout.set_defaults(run=run_checkout)


def run_wallet(args: argparse.Namespace) -> int:
    from loadtest.bench import wallet

    code = 0
    for name in args.scenario or sorted(wallet.SCENARIOS):
        report = wallet.run(
            name, transfers=args.transfers, accounts=args.accounts, smoke=args.smoke, data_dir=args.data_dir
        )
        if args.json:
            print(json.dumps(report), flush=True)
        else:
            wallet.print_report(report)
        if not all(report["checks"].values()):
            print(f"bench: {name}: a check failed: {report['checks']}", file=sys.stderr)
            code = 1
    return code


def run_checkout(args: argparse.Namespace) -> int:
    from loadtest.bench import checkout

    report = checkout.run(args.checkouts, args.at_once, args.executors)
    if args.json:
        print(json.dumps(report), flush=True)
    else:
        checkout.print_report(report)
    return 0 if all(report["checks"].values()) else 1


def run_compare(args: argparse.Namespace) -> int:
    from loadtest.baselines import ducat_wallet, postgres_tcc, valkey_lua

    contenders = {"valkey_lua": valkey_lua, "postgres_tcc": postgres_tcc, "ducat": ducat_wallet}
    report = {}
    for name, contender in contenders.items():
        with tempfile.TemporaryDirectory(prefix="ducat-bench-") as folder:
            report[name] = contender.compare(Path(folder), args.transfers)
    if args.json:
        print(json.dumps(report), flush=True)
    else:
        for name, seen in report.items():
            lost = ", ".join(f"{what} {value}" for what, value in seen["after_kill"].items() if value is not None)
            print(f"{name:<14} {seen['transfers_per_second']:>12,.0f} transfers/s   after a kill: {lost}")
    return 0 if report["ducat"]["after_kill"]["money_missing_minor"] == 0 else 1
