"""RPC figures and the rooms' own metrics."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from runtime import metrics
from runtime.settings import Settings, SettingsInvalid


def test_rpc_figures_add_up() -> None:
    registry = CollectorRegistry()
    rpc = metrics.RpcMetrics(registry=registry)
    rpc.record("/a/B", "OK", time.perf_counter() - 0.003)
    rpc.record("/a/B", "OK", time.perf_counter() - 0.3)
    rpc.record("/a/B", "NOT_FOUND", time.perf_counter() - 60)
    get = registry.get_sample_value
    assert get("ducat_rpc_server_handled_total", {"method": "/a/B", "code": "OK"}) == 2
    assert get("ducat_rpc_server_handled_total", {"method": "/a/B", "code": "NOT_FOUND"}) == 1
    name, label = "ducat_rpc_server_duration_seconds", {"method": "/a/B"}
    assert [get(f"{name}_bucket", {**label, "le": le}) for le in ("0.002", "0.005", "0.5", "10.0", "+Inf")] == [
        0,
        1,
        2,
        2,
        3,
    ]
    assert get(f"{name}_count", label) == 3
    assert get(f"{name}_sum", label) == pytest.approx(60.303, abs=0.1)
    assert b"ducat_rpc_server_duration_seconds_bucket" in generate_latest(registry)
    rpc.close()
    assert b"ducat_rpc" not in generate_latest(registry)


def test_asking_twice_gives_the_same_metric_and_another_kind_is_a_mistake() -> None:
    first = metrics.counter("ducat_test_things_total", "Things.", ["kind"])
    assert metrics.counter("ducat_test_things_total", "Things.", ["kind"]) is first
    with pytest.raises(TypeError, match="exists as a Counter"):
        metrics.gauge("ducat_test_things_total", "Things.")
    assert metrics.gauge("ducat_test_level", "Level.") is metrics.gauge("ducat_test_level", "Level.")
    assert metrics.histogram("ducat_test_s", "S.") is metrics.histogram("ducat_test_s", "S.")


def test_metrics_beyond_loopback_need_mtls() -> None:
    with pytest.raises(SettingsInvalid, match="tls_cert_file"):
        metrics.serve_metrics("0.0.0.0:0", Settings.load(environ={}))
