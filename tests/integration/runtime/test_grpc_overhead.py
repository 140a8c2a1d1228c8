"""What stands around a method must stay cheap: a checkout makes dozens of calls."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ducat.payment.v1 import payment_pb2, payment_service_pb2_grpc
from runtime.grpc_server import _Collector, _Guard
from runtime.metrics import RpcMetrics
from runtime.security import TokenStore, create_token
from tests.integration.runtime.serving import SCOPES, SERVICE, PaymentServicer, load

OVERHEAD_CALLS_MAX = {"GetPayment": 75, "CancelPayment": 160}
"""Function calls around a method, a read and a change (whose request is validated); a time would say more of what else the machine does."""


class Context:
    """What grpc.aio hands to a handler, as far as it is used."""

    def __init__(self, token: str) -> None:
        self._metadata = (
            ("user-agent", "x"),
            ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ("authorization", f"Bearer {token}"),
        )

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None


async def calls_of(call: Callable[[], Awaitable[Any]]) -> int:
    """Function calls, of Python and of C, that one call takes once everything is warm."""
    for _ in range(3):
        await call()
    count = 0

    def counts(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counts)
    try:
        await call()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("method", ["GetPayment", "CancelPayment"])
async def test_overhead_of_everything_around_a_method(method: str, tmp_path: Path) -> None:
    path = str(tmp_path / "tokens.toml")
    context = Context(create_token(path, "caller", ["payments.*"]))
    collector = _Collector()
    servicer = PaymentServicer()
    payment_service_pb2_grpc.add_PaymentServiceServicer_to_server(servicer, collector)
    handler = collector.handlers[f"/{SERVICE}/{method}"]
    guard = _Guard(load(), SCOPES, TokenStore(path), RpcMetrics(registry=None))
    guarded = guard.wrap(f"/{SERVICE}/{method}", handler).unary_unary
    raw = payment_pb2.GetPaymentRequest(checkout_id="CHK-1").SerializeToString()

    async def bare() -> bytes:
        response = await handler.unary_unary(handler.request_deserializer(raw), context)
        return handler.response_serializer(response)

    assert await guarded(raw, context) == await bare()
    overhead = await calls_of(lambda: guarded(raw, context)) - await calls_of(bare)
    print(f"{method}: {overhead} calls")
    assert 0 < overhead <= OVERHEAD_CALLS_MAX[method]
