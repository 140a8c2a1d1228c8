"""Risk: a PostgreSQL, a Valkey or a bus that stalls, refuses or goes away stops the shards, or makes callers hang."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import grpc
import grpc.aio
import pytest

from ducat.wallet.v1 import shard_pb2, wallet_pb2
from kernel.ids import account_id, uuid7
from runtime.bus import open_bus
from runtime.embedded import EmbeddedValkey
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.integration.wallet_service.test_wallet_process import CLEARING, SELLER, now, open_accounts, until
from tests.unit.wallet_core.service.test_bus_flows import captured

ANSWER_S = 8.0
"""Above what any answer may take, on a busy machine too; a stall of a store lasts until the test ends it."""


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    """One that the test may stop."""
    with tempfile.TemporaryDirectory(prefix="ducat-v-") as folder:
        server = EmbeddedValkey(Path(folder) / "valkey")
        server.start()
        yield server
        if server.pid is not None:
            os.kill(server.pid, signal.SIGCONT)
        server.stop()


class Load:
    """Transfers one after the other, as long as the block lasts; each must be answered OK, and soon."""

    def __init__(self, wallet: WalletProcess) -> None:
        self._wallet = wallet
        self.count = 0
        self.slowest_s = 0.0

    async def pay(self) -> wallet_pb2.CreateTransfersResponse:
        self.count += 1
        row = wallet_pb2.Transfer(
            transfer_id=uuid7(now() // 10**6, self.count.to_bytes(10, "big")),
            debit_account_id=account_id(CLEARING),
            credit_account_id=account_id(SELLER),
            amount_minor=1,
        )
        begin = time.monotonic()
        done = await self._wallet.wallet.CreateTransfers(
            wallet_pb2.CreateTransfersRequest(transfers=[row]), timeout=ANSWER_S
        )
        self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
        assert list(done.results) == [wallet_pb2.TRANSFER_RESULT_OK]
        return done

    async def _run(self) -> None:
        while not self._is_over:
            await self.pay()
            await asyncio.sleep(0.005)

    async def __aenter__(self) -> Load:
        self._is_over = False
        self._task = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._is_over = True  # the last one is answered, so that all that were counted are there
        await self._task


async def shards(wallet: WalletProcess) -> list[shard_pb2.Shard]:
    answer = await wallet.shards.ListShards(shard_pb2.ListShardsRequest(), timeout=ANSWER_S)
    return list(answer.shards)


async def problem_is(wallet: WalletProcess, *words: str) -> None:
    """Waits until a shard reports a problem with all of these words, while all of them serve."""
    async with asyncio.timeout(30):
        while True:
            found = await shards(wallet)
            assert {one.state for one in found} == {shard_pb2.SHARD_STATE_SERVING}
            if any(all(word in one.read_model_problem for word in words) for one in found):
                return
            await asyncio.sleep(0.05)


async def follows(wallet: WalletProcess) -> None:
    """Waits until the read model has everything, and no problem."""
    async with asyncio.timeout(60):
        while True:
            found = await shards(wallet)
            if all(
                not one.read_model_problem and one.projected_sequence_number == one.durable_sequence_number
                for one in found
            ):
                return
            await asyncio.sleep(0.05)


async def live_balance(wallet: WalletProcess) -> int:
    """By id, so that the name has to be looked up."""
    request = wallet_pb2.GetBalanceRequest(account_id=account_id(SELLER))
    return (await wallet.wallet.GetBalance(request, timeout=ANSWER_S)).account.balance_minor


async def listed(wallet: WalletProcess, done: wallet_pb2.CreateTransfersResponse) -> int:
    request = wallet_pb2.ListAccountTransfersRequest(name=SELLER, page_size=1000, at_least=done.positions)
    return len((await wallet.wallet.ListAccountTransfers(request, timeout=ANSWER_S)).transfers)


async def listed_or_none(wallet: WalletProcess) -> int | None:
    """None while the read model is refused because it did not answer a moment ago."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        return await listed(wallet, wallet_pb2.CreateTransfersResponse())
    return None


async def test_a_valkey_that_is_away_or_stalls_stops_nothing(
    start_wallet: StartWallet, own_valkey: EmbeddedValkey
) -> None:
    url = own_valkey.tcp_url
    own_valkey.stop()
    wallet = await start_wallet(redis_url=url, redis_timeout_ms=150, log_level="error")
    await open_accounts(wallet, CLEARING, may_overdraw=True)
    await open_accounts(wallet, SELLER)
    load = Load(wallet)
    done = await load.pay()
    await problem_is(wallet, "Valkey", "ConnectionError")
    assert await live_balance(wallet) == 1
    assert await listed(wallet, done) == 1  # statements are PostgreSQL's alone

    own_valkey.start()
    await follows(wallet)
    assert own_valkey.pid is not None
    async with load:
        os.kill(own_valkey.pid, signal.SIGSTOP)
        await problem_is(wallet, "Valkey", "TimeoutError")
    done = await load.pay()
    assert await live_balance(wallet) == load.count
    assert await listed(wallet, done) == load.count
    os.kill(own_valkey.pid, signal.SIGCONT)
    await follows(wallet)

    bus = await open_bus("valkey", redis_url=url, name="test")
    await bus.publish([captured("ORD-1", time_ns=now(), seller_account="SELL-1", amount=100)])
    await bus.close()
    await until(wallet, SELLER, (load.count + 100, 0))
    assert await wallet.stop() == 0


async def test_a_postgresql_that_cuts_refuses_or_locks_stops_nothing(
    start_wallet: StartWallet, postgres_dsn: str
) -> None:
    wallet = await start_wallet(log_level="error")
    await open_accounts(wallet, CLEARING, may_overdraw=True)
    await open_accounts(wallet, SELLER)
    operator = await asyncpg.connect(postgres_dsn)
    load = Load(wallet)
    async with load:
        for _ in range(20):
            await operator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await live_balance(wallet)
            await asyncio.sleep(0.05)
    assert await live_balance(wallet) == load.count
    await follows(wallet)
    assert await listed(wallet, await load.pay()) == load.count

    await operator.execute("ALTER TABLE wallet.transfer RENAME TO gone")
    done = await load.pay()
    await problem_is(wallet, "PostgreSQL", "UndefinedTableError")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await listed(wallet, done)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await live_balance(wallet) == load.count
    await operator.execute("ALTER TABLE wallet.gone RENAME TO transfer")
    await follows(wallet)

    async with operator.transaction():  # as a server that has stopped: every statement waits
        await operator.execute("LOCK TABLE wallet.transfer, wallet.account_name, wallet.projection")
        async with load:
            for _ in range(3):
                assert await live_balance(wallet) > 0
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await wallet.wallet.ListAccountTransfers(
                    wallet_pb2.ListAccountTransfersRequest(name=SELLER), timeout=ANSWER_S
                )
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    await operator.close()
    await follows(wallet)
    async with asyncio.timeout(10):
        while (found := await listed_or_none(wallet)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert found == min(load.count, 1000)
    assert await wallet.stop() == 0
