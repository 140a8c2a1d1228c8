"""A payment: one checkout of one buyer, and its orders."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from payment.domain.payment_order import PaymentOrder

__all__ = ["Buyer", "Payment"]


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

    @property
    def update_time(self) -> datetime:
        """When it, or one of its orders, last changed."""
        return max((order.update_time for order in self.orders), default=self.create_time)
