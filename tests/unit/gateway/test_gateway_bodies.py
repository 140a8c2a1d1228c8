"""Risk: bodies that never end take the room of those that do: a stranger's webhooks shed a shop's payments, and other PSPs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway.adapters.app import GatewayApp
from gateway.adapters.exchange import BODIES_BYTES_MAX, BODIES_BYTES_PER_ADDRESS_MAX, HttpProblem, Request
from runtime.settings import Settings

PIECE = b"x" * 262_144


def request(address: str, *pieces: bytes, ends: bool = True) -> Request:
    """One whose body comes in ``pieces``; the last one is the end only where it ``ends``."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if ends:
        messages[-1]["more_body"] = False
    coming = iter(messages)

    async def receive() -> Any:
        for message in coming:
            return message
        return await asyncio.Future()

    return Request("/", "", {}, {"client": (address, 1)}, receive)


@asynccontextmanager
async def half_sent(app: GatewayApp, address: str, bytes_wanted: int) -> AsyncIterator[None]:
    """So many bytes of webhooks that do not end, from one address."""
    reads = [
        asyncio.create_task(app._read_body(request(address, PIECE, ends=False), "webhooks"))
        for _ in range(bytes_wanted // len(PIECE))
    ]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


async def test_half_sent_bodies_shed_only_their_own_address_and_their_own_kind() -> None:
    app = GatewayApp(Settings.load(environ={}), None)  # type: ignore[arg-type]
    honest = (b"{", b"}")
    async with half_sent(app, "203.0.113.1", BODIES_BYTES_PER_ADDRESS_MAX):
        with pytest.raises(HttpProblem) as caught:
            await app._read_body(request("203.0.113.1", *honest), "webhooks")
        assert caught.value.status == 429
        assert await app._read_body(request("203.0.113.2", *honest), "webhooks") == b"{}"
    async with AsyncExitStack() as stack:
        for host in range(BODIES_BYTES_MAX // BODIES_BYTES_PER_ADDRESS_MAX):
            await stack.enter_async_context(half_sent(app, f"203.0.113.{host}", BODIES_BYTES_PER_ADDRESS_MAX))
        with pytest.raises(HttpProblem) as caught:
            await app._read_body(request("203.0.113.99", *honest), "webhooks")
        assert caught.value.status == 503
        assert await app._read_body(request("203.0.113.1", *honest), "api") == b"{}"
    assert await app._read_body(request("203.0.113.1", *honest), "webhooks") == b"{}"
    assert not app._bodies["webhooks"]._held_by_address
