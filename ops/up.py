"""`ducat up`: the platform, kept running on durable data until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ops.demo import SAMPLE
from ops.platform import DataFolderBusy, Platform, ProcessFailed
from ops.terminal import ducat_command, near
from runtime.settings import Settings

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "up", help="start everything on this machine, watch it, restart what ends; Ctrl-C stops it"
    )
    parser.add_argument(
        "--data-dir",
        default="",
        help="where all data lives (default: data_dir of the settings, which is .ducat)",
    )
    parser.add_argument("--free-ports", action="store_true", help="free ports instead of the well-known ones")
    parser.add_argument("--executors", type=int, default=1, help="executor processes side by side")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_up(args))


async def _up(args: argparse.Namespace) -> int:
    environment = {name: value for name, value in os.environ.items() if name.startswith("DUCAT_")}
    platform = Platform(
        Path(args.data_dir or Settings.load().data_dir),
        free_ports=args.free_ports,
        env=environment,
        executor_count=args.executors,
        log=lambda line: print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True),
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    start = asyncio.create_task(platform.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return 0
        start.result()
        _print_addresses(platform)
        await stopped
        print("\nstopping", flush=True)
        return 0
    except (DataFolderBusy, ProcessFailed) as error:
        print(f"up: {error}", file=sys.stderr)
        return 1
    finally:
        await platform.stop()


def _print_addresses(platform: Platform) -> None:
    gateway = platform.gateway_url
    lines = [
        "",
        f"gateway    {gateway}            (REST; description at {gateway}/openapi.json)",
        *(
            [f"sandbox    {platform.sandbox_url}            (a PSP on your own machine)"]
            if "sandbox" in platform.names
            else []
        ),
        *(
            f"{name:<10} {platform.grpc_address(name)}                  (gRPC)"
            for name in ("payment", "executor", "wallet", "ledger")
        ),
        f"data       {platform.data_dir}   (logs in {platform.data_dir / 'logs'})",
        "",
        "try next:",
        f"  curl -sS {gateway}/v1/payments -H 'content-type: application/json' -d @{near(SAMPLE)}",
        "  open the checkout_url of its answer and pay with card 4242 4242 4242 4242",
        f"  {ducat_command()} wallet shards --address {platform.grpc_address('wallet')}",
        "",
        "Ctrl-C stops everything; the data stays.",
    ]
    print("\n".join(lines), flush=True)
