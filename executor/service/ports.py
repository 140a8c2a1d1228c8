"""What the executor's use cases need from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from executor.domain.attempt import Attempt, AttemptKind, AttemptState
from executor.domain.command import Command, ExecuteOrder, ExecuteRefund, PayoutInstruction
from executor.domain.health import Health
from executor.domain.outcome import Answer, Notification
from executor.domain.routing import Provider

__all__ = ["AttemptStore", "Channel", "Due", "Event", "PayoutInstructions", "PspAdapter", "Waiting"]

Waiting = tuple[AttemptKind, str, int]
"""Kind, reference and next poll time (unix nanoseconds) of an attempt that waits for its PSP to answer."""


class Channel(Enum):
    """Which of a PSP's webhooks was called."""

    PAYMENT = "payment"
    PAYOUT = "payout"


class PspAdapter(Protocol):
    """One PSP. Expected outcomes are values (`Answer`); an exception is a bug. Every call is bounded by the PSP's timeout.

    `register_order`, `refund` and `payout` send our own id as the PSP's idempotency key: the same call again gives the same object.
    """

    @property
    def provider(self) -> Provider:
        """Name, capabilities, currencies, weight."""
        ...

    async def register_order(self, order: ExecuteOrder) -> Answer: ...

    async def query_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        """What the PSP has; by its own id where that is known, else by ours."""
        ...

    async def cancel_order(self, payment_order_id: str, psp_object_id: str) -> Answer: ...

    async def refund(self, refund: ExecuteRefund) -> Answer: ...

    async def query_refund(self, refund_id: str, psp_object_id: str) -> Answer: ...

    async def payout(self, payout: PayoutInstruction) -> Answer: ...

    async def query_payout(self, reference: str, psp_object_id: str) -> Answer: ...

    def verify(self, headers: Mapping[str, str], body: bytes, channel: Channel, now_s: int) -> None:
        """Raises PermissionDenied (SIGNATURE_INVALID) unless the PSP itself signed exactly these bytes, and lately. Header names are
        in lower case."""
        ...

    def translate(self, body: bytes, channel: Channel) -> Sequence[Notification]:
        """What a verified body says; InvalidArgument where it is not what the PSP sends."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Event:
    """What the executor tells: the names of `kind` and `fields` are those of ducat.event.v1.Envelope's body."""

    kind: str
    key: str
    event_id: str
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Due:
    """An attempt whose time has come; `command` is what to send again."""

    attempt: Attempt
    command: Command


class AttemptStore(Protocol):
    """Where attempts and PSP health are kept. Each method is one transaction."""

    async def begin(self, command: Command, psp: str, now_ns: int, next_poll_time_ns: int, traceparent: str) -> Attempt:
        """Stores the attempt as SENDING, or counts one more call of the one that is there, and returns what is stored."""
        ...

    async def finish(
        self,
        attempt: Attempt,
        expected: AttemptState,
        events: Sequence[Event],
        traceparent: str,
    ) -> bool:
        """Stores `attempt` with its events, provided that the stored state is still `expected` and the PSP the same; False where not."""
        ...

    async def reroute(self, attempt: Attempt, psp: str, now_ns: int) -> bool:
        """Gives a SENDING attempt, which its PSP certainly did not take, to another PSP; False where it has moved on meanwhile."""
        ...

    async def load(self, kind: AttemptKind, reference: str) -> Due | None: ...

    async def claim_due(self, now_ns: int, lease_until_ns: int, count_max: int) -> tuple[list[Due], int]:
        """Takes attempts whose time has come, skipping those that another executor holds, and moves their time to the lease's end.
        Also the unix nanoseconds at which the next one is due, 0 where there is none."""
        ...

    async def hasten(self, waiting: Sequence[Waiting], now_ns: int) -> None:
        """Makes attempts due now, those whose next poll time (unix nanoseconds) is still the given one: nobody has them in hand."""
        ...

    async def settle(self, references: Sequence[tuple[AttemptKind, str]], now_ns: int) -> None:
        """No webhook is missing for these any more: do not ask the PSP about them, but a payout once more after a day.

        The webhook was verified here, not yet stored by the payment service, and PSPs do not all send again. An order that lost its
        webhook so is asked for when it expires; a payout never expires.
        """
        ...

    async def request_cancel(self, payment_order_id: str, now_ns: int) -> Due | None:
        """Marks an order to be canceled, to be done now or when the PSP is next asked about it; None where no attempt exists."""
        ...

    async def load_health(self) -> dict[str, Health]: ...

    async def save_health(self, psp: str, health: Health, now_ns: int) -> None: ...


class PayoutInstructions(Protocol):
    """Where a payout's unmasked bank details are read."""

    async def read(self, reference: str) -> PayoutInstruction:
        """Raises NotFound where the payment service does not know the payout, Unavailable where it does not answer."""
        ...
