"""A payment: one checkout of one buyer, and its orders."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from payment.domain.finding import Finding
from payment.domain.payment_order import PaymentOrder
from payment.domain.refund import Refund

__all__ = ["PAGE_KEY_BYTES", "Buyer", "Payment"]

PAGE_KEY_BYTES = 16
"""128 bits: nobody guesses one."""


@dataclass(frozen=True, slots=True)
class Buyer:
    """Who buys."""

    buyer_id: str
    name: str = ""
    email: str = ""


@dataclass(slots=True)
class Payment:
    """A checkout. It is done when every order is final; SUCCESS counts as final here, though refunds may follow."""

    checkout_id: str
    buyer: Buyer
    orders: list[PaymentOrder]
    is_done: bool
    create_time: datetime
    page_key: str = ""
    """The unguessable part of the address of the buyer's page: PAGE_KEY_BYTES of randomness in hexadecimal digits."""
    findings: list[Finding] = field(default_factory=list)
    refunds: list[Refund] = field(default_factory=list)

    @property
    def update_time(self) -> datetime:
        """When it, or one of its orders, last changed."""
        return max((order.update_time for order in self.orders), default=self.create_time)
