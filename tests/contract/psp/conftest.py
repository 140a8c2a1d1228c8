from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from executor.psp.base import PspAdapter
from executor.psp.sandbox import SandboxPsp
from tests.contract.psp.sandbox_server import Gateway, RunningSandbox, Server


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[Gateway, str]]:
    gateway = Gateway()
    server = Server(gateway)
    await server.start()
    yield gateway, server.url
    await server.kill()


@pytest.fixture
async def sandbox(tmp_path: Path, gateway: tuple[Gateway, str]) -> AsyncIterator[RunningSandbox]:
    running = RunningSandbox(tmp_path, gateway[1])
    await running.start()
    yield running
    await running.kill()


@pytest.fixture
async def psp(sandbox: RunningSandbox) -> AsyncIterator[PspAdapter]:
    adapter = SandboxPsp(sandbox.config())
    yield adapter
    await adapter.close()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session
