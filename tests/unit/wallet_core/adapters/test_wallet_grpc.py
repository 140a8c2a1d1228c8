"""Risk: what a caller sends over a real channel is not what the shards do, or a refusal does not say what
was wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from ducat.batch import failed_transfers, transfer_batches
from ducat.wallet.v1 import shard_pb2, wallet_pb2, wallet_service_pb2_grpc
from kernel.clock import FixedClock
from kernel.errors import DucatError, FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from kernel.ids import account_id, derived_transfer_id
from runtime.errors import from_rpc_error
from runtime.grpc_server import GrpcServer
from runtime.settings import Settings
from tests.unit.wallet_core.service.memory_host import MemoryDirectory, MemoryHost, NoReadModel
from wallet_core.adapters import grpc as grpc_adapter
from wallet_core.adapters.grpc import BATCHES_IN_FLIGHT_MAX, SCOPES, ShardServicer, WalletServicer
from wallet_core.service.history import History
from wallet_core.service.port import AccountState
from wallet_core.service.wallet import AccountView, Wallet

NOW_NS = 1_753_056_000_000_000_000
NOW_MS = NOW_NS // 1_000_000
CLEARING = "psp/sandbox/clearing/USD"


@dataclass
class Served:
    clock: FixedClock
    host: MemoryHost
    wallet: wallet_service_pb2_grpc.WalletServiceAsyncStub
    shards: wallet_service_pb2_grpc.ShardServiceAsyncStub
    channel: grpc.aio.Channel

    async def open(self, *names: str, **fields: object) -> None:
        specs = [wallet_pb2.AccountSpec(name=name, currency_code="USD", **fields) for name in names]  # type: ignore[arg-type]
        answer = await self.wallet.CreateAccounts(wallet_pb2.CreateAccountsRequest(accounts=specs))
        assert set(answer.results) == {wallet_pb2.ACCOUNT_RESULT_OK}

    async def pay(self, name: str, amount: int, number: object = 0) -> wallet_pb2.CreateTransfersResponse:
        return await self.wallet.CreateTransfers(
            wallet_pb2.CreateTransfersRequest(
                transfers=[
                    wallet_pb2.Transfer(
                        transfer_id=derived_transfer_id(self.clock.now_ns() // 10**6, name, str(number)),
                        debit_account_id=account_id(CLEARING),
                        credit_account_id=account_id(name),
                        amount_minor=amount,
                    )
                ]
            )
        )


async def serve(host: MemoryHost, clock: FixedClock) -> AsyncIterator[Served]:
    directory = MemoryDirectory()
    wallet = Wallet(host, directory, NoReadModel(), read_wait_s=0.05)
    history = History(host, host, clock)
    servicer = WalletServicer(host, wallet, history)
    shard_servicer = ShardServicer(host, wallet, history, lambda: "127.0.0.1:1")
    server = GrpcServer(
        Settings(),
        [
            (
                servicer,
                wallet_service_pb2_grpc.add_WalletServiceServicer_to_server,
                "ducat.wallet.v1.WalletService",
            ),
            (
                shard_servicer,
                wallet_service_pb2_grpc.add_ShardServiceServicer_to_server,
                "ducat.wallet.v1.ShardService",
            ),
        ],
        SCOPES,
        servicer.raw_handlers(),
    )
    address = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(address) as channel:
        yield Served(
            clock,
            host,
            wallet_service_pb2_grpc.WalletServiceStub(channel),  # type: ignore[arg-type]
            wallet_service_pb2_grpc.ShardServiceStub(channel),  # type: ignore[arg-type]
            channel,
        )
    await server.stop(0)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    clock = FixedClock(NOW_NS)
    async for one in serve(MemoryHost(clock), clock):
        await one.open(CLEARING, may_overdraw=True, striped=True)
        yield one


@pytest.fixture
async def half() -> AsyncIterator[Served]:
    """A process that owns shard 0 of 2."""
    clock = FixedClock(NOW_NS)
    async for one in serve(MemoryHost(clock, owned=[0]), clock):
        yield one


async def error_of(call: object) -> DucatError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call  # type: ignore[misc]
    return from_rpc_error(raised.value)


def name_on(shard: int, host: MemoryHost, number: int = 0) -> str:
    return next(
        name
        for name in (f"seller/S{n}/USD" for n in range(number * 1000, 10**6))
        if host.shard_of(account_id(name)) == shard
    )


# --- accounts


async def test_each_account_row_stands_for_itself(served: Served) -> None:
    key = account_id("seller/A/USD")
    answer = await served.wallet.CreateAccounts(
        wallet_pb2.CreateAccountsRequest(
            accounts=[
                wallet_pb2.AccountSpec(name="seller/A/USD", currency_code="USD"),
                wallet_pb2.AccountSpec(name="seller/A/USD", account_id=key, currency_code="USD"),
                wallet_pb2.AccountSpec(name="seller/A/USD", account_id=b"x" * 16, currency_code="USD"),
                wallet_pb2.AccountSpec(currency_code="USD"),
                wallet_pb2.AccountSpec(account_id=b"short", currency_code="USD"),
                wallet_pb2.AccountSpec(account_id=key, currency_code="EUR"),
                wallet_pb2.AccountSpec(name="seller/B/usd", currency_code="usd"),
                wallet_pb2.AccountSpec(name="seller/C/USD", currency_code="USD", striped=True),
                wallet_pb2.AccountSpec(name="seller/D/USD", currency_code="USD", overdraft_limit_minor=-1),
                wallet_pb2.AccountSpec(account_id=bytes(16), currency_code="USD"),
                wallet_pb2.AccountSpec(account_id=b"y" * 16, currency_code="ÜSD"),
                wallet_pb2.AccountSpec(account_id=b"y" * 16, currency_code="US\0"),
            ]
        )
    )
    names = [wallet_pb2.AccountResult.Name(result).removeprefix("ACCOUNT_RESULT_") for result in answer.results]
    assert names == [
        "OK", "OK", "ID_INVALID", "ID_INVALID", "ID_INVALID", "ALREADY_EXISTS",
        "CURRENCY_INVALID", "FLAGS_INVALID", "LIMIT_INVALID", "ID_INVALID", "CURRENCY_INVALID", "CURRENCY_INVALID",
    ]  # fmt: skip


async def test_updates_keep_what_cannot_change(served: Served) -> None:
    await served.open("seller/A/USD")

    async def update(**fields: object) -> int:
        spec = wallet_pb2.AccountSpec(**fields)  # type: ignore[arg-type]
        return (await served.wallet.UpdateAccounts(wallet_pb2.UpdateAccountsRequest(accounts=[spec]))).results[0]

    assert await update(name="seller/A/USD", frozen=True, balance_limit_minor=900) == wallet_pb2.ACCOUNT_RESULT_OK
    assert await update(name="seller/A/USD", may_overdraw=True) == wallet_pb2.ACCOUNT_RESULT_FLAGS_INVALID
    assert await update(name="seller/A/USD", currency_code="EUR") == wallet_pb2.ACCOUNT_RESULT_CURRENCY_INVALID
    assert await update(name="seller/NONE/USD") == wallet_pb2.ACCOUNT_RESULT_NOT_FOUND
    assert await update(name=CLEARING, frozen=True) == wallet_pb2.ACCOUNT_RESULT_OK
    got = await served.wallet.GetAccounts(wallet_pb2.GetAccountsRequest(names=["seller/A/USD", CLEARING]))
    one, clearing = got.accounts
    assert (one.frozen, one.balance_limit_minor, one.may_overdraw) == (True, 900, False)
    assert (clearing.frozen, clearing.may_overdraw, clearing.striped) == (True, True, True)
    assert await update(name=CLEARING) == wallet_pb2.ACCOUNT_RESULT_OK
    assert await update(name="seller/A/USD", closed=True) == wallet_pb2.ACCOUNT_RESULT_OK
    assert await update(name="seller/A/USD") == wallet_pb2.ACCOUNT_RESULT_FLAGS_INVALID
    await served.open("seller/B/USD")
    await served.pay("seller/B/USD", 5)
    assert await update(name="seller/B/USD", closed=True) == wallet_pb2.ACCOUNT_RESULT_BALANCE_NOT_ZERO


async def test_striped_accounts_read_as_the_sum_of_their_parts(served: Served) -> None:
    one, two = name_on(0, served.host), name_on(1, served.host)
    await served.open(one, two)
    await served.pay(one, 30)
    await served.pay(two, 12)
    got = await served.wallet.GetAccounts(
        wallet_pb2.GetAccountsRequest(account_ids=[account_id(CLEARING)], names=[one, "seller/NONE/USD", two])
    )
    assert [account.balance_minor for account in got.accounts] == [-42, 30, 12]
    assert [account.name for account in got.accounts] == [CLEARING, one, two]
    assert [len(account.positions) for account in got.accounts] == [2, 1, 1]
    assert got.accounts[2].positions[0].shard == 1


async def test_a_read_waits_for_its_position_or_says_where_the_log_is(served: Served) -> None:
    await served.open("seller/A/USD")
    done = await served.pay("seller/A/USD", 7)
    read = wallet_pb2.GetAccountsRequest(names=["seller/A/USD"], at_least=done.positions)
    assert (await served.wallet.GetAccounts(read)).accounts[0].balance_minor == 7
    ahead = wallet_pb2.ShardPosition(shard=0, sequence_number=10**6)
    read = wallet_pb2.GetAccountsRequest(names=["seller/A/USD"], at_least=[ahead])
    error = await error_of(served.wallet.GetAccounts(read))
    assert isinstance(error, OutOfRange)
    assert error.reason == "SEQUENCE_OUT_OF_RANGE"
    unknown = wallet_pb2.GetAccountsRequest(account_ids=[b"x" * 15])
    error = await error_of(served.wallet.GetAccounts(unknown))
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == "account_ids[0]"


async def test_account_pages_are_complete_and_tokens_belong_to_their_filter(served: Served) -> None:
    names = [f"seller/P{number:02}/USD" for number in range(23)]
    await served.open(*names)
    found: list[str] = []
    token = ""
    while True:
        page = await served.wallet.ListAccounts(
            wallet_pb2.ListAccountsRequest(name_prefix="seller/P", page_size=5, page_token=token)
        )
        found += [account.name for account in page.accounts]
        token = page.next_page_token
        if not token:
            break
    assert found == names
    first = await served.wallet.ListAccounts(wallet_pb2.ListAccountsRequest(name_prefix="seller/P", page_size=5))
    for prefix, bad in (("seller/", first.next_page_token), ("seller/P", "garbage!"), ("seller/P", "AAAA")):
        error = await error_of(
            served.wallet.ListAccounts(wallet_pb2.ListAccountsRequest(name_prefix=prefix, page_token=bad))
        )
        assert (type(error), error.reason) == (InvalidArgument, "PAGE_TOKEN_INVALID")


# --- transfers as rows


async def test_rows_carry_every_field_and_results_come_in_order(served: Served) -> None:
    await served.open("seller/A/USD")
    await served.pay("seller/A/USD", 100)
    seller, clearing = account_id("seller/A/USD"), account_id(CLEARING)
    hold, post = derived_transfer_id(NOW_MS, "h", "1"), derived_transfer_id(NOW_MS, "p", "1")
    rows = [
        wallet_pb2.Transfer(
            transfer_id=hold,
            debit_account_id=seller,
            credit_account_id=clearing,
            amount_minor=60,
            kind=wallet_pb2.TRANSFER_KIND_HOLD,
            timeout_s=90,
            code=7,
        ),
        wallet_pb2.Transfer(
            transfer_id=derived_transfer_id(NOW_MS, "x", "1"),
            debit_account_id=seller,
            credit_account_id=clearing,
            amount_minor=41,
        ),
        wallet_pb2.Transfer(
            transfer_id=post,
            debit_account_id=seller,
            credit_account_id=clearing,
            amount_minor=25,
            kind=wallet_pb2.TRANSFER_KIND_POST,
            pending_id=hold,
        ),
        wallet_pb2.Transfer(
            transfer_id=derived_transfer_id(NOW_MS, "b", "1"),
            debit_account_id=seller,
            credit_account_id=clearing,
            amount_minor=0,
            balancing_debit=True,
        ),
    ]
    request = wallet_pb2.CreateTransfersRequest(transfers=rows)
    answer = await served.wallet.CreateTransfers(request)
    again = await served.wallet.CreateTransfers(request)
    names = [wallet_pb2.TransferResult.Name(result).removeprefix("TRANSFER_RESULT_") for result in answer.results]
    assert names == ["OK", "INSUFFICIENT_FUNDS", "OK", "OK"]
    assert again.results == answer.results
    account = (await served.wallet.GetAccounts(wallet_pb2.GetAccountsRequest(names=["seller/A/USD"]))).accounts[0]
    assert (account.balance_minor, account.held_out_minor) == (0, 0)
    assert {position.shard for position in answer.positions} == {0, 1}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"transfer_id": b"short"}, "transfers[0].transfer_id"),
        ({"transfer_id": b""}, "transfers[0].transfer_id"),
        ({"transfer_id": b"x" * 16, "debit_account_id": b"x"}, "transfers[0].debit_account_id"),
        ({"transfer_id": b"x" * 16, "credit_account_id": b"x" * 17}, "transfers[0].credit_account_id"),
        ({"transfer_id": b"x" * 16, "pending_id": b"x" * 15}, "transfers[0].pending_id"),
        ({"transfer_id": b"x" * 16, "code": 65_536}, "transfers[0].code"),
        ({"transfer_id": b"x" * 16, "kind": 99}, "transfers[0].kind"),
    ],
)
async def test_a_malformed_row_is_named(served: Served, fields: dict[str, object], field: str) -> None:
    row = wallet_pb2.Transfer(**fields)  # type: ignore[arg-type]
    error = await error_of(served.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=[row])))
    assert isinstance(error, InvalidArgument)
    assert error.violations[0].field == field


async def test_no_rows_and_broken_bytes_are_refused(served: Served) -> None:
    error = await error_of(served.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest()))
    assert isinstance(error, InvalidArgument)
    raw = served.channel.unary_unary("/ducat.wallet.v1.WalletService/CreateTransfers")
    error = await error_of(raw(b"\xff\xff\xff"))
    assert isinstance(error, InvalidArgument)


# --- transfers as columns


def batch(served: Served, number: int, rows: int = 3) -> wallet_pb2.TransferBatch:
    ids = b"".join(derived_transfer_id(NOW_MS, f"s{number}", str(row)) for row in range(rows))
    credit = account_id("seller/A/USD")
    return next(transfer_batches(ids, account_id(CLEARING) * rows, credit * rows, [1] * rows, first_batch_id=number))


async def test_many_batches_in_flight_are_each_answered_once(served: Served) -> None:
    await served.open("seller/A/USD")
    count = 3 * BATCHES_IN_FLIGHT_MAX

    async def requests() -> AsyncIterator[wallet_pb2.SubmitTransfersRequest]:
        for number in range(1, count + 1):
            yield wallet_pb2.SubmitTransfersRequest(batch=batch(served, number))

    answers = [answer.result async for answer in served.wallet.SubmitTransfers(requests())]
    assert sorted(answer.batch_id for answer in answers) == list(range(1, count + 1))
    assert all(answer.row_count == 3 and failed_transfers(answer) == [] for answer in answers)
    account = (await served.wallet.GetAccounts(wallet_pb2.GetAccountsRequest(names=["seller/A/USD"]))).accounts[0]
    assert account.balance_minor == 3 * count


async def test_a_malformed_column_ends_the_stream_after_the_other_answers(served: Served) -> None:
    await served.open("seller/A/USD")
    bad = batch(served, 3)
    bad.credit_account_ids = bad.credit_account_ids[:-1]
    call = served.wallet.SubmitTransfers()
    for number in (1, 2):
        await call.write(wallet_pb2.SubmitTransfersRequest(batch=batch(served, number)))
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=bad))
    seen: list[int] = []

    async def read_on() -> None:  # the client does not have to close its side
        while (answer := await call.read()) is not grpc.aio.EOF:
            seen.append(answer.result.batch_id)

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await read_on()
    assert sorted(seen) == [1, 2]
    error = from_rpc_error(raised.value)
    assert isinstance(error, InvalidArgument)
    assert (error.reason, error.metadata["field"], error.metadata["message_number"]) == (
        "BATCH_INVALID",
        "credit_account_ids",
        "3",
    )
    assert error.violations[0].field == "credit_account_ids"


async def test_a_client_that_goes_away_leaves_the_server_well(served: Served) -> None:
    await served.open("seller/A/USD")
    call = served.wallet.SubmitTransfers()
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=batch(served, 1)))
    await call.read()
    call.cancel()
    assert (await served.pay("seller/A/USD", 1)).results == [wallet_pb2.TRANSFER_RESULT_OK]


# --- the past


async def test_balances_of_the_past_are_those_that_were_answered_then(served: Served) -> None:
    name = name_on(0, served.host)
    await served.open(name)
    before_ns = served.clock.now_ns()
    known: list[tuple[int, int, int]] = []
    for number in range(12):
        served.clock.advance(seconds=1)
        done = await served.pay(name, 10 + number, number)
        live = (await served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name))).account.balance_minor
        at = next(position.sequence_number for position in done.positions if position.shard == 0)
        known.append((served.clock.now_ns(), at, live))
    for time_ns, at, balance in known:
        stamp = Timestamp(seconds=time_ns // 10**9)
        by_time = await served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name, time=stamp))
        assert by_time.account.balance_minor == balance
        position = wallet_pb2.ShardPosition(shard=0, sequence_number=at)
        by_event = await served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name, position=position))
        assert by_event.account.balance_minor == balance
        assert by_event.account.positions[0].sequence_number == at
        clearing = await served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=CLEARING, time=stamp))
        assert clearing.account.balance_minor == -balance
    early = wallet_pb2.GetBalanceRequest(name=name, time=Timestamp(seconds=before_ns // 10**9 - 10))
    assert isinstance(await error_of(served.wallet.GetBalance(early)), NotFound)
    later = Timestamp(seconds=served.clock.now_ns() // 10**9 + 1)
    error = await error_of(served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name, time=later)))
    assert (type(error), error.reason) == (OutOfRange, "SEQUENCE_OUT_OF_RANGE")
    beyond = wallet_pb2.ShardPosition(shard=0, sequence_number=10**6)
    error = await error_of(served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name, position=beyond)))
    assert isinstance(error, OutOfRange)
    other = wallet_pb2.ShardPosition(shard=1, sequence_number=1)
    error = await error_of(served.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=name, position=other)))
    assert isinstance(error, InvalidArgument)


async def test_watch_gives_every_event_from_the_first_and_then_the_live_ones(served: Served) -> None:
    name = name_on(0, served.host)
    await served.open(name)
    for number in range(5):
        await served.pay(name, 1, number)
    call = served.wallet.WatchEvents(wallet_pb2.WatchEventsRequest(shard=0, from_sequence_number=1))
    seen: list[wallet_pb2.WalletEvent] = []
    while len(seen) < 7:
        seen += (await call.read()).events
    assert [event.sequence_number for event in seen] == list(range(1, 8))
    assert [event.kind for event in seen] == [1, 1, 3, 3, 3, 3, 3]
    assert seen[0].debit_account_id == account_id(CLEARING)
    assert seen[-1].credit_account_id == account_id(name)
    await served.pay(name, 1, "live")
    assert (await asyncio.wait_for(call.read(), 60)).events[0].sequence_number == 8
    call.cancel()
    other = name_on(0, served.host, 1)
    await served.open(other)
    only = served.wallet.WatchEvents(
        wallet_pb2.WatchEventsRequest(shard=0, from_sequence_number=1, account_id=account_id(other))
    )
    assert [event.sequence_number for event in (await only.read()).events] == [9]
    only.cancel()
    error = await error_of(
        served.wallet.WatchEvents(wallet_pb2.WatchEventsRequest(shard=0, from_sequence_number=10**6)).read()
    )
    assert isinstance(error, OutOfRange)


async def test_verify_replays_to_the_same_digest_and_names_the_event_where_it_does_not(served: Served) -> None:
    name = name_on(0, served.host)
    await served.open(name)
    await served.pay(name, 1)
    last = [answer async for answer in served.shards.VerifyShard(shard_pb2.VerifyShardRequest(shard=0))][-1]
    assert (last.done, last.ok, last.sequence_number, last.problem) == (True, True, 3, "")
    served.host.digests[0][1] = b"z" * 16
    last = [answer async for answer in served.shards.VerifyShard(shard_pb2.VerifyShardRequest(shard=0))][-1]
    assert (last.done, last.ok) == (True, False)
    assert "after event 2 " in last.problem


# --- shards


async def test_the_shard_map_covers_every_slot_once(served: Served) -> None:
    answer = await served.shards.ListShards(shard_pb2.ListShardsRequest())
    assert [(shard.first_slot, shard.end_slot) for shard in answer.shards] == [(0, 2048), (2048, 4096)]
    assert answer.slot_count == 4096


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 64])
async def test_slot_ranges_are_those_of_the_router(count: int) -> None:
    clock = FixedClock(NOW_NS)
    host = MemoryHost(clock, shard_count=count)
    async for one in serve(host, clock):
        answer = await one.shards.ListShards(shard_pb2.ListShardsRequest())
        for shard in answer.shards:
            for slot in (shard.first_slot, shard.end_slot - 1):
                assert host.shard_of(bytes(14) + slot.to_bytes(2, "big")) == shard.shard


async def test_what_another_process_owns_is_refused_by_shard(half: Served) -> None:
    theirs = name_on(1, half.host)
    error = await error_of(half.wallet.GetAccounts(wallet_pb2.GetAccountsRequest(names=[theirs])))
    assert (type(error), error.reason) == (FailedPrecondition, "WRONG_SHARD")
    answer = await half.wallet.CreateAccounts(
        wallet_pb2.CreateAccountsRequest(accounts=[wallet_pb2.AccountSpec(name=theirs, currency_code="USD")])
    )
    assert answer.results == [wallet_pb2.ACCOUNT_RESULT_WRONG_SHARD]
    row = wallet_pb2.Transfer(
        transfer_id=derived_transfer_id(NOW_MS, "w", "1"),
        debit_account_id=account_id(theirs),
        credit_account_id=account_id(name_on(0, half.host)),
        amount_minor=1,
    )
    done = await half.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=[row]))
    assert done.results == [wallet_pb2.TRANSFER_RESULT_WRONG_SHARD]
    error = await error_of(half.wallet.WatchEvents(wallet_pb2.WatchEventsRequest(shard=1)).read())
    assert (error.reason, error.metadata["shard"]) == ("WRONG_SHARD", "1")


async def test_what_is_available_never_leaves_64_bits(served: Served) -> None:
    limit = 2**63 - 1
    await served.open(CLEARING, may_overdraw=True, striped=True)
    await served.open("seller/rich/USD", overdraft_limit_minor=limit)
    await served.pay("seller/rich/USD", 100)
    answer = await served.wallet.GetAccounts(wallet_pb2.GetAccountsRequest(names=["seller/rich/USD"]))
    assert (answer.accounts[0].balance_minor, answer.accounts[0].available_minor) == (100, limit)


def test_a_sum_over_shards_beyond_64_bits_is_refused_by_name() -> None:
    state = AccountState(account_id(CLEARING), "USD", 2**63, 0, 0, 0, 0, 0)
    with pytest.raises(OutOfRange, match="over all shards"):
        grpc_adapter._account(AccountView(state, CLEARING, ()))
