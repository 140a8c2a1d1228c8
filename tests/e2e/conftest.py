"""One platform of real processes for all end-to-end tests of a session; a second one only where a test breaks
things.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from ops.platform import Platform


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def platform(tmp_path_factory: object) -> AsyncIterator[Platform]:
    folder: Path = tmp_path_factory.mktemp("platform")  # type: ignore[attr-defined]
    quick = {"DUCAT_FEED_CHECK_INTERVAL_S": "1", "DUCAT_FEED_GRACE_S": "1", "DUCAT_LEDGER_COMPARE_CONFIRM_S": "4"}
    running = Platform(folder, free_ports=True, env=quick, log=print)
    await running.start()
    yield running
    await running.stop()
