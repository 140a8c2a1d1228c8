"""`ducat bus dead-letter list|retry` and `ducat bus groups` as an operator types it."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest
import redis

from ducat.event.v1.event_pb2 import Envelope, PaymentCompleted
from kernel.errors import FailedPrecondition, NotFound
from ops.bus import add_parser, kind_of, run
from runtime.bus import Message
from runtime.bus._dispatch import Delivery
from runtime.bus.valkey import ValkeyBus

ENVELOPE = Envelope(event_id="e-1", payment_completed=PaymentCompleted(checkout_id="c-1")).SerializeToString()


def command(*words: str) -> argparse.Namespace:
    return bus_command("dead-letter", *words)


def bus_command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["bus", *words])


async def bury(url: str, *messages: Message) -> None:
    bus = await ValkeyBus.open(url)
    for message in messages:
        topic = await bus.topic(message.topic)
        await bus.bury(topic, "wallet", Delivery(message, 0, "0-1", failures=8), "ValueError: no")
    await bus.close()


def test_list_shows_what_failed_and_retry_sends_it_again(
    valkey_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUCAT_REDIS_URL", valkey_url)
    assert run(command("list")) == 0
    assert capsys.readouterr().out == "no dead letters\n"
    good, broken = Message("payment.events", "c-1", "e-1", ENVELOPE), Message("payment.events", "c-2", "e-2", b"\xff")
    asyncio.run(bury(valkey_url, good, broken))

    assert run(command("list", "--json")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["message_id"], row["kind"], row["group"], row["deliveries"], row["error"]) for row in rows] == [
        ("e-1", "payment_completed", "wallet", 8, "ValueError: no"),
        ("e-2", "(no envelope)", "wallet", 8, "ValueError: no"),
    ]
    assert run(command("list", "--topic", "payment.events")) == 0
    assert "payment.events → wallet  payment_completed  key c-1" in capsys.readouterr().out

    with pytest.raises(NotFound):
        run(command("retry", "--topic", "payment.events", "9-9"))
    assert run(command("retry", "--topic", "payment.events", rows[0]["id"])) == 0
    assert capsys.readouterr().out == f"retried 1: {rows[0]['id']}\n"
    assert run(command("retry", "--all")) == 0
    assert run(command("list")) == 0
    assert capsys.readouterr().out.endswith("no dead letters\n")


def test_wrong_use_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command("retry")) == 2
    assert run(command("retry", "--all", "1-1")) == 2
    assert run(command("retry", "1-1")) == 2
    assert "--topic" in capsys.readouterr().err


def test_kind_of_a_message_that_says_nothing() -> None:
    assert kind_of(b"") == "(an envelope of a newer version)"


def test_what_is_no_message_is_listed_and_retried(
    valkey_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUCAT_REDIS_URL", valkey_url)
    fields = [b"k", b"\xff\x1b[2J", b"i", b"e-1"]

    async def bury_raw() -> None:
        bus = await ValkeyBus.open(valkey_url)
        topic = await bus.topic("payment.events")
        delivery = Delivery(Message(topic.name, "\ufffd\x1b[2J", "e-1", b""), 0, "0-1", refusal="no", raw=fields)
        await bus.bury(topic, "wallet", delivery, "Undecodable: no")
        await bus.close()

    asyncio.run(bury_raw())
    assert run(command("list")) == 0
    shown = capsys.readouterr().out
    assert "(no message)  key \ufffd\\x1b[2J  message e-1" in shown
    assert "\x1b" not in shown
    assert run(command("list", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["raw"].startswith("*4\r\n$1\r\nk")
    assert run(command("retry", "--all")) == 0
    assert "left 1 that are no message" in capsys.readouterr().out
    with redis.Redis.from_url(valkey_url) as client:
        letter_id = client.xrange("bus:{payment.events}:dead-letter")[0][0].decode()
    assert run(command("retry", "--topic", "payment.events", letter_id)) == 0
    with redis.Redis.from_url(valkey_url) as client:
        streams = [client.xrange(key) for key in client.keys("bus:{payment.events}:?")]
    assert [entry for stream in streams for _, entry in stream] == [{b"k": b"\xff\x1b[2J", b"i": b"e-1"}]


def test_groups_are_shown_and_removed(
    valkey_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUCAT_REDIS_URL", valkey_url)
    assert run(bus_command("groups")) == 0
    assert capsys.readouterr().out == "no groups\n"

    async def publish() -> None:
        bus = await ValkeyBus.open(valkey_url)
        await bus.publish([Message("payment.events", f"c-{n}", f"e-{n}", ENVELOPE) for n in range(5)])
        await bus.close()

    asyncio.run(publish())
    with redis.Redis.from_url(valkey_url) as client:
        for name in ("wallet-1", b"\xff\x1b"):
            for key in client.keys("bus:{payment.events}:?"):
                client.xgroup_create(key, name, "0")
        client.zadd("bus:{payment.events}:wallet-1:members", {"somebody": 2e12})
    assert run(bus_command("groups", "--json")) == 0
    rows = {row["group"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {name: (row["members"], row["lag"], row["pending"]) for name, row in rows.items()} == {
        "wallet-1": (1, 5, 0),
        "\\xff\x1b": (0, 5, 0),
    }
    assert run(bus_command("groups", "--topic", "payment.events")) == 0
    shown = capsys.readouterr().out
    assert "wallet-1" in shown
    assert "\x1b" not in shown

    remove = ("groups", "remove", "--topic", "payment.events", "--group")
    with pytest.raises(FailedPrecondition, match="--force"):
        run(bus_command(*remove, "wallet-1"))
    assert run(bus_command(*remove, "wallet-1", "--force")) == 0
    assert capsys.readouterr().out == "removed group wallet-1 of payment.events: 5 messages it had not handled\n"
    assert run(bus_command(*remove, "\\xff\x1b")) == 0
    with pytest.raises(NotFound):
        run(bus_command(*remove, "wallet-1"))


def test_a_broken_topic_hides_no_other(
    valkey_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUCAT_REDIS_URL", valkey_url)

    async def publish() -> None:
        bus = await ValkeyBus.open(valkey_url)
        await bus.publish([Message(topic, "c", "e", ENVELOPE) for topic in ("a", "b", "c", "d", "e")])
        await bus.close()

    asyncio.run(publish())
    with redis.Redis.from_url(valkey_url) as client:
        for key in client.keys("bus:{?}:?"):
            client.xgroup_create(key, "wallet", "0")
        client.set("bus:{a}:partitions", "many")
        client.rpush("bus:{b}:wallet:members", "nobody")
        client.set("bus:{c}:wallet:leases", "x")
        client.hset("bus:{d}:wallet:leases", "seen", "yesterday")
    assert run(bus_command("groups", "--json")) == 1
    said = capsys.readouterr()
    assert {json.loads(line)["topic"] for line in said.out.splitlines()} >= {"e"}
    for topic in ("a", "b", "c", "d"):
        assert (f"those of {topic} cannot be read" in said.err) != (f'"topic": "{topic}"' in said.out), said
