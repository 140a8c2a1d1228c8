"""Risk: the rooms work apart and fail together, or a killed process loses or doubles money."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from ducat.batch import failed_transfers, transfer_batches, transfer_ids
from ducat.event.v1 import event_pb2
from ducat.wallet.v1 import shard_pb2, wallet_pb2
from kernel.errors import OutOfRange
from kernel.ids import account_id, uuid7
from runtime.bus import Bus, Message
from runtime.errors import from_rpc_error
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.unit.wallet_core.service.test_bus_flows import captured, message, requested

CLEARING = "psp/sandbox/clearing/USD"
SELLER = "seller/SELL-1/USD"
PAYOUTS = "psp/sandbox/payouts/USD"


def now(ms: int = 0) -> int:
    return time.time_ns() + ms * 1_000_000


async def balances(wallet: WalletProcess, *names: str) -> list[tuple[int, int]]:
    answer = await wallet.wallet.GetAccounts(wallet_pb2.GetAccountsRequest(names=names))
    found = {account.name: (account.balance_minor, account.held_out_minor) for account in answer.accounts}
    return [found.get(name, (0, 0)) for name in names]


async def until(wallet: WalletProcess, name: str, expected: tuple[int, int]) -> None:
    found: Sequence[tuple[int, int]] = []
    try:
        async with asyncio.timeout(60):
            while found != [expected]:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    found = await balances(wallet, name)
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"{name}: expected {expected}, got {found}")


async def answers(bus: Bus, count: int) -> list[event_pb2.Envelope]:
    """The first `count` messages of wallet.events."""
    found: list[event_pb2.Envelope] = []
    enough = asyncio.Event()

    async def handler(messages: Sequence[Message]) -> None:
        found.extend(event_pb2.Envelope.FromString(one.payload) for one in messages)
        if len(found) >= count:
            enough.set()

    consumer = asyncio.ensure_future(bus.consume("wallet.events", "payment", handler))
    try:
        async with asyncio.timeout(60):
            await enough.wait()
    finally:
        consumer.cancel()
    return found


async def test_from_the_bus_to_every_reader(start_wallet: StartWallet, valkey_bus: Bus) -> None:
    wallet = await start_wallet()
    paid = captured(time_ns=now())
    await valkey_bus.publish([paid, requested(time_ns=now(), amount=3_000), paid])
    held = (await answers(valkey_bus, 1))[0]
    assert held.funds_held.reference == "PO-1"
    done = message("payout_completed", now(), reference="PO-1", amount=3_000, hold_id=held.funds_held.hold_id)
    await valkey_bus.publish([done])
    await until(wallet, PAYOUTS, (3_000, 0))

    listed = await wallet.wallet.ListAccounts(wallet_pb2.ListAccountsRequest())
    assert [account.name for account in listed.accounts] == [CLEARING, PAYOUTS, SELLER]
    assert sum(account.balance_minor for account in listed.accounts) == 0

    status = (await wallet.shards.ListShards(shard_pb2.ListShardsRequest())).shards
    positions = [
        wallet_pb2.ShardPosition(shard=shard.shard, sequence_number=shard.durable_sequence_number) for shard in status
    ]
    page = await wallet.wallet.ListAccountTransfers(
        wallet_pb2.ListAccountTransfersRequest(name=SELLER, at_least=positions)
    )
    kinds = [wallet_pb2.EventKind.Name(record.kind) for record in page.transfers]
    assert kinds == ["EVENT_KIND_HOLD_POSTED", "EVENT_KIND_HOLD_PLACED", "EVENT_KIND_MONEY_MOVED"]
    got = await wallet.wallet.GetTransfers(
        wallet_pb2.GetTransfersRequest(transfer_ids=[held.funds_held.hold_id, bytes(16)])
    )
    assert [record.amount_minor for record in got.transfers] == [3_000]
    assert await wallet.stop() == 0


async def test_a_kill_at_any_moment_neither_loses_nor_doubles_a_capture(
    start_wallet: StartWallet, valkey_bus: Bus
) -> None:
    """Captures are published while the wallet is killed again and again."""
    wallet = await start_wallet()
    messages = [captured(f"ORD-{number}", time_ns=now(), amount=100) for number in range(400)]
    for round_number in range(4):
        part = messages[100 * round_number : 100 * round_number + 100]
        await valkey_bus.publish(part)
        await asyncio.sleep(0.03 * round_number)
        await wallet.kill()
        wallet = await start_wallet()
    await valkey_bus.publish(messages)
    await valkey_bus.publish([captured("LAST", time_ns=now(), seller_account="SELL-2", amount=1)])
    await until(wallet, "seller/SELL-2/USD", (1, 0))
    assert await balances(wallet, SELLER, CLEARING) == [(40_000, 0), (-40_001, 0)]
    for shard in (0, 1):
        last = [a async for a in wallet.shards.VerifyShard(shard_pb2.VerifyShardRequest(shard=shard))][-1]
        assert (last.ok, last.problem) == (True, "")


async def open_accounts(wallet: WalletProcess, *names: str, **fields: object) -> None:
    specs = [wallet_pb2.AccountSpec(name=name, currency_code="USD", **fields) for name in names]  # type: ignore[arg-type]
    answer = await wallet.wallet.CreateAccounts(wallet_pb2.CreateAccountsRequest(accounts=specs))
    assert set(answer.results) == {wallet_pb2.ACCOUNT_RESULT_OK}


async def test_columns_stream_through_real_shards_and_the_past_is_exact(start_wallet: StartWallet) -> None:
    wallet = await start_wallet()
    names = [f"seller/S{number}/USD" for number in range(50)]
    await open_accounts(wallet, CLEARING, may_overdraw=True, striped=True)
    await open_accounts(wallet, *names)
    rows = 20_000
    credits = b"".join(account_id(names[row % len(names)]) for row in range(rows))
    batches = list(transfer_batches(transfer_ids(rows), account_id(CLEARING) * rows, credits, [3] * rows))

    async def requests():  # type: ignore[no-untyped-def]
        for batch in batches:
            yield wallet_pb2.SubmitTransfersRequest(batch=batch)

    for again in (False, True):
        results = [answer.result async for answer in wallet.wallet.SubmitTransfers(requests())]
        assert sorted(result.batch_id for result in results) == [1, 2, 3]
        assert [failed for result in results for failed in failed_transfers(result)] == []
        assert sum(result.replayed_count for result in results) == (rows if again else 0)
    assert (await balances(wallet, names[7], CLEARING)) == [(1_200, 0), (-60_000, 0)]

    live = (await wallet.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=names[7]))).account
    shard = live.positions[0].shard
    watch = wallet.wallet.WatchEvents(
        wallet_pb2.WatchEventsRequest(
            shard=shard,
            from_sequence_number=1,
            account_id=live.account_id,
            end_sequence_number=live.positions[0].sequence_number,
        )
    )
    balance = 0
    seen: list[tuple[int, int]] = []
    async for answer in watch:
        for event in answer.events:
            balance += event.amount_minor if event.credit_account_id == live.account_id else 0
            seen.append((event.sequence_number, balance))
    assert balance == 1_200
    await wallet.shards.CreateSnapshot(shard_pb2.CreateSnapshotRequest(shard=shard))
    for sequence, expected in seen[:: len(seen) // 5]:
        position = wallet_pb2.ShardPosition(shard=shard, sequence_number=sequence)
        past = await wallet.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=names[7], position=position))
        assert past.account.balance_minor == expected
    assert await wallet.stop() == 0


async def test_a_malformed_column_is_named_over_a_real_stream(start_wallet: StartWallet) -> None:
    wallet = await start_wallet()
    await open_accounts(wallet, CLEARING, may_overdraw=True, striped=True)
    await open_accounts(wallet, SELLER)

    def batch() -> wallet_pb2.TransferBatch:
        return next(transfer_batches(transfer_ids(4), account_id(CLEARING) * 4, account_id(SELLER) * 4, [1] * 4))

    async def error_of(bad: wallet_pb2.TransferBatch) -> tuple[str, str, str]:
        call = wallet.wallet.SubmitTransfers()
        await call.write(wallet_pb2.SubmitTransfersRequest(batch=batch()))
        await call.write(wallet_pb2.SubmitTransfersRequest(batch=bad))
        assert (await call.read()).result.row_count == 4
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        error = from_rpc_error(raised.value)
        return error.reason, error.metadata["field"], error.metadata["message_number"]

    for column, value in (
        ("ids", b"x" * 63),
        ("debit_account_ids", b"x" * 48),
        ("credit_account_ids", b""),
        ("flags", b"x"),
        ("pending_ids", b"x" * 16),
        ("codes", b"x" * 10),
    ):
        bad = batch()
        setattr(bad, column, value)
        assert await error_of(bad) == ("BATCH_INVALID", column, "2")
    bad = batch()
    bad.amounts_minor.append(1)
    assert await error_of(bad) == ("BATCH_INVALID", "amounts_minor", "2")
    bad = batch()
    bad.timeouts_s.append(1)
    assert await error_of(bad) == ("BATCH_INVALID", "timeouts_s", "2")
    assert await error_of(wallet_pb2.TransferBatch()) == ("BATCH_INVALID", "ids", "2")


async def test_a_data_folder_that_others_could_enter_is_closed(start_wallet: StartWallet, tmp_path: Path) -> None:
    """Risk: a folder of an older version stays open to every user of the machine."""
    (tmp_path / "wallet").mkdir(mode=0o755)
    await start_wallet()
    entered = [path for path in (tmp_path / "wallet").rglob("") if stat.S_IMODE(path.stat().st_mode) != 0o700]
    assert entered == []


async def test_reading_your_own_write_from_the_read_model(start_wallet: StartWallet) -> None:
    wallet = await start_wallet()
    await open_accounts(wallet, CLEARING, may_overdraw=True, striped=True)
    await open_accounts(wallet, SELLER)
    for number in range(5):
        transfer = uuid7(now() // 10**6, number.to_bytes(10, "big"))
        row = wallet_pb2.Transfer(
            transfer_id=transfer,
            debit_account_id=account_id(CLEARING),
            credit_account_id=account_id(SELLER),
            amount_minor=number + 1,
        )
        done = await wallet.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=[row]))
        page = await wallet.wallet.ListAccountTransfers(
            wallet_pb2.ListAccountTransfersRequest(name=SELLER, at_least=done.positions, page_size=2)
        )
        assert page.transfers[0].transfer_id == transfer
        assert bool(page.next_page_token) == (number >= 2)
    ahead = wallet_pb2.ShardPosition(shard=0, sequence_number=10**9)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await wallet.wallet.ListAccountTransfers(wallet_pb2.ListAccountTransfersRequest(name=SELLER, at_least=[ahead]))
    assert isinstance(from_rpc_error(raised.value), OutOfRange)
