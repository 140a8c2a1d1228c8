"""Puts the payment service together: the only place that names concrete classes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

from ducat.payment.v1.payment_service_pb2_grpc import add_PaymentServiceServicer_to_server
from kernel.clock import SystemClock
from payment.adapters.bus import BATCH_MAX, EXECUTOR_EVENTS, GROUP, WALLET_EVENTS, reports_handler
from payment.adapters.changes import PaymentChanges
from payment.adapters.executor_client import ExecutorClient
from payment.adapters.grpc import SCOPES, SERVICE, PaymentServicer
from payment.adapters.operator_log import FindingsGauge, report_notification
from payment.adapters.postgres import PostgresStore
from payment.service.findings import Findings
from payment.service.notifications import Notifications
from payment.service.payments import Payments
from payment.service.payouts import Payouts
from payment.service.reports import Reports
from payment.service.timers import INTERVAL_S, Timers
from runtime import trace
from runtime.feed import Feeds
from runtime.inbox import InboxRecorder
from runtime.outbox import OutboxRelay
from runtime.postgres import connect
from runtime.process import Process
from runtime.settings import Settings

__all__ = ["NAME", "main", "serve"]

NAME = "payment"
SCHEMA = "payment"
PLANNER = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""Every statement of this room finds a handful of rows by key. Left alone, the planner expects a hundred rows of each JSON list and
answers with hash joins over whole tables until they have many thousands of rows. So no plan depends on the values, and
planning anew for each call, which it does for lists, only costs (0.5 ms of CPU a checkout of two orders)."""

FINDINGS_INTERVAL_S = 30.0
"""How often open findings are counted for the metric."""


async def main() -> None:
    """The payment process with the settings of its environment."""
    await serve(Settings.load())


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    async with Process.start(NAME, settings) as process:
        pool = await process.postgres(SCHEMA, server_settings=PLANNER)
        bus = await process.bus()
        relay = OutboxRelay(pool, SCHEMA, bus)
        store = PostgresStore(pool, relay.wake)
        process.on_close("payment store", store.close)
        clock = SystemClock()
        providers = {psp.name: frozenset(psp.currency_codes) for psp in settings.psps}
        changes = PaymentChanges(
            lambda: connect(settings.database_url, SCHEMA, application_name="ducat-payment-changes", wait_s=5.0)
        )
        process.on_close("payment changes", changes.close)
        payments = Payments(
            store,
            changes,
            clock,
            providers=providers,
            orders_max=settings.orders_per_payment_max,
            expiry=timedelta(seconds=settings.order_expiry_s),
        )
        payouts = Payouts(store, clock, providers=providers)
        executor = ExecutorClient(await process.channel(settings.executor_address))
        notifications = Notifications(store, executor, clock, report_notification)
        reports = Reports(store, notifications, clock, report_notification)
        timers = Timers(store, notifications, clock)
        findings = Findings(store, clock)
        findings_gauge = FindingsGauge(findings)

        process.keep(relay.run, name="outbox relay")
        feeds = Feeds(process, pool, publishes=True)
        for topic, address in ((EXECUTOR_EVENTS, settings.executor_address), (WALLET_EVENTS, settings.wallet_address)):
            recorder = InboxRecorder(pool, topic)
            handle = recorder.batches(reports_handler(reports, topic))
            follower = feeds.follow(
                await process.channel(address),
                recorder,
                topic=topic,
                consumer=GROUP,
                handler=handle,
                batch_max=BATCH_MAX,
            )
            consume = partial(bus.consume, topic, GROUP, follower.batches(handle))
            process.keep(partial(consume, batch_max=BATCH_MAX, on_gap=follower.on_gap), name=topic)
        process.keep(lambda: _every(INTERVAL_S, timers.run_once), name="timers")
        process.keep(lambda: _every(FINDINGS_INTERVAL_S, findings_gauge.measure), name="findings gauge")
        await process.serve_grpc(
            settings.payment_listen,
            [
                (
                    PaymentServicer(payments, payouts, notifications, findings, settings.gateway_url),
                    add_PaymentServiceServicer_to_server,
                    SERVICE,
                ),
                *feeds.servicers,
            ],
            SCOPES | feeds.scopes,
        )


async def _every(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` now and then each `interval_s`."""
    while True:
        trace.set_current("")
        await work()
        await asyncio.sleep(interval_s)
