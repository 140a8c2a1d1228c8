"""The pages that a buyer sees. They work without JavaScript (a refresh shows the new state); one small script does the
same quietly. Style and script stand in the page and are allowed by their hashes, nothing else is.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from ducat.payment.v1 import payment_pb2
from gateway.adapters.views import ORDER_STATES
from gateway.domain import decimal_text

__all__ = ["SECURITY_POLICY", "checkout_page", "index_page", "message_page", "return_page"]

REFRESH_S = 3
"""How often a page without JavaScript looks again."""

_HERE = Path(__file__).parent
_STYLE = (_HERE / "page.css").read_text()
_SCRIPT = (_HERE / "page.js").read_text()


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


SECURITY_POLICY = (
    f"default-src 'none'; style-src {_hash_of(_STYLE)}; script-src {_hash_of(_SCRIPT)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_SIGNS = {
    "good": '<path d="M5 12.5l4.5 4.5L19 7.5"/>',
    "bad": '<path d="M7 7l10 10M17 7L7 17"/>',
    "wait": '<g class="spin"><path d="M12 3a9 9 0 1 1-9 9"/></g>',
    "idle": '<path d="M12 7v6M12 17h.01"/>',
}


@dataclass(frozen=True, slots=True)
class _Shown:
    """How a state is shown: tone, label, and what it means for the buyer."""

    tone: str
    label: str
    meaning: str
    is_final: bool


_STATES: dict[str, _Shown] = {
    "NOT_STARTED": _Shown("idle", "Preparing", "The payment page is being prepared. This takes a moment.", False),
    "EXECUTING": _Shown("wait", "To pay", "", False),
    "SUCCESS": _Shown("good", "Paid", "", True),
    "FAILED": _Shown("bad", "Not paid", "The payment was refused.", True),
    "CANCELED": _Shown("idle", "Canceled", "This order was canceled. Nothing was charged.", True),
    "EXPIRED": _Shown("idle", "Expired", "This order was not paid in time. Nothing was charged.", True),
    "PARTIALLY_REFUNDED": _Shown("good", "Partly refunded", "A part of the money went back to you.", True),
    "REFUNDED": _Shown("idle", "Refunded", "The money went back to you.", True),
    "DISPUTED": _Shown("idle", "Disputed", "Your bank is looking into this payment.", True),
    "DISPUTE_LOST": _Shown("idle", "Charged back", "The money went back to you.", True),
}
_UNKNOWN = _Shown("idle", "Unknown", "", False)
_PAID = frozenset({"SUCCESS", "PARTIALLY_REFUNDED", "REFUNDED", "DISPUTED", "DISPUTE_LOST"})


def checkout_page(payment: payment_pb2.Payment) -> str:
    """The orders of a checkout: amounts, where to pay each, how each stands."""
    tone, headline, text = _summary(payment)
    orders = "".join(_order_item(place, order) for place, order in enumerate(payment.payment_orders))
    main = (
        f'<p class="eyebrow">Checkout {escape(payment.checkout_id)}</p><h1>Your payment</h1>'
        f"{_banner(tone, headline, text)}"
        f'<section class="card" aria-label="Orders"><ul class="orders" id="orders" data-part>{orders}</ul>'
        f'<div class="totals"><span>Total</span>{_totals(payment.payment_orders)}</div></section>'
        '<p class="foot">You pay on the payment provider\'s own page; your card details never reach this one. '
        "You can come back to this page at any time.</p>"
    )
    return _page(f"{headline} – checkout {payment.checkout_id}", main, is_live=not payment.is_payment_done)


def return_page(payment: payment_pb2.Payment | None, payment_order_id: str) -> str:
    """Where the payment provider sends the buyer back to. Shows the state as it is known here, and changes nothing."""
    if payment is None:
        return message_page(
            "Thank you",
            "wait",
            "Waiting for the payment provider",
            "We are told by the payment provider as soon as your payment is through. You may close this page.",
        )
    order = next((each for each in payment.payment_orders if each.payment_order_id == payment_order_id), None)
    tone, headline, text = _summary(payment) if order is None else _order_summary(order)
    is_live = (
        not payment.is_payment_done if order is None else not _shown(order).is_final
    )  # the webhook may come after the buyer
    link = urlsplit(payment.checkout_url).path
    left = sum(1 for each in payment.payment_orders if not _shown(each).is_final and each is not order)
    is_refused = order is not None and _shown(order).is_final and not _is_paid(order)
    title = "Payment not made" if is_refused else "Thank you"
    more = f"{left} more {'order' if left == 1 else 'orders'} to pay in this checkout." if left else ""
    main = (
        f'<p class="eyebrow">Checkout {escape(payment.checkout_id)}</p><h1 id="title" data-part>{title}</h1>'
        f"{_banner(tone, headline, text)}"
        f'<div id="next" data-part><p>{more}</p>'
        f'<p class="foot"><a class="button" id="back" href="{escape(link)}">'
        f"{'Pay the rest' if left else 'See your checkout'}</a></p>"
        "</div>"
    )
    return _page(f"{headline} – checkout {payment.checkout_id}", main, is_live=is_live)


def message_page(title: str, tone: str, headline: str, text: str, *, is_live: bool = False) -> str:
    """A page with one message."""
    return _page(title, f"<h1>{escape(title)}</h1>{_banner(tone, headline, text)}", is_live=is_live)


def index_page(links: Iterable[tuple[str, str, str]]) -> str:
    """A short page of links: (path, name, what it is)."""
    items = "".join(
        f'<li><a href="{escape(path)}">{escape(name)}</a><span>{escape(what)}</span></li>' for path, name, what in links
    )
    main = f'<p class="eyebrow">Ducat</p><h1>REST gateway</h1><ul class="card links">{items}</ul>'
    return _page("Ducat REST gateway", main, is_live=False)


# --- parts


def _page(title: str, main: str, *, is_live: bool) -> str:
    live = " data-live" if is_live else ""
    refresh = f'<noscript><meta http-equiv="refresh" content="{REFRESH_S}"></noscript>' if is_live else ""
    script = f"<script>{_SCRIPT}</script>" if is_live else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex, nofollow">'
        f"<title>{escape(title)}</title>{refresh}<style>{_STYLE}</style></head>"
        f"<body><main{live}>{main}</main>{script}</body></html>"
    )


def _banner(tone: str, headline: str, text: str) -> str:
    return (
        f'<div class="banner {tone}" id="banner" data-part role="status">'
        '<svg class="sign" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2.2" '
        f'stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">{_SIGNS[tone]}</svg>'
        f"<div><strong>{escape(headline)}</strong>{escape(text)}</div></div>"
    )


def _shown(order: payment_pb2.PaymentOrder) -> _Shown:
    return _STATES.get(ORDER_STATES.get(order.state, ""), _UNKNOWN)


def _is_paid(order: payment_pb2.PaymentOrder) -> bool:
    return ORDER_STATES.get(order.state) in _PAID


def _summary(payment: payment_pb2.Payment) -> tuple[str, str, str]:
    """Tone, headline and sentence for a whole checkout."""
    orders = payment.payment_orders
    paid = sum(1 for order in orders if _is_paid(order))
    open_count = sum(1 for order in orders if not _shown(order).is_final)
    if open_count:
        text = f"{paid} of {len(orders)} paid." if paid else "Pay each order below."
        return "wait", f"{open_count} {'order' if open_count == 1 else 'orders'} to pay", text
    if all(ORDER_STATES.get(order.state) == "SUCCESS" for order in orders):
        return "good", "Payment complete", "Everything is paid. You may close this page."
    if paid == len(orders):
        return "idle", "Payment closed", "Everything was paid; some of it has changed since, as you see below."
    if paid:
        return "bad", f"{paid} of {len(orders)} orders paid", "The others were not paid; nothing was charged for them."
    return "bad", "Not paid", "None of the orders was paid. Nothing was charged."


def _order_summary(order: payment_pb2.PaymentOrder) -> tuple[str, str, str]:
    """Tone, headline and sentence for the order that the buyer comes back from."""
    shown = _shown(order)
    what = f"{_amount(order)} for order {order.payment_order_id}"
    if not shown.is_final:
        return "wait", "Waiting for the payment provider", f"We have not been told yet that {what} is paid."
    if _is_paid(order):
        return shown.tone, shown.label, f"{what}. {shown.meaning}".strip()
    return shown.tone, shown.label, f"{what}: {_lower_first(order.failure_reason or shown.meaning)}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _order_item(place: int, order: payment_pb2.PaymentOrder) -> str:
    shown = _shown(order)
    what = order.failure_reason if shown.is_final and order.failure_reason else shown.meaning
    action = ""
    if not shown.is_final and _is_web_address(order.hosted_page_url):
        action = (
            f'<div class="do"><a class="button" id="pay-{place}" rel="noreferrer" '
            f'href="{escape(order.hosted_page_url)}">'
            f"Pay {escape(_amount(order))}</a></div>"
        )
    meaning = f'<p class="what">{escape(what)}</p>' if what else ""
    return (
        f'<li class="order"><h2>{escape(order.payment_order_id)}</h2>'
        f'<span class="amount">{escape(_amount(order))}</span>'
        f'<span class="seller">Sold by {escape(order.seller_account)}</span>'
        f'<span class="state"><span class="badge {shown.tone}">{escape(shown.label)}</span></span>'
        f"{meaning}{action}</li>"
    )


def _totals(orders: Sequence[payment_pb2.PaymentOrder]) -> str:
    totals: dict[str, int] = {}
    for order in orders:
        code = order.amount.currency_code
        totals[code] = totals.get(code, 0) + order.amount.amount_minor
    items = "".join(f'<li class="amount">{escape(_money(minor, code))}</li>' for code, minor in totals.items())
    return f"<ul>{items}</ul>"


def _amount(order: payment_pb2.PaymentOrder) -> str:
    return _money(order.amount.amount_minor, order.amount.currency_code)


def _money(amount_minor: int, currency_code: str) -> str:
    whole, point, decimals = decimal_text(amount_minor, currency_code).partition(".")
    return f"{int(whole):,}{point}{decimals} {currency_code}"


def _is_web_address(url: str) -> bool:
    """Never follow a PSP to `javascript:` or anywhere else that is not a web page."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)
