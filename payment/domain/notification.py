"""What a PSP tells us, by webhook or because the executor asked it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

__all__ = ["Notification", "NotificationKind", "Outcome"]


class NotificationKind(IntEnum):
    """What it tells. The numbers are those of ducat.executor.v1.NotificationKind."""

    UNKNOWN = 0
    ORDER_SUCCEEDED = 1
    ORDER_FAILED = 2
    ORDER_CANCELED = 3
    ORDER_EXPIRED = 4
    ORDER_PENDING = 5
    REFUND_SUCCEEDED = 6
    REFUND_FAILED = 7
    PAYOUT_PROCESSING = 8
    PAYOUT_COMPLETED = 9
    PAYOUT_FAILED = 10
    PAYOUT_REJECTED = 11
    PAYOUT_RETURNED = 12
    DISPUTE_OPENED = 13
    DISPUTE_WON = 14
    DISPUTE_LOST = 15

    @property
    def subject(self) -> str:
        """What it is about: ``order``, ``refund``, ``payout``, or empty."""
        return _SUBJECTS[self]


_SUBJECTS = {
    kind: {"ORDER": "order", "DISPUTE": "order", "REFUND": "refund", "PAYOUT": "payout"}.get(
        kind.name.partition("_")[0], ""
    )
    for kind in NotificationKind
}


class Outcome(IntEnum):
    """What became of a notification; stored with it."""

    PARKED = 0
    """It fits nothing that we know yet (unknown order, or a state that does not allow it yet). Tried again on
    a schedule.
    """
    APPLIED = 1
    """It changed something."""
    IGNORED = 2
    """Late, repeated, reordered, or of a type that means nothing to us."""
    FLAGGED = 3
    """It contradicts what we know (amount, currency, paid twice). Nothing was credited; an operator must look."""


@dataclass(frozen=True, slots=True)
class Notification:
    """One notification, verified and translated. `amount_minor` is None where the PSP does not tell an amount.

    `psp_event_id` is empty for what the executor found by asking (the bus message's id then guards against repeats).
    """

    psp: str
    psp_event_id: str
    kind: NotificationKind
    psp_object_id: str = ""
    merchant_reference: str = ""
    currency_code: str = ""
    amount_minor: int | None = None
    code: str = ""
    reason: str = ""
    psp_type: str = ""
    occur_time: datetime | None = None
    attempt_count: int = 0
    psp_payment_id: str = ""
    """Of a refund: the PSP's id of the payment whose money goes back."""

    @property
    def cause(self) -> str:
        """For histories: ``notification evt_123 (payment_intent.succeeded)``."""
        if not self.psp_event_id:
            return f"found at {self.psp}: {self.kind.name.lower()}"
        return f"notification {self.psp_event_id}" + (f" ({self.psp_type})" if self.psp_type else "")

    @property
    def failure(self) -> str:
        """Why it failed, in words for people; never empty."""
        words = self.reason or self.kind.name.lower().replace("_", " ")
        return f"{words} ({self.code})" if self.code else words
