"""The store on PostgreSQL, schema `payment`; the statements that write are functions of the migration.

A create is one statement. Everything else that changes state is one read without locks, the decision in Python
through the state tables, and one statement (`payment.apply`) that writes back where every revision is still the one
that was read. So each transaction is one round trip, no lock is ever held while Python thinks, and a decision on old
state writes nothing (StaleState).
"""

# ruff: noqa: S608 - every piece that is put into a statement is a constant of this file; values are always arguments
from __future__ import annotations

import json
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from payment.adapters.envelopes import OutboxRow, encode, encode_completed, encode_execute_orders
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
    PspObjectTaken,
    RecordedNotification,
    StaleState,
    Stored,
)
from runtime.postgres import KeptConnections

__all__ = ["PostgresStore"]

_ORDER_IDS_TAKEN = "DU001"
_STALE = frozenset({"DU002", "40001", "40P01"})
"""Our own code for a changed revision, serialization failure, deadlock: all mean "load and decide again"."""
_ONE_ORDER_A_PSP_OBJECT = "payment_order_psp_token"
"""The unique index."""

_ORDER = """payment_order_id, checkout_id, seller_account, currency_code, amount_minor, state, create_time, update_time,
    psp, psp_token, hosted_page_url, failure_reason, attention, refunded_minor, cancel_requested, revision,
    traceparent"""
_PAYOUT = """reference, seller_account, currency_code, amount_minor, recipient, purpose, psp, state,
    create_time, update_time, schedule_time, psp_payout_id, hold_id, failure_reason, attention, revision,
    traceparent"""
_EVENT = "e.checkout_id, e.buyer_id, e.buyer_name, e.buyer_email, e.is_payment_done, e.create_time"


def _prefixed(columns: str, prefix: str) -> str:
    return ", ".join(f"{prefix}.{column.strip()}" for column in columns.split(","))


_CREATE_PAYMENT = f"SELECT payment.create_payment({', '.join(f'${n}' for n in range(1, 11))})"
_CREATE_PAYOUT = f"SELECT payment.create_payout({', '.join(f'${n}' for n in range(1, 17))})"
_APPLY = "SELECT payment.apply($1, $2, $3)"
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
_PAYMENT_HASH = "SELECT content_hash FROM payment.payment_event WHERE checkout_id = $1"
_PAYOUT_HASH = "SELECT content_hash FROM payment.payout WHERE reference = $1"
_TAKEN = "SELECT payment_order_id FROM payment.payment_order WHERE payment_order_id = ANY($1) AND checkout_id <> $2"

_KNOWN_NOTIFICATIONS = """
FROM unnest($1::text[], $2::text[], $3::text[]) AS u(psp, id, reference)
LEFT JOIN payment.psp_notification AS k ON k.psp = u.psp AND k.psp_event_id = u.id AND k.outcome <> 0
"""
_KNOWN_MESSAGES = """
FROM unnest($2::text[], $3::text[]) AS u(id, reference)
LEFT JOIN payment.inbox AS k ON k.consumer = $1 AND k.message_id = u.id
"""
_JOIN_ORDER = "LEFT JOIN payment.payment_order AS o ON o.payment_order_id = u.reference"
_JOIN_PAYOUT = "LEFT JOIN payment.payout AS q ON q.reference = u.reference"
_ORDERS_FOR_NOTIFICATIONS = (
    f"SELECT k.psp AS known_psp, k.psp_event_id, {_prefixed(_ORDER, 'o')} {_KNOWN_NOTIFICATIONS} {_JOIN_ORDER}"
)
_PAYOUTS_FOR_NOTIFICATIONS = (
    f"SELECT k.psp AS known_psp, k.psp_event_id, {_prefixed(_PAYOUT, 'q')} {_KNOWN_NOTIFICATIONS} {_JOIN_PAYOUT}"
)
_ORDERS_FOR_MESSAGES = f"SELECT k.consumer, k.message_id, {_prefixed(_ORDER, 'o')} {_KNOWN_MESSAGES} {_JOIN_ORDER}"
_PAYOUTS_FOR_MESSAGES = f"SELECT k.consumer, k.message_id, {_prefixed(_PAYOUT, 'q')} {_KNOWN_MESSAGES} {_JOIN_PAYOUT}"
_ORDERS_BY_TOKEN = f"""
SELECT {_prefixed(_ORDER, "o")} FROM unnest($1::text[], $2::text[]) AS u(psp, token)
JOIN payment.payment_order AS o ON o.psp = u.psp AND o.psp_token = u.token AND o.psp_token <> ''
"""
_PAYOUTS_BY_TOKEN = f"""
SELECT {_prefixed(_PAYOUT, "q")} FROM unnest($1::text[], $2::text[]) AS u(psp, token)
JOIN payment.payout AS q ON q.psp = u.psp AND q.psp_payout_id = u.token AND q.psp_payout_id <> ''
"""
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
    """Implements payment.service.ports.Store over an asyncpg pool.

    `wake` is called after each commit that left something in the outbox: OutboxRelay.wake of this process.
    """

    def __init__(self, pool: asyncpg.Pool, wake: Callable[[], None] = lambda: None) -> None:
        self._pool = KeptConnections(pool)
        self._wake = wake

    async def close(self) -> None:
        """Gives the kept connections back; call it before the pool is closed."""
        await self._pool.close()

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
                _FIRST_HISTORY % (PaymentOrderState.NOT_STARTED, int(now.timestamp() * 1000)),
                _json(
                    [
                        {
                            "id": order.payment_order_id,
                            "seller": order.seller_account,
                            "currency": order.currency_code,
                            "amount": order.amount_minor,
                            "psp": order.psp,
                            "message_id": message_id,
                            "payload": _base64(payload),
                        }
                        for order, message_id, payload in zip(orders, message_ids, payloads, strict=True)
                    ]
                ),
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate == _ORDER_IDS_TAKEN:
                raise OrderIdsTaken(json.loads(error.detail or "[]")) from error
            raise
        self._wake()
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

    async def payment_hash(self, checkout_id: str) -> bytes | None:
        """The hash of the request that made a payment."""
        rows = await self._pool.fetch(_PAYMENT_HASH, checkout_id)
        return rows[0][0] if rows else None

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
        self._wake()
        return Stored(stored)

    async def read_payout(self, reference: str) -> Payout | None:
        """One payout with its history."""
        row = await self._pool.fetchrow(_READ_PAYOUT, reference)
        return _payout_of(row, row["history"]) if row else None

    async def payout_hash(self, reference: str) -> bytes | None:
        """The hash of the request that made a payout."""
        rows = await self._pool.fetch(_PAYOUT_HASH, reference)
        return rows[0][0] if rows else None

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
        """One round trip where PSPs echo our reference; a second one for those that are found by the PSP's id only."""
        loaded = Loaded()
        about_payouts = [each for each in notifications if each.kind.subject == "payout"]
        others = [each for each in notifications if each.kind.subject != "payout"]
        if others:
            await self._load(loaded, others, _ORDERS_FOR_NOTIFICATIONS, _ORDERS_BY_TOKEN, _order_of, loaded.orders)
        if about_payouts:
            await self._load(
                loaded, about_payouts, _PAYOUTS_FOR_NOTIFICATIONS, _PAYOUTS_BY_TOKEN, _payout_of, loaded.payouts
            )
        return loaded

    async def _load(
        self,
        loaded: Loaded,
        notifications: Sequence[Notification],
        by_reference: str,
        by_token: str,
        of: Callable[[Any], Any],
        into: dict[str, Any],
    ) -> None:
        rows = await self._pool.fetch(
            by_reference,
            [each.psp for each in notifications],
            [each.psp_event_id for each in notifications],
            [each.merchant_reference for each in notifications],
        )
        for row in rows:
            if row[0] is not None:
                loaded.known.add((row[0], row[1]))
            if row[2] is not None and row[2] not in into:
                into[row[2]] = of(row)
        unmatched = [each for each in notifications if each.psp_object_id and each.merchant_reference not in into]
        if unmatched:
            tokens = [each.psp for each in unmatched], [each.psp_object_id for each in unmatched]
            for row in await self._pool.fetch(by_token, *tokens):
                if row[0] not in into:
                    into[row[0]] = of(row)

    async def load_holders(self, loaded: Loaded, notifications: Sequence[Notification]) -> None:
        """One round trip."""
        tokens = [each.psp for each in notifications], [each.psp_object_id for each in notifications]
        for row in await self._pool.fetch(_ORDERS_BY_TOKEN, *tokens):
            if row[0] not in loaded.orders:
                loaded.orders[row[0]] = _order_of(row)

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
        document = _document(changes)
        try:
            has_parked: bool = await self._pool.fetchval(_APPLY, changes.now, changes.consumer, _json(document))
        except asyncpg.PostgresError as error:
            if error.sqlstate in _STALE:
                raise StaleState(str(error)) from error
            if isinstance(error, asyncpg.UniqueViolationError) and error.constraint_name == _ONE_ORDER_A_PSP_OBJECT:
                raise PspObjectTaken(f"the PSP object belongs to another order: {error.detail}") from error
            raise
        if "outbox" in document or "closed" in document:
            self._wake()
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


def _take(rows: Sequence[Any], loaded: Loaded, of: Callable[[Any], Any], into: dict[str, Any]) -> None:
    for row in rows:
        if row[0] is not None:
            loaded.known.add(row[1])
        if row[2] is not None and row[2] not in into:
            into[row[2]] = of(row)


def _padded(ids: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two lists of one length for unnest; nothing has the empty id."""
    count = max(len(ids), len(references))
    return [*ids, *[""] * (count - len(ids))], [*references, *[""] * (count - len(references))]


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


_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def _json(value: object) -> str:
    return _encode_json(value)


def _base64(payload: bytes) -> str:
    return b2a_base64(payload, newline=False).decode()


def _document(changes: ChangeSet) -> dict[str, Any]:
    """What payment.apply takes; empty parts are left out."""
    orders = sorted(changes.orders, key=_by_order_id)
    document: dict[str, Any] = {}
    if changes.message_ids:
        document["messages"] = changes.message_ids
    if orders:
        document["orders"] = [_order_part(order) for order in orders]
        document["changed"] = list({order.checkout_id for order in orders})
        closed = [order for order in orders if order.is_closed_now]
        if closed:
            document["closed"] = _closed_part(closed, changes.now)
    if changes.payouts:
        document["payouts"] = [_payout_part(payout) for payout in sorted(changes.payouts, key=_by_reference)]
    if changes.notifications:
        document["notifications"] = [_notification_part(each) for each in changes.notifications]
    if changes.facts:
        document["outbox"] = [_outbox_part(encode(fact, subject, changes.now)) for fact, subject in changes.facts]
    if changes.message_ids:  # a webhook names objects that the executor made known before
        objects = [order.psp_token for order in orders] + [payout.psp_payout_id for payout in changes.payouts]
        if any(objects):
            document["objects"] = [each for each in objects if each]
    return document


def _order_part(order: PaymentOrder) -> dict[str, Any]:
    return {
        "id": order.payment_order_id,
        "was": order.stored_revision,
        "revision": order.revision,
        "state": order.state,
        "psp": order.psp,
        "token": order.psp_token,
        "url": order.hosted_page_url,
        "reason": order.failure_reason,
        "attention": order.attention,
        "cancel": order.cancel_requested,
        "refunded": order.refunded_minor,
        "history": _history_part(order.changes),
    }


def _payout_part(payout: Payout) -> dict[str, Any]:
    return {
        "id": payout.reference,
        "was": payout.stored_revision,
        "revision": payout.revision,
        "state": payout.state,
        "token": payout.psp_payout_id,
        "hold": payout.hold_id.hex(),
        "reason": payout.failure_reason,
        "attention": payout.attention,
        "history": _history_part(payout.changes),
    }


def _history_part(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [{"s": each.state, "c": each.cause, "t": each.time_ms} for each in changes]


def _closed_part(orders: Sequence[PaymentOrder], now: datetime) -> list[dict[str, Any]]:
    """One entry a payment whose orders ended, in the order of the ids."""
    parts: dict[str, dict[str, Any]] = {}
    for order in orders:
        part = parts.get(order.checkout_id)
        if part is None:
            message_id, payload = encode_completed(order.checkout_id, now, order.traceparent)
            parts[order.checkout_id] = {
                "checkout_id": order.checkout_id,
                "count": 1,
                "id": message_id,
                "payload": _base64(payload),
                "trace": order.traceparent,
            }
        else:
            part["count"] += 1
    return list(parts.values())


def _outbox_part(row: OutboxRow) -> dict[str, str]:
    topic, key, message_id, payload, traceparent = row
    return {"topic": topic, "key": key, "id": message_id, "payload": _base64(payload), "trace": traceparent}


def _notification_part(recorded: RecordedNotification) -> dict[str, Any]:
    each = recorded.notification
    return {
        "psp": each.psp,
        "id": each.psp_event_id,
        "kind": each.kind,
        "outcome": recorded.outcome,
        "reference": recorded.reference,
        "attempts": recorded.attempt_count,
        "next": recorded.next_attempt_time.isoformat() if recorded.next_attempt_time else None,
        "content": {
            "object": each.psp_object_id,
            "reference": each.merchant_reference,
            "currency": each.currency_code,
            "amount": each.amount_minor,
            "code": each.code,
            "reason": each.reason,
            "type": each.psp_type,
            "time": each.occur_time.isoformat() if each.occur_time else None,
        },
    }


def _recipient_json(account: BankAccount) -> str:
    address = account.address
    return _json(
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
