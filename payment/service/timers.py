"""What the clock does: unpaid orders expire, scheduled payouts start, parked notifications are tried again.

One round a minute, three cheap queries, each over a partial index that holds only what may be due. Several processes
may run it at the same time: the state table and the revision check make each effect happen once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

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
        """One round. What fails holds up nothing else, neither of its kind nor of another; all failures are raised together at the end."""
        failures: list[Exception] = []
        for work in (self.expire_unpaid, self.start_due_payouts, self._notifications.retry_parked):
            try:
                await work()
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("timers", failures)

    async def expire_unpaid(self) -> int:
        """Orders that nobody paid in time become EXPIRED, and their intents are canceled at the PSP. Returns
        the payments.
        """
        return await self._each(self._store.overdue_checkout_ids, self._expire)

    async def start_due_payouts(self) -> int:
        """Scheduled payouts whose time has come ask for their hold. Returns how many."""
        return await self._each(self._store.due_payout_references, self._start)

    async def _each(
        self, find: Callable[[datetime, int], Awaitable[list[str]]], work: Callable[[str], Awaitable[None]]
    ) -> int:
        """Does `work` to everything that is due, batch by batch; stops after a batch in which something failed."""
        count = 0
        failures: list[Exception] = []
        while True:
            due = await find(now_of(self._clock), BATCH_MAX)
            for each in due:
                try:
                    await until_fresh(partial(work, each))
                except Exception as error:
                    failures.append(error)
            if failures:
                raise ExceptionGroup(f"{len(failures)} of {len(due)} failed", failures)
            count += len(due)
            if len(due) < BATCH_MAX:
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
