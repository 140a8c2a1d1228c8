"""The ASGI application: bounds what comes in, finds the operation, answers."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from gateway.adapters import pages
from gateway.adapters.budgets import Budget, Rates, Shedding
from gateway.adapters.exchange import (
    BodyReader,
    HttpProblem,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    html,
    json_response,
    problem,
    problem_of,
)
from gateway.adapters.openapi import OPENAPI_JSON
from gateway.adapters.payment import PaymentClient
from gateway.adapters.routes import ROUTES, Route, allowed_methods, find
from gateway.adapters.views import FINDING_KINDS, FINDING_SUBJECTS, finding_view, payment_view, payout_view
from gateway.domain import is_id, parse_finding_query, parse_payment_event, parse_payout_request, parse_resolution
from kernel.errors import DucatError, FieldViolation, InvalidArgument, NotFound
from runtime import trace
from runtime.errors import as_ducat_error
from runtime.logs import get_logger
from runtime.metrics import RpcMetrics
from runtime.security import TokenStore
from runtime.settings import Settings

__all__ = ["HEADERS_MAX", "GatewayApp"]

HEADERS_MAX = 64
"""Most headers of a webhook; the contract of RecordNotification has the same limit."""
QUERY_BYTES_MAX = 4_096
QUERY_FIELDS_MAX = 32
PAGE_KEY_LENGTH_MAX = 128
READY_TIMEOUT_S = 1.0
READY_KEPT_S = 1.0
"""How long an answer about readiness is kept."""

_PSP = re.compile(r"[a-z0-9_-]{1,64}")
# They are about one connection, or about this host alone: nothing that a PSP signs.
_NOT_PASSED_ON = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"cookie", b"content-length"}
)
_ALWAYS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_FOR_PAGES = (
    *_ALWAYS,
    (b"x-robots-tag", b"noindex, nofollow"),
    (b"content-security-policy", pages.SECURITY_POLICY.encode()),
)
_FOR_DATA = (*_ALWAYS, (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"))
_STRICT_TRANSPORT = ((b"strict-transport-security", b"max-age=31536000"),)

_LINKS = (
    ("/openapi.json", "OpenAPI document", "every operation, request and answer"),
    ("/readyz", "Readiness", "whether the payment service answers"),
    ("/healthz", "Liveness", "whether this process answers"),
)

_logger = get_logger("gateway")
_Handler = Callable[[Request], Awaitable[Response]]


class GatewayApp:
    """``GatewayApp(settings, payment)`` is an ASGI application. Who is turned away, and when: gateway/adapters/budgets.py."""

    def __init__(self, settings: Settings, payment: PaymentClient, metrics: RpcMetrics | None = None) -> None:
        self._settings = settings
        self._payment = payment
        self._metrics = metrics
        self._tokens = TokenStore(settings.auth_tokens_file) if settings.auth_tokens_file else None
        self.shedding = Shedding()
        self._budgets = {
            name: Budget(name, running_max, self.shedding)
            for name, running_max in (
                ("api", settings.gateway_api_concurrency_max),
                ("webhooks", settings.gateway_webhook_concurrency_max),
                ("pages", settings.gateway_page_concurrency_max),
            )
        }
        self._caller_rates = Rates("api", settings.gateway_caller_rate_max, self.shedding)
        self._address_rates = {
            name: Rates(name, settings.gateway_address_rate_max, self.shedding) for name in ("webhooks", "pages")
        }
        self._bodies = {name: BodyReader(settings.body_bytes_max) for name in self._budgets}
        self._readiness = Readiness({"payment": payment.check_health} if payment is not None else {})
        self._running = 0
        if metrics is not None:
            metrics.in_flight = lambda: self._running
        extra = _STRICT_TRANSPORT if settings.gateway_url.startswith("https:") else ()
        self._page_headers = (*_FOR_PAGES, *extra)
        self._data_headers = (*_FOR_DATA, *extra)
        self._handlers: dict[str, _Handler] = {
            route.operation: getattr(self, f"_{route.operation}") for route in ROUTES
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"expected an HTTP request, got {scope['type']!r}")
        begin_s = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        traceparent = trace.set_current(headers.get(b"traceparent", b"").decode("latin-1"))
        self._running += 1
        try:
            response, operation = await self._answer(scope, receive, headers)
        finally:
            self._running -= 1
        await self._send(scope, send, response, traceparent)
        if self._metrics is not None:
            self._metrics.record(operation, str(response.status), begin_s)

    async def _answer(self, scope: Scope, receive: Receive, headers: dict[bytes, bytes]) -> tuple[Response, str]:
        """The response, and the operation's name for the metrics. Never raises."""
        path: str = scope["path"]
        found = find(path)
        if found is None:
            return problem(
                404, "NOT_FOUND", "there is nothing at this path; see /openapi.json", _shown(path)
            ), "unknown"
        methods, argument = found
        route = methods.get(scope["method"])
        if route is None:
            allowed = allowed_methods(methods)
            error = HttpProblem(405, f"this path takes {allowed}", headers=((b"allow", allowed.encode()),))
            return problem_of(error, _shown(path)), "unknown"
        try:
            request = Request(path, argument, headers, scope, receive)
            return await self._run(route, request), route.operation
        except (HttpProblem, DucatError) as error:
            return self._refused(route, path, error), route.operation
        except Exception as error:
            known = as_ducat_error(error)
            _logger.exception("request failed", operation=route.operation)
            return self._refused(route, path, known), route.operation

    async def _run(self, route: Route, request: Request) -> Response:
        """The handler's response. What a client takes its time for, its body, comes before there is room for it in the budget."""
        handler = self._handlers[route.operation]
        name = _budget_of(route)
        if not name:
            return await handler(request)
        budget = self._budgets[name]
        self._admit(route, request, name)
        budget.check()
        if route.method == "POST":
            self._check_head(route, request)
            request.body = await self._read_body(request, name)
        with budget.taken():
            return await handler(request)

    def _admit(self, route: Route, request: Request, budget: str) -> None:
        """Token and rate. Raises Unauthenticated, PermissionDenied, HttpProblem."""
        client = request.scope.get("client")
        caller = client[0] if client else ""
        if budget != "api":
            self._address_rates[budget].spend(caller)
            return
        if self._tokens is not None:
            authorization = request.headers.get(b"authorization", b"").decode("latin-1")
            caller = f"token {self._tokens.authorize(authorization, route.scope).name}"
        self._caller_rates.spend(caller)

    def _check_head(self, route: Route, request: Request) -> None:
        """What is refused before a body is read. Raises NotFound, HttpProblem."""
        if request.headers.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise HttpProblem(
                415, "send the body as it is, without a content-encoding", headers=((b"accept-encoding", b"identity"),)
            )
        if route.scope:
            media_type, _, parameters = request.headers.get(b"content-type", b"").lower().partition(b";")
            charset = parameters.strip().removeprefix(b"charset=").strip(b'"')
            if media_type.strip() != b"application/json" or charset not in (b"", b"utf-8"):
                raise HttpProblem(415, "send the body as application/json in UTF-8")
        elif _PSP.fullmatch(request.argument) is None:
            raise NotFound("no payment service provider of that name is configured", reason="PROVIDER_UNKNOWN")

    async def _read_body(self, request: Request, budget: str) -> bytes:
        try:
            return await self._bodies[budget].read(request)
        except HttpProblem as error:
            if error.status in (429, 503):
                self.shedding.note(budget, error.status)
            raise

    def _refused(self, route: Route, path: str, error: DucatError | HttpProblem) -> Response:
        response = problem_of(error, _shown(path))
        return _error_page(response.status) if route.is_page else response

    async def _send(self, scope: Scope, send: Send, response: Response, traceparent: str) -> None:
        is_page = response.headers[0][1].startswith(b"text/html")
        headers = [
            *response.headers,
            *(self._page_headers if is_page else self._data_headers),
            (b"content-length", str(len(response.body)).encode()),
            (b"traceparent", traceparent.encode()),
            (b"x-trace-id", traceparent[3:35].encode()),
        ]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else response.body})

    # --- payments and payouts

    async def _create_payment(self, request: Request) -> Response:
        body = await self._json_body(request)
        event = parse_payment_event(body, orders_max=self._settings.orders_per_payment_max)
        if isinstance(event, list):
            raise _invalid("the payment event", event)
        payment, replayed = await self._payment.create_payment(event)
        _logger.info("payment created", checkout_id=event.checkout_id, replayed=replayed)
        return _created(payment_view(payment), f"/v1/payments/{event.checkout_id}", replayed)

    async def _get_payment(self, request: Request) -> Response:
        checkout_id = _id_in_path(request, "checkout")
        return json_response(200, payment_view(await self._payment.get_payment(checkout_id)))

    async def _create_payout(self, request: Request) -> Response:
        payout_request = parse_payout_request(await self._json_body(request))
        if isinstance(payout_request, list):
            raise _invalid("the payout", payout_request)
        payout, replayed = await self._payment.create_payout(payout_request)
        _logger.info("payout created", reference=payout_request.reference, replayed=replayed)
        return _created(payout_view(payout), f"/v1/payouts/{payout_request.reference}", replayed)

    async def _get_payout(self, request: Request) -> Response:
        return json_response(200, payout_view(await self._payment.get_payout(_id_in_path(request, "payout"))))

    async def _json_body(self, request: Request) -> bytes:
        return request.body

    # --- findings

    async def _list_findings(self, request: Request) -> Response:
        kinds, subjects = (frozenset(each.values()) - {"UNSPECIFIED"} for each in (FINDING_KINDS, FINDING_SUBJECTS))
        query = parse_finding_query(_query(request.scope, is_strict=True), kinds, subjects)
        if isinstance(query, list):
            raise _invalid("the query", query)
        found = await self._payment.list_findings(query)
        view = {"findings": [finding_view(each) for each in found.findings], "next_page_token": found.next_page_token}
        return json_response(200, view)

    async def _resolve_finding(self, request: Request) -> Response:
        finding_id = _id_in_path(request, "finding")
        resolution = parse_resolution(await self._json_body(request))
        if isinstance(resolution, list):
            raise _invalid("the resolution", resolution)
        finding = await self._payment.resolve_finding(finding_id, resolution, self._caller_name(request))
        return json_response(200, finding_view(finding))

    def _caller_name(self, request: Request) -> str:
        if self._tokens is None:
            return ""
        return self._tokens.authenticate(request.headers.get(b"authorization", b"").decode("latin-1")).name

    # --- webhooks

    async def _record_payment_notification(self, request: Request) -> Response:
        return await self._record_notification(request, is_payout=False)

    async def _record_payout_notification(self, request: Request) -> Response:
        return await self._record_notification(request, is_payout=True)

    async def _record_notification(self, request: Request, *, is_payout: bool) -> Response:
        """The raw body and headers, passed on. The 2xx goes out only after the payment service has answered."""
        headers = _passed_on(request.scope["headers"])
        answer = await self._payment.record_notification(request.argument, request.body, headers, is_payout=is_payout)
        return json_response(
            200,
            {
                "applied_count": answer.applied_count,
                "duplicate_count": answer.duplicate_count,
                "ignored_count": answer.ignored_count,
            },
        )

    # --- pages

    async def _show_checkout(self, request: Request) -> Response:
        """Whoever has the key may see it. Every other address is one and the same 404."""
        if len(request.argument) > PAGE_KEY_LENGTH_MAX:
            raise NotFound("no page has this address")
        return html(200, pages.checkout_page(await self._payment.get_page(request.argument)))

    async def _show_return(self, request: Request) -> Response:
        """Reads only. A return from a PSP proves nothing: the state comes from the payment service."""
        query = _query(request.scope)
        page_key = query.get("key", "")
        if not 0 < len(page_key) <= PAGE_KEY_LENGTH_MAX:
            return html(200, pages.return_page(None, ""))
        try:
            payment = await self._payment.get_page(page_key)
        except NotFound:
            return html(200, pages.return_page(None, ""))
        return html(200, pages.return_page(payment, query.get("payment_order_id", "")))

    async def _index(self, request: Request) -> Response:
        return html(200, pages.index_page(_LINKS))

    # --- operations

    async def _healthz(self, request: Request) -> Response:
        return json_response(200, {"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        missing = await self._readiness.missing()
        if missing:
            names = ", ".join(missing)
            raise HttpProblem(503, f"not ready: {names} cannot be reached or does not serve; try again", "UNAVAILABLE")
        return json_response(200, {"status": "ready"})

    async def _openapi(self, request: Request) -> Response:
        return Response(200, OPENAPI_JSON, ((b"content-type", b"application/json"),))


_UNBUDGETED = frozenset({"healthz", "readyz"})


def _budget_of(route: Route) -> str:
    """The name of the budget of an operation; empty for what is always answered."""
    if route.operation in _UNBUDGETED:
        return ""
    if route.path.startswith("/webhooks/"):
        return "webhooks"
    return "api" if route.scope else "pages"


class Readiness:
    """Whether everything that the gateway needs is there. Looked at once in READY_KEPT_S, however many ask."""

    def __init__(self, checks: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self._checks = checks
        self._missing: list[str] = []
        self._looked_s = -READY_KEPT_S
        self._looking: asyncio.Task[None] | None = None

    async def missing(self) -> list[str]:
        """The names of what is not there."""
        if time.monotonic() - self._looked_s >= READY_KEPT_S:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
            await asyncio.shield(self._looking)
        return self._missing

    async def _look(self) -> None:
        missing = []
        for name, check in self._checks.items():
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await check()
            except Exception as error:
                _logger.warning("not ready", missing=name, error=f"{type(error).__name__}: {error}")
                missing.append(name)
        self._missing, self._looked_s = missing, time.monotonic()


def _created(view: dict[str, Any], location: str, replayed: bool) -> Response:
    if replayed:
        return json_response(200, view, (b"idempotent-replayed", b"true"))
    return json_response(201, view, (b"location", location.encode()))


def _invalid(what: str, violations: list[FieldViolation]) -> InvalidArgument:
    count = len(violations)
    message = f"{what} has {count} wrong {'field' if count == 1 else 'fields'}; nothing was stored"
    return InvalidArgument(message, violations=violations)


def _id_in_path(request: Request, what: str) -> str:
    """An id that breaks the rules of ids cannot exist; no need to ask."""
    if not is_id(request.argument):
        raise NotFound(f"there is no {what} of that id")
    return request.argument


def _passed_on(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of a webhook, names in lower case, a repeated one joined by commas (RFC 9110, 5.2)."""
    passed: dict[str, str] = {}
    for raw_name, raw_value in headers:
        if raw_name in _NOT_PASSED_ON:
            continue
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        passed[name] = f"{passed[name]}, {value}" if name in passed else value
    if len(passed) > HEADERS_MAX:
        raise HttpProblem(431, f"a webhook may have at most {HEADERS_MAX} headers, this one has {len(passed)}")
    return passed


def _query(scope: Scope, *, is_strict: bool = False) -> dict[str, str]:
    """The query's fields, the first of each name. An unreadable query is an empty one for a page, which shows what it can;
    `is_strict`: it is refused, and so is a name that comes twice, as filters that are left out would show everything.
    """
    raw: bytes = scope["query_string"]
    try:
        if len(raw) > QUERY_BYTES_MAX:
            raise ValueError(f"longer than {QUERY_BYTES_MAX} bytes")
        pairs = parse_qsl(
            raw.decode("latin-1"),
            max_num_fields=QUERY_FIELDS_MAX,
            keep_blank_values=is_strict,
            errors="strict" if is_strict else "replace",
        )
    except ValueError as error:
        if is_strict:
            raise InvalidArgument(f"the query cannot be read: {error}") from None
        return {}
    fields = dict(reversed(pairs))
    if is_strict and len(fields) < len(pairs):
        raise InvalidArgument("the query has a name more than once; give each filter once")
    return fields


def _shown(path: str) -> str:
    """A path as the `instance` of a problem: bounded, and a valid URI reference."""
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "/._-~:@") else "_" for letter in path[:200]
    )


_ERROR_TEXTS = {
    404: ("Not found", "idle", "There is no such checkout", "Check the address, or go back to the shop."),
    503: (
        "One moment",
        "wait",
        "We cannot look this up right now",
        "This page tries again by itself. Nothing is lost.",
    ),
}


def _error_page(status: int) -> Response:
    """What a buyer sees instead of a problem document."""
    is_refused = 400 <= status < 500
    title, tone, headline, text = _ERROR_TEXTS[404 if is_refused else 503]
    page = pages.message_page(title, tone, headline, text, is_live=not is_refused)
    return html(status, page) if is_refused else html(status, page, (b"retry-after", b"3"))
