"""Wires the executor: the only place that names concrete classes."""

from __future__ import annotations

from ducat.executor.v1 import executor_pb2_grpc
from executor.adapters.bus import GROUP, TOPIC, CommandConsumer, log_attempt
from executor.adapters.grpc_server import SCOPES, SERVICE_NAME, ExecutorServicer
from executor.adapters.payment_client import GrpcPayoutInstructions
from executor.adapters.postgres import PostgresAttemptStore
from executor.psp.base import PspAdapter, PspBase, PspConfig
from executor.psp.registry import ADAPTERS
from executor.service.execute import Executor, Policy
from executor.service.health_board import HealthBoard
from executor.service.notifications import Notifications
from executor.service.poller import Poller
from executor.service.ports import Due
from kernel.clock import SystemClock
from kernel.errors import Unavailable
from runtime import trace
from runtime.feed import Feeds
from runtime.http_client import may_be_proxied
from runtime.inbox import InboxRecorder
from runtime.logs import get_logger
from runtime.outbox import OutboxRelay
from runtime.postgres import KeptConnections
from runtime.process import Process
from runtime.settings import PspSettings, Settings, SettingsInvalid

__all__ = ["adapters_of", "serve", "with_previous_secret"]

SENDING_GRACE_S = 10
"""Longer than a call to a PSP may take, a SENDING attempt is taken for abandoned."""

_logger = get_logger("executor")


async def serve(settings: Settings) -> None:
    """Runs the executor until it is told to stop."""
    async with Process.start("executor", settings) as process:
        adapters = adapters_of(settings)
        for psp in with_previous_secret(settings):
            _logger.warning("webhooks signed with the previous secret are accepted, until it is taken away", psp=psp)
        for adapter in adapters.values():
            process.on_close(f"psp {adapter.provider.name}", adapter.close)
        clock = SystemClock()
        pool = await process.postgres("executor")
        bus = await process.bus()
        relay = OutboxRelay(pool, "executor", bus)
        kept = KeptConnections(pool)
        process.on_close("kept connections", kept.close)
        store = PostgresAttemptStore(kept, relay)
        health = HealthBoard(store, clock)
        executor = Executor(
            store,
            adapters,
            GrpcPayoutInstructions(await process.channel(settings.payment_address)),
            health,
            clock,
            Policy(
                unknown_schedule_s=settings.unknown_poll_schedule_s,
                accepted_schedule_s=settings.accepted_poll_schedule_s,
                sending_grace_s=SENDING_GRACE_S + 2 * settings.psp_timeout_ms / 1000,
            ),
            wake=lambda time_ns: poller.wake(time_ns),
        )

        async def resume(due: Due) -> None:
            with trace.bind(due.attempt.traceparent):
                before = due.attempt.state
                attempt = await executor.resume(due)
                if attempt.state is not before:
                    log_attempt("asked the PSP again", attempt)

        poller = Poller(store, health, clock, resume, _poll_failed)
        notifications = Notifications(store, adapters, clock)
        process.on_close("settled notes", notifications.flush)
        await health.refresh()
        process.keep(relay.run, name="outbox relay")
        process.keep(poller.run, name="poller")
        process.keep(notifications.run, name="settled notes")
        feeds = Feeds(process, pool, publishes=True)
        consumer = CommandConsumer(executor, concurrency=settings.executor_concurrency)
        recorder = InboxRecorder(pool, GROUP)
        follower = feeds.follow(
            await process.channel(settings.payment_address),
            recorder,
            topic=TOPIC,
            consumer=GROUP,
            handler=recorder.batches(consumer.ensure),
        )
        process.keep(
            lambda: bus.consume_each(
                TOPIC,
                GROUP,
                follower.each(recorder.each(consumer.handle)),
                concurrency=settings.executor_concurrency,
                on_gap=follower.on_gap,
            ),
            name=TOPIC,
        )
        await process.serve_grpc(
            settings.executor_listen,
            servicers=[
                (
                    ExecutorServicer(executor, notifications, health, adapters),
                    executor_pb2_grpc.add_ExecutorServiceServicer_to_server,
                    SERVICE_NAME,
                ),
                *feeds.servicers,
            ],
            scopes=SCOPES | feeds.scopes,
        )


def adapters_of(settings: Settings) -> dict[str, PspAdapter]:
    """One adapter a configured PSP. Raises SettingsInvalid for an adapter that does not exist."""
    adapters: dict[str, PspAdapter] = {}
    for psp in settings.psps:
        make = ADAPTERS.get(psp.adapter)
        if make is None:
            raise SettingsInvalid(
                f"psps: {psp.name}: no adapter {psp.adapter!r}; there are: {', '.join(sorted(ADAPTERS))}"
            )
        config = _config(psp, settings)
        if settings.psp_proxy and not may_be_proxied(psp.base_url):
            raise SettingsInvalid(
                f"psps: {psp.name}: base_url {psp.base_url}: with psp_proxy it must be https, or the proxy reads what is sent"
            )
        adapter = adapters[psp.name] = make(config)
        if type(adapter).verify is not PspBase.verify and not config.webhook_secrets:
            raise SettingsInvalid(
                f"psps: {psp.name}: webhook_secret is empty, so every webhook would be refused; set webhook_secret or webhook_secret_file"
            )
    return adapters


def with_previous_secret(settings: Settings) -> list[str]:
    """The PSPs whose webhook secret is being replaced."""
    return [psp.name for psp in settings.psps if psp.webhook_secret_previous.get_secret_value()]


def _config(psp: PspSettings, settings: Settings) -> PspConfig:
    gateway_url = settings.gateway_url.rstrip("/")
    return PspConfig(
        name=psp.name,
        base_url=psp.base_url,
        api_key=psp.api_key.get_secret_value(),
        payout_api_key=psp.payout_api_key.get_secret_value(),
        webhook_secret=psp.webhook_secret.get_secret_value(),
        return_url=f"{gateway_url}/payment/return",
        payout_callback_url=f"{gateway_url}/webhooks/{psp.name}/payouts",
        statement_descriptor=settings.statement_descriptor,
        timeout_ms=settings.psp_timeout_ms,
        currency_codes=frozenset(psp.currency_codes),
        weight=psp.weight,
        webhook_secret_previous=psp.webhook_secret_previous.get_secret_value(),
        proxy=settings.psp_proxy,
    )


def _poll_failed(due: Due, error: BaseException, count: int) -> None:
    """An attempt is asked about again once its lease has ended."""
    fields = {"reference": due.attempt.reference, "psp": due.attempt.psp, "count": count}
    if isinstance(error, Unavailable):
        _logger.warning("attempts wait for a service that does not answer", error=str(error), **fields)
    else:
        _logger.error("polling attempts failed", exc_info=error, **fields)
