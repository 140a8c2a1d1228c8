"""What a change of state tells the rest of the system, as values: the adapters turn each into one message of
the outbox.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Change", "Fact", "FactKind"]


class FactKind(Enum):
    """Commands to the executor and events for the wallet and the ledger. The value is the field of the bus envelope."""

    CANCEL_ORDER = "cancel_order"
    EXECUTE_PAYOUT = "execute_payout"
    ORDER_SUCCEEDED = "payment_order_succeeded"
    ORDER_CLOSED = "payment_order_closed"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_CLOSED = "dispute_closed"
    REFUND_REQUESTED = "refund_requested"
    REFUND_COMPLETED = "refund_completed"
    REFUND_CLAIMED = "refund_claimed"
    REFUND_REVERSED = "refund_reversed"
    PAYOUT_REQUESTED = "payout_requested"
    PAYOUT_COMPLETED = "payout_completed"
    PAYOUT_RELEASED = "payout_released"
    PAYOUT_RETURNED = "payout_returned"


@dataclass(frozen=True, slots=True)
class Fact:
    """One message to be sent. What it is about (order, payout or refund) travels beside it; here is only what may
    change afterwards.
    """

    kind: FactKind
    state: str = ""
    reason: str = ""
    psp: str = ""
    psp_object_id: str = ""
    hold_id: bytes = b""
    won: bool = False
    revision: int = 0
    amount_minor: int = 0
    reference: str = ""
    succeeded: bool = False
    claimed: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a history: the state after the change, what caused it, when (unix milliseconds)."""

    state: int
    cause: str
    time_ms: int
