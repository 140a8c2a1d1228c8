"""Risk: a proxy that somebody's environment names swallows, or reads, what Ducat's processes and callers say to one another."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import pytest

import ducat
import ducat.aio
from ducat.payment.v1 import payment_pb2, payment_service_pb2_grpc
from executor.bootstrap import adapters_of
from kernel.errors import DucatError
from runtime import telemetry
from runtime.channel import open_channel
from runtime.errors import from_rpc_error
from runtime.http_client import HttpPool, NotSent
from runtime.settings import Settings, SettingsInvalid
from sandbox.deliveries import Deliveries

NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
BEYOND = "payment.internal.invalid:50051"
GET = payment_pb2.GetPaymentRequest(checkout_id="CHK-1")


@dataclass
class Proxy:
    """Records what it is asked, and refuses."""

    url: str = ""
    heard: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append(await reader.read(4_096))
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: None) -> AsyncIterator[Proxy]:
    """A proxy that every spelling of the environment names."""
    proxy = Proxy()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for name in NAMES:
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.upper(), proxy.url)
    yield proxy
    server.close()


@pytest.fixture(params=[None, "", "other.example"], ids=["unset", "empty", "another"])
def no_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        if request.param is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, request.param)


async def listener() -> tuple[asyncio.Server, str]:
    """Something that takes connections and says nothing."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    return server, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_no_channel_looks_at_the_environment(proxy: Proxy) -> None:
    """Before: the proxy got CONNECT payment.internal:50051, and behind it every message in the clear."""
    server, local = await listener()
    settings = Settings.load({}, environ={})
    for address in (local, local.replace("127.0.0.1", "localhost"), BEYOND):
        async with open_channel(address, settings) as channel:
            stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.GetPayment(GET, timeout=0.3)
            assert isinstance(from_rpc_error(raised.value), DucatError)
        async with ducat.aio.Client(address=address, timeout_s=0.3, retry=ducat.Retry(count_max=0)) as client:
            with pytest.raises(ducat.DucatError):
                await client.payments.get_payment(checkout_id="CHK-1")

        def call(address: str = address) -> None:
            with (
                ducat.Client(address=address, timeout_s=0.3, retry=ducat.Retry(count_max=0)) as client,
                pytest.raises(ducat.DucatError),
            ):
                client.payments.get_payment(checkout_id="CHK-1")

        with ThreadPoolExecutor(1) as thread:
            await asyncio.get_running_loop().run_in_executor(thread, call)
    server.close()
    assert proxy.heard == []


async def test_a_proxy_is_used_only_beyond_loopback_with_tls_and_when_asked_for(proxy: Proxy) -> None:
    with pytest.raises(ValueError, match="use_proxy"):
        ducat.Client(address=BEYOND, use_proxy=True)
    with pytest.raises(SettingsInvalid, match="grpc_proxy needs tls_ca_file"):
        Settings.load({"grpc_proxy": True}, environ={})
    named = {"tls": ducat.TLS(), "timeout_s": 2, "retry": ducat.Retry(count_max=0), "use_proxy": True}
    async with ducat.aio.Client(address="127.0.0.1:1", **named) as client:
        with pytest.raises(ducat.DucatError):
            await client.payments.get_payment(checkout_id="CHK-1")
    assert proxy.heard == []
    async with ducat.aio.Client(address=BEYOND, **named) as client:
        with pytest.raises(ducat.DucatError):
            await client.payments.get_payment(checkout_id="CHK-1")
    assert proxy.heard[0].startswith(f"CONNECT {BEYOND} HTTP/1.".encode())
    assert not [each for each in proxy.heard if b"CHK-1" in each]


async def test_calls_to_psps_and_webhooks_use_only_the_proxy_of_the_settings(proxy: Proxy) -> None:
    server, local = await listener()
    for base_url in (f"http://{local}", "http://psp.invalid", "https://psp.invalid"):
        pool = HttpPool(base_url, timeout_s=0.3)
        with pytest.raises(Exception, match=r"no connection|no whole answer"):
            await pool.request("POST", "/v1/payouts", {}, b"account 1234")
        await pool.close()
    deliveries = Deliveries.__new__(Deliveries)
    deliveries._pools = {}
    pool, _ = deliveries._pool_of(f"http://{local}/webhooks/sandbox")
    assert pool._proxy is None
    pool = HttpPool(f"http://{local}", timeout_s=0.3, proxy=proxy.url)
    with pytest.raises(Exception, match="no whole answer"):
        await pool.request("POST", "/v1/payouts", {}, b"account 1234")
    await pool.close()
    assert proxy.heard == []

    pool = HttpPool("https://psp.invalid", timeout_s=2, proxy=proxy.url)
    with pytest.raises(NotSent, match="no connection"):
        await pool.request("POST", "/v1/payouts", {}, b"account 1234")
    await pool.close()
    assert proxy.heard[0].startswith(b"CONNECT psp.invalid:443 HTTP/1.1")
    assert b"1234" not in b"".join(proxy.heard)
    server.close()


def test_a_proxy_never_reads_a_psps_calls() -> None:
    with pytest.raises(ValueError, match="a proxy would read"):
        HttpPool("http://psp.example", timeout_s=1, proxy="http://127.0.0.1:1")
    sandbox_elsewhere = {"psp_proxy": "http://127.0.0.1:1", "sandbox_url": "http://sandbox.example"}
    with pytest.raises(SettingsInvalid, match="base_url"):
        adapters_of(Settings.load(sandbox_elsewhere, environ={}))
    adapters_of(Settings.load({"psp_proxy": "http://127.0.0.1:1"}, environ={}))
    with pytest.raises(SettingsInvalid, match="psp_proxy"):
        Settings.load({"psp_proxy": "socks5://x"}, environ={})


@pytest.mark.parametrize(
    ("endpoint", "use_proxy", "option"),
    [("http://127.0.0.1:1", True, 0), ("https://spans.example", False, 0), ("https://spans.example", True, 1)],
)
def test_spans_do_not_pass_a_proxy(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, use_proxy: bool, option: int
) -> None:
    exporters = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    given: list[dict[str, Any]] = []
    made = exporters.OTLPSpanExporter

    def make(**named: Any) -> Any:
        given.append(named)
        return made(**named)

    monkeypatch.setattr(exporters, "OTLPSpanExporter", make)
    telemetry.start("test", endpoint, use_proxy=use_proxy)()
    assert given[0]["channel_options"] == (("grpc.enable_http_proxy", option),)


def test_sessions_do_not_trust_the_environment() -> None:
    """aiohttp's own default is part of the wall: whoever makes a session must not switch it on."""
    assert aiohttp.ClientSession.__init__.__kwdefaults__["trust_env"] is False
    root = os.path.join(os.path.dirname(__file__), "..", "..", "..")
    rooms = (
        "ducat",
        "runtime",
        "gateway",
        "payment",
        "executor",
        "wallet_core",
        "ledger",
        "sandbox",
        "ops",
        "loadtest",
    )
    for folder, _, files in itertools.chain.from_iterable(os.walk(os.path.join(root, room)) for room in rooms):
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    text = file.read()
                assert "trust_env=True" not in text.replace(" ", ""), name
