"""Risk: the platform works over Valkey Streams and files only, though bus and event log are ports with two engines each; or a broker that
loses its topics loses money."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from ops.demo import (
    order_state,
    pay_checkout,
    payment_if_done,
    payout_state,
    play_buyer,
    post_event,
    run_checkout,
    wait_for,
)
from ops.platform import Platform
from tests.e2e.checkouts import checkout, is_published
from wallet_core.event_log.kafka import KafkaFrames, KafkaLogConfig


@pytest.mark.kafka
@pytest.mark.timeout(400)
async def test_a_checkout_a_payout_and_lost_topics_over_a_real_kafka_broker(
    kafka_bootstrap: str, postgres_dsn: str, valkey_url: str, tmp_path: Path
) -> None:
    env = {
        "DUCAT_DATABASE_URL": postgres_dsn,
        "DUCAT_REDIS_URL": valkey_url,
        "DUCAT_BUS": "kafka",
        "DUCAT_KAFKA_BOOTSTRAP": kafka_bootstrap,
        "DUCAT_WALLET_LOG": "kafka",
        "DUCAT_FEED_CHECK_INTERVAL_S": "1",
        "DUCAT_FEED_GRACE_S": "1",
        "DUCAT_WALLET_KAFKA_TOPIC": f"e2e.wallet.log.{uuid.uuid4()}",
    }
    platform = Platform(tmp_path, free_ports=True, env=env, log=print)
    try:
        await platform.start()
        outcome = await run_checkout(platform, checkout(6, currencies=("USD", "JPY")), log=print)
        await _lose_the_topics(platform, AdminClient({"bootstrap.servers": kafka_bootstrap}))
    finally:
        await platform.stop()
    assert {order_state(order.state) for order in outcome.payment.payment_orders} == {"SUCCESS"}
    assert [payout_state(payout.state) for payout in outcome.payouts] == ["COMPLETED"]
    assert all(outcome.invariants().values())
    kafka = KafkaLogConfig(kafka_bootstrap, topic=env["DUCAT_WALLET_KAFKA_TOPIC"])
    assert sum(len(list(KafkaFrames(kafka, shard).read())) for shard in (0, 1)) > 0, "the wallet's log is not in Kafka"


async def _lose_the_topics(platform: Platform, admin: AdminClient) -> None:
    """Orders are paid while the wallet stands still; then the broker has none of the platform's messages any more."""
    body = checkout(3)
    pid = platform.processes["wallet"].pid
    assert pid is not None
    async with platform.http_session() as http, platform.client() as client:
        os.kill(pid, signal.SIGSTOP)
        try:
            checkout_id, _ = await post_event(http, platform, body)
            await play_buyer(http, client, checkout_id)
            await wait_for(lambda: payment_if_done(client, checkout_id), "the payment")
            await is_published(platform)
            topics = [
                name for name in admin.list_topics().topics if name.startswith(("payment.", "executor.", "wallet."))
            ]
            assert "payment.events" in topics
            for deleted in admin.delete_topics(topics).values():
                await asyncio.wrap_future(deleted)
        finally:
            os.kill(pid, signal.SIGCONT)
        await pay_checkout(platform, http, client, body, log=print)
    outcome = await run_checkout(platform, checkout(2), log=print, pay_out=False)
    assert all(outcome.invariants().values()), outcome.as_json()
