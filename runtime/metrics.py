"""Prometheus metrics: `counter`, `gauge` and `histogram` for the rooms, RPC figures, and the endpoint that serves them.

Names are `ducat_<room>_<what>_<unit>`; labels are few and bounded (never an id). The endpoint is off unless
`metrics_listen_<process>` is set; it has a port of its own, so that it never has to share an authentication with the
API.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, make_asgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from runtime.settings import Settings, SettingsInvalid, is_loopback, split_address

__all__ = ["RpcMetrics", "counter", "gauge", "histogram", "serve_metrics"]

LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CONNECTIONS_MAX = 64
"""To the metrics endpoint."""
STOP_S = 1.0

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)
_made: dict[str, Counter | Gauge | Histogram] = {}


def counter(name: str, help: str, labels: Sequence[str] = ()) -> Counter:
    """A counter; asking again for the same name gives the same one."""
    return _once(Counter, name, lambda: Counter(name, help, labels))


def gauge(name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
    """A gauge; asking again for the same name gives the same one."""
    return _once(Gauge, name, lambda: Gauge(name, help, labels))


def histogram(
    name: str,
    help: str,
    labels: Sequence[str] = (),
    buckets: Sequence[float] = LATENCY_BUCKETS_S,
) -> Histogram:
    """A histogram, by default of seconds; asking again for the same name gives the same one."""
    return _once(Histogram, name, lambda: Histogram(name, help, labels, buckets=buckets))


def _once(kind: type[_Metric], name: str, make: Callable[[], _Metric]) -> _Metric:
    metric = _made.get(name)
    if metric is None:
        metric = _made[name] = make()
    if not isinstance(metric, kind):
        raise TypeError(f"{name}: exists as a {type(metric).__name__}, asked for as a {kind.__name__}")
    return metric


class RpcMetrics(Collector):
    """Counts and latency of RPCs by method and code. Plain lists on the hot path (one event loop writes), families when
    scraped.
    """

    def __init__(self, side: str = "server", registry: CollectorRegistry | None = REGISTRY) -> None:
        self._side = side
        self._latency: dict[
            str, list[float]
        ] = {}  # method → count of each bucket, one above all, and the sum of seconds
        self._codes: dict[tuple[str, str], int] = {}
        self._registry = registry
        self.in_flight: Callable[[], int] = lambda: 0
        """How many RPCs run; whoever counts them sets it."""
        if registry is not None:
            registry.register(self)

    def record(self, method: str, code: str, begin_s: float) -> None:
        """One RPC has ended; ``begin_s`` is time.perf_counter() at its start."""
        elapsed_s = time.perf_counter() - begin_s
        key = (method, code)
        self._codes[key] = self._codes.get(key, 0) + 1
        latency = self._latency.get(method)
        if latency is None:
            latency = self._latency[method] = [0.0] * (len(LATENCY_BUCKETS_S) + 2)
        latency[bisect_left(LATENCY_BUCKETS_S, elapsed_s)] += 1
        latency[-1] += elapsed_s

    def close(self) -> None:
        """Takes the figures out of the registry."""
        if self._registry is not None:
            self._registry.unregister(self)

    def collect(self) -> Iterable[Metric]:
        """The families, for a scrape."""
        handled = CounterMetricFamily(
            f"ducat_rpc_{self._side}_handled", "RPCs that have ended.", labels=("method", "code")
        )
        for (method, code), count in list(self._codes.items()):
            handled.add_metric((method, code), count)
        duration = HistogramMetricFamily(
            f"ducat_rpc_{self._side}_duration_seconds", "Time of RPCs.", labels=("method",)
        )
        for method, latency in list(self._latency.items()):
            total = 0.0
            buckets: list[tuple[str, float]] = []
            for bound, in_bucket in zip((*map(str, LATENCY_BUCKETS_S), "+Inf"), latency, strict=False):
                total += in_bucket
                buckets.append((bound, total))
            duration.add_metric((method,), buckets, latency[-1])
        yield handled
        yield duration
        yield GaugeMetricFamily(f"ducat_rpc_{self._side}_in_flight", "RPCs that are running.", value=self.in_flight())

    def describe(self) -> Iterable[Metric]:
        """No families before the first RPC."""
        return ()


def serve_metrics(listen: str, settings: Settings) -> tuple[str, Callable[[], None]]:
    """Serves the default registry on ``listen`` from a thread of its own; returns the real address and what stops it.

    Beyond loopback only with mTLS (tls_cert_file, tls_key_file, tls_ca_file): raises SettingsInvalid otherwise. The server is the one of
    runtime/http_server.py with few connections, so a stranger costs no more here than at the gateway.
    """
    from runtime.http_server import HttpLimits, make_server

    host, port = split_address(listen)
    is_guarded = not is_loopback(listen)
    if is_guarded and not (settings.tls_cert_file and settings.tls_key_file and settings.tls_ca_file):
        raise SettingsInvalid(
            f"metrics on {listen}: beyond loopback they need tls_cert_file, tls_key_file and tls_ca_file; "
            "set them, or listen on 127.0.0.1"
        )
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsInvalid(f"cannot listen on {listen} for metrics: {error.strerror}") from None
    server = make_server(
        make_asgi_app(),
        limits=HttpLimits(connections_max=CONNECTIONS_MAX),
        cert_file=settings.tls_cert_file if is_guarded else "",
        key_file=settings.tls_key_file if is_guarded else "",
        client_ca_file=settings.tls_ca_file if is_guarded else "",
    )
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listening])), name="metrics", daemon=True
    )
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=STOP_S)

    return f"{host}:{listening.getsockname()[1]}", stop
