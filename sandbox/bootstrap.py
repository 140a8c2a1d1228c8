"""Puts the sandbox together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.process import Process
from runtime.settings import Settings, SettingsInvalid
from sandbox.api import SandboxApi
from sandbox.deliveries import Deliveries
from sandbox.faults import faults_from
from sandbox.psp import PspName, SandboxPsp
from sandbox.store import Store, Task

__all__ = ["PAYOUT_DELAY_MS", "Sandbox", "names_of", "serve"]

PAYOUT_DELAY_MS = 30
"""Between the states of a payout: pending → processing → completed."""


class Sandbox:
    """A whole sandbox without its server: `api` is the ASGI application, `deliveries.run()` sends the webhooks."""

    def __init__(self, path: Path, names: Sequence[PspName], *, payout_delay_ms: int = PAYOUT_DELAY_MS) -> None:
        self.store = Store(path)
        by_name = {name.name: name for name in names}
        self.psp = SandboxPsp(
            self.store,
            now_ms=lambda: time.time_ns() // 1_000_000,
            new_id=lambda prefix: f"{prefix}_{secrets.token_hex(12)}",
            schedule=lambda task: self.deliveries.schedule(task),
            payout_delay_ms=payout_delay_ms,
        )
        self.psp.faults.update({psp: faults_from(body) for psp, body in self.store.faults().items()})

        def advance(task: Task) -> None:
            name = by_name.get(task.psp)
            if name is not None:  # of a PSP that has left the settings: kept, and taken up when it is back
                self.psp.advance(name, task)

        self.deliveries = Deliveries(self.store, {name.name: name.webhook_secret for name in names}, advance)
        self.api = SandboxApi(self.psp, by_name, self.store, self.deliveries)


def names_of(settings: Settings) -> list[PspName]:
    """The configured PSPs that the sandbox plays."""
    return [
        PspName(
            name=psp.name,
            base_url=psp.base_url.rstrip("/"),
            api_key=psp.api_key.get_secret_value(),
            payout_api_key=psp.payout_api_key.get_secret_value(),
            webhook_secret=psp.webhook_secret.get_secret_value(),
            webhook_url=f"{settings.gateway_url.rstrip('/')}/webhooks/{psp.name}",
        )
        for psp in settings.psps
        if psp.adapter == "sandbox"
    ]


async def serve(settings: Settings) -> None:
    """Serves until stopped."""
    names = names_of(settings)
    if not names:
        raise SettingsInvalid('psps: none has the adapter "sandbox", so the sandbox has nothing to play')
    async with Process.start("sandbox", settings) as process:
        sandbox = Sandbox(Path(settings.data_dir) / "sandbox" / "sandbox.sqlite", names)

        async def close() -> None:
            sandbox.store.close()

        process.on_close("store", close)
        process.keep(sandbox.deliveries.run, name="deliveries")
        await process.serve_http(settings.sandbox_listen, sandbox.api)
