"""Wallet against ledger: the same accounts as of the same events.

Both read the feed `payment.events`, each at its own pace, and an event moves the same money on accounts of the same names in both. So at
any moment, for every account,

    wallet balance = ledger balance − entries whose events the wallet has not applied + events that the ledger has not applied

The last term is waited away: a wallet's balances are compared once the ledger has applied all that they include. The middle one is
subtracted, since the ledger keeps the position of each entry's event. What is left is a difference.

That holds while events are under way. An event that one side never applies is not under way: `Progress` tells the two apart. It is
overdue once the side has lacked it for the grace time although it applied later ones, or has applied nothing at all for that time. An
overdue event is no longer subtracted, or waited for, and shows as the difference that it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice

__all__ = [
    "GAP_COUNT_MAX",
    "Applied",
    "Difference",
    "LateEntry",
    "Progress",
    "applied_by_all",
    "differences_of",
    "lacking",
]

GAP_COUNT_MAX = 10_000
"""Positions of one side whose age is kept, the lowest first; a gap beyond them counts as under way until those are closed."""


@dataclass(frozen=True, slots=True)
class Applied:
    """Positions of a feed, from 1, that one side has applied: ranges, both ends included, ascending and apart."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Applied:
        """From ranges of which some may be empty, such as (1, 0)."""
        return cls(tuple((first, last) for first, last in ranges if first <= last))

    def __post_init__(self) -> None:
        end = 0
        for first, last in self.ranges:
            if not (end + 1 < first or end == 0 < first) or last < first:
                raise ValueError(f"ranges: expected them ascending, apart and from 1, got {self.ranges[:8]}")
            end = last

    @property
    def prefix(self) -> int:
        """Everything up to here is applied; 0 = nothing."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 1 else 0

    @property
    def last(self) -> int:
        """The last position that is applied; 0 = nothing."""
        return self.ranges[-1][1] if self.ranges else 0

    def has(self, position: int) -> bool:
        """Whether a position is applied."""
        at = bisect_right(self.ranges, (position, 1 << 63)) - 1
        return at >= 0 and position <= self.ranges[at][1]

    def gaps(self) -> list[tuple[int, int]]:
        """What is not applied below `last`, both ends included."""
        found = []
        end = 0
        for first, last in self.ranges:
            if first > end + 1:
                found.append((end + 1, first - 1))
            end = last
        return found

    def both(self, other: Applied) -> Applied:
        """What both have applied."""
        return Applied(tuple(_meet(self.ranges, other.ranges)))


def applied_by_all(sides: Sequence[Applied]) -> Applied:
    """What every side has applied; there is at least one."""
    return reduce(Applied.both, sides)


def lacking(behind: Applied, ahead: Applied, limit: int) -> list[int]:
    """The lowest positions, at most `limit`, that `ahead` has applied and `behind` has not."""
    not_behind = [*behind.gaps(), (behind.last + 1, max(behind.last + 1, ahead.last))]
    positions = (position for first, last in _meet(not_behind, ahead.ranges) for position in range(first, last + 1))
    return list(islice(positions, limit))


def _meet(one: Sequence[tuple[int, int]], two: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is in both of two ascending lists of ranges."""
    at_one = at_two = 0
    while at_one < len(one) and at_two < len(two):
        (first, last), (other_first, other_last) = one[at_one], two[at_two]
        if max(first, other_first) <= min(last, other_last):
            yield max(first, other_first), min(last, other_last)
        if last < other_last:
            at_one += 1
        else:
            at_two += 1


@dataclass(slots=True)
class Progress:
    """One side over time: since when it has been seen to lack which positions. `grace_s`: for how long an event may be under way. Times
    are of a clock that never goes back, in seconds."""

    grace_s: float
    applied: Applied = field(default_factory=Applied)
    _seen_s: float = 0.0
    _behind_since_s: float | None = None
    _gaps_since_s: dict[int, float] = field(default_factory=dict)

    def observe(self, applied: Applied, head: int, now_s: float) -> None:
        """The side stands there now; `head`: a position that there is for sure. What it lacked for too long it goes on to lack, also
        where it goes on behind it."""
        since_s = self._behind_since_s
        stood_still = since_s is not None and self._seen_s - since_s >= self.grace_s
        gap_since_s = since_s if since_s is not None and stood_still else now_s
        every = (position for first, last in applied.gaps() for position in range(first, last + 1))
        self._gaps_since_s = {
            position: self._gaps_since_s.get(position, gap_since_s) for position in islice(every, GAP_COUNT_MAX)
        }
        if head <= applied.last:
            self._behind_since_s = None
        elif since_s is None or applied.last != self.applied.last:
            self._behind_since_s = now_s
        self.applied = applied
        self._seen_s = now_s

    def is_overdue(self, position: int, now_s: float) -> bool:
        """Whether it lacks `position`, and no longer because events are under way."""
        if self.applied.has(position):
            return False
        since_s = self._behind_since_s if position > self.applied.last else self._gaps_since_s.get(position)
        return since_s is not None and now_s - since_s >= self.grace_s


@dataclass(frozen=True, slots=True)
class LateEntry:
    """An entry whose event not every wallet process has applied. `postings`: (account name, credit − debit in minor units)."""

    position: int
    age_s: float
    postings: tuple[tuple[str, int], ...]

    @property
    def owner(self) -> str:
        """The account whose wallet process applies the event: the seller's, as in wallet_core/service/flows.py."""
        return next((name for name, _ in self.postings if name.startswith("seller/")), self.postings[0][0])


@dataclass(frozen=True, slots=True)
class Difference:
    """An account that both sides do not agree about: credits less debits, minor units, as of the same events."""

    account_name: str
    currency_code: str
    wallet_minor: int
    ledger_minor: int

    @property
    def difference_minor(self) -> int:
        """Wallet less ledger."""
        return self.wallet_minor - self.ledger_minor


def differences_of(
    names: Iterable[str],
    wallet: Mapping[str, int],
    ledger: Mapping[str, int],
    under_way: Iterable[LateEntry],
    currency_of: Callable[[str], str],
) -> list[Difference]:
    """The accounts of `names` that differ. Balances are credits less debits; an account that a side does not have holds nothing.
    `under_way`: entries that the wallet's balances do not include."""
    late: dict[str, int] = {}
    for entry in under_way:
        for name, minor in entry.postings:
            late[name] = late.get(name, 0) + minor
    found = []
    for name in names:
        wallet_minor, ledger_minor = wallet.get(name, 0), ledger.get(name, 0) - late.get(name, 0)
        if wallet_minor != ledger_minor:
            found.append(Difference(name, currency_of(name), wallet_minor, ledger_minor))
    return found
