"""Risk: a process that dies at the wrong moment loses an order, or pays it twice."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from ops.demo import Outcome, order_state, run_checkout
from ops.platform import Platform
from tests.e2e.checkouts import checkout

CHECKOUT_COUNT = int(os.environ.get("DUCAT_TEST_KILL_CHECKOUTS", "48"))
AT_ONCE = 8
VICTIMS = ("payment", "executor", "wallet", "ledger", "gateway", "sandbox", "valkey", "postgres")


@pytest.mark.timeout(600)
async def test_each_process_killed_during_a_run_loses_and_doubles_nothing(tmp_path: Path) -> None:
    platform = Platform(tmp_path, free_ports=True, log=print)
    seed = int(os.environ.get("DUCAT_TEST_SEED", "20261122"))
    dice = random.Random(seed)
    await platform.start()
    try:
        gate = asyncio.Semaphore(AT_ONCE)
        done = 0
        reached = [asyncio.Event() for _ in VICTIMS]

        async def one(number: int) -> Outcome:
            nonlocal done
            body = checkout(2, currencies=("USD", "EUR"), sellers=10)
            async with gate:
                outcome = await stubborn_checkout(platform, body)
            done += 1
            for turn, event in enumerate(reached):
                if done >= CHECKOUT_COUNT * (turn + 1) // (len(VICTIMS) + 1):
                    event.set()
            return outcome

        async def killer() -> None:
            for turn, victim in enumerate(VICTIMS):
                await reached[turn].wait()
                await asyncio.sleep(dice.random() * 0.3)
                print(f"killing {victim} after {done} checkouts (seed {seed})")
                platform.kill(victim)

        kills = asyncio.create_task(killer())
        outcomes = await asyncio.gather(*(one(number) for number in range(CHECKOUT_COUNT)))
        await kills
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
        restarted = {name for name, process in platform.processes.items() if process.restart_count}
        assert restarted >= set(VICTIMS) - {"valkey", "postgres"}
    finally:
        await platform.stop()


async def stubborn_checkout(platform: Platform, body: bytes) -> Outcome:
    """What a careful client does while processes die under it: the same request again, with the same ids."""
    deadline = asyncio.get_running_loop().time() + 90
    while True:
        try:
            return await run_checkout(platform, body, log=lambda line: None, pay_out=False)
        except Exception as error:
            if asyncio.get_running_loop().time() > deadline:
                raise
            print(f"again after {type(error).__name__}: {error}")
            await asyncio.sleep(0.2)
