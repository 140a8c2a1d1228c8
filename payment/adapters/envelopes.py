"""Facts as messages: one Envelope each, with an id that the fact itself gives, so that a replay changes
nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from ducat.event.v1.event_pb2 import Envelope
from kernel.ids import derived_event_id
from payment.domain.facts import Fact, FactKind
from payment.domain.payment import Payment
from payment.domain.payment_order import PaymentOrder
from payment.domain.payout import Payout
from payment.domain.refund import Refund
from payment.service.ports import Subject

__all__ = ["COMMANDS", "EVENTS", "OutboxRow", "encode", "encode_completed", "encode_execute_orders"]

COMMANDS = "payment.commands"
EVENTS = "payment.events"

OutboxRow = tuple[str, str, str, bytes, str]
"""topic, key, message_id, payload, traceparent: the columns of the outbox."""

_COMMANDS = frozenset({FactKind.CANCEL_ORDER, FactKind.EXECUTE_PAYOUT})
_REPEATABLE = frozenset({FactKind.DISPUTE_OPENED, FactKind.DISPUTE_CLOSED, FactKind.CANCEL_ORDER})
"""Facts that can happen to one order more than once."""


def encode(fact: Fact, subject: Subject, occur_time: datetime) -> OutboxRow:
    """The outbox row of a fact. `occur_time` is stored in the payload: ids that are derived from it never
    change again.
    """
    kind = fact.kind
    if isinstance(subject, PaymentOrder):
        reference, group = subject.payment_order_id, subject.checkout_id
    elif isinstance(subject, Refund):
        reference, group = fact.reference or subject.refund_id, subject.checkout_id
        if fact.claimed:
            reference = f"{reference}/claimed"
    else:
        reference = group = subject.reference
    natural = reference
    if kind in _REPEATABLE:
        natural = f"{reference}/{fact.psp_object_id or fact.revision}"
    envelope = Envelope(
        event_id=derived_event_id(kind.value, natural), occur_time=occur_time, traceparent=subject.traceparent
    )
    _FILL[kind](envelope, fact, subject)
    is_command = kind in _COMMANDS
    return (
        COMMANDS if is_command else EVENTS,
        reference if is_command else group,
        envelope.event_id,
        envelope.SerializeToString(),
        subject.traceparent,
    )


def encode_execute_orders(payment: Payment, traceparent: str) -> tuple[list[str], list[bytes]]:
    """Message ids and payloads of the commands that a new payment starts with, in the order of its orders."""
    ids, payloads = [], []
    for order in payment.orders:
        envelope = Envelope(
            event_id=derived_event_id("execute_order", order.payment_order_id),
            occur_time=payment.create_time,
            traceparent=traceparent,
        )
        body = envelope.execute_order
        body.payment_order_id = order.payment_order_id
        body.checkout_id = order.checkout_id
        body.seller_account = order.seller_account
        body.amount.currency_code = order.currency_code
        body.amount.amount_minor = order.amount_minor
        body.psp = order.psp
        body.buyer_email = payment.buyer.email
        body.page_key = payment.page_key
        ids.append(envelope.event_id)
        payloads.append(envelope.SerializeToString())
    return ids, payloads


def encode_completed(checkout_id: str, occur_time: datetime, traceparent: str) -> tuple[str, bytes]:
    """Message id and payload of payment_completed, in case the payment turns out to be done."""
    envelope = Envelope(
        event_id=derived_event_id("payment_completed", checkout_id), occur_time=occur_time, traceparent=traceparent
    )
    envelope.payment_completed.checkout_id = checkout_id
    return envelope.event_id, envelope.SerializeToString()


def _cancel_order(envelope: Envelope, fact: Fact, order: PaymentOrder) -> None:
    body = envelope.cancel_order
    body.payment_order_id, body.psp, body.psp_token = order.payment_order_id, fact.psp, fact.psp_object_id


def _order_succeeded(envelope: Envelope, fact: Fact, order: PaymentOrder) -> None:
    body = envelope.payment_order_succeeded
    body.payment_order_id, body.checkout_id = order.payment_order_id, order.checkout_id
    body.seller_account = order.seller_account
    body.amount.currency_code, body.amount.amount_minor = order.currency_code, order.amount_minor
    body.psp, body.psp_token = fact.psp, fact.psp_object_id


def _order_closed(envelope: Envelope, fact: Fact, order: PaymentOrder) -> None:
    body = envelope.payment_order_closed
    body.payment_order_id, body.checkout_id = order.payment_order_id, order.checkout_id
    body.state, body.reason = fact.state, fact.reason


def _dispute_opened(envelope: Envelope, fact: Fact, order: PaymentOrder) -> None:
    body = envelope.dispute_opened
    body.payment_order_id, body.seller_account, body.psp = order.payment_order_id, order.seller_account, order.psp
    body.amount.currency_code, body.amount.amount_minor = order.currency_code, fact.amount_minor


def _dispute_closed(envelope: Envelope, fact: Fact, order: PaymentOrder) -> None:
    body = envelope.dispute_closed
    body.payment_order_id, body.seller_account, body.psp = order.payment_order_id, order.seller_account, order.psp
    body.amount.currency_code, body.amount.amount_minor = order.currency_code, fact.amount_minor
    body.won = fact.won


def _refund_part(body: Any, fact: Fact, refund: Refund) -> None:
    body.refund_id, body.payment_order_id = refund.refund_id, refund.payment_order_id
    body.seller_account, body.psp = refund.seller_account, refund.psp
    body.amount.currency_code, body.amount.amount_minor = refund.currency_code, fact.amount_minor


def _refund_requested(envelope: Envelope, fact: Fact, refund: Refund) -> None:
    body = envelope.refund_requested
    _refund_part(body, fact, refund)
    if fact.reference != refund.refund_id:
        body.hold_reference = fact.reference


def _refund_completed(envelope: Envelope, fact: Fact, refund: Refund) -> None:
    body = envelope.refund_completed
    _refund_part(body, fact, refund)
    body.succeeded, body.hold_id = fact.succeeded, fact.hold_id


def _refund_claimed(envelope: Envelope, fact: Fact, refund: Refund) -> None:
    _refund_part(envelope.refund_claimed, fact, refund)


def _refund_reversed(envelope: Envelope, fact: Fact, refund: Refund) -> None:
    body = envelope.refund_reversed
    _refund_part(body, fact, refund)
    body.claimed = fact.claimed


def _execute_payout(envelope: Envelope, _fact: Fact, payout: Payout) -> None:
    envelope.execute_payout.reference = payout.reference


def _payout_requested(envelope: Envelope, _fact: Fact, payout: Payout) -> None:
    body = envelope.payout_requested
    body.reference, body.seller_account, body.psp = payout.reference, payout.seller_account, payout.psp
    body.amount.currency_code, body.amount.amount_minor = payout.currency_code, payout.amount_minor


def _payout_completed(envelope: Envelope, fact: Fact, payout: Payout) -> None:
    body = envelope.payout_completed
    body.reference, body.seller_account, body.psp = payout.reference, payout.seller_account, payout.psp
    body.amount.currency_code, body.amount.amount_minor = payout.currency_code, payout.amount_minor
    body.hold_id = fact.hold_id


def _payout_released(envelope: Envelope, fact: Fact, payout: Payout) -> None:
    body = envelope.payout_released
    body.reference, body.seller_account, body.psp = payout.reference, payout.seller_account, payout.psp
    body.amount.currency_code, body.amount.amount_minor = payout.currency_code, payout.amount_minor
    body.state, body.reason, body.hold_id = fact.state, fact.reason, fact.hold_id


def _payout_returned(envelope: Envelope, fact: Fact, payout: Payout) -> None:
    body = envelope.payout_returned
    body.reference, body.seller_account, body.psp = payout.reference, payout.seller_account, payout.psp
    body.amount.currency_code, body.amount.amount_minor = payout.currency_code, payout.amount_minor
    body.reason = fact.reason


_FILL: dict[FactKind, Callable[[Envelope, Fact, Any], None]] = {
    FactKind.CANCEL_ORDER: _cancel_order,
    FactKind.ORDER_SUCCEEDED: _order_succeeded,
    FactKind.ORDER_CLOSED: _order_closed,
    FactKind.DISPUTE_OPENED: _dispute_opened,
    FactKind.DISPUTE_CLOSED: _dispute_closed,
    FactKind.REFUND_REQUESTED: _refund_requested,
    FactKind.REFUND_COMPLETED: _refund_completed,
    FactKind.REFUND_CLAIMED: _refund_claimed,
    FactKind.REFUND_REVERSED: _refund_reversed,
    FactKind.EXECUTE_PAYOUT: _execute_payout,
    FactKind.PAYOUT_REQUESTED: _payout_requested,
    FactKind.PAYOUT_COMPLETED: _payout_completed,
    FactKind.PAYOUT_RELEASED: _payout_released,
    FactKind.PAYOUT_RETURNED: _payout_returned,
}
