"""A payment order and its life.

Late, repeated and reordered facts are *ignored* pairs of the table. Pairs that are in neither list cannot happen: a
notification of that kind is parked for an operator, a caller's request is refused.

A success that the PSP reports after FAILED, CANCELED or EXPIRED is authoritative: the PSP has the buyer's money, so
the order becomes SUCCESS and the seller is credited. The other way round (failed after SUCCESS) is a reordered
message and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum

from kernel.state_table import StateTable, TransitionRefused
from payment.domain.facts import Change, Fact, FactKind
from payment.domain.finding import Finding, FindingKind, FindingSubject, finding_of
from payment.domain.notification import Notification, NotificationKind, Outcome

__all__ = [
    "OPEN_STATES",
    "PAID_STATES",
    "PAYMENT_ORDER_TABLE",
    "PaymentOrder",
    "PaymentOrderEvent",
    "PaymentOrderState",
]


class PaymentOrderState(IntEnum):
    """The numbers are those of ducat.payment.v1.PaymentOrderState."""

    NOT_STARTED = 1
    EXECUTING = 2
    SUCCESS = 3
    FAILED = 4
    CANCELED = 5
    EXPIRED = 6
    PARTIALLY_REFUNDED = 7
    REFUNDED = 8
    DISPUTED = 9
    DISPUTE_LOST = 10


class PaymentOrderEvent(Enum):
    """What can happen to an order, and who says so."""

    REGISTERED = "executor: a PSP has the intent"
    REJECTED = "executor: no PSP takes it"
    SUCCEEDED = "PSP: paid"
    FAILED = "PSP: refused for good"
    CANCELED = "PSP: canceled"
    EXPIRED = "PSP: not paid in time"
    PENDING = "PSP: moved on, not final"
    CANCEL_REQUESTED = "caller: cancel"
    TIMED_OUT = "clock: not paid in time"
    REFUNDED_IN_PART = "refund: some of the money is back"
    REFUNDED_IN_FULL = "refund: all of the money is back"
    REFUND_FAILED_IN_PART = "refund: failed after all, others stay"
    REFUND_FAILED = "refund: failed after all, none stays"
    DISPUTE_OPENED = "PSP: the buyer's bank disputes"
    DISPUTE_WON = "PSP: the seller keeps the money"
    DISPUTE_WON_PARTIALLY_REFUNDED = "PSP: the seller keeps what was not refunded"
    DISPUTE_WON_REFUNDED = "PSP: won, but everything was refunded before"
    DISPUTE_LOST = "PSP: the money is gone"


_S, _E = PaymentOrderState, PaymentOrderEvent

OPEN_STATES = frozenset({_S.NOT_STARTED, _S.EXECUTING})
"""Not final: the buyer may still pay. A payment is done when none of its orders is in one of these."""

PAID_STATES = frozenset({_S.SUCCESS, _S.PARTIALLY_REFUNDED, _S.REFUNDED, _S.DISPUTED, _S.DISPUTE_LOST})
"""The money was captured."""

_UNPAID_FINAL = (_S.FAILED, _S.CANCELED, _S.EXPIRED)
_BEFORE_PAID = (
    _E.REGISTERED,
    _E.REJECTED,
    _E.FAILED,
    _E.CANCELED,
    _E.EXPIRED,
    _E.PENDING,
    _E.CANCEL_REQUESTED,
    _E.TIMED_OUT,
)
_WON = (_E.DISPUTE_WON, _E.DISPUTE_WON_PARTIALLY_REFUNDED, _E.DISPUTE_WON_REFUNDED)

PAYMENT_ORDER_TABLE: StateTable[PaymentOrderState, PaymentOrderEvent] = StateTable(
    "payment_order",
    PaymentOrderState,
    PaymentOrderEvent,
    {
        (_S.NOT_STARTED, _E.REGISTERED): _S.EXECUTING,
        (_S.NOT_STARTED, _E.REJECTED): _S.FAILED,
        # A webhook may overtake the executor's report.
        (_S.NOT_STARTED, _E.SUCCEEDED): _S.SUCCESS,
        (_S.NOT_STARTED, _E.FAILED): _S.FAILED,
        (_S.NOT_STARTED, _E.CANCELED): _S.CANCELED,
        (_S.NOT_STARTED, _E.EXPIRED): _S.EXPIRED,
        (_S.NOT_STARTED, _E.CANCEL_REQUESTED): _S.CANCELED,
        (_S.NOT_STARTED, _E.TIMED_OUT): _S.EXPIRED,
        (_S.EXECUTING, _E.SUCCEEDED): _S.SUCCESS,
        (_S.EXECUTING, _E.FAILED): _S.FAILED,
        (_S.EXECUTING, _E.CANCELED): _S.CANCELED,
        (_S.EXECUTING, _E.EXPIRED): _S.EXPIRED,
        (_S.EXECUTING, _E.TIMED_OUT): _S.EXPIRED,
        # Late success: the PSP has the money, whatever we thought.
        (_S.FAILED, _E.SUCCEEDED): _S.SUCCESS,
        (_S.CANCELED, _E.SUCCEEDED): _S.SUCCESS,
        (_S.EXPIRED, _E.SUCCEEDED): _S.SUCCESS,
        (_S.SUCCESS, _E.REFUNDED_IN_PART): _S.PARTIALLY_REFUNDED,
        (_S.SUCCESS, _E.REFUNDED_IN_FULL): _S.REFUNDED,
        (_S.PARTIALLY_REFUNDED, _E.REFUNDED_IN_PART): _S.PARTIALLY_REFUNDED,
        (_S.PARTIALLY_REFUNDED, _E.REFUNDED_IN_FULL): _S.REFUNDED,
        # Banks send refunds back days after the PSP called them paid.
        (_S.PARTIALLY_REFUNDED, _E.REFUND_FAILED_IN_PART): _S.PARTIALLY_REFUNDED,
        (_S.PARTIALLY_REFUNDED, _E.REFUND_FAILED): _S.SUCCESS,
        (_S.REFUNDED, _E.REFUND_FAILED_IN_PART): _S.PARTIALLY_REFUNDED,
        (_S.REFUNDED, _E.REFUND_FAILED): _S.SUCCESS,
        (_S.DISPUTED, _E.REFUND_FAILED_IN_PART): _S.DISPUTED,
        (_S.DISPUTED, _E.REFUND_FAILED): _S.DISPUTED,
        (_S.DISPUTE_LOST, _E.REFUND_FAILED_IN_PART): _S.DISPUTE_LOST,
        (_S.DISPUTE_LOST, _E.REFUND_FAILED): _S.DISPUTE_LOST,
        (_S.SUCCESS, _E.DISPUTE_OPENED): _S.DISPUTED,
        (_S.PARTIALLY_REFUNDED, _E.DISPUTE_OPENED): _S.DISPUTED,
        (_S.REFUNDED, _E.DISPUTE_OPENED): _S.DISPUTED,
        (_S.DISPUTED, _E.DISPUTE_WON): _S.SUCCESS,
        (_S.DISPUTED, _E.DISPUTE_WON_PARTIALLY_REFUNDED): _S.PARTIALLY_REFUNDED,
        (_S.DISPUTED, _E.DISPUTE_WON_REFUNDED): _S.REFUNDED,
        (_S.DISPUTED, _E.DISPUTE_LOST): _S.DISPUTE_LOST,
        # The notification of the opening may come after that of the loss, or never.
        (_S.SUCCESS, _E.DISPUTE_LOST): _S.DISPUTE_LOST,
        (_S.PARTIALLY_REFUNDED, _E.DISPUTE_LOST): _S.DISPUTE_LOST,
        (_S.REFUNDED, _E.DISPUTE_LOST): _S.DISPUTE_LOST,
        # A refund that was under way when the dispute came is never lost: its amount is added, the state stays.
        (_S.DISPUTED, _E.REFUNDED_IN_PART): _S.DISPUTED,
        (_S.DISPUTED, _E.REFUNDED_IN_FULL): _S.DISPUTED,
        (_S.DISPUTE_LOST, _E.REFUNDED_IN_PART): _S.DISPUTE_LOST,
        (_S.DISPUTE_LOST, _E.REFUNDED_IN_FULL): _S.DISPUTE_LOST,
    },
    ignored=frozenset(
        {
            (_S.NOT_STARTED, _E.PENDING),
            (_S.EXECUTING, _E.REGISTERED),
            (_S.EXECUTING, _E.REJECTED),
            (_S.EXECUTING, _E.PENDING),
            # The PSP decides whether the cancel came in time: a command goes out, its notification moves the order.
            (_S.EXECUTING, _E.CANCEL_REQUESTED),
            *((state, event) for state in _UNPAID_FINAL for event in _BEFORE_PAID),
            *((state, event) for state in PAID_STATES for event in _BEFORE_PAID),
            *((state, _E.SUCCEEDED) for state in PAID_STATES),
            *((state, event) for state in (_S.SUCCESS, _S.PARTIALLY_REFUNDED, _S.REFUNDED) for event in _WON),
            (_S.REFUNDED, _E.REFUNDED_IN_FULL),
            (_S.DISPUTED, _E.DISPUTE_OPENED),
            (_S.DISPUTE_LOST, _E.DISPUTE_OPENED),
            (_S.DISPUTE_LOST, _E.DISPUTE_LOST),
        }
    ),
)

_EVENT_OF_KIND = {
    NotificationKind.ORDER_SUCCEEDED: _E.SUCCEEDED,
    NotificationKind.ORDER_FAILED: _E.FAILED,
    NotificationKind.ORDER_CANCELED: _E.CANCELED,
    NotificationKind.ORDER_EXPIRED: _E.EXPIRED,
    NotificationKind.ORDER_PENDING: _E.PENDING,
    NotificationKind.DISPUTE_OPENED: _E.DISPUTE_OPENED,
    NotificationKind.DISPUTE_WON: _E.DISPUTE_WON,
    NotificationKind.DISPUTE_LOST: _E.DISPUTE_LOST,
}
_INTENT_EVENTS = frozenset({_E.FAILED, _E.CANCELED, _E.EXPIRED, _E.PENDING})


@dataclass(slots=True)
class PaymentOrder:
    """One order of a checkout. Amounts are minor units. Its methods take what happened, change it through the table
    and note what must be told to others in `facts`; the store writes it back where `revision` is still
    `stored_revision`.
    """

    payment_order_id: str
    checkout_id: str
    seller_account: str
    currency_code: str
    amount_minor: int
    state: PaymentOrderState
    create_time: datetime
    update_time: datetime
    psp: str = ""
    psp_token: str = ""
    hosted_page_url: str = ""
    failure_reason: str = ""
    attention: str = ""
    refunded_minor: int = 0
    disputed_minor: int = 0
    """What a dispute took from the seller and a won one gives back."""
    cancel_requested: bool = False
    revision: int = 1
    stored_revision: int = 1
    stored_state: PaymentOrderState = _S.NOT_STARTED
    traceparent: str = ""
    history: list[Change] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    new_findings: list[Finding] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """True when it must be written back."""
        return self.revision != self.stored_revision

    @property
    def is_closed_now(self) -> bool:
        """True when it was open as read and is final now: it counts once towards its payment being done."""
        return self.stored_state in OPEN_STATES and self.state not in OPEN_STATES

    def register(self, psp: str, psp_token: str, hosted_page_url: str, now: datetime) -> bool:
        """The executor says that a PSP has the intent. Returns whether anything changed.

        An order that was canceled or expired before its intent was known sends the cancel after it, so that nobody
        can pay it.
        """
        moved = self._move(_E.REGISTERED, "order_registered", now)
        if self.psp_token:
            return moved
        self.psp, self.psp_token = psp, psp_token
        if moved:
            self.hosted_page_url = hosted_page_url
            return True
        self._touch(now)
        if self.state in (_S.CANCELED, _S.EXPIRED):
            self._send_cancel("intent known after the order was closed", now)
        return True

    def reject(self, psp: str, code: str, reason: str, now: datetime) -> bool:
        """The executor says that no PSP takes it. Returns whether anything changed."""
        if not self._move(_E.REJECTED, "order_rejected", now):
            return False
        self.psp = psp or self.psp
        self._close(f"{reason or 'rejected by the provider'}{f' ({code})' if code else ''}")
        return True

    def cancel(self, reason: str, now: datetime) -> bool:
        """The caller wants it canceled: at once where no PSP has it, else through the PSP. Returns whether
        anything changed.
        """
        cause = f"cancel requested: {reason}" if reason else "cancel requested"
        if self._move(_E.CANCEL_REQUESTED, cause, now):
            self._close(reason or "canceled by the caller")
            return True
        if self.state is not _S.EXECUTING or self.cancel_requested:
            return False
        self._send_cancel(cause, now)
        return True

    def time_out(self, now: datetime) -> bool:
        """It was not paid in time. Returns whether anything changed. The intent at the PSP, if known, is
        canceled too.
        """
        if not self._move(_E.TIMED_OUT, "not paid in time", now):
            return False
        self._close("not paid in time")
        if self.psp_token and not self.cancel_requested:
            self._send_cancel("", now)
        return True

    def notify(self, notification: Notification, now: datetime, holder: str = "") -> Outcome:
        """A PSP tells something about it. `holder` is another order that has the notification's PSP object, if there is one."""
        event = _EVENT_OF_KIND.get(notification.kind)
        if event is None:
            return Outcome.IGNORED
        ours = not self.psp_token or (
            notification.psp == self.psp and notification.psp_object_id in ("", self.psp_token)
        )
        if event is _E.SUCCEEDED:
            contradiction = self._contradiction(notification, ours, holder)
            if contradiction is not None:
                kind, text = contradiction
                if self.state not in PAID_STATES:
                    self.failure_reason = text
                self.flag(kind, text, notification, now)
                return Outcome.FLAGGED
        elif event in _INTENT_EVENTS and not ours:
            return (
                Outcome.IGNORED
            )  # the end of another intent of this order says nothing about the one that the buyer sees
        if event is _E.DISPUTE_WON and self.refunded_minor:
            whole = self.refunded_minor >= self.amount_minor
            event = _E.DISPUTE_WON_REFUNDED if whole else _E.DISPUTE_WON_PARTIALLY_REFUNDED
        was = self.state
        try:
            moved = self._move(event, notification.cause, now)
        except TransitionRefused:
            return Outcome.PARKED
        if not moved:
            return Outcome.IGNORED
        if event is _E.SUCCEEDED:
            self._capture(notification, ours, now)
        elif self.state in _UNPAID_FINAL:
            self.psp = self.psp or notification.psp
            self._close(notification.failure)
        elif event is _E.DISPUTE_OPENED:
            self._open_dispute(notification, now)
        else:
            if was is not _S.DISPUTED:  # the loss is the first that we hear of it: the money went all the same
                self._open_dispute(notification, now)
            self._close_dispute(event in _WON)
        return Outcome.APPLIED

    def add_refund(self, amount_minor: int, cause: str, now: datetime) -> None:
        """Money of it went back to the buyer. Raises TransitionRefused where it was never paid, ValueError
        where it is too much.
        """
        total = self.refunded_minor + amount_minor
        if amount_minor <= 0 or total > self.amount_minor:
            raise ValueError(f"{self.payment_order_id}: refunds of {total} of {self.amount_minor} {self.currency_code}")
        whole = total == self.amount_minor
        if self._move(_E.REFUNDED_IN_FULL if whole else _E.REFUNDED_IN_PART, cause, now):
            self.refunded_minor = total

    def remove_refund(self, amount_minor: int, cause: str, now: datetime) -> None:
        """A refund of it failed after it was added. Raises ValueError where so much was never refunded."""
        left = self.refunded_minor - amount_minor
        if amount_minor <= 0 or left < 0:
            raise ValueError(f"{self.payment_order_id}: {amount_minor} of {self.refunded_minor} refunded fail")
        if self._move(_E.REFUND_FAILED_IN_PART if left else _E.REFUND_FAILED, cause, now):
            self.refunded_minor = left

    def flag(self, kind: FindingKind, text: str, notification: Notification, now: datetime) -> None:
        """What a notification says does not agree with the order."""
        self.new_findings.append(self.finding(kind, text, notification, now))
        if self.attention != text:
            self.attention = text
            self._touch(now, f"{notification.cause}: {text}")

    def finding(self, kind: FindingKind, text: str, notification: Notification, now: datetime) -> Finding:
        """The finding that `flag` makes: the same arguments give the same id."""
        ours = {
            "amount_minor": self.amount_minor,
            "currency_code": self.currency_code,
            "psp": self.psp,
            "psp_token": self.psp_token,
            "state": self.state.name,
            "refunded_minor": self.refunded_minor,
        }
        theirs: dict[str, object] = {
            "psp": notification.psp,
            "psp_object_id": notification.psp_object_id,
            "state": notification.kind.name,
        }
        if notification.amount_minor is not None:
            theirs |= {"amount_minor": notification.amount_minor, "currency_code": notification.currency_code}
        return finding_of(
            kind,
            FindingSubject.ORDER,
            self.payment_order_id,
            text,
            notification,
            now,
            ours,
            theirs,
            checkout_id=self.checkout_id,
            seller_account=self.seller_account,
        )

    def _open_dispute(self, notification: Notification, now: datetime) -> None:
        """It takes what refunds have left: nothing is taken from a seller twice."""
        left = self.amount_minor - self.refunded_minor
        told = notification.amount_minor
        if left == 0 or (told is not None and (notification.currency_code, told) != (self.currency_code, left)):
            what = "an amount that it does not tell" if told is None else f"{told} {notification.currency_code}"
            self.flag(
                FindingKind.DISPUTE_MISMATCH,
                f"{notification.psp} tells of a dispute about {what}, {left} {self.currency_code} of the order are left "
                "after refunds (minor units): booked as what is left",
                notification,
                now,
            )
        self.disputed_minor = left
        if left:
            self.facts.append(Fact(FactKind.DISPUTE_OPENED, revision=self.revision, amount_minor=left))

    def _close_dispute(self, won: bool) -> None:
        if self.disputed_minor:
            self.facts.append(
                Fact(FactKind.DISPUTE_CLOSED, won=won, revision=self.revision, amount_minor=self.disputed_minor)
            )
        if won:
            self.disputed_minor = 0

    def _contradiction(self, notification: Notification, ours: bool, holder: str) -> tuple[FindingKind, str] | None:
        if notification.amount_minor is not None and (notification.currency_code, notification.amount_minor) != (
            self.currency_code,
            self.amount_minor,
        ):
            return FindingKind.AMOUNT_MISMATCH, (
                f"{notification.psp} says paid {notification.amount_minor} {notification.currency_code}, "
                f"the order is {self.amount_minor} {self.currency_code} (minor units): not credited"
            )
        if holder:
            return FindingKind.PAYMENT_OF_ANOTHER_ORDER, (
                f"{notification.psp} says paid by {notification.psp_object_id}, "
                f"which is the payment of order {holder}: not credited"
            )
        if not ours and self.state in PAID_STATES:
            return FindingKind.PAID_TWICE, (
                f"paid twice: {self.psp} {self.psp_token} and {notification.psp} {notification.psp_object_id}: "
                "the second was not credited, refund it at the provider"
            )
        return None

    def _capture(self, notification: Notification, ours: bool, now: datetime) -> None:
        if not ours and not self.cancel_requested:
            self._send_cancel("", now)  # the buyer paid another intent: close the one that is known
        token = notification.psp_object_id or (self.psp_token if notification.psp == self.psp else "")
        self.psp, self.psp_token = notification.psp, token
        self.failure_reason = self.hosted_page_url = ""
        self.facts.append(Fact(FactKind.ORDER_SUCCEEDED, psp=self.psp, psp_object_id=self.psp_token))

    def _close(self, reason: str) -> None:
        self.failure_reason, self.hosted_page_url = reason[:1000], ""
        self.facts.append(Fact(FactKind.ORDER_CLOSED, state=self.state.name, reason=self.failure_reason))

    def _send_cancel(self, cause: str, now: datetime) -> None:
        self.cancel_requested = True
        self.facts.append(Fact(FactKind.CANCEL_ORDER, psp=self.psp, psp_object_id=self.psp_token))
        self._touch(now, cause)

    def _move(self, event: PaymentOrderEvent, cause: str, now: datetime) -> bool:
        new = PAYMENT_ORDER_TABLE.next(self.state, event)
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
