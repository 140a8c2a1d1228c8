"""What the client decides without a server: addresses, tokens in the clear, retries, which methods it has."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ducat
import ducat.services
from ducat import _methods, services
from ducat.executor.v1 import executor_pb2
from ducat.ledger.v1 import ledger_pb2
from ducat.payment.v1 import payment_service_pb2
from ducat.wallet.v1 import wallet_service_pb2

FILES = (payment_service_pb2, executor_pb2, wallet_service_pb2, ledger_pb2)
CLASSES = {
    "PaymentService": services.Payments,
    "ExecutorService": services.Executor,
    "WalletService": services.Wallet,
    "ShardService": services.Shards,
    "LedgerService": services.Ledger,
}
RPCS = [method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods]
NOT_IDEMPOTENT = {"CreateSnapshot"}


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.full_name)
def test_every_method_of_the_contract_is_there_as_it_is_described(rpc: object) -> None:
    cls = CLASSES[rpc.containing_service.name]
    methods = {
        value.name: value
        for base in cls.__mro__
        for value in vars(base).values()
        if isinstance(value, _methods._Method)
    }
    method = methods[rpc.name]
    assert method.request.DESCRIPTOR is rpc.input_type
    assert method.response.DESCRIPTOR is rpc.output_type
    kind = (rpc.client_streaming, rpc.server_streaming)
    assert {(False, False): "unary_unary", (False, True): "unary_stream", (True, True): "stream_stream"}[
        kind
    ] == method.kind
    assert method.idempotent is (rpc.name not in NOT_IDEMPOTENT)
    assert "timeout_s" not in rpc.input_type.fields_by_name, "would hide the deadline's argument"


def test_no_method_is_there_that_the_contract_does_not_have() -> None:
    ours = {
        (cls.__name__, value.name)
        for cls in CLASSES.values()
        for base in cls.__mro__
        for value in vars(base).values()
        if isinstance(value, _methods._Method)
    }
    assert ours == {(CLASSES[rpc.containing_service.name].__name__, rpc.name) for rpc in RPCS}


def test_public_names() -> None:
    assert ducat.__all__ == ["TLS", "Client", "DucatError", "Retry", "aio", "batch", "errors"]
    for name in ducat.__all__:
        assert getattr(ducat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Wallet'"):
        _ = ducat.Wallet  # type: ignore[attr-defined]


def test_import_is_lazy_and_needs_no_server_code() -> None:
    """A process that wants only stubs imports no client; a caller imports no asyncio server, database or settings."""
    code = (
        "import sys, ducat.payment.v1.payment_pb2; assert 'ducat.client' not in sys.modules;"
        "import ducat; ducat.Client;"
        "foreign = {'runtime', 'asyncpg', 'redis', 'pydantic', 'structlog', 'uvloop', 'numpy'} & set(sys.modules);"
        "assert not foreign, foreign"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "address",
    ["payments.internal:443", "10.0.0.7:50051", "[2001:db8::1]:50051", "localhost.evil:1", "127.0.0.1.evil.com:443"],
)
def test_a_token_never_leaves_the_machine_in_the_clear(address: str) -> None:
    with pytest.raises(ValueError, match="in the clear"):
        ducat.Client(payment_address=address, token="ducat_x")
    with pytest.raises(ValueError, match="in the clear"):
        ducat.aio.Client(wallet_address="127.0.0.1:1", payment_address=address, token=lambda: "ducat_x")
    ducat.Client(payment_address=address, token="ducat_x", tls=ducat.TLS()).close()
    ducat.Client(payment_address=address).close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/ducat.sock"])
def test_a_token_on_loopback_needs_no_tls(address: str) -> None:
    ducat.Client(address=address, token="ducat_x").close()


def test_a_service_without_an_address_is_not_looked_for_on_this_machine() -> None:
    with ducat.Client(payment_address="127.0.0.1:1") as client, pytest.raises(ValueError, match="wallet_address"):
        client.wallet.get_balance(name="seller/A/USD")


def test_without_any_address_it_is_the_development_platform() -> None:
    with ducat.Client() as client:
        assert client._config.address_of("ledger") == "127.0.0.1:50054"


def test_tls_wants_certificate_and_key_together() -> None:
    with pytest.raises(ValueError, match="belong together"):
        ducat.TLS(cert=b"x")


@pytest.mark.parametrize("wrong", [{"count_max": -1}, {"base_s": 0}, {"base_s": 2.0, "cap_s": 1.0}])
def test_retry_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Retry"):
        ducat.Retry(**wrong)  # type: ignore[arg-type]


def test_retry_pauses_grow_are_jittered_and_capped() -> None:
    retry = ducat.Retry(base_s=0.1, cap_s=1.0)
    longest = [retry.pause_s(failures, 0.999999) for failures in range(1, 8)]
    assert longest == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0], rel=1e-4)
    assert retry.pause_s(3, 0.0) == pytest.approx(0.04)


def test_a_call_that_is_not_idempotent_is_never_repeated() -> None:
    patient = ducat.Retry(count_max=50, base_s=0.2, cap_s=0.2)
    with ducat.Client(address="127.0.0.1:1", retry=patient) as client, pytest.raises(ducat.DucatError) as caught:
        client.shards.create_snapshot(shard=0, timeout_s=5)
    assert type(caught.value) is ducat.errors.Unavailable
    assert caught.value.reason == "", "no Ducat process answered"
