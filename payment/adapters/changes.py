"""Tells watchers that a payment changed: LISTEN on a connection of its own, which exists only while somebody
watches.

The connection also holds an advisory lock, by which writers know that somebody listens: without one they send no NOTIFY,
because PostgreSQL lets one notifying transaction commit at a time (migration 0002).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg

from kernel.errors import DucatError
from runtime.bus import is_transient
from runtime.logs import get_logger

__all__ = ["CHANNEL", "LINGER_S", "PaymentChanges"]

CHANNEL = "payment_changed"
"""The payload is the checkout_id."""
LOCK = (3341, 1)
"""The advisory lock that migration 0002 names. Shared by all that listen."""
LINGER_S = 30.0
"""How long the connection stays open after the last watcher left."""
RECONNECT_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

_logger = get_logger("changes")


class PaymentChanges:
    """Implements payment.service.ports.Changes. `connect` opens the connection to listen on."""

    def __init__(self, connect: Callable[[], Awaitable[asyncpg.Connection]]) -> None:
        self._connect = connect
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._connection: Any = None
        self._opening = asyncio.Lock()
        self._linger: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def watch(self, checkout_id: str) -> AsyncIterator[None]:
        """Yields at once, then after each change. Listens before the first yield, so that no change is missed
        in between.
        """
        changed = asyncio.Event()
        changed.set()
        self._watchers.setdefault(checkout_id, set()).add(changed)
        try:
            await self._listen()
            while True:
                await changed.wait()
                changed.clear()
                yield None
        finally:
            watching = self._watchers[checkout_id]
            watching.discard(changed)
            if not watching:
                del self._watchers[checkout_id]
            if not self._watchers:
                self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._hang_up)

    async def close(self) -> None:
        """Ends the connection."""
        if self._linger is not None:
            self._linger.cancel()
        if self._task is not None:
            self._task.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _listen(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        async with self._opening:
            if self._connection is not None:
                return
            connection = await self._connect()
            try:
                await connection.add_listener(CHANNEL, self._on_change)
                # Waits for transactions that saw no listener; whoever reads after this sees what they did.
                await connection.execute("SELECT pg_advisory_lock_shared($1, $2)", *LOCK)
            except BaseException:
                connection.terminate()
                raise
            connection.add_termination_listener(self._on_lost)
            self._connection = connection

    def _on_change(self, _connection: object, _pid: int, _channel: str, checkout_id: object) -> None:
        for changed in self._watchers.get(str(checkout_id), ()):
            changed.set()

    def _on_lost(self, connection: Any) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        if self._watchers:
            self._task = asyncio.get_running_loop().create_task(self._listen_again(), name="payment-changes")

    async def _listen_again(self) -> None:
        tries = 0
        while self._watchers and self._connection is None:
            await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
            tries += 1
            try:
                await self._listen()
            except Exception as error:
                if tries == 1:
                    trace = None if isinstance(error, DucatError) or is_transient(error) else error
                    _logger.warning(
                        "payment changes are not heard; it is tried again, and watchers are woken then",
                        error=f"{type(error).__name__}: {error}",
                        exc_info=trace,
                    )
        _logger.info("listening for payment changes again", tries=tries)
        for watching in self._watchers.values():  # what changed meanwhile was not heard
            for changed in watching:
                changed.set()

    def _hang_up(self) -> None:
        if self._watchers:
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
