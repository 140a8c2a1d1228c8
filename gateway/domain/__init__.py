"""What comes in, as values: parsing and checking of REST bodies. Pure."""

from gateway.domain.document import read_document
from gateway.domain.fields import ID_PATTERN, decimal_text, is_id
from gateway.domain.payment_event import BuyerInfo, PaymentEvent, PaymentOrderSpec, parse_payment_event
from gateway.domain.payout_request import Address, PayoutRequest, Recipient, parse_payout_request

__all__ = [
    "ID_PATTERN",
    "Address",
    "BuyerInfo",
    "PaymentEvent",
    "PaymentOrderSpec",
    "PayoutRequest",
    "Recipient",
    "decimal_text",
    "is_id",
    "parse_payment_event",
    "parse_payout_request",
    "read_document",
]
