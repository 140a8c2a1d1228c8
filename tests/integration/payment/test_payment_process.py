"""`python -m payment` as an operating-system process: over real PostgreSQL and Valkey, killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from ducat.common.v1.common_pb2 import Money
from ducat.event.v1 import event_pb2
from ducat.executor.v1 import executor_pb2, executor_pb2_grpc
from ducat.payment.v1 import payment_pb2
from ducat.payment.v1.payment_service_pb2_grpc import PaymentServiceStub
from runtime.bus import Bus, Message, open_bus
from tests import prefork


class Executor(executor_pb2_grpc.ExecutorServiceServicer):
    """Takes the body as the order's id and says that it is paid."""

    async def VerifyNotification(self, request: Any, context: Any) -> executor_pb2.VerifyNotificationResponse:
        order_id = request.body.decode()
        if request.headers.get("signature") != "good":
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "signature")
        return executor_pb2.VerifyNotificationResponse(
            notifications=[
                executor_pb2.Notification(
                    psp_event_id=f"evt_{order_id}",
                    kind=executor_pb2.NOTIFICATION_KIND_ORDER_SUCCEEDED,
                    psp_object_id=f"pi_{order_id}",
                    merchant_reference=order_id,
                    amount=Money(currency_code="USD", amount_minor=7500),
                )
            ]
        )


class Platform:
    """The payment process's surroundings, and the process itself, which may die and come back."""

    def __init__(self, environment: dict[str, str], bus: Bus) -> None:
        self.environment = environment
        self.bus = bus
        self.process: prefork.ForkedProcess | None = None
        self.payment: Any = None
        self.commands: list[str] = []
        self.events: list[event_pb2.Envelope] = []

    async def start(self) -> None:
        self.process = await prefork.start("payment", env=self.environment)
        line = (await asyncio.wait_for(self.process.stdout.readline(), 60)).decode().split()
        assert line[:2] == ["ready", "payment"]
        self.payment = PaymentServiceStub(grpc.aio.insecure_channel(line[2]))

    async def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 60)

    async def register(self, message: Message) -> None:
        """As the executor: answers the command with a registration whose id is the order's."""
        order = event_pb2.Envelope.FromString(message.payload).execute_order
        self.commands.append(order.payment_order_id)
        registered = event_pb2.Envelope(
            event_id=f"registered-{order.payment_order_id}",
            order_registered=event_pb2.OrderRegistered(
                payment_order_id=order.payment_order_id,
                psp="sandbox",
                psp_token=f"pi_{order.payment_order_id}",
                hosted_page_url="http://pay",
            ),
        )
        key, payload = order.payment_order_id, registered.SerializeToString()
        await self.bus.publish([Message("executor.events", key, registered.event_id, payload)])

    async def collect(self, messages: Any) -> None:
        self.events += [event_pb2.Envelope.FromString(message.payload) for message in messages]

    def create(self, checkout_id: str) -> Any:
        return self.payment.CreatePayment(
            payment_pb2.CreatePaymentRequest(
                checkout_id=checkout_id,
                buyer_info=payment_pb2.BuyerInfo(buyer_id="B"),
                payment_orders=[
                    payment_pb2.PaymentOrderSpec(
                        payment_order_id=f"{checkout_id}-{name}",
                        seller_account="S",
                        amount=Money(currency_code="USD", amount_minor=7500),
                    )
                    for name in "AB"
                ],
            ),
            timeout=10,
        )

    def tell(self, order_id: str, signature: str = "good") -> Any:
        return self.payment.RecordNotification(
            payment_pb2.RecordNotificationRequest(
                psp="sandbox",
                body=order_id.encode(),
                headers={"signature": signature},
                channel=payment_pb2.NOTIFICATION_CHANNEL_PAYMENT,
            ),
            timeout=10,
        )

    async def until(self, checkout_id: str, state: int) -> payment_pb2.Payment:
        """Watches the payment until each of its orders has reached the state."""
        request = payment_pb2.WatchPaymentRequest(checkout_id=checkout_id)
        async for response in self.payment.WatchPayment(request, timeout=20):
            if all(order.state == state for order in response.payment.payment_orders):
                return response.payment  # type: ignore[no-any-return]
        raise AssertionError("the stream ended before")


@asynccontextmanager
async def running(postgres_dsn: str, valkey_url: str) -> AsyncIterator[Platform]:
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(Executor(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    bus = await open_bus("valkey", redis_url=valkey_url, name="test")
    environment = os.environ | {
        "DUCAT_DATABASE_URL": postgres_dsn,
        "DUCAT_REDIS_URL": valkey_url,
        "DUCAT_PAYMENT_LISTEN": "127.0.0.1:0",
        "DUCAT_EXECUTOR_ADDRESS": f"127.0.0.1:{port}",
    }
    platform = Platform(environment, bus)
    consumers = [
        asyncio.ensure_future(bus.consume_each("payment.commands", "executor", platform.register)),
        asyncio.ensure_future(bus.consume("payment.events", "wallet", platform.collect)),
    ]
    try:
        await platform.start()
        yield platform
    finally:
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        if platform.process is not None and platform.process.returncode is None:
            await platform.end(signal.SIGKILL)
        await bus.close()
        await server.stop(0)


async def test_a_checkout_through_the_real_process(postgres_dsn: str, valkey_url: str) -> None:
    async with running(postgres_dsn, valkey_url) as platform:
        created = await platform.create("CH-1")
        base, _, key = created.payment.checkout_url.rpartition("/")
        assert (base, len(bytes.fromhex(key))) == ("http://127.0.0.1:8080/checkout", 16)
        await platform.until("CH-1", payment_pb2.PAYMENT_ORDER_STATE_EXECUTING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await platform.tell("CH-1-A", signature="bad")
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await platform.tell("CH-1-A")).applied_count == 1
        assert (await platform.tell("CH-1-A")).duplicate_count == 1
        assert (await platform.tell("CH-1-B")).applied_count == 1
        payment = await platform.until("CH-1", payment_pb2.PAYMENT_ORDER_STATE_SUCCESS)
        assert payment.is_payment_done
        assert await platform.end(signal.SIGTERM) == 0


async def test_killed_at_any_moment_each_payment_still_ends_once(postgres_dsn: str, valkey_url: str) -> None:
    checkouts = [f"CH-{number}" for number in range(12)]
    async with running(postgres_dsn, valkey_url) as platform:
        creating = asyncio.gather(*(platform.create(each) for each in checkouts), return_exceptions=True)
        await asyncio.sleep(0.03)  # in the middle of it
        await platform.end(signal.SIGKILL)
        await creating
        await platform.start()
        # Whoever got no answer sends the same request again.
        await asyncio.gather(*(platform.create(each) for each in checkouts))
        for each in checkouts:
            await platform.until(each, payment_pb2.PAYMENT_ORDER_STATE_EXECUTING)
        orders = [f"{each}-{name}" for each in checkouts for name in "AB"]
        telling = asyncio.gather(*(platform.tell(each) for each in orders), return_exceptions=True)
        await asyncio.sleep(0.03)
        await platform.end(signal.SIGKILL)
        await telling
        await platform.start()
        # A PSP sends again until it gets a 2xx.
        for each in orders:
            await platform.tell(each)
        for each in checkouts:
            assert (await platform.until(each, payment_pb2.PAYMENT_ORDER_STATE_SUCCESS)).is_payment_done
        async with asyncio.timeout(60):
            while len({event.event_id for event in platform.events}) < 36:  # noqa: ASYNC110 - the bus has no end to wait for
                await asyncio.sleep(0.02)
    kinds = {event.event_id: event.WhichOneof("body") for event in platform.events}
    assert sorted(kinds.values()) == ["payment_completed"] * 12 + ["payment_order_succeeded"] * 24
    # Delivered again after a crash or not: the same event always says the same, its time included.
    assert len({event.SerializeToString(deterministic=True) for event in platform.events}) == 36
    assert set(platform.commands) == set(orders)
