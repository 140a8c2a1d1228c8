"""Risk: money that crosses from one wallet process to another is lost, doubled, or stuck when one of them
dies."""

from __future__ import annotations

import asyncio

import pytest

from ducat.batch import transfer_batches, transfer_ids
from ducat.wallet.v1 import shard_pb2, wallet_pb2
from kernel.ids import account_id
from ops.platform import free_port
from runtime.bus import Bus
from runtime.settings import SettingsInvalid
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.integration.wallet_service.test_wallet_process import now, open_accounts, until
from tests.unit.wallet_core.service.test_bus_flows import captured, requested
from wallet_core.bootstrap import _peers, host_config
from wallet_core.service.port import slot_of

NAMES = {
    shard: next(f"seller/N{n}/USD" for n in range(10**6) if slot_of(account_id(f"seller/N{n}/USD")) // 2048 == shard)
    for shard in (0, 1)
}


class Pair:
    """Shard 0 and shard 1, each in a process of its own."""

    def __init__(self, start: StartWallet) -> None:
        self._start = start
        self._ports = (free_port(), free_port())
        self.processes: list[WalletProcess] = []

    async def start(self, shard: int) -> WalletProcess:
        process = await self._start(
            wallet_shard_count=2,
            wallet_shards=shard,
            wallet_listen=f"127.0.0.1:{self._ports[shard]}",
            wallet_peers=f"{1 - shard}=127.0.0.1:{self._ports[1 - shard]}",
        )
        self.processes[shard : shard + 1] = [process]
        return process


async def balance(wallet: WalletProcess, name: str) -> int:
    answer = await wallet.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name))
    return answer.account.balance_minor


def batches(rows: int, settle: int, first: int) -> list[wallet_pb2.TransferBatch]:
    return list(
        transfer_batches(
            transfer_ids(rows),
            account_id(NAMES[0]) * rows,
            account_id(NAMES[1]) * rows,
            [1] * rows,
            settle=settle,  # type: ignore[arg-type]
            first_batch_id=first,
        )
    )


async def test_sagas_settle_between_processes_and_survive_the_death_of_either(start_wallet: StartWallet) -> None:
    pair = Pair(start_wallet)
    one, two = await pair.start(0), await pair.start(1)
    await open_accounts(one, NAMES[0], may_overdraw=True)
    await open_accounts(two, NAMES[1])

    (settled,) = batches(500, wallet_pb2.SETTLE_MODE_SETTLED, 1)
    call = one.wallet.SubmitTransfers()
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=settled))
    result = (await asyncio.wait_for(call.read(), 10)).result
    assert list(result.failed_rows) == []
    assert (await balance(one, NAMES[0]), await balance(two, NAMES[1])) == (-500, 500)

    await two.kill()
    (durable,) = batches(700, wallet_pb2.SETTLE_MODE_DURABLE, 2)
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=durable))
    result = (await asyncio.wait_for(call.read(), 10)).result
    assert set(result.failed_results) == {wallet_pb2.TRANSFER_RESULT_IN_FLIGHT}
    assert await balance(one, NAMES[0]) == -1_200
    await one.kill()
    two = await pair.start(1)
    assert await balance(two, NAMES[1]) == 500
    one = await pair.start(0)
    async with asyncio.timeout(15):
        while await balance(two, NAMES[1]) != 1_200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await balance(one, NAMES[0]) == -1_200

    listed = (await one.shards.ListShards(shard_pb2.ListShardsRequest())).shards
    assert [(shard.shard, shard.first_slot, shard.end_slot) for shard in listed] == [(0, 0, 2048), (1, 2048, 4096)]
    assert len({shard.address for shard in listed}) == 2
    only = (await one.shards.ListShards(shard_pb2.ListShardsRequest(local_only=True))).shards
    assert [shard.shard for shard in only] == [0]
    assert [a.name for a in (await one.wallet.ListAccounts(wallet_pb2.ListAccountsRequest())).accounts] == [NAMES[0]]


async def test_a_refused_credit_comes_back_across_processes(start_wallet: StartWallet) -> None:
    pair = Pair(start_wallet)
    one, two = await pair.start(0), await pair.start(1)
    await open_accounts(one, NAMES[0], may_overdraw=True)
    await open_accounts(two, NAMES[1], frozen=True)
    (settled,) = batches(3, wallet_pb2.SETTLE_MODE_SETTLED, 1)
    call = one.wallet.SubmitTransfers()
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=settled))
    result = (await asyncio.wait_for(call.read(), 10)).result
    assert set(result.failed_results) == {wallet_pb2.TRANSFER_RESULT_CREDIT_ACCOUNT_FROZEN}
    assert (await balance(one, NAMES[0]), await balance(two, NAMES[1])) == (0, 0)


async def test_every_event_of_the_bus_is_applied_by_exactly_one_process(
    start_wallet: StartWallet, valkey_bus: Bus
) -> None:
    pair = Pair(start_wallet)
    processes = [await pair.start(0), await pair.start(1)]
    sellers = [name.split("/")[1] for name in NAMES.values()]
    messages = [
        captured(f"ORD-{number}", time_ns=now(), seller_account=sellers[number % 2], amount=10) for number in range(60)
    ]
    await valkey_bus.publish(messages)
    await valkey_bus.publish([requested(f"PO-{s}", time_ns=now(), seller_account=s, amount=100) for s in sellers])
    for shard, process in enumerate(processes):
        await until(process, NAMES[shard], (300, 100))
    clearing = [await balance(process, "psp/sandbox/clearing/USD") for process in processes]
    assert clearing == [-300, -300]


@pytest.mark.parametrize(
    ("shards", "peers", "problem"),
    [
        ("0", "", "nobody owns shard 1"),
        ("0", "0-1=localhost:1", "shard 0 is this process's own"),
        ("0", "1=localhost:1 1=localhost:2", "shard 1 is named twice"),
        ("0", "1", "expected SHARDS=HOST:PORT"),
        ("0", "7=localhost:1", "beyond wallet_shard_count"),
        ("0-x", "", "expected numbers and ranges"),
    ],
)
def test_a_shard_map_with_holes_is_refused_at_the_start(shards: str, peers: str, problem: str) -> None:
    from runtime.settings import Settings

    settings = Settings.load({"wallet_shards": shards, "wallet_peers": peers}, environ={})
    with pytest.raises(SettingsInvalid, match=problem):
        _peers(settings, host_config(settings))
