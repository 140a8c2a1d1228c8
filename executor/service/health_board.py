"""Which PSPs calls may leave for, as this process knows it and every executor shares it."""

from __future__ import annotations

from collections.abc import Iterable

from executor.domain.health import CLOSED, Health, after_failure, after_success, is_healthy, take
from executor.domain.outcome import Answer, NoAnswer, NotSent
from executor.service.ports import AttemptStore
from kernel.clock import Clock

__all__ = ["HealthBoard"]


class HealthBoard:
    """Written to the store only when it changes, so a healthy PSP costs nothing."""

    def __init__(self, store: AttemptStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._health: dict[str, Health] = {}

    async def refresh(self) -> None:
        """Takes over what the executors beside this one have found."""
        self._health = await self._store.load_health()

    def of(self, psp: str) -> Health:
        return self._health.get(psp, CLOSED)

    def unhealthy(self, psps: Iterable[str]) -> frozenset[str]:
        return frozenset(psp for psp in psps if not is_healthy(self.of(psp)))

    async def may_call(self, psp: str) -> bool:
        """True where a call may leave now; the caller tells its answer to `record`."""
        before = self._health.get(psp)
        if before is None:
            return True
        allowed, after = take(before, self._clock.now_ns())
        if after is not before:
            await self._keep(psp, after)
        return allowed

    async def record(self, psp: str, answer: Answer) -> None:
        """An answer of any kind is a success of the PSP, even a refusal; none, or no connection, is a failure."""
        before = self.of(psp)
        if isinstance(answer, NoAnswer) or (isinstance(answer, NotSent) and not answer.throttled):
            after = after_failure(before, self._clock.now_ns())
            if after is not before:
                await self._keep(psp, after)
        elif before.failure_count:
            await self._keep(psp, after_success(before))

    async def _keep(self, psp: str, health: Health) -> None:
        self._health[psp] = health
        await self._store.save_health(psp, health, self._clock.now_ns())
