"""What the clock does: unpaid orders expire, scheduled payouts start, parked notifications are tried again.

One round a minute, three cheap queries, each over a partial index that holds only what may be due. Several processes
may run it at the same time: the state table and the revision check make each effect happen once.
"""

from __future__ import annotations

from collections.abc import Callable

from kernel.clock import Clock
from payment.service.notifications import Notifications
from payment.service.payments import until_fresh
from payment.service.ports import ChangeSet, Store, Subject, now_of

__all__ = ["BATCH_MAX", "INTERVAL_S", "Timers"]

INTERVAL_S = 60.0
"""How often a round runs; the precision of expiry and schedule times."""
BATCH_MAX = 200
"""Payments, and payouts, of one query."""


class Timers:
    """The use cases that no caller starts."""

    def __init__(self, store: Store, notifications: Notifications, clock: Clock) -> None:
        self._store = store
        self._notifications = notifications
        self._clock = clock

    async def run_once(self) -> None:
        """One round."""
        await self.expire_unpaid()
        await self.start_due_payouts()
        await self._notifications.retry_parked()

    async def expire_unpaid(self) -> int:
        """Orders that nobody paid in time become EXPIRED, and their intents are canceled at the PSP. Returns
        the payments.
        """
        count = 0
        while True:
            checkout_ids = await self._store.overdue_checkout_ids(now_of(self._clock), BATCH_MAX)
            for checkout_id in checkout_ids:
                await until_fresh(lambda checkout_id=checkout_id: self._expire(checkout_id))  # type: ignore[misc]
            count += len(checkout_ids)
            if len(checkout_ids) < BATCH_MAX:
                return count

    async def start_due_payouts(self) -> int:
        """Scheduled payouts whose time has come ask for their hold. Returns how many."""
        count = 0
        while True:
            references = await self._store.due_payout_references(now_of(self._clock), BATCH_MAX)
            for reference in references:
                await until_fresh(lambda reference=reference: self._start(reference))  # type: ignore[misc]
            count += len(references)
            if len(references) < BATCH_MAX:
                return count

    async def _expire(self, checkout_id: str) -> None:
        payment = await self._store.read_payment(checkout_id)
        if payment is not None:
            await self._apply(payment.orders, lambda changes: [order.time_out(changes.now) for order in payment.orders])

    async def _start(self, reference: str) -> None:
        payout = await self._store.read_payout(reference)
        if payout is not None:
            await self._apply([payout], lambda changes: payout.due(changes.now))

    async def _apply(self, subjects: list[Subject] | list, decide: Callable[[ChangeSet], object]) -> None:  # type: ignore[type-arg]
        changes = ChangeSet(now_of(self._clock))
        decide(changes)
        changes.collect(subjects)
        if not changes.is_empty:
            await self._store.apply(changes)
