"""What needs an operator is one line at the right level, and carries the payment's own trace."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from structlog.testing import capture_logs

from kernel.clock import FixedClock
from payment.adapters.operator_log import report_notification
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from payment.service.notifications import Notifications
from runtime import trace
from tests.unit.payment.memory_store import MemoryStore

NOW = datetime(2025, 7, 21, tzinfo=UTC)
TRACE = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"


def lines(outcome: Outcome, attempt_count: int = 0, order: PaymentOrder | None = None) -> list[Any]:
    told = Notification(
        "sandbox", "evt_1", NotificationKind.ORDER_SUCCEEDED, "pi_1", "ORD-1", attempt_count=attempt_count
    )
    with capture_logs() as captured:
        report_notification(outcome, told, order)
    return captured


def test_a_contradiction_is_an_error_that_says_what_and_where() -> None:
    order = PaymentOrder("ORD-1", "CH-1", "S", "USD", 1, PaymentOrderState.EXECUTING, NOW, NOW, traceparent=TRACE)
    order.attention = "paid 2, the order is 1"
    before = trace.current()
    (line,) = lines(Outcome.FLAGGED, order=order)
    assert (line["log_level"], line["attention"], line["psp_event_id"]) == ("error", order.attention, "evt_1")
    assert trace.current() == before


def test_a_parked_notification_warns_once_not_at_each_try() -> None:
    (line,) = lines(Outcome.PARKED)
    assert (line["log_level"], line["state"]) == ("warning", "unknown here")
    assert lines(Outcome.PARKED, attempt_count=1) == []
    assert lines(Outcome.IGNORED, attempt_count=1) == []


async def test_a_parked_notification_carries_the_trace_of_its_own_webhook_not_of_its_neighbour() -> None:
    """Calls that come together share one transaction, which runs in the task of the first of them."""
    seen: list[tuple[str, str]] = []

    def report(_outcome: Outcome, notification: Notification, _subject: object) -> None:
        seen.append((notification.psp_event_id, trace.trace_id()))

    notifications = Notifications(MemoryStore(()), None, FixedClock(), report)  # type: ignore[arg-type]

    async def webhook(number: int) -> None:
        trace.set_current(f"00-{number:032x}-{'d' * 16}-01")
        await notifications.apply([Notification("sandbox", f"evt_{number}", NotificationKind.ORDER_SUCCEEDED, "pi")])

    await asyncio.gather(*(webhook(number) for number in range(1, 6)))
    assert seen == [(f"evt_{number}", f"{number:032x}") for number in range(1, 6)]
