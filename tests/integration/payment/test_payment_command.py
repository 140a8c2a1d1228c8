"""`ducat payment …` against the service over gRPC, with tokens: what an operator sees, and who it says resolved it."""

from __future__ import annotations

import asyncio
import getpass
import json
from pathlib import Path

import pytest

from ducat.payment.v1 import finding_pb2, payment_service_pb2_grpc
from ops.__main__ import main
from payment.adapters.grpc import SCOPES, SERVICE
from runtime.channel import open_channel
from runtime.grpc_server import GrpcServer
from runtime.metrics import RpcMetrics
from runtime.security import create_token
from runtime.settings import Settings
from tests.integration.payment.conftest import Service, checkout, paid
from tests.integration.payment.test_findings_and_refunds import servicer


async def test_findings_on_a_terminal(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await service.payments.create(checkout(("A", 7500)))
    await service.register("A")
    await service.tell(paid("A", 100, "evt_1"), paid("A", 200, "evt_2"))
    tokens = str(tmp_path / "tokens.toml")
    token = create_token(tokens, "night-shift", ["payments.*"])
    settings = Settings.load({"auth_tokens_file": tokens, "auth_token": token}, environ={})
    add = payment_service_pb2_grpc.add_PaymentServiceServicer_to_server
    server = GrpcServer(settings, [(servicer(service), add, SERVICE)], SCOPES, (), RpcMetrics(registry=None), ())
    address = await server.start("127.0.0.1:0")
    monkeypatch.setenv("DUCAT_AUTH_TOKEN", token)

    async def run(*words: str) -> tuple[int, str]:
        code = await asyncio.to_thread(main, ["payment", *words, "--address", address])
        return code, capsys.readouterr().out

    try:
        capsys.readouterr()
        code, out = await run("findings", "--json")
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert (code, {each["theirs"]["amount_minor"] for each in found}) == (0, {"200", "100"})
        first, second = (each["finding_id"] for each in found)
        code, out = await run("resolve", first, "--reason", "a test of the PSP")
        assert code == 0
        assert f"by {getpass.getuser()}: a test of the PSP" in out
        assert (await run("resolve", first, "--reason", "again"))[0] == 1
        assert (await run("findings", "--kind", "nothing"))[0] == 1
        assert first not in (await run("findings"))[1]
        assert first in (await run("findings", "--all"))[1]
        # A caller that asks for itself is named by its token.
        channel = open_channel(address, settings)
        stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
        answer = await stub.ResolveFinding(
            finding_pb2.ResolveFindingRequest(finding_id=second, reason="settled", request_id="R-2")
        )
        await channel.close()
        assert answer.finding.resolved_by == "night-shift"
        assert "no open findings" in (await run("findings"))[1]
    finally:
        await server.stop()
