"""Between our words and the sandbox's JSON. Pure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from executor.domain.command import ExecuteOrder, ExecuteRefund, PayoutInstruction
from executor.domain.outcome import (
    Accepted,
    Answer,
    NoAnswer,
    NotFound,
    Notification,
    NotificationKind,
    answer_from_http_error,
)
from executor.psp.base import Capabilities, HttpAnswer, PspConfig, encode_json
from kernel.errors import InvalidArgument
from kernel.money import AMOUNT_MINOR_MAX, Money

__all__ = ["answer", "intent_body", "notifications", "payout_body", "query_answer", "refund_body"]

STATUS_KINDS: dict[tuple[str, str], NotificationKind] = {
    ("payment_intent", "requires_payment"): NotificationKind.ORDER_PENDING,
    ("payment_intent", "processing"): NotificationKind.ORDER_PENDING,
    ("payment_intent", "succeeded"): NotificationKind.ORDER_SUCCEEDED,
    ("payment_intent", "failed"): NotificationKind.ORDER_FAILED,
    ("payment_intent", "canceled"): NotificationKind.ORDER_CANCELED,
    ("refund", "pending"): NotificationKind.UNSPECIFIED,
    ("refund", "succeeded"): NotificationKind.REFUND_SUCCEEDED,
    ("refund", "failed"): NotificationKind.REFUND_FAILED,
    ("payout", "pending"): NotificationKind.UNSPECIFIED,
    ("payout", "processing"): NotificationKind.PAYOUT_PROCESSING,
    ("payout", "completed"): NotificationKind.PAYOUT_COMPLETED,
    ("payout", "failed"): NotificationKind.PAYOUT_FAILED,
    ("payout", "rejected"): NotificationKind.PAYOUT_REJECTED,
    ("payout", "returned"): NotificationKind.PAYOUT_RETURNED,
}
"""By (object, status). What is not listed is still under way."""

EVENT_KINDS: dict[str, NotificationKind] = {
    "payment_intent.processing": NotificationKind.ORDER_PENDING,
    "payment_intent.succeeded": NotificationKind.ORDER_SUCCEEDED,
    "payment_intent.payment_failed": NotificationKind.ORDER_FAILED,
    "payment_intent.canceled": NotificationKind.ORDER_CANCELED,
    "refund.succeeded": NotificationKind.REFUND_SUCCEEDED,
    "refund.failed": NotificationKind.REFUND_FAILED,
    "payout.processing": NotificationKind.PAYOUT_PROCESSING,
    "payout.completed": NotificationKind.PAYOUT_COMPLETED,
    "payout.failed": NotificationKind.PAYOUT_FAILED,
    "payout.rejected": NotificationKind.PAYOUT_REJECTED,
    "payout.returned": NotificationKind.PAYOUT_RETURNED,
}
"""By event type. What is not listed is kept and changes nothing."""

ID_LENGTH_MAX = 255
_CODE_SHOWN_MAX = 8
_BANK_FIELDS = {
    "ifsc": "ifsc",
    "aba_routing_number": "routing_number",
    "sort_code": "sort_code",
    "bsb": "bsb",
    "iban": "iban",
}


def intent_body(order: ExecuteOrder, config: PspConfig, capabilities: Capabilities) -> bytes:
    """The payment intent, as docs/sandbox.md shows it."""
    body: dict[str, Any] = {
        "amount": capabilities.amount_to_psp(order.amount),
        "currency": order.amount.currency_code.lower(),
        "payment_method_types": ["card"],
        "description": f"Payment for order {order.payment_order_id}",
        "metadata": {
            "payment_order_id": order.payment_order_id,
            "checkout_id": order.checkout_id,
            "seller_id": order.seller_account,
        },
        "return_url": f"{config.return_url}?{_page_of(order)}",
        "statement_descriptor": config.statement_descriptor,
    }
    if order.buyer_email:
        body["receipt_email"] = order.buyer_email
    return encode_json(body).encode()


def refund_body(refund: ExecuteRefund, capabilities: Capabilities) -> bytes:
    return encode_json(
        {
            "payment_intent": refund.psp_token,
            "amount": capabilities.amount_to_psp(refund.amount),
            "metadata": {"refund_id": refund.refund_id, "payment_order_id": refund.payment_order_id},
        }
    ).encode()


def payout_body(payout: PayoutInstruction, config: PspConfig, capabilities: Capabilities) -> bytes:
    """The payout call, as docs/sandbox.md shows it; `amount.value` in minor units."""
    recipient = payout.recipient
    details: dict[str, Any] = {
        "type": "bank_account",
        "account_holder_name": recipient.account_holder_name,
        "country": recipient.country_code,
    }
    if recipient.account_number:
        details["account_number"] = recipient.account_number
    if recipient.bank_name:
        details["bank_name"] = recipient.bank_name
    if recipient.identifier_kind:
        details[_BANK_FIELDS[recipient.identifier_kind]] = recipient.identifier
    if recipient.bic:
        details["bic"] = recipient.bic
    if recipient.address:
        details["address"] = dict(recipient.address)
    return encode_json(
        {
            "amount": {"value": capabilities.amount_to_psp(payout.amount), "currency": payout.amount.currency_code},
            "recipient_details": details,
            "purpose": payout.purpose,
            "your_reference_id": payout.reference,
            "callback_url": config.payout_callback_url,
        }
    ).encode()


def answer(response: HttpAnswer, capabilities: Capabilities) -> Answer:
    """What the PSP's answer to a call that acts means."""
    body = response.json()
    if response.status in (200, 201):
        psp_object_id = body.get("id")
        if not isinstance(psp_object_id, str) or not psp_object_id:
            return NoAnswer("the PSP's answer names no object")
        return _accepted(psp_object_id, body, capabilities)
    error = body.get("error")
    error = error if isinstance(error, dict) else {}
    return answer_from_http_error(
        response.status,
        error_type=_text(error, "type"),
        code=_text(error, "code"),
        reason=_text(error, "message"),
        retry_after_s=response.retry_after_s,
    )


def query_answer(response: HttpAnswer, capabilities: Capabilities) -> Answer:
    """What the PSP's answer to a question means. Nothing that a question meets can reject what was asked about."""
    if response.status == 404:
        return NotFound()
    body = response.json()
    listed = body.get("data")
    if response.status == 200 and isinstance(listed, list):
        if not listed:
            return NotFound()
        first = listed[0] if isinstance(listed[0], dict) else {}
        psp_object_id = first.get("id")
        if isinstance(psp_object_id, str) and psp_object_id:
            return _accepted(psp_object_id, first, capabilities)
        return NoAnswer("the PSP's answer names no object")
    if response.status == 200 and isinstance(body.get("id"), str):
        return _accepted(body["id"], body, capabilities)
    return NoAnswer(f"the PSP answered HTTP {response.status} to a question")


def notifications(body: bytes, capabilities: Capabilities) -> tuple[Notification, ...]:
    """The one notification of a webhook call."""
    try:
        event = json.loads(body)
        event_id, event_type, thing = event["id"], event["type"], event["data"]["object"]
        object_id = thing["id"]
        created = event.get("created", 0)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidArgument(f"not a webhook of the sandbox: {type(error).__name__}: {error}") from error
    texts = (event_id, event_type, object_id)
    if not all(isinstance(text, str) and 0 < len(text) <= ID_LENGTH_MAX for text in texts) or not _is_time(created):
        raise InvalidArgument(
            f"not a webhook of the sandbox: id, type and data.object.id must be text of at most {ID_LENGTH_MAX} characters, "
            "created a unix time"
        )
    event_id, event_type, object_id = map(_whole, texts)
    return (
        Notification(
            psp_event_id=event_id,
            kind=EVENT_KINDS.get(event_type, NotificationKind.UNSPECIFIED),
            psp_object_id=object_id,
            merchant_reference=_merchant_reference(thing),
            psp_type=event_type,
            amount=_amount(thing, capabilities),
            code=_text(thing, "failure_code"),
            reason=_text(thing, "failure_message"),
            occur_time_ns=created * 1_000_000_000,
            psp_payment_id=_text(thing, "payment_intent")[:ID_LENGTH_MAX],
        ),
    )


def _accepted(psp_object_id: str, thing: Mapping[str, Any], capabilities: Capabilities) -> Accepted | NoAnswer:
    if len(psp_object_id) > ID_LENGTH_MAX:
        return NoAnswer(f"the PSP's id of the object has more than {ID_LENGTH_MAX} characters")
    kind = STATUS_KINDS.get((_text(thing, "object"), _text(thing, "status")), NotificationKind.UNSPECIFIED)
    return Accepted(
        _whole(psp_object_id),
        hosted_page_url=_text(thing, "hosted_page_url"),
        kind=kind,
        amount=_amount(thing, capabilities) if kind.is_final else None,
        code=_text(thing, "failure_code"),
        reason=_text(thing, "failure_message"),
    )


def _page_of(order: ExecuteOrder) -> str:
    """Which page the buyer comes back to. A command of the time before pages had keys is sent again as it was sent then."""
    if order.page_key:
        return f"key={quote(order.page_key, safe='')}"
    return f"checkout_id={quote(order.checkout_id, safe='')}"


def _merchant_reference(thing: Mapping[str, Any]) -> str:
    reference = _text(thing, "your_reference_id")
    metadata = thing.get("metadata")
    if reference or not isinstance(metadata, dict):
        return reference
    return _text(metadata, "refund_id" if thing.get("object") == "refund" else "payment_order_id")


def _amount(thing: Mapping[str, Any], capabilities: Capabilities) -> Money | None:
    """None only where the PSP tells no amount. One that cannot be read is told as zero: it contradicts every order, and so a person
    sees it, where no amount at all would pass.
    """
    amount, currency = thing.get("amount"), thing.get("currency")
    if isinstance(amount, dict):  # a payout's
        money: dict[str, Any] = amount
        amount, currency = money.get("value"), money.get("currency")
    if amount is None and currency is None:
        return None
    code = _whole(currency)[:_CODE_SHOWN_MAX] if isinstance(currency, str) else ""
    if isinstance(amount, int) and not isinstance(amount, bool) and abs(amount) <= AMOUNT_MINOR_MAX:
        with contextlib.suppress(ValueError):
            return capabilities.amount_from_psp(code, amount)
    return Money(code or "?", 0)


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return _whole(value) if isinstance(value, str) else ""


def _whole(text: str) -> str:
    """The text without what JSON can spell and nobody can pass on or store: halves of surrogate pairs (UTF-8) and NUL (PostgreSQL)."""
    whole = text if text.isascii() else text.encode(errors="replace").decode()
    return whole.replace("\0", "\ufffd") if "\0" in whole else whole


def _is_time(created: object) -> bool:
    """Unix seconds of the years 1970 to 9999."""
    return isinstance(created, int) and not isinstance(created, bool) and 0 <= created <= 253_402_300_799
