"""Payment events for end-to-end tests."""

from __future__ import annotations

import json
import uuid
from typing import Any

__all__ = ["checkout", "order"]

AMOUNTS = {"USD": "75.00", "EUR": "12.34", "JPY": "1500", "KWD": "3.125"}


def order(order_id: str, currency: str = "USD", **changes: Any) -> dict[str, Any]:
    return {
        "seller_account": "SELL-XYZ-1",
        "amount": AMOUNTS[currency],
        "currency": currency,
        "payment_order_id": order_id,
    } | changes


def checkout(count: int = 2, *, currencies: tuple[str, ...] = ("USD",), sellers: int = 2, **changes: Any) -> bytes:
    """A payment event of ``count`` orders; currencies and sellers take turns."""
    checkout_id = f"E2E-{uuid.uuid4()}"
    event = {
        "checkout_id": checkout_id,
        "buyer_info": {"buyer_id": "BUYER-1", "name": "Jane Doe", "email": "jane.doe@example.com"},
        "payment_orders": [
            order(
                f"{checkout_id}-{number}",
                currencies[number % len(currencies)],
                seller_account=f"SELL-{number % sellers}",
            )
            for number in range(count)
        ],
    } | changes
    return json.dumps(event).encode()
