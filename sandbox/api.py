"""The sandbox over HTTP: an ASGI application without a framework, since a request here costs less than a framework's routing.

Paths are in docs/sandbox.md. Guards first: known PSP, API key in constant time, bounded body; then the parameters; then the doing.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote

from runtime.logs import get_logger
from sandbox import pages, rules
from sandbox.deliveries import Deliveries
from sandbox.faults import SLOW_MS, faults_from
from sandbox.psp import Answered, PspName, SandboxPsp
from sandbox.rules import ApiError, Json
from sandbox.store import Store, Stored, encode

__all__ = ["BODY_BYTES_MAX", "SandboxApi"]

BODY_BYTES_MAX = 65_536
BODY_TIMEOUT_S = 10.0
KEY_LENGTH_MAX = 255
HOLD_S_MAX = 60.0
"""How long an answer that never comes holds its connection."""
ONCE_COUNT_MAX = 100_000

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_HTML = (b"content-type", b"text/html; charset=utf-8")
_PAGE_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    ),
)
_KINDS = {"payment_intents": "payment_intent", "refunds": "refund", "payouts": "payout"}
_REFERENCE_PARAMS = {"payment_intents": "payment_order_id", "refunds": "refund_id", "payouts": "your_reference_id"}
_logger = get_logger("sandbox.api")


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    query: bytes
    headers: Mapping[bytes, bytes]
    body: bytes

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")


class _Hold(Exception):
    """No answer ever."""


class SandboxApi:
    """The application: `await api(scope, receive, send)`."""

    def __init__(self, psp: SandboxPsp, names: Mapping[str, PspName], store: Store, deliveries: Deliveries) -> None:
        self._psp = psp
        self._names = names
        self._store = store
        self._deliveries = deliveries
        self._once: set[tuple[str, str, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            response = await self._respond(scope, receive)
        except ApiError as error:
            response = _refusal(error)
        except _Hold:
            await _hold(receive)
            return
        except Exception:
            _logger.exception("request failed", path=scope["path"])
            response = _refusal(
                ApiError(500, "api_error", "internal", "a bug of the sandbox; its log has the traceback")
            )
        length = (b"content-length", str(len(response.body)).encode())
        await send({"type": "http.response.start", "status": response.status, "headers": [*response.headers, length]})
        await send({"type": "http.response.body", "body": response.body})

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        method = scope["method"]
        parts = scope["path"].split("/")  # "/sandbox/v1/payment_intents/pi_1" → ["", "sandbox", "v1", …]
        headers = dict(scope["headers"])
        body = b"" if method in ("GET", "HEAD") else await _body(receive)
        request = Request("GET" if method == "HEAD" else method, scope["query_string"], headers, body)
        name = self._names.get(parts[1]) if len(parts) > 2 else None
        if name is not None and parts[2] == "v1" and 4 <= len(parts) <= 6:
            return await self._call_api(name, request, parts[3:])
        if name is not None and parts[2] == "pay" and len(parts) == 4:
            return await self._serve_page(name, request, parts[3])
        return self._serve_rest(request, parts)

    # --- the PSP's API

    async def _call_api(self, name: PspName, request: Request, path: list[str]) -> Response:
        collection = path[0]
        kind = _KINDS.get(collection)
        if kind is None:
            raise _not_found()
        _authenticate(name, request, kind)
        match request.method, path[1:]:
            case "POST", []:
                return await self._create(name, request, kind)
            case "GET", [object_id] if object_id:
                return _json(self._psp.get(name, kind, object_id).to_json())
            case "GET", []:
                param = _REFERENCE_PARAMS[collection]
                reference = parse_qs(request.query.decode("latin-1")).get(param, [""])[0]
                if not reference:
                    raise rules.invalid(param, "missing from the query", "parameter_missing")
                found = [stored.to_json() for stored in self._psp.find(name, kind, reference)]
                return _json({"object": "list", "data": found})
            case "POST", [object_id, "cancel"] if kind == "payment_intent":
                intent = self._psp.get(name, kind, object_id)
                self._psp.cancel_intent(name, intent)
                return _json(intent.to_json())
        raise _not_found()

    async def _create(self, name: PspName, request: Request, kind: str) -> Response:
        params = rules.object_from_json(request.body)
        fields = _PARSERS[kind](params)
        key = request.header(b"idempotency-key")
        if len(key) > KEY_LENGTH_MAX:
            raise rules.invalid("Idempotency-Key", f"expected at most {KEY_LENGTH_MAX} characters")
        metadata = fields.get("metadata", {})
        reference = _reference(kind, fields)
        faults = self._psp.faults_of(name, reference, request.header(b"sandbox-fault"), metadata)
        if faults:
            await self._before_acting(name, kind, key or reference, faults)
        if kind == "payment_intent":
            answered = self._psp.create_intent(name, key, fields, params, faults)
        elif kind == "refund":
            answered = self._psp.create_refund(name, key, fields, params, faults)
        else:
            answered = self._psp.create_payout(name, fields, params, faults)
        if faults:
            self._after_acting(name, kind, key or reference, faults, answered)
        return _created(answered)

    async def _before_acting(self, name: PspName, kind: str, key: str, faults: frozenset[str]) -> None:
        if "slow" in faults:
            await asyncio.sleep((self._psp.slow_ms(name) or SLOW_MS) / 1000)
        if "throttle" in faults and self._first_time("throttle", name, kind, key):
            raise ApiError(429, "rate_limit_error", "rate_limit", "too many requests; try again later", retry_after_s=1)
        if "lost" in faults and self._first_time("lost", name, kind, key):
            raise _Hold

    def _after_acting(self, name: PspName, kind: str, key: str, faults: frozenset[str], answered: Answered) -> None:
        if "timeout" in faults and self._first_time("timeout", name, kind, key):
            raise _Hold
        if "error_after" in faults and not answered.replayed:
            raise ApiError(500, "api_error", "internal", "something went wrong after the request was carried out")

    def _first_time(self, fault: str, name: PspName, kind: str, key: str) -> bool:
        """Faults that would never let a retry through happen once a key. Forgotten at a restart, which a retry survives."""
        mark = (fault, f"{name.name}/{kind}", key)
        if mark in self._once:
            return False
        if len(self._once) >= ONCE_COUNT_MAX:
            self._once.clear()
        self._once.add(mark)
        return True

    # --- the buyer's page

    async def _serve_page(self, name: PspName, request: Request, object_id: str) -> Response:
        intent = self._psp.get(name, "payment_intent", object_id)
        if request.method == "GET":
            return _html(200, self._page(name, intent))
        if request.method != "POST":
            raise _method_not_allowed()
        if intent.status != "requires_payment":
            return _redirect(_back_url(intent))
        form = parse_qs(request.body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=16)
        card = rules.card_of(form.get("card_number", [""])[0])
        if isinstance(card, str):
            return _html(422, pages.payment_page(name.name, intent, error=card))
        faults = self._psp.faults_of(name, intent.reference, request.header(b"sandbox-fault"), intent.body["metadata"])
        if "slow" in faults:
            await asyncio.sleep((self._psp.slow_ms(name) or SLOW_MS) / 1000)
            intent = self._psp.get(name, "payment_intent", object_id)  # it may have been paid meanwhile
        self._psp.pay(name, intent, card, faults)
        if intent.status == "requires_payment":
            return _html(402, pages.payment_page(name.name, intent, error=card.message))
        return _redirect(_back_url(intent))

    def _page(self, name: PspName, intent: Stored) -> bytes:
        if intent.status == "requires_payment":
            return pages.payment_page(name.name, intent)
        return pages.outcome_page(name.name, intent, _back_url(intent))

    # --- the rest

    def _serve_rest(self, request: Request, parts: list[str]) -> Response:
        match parts[1:]:
            case ["healthz"] if request.method == "GET":
                return _json({"status": "ok"})
            case [""] if request.method == "GET":
                return _html(
                    200, pages.index_page(sorted(self._names), self._store.count(), self._deliveries.pending_count)
                )
            case ["_control", what]:
                self._authenticate_operator(request)
                if what == "faults":
                    return self._control_faults(request)
                if what == "refunds":
                    return self._control_refunds(request)
                if what == "pending" and request.method == "GET":
                    return _json({"pending": self._deliveries.pending_count})
        raise _not_found()

    def _authenticate_operator(self, request: Request) -> None:
        """By the API key of any PSP that is played: who has one may do worse. A buyer, who sees the hosted page, has none."""
        given = _bearer(request)
        known = [hmac.compare_digest(given, name.api_key.encode()) for name in self._names.values() if name.api_key]
        if not any(known):
            raise _unauthenticated("Authorization: Bearer <key>, the API key of any PSP that is played here")

    def _control_faults(self, request: Request) -> Response:
        if request.method == "POST":
            params = rules.object_from_json(request.body)
            psp = params.get("psp", "")
            if psp != "" and psp not in self._names:
                raise rules.invalid("psp", f"expected one of {', '.join(sorted(self._names))}")
            faults = faults_from(params)
            self._store.set_faults(psp, faults.to_json())
            self._psp.faults[psp] = faults
        elif request.method == "DELETE":
            self._store.set_faults("", None)
            self._psp.faults.clear()
        elif request.method != "GET":
            raise _method_not_allowed()
        return _json({psp or "*": faults.to_json() for psp, faults in self._psp.faults.items()})

    def _control_refunds(self, request: Request) -> Response:
        """A refund as somebody makes it in the PSP's dashboard: without any id of the merchant."""
        if request.method != "POST":
            raise _method_not_allowed()
        params = rules.object_from_json(request.body)
        name = self._names.get(str(params.get("psp", "")))
        if name is None:
            raise rules.invalid("psp", f"expected one of {', '.join(sorted(self._names))}")
        body: Json = {key: params[key] for key in ("payment_intent", "amount", "reason") if key in params}
        order_id = params.get("payment_order_id")
        if "payment_intent" not in body and isinstance(order_id, str) and order_id:
            intents = self._psp.find(name, "payment_intent", order_id)
            if not intents:
                raise rules.invalid("payment_order_id", "no payment intent has it")
            body["payment_intent"] = intents[0].id
        fields = rules.refund_from(body)
        faults = self._psp.faults_of(name, "", request.header(b"sandbox-fault"), {})
        return _created(self._psp.create_refund(name, "", fields, body, faults))


_PARSERS = {"payment_intent": rules.intent_from, "refund": rules.refund_from, "payout": rules.payout_from}


def _reference(kind: str, fields: Json) -> str:
    if kind == "payout":
        return str(fields["your_reference_id"])
    return str(fields["metadata"].get("refund_id" if kind == "refund" else "payment_order_id", ""))


def _authenticate(name: PspName, request: Request, kind: str) -> None:
    if kind == "payout":
        given, expected, where = request.headers.get(b"x-api-key", b""), name.payout_api_key, "X-API-Key: <payout key>"
    else:
        given, expected, where = _bearer(request), name.api_key, "Authorization: Bearer <key>"
    if not hmac.compare_digest(given, expected.encode()):
        raise _unauthenticated(where)


def _bearer(request: Request) -> bytes:
    given = request.headers.get(b"authorization", b"")
    return given[7:] if given[:7].lower() == b"bearer " else b""


def _unauthenticated(where: str) -> ApiError:
    return ApiError(401, "authentication_error", "api_key_invalid", f"no valid API key; send {where}")


async def _body(receive: Receive) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            message = await receive()
            body: bytes = message.get("body", b"")
            while message.get("more_body") and len(body) <= BODY_BYTES_MAX:
                message = await receive()
                body += message.get("body", b"")
    except TimeoutError:
        raise ApiError(
            408, "invalid_request_error", "body_too_slow", f"the body did not come within {BODY_TIMEOUT_S:g} s"
        ) from None
    if len(body) > BODY_BYTES_MAX:
        raise ApiError(
            413, "invalid_request_error", "body_too_large", f"the body is larger than {BODY_BYTES_MAX} bytes"
        )
    return body


async def _hold(receive: Receive) -> None:
    """Says nothing until the caller gives up. uvicorn then closes the connection."""
    try:
        async with asyncio.timeout(HOLD_S_MAX):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        pass


def _json(value: Json, status: int = 200, *headers: tuple[bytes, bytes]) -> Response:
    return Response(status, encode(value).encode(), (_JSON, *headers))


def _created(answered: Answered) -> Response:
    if not answered.replayed:
        return _json(answered.body())
    try:
        return _json(answered.body(), 200, _REPLAYED)
    except ApiError as error:
        refusal = _refusal(error)
        return Response(refusal.status, refusal.body, (*refusal.headers, _REPLAYED))


_REPLAYED = (b"idempotent-replayed", b"true")


def _refusal(error: ApiError) -> Response:
    headers = ((b"retry-after", str(error.retry_after_s).encode()),) if error.retry_after_s else ()
    return _json(error.body(), error.status, *headers)


def _html(status: int, body: bytes) -> Response:
    return Response(status, body, (_HTML, *_PAGE_HEADERS))


def _redirect(url: str) -> Response:
    return Response(303, b"", ((b"location", url.encode()), (b"cache-control", b"no-store")))


def _back_url(intent: Stored) -> str:
    url = str(intent.private["return_url"])
    fragment_at = url.find("#")
    base = url if fragment_at < 0 else url[:fragment_at]
    separator = "&" if "?" in base else "?"
    return f"{base}{separator}payment_order_id={quote(intent.reference, safe='')}&payment_intent={intent.id}"


def _not_found() -> ApiError:
    return ApiError(404, "invalid_request_error", "path_unknown", "no such path; see docs/sandbox.md")


def _method_not_allowed() -> ApiError:
    return ApiError(405, "invalid_request_error", "method_not_allowed", "this path does not take this method")
