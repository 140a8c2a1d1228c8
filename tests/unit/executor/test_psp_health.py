"""A PSP that is down must not be hammered, and one that is back must not be shunned."""

from __future__ import annotations

import pytest

from executor.domain.health import (
    CLOSED,
    FAILURE_COUNT_OPEN,
    OPEN_S,
    OPEN_S_MAX,
    PROBE_S,
    Health,
    after_failure,
    after_success,
    is_healthy,
    take,
)
from executor.domain.schedule import next_time_ns

S = 1_000_000_000


def failed(times: int, now_ns: int = 0) -> Health:
    health = CLOSED
    for _ in range(times):
        health = after_failure(health, now_ns)
    return health


def test_opens_after_failures_in_a_row() -> None:
    assert is_healthy(failed(FAILURE_COUNT_OPEN - 1))
    assert not is_healthy(failed(FAILURE_COUNT_OPEN))
    assert is_healthy(after_failure(after_success(failed(FAILURE_COUNT_OPEN)), 0))


def test_one_probe_when_the_time_is_over() -> None:
    health = failed(FAILURE_COUNT_OPEN)
    assert take(health, OPEN_S * S - 1) == (False, health)
    allowed, probing = take(health, OPEN_S * S)
    assert allowed
    assert not take(probing, OPEN_S * S)[0]
    assert take(probing, (OPEN_S + PROBE_S) * S)[0]  # the probe's process died


def test_failed_probes_wait_longer_up_to_a_limit() -> None:
    health, now_ns, waits = failed(FAILURE_COUNT_OPEN), 0, []
    for _ in range(60):
        waits.append((health.open_until_ns - now_ns) // S)
        now_ns = health.open_until_ns
        allowed, health = take(health, now_ns)
        assert allowed
        health = after_failure(health, now_ns)
    assert waits == sorted(waits)
    assert (waits[0], waits[1], waits[-1]) == (OPEN_S, 2 * OPEN_S, OPEN_S_MAX)


def test_calls_under_way_when_it_opens_do_not_keep_it_open() -> None:
    assert failed(FAILURE_COUNT_OPEN + 100) == failed(FAILURE_COUNT_OPEN)


def test_a_healthy_psp_changes_nothing() -> None:
    assert take(CLOSED, 5) == (True, CLOSED)
    assert after_success(CLOSED) is CLOSED


def test_schedule_repeats_its_last_step() -> None:
    assert [next_time_ns([2, 5, 60], count, 0) // S for count in range(5)] == [2, 5, 60, 60, 60]
    assert next_time_ns([2], 0, 7, at_least_s=9) == 9 * S + 7
    with pytest.raises(ValueError, match="at least one"):
        next_time_ns([], 0, 0)
