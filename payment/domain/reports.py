"""What the executor and the wallet report over the bus."""

from __future__ import annotations

from dataclasses import dataclass

from payment.domain.notification import Notification

__all__ = [
    "FundsHeld",
    "FundsRefused",
    "OrderRegistered",
    "OrderRejected",
    "OutcomeFound",
    "PayoutRejected",
    "PayoutSubmitted",
    "RefundFundsHeld",
    "RefundFundsRefused",
    "Report",
]


@dataclass(frozen=True, slots=True)
class OrderRegistered:
    """The PSP has the order."""

    payment_order_id: str
    psp: str
    psp_token: str
    hosted_page_url: str


@dataclass(frozen=True, slots=True)
class OrderRejected:
    """No PSP takes the order; final."""

    payment_order_id: str
    psp: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class PayoutSubmitted:
    """The PSP has the payout."""

    reference: str
    psp: str
    psp_payout_id: str


@dataclass(frozen=True, slots=True)
class PayoutRejected:
    """The PSP refuses the payout; final. `compliance`: AML, fraud or sanctions."""

    reference: str
    psp: str
    code: str
    reason: str
    compliance: bool


@dataclass(frozen=True, slots=True)
class OutcomeFound:
    """What a PSP says of something whose outcome was unknown."""

    notification: Notification


@dataclass(frozen=True, slots=True)
class FundsHeld:
    """The wallet holds a payout's money; `hold_id` is the transfer that does."""

    reference: str
    hold_id: bytes


@dataclass(frozen=True, slots=True)
class FundsRefused:
    """The wallet does not cover a payout; `result` is the wallet's TransferResult."""

    reference: str
    result: str


@dataclass(frozen=True, slots=True)
class RefundFundsHeld:
    """The wallet holds a refund's money. `reference` names the hold that was asked for."""

    reference: str
    hold_id: bytes

    @property
    def refund_id(self) -> str:
        """A hold is named by its refund, from the second on with its number."""
        return self.reference.partition("/")[0]


@dataclass(frozen=True, slots=True)
class RefundFundsRefused:
    """The wallet does not cover a refund; `available_minor` is what it had left."""

    reference: str
    result: str
    available_minor: int

    @property
    def refund_id(self) -> str:
        """A hold is named by its refund, from the second on with its number."""
        return self.reference.partition("/")[0]


Report = (
    OrderRegistered
    | OrderRejected
    | PayoutSubmitted
    | PayoutRejected
    | OutcomeFound
    | FundsHeld
    | FundsRefused
    | RefundFundsHeld
    | RefundFundsRefused
)
