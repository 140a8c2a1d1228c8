"""Protobuf messages of the payment service → the JSON of the REST API."""

from __future__ import annotations

import json
from typing import Any

from ducat.payment.v1 import finding_pb2, payment_pb2, payout_pb2
from gateway.domain import decimal_text
from gateway.domain.payout_request import ADDRESS_FIELDS, BANK_IDENTIFIERS

__all__ = [
    "FINDING_KINDS",
    "FINDING_SUBJECTS",
    "ORDER_STATES",
    "PAYOUT_STATES",
    "REFUND_STATES",
    "encode",
    "finding_view",
    "payment_view",
    "payout_view",
]

ORDER_STATES: dict[int, str] = {
    number: name.removeprefix("PAYMENT_ORDER_STATE_") for name, number in payment_pb2.PaymentOrderState.items()
}
PAYOUT_STATES: dict[int, str] = {
    number: name.removeprefix("PAYOUT_STATE_") for name, number in payout_pb2.PayoutState.items()
}
REFUND_STATES: dict[int, str] = {
    number: name.removeprefix("REFUND_STATE_") for name, number in payment_pb2.RefundState.items()
}
FINDING_KINDS: dict[int, str] = {
    number: name.removeprefix("FINDING_KIND_") for name, number in finding_pb2.FindingKind.items()
}
FINDING_SUBJECTS: dict[int, str] = {
    number: name.removeprefix("FINDING_SUBJECT_") for name, number in finding_pb2.FindingSubject.items()
}
"""Numbers of the .proto → names without prefix. A number that is newer than this program is UNSPECIFIED."""

_encode = json.JSONEncoder(separators=(",", ":")).encode
_JSON_FIELD = {proto_field: json_field for json_field, (proto_field, _) in BANK_IDENTIFIERS.items()}


def encode(value: Any) -> bytes:
    """Compact JSON, ASCII only."""
    return _encode(value).encode()


def payment_view(payment: payment_pb2.Payment) -> dict[str, Any]:
    """The JSON of a payment."""
    buyer = payment.buyer_info
    return {
        "checkout_id": payment.checkout_id,
        "is_payment_done": payment.is_payment_done,
        "checkout_url": payment.checkout_url,
        "buyer_info": {"buyer_id": buyer.buyer_id, "name": buyer.name, "email": buyer.email},
        "payment_orders": [_order_view(order) for order in payment.payment_orders],
        "findings": [finding_view(finding) for finding in payment.findings],
        "create_time": payment.create_time.ToJsonString(),
        "update_time": payment.update_time.ToJsonString(),
    }


def _order_view(order: payment_pb2.PaymentOrder) -> dict[str, Any]:
    amount = order.amount
    return {
        "payment_order_id": order.payment_order_id,
        "seller_account": order.seller_account,
        "amount": decimal_text(amount.amount_minor, amount.currency_code),
        "amount_minor": amount.amount_minor,
        "currency": amount.currency_code,
        "state": ORDER_STATES.get(order.state, "UNSPECIFIED"),
        "psp": order.psp,
        "psp_token": order.psp_token,
        "hosted_page_url": order.hosted_page_url,
        "failure_reason": order.failure_reason,
        "refunded": decimal_text(order.refunded.amount_minor, amount.currency_code),
        "refunded_minor": order.refunded.amount_minor,
        "refunds": [_refund_view(refund) for refund in order.refunds],
        "attention": order.attention,
    }


def _refund_view(refund: payment_pb2.Refund) -> dict[str, Any]:
    amount = refund.amount
    return {
        "refund_id": refund.refund_id,
        "amount": decimal_text(amount.amount_minor, amount.currency_code),
        "amount_minor": amount.amount_minor,
        "claimed_minor": refund.claimed.amount_minor,
        "state": REFUND_STATES.get(refund.state, "UNSPECIFIED"),
        "psp": refund.psp,
        "psp_refund_id": refund.psp_refund_id,
        "made_at_psp": refund.made_at_psp,
        "reason": refund.reason,
        "failure_reason": refund.failure_reason,
        "create_time": refund.create_time.ToJsonString(),
        "update_time": refund.update_time.ToJsonString(),
    }


def finding_view(finding: finding_pb2.Finding) -> dict[str, Any]:
    """The JSON of a finding."""
    return {
        "finding_id": finding.finding_id,
        "kind": FINDING_KINDS.get(finding.kind, "UNSPECIFIED"),
        "subject": FINDING_SUBJECTS.get(finding.subject, "UNSPECIFIED"),
        "reference": finding.reference,
        "checkout_id": finding.checkout_id,
        "seller_account": finding.seller_account,
        "psp": finding.psp,
        "psp_event_id": finding.psp_event_id,
        "text": finding.text,
        "ours": dict(finding.ours),
        "theirs": dict(finding.theirs),
        "create_time": finding.create_time.ToJsonString(),
        "resolve_time": finding.resolve_time.ToJsonString() if finding.HasField("resolve_time") else None,
        "resolved_by": finding.resolved_by,
        "reason": finding.reason,
    }


def payout_view(payout: payout_pb2.Payout) -> dict[str, Any]:
    """The JSON of a payout; the payment service has masked the account number and the IBAN."""
    amount = payout.amount
    return {
        "your_reference_id": payout.reference,
        "seller_account": payout.seller_account,
        "amount": {"value": decimal_text(amount.amount_minor, amount.currency_code), "currency": amount.currency_code},
        "amount_minor": amount.amount_minor,
        "recipient_details": _recipient_view(payout.recipient),
        "purpose": payout.purpose,
        "state": PAYOUT_STATES.get(payout.state, "UNSPECIFIED"),
        "psp": payout.psp,
        "psp_payout_id": payout.psp_payout_id,
        "failure_reason": payout.failure_reason,
        "findings": [finding_view(finding) for finding in payout.findings],
        "attention": payout.attention,
        "create_time": payout.create_time.ToJsonString(),
        "update_time": payout.update_time.ToJsonString(),
    }


def _recipient_view(recipient: payout_pb2.BankAccount) -> dict[str, Any]:
    view: dict[str, Any] = {
        "type": "bank_account",
        "account_holder_name": recipient.account_holder_name,
        "account_number": recipient.account_number,
        "bank_name": recipient.bank_name,
        "country_code": recipient.country_code,
    }
    identifier = recipient.WhichOneof("bank_identifier")
    if identifier is not None:
        view[_JSON_FIELD[identifier]] = getattr(recipient, identifier)
    view["bic"] = recipient.bic
    if recipient.HasField("address"):
        view["address"] = {name: getattr(recipient.address, name) for name in ADDRESS_FIELDS}
    return view
