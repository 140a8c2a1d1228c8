"""What the executor is told to do. The field names are those of ducat.event.v1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kernel.money import Money

__all__ = ["CancelOrder", "Command", "ExecuteOrder", "ExecutePayout", "ExecuteRefund", "PayoutInstruction", "Recipient"]


@dataclass(frozen=True, slots=True)
class ExecuteOrder:
    """Register one order. `psp` empty: routing chooses."""

    payment_order_id: str
    checkout_id: str
    seller_account: str
    amount: Money
    psp: str = ""
    buyer_email: str = ""
    page_key: str = ""
    """The unguessable part of the buyer's page, for the return URL; empty of older commands."""


@dataclass(frozen=True, slots=True)
class ExecuteRefund:
    """Send one refund to the PSP that has the payment."""

    refund_id: str
    payment_order_id: str
    psp: str
    psp_token: str
    amount: Money


@dataclass(frozen=True, slots=True)
class ExecutePayout:
    """Send one payout; its bank details are read from the payment service when it is sent, and never stored here."""

    reference: str


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """Cancel one order that is not paid yet."""

    payment_order_id: str
    psp: str = ""
    psp_token: str = ""


Command = ExecuteOrder | ExecuteRefund | ExecutePayout


@dataclass(frozen=True, slots=True)
class Recipient:
    """A bank account, unmasked. Its repr shows nothing that must not reach a log."""

    account_holder_name: str = field(repr=False)
    country_code: str
    account_number: str = field(default="", repr=False)
    bank_name: str = field(default="", repr=False)
    identifier_kind: str = ""
    """`ifsc`, `aba_routing_number`, `sort_code`, `bsb` or `iban`."""
    identifier: str = field(default="", repr=False)
    bic: str = field(default="", repr=False)
    address: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    """`line1`, `line2`, `city`, `region`, `postal_code`, `country_code`; only those that are set."""


@dataclass(frozen=True, slots=True)
class PayoutInstruction:
    """All that a PSP needs to pay somebody."""

    reference: str
    amount: Money
    recipient: Recipient
    purpose: str
    psp: str = ""
    sendable: bool = True
    """False where the payout was canceled or ended before it was sent."""
