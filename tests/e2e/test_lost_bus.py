"""Risk: what the bus alone had is lost with it: credits never come, orders are never sent to their PSP."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest
import redis.asyncio

from ops.__main__ import main as ducat_command
from ops.demo import order_state, pay_checkout, payment_if_done, play_buyer, post_event, run_checkout, wait_for
from ops.platform import Platform
from tests.e2e.checkouts import checkout, is_published

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.timeout(240)
async def test_a_flushed_bus_costs_seconds_not_money(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wallet stands still while orders are paid, then the ledger, then the executor while one is posted; each time the bus forgets
    everything."""
    restarts = {name: process.restart_count for name, process in platform.processes.items()}
    async with (
        redis.asyncio.Redis.from_url(platform.redis_url) as broker,
        platform.http_session() as http,
        platform.client() as client,
    ):
        await pay_checkout(platform, http, client, checkout(1), log=print)  # everything has been used once
        for victim in ("wallet", "ledger", "executor"):
            first, body = checkout(1), checkout(3)
            pid = platform.processes[victim].pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                # A reader that waits still gets what comes first; what comes then is the bus's alone.
                await post_event(http, platform, first)
                await is_published(platform)
                checkout_id, _ = await post_event(http, platform, body)
                if victim != "executor":
                    await play_buyer(http, client, checkout_id)
                    payment = await wait_for(lambda: payment_if_done(client, checkout_id), "the payment")  # noqa: B023
                    assert {order_state(order.state) for order in payment.payment_orders} == {"SUCCESS"}
                await is_published(platform)
                await broker.flushall()
            finally:
                os.kill(pid, signal.SIGCONT)
            begin_s = asyncio.get_running_loop().time()
            # The same event again is the same payment: pays what is unpaid, and waits for wallets and ledger.
            payment = await pay_checkout(platform, http, client, body, log=print)
            await pay_checkout(platform, http, client, first, log=print)
            print(f"{victim}: healed {asyncio.get_running_loop().time() - begin_s:.1f} s after its SIGCONT")
            assert [order_state(order.state) for order in payment.payment_orders] == ["SUCCESS"] * 3
    outcome = await run_checkout(platform, checkout(1), log=print, pay_out=False)
    assert all(outcome.invariants().values()), outcome.as_json()
    for name in ("payment", "executor", "wallet", "ledger"):
        monkeypatch.setenv(f"DUCAT_{name.upper()}_ADDRESS", platform.grpc_address(name))
    capsys.readouterr()
    async with asyncio.timeout(60):
        while True:
            code = await asyncio.to_thread(ducat_command, ["feed", "--json"])
            rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"process"')]
            assert code == 0
            if not any(row["lag"] for row in rows):
                break
            await asyncio.sleep(1)
    assert {(row["topic"], row["consumer"]) for row in rows} == {
        ("payment.commands", "executor"),
        ("payment.events", "ledger"),
        ("payment.events", "wallet"),
        ("executor.events", "payment"),
        ("wallet.events", "payment"),
    }
    assert await asyncio.to_thread(ducat_command, ["feed", "missing"]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert await asyncio.to_thread(ducat_command, ["feed", "accept", "--topic", "payment.events"]) == 1
    assert "no consumer has a problem" in capsys.readouterr().err
    assert {name: process.restart_count for name, process in platform.processes.items()} == restarts
