"""Time as an argument: the pure rooms never read a clock, the outer rooms pass one in."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "FixedClock", "SystemClock"]


class Clock(Protocol):
    def now_ns(self) -> int:
        """Unix time in nanoseconds."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now_ns(self) -> int:
        return time.time_ns()


class FixedClock:
    """A clock for tests: stands still until it is moved."""

    def __init__(self, now_ns: int = 1_753_056_000_000_000_000) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance(self, *, seconds: float) -> None:
        self._now_ns += int(seconds * 1_000_000_000)
