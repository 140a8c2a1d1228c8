"""The payment service over a real PostgreSQL, with a fake executor, a fake bus and a clock that stands still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from ducat.event.v1.event_pb2 import Envelope
from kernel.clock import FixedClock
from payment.adapters.changes import PaymentChanges
from payment.adapters.postgres import PostgresStore
from payment.domain.bank_account import BankAccount
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment import Buyer
from payment.domain.reports import OrderRegistered
from payment.domain.requests import OrderSpec, PaymentRequest, PayoutRequest
from payment.service.notifications import Counts, Notifications
from payment.service.payments import Payments
from payment.service.payouts import Payouts
from payment.service.ports import Subject
from payment.service.reports import Reports
from payment.service.timers import Timers
from runtime.bus import Message
from runtime.postgres import connect, create_pool

PROVIDERS = {"sandbox": frozenset[str](), "sandbox2": frozenset[str]()}
HOLD = b"hold-id-16-bytes"


class FakeExecutor:
    """Hands out the notifications that a test put into it."""

    def __init__(self) -> None:
        self.notifications: list[Notification] = []
        self.calls: list[tuple[str, bytes]] = []

    async def verify(self, psp: str, body: bytes, headers: Mapping[str, str], channel: int) -> list[Notification]:
        self.calls.append((psp, body))
        return self.notifications


class FakeBus:
    """Keeps what the relay publishes; nothing is ever consumed from it."""

    def __init__(self) -> None:
        self.published: list[Message] = []
        self._arrived = asyncio.Condition()

    async def publish(self, messages: Sequence[Message]) -> None:
        async with self._arrived:
            self.published += messages
            self._arrived.notify_all()

    async def consume(self, topic: str, group: str, handler: Any, *, batch_max: int = 64) -> None:
        await asyncio.Event().wait()

    async def consume_each(self, topic: str, group: str, handler: Any, *, concurrency: int = 32) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass

    async def holds(self, count: int) -> None:
        """Waits until so many messages were published."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.published) >= count)


@dataclass
class Service:
    """One payment process without its sockets. Several may stand on the same database."""

    pool: asyncpg.Pool
    dsn: str
    clock: FixedClock
    store: PostgresStore
    executor: FakeExecutor
    changes: PaymentChanges
    payments: Payments
    payouts: Payouts
    notifications: Notifications
    reports: Reports
    timers: Timers
    reported: list[tuple[Outcome, Notification, Subject | None]] = field(default_factory=list)
    others: list[Service] = field(default_factory=list)

    def another(self) -> Service:
        """A second process on the same database: it shares nothing with this one but the tables."""
        self.others.append(Service.over(self.pool, self.dsn))
        return self.others[-1]

    @classmethod
    def over(cls, pool: asyncpg.Pool, dsn: str) -> Service:
        clock, store, executor = FixedClock(), PostgresStore(pool), FakeExecutor()
        changes = PaymentChanges(lambda: connect(dsn, "payment"))
        reported: list[tuple[Outcome, Notification, Subject | None]] = []

        def report(*facts: Any) -> None:
            reported.append(facts)

        notifications = Notifications(store, executor, clock, report)
        return cls(
            pool,
            dsn,
            clock,
            store,
            executor,
            changes,
            Payments(store, changes, clock, providers=PROVIDERS, orders_max=100, expiry=timedelta(days=1)),
            Payouts(store, clock, providers=PROVIDERS),
            notifications,
            Reports(store, notifications, clock, report),
            Timers(store, notifications, clock),
            reported,
        )

    async def outbox(self) -> list[tuple[str, Envelope]]:
        """What waits to be published: topic and envelope, in order."""
        rows = await self.pool.fetch("SELECT topic, message_id, payload FROM payment.outbox ORDER BY position")
        found = [(row["topic"], Envelope.FromString(row["payload"])) for row in rows]
        assert [envelope.event_id for _, envelope in found] == [row["message_id"] for row in rows]
        return found

    async def said(self) -> list[str]:
        """The kinds of what waits to be published, in order."""
        return [str(envelope.WhichOneof("body")) for _, envelope in await self.outbox()]

    async def register(self, *order_ids: str, psp: str = "sandbox") -> None:
        """The executor reports that the PSP has the orders."""
        await self.reports.apply(
            "executor.events",
            [(f"reg-{each}", OrderRegistered(each, psp, f"pi_{each}", f"http://pay/{each}")) for each in order_ids],
        )

    async def tell(self, *notifications: Notification) -> Counts:
        """A PSP calls the webhook."""
        self.executor.notifications = list(notifications)
        return await self.notifications.record("sandbox", b"{}", {}, 1)


def checkout(*orders: tuple[str, int], checkout_id: str = "CH-1", currency: str = "USD") -> PaymentRequest:
    """A payment event of the given (order id, amount)."""
    return PaymentRequest(
        checkout_id,
        Buyer("BUYER-1", "Jane Doe", "jane@example.com"),
        tuple(OrderSpec(order_id, f"SELL-{order_id}", currency, amount) for order_id, amount in orders),
    )


def paid(order_id: str, amount: int, event_id: str = "", **values: Any) -> Notification:
    """The PSP's success of an order."""
    values = {
        "kind": NotificationKind.ORDER_SUCCEEDED,
        "psp": "sandbox",
        "psp_object_id": f"pi_{order_id}",
        "merchant_reference": order_id,
        "currency_code": "USD",
        "amount_minor": amount,
        "psp_type": "payment_intent.succeeded",
        **values,
    }
    return Notification(psp_event_id=event_id or f"evt_{order_id}", **values)


def payout_request(reference: str = "PO-1", **values: Any) -> PayoutRequest:
    """A payout of 7.50 USD to a US account."""
    account = BankAccount("Jane Doe", "US", "aba_routing_number", "021000021", "1234567890", bank_name="Anytown")
    return PayoutRequest(reference, "SELL-1", "USD", 750, values.pop("recipient", account), "work", **values)


@pytest.fixture
async def service(postgres_dsn: str) -> AsyncIterator[Service]:
    pool = await create_pool(postgres_dsn, "payment", max_size=60)
    made = Service.over(pool, postgres_dsn)
    yield made
    for each in (made, *made.others):
        await each.changes.close()
        await each.store.close()
    await pool.close()
