"""Risk: the operator's command shows something else than the shards hold."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from ducat.wallet.v1 import wallet_pb2
from ducat.wallet.v1.wallet_service_pb2_grpc import (
    add_ShardServiceServicer_to_server,
    add_WalletServiceServicer_to_server,
)
from kernel.clock import SystemClock
from kernel.errors import InvalidArgument, NotFound
from kernel.ids import account_id, uuid7
from ops.__main__ import COMMANDS
from ops.wallet import add_parser
from runtime.grpc_server import GrpcServer
from runtime.settings import Settings
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.integration.wallet_service.test_wallet_process import CLEARING, SELLER, now, open_accounts
from wallet_core.adapters.alone import NoDirectory, NoReadModel
from wallet_core.adapters.archive import FileArchive
from wallet_core.adapters.grpc import SCOPES, ShardServicer, WalletServicer
from wallet_core.service.history import History
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.service.wallet import Wallet
from wallet_core.shard import ShardHostConfig, WalletHost


class Operator:
    """Types commands at a running wallet."""

    def __init__(self, wallet: WalletProcess, capsys: pytest.CaptureFixture[str]) -> None:
        self._wallet = wallet
        self._capsys = capsys

    async def type(self, *words: str) -> str:
        import argparse

        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers(dest="command"))
        args = parser.parse_args(["wallet", *words, "--address", self._wallet.address])
        self._capsys.readouterr()
        code = await asyncio.to_thread(args.run, args)
        assert code == 0
        return self._capsys.readouterr().out

    async def json(self, *words: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (await self.type(*words, "--json")).splitlines()]


async def pay(wallet: WalletProcess, amount: int, label: int, kind: int = 0, pending: bytes = b"") -> bytes:
    transfer = uuid7(now() // 10**6, label.to_bytes(10, "big"))
    debit, credit = (SELLER, CLEARING) if kind else (CLEARING, SELLER)
    row = wallet_pb2.Transfer(
        transfer_id=transfer,
        debit_account_id=account_id(debit),
        credit_account_id=account_id(credit),
        amount_minor=amount,
        kind=kind,  # type: ignore[arg-type]
        pending_id=pending,
    )
    done = await wallet.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=[row]))
    assert list(done.results) == [wallet_pb2.TRANSFER_RESULT_OK]
    return transfer


@pytest.fixture
async def paid(start_wallet: StartWallet, monkeypatch: pytest.MonkeyPatch) -> WalletProcess:
    wallet = await start_wallet()
    for name in ("DUCAT_DATABASE_URL", "DUCAT_REDIS_URL", "DUCAT_DATA_DIR"):
        monkeypatch.setenv(name, wallet.env[name])
    await open_accounts(wallet, CLEARING, may_overdraw=True, striped=True)
    await open_accounts(wallet, SELLER)
    return wallet


async def test_balances_and_history_of_the_past(paid: WalletProcess, capsys: pytest.CaptureFixture[str]) -> None:
    operator = Operator(paid, capsys)
    await pay(paid, 7_500, 1)
    await asyncio.sleep(0.002)
    middle = datetime.fromtimestamp(now() / 10**9, UTC).isoformat()
    await asyncio.sleep(0.002)
    hold = await pay(paid, 3_000, 2, wallet_pb2.TRANSFER_KIND_HOLD)
    await pay(paid, 2_000, 3, wallet_pb2.TRANSFER_KIND_POST, hold)

    (live,) = await operator.json("balance", SELLER)
    assert (live["balance_minor"], live["held_out_minor"], live["available_minor"]) == (5_500, 0, 5_500)
    (by_id,) = await operator.json("balance", account_id(SELLER).hex())
    assert by_id == live
    (then,) = await operator.json("balance", SELLER, "--at", middle)
    assert then["balance_minor"] == 7_500
    history = await operator.json("history", SELLER)
    assert [(row["kind"], row["change_minor"], row["balance_minor"]) for row in history] == [
        ("account_opened", 0, 0),
        ("money_moved", 7_500, 7_500),
        ("hold_placed", 0, 7_500),
        ("hold_posted", -2_000, 5_500),
    ]
    for row in history:
        at = str(row["sequence_number"])
        (past,) = await operator.json("balance", SELLER, "--at", at)
        assert past["balance_minor"] == row["balance_minor"]
    assert (await operator.json("balance", CLEARING))[0]["balance_minor"] == -5_500
    assert (await operator.json("history", CLEARING))[-1]["balance_minor"] == -5_500
    assert "55.00 USD" in await operator.type("balance", SELLER)
    assert "hold_posted" in await operator.type("history", SELLER, "--limit", "1")
    with pytest.raises(NotFound, match="no account seller/NOBODY/USD"):
        await operator.type("balance", "seller/NOBODY/USD")
    with pytest.raises(InvalidArgument, match="--at yesterday: expected a time such as"):
        await operator.type("balance", SELLER, "--at", "yesterday")


async def test_shards_events_snapshot_verify_and_rebuild(
    paid: WalletProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(paid, capsys)
    for label in range(30):
        await pay(paid, 10, label)
    shards = await operator.json("shards")
    assert [shard["state"] for shard in shards] == ["serving", "serving"]
    busy = max(shards, key=lambda shard: int(str(shard["sequence_number"])))
    events = await operator.json("events", "--shard", str(busy["shard"]))
    assert [event["sequence_number"] for event in events] == list(range(1, int(str(busy["durable"])) + 1))
    some = await operator.json("events", "--shard", str(busy["shard"]), "--account", SELLER, "--limit", "3")
    assert len(some) == 3
    (snapshot,) = await operator.json("snapshot", "--shard", str(busy["shard"]))
    assert snapshot["sequence_number"] == busy["durable"]
    assert await operator.json("snapshots", "--shard", str(busy["shard"])) == [
        {key: value for key, value in snapshot.items() if key != "seconds"}
    ]
    assert [(one["ok"], one["problem"]) for one in await operator.json("verify")] == [(True, ""), (True, "")]
    assert "every digest agrees" in await operator.type("verify")
    assert (await operator.json("rebuild"))[-1]["done"] is True
    assert [shard["lag"] for shard in await operator.json("shards")] == [0, 0]
    positions = [
        wallet_pb2.ShardPosition(shard=int(str(shard["shard"])), sequence_number=int(str(shard["durable"])))
        for shard in shards
    ]
    page = await paid.wallet.ListAccountTransfers(
        wallet_pb2.ListAccountTransfersRequest(name=SELLER, at_least=positions)
    )
    assert len(page.transfers) == 30
    table = await operator.type("shards")
    assert table.splitlines()[0].split()[:2] == ["shard", "state"]


async def test_history_begins_with_the_oldest_state_that_can_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retention keeps whole segments, so the oldest event that the log has is older than the oldest snapshot."""
    config = ShardHostConfig(tmp_path, segment_bytes=65536, reserve_bytes=0)
    host = await WalletHost.open(config)
    debit, credit, total = account_id(CLEARING), account_id(SELLER), 0
    assert set(await host.create_accounts([AccountRow(debit, "USD", 4), AccountRow(credit, "USD")])) == {1}
    history, wallet = History(host, FileArchive(config), SystemClock()), Wallet(host, NoDirectory(), NoReadModel())
    for _ in range(3):
        for _ in range(7):
            ids = [uuid7(now() // 10**6, number.to_bytes(10, "big")) for number in range(total, total + 300)]
            assert set(await host.transfers([TransferRow(one, debit, credit, 1) for one in ids])) == {1}
            total += 300
        await host.snapshot(0)
    assert 1 < host.first_sequence(0) < host.snapshots(0)[-1].sequence
    servicer = WalletServicer(host, wallet, history)
    services = [
        (servicer, add_WalletServiceServicer_to_server, "ducat.wallet.v1.WalletService"),
        (
            ShardServicer(host, wallet, history, lambda: "here"),
            add_ShardServiceServicer_to_server,
            "ducat.wallet.v1.ShardService",
        ),
    ]
    server = GrpcServer(Settings(), services, SCOPES, servicer.raw_handlers())
    served = SimpleNamespace(address=await server.start("127.0.0.1:0"))
    found = await Operator(served, capsys).json("history", credit.hex(), "--limit", "0")  # type: ignore[arg-type]
    await server.stop(0)
    await host.close()
    assert 2_100 <= len(found) < total
    assert [row["balance_minor"] for row in found] == list(range(total - len(found) + 1, total + 1))


def test_the_command_is_wired() -> None:
    assert "wallet" in COMMANDS
