"""Who is turned away when there is too much: a budget of requests at once for each kind of request, and a rate for each caller.

    health     never turned away, costs nothing
    webhooks   PSPs; nothing that callers or buyers do takes their room
    api        callers with a token, or without one on a machine for development
    pages      buyers, and whoever finds the address

Over a budget the answer is 503: it is about us. Over a caller's own rate it is 429. Both say when to come back, are counted
(`ducat_http_shed_total{budget}`) and logged at most once in LOG_INTERVAL_S for each budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.adapters.exchange import HttpProblem, retry_after
from runtime.logs import get_logger
from runtime.metrics import counter
from runtime.rates import CallerRates

__all__ = ["Budget", "Rates", "Shedding"]

LOG_INTERVAL_S = 10.0

_logger = get_logger("gateway.shed")


class Shedding:
    """Counts what was turned away, and says so."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._shed = counter("ducat_http_shed_total", "Requests that were turned away.", ("budget",))
        self._unsaid: dict[str, int] = {}
        self._say_again_s: dict[str, float] = {}

    def note(self, budget: str, status: int) -> None:
        """One request of ``budget`` was turned away."""
        self._shed.labels(budget).inc()
        self._unsaid[budget] = self._unsaid.get(budget, 0) + 1
        now_s = self._now_s()
        if now_s >= self._say_again_s.get(budget, 0.0):
            self._say_again_s[budget] = now_s + LOG_INTERVAL_S
            _logger.warning("requests are turned away", budget=budget, status=status, count=self._unsaid.pop(budget))


class Budget:
    """At most ``running_max`` requests of one kind at once."""

    def __init__(self, name: str, running_max: int, shedding: Shedding) -> None:
        self.name = name
        self._running_max = running_max
        self._running = 0
        self._shedding = shedding

    def check(self) -> None:
        """Raises HttpProblem (503) where there is no room now."""
        if self._running >= self._running_max:
            self._shedding.note(self.name, 503)
            raise HttpProblem(503, f"{self._running_max} requests of this kind run already; try again", "OVERLOADED")

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Room for one request. Raises as `check`."""
        self.check()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class Rates:
    """What each caller may ask for in a second; 0 = no limit."""

    def __init__(self, name: str, per_s: float, shedding: Shedding) -> None:
        self._name = name
        self._callers = CallerRates(per_s)
        self._shedding = shedding

    def spend(self, caller: str) -> None:
        """One request of ``caller``. Raises HttpProblem (429) where it asks too often."""
        wait_s = self._callers.spend(caller)
        if wait_s:
            self._shedding.note(self._name, 429)
            raise HttpProblem(
                429,
                f"more than {self._callers.per_s:g} requests a second from you; slow down",
                "OVERLOADED",
                (retry_after(wait_s),),
            )
