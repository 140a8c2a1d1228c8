"""A PSP's health: a circuit that opens after failures in a row, and lets one probe through when it may have recovered."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "CLOSED",
    "FAILURE_COUNT_OPEN",
    "OPEN_S",
    "OPEN_S_MAX",
    "PROBE_S",
    "Health",
    "after_failure",
    "after_success",
    "is_healthy",
    "take",
]

FAILURE_COUNT_OPEN = 5
"""So many failures in a row open the circuit."""
OPEN_S = 5
"""The first open time; doubles with each failed probe."""
OPEN_S_MAX = 120
PROBE_S = 30
"""A probe that has told nothing for so long (its process died) is replaced by another."""

_SECOND_NS = 1_000_000_000

assert OPEN_S <= OPEN_S_MAX
assert FAILURE_COUNT_OPEN >= 2


@dataclass(frozen=True, slots=True)
class Health:
    """`open_until_ns`: no call before this unix time while `failure_count` is at or above FAILURE_COUNT_OPEN."""

    failure_count: int = 0
    open_until_ns: int = 0
    probing: bool = False


CLOSED = Health()


def is_healthy(health: Health) -> bool:
    """True while calls go through."""
    return health.failure_count < FAILURE_COUNT_OPEN


def take(health: Health, now_ns: int) -> tuple[bool, Health]:
    """May a call leave now? In an open circuit whose time is over, the one who asks first is the probe and the others wait for it."""
    if is_healthy(health):
        return True, health
    if now_ns < health.open_until_ns:
        return False, health
    return True, replace(health, open_until_ns=now_ns + PROBE_S * _SECOND_NS, probing=True)


def after_failure(health: Health, now_ns: int) -> Health:
    """No answer, or no connection. Calls that were under way when the circuit opened do not make it stay open longer; a failed
    probe does."""
    if not is_healthy(health) and not health.probing:
        return health
    count = health.failure_count + 1
    if count < FAILURE_COUNT_OPEN:
        return Health(count, 0)
    open_s = min(OPEN_S << min(count - FAILURE_COUNT_OPEN, 16), OPEN_S_MAX)
    return Health(count, now_ns + open_s * _SECOND_NS)


def after_success(health: Health) -> Health:
    """Any answer, a refusal too."""
    return CLOSED if health != CLOSED else health
