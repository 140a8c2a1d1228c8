"""Payment events for end-to-end tests, and a client that pays them through faults."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable
from typing import Any

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from ducat.payment.v1 import payment_pb2
from ops.demo import Outcome, order_state, pay_checkout
from ops.platform import Platform
from runtime.channel import open_channel

__all__ = ["assert_paid_once", "checkout", "is_published", "order", "pay_stubbornly"]

AMOUNTS = {"USD": "75.00", "EUR": "12.34", "JPY": "1500", "KWD": "3.125"}
STUBBORN_S = 120.0


def order(order_id: str, currency: str = "USD", **changes: Any) -> dict[str, Any]:
    return {
        "seller_account": "SELL-XYZ-1",
        "amount": AMOUNTS[currency],
        "currency": currency,
        "payment_order_id": order_id,
    } | changes


def checkout(count: int = 2, *, currencies: tuple[str, ...] = ("USD",), sellers: int = 2, **changes: Any) -> bytes:
    """A payment event of ``count`` orders; currencies and sellers take turns."""
    checkout_id = f"E2E-{uuid.uuid4()}"
    event = {
        "checkout_id": checkout_id,
        "buyer_info": {"buyer_id": "BUYER-1", "name": "Jane Doe", "email": "jane.doe@example.com"},
        "payment_orders": [
            order(
                f"{checkout_id}-{number}",
                currencies[number % len(currencies)],
                seller_account=f"SELL-{number % sellers}",
            )
            for number in range(count)
        ],
    } | changes
    return json.dumps(event).encode()


async def pay_stubbornly(platform: Platform, body: bytes) -> payment_pb2.Payment:
    """What a careful client does while processes die under it: the same request again, with the same ids."""
    deadline = asyncio.get_running_loop().time() + STUBBORN_S
    while True:
        try:
            async with platform.http_session() as http, platform.client() as client:
                return await pay_checkout(platform, http, client, body, log=lambda line: None)
        except Exception as error:
            if asyncio.get_running_loop().time() > deadline:
                raise
            print(f"again after {type(error).__name__}: {error}")
            await asyncio.sleep(0.2)


def assert_paid_once(payments: Iterable[payment_pb2.Payment], final: Outcome) -> None:
    """Every order of ``payments`` succeeded, their sellers' wallets have just that in ``final``, and the books agree."""
    paid: dict[str, int] = {}
    for payment in payments:
        for one in payment.payment_orders:
            assert order_state(one.state) == "SUCCESS", one
            name = f"seller/{one.seller_account}/{one.amount.currency_code}"
            paid[name] = paid.get(name, 0) + one.amount.amount_minor
    assert all(final.invariants().values()), final.as_json()
    wallets = final.as_json()["wallets"]
    assert {name: wallets[name] for name in paid} == paid


async def is_published(platform: Platform) -> None:
    """Until the relay of the payment service has given everything to the bus."""
    async with open_channel(platform.grpc_address("payment"), platform.settings) as channel:
        stub = feed_pb2_grpc.FeedServiceStub(channel)
        request = feed_pb2.GetFeedRequest(topic="payment.commands")
        before = -1
        async with asyncio.timeout(30):
            while (now := (await stub.GetFeed(request)).head_position) != before:  # type: ignore[misc]
                before = now
                await asyncio.sleep(0.5)
