"""Tells operators what needs them: notifications that contradict us, or that fit nothing yet, and how many findings are open."""

from __future__ import annotations

from payment.domain.notification import Notification, Outcome
from payment.service.findings import Findings
from payment.service.ports import Subject
from runtime import trace
from runtime.logs import get_logger
from runtime.metrics import gauge

__all__ = ["FindingsGauge", "report_notification"]

_logger = get_logger("notifications")


def report_notification(outcome: Outcome, notification: Notification, subject: Subject | None) -> None:
    """One line: error for a contradiction, warning for the first time that one is parked."""
    facts = {
        "psp": notification.psp,
        "psp_event_id": notification.psp_event_id,
        "kind": notification.kind.name,
        "psp_object_id": notification.psp_object_id,
        "reference": notification.merchant_reference,
    }
    with trace.bind(subject.traceparent if subject is not None else trace.current()):
        if outcome is Outcome.FLAGGED:
            _logger.error(
                "a notification contradicts us; an operator must look",
                attention=subject.attention if subject is not None else "",
                **facts,
            )
        elif notification.attempt_count == 0:
            state = subject.state.name if subject is not None else "unknown here"
            _logger.warning("a notification fits nothing yet and is parked", state=state, **facts)


class FindingsGauge:
    """The metric of open findings."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._open = gauge("ducat_payment_findings_open", "Findings that nobody has resolved.", ["kind"])

    async def measure(self) -> None:
        """Counts them."""
        for kind, count in (await self._findings.open_counts()).items():
            self._open.labels(kind.name.lower()).set(count)
