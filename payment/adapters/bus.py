"""Consumers of executor.events and wallet.events: envelopes become reports, a batch is one transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ducat.event.v1 import event_pb2
from payment.adapters.executor_client import clean
from payment.domain.notification import Notification, NotificationKind
from payment.domain.reports import (
    FundsHeld,
    FundsRefused,
    OrderRegistered,
    OrderRejected,
    OutcomeFound,
    PayoutRejected,
    PayoutSubmitted,
    RefundFundsHeld,
    RefundFundsRefused,
    Report,
)
from payment.service.reports import Reports
from runtime import trace
from runtime.bus import Message
from runtime.logs import get_logger

__all__ = ["BATCH_MAX", "EXECUTOR_EVENTS", "GROUP", "WALLET_EVENTS", "report_of", "reports_handler"]

EXECUTOR_EVENTS = "executor.events"
WALLET_EVENTS = "wallet.events"
GROUP = "payment"
BATCH_MAX = 64

_logger = get_logger("bus")
_KINDS = {kind.name.lower(): kind for kind in NotificationKind}


def reports_handler(reports: Reports, topic: str) -> Callable[[Sequence[Message]], Awaitable[None]]:
    """The handler of one topic. The topic is the inbox's consumer name."""

    async def handle(messages: Sequence[Message]) -> None:
        batch = []
        for message in messages:
            report = report_of(message.payload)
            if report is not None:
                batch.append((message.message_id, report, message))
        await reports.apply(topic, [(message_id, report) for message_id, report, _ in batch])
        for _, report, message in batch:
            sentence = _SENTENCES.get(type(report))
            if sentence:
                with trace.bind(message.traceparent):
                    _logger.info(sentence, key=message.key)

    return handle


_SENTENCES: dict[type, str] = {
    OrderRejected: "order rejected",
    PayoutRejected: "payout rejected",
    OutcomeFound: "outcome found",
    FundsRefused: "funds refused",
}
"""What is worth a line; the rest is in the histories, and a line costs as much as the decision."""


def report_of(payload: bytes) -> Report | None:
    """The report of an envelope; None for what this service has no use for, such as wallet_credited."""
    envelope = event_pb2.Envelope.FromString(payload)
    translate = _TRANSLATE.get(envelope.WhichOneof("body") or "")
    return translate(envelope) if translate else None


def _order_registered(envelope: event_pb2.Envelope) -> Report:
    body = envelope.order_registered
    return OrderRegistered(body.payment_order_id, body.psp, body.psp_token, body.hosted_page_url)


def _order_rejected(envelope: event_pb2.Envelope) -> Report:
    body = envelope.order_rejected
    return OrderRejected(body.payment_order_id, body.psp, clean(body.code), clean(body.reason))


def _payout_submitted(envelope: event_pb2.Envelope) -> Report:
    body = envelope.payout_submitted
    return PayoutSubmitted(body.reference, body.psp, body.psp_payout_id)


def _payout_rejected(envelope: event_pb2.Envelope) -> Report:
    body = envelope.payout_rejected
    return PayoutRejected(body.reference, body.psp, clean(body.code), clean(body.reason), body.compliance)


def _outcome_found(envelope: event_pb2.Envelope) -> Report:
    body = envelope.outcome_found
    has_amount = body.HasField("amount")
    return OutcomeFound(
        Notification(
            psp=body.psp,
            psp_event_id="",
            kind=_KINDS.get(body.kind, NotificationKind.UNKNOWN),
            psp_object_id=body.psp_object_id,
            merchant_reference=body.merchant_reference,
            currency_code=body.amount.currency_code if has_amount else "",
            amount_minor=body.amount.amount_minor if has_amount else None,
            code=clean(body.code),
            reason=clean(body.reason),
        )
    )


def _funds_held(envelope: event_pb2.Envelope) -> Report | None:
    body = envelope.funds_held
    match body.purpose:
        case event_pb2.FUNDS_PURPOSE_PAYOUT:
            return FundsHeld(body.reference, body.hold_id)
        case event_pb2.FUNDS_PURPOSE_REFUND:
            return RefundFundsHeld(body.reference, body.hold_id)
    return None


def _funds_refused(envelope: event_pb2.Envelope) -> Report | None:
    body = envelope.funds_refused
    match body.purpose:
        case event_pb2.FUNDS_PURPOSE_PAYOUT:
            return FundsRefused(body.reference, body.result)
        case event_pb2.FUNDS_PURPOSE_REFUND:
            return RefundFundsRefused(body.reference, body.result, body.available.amount_minor)
    return None


_TRANSLATE: dict[str, Callable[[event_pb2.Envelope], Report | None]] = {
    "order_registered": _order_registered,
    "order_rejected": _order_rejected,
    "payout_submitted": _payout_submitted,
    "payout_rejected": _payout_rejected,
    "outcome_found": _outcome_found,
    "funds_held": _funds_held,
    "funds_refused": _funds_refused,
}
