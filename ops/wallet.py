"""`ducat wallet …`: looks into the wallet's shards and mends them.

    shards                      where each shard stands
    balance ACCOUNT [--at …]    now, at a time, or after an event
    history ACCOUNT             every event of an account with the balance after it, from the log
    events                      the log of a shard, also live
    snapshot | snapshots        write one now | list them
    check                       add up all balances and the money in flight, live
    verify                      replay the log beside the live state and compare digests
    restore                     a shard's folder from a snapshot and log segments elsewhere (the wallet is stopped)
    accept                      go on with a shard whose log is older than what was seen of it, or missing (the wallet is stopped)
    rebuild                     fill the read model again from the logs
    serve                       run a wallet process here

ACCOUNT is a name such as seller/SELL-XYZ-1/USD, or an id of 32 hexadecimal digits.

Where several processes share the shards, any of them is asked for the shard map, and then the owner of each shard. A shard whose
owner does not answer is named, and the exit code is 1: what is shown is then not all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kernel.errors import (
    DeadlineExceeded,
    DucatError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from kernel.ids import account_id
from kernel.money import Money
from ops.terminal import printable, table
from runtime.settings import Settings
from runtime.unfinished import check_finished

if TYPE_CHECKING:
    from ducat.wallet.v1 import shard_pb2, wallet_pb2
    from wallet_core.adapters.accept import Found
    from wallet_core.adapters.presence import Lacking

__all__ = ["add_parser", "run"]

_LIMIT = 50
_WALLET_GONE_S = 15.0
_NS = 1_000_000_000
_MAP_TIMEOUT_S = 5.0
_LONG_TIMEOUT_S = 600.0
_STUCK_S = 30.0
"""So long the read model may have a problem and make no progress before `rebuild` gives up waiting."""
_NO_ANSWER = (Unavailable, DeadlineExceeded)


def add_parser(subparsers: Any) -> None:
    """`ducat wallet` and its sub-commands."""
    parser = subparsers.add_parser("wallet", help="look into the wallet's shards and mend them")
    commands = parser.add_subparsers(dest="wallet_command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *, account: bool = False) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        if account:
            command.add_argument("account", metavar="ACCOUNT", help="a name, or 32 hexadecimal digits")
        command.add_argument("--address", help="the wallet's gRPC address (default: the settings' wallet_address)")
        command.add_argument("--json", action="store_true", help="JSON, one object a line")
        return command

    add("shards", "where each shard stands")
    balance = add("balance", "what an account holds, now or in the past", account=True)
    balance.add_argument(
        "--at",
        metavar="TIME|SEQ",
        help="2026-01-31T12:00:00Z, or an event's number, or SHARD:NUMBER of a striped account",
    )
    history = add("history", "every event of an account with the balance after it", account=True)
    history.add_argument(
        "--limit", type=_count, default=_LIMIT, help=f"only the newest so many (default {_LIMIT}, 0 = all)"
    )
    events = add("events", "the events of a shard")
    events.add_argument("--shard", type=_shard_number, default=0)
    events.add_argument(
        "--from", dest="from_sequence", type=_count, default=1, help="the first event wanted (default 1)"
    )
    events.add_argument("--limit", type=_count, default=0, help="end after so many")
    events.add_argument("--account", help="only of this account")
    events.add_argument("--follow", action="store_true", help="go on with new ones")
    for name, text in (
        ("snapshot", "write a snapshot now, without stopping the writer"),
        ("snapshots", "the snapshots of a shard"),
        ("verify", "replay the log and compare every digest"),
    ):
        add(name, text).add_argument("--shard", type=_shard_number, help="default: every shard")
    check = add("check", "add up all balances and the money in flight of all shards: every currency must come to 0")
    check.add_argument(
        "--watch", action="store_true", help="go on until interrupted; ends at once where money is missing"
    )
    check.add_argument("--every", type=_seconds, default=5.0, metavar="SECONDS", help="with --watch (default 5)")
    restore = add("restore", "make a shard's folder from a snapshot and log segments; the wallet must be stopped")
    restore.add_argument("--shard", type=_shard_number, required=True)
    restore.add_argument("--from", dest="source", type=Path, required=True, help="folder with snapshots and segments")
    restore.add_argument("--to", dest="target", type=Path, help="data folder (default: the settings' data_dir/wallet)")
    upto = restore.add_mutually_exclusive_group()
    upto.add_argument(
        "--to-event",
        type=int,
        metavar="SEQ",
        help="end with this event, or with the last batch before it (default: all there is)",
    )
    upto.add_argument("--at", metavar="TIME", help="end with the last batch at or before 2026-01-31T12:00:00Z")
    restore.add_argument("--dry-run", action="store_true", help="only say what would be done")
    accept = add("accept", "go on with a shard as its folder is now, older or empty; the wallet must be stopped")
    accept.add_argument("--shard", type=_shard_number, required=True)
    accept.add_argument("--yes", action="store_true", help="do it; without it only what would be lost is said")
    rebuild = add("rebuild", "fill the read model again from the logs")
    rebuild.add_argument("--no-wait", action="store_true", help="do not wait until it has caught up")
    serve = add("serve", "run a wallet process")
    serve.add_argument("--shards", help='the shards that it owns, such as "0-3" (default: the settings\')')
    serve.add_argument("--listen", help="gRPC address to listen on")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command; returns the exit code."""
    settings = Settings.load()
    if args.wallet_command == "serve":
        return _serve(args)
    try:
        if args.wallet_command == "restore":
            return _restore(args, settings)
        if args.wallet_command == "accept":
            return asyncio.run(_accept(args, settings))
        return asyncio.run(_run_session(args, settings))
    except BrokenPipeError:  # whoever read this has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(printable(f"ducat wallet {args.wallet_command}: {error}"), file=sys.stderr)
        return 1


async def _run_session(args: argparse.Namespace, settings: Settings) -> int:
    session = _Session(args, settings)
    try:
        code = await _COMMANDS[args.wallet_command](session)
    finally:
        await session.close()
    return code or (1 if session.is_incomplete else 0)


class _Session:
    """One command: the process that is asked first, and the owners of the shards that it names."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self.args = args
        self.settings = settings
        self._candidates = [args.address] if args.address else _addresses(settings)
        self.address: str = self._candidates[0]
        """Of the process that knows the map; the first one that answers."""
        self.is_incomplete = False
        """Something that was asked for is not shown."""
        self._channels: dict[str, Any] = {}
        self._map: shard_pb2.ListShardsResponse | None = None

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, address: str) -> Any:
        from runtime.channel import open_channel

        if address not in self._channels:
            self._channels[address] = open_channel(address, self.settings)
        return self._channels[address]

    def wallet_at(self, address: str) -> Any:
        """The WalletService of a process."""
        from ducat.wallet.v1 import wallet_service_pb2_grpc

        return wallet_service_pb2_grpc.WalletServiceStub(self._channel(address))

    def shards_at(self, address: str) -> Any:
        """The ShardService of a process."""
        from ducat.wallet.v1 import wallet_service_pb2_grpc

        return wallet_service_pb2_grpc.ShardServiceStub(self._channel(address))

    @property
    def shards(self) -> Any:
        """The ShardService of the process that knows the map."""
        return self.shards_at(self.address)

    async def call(self, awaitable: Awaitable[Any]) -> Any:
        from runtime.errors import typed_rpc_errors

        with typed_rpc_errors():
            return await awaitable

    async def shard_map(self, *, again: bool = False) -> shard_pb2.ListShardsResponse:
        """All shards, from the first process that answers. Raises Unavailable where none does."""
        if self._map is not None and not again:
            return self._map
        problems: list[str] = []
        for address in self._candidates:
            try:
                self._map = await self._ask_for_map(address)
            except _NO_ANSWER as error:
                problems.append(f"{address} ({error.message})")
                continue
            self.address = address
            return self._map
        raise Unavailable(
            f"no wallet answers at {', '.join(problems)}; start one, or name the address of one that runs with --address"
        )

    async def _ask_for_map(self, address: str) -> shard_pb2.ListShardsResponse:
        from ducat.wallet.v1 import shard_pb2

        stub = self.shards_at(address)
        found: shard_pb2.ListShardsResponse = await self.call(
            stub.ListShards(shard_pb2.ListShardsRequest(), timeout=_MAP_TIMEOUT_S)
        )
        own = await self.call(stub.ListShards(shard_pb2.ListShardsRequest(local_only=True), timeout=_MAP_TIMEOUT_S))
        here = {shard.shard for shard in own.shards}
        for shard in found.shards:
            if shard.shard in here:
                shard.address = address  # it answered there, whatever it calls itself
        return found

    async def owner(self, number: int) -> shard_pb2.Shard:
        """The entry of a shard whose owner answers. Raises NotFound, and Unavailable where the owner does not answer."""
        for shard in (await self.shard_map()).shards:
            if shard.shard == number:
                if _is_unreachable(shard):
                    raise Unavailable(f"shard {number} is unreachable: {shard.problem}")
                return shard
        raise NotFound(f"{self.address} knows no shard {number}")

    async def each_shard(self, work: Callable[[shard_pb2.Shard], Awaitable[int]]) -> int:
        """Does `work` for the shards that are asked for, one after the other; says which ones could not be done."""
        wanted = self.args.shard
        numbers = [shard.shard for shard in (await self.shard_map()).shards] if wanted is None else [wanted]
        code = 0
        for number in numbers:
            try:
                code = await work(await self.owner(number)) or code
            except NotFound:
                raise
            except DucatError as error:
                self.lacks(f"shard {number}: {error} ({error.reason})")
        return code

    def lacks(self, what: str) -> None:
        """Says what is not shown, and ends the command with exit code 1."""
        self.is_incomplete = True
        print(printable(what), file=sys.stderr)

    def show(self, record: dict[str, Any], line: str) -> None:
        print(json.dumps(record) if self.args.json else printable(line, keep="\n"))


def _addresses(settings: Settings) -> list[str]:
    """Where wallets are, as far as the settings say: this one's, then its peers'."""
    peers = [part.partition("=")[2] for part in settings.wallet_peers.split()]
    return list(dict.fromkeys([settings.wallet_address, *filter(None, peers)]))


def _is_unreachable(shard: shard_pb2.Shard) -> bool:
    from ducat.wallet.v1 import shard_pb2

    return shard.state == shard_pb2.SHARD_STATE_UNREACHABLE


_NOTHING_KNOWN = (
    "accounts",
    "sequence_number",
    "durable",
    "snapshot",
    "projected",
    "lag",
    "log_mib",
    "epoch",
    "digest",
)


async def _shards(session: _Session) -> int:
    answer = await session.shard_map()
    from ducat.wallet.v1 import shard_pb2

    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for shard in answer.shards:
        state = shard_pb2.ShardState.Name(shard.state).removeprefix("SHARD_STATE_").lower()
        record: dict[str, Any] = {
            "shard": shard.shard,
            "state": state,
            "address": shard.address,
            "slots": f"{shard.first_slot}-{shard.end_slot - 1}",
            "accounts": shard.account_count,
            "sequence_number": shard.sequence_number,
            "durable": shard.durable_sequence_number,
            "snapshot": shard.snapshot_sequence_number,
            "projected": shard.projected_sequence_number,
            "lag": max(0, shard.durable_sequence_number - shard.projected_sequence_number),
            "log_mib": round(shard.log_bytes / 2**20, 1),
            "epoch": shard.epoch,
            "digest": shard.digest.hex(),
            "scrubbed": _time_text(shard.scrub_time.ToNanoseconds())[:19] if shard.HasField("scrub_time") else "never",
            "read_model": "problem" if shard.read_model_problem else "ok",
        }
        if _is_unreachable(shard):
            record |= dict.fromkeys((*_NOTHING_KNOWN, "read_model"))
        problems = _problems(shard)
        lines += [f"shard {shard.shard}: {problem}" for problem in problems]
        if session.args.json:
            record["problems"] = problems
            record["scrub_problems"] = list(shard.scrub_problems)
        rows.append(record)
    _table(session, rows)
    if not session.args.json:
        for line in lines:
            print(printable(line))
    is_poisoned = any(shard.state == shard_pb2.SHARD_STATE_POISONED for shard in answer.shards)
    return 1 if lines or is_poisoned else 0


def _problems(shard: shard_pb2.Shard) -> list[str]:
    from ducat.wallet.v1 import shard_pb2

    hint = ""
    if shard.state == shard_pb2.SHARD_STATE_REWOUND:
        hint = ": it was restored from an old copy (docs/wallet.md, A shard went back in time)"
    links = [link.problem for link in shard.links if link.problem]
    problems = [f"{problem}{hint}" for problem in links or filter(None, [shard.problem])]
    problems += [
        f"{problem}: damage on the disk (docs/wallet.md, Damage on the disk)" for problem in shard.scrub_problems
    ]
    if shard.read_model_problem:
        problems.append(f"the read model waits, the shard goes on: {shard.read_model_problem}")
    return problems


async def _balance(session: _Session) -> int:
    record = await _whole_balance(session, session.args.at)
    if session.args.json:
        print(json.dumps({name: value for name, value in record.items() if name != "flags"}))
        return 0
    lines = [("account", record["name"] or record["account_id"]), ("id", record["account_id"])]
    for label in ("balance", "held_out", "held_in", "available"):
        lines.append((label.replace("_", " "), str(Money(record["currency"], record[f"{label}_minor"]))))
    where = (f"shard {shard} event {sequence}" for shard, sequence in record["positions"].items())
    lines.append(("as of", ", ".join(where)))
    if record["flags"]:
        lines.append(("flags", ", ".join(record["flags"])))
    for label, text in lines:
        print(f"{label:>10}  {printable(text)}")
    return 0


async def _whole_balance(session: _Session, at: str | None) -> dict[str, Any]:
    """What an account holds: asked of the owner of its shard; the parts of a striped one, of every process, added up. Says which shards
    are not in the sum. Raises NotFound, and Unavailable where nobody who could know answers."""
    from ducat.wallet.v1 import wallet_pb2

    request = wallet_pb2.GetBalanceRequest(**_account(session.args.account))
    only = await _set_as_of(session, request, at) if at else None
    home = await _home(session)
    if only is not None:
        owner = await session.owner(only)
        return _added_up([await _balance_at(session, owner.address, request)])
    shards = (await session.shard_map()).shards
    addresses = list(dict.fromkeys(shard.address for shard in shards if not _is_unreachable(shard)))
    addresses.sort(key=lambda address: address != home.address)
    away = [shard for shard in shards if _is_unreachable(shard)]
    parts: list[wallet_pb2.Account] = []
    not_found: NotFound | None = None
    for address in addresses:
        try:
            part = await _balance_at(session, address, request)
        except NotFound as error:
            not_found = error if address == home.address else not_found
        except FailedPrecondition as error:
            if error.reason != "WRONG_SHARD":
                raise
        except _NO_ANSWER as error:
            lost = [shard for shard in shards if shard.address == address]
            if home in lost:
                raise
            for shard in lost:
                shard.problem = error.message
            away += lost
        else:
            if not part.striped:
                return _added_up([part])
            parts.append(part)
    if parts:
        for shard in away:
            session.lacks(f"without the part on shard {shard.shard}, which is unreachable: {shard.problem}")
        return _added_up(parts)
    if _is_unreachable(home):
        raise Unavailable(f"the account is on shard {home.shard}, which is unreachable: {home.problem}")
    raise not_found or NotFound(f"no account {session.args.account}")


async def _balance_at(session: _Session, address: str, request: wallet_pb2.GetBalanceRequest) -> wallet_pb2.Account:
    answer = await session.call(session.wallet_at(address).GetBalance(request, timeout=_LONG_TIMEOUT_S))
    account: wallet_pb2.Account = answer.account
    return account


def _added_up(parts: Sequence[wallet_pb2.Account]) -> dict[str, Any]:
    first = parts[0]
    return {
        "account_id": first.account_id.hex(),
        "name": next((part.name for part in parts if part.name), ""),
        "currency": first.currency_code,
        "balance_minor": sum(part.balance_minor for part in parts),
        "held_out_minor": sum(part.held_out_minor for part in parts),
        "held_in_minor": sum(part.held_in_minor for part in parts),
        "available_minor": sum(part.available_minor for part in parts),
        "positions": {str(one.shard): one.sequence_number for part in parts for one in part.positions},
        "flags": [name for name in ("frozen", "closed", "may_overdraw", "striped") if getattr(first, name)],
    }


async def _set_as_of(session: _Session, request: wallet_pb2.GetBalanceRequest, at: str) -> int | None:
    """Sets the moment; the shard that alone can tell, where it is a position."""
    shard, colon, number = at.partition(":")
    try:
        if at.isdecimal():
            request.position.shard = (await _home(session)).shard
            request.position.sequence_number = int(at)
        elif colon and shard.isdecimal() and number.isdecimal():
            request.position.shard = int(shard)
            request.position.sequence_number = int(number)
        else:
            time_ns = _time_ns(at)
            if time_ns < 0:
                raise _wrong_moment(at)
            request.time.FromNanoseconds(time_ns)
            return None
    except (ValueError, OverflowError):  # beyond what the message can carry
        raise _wrong_moment(at) from None
    return int(request.position.shard)


async def _home(session: _Session) -> shard_pb2.Shard:
    """The shard of the account, as the map has it, be its owner there or not."""
    key = _account_key(session.args.account)
    answer = await session.shard_map()
    slot = ((key[14] << 8) | key[15]) & (answer.slot_count - 1)
    for shard in answer.shards:
        if shard.first_slot <= slot < shard.end_slot:
            return shard
    raise NotFound(f"{session.address} does not know the shard of slot {slot}")


async def _history(session: _Session) -> int:
    """From the log: the balance before the oldest event that is kept, then every event."""
    from ducat.wallet.v1 import wallet_pb2

    key = _account_key(session.args.account)
    fields = _account(session.args.account)
    live = await _whole_balance(session, None)
    shards = [
        shard
        for shard in (await session.shard_map()).shards
        if shard.durable_sequence_number and not _is_unreachable(shard)
    ]
    if "striped" not in live["flags"]:
        home = await _home(session)
        shards = [shard for shard in shards if shard.shard == home.shard]
    balance = 0
    found: list[wallet_pb2.WalletEvent] = []
    for shard in shards:
        oldest = await _oldest(session, shard)
        if oldest > 1:
            oldest = await _oldest_state(session, shard, oldest) + 1
            balance += await _balance_after(session, fields, shard, oldest - 1)
        progress = _Progress(f"shard {shard.shard}", shard.durable_sequence_number, quiet=session.args.json)
        request = wallet_pb2.WatchEventsRequest(
            shard=shard.shard,
            from_sequence_number=oldest,
            end_sequence_number=shard.durable_sequence_number,
            account_id=key,
        )
        stream = session.wallet_at(shard.address).WatchEvents(request)
        while answer := await session.call(stream.read()):
            found += answer.events
            progress.at(answer.events[-1].sequence_number)
        progress.end()
    found.sort(key=lambda event: (event.create_time.ToNanoseconds(), event.shard, event.sequence_number))
    rows: deque[dict[str, Any]] = deque(maxlen=session.args.limit or None)
    for event in found:
        delta = _delta(event, key)
        balance += delta
        record = _event_record(event)
        record["other"] = record["credit"] if event.debit_account_id == key else record["debit"]
        record |= {"change_minor": delta, "balance_minor": balance}
        for gone in ("debit", "credit"):
            del record[gone]
        if not session.args.json:
            record["transfer_id"], record["other"] = record["transfer_id"][:18], record["other"][:12]
        rows.append(record)
    _table(session, list(rows))
    if balance != live["balance_minor"] and not session.args.json:
        moved = live["balance_minor"] - balance
        print(f"the account moved by {moved} minor units more while this was read", file=sys.stderr)
    return 0


async def _oldest(session: _Session, shard: shard_pb2.Shard) -> int:
    """The number of the oldest event that the shard's log still has."""
    from ducat.wallet.v1 import wallet_pb2

    request = wallet_pb2.WatchEventsRequest(shard=shard.shard, from_sequence_number=1, end_sequence_number=1)
    stream = session.wallet_at(shard.address).WatchEvents(request)
    try:
        await session.call(stream.read())
    except OutOfRange as error:
        return int(error.metadata.get("first", "1"))
    return 1


async def _oldest_state(session: _Session, shard: shard_pb2.Shard, oldest: int) -> int:
    """The event of the oldest snapshot that the log, which begins with event `oldest`, leads on from."""
    from ducat.wallet.v1 import shard_pb2

    request = shard_pb2.ListSnapshotsRequest(shard=shard.shard)
    answer = await session.call(session.shards_at(shard.address).ListSnapshots(request))
    found = [one.sequence_number for one in answer.snapshots if one.sequence_number + 1 >= oldest]
    return int(min(found, default=oldest - 1))


async def _balance_after(session: _Session, fields: dict[str, Any], shard: shard_pb2.Shard, sequence: int) -> int:
    from ducat.wallet.v1 import wallet_pb2

    position = wallet_pb2.ShardPosition(shard=shard.shard, sequence_number=sequence)
    request = wallet_pb2.GetBalanceRequest(**fields, position=position)
    try:
        return int((await _balance_at(session, shard.address, request)).balance_minor)
    except NotFound:
        return 0


def _delta(event: wallet_pb2.WalletEvent, key: bytes) -> int:
    """By how much an event changes the balance of an account."""
    from ducat.wallet.v1 import wallet_pb2

    kind = wallet_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_")
    if kind in ("MONEY_MOVED", "HOLD_POSTED", "MONEY_RECEIVED", "MONEY_RETURNED"):
        return event.amount_minor * ((event.credit_account_id == key) - (event.debit_account_id == key))
    if kind == "MONEY_SENT" and event.debit_account_id == key:
        return -event.amount_minor
    return 0


async def _events(session: _Session) -> int:
    from ducat.wallet.v1 import wallet_pb2

    args = session.args
    end = 0
    owner = await session.owner(args.shard)
    if not args.follow:
        end = owner.durable_sequence_number
        if end < args.from_sequence:
            return 0
    request = wallet_pb2.WatchEventsRequest(
        shard=args.shard,
        from_sequence_number=args.from_sequence,
        end_sequence_number=end,
        account_id=_account_key(args.account) if args.account else b"",
    )
    stream = session.wallet_at(owner.address).WatchEvents(request)
    count = 0
    while answer := await session.call(stream.read()):
        for event in answer.events:
            record = _event_record(event)
            line = "  ".join(
                (
                    f"{record['sequence_number']:>10}",
                    record["time"],
                    f"{record['kind']:<16}",
                    f"{record['amount_minor']:>14}",
                    record["debit"] or "-",
                    "→",
                    record["credit"] or "-",
                    record["transfer_id"],
                    record["result"],
                )
            )
            session.show(record, line.rstrip())
            count += 1
            if args.limit and count >= args.limit:
                stream.cancel()
                return 0
    return 0


def _event_record(event: wallet_pb2.WalletEvent) -> dict[str, Any]:
    from ducat.wallet.v1 import wallet_pb2

    result = wallet_pb2.TransferResult.Name(event.result).removeprefix("TRANSFER_RESULT_") if event.result > 1 else ""
    return {
        "shard": event.shard,
        "sequence_number": event.sequence_number,
        "time": _time_text(event.create_time.ToNanoseconds()),
        "kind": wallet_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower(),
        "amount_minor": event.amount_minor,
        "debit": event.debit_account_id.hex(),
        "credit": event.credit_account_id.hex(),
        "transfer_id": event.transfer_id.hex(),
        "result": result,
    }


async def _snapshot(session: _Session) -> int:
    from ducat.wallet.v1 import shard_pb2

    rows: list[dict[str, Any]] = []

    async def write(shard: shard_pb2.Shard) -> int:
        begin = time.monotonic()
        request = shard_pb2.CreateSnapshotRequest(shard=shard.shard)
        answer = await session.call(session.shards_at(shard.address).CreateSnapshot(request, timeout=3600))
        rows.append({**_snapshot_record(answer.snapshot), "seconds": round(time.monotonic() - begin, 2)})
        return 0

    code = await session.each_shard(write)
    _table(session, rows)
    return code


async def _snapshots(session: _Session) -> int:
    from ducat.wallet.v1 import shard_pb2

    rows: list[dict[str, Any]] = []

    async def look(shard: shard_pb2.Shard) -> int:
        request = shard_pb2.ListSnapshotsRequest(shard=shard.shard)
        answer = await session.call(session.shards_at(shard.address).ListSnapshots(request))
        rows.extend(_snapshot_record(snapshot) for snapshot in answer.snapshots)
        return 0

    code = await session.each_shard(look)
    _table(session, rows)
    return code


def _snapshot_record(snapshot: shard_pb2.Snapshot) -> dict[str, Any]:
    return {
        "shard": snapshot.shard,
        "sequence_number": snapshot.sequence_number,
        "file": snapshot.file_name,
        "mib": round(snapshot.size_bytes / 2**20, 1),
        "time": _time_text(snapshot.create_time.ToNanoseconds()),
        "digest": snapshot.digest.hex(),
    }


async def _verify(session: _Session) -> int:
    from ducat.wallet.v1 import shard_pb2

    async def verify(shard: shard_pb2.Shard) -> int:
        stream = session.shards_at(shard.address).VerifyShard(shard_pb2.VerifyShardRequest(shard=shard.shard))
        progress: _Progress | None = None
        while answer := await session.call(stream.read()):
            if progress is None:
                progress = _Progress(f"shard {shard.shard}", answer.end_sequence_number, quiet=session.args.json)
            progress.at(answer.sequence_number)
            if answer.done:
                progress.end()
                record = {
                    "shard": shard.shard,
                    "ok": answer.ok,
                    "sequence_number": answer.sequence_number,
                    "problem": answer.problem,
                }
                verdict = "every digest agrees" if answer.ok else f"FAILED {answer.problem}"
                session.show(record, f"shard {shard.shard}: events up to {answer.sequence_number}: {verdict}")
                return 0 if answer.ok else 1
        raise Unavailable(f"{shard.address} ended before there was a verdict")

    return await session.each_shard(verify)


async def _check(session: _Session) -> int:
    """0: all money is there. 1: it is not."""
    while True:
        try:
            if code := await _check_once(session):
                return code
        except _NO_ANSWER as error:  # a process that is started again is no reason to stop looking
            if not session.args.watch:
                raise
            session.lacks(f"{_time_text(time.time_ns())}  {error.message}")
        if not session.args.watch:
            return 0
        await asyncio.sleep(max(session.args.every, 0.1))


async def _check_once(session: _Session) -> int:
    from ducat.wallet.v1 import shard_pb2

    begin = time.monotonic()
    away = [shard for shard in (await session.shard_map(again=True)).shards if _is_unreachable(shard)]
    if away:
        problems = "; ".join(f"shard {shard.shard}: {shard.problem}" for shard in away)
        raise Unavailable(f"no verdict, for money may be on shards that are unreachable: {problems}")
    request = shard_pb2.CheckBalancesRequest()
    answer = await session.call(session.shards.CheckBalances(request, timeout=_LONG_TIMEOUT_S))
    seconds = time.monotonic() - begin
    positions = {str(position.shard): position.sequence_number for position in answer.positions}
    if session.args.json:
        record = {
            "ok": answer.ok,
            "currencies": {
                one.currency_code: {
                    "balance_minor": one.balance_minor,
                    "in_flight_minor": one.in_flight_minor,
                    "imbalance_minor": one.imbalance_minor,
                }
                for one in answer.balances
            },
            "uneven_shards": [[one.shard, one.currency_code, one.amount_minor] for one in answer.uneven_shards],
            "positions": positions,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(record), flush=True)
        return 0 if answer.ok else 1
    now = _time_text(time.time_ns())
    for one in answer.balances:
        verdict = "ok" if one.imbalance_minor == 0 else f"WRONG BY {one.imbalance_minor:,} minor units"
        print(
            f"{now}  {one.currency_code}  balances {one.balance_minor:>20,}  in flight {one.in_flight_minor:>16,}  {verdict}"
        )
    for one in answer.uneven_shards:
        print(
            f"{now}  shard {one.shard}: its own {one.currency_code} accounts are off by {one.amount_minor:,} minor units"
        )
    where = ", ".join(f"shard {shard} event {sequence}" for shard, sequence in positions.items())
    if answer.ok:
        print(f"{now}  all money is there ({where}; {seconds:.2f} s)", flush=True)
        return 0
    print(
        f"{now}  MONEY IS MISSING OR TOO MUCH at {where}. Stop payouts, keep the logs, run `ducat wallet verify`.",
        flush=True,
    )
    return 1


async def _rebuild(session: _Session) -> int:
    """Empties the stores; every running wallet notices at once, a stopped one at its next start."""
    from ducat.wallet.v1 import shard_pb2

    await session.shard_map()
    answer = await session.call(
        session.shards.RebuildReadModel(shard_pb2.RebuildReadModelRequest(), timeout=_LONG_TIMEOUT_S)
    )
    record = {"reset": True, "valkey_keys": answer.removed_key_count}
    session.show(record, "the read model is empty; each wallet fills it from the logs of its shards")
    shards = (await session.shard_map(again=True)).shards
    for shard in shards:
        if _is_unreachable(shard):
            session.lacks(f"shard {shard.shard} is filled when its owner is back: {shard.problem}")
    if session.args.no_wait:
        return 0
    await asyncio.sleep(0.3)  # the other processes are told by PostgreSQL
    ends = {shard.shard: shard.durable_sequence_number for shard in shards if not _is_unreachable(shard)}
    progress = _Progress("read model", sum(ends.values()), quiet=session.args.json)
    most, most_s = -1, time.monotonic()
    while True:
        shards = (await session.shard_map(again=True)).shards
        done = {shard.shard: min(shard.projected_sequence_number, ends.get(shard.shard, 0)) for shard in shards}
        count = sum(done.values())
        progress.at(count)
        if all(done.get(shard, 0) >= end for shard, end in ends.items()):
            progress.end()
            session.show({"done": True, "events": sum(ends.values())}, "the read model has caught up")
            return 0
        if count > most:
            most, most_s = count, time.monotonic()
        problems = [f"shard {shard.shard}: {problem}" for shard in shards for problem in _problems(shard)]
        if problems and time.monotonic() - most_s > _STUCK_S:
            progress.end()
            session.lacks(
                f"the read model does not get on; it goes on by itself once this is mended: {'; '.join(problems)}"
            )
            return 1
        await asyncio.sleep(0.5)


def _restore(args: argparse.Namespace, settings: Settings) -> int:
    from wallet_core.adapters.restore import END, Cut, restore_shard
    from wallet_core.bootstrap import host_config

    if args.to_event is not None and args.to_event < 1:
        raise InvalidArgument(f"--to-event {args.to_event}: events are numbered from 1")
    cut = END
    if args.to_event is not None:
        cut = Cut(sequence=args.to_event)
    elif args.at:
        cut = Cut(time_ns=_time_ns(args.at))
    config = host_config(settings)
    if args.target:
        config = replace(config, data_dir=args.target)
    check_finished(config.data_dir.parent)
    progress: _Progress | None = None

    def note(what: str, at: int, end: int) -> None:
        nonlocal progress
        if progress is None or progress.what != what:
            if progress is not None:
                progress.end()
            progress = _Progress(what, end, quiet=args.json)
        progress.at(at)

    report = restore_shard(config, args.source, args.shard, dry_run=args.dry_run, cut=cut, note=note)
    if progress is not None:
        progress.end()
    if not args.dry_run and config.data_dir.absolute() == host_config(settings).data_dir.absolute():
        told = asyncio.run(
            _rebind(
                settings,
                args.shard,
                config.data_dir,
                identity=report["identity"],
                sequence=report["sequence_number"],
                time_ns=report["time_ns"],
            )
        )
        report["steps"] += told["steps"]
    if args.json:
        print(json.dumps(report))
    else:
        for line in report["steps"]:
            print(("would " if args.dry_run else "") + line)
    return 0


async def _accept(args: argparse.Namespace, settings: Settings) -> int:
    """Says what would be lost; with --yes the shard goes on with what its folder has."""
    from ops.database import database
    from wallet_core.adapters.accept import accept_shard, check_stopped, look_at
    from wallet_core.adapters.presence import lacking
    from wallet_core.bootstrap import host_config

    config = host_config(settings)
    check_finished(config.data_dir.parent)
    found = look_at(config, args.shard)
    check_stopped(config, args.shard)
    lacks: Lacking | None = None
    if not settings.wallet_alone:
        async with database(settings, "wallet") as connection:
            if connection is not None:
                lacks = await lacking(connection, args.shard, sequence=found.sequence, time_ns=found.time_ns)
    lines = _accept_lines(found, lacks, settings.wallet_id_window_ms, time.time_ns())
    record = {
        "shard": args.shard,
        "sequence_number": found.sequence,
        "seen": lacks.seen_sequence if lacks else None,
        "lacking_events": max((lacks.seen_sequence or 0) - found.sequence, 0) if lacks else None,
        "transfers": lacks.transfers if lacks else 0,
        "messages": lacks.messages if lacks else 0,
        "accepted": args.yes,
    }
    if args.yes:
        done = accept_shard(config, found)
        told = await _rebind(
            *(settings, args.shard, config.data_dir),
            identity=done.identity,
            sequence=done.sequence,
            time_ns=done.time_ns,
        )
        lines += told["steps"]
        record |= {"identity": done.identity, "lost_file": told["lost_file"], "messages": told["messages"]}
    else:
        lines.append(f"nothing was changed; `ducat wallet accept --shard {args.shard} --yes` does it")
    print(json.dumps(record) if args.json else "\n".join(lines))
    return 0


def _accept_lines(found: Found, lacks: Lacking | None, window_ms: int, now_ns: int) -> list[str]:
    """What is known of a shard that is to go on with what its folder has, and what comes after: of losses only where there are some."""
    end, shard = found.sequence, found.shard
    when = f"event {end} ({_time_text(found.time_ns)})" if end else "no event"
    lines = [f"shard {shard} goes on with {found.what} of {found.folder}, which ends with {when}"]
    kept = "it gets a new identity; a folder of this shard that turns up later is refused"
    if lacks is None:
        return [
            *lines,
            "there is no database that could know how far the shard was: whether anything is missing cannot be told from here",
            f"{kept}: keep it aside until you know that nothing is missing",
        ]
    seen = lacks.seen_sequence or 0
    if seen <= end and not lacks.transfers:
        what = "PostgreSQL has not heard of this shard yet" if lacks.seen_sequence is None else f"seen: event {seen}"
        lines.append(f"{what}; the log has all that was seen, so nothing is lost and nothing is applied again")
        if seen < end:
            lines.append(
                f"the log has {end - seen:,} events more than PostgreSQL has seen; if it was restored to an older state, payments that "
                f"it has forgotten are booked once more when they are told again: run `ducat check` before payouts"
            )
        return [*lines, f"{kept}; start the wallet"]
    which = f"event {seen}" if seen <= end + 1 else f"events {end + 1:,} to {seen:,}"
    to_file = ", which go to a file first" if lacks.transfers else ""
    lines.append(
        f"seen: event {seen}; {max(seen - end, 0):,} events are not in the log ({which}); "
        f"the read model has {lacks.transfers:,} transfers of them{to_file}"
    )
    if lacks.messages:
        lines.append(
            f"{lacks.messages:,} messages of payment.events, recorded since shortly before the log's end, are applied again "
            f"by themselves once the wallet runs; what the log has already changes nothing"
        )
        if now_ns - found.time_ns > window_ms * 10**6:
            lines.append(
                f"those that are older than the wallet's id window ({window_ms / 3_600_000:g} h, DUCAT_WALLET_ID_WINDOW_MS) are refused "
                f"(ID_TOO_OLD): set it longer for that start"
            )
    else:
        lines.append("no message of payment.events was recorded since, so none is applied again")
    return [
        *lines,
        "what of these events came over gRPC, if anything did, is lost: nothing brings it back. `ducat check` says afterwards what differs",
        f"{kept}: keep it aside, it is the only copy of what is lost",
    ]


async def _rebind(
    settings: Settings, shard: int, data_dir: Path, *, identity: str, sequence: int, time_ns: int
) -> dict[str, Any]:
    """PostgreSQL goes on with a shard's log that ends with event `sequence`. What the read model had behind it goes to a file."""
    from ops.database import database
    from wallet_core.adapters.presence import lost_transfers, rebind

    told: dict[str, Any] = {"steps": [], "lost_file": None, "messages": 0}
    if settings.wallet_alone:
        return told
    async with database(settings, "wallet") as connection:
        if connection is None:
            told["steps"].append("there is no database yet that could know the shard")
            return told
        await _wait_for_no_wallet(connection)
        lost = data_dir / f"shard-{shard:04d}.lost-after-{sequence}.jsonl"
        with _Lines(lost) as lines:
            async for record in lost_transfers(connection, shard, sequence):
                lines.add(record)
        done = await rebind(connection, shard, identity=identity, sequence=sequence, time_ns=time_ns)
    if lines.count:
        told["lost_file"] = str(lost)
        told["steps"].append(
            f"write the {lines.count} transfers that the read model had behind event {sequence} to {lost}"
        )
    told["messages"] = done.messages
    again = f"; {done.messages:,} messages will be looked for in the feed again" if done.messages else ""
    told["steps"].append(
        f"tell PostgreSQL that shard {shard} ends with event {sequence} (it had seen {done.seen_sequence}){again}"
    )
    told["steps"].append(await _empty_valkey(settings))
    return told


async def _empty_valkey(settings: Settings) -> str:
    """Balances in Valkey are sums over shards, so all of them begin again."""
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    from runtime.embedded import EmbeddedValkey
    from wallet_core.adapters.read_model import reset_valkey

    later = "once the wallet runs, run `ducat wallet rebuild`: Valkey could not be emptied"
    url = settings.redis_url or await asyncio.to_thread(EmbeddedValkey(f"{settings.data_dir}/valkey").running_url)
    if not url:
        return f"{later} (none answers)"
    client = Redis.from_url(url, socket_connect_timeout=5, socket_timeout=60)
    try:
        count = await reset_valkey(client)
    except (RedisError, OSError) as error:
        return f"{later} ({error})"
    finally:
        await client.aclose()
    return f"empty the read model in Valkey ({count} keys); the wallet fills it again from its logs"


async def _wait_for_no_wallet(connection: Any) -> None:
    """All processes of the wallet share the inbox and the feed's cursor. One that is refused and started again and again comes and goes."""
    from wallet_core.adapters.presence import other_wallets

    deadline = time.monotonic() + _WALLET_GONE_S
    while await other_wallets(connection):
        if time.monotonic() > deadline:
            raise FailedPrecondition(
                "a process of the wallet is connected to PostgreSQL; stop all of them (also those of other shards), then "
                "`ducat wallet accept` again"
            )
        await asyncio.sleep(0.1)


class _Lines:
    """A private file of JSON lines, which is not made where there are none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self.count = 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self._file = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w")
        self._file.write(json.dumps(record) + "\n")
        self.count += 1


def _serve(args: argparse.Namespace) -> int:
    from runtime.process import run as run_process
    from wallet_core.bootstrap import main

    overrides = {"wallet_shards": args.shards, "wallet_listen": args.listen or args.address}
    run_process(lambda: main(overrides))
    return 0


_COMMANDS: dict[str, Callable[[_Session], Awaitable[int]]] = {
    "shards": _shards,
    "balance": _balance,
    "history": _history,
    "events": _events,
    "snapshot": _snapshot,
    "snapshots": _snapshots,
    "verify": _verify,
    "check": _check,
    "rebuild": _rebuild,
}


# --- words in, words out


def _account_key(text: str) -> bytes:
    if len(text) == 32 and all(digit in "0123456789abcdefABCDEF" for digit in text):
        return bytes.fromhex(text)
    try:
        return account_id(text)
    except ValueError:
        raise InvalidArgument(f"ACCOUNT {text!a}: expected a name, or 32 hexadecimal digits") from None


def _account(text: str) -> dict[str, Any]:
    """The fields of a request that name an account."""
    key = _account_key(text)
    return {"account_id": key} if len(text) == 32 and key.hex() == text.lower() else {"name": text}


def _count(text: str) -> int:
    """0, 1, 2, …: what an argument that counts events may be."""
    return _number(text, 2**63 - 1)


def _shard_number(text: str) -> int:
    """The number of a shard."""
    return _number(text, 2**16 - 1)


def _number(text: str, most: int) -> int:
    if not text.isdecimal() or int(text[:20]) > most:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {most}, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds, at most a day, got {text!r}")
    return seconds


def _time_ns(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.astimezone()
    except (ValueError, OverflowError):
        raise _wrong_moment(text) from None
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _NS + since.microseconds * 1000


def _wrong_moment(text: str) -> InvalidArgument:
    return InvalidArgument(
        f"--at {text}: expected a time such as 2026-01-31T12:00:00Z, an event's number, or SHARD:NUMBER"
    )


def _time_text(time_ns: int) -> str:
    moment = datetime.fromtimestamp(time_ns // _NS, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % _NS // 1000:06}Z"


def _table(session: _Session, rows: Sequence[dict[str, Any]]) -> None:
    if session.args.json:
        for row in rows:
            print(json.dumps(row))
        return
    if not rows:
        print("nothing")
        return
    print(table(rows))


class _Progress:
    """One line on a terminal: how far, how fast, how long still. Nothing where nobody would see it move."""

    def __init__(self, what: str, end: int, *, quiet: bool) -> None:
        self.what = what
        self._end = end
        self._quiet = quiet or not sys.stderr.isatty()
        self._begin = time.monotonic()
        self._first: int | None = None
        self._shown = 0.0

    def at(self, done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if self._quiet or now - self._shown < 0.2:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._begin, 1e-6)
        left = f"{(self._end - done) / rate:,.0f} s left" if rate > 0 else ""
        share = 100 * done / self._end if self._end else 100
        line = f"\r{self.what}: {done:,} of {self._end:,} ({share:.0f} %)  {rate:,.0f}/s  {left}"
        print(f"{line:<79}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if not self._quiet and self._shown:
            print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)
