"""Asks again: wakes when the next attempt is due, never in a busy loop.

Several executors poll side by side; the store hands each due attempt to one of them for `LEASE_S`. A process that dies with attempts in
hand loses nothing: their lease ends and another takes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from executor.service.health_board import HealthBoard
from executor.service.ports import AttemptStore, Due
from kernel.clock import Clock

__all__ = ["BATCH_MAX", "HASTEN_BATCH_MAX", "IDLE_S", "LEASE_S", "Poller"]

BATCH_MAX = 32
HASTEN_BATCH_MAX = 1024
LEASE_S = 60
IDLE_S = 30.0
"""How long this process may sleep although another one may have stored something that is due earlier."""

_NEVER_NS = 1 << 62

assert LEASE_S > IDLE_S


class Poller:
    """`resume(due)` looks at one attempt. Where that raised, `failed(due, error, count)` is told once a poll for all attempts that met
    the same error: the first of them, and how many they were.
    """

    def __init__(
        self,
        store: AttemptStore,
        health: HealthBoard,
        clock: Clock,
        resume: Callable[[Due], Awaitable[object]],
        failed: Callable[[Due, BaseException, int], None],
    ) -> None:
        self._store = store
        self._health = health
        self._clock = clock
        self._resume = resume
        self._failed = failed
        self._changed = asyncio.Event()
        self._wake_time_ns = _NEVER_NS
        """When this process looks next; while it polls, the earliest time that it was told of meanwhile."""

    def wake(self, time_ns: int) -> None:
        """An attempt is due at this time."""
        if time_ns < self._wake_time_ns:
            self._wake_time_ns = time_ns
            self._changed.set()

    async def run(self) -> None:
        """Polls until cancelled. Raises what the store raises; it may be called again then."""
        while True:
            self._wake_time_ns = _NEVER_NS
            await self._health.refresh()
            next_ns = await self.poll_once()
            now_ns = self._clock.now_ns()
            next_ns = min(next_ns or _NEVER_NS, self._wake_time_ns)
            wait_s = min(max((next_ns - now_ns) / 1e9, 0.1), IDLE_S)
            self._wake_time_ns = now_ns + int(wait_s * 1e9)
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def poll_once(self) -> int:
        """Looks at everything that is due now; unix nanoseconds of what is due next, 0 where nothing is."""
        failures: dict[tuple[type, str], tuple[Due, Exception, int]] = {}
        try:
            return await self._poll(failures)
        finally:
            for first, error, count in failures.values():
                self._failed(first, error, count)

    async def _poll(self, failures: dict[tuple[type, str], tuple[Due, Exception, int]]) -> int:
        while True:
            now_ns = self._clock.now_ns()
            while recovered := self._health.recovered(HASTEN_BATCH_MAX):
                await self._store.hasten(recovered, now_ns)
                self._health.forget(recovered)
            due, next_ns = await self._store.claim_due(now_ns, now_ns + LEASE_S * 1_000_000_000, BATCH_MAX)
            if not due:
                return next_ns
            for each, error in zip(
                due, await asyncio.gather(*map(self._resume, due), return_exceptions=True), strict=True
            ):
                if isinstance(error, Exception):
                    key = (type(error), str(error))
                    first, _, count = failures.get(key, (each, error, 0))
                    failures[key] = (first, error, count + 1)
