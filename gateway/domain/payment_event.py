"""The payment event of docs/rest.md: JSON → PaymentEvent, or everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.domain.document import kind_of, read_document
from gateway.domain.fields import ID_PATTERN, VIOLATIONS_MAX, Fields, TextRule
from kernel.errors import FieldViolation

__all__ = ["ORDERS_MAX", "TEXT_RULES", "BuyerInfo", "PaymentEvent", "PaymentOrderSpec", "parse_payment_event"]

ORDERS_MAX = 100
"""Most orders in one checkout, as the contract has it; the setting orders_per_payment_max may lower it."""

_ID = TextRule(128, is_required=True, pattern=ID_PATTERN, expected="letters, digits and . _ : - only")

TEXT_RULES: dict[str, TextRule] = {
    "checkout_id": _ID,
    "buyer_info.buyer_id": TextRule(128, is_required=True),
    "buyer_info.name": TextRule(200),
    "buyer_info.email": TextRule(254),
    "payment_orders.payment_order_id": _ID,
    "payment_orders.seller_account": _ID,
    "payment_orders.psp": TextRule(64),
}
"""The rules of the text fields, by their path in the .proto."""

_EVENT_FIELDS = ("checkout_id", "buyer_info", "payment_orders")
_BUYER_FIELDS = ("buyer_id", "name", "email")
_ORDER_FIELDS = ("payment_order_id", "seller_account", "amount", "currency", "psp")


@dataclass(frozen=True, slots=True)
class BuyerInfo:
    """Who buys."""

    buyer_id: str
    name: str
    email: str


@dataclass(frozen=True, slots=True)
class PaymentOrderSpec:
    """One order; ``psp`` is empty where routing may choose."""

    payment_order_id: str
    seller_account: str
    currency_code: str
    amount_minor: int
    psp: str


@dataclass(frozen=True, slots=True)
class PaymentEvent:
    """A checkout, as asked for."""

    checkout_id: str
    buyer_info: BuyerInfo
    payment_orders: tuple[PaymentOrderSpec, ...]


def parse_payment_event(body: bytes, *, orders_max: int = ORDERS_MAX) -> PaymentEvent | list[FieldViolation]:
    """The payment event in ``body``, or every violation with its JSON path, such as ``payment_orders[1].amount``."""
    document = read_document(body)
    if isinstance(document, list):
        return document
    violations: list[FieldViolation] = []
    fields = Fields(document, "", _EVENT_FIELDS, violations)
    if not isinstance(document, dict):
        return violations
    checkout_id = fields.text("checkout_id", _ID)
    buyer_info = _buyer(fields)
    orders = _orders(fields, min(orders_max, ORDERS_MAX))
    if violations:
        return violations[:VIOLATIONS_MAX]
    return PaymentEvent(checkout_id, buyer_info, orders)


def _buyer(event: Fields) -> BuyerInfo:
    if "buyer_info" not in event.value:
        event.refuse("buyer_info", "is required")
        return BuyerInfo("", "", "")
    fields = Fields(event.value["buyer_info"], "buyer_info", _BUYER_FIELDS, event.violations)
    if not isinstance(event.value["buyer_info"], dict):
        return BuyerInfo("", "", "")
    return BuyerInfo(
        fields.text("buyer_id", TEXT_RULES["buyer_info.buyer_id"]),
        fields.text("name", TEXT_RULES["buyer_info.name"]),
        fields.text("email", TEXT_RULES["buyer_info.email"]),
    )


def _orders(event: Fields, orders_max: int) -> tuple[PaymentOrderSpec, ...]:
    value = event.value.get("payment_orders")
    if not isinstance(value, list):
        missing = "payment_orders" not in event.value
        event.refuse("payment_orders", "is required" if missing else f"expected a list, got {kind_of(value)}")
    elif not value:
        event.refuse("payment_orders", "needs at least one order")
    elif len(value) > orders_max:
        event.refuse("payment_orders", f"may have at most {orders_max} orders, has {len(value)}")
    else:
        orders = tuple(_order(item, f"payment_orders[{place}]", event.violations) for place, item in enumerate(value))
        _check_ids_differ(orders, event.violations)
        return orders
    return ()


def _order(value: object, path: str, violations: list[FieldViolation]) -> PaymentOrderSpec:
    fields = Fields(value, path, _ORDER_FIELDS, violations)
    if not isinstance(value, dict):
        return PaymentOrderSpec("", "", "", 0, "")
    order_id = fields.text("payment_order_id", _ID)
    seller_account = fields.text("seller_account", _ID)
    amount_minor, currency_code = fields.money("amount", "currency")
    psp = fields.text("psp", TEXT_RULES["payment_orders.psp"]) if "psp" in value else ""
    return PaymentOrderSpec(order_id, seller_account, currency_code, amount_minor, psp)


def _check_ids_differ(orders: tuple[PaymentOrderSpec, ...], violations: list[FieldViolation]) -> None:
    first_place: dict[str, int] = {}
    for place, order in enumerate(orders):
        first = first_place.setdefault(order.payment_order_id, place) if order.payment_order_id else place
        if first != place:
            path = f"payment_orders[{place}].payment_order_id"
            violations.append(FieldViolation(path, f"is the same as that of payment_orders[{first}]"))
