"""The public client against a real server, blocking and asyncio: the same cases for both."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import ducat
import ducat.aio
from ducat import errors
from ducat.payment.v1 import payment_pb2
from ducat.wallet.v1 import wallet_pb2
from kernel.errors import FieldViolation, InvalidArgument, ResourceExhausted, Unavailable
from runtime import errors as server_errors
from runtime import trace
from runtime.grpc_server import GrpcServer
from runtime.security import create_token
from tests.integration.runtime.serving import PaymentServicer, load, serving

QUICK = ducat.Retry(count_max=3, base_s=0.01, cap_s=0.02)
ROOT = Path(__file__).resolve().parents[3]


class Either:
    """One of the two clients behind one awaitable face."""

    def __init__(self, kind: str, client: Any) -> None:
        self.kind = kind
        self.client = client

    async def call(self, service: str, method: str, *arguments: Any, **named: Any) -> Any:
        bound = getattr(getattr(self.client, service), method)
        if self.kind == "aio":
            return await bound(*arguments, **named)
        return await asyncio.to_thread(bound, *arguments, **named)

    async def stream(self, service: str, method: str, *arguments: Any, **named: Any) -> list[Any]:
        bound = getattr(getattr(self.client, service), method)
        if self.kind == "aio":
            return [each async for each in bound(*arguments, **named)]
        return await asyncio.to_thread(lambda: list(bound(*arguments, **named)))

    async def close(self) -> None:
        if self.kind == "aio":
            await self.client.close()
        else:
            await asyncio.to_thread(self.client.close)


Make = Callable[..., Either]


@pytest.fixture(params=["sync", "aio"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    made: list[Either] = []

    def client(server: GrpcServer | str, **named: Any) -> Either:
        address = server if isinstance(server, str) else server.address
        named = {"address": address, "retry": QUICK, **named}
        either = Either(request.param, ducat.Client(**named) if request.param == "sync" else ducat.aio.Client(**named))
        made.append(either)
        return either

    yield client
    for each in made:
        await each.close()


def failing(times: int, error: Exception) -> Callable[[Any, Any], Awaitable[None]]:
    """Raises the first so many times."""
    left = iter(range(times))

    async def behaviour(_request: Any, _context: Any) -> None:
        if next(left, None) is not None:
            raise error

    return behaviour


async def test_message_or_fields(make: Make) -> None:
    async with serving(PaymentServicer(), load()) as server:
        client = make(server)
        by_message = await client.call("payments", "get_payment", payment_pb2.GetPaymentRequest(checkout_id="CHK-1"))
        by_fields = await client.call("payments", "get_payment", checkout_id="CHK-1")
        assert by_message == by_fields
        assert by_fields.payment.checkout_id == "CHK-1"
        with pytest.raises(TypeError, match="not both"):
            await client.call("payments", "get_payment", payment_pb2.GetPaymentRequest(), checkout_id="CHK-1")
        with pytest.raises(TypeError, match="expected a GetPaymentRequest"):
            await client.call("payments", "get_payment", payment_pb2.ListPaymentsRequest())


@pytest.mark.parametrize("row", server_errors.TABLE, ids=lambda row: row.error.__name__)
async def test_every_error_is_typed_with_its_reason(make: Make, row: server_errors.Row) -> None:
    sent = row.error("what to do", reason="PROVIDER_REFUSED", metadata={"code": "51"})
    if isinstance(sent, InvalidArgument):
        sent = InvalidArgument("bad", violations=[FieldViolation("amount", "is zero")])
    async with serving(PaymentServicer(failing(99, sent)), load()) as server:
        with pytest.raises(ducat.DucatError) as caught:
            await make(server, retry=ducat.Retry(count_max=0)).call("payments", "cancel_payment", checkout_id="CHK-1")
    got = caught.value
    assert type(got) is getattr(errors, row.error.__name__)
    assert (got.code, got.reason, got.message) == (row.code, sent.reason, sent.message)
    assert got.metadata.items() >= sent.metadata.items()
    assert got.method == "ducat.payment.v1.PaymentService/CancelPayment"
    assert len(got.trace_id) == 32
    if isinstance(sent, InvalidArgument):
        assert got.violations == (errors.FieldViolation("amount", "is zero"),)
        assert "amount: is zero" in str(got)


async def test_retry_what_is_unavailable_or_unknown_until_it_answers(make: Make) -> None:
    seen = []
    for error in (Unavailable("later"), ConnectionResetError()):
        servicer = PaymentServicer(failing(2, error))
        async with serving(servicer, load()) as server:
            await make(server).call("payments", "cancel_payment", checkout_id="CHK-1")
        seen.append(servicer.calls)
    assert seen == [3, 3]


async def test_retry_is_bounded_by_count(make: Make) -> None:
    servicer = PaymentServicer(failing(99, Unavailable("later")))
    async with serving(servicer, load()) as server:
        with pytest.raises(errors.Unavailable):
            await make(server).call("payments", "cancel_payment", checkout_id="CHK-1")
    assert servicer.calls == 1 + QUICK.count_max


async def test_retry_is_bounded_by_the_deadline_of_the_whole_call(make: Make) -> None:
    servicer = PaymentServicer(failing(9999, Unavailable("later")))
    endless = ducat.Retry(count_max=9999, base_s=0.05, cap_s=0.05)
    loop = asyncio.get_running_loop()
    async with serving(servicer, load()) as server:
        begin_s = loop.time()
        with pytest.raises((errors.Unavailable, errors.DeadlineExceeded)):
            await make(server, retry=endless).call("payments", "cancel_payment", checkout_id="CHK-1", timeout_s=0.4)
        assert loop.time() - begin_s < 2
    assert servicer.calls > 1


@pytest.mark.parametrize("error", [ResourceExhausted("full"), InvalidArgument("bad"), RuntimeError("bug")], ids=repr)
async def test_retry_never_what_a_repetition_cannot_help(make: Make, error: Exception) -> None:
    servicer = PaymentServicer(failing(1, error))
    async with serving(servicer, load()) as server:
        with pytest.raises(ducat.DucatError):
            await make(server).call("payments", "cancel_payment", checkout_id="CHK-1")
    assert servicer.calls == 1


async def test_retry_never_a_stream(make: Make) -> None:
    servicer = PaymentServicer(failing(1, Unavailable("later")))
    async with serving(servicer, load()) as server:
        with pytest.raises(errors.Unavailable):
            await make(server).stream("payments", "watch_payment", checkout_id="CHK-1")
    assert servicer.calls == 1


async def test_retries_of_one_call_share_one_trace(make: Make) -> None:
    seen: list[str] = []
    fail = failing(2, Unavailable("later"))

    async def behaviour(request: Any, context: Any) -> None:
        seen.append(trace.current())
        await fail(request, context)

    async with serving(PaymentServicer(behaviour), load()) as server:
        client = make(server)
        await client.call("payments", "cancel_payment", checkout_id="CHK-1")
        await client.call("payments", "cancel_payment", checkout_id="CHK-2")
    assert len(set(seen)) == 4
    assert len({each[:35] for each in seen[:3]}) == 1
    assert seen[3][:35] != seen[0][:35]


async def test_a_server_that_comes_back_is_reached_again(make: Make) -> None:
    settings = load()
    async with serving(PaymentServicer(), settings) as server:
        address = server.address
        client = make(address, retry=ducat.Retry(count_max=40, base_s=0.05, cap_s=0.1))
        await client.call("payments", "get_payment", checkout_id="CHK-1")
    late = asyncio.ensure_future(client.call("payments", "get_payment", checkout_id="CHK-1"))
    await asyncio.sleep(0.3)
    again = PaymentServicer()
    server = GrpcServer(settings, [(again, _add(), "ducat.payment.v1.PaymentService")], {})
    await server.start(address)
    try:
        await late
    finally:
        await server.stop(0.2)
    assert again.calls == 1


def _add() -> Any:
    from ducat.payment.v1 import payment_service_pb2_grpc

    return payment_service_pb2_grpc.add_PaymentServiceServicer_to_server


async def test_a_deadline_ends_the_call(make: Make) -> None:
    async with serving(PaymentServicer(lambda *_: asyncio.sleep(5)), load()) as server:
        with pytest.raises(errors.DeadlineExceeded):
            await make(server, timeout_s=0.2).call("payments", "get_payment", checkout_id="CHK-1")


async def test_streams_both_ways(make: Make) -> None:
    async with serving(PaymentServicer(), load()) as server:
        client = make(server)
        watched = await client.stream("payments", "watch_payment", checkout_id="CHK-1")
        assert [each.payment.checkout_id for each in watched] == ["CHK-1", "CHK-1"]
        batches = [wallet_pb2.SubmitTransfersRequest(batch=wallet_pb2.TransferBatch(batch_id=n)) for n in (1, 300)]
        answers = await client.stream("wallet", "submit_transfers", batches)
        assert [each.result.batch_id for each in answers] == [each.ByteSize() for each in batches]


async def test_leaving_a_stream_ends_it_on_the_server() -> None:
    ended, began = asyncio.Event(), threading.Event()

    async def wait(_request: Any, _context: Any) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def read_one(address: str) -> None:
        with ducat.Client(address=address) as client, client.payments.watch_payment(checkout_id="CHK-1") as changes:
            for _ in zip(range(2), changes, strict=False):
                pass
            assert began.wait(30)

    async with serving(PaymentServicer(wait), load()) as server, ducat.aio.Client(address=server.address) as client:
        async with client.payments.watch_payment(checkout_id="CHK-1") as changes:
            await anext(changes)
            await anext(changes)
            assert await asyncio.to_thread(began.wait, 30)
        async with asyncio.timeout(60):
            await ended.wait()
        ended.clear()
        began.clear()
        await asyncio.to_thread(read_one, server.address)
        async with asyncio.timeout(60):
            await ended.wait()


async def test_a_token_that_changes_is_asked_for_at_each_try(make: Make, tmp_path: Path) -> None:
    path = str(tmp_path / "tokens.toml")
    tokens: Iterator[str] = iter([create_token(path, "one", ["payments.*"]), create_token(path, "two", [])])
    async with serving(PaymentServicer(), load(auth_tokens_file=path)) as server:
        client = make(server, token=lambda: next(tokens))
        await client.call("payments", "get_payment", checkout_id="CHK-1")
        with pytest.raises(errors.PermissionDenied) as caught:
            await client.call("payments", "get_payment", checkout_id="CHK-1")
    assert caught.value.metadata["scope"] == "payments.read"


async def test_a_closed_client_says_so(make: Make) -> None:
    async with serving(PaymentServicer(), load()) as server:
        client = make(server)
        await client.close()
        with pytest.raises(ValueError, match="closed"):
            await client.call("ledger", "get_trial_balance")


async def test_threads_share_one_client() -> None:
    servicer = PaymentServicer()
    async with serving(servicer, load()) as server:
        with ducat.Client(address=server.address) as client:
            calls = [asyncio.to_thread(client.payments.get_payment, checkout_id=f"CHK-{n}") for n in range(20)]
            answers = await asyncio.gather(*calls)
    assert [each.payment.checkout_id for each in answers] == [f"CHK-{n}" for n in range(20)]


GEVENT = """
from gevent import monkey; monkey.patch_all()
import grpc.experimental.gevent; grpc.experimental.gevent.init_gevent()
import gevent, sys, time
import ducat
client = ducat.Client(address=sys.argv[1])
begin = time.perf_counter()
jobs = [gevent.spawn(client.payments.cancel_payment, checkout_id=f"CHK-{n}") for n in range(10)]
gevent.joinall(jobs, raise_error=True)
print("together" if time.perf_counter() - begin < 2.5 else "one after another")
client.close()
"""


async def test_gevent_greenlets_call_at_the_same_time() -> None:
    async with serving(PaymentServicer(lambda *_: asyncio.sleep(0.3)), load()) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", GEVENT, server.address, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(60):
            out, problems = await process.communicate()
    assert out.decode().strip() == "together", problems.decode()


async def test_the_import_opens_no_channel_and_starts_no_thread() -> None:
    before = threading.active_count()
    client = ducat.Client(address="127.0.0.1:1")
    assert client.payments is client.payments
    assert client._channels == {}
    assert threading.active_count() == before
    client.close()


async def test_a_channel_of_ones_own_is_given_out_for_raw_calls() -> None:
    async with serving(PaymentServicer(), load()) as server, ducat.aio.Client(address=server.address) as client:
        call = client.channel("payment").unary_unary("/ducat.payment.v1.PaymentService/GetPayment")
        raw = await call(
            payment_pb2.GetPaymentRequest(checkout_id="CHK-1").SerializeToString(), metadata=client.metadata()
        )
        assert payment_pb2.GetPaymentResponse.FromString(raw).payment.checkout_id == "CHK-1"
        assert isinstance(client.channel("payment"), grpc.aio.Channel)
