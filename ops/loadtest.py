"""`ducat loadtest`: locust, headless, against a platform that it starts; then the invariants are checked."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ops.demo import read_books
from ops.platform import Platform, ProcessFailed

__all__ = ["add_parser", "run"]

SETTLE_S_MAX = 60.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("loadtest", help="one headless minute of locust against a platform of its own")
    parser.add_argument("--users", type=int, default=20, help="users at once (default 20)")
    parser.add_argument("--spawn-rate", type=float, default=10, help="users started a second (default 10)")
    parser.add_argument("--seconds", type=int, default=60, help="how long (default 60, the most is 3600)")
    parser.add_argument("--only", choices=("checkout", "transfer"), help="one kind of user instead of both")
    parser.add_argument("--report", default="loadtest-report.html", help="where the HTML report goes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.seconds <= 3600:
        print(f"loadtest: --seconds: expected 1 to 3600, got {args.seconds}", file=sys.stderr)
        return 2
    if find_spec("locust") is None:
        print("loadtest: locust is not installed; fix: pip install 'ducat-payments[loadtest]'", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="ducat-loadtest-"))
    try:
        return asyncio.run(_loadtest(args, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _loadtest(args: argparse.Namespace, folder: Path) -> int:
    environment = {name: value for name, value in os.environ.items() if name.startswith("DUCAT_")}
    platform = Platform(folder, free_ports=True, env=environment, log=lambda line: print(f"  {line}"))
    try:
        await platform.start()
        before = platform.cpu_seconds()
        code = await _locust(args, platform)
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in platform.cpu_seconds().items()}
        print("\nCPU seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items()))
        holds = await _invariants(platform)
        print("invariants: " + ", ".join(f"{name} {'holds' if true else 'BROKEN'}" for name, true in holds.items()))
        print(f"report: {args.report}")
        return code or (0 if all(holds.values()) else 1)
    except ProcessFailed as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    finally:
        await platform.stop()


async def _locust(args: argparse.Namespace, platform: Platform) -> int:
    locustfile = Path(__file__).parent.parent / "loadtest" / "locustfile.py"
    users = {"checkout": ["CheckoutUser"], "transfer": ["TransferUser"]}.get(args.only or "", [])
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "locust", "--locustfile", str(locustfile), "--headless", "--only-summary",
        "--users", str(args.users), "--spawn-rate", str(args.spawn_rate), "--run-time", f"{args.seconds}s",
        "--stop-timeout", "20", "--host", platform.gateway_url, "--html", args.report, *users,
        env={**os.environ, "DUCAT_WALLET_ADDRESS": platform.grpc_address("wallet")},
    )  # fmt: skip
    try:
        return await asyncio.wait_for(child.wait(), args.seconds + 120)
    except TimeoutError:
        child.kill()
        await child.wait()
        print("loadtest: locust did not end in time and was killed", file=sys.stderr)
        return 1


async def _invariants(platform: Platform) -> dict[str, bool]:
    """The invariants, once what is still under way has landed."""
    async with platform.client() as client:
        deadline = asyncio.get_running_loop().time() + SETTLE_S_MAX
        while True:
            books = await read_books(client)
            if all(books.invariants().values()) or asyncio.get_running_loop().time() > deadline:
                return books.invariants()
            await asyncio.sleep(0.25)
