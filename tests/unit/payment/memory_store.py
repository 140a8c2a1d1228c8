"""The payment service's store in memory: what the use cases need of it, with the same promises (one effect a message, one order a PSP
object, nothing written where the state changed in between).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

from payment.domain.facts import Fact
from payment.domain.finding import Finding
from payment.domain.notification import Notification, Outcome
from payment.domain.payment_order import PaymentOrder
from payment.domain.payout import Payout
from payment.domain.refund import Refund
from payment.service.ports import ChangeSet, Loaded, PspObjectTaken, RecordedNotification, StaleState, Subject


class MemoryStore:
    """Implements the part of payment.service.ports.Store that reports and notifications use."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        subjects = list(subjects)
        self.orders = {each.payment_order_id: each for each in subjects if isinstance(each, PaymentOrder)}
        self.payouts = {each.reference: each for each in subjects if isinstance(each, Payout)}
        self.messages: set[tuple[str, str]] = set()
        self.notifications: dict[tuple[str, str], RecordedNotification] = {}
        self.refunds = {each.refund_id: each for each in subjects if isinstance(each, Refund)}
        self.findings: dict[str, Finding] = {}
        self.facts: list[Fact] = []
        self.write_count = 0

    async def load_for_messages(
        self,
        consumer: str,
        message_ids: Sequence[str],
        order_ids: Sequence[str],
        references: Sequence[str],
        refund_ids: Sequence[str] = (),
    ) -> Loaded:
        return Loaded(
            {each: copy.deepcopy(self.orders[each]) for each in order_ids if each in self.orders},
            {each: copy.deepcopy(self.payouts[each]) for each in references if each in self.payouts},
            {each: copy.deepcopy(self.refunds[each]) for each in refund_ids if each in self.refunds},
            {each for each in message_ids if (consumer, each) in self.messages},
        )

    async def load_for_notifications(self, notifications: Sequence[Notification]) -> Loaded:
        references = [each.merchant_reference for each in notifications]
        loaded = await self.load_for_messages("", (), references, references)
        keys = [(each.psp, each.psp_event_id) for each in notifications]
        loaded.known |= {
            each
            for each in keys
            if each in self.notifications and self.notifications[each].outcome is not Outcome.PARKED
        }
        refunds = [each for each in notifications if each.kind.subject == "refund"]
        told = {(each.psp, each.psp_object_id) for each in refunds}
        loaded.refunds = {
            key: copy.deepcopy(each) for key, each in self.refunds.items() if (each.psp, each.psp_refund_id) in told
        }
        paid = {(each.psp, each.psp_payment_id) for each in refunds}
        for order_id, order in self.orders.items():
            is_of_refund = any(each.payment_order_id == order_id for each in loaded.refunds.values())
            if is_of_refund or (order.psp_token and (order.psp, order.psp_token) in paid):
                loaded.orders.setdefault(order_id, copy.deepcopy(order))
        return loaded

    async def load_holders(self, loaded: Loaded, notifications: Sequence[Notification]) -> None:
        wanted = {(each.psp, each.psp_object_id) for each in notifications}
        for order_id, order in self.orders.items():
            if order.psp_token and (order.psp, order.psp_token) in wanted:
                loaded.orders.setdefault(order_id, copy.deepcopy(order))

    async def parked_notifications(
        self, _now: object, psp_object_ids: Sequence[str], _limit: int
    ) -> list[Notification]:
        return [
            each.notification
            for each in self.notifications.values()
            if each.outcome is Outcome.PARKED
            and (not psp_object_ids or each.notification.psp_object_id in psp_object_ids)
        ]

    async def apply(self, changes: ChangeSet) -> bool:
        for order in changes.orders:
            if self.orders[order.payment_order_id].revision != order.stored_revision:
                raise StaleState
            has = {(each.psp, each.psp_token) for key, each in self.orders.items() if key != order.payment_order_id}
            if order.psp_token and (order.psp, order.psp_token) in has:
                raise PspObjectTaken(f"the PSP object belongs to another order: {order.psp_token}")
        for refund in changes.refunds:
            before = self.refunds.get(refund.refund_id)
            if (before.revision if before else 0) != refund.stored_revision:
                raise StaleState
        for subject in (*changes.orders, *changes.payouts, *changes.refunds):
            subject.stored_revision = subject.revision
        self.orders |= {each.payment_order_id: each for each in changes.orders}
        self.payouts |= {each.reference: each for each in changes.payouts}
        self.refunds |= {each.refund_id: each for each in changes.refunds}
        self.findings = {each.finding_id: each for each in changes.findings} | self.findings
        for finding_id, each in changes.resolutions.items():
            if (found := self.findings.get(finding_id)) and found.is_open:
                self.findings[finding_id] = replace(
                    found, resolve_time=changes.now, resolved_by=each.resolved_by, reason=each.reason
                )
        self.messages |= {(changes.consumer, each) for each in changes.message_ids}
        self.notifications |= {
            (each.notification.psp, each.notification.psp_event_id): each for each in changes.notifications
        }
        self.facts += [fact for fact, _ in changes.facts]
        self.write_count += 1
        return any(each.outcome is Outcome.PARKED for each in self.notifications.values())
