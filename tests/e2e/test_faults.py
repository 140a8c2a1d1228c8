"""Risk: what only one copy holds is lost: the bus is emptied or forgets, a shard's folder is gone, connections are cut, Valkey stalls.

Each fault comes while checkouts are under way. At the end every order is SUCCESS, every seller has what was paid to it, once, and wallet
and ledger agree. `DUCAT_TEST_FAULT_CHECKOUTS` and `DUCAT_TEST_STALL_S` make the long form (400 and 30 for a release).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio
import redis.exceptions

from ops.demo import Outcome, order_state
from ops.platform import Platform
from tests.e2e.checkouts import checkout
from tests.e2e.test_kill import stubborn_checkout

CHECKOUT_COUNT = int(os.environ.get("DUCAT_TEST_FAULT_CHECKOUTS", "48"))
STALL_S = float(os.environ.get("DUCAT_TEST_STALL_S", "3"))
AT_ONCE = 6
REFUSALS_SEEN_S = 3.0


async def _answers(platform: Platform) -> None:
    """The Valkey of the fault before is back."""
    deadline = asyncio.get_running_loop().time() + 30
    while True:
        try:
            async with redis.asyncio.Redis.from_url(platform.redis_url) as valkey:
                await valkey.ping()
            return
        except redis.exceptions.ConnectionError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.1)


async def flush_the_bus(platform: Platform) -> None:
    """Everything on the bus is gone while the wallet has not read it."""
    wallet = platform.processes["wallet"].pid
    assert wallet is not None
    os.kill(wallet, signal.SIGSTOP)
    try:
        await asyncio.sleep(1.0)  # orders are paid meanwhile, and their events wait for the wallet
        async with redis.asyncio.Redis.from_url(platform.redis_url) as valkey:
            await valkey.flushall()
    finally:
        os.kill(wallet, signal.SIGCONT)


async def restart_the_bus_empty(platform: Platform) -> None:
    """A Redis without a disk: its process dies, and the next one knows nothing."""
    assert platform.valkey is not None
    shutil.rmtree(platform.data_dir / "valkey" / "data" / "appendonlydir")
    platform.kill("valkey")
    await asyncio.sleep(0.5)
    await _answers(platform)


async def forget_the_last_second(platform: Platform) -> None:
    """A Redis with default settings: what came since its last save is gone after a crash."""
    async with redis.asyncio.Redis.from_url(platform.redis_url) as valkey:
        await valkey.config_set("appendonly", "no")
    await asyncio.sleep(1.0)
    platform.kill("valkey")
    await asyncio.sleep(0.5)
    await _answers(platform)


async def take_a_shard_away(platform: Platform) -> None:
    """A disk is not mounted after a crash: the wallet must not go on without it, and go on when it is back."""
    folder = platform.data_dir / "wallet" / "shard-0000"
    aside = platform.data_dir / "shard-0000-elsewhere"
    wallet = platform.processes["wallet"]
    folder.rename(aside)
    platform.kill("wallet")
    await asyncio.sleep(REFUSALS_SEEN_S)
    assert not wallet.ready.is_set(), "the wallet serves without a shard that it had"
    assert not folder.exists() or not any(folder.rglob("*.seg")), "an empty shard was made in place of the missing one"
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    await platform.wait_ready("wallet")


async def cut_the_connections(platform: Platform) -> None:
    """PostgreSQL ends every connection, again and again."""
    connection = await asyncpg.connect(platform.database_url)
    try:
        for _ in range(8):
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            await asyncio.sleep(0.25)
    finally:
        await connection.close()


async def stall_valkey(platform: Platform) -> None:
    """Valkey answers nothing for a while; nobody closes a connection."""
    assert platform.valkey is not None
    pid = platform.valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(STALL_S)
    finally:
        os.kill(pid, signal.SIGCONT)


FAULTS: tuple[Callable[[Platform], Awaitable[None]], ...] = (
    flush_the_bus,
    restart_the_bus_empty,
    forget_the_last_second,
    take_a_shard_away,
    cut_the_connections,
    stall_valkey,
)


@pytest.mark.timeout(900)
async def test_faults_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    platform = Platform(tmp_path, free_ports=True, log=print)
    await platform.start()
    try:
        gate = asyncio.Semaphore(AT_ONCE)
        reached = [asyncio.Event() for _ in FAULTS]
        done = 0

        async def one() -> Outcome:
            nonlocal done
            async with gate:
                outcome = await stubborn_checkout(platform, checkout(2, currencies=("USD", "EUR"), sellers=10))
            done += 1
            for turn, event in enumerate(reached):
                if done >= CHECKOUT_COUNT * (turn + 1) // (len(FAULTS) + 2):
                    event.set()
            return outcome

        async def cause_faults() -> None:
            for fault, event in zip(FAULTS, reached, strict=True):
                await event.wait()
                print(f"{fault.__name__} after {done} checkouts")
                await fault(platform)

        faults = asyncio.create_task(cause_faults())
        outcomes = await asyncio.gather(*(one() for _ in range(CHECKOUT_COUNT)))
        await faults
        states = [order_state(order.state) for outcome in outcomes for order in outcome.payment.payment_orders]
        assert states == ["SUCCESS"] * (2 * CHECKOUT_COUNT)
        final = await stubborn_checkout(platform, checkout(1, sellers=1, currencies=("JPY",)))
        assert all(final.invariants().values()), final.as_json()
        paid: dict[str, int] = {}
        for outcome in outcomes:
            for order in outcome.payment.payment_orders:
                name = f"seller/{order.seller_account}/{order.amount.currency_code}"
                paid[name] = paid.get(name, 0) + order.amount.amount_minor
        wallets = final.as_json()["wallets"]
        assert {name: wallets[name] for name in paid} == paid
    finally:
        await platform.stop()
