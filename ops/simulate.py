"""`ducat simulate`: the wallet core over simulated disks, network and clocks, seed by seed (docs/simulation.md)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from wallet_core.simulation import Options, Outcome, run_seed

__all__ = ["add_parser", "run"]

SHARDS_MAX = 16
FAILURES_SHOWN_MAX = 3
TRACE_LINES_SHOWN = 24
PROGRESS_S = 2.0


def add_parser(subparsers: Any) -> None:
    defaults = Options()
    parser = subparsers.add_parser("simulate", help="the wallet core against crashes, torn writes and a bad network")
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--seed", type=int, help="one seed only, with its trace")
    parser.add_argument("--shards", type=int, default=defaults.shards, help=f"shards (default {defaults.shards})")
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help=f"steps with faults a seed (default {defaults.steps})"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a CPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: every rule held; 1: a seed broke one; 2: wrong use."""
    if not 1 <= args.shards <= SHARDS_MAX or args.steps < 1 or args.seeds < 1 or args.jobs < 1:
        print(f"simulate: --shards is 1 to {SHARDS_MAX}; --steps, --seeds and --jobs are at least 1", file=sys.stderr)
        return 2
    options = Options(shards=args.shards, steps=args.steps)
    seeds = [args.seed] if args.seed is not None else list(range(args.first, args.first + args.seeds))
    began = time.monotonic()
    shown = began
    counts: Counter[str] = Counter()
    done = steps = transfers = 0
    broken: list[Outcome] = []
    for outcome in _outcomes(seeds, options, min(args.jobs, len(seeds))):
        done += 1
        steps += outcome.steps
        transfers += outcome.transfers
        counts.update(outcome.counts)
        if outcome.violation is not None:
            broken.append(outcome)
            if not args.json and len(broken) <= FAILURES_SHOWN_MAX:
                _print_failure(outcome, len(outcome.trace) if args.seed is not None else TRACE_LINES_SHOWN)
        now = time.monotonic()
        if sys.stderr.isatty() and now - shown > PROGRESS_S:
            shown = now
            rate = done / (now - began)
            left_s = (len(seeds) - done) / rate
            print(f"\r{done} of {len(seeds)} seeds, {rate:.0f}/s, {left_s:.0f} s left ", end="", file=sys.stderr)
    seconds = time.monotonic() - began
    if args.json:
        print(json.dumps(_report(options, done, seconds, steps, transfers, counts, broken)))
    else:
        _print_summary(done, seconds, steps, transfers, counts, broken)
    return 1 if broken else 0


def _outcomes(seeds: list[int], options: Options, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        for seed in seeds:
            yield run_seed(seed, options)
        return
    from functools import partial
    from multiprocessing import get_context

    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(partial(run_seed, options=options), seeds, chunksize=4)


def _report(
    options: Options,
    done: int,
    seconds: float,
    steps: int,
    transfers: int,
    counts: Counter[str],
    broken: list[Outcome],
) -> dict[str, Any]:
    return {
        "seeds": done,
        "seconds": round(seconds, 3),
        "seeds_per_second": round(done / seconds, 1),
        "shards": options.shards,
        "steps": steps,
        "transfers": transfers,
        "counts": dict(counts.most_common()),
        "failures": [
            {
                "seed": outcome.seed,
                "rule": outcome.violation.rule,
                "detail": outcome.violation.detail,
                "command": outcome.command,
            }
            for outcome in broken
            if outcome.violation is not None
        ],
    }


def _print_failure(outcome: Outcome, lines: int) -> None:
    print(f"\nseed {outcome.seed} failed: {outcome.violation}")
    print(f"the last {min(lines, len(outcome.trace))} things that happened (step, simulated time, what):")
    for line in outcome.trace[-lines:]:
        print(line)
    print(f"replay it: {outcome.command}\n", flush=True)


def _print_summary(
    done: int, seconds: float, steps: int, transfers: int, counts: Counter[str], broken: list[Outcome]
) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(
        f"{done} seeds in {seconds:.1f} s: {done / seconds:.1f} seeds/s, {steps / done:.0f} steps and "
        f"{transfers / done:.0f} remembered transfers a seed"
    )
    for kind, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
        print(f"{count:>10,}  {kind}")
    if not broken:
        print("every rule held in every seed")
        return
    print(f"{len(broken)} seeds broke a rule:")
    for outcome in broken:
        print(f"  {outcome.command}    {outcome.violation.rule if outcome.violation else ''}")
