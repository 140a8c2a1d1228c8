"""The REST API as a table: what each path and method does, and what it needs. The router, the `Allow` header and the
test of the OpenAPI document all read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ROUTES", "Route", "allowed_methods", "find"]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. ``scope`` is what a caller's token needs where authentication is on; empty for buyers and PSPs."""

    method: str
    path: str
    operation: str
    scope: str = ""
    is_page: bool = False


ROUTES: tuple[Route, ...] = (
    Route("POST", "/v1/payments", "create_payment", "payments.write"),
    Route("GET", "/v1/payments/{checkout_id}", "get_payment", "payments.read"),
    Route("POST", "/v1/payouts", "create_payout", "payouts.write"),
    Route("GET", "/v1/payouts/{reference}", "get_payout", "payouts.read"),
    Route("GET", "/v1/findings", "list_findings", "payments.read"),
    Route("POST", "/v1/findings/{finding_id}:resolve", "resolve_finding", "payments.write"),
    Route("GET", "/checkout/{page_key}", "show_checkout", is_page=True),
    Route("GET", "/payment/return", "show_return", is_page=True),
    Route("POST", "/webhooks/{psp}", "record_payment_notification"),
    Route("POST", "/webhooks/{psp}/payouts", "record_payout_notification"),
    Route("GET", "/healthz", "healthz"),
    Route("GET", "/readyz", "readyz"),
    Route("GET", "/openapi.json", "openapi"),
    Route("GET", "/", "index", is_page=True),
)

_FIXED: dict[str, dict[str, Route]] = {}
_VARIABLE: list[tuple[re.Pattern[str], dict[str, Route]]] = []


def _methods_of(path: str) -> dict[str, Route]:
    methods = {route.method: route for route in ROUTES if route.path == path}
    if "GET" in methods:
        methods["HEAD"] = methods["GET"]
    return methods


for _path in dict.fromkeys(route.path for route in ROUTES):
    if "{" in _path:
        _pattern = re.compile(re.sub(r"\\\{\w+\\\}", "([^/]+)", re.escape(_path)))
        _VARIABLE.append((_pattern, _methods_of(_path)))
    else:
        _FIXED[_path] = _methods_of(_path)


def find(path: str) -> tuple[dict[str, Route], str] | None:
    """The routes of a path by method, and the variable part of the path; None for a path that is not ours."""
    methods = _FIXED.get(path)
    if methods is not None:
        return methods, ""
    for pattern, methods in _VARIABLE:
        match = pattern.fullmatch(path)
        if match is not None:
            return methods, match[1]
    return None


def allowed_methods(methods: dict[str, Route]) -> str:
    """The value of an `Allow` header."""
    return ", ".join(methods)
