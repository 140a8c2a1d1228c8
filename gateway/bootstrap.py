"""Wires the gateway: the only place that names concrete classes."""

from __future__ import annotations

from gateway.adapters.app import GatewayApp
from gateway.adapters.http_protocol import CONNECTIONS_MAX, BoundedHttpProtocol
from gateway.adapters.payment import PaymentClient
from runtime.metrics import RpcMetrics
from runtime.process import Process
from runtime.settings import Settings

__all__ = ["main"]


async def main() -> None:
    """Runs the gateway until it is told to stop."""
    settings = Settings.load()
    async with Process.start("gateway", settings) as process:
        payment = PaymentClient(await process.channel(settings.payment_address))
        app = GatewayApp(settings, payment, RpcMetrics("http"))
        await process.serve_http(
            settings.gateway_listen, app, concurrency_max=CONNECTIONS_MAX, protocol=BoundedHttpProtocol
        )
