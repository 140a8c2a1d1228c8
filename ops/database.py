"""The platform's PostgreSQL for a command: the settings' own, or the embedded one of the data folder, running or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kernel.errors import Unavailable
from runtime.embedded import EmbeddedPostgres, ServerFailed
from runtime.postgres import Connection, connect
from runtime.settings import Settings
from runtime.unfinished import check_finished

__all__ = ["database"]

CONNECT_WAIT_S = 10.0


@asynccontextmanager
async def database(settings: Settings, schema: str) -> AsyncIterator[Connection | None]:
    """A connection; None where there is no database: no URL is set, and the data folder has no embedded server. An embedded server that
    does not run is started for the time. Raises Unavailable, FailedPrecondition (half a data folder)."""
    embedded: EmbeddedPostgres | None = None
    url = settings.database_url
    check_finished(Path(settings.data_dir))
    try:
        if not url:
            server = _embedded(settings)
            if server is None:
                yield None
                return
            url = server.running_dsn()
            if not url:
                embedded = server
                try:
                    url = await asyncio.to_thread(server.start)
                except (ServerFailed, OSError) as error:
                    raise Unavailable(f"the embedded PostgreSQL of {server.folder} does not start: {error}") from error
        connection = await connect(url, schema, application_name="ducat-ops", wait_s=CONNECT_WAIT_S)
        try:
            yield connection
        finally:
            await connection.close()
    finally:
        if embedded is not None:
            await asyncio.to_thread(embedded.stop)


def _embedded(settings: Settings) -> EmbeddedPostgres | None:
    folder = Path(settings.data_dir).absolute() / "postgres"
    return EmbeddedPostgres(folder) if (folder / "data" / "PG_VERSION").is_file() else None
