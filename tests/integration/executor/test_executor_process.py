"""The executor process against a real PostgreSQL, a real Valkey and the real sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import grpc.aio
import pytest

from ducat.common.v1 import common_pb2
from ducat.event.v1 import event_pb2
from ducat.executor.v1 import executor_pb2, executor_pb2_grpc
from ducat.payment.v1 import payment_service_pb2_grpc, payout_pb2
from runtime.bus import Bus, Message, open_bus
from tests import prefork
from tests.contract.psp.sandbox_server import Gateway, RunningSandbox, Server

ROOT = Path(__file__).parents[3]


class Platform:
    """What an executor stands on, and the events that it told."""

    def __init__(self, dsn: str, valkey_url: str, sandbox: RunningSandbox, bus: Bus) -> None:
        self.dsn = dsn
        self.valkey_url = valkey_url
        self.sandbox = sandbox
        self.bus = bus
        self.events: list[event_pb2.Envelope] = []
        self._changed = asyncio.Condition()

    async def keep(self, messages: list[Message]) -> None:
        async with self._changed:
            self.events += [event_pb2.Envelope.FromString(message.payload) for message in messages]
            self._changed.notify_all()

    async def until(self, count: int, timeout_s: float = 30.0, without: str = "") -> list[event_pb2.Envelope]:
        """So many events, those of the kind `without` left out; one that is published again after a kill counts once."""

        def told() -> list[event_pb2.Envelope]:
            fresh = {each.event_id: each for each in self.events if each.WhichOneof("body") != without}
            return list(fresh.values())

        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len(told()) >= count)
        return told()

    async def order(self, *references: str, psp: str = "sandbox") -> None:
        await self.bus.publish(
            [
                Message("payment.commands", reference, f"cmd-{reference}", execute(reference, psp).SerializeToString())
                for reference in references
            ]
        )

    async def rows(self) -> dict[str, asyncpg.Record]:
        connection = await asyncpg.connect(self.dsn)
        try:
            return {row["reference"]: row for row in await connection.fetch("SELECT * FROM executor.attempt")}
        finally:
            await connection.close()

    @asynccontextmanager
    async def executor(self, **environment: str) -> AsyncIterator[tuple[prefork.ForkedProcess, str]]:
        """`python -m executor` on a free port: the process and its address."""
        psp = {
            "name": "sandbox",
            "adapter": "sandbox",
            "base_url": self.sandbox.base_url,
            "api_key": "sk_contract",
            "payout_api_key": "sk_contract_payout",
            "webhook_secret": "whsec_contract",
        }
        process = await prefork.start(
            "executor",
            env={
                **os.environ,
                "DUCAT_DATABASE_URL": self.dsn,
                "DUCAT_REDIS_URL": self.valkey_url,
                "DUCAT_EXECUTOR_LISTEN": "127.0.0.1:0",
                "DUCAT_PSPS": json.dumps([psp]),
                "DUCAT_PSP_TIMEOUT_MS": "1000",
                "DUCAT_UNKNOWN_POLL_SCHEDULE_S": "[1]",
                "DUCAT_BUS_CLAIM_IDLE_MS": "500",
                "DUCAT_LOG_FORMAT": "text",
                **environment,
            },
        )
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
            assert line.startswith("ready executor "), line
            yield process, line.split()[2]
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), 60) == 0


def execute(reference: str, psp: str = "sandbox") -> event_pb2.Envelope:
    return event_pb2.Envelope(
        event_id=f"cmd-{reference}",
        execute_order=event_pb2.ExecuteOrder(
            payment_order_id=reference,
            checkout_id="CHCKT-1",
            seller_account="SELL-1",
            amount=common_pb2.Money(currency_code="USD", amount_minor=7500),
            psp=psp,
        ),
    )


@pytest.fixture
async def platform(postgres_dsn: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Platform]:
    gateway = Server(Gateway())
    await gateway.start()
    sandbox = RunningSandbox(tmp_path, gateway.url)
    await sandbox.start()
    bus = await open_bus("valkey", redis_url=valkey_url, name="test")
    platform = Platform(postgres_dsn, valkey_url, sandbox, bus)
    consuming = asyncio.create_task(bus.consume("executor.events", "payment", platform.keep))
    yield platform
    consuming.cancel()
    await asyncio.gather(consuming, return_exceptions=True)
    await bus.close()
    await sandbox.kill()
    await gateway.kill()


async def test_orders_of_a_checkout_are_registered(platform: Platform) -> None:
    async with platform.executor():
        await platform.order("ORD-A", "ORD-B", "ORD-fault-reject")
        events = {each.WhichOneof("body") + " " + _reference(each): each for each in await platform.until(3)}
    assert set(events) == {"order_registered ORD-A", "order_registered ORD-B", "order_rejected ORD-fault-reject"}
    registered = events["order_registered ORD-A"].order_registered
    assert registered.psp == "sandbox"
    assert registered.psp_token.startswith("pi_")
    assert registered.hosted_page_url.startswith(platform.sandbox.base_url)
    assert events["order_rejected ORD-fault-reject"].order_rejected.code == "account_closed"


async def test_ambiguous_answers_become_known_and_never_failed(platform: Platform) -> None:
    async with platform.executor():
        await platform.order("ORD-fault-timeout", "ORD-fault-lost", "ORD-fault-error_after")
        events = await platform.until(3)
        rows = await platform.rows()
    assert [each.WhichOneof("body") for each in events] == ["order_registered"] * 3
    assert {row["state"] for row in rows.values()} == {2}
    assert rows["ORD-fault-timeout"]["call_count"] == 1
    assert rows["ORD-fault-lost"]["call_count"] == 2


async def test_killed_in_the_middle_each_order_ends_once(platform: Platform) -> None:
    references = [f"ORD-{number}" for number in range(40)]
    await platform.order(*references)
    async with platform.executor(DUCAT_EXECUTOR_CONCURRENCY="4") as (first, _):
        await platform.until(3)
        first.send_signal(signal.SIGKILL)
        await first.wait()
    async with platform.executor(), platform.executor():
        events = await platform.until(40)
    told: dict[str, set[str]] = {}
    for each in events:
        assert each.WhichOneof("body") == "order_registered"
        told.setdefault(_reference(each), set()).add(each.order_registered.psp_token)
    assert set(told) == set(references)
    assert all(len(tokens) == 1 for tokens in told.values())
    assert platform.sandbox.sandbox.store.count() == {"payment_intent requires_payment": 40}


async def test_a_psp_that_is_down_loses_no_order(platform: Platform) -> None:
    await platform.sandbox.kill()
    async with platform.executor() as (_, address):
        await platform.order(*(f"ORD-{number}" for number in range(8)))
        async with grpc.aio.insecure_channel(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            async with asyncio.timeout(60):
                while True:
                    (provider,) = (await stub.ListProviders(executor_pb2.ListProvidersRequest())).providers
                    if not provider.healthy:
                        break
                    await asyncio.sleep(0.1)
        assert provider.failure_count >= 5
        assert not platform.events
        await platform.sandbox.start()
        events = await platform.until(8)
    assert {each.WhichOneof("body") for each in events} == {"order_registered"}


async def test_an_outcome_without_a_webhook_is_found(platform: Platform) -> None:
    async with platform.executor(DUCAT_ACCEPTED_POLL_SCHEDULE_S="[1]"):
        await platform.order("ORD-A")
        token = (await platform.until(1))[0].order_registered.psp_token
        stored = platform.sandbox.sandbox.store.get("sandbox", "payment_intent", token)
        assert stored is not None
        stored.status = "succeeded"
        platform.sandbox.sandbox.store.update(stored)
        found = (await platform.until(2))[1].outcome_found
    assert (found.merchant_reference, found.kind, found.object_kind) == ("ORD-A", "order_succeeded", "order")
    assert found.amount.amount_minor == 7500
    assert found.psp_object_id == token


async def test_rpc(platform: Platform) -> None:
    async with platform.executor() as (_, address), grpc.aio.insecure_channel(address) as channel:
        stub = executor_pb2_grpc.ExecutorServiceStub(channel)
        request = executor_pb2.ExecuteOrderRequest(order=execute("ORD-A").execute_order)
        first = (await stub.ExecuteOrder(request)).attempt
        second = (await stub.ExecuteOrder(request)).attempt
        assert first.state == executor_pb2.ATTEMPT_STATE_ACCEPTED
        assert (first.psp_object_id, second.call_count) == (second.psp_object_id, 1)
        queried = await stub.QueryAttempt(
            executor_pb2.QueryAttemptRequest(merchant_reference="ORD-A", kind="ATTEMPT_KIND_ORDER", refresh=True)
        )
        assert queried.attempt.hosted_page_url == first.hosted_page_url
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.VerifyNotification(
                executor_pb2.VerifyNotificationRequest(
                    psp="sandbox", body=b"{}", headers={"sandbox-signature": "t=1,v1=00"}
                )
            )
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await stub.QueryAttempt(
                executor_pb2.QueryAttemptRequest(merchant_reference="ORD-Z", kind="ATTEMPT_KIND_ORDER")
            )
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        broken = event_pb2.ExecuteOrder(amount=common_pb2.Money(currency_code="XXX", amount_minor=-1))
        for text in ("", "ORD-\0"):
            broken.payment_order_id = text
            with pytest.raises(grpc.aio.AioRpcError) as wrong:
                await stub.ExecuteOrder(executor_pb2.ExecuteOrderRequest(order=broken))
            assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as unstorable:
            await stub.QueryAttempt(
                executor_pb2.QueryAttemptRequest(merchant_reference="ORD\0", kind="ATTEMPT_KIND_ORDER")
            )
        assert unstorable.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        nobody = execute("ORD-N", psp="nobody").execute_order
        rejected = (await stub.ExecuteOrder(executor_pb2.ExecuteOrderRequest(order=nobody))).attempt
        assert (rejected.state, rejected.code) == (executor_pb2.ATTEMPT_STATE_REJECTED, "no_provider")


class Payment(payment_service_pb2_grpc.PaymentServiceServicer):
    """The one method of the payment service that the executor calls."""

    def __init__(self) -> None:
        self.state = payout_pb2.PAYOUT_STATE_PENDING

    async def GetPayoutInstruction(self, request: Any, context: Any) -> payout_pb2.GetPayoutInstructionResponse:
        return payout_pb2.GetPayoutInstructionResponse(
            reference=request.reference,
            amount=common_pb2.Money(currency_code="USD", amount_minor=750),
            recipient=payout_pb2.BankAccount(
                account_holder_name="Jane Doe",
                account_number="1234567890",
                country_code="US",
                aba_routing_number="021000021",
                address=payout_pb2.PostalAddress(city="Anytown"),
            ),
            purpose="work",
            psp="sandbox",
            state=self.state,
        )


@pytest.fixture
async def payment() -> AsyncIterator[tuple[Payment, str]]:
    server = grpc.aio.server()
    payment = Payment()
    payment_service_pb2_grpc.add_PaymentServiceServicer_to_server(payment, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield payment, f"127.0.0.1:{port}"
    await server.stop(None)


async def test_payouts(platform: Platform, payment: tuple[Payment, str]) -> None:
    async with platform.executor(DUCAT_PAYMENT_ADDRESS=payment[1]) as (_, address):
        for reference in ("PO-1", "PO-fault-block", "PO-fault-timeout", "PO-fault-error_after"):
            envelope = event_pb2.Envelope(
                event_id=reference, execute_payout=event_pb2.ExecutePayout(reference=reference)
            )
            await platform.bus.publish(
                [Message("payment.commands", reference, reference, envelope.SerializeToString())]
            )
        events = {str(_body(each).reference): each for each in await platform.until(4, without="outcome_found")}
        payment[0].state = payout_pb2.PAYOUT_STATE_CANCELED
        async with grpc.aio.insecure_channel(address) as channel:
            canceled = await executor_pb2_grpc.ExecutorServiceStub(channel).ExecutePayout(
                executor_pb2.ExecutePayoutRequest(payout=event_pb2.ExecutePayout(reference="PO-canceled"))
            )
        rows = await platform.rows()
    assert {reference: each.WhichOneof("body") for reference, each in events.items()} == {
        "PO-1": "payout_submitted",
        "PO-fault-block": "payout_rejected",
        "PO-fault-timeout": "payout_submitted",
        "PO-fault-error_after": "payout_submitted",
    }
    assert events["PO-1"].payout_submitted.psp_payout_id.startswith("po_")
    assert events["PO-fault-block"].payout_rejected.compliance
    assert canceled.attempt.state == executor_pb2.ATTEMPT_STATE_REJECTED
    assert "1234567890" not in str([dict(row) for row in rows.values()])
    assert sum(platform.sandbox.sandbox.store.count().values()) == 4


async def test_a_cancel_that_meets_an_unknown_order_is_done_when_it_is_known(platform: Platform) -> None:
    async with platform.executor():
        await platform.order("ORD-fault-timeout")
        cancel = event_pb2.Envelope(
            event_id="c", cancel_order=event_pb2.CancelOrder(payment_order_id="ORD-fault-timeout")
        )
        await platform.bus.publish([Message("payment.commands", "ORD-fault-timeout", "c", cancel.SerializeToString())])
        events = await platform.until(2)
    assert [each.WhichOneof("body") for each in events] == ["order_registered", "outcome_found"]
    assert events[1].outcome_found.kind == "order_canceled"


def _body(envelope: event_pb2.Envelope) -> Any:
    return getattr(envelope, envelope.WhichOneof("body"))


def _reference(envelope: event_pb2.Envelope) -> str:
    return str(getattr(envelope, envelope.WhichOneof("body")).payment_order_id)
