"""A payout and its life.

The money is held on the seller's wallet before the PSP hears of the payout; the hold is posted when the payout
arrived and voided when it did not. A cancel is possible until the hold stands. COMPLETED after FAILED or REJECTED
cannot be applied, because the hold is gone: it is parked and flagged for an operator. RETURNED before COMPLETED
(reordered) voids the hold, which has the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum

from kernel.state_table import StateTable, TransitionRefused
from payment.domain.bank_account import BankAccount
from payment.domain.facts import Change, Fact, FactKind
from payment.domain.finding import Finding, FindingKind, FindingSubject, finding_of
from payment.domain.notification import Notification, NotificationKind, Outcome

__all__ = ["PAYOUT_TABLE", "Payout", "PayoutEvent", "PayoutState"]


class PayoutState(IntEnum):
    """The numbers are those of ducat.payment.v1.PayoutState."""

    AWAITING_APPROVAL = 1
    SCHEDULED = 2
    HOLDING = 3
    PENDING = 4
    PROCESSING = 5
    COMPLETED = 6
    FAILED = 7
    REJECTED = 8
    RETURNED = 9
    CANCELED = 10


class PayoutEvent(Enum):
    """What can happen to a payout, and who says so."""

    APPROVED = "approver: go"
    APPROVED_FOR_LATER = "approver: go, at its time"
    APPROVAL_REFUSED = "approver: no"
    DUE = "clock: its time has come"
    CANCEL_REQUESTED = "caller: cancel"
    FUNDS_HELD = "wallet: the money is held"
    FUNDS_REFUSED = "wallet: not covered"
    SUBMITTED = "executor: the PSP has it"
    PSP_REJECTED = "executor: the PSP refuses it"
    COMPLIANCE_REJECTED = "executor, PSP: AML, fraud or sanctions"
    PROCESSING = "PSP: under way"
    COMPLETED = "PSP: arrived"
    FAILED = "PSP: failed"
    RETURNED = "PSP: the bank sent it back"


_S, _E = PayoutState, PayoutEvent
_APPROVALS = (_E.APPROVED, _E.APPROVED_FOR_LATER)
_EARLY = (_E.APPROVED, _E.APPROVED_FOR_LATER, _E.DUE)

PAYOUT_TABLE: StateTable[PayoutState, PayoutEvent] = StateTable(
    "payout",
    PayoutState,
    PayoutEvent,
    {
        (_S.AWAITING_APPROVAL, _E.APPROVED): _S.HOLDING,
        (_S.AWAITING_APPROVAL, _E.APPROVED_FOR_LATER): _S.SCHEDULED,
        (_S.AWAITING_APPROVAL, _E.APPROVAL_REFUSED): _S.CANCELED,
        (_S.AWAITING_APPROVAL, _E.CANCEL_REQUESTED): _S.CANCELED,
        (_S.SCHEDULED, _E.DUE): _S.HOLDING,
        (_S.SCHEDULED, _E.CANCEL_REQUESTED): _S.CANCELED,
        (_S.HOLDING, _E.FUNDS_HELD): _S.PENDING,
        (_S.HOLDING, _E.FUNDS_REFUSED): _S.FAILED,
        (_S.HOLDING, _E.CANCEL_REQUESTED): _S.CANCELED,
        (_S.PENDING, _E.SUBMITTED): _S.PENDING,
        (_S.PENDING, _E.PSP_REJECTED): _S.FAILED,
        (_S.PENDING, _E.COMPLIANCE_REJECTED): _S.REJECTED,
        (_S.PENDING, _E.PROCESSING): _S.PROCESSING,
        (_S.PENDING, _E.COMPLETED): _S.COMPLETED,
        (_S.PENDING, _E.FAILED): _S.FAILED,
        (_S.PENDING, _E.RETURNED): _S.RETURNED,
        (_S.PROCESSING, _E.PSP_REJECTED): _S.FAILED,
        (_S.PROCESSING, _E.COMPLIANCE_REJECTED): _S.REJECTED,
        (_S.PROCESSING, _E.COMPLETED): _S.COMPLETED,
        (_S.PROCESSING, _E.FAILED): _S.FAILED,
        (_S.PROCESSING, _E.RETURNED): _S.RETURNED,
        # Some PSPs say "failed" when a bank refuses a payout that they had called paid.
        (_S.COMPLETED, _E.FAILED): _S.RETURNED,
        (_S.COMPLETED, _E.RETURNED): _S.RETURNED,
    },
    ignored=frozenset(
        {
            (_S.AWAITING_APPROVAL, _E.DUE),
            *((_S.SCHEDULED, event) for event in _APPROVALS),
            *((state, event) for state in (_S.HOLDING, _S.PENDING, _S.PROCESSING, _S.COMPLETED) for event in _EARLY),
            *((state, event) for state in (_S.FAILED, _S.REJECTED, _S.RETURNED) for event in _EARLY),
            (_S.PENDING, _E.FUNDS_HELD),
            *((_S.PROCESSING, event) for event in (_E.FUNDS_HELD, _E.SUBMITTED, _E.PROCESSING)),
            *((_S.COMPLETED, event) for event in (_E.FUNDS_HELD, _E.SUBMITTED, _E.PROCESSING, _E.COMPLETED)),
            *(
                (state, event)
                for state in (_S.FAILED, _S.REJECTED)
                for event in (
                    _E.FUNDS_HELD,
                    _E.FUNDS_REFUSED,
                    _E.SUBMITTED,
                    _E.PSP_REJECTED,
                    _E.COMPLIANCE_REJECTED,
                    _E.PROCESSING,
                    _E.FAILED,
                    _E.RETURNED,
                )
            ),
            *(
                (_S.RETURNED, event)
                for event in (_E.FUNDS_HELD, _E.SUBMITTED, _E.PROCESSING, _E.COMPLETED, _E.FAILED, _E.RETURNED)
            ),
            # The hold may still come after the cancel: it is released at once.
            *(
                (_S.CANCELED, event)
                for event in (_E.DUE, _E.CANCEL_REQUESTED, _E.APPROVAL_REFUSED, _E.FUNDS_HELD, _E.FUNDS_REFUSED)
            ),
        }
    ),
)

_EVENT_OF_KIND = {
    NotificationKind.PAYOUT_PROCESSING: _E.PROCESSING,
    NotificationKind.PAYOUT_COMPLETED: _E.COMPLETED,
    NotificationKind.PAYOUT_FAILED: _E.FAILED,
    NotificationKind.PAYOUT_REJECTED: _E.COMPLIANCE_REJECTED,
    NotificationKind.PAYOUT_RETURNED: _E.RETURNED,
}
_RELEASED = frozenset({_S.FAILED, _S.REJECTED, _S.CANCELED, _S.RETURNED})


@dataclass(slots=True)
class Payout:
    """Money that leaves a wallet for a bank account. Amounts are minor units. Written back as a PaymentOrder is."""

    reference: str
    seller_account: str
    currency_code: str
    amount_minor: int
    recipient: BankAccount
    purpose: str
    psp: str
    state: PayoutState
    create_time: datetime
    update_time: datetime
    schedule_time: datetime | None = None
    psp_payout_id: str = ""
    hold_id: bytes = b""
    failure_reason: str = ""
    attention: str = ""
    revision: int = 1
    stored_revision: int = 1
    traceparent: str = ""
    history: list[Change] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    new_findings: list[Finding] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """True when it must be written back."""
        return self.revision != self.stored_revision

    def due(self, now: datetime) -> bool:
        """Its time has come. Returns whether anything changed."""
        if not self._move(_E.DUE, "schedule_time reached", now):
            return False
        self.facts.append(Fact(FactKind.PAYOUT_REQUESTED))
        return True

    def cancel(self, reason: str, now: datetime) -> bool:
        """The caller wants it canceled. Returns whether anything changed. Raises TransitionRefused once the hold
        stands.

        A hold that is under way is released when the wallet reports it.
        """
        if not self._move(_E.CANCEL_REQUESTED, f"cancel requested: {reason}" if reason else "cancel requested", now):
            return False
        self.failure_reason = reason or "canceled by the caller"
        return True

    def hold(self, hold_id: bytes, now: datetime) -> bool:
        """The wallet holds the money. Returns whether anything changed."""
        if self._move(_E.FUNDS_HELD, "funds_held", now):
            self.hold_id = hold_id
            self.facts.append(Fact(FactKind.EXECUTE_PAYOUT))
            return True
        if self.hold_id or self.state not in _RELEASED:
            return False
        self.hold_id = hold_id
        self._touch(now)
        self._release()
        return True

    def refuse_funds(self, result: str, now: datetime) -> bool:
        """The wallet does not cover it. Returns whether anything changed."""
        if not self._move(_E.FUNDS_REFUSED, "funds_refused", now):
            return False
        self.failure_reason = f"the wallet refused: {result.lower().replace('_', ' ')}"
        return True

    def submit(self, psp_payout_id: str, now: datetime) -> bool:
        """The PSP has it. Returns whether anything changed."""
        moved = self._move(_E.SUBMITTED, "payout_submitted", now)
        if self.psp_payout_id:
            return moved
        self.psp_payout_id = psp_payout_id
        if not moved:
            self._touch(now)
        return True

    def reject(self, code: str, reason: str, compliance: bool, now: datetime) -> bool:
        """The PSP refuses it. Returns whether anything changed."""
        if not self._move(_E.COMPLIANCE_REJECTED if compliance else _E.PSP_REJECTED, "payout_rejected", now):
            return False
        self.failure_reason = f"{reason or 'rejected by the provider'}{f' ({code})' if code else ''}"[:1000]
        self._release()
        return True

    def notify(self, notification: Notification, now: datetime) -> Outcome:
        """A PSP tells something about it."""
        event = _EVENT_OF_KIND.get(notification.kind)
        if event is None:
            return Outcome.IGNORED
        contradiction = self._contradiction(notification)
        if contradiction is not None:
            self._flag(*contradiction, notification, now)
            return Outcome.FLAGGED
        was = self.state
        try:
            moved = self._move(event, notification.cause, now)
        except TransitionRefused:
            if was in (_S.FAILED, _S.REJECTED, _S.CANCELED):
                said = f"{notification.psp} says {event.name.lower()}"
                text = f"{said}, but the payout is {was.name} and its hold is released"
                self._flag(FindingKind.PAYOUT_AFTER_RELEASE, text, notification, now)
                return Outcome.FLAGGED
            return Outcome.PARKED
        if not moved:
            return Outcome.IGNORED
        self.psp_payout_id = self.psp_payout_id or notification.psp_object_id
        if self.state is _S.COMPLETED:
            self.facts.append(Fact(FactKind.PAYOUT_COMPLETED, hold_id=self.hold_id))
        elif self.state is _S.RETURNED and was is _S.COMPLETED:
            self.failure_reason = notification.failure[:1000]
            self.facts.append(Fact(FactKind.PAYOUT_RETURNED, reason=self.failure_reason))
        elif self.state in _RELEASED:
            self.failure_reason = notification.failure[:1000]
            self._release()
        return Outcome.APPLIED

    def _contradiction(self, notification: Notification) -> tuple[FindingKind, str] | None:
        if notification.psp != self.psp:
            return FindingKind.PAYOUT_OTHER_PSP, f"{notification.psp} tells of a payout that {self.psp} has"
        if self.psp_payout_id and notification.psp_object_id not in ("", self.psp_payout_id):
            return FindingKind.PAYOUT_TWICE, (
                f"{notification.psp} tells of {notification.psp_object_id}, a second payout under our reference; "
                f"ours is {self.psp_payout_id}: not applied, find out whether it was paid twice"
            )
        if notification.amount_minor is not None and (notification.currency_code, notification.amount_minor) != (
            self.currency_code,
            self.amount_minor,
        ):
            return FindingKind.AMOUNT_MISMATCH, (
                f"{notification.psp} says {notification.amount_minor} {notification.currency_code}, "
                f"the payout is {self.amount_minor} {self.currency_code} (minor units): not applied"
            )
        return None

    def _release(self) -> None:
        self.facts.append(
            Fact(FactKind.PAYOUT_RELEASED, state=self.state.name, reason=self.failure_reason, hold_id=self.hold_id)
        )

    def _flag(self, kind: FindingKind, text: str, notification: Notification, now: datetime) -> None:
        ours = _side(self.currency_code, self.amount_minor, self.psp, self.psp_payout_id, self.state.name)
        theirs = _side(
            notification.currency_code,
            notification.amount_minor,
            notification.psp,
            notification.psp_object_id,
            notification.kind.name,
        )
        self.new_findings.append(
            finding_of(
                kind,
                FindingSubject.PAYOUT,
                self.reference,
                text,
                notification,
                now,
                ours,
                theirs,
                seller_account=self.seller_account,
            )
        )
        if self.attention != text:
            self.attention = text
            self._touch(now, f"{notification.cause}: {text}")

    def _move(self, event: PayoutEvent, cause: str, now: datetime) -> bool:
        new = PAYOUT_TABLE.next(self.state, event)
        if new is None:
            return False
        self.state = new
        self._touch(now, cause)
        return True

    def _touch(self, now: datetime, cause: str = "") -> None:
        self.revision += 1
        self.update_time = now
        if cause:
            self.changes.append(Change(self.state, cause[:500], int(now.timestamp() * 1000)))


def _side(currency_code: str, amount_minor: int | None, psp: str, psp_payout_id: str, state: str) -> dict[str, object]:
    side: dict[str, object] = {"psp": psp, "psp_payout_id": psp_payout_id, "state": state}
    if amount_minor is not None:
        side |= {"amount_minor": amount_minor, "currency_code": currency_code}
    return side
