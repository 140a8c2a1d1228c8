"""A token bucket for each caller."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["BURST_S", "CALLERS_MAX", "CallerRates"]

CALLERS_MAX = 10_000
"""Callers whose rate is known at once; the one that was silent longest is forgotten, and begins with a full bucket."""
BURST_S = 2.0
"""A bucket holds what so many seconds bring."""


class CallerRates:
    """``per_s`` calls a second for each caller, BURST_S seconds' worth at once. 0 = no limit."""

    def __init__(self, per_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self._burst = max(1.0, per_s * BURST_S)
        self._now_s = now_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller → calls left, and when

    def spend(self, caller: str) -> float:
        """One call of ``caller``: 0, or the seconds after which it may try again. What is refused costs it nothing."""
        if not self.per_s:
            return 0.0
        now_s = self._now_s()
        left, then_s = self._buckets.pop(caller, (self._burst, now_s))
        left = min(self._burst, left + (now_s - then_s) * self.per_s)
        wait_s = 0.0 if left >= 1.0 else (1.0 - left) / self.per_s
        self._buckets[caller] = (left if wait_s else left - 1.0, now_s)
        if len(self._buckets) > CALLERS_MAX:
            self._buckets.popitem(last=False)
        return wait_s
