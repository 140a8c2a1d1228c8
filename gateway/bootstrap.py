"""Wires the gateway: the only place that names concrete classes."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_network

from gateway.adapters.app import GatewayApp
from gateway.adapters.payment import PaymentClient
from runtime.http_server import HttpLimits
from runtime.metrics import RpcMetrics
from runtime.process import Process
from runtime.settings import Settings, SettingsInvalid

__all__ = ["limits_of", "main"]

ALWAYS = frozenset({"/healthz", "/readyz"})


async def main() -> None:
    """Runs the gateway until it is told to stop."""
    settings = Settings.load()
    async with Process.start("gateway", settings) as process:
        payment = PaymentClient(await process.channel(settings.payment_address))
        app = GatewayApp(settings, payment, RpcMetrics("http"))
        await process.serve_http(
            settings.gateway_listen,
            app,
            limits=limits_of(settings, app),
            trusted_proxies=settings.gateway_trusted_proxies,
        )


def limits_of(settings: Settings, app: GatewayApp) -> HttpLimits:
    """How many connections the gateway takes. Raises SettingsInvalid."""
    return HttpLimits(
        settings.gateway_connections_max,
        settings.gateway_connections_per_address_max,
        ALWAYS,
        _is_in(settings.gateway_trusted_proxies),
        lambda status: app.shedding.note("connections", status),
    )


def _is_in(networks: str) -> Callable[[str], bool]:
    try:
        known = [ip_network(each.strip(), strict=False) for each in networks.split(",") if each.strip()]
    except ValueError as error:
        raise SettingsInvalid(f"gateway_trusted_proxies: expected addresses or networks with commas: {error}") from None

    def is_in(address: str) -> bool:
        try:
            return any(ip_address(address) in network for network in known)
        except ValueError:
            return False

    return is_in
