"""Risk: a process dies at the wrong moment, or what only one copy holds is lost: an order is lost, or paid twice.

Each process and each server is killed; the bus is emptied or forgets, a shard's folder is gone, connections are cut, Valkey stalls: each
while checkouts are under way. At the end every order is SUCCESS, every seller has what was paid to it, once, and wallet and ledger agree.
`DUCAT_TEST_FAULT_CHECKOUTS` (before each fault) and `DUCAT_TEST_STALL_S` make the long form: 30 and 30 for a release.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio
import redis.exceptions

from ducat.payment.v1 import payment_pb2
from ops.demo import run_checkout
from ops.platform import Platform
from tests.e2e.checkouts import assert_paid_once, checkout, pay_stubbornly

CHECKOUTS_BEFORE_A_FAULT = int(os.environ.get("DUCAT_TEST_FAULT_CHECKOUTS", "3"))
STALL_S = float(os.environ.get("DUCAT_TEST_STALL_S", "3"))
SEED = int(os.environ.get("DUCAT_TEST_SEED", "20261122"))
BUYERS = 4
BUYER_PAUSE_S = 0.2
VICTIMS = ("payment", "executor", "wallet", "ledger", "gateway", "sandbox", "valkey", "postgres")
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


Fault = Callable[[Platform], Awaitable[None]]

FAULTS: tuple[Fault, ...] = (
    flush_the_bus,
    restart_the_bus_empty,
    forget_the_last_second,
    take_a_shard_away,
    cut_the_connections,
    stall_valkey,
)


def killing(victim: str) -> Fault:
    """SIGKILL, as a crash would."""

    async def kill(platform: Platform) -> None:
        await asyncio.sleep(dice.random() * 0.3)
        platform.kill(victim)

    dice = random.Random(f"{SEED} {victim}")
    kill.__name__ = f"kill_{victim}"
    return kill


@pytest.mark.timeout(1800)
async def test_faults_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    platform = Platform(tmp_path, free_ports=True, log=print)
    await platform.start()
    try:
        payments: list[payment_pb2.Payment] = []
        paid, is_over = asyncio.Condition(), False

        async def buyer() -> None:
            while not is_over:
                payment = await pay_stubbornly(platform, checkout(2, currencies=("USD", "EUR"), sellers=10))
                async with paid:
                    payments.append(payment)
                    paid.notify_all()
                await asyncio.sleep(BUYER_PAUSE_S)

        async def pass_checkouts() -> None:
            async with paid:
                enough = len(payments) + CHECKOUTS_BEFORE_A_FAULT
                await paid.wait_for(lambda: len(payments) >= enough)

        async with asyncio.TaskGroup() as buyers:
            for _ in range(BUYERS):
                buyers.create_task(buyer())
            for fault in (*map(killing, VICTIMS), *FAULTS):
                await pass_checkouts()
                print(f"{fault.__name__} after {len(payments)} checkouts (seed {SEED})")
                await fault(platform)
            await pass_checkouts()
            is_over = True
        final = await run_checkout(platform, checkout(1, sellers=1, currencies=("JPY",)), log=print, pay_out=False)
        assert_paid_once(payments, final)
        restarted = {name for name, process in platform.processes.items() if process.restart_count}
        assert restarted >= set(VICTIMS) - {"valkey", "postgres"}
    finally:
        await platform.stop()
