"""The store on PostgreSQL, schema `payment`; the statements that write are functions of the migration.

A create is one statement. Everything else that changes state is one read without locks, the decision in Python
through the state tables, and one statement (`payment.apply`) that writes back where every revision is still the one
that was read. So each transaction is one round trip, no lock is ever held while Python thinks, and a decision on old
state writes nothing (StaleState).
"""

# ruff: noqa: S608 - every piece that is put into a statement is a constant of this file; values are always arguments
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from payment.adapters.envelopes import encode, encode_completed, encode_execute_orders
from payment.domain.bank_account import BankAccount, PostalAddress
from payment.domain.facts import Change
from payment.domain.notification import Notification, NotificationKind
from payment.domain.payment import Buyer, Payment
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from payment.domain.payout import Payout, PayoutState
from payment.service.ports import (
    ChangeSet,
    Loaded,
    OrderIdsTaken,
    PaymentFilter,
    PayoutFilter,
    Position,
    RecordedNotification,
    StaleState,
    Stored,
)

__all__ = ["PostgresStore"]

_ORDER_IDS_TAKEN = "DU001"
_STALE = frozenset({"DU002", "40001", "40P01"})
"""Our own code for a changed revision, serialization failure, deadlock: all mean "load and decide again"."""

_ORDER = """payment_order_id, checkout_id, seller_account, currency_code, amount_minor, state, create_time, update_time,
    psp, psp_token, hosted_page_url, failure_reason, attention, refunded_minor, cancel_requested, revision,
    traceparent"""
_PAYOUT = """reference, seller_account, currency_code, amount_minor, recipient, purpose, psp, state,
    create_time, update_time, schedule_time, psp_payout_id, hold_id, failure_reason, attention, revision,
    traceparent"""
_EVENT = "e.checkout_id, e.buyer_id, e.buyer_name, e.buyer_email, e.is_payment_done, e.create_time"


def _prefixed(columns: str, prefix: str) -> str:
    return ", ".join(f"{prefix}.{column.strip()}" for column in columns.split(","))


_CREATE_PAYMENT = f"SELECT payment.create_payment({', '.join(f'${n}' for n in range(1, 17))})"
_CREATE_PAYOUT = f"SELECT payment.create_payout({', '.join(f'${n}' for n in range(1, 17))})"
_APPLY = f"SELECT payment.apply({', '.join(f'${n}' for n in range(1, 45))})"
_READ_PAYMENT = f"""
SELECT {_prefixed(_ORDER, "o")}, o.history, e.buyer_id, e.buyer_name, e.buyer_email, e.is_payment_done,
    e.create_time AS event_create_time
FROM payment.payment_event AS e JOIN payment.payment_order AS o USING (checkout_id)
WHERE e.checkout_id = $1 ORDER BY o.position
"""
_ORDERS_OF = (
    f"SELECT {_ORDER}, history FROM payment.payment_order WHERE checkout_id = ANY($1) ORDER BY checkout_id, position"
)
_READ_PAYOUT = f"SELECT {_PAYOUT}, history FROM payment.payout WHERE reference = $1"
_TAKEN = "SELECT payment_order_id FROM payment.payment_order WHERE payment_order_id = ANY($1) AND checkout_id <> $2"

_KNOWN_NOTIFICATIONS = """
FROM unnest($2::text[], $3::text[]) AS u(id, reference)
LEFT JOIN payment.psp_notification AS k ON k.psp = $1 AND k.psp_event_id = u.id AND k.outcome <> 0
"""
_KNOWN_MESSAGES = """
FROM unnest($2::text[], $3::text[]) AS u(id, reference)
LEFT JOIN payment.inbox AS k ON k.consumer = $1 AND k.message_id = u.id
"""
_JOIN_ORDER = "LEFT JOIN payment.payment_order AS o ON o.payment_order_id = u.reference"
_JOIN_PAYOUT = "LEFT JOIN payment.payout AS q ON q.reference = u.reference"
_ORDERS_FOR_NOTIFICATIONS = (
    f"SELECT u.id, k.psp IS NOT NULL AS is_known, {_prefixed(_ORDER, 'o')} {_KNOWN_NOTIFICATIONS} {_JOIN_ORDER}"
)
_PAYOUTS_FOR_NOTIFICATIONS = (
    f"SELECT u.id, k.psp IS NOT NULL AS is_known, {_prefixed(_PAYOUT, 'q')} {_KNOWN_NOTIFICATIONS} {_JOIN_PAYOUT}"
)
_ORDERS_FOR_MESSAGES = (
    f"SELECT u.id, k.consumer IS NOT NULL AS is_known, {_prefixed(_ORDER, 'o')} {_KNOWN_MESSAGES} {_JOIN_ORDER}"
)
_PAYOUTS_FOR_MESSAGES = (
    f"SELECT u.id, k.consumer IS NOT NULL AS is_known, {_prefixed(_PAYOUT, 'q')} {_KNOWN_MESSAGES} {_JOIN_PAYOUT}"
)
_ORDERS_BY_TOKEN = (
    f"SELECT {_ORDER} FROM payment.payment_order WHERE psp = $1 AND psp_token = ANY($2) AND psp_token <> ''"
)
_PAYOUTS_BY_TOKEN = (
    f"SELECT {_PAYOUT} FROM payment.payout WHERE psp = $1 AND psp_payout_id = ANY($2) AND psp_payout_id <> ''"
)
_OVERDUE = """
SELECT checkout_id FROM payment.payment_event WHERE NOT is_payment_done AND expire_time <= $1 ORDER BY expire_time
LIMIT $2
"""
_DUE_PAYOUTS = """
SELECT reference FROM payment.payout WHERE state = 2 AND schedule_time <= $1 ORDER BY schedule_time LIMIT $2
"""
_PARKED = "SELECT psp, psp_event_id, kind, content, attempt_count FROM payment.psp_notification WHERE outcome = 0"
_PARKED_DUE = f"{_PARKED} AND next_attempt_time <= $1 ORDER BY next_attempt_time LIMIT $2"
_PARKED_OF_OBJECTS = f"{_PARKED} AND content ->> 'object' = ANY($1) ORDER BY create_time LIMIT $2"

_FIRST_HISTORY = '[{"s":%d,"c":"created","t":%d}]'


class PostgresStore:
    """Implements payment.service.ports.Store over an asyncpg pool."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    # --- payments
    # -----------------------------------------------------------------------------------------------------------

    async def create_payment(
        self, payment: Payment, content_hash: bytes, expire_time: datetime, traceparent: str
    ) -> Stored:
        """One statement, one round trip."""
        message_ids, payloads = encode_execute_orders(payment, traceparent)
        orders, buyer, now = payment.orders, payment.buyer, payment.create_time
        try:
            stored = await self._pool.fetchval(
                _CREATE_PAYMENT,
                payment.checkout_id,
                content_hash,
                buyer.buyer_id,
                buyer.name,
                buyer.email,
                now,
                expire_time,
                traceparent,
                [order.payment_order_id for order in orders],
                [order.seller_account for order in orders],
                [order.currency_code for order in orders],
                [order.amount_minor for order in orders],
                [order.psp for order in orders],
                _FIRST_HISTORY % (PaymentOrderState.NOT_STARTED, int(now.timestamp() * 1000)),
                message_ids,
                payloads,
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate == _ORDER_IDS_TAKEN:
                raise OrderIdsTaken(json.loads(error.detail or "[]")) from error
            raise
        return Stored(stored)

    async def taken_order_ids(self, checkout_id: str, payment_order_ids: Sequence[str]) -> list[str]:
        """Those of the ids that belong to other checkouts."""
        return [row[0] for row in await self._pool.fetch(_TAKEN, list(payment_order_ids), checkout_id)]

    async def read_payment(self, checkout_id: str) -> Payment | None:
        """One payment with its orders and their histories."""
        rows = await self._pool.fetch(_READ_PAYMENT, checkout_id)
        if not rows:
            return None
        first = rows[0]
        return Payment(
            checkout_id,
            Buyer(first["buyer_id"], first["buyer_name"], first["buyer_email"]),
            [_order_of(row, row["history"]) for row in rows],
            first["is_payment_done"],
            first["event_create_time"],
        )

    async def list_payments(self, filter: PaymentFilter, after: Position | None, limit: int) -> list[Payment]:
        """Newest first, after a position."""
        conditions, arguments = _Conditions.start(after, "e.create_time", "e.checkout_id")
        if filter.buyer_id:
            conditions.append(f"e.buyer_id = ${arguments.add(filter.buyer_id)}")
        if filter.seller_account:
            conditions.append(
                "EXISTS (SELECT FROM payment.payment_order AS o WHERE o.checkout_id = e.checkout_id"
                f" AND o.seller_account = ${arguments.add(filter.seller_account)})"
            )
        if filter.open_only:
            conditions.append("NOT e.is_payment_done")
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = await self._pool.fetch(
            f"SELECT {_EVENT} FROM payment.payment_event AS e {where}"
            f" ORDER BY e.create_time DESC, e.checkout_id DESC LIMIT ${arguments.add(limit)}",
            *arguments.values,
        )
        orders: dict[str, list[PaymentOrder]] = {row["checkout_id"]: [] for row in rows}
        for row in await self._pool.fetch(_ORDERS_OF, list(orders)) if rows else ():
            orders[row["checkout_id"]].append(_order_of(row, row["history"]))
        return [
            Payment(
                row["checkout_id"],
                Buyer(row["buyer_id"], row["buyer_name"], row["buyer_email"]),
                orders[row["checkout_id"]],
                row["is_payment_done"],
                row["create_time"],
            )
            for row in rows
        ]

    # --- payouts
    # ------------------------------------------------------------------------------------------------------------

    async def create_payout(self, payout: Payout, content_hash: bytes) -> Stored:
        """One statement, one round trip."""
        message_id, payload = "", b""
        if payout.facts:
            _, _, message_id, payload, _ = encode(payout.facts[0], payout, payout.create_time)
        stored = await self._pool.fetchval(
            _CREATE_PAYOUT,
            payout.reference,
            content_hash,
            payout.seller_account,
            payout.currency_code,
            payout.amount_minor,
            _recipient_json(payout.recipient),
            "",
            payout.purpose,
            int(payout.state),
            payout.psp,
            payout.schedule_time,
            payout.create_time,
            payout.traceparent,
            _FIRST_HISTORY % (payout.state, int(payout.create_time.timestamp() * 1000)),
            message_id,
            payload,
        )
        return Stored(stored)

    async def read_payout(self, reference: str) -> Payout | None:
        """One payout with its history."""
        row = await self._pool.fetchrow(_READ_PAYOUT, reference)
        return _payout_of(row, row["history"]) if row else None

    async def list_payouts(self, filter: PayoutFilter, after: Position | None, limit: int) -> list[Payout]:
        """Newest first, after a position."""
        conditions, arguments = _Conditions.start(after, "create_time", "reference")
        if filter.seller_account:
            conditions.append(f"seller_account = ${arguments.add(filter.seller_account)}")
        if filter.state is not None:
            conditions.append(f"state = ${arguments.add(int(filter.state))}")
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = await self._pool.fetch(
            f"SELECT {_PAYOUT}, history FROM payment.payout {where}"
            f" ORDER BY create_time DESC, reference DESC LIMIT ${arguments.add(limit)}",
            *arguments.values,
        )
        return [_payout_of(row, row["history"]) for row in rows]

    # --- load, decide elsewhere, apply
    # --------------------------------------------------------------------------------------

    async def load_for_notifications(self, notifications: Sequence[Notification]) -> Loaded:
        """One round trip where the PSP echoes our reference; a second one for those that are found by the
        PSP's id only.
        """
        loaded = Loaded()
        psp = notifications[0].psp
        about_payouts = [each for each in notifications if each.kind.subject == "payout"]
        others = [each for each in notifications if each.kind.subject != "payout"]
        if others:
            await self._load(loaded, _ORDERS_FOR_NOTIFICATIONS, psp, others, _order_of, loaded.orders)
            unmatched = _objects_unmatched(others, loaded.orders)
            for row in await self._pool.fetch(_ORDERS_BY_TOKEN, psp, unmatched) if unmatched else ():
                loaded.orders[row["payment_order_id"]] = _order_of(row)
        if about_payouts:
            await self._load(loaded, _PAYOUTS_FOR_NOTIFICATIONS, psp, about_payouts, _payout_of, loaded.payouts)
            unmatched = _objects_unmatched(about_payouts, loaded.payouts)
            for row in await self._pool.fetch(_PAYOUTS_BY_TOKEN, psp, unmatched) if unmatched else ():
                loaded.payouts[row["reference"]] = _payout_of(row)
        return loaded

    async def _load(
        self,
        loaded: Loaded,
        statement: str,
        psp: str,
        notifications: Sequence[Notification],
        of: Any,
        into: dict[str, Any],
    ) -> None:
        rows = await self._pool.fetch(
            statement,
            psp,
            [each.psp_event_id for each in notifications],
            [each.merchant_reference for each in notifications],
        )
        _take(rows, loaded, of, into)

    async def load_for_messages(
        self, consumer: str, message_ids: Sequence[str], order_ids: Sequence[str], references: Sequence[str]
    ) -> Loaded:
        """One round trip where all messages are about orders, or all about payouts."""
        loaded = Loaded()
        ids = list(message_ids)
        if order_ids or not references:
            rows = await self._pool.fetch(_ORDERS_FOR_MESSAGES, consumer, *_padded(ids, order_ids))
            _take(rows, loaded, _order_of, loaded.orders)
            ids = []
        if references:
            rows = await self._pool.fetch(_PAYOUTS_FOR_MESSAGES, consumer, *_padded(ids, references))
            _take(rows, loaded, _payout_of, loaded.payouts)
        return loaded

    async def apply(self, changes: ChangeSet) -> bool:
        """One statement, one round trip."""
        now = changes.now
        orders = sorted(changes.orders, key=_by_order_id)
        payouts = sorted(changes.payouts, key=_by_reference)
        notifications = changes.notifications
        outbox = [encode(fact, subject, now) for fact, subject in changes.facts]
        closed: dict[str, int] = {}
        traces: dict[str, str] = {}
        for order in orders:
            if order.is_closed_now:
                closed[order.checkout_id] = closed.get(order.checkout_id, 0) + 1
                traces[order.checkout_id] = order.traceparent
        completed = [encode_completed(checkout_id, now, traces[checkout_id]) for checkout_id in closed]
        known_objects = [order.psp_token for order in orders if order.psp_token] + [
            payout.psp_payout_id for payout in payouts if payout.psp_payout_id
        ]
        try:
            has_parked: bool = await self._pool.fetchval(
                _APPLY,
                now,
                changes.consumer,
                changes.message_ids,
                [each.notification.psp for each in notifications],
                [each.notification.psp_event_id for each in notifications],
                [each.notification.kind for each in notifications],
                [each.outcome for each in notifications],
                [each.reference for each in notifications],
                [_content_json(each) for each in notifications],
                [each.attempt_count for each in notifications],
                [each.next_attempt_time for each in notifications],
                [order.payment_order_id for order in orders],
                [order.stored_revision for order in orders],
                [order.revision for order in orders],
                [order.state for order in orders],
                [order.psp for order in orders],
                [order.psp_token for order in orders],
                [order.hosted_page_url for order in orders],
                [order.failure_reason for order in orders],
                [order.attention for order in orders],
                [order.cancel_requested for order in orders],
                [order.refunded_minor for order in orders],
                [_history_json(order.changes) for order in orders],
                [payout.reference for payout in payouts],
                [payout.stored_revision for payout in payouts],
                [payout.revision for payout in payouts],
                [payout.state for payout in payouts],
                [payout.psp_payout_id for payout in payouts],
                [payout.hold_id for payout in payouts],
                [payout.failure_reason for payout in payouts],
                [payout.attention for payout in payouts],
                [_history_json(payout.changes) for payout in payouts],
                [row[0] for row in outbox],
                [row[1] for row in outbox],
                [row[2] for row in outbox],
                [row[3] for row in outbox],
                [row[4] for row in outbox],
                list(closed),
                list(closed.values()),
                [row[0] for row in completed],
                [row[1] for row in completed],
                [traces[checkout_id] for checkout_id in closed],
                list({order.checkout_id for order in orders}),
                known_objects,
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate in _STALE:
                raise StaleState(str(error)) from error
            raise
        return has_parked

    # --- what the clock asks for
    # --------------------------------------------------------------------------------------------

    async def overdue_checkout_ids(self, now: datetime, limit: int) -> list[str]:
        """Open payments whose time is over, oldest first."""
        return [row[0] for row in await self._pool.fetch(_OVERDUE, now, limit)]

    async def due_payout_references(self, now: datetime, limit: int) -> list[str]:
        """Scheduled payouts whose time has come, oldest first."""
        return [row[0] for row in await self._pool.fetch(_DUE_PAYOUTS, now, limit)]

    async def parked_notifications(
        self, now: datetime | None, psp_object_ids: Sequence[str], limit: int
    ) -> list[Notification]:
        """Parked notifications that are due at `now`, or those of the given PSP objects."""
        if now is not None:
            rows = await self._pool.fetch(_PARKED_DUE, now, limit)
        else:
            rows = await self._pool.fetch(_PARKED_OF_OBJECTS, list(psp_object_ids), limit)
        return [_notification_of(row) for row in rows]


class _Conditions:
    """Numbered arguments of a statement whose conditions vary."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def add(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values)

    @classmethod
    def start(cls, after: Position | None, time: str, key: str) -> tuple[list[str], _Conditions]:
        arguments = cls()
        if after is None:
            return [], arguments
        return [f"({time}, {key}) < (${arguments.add(after[0])}, ${arguments.add(after[1])})"], arguments


def _take(rows: Sequence[Any], loaded: Loaded, of: Any, into: dict[str, Any]) -> None:
    for row in rows:
        if row["is_known"]:
            loaded.known.add(row["id"])
        key = row[2]
        if key is not None and key not in into:
            into[key] = of(row)


def _padded(ids: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two lists of one length for unnest; nothing has the empty id."""
    count = max(len(ids), len(references))
    return [*ids, *[""] * (count - len(ids))], [*references, *[""] * (count - len(references))]


def _objects_unmatched(notifications: Sequence[Notification], found: Mapping[str, object]) -> list[str]:
    return [each.psp_object_id for each in notifications if each.psp_object_id and each.merchant_reference not in found]


def _by_order_id(order: PaymentOrder) -> str:
    return order.payment_order_id


def _by_reference(payout: Payout) -> str:
    return payout.reference


def _order_of(row: Any, history: str = "[]") -> PaymentOrder:
    state = PaymentOrderState(row["state"])
    revision = row["revision"]
    return PaymentOrder(
        payment_order_id=row["payment_order_id"],
        checkout_id=row["checkout_id"],
        seller_account=row["seller_account"],
        currency_code=row["currency_code"],
        amount_minor=row["amount_minor"],
        state=state,
        create_time=row["create_time"],
        update_time=row["update_time"],
        psp=row["psp"],
        psp_token=row["psp_token"],
        hosted_page_url=row["hosted_page_url"],
        failure_reason=row["failure_reason"],
        attention=row["attention"],
        refunded_minor=row["refunded_minor"],
        cancel_requested=row["cancel_requested"],
        revision=revision,
        stored_revision=revision,
        stored_state=state,
        traceparent=row["traceparent"],
        history=_history_of(history),
    )


def _payout_of(row: Any, history: str = "[]") -> Payout:
    revision = row["revision"]
    return Payout(
        reference=row["reference"],
        seller_account=row["seller_account"],
        currency_code=row["currency_code"],
        amount_minor=row["amount_minor"],
        recipient=_recipient_of(row["recipient"]),
        purpose=row["purpose"],
        psp=row["psp"],
        state=PayoutState(row["state"]),
        create_time=row["create_time"],
        update_time=row["update_time"],
        schedule_time=row["schedule_time"],
        psp_payout_id=row["psp_payout_id"],
        hold_id=row["hold_id"],
        failure_reason=row["failure_reason"],
        attention=row["attention"],
        revision=revision,
        stored_revision=revision,
        traceparent=row["traceparent"],
        history=_history_of(history),
    )


def _history_of(text: str) -> list[Change]:
    if text == "[]":
        return []
    return [Change(each["s"], each["c"], each["t"]) for each in json.loads(text)]


def _history_json(changes: Sequence[Change]) -> str:
    return json.dumps([{"s": int(each.state), "c": each.cause, "t": each.time_ms} for each in changes])


def _recipient_json(account: BankAccount) -> str:
    address = account.address
    return json.dumps(
        {
            "holder": account.account_holder_name,
            "country": account.country_code,
            "scheme": account.scheme,
            "code": account.bank_code,
            "number": account.account_number,
            "bic": account.bic,
            "bank": account.bank_name,
            "address": [
                address.line1,
                address.line2,
                address.city,
                address.region,
                address.postal_code,
                address.country_code,
            ]
            if address
            else None,
        }
    )


def _recipient_of(text: str) -> BankAccount:
    stored = json.loads(text)
    return BankAccount(
        account_holder_name=stored["holder"],
        country_code=stored["country"],
        scheme=stored["scheme"],
        bank_code=stored["code"],
        account_number=stored["number"],
        bic=stored["bic"],
        bank_name=stored["bank"],
        address=PostalAddress(*stored["address"]) if stored["address"] else None,
    )


def _content_json(recorded: RecordedNotification) -> str:
    each = recorded.notification
    return json.dumps(
        {
            "object": each.psp_object_id,
            "reference": each.merchant_reference,
            "currency": each.currency_code,
            "amount": each.amount_minor,
            "code": each.code,
            "reason": each.reason,
            "type": each.psp_type,
            "time": each.occur_time.isoformat() if each.occur_time else None,
        }
    )


def _notification_of(row: Any) -> Notification:
    content = json.loads(row["content"])
    return Notification(
        psp=row["psp"],
        psp_event_id=row["psp_event_id"],
        kind=NotificationKind(row["kind"]),
        psp_object_id=content["object"],
        merchant_reference=content["reference"],
        currency_code=content["currency"],
        amount_minor=content["amount"],
        code=content["code"],
        reason=content["reason"],
        psp_type=content["type"],
        occur_time=datetime.fromisoformat(content["time"]) if content["time"] else None,
        attempt_count=row["attempt_count"],
    )
