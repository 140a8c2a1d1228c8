"""`ducat check`: is all money there?

    wallet            all balances and the money in flight add up to 0
    ledger            debits equal credits in every currency
    wallet = ledger   every account, as of the same events
    feeds             every consumer has proven that it applied everything that was published

Ends with 0: all is well; 1: something differs; 2: it cannot be told, because a process does not answer, or events are still under way
after --wait. Nothing is changed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kernel.errors import DucatError, Unavailable
from ops.terminal import json_line, printable
from runtime.settings import Settings

if TYPE_CHECKING:
    from ducat.ledger.v1 import ledger_pb2
    from runtime.channel import Channel

__all__ = [
    "DIFFERS",
    "EXIT_CODES",
    "OK",
    "UNKNOWN",
    "Verdict",
    "add_parser",
    "lines_of",
    "record_of",
    "run",
    "run_checks",
    "verdict_of",
]

WAIT_S = 120.0
POLL_S = 2.0
CALL_S = 600.0
"""Deadline of one call; a comparison of very many accounts takes minutes."""
DOWN_S = 20.0
"""A process that has not answered for so long, longer than a restart takes, is not waited for any more."""
SILENT_S = 60.0
"""A consumer that has not asked for so long does not run: what it lacks is not lost, nobody applies it."""
UNDER_WAY_S = 5.0
"""Events that are younger are no reason to ask again."""
LINES_MAX = 20
OK, DIFFERS, UNKNOWN = "ok", "differs", "unknown"
EXIT_CODES = {OK: 0, DIFFERS: 1, UNKNOWN: 2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check found. `lines`: the details for people, `todo`: what to do next, `facts`: the same for machines. `at_last`: what
    `unknown` is where waiting did not change it."""

    name: str
    verdict: str
    text: str
    lines: list[str] = field(default_factory=list)
    todo: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    at_last: str = UNKNOWN


def add_parser(subparsers: Any) -> None:
    """`ducat check`."""
    text = "is all money there? Adds up the wallet and the ledger, compares the two, and asks whether every event was applied"
    parser = subparsers.add_parser(
        "check", help=text, description=f"{text}. Exit code: 0 all is well, 1 something differs, 2 it cannot be told."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="SECONDS",
        help=f"how long to wait for events that are under way (default {WAIT_S:g}); for a process that does not answer"
        f" at most {DOWN_S:g}",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the checks; returns the exit code."""
    begin = time.monotonic()
    found = asyncio.run(run_checks(Settings.load(), wait_s=args.wait))
    verdict = verdict_of(found)
    _show(found, verdict, time.monotonic() - begin, as_json=args.json)
    return EXIT_CODES[verdict]


async def run_checks(settings: Settings, *, wait_s: float, without: Collection[str] = ()) -> list[Verdict]:
    """All checks, of the processes that the settings name; `unknown` is asked again for `wait_s`.

    A process that does not answer for DOWN_S ends the waiting.
    `without`: processes that do not run here and are not missed: they are not asked, and what they have applied does not count.
    """
    from runtime.channel import open_channel

    addresses = {
        "payment": settings.payment_address,
        "executor": settings.executor_address,
        "wallet": settings.wallet_address,
        "ledger": settings.ledger_address,
    }
    channels = {name: open_channel(address, settings) for name, address in addresses.items() if name not in without}
    patience = _Patience(time.monotonic() + max(wait_s, 0.0))
    checks: dict[str, Callable[[dict[str, Channel]], Awaitable[Verdict]]] = {
        "wallet": _wallet,
        "ledger": _ledger,
        "wallet = ledger": _compare,
        "feeds": _Feeds(without).check,
    }
    try:
        return list(await asyncio.gather(*(_until(name, check, channels, patience) for name, check in checks.items())))
    finally:
        for channel in channels.values():
            await channel.close()


def verdict_of(found: Sequence[Verdict]) -> str:
    """The worst of them."""
    return next((each for each in (DIFFERS, UNKNOWN) if any(one.verdict == each for one in found)), OK)


@dataclass(slots=True)
class _Patience:
    """Until when (monotonic seconds) all checks wait; a process that is down ends the waiting of all."""

    deadline: float


class _Silent(Exception):
    """A process cannot be asked. `is_down`: because it does not answer."""

    def __init__(self, text: str, *, is_down: bool) -> None:
        super().__init__(text)
        self.is_down = is_down


async def _until(
    name: str,
    check: Callable[[dict[str, Channel]], Awaitable[Verdict]],
    channels: dict[str, Channel],
    patience: _Patience,
) -> Verdict:
    """What a check says at last: `unknown` is asked again until the deadline."""
    down_since: float | None = None
    while True:
        is_down = False
        try:
            found = await check(channels)
        except _Silent as error:
            todo = "see `ducat config` for addresses, tokens and certificates, and whether the process runs; then check again"
            found, is_down = Verdict(name, UNKNOWN, str(error), todo=todo), error.is_down
        if found.verdict != UNKNOWN:
            return found
        now = time.monotonic()
        down_since = (now if down_since is None else down_since) if is_down else None
        if down_since is not None and now - down_since >= DOWN_S:
            patience.deadline = min(patience.deadline, now)
        if now >= patience.deadline:
            return replace(found, verdict=found.at_last)
        await asyncio.sleep(min(POLL_S, patience.deadline - now))


async def _call(process: str, method: Any, request: Any) -> Any:
    """Raises _Silent."""
    from runtime.errors import typed_rpc_errors

    try:
        with typed_rpc_errors():
            return await method(request, timeout=CALL_S)
    except DucatError as error:
        text = f"{process} cannot be asked: {error} ({error.reason})"
        raise _Silent(text, is_down=isinstance(error, Unavailable)) from error


async def _wallet(channels: dict[str, Channel]) -> Verdict:
    from ducat.wallet.v1 import shard_pb2, wallet_service_pb2_grpc

    stub: Any = wallet_service_pb2_grpc.ShardServiceStub(channels["wallet"])
    answer = await _call("wallet", stub.CheckBalances, shard_pb2.CheckBalancesRequest())
    wrong = {one.currency_code: one.imbalance_minor for one in answer.balances if one.imbalance_minor}
    facts = {
        "imbalances": wrong,
        "in_flight": {one.currency_code: one.in_flight_minor for one in answer.balances},
        "uneven_shards": [[one.shard, one.currency_code, one.amount_minor] for one in answer.uneven_shards],
        "positions": {str(one.shard): one.sequence_number for one in answer.positions},
    }
    if answer.ok:
        currencies = ", ".join(one.currency_code for one in answer.balances) or "no currency yet"
        return Verdict("wallet", OK, f"balances and money in flight add up to 0 ({currencies})", facts=facts)
    return Verdict(
        "wallet",
        DIFFERS,
        "balances and money in flight do not add up to 0",
        [
            *(f"{currency}: {minor:+,} minor units" for currency, minor in wrong.items()),
            *(f"shard {shard}: {minor:+,} {currency}" for shard, currency, minor in facts["uneven_shards"]),
        ],
        "stop payouts, keep the logs, run `ducat wallet verify`",
        facts,
    )


async def _ledger(channels: dict[str, Channel]) -> Verdict:
    from ducat.ledger.v1 import ledger_pb2, ledger_pb2_grpc

    stub: Any = ledger_pb2_grpc.LedgerServiceStub(channels["ledger"])
    answer = await _call("ledger", stub.GetTrialBalance, ledger_pb2.GetTrialBalanceRequest())
    facts = {
        one.currency_code: {"debit_minor": one.debit_minor, "credit_minor": one.credit_minor} for one in answer.lines
    }
    if answer.balanced:
        currencies = ", ".join(facts) or "no entry yet"
        return Verdict("ledger", OK, f"debits equal credits ({currencies})", facts=facts)
    return Verdict(
        "ledger",
        DIFFERS,
        "debits do not equal credits, or the accounts' sums are not those of their postings",
        [f"{one.currency_code}: debits {one.debit_minor:,}, credits {one.credit_minor:,}" for one in answer.lines],
        "somebody wrote to the ledger's tables; compare them with a backup (docs/ledger.md)",
        facts,
    )


async def _compare(channels: dict[str, Channel]) -> Verdict:
    from ducat.ledger.v1 import ledger_pb2, ledger_pb2_grpc

    stub: Any = ledger_pb2_grpc.LedgerServiceStub(channels["ledger"])
    answer: ledger_pb2.CompareWalletResponse = await _call(
        "ledger", stub.CompareWallet, ledger_pb2.CompareWalletRequest()
    )
    age_s = answer.under_way_age.ToNanoseconds() / 1e9
    facts = {
        "complete": answer.complete,
        "problem": answer.problem,
        "accounts": answer.account_count,
        "difference_count": answer.difference_count,
        "differences": [
            {
                "account": one.account_name,
                "currency": one.currency_code,
                "wallet_minor": one.wallet_balance_minor,
                "ledger_minor": one.ledger_balance_minor,
                "difference_minor": one.difference_minor,
            }
            for one in answer.differences
        ],
        "positions": {
            one.process: {
                "applied": one.applied_position,
                "last": one.last_position,
                "lacking": list(one.lacking_positions),
            }
            for one in answer.progress
        },
        "under_way": answer.under_way_count,
        "under_way_s": round(age_s, 3),
    }
    name = "wallet = ledger"
    if answer.difference_count:
        lines = [
            f"{one.account_name}: wallet {one.wallet_balance_minor:,}, ledger {one.ledger_balance_minor:,},"
            f" difference {one.difference_minor:+,}"
            for one in answer.differences
        ]
        for side in answer.progress:
            lines.append(
                f"{side.process} has applied everything up to event {side.applied_position}, and some up to {side.last_position}"
            )
            if side.lacking_positions:
                lines.append(
                    f"{side.process} lacks event {', '.join(map(str, side.lacking_positions))} of payment.events"
                )
        todo = (
            "stop payouts of these accounts; events that one side lacks: `ducat feed` and `ducat bus dead-letter list` say why;"
            " else compare `ducat wallet history ACCOUNT` with the ledger's entries (docs/ledger.md)"
        )
        return Verdict(name, DIFFERS, f"{answer.difference_count:,} accounts differ", lines, todo, facts)
    if not answer.complete:
        todo = "ask again; if it stays so, see the logs of ledger and wallet"
        return Verdict(name, UNKNOWN, answer.problem, todo=todo, facts=facts)
    if answer.under_way_count and age_s > UNDER_WAY_S:
        text = f"{answer.under_way_count:,} events have been under way to the wallet for up to {age_s:.0f} s"
        return Verdict(name, UNKNOWN, text, todo="ask again; `ducat feed` says how far the wallet is", facts=facts)
    at = max((one.last_position for one in answer.progress), default=0)
    return Verdict(
        name, OK, f"{answer.account_count:,} accounts agree, as of event {at:,} of payment.events", facts=facts
    )


class _Feeds:
    """Every consumer has proven what was published when the check began."""

    def __init__(self, without: Collection[str]) -> None:
        self._without = without
        self._wanted: dict[tuple[str, str], int] = {}

    async def check(self, channels: dict[str, Channel]) -> Verdict:
        from ducat.event.v1 import feed_pb2, feed_pb2_grpc

        publishers = [name for name in ("payment", "executor", "wallet") if name not in self._without]
        answers = await asyncio.gather(
            *(
                _call(
                    name,
                    feed_pb2_grpc.FeedServiceStub(channels[name]).ListFeedConsumers,
                    feed_pb2.ListFeedConsumersRequest(),
                )
                for name in publishers
            )
        )
        rows: list[dict[str, Any]] = []
        faults: list[str] = []
        behind: list[str] = []
        is_missing = is_silent = False
        now_s = time.time()
        for publisher, answer in zip(publishers, answers, strict=True):
            for one in answer.consumers:
                if one.consumer in self._without:
                    continue
                wanted = self._wanted.setdefault((one.topic, one.consumer), one.head_position)
                asked_s = now_s - one.update_time.ToNanoseconds() / 1e9
                rows.append(
                    {
                        "publisher": publisher,
                        "topic": one.topic,
                        "consumer": one.consumer,
                        "proven": one.proven_position,
                        "head": one.head_position,
                        "missing": one.missing_count,
                        "problem": one.problem,
                    }
                )
                who = f"{one.consumer} of {one.topic}"
                if one.problem:
                    faults.append(f"{who}: {one.problem}")
                elif one.proven_position < wanted:
                    lacks = f", {one.missing_count:,} of them missing" if one.missing_count else ""
                    behind.append(
                        f"{who} has proven {one.proven_position:,} of {wanted:,}{lacks}; it asked {asked_s:.0f} s ago"
                        + (": does its process run?" if asked_s > SILENT_S else "")
                    )
                    is_silent |= asked_s > SILENT_S
                    is_missing |= one.missing_count > 0 and asked_s <= SILENT_S
        facts = {"consumers": rows}
        todo = "`ducat feed` shows what is missing and why"
        if faults:
            return Verdict("feeds", DIFFERS, "a consumer cannot go on by itself", [*faults, *behind], todo, facts)
        if behind:
            if is_silent:
                todo = "start what does not run, and check again: it applies what it lacks by itself; " + todo
            text = "consumers have not applied everything" + (", and some of it is missing" if is_missing else " yet")
            return Verdict("feeds", UNKNOWN, text, behind, todo, facts, at_last=DIFFERS if is_missing else UNKNOWN)
        return Verdict("feeds", OK, f"{len(rows)} consumers have proven that they applied everything", facts=facts)


def _show(found: Sequence[Verdict], verdict: str, seconds: float, *, as_json: bool) -> None:
    if as_json:
        record = {"ok": verdict == OK, "verdict": verdict, "seconds": round(seconds, 2), "checks": record_of(found)}
        print(json_line(record), flush=True)
        return
    print("\n".join(lines_of(found)))
    last = {
        OK: "all money is there",
        DIFFERS: "MONEY IS MISSING OR TOO MUCH: see above what to do",
        UNKNOWN: "it cannot be told whether all money is there: see above why",
    }[verdict]
    print(f"{last} ({seconds:.1f} s)", file=sys.stdout if verdict == OK else sys.stderr, flush=True)


def record_of(found: Sequence[Verdict]) -> dict[str, Any]:
    """For machines: each check by its name."""
    return {
        one.name.replace(" = ", "_against_"): {"verdict": one.verdict, "text": one.text, **one.facts} for one in found
    }


def lines_of(found: Sequence[Verdict]) -> list[str]:
    """For people: a line a check, with its details and what to do below it."""
    lines: list[str] = []
    for one in found:
        lines.append(f"{one.name:<16} {one.verdict:<8} {one.text}")
        lines += [f"{'':25} {line}" for line in one.lines[:LINES_MAX]]
        if len(one.lines) > LINES_MAX:
            lines.append(f"{'':25} and {len(one.lines) - LINES_MAX} more (--json has them)")
        if one.todo:
            lines.append(f"{'':25} → {one.todo}")
    return [printable(line) for line in lines]
