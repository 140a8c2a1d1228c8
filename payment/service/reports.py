"""What the executor and the wallet report, applied in batches: one read, one write, one transaction a batch.

A report that the state table refuses, or that is about an order that is not ours, is a bug somewhere: it raises, the
bus tries it alone, and it ends in the dead-letter topic for an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from kernel.clock import Clock
from kernel.errors import NotFound
from payment.domain.notification import Outcome
from payment.domain.payment_order import PaymentOrder
from payment.domain.payout import Payout
from payment.domain.refund import Refund
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
from payment.service import notifications
from payment.service.payments import until_fresh
from payment.service.ports import ChangeSet, Loaded, Store, Subject, now_of

__all__ = ["Reports"]


class Reports:
    """Applies executor and wallet reports."""

    def __init__(
        self, store: Store, inbox_notifications: notifications.Notifications, clock: Clock, report: notifications.Report
    ) -> None:
        self._store = store
        self._notifications = inbox_notifications
        self._clock = clock
        self._report = report

    async def apply(self, consumer: str, reports: Sequence[tuple[str, Report]]) -> None:
        """Apply a batch of (message id, report) of one consumer, each message once."""
        if not reports:
            return
        objects = await until_fresh(lambda: self._attempt(consumer, reports))
        if objects:
            await self._notifications.retry_parked(objects)

    async def _attempt(self, consumer: str, reports: Sequence[tuple[str, Report]]) -> list[str]:
        order_ids = sorted({_order_id(report) for _, report in reports} - {""})
        references = sorted({_reference(report) for _, report in reports} - {""})
        refund_ids = sorted({_refund_id(report) for _, report in reports} - {""})
        loaded = await self._store.load_for_messages(
            consumer, [each for each, _ in reports], order_ids, references, refund_ids
        )
        found = [report.notification for _, report in reports if isinstance(report, OutcomeFound)]
        claims = notifications.claims_of(found, loaded)
        if claims:
            await self._store.load_holders(loaded, claims)
        changes = ChangeSet(now_of(self._clock), consumer)
        seen = set(loaded.known)
        objects: list[str] = []
        flagged: list[tuple[Outcome, OutcomeFound, Subject | None]] = []
        for message_id, report in reports:
            if message_id in seen:
                continue
            seen.add(message_id)
            changes.message_ids.append(message_id)
            if isinstance(report, OutcomeFound):
                outcome, subject = notifications.decide_notification(report.notification, loaded, changes)
                if outcome in (Outcome.FLAGGED, Outcome.PARKED):
                    flagged.append((outcome, report, subject))
            else:
                subject = _subject(report, loaded)
                _decide(report, subject, changes.now)
                changes.take_facts(subject)
                if isinstance(report, OrderRegistered):
                    objects.append(report.psp_token)
                elif isinstance(report, PayoutSubmitted):
                    objects.append(report.psp_payout_id)
        # In the order of the ids, so that two batches lock in the same order.
        changes.collect([loaded.orders[each] for each in order_ids if each in loaded.orders])
        changes.collect([loaded.payouts[each] for each in references if each in loaded.payouts])
        changes.collect([loaded.refunds[each] for each in refund_ids if each in loaded.refunds])
        has_parked = False
        if not changes.is_empty:
            has_parked = await self._store.apply(changes)
            self._notifications.wake(changes.orders)
        for outcome, report, subject in flagged:
            self._report(outcome, report.notification, subject)
        return objects if has_parked else []


def _decide(report: Report, subject: Subject, now: datetime) -> None:
    match report, subject:
        case OrderRegistered(), PaymentOrder():
            subject.register(report.psp, report.psp_token, report.hosted_page_url, now)
        case OrderRejected(), PaymentOrder():
            subject.reject(report.psp, report.code, report.reason, now)
        case PayoutSubmitted(), Payout():
            subject.submit(report.psp_payout_id, now)
        case PayoutRejected(), Payout():
            subject.reject(report.code, report.reason, report.compliance, now)
        case FundsHeld(), Payout():
            subject.hold(report.hold_id, now)
        case FundsRefused(), Payout():
            subject.refuse_funds(report.result, now)
        case RefundFundsHeld(), Refund():
            subject.hold(report.reference, report.hold_id, now)
        case RefundFundsRefused(), Refund():
            subject.refuse_funds(report.reference, report.result, report.available_minor, now)


def _order_id(report: Report) -> str:
    if isinstance(report, OrderRegistered | OrderRejected):
        return report.payment_order_id
    if isinstance(report, OutcomeFound) and report.notification.kind.subject == "order":
        return report.notification.merchant_reference
    return ""


def _reference(report: Report) -> str:
    if isinstance(report, PayoutSubmitted | PayoutRejected | FundsHeld | FundsRefused):
        return report.reference
    if isinstance(report, OutcomeFound) and report.notification.kind.subject == "payout":
        return report.notification.merchant_reference
    return ""


def _refund_id(report: Report) -> str:
    return report.refund_id if isinstance(report, RefundFundsHeld | RefundFundsRefused) else ""


def _subject(report: Report, loaded: Loaded) -> Subject:
    order_id, reference = _order_id(report), _reference(report) or _refund_id(report)
    subject: Subject | None
    if isinstance(report, RefundFundsHeld | RefundFundsRefused):
        subject = loaded.refunds.get(reference)
    else:
        subject = loaded.orders.get(order_id) if order_id else loaded.payouts.get(reference)
    if subject is None:
        raise NotFound(f"{type(report).__name__} is about {order_id or reference!r}, which is not stored here")
    return subject
