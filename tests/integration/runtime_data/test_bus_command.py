"""`ducat bus dead-letter list|retry` as an operator types it."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest

from ducat.event.v1.event_pb2 import Envelope, PaymentCompleted
from kernel.errors import NotFound
from ops.bus import add_parser, kind_of, run
from runtime.bus import Message
from runtime.bus._dispatch import Delivery
from runtime.bus.valkey import ValkeyBus

ENVELOPE = Envelope(event_id="e-1", payment_completed=PaymentCompleted(checkout_id="c-1")).SerializeToString()


def command(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["bus", "dead-letter", *words])


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
