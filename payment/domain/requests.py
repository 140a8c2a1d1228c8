"""What callers ask for: a payment and a payout, with every rule that a request can break, and the hash that tells a
repeat of a request from other content under the same key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from kernel.errors import FieldViolation
from kernel.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS, Money
from payment.domain.bank_account import BankAccount, check_bank_account
from payment.domain.facts import Change
from payment.domain.payment import Buyer, Payment
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from payment.domain.payout import Payout, PayoutState

__all__ = [
    "SCHEDULE_AHEAD_MAX",
    "OrderSpec",
    "PaymentRequest",
    "PayoutRequest",
    "Providers",
    "check_payment",
    "check_payout",
    "choose_provider",
    "new_payment",
    "new_payout",
    "payment_hash",
    "payout_hash",
    "used_order_violations",
]

SCHEDULE_AHEAD_MAX = timedelta(days=366)
"""How far ahead a payout may be scheduled."""

Providers = Mapping[str, frozenset[str]]
"""The configured PSPs, in the order of the settings, and the currencies that each takes; an empty set means all."""


@dataclass(frozen=True, slots=True)
class OrderSpec:
    """One order of a checkout, as asked for. The amount is in minor units."""

    payment_order_id: str
    seller_account: str
    currency_code: str
    amount_minor: int
    psp: str = ""


@dataclass(frozen=True, slots=True)
class PaymentRequest:
    """A payment event, as asked for."""

    checkout_id: str
    buyer: Buyer
    orders: tuple[OrderSpec, ...]


@dataclass(frozen=True, slots=True)
class PayoutRequest:
    """A payout, as asked for. The amount is in minor units."""

    reference: str
    seller_account: str
    currency_code: str
    amount_minor: int
    recipient: BankAccount
    purpose: str
    psp: str = ""
    schedule_time: datetime | None = None


def check_payment(request: PaymentRequest, providers: Providers, orders_max: int) -> list[FieldViolation]:
    """Everything that is wrong with it, not only the first."""
    wrong: list[FieldViolation] = []
    buyer = request.buyer
    _check_text(buyer.buyer_id, "buyer_info.buyer_id", wrong)
    _check_text(buyer.name, "buyer_info.name", wrong)
    _check_text(buyer.email, "buyer_info.email", wrong)
    if not request.orders:
        wrong.append(FieldViolation("payment_orders", "needs at least one order"))
    if len(request.orders) > orders_max:
        wrong.append(
            FieldViolation("payment_orders", f"at most {orders_max} orders in one checkout, got {len(request.orders)}")
        )
        return wrong
    first_index: dict[str, int] = {}
    for index, order in enumerate(request.orders):
        path = f"payment_orders[{index}]"
        first = first_index.setdefault(order.payment_order_id, index)
        if first != index:
            wrong.append(
                FieldViolation(
                    f"{path}.payment_order_id",
                    f"{order.payment_order_id!r} is also the id of payment_orders[{first}]; ids must differ",
                )
            )
        _check_amount(order.currency_code, order.amount_minor, f"{path}.amount", wrong)
        _check_provider(order.psp, order.currency_code, providers, f"{path}.psp", wrong)
    return wrong


def check_payout(
    request: PayoutRequest, providers: Providers, now: datetime
) -> tuple[PayoutRequest, list[FieldViolation]]:
    """The request with the recipient's numbers normalized, and everything that is wrong with it."""
    wrong: list[FieldViolation] = []
    _check_amount(request.currency_code, request.amount_minor, "amount", wrong)
    recipient, wrong_recipient = check_bank_account(request.recipient)
    wrong += wrong_recipient
    _check_text(request.purpose, "purpose", wrong)
    if not request.purpose.strip():
        wrong.append(FieldViolation("purpose", "must say why the payment is made"))
    _check_provider(request.psp, request.currency_code, providers, "psp", wrong)
    if request.schedule_time is not None and request.schedule_time > now + SCHEDULE_AHEAD_MAX:
        wrong.append(FieldViolation("schedule_time", f"at most {SCHEDULE_AHEAD_MAX.days} days ahead"))
    return replace(request, recipient=recipient), wrong


def used_order_violations(request: PaymentRequest, used: Iterable[str]) -> list[FieldViolation]:
    """The orders whose id belongs to another checkout."""
    taken = set(used)
    return [
        FieldViolation(
            f"payment_orders[{index}].payment_order_id",
            f"{order.payment_order_id!r} belongs to another checkout; order ids are unique over all checkouts",
        )
        for index, order in enumerate(request.orders)
        if order.payment_order_id in taken
    ]


def choose_provider(wanted: str, currency_code: str, providers: Providers) -> str:
    """The PSP of a payout: the wanted one, else the first that takes the currency; empty where none does.

    It must be known before the hold is placed, because the hold's credit account is the PSP's.
    """
    if wanted:
        return wanted
    return next((name for name, codes in providers.items() if not codes or currency_code in codes), "")


def new_payment(request: PaymentRequest, now: datetime, traceparent: str, page_key: str) -> Payment:
    """The payment that the request makes. `page_key` is random."""
    time_ms = int(now.timestamp() * 1000)
    orders = [
        PaymentOrder(
            payment_order_id=spec.payment_order_id,
            checkout_id=request.checkout_id,
            seller_account=spec.seller_account,
            currency_code=spec.currency_code,
            amount_minor=spec.amount_minor,
            state=PaymentOrderState.NOT_STARTED,
            create_time=now,
            update_time=now,
            psp=spec.psp,
            traceparent=traceparent,
            history=[Change(PaymentOrderState.NOT_STARTED, "created", time_ms)],
        )
        for spec in request.orders
    ]
    return Payment(request.checkout_id, request.buyer, orders, False, now, page_key)


def new_payout(request: PayoutRequest, psp: str, now: datetime, traceparent: str) -> Payout:
    """The payout that the request makes. A time that has passed means now."""
    later = request.schedule_time is not None and request.schedule_time > now
    state = PayoutState.SCHEDULED if later else PayoutState.HOLDING
    return Payout(
        reference=request.reference,
        seller_account=request.seller_account,
        currency_code=request.currency_code,
        amount_minor=request.amount_minor,
        recipient=request.recipient,
        purpose=request.purpose,
        psp=psp,
        state=state,
        create_time=now,
        update_time=now,
        schedule_time=request.schedule_time,
        traceparent=traceparent,
        history=[Change(state, "created", int(now.timestamp() * 1000))],
    )


def payment_hash(request: PaymentRequest) -> bytes:
    """32 bytes: SHA-256 of the request's content in one canonical form. The tag names the form; a new form
    gets a new tag.
    """
    buyer = request.buyer
    return _hash(
        "payment/1",
        [
            request.checkout_id,
            [buyer.buyer_id, buyer.name, buyer.email],
            [[o.payment_order_id, o.seller_account, o.currency_code, o.amount_minor, o.psp] for o in request.orders],
        ],
    )


def payout_hash(request: PayoutRequest) -> bytes:
    """32 bytes, as payment_hash; of the normalized request, so that ``20-00-00`` and ``200000`` are the same
    sort code.
    """
    to = request.recipient
    address = to.address
    return _hash(
        "payout/1",
        [
            request.reference,
            request.seller_account,
            request.currency_code,
            request.amount_minor,
            [to.account_holder_name, to.country_code, to.scheme, to.bank_code, to.account_number, to.bic, to.bank_name],
            [address.line1, address.line2, address.city, address.region, address.postal_code, address.country_code]
            if address
            else [],
            request.purpose,
            request.psp,
            request.schedule_time.isoformat() if request.schedule_time else "",
        ],
    )


def _hash(tag: str, content: list[object]) -> bytes:
    return hashlib.sha256(f"{tag}\n{json.dumps(content, separators=(',', ':'))}".encode()).digest()


def _check_text(text: str, path: str, wrong: list[FieldViolation]) -> None:
    if "\0" in text:
        wrong.append(FieldViolation(path, "must not hold the character NUL"))


def _check_amount(currency_code: str, amount_minor: int, path: str, wrong: list[FieldViolation]) -> None:
    if currency_code not in CURRENCY_EXPONENTS:
        wrong.append(
            FieldViolation(
                f"{path}.currency_code",
                f"unknown currency {currency_code!r}: use an ISO 4217 code in upper case, such as USD",
            )
        )
    if amount_minor <= 0:
        wrong.append(FieldViolation(f"{path}.amount_minor", f"must be more than zero, got {amount_minor}"))
    elif amount_minor > AMOUNT_MINOR_MAX:
        wrong.append(
            FieldViolation(
                f"{path}.amount_minor",
                f"must not be more than {Money(currency_code, AMOUNT_MINOR_MAX)}, got {amount_minor}",
            )
        )


def _check_provider(psp: str, currency_code: str, providers: Providers, path: str, wrong: list[FieldViolation]) -> None:
    if psp:
        codes = providers.get(psp)
        if codes is None:
            known = ", ".join(providers) or "none"
            wrong.append(
                FieldViolation(path, f"no provider {psp!r} is configured; there is {known}; empty lets routing choose")
            )
        elif codes and currency_code not in codes:
            wrong.append(FieldViolation(path, f"provider {psp!r} does not take {currency_code}"))
    elif currency_code in CURRENCY_EXPONENTS and not choose_provider("", currency_code, providers):
        wrong.append(FieldViolation(path, f"no configured provider takes {currency_code}"))
