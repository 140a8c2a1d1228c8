"""Risk: the platform works over Valkey Streams only, though the bus is one port with two engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.demo import order_state, payout_state, run_checkout
from ops.platform import Platform
from tests.e2e.checkouts import checkout


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_a_checkout_and_a_payout_over_a_real_kafka_broker(kafka_bootstrap: str, tmp_path: Path) -> None:
    platform = Platform(
        tmp_path, free_ports=True, env={"DUCAT_BUS": "kafka", "DUCAT_KAFKA_BOOTSTRAP": kafka_bootstrap}, log=print
    )
    try:
        await platform.start()
        outcome = await run_checkout(platform, checkout(6, currencies=("USD", "JPY")), log=print)
    finally:
        await platform.stop()
    assert {order_state(order.state) for order in outcome.payment.payment_orders} == {"SUCCESS"}
    assert [payout_state(payout.state) for payout in outcome.payouts] == ["COMPLETED"]
    assert all(outcome.invariants().values())
