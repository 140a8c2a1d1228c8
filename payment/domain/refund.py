"""A refund and its life.

A refund that was made at the PSP (in its dashboard, say) is known here when the PSP tells of it: the buyer has the money,
so it begins as SUCCEEDED, and what is left is to book it. The money leaves the seller's wallet as far as the wallet covers
it; the rest is a claim on the seller, because no wallet goes below zero:

    ask the wallet to hold the whole → held:    post it
                                     → refused: ask for what the wallet has left (HOLD_TRIES_MAX times), claim the rest

Wallet and ledger hear of each step from the same events. What was posted or claimed is reversed when the refund fails
after all. Refunds that callers ask for are not served yet; the table is what they will go through.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum

from kernel.state_table import StateTable
from payment.domain.facts import Change, Fact, FactKind
from payment.domain.notification import Notification

__all__ = ["HOLD_TRIES_MAX", "REFUND_TABLE", "Refund", "RefundBooking", "RefundEvent", "RefundState", "told_refund_id"]

HOLD_TRIES_MAX = 5
"""How often the wallet is asked for a hold, each time for what it had left the time before."""


class RefundState(IntEnum):
    """The numbers are those of ducat.payment.v1.RefundState."""

    PENDING = 1
    EXECUTING = 2
    SUCCEEDED = 3
    FAILED = 4


class RefundEvent(Enum):
    """What can happen to a refund, and who says so."""

    FUNDS_HELD = "wallet: the seller's money is held"
    FUNDS_REFUSED = "wallet: not covered"
    SUBMITTED = "executor: the PSP has it"
    REJECTED = "executor: the PSP refuses it"
    SUCCEEDED = "PSP: the money is back with the buyer"
    FAILED = "PSP: it failed"


_S, _E = RefundState, RefundEvent

REFUND_TABLE: StateTable[RefundState, RefundEvent] = StateTable(
    "refund",
    RefundState,
    RefundEvent,
    {
        (_S.PENDING, _E.FUNDS_HELD): _S.PENDING,
        (_S.PENDING, _E.FUNDS_REFUSED): _S.FAILED,
        (_S.PENDING, _E.SUBMITTED): _S.EXECUTING,
        (_S.PENDING, _E.REJECTED): _S.FAILED,
        (_S.PENDING, _E.SUCCEEDED): _S.SUCCEEDED,
        (_S.PENDING, _E.FAILED): _S.FAILED,
        (_S.EXECUTING, _E.REJECTED): _S.FAILED,
        (_S.EXECUTING, _E.SUCCEEDED): _S.SUCCEEDED,
        (_S.EXECUTING, _E.FAILED): _S.FAILED,
        # Banks send refunds back days after the PSP called them paid.
        (_S.SUCCEEDED, _E.FAILED): _S.FAILED,
    },
    ignored=frozenset(
        {
            (_S.EXECUTING, _E.FUNDS_HELD),
            (_S.EXECUTING, _E.SUBMITTED),
            (_S.SUCCEEDED, _E.FUNDS_HELD),
            # One that was made at the PSP: what the wallet does not cover is claimed, the refund stays.
            (_S.SUCCEEDED, _E.FUNDS_REFUSED),
            (_S.SUCCEEDED, _E.SUBMITTED),
            (_S.SUCCEEDED, _E.SUCCEEDED),
            (_S.FAILED, _E.FUNDS_HELD),
            (_S.FAILED, _E.FUNDS_REFUSED),
            (_S.FAILED, _E.SUBMITTED),
            (_S.FAILED, _E.REJECTED),
            (_S.FAILED, _E.FAILED),
        }
    ),
)


class RefundBooking(IntEnum):
    """How far the money of a refund is booked."""

    NONE = 0
    """Nothing is to be booked: it failed before anything was."""
    HOLDING = 1
    """The wallet was asked to hold it."""
    BOOKED = 2
    """It left the seller's wallet, what the wallet did not cover is claimed."""
    REVERSED = 3
    """It failed afterwards: what was taken is given back, what was claimed is withdrawn."""


_ID_PART = re.compile(r"[A-Za-z0-9._:-]{1,60}")


def told_refund_id(psp: str, psp_refund_id: str) -> str:
    """Our id of a refund that was made at a PSP: the same for the same refund, whatever event tells of it."""
    if _ID_PART.fullmatch(psp_refund_id):
        return f"{psp}:{psp_refund_id}"
    return f"{psp}:{hashlib.sha256(psp_refund_id.encode()).hexdigest()[:48]}"


@dataclass(slots=True)
class Refund:
    """Money of an order that goes back to the buyer. Amounts are minor units. Written back as a PaymentOrder is."""

    refund_id: str
    payment_order_id: str
    checkout_id: str
    seller_account: str
    currency_code: str
    amount_minor: int
    state: RefundState
    psp: str
    psp_refund_id: str
    create_time: datetime
    update_time: datetime
    booking: RefundBooking = RefundBooking.NONE
    hold_count: int = 0
    held_minor: int = 0
    hold_id: bytes = b""
    made_at_psp: bool = True
    reason: str = ""
    failure_reason: str = ""
    attention: str = ""
    revision: int = 1
    stored_revision: int = 0
    traceparent: str = ""
    history: list[Change] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """True when it must be written back."""
        return self.revision != self.stored_revision

    @property
    def claimed_minor(self) -> int:
        """What the seller owes because the wallet did not cover it."""
        return self.amount_minor - self.held_minor if self.booking is RefundBooking.BOOKED else 0

    @property
    def hold_reference(self) -> str:
        """What the wallet's answer to the latest hold names."""
        return self.refund_id if self.hold_count <= 1 else f"{self.refund_id}/{self.hold_count}"

    def begin(self, cause: str, now: datetime) -> None:
        """It is new. One that succeeded asks the wallet for the money."""
        self.changes.append(Change(self.state, cause[:500], int(now.timestamp() * 1000)))
        if self.state is _S.SUCCEEDED:
            self._ask_hold(self.amount_minor)

    def hold(self, reference: str, hold_id: bytes, now: datetime) -> bool:
        """The wallet holds what it was asked for. Returns whether anything changed."""
        if self.booking is not RefundBooking.HOLDING or reference != self.hold_reference:
            return False
        self.hold_id = hold_id
        if self.state is _S.FAILED:
            self.booking = RefundBooking.NONE
            self._completed(succeeded=False)
        else:
            self.booking = RefundBooking.BOOKED
            self._completed(succeeded=True)
            self._claim()
        self._touch(now, "funds_held")
        return True

    def refuse_funds(self, reference: str, result: str, available_minor: int, now: datetime) -> bool:
        """The wallet does not cover what it was asked for, and has `available_minor` left. Returns whether anything
        changed.
        """
        if self.booking is not RefundBooking.HOLDING or reference != self.hold_reference:
            return False
        if self.state is _S.FAILED:
            self.booking, self.held_minor = RefundBooking.NONE, 0
        elif available_minor > 0 and self.hold_count < HOLD_TRIES_MAX:
            self._ask_hold(min(available_minor, self.amount_minor))
        else:
            self.booking, self.held_minor = RefundBooking.BOOKED, 0
            self._claim()
        self._touch(now, f"funds_refused: {result.lower().replace('_', ' ')}")
        return True

    def fail(self, notification: Notification, now: datetime) -> bool:
        """The PSP says that it failed, also after it called it paid. Returns whether anything changed.

        A hold that is under way is released when the wallet reports it.
        """
        new = REFUND_TABLE.next(self.state, _E.FAILED)
        if new is None:
            return False
        self.state = new
        self.failure_reason = notification.failure[:1000]
        if self.booking is RefundBooking.BOOKED:
            self.booking = RefundBooking.REVERSED
            if self.held_minor:
                self.facts.append(Fact(FactKind.REFUND_REVERSED, amount_minor=self.held_minor))
            if self.amount_minor > self.held_minor:
                rest = self.amount_minor - self.held_minor
                self.facts.append(Fact(FactKind.REFUND_REVERSED, amount_minor=rest, claimed=True))
        self._touch(now, notification.cause)
        return True

    def _ask_hold(self, amount_minor: int) -> None:
        self.booking, self.held_minor = RefundBooking.HOLDING, amount_minor
        self.hold_count += 1
        self.facts.append(Fact(FactKind.REFUND_REQUESTED, amount_minor=amount_minor, reference=self.hold_reference))

    def _completed(self, *, succeeded: bool) -> None:
        self.facts.append(
            Fact(FactKind.REFUND_COMPLETED, amount_minor=self.held_minor, hold_id=self.hold_id, succeeded=succeeded)
        )

    def _claim(self) -> None:
        rest = self.amount_minor - self.held_minor
        if rest:
            self.facts.append(Fact(FactKind.REFUND_CLAIMED, amount_minor=rest))

    def _touch(self, now: datetime, cause: str) -> None:
        self.revision += 1
        self.update_time = now
        self.changes.append(Change(self.state, cause[:500], int(now.timestamp() * 1000)))
