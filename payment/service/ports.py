"""What the use cases need from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Protocol

from kernel.clock import Clock
from payment.domain.facts import Fact
from payment.domain.finding import Finding, FindingKind, FindingSubject
from payment.domain.notification import Notification, Outcome
from payment.domain.payment import Payment
from payment.domain.payment_order import PaymentOrder
from payment.domain.payout import Payout, PayoutState
from payment.domain.refund import Refund

__all__ = [
    "ChangeSet",
    "Changes",
    "FindingFilter",
    "Loaded",
    "NotificationVerifier",
    "OrderIdsTaken",
    "PaymentFilter",
    "PayoutFilter",
    "Position",
    "PspObjectTaken",
    "RecordedNotification",
    "RequestIdTaken",
    "Resolution",
    "StaleState",
    "Store",
    "Stored",
    "Subject",
    "now_of",
]

Subject = PaymentOrder | Payout | Refund
"""What a fact is about."""

Position = tuple[datetime, str]
"""Where a page of a list, newest first, ended: create_time and id of its last row."""


class Stored(Enum):
    """What became of a create."""

    CREATED = "created"
    REPLAYED = "replayed"
    MISMATCH = "mismatch"


class StaleState(Exception):
    """What was loaded changed before it was written back: load and decide again. Nothing was written."""


class OrderIdsTaken(Exception):
    """Order ids of a new payment belong to other checkouts. Nothing was written."""

    def __init__(self, payment_order_ids: Sequence[str]) -> None:
        super().__init__(f"taken: {', '.join(payment_order_ids)}")
        self.payment_order_ids = tuple(payment_order_ids)


class RequestIdTaken(Exception):
    """The request id resolved another finding before. Nothing was written."""


class PspObjectTaken(Exception):
    """The PSP object that an order would get belongs to another order. Nothing was written."""


@dataclass(frozen=True, slots=True)
class PaymentFilter:
    """Empty fields do not filter."""

    buyer_id: str = ""
    seller_account: str = ""
    open_only: bool = False
    has_findings: bool = False


@dataclass(frozen=True, slots=True)
class FindingFilter:
    """Empty fields do not filter. `start` is included, `end` is not."""

    open_only: bool = False
    kind: FindingKind | None = None
    psp: str = ""
    seller_account: str = ""
    subject: FindingSubject | None = None
    reference: str = ""
    checkout_id: str = ""
    start: datetime | None = None
    end: datetime | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """What an operator says of a finding."""

    reason: str
    resolved_by: str
    request_id: str


@dataclass(frozen=True, slots=True)
class PayoutFilter:
    """Empty fields do not filter."""

    seller_account: str = ""
    state: PayoutState | None = None


@dataclass(slots=True)
class Loaded:
    """Orders, payouts and refunds by their id, and which of the asked messages or notifications had their effect before."""

    orders: dict[str, PaymentOrder] = field(default_factory=dict)
    payouts: dict[str, Payout] = field(default_factory=dict)
    refunds: dict[str, Refund] = field(default_factory=dict)
    known: set[str | tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class RecordedNotification:
    """A notification and what became of it."""

    notification: Notification
    outcome: Outcome
    reference: str
    attempt_count: int = 0
    next_attempt_time: datetime | None = None


@dataclass(slots=True)
class ChangeSet:
    """Everything that one decision changes; written in one transaction or not at all."""

    now: datetime
    consumer: str = ""
    message_ids: list[str] = field(default_factory=list)
    notifications: list[RecordedNotification] = field(default_factory=list)
    orders: list[PaymentOrder] = field(default_factory=list)
    payouts: list[Payout] = field(default_factory=list)
    refunds: list[Refund] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    resolutions: dict[str, Resolution] = field(default_factory=dict)
    """By finding id: findings, open or not there at all, that what is written here settles."""
    facts: list[tuple[Fact, Subject]] = field(default_factory=list)

    def collect(self, subjects: Sequence[Subject]) -> None:
        """Takes over what changed, and what must be told, in the order in which it was decided."""
        for subject in subjects:
            if subject.is_changed:
                if isinstance(subject, PaymentOrder):
                    self.orders.append(subject)
                elif isinstance(subject, Payout):
                    self.payouts.append(subject)
                else:
                    self.refunds.append(subject)
            self.take_facts(subject)

    def take_facts(self, subject: Subject) -> None:
        """Takes the facts of one subject now, so that facts of several subjects keep the order of the decisions."""
        if subject.facts:
            self.facts += [(fact, subject) for fact in subject.facts]
            subject.facts.clear()
        if not isinstance(subject, Refund) and subject.new_findings:
            self.findings += subject.new_findings
            subject.new_findings.clear()

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to write."""
        return not (self.orders or self.payouts or self.refunds or self.message_ids or self.notifications)


class Store(Protocol):
    """The payment service's own tables. Each write is one transaction."""

    async def create_payment(
        self, payment: Payment, content_hash: bytes, expire_time: datetime, traceparent: str
    ) -> Stored:
        """Store a new payment and its commands. Raises OrderIdsTaken."""
        ...

    async def taken_order_ids(self, checkout_id: str, payment_order_ids: Sequence[str]) -> list[str]:
        """Those of the ids that belong to other checkouts."""
        ...

    async def read_payment(self, checkout_id: str) -> Payment | None: ...

    async def read_page(self, page_key: str) -> Payment | None:
        """The payment of a buyer's page, compared in constant time."""
        ...

    async def payment_hash(self, checkout_id: str) -> bytes | None:
        """The hash of the request that made a payment; None where there is none."""
        ...

    async def list_payments(self, filter: PaymentFilter, after: Position | None, limit: int) -> list[Payment]: ...

    async def create_payout(self, payout: Payout, content_hash: bytes) -> Stored: ...

    async def read_payout(self, reference: str) -> Payout | None: ...

    async def payout_hash(self, reference: str) -> bytes | None:
        """The hash of the request that made a payout; None where there is none."""
        ...

    async def list_payouts(self, filter: PayoutFilter, after: Position | None, limit: int) -> list[Payout]: ...

    async def load_for_notifications(self, notifications: Sequence[Notification]) -> Loaded:
        """What the notifications are about, found by our reference or else by the PSP's id.

        `known`: (psp, psp_event_id) of those that have a final outcome.
        """
        ...

    async def load_holders(self, loaded: Loaded, notifications: Sequence[Notification]) -> None:
        """Adds the orders that have the PSP objects of the notifications."""
        ...

    async def load_for_messages(
        self,
        consumer: str,
        message_ids: Sequence[str],
        order_ids: Sequence[str],
        references: Sequence[str],
        refund_ids: Sequence[str] = (),
    ) -> Loaded:
        """Orders, payouts and refunds by id. `known`: message ids that this consumer has taken."""
        ...

    async def apply(self, changes: ChangeSet) -> bool:
        """Write it back, in one transaction. Raises StaleState where anything changed since it was loaded, and
        PspObjectTaken. Returns whether notifications are parked that may fit now.
        """
        ...

    async def list_findings(self, filter: FindingFilter, after: Position | None, limit: int) -> list[Finding]: ...

    async def read_finding(self, finding_id: str) -> tuple[Finding, str] | None:
        """A finding, and the request that resolved it, if one did."""
        ...

    async def resolve_finding(self, finding_id: str, resolution: Resolution, now: datetime) -> bool:
        """Resolves it where it is open; the order's or payout's `attention` follows. Returns whether it was open.
        Raises RequestIdTaken.
        """
        ...

    async def open_finding_counts(self) -> dict[FindingKind, int]:
        """How many findings of each kind are open."""
        ...

    async def overdue_checkout_ids(self, now: datetime, limit: int) -> list[str]:
        """Open payments whose time is over, oldest first."""
        ...

    async def due_payout_references(self, now: datetime, limit: int) -> list[str]:
        """Scheduled payouts whose time has come, oldest first."""
        ...

    async def parked_notifications(
        self, now: datetime | None, psp_object_ids: Sequence[str], limit: int
    ) -> list[Notification]:
        """Parked notifications: those whose next attempt is due at `now`, or those of the given PSP objects."""
        ...


class NotificationVerifier(Protocol):
    """The executor's adapters for PSPs."""

    async def verify(self, psp: str, body: bytes, headers: Mapping[str, str], channel: int) -> list[Notification]:
        """Verify the signature and translate. Raises PermissionDenied, InvalidArgument, Unavailable."""
        ...


class Changes(Protocol):
    """Tells when a payment changed."""

    def watch(self, checkout_id: str) -> AsyncIterator[None]:
        """Yields at once, then after each change, several changes possibly as one. Never misses the last one."""
        ...


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def now_of(clock: Clock) -> datetime:
    """The clock's time with the precision that is stored: microseconds."""
    return _EPOCH + timedelta(microseconds=clock.now_ns() // 1000)
