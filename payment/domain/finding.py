"""Findings: where what a PSP says and what we have do not agree.

A finding moves no money. It is kept until an operator resolves it, beside all others of the same order or payout. Its id
follows from what it says, so that the same finding, told again under another event id, is the same finding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from payment.domain.notification import Notification

__all__ = ["Finding", "FindingKind", "FindingSubject", "finding_of"]

TEXT_LENGTH_MAX = 1000


class FindingKind(IntEnum):
    """The numbers are those of ducat.payment.v1.FindingKind."""

    AMOUNT_MISMATCH = 1
    PAYMENT_OF_ANOTHER_ORDER = 2
    PAID_TWICE = 3
    PAYOUT_OTHER_PSP = 4
    PAYOUT_TWICE = 5
    PAYOUT_AFTER_RELEASE = 6
    REFUND_TOO_LARGE = 7
    REFUND_OF_UNPAID = 8
    REFUND_OF_DISPUTED = 9
    REFUND_UNCLEAR = 10
    DISPUTE_MISMATCH = 11
    NOTIFICATION_GIVEN_UP = 12
    EARLIER = 13


class FindingSubject(IntEnum):
    """The numbers are those of ducat.payment.v1.FindingSubject."""

    ORDER = 1
    PAYOUT = 2
    NOTIFICATION = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `ours` and `theirs` hold the two sides under the same names."""

    finding_id: str
    kind: FindingKind
    subject: FindingSubject
    reference: str
    text: str
    create_time: datetime
    checkout_id: str = ""
    seller_account: str = ""
    psp: str = ""
    psp_event_id: str = ""
    ours: Mapping[str, str] = field(default_factory=dict)
    theirs: Mapping[str, str] = field(default_factory=dict)
    resolve_time: datetime | None = None
    resolved_by: str = ""
    reason: str = ""

    @property
    def is_open(self) -> bool:
        """True until somebody resolves it."""
        return self.resolve_time is None


def finding_of(
    kind: FindingKind,
    subject: FindingSubject,
    reference: str,
    text: str,
    notification: Notification,
    now: datetime,
    ours: Mapping[str, object],
    theirs: Mapping[str, object],
    *,
    checkout_id: str = "",
    seller_account: str = "",
) -> Finding:
    """A finding that a notification makes. What it says is `text` and `theirs`; neither the event's id nor `ours`, which may
    change between two tellings.
    """
    our_side, their_side = ({name: str(value) for name, value in side.items()} for side in (ours, theirs))
    says = json.dumps([kind, subject, reference, notification.psp, text, their_side], sort_keys=True)
    return Finding(
        hashlib.sha256(says.encode()).hexdigest()[:32],
        kind,
        subject,
        reference,
        text[:TEXT_LENGTH_MAX],
        now,
        checkout_id,
        seller_account,
        notification.psp,
        notification.psp_event_id,
        our_side,
        their_side,
    )
