"""Risk: a gateway that does not start, does not stop, or loses a call while it stops."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[3]


async def start(**settings: str) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DUCAT_")}
    environment |= {f"DUCAT_{name.upper()}": value for name, value in settings.items()}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE
    )


async def test_it_serves_without_the_payment_service_and_stops_on_a_signal() -> None:
    process = await start(gateway_listen="127.0.0.1:0", payment_address="127.0.0.1:1")
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            ready = (await process.stdout.readline()).decode().split()
        assert ready[:2] == ["ready", "gateway"]
        async with aiohttp.ClientSession(f"http://{ready[2]}") as http:
            assert (await http.get("/healthz")).status == 200
            assert (await http.get("/readyz")).status == 503
            assert (await http.post("/webhooks/sandbox", data=b"{}")).status == 503
            process.terminate()
            async with asyncio.timeout(60):
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_it_refuses_to_listen_to_the_world_unprotected() -> None:
    process = await start(gateway_listen="0.0.0.0:0")
    try:
        async with asyncio.timeout(60):
            assert await process.wait() == 2
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
