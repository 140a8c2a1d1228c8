"""Faults on demand: which ones meet a request.

A fault is asked for by the header `Sandbox-Fault`, by `metadata.sandbox_fault`, by `fault-<name>` inside our reference (order id, refund
id or payout reference), or by a global rate. A rate is drawn from a hash of seed, fault and reference: the same run meets the same faults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox.rules import ApiError, invalid

__all__ = ["NAMES", "Faults", "faults_from"]

NAMES = (
    "decline",  # the card is declined on the hosted page, whatever card
    "reject",  # the API refuses: an intent at once (402), a payout by its compliance check (webhook payout.rejected)
    "block",  # a payout is refused at once by a compliance check (403)
    "fail",  # a payout or refund fails (webhook payout.failed, refund.failed)
    "return",  # a payout completes, then the bank sends it back (webhook payout.returned)
    "timeout",  # acts, and never answers
    "lost",  # neither acts nor answers; once
    "error_after",  # acts, and answers 500; once
    "throttle",  # does not act, and answers 429; once
    "duplicate_webhooks",  # each event is sent twice, and once more under another event id
    "reorder_webhooks",  # an older event is delivered after the newer one
    "slow",  # answers after slow_ms
)
SLOW_MS = 1_500
SLOW_MS_MAX = 60_000


@dataclass(slots=True)
class Faults:
    """The global faults of one PSP name, or of all."""

    rates: dict[str, float] = field(default_factory=dict)
    slow_ms: int = 0
    seed: int = 0

    def of(self, reference: str, header: str, metadata: Mapping[str, str]) -> frozenset[str]:
        """The faults that this request meets."""
        asked = header or metadata.get("sandbox_fault", "")
        lowered = reference.lower()
        if not asked and not self.rates and not self.slow_ms and "fault-" not in lowered:
            return _NONE
        met = {name for name in (part.strip().replace("-", "_") for part in asked.split(",")) if name in NAMES}
        met.update(name for name in NAMES if f"fault-{name}" in lowered or f"fault-{name.replace('_', '-')}" in lowered)
        met.update(name for name, rate in self.rates.items() if self._draw(name, reference) < rate)
        if self.slow_ms:
            met.add("slow")
        return frozenset(met)

    def to_json(self) -> dict[str, Any]:
        return {**self.rates, "slow_ms": self.slow_ms, "seed": self.seed}

    def _draw(self, name: str, reference: str) -> float:
        digest = hashlib.blake2b(f"{self.seed}/{name}/{reference}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / float(1 << 48)


_NONE: frozenset[str] = frozenset()


def faults_from(params: Mapping[str, Any]) -> Faults:
    """Global faults from ``{"decline": 0.1, "slow_ms": 200, "seed": 7}``. Raises ApiError for anything else."""
    faults = Faults()
    for name, value in params.items():
        if name == "psp":
            continue
        if name in ("slow_ms", "seed"):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= SLOW_MS_MAX:
                raise invalid(name, f"expected a whole number from 0 to {SLOW_MS_MAX}")
            setattr(faults, name, value)
        elif name not in NAMES:
            raise ApiError(
                400,
                "invalid_request_error",
                "parameter_unknown",
                f"{name[:40]!r} is no fault; known: {', '.join(NAMES)}, slow_ms, seed, psp",
                param=name[:40],
            )
        elif not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise invalid(name, "expected a rate from 0 to 1")
        elif value:
            faults.rates[name] = float(value)
    return faults
