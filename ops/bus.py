"""`ducat bus dead-letter list|retry|discard`: look at messages that no try could handle, send them again, or remove them.
`ducat bus groups`, `ducat bus groups remove`: who reads what and how far behind, and the end of a group that nobody reads any more.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from ducat.event.v1.event_pb2 import Envelope
from kernel.errors import Unavailable
from ops.terminal import json_line, printable, table
from runtime.bus import TOPICS, Bus, BusPolicy, open_bus
from runtime.bus.dead_letter import DeadLetter, DeadLetterStore, discard, list_dead_letters, retry, retry_all
from runtime.bus.groups import Group, GroupStore, remove
from runtime.embedded import EmbeddedValkey
from runtime.settings import Settings

__all__ = ["add_parser", "run"]

TIME_MS_MAX = 253_402_300_799_000
"""The end of the year 9999: a later time was written by nobody of ours."""


def add_parser(subparsers: Any) -> None:
    """Adds the command `bus`."""
    parser = subparsers.add_parser("bus", help="look at the bus")
    rooms = parser.add_subparsers(dest="room", required=True, metavar="ROOM")
    dead_letter = rooms.add_parser("dead-letter", help="messages that no try could handle")
    actions = dead_letter.add_subparsers(dest="action", required=True, metavar="ACTION")

    show = actions.add_parser("list", help="show them, oldest first")
    show.add_argument("--topic", default="", help="one topic, such as payment.events; default: all")
    show.add_argument("--limit", type=int, default=100, help="at most this many of a topic (default 100)")
    show.add_argument("--json", action="store_true", help="one JSON object a line")

    again = actions.add_parser("retry", help="publish them to their topic again, then remove them")
    again.add_argument("--topic", default="", help=f"such as {', '.join(TOPICS)}")
    again.add_argument(
        "--all", action="store_true", help="every dead letter of the topic, or of all topics without --topic"
    )
    again.add_argument("ids", nargs="*", metavar="ID", help="as `list` shows them; needs --topic")

    drop = actions.add_parser("discard", help="remove them; the feed of their topic still has every message")
    drop.add_argument("--topic", required=True, help=f"such as {', '.join(TOPICS)}")
    drop.add_argument("ids", nargs="+", metavar="ID", help="as `list` shows them")

    groups = rooms.add_parser("groups", help="who reads which topic, and how far behind")
    groups.add_argument("--topic", default="", help="one topic; default: all")
    groups.add_argument("--json", action="store_true", help="one JSON object a line")
    group_actions = groups.add_subparsers(dest="action", metavar="ACTION")
    gone = group_actions.add_parser("remove", help="remove a group that nobody reads any more")
    gone.add_argument("--topic", dest="of_topic", required=True, help=f"such as {', '.join(TOPICS)}")
    gone.add_argument("--group", required=True, help="as `ducat bus groups` shows it")
    gone.add_argument("--force", action="store_true", help="also while it has living members")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit code: 0 done, 1 a topic cannot be read, 2 wrong use. Raises DucatError, such as NotFound for an id."""
    if args.action == "retry" and bool(args.all) == bool(args.ids):
        print("bus dead-letter retry: give the ids to retry, or --all", file=sys.stderr)
        return 2
    if args.action == "retry" and args.ids and not args.topic:
        print("bus dead-letter retry: ids need --topic", file=sys.stderr)
        return 2
    return asyncio.run(_run(args, Settings.load()))


async def _run(args: argparse.Namespace, settings: Settings) -> int:
    bus: Bus = await open_bus(
        settings.bus,
        redis_url=_redis_url(settings) if settings.bus == "valkey" else "",
        kafka_bootstrap=settings.kafka_bootstrap,
        policy=BusPolicy(),
        name="ducat-bus",
    )
    store, group_store = cast("DeadLetterStore", bus), cast("GroupStore", bus)
    try:
        if args.room == "groups" and args.action == "remove":
            removed = await remove(group_store, args.of_topic, args.group, force=args.force)
            count = removed.lag + removed.pending
            print(printable(f"removed group {removed.name} of {removed.topic}: {count} messages it had not handled"))
        elif args.room == "groups":
            listed, broken = (
                (await group_store.groups(args.topic), {}) if args.topic else await group_store.all_groups()
            )
            _show_groups(listed, as_json=args.json)
            for topic, why in broken.items():
                print(f"bus groups: those of {printable(topic)} cannot be read: {printable(why)}", file=sys.stderr)
            if broken:
                return 1
        elif args.action == "list":
            _show(await list_dead_letters(store, args.topic, limit=args.limit), as_json=args.json)
        elif args.action == "discard":
            print(f"removed {len(await discard(store, args.topic, args.ids))}")
        else:
            topics = [args.topic] if args.topic else await store.dead_letter_topics()
            retried: list[DeadLetter] = []
            for topic in topics:
                retried += await (retry_all(store, topic) if args.all else retry(store, topic, args.ids))
            print(f"retried {len(retried)}: {', '.join(letter.id for letter in retried) or 'nothing to retry'}")
            left = [letter for letter in await list_dead_letters(store, args.topic) if letter.raw] if args.all else []
            if left:
                print(
                    f"left {len(left)} that are no message: look with `list`, then `discard` them, or `retry` them by id"
                )
    finally:
        await bus.close()
    return 0


def _redis_url(settings: Settings) -> str:
    """The settings' server, or the embedded one of a `ducat up` that runs on the settings' data folder."""
    url = settings.redis_url or EmbeddedValkey(Path(settings.data_dir) / "valkey").running_url()
    if not url:
        raise Unavailable(
            f"no bus: no Valkey answers on the data folder {settings.data_dir}; "
            "start `ducat up`, or set DUCAT_DATA_DIR or DUCAT_REDIS_URL to where it runs"
        )
    return url


def _show(letters: Sequence[DeadLetter], *, as_json: bool) -> None:
    if as_json:
        for letter in letters:
            print(json_line(_row(letter)))
        return
    if not letters:
        print("no dead letters")
    for letter in letters:
        row = _row(letter)
        print(
            printable(
                f"{row['id']}  {row['topic']} → {row['group']}  {row['kind']}  key {row['key']}  message {row['message_id']}"
            )
        )
        print(f"    {row['deliveries']} tries, first {row['first_failed']}, last {row['last_failed']}")
        print(f"    {printable(row['error'])}")


def _row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "topic": letter.message.topic,
        "group": letter.group,
        "kind": "(no message)" if letter.raw else kind_of(letter.message.payload),
        "key": letter.message.key,
        "message_id": letter.message.message_id,
        "deliveries": letter.delivery_count,
        "first_failed": _time_of(letter.first_failed_ms),
        "last_failed": _time_of(letter.last_failed_ms),
        "error": letter.error,
        "traceparent": letter.message.traceparent,
        "position": letter.message.position,
        **({"raw": letter.raw.decode(errors="backslashreplace")} if letter.raw else {}),
    }


def _show_groups(groups: Sequence[Group], *, as_json: bool) -> None:
    if as_json:
        for group in groups:
            print(json_line(_group_row(group)))
        return
    if not groups:
        print("no groups")
        return
    print(table([_group_row(group) for group in groups]))


def _group_row(group: Group) -> dict[str, Any]:
    return {
        "topic": group.topic,
        "group": group.name,
        "members": group.members,
        "lag": group.lag,
        "pending": group.pending,
        "waiting_s": round(group.waiting_s, 1),
        "idle_s": None if group.idle_s is None else round(group.idle_s, 1),
        "last_delivered": _time_of(group.last_delivered_ms) if group.last_delivered_ms else None,
    }


def kind_of(payload: bytes) -> str:
    """What the envelope says, such as `payment_order_succeeded`, or why that cannot be told."""
    try:
        return Envelope.FromString(payload).WhichOneof("body") or "(an envelope of a newer version)"
    except Exception:
        return "(no envelope)"


def _time_of(time_ms: int) -> str:
    time_ms = time_ms if 0 <= time_ms <= TIME_MS_MAX else 0
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
