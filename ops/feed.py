"""`ducat feed [missing|retry|forget|accept]`: how far every consumer has proven that it has all of what was published.

    ducat feed                                  topics, heads, consumers; exit code 1 where one cannot go on by itself
    ducat feed missing                          what was compared and is not applied, with the error of the last try
    ducat feed retry [--topic T [--position N]] try it at once, also what is not tried any more
    ducat feed forget --topic T --consumer C    a consumer that is gone for good: pruning no longer waits for it
    ducat feed accept --topic T                 go on with a feed whose database was restored to an older state, or lost entries

It asks the running processes: payment, executor, wallet and ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from kernel.errors import DucatError, NotFound
from ops.terminal import json_line, printable
from runtime.channel import open_channel
from runtime.errors import from_rpc_error
from runtime.settings import Settings

__all__ = ["add_parser", "run"]

PUBLISHERS = ("payment", "executor", "wallet")
FOLLOWERS = ("payment", "executor", "wallet", "ledger")

_Ask = Callable[[Any], Awaitable[Any]]


def add_parser(subparsers: Any) -> None:
    """Adds the command `feed`."""
    parser = subparsers.add_parser("feed", help="what consumers have proven of what was published")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    missing = actions.add_parser("missing", help="what is not applied, and why")
    missing.add_argument("--json", action="store_true", help="one JSON object a line", default=argparse.SUPPRESS)
    retry = actions.add_parser("retry", help="try what is missing at once")
    retry.add_argument("--topic", default="", help="one topic; default: all")
    retry.add_argument("--position", type=int, default=0, help="one entry; needs --topic")
    forget = actions.add_parser("forget", help="pruning no longer waits for a consumer that is gone for good")
    forget.add_argument("--topic", required=True)
    forget.add_argument("--consumer", required=True)
    accept = actions.add_parser("accept", help="go on with a feed that was restored to an older state")
    accept.add_argument("--topic", required=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit code: 0 all well, 1 a consumer cannot go on or a process does not answer, 2 wrong use."""
    if args.action == "retry" and args.position and not args.topic:
        print("feed retry: --position needs --topic", file=sys.stderr)
        return 2
    return asyncio.run(_ACTIONS[args.action or "show"](args, Settings.load()))


async def _show(args: argparse.Namespace, settings: Settings) -> int:
    answers, code = await _ask_all(
        settings, PUBLISHERS, lambda stub: stub.ListFeedConsumers(feed_pb2.ListFeedConsumersRequest())
    )
    for process, answer in answers.items():
        for one in answer.consumers:
            problem = one.problem
            if not problem and one.proven_position > one.head_position:
                problem = f"it has proven more than there is: was the database of {process} restored to an older state?"
            code = code or (1 if problem else 0)
            lag = max(0, one.head_position - one.proven_position)
            row = {
                "process": process,
                "topic": one.topic,
                "consumer": one.consumer,
                "head": one.head_position,
                "proven": one.proven_position,
                "lag": lag,
                "missing": one.missing_count,
                "update_time": _time_of(one.update_time),
                "problem": problem,
            }
            if args.json:
                print(json_line(row))
                continue
            line = (
                f"{one.topic:18} → {one.consumer:10} head {one.head_position:>10}  proven {one.proven_position:>10}"
                f"  lag {lag:>7}  missing {one.missing_count:>5}  told {_time_of(one.update_time)}"
            )
            print(printable(line))
            if problem:
                print(f"    {printable(problem)}")
                if "`ducat feed" not in problem:
                    print(f"    way out: look at it, then `ducat feed accept --topic {one.topic}`")
    return code


async def _missing(args: argparse.Namespace, settings: Settings) -> int:
    answers, code = await _ask_all(
        settings, FOLLOWERS, lambda stub: stub.ListMissingEntries(feed_pb2.ListMissingEntriesRequest()), follower=True
    )
    found = 0
    for answer in answers.values():
        found += answer.total_count
        for entry in answer.entries:
            row = {
                "topic": entry.topic,
                "consumer": entry.consumer,
                "position": entry.position,
                "message_id": entry.message_id,
                "key": entry.key,
                "tries": entry.try_count,
                "next_try": _time_of(entry.next_try_time) if entry.HasField("next_try_time") else "",
                "error": entry.error,
            }
            if args.json:
                print(json_line(row))
                continue
            when = f"again {row['next_try']}" if row["next_try"] else "not tried any more"
            line = (
                f"{entry.topic} {entry.position} → {entry.consumer}  key {entry.key}  message {entry.message_id}"
                f"  {entry.try_count} tries, {when}"
            )
            print(printable(line))
            if entry.error:
                print(f"    {printable(entry.error)}")
            if not entry.message_id:
                print(
                    "    way out: put the entry back from a backup, then `ducat feed retry`; or do without it: "
                    f"`ducat feed accept --topic {entry.topic}`"
                )
        if answer.total_count > len(answer.entries) and not args.json:
            print(f"… and {answer.total_count - len(answer.entries)} more")
    if not found and not code and not args.json:
        print("nothing is missing")
    return 1 if found else code


async def _retry(args: argparse.Namespace, settings: Settings) -> int:
    request = feed_pb2.RetryMissingEntriesRequest(topic=args.topic, position=args.position)
    answers, code = await _ask_all(settings, FOLLOWERS, lambda stub: stub.RetryMissingEntries(request), follower=True)
    print(f"{sum(answer.entry_count for answer in answers.values())} entries are tried now; see `ducat feed missing`")
    return code


async def _forget(args: argparse.Namespace, settings: Settings) -> int:
    request = feed_pb2.ForgetFeedConsumerRequest(topic=args.topic, consumer=args.consumer)
    answers, code = await _ask_all(
        settings, PUBLISHERS, lambda stub: _unless_not_found(stub.ForgetFeedConsumer(request))
    )
    if any(answer is not None for answer in answers.values()):
        print(f"{args.consumer} of {args.topic} is forgotten; if it asks again it is remembered again")
        return code
    if not code:
        print(
            f"feed forget: nobody knows a consumer {args.consumer!r} of {args.topic!r}; see `ducat feed`",
            file=sys.stderr,
        )
    return 1


async def _accept(args: argparse.Namespace, settings: Settings) -> int:
    request = feed_pb2.AcceptFeedRequest(topic=args.topic)
    answers, code = await _ask_all(
        settings, FOLLOWERS, lambda stub: _unless_not_found(stub.AcceptFeed(request)), follower=True
    )
    count = sum(answer.consumer_count for answer in answers.values() if answer is not None)
    if count:
        print(
            f"{count} consumers go on with {args.topic} as it is, without entries that it lacks; another feed than the one that was "
            "followed is compared from its first entry on, and what is not known is applied; see `ducat feed`"
        )
        return code
    if not code:
        print(f"feed accept: no consumer has a problem with {args.topic!r}; see `ducat feed`", file=sys.stderr)
    return 1


_ACTIONS: dict[str, Callable[[argparse.Namespace, Settings], Coroutine[Any, Any, int]]] = {
    "show": _show,
    "missing": _missing,
    "retry": _retry,
    "forget": _forget,
    "accept": _accept,
}


async def _ask_all(
    settings: Settings, processes: tuple[str, ...], ask: _Ask, *, follower: bool = False
) -> tuple[dict[str, Any], int]:
    """The answers by process, and exit code 1 where one did not answer; each of those is a line on stderr."""
    answers: dict[str, Any] = {}
    code = 0
    for process in processes:
        address = str(getattr(settings, f"{process}_address"))
        async with open_channel(address, settings) as channel:
            stub = (
                feed_pb2_grpc.FeedFollowerServiceStub(channel) if follower else feed_pb2_grpc.FeedServiceStub(channel)
            )
            try:
                answers[process] = await ask(stub)
            except grpc.RpcError as error:
                told: DucatError = from_rpc_error(error)
                print(printable(f"ducat feed: {process} at {address}: {told} ({told.reason})"), file=sys.stderr)
                code = 1
    return answers, code


async def _unless_not_found(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.RpcError as error:
        if isinstance(from_rpc_error(error), NotFound):
            return None
        raise


def _time_of(time: Any) -> str:
    moment = datetime.fromtimestamp(time.seconds + time.nanos / 1e9, UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
