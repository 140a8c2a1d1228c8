"""Risk: a slow peer makes this process run out of memory, or is sent what has a gap."""

from __future__ import annotations

import pytest

from ducat.wallet.v1 import relay_pb2
from wallet_core.adapters import relay
from wallet_core.adapters.relay import parse_peers


def delivery(number: int, size: int = 100) -> relay_pb2.Delivery:
    return relay_pb2.Delivery(number=number, payload=bytes(size))


async def test_what_one_call_carries_is_bounded_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "BYTES_MAX", 250)
    monkeypatch.setattr(relay, "DELIVERY_COUNT_MAX", 5)
    queue = relay._Queue()
    for number in range(4):
        queue.put(delivery(number))
    queue.put(delivery(4, size=1_000))
    for number in range(5, 12):
        queue.put(delivery(number, size=0))
    calls = [[one.number for one in await queue.take()] for _ in range(5)]
    assert calls == [[0, 1], [2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


async def test_a_full_queue_takes_nothing_more_until_it_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "QUEUE_BYTES_MAX", 250)
    queue = relay._Queue()
    for number in range(6):
        queue.put(delivery(number))
    assert [one.number for one in await queue.take()] == [0, 1, 2]
    queue.put(delivery(6))  # there is room again, but 3 to 5 are missing
    assert queue.is_spilled
    queue.clear()
    queue.put(delivery(3))
    assert not queue.is_spilled
    assert [one.number for one in await queue.take()] == [3]


def test_the_map_of_peers() -> None:
    found = parse_peers("2-3=one:1 5=two:2", lambda text: [int(part) for part in text.split("-")])
    assert found == {2: "one:1", 3: "one:1", 5: "two:2"}
