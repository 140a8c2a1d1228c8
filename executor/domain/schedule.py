"""When to ask again: seconds, then minutes, then hours; the last step repeats."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["next_time_ns"]


def next_time_ns(schedule_s: Sequence[float], poll_count: int, now_ns: int, *, at_least_s: float = 0.0) -> int:
    """Unix nanoseconds of the next try after `poll_count` tries that told nothing."""
    if not schedule_s:
        raise ValueError("schedule_s: expected at least one step, got none")
    delay_s = max(schedule_s[min(max(poll_count, 0), len(schedule_s) - 1)], at_least_s)
    return now_ns + int(delay_s * 1_000_000_000)
