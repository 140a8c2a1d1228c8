"""Which PSPs calls may leave for, as this process knows it and every executor shares it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from executor.domain.attempt import Attempt, AttemptKind
from executor.domain.health import CLOSED, Health, after_failure, after_success, is_healthy, take
from executor.domain.outcome import Answer, NoAnswer, NotSent
from executor.service.ports import AttemptStore, Waiting
from kernel.clock import Clock

__all__ = ["WAITING_COUNT_MAX", "HealthBoard"]

WAITING_COUNT_MAX = 8192
"""So many attempts of one PSP are remembered and tried as soon as it answers; further ones look for themselves now and then."""


class HealthBoard:
    """Written to the store only when it changes, so a healthy PSP costs nothing."""

    def __init__(self, store: AttemptStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._health: dict[str, Health] = {}
        self._waiting: dict[str, dict[tuple[AttemptKind, str], int]] = {}

    async def refresh(self) -> None:
        """Takes over what the executors beside this one have found."""
        self._health = await self._store.load_health()

    def of(self, psp: str) -> Health:
        return self._health.get(psp, CLOSED)

    def is_healthy(self, psp: str) -> bool:
        """True while calls go through."""
        return is_healthy(self.of(psp))

    def open_until_ns(self, psp: str) -> int:
        """Before this unix time no call leaves; 0 while calls go through."""
        health = self.of(psp)
        return 0 if is_healthy(health) else health.open_until_ns

    def wait(self, attempt: Attempt) -> None:
        """An attempt, as stored, that is put off because its PSP does not answer."""
        waiting = self._waiting.setdefault(attempt.psp, {})
        key = (attempt.kind, attempt.reference)
        if key in waiting or len(waiting) < WAITING_COUNT_MAX:
            waiting[key] = attempt.next_poll_time_ns

    def recovered(self, count_max: int = 1) -> list[Waiting]:
        """Attempts that need not wait any more: their PSP answers again. They stay in the list until `forget`."""
        ready = (
            (kind, reference, time_ns)
            for psp, waiting in self._waiting.items()
            if self.is_healthy(psp)
            for (kind, reference), time_ns in waiting.items()
        )
        return list(islice(ready, count_max))

    def forget(self, attempts: Sequence[Waiting]) -> None:
        """These have been made due."""
        for waiting in self._waiting.values():
            for kind, reference, time_ns in attempts:
                if waiting.get((kind, reference)) == time_ns:
                    del waiting[kind, reference]

    def unhealthy(self, psps: Iterable[str]) -> frozenset[str]:
        return frozenset(psp for psp in psps if not self.is_healthy(psp))

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
