"""What needs an operator is one line at the right level, and carries the payment's own trace."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from structlog.testing import capture_logs

from payment.adapters.operator_log import report_notification
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from runtime import trace

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
