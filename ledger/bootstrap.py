"""Wires the ledger: the only place that names concrete classes."""

from __future__ import annotations

from kernel.clock import SystemClock
from ledger.adapters.bus import BATCH_MAX, GROUP, TOPIC, LedgerConsumer
from ledger.adapters.comparison_metrics import ComparisonTold
from ledger.adapters.grpc_server import SCOPES, SERVICE_NAME, LedgerServicer, add_to_server
from ledger.adapters.postgres import CONSUMER, PostgresJournal
from ledger.adapters.wallet import GrpcWallet
from ledger.domain import Applied
from ledger.service import CompareWallet, PostFacts, ReadLedger
from runtime.feed import Feeds
from runtime.inbox import InboxRecorder
from runtime.postgres import KeptConnections
from runtime.process import Process
from runtime.settings import Settings

__all__ = ["main"]


async def main() -> None:
    """Runs the ledger until it is told to stop."""
    settings = Settings.load()
    async with Process.start("ledger", settings) as process:
        pool = await process.postgres("ledger")
        kept = KeptConnections(pool)
        process.on_close("kept connections", kept.close)
        journal = PostgresJournal(kept)
        bus = await process.bus()
        consumer = LedgerConsumer(PostFacts(journal))
        feeds = Feeds(process, pool, publishes=False)
        recorder = InboxRecorder(pool, CONSUMER)
        handle = recorder.batches(consumer.handle)
        follower = feeds.follow(
            await process.channel(settings.payment_address),
            recorder,
            topic=TOPIC,
            consumer=GROUP,
            handler=handle,
            batch_max=BATCH_MAX,
        )
        process.keep(
            lambda: bus.consume(TOPIC, GROUP, follower.batches(handle), batch_max=BATCH_MAX, on_gap=follower.on_gap),
            name=TOPIC,
        )
        comparison = CompareWallet(
            GrpcWallet(settings.wallet_address, process.channel),
            journal,
            lambda: Applied.of(follower.applied.ranges()),
            SystemClock(),
            grace_s=settings.ledger_compare_grace_s,
            confirm_s=settings.ledger_compare_confirm_s,
        )
        if settings.ledger_compare_interval_s:
            interval_s, told = settings.ledger_compare_interval_s, ComparisonTold()
            process.keep(lambda: comparison.keep_comparing(interval_s, told), name="comparison with the wallet")
        await process.serve_grpc(
            settings.ledger_listen,
            servicers=[
                (LedgerServicer(ReadLedger(journal), comparison), add_to_server, SERVICE_NAME),
                *feeds.servicers,
            ],
            scopes=SCOPES | feeds.scopes,
        )
