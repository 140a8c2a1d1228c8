"""Time, chance and the order of things: one seeded source of randomness and one queue of what happens
next."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any

__all__ = ["START_NS", "Options", "Violation", "World"]

#: Unix time, nanoseconds, at which every simulation begins.
START_NS = 1_760_000_000_000_000_000
TRACE_LENGTH = 48


class Violation(Exception):
    """A rule of the wallet core does not hold. `rule` is its short name."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(rule, detail)
        self.rule, self.detail = rule, detail

    def __str__(self) -> str:
        return f"{self.rule}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Options:
    """What a seed is run with. `steps`: scheduler steps while faults happen; then faults stop and at most
    `drain_steps` more may pass until everything has settled."""

    shards: int = 3
    steps: int = 400
    drain_steps: int = 12_000
    clients: int = 5
    heavy_share: float = 0.06  # of seeds with batches so large that segments fill
    twin_every: int = 16  # every n-th seed replays its logs into the Python twin as well
    rebuild_every: int = 4  # every n-th seed rebuilds its shards from disk beside the ones that run; 0: none


class World:
    """One simulation's clock, queue, randomness, fault counts and trace. Nothing else in it may be random
    or read a clock."""

    def __init__(self, seed: int, options: Options) -> None:
        self.seed, self.options = seed, options
        self.random = Random(seed)  # noqa: S311 - reproducible on purpose
        self.chance = self.random.random
        self.now_ns = START_NS
        self.steps = 0
        self.faulty = True  # False: faults have stopped for good
        self.rot = 0.1  # how likely a shard that starts finds its newest snapshot damaged
        self.counts: Counter[str] = Counter()
        self.trace: deque[tuple[int, int, str, tuple[Any, ...]]] = deque(maxlen=TRACE_LENGTH)
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._tie = 0

    def after(self, delay_ns: int, call: Callable[..., None], *arguments: Any) -> int:
        """Let `call` happen `delay_ns` from now; returns when that is. Of two at the same time the earlier
        asked for comes first."""
        at = self.now_ns + delay_ns
        self._tie += 1
        heappush(self._queue, (at, self._tie, call, arguments))
        return at

    def step(self) -> None:
        """The next thing happens."""
        at, _, call, arguments = heappop(self._queue)
        if at > self.now_ns:
            self.now_ns = at
        self.steps += 1
        call(*arguments)

    def between(self, low_ns: int, high_ns: int) -> int:
        """A duration, evenly spread."""
        return low_ns + int(self.chance() * (high_ns - low_ns))

    def fault(self, kind: str) -> None:
        """Count a fault that really happened."""
        self.counts[kind] += 1

    def note(self, what: str, *facts: Any) -> None:
        """A line of the trace, formatted only if it is ever shown."""
        self.trace.append((self.steps, self.now_ns, what, facts))

    def trace_lines(self) -> list[str]:
        """The last things that happened: step, time since the start, what."""
        return [
            f"{step:>7}  {(now - START_NS) / 1e6:>12.3f} ms  {what} {' '.join(map(str, facts))}".rstrip()
            for step, now, what, facts in self.trace
        ]
