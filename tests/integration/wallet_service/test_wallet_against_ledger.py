"""Risk: wallet and ledger differ and nobody is told; or an operator is woken for events that are only under way."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from ducat.ledger.v1 import ledger_pb2, ledger_pb2_grpc
from ducat.wallet.v1 import shard_pb2, wallet_pb2
from kernel.ids import account_id, uuid7
from ops import check
from runtime.bus import Bus, Message
from tests import prefork
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.integration.wallet_service.test_two_processes import NAMES, OTHER, Pair
from tests.integration.wallet_service.test_wallet_process import CLEARING, now, until
from tests.unit.wallet_core.service.test_bus_flows import captured

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class LedgerProcess:
    """`python -m ledger` on a free port."""

    address: str
    ledger: Any
    log: list[dict[str, Any]]

    async def compare(self, name_prefix: str = "") -> ledger_pb2.CompareWalletResponse:
        request = ledger_pb2.CompareWalletRequest(name_prefix=name_prefix)
        answer: ledger_pb2.CompareWalletResponse = await self.ledger.CompareWallet(request, timeout=60)
        return answer


@asynccontextmanager
async def ledger_process(postgres_dsn: str, valkey_url: str, wallet_address: str) -> AsyncIterator[LedgerProcess]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DUCAT_")},
        "DUCAT_DATABASE_URL": postgres_dsn,
        "DUCAT_REDIS_URL": valkey_url,
        "DUCAT_LEDGER_LISTEN": "127.0.0.1:0",
        "DUCAT_WALLET_ADDRESS": wallet_address,
        "DUCAT_LEDGER_COMPARE_INTERVAL_S": "0.2",
        "DUCAT_LEDGER_COMPARE_CONFIRM_S": "0.5",
        "DUCAT_LEDGER_COMPARE_GRACE_S": "5",
    }
    process = await prefork.start("ledger", env=environment, keep_stderr=True)
    assert process.stderr is not None
    log: list[dict[str, Any]] = []

    async def read_log(stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            log.append(json.loads(line))

    reader = asyncio.ensure_future(read_log(process.stderr))
    try:
        async with asyncio.timeout(60):
            address = (await process.stdout.readline()).decode().split()[2]
        async with grpc.aio.insecure_channel(address) as channel:
            yield LedgerProcess(address, ledger_pb2_grpc.LedgerServiceStub(channel), log)
    finally:
        process.terminate()
        async with asyncio.timeout(60):
            await process.wait()
        await reader


class Payments:
    """Publishes captures as payment's relay does: each with its place in the feed."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.count = 0

    async def pay(self, *sellers: str, amount: int = 100) -> None:
        messages: list[Message] = []
        for seller in sellers:
            self.count += 1
            one = captured(f"ORD-{self.count}", amount=amount, seller_account=seller, time_ns=now())
            messages.append(replace(one, key=f"ORD-{self.count}", position=self.count))
        await self._bus.publish(messages)


async def move(wallet: WalletProcess, debit: str, credit: str, amount: int) -> None:
    transfer = wallet_pb2.Transfer(
        transfer_id=uuid7(now() // 10**6, os.urandom(10)),
        debit_account_id=account_id(debit),
        credit_account_id=account_id(credit),
        amount_minor=amount,
    )
    answer = await wallet.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=[transfer]))
    assert list(answer.results) == [wallet_pb2.TRANSFER_RESULT_OK]


async def type_check(*words: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers(dest="command"))
    code: int = await asyncio.to_thread(check.run, parser.parse_args(["check", *words]))
    return code


async def test_two_wallet_processes_and_the_ledger_are_compared_while_they_work(
    start_wallet: StartWallet,
    valkey_bus: Bus,
    postgres_dsn: str,
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = Pair(start_wallet)
    first, _ = await pair.start(0), await pair.start(1)
    payments = Payments(valkey_bus)
    sellers = [name.split("/")[1] for name in (NAMES[0], NAMES[1], OTHER)]
    async with ledger_process(postgres_dsn, valkey_url, pair.address(0)) as ledger:

        async def load() -> None:
            while looks < 3:
                await payments.pay(*sellers)
                await asyncio.sleep(0.01)

        looks = 0
        loading = asyncio.ensure_future(load())
        async with asyncio.timeout(60):
            while looks < 3:
                found = await ledger.compare()
                assert list(found.differences) == []
                looks += found.complete
        await loading
        await until(pair.processes[1], OTHER, (payments.count // 3 * 100, 0))
        found = await ledger.compare()
        assert (found.ok, found.account_count, found.under_way_count) == (True, 4, 0)
        assert {one.process: one.last_position for one in found.progress} == {
            "ledger": payments.count,
            pair.address(0): payments.count,
            pair.address(1): payments.count,
        }

        for name, value in {
            "WALLET_ADDRESS": pair.address(0),
            "LEDGER_ADDRESS": ledger.address,
            "PAYMENT_ADDRESS": "127.0.0.1:1",
            "EXECUTOR_ADDRESS": "127.0.0.1:1",
        }.items():
            monkeypatch.setenv(f"DUCAT_{name}", value)
        await move(first, NAMES[0], OTHER, 77)  # which no event asked for
        found = await ledger.compare()
        assert [(one.account_name, one.difference_minor) for one in found.differences] == sorted(
            [(NAMES[0], -77), (OTHER, 77)]
        )
        capsys.readouterr()
        assert await type_check("--json", "--wait", "0") == 1
        told = json.loads(capsys.readouterr().out)
        assert (told["ok"], told["verdict"]) == (False, "differs")
        assert told["checks"]["wallet"]["verdict"] == told["checks"]["ledger"]["verdict"] == "ok"
        assert {
            one["account"]: one["difference_minor"] for one in told["checks"]["wallet_against_ledger"]["differences"]
        } == {
            NAMES[0]: -77,
            OTHER: 77,
        }
        lines = [line for line in ledger.log if line.get("level") == "error"]
        assert {(line["account"], line["difference_minor"]) for line in lines} == {(NAMES[0], -77), (OTHER, 77)}

        await move(pair.processes[1], OTHER, NAMES[0], 77)
        assert (await ledger.compare()).ok
        assert await type_check("--wait", "0") == 2  # no payment answers
        shown = capsys.readouterr()
        assert "wallet = ledger  ok       4 accounts agree" in shown.out
        assert "cannot be told" in shown.err

        await pair.processes[1].kill()
        found = await ledger.compare()
        assert (found.ok, found.complete, found.difference_count) == (False, False, 0)
        assert "does not answer" in found.problem


async def test_a_page_is_read_between_two_events(start_wallet: StartWallet, valkey_bus: Bus) -> None:
    """Risk: the balances include an event that is not named beside them, or lack one that is."""
    wallet = await start_wallet()
    payments = Payments(valkey_bus)
    loading = asyncio.ensure_future(payments.pay(*(f"S{number}" for number in range(500)), amount=1))
    request = shard_pb2.ReadBookedBalancesRequest(names=[CLEARING, *(f"seller/S{number}/USD" for number in range(500))])
    applied = 0
    while applied < 500:
        answer = await wallet.shards.ReadBookedBalances(request)
        held = {one.name: one.balance_minor for one in answer.balances}
        applied = sum(one.last_position - one.first_position + 1 for one in answer.applied)
        assert -held.pop(CLEARING, 0) == sum(held.values()) == applied
    await loading
    answer = await wallet.shards.ListAccountNames(
        shard_pb2.ListAccountNamesRequest(name_prefix="seller/S1", page_size=3)
    )
    assert list(answer.names) == ["seller/S1/USD", "seller/S10/USD", "seller/S100/USD"]
