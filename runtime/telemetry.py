"""OpenTelemetry spans of RPCs, only with `otel_endpoint` and the optional extra: pip install
"ducat-payments[telemetry]".

Without an endpoint nothing of OpenTelemetry is imported and `spans` stays None. The trace id is the one of
runtime/trace.py, so that a span, a log line and a bus message of one payment meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from runtime import trace
from runtime.settings import SettingsInvalid

__all__ = ["Spans", "spans", "start"]


class Spans(Protocol):
    """What the gRPC server and the channel ask for."""

    def server(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """The servicer's method, within a span."""
        ...

    def client(self, method: str) -> tuple[str, Callable[[Any], None]]:
        """Begins a span; returns the traceparent to send, and what ends the span when it is given the finished call."""
        ...


spans: Spans | None = None
"""Set by `start`."""


def start(process: str, endpoint: str, *, use_proxy: bool = False) -> Callable[[], None]:
    """Begins to export spans to ``endpoint`` (OTLP over gRPC); returns what flushes and stops (blocking). Only with ``use_proxy``
    through the proxy of the environment.

    Raises SettingsInvalid where the optional extra is not installed.
    """
    global spans
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsInvalid(
            f'otel_endpoint is set, but {error.name} is missing; fix: pip install "ducat-payments[telemetry]", '
            "or leave otel_endpoint empty"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"ducat-{process}"}))
    exporter = OTLPSpanExporter(
        endpoint=endpoint,
        insecure=not endpoint.startswith("https://"),
        channel_options=(("grpc.enable_http_proxy", int(use_proxy and endpoint.startswith("https://"))),),  # type: ignore[arg-type]
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    spans = _OpenTelemetrySpans(provider.get_tracer("ducat"))

    def stop() -> None:
        global spans
        spans = None
        provider.shutdown()

    return stop


class _OpenTelemetrySpans:
    def __init__(self, tracer: Any) -> None:
        from opentelemetry import trace as otel
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._kind = otel.SpanKind
        self._error = otel.Status(otel.StatusCode.ERROR)
        self._propagator = TraceContextTextMapPropagator()

    def server(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        # Every RPC has a context of its own, so what is bound here needs no undoing.
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Any) -> Any:
                span = self._begin(method, self._kind.SERVER)
                trace.set_current(_traceparent(span))
                try:
                    async for response in behaviour(request, context):
                        yield response
                except Exception as error:
                    self._fail(span, error)
                    raise
                finally:
                    span.end()

            return stream

        async def call(request: Any, context: Any) -> Any:
            span = self._begin(method, self._kind.SERVER)
            trace.set_current(_traceparent(span))
            try:
                return await behaviour(request, context)
            except Exception as error:
                self._fail(span, error)
                raise
            finally:
                span.end()

        return call

    def client(self, method: str) -> tuple[str, Callable[[Any], None]]:
        span = self._begin(method, self._kind.CLIENT)

        def finish(_call: Any) -> None:
            span.end()

        return _traceparent(span), finish

    def _begin(self, method: str, kind: Any) -> Any:
        service, _, name = method[1:].rpartition("/")
        parent = self._propagator.extract({"traceparent": trace.current()})
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return self._tracer.start_span(method[1:], context=parent, kind=kind, attributes=attributes)

    def _fail(self, span: Any, error: Exception) -> None:
        span.set_status(self._error)
        span.set_attribute("error.type", getattr(error, "reason", type(error).__name__))


def _traceparent(span: Any) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
