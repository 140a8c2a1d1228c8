"""Which positions of a feed have been applied."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["AppliedPositions"]


class AppliedPositions:
    """A set of positions from 1 on, kept as ranges: nearly always one, and one more for each hole."""

    def __init__(self, prefix: int = 0) -> None:
        """`prefix`: all up to it are in."""
        self._firsts = [1]
        self._lasts = [prefix]

    @property
    def prefix(self) -> int:
        """All positions up to this one are in."""
        return self._lasts[0]

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last of each range, in order; the first range is (1, prefix), also where prefix is 0."""
        return tuple(zip(self._firsts, self._lasts, strict=True))

    def extras(self) -> tuple[int, ...]:
        """The positions beyond `prefix`, in order. There may be many where an early one has been missing for long: see `ranges`."""
        return tuple(
            position
            for first, last in zip(self._firsts[1:], self._lasts[1:], strict=True)
            for position in range(first, last + 1)
        )

    def __contains__(self, position: object) -> bool:
        if not isinstance(position, int) or position < 1:
            return False
        at = bisect_right(self._firsts, position) - 1
        return position <= self._lasts[at]

    def add(self, position: int) -> None:
        """Puts a position in; one below 1 (a message without a position) is ignored."""
        firsts, lasts = self._firsts, self._lasts
        if position == lasts[-1] + 1:
            lasts[-1] = position
            return
        if position < 1 or position in self:
            return
        at = bisect_right(firsts, position)  # the range behind it
        joins_left = position == lasts[at - 1] + 1
        joins_right = at < len(firsts) and position == firsts[at] - 1
        if joins_left and joins_right:
            lasts[at - 1] = lasts[at]
            del firsts[at], lasts[at]
        elif joins_left:
            lasts[at - 1] = position
        elif joins_right:
            firsts[at] = position
        else:
            firsts.insert(at, position)
            lasts.insert(at, position)

    def advance(self, prefix: int) -> None:
        """Puts all positions up to `prefix` in."""
        if prefix <= self._lasts[0]:
            return
        firsts, lasts = self._firsts, self._lasts
        at = bisect_right(firsts, prefix + 1) - 1  # the last range that begins within, or right behind
        last = max(prefix, lasts[at])
        del firsts[1 : at + 1], lasts[1 : at + 1]
        lasts[0] = last

    def load(self, last: int, holes: Sequence[int]) -> None:
        """Begins again: all positions up to `last` are in, but `holes`."""
        self._firsts, self._lasts = [1], []
        for hole in sorted(hole for hole in holes if hole <= last):
            self._lasts.append(hole - 1)
            self._firsts.append(hole + 1)
        self._lasts.append(last)
        kept = [0] + [at for at in range(1, len(self._firsts)) if self._firsts[at] <= self._lasts[at]]
        self._firsts, self._lasts = [self._firsts[at] for at in kept], [self._lasts[at] for at in kept]
