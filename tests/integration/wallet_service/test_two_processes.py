"""Risk: money that crosses from one wallet process to another is lost, doubled, or stuck when one of them
dies."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import redis

from ducat.batch import transfer_batches, transfer_ids
from ducat.wallet.v1 import relay_pb2, shard_pb2, wallet_pb2
from ducat.wallet.v1.relay_pb2_grpc import RelayServiceServicer, RelayServiceStub, add_RelayServiceServicer_to_server
from kernel.ids import account_id
from ops.platform import free_port
from runtime.bus import Message
from runtime.settings import SettingsInvalid
from tests import prefork
from tests.integration.wallet_service.conftest import Publisher, StartWallet, WalletProcess
from tests.integration.wallet_service.test_wallet_process import now, open_accounts, until
from tests.unit.wallet_core.service.test_bus_flows import captured, requested
from wallet_core.bootstrap import _peers, host_config
from wallet_core.service.port import slot_of

OTHER = next(f"seller/N{n}/USD" for n in range(2_000, 10**6) if slot_of(account_id(f"seller/N{n}/USD")) // 2048 == 1)
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

    def address(self, shard: int) -> str:
        return f"127.0.0.1:{self._ports[shard]}"

    async def start(self, shard: int, *, via: str = "", **settings: object) -> WalletProcess:
        process = await self._start(
            **settings,
            wallet_shard_count=2,
            wallet_shards=shard,
            wallet_listen=f"127.0.0.1:{self._ports[shard]}",
            wallet_peers=f"{1 - shard}={via or self.address(1 - shard)}",
        )
        self.processes[shard : shard + 1] = [process]
        return process


class LossyLine(RelayServiceServicer):
    """Stands between two processes and says "taken" to outcomes that it loses."""

    def __init__(self, address: str) -> None:
        self.lose = 0  # so many outcomes
        self.lost: list[relay_pb2.Delivery] = []
        self._channel = grpc.aio.insecure_channel(address)
        self._server = grpc.aio.server()
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        add_RelayServiceServicer_to_server(self, self._server)

    async def Deliver(self, request: relay_pb2.DeliverRequest, context: Any) -> relay_pb2.DeliverResponse:
        kept = []
        for one in request.deliveries:
            if one.kind == relay_pb2.DELIVERY_KIND_OUTCOMES and len(self.lost) < self.lose:
                self.lost.append(one)
            else:
                kept.append(one)
        if kept:
            try:
                await RelayServiceStub(self._channel).Deliver(relay_pb2.DeliverRequest(deliveries=kept), timeout=5)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), "the other end")
        return relay_pb2.DeliverResponse()

    async def __aenter__(self) -> LossyLine:
        await self._server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.stop(0)
        await self._channel.close()


class Submitted:
    """Rows from the account on shard 0 to accounts on shard 1; every second one is for a frozen account."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._ids = transfer_ids(count)
        self._credit_ids = b"".join(account_id((NAMES[1], OTHER)[n % 2]) for n in range(count))

    async def to(self, wallet: WalletProcess, settle: int) -> dict[int, int]:
        """Row → what failed."""
        (batch,) = transfer_batches(
            self._ids,
            account_id(NAMES[0]) * self.count,
            self._credit_ids,
            [10] * self.count,
            settle=settle,  # type: ignore[arg-type]
            first_batch_id=1,
        )
        call = wallet.wallet.SubmitTransfers()
        await call.write(wallet_pb2.SubmitTransfersRequest(batch=batch))
        result = (await asyncio.wait_for(call.read(), 60)).result
        call.cancel()
        return dict(zip(result.failed_rows, result.failed_results, strict=True))


def refused(count: int) -> dict[int, int]:
    return dict.fromkeys(range(1, count, 2), wallet_pb2.TRANSFER_RESULT_CREDIT_ACCOUNT_FROZEN)


async def money(one: WalletProcess, two: WalletProcess) -> tuple[int, int, int]:
    return await balance(one, NAMES[0]), await balance(two, NAMES[1]), await balance(two, OTHER)


async def lost(line: LossyLine, count: int) -> None:
    async with asyncio.timeout(60):
        while len(line.lost) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_outcomes_that_get_lost_neither_keep_nor_misreport_money(start_wallet: StartWallet) -> None:
    pair = Pair(start_wallet)
    async with LossyLine(pair.address(0)) as line:
        one, two = await pair.start(0), await pair.start(1, via=line.address)
        await open_accounts(one, NAMES[0], may_overdraw=True)
        await open_accounts(two, NAMES[1])
        await open_accounts(two, OTHER, frozen=True)
        line.lose = 3
        first, second, third = Submitted(20), Submitted(1), Submitted(6)
        assert len(await first.to(one, wallet_pb2.SETTLE_MODE_DURABLE)) == 20  # in flight
        await lost(line, 1)
        assert len(await second.to(one, wallet_pb2.SETTLE_MODE_DURABLE)) == 1
        await lost(line, 2)
        # this one waits: its outcome is lost as well, and nothing else moves
        assert await third.to(one, wallet_pb2.SETTLE_MODE_SETTLED) == refused(6)
        assert len(line.lost) == 3
        assert await first.to(one, wallet_pb2.SETTLE_MODE_SETTLED) == refused(20)
        assert await second.to(one, wallet_pb2.SETTLE_MODE_SETTLED) == {}
        assert await money(one, two) == (-140, 140, 0)
        # and after a restart of the debit side, from the log
        await one.kill()
        one = await pair.start(0)
        assert await first.to(one, wallet_pb2.SETTLE_MODE_SETTLED) == refused(20)
        assert await money(one, two) == (-140, 140, 0)


@pytest.mark.parametrize("also_debit", [False, True])
async def test_a_credit_side_that_dies_before_its_outcome_arrives_is_asked_again(
    start_wallet: StartWallet, also_debit: bool
) -> None:
    """No further traffic: the debit side itself has to notice."""
    pair = Pair(start_wallet)
    async with LossyLine(pair.address(0)) as line:
        one, two = await pair.start(0), await pair.start(1, via=line.address)
        await open_accounts(one, NAMES[0], may_overdraw=True)
        await open_accounts(two, NAMES[1])
        await open_accounts(two, OTHER, frozen=True)
        line.lose = 10**6
        sent = Submitted(30)
        assert len(await sent.to(one, wallet_pb2.SETTLE_MODE_DURABLE)) == 30
        await lost(line, 1)
        await two.kill()
        if also_debit:
            await one.kill()
            one = await pair.start(0)
        line.lose = 0
        two = await pair.start(1, via=line.address)
        async with asyncio.timeout(60):
            while await money(one, two) != (-150, 150, 0):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await sent.to(one, wallet_pb2.SETTLE_MODE_SETTLED) == refused(30)


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
    result = (await asyncio.wait_for(call.read(), 60)).result
    assert list(result.failed_rows) == []
    assert (await balance(one, NAMES[0]), await balance(two, NAMES[1])) == (-500, 500)

    await two.kill()
    (durable,) = batches(700, wallet_pb2.SETTLE_MODE_DURABLE, 2)
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=durable))
    result = (await asyncio.wait_for(call.read(), 60)).result
    assert set(result.failed_results) == {wallet_pb2.TRANSFER_RESULT_IN_FLIGHT}
    assert await balance(one, NAMES[0]) == -1_200
    await one.kill()
    two = await pair.start(1)
    assert await balance(two, NAMES[1]) == 500
    one = await pair.start(0)
    async with asyncio.timeout(60):
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
    result = (await asyncio.wait_for(call.read(), 60)).result
    assert set(result.failed_results) == {wallet_pb2.TRANSFER_RESULT_CREDIT_ACCOUNT_FROZEN}
    assert (await balance(one, NAMES[0]), await balance(two, NAMES[1])) == (0, 0)


async def test_every_event_is_applied_by_exactly_one_process(
    start_wallet: StartWallet, publisher: Publisher, valkey_url: str
) -> None:
    """Also those from before this split of the shards, which its groups never see, and those that the bus forgets meanwhile."""
    pair = Pair(start_wallet)
    sellers = [name.split("/")[1] for name in NAMES.values()]

    def captures(first: int, count: int) -> list[Message]:
        return [
            captured(f"ORD-{n}", time_ns=now(), seller_account=sellers[n % 2], amount=10)
            for n in range(first, first + count)
        ]

    await publisher.say(captures(0, 20))
    feed = {"payment_address": publisher.address, "feed_grace_s": 0.5, "feed_check_interval_s": 1.0}
    processes = [await pair.start(shard, **feed) for shard in (0, 1)]
    await publisher.say(captures(20, 20))
    with redis.Redis.from_url(valkey_url) as broker:
        broker.flushall()
    await publisher.say(captures(40, 20))
    for shard, process in enumerate(processes):
        await until(process, NAMES[shard], (300, 0))
    await publisher.say([requested(f"PO-{s}", time_ns=now(), seller_account=s, amount=100) for s in sellers])
    for shard, process in enumerate(processes):
        await until(process, NAMES[shard], (300, 100))
    clearing = [await balance(process, "psp/sandbox/clearing/USD") for process in processes]
    assert clearing == [-300, -300]

    async with asyncio.timeout(30):
        proven = "SELECT min(proven_position) FROM payment.feed_consumer WHERE consumer = 'wallet'"
        while await publisher.pool.fetchval(proven) != 62:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    with redis.Redis.from_url(valkey_url) as broker:
        assert list(broker.scan_iter("*dead-letter*")) == []
    answers = await publisher.pool.fetch("SELECT key FROM wallet.feed ORDER BY key")
    assert sorted({row[0] for row in answers}) == sorted(f"PO-{s}" for s in sellers)


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


async def test_a_shard_restored_from_an_old_copy_says_so_and_moves_no_money(start_wallet: StartWallet) -> None:
    """It takes more new transfers before the other process answers than were lost, and dies in between."""
    pair = Pair(start_wallet)
    one, two = await pair.start(0), await pair.start(1)
    await open_accounts(one, NAMES[0], may_overdraw=True)
    await open_accounts(two, NAMES[1])
    await one.stop()
    folder = Path(one.env["DUCAT_DATA_DIR"]) / "wallet" / "shard-0000"
    old = folder.with_name("old")
    shutil.copytree(folder, old)
    one = await pair.start(0)
    settled = wallet_pb2.SETTLE_MODE_SETTLED
    await send_all(one, batches(20, settled, 1))
    await one.stop()
    await two.stop()
    shutil.rmtree(folder)
    old.rename(folder)
    await accept(one, 0)  # or it does not start: PostgreSQL has seen what the copy lacks
    one = await pair.start(0)
    durable = wallet_pb2.SETTLE_MODE_DURABLE
    assert await send_all(one, batches(50, durable, 2)) == {wallet_pb2.TRANSFER_RESULT_IN_FLIGHT}
    await one.kill()
    two = await pair.start(1)
    one = await pair.start(0)
    async with asyncio.timeout(60):
        while True:
            shards = (await one.shards.ListShards(shard_pb2.ListShardsRequest())).shards
            if shards[0].state == shard_pb2.SHARD_STATE_REWOUND:
                break
            await asyncio.sleep(0.05)
    (link,) = shards[0].links
    assert link.problem == "shard 1 has taken 20 transfers from here, this shard's log ends with number 0"
    assert await send_all(one, batches(5, settled, 3)) == {wallet_pb2.TRANSFER_RESULT_TOO_MANY_PENDING}
    assert (await balance(one, NAMES[0]), await balance(two, NAMES[1])) == (-50, 20)


async def accept(wallet: WalletProcess, shard: int) -> None:
    done = await prefork.start("ops", "wallet", "accept", "--shard", str(shard), "--yes", env=wallet.env)
    assert await done.wait() == 0


async def send_all(wallet: WalletProcess, batches: list[wallet_pb2.TransferBatch]) -> set[int]:
    """What was not OK."""
    call = wallet.wallet.SubmitTransfers()
    found: set[int] = set()
    for batch in batches:
        await call.write(wallet_pb2.SubmitTransfersRequest(batch=batch))
        found |= set((await asyncio.wait_for(call.read(), 60)).result.failed_results)
    call.cancel()
    return found


async def test_a_wallet_that_listens_on_any_port_says_which(start_wallet: StartWallet) -> None:
    wallet = await start_wallet()
    shards = (await wallet.shards.ListShards(shard_pb2.ListShardsRequest())).shards
    assert {shard.address for shard in shards} == {wallet.address}
