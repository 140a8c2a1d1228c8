"""What stands around every servicer's method, over a real connection on loopback."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from ducat.payment.v1 import payment_pb2, payment_service_pb2_grpc
from ducat.wallet.v1 import wallet_pb2, wallet_service_pb2_grpc
from kernel.errors import (
    DeadlineExceeded,
    DucatError,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from runtime import errors, logs, trace
from runtime.channel import open_channel
from runtime.grpc_server import GrpcServer, shielded
from runtime.metrics import RpcMetrics
from runtime.security import create_token
from runtime.settings import SettingsInvalid
from tests.integration.runtime.serving import SERVICE, WALLET, PaymentServicer, load, served, serving, until

GET = payment_pb2.GetPaymentRequest(checkout_id="CHK-1")
CANCEL = payment_pb2.CancelPaymentRequest(checkout_id="CHK-1")


def raising(error: BaseException) -> Any:
    async def behaviour(_request: Any, _context: Any) -> None:
        raise error

    return behaviour


async def failure(call: Any) -> DucatError:
    """The typed error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return errors.from_rpc_error(caught.value)


# --- errors


@pytest.mark.parametrize("row", errors.TABLE, ids=lambda row: row.error.__name__)
async def test_every_error_crosses_the_wire_as_itself(row: errors.Row) -> None:
    sent: DucatError = row.error("what came, what to do", reason="PROVIDER_REFUSED", metadata={"fact": "ünïcode"})
    if isinstance(sent, InvalidArgument):
        sent = InvalidArgument(
            "bad",
            violations=[FieldViolation("payment_orders[0].amount", "is zero"), FieldViolation("buyer", "missing")],
        )
    async with served(PaymentServicer(raising(sent)), load()) as (stub, _, _):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.CancelPayment(CANCEL)
    assert caught.value.code() is row.code
    got = errors.from_rpc_error(caught.value)
    assert type(got) is row.error
    assert (got.message, got.reason) == (sent.message, sent.reason)
    assert got.metadata.items() >= sent.metadata.items()
    assert errors.http_status_of(got) == row.http_status
    if isinstance(sent, InvalidArgument):
        assert isinstance(got, InvalidArgument)
        assert got.violations == sent.violations


async def test_a_bug_gives_nothing_away_but_its_trace_id(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("payment")
    bug = RuntimeError("password=hunter2 at /srv/ducat/payment/adapters/db.py")
    async with served(PaymentServicer(raising(bug)), load()) as (stub, _, _):
        with trace.bind() as traceparent:
            got = await failure(stub.CancelPayment(CANCEL))
    assert type(got) is Internal
    assert "hunter2" not in str(got.metadata) + got.message
    assert got.metadata["trace_id"] == traceparent[3:35]
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"call failed"' in line]
    assert logged[0]["trace_id"] == traceparent[3:35]
    assert "RuntimeError" in logged[0]["traceback"]
    assert logged[0]["method"] == f"/{SERVICE}/CancelPayment"


@pytest.mark.parametrize("lost", [ConnectionRefusedError("refused"), ConnectionResetError("reset")])
async def test_a_dependency_that_is_down_is_unavailable(lost: Exception) -> None:
    async with served(PaymentServicer(raising(lost)), load()) as (stub, _, _):
        got = await failure(stub.CancelPayment(CANCEL))
    assert type(got) is Unavailable


async def test_an_error_with_endless_details_still_arrives() -> None:
    """gRPC drops a status whose trailing metadata are too large."""
    many = [FieldViolation(f"payment_orders[{index}].amount", "ж" * 900) for index in range(1000)]
    async with served(PaymentServicer(raising(InvalidArgument("ж" * 9000, violations=many))), load()) as (stub, _, _):
        got = await failure(stub.CancelPayment(CANCEL))
    assert isinstance(got, InvalidArgument)
    assert got.violations
    assert got.violations[0].field == "payment_orders[0].amount"


async def test_errors_of_streams_are_typed_too() -> None:
    async with served(PaymentServicer(raising(NotFound("no such payment"))), load()) as (stub, _, _):
        call = stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))
        iterator = call.__aiter__()
        assert (await anext(iterator)).payment.checkout_id == "CHK-1"
        await anext(iterator)
        assert type(await failure(anext(iterator))) is NotFound


# --- what comes in


async def test_field_rules_of_the_proto_are_checked_before_the_servicer() -> None:
    servicer = PaymentServicer()
    async with served(servicer, load()) as (stub, _, _):
        got = await failure(stub.GetPayment(payment_pb2.GetPaymentRequest(checkout_id="x" * 200)))
        watched = stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id=""))
        streamed = await failure(anext(watched.__aiter__()))
    assert isinstance(got, InvalidArgument)
    assert [violation.field for violation in got.violations] == ["checkout_id"]
    assert got.reason == "INVALID_ARGUMENT"
    assert isinstance(streamed, InvalidArgument)
    assert servicer.calls == 0


async def test_a_violation_names_the_path_into_a_list() -> None:
    servicer = WalletRows()
    server = GrpcServer(
        load(),
        [(servicer, wallet_service_pb2_grpc.add_WalletServiceServicer_to_server, "ducat.wallet.v1.WalletService")],
        {},
    )
    address = await server.start("127.0.0.1:0")
    try:
        async with open_channel(address, load()) as channel:
            stub = wallet_service_pb2_grpc.WalletServiceStub(channel)
            rows = [wallet_pb2.Transfer(transfer_id=b"x" * 16), wallet_pb2.Transfer(transfer_id=b"short")]
            got = await failure(stub.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=rows)))
    finally:
        await server.stop(0.2)
    assert isinstance(got, InvalidArgument)
    assert [violation.field for violation in got.violations] == ["transfers[1].transfer_id"]


class WalletRows(wallet_service_pb2_grpc.WalletServiceServicer):
    async def CreateTransfers(self, request: Any, context: Any) -> Any:
        return wallet_pb2.CreateTransfersResponse()


async def test_bytes_that_are_no_message_are_the_callers_mistake() -> None:
    async with served(PaymentServicer(), load()) as (_, _, channel):
        call = channel.unary_unary(f"/{SERVICE}/GetPayment")
        got = await failure(call(b"\xff\xff\xff"))
    assert type(got) is InvalidArgument


async def test_a_message_above_the_limit_is_refused() -> None:
    request = payment_pb2.CancelPaymentRequest(checkout_id="CHK-1", reason="x" * 8192)
    small = load(grpc_message_bytes_max=4096)
    async with serving(PaymentServicer(), small) as server, open_channel(server.address, load()) as channel:
        stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
        assert type(await failure(stub.CancelPayment(request))) is ResourceExhausted


# --- what is not served


async def test_a_method_that_is_not_served_yet_says_so() -> None:
    async with served(PaymentServicer(), load()) as (stub, _, _):
        got = await failure(stub.ListRefunds(payment_pb2.ListRefundsRequest()))
        assert type(got) is Unimplemented
        assert got.reason == "UNIMPLEMENTED"
        assert "ListRefunds" in got.message


async def test_a_method_that_nobody_has_says_so() -> None:
    async with served(PaymentServicer(), load()) as (_, _, channel):
        got = await failure(channel.unary_unary("/ducat.payment.v1.PaymentService/Steal")(b""))
        other = await failure(channel.unary_unary("/no.such.Service/Method")(b""))
    assert type(got) is type(other) is Unimplemented
    assert (got.reason, other.reason) == ("UNIMPLEMENTED", "UNIMPLEMENTED")


async def test_a_servicer_that_would_block_the_loop_is_refused_at_the_start() -> None:
    class Blocking(payment_service_pb2_grpc.PaymentServiceServicer):
        def GetPayment(self, request: Any, context: Any) -> Any:
            return payment_pb2.GetPaymentResponse()

    add = payment_service_pb2_grpc.add_PaymentServiceServicer_to_server
    with pytest.raises(TypeError, match="async def"):
        await GrpcServer(load(), [(Blocking(), add, SERVICE)], {}).start("127.0.0.1:0")


# --- who may call


async def authenticated(tmp_path: Any, scopes: list[str], **overrides: Any) -> tuple[Any, Any]:
    path = str(tmp_path / "tokens.toml")
    token = create_token(path, "tester", scopes)
    return load(auth_tokens_file=path, auth_token=token), load(auth_tokens_file=path, **overrides)


async def test_a_token_with_the_scope_may_call(tmp_path: Any) -> None:
    settings, _ = await authenticated(tmp_path, ["payments.read", "wallet.*"])
    async with served(PaymentServicer(), settings) as (stub, _, channel):
        assert (await stub.GetPayment(GET)).payment.checkout_id == "CHK-1"
        denied = await failure(stub.CancelPayment(CANCEL))
        assert type(denied) is PermissionDenied
        assert denied.reason == "SCOPE_MISSING"
        assert denied.metadata["scope"] == "payments.write"
        wallet = wallet_service_pb2_grpc.WalletServiceStub(channel)
        batch = wallet_pb2.SubmitTransfersRequest(batch=wallet_pb2.TransferBatch(batch_id=7))
        answers = [answer async for answer in wallet.SubmitTransfers(iter([batch]))]
        assert answers[0].result.batch_id == batch.ByteSize()


@pytest.mark.parametrize("token", ["", "ducat_wrong"])
async def test_without_a_known_token_nothing_is_parsed_or_called(tmp_path: Any, token: str) -> None:
    _, settings = await authenticated(tmp_path, ["*"], auth_token=token)
    servicer = PaymentServicer()
    async with served(servicer, settings) as (stub, _, channel):
        broken = await failure(channel.unary_unary(f"/{SERVICE}/GetPayment")(b"\xff\xff\xff"))
        unary = await failure(stub.GetPayment(GET))
        watched = stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))
        stream = await failure(anext(watched.__aiter__()))
        wallet = wallet_service_pb2_grpc.WalletServiceStub(channel)
        raw = await failure(anext(wallet.SubmitTransfers(iter([])).__aiter__()))
        unserved = await failure(stub.ListRefunds(payment_pb2.ListRefundsRequest()))
    for each in (broken, unary, stream, raw, unserved):
        assert type(each) is Unauthenticated
        assert each.reason == "UNAUTHENTICATED"
    assert servicer.calls == 0


async def test_a_method_without_a_scope_entry_is_refused_even_with_every_scope(tmp_path: Any) -> None:
    settings, _ = await authenticated(tmp_path, ["*"])
    async with served(PaymentServicer(), settings) as (stub, _, _):
        request = payment_pb2.CreateRefundRequest(refund_id="R-1", payment_order_id="ORD-1")
        assert type(await failure(stub.CreateRefund(request))) is PermissionDenied


async def test_health_needs_no_token_and_reflection_is_closed_where_there_are_tokens(tmp_path: Any) -> None:
    settings, _ = await authenticated(tmp_path, ["*"])
    async with serving(PaymentServicer(), settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await anext(reflection.ServerReflectionInfo(iter([])).__aiter__())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_half_a_message_without_a_token_is_refused_when_its_head_has_come(tmp_path: Any) -> None:
    """Before: authorize ran after gRPC had read the message; 300 half-sent ones of 900 kB on one connection were kept for ever."""
    settings, _ = await authenticated(tmp_path, ["*"])
    async with serving(PaymentServicer(), settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        for method in (f"/{SERVICE}/CancelPayment", f"/{WALLET}/CreateTransfers", "/no.Service/Method"):
            call = channel.stream_stream(method)()  # a head, and no message
            async with asyncio.timeout(5):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_health_check_whose_message_does_not_come_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.grpc_server.MESSAGE_TIMEOUT_S", 0.05)
    async with serving(PaymentServicer(), load()) as server, grpc.aio.insecure_channel(server.address) as channel:
        for method in ("Check", "Watch"):
            call = channel.stream_stream(f"/grpc.health.v1.Health/{method}")()
            async with asyncio.timeout(5):
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- raw handlers


async def test_raw_handlers_get_bytes_and_typed_errors() -> None:
    async with served(PaymentServicer(), load()) as (_, _, channel):
        wallet = wallet_service_pb2_grpc.WalletServiceStub(channel)
        got = await failure(anext(wallet.SubmitTransfers(iter([wallet_pb2.SubmitTransfersRequest()])).__aiter__()))
    assert type(got) is Internal
    assert "empty batch" not in got.message


# --- time


async def test_a_call_without_a_deadline_gets_the_servers() -> None:
    servicer = PaymentServicer(lambda *_: asyncio.sleep(60))
    settings = load(request_deadline_ms=50)
    async with serving(servicer, settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
        async with asyncio.timeout(5):
            for call in (stub.CancelPayment(CANCEL), stub.GetPayment(GET)):
                got = await failure(call)
                assert type(got) is DeadlineExceeded
                assert got.reason == "DEADLINE_EXCEEDED"


async def test_a_deadline_of_the_caller_wins_over_the_servers() -> None:
    servicer = PaymentServicer(lambda *_: asyncio.sleep(0.2))
    short = load(request_deadline_ms=20)
    async with serving(servicer, short) as server, grpc.aio.insecure_channel(server.address) as channel:
        await payment_service_pb2_grpc.PaymentServiceStub(channel).CancelPayment(CANCEL, timeout=5)


async def test_cancellation_a_commit_is_not_torn_when_its_caller_gives_up() -> None:
    began, go_on, committed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def commit(_request: Any, _context: Any) -> None:
        began.set()
        await go_on.wait()
        committed.set()

    async with served(PaymentServicer(commit), load()) as (stub, _, _):
        call = stub.CancelPayment(CANCEL, timeout=0.2)
        await began.wait()
        assert type(await failure(call)) is DeadlineExceeded
        go_on.set()
        async with asyncio.timeout(2):
            await committed.wait()


async def test_cancellation_reads_and_streams_end_with_their_caller() -> None:
    cancelled = []

    async def wait(_request: Any, _context: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async with served(PaymentServicer(wait), load()) as (stub, _, _):
        assert type(await failure(stub.GetPayment(GET, timeout=0.1))) is DeadlineExceeded
        await until(lambda: len(cancelled) == 1)
        call = stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))
        iterator = call.__aiter__()
        await anext(iterator)
        call.cancel()
        await until(lambda: len(cancelled) == 2)


async def test_cancellation_shielded_work_inside_a_stream_goes_on() -> None:
    began, go_on, committed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def commit() -> None:
        began.set()
        await go_on.wait()
        committed.set()

    async with served(PaymentServicer(lambda *_: shielded(commit())), load()) as (stub, _, _):
        call = stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))
        reading = asyncio.ensure_future(call.__aiter__().__anext__())
        await began.wait()
        call.cancel()
        go_on.set()
        async with asyncio.timeout(2):
            await committed.wait()
        await asyncio.gather(reading, return_exceptions=True)


# --- load


async def test_overload_is_shed_with_a_reason_and_health_still_answers() -> None:
    go_on = asyncio.Event()
    servicer = PaymentServicer(lambda *_: go_on.wait())
    async with served(servicer, load(grpc_concurrency_max=2)) as (stub, _, channel):
        running = [asyncio.ensure_future(stub.CancelPayment(CANCEL)) for _ in range(2)]
        await until(lambda: servicer.calls == 2)
        got = await failure(stub.GetPayment(GET))
        assert type(got) is Unavailable, "it is about us, not about the caller"
        assert (got.reason, got.metadata["limit"]) == ("OVERLOADED", "grpc_concurrency_max")
        assert got.metadata["retry_after_s"] == "1"
        watched = stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))
        assert (await anext(watched.__aiter__())).payment.checkout_id == "CHK-1", "streams have a limit of their own"
        watched.cancel()
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        go_on.set()
        await asyncio.gather(*running)
        await stub.GetPayment(GET)


async def test_what_processes_ask_of_one_another_has_room_when_callers_have_taken_theirs() -> None:
    go_on = asyncio.Event()
    servicer = PaymentServicer(lambda *_: go_on.wait())
    async with served(servicer, load(grpc_concurrency_max=1)) as (stub, server, _):
        running = asyncio.ensure_future(stub.CancelPayment(CANCEL))
        await until(lambda: servicer.calls == 1)
        guard = server._guard
        callers = guard._room("/ducat.payment.v1.PaymentService/GetPayment", "payments.read", is_stream=False)
        assert callers.running == callers.running_max == 1
        for method, scope in (
            ("/ducat.payment.v1.PaymentService/RecordNotification", "notifications.write"),
            ("/ducat.payment.v1.PaymentService/OpenPayout", "payouts.instruct"),
            ("/ducat.event.v1.FeedService/GetFeed", None),
        ):
            assert guard._room(method, scope, is_stream=False).running == 0, method
        go_on.set()
        await running


async def test_a_token_that_calls_too_often_is_told_when_to_come_back(tmp_path: Any) -> None:
    path = str(tmp_path / "tokens.toml")
    token = create_token(path, "shop", ["*"])
    settings = load(grpc_caller_rate_max=1, auth_tokens_file=path, auth_token=token)
    async with served(PaymentServicer(), settings) as (stub, _, _):
        for _ in range(2):
            await stub.GetPayment(GET)
        got = await failure(stub.GetPayment(GET))
        assert type(got) is ResourceExhausted
        assert (got.metadata["limit"], got.metadata["retry_after_s"]) == ("grpc_caller_rate_max", "1")


# --- stopping


async def test_graceful_stop_ends_running_calls_and_takes_no_new_ones() -> None:
    go_on = asyncio.Event()
    servicer = PaymentServicer(lambda *_: go_on.wait())
    async with served(servicer, load()) as (stub, server, channel):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest()).__aiter__()
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        running = asyncio.ensure_future(stub.CancelPayment(CANCEL))
        await until(lambda: servicer.calls == 1)
        stopping = asyncio.ensure_future(server.stop(5))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.sleep(0.1)
        async with open_channel(server.address, load()) as other:
            late = payment_service_pb2_grpc.PaymentServiceStub(other)
            assert type(await failure(late.GetPayment(GET, timeout=2))) is Unavailable
        assert not stopping.done()
        go_on.set()
        await running
        async with asyncio.timeout(5):
            await stopping


async def test_graceful_stop_waits_for_a_commit_whose_caller_has_left() -> None:
    began, committed = asyncio.Event(), []

    async def commit(_request: Any, _context: Any) -> None:
        began.set()
        await asyncio.sleep(0.3)
        committed.append(True)

    async with served(PaymentServicer(commit), load()) as (stub, server, _):
        call = stub.CancelPayment(CANCEL)
        await began.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await server.stop(5)
        assert committed


async def test_a_port_that_is_taken_is_said_so() -> None:
    async with serving(PaymentServicer(), load()) as server:
        with pytest.raises(SettingsInvalid, match=server.address):
            await GrpcServer(load(), [], {}).start(server.address)


# --- what an operator sees


async def test_the_trace_of_the_caller_reaches_the_servicer_and_its_tasks() -> None:
    seen = []

    async def look(_request: Any, _context: Any) -> None:
        seen.append(trace.current())

    async with served(PaymentServicer(look), load()) as (stub, _, channel):
        with trace.bind() as traceparent:
            await stub.GetPayment(GET)
            await stub.CancelPayment(CANCEL)
            [each async for each in stub.WatchPayment(payment_pb2.WatchPaymentRequest(checkout_id="CHK-1"))]
        raw = grpc.aio.insecure_channel(channel._address)
        await payment_service_pb2_grpc.PaymentServiceStub(raw).GetPayment(GET)
        await payment_service_pb2_grpc.PaymentServiceStub(raw).GetPayment(GET, metadata=(("traceparent", "nonsense"),))
        await raw.close()
    assert [each[:35] for each in seen[:3]] == [traceparent[:35]] * 3
    assert len({each[36:52] for each in seen[:3]} | {traceparent[36:52]}) == 4, "each call has a span of its own"
    assert len({each[:35] for each in seen}) == 3, "a call without a usable trace starts one"


async def test_reflection_lists_what_is_served() -> None:
    async with serving(PaymentServicer(), load()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        answers = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {SERVICE, "ducat.wallet.v1.WalletService", "grpc.health.v1.Health"}
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(raw)
        for raw in answers[1].file_descriptor_response.file_descriptor_proto
    ]
    assert "ducat/payment/v1/payment_service.proto" in {file.name for file in files}


async def test_metrics_count_by_method_and_code() -> None:
    registry = CollectorRegistry()
    metrics = RpcMetrics(registry=registry)
    async with served(PaymentServicer(raising(NotFound("none"))), load(), metrics=metrics) as (stub, _, channel):
        for _ in range(3):
            await failure(stub.CancelPayment(CANCEL))
        await failure(channel.unary_unary("/made/Up")(b""))
        await until(
            lambda: (
                registry.get_sample_value(
                    "ducat_rpc_server_handled_total", {"method": "/unknown", "code": "UNIMPLEMENTED"}
                )
                == 1
            )
        )
    labels = {"method": f"/{SERVICE}/CancelPayment", "code": "NOT_FOUND"}
    assert registry.get_sample_value("ducat_rpc_server_handled_total", labels) == 3
    buckets = {"method": f"/{SERVICE}/CancelPayment", "le": "+Inf"}
    assert registry.get_sample_value("ducat_rpc_server_duration_seconds_bucket", buckets) == 3


async def test_metrics_say_how_many_calls_run_now() -> None:
    """Risk: a gauge that always says 0."""
    registry = CollectorRegistry()
    held = asyncio.Event()

    async def wait(_request: Any, _context: Any) -> None:
        await held.wait()

    def running() -> float | None:
        return registry.get_sample_value("ducat_rpc_server_in_flight")

    servicer = PaymentServicer(wait)
    async with served(servicer, load(), metrics=RpcMetrics(registry=registry)) as (stub, _, _channel):
        calls = [asyncio.ensure_future(stub.CancelPayment(CANCEL)) for _ in range(2)]
        await until(lambda: servicer.calls == 2)
        assert running() == 2
        held.set()
        await asyncio.gather(*calls)
        await until(lambda: running() == 0)
