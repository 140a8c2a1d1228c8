"""Risk: an event that is lost, doubled or half applied on its way from the bus into the journal; a poison message that blocks."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from ducat.common.v1 import common_pb2
from ducat.event.v1 import event_pb2
from ducat.ledger.v1 import ledger_pb2, ledger_pb2_grpc
from kernel.errors import DucatError, InvalidArgument, NotFound, Unimplemented
from kernel.ids import derived_event_id
from runtime.bus import BusPolicy, Message
from runtime.bus import dead_letter as dead_letters
from runtime.bus.valkey import ValkeyBus
from runtime.errors import from_rpc_error

ROOT = Path(__file__).resolve().parents[3]


def usd(amount_minor: int) -> common_pb2.Money:
    return common_pb2.Money(currency_code="USD", amount_minor=amount_minor)


def message(key: str, **body: object) -> Message:
    (kind,) = body
    envelope = event_pb2.Envelope(
        event_id=derived_event_id(kind, key), occur_time=Timestamp(seconds=1_753_056_000, nanos=5_000), **body
    )
    return Message("payment.events", key, envelope.event_id, envelope.SerializeToString())


def captured(reference: str, amount_minor: int, seller: str = "S1") -> Message:
    body = event_pb2.PaymentOrderSucceeded(
        payment_order_id=reference, checkout_id="C", seller_account=seller, amount=usd(amount_minor), psp="sandbox"
    )
    return message(reference, payment_order_succeeded=body)


@asynccontextmanager
async def ledger_process(postgres_dsn: str, valkey_url: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`python -m ledger` on a free port; its address."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DUCAT_")},
        "DUCAT_DATABASE_URL": postgres_dsn,
        "DUCAT_REDIS_URL": valkey_url,
        "DUCAT_LEDGER_LISTEN": "127.0.0.1:0",
        "DUCAT_BUS_DELIVERY_COUNT_MAX": "2",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ledger", cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode().split()
        assert line[:2] == ["ready", "ledger"], line
        yield line[2], process
    finally:
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(60):
                await process.wait()


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[ValkeyBus]:
    opened = await ValkeyBus.open(valkey_url, policy=BusPolicy(), name="test")
    yield opened
    await opened.close()


async def eventually(ask: Callable[[], Awaitable[bool]], what: str) -> None:
    for _ in range(300):
        if await ask():
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"never happened: {what}")


async def error_of(call: Awaitable[object]) -> DucatError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_events_become_entries_once_and_poison_is_put_aside(
    postgres_dsn: str, valkey_url: str, bus: ValkeyBus
) -> None:
    payout = event_pb2.PayoutCompleted(reference="P", seller_account="S1", amount=usd(3000), psp="sandbox")
    good = [
        captured("A", 7500),
        captured("B", 2500, "S2"),
        message("C", payment_completed=event_pb2.PaymentCompleted(checkout_id="C")),
        message("P", payout_completed=payout),
    ]
    poison = [captured("Z", 0), Message("payment.events", "Y", "not an envelope", b"\xff\xff\xff")]
    await bus.publish([good[0], *poison, *good[1:], *good])
    async with ledger_process(postgres_dsn, valkey_url) as (address, _), grpc.aio.insecure_channel(address) as channel:
        ledger = ledger_pb2_grpc.LedgerServiceStub(channel)

        async def entry_count() -> int:
            answer = await ledger.ListJournalEntries(ledger_pb2.ListJournalEntriesRequest())
            return len(answer.journal_entries)

        async def has_three() -> bool:
            return await entry_count() == 3

        await eventually(has_three, "three entries")

        async def has_two_dead() -> bool:
            return len(await dead_letters.list_dead_letters(bus, "payment.events")) == 2

        await eventually(has_two_dead, "two dead letters")
        letters = await dead_letters.list_dead_letters(bus, "payment.events")
        assert {(each.message.message_id, each.group) for each in letters} == {
            (each.message_id, "ledger") for each in poison
        }

        await bus.publish(good)  # and once more, after everything
        await bus.publish([captured("LAST", 1)])

        async def has_four() -> bool:
            return await entry_count() == 4

        await eventually(has_four, "four entries")

        account = (await ledger.GetAccount(ledger_pb2.GetAccountRequest(name="seller/S1/USD"))).account
        assert account.kind == ledger_pb2.ACCOUNT_KIND_LIABILITY
        assert (account.debit_minor, account.credit_minor, account.balance_minor) == (3000, 7501, 4501)
        balance = await ledger.GetTrialBalance(ledger_pb2.GetTrialBalanceRequest())
        assert balance.balanced
        assert [(line.currency_code, line.debit_minor, line.credit_minor) for line in balance.lines] == [
            ("USD", 13001, 13001)
        ]
        entries = (
            await ledger.ListJournalEntries(ledger_pb2.ListJournalEntriesRequest(merchant_reference="P"))
        ).journal_entries
        assert entries[0].journal_entry_id == derived_event_id("payout", "P")
        assert entries[0].occur_time == Timestamp(seconds=1_753_056_000, nanos=5_000)
        assert [(each.account_name, each.side) for each in entries[0].postings] == [
            ("seller/S1/USD", ledger_pb2.POSTING_SIDE_DEBIT),
            ("psp/sandbox/payouts/USD", ledger_pb2.POSTING_SIDE_CREDIT),
        ]
        accounts = await ledger.ListAccounts(ledger_pb2.ListAccountsRequest(name_prefix="seller/", page_size=1))
        assert [each.name for each in accounts.accounts] == ["seller/S1/USD"]
        assert accounts.next_page_token
        statement = await ledger.GetStatement(
            ledger_pb2.GetStatementRequest(account_name="seller/S1/USD", start_time=Timestamp(seconds=1))
        )
        assert statement.closing_balance_minor == 4501
        assert len(statement.lines) == 3

        missing = await error_of(ledger.GetAccount(ledger_pb2.GetAccountRequest(name="seller/nobody/USD")))
        assert isinstance(missing, NotFound)
        wrong = ledger_pb2.GetStatementRequest(account_name="seller/S1/USD", end_time=Timestamp(seconds=2**60))
        assert isinstance(await error_of(ledger.GetStatement(wrong)), InvalidArgument)
        token = await error_of(ledger.ListAccounts(ledger_pb2.ListAccountsRequest(page_token="nonsense")))
        assert token.reason == "PAGE_TOKEN_INVALID"
        for call in (
            ledger.ImportSettlement(ledger_pb2.ImportSettlementRequest(psp="sandbox", report_id="R")),
            ledger.ListBreaks(ledger_pb2.ListBreaksRequest()),
            ledger.ResolveBreak(ledger_pb2.ResolveBreakRequest(break_id="B", note="N", request_id="R")),
        ):
            refused = await error_of(call)
            assert isinstance(refused, Unimplemented)
            assert "ListJournalEntries" in refused.message


async def test_killed_at_any_moment_nothing_is_lost_or_doubled(
    postgres_dsn: str, valkey_url: str, bus: ValkeyBus
) -> None:
    events = [captured(f"ORD-{number}", 1, f"S{number % 5}") for number in range(600)]
    for round_number in range(3):
        await bus.publish(events[round_number * 200 : (round_number + 1) * 200])
        async with ledger_process(postgres_dsn, valkey_url) as (_, process):
            await asyncio.sleep(0.02 * (round_number + 1))
            process.send_signal(signal.SIGKILL)
            await process.wait()
    async with ledger_process(postgres_dsn, valkey_url) as (address, _), grpc.aio.insecure_channel(address) as channel:
        ledger = ledger_pb2_grpc.LedgerServiceStub(channel)

        async def is_whole() -> bool:
            answer = await ledger.GetTrialBalance(ledger_pb2.GetTrialBalanceRequest())
            return answer.balanced and [line.debit_minor for line in answer.lines] == [600]

        await eventually(is_whole, "600 events booked")
