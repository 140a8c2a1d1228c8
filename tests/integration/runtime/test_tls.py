"""TLS, mTLS and the rotation of certificates, with certificates made for each test."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

import ducat
import ducat.aio
from ducat.payment.v1 import payment_pb2, payment_service_pb2_grpc
from runtime.channel import open_channel
from runtime.security import create_token
from runtime.settings import Settings, SettingsInvalid
from tests.integration.runtime.serving import PaymentServicer, load, serving

GET = payment_pb2.GetPaymentRequest(checkout_id="CHK-1")


class Files:
    """An authority and the files of one process."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.paths = {name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}
        self.ca.cert_pem.write_to_path(self.paths["ca"])
        self.issue(self.ca)

    def issue(self, ca: trustme.CA) -> None:
        """A new certificate for loopback, written over the old one."""
        issued = ca.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(self.paths["key"])
        issued.cert_chain_pems[0].write_to_path(self.paths["cert"])

    def damage(self) -> None:
        """Leaves half a certificate behind."""
        Path(self.paths["cert"]).write_text("half a certifi")

    def tls(self) -> ducat.TLS:
        """For a client: paths and bytes are both taken."""
        return ducat.TLS(ca=self.paths["ca"], cert=self.paths["cert"], key=Path(self.paths["key"]).read_bytes())

    def settings(self, **overrides: Any) -> Settings:
        names = {f"tls_{name}_file": path for name, path in self.paths.items()}
        return load(**{**names, **overrides})


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def get(channel: grpc.aio.Channel, timeout_s: float = 3) -> str:
    stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
    answer = await stub.GetPayment(GET, timeout=timeout_s)  # type: ignore[misc]
    return str(answer.payment.checkout_id)


async def test_tls_serves_who_trusts_the_authority_and_nobody_in_the_clear(files: Files) -> None:
    async with serving(PaymentServicer(), files.settings()) as server:
        async with open_channel(server.address, load(tls_ca_file=files.paths["ca"])) as channel:
            assert await get(channel) == "CHK-1"
        async with open_channel(server.address, load()) as channel:
            with pytest.raises(grpc.RpcError):
                await get(channel)
        stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        async with grpc.aio.secure_channel(server.address, stranger) as channel:
            with pytest.raises(grpc.RpcError):
                await get(channel)


async def test_mtls_refuses_callers_without_a_certificate_of_the_authority(files: Files, tmp_path: Path) -> None:
    async with serving(PaymentServicer(), files.settings(tls_client_auth=True)) as server:
        async with open_channel(server.address, files.settings()) as channel:
            assert await get(channel) == "CHK-1"
        async with open_channel(server.address, load(tls_ca_file=files.paths["ca"])) as channel:
            with pytest.raises(grpc.RpcError):
                await get(channel)
        (tmp_path / "other").mkdir()
        other = Files(tmp_path / "other")
        stranger = load(
            tls_ca_file=files.paths["ca"], tls_cert_file=other.paths["cert"], tls_key_file=other.paths["key"]
        )
        async with open_channel(server.address, stranger) as channel:
            with pytest.raises(grpc.RpcError):
                await get(channel)


async def test_a_new_certificate_is_used_without_a_restart_and_running_connections_stay(files: Files) -> None:
    old_ca = files.ca.cert_pem.bytes()
    new = trustme.CA()
    async with (
        serving(PaymentServicer(), files.settings()) as server,
        grpc.aio.secure_channel(server.address, grpc.ssl_channel_credentials(old_ca)) as running,
    ):
        assert await get(running) == "CHK-1"
        files.issue(new)
        fresh = grpc.ssl_channel_credentials(new.cert_pem.bytes())
        async with grpc.aio.secure_channel(server.address, fresh) as channel:
            assert await get(channel) == "CHK-1"
        assert await get(running) == "CHK-1"


async def test_a_broken_new_certificate_leaves_the_old_one_in_force(files: Files) -> None:
    async with serving(PaymentServicer(), files.settings()) as server:
        files.damage()
        async with open_channel(server.address, load(tls_ca_file=files.paths["ca"])) as channel:
            assert await get(channel) == "CHK-1"


async def test_a_channel_takes_up_new_certificates_of_its_own(files: Files) -> None:
    """The caller's authority and certificate change while its channel lives."""
    settings = files.settings(tls_client_auth=True)
    async with serving(PaymentServicer(), settings) as server, open_channel(server.address, settings) as channel:
        assert await get(channel) == "CHK-1"
        assert channel.reload_certificates() is False
        new = trustme.CA()
        files.issue(new)
        new.cert_pem.write_to_path(files.paths["ca"])
        channel.look_for_certificates_again()
        assert await get(channel) == "CHK-1"


@pytest.mark.parametrize("broken", ["missing", "not a pair"])
async def test_a_certificate_that_cannot_be_used_stops_the_start(files: Files, tmp_path: Path, broken: str) -> None:
    if broken == "missing":
        settings = files.settings(tls_cert_file=str(tmp_path / "nowhere.pem"))
    else:
        (tmp_path / "other").mkdir()
        settings = files.settings(tls_key_file=Files(tmp_path / "other").paths["key"])
    with pytest.raises(SettingsInvalid, match="tls_cert_file"):
        async with serving(PaymentServicer(), settings):
            raise AssertionError("it served")


async def test_both_clients_over_mtls_with_a_token(files: Files, tmp_path: Path) -> None:
    tokens = str(tmp_path / "tokens.toml")
    token = create_token(tokens, "caller", ["payments.read"])
    settings = files.settings(tls_client_auth=True, auth_tokens_file=tokens)
    tls = files.tls()
    async with serving(PaymentServicer(), settings) as server:
        async with ducat.aio.Client(payment_address=server.address, token=token, tls=tls) as client:
            assert (await client.payments.get_payment(GET)).payment.checkout_id == "CHK-1"

        def blocking() -> str:
            with ducat.Client(payment_address=server.address, token=lambda: token, tls=tls) as client:
                return client.payments.get_payment(checkout_id="CHK-2").payment.checkout_id

        assert await asyncio.to_thread(blocking) == "CHK-2"
