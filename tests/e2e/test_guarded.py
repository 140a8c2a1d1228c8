"""Risk: TLS, client certificates and tokens work in each process's own tests, and not between the processes."""

from __future__ import annotations

import json
import re
import ssl
from pathlib import Path

import aiohttp
import grpc.aio
import pytest
import trustme

from ducat.wallet.v1 import wallet_pb2, wallet_service_pb2_grpc
from ops.demo import order_state, payout_state, run_checkout
from ops.platform import Platform
from runtime.security import create_token
from tests.e2e.checkouts import checkout


def guarded(folder: Path) -> dict[str, str]:
    """Settings with mTLS, a token for every process, and secrets of its own."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    issued.private_key_pem.write_to_path(paths["key"])
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    (folder / "token").write_text(create_token(str(folder / "tokens.toml"), "inside", ["*"]))
    return {
        **{f"DUCAT_TLS_{name.upper()}_FILE": str(path) for name, path in paths.items()},
        "DUCAT_TLS_CLIENT_AUTH": "true",
        "DUCAT_AUTH_TOKENS_FILE": str(folder / "tokens.toml"),
        "DUCAT_AUTH_TOKEN_FILE": str(folder / "token"),
        "DUCAT_METRICS_LISTEN_PAYMENT": "127.0.0.1:0",
        "SSL_CERT_FILE": str(paths["ca"]),
    }


@pytest.mark.timeout(400)
async def test_over_mtls_with_tokens_one_trace_and_given_servers_twice(
    postgres_dsn: str, valkey_url: str, tmp_path: Path
) -> None:
    """Risks too: an embedded server is filled beside the given one; a restart of everything loses or repeats a payment."""
    (tmp_path / "dsn").write_text(postgres_dsn)
    env = {
        **guarded(tmp_path),
        "DUCAT_DATABASE_URL_FILE": str(tmp_path / "dsn"),
        "DUCAT_REDIS_URL": valkey_url,
    }
    body = checkout(4, currencies=("USD", "KWD"))
    outcomes = []
    for executor_count in (2, 1):
        platform = Platform(tmp_path / "data", free_ports=True, executor_count=executor_count, env=env, log=print)
        try:
            await platform.start()
            outcomes.append(await run_checkout(platform, body, log=print))
            if len(outcomes) == 1:
                await _strangers_get_nothing(platform, tmp_path)
        finally:
            await platform.stop()
        assert (platform.postgres, platform.valkey) == (None, None)
        assert not (tmp_path / "data" / "postgres").exists()
    for outcome in outcomes:
        assert {order_state(order.state) for order in outcome.payment.payment_orders} == {"SUCCESS"}
        assert [payout_state(payout.state) for payout in outcome.payouts] == ["COMPLETED"]
        assert all(outcome.invariants().values())
    first, second = ({**outcome.as_json(), "payout": outcome.payouts[0].psp_payout_id} for outcome in outcomes)
    assert first == second, "the same checkout and payout again: the same ids, the same balances"

    logs = {path.stem: path.read_text() for path in (tmp_path / "data" / "logs").iterdir()}
    secret = (tmp_path / "token").read_text()
    assert [name for name, text in logs.items() if secret in text or "sk_test" in text or "whsec" in text] == []
    checkout_id = outcomes[0].payment.checkout_id
    created = next(json.loads(line) for line in logs["payment"].splitlines() if checkout_id in line)
    seen = {re.sub(r"-\d+$", "", name) for name, text in logs.items() if created["trace_id"] in text}
    assert seen >= {"gateway", "payment", "executor", "ledger", "wallet"}


async def _strangers_get_nothing(platform: Platform, folder: Path) -> None:
    """Neither who has no token, nor who has no certificate."""
    trusting = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(folder / "ca.pem")))
    async with aiohttp.ClientSession(connector=trusting) as http:
        for path, method in (("/v1/payments", "POST"), ("/v1/payments/CHK-1", "GET"), ("/v1/payouts/P-1", "GET")):
            async with http.request(method, platform.gateway_url + path) as refused:
                assert refused.status == 401, "no token, no answer"
    plain = grpc.aio.insecure_channel(platform.grpc_address("wallet"))
    stub = wallet_service_pb2_grpc.WalletServiceStub(plain)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetBalance(wallet_pb2.GetBalanceRequest(name="seller/S/USD"), timeout=3)  # type: ignore[misc]
    await plain.close()
