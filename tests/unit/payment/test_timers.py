"""Risk: one payment that cannot be expired keeps all others open, scheduled payouts unpaid and notifications parked for ever."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest

from kernel.clock import SystemClock
from payment.domain.notification import Notification
from payment.service.notifications import Notifications
from payment.service.timers import BATCH_MAX, Timers


class Store:
    """Cannot read the checkout `bad`; keeps what it was asked for."""

    def __init__(self, *overdue: str) -> None:
        self.overdue = overdue
        self.asked: list[str] = []

    async def overdue_checkout_ids(self, _now: datetime, limit: int) -> list[str]:
        return list(self.overdue[:limit])

    async def due_payout_references(self, _now: datetime, _limit: int) -> list[str]:
        return ["PO-1"]

    async def parked_notifications(self, _now: Any, _ids: Sequence[str], _limit: int) -> list[Notification]:
        self.asked.append("parked")
        return []

    async def read_payment(self, checkout_id: str) -> None:
        self.asked.append(checkout_id)
        if checkout_id == "bad":
            raise ValueError("bad")

    async def read_payout(self, reference: str) -> None:
        self.asked.append(reference)


def timers(store: Store) -> Timers:
    clock = SystemClock()
    return Timers(store, Notifications(store, None, clock, lambda *_: None), clock)  # type: ignore[arg-type]


async def test_one_that_fails_holds_up_no_other() -> None:
    store = Store("a", "bad", "b")
    with pytest.raises(ExceptionGroup) as caught:
        await timers(store).run_once()
    assert caught.group_contains(ValueError, match="bad")
    assert store.asked == ["a", "bad", "b", "PO-1", "parked"]


async def test_a_full_batch_that_fails_is_not_tried_without_end() -> None:
    store = Store(*["bad"] * BATCH_MAX)
    with pytest.raises(ExceptionGroup):
        await timers(store).expire_unpaid()
    assert len(store.asked) == BATCH_MAX
