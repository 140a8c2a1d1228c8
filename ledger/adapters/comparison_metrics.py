"""What the continuous comparison of wallet and ledger shows: metrics, and a line for every account that differs."""

from __future__ import annotations

from collections.abc import Sequence

from ledger.domain import Difference
from ledger.service import Comparison
from runtime import metrics
from runtime.logs import get_logger

__all__ = ["ComparisonTold"]

LINES_MAX = 20
"""Accounts of one round that get a line each; the rest is a number."""
SILENCE_S = 600.0
"""Without a verdict for so long, that is an error of its own."""

_logger = get_logger("ledger.compare")


class ComparisonTold:
    """Takes what `CompareWallet.keep_comparing` tells."""

    def __init__(self) -> None:
        self._minor = metrics.gauge(
            "ducat_ledger_wallet_difference_minor",
            "By how much accounts differ between wallet and ledger, all of a currency, without signs; anything but 0 is wrong.",
            ["currency"],
        )
        self._accounts = metrics.gauge(
            "ducat_ledger_wallet_differences",
            "Accounts that differ between wallet and ledger; anything but 0 is wrong.",
        )
        self._time = metrics.gauge(
            "ducat_ledger_compare_timestamp_seconds", "When wallet and ledger were compared last, every account."
        )
        self._verdict = metrics.gauge(
            "ducat_ledger_compare_no_verdict", "1: wallet and ledger could not be compared at the last try."
        )
        self._currencies: set[str] = set()
        self._shown = 0
        self._silent_since_ns = 0

    def __call__(self, found: Comparison, fresh: Sequence[Difference], is_end: bool) -> None:
        """`fresh`: what the last round found; `is_end`: every account was compared since `found` began."""
        for one in fresh[:LINES_MAX]:
            _logger.error(
                "wallet and ledger differ: stop payouts of this account and run `ducat check`",
                account=one.account_name,
                currency=one.currency_code,
                wallet_minor=one.wallet_minor,
                ledger_minor=one.ledger_minor,
                difference_minor=one.difference_minor,
                positions={side.process: side.last for side in found.progress},
                lacking={side.process: list(side.lacking) for side in found.progress if side.lacking},
            )
        if len(fresh) > LINES_MAX:
            _logger.error("more accounts differ between wallet and ledger", accounts=len(fresh) - LINES_MAX)
        self._verdict.set(1 if found.problem else 0)
        if found.problem:
            self._tell_silence(found)
        else:
            self._silent_since_ns = 0
        if is_end:
            self._time.set(found.end_time_ns / 1e9)
        if is_end or found.difference_count >= self._shown:  # one that is not through yet only adds
            self._show(found)

    def _show(self, found: Comparison) -> None:
        sums = dict.fromkeys(self._currencies, 0)
        for one in found.differences:
            sums[one.currency_code] = sums.get(one.currency_code, 0) + abs(one.difference_minor)
        for currency, minor in sums.items():
            self._minor.labels(currency).set(minor)
        self._currencies = set(sums)
        self._accounts.set(found.difference_count)
        self._shown = found.difference_count

    def _tell_silence(self, found: Comparison) -> None:
        self._silent_since_ns = self._silent_since_ns or found.end_time_ns
        silent_s = (found.end_time_ns - self._silent_since_ns) / 1e9
        log = _logger.error if silent_s >= SILENCE_S else _logger.warning
        log("wallet and ledger could not be compared", problem=found.problem, silent_s=round(silent_s))
