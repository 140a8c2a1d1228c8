"""Wires the ledger: the only place that names concrete classes."""

from __future__ import annotations

import asyncio

from ledger.adapters.bus import BATCH_MAX, GROUP, TOPIC, LedgerConsumer
from ledger.adapters.grpc_server import SCOPES, SERVICE_NAME, LedgerServicer, add_to_server
from ledger.adapters.postgres import PostgresJournal
from ledger.service import PostFacts, ReadLedger
from runtime import inbox
from runtime.logs import get_logger
from runtime.postgres import Pool
from runtime.process import Process
from runtime.settings import Settings

__all__ = ["main"]

PRUNE_INTERVAL_S = 3_600.0
PRUNE_BATCHES_MAX = 100
"""Most batches of inbox.PRUNE_BATCH rows in one round."""

_logger = get_logger("ledger")


async def main() -> None:
    """Runs the ledger until it is told to stop."""
    settings = Settings.load()
    async with Process.start("ledger", settings) as process:
        pool = await process.postgres("ledger")
        journal = PostgresJournal(pool)
        bus = await process.bus()
        consumer = LedgerConsumer(PostFacts(journal))
        process.spawn(bus.consume(TOPIC, GROUP, consumer.handle, batch_max=BATCH_MAX), name=TOPIC)
        process.spawn(_prune_inbox(pool), name="inbox pruning")
        await process.serve_grpc(
            settings.ledger_listen,
            servicers=[(LedgerServicer(ReadLedger(journal)), add_to_server, SERVICE_NAME)],
            scopes=SCOPES,
        )


async def _prune_inbox(pool: Pool) -> None:
    """Forgets old message ids now and then each hour; entries keep their own ids for ever."""
    while True:
        try:
            async with pool.acquire() as connection:
                for _ in range(PRUNE_BATCHES_MAX):
                    if await inbox.prune(connection) < inbox.PRUNE_BATCH:
                        break
        except Exception:
            _logger.exception("pruning failed; it runs again", interval_s=PRUNE_INTERVAL_S)
        await asyncio.sleep(PRUNE_INTERVAL_S)
