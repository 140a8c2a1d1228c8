"""A real wallet process over a real PostgreSQL and a real Valkey."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import pytest

from ducat.event.v1 import feed_pb2_grpc
from ducat.wallet.v1 import wallet_service_pb2_grpc
from runtime import outbox
from runtime.bus import Bus, Message, open_bus
from runtime.feed import FeedServicer
from runtime.outbox import OutboxRelay
from runtime.postgres import Pool, create_pool, transaction
from tests import prefork

START_S = 30.0
StartWallet = Callable[..., Awaitable["WalletProcess"]]


@dataclass
class WalletProcess:
    """`python -m wallet_core` on a free port."""

    env: dict[str, str]
    process: prefork.ForkedProcess
    address: str
    channel: grpc.aio.Channel
    log: list[str] = field(default_factory=list)

    @property
    def wallet(self) -> wallet_service_pb2_grpc.WalletServiceAsyncStub:
        return wallet_service_pb2_grpc.WalletServiceStub(self.channel)  # type: ignore[return-value]

    @property
    def shards(self) -> wallet_service_pb2_grpc.ShardServiceAsyncStub:
        return wallet_service_pb2_grpc.ShardServiceStub(self.channel)  # type: ignore[return-value]

    async def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        await self.process.wait()
        await self.channel.close()

    async def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        await self.channel.close()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            return await self.process.wait()


@pytest.fixture
async def start_wallet(tmp_path: Path, postgres_dsn: str, valkey_url: str) -> AsyncIterator[StartWallet]:
    """Starts wallet processes on one data folder; stops what is left."""
    started: list[WalletProcess] = []
    processes: list[prefork.ForkedProcess] = []

    async def start(**settings: object) -> WalletProcess:
        env = {
            **os.environ,
            "DUCAT_DATABASE_URL": postgres_dsn,
            "DUCAT_REDIS_URL": valkey_url,
            "DUCAT_DATA_DIR": str(tmp_path),
            "DUCAT_WALLET_LISTEN": "127.0.0.1:0",
            "DUCAT_WALLET_SEGMENT_BYTES": str(1 << 20),
            "DUCAT_WALLET_DISK_RESERVE_BYTES": "0",
            "DUCAT_BUS_CLAIM_IDLE_MS": "200",
            "DUCAT_LOG_LEVEL": "warning",
            **{f"DUCAT_{name.upper()}": str(value) for name, value in settings.items()},
        }
        process = await prefork.start("wallet_core", env=env)
        processes.append(
            process
        )  # before the wait: one that starts too slowly must not go on reading the session's bus
        async with asyncio.timeout(START_S):
            line = (await process.stdout.readline()).decode()
        if not line.startswith("ready wallet "):
            process.kill()
            pytest.fail(f"the wallet did not start: {line!r}")
        address = line.split()[2]
        one = WalletProcess(env, process, address, grpc.aio.insecure_channel(address))
        started.append(one)
        return one

    yield start
    for one in started:
        if one.process.returncode is None:
            await one.kill()
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def valkey_bus(valkey_url: str) -> AsyncIterator[Bus]:
    opened = await open_bus("valkey", redis_url=valkey_url, name="test")
    yield opened
    await opened.close()


@dataclass
class Publisher:
    """The payment service's outbox, feed and relay, without the payment service."""

    address: str
    pool: Pool
    relay: OutboxRelay

    async def say(self, messages: Sequence[Message]) -> None:
        """In one transaction."""
        await transaction(self.pool, lambda connection: outbox.insert(connection, messages, notify=False))
        self.relay.wake()


@pytest.fixture
async def publisher(postgres_dsn: str, valkey_bus: Bus) -> AsyncIterator[Publisher]:
    """Give its address to a wallet as `payment_address`."""
    pool = await create_pool(postgres_dsn, "payment", max_size=4)
    relay = OutboxRelay(pool, "payment", valkey_bus)
    running = asyncio.create_task(relay.run())
    server = grpc.aio.server()
    feed_pb2_grpc.add_FeedServiceServicer_to_server(FeedServicer(pool, grace_s=0.5), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Publisher(f"127.0.0.1:{port}", pool, relay)
    await server.stop(None)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()
