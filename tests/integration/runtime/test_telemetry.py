"""Spans over a real OTLP collector on loopback."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from ducat.payment.v1 import payment_pb2
from kernel.errors import NotFound
from runtime import telemetry, trace
from runtime.settings import SettingsInvalid
from tests.integration.runtime.serving import PaymentServicer, load, served

collector_pb2_grpc = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc", reason="needs the extra `telemetry`"
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # noqa: E402


class Collector(collector_pb2_grpc.TraceServiceServicer):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.services |= {
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.aio.server()
    collector_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield collector, f"http://127.0.0.1:{port}"
    await server.stop(0)


async def test_spans_of_client_and_server_hang_together_and_share_the_trace(collector: tuple[Collector, str]) -> None:
    seen: list[str] = []

    async def behaviour(_request: Any, _context: Any) -> None:
        seen.append(trace.current())
        if len(seen) > 2:
            raise NotFound("none")

    got, endpoint = collector
    stop = telemetry.start("payment", endpoint)
    try:
        async with served(PaymentServicer(behaviour), load()) as (stub, _, _):
            with trace.bind() as traceparent:
                await stub.GetPayment(payment_pb2.GetPaymentRequest(checkout_id="CHK-1"))
                [each async for each in stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))]
                with pytest.raises(grpc.RpcError):
                    await stub.CancelPayment(payment_pb2.CancelPaymentRequest(checkout_id="CHK-1"))
    finally:
        await asyncio.to_thread(stop)
    assert telemetry.spans is None
    assert got.services == {"ducat-payment"}
    assert {span.trace_id.hex() for span in got.spans} == {traceparent[3:35]}
    clients = {span.span_id: span for span in got.spans if span.kind == span.SPAN_KIND_CLIENT}
    servers = [span for span in got.spans if span.kind == span.SPAN_KIND_SERVER]
    assert len(clients) == len(servers) == 3
    for span in servers:
        assert span.parent_span_id in clients, "a server's span hangs on its caller's"
        assert clients[span.parent_span_id].parent_span_id.hex() == traceparent[36:52]
    assert {span.span_id.hex() for span in servers} == {each[36:52] for each in seen}, "what the servicer passes on"
    failed = [span for span in servers if span.status.code == span.status.STATUS_CODE_ERROR]
    assert [span.name for span in failed] == ["ducat.payment.v1.PaymentService/CancelPayment"]
    assert {each.key: each.value.string_value for each in failed[0].attributes}["error.type"] == "NOT_FOUND"


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsInvalid, match=r"pip install \"ducat-payments\[telemetry\]\""):
        telemetry.start("payment", "http://127.0.0.1:4317")
