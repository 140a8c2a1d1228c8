"""Risk: the main job does not work as a whole, over real processes and real sockets."""

from __future__ import annotations

import asyncio
import json
import stat
import uuid
from pathlib import Path

import aiohttp
import pytest

from ducat.ledger.v1 import ledger_pb2
from ducat.payment.v1 import payment_pb2
from ops.__main__ import main
from ops.demo import EventRefused, Outcome, order_state, payout_state, run_checkout, wait_for
from ops.platform import DataFolderBusy, Platform
from tests.e2e.checkouts import checkout

pytestmark = pytest.mark.asyncio(loop_scope="session")
OPERATOR = {"authorization": "Bearer sk_test_sandbox"}
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "payment_event.json"


def assert_all_paid(outcome: Outcome) -> None:
    assert outcome.payment.is_payment_done
    assert {order_state(order.state) for order in outcome.payment.payment_orders} == {"SUCCESS"}
    assert outcome.invariants() == {"wallet_zero_sum": True, "ledger_balanced": True, "wallet_matches_ledger": True}


async def test_the_sample_checkout_goes_from_json_to_a_payout(platform: Platform) -> None:
    outcome = await run_checkout(platform, EXAMPLE.read_bytes(), log=print)
    assert_all_paid(outcome)
    assert [payout_state(payout.state) for payout in outcome.payouts] == ["COMPLETED"]
    assert outcome.payouts[0].amount.amount_minor == 3750
    wallets = outcome.as_json()["wallets"]
    assert wallets["seller/SELL-XYZ-1/USD"] == 3750
    assert wallets["seller/SELL-ABC-2/USD"] == 2500
    # Again: the same answer, nothing paid twice.
    again = await run_checkout(platform, EXAMPLE.read_bytes(), log=print, pay_out=False)
    assert again.as_json()["wallets"]["seller/SELL-XYZ-1/USD"] == 3750


async def test_the_first_example_of_the_client_page_runs(
    platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    """Risk: the first thing that a new user copies answers UNIMPLEMENTED."""
    page = (EXAMPLE.parents[1] / "client.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    code = code.replace("payments.internal:443", platform.grpc_address("payment"))
    code = code.replace("wallet.internal:443", platform.grpc_address("wallet"))
    code = "\n".join(line for line in code.splitlines() if "tls=" not in line).replace("token=token", 'token=""')
    await asyncio.to_thread(exec, code, {})
    base, _, key = capsys.readouterr().out.strip().rpartition("/")
    assert (base, len(key)) == (f"{platform.gateway_url}/checkout", 32)


async def test_forty_orders_in_four_currencies_over_two_psps(platform: Platform) -> None:
    body = checkout(40, currencies=("JPY", "KWD", "USD", "EUR"), sellers=5)
    outcome = await run_checkout(platform, body, log=print)
    assert_all_paid(outcome)
    assert len({order.psp for order in outcome.payment.payment_orders}) == 2
    assert {"JPY", "KWD", "USD", "EUR"} <= outcome.as_json()["trial_balance"].keys()


async def test_same_checkout_id_with_other_content_is_a_conflict(platform: Platform) -> None:
    body = json.loads(checkout(1))
    async with aiohttp.ClientSession() as http:
        first = await http.post(f"{platform.gateway_url}/v1/payments", json=body)
        body["payment_orders"][0]["amount"] = "76.00"
        second = await http.post(f"{platform.gateway_url}/v1/payments", json=body)
        problem = await second.json(content_type=None)
    assert (first.status, second.status) == (201, 409)
    assert problem["reason"] == "IDEMPOTENCY_MISMATCH"


async def test_an_invalid_event_names_every_wrong_field_and_stores_nothing(platform: Platform) -> None:
    event = json.loads(checkout(2))
    event["payment_orders"][0]["amount"] = "1.001"
    event["payment_orders"][1]["currency"] = "XXX"
    event["surprise"] = 1
    with pytest.raises(EventRefused) as refused:
        await run_checkout(platform, json.dumps(event).encode(), log=print)
    fields = {violation["field"] for violation in refused.value.problem["violations"]}
    assert fields == {"payment_orders[0].amount", "payment_orders[1].currency", "surprise"}
    async with aiohttp.ClientSession() as http:
        answer = await http.get(f"{platform.gateway_url}/v1/payments/{event['checkout_id']}")
    assert answer.status == 404


async def test_the_same_webhook_a_hundred_times_pays_once(platform: Platform) -> None:
    async with aiohttp.ClientSession() as http:
        faults = {"duplicate_webhooks": 1.0, "reorder_webhooks": 1.0}
        async with http.post(f"{platform.sandbox_url}/_control/faults", json=faults, headers=OPERATOR) as answer:
            assert answer.status == 200
        try:
            outcomes = await asyncio.gather(
                *(run_checkout(platform, checkout(2), log=print, pay_out=False) for _ in range(10))
            )
        finally:
            await http.delete(f"{platform.sandbox_url}/_control/faults", headers=OPERATOR)
    for outcome in outcomes:
        assert_all_paid(outcome)


async def test_nobody_else_enters_the_data(platform: Platform) -> None:
    """Risk: any user of the machine reads balances, names and logs."""
    owned = ("wallet", "logs", "sandbox", "valkey", "postgres/data", "postgres/socket")
    modes = {name: stat.S_IMODE((platform.data_dir / name).stat().st_mode) for name in owned}
    assert modes == dict.fromkeys(owned, 0o700)


async def test_a_second_up_on_the_same_data_is_refused(platform: Platform) -> None:
    with pytest.raises(DataFolderBusy, match="in use"):
        await Platform(platform.data_dir, free_ports=True).start()
    async with aiohttp.ClientSession() as http:
        assert (await http.get(f"{platform.gateway_url}/readyz")).status == 200


async def test_a_refund_in_the_dashboard_leaves_the_wallet_before_the_next_payout(platform: Platform) -> None:
    """Risk: the buyer has the money back, and the seller is paid out the same money."""
    seller = f"SELL-{uuid.uuid4()}"
    body = json.loads(checkout(1))
    body["payment_orders"][0]["seller_account"] = seller
    outcome = await run_checkout(platform, json.dumps(body).encode(), log=print, pay_out=False)
    order = outcome.payment.payment_orders[0]
    async with platform.http_session() as http, platform.client() as client:
        request = {"psp": order.psp, "payment_order_id": order.payment_order_id, "amount": 7000}
        async with http.post(f"{platform.sandbox_url}/_control/refunds", json=request, headers=OPERATOR) as answer:
            assert answer.status == 200
        wallet = f"seller/{seller}/USD"

        async def is_booked() -> bool:
            got = (
                await client.payments.get_payment(payment_pb2.GetPaymentRequest(checkout_id=body["checkout_id"]))
            ).payment
            account = await client.ledger.get_account(ledger_pb2.GetAccountRequest(name=wallet))
            return (
                order_state(got.payment_orders[0].state) == "PARTIALLY_REFUNDED"
                and account.account.balance_minor == 500
            )

        await wait_for(is_booked, "the refund to be booked in the ledger")
        again = await run_checkout(platform, json.dumps(body).encode(), log=print, pay_out=False)
        assert again.as_json()["wallets"][wallet] == 500
        assert again.invariants() == {"wallet_zero_sum": True, "ledger_balanced": True, "wallet_matches_ledger": True}


async def test_ducat_check_says_that_all_money_is_there(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While checkouts go on."""
    for name in ("payment", "executor", "wallet", "ledger"):
        monkeypatch.setenv(f"DUCAT_{name.upper()}_ADDRESS", platform.grpc_address(name))
    paying = asyncio.gather(
        *(run_checkout(platform, checkout(3, sellers=5), log=lambda line: None, pay_out=False) for _ in range(8))
    )
    code = await asyncio.to_thread(main, ["check", "--json", "--wait", "60"])
    told = json.loads(capsys.readouterr().out)
    assert (code, told["verdict"]) == (0, "ok"), told
    assert {name: one["verdict"] for name, one in told["checks"].items()} == dict.fromkeys(
        ("wallet", "ledger", "wallet_against_ledger", "feeds"), "ok"
    )
    assert told["checks"]["wallet_against_ledger"]["accounts"] > 0
    assert {(one["topic"], one["consumer"]) for one in told["checks"]["feeds"]["consumers"]} >= {
        ("payment.commands", "executor"),
        ("payment.events", "wallet"),
        ("payment.events", "ledger"),
        ("executor.events", "payment"),
        ("wallet.events", "payment"),
    }
    await paying
