"""Risk: the platform works over Valkey Streams and files only, though bus and event log are ports with two engines each."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from ops.demo import order_state, payout_state, run_checkout
from ops.platform import Platform
from tests.e2e.checkouts import checkout
from wallet_core.event_log.kafka import KafkaFrames, KafkaLogConfig


@pytest.mark.kafka
@pytest.mark.timeout(400)
async def test_a_checkout_and_a_payout_over_a_real_kafka_broker(
    kafka_bootstrap: str, postgres_dsn: str, valkey_url: str, tmp_path: Path
) -> None:
    env = {
        "DUCAT_DATABASE_URL": postgres_dsn,
        "DUCAT_REDIS_URL": valkey_url,
        "DUCAT_BUS": "kafka",
        "DUCAT_KAFKA_BOOTSTRAP": kafka_bootstrap,
        "DUCAT_WALLET_LOG": "kafka",
        "DUCAT_WALLET_KAFKA_TOPIC": f"e2e.wallet.log.{uuid.uuid4()}",
    }
    platform = Platform(tmp_path, free_ports=True, env=env, log=print)
    try:
        await platform.start()
        outcome = await run_checkout(platform, checkout(6, currencies=("USD", "JPY")), log=print)
    finally:
        await platform.stop()
    assert {order_state(order.state) for order in outcome.payment.payment_orders} == {"SUCCESS"}
    assert [payout_state(payout.state) for payout in outcome.payouts] == ["COMPLETED"]
    assert all(outcome.invariants().values())
    kafka = KafkaLogConfig(kafka_bootstrap, topic=env["DUCAT_WALLET_KAFKA_TOPIC"])
    assert sum(len(list(KafkaFrames(kafka, shard).read())) for shard in (0, 1)) > 0, "the wallet's log is not in Kafka"
