"""The store on PostgreSQL, schema `payment`; the statements that write are functions of the migration.

A create is one statement. Everything else that changes state is one read without locks, the decision in Python
through the state tables, and one statement (`payment.apply`) that writes back where every revision is still the one
that was read. So each transaction is one round trip, no lock is ever held while Python thinks, and a decision on old
state writes nothing (StaleState).
"""

# ruff: noqa: S608 - every piece that is put into a statement is a constant of this file; values are always arguments
from __future__ import annotations

import hashlib
import hmac
import json
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from payment.adapters.envelopes import OutboxRow, encode, encode_completed, encode_execute_orders
from payment.domain.bank_account import BankAccount, PostalAddress
from payment.domain.facts import Change, FactKind
from payment.domain.finding import Finding, FindingKind, FindingSubject
from payment.domain.notification import Notification, NotificationKind
from payment.domain.payment import Buyer, Payment
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from payment.domain.payout import Payout, PayoutState
from payment.domain.refund import Refund, RefundBooking, RefundState
from payment.service.ports import (
    ChangeSet,
    FindingFilter,
    Loaded,
    OrderIdsTaken,
    PaymentFilter,
    PayoutFilter,
    Position,
    PspObjectTaken,
    RecordedNotification,
    RequestIdTaken,
    Resolution,
    StaleState,
    Stored,
)
from runtime.postgres import KeptConnections

__all__ = ["PostgresStore"]

_ORDER_IDS_TAKEN = "DU001"
_STALE = frozenset({"DU002", "40001", "40P01"})
"""Our own code for a changed revision, serialization failure, deadlock: all mean "load and decide again"."""
_ONE_ORDER_A_PSP_OBJECT = "payment_order_psp_token"
_ONE_FINDING_A_REQUEST = "finding_request"
"""The unique indexes."""
_RARE = frozenset({"refunds", "disputes", "findings"})
"""Parts of a document that payment.apply_rare writes."""

FINDINGS_SHOWN_MAX = 100
"""The newest findings that are shown with a payment or a payout; ListFindings has all."""
REFUNDS_SHOWN_MAX = 25
"""The newest refunds that are shown with an order."""

_ORDER = """payment_order_id, checkout_id, seller_account, currency_code, amount_minor, state, create_time, update_time,
    psp, psp_token, hosted_page_url, failure_reason, attention, refunded_minor, disputed_minor, cancel_requested, revision,
    traceparent"""
_PAYOUT = """reference, seller_account, currency_code, amount_minor, recipient, purpose, psp, state,
    create_time, update_time, schedule_time, psp_payout_id, hold_id, failure_reason, attention, revision,
    traceparent"""
_EVENT = "e.checkout_id, e.buyer_id, e.buyer_name, e.buyer_email, e.is_payment_done, e.create_time, e.page_key"
_REFUND = """refund_id, payment_order_id, checkout_id, seller_account, currency_code, amount_minor, state, psp, psp_refund_id,
    create_time, update_time, booking, hold_count, held_minor, hold_id, made_at_psp, reason, failure_reason, revision,
    traceparent"""
_FINDING = """finding_id, kind, subject, reference, text, create_time, checkout_id, seller_account, psp, psp_event_id, ours,
    theirs, resolve_time, resolved_by, reason"""


def _prefixed(columns: str, prefix: str) -> str:
    return ", ".join(f"{prefix}.{column.strip()}" for column in columns.split(","))


_CREATE_PAYMENT = f"SELECT payment.create_payment({', '.join(f'${n}' for n in range(1, 12))})"
_CREATE_PAYOUT = f"SELECT payment.create_payout({', '.join(f'${n}' for n in range(1, 17))})"
_APPLY = "SELECT payment.apply($1, $2, $3)"
_APPLY_RARE = "SELECT payment.apply_rare($1, $2, $3)"
# Resolved after the rest, not beside it: resolving gives the order a new revision.
_APPLY_RESOLVING = """
WITH applied AS MATERIALIZED (SELECT payment.apply_rare($1, $2, $3) AS has_parked)
SELECT has_parked FROM applied, LATERAL (
    SELECT count(payment.resolve_finding(r.id, $1, r.by, r.reason, r.request_id))
    FROM jsonb_to_recordset($3 -> 'resolutions') AS r(id text, by text, reason text, request_id text)
    WHERE has_parked IS NOT NULL
)
"""
_HAS_MORE = """EXISTS (SELECT FROM payment.finding AS f WHERE f.checkout_id = o.checkout_id AND f.checkout_id <> '')
    OR EXISTS (SELECT FROM payment.refund AS r WHERE r.payment_order_id = o.payment_order_id)"""
_PAYMENT = f"""
SELECT {_prefixed(_ORDER, "o")}, o.history, e.buyer_id, e.buyer_name, e.buyer_email, e.is_payment_done, e.page_key,
    e.create_time AS event_create_time, {_HAS_MORE} AS has_more
FROM payment.payment_event AS e JOIN payment.payment_order AS o USING (checkout_id)
"""
_READ_PAYMENT = f"{_PAYMENT} WHERE e.checkout_id = $1 ORDER BY o.position"
_READ_PAGE = f"{_PAYMENT} WHERE sha256(decode(e.page_key, 'hex')) = $1 ORDER BY o.position"
_SHOWN_FINDINGS = f"""
SELECT f.* FROM unnest($1::text[]) AS u(id) CROSS JOIN LATERAL (
    SELECT {_FINDING} FROM payment.finding WHERE %s ORDER BY create_time DESC, finding_id DESC LIMIT {FINDINGS_SHOWN_MAX}
) AS f ORDER BY f.create_time, f.finding_id
"""
_FINDINGS_OF = _SHOWN_FINDINGS % "checkout_id = u.id AND checkout_id <> ''"
_FINDINGS_OF_PAYOUTS = _SHOWN_FINDINGS % "reference = u.id AND subject = 2"
_REFUNDS_OF = f"""
SELECT r.* FROM unnest($1::text[]) AS u(id) CROSS JOIN LATERAL (
    SELECT {_REFUND} FROM payment.refund WHERE payment_order_id = u.id
    ORDER BY create_time DESC, refund_id DESC LIMIT {REFUNDS_SHOWN_MAX}
) AS r ORDER BY r.create_time, r.refund_id
"""
_READ_FINDING = f"SELECT {_FINDING}, request_id FROM payment.finding WHERE finding_id = $1"
_RESOLVE_FINDING = "SELECT payment.resolve_finding($1, $2, $3, $4, $5)"
_OPEN_FINDINGS = "SELECT kind, count(*) FROM payment.finding WHERE resolve_time IS NULL GROUP BY kind"
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
_REFUNDS_FOR_NOTIFICATIONS = f"""
SELECT k.psp AS known_psp, k.psp_event_id, {_prefixed(_REFUND, "r")} {_KNOWN_NOTIFICATIONS}
LEFT JOIN payment.refund AS r ON r.psp = u.psp AND r.psp_refund_id = u.reference AND r.psp_refund_id <> ''
"""
_ORDERS_BY_ID = f"SELECT {_ORDER} FROM payment.payment_order WHERE payment_order_id = ANY($1)"
_JOIN_REFUND = "LEFT JOIN payment.refund AS r ON r.refund_id = u.reference"
_REFUNDS_FOR_MESSAGES = f"SELECT k.consumer, k.message_id, {_prefixed(_REFUND, 'r')} {_KNOWN_MESSAGES} {_JOIN_REFUND}"
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
                payment.page_key,
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
        return await self._payment_of(rows) if rows else None

    async def read_page(self, page_key: str) -> Payment | None:
        """By the hash of the key: what is no key at all is looked up like a wrong one."""
        try:
            raw = bytes.fromhex(page_key)
        except ValueError:
            raw = page_key.encode(errors="replace")
        rows = await self._pool.fetch(_READ_PAGE, hashlib.sha256(raw).digest())
        is_it = hmac.compare_digest((rows[0]["page_key"] if rows else "").encode(), page_key.encode(errors="replace"))
        return await self._payment_of(rows) if rows and is_it else None

    async def _payment_of(self, rows: Sequence[Any]) -> Payment:
        first = rows[0]
        payment = Payment(
            first["checkout_id"],
            Buyer(first["buyer_id"], first["buyer_name"], first["buyer_email"]),
            [_order_of(row, row["history"]) for row in rows],
            first["is_payment_done"],
            first["event_create_time"],
            first["page_key"],
        )
        if any(row["has_more"] for row in rows):
            await self._add_rare([payment])
        return payment

    async def _add_rare(self, payments: Sequence[Payment]) -> None:
        """Findings and refunds, which few payments have."""
        by_id = {each.checkout_id: each for each in payments}
        for row in await self._pool.fetch(_FINDINGS_OF, list(by_id)):
            by_id[row["checkout_id"]].findings.append(_finding_of(row))
        of_order = {order.payment_order_id: each for each in payments for order in each.orders}
        for row in await self._pool.fetch(_REFUNDS_OF, list(of_order)):
            of_order[row["payment_order_id"]].refunds.append(_refund_of(row))

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
        if filter.has_findings:
            conditions.append(
                "e.checkout_id IN (SELECT checkout_id FROM payment.finding"
                " WHERE resolve_time IS NULL AND checkout_id <> '')"
            )
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = await self._pool.fetch(
            f"SELECT {_EVENT} FROM payment.payment_event AS e {where}"
            f" ORDER BY e.create_time DESC, e.checkout_id DESC LIMIT ${arguments.add(limit)}",
            *arguments.values,
        )
        orders: dict[str, list[PaymentOrder]] = {row["checkout_id"]: [] for row in rows}
        for row in await self._pool.fetch(_ORDERS_OF, list(orders)) if rows else ():
            orders[row["checkout_id"]].append(_order_of(row, row["history"]))
        payments = [
            Payment(
                row["checkout_id"],
                Buyer(row["buyer_id"], row["buyer_name"], row["buyer_email"]),
                orders[row["checkout_id"]],
                row["is_payment_done"],
                row["create_time"],
                row["page_key"],
            )
            for row in rows
        ]
        if payments:
            await self._add_rare(payments)
        return payments

    # --- payouts

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
        if row is None:
            return None
        payout = _payout_of(row, row["history"])
        await self._add_findings([payout])
        return payout

    async def _add_findings(self, payouts: Sequence[Payout]) -> None:
        by_reference = {each.reference: each for each in payouts}
        for row in await self._pool.fetch(_FINDINGS_OF_PAYOUTS, list(by_reference)):
            by_reference[row["reference"]].findings.append(_finding_of(row))

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
        payouts = [_payout_of(row, row["history"]) for row in rows]
        if payouts:
            await self._add_findings(payouts)
        return payouts

    # --- findings

    async def list_findings(self, filter: FindingFilter, after: Position | None, limit: int) -> list[Finding]:
        """Newest first, after a position."""
        conditions, arguments = _Conditions.start(after, "create_time", "finding_id")
        if filter.open_only:
            conditions.append("resolve_time IS NULL")
        for column, value in (
            ("kind", filter.kind),
            ("subject", filter.subject),
            ("psp", filter.psp),
            ("seller_account", filter.seller_account),
            ("reference", filter.reference),
            ("checkout_id", filter.checkout_id),
        ):
            if value:
                conditions.append(f"{column} = ${arguments.add(value)}")
        if filter.start is not None:
            conditions.append(f"create_time >= ${arguments.add(filter.start)}")
        if filter.end is not None:
            conditions.append(f"create_time < ${arguments.add(filter.end)}")
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = await self._pool.fetch(
            f"SELECT {_FINDING} FROM payment.finding {where}"
            f" ORDER BY create_time DESC, finding_id DESC LIMIT ${arguments.add(limit)}",
            *arguments.values,
        )
        return [_finding_of(row) for row in rows]

    async def read_finding(self, finding_id: str) -> tuple[Finding, str] | None:
        """A finding, and the request that resolved it, if one did."""
        row = await self._pool.fetchrow(_READ_FINDING, finding_id)
        return (_finding_of(row), row["request_id"]) if row else None

    async def resolve_finding(self, finding_id: str, resolution: Resolution, now: datetime) -> bool:
        """One statement."""
        try:
            was_open: bool = await self._pool.fetchval(
                _RESOLVE_FINDING, finding_id, now, resolution.resolved_by, resolution.reason, resolution.request_id
            )
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name == _ONE_FINDING_A_REQUEST:
                raise RequestIdTaken(resolution.request_id) from error
            raise
        return was_open

    async def open_finding_counts(self) -> dict[FindingKind, int]:
        """Over the partial index of those that are open."""
        return {FindingKind(row[0]): row[1] for row in await self._pool.fetch(_OPEN_FINDINGS)}

    # --- load, decide elsewhere, apply

    async def load_for_notifications(self, notifications: Sequence[Notification]) -> Loaded:
        """One round trip where PSPs echo our reference; a second one for those that are found by the PSP's id only."""
        loaded = Loaded()
        about_payouts = [each for each in notifications if each.kind.subject == "payout"]
        about_refunds = [each for each in notifications if each.kind.subject == "refund"]
        others = [each for each in notifications if each.kind.subject not in ("payout", "refund")]
        if others:
            await self._load(loaded, others, _ORDERS_FOR_NOTIFICATIONS, _ORDERS_BY_TOKEN, _order_of, loaded.orders)
        if about_payouts:
            await self._load(
                loaded, about_payouts, _PAYOUTS_FOR_NOTIFICATIONS, _PAYOUTS_BY_TOKEN, _payout_of, loaded.payouts
            )
        if about_refunds:
            await self._load_refunds(loaded, about_refunds)
        return loaded

    async def _load_refunds(self, loaded: Loaded, notifications: Sequence[Notification]) -> None:
        """Refunds by the PSP's id, and orders by the payment that is given back."""
        psps = [each.psp for each in notifications]
        rows = await self._pool.fetch(
            _REFUNDS_FOR_NOTIFICATIONS,
            psps,
            [each.psp_event_id for each in notifications],
            [each.psp_object_id for each in notifications],
        )
        for row in rows:
            if row[0] is not None:
                loaded.known.add((row[0], row[1]))
            if row[2] is not None:
                loaded.refunds.setdefault(row[2], _refund_of(row))
        missing = {each.payment_order_id for each in loaded.refunds.values()} - loaded.orders.keys()
        found = await self._pool.fetch(_ORDERS_BY_ID, sorted(missing)) if missing else []
        found += await self._pool.fetch(_ORDERS_BY_TOKEN, psps, [each.psp_payment_id for each in notifications])
        for row in found:
            if row[0] not in loaded.orders:
                loaded.orders[row[0]] = _order_of(row)

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
        self,
        consumer: str,
        message_ids: Sequence[str],
        order_ids: Sequence[str],
        references: Sequence[str],
        refund_ids: Sequence[str] = (),
    ) -> Loaded:
        """One round trip where all messages are about orders, or all about payouts, or all about refunds."""
        loaded = Loaded()
        ids = list(message_ids)
        if order_ids or not (references or refund_ids):
            rows = await self._pool.fetch(_ORDERS_FOR_MESSAGES, consumer, *_padded(ids, order_ids))
            _take(rows, loaded, _order_of, loaded.orders)
            ids = []
        if references:
            rows = await self._pool.fetch(_PAYOUTS_FOR_MESSAGES, consumer, *_padded(ids, references))
            _take(rows, loaded, _payout_of, loaded.payouts)
            ids = []
        if refund_ids:
            rows = await self._pool.fetch(_REFUNDS_FOR_MESSAGES, consumer, *_padded(ids, refund_ids))
            _take(rows, loaded, _refund_of, loaded.refunds)
        return loaded

    async def apply(self, changes: ChangeSet) -> bool:
        """One statement, one round trip."""
        document = _document(changes)
        try:
            statement = _APPLY if _RARE.isdisjoint(document) else _APPLY_RARE
            if changes.resolutions:
                statement = _APPLY_RESOLVING
            has_parked: bool = await self._pool.fetchval(statement, changes.now, changes.consumer, _json(document))
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
        disputed_minor=row["disputed_minor"],
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


def _refund_of(row: Any) -> Refund:
    revision = row["revision"]
    return Refund(
        refund_id=row["refund_id"],
        payment_order_id=row["payment_order_id"],
        checkout_id=row["checkout_id"],
        seller_account=row["seller_account"],
        currency_code=row["currency_code"],
        amount_minor=row["amount_minor"],
        state=RefundState(row["state"]),
        psp=row["psp"],
        psp_refund_id=row["psp_refund_id"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        booking=RefundBooking(row["booking"]),
        hold_count=row["hold_count"],
        held_minor=row["held_minor"],
        hold_id=row["hold_id"],
        made_at_psp=row["made_at_psp"],
        reason=row["reason"],
        failure_reason=row["failure_reason"],
        revision=revision,
        stored_revision=revision,
        traceparent=row["traceparent"],
    )


def _finding_of(row: Any) -> Finding:
    return Finding(
        finding_id=row["finding_id"],
        kind=FindingKind(row["kind"]),
        subject=FindingSubject(row["subject"]),
        reference=row["reference"],
        text=row["text"],
        create_time=row["create_time"],
        checkout_id=row["checkout_id"],
        seller_account=row["seller_account"],
        psp=row["psp"],
        psp_event_id=row["psp_event_id"],
        ours=json.loads(row["ours"]),
        theirs=json.loads(row["theirs"]),
        resolve_time=row["resolve_time"],
        resolved_by=row["resolved_by"],
        reason=row["reason"],
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
    if changes.refunds:
        document["refunds"] = [_refund_part(each) for each in changes.refunds]
    disputes = {
        subject.payment_order_id: subject.disputed_minor
        for fact, subject in changes.facts
        if isinstance(subject, PaymentOrder) and fact.kind in (FactKind.DISPUTE_OPENED, FactKind.DISPUTE_CLOSED)
    }
    if disputes:
        document["disputes"] = [{"id": each, "amount": amount} for each, amount in disputes.items()]
    if changes.findings:
        document["findings"] = [_finding_part(each) for each in changes.findings]
    if changes.resolutions:
        document["resolutions"] = [
            {"id": id, "by": each.resolved_by, "reason": each.reason, "request_id": each.request_id}
            for id, each in changes.resolutions.items()
        ]
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


def _refund_part(refund: Refund) -> dict[str, Any]:
    return {
        "id": refund.refund_id,
        "was": refund.stored_revision,
        "revision": refund.revision,
        "order_id": refund.payment_order_id,
        "checkout_id": refund.checkout_id,
        "seller": refund.seller_account,
        "currency": refund.currency_code,
        "amount": refund.amount_minor,
        "state": refund.state,
        "psp": refund.psp,
        "token": refund.psp_refund_id,
        "booking": refund.booking,
        "holds": refund.hold_count,
        "held": refund.held_minor,
        "hold": refund.hold_id.hex(),
        "made_at_psp": refund.made_at_psp,
        "reason": refund.reason,
        "failure": refund.failure_reason,
        "trace": refund.traceparent,
        "history": _history_part(refund.changes),
    }


def _finding_part(finding: Finding) -> dict[str, Any]:
    return {
        "id": finding.finding_id,
        "kind": finding.kind,
        "subject": finding.subject,
        "reference": finding.reference,
        "checkout_id": finding.checkout_id,
        "seller": finding.seller_account,
        "psp": finding.psp,
        "event": finding.psp_event_id,
        "text": finding.text,
        "ours": finding.ours,
        "theirs": finding.theirs,
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
            **({"payment": each.psp_payment_id} if each.psp_payment_id else {}),
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
        psp_payment_id=content.get("payment", ""),
    )
