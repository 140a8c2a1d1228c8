"""The OpenAPI 3.1 document, made from the same rules that the code checks. tests/contract/rest holds it to the running
app.
"""

from __future__ import annotations

import json
from typing import Any

from gateway.adapters.views import FINDING_KINDS, FINDING_SUBJECTS, ORDER_STATES, PAYOUT_STATES, REFUND_STATES
from gateway.domain import ID_PATTERN, payment_event, payout_request
from gateway.domain.fields import AMOUNT_LENGTH_MAX, TextRule
from gateway.domain.finding import PAGE_SIZE_MAX, REASON_LENGTH_MAX
from gateway.domain.payout_request import BANK_IDENTIFIERS
from kernel.money import CURRENCY_EXPONENTS

__all__ = ["OPENAPI", "OPENAPI_JSON"]

Schema = dict[str, Any]

_ID: Schema = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": f"^{ID_PATTERN.pattern}$"}
_PSP: Schema = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[a-z0-9_-]+$"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_CURRENCY: Schema = {"type": "string", "enum": sorted(CURRENCY_EXPONENTS), "description": "ISO 4217 code"}
_AMOUNT_IN: Schema = {
    "description": "Decimal amount in the currency's own unit, with no more decimals than the currency has. "
    "Text is safest: some JSON libraries turn numbers into floats.",
    "oneOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "maxLength": AMOUNT_LENGTH_MAX, "pattern": r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"},
    ],
    "examples": ["75.00", 75.00],
}
_AMOUNT_OUT: Schema = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$", "description": "Decimal amount as text"}
_MINOR: Schema = {"type": "integer", "description": "The same in minor units"}
_COUNTRY: Schema = {"type": "string", "pattern": "^[A-Z]{2}$", "description": "ISO 3166-1 alpha-2"}
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"


def _text(rule: TextRule, description: str) -> Schema:
    schema: Schema = {"type": "string", "maxLength": rule.length_max, "description": description}
    if rule.is_required:
        schema["minLength"] = 1
    schema["pattern"] = _PRINTABLE if rule.pattern is None else f"^{rule.pattern.pattern}$"
    return schema


def _object(properties: dict[str, Schema], required: list[str] | None = None, **more: Any) -> Schema:
    """Nothing but ``properties``; all of them unless ``required`` names fewer."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **more,
    }


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_EVENT_RULES = payment_event.TEXT_RULES
_PAYOUT_RULES = payout_request.TEXT_RULES

_ADDRESS = {
    name: _text(_PAYOUT_RULES[f"recipient.address.{name}"], "Part of the recipient's address")
    for name in payout_request.ADDRESS_FIELDS
}
_RECIPIENT: dict[str, Schema] = {
    "type": {"const": "bank_account"},
    "account_holder_name": _text(_PAYOUT_RULES["recipient.account_holder_name"], "Who owns the account"),
    "account_number": _text(_PAYOUT_RULES["recipient.account_number"], "Text: leading zeros matter. Not with an IBAN."),
    "bank_name": _text(_PAYOUT_RULES["recipient.bank_name"], "Name of the bank"),
    "country_code": {**_COUNTRY, "description": "Follows from the bank's identifier if left out"},
    "ifsc": {"type": "string", "description": "India: 11 characters"},
    "routing_number": {"type": "string", "description": "United States: ABA routing number, nine digits"},
    "sort_code": {"type": "string", "description": "United Kingdom: six digits"},
    "bsb": {"type": "string", "description": "Australia: six digits"},
    "iban": {"type": "string", "description": "International bank account number"},
    "bic": _text(_PAYOUT_RULES["recipient.bic"], "SWIFT code"),
    "address": _object(_ADDRESS, []),
}
for _name in BANK_IDENTIFIERS:
    _RECIPIENT[_name].update(minLength=1, maxLength=64, pattern=_PRINTABLE)

_ORDER_STATE: Schema = {"enum": sorted(ORDER_STATES.values())}
_PAYOUT_STATE: Schema = {"enum": sorted(PAYOUT_STATES.values())}
_STRING: Schema = {"type": "string"}
_FINDINGS: Schema = {
    "type": "array",
    "items": {"$ref": "#/components/schemas/Finding"},
    "description": "Where what a PSP says and what we have do not agree; oldest first",
}
_ATTENTION: Schema = {**_STRING, "description": "The text of the newest open finding; empty where none is open"}
_SIDE: Schema = {"type": "object", "additionalProperties": _STRING}

_SCHEMAS: dict[str, Schema] = {
    "PaymentEvent": _object(
        {
            "checkout_id": {**_ID, "description": "Your id of the checkout; the idempotency key"},
            "buyer_info": _object(
                {
                    "buyer_id": _text(_EVENT_RULES["buyer_info.buyer_id"], "Your id of the buyer"),
                    "name": _text(_EVENT_RULES["buyer_info.name"], "Full name"),
                    "email": _text(_EVENT_RULES["buyer_info.email"], "For the receipt"),
                },
                ["buyer_id"],
            ),
            "payment_orders": {
                "type": "array",
                "minItems": 1,
                "maxItems": payment_event.ORDERS_MAX,
                "items": _object(
                    {
                        "payment_order_id": {**_ID, "description": "Your id of the order, unique over all checkouts"},
                        "seller_account": {**_ID, "description": "The seller whose wallet is credited"},
                        "amount": _AMOUNT_IN,
                        "currency": _CURRENCY,
                        "psp": _text(
                            _EVENT_RULES["payment_orders.psp"], "Name of the PSP; routing chooses if left out"
                        ),
                    },
                    ["payment_order_id", "seller_account", "amount", "currency"],
                ),
            },
        },
        ["checkout_id", "buyer_info", "payment_orders"],
    ),
    "Payment": _object(
        {
            "checkout_id": _STRING,
            "is_payment_done": {"type": "boolean", "description": "True when every order is final"},
            "checkout_url": {**_STRING, "description": "The page for the buyer"},
            "buyer_info": _object(
                {"buyer_id": _STRING, "name": _STRING, "email": _STRING}, ["buyer_id", "name", "email"]
            ),
            "payment_orders": {
                "type": "array",
                "items": _object(
                    {
                        "payment_order_id": _STRING,
                        "seller_account": _STRING,
                        "amount": _AMOUNT_OUT,
                        "amount_minor": _MINOR,
                        "currency": _STRING,
                        "state": _ORDER_STATE,
                        "psp": {**_STRING, "description": "Empty until routing chose"},
                        "psp_token": {**_STRING, "description": "The PSP's id of the intent; empty until it has it"},
                        "hosted_page_url": {**_STRING, "description": "Where the buyer pays; empty unless EXECUTING"},
                        "failure_reason": {**_STRING, "description": "In words; empty unless it failed"},
                        "refunded": _AMOUNT_OUT,
                        "refunded_minor": _MINOR,
                        "refunds": {"type": "array", "items": {"$ref": "#/components/schemas/Refund"}},
                        "attention": _ATTENTION,
                    },
                ),
            },
            "findings": _FINDINGS,
            "create_time": _TIME,
            "update_time": _TIME,
        },
        [
            "checkout_id",
            "is_payment_done",
            "checkout_url",
            "buyer_info",
            "payment_orders",
            "findings",
            "create_time",
            "update_time",
        ],
    ),
    "Refund": _object(
        {
            "refund_id": _STRING,
            "amount": _AMOUNT_OUT,
            "amount_minor": _MINOR,
            "claimed_minor": {
                "type": "integer",
                "description": "How much of it the seller's wallet did not cover, in minor units: the seller owes it",
            },
            "state": {"enum": sorted(REFUND_STATES.values())},
            "psp": _STRING,
            "psp_refund_id": _STRING,
            "made_at_psp": {"type": "boolean", "description": "Made at the PSP, not asked for here"},
            "reason": _STRING,
            "failure_reason": {**_STRING, "description": "In words; empty unless it failed"},
            "create_time": _TIME,
            "update_time": _TIME,
        },
    ),
    "Finding": _object(
        {
            "finding_id": _STRING,
            "kind": {"enum": sorted(FINDING_KINDS.values())},
            "subject": {"enum": sorted(FINDING_SUBJECTS.values())},
            "reference": {**_STRING, "description": "The order, the payout, or the PSP's id of the notification"},
            "checkout_id": _STRING,
            "seller_account": _STRING,
            "psp": _STRING,
            "psp_event_id": _STRING,
            "text": {**_STRING, "description": "In words"},
            "ours": {**_SIDE, "description": "What we have"},
            "theirs": {**_SIDE, "description": "What the PSP says, under the same names"},
            "create_time": _TIME,
            "resolve_time": {"type": ["string", "null"], "format": "date-time", "description": "null while it is open"},
            "resolved_by": _STRING,
            "reason": {**_STRING, "description": "Why it is no problem any more"},
        },
    ),
    "FindingList": _object({"findings": _FINDINGS, "next_page_token": _STRING}),
    "Resolution": _object(
        {
            "reason": {
                "type": "string",
                "minLength": 1,
                "maxLength": REASON_LENGTH_MAX,
                "pattern": r"^[^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$",
                "description": "Why it is no problem any more",
            },
            "request_id": {**_ID, "description": "The idempotency key"},
        },
    ),
    "PayoutRequest": _object(
        {
            "seller_account": {**_ID, "description": "The seller whose wallet is debited"},
            "amount": _object({"value": _AMOUNT_IN, "currency": _CURRENCY}, ["value", "currency"]),
            "recipient_details": _object(
                _RECIPIENT,
                ["account_holder_name"],
                oneOf=[{"required": [name]} for name in BANK_IDENTIFIERS],
            ),
            "purpose": _text(_PAYOUT_RULES["purpose"], "Why the payment is made; PSPs need it for compliance"),
            "your_reference_id": {**_ID, "description": "Your reference; the idempotency key"},
            "psp": _text(_PAYOUT_RULES["psp"], "Name of the PSP; routing chooses if left out"),
        },
        ["seller_account", "amount", "recipient_details", "purpose", "your_reference_id"],
    ),
    "Payout": _object(
        {
            "your_reference_id": _STRING,
            "seller_account": _STRING,
            "amount": _object({"value": _AMOUNT_OUT, "currency": _STRING}, ["value", "currency"]),
            "amount_minor": _MINOR,
            "recipient_details": {
                **_object(
                    {
                        **dict.fromkeys(_RECIPIENT, _STRING),
                        "address": _object(dict.fromkeys(_ADDRESS, _STRING), []),
                    },
                    ["type", "account_holder_name"],
                ),
                "description": "Account number and IBAN show their last four characters only",
            },
            "purpose": _STRING,
            "state": _PAYOUT_STATE,
            "psp": _STRING,
            "psp_payout_id": _STRING,
            "failure_reason": _STRING,
            "findings": _FINDINGS,
            "attention": _ATTENTION,
            "create_time": _TIME,
            "update_time": _TIME,
        },
    ),
    "NotificationResult": _object(
        {
            "applied_count": {"type": "integer", "description": "New and applied"},
            "duplicate_count": {"type": "integer", "description": "Known already"},
            "ignored_count": {"type": "integer", "description": "Stored; change nothing"},
        },
        ["applied_count", "duplicate_count", "ignored_count"],
    ),
    "Problem": _object(
        {
            "type": {"type": "string", "description": "`urn:ducat:problem:` and the reason"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "instance": {"type": "string"},
            "reason": {"type": "string", "description": "A name of ducat.common.v1.ErrorReason, as in the gRPC API"},
            "violations": {
                "type": "array",
                "items": _object(
                    {
                        "field": {"type": "string", "description": "Such as `payment_orders[1].amount`; `$`: the body"},
                        "description": {"type": "string"},
                    },
                    ["field", "description"],
                ),
            },
            "trace_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        },
        ["type", "title", "status", "detail", "instance", "reason", "trace_id"],
    ),
    "Status": _object({"status": {"enum": ["ok", "ready"]}}, ["status"]),
}

_TRACE_HEADERS: dict[str, Schema] = {
    "X-Trace-Id": {"description": "Name it when you report a problem", "schema": {"type": "string"}, "required": True},
    "traceparent": {"description": "W3C trace context", "schema": {"type": "string"}, "required": True},
}


def _answer(description: str, schema: str, media_type: str = "application/json", **headers: Schema) -> Schema:
    return {
        "description": description,
        "headers": {**_TRACE_HEADERS, **{name.replace("_", "-"): header for name, header in headers.items()}},
        "content": {media_type: {"schema": _reference(schema)}},
    }


_RETRY_AFTER: Schema = {"schema": {"type": "string"}, "description": "Seconds", "required": True}
_REPLAYED: Schema = {"schema": {"const": "true"}, "required": True}
_LOCATION: Schema = {"schema": {"type": "string"}, "required": True}

_PROBLEM_TEXTS: dict[int, str] = {
    400: "The input breaks a rule; `violations` names every field",
    401: "No token, or one that is not known (where authentication is on)",
    403: "The token lacks a scope, or a webhook's signature does not hold",
    404: "There is none",
    408: "The body came too slowly",
    409: "The same id with other content (IDEMPOTENCY_MISMATCH), or a state that does not allow it",
    413: "The body is too large",
    415: "The body is not application/json in UTF-8, or has a content-encoding",
    429: "A named limit is reached; retry with backoff",
    431: "Too many headers",
    500: "A bug",
    501: "Part of the contract, not served yet",
    503: "Overloaded, or the payment service does not answer; retry with backoff",
    504: "The outcome is unknown; retry with the same id",
}


def _problems(*statuses: int) -> dict[str, Schema]:
    return {
        str(status): _answer(
            _PROBLEM_TEXTS[status],
            "Problem",
            "application/problem+json",
            **({"Retry_After": _RETRY_AFTER} if status in (429, 503, 504) else {}),
        )
        for status in statuses
    }


def _page(*statuses: int) -> dict[str, Schema]:
    return {
        str(status): {
            "description": "The page" if status == 200 else "A page that says so",
            "headers": _TRACE_HEADERS,
            "content": {"text/html; charset=utf-8": {"schema": {"type": "string"}}},
        }
        for status in statuses
    }


def _body(schema: str) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": _reference(schema)}}}


def _in_path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _in_query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


def _operation(route: str, summary: str, tag: str, responses: dict[str, Schema], **more: Any) -> Schema:
    security: list[Schema] = [{}, {"bearer": []}] if tag in ("payments", "payouts", "findings") else []
    return {
        "operationId": route,
        "summary": summary,
        "tags": [tag],
        "security": security,
        "responses": responses,
        **more,
    }


_READ_PROBLEMS = _problems(401, 403, 404, 429, 500, 503, 504)
_CREATE_PROBLEMS = _problems(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 501, 503, 504)
_WEBHOOK_PROBLEMS = _problems(400, 403, 404, 408, 409, 413, 415, 429, 431, 500, 501, 503, 504)
_ANY_BODY: Schema = {"required": True, "content": {"application/json": {"schema": True}}}


def _webhook(operation: str, summary: str) -> Schema:
    return _operation(
        operation,
        summary,
        "webhooks",
        {"200": _answer("Committed. Never sent before the commit", "NotificationResult"), **_WEBHOOK_PROBLEMS},
        parameters=[_in_path("psp", _PSP)],
        requestBody=_ANY_BODY,
        description="For PSPs. The body is taken as it is and verified by the PSP's signature. "
        "Anything but a 2xx means: send it again.",
    )


OPENAPI: Schema = {
    "openapi": "3.1.0",
    "info": {
        "title": "Ducat REST API",
        "version": "1",
        "description": "Payments for marketplaces. Every error is an RFC 9457 problem document whose `reason` is the "
        "same as in the gRPC API. Fields that are not in this document are refused.",
    },
    "paths": {
        "/v1/payments": {
            "post": _operation(
                "create_payment",
                "Create a payment from a payment event; idempotent by checkout_id",
                "payments",
                {
                    "201": _answer("Created", "Payment", Location=_LOCATION),
                    "200": _answer("The same request was answered before", "Payment", Idempotent_Replayed=_REPLAYED),
                    **_CREATE_PROBLEMS,
                },
                requestBody=_body("PaymentEvent"),
            )
        },
        "/v1/payments/{checkout_id}": {
            "get": _operation(
                "get_payment",
                "Read a payment",
                "payments",
                {"200": _answer("The payment", "Payment"), **_READ_PROBLEMS},
                parameters=[_in_path("checkout_id", _ID)],
            )
        },
        "/v1/payouts": {
            "post": _operation(
                "create_payout",
                "Pay a seller's wallet out to a bank account; idempotent by your_reference_id",
                "payouts",
                {
                    "201": _answer("Created", "Payout", Location=_LOCATION),
                    "200": _answer("The same request was answered before", "Payout", Idempotent_Replayed=_REPLAYED),
                    **_CREATE_PROBLEMS,
                },
                requestBody=_body("PayoutRequest"),
            )
        },
        "/v1/payouts/{reference}": {
            "get": _operation(
                "get_payout",
                "Read a payout; bank details are masked",
                "payouts",
                {"200": _answer("The payout", "Payout"), **_READ_PROBLEMS},
                parameters=[_in_path("reference", _ID)],
            )
        },
        "/v1/findings": {
            "get": _operation(
                "list_findings",
                "List findings, newest first",
                "findings",
                {"200": _answer("One page", "FindingList"), **_problems(400, 401, 403, 429, 500, 503, 504)},
                parameters=[
                    _in_query("page_size", {"type": "integer", "minimum": 1, "maximum": PAGE_SIZE_MAX}),
                    _in_query("page_token", {"type": "string", "maxLength": 512}),
                    _in_query("open_only", {"enum": ["true", "false"]}),
                    _in_query("kind", {"enum": sorted(set(FINDING_KINDS.values()) - {"UNSPECIFIED"})}),
                    _in_query("subject", {"enum": sorted(set(FINDING_SUBJECTS.values()) - {"UNSPECIFIED"})}),
                    _in_query("psp", {"type": "string", "maxLength": 64}),
                    _in_query("seller_account", {"type": "string", "maxLength": 128}),
                    _in_query("reference", {"type": "string", "maxLength": 255}),
                    _in_query("checkout_id", {"type": "string", "maxLength": 128}),
                    _in_query("start_time", _TIME),
                    _in_query("end_time", _TIME),
                ],
            )
        },
        "/v1/findings/{finding_id}:resolve": {
            "post": _operation(
                "resolve_finding",
                "Close a finding with a reason; idempotent by request_id",
                "findings",
                {
                    "200": _answer("The finding, resolved", "Finding"),
                    **_problems(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504),
                },
                parameters=[_in_path("finding_id", _ID)],
                requestBody=_body("Resolution"),
            )
        },
        "/checkout/{page_key}": {
            "get": _operation(
                "show_checkout",
                "The buyer's page: the orders, where to pay each, live state. Take the address from `checkout_url`: nobody "
                "can guess it",
                "pages",
                _page(200, 404, 429, 500, 503, 504),
                parameters=[_in_path("page_key", {"type": "string", "minLength": 1, "maxLength": 128})],
            )
        },
        "/payment/return": {
            "get": _operation(
                "show_return",
                "Where a PSP sends the buyer back to; shows the state and changes nothing",
                "pages",
                _page(200, 429, 500, 503, 504),
                parameters=[
                    _in_query("key", {"type": "string"}),
                    _in_query("payment_order_id", {"type": "string"}),
                ],
            )
        },
        "/webhooks/{psp}": {"post": _webhook("record_payment_notification", "Payments, refunds and disputes of a PSP")},
        "/webhooks/{psp}/payouts": {"post": _webhook("record_payout_notification", "Payouts of a PSP")},
        "/healthz": {
            "get": _operation(
                "healthz", "Whether this process answers", "operation", {"200": _answer("It does", "Status")}
            )
        },
        "/readyz": {
            "get": _operation(
                "readyz",
                "Whether the payment service answers",
                "operation",
                {"200": _answer("It does", "Status"), **_problems(500, 503, 504)},
            )
        },
        "/openapi.json": {
            "get": _operation(
                "openapi",
                "This document",
                "operation",
                {
                    "200": {
                        "description": "OpenAPI 3.1",
                        "headers": _TRACE_HEADERS,
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    }
                },
            )
        },
        "/": {"get": _operation("index", "A page of links", "pages", _page(200))},
    },
    "components": {
        "schemas": _SCHEMAS,
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
    },
}

OPENAPI_JSON = json.dumps(OPENAPI, separators=(",", ":")).encode()
