"""What comes in, as values: parsing and checking of REST bodies. Pure."""

from gateway.domain.document import read_document
from gateway.domain.fields import ID_PATTERN, decimal_text, is_id
from gateway.domain.finding import FindingQuery, Resolution, parse_finding_query, parse_resolution
from gateway.domain.payment_event import BuyerInfo, PaymentEvent, PaymentOrderSpec, parse_payment_event
from gateway.domain.payout_request import Address, PayoutRequest, Recipient, parse_payout_request

__all__ = [
    "ID_PATTERN",
    "Address",
    "BuyerInfo",
    "FindingQuery",
    "PaymentEvent",
    "PaymentOrderSpec",
    "PayoutRequest",
    "Recipient",
    "Resolution",
    "decimal_text",
    "is_id",
    "parse_finding_query",
    "parse_payment_event",
    "parse_payout_request",
    "parse_resolution",
    "read_document",
]
