"""Wires the ledger: the only place that names concrete classes."""

from __future__ import annotations

from ledger.adapters.bus import BATCH_MAX, GROUP, TOPIC, LedgerConsumer
from ledger.adapters.grpc_server import SCOPES, SERVICE_NAME, LedgerServicer, add_to_server
from ledger.adapters.postgres import PostgresJournal
from ledger.service import PostFacts, ReadLedger
from runtime import inbox
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
        process.spawn(bus.consume(TOPIC, GROUP, consumer.handle, batch_max=BATCH_MAX), name=TOPIC)
        process.spawn(inbox.keep_pruned(pool), name="inbox pruning")
        await process.serve_grpc(
            settings.ledger_listen,
            servicers=[(LedgerServicer(ReadLedger(journal)), add_to_server, SERVICE_NAME)],
            scopes=SCOPES,
        )
