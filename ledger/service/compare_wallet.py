"""Use case: compare wallet and ledger, account by account, while both go on. The rule is in ledger/domain/comparison.py.

One look at a few thousand accounts:

    1. every wallet process reads what it holds of them, between two events, and says which events that includes;
    2. the ledger waits until it has applied those events too;
    3. one snapshot of the ledger gives its balances, and the entries whose events the wallet has not applied.

An account that differs is looked at once more, `confirm_s` later, before it is told: a wallet that was just restarted may hold what it
does not know to be applied yet, for as long as its first comparison with the feed takes.

Where a side cannot be read there is no verdict; that is told, and it is asked again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kernel.clock import Clock
from kernel.errors import DucatError, Unavailable
from kernel.ids import account_id
from ledger.domain import (
    CHART_PREFIXES,
    AccountNameInvalid,
    Applied,
    Difference,
    LateEntry,
    Progress,
    account_of_name,
    applied_by_all,
    differences_of,
    lacking,
)

__all__ = [
    "Books",
    "CompareWallet",
    "Comparison",
    "ProcessProgress",
    "Tell",
    "Wallet",
    "WalletLook",
    "WalletProcess",
]

PAGE_SIZE = 1_000
"""Names of one look, of each side. The wallet's events wait for some 4 ms while 1,000 accounts are read."""
PAGES_PER_STEP = 50
"""Looks of one round; a round that does not reach the end goes on there in the next."""
SUSPECT_COUNT_MAX = 10_000
"""Accounts of one round that are looked at again; where more differ, the rest is told with the next rounds."""
DIFFERENCE_COUNT_MAX = 10_000
"""Differences that one comparison keeps; more are only counted."""
LACKING_COUNT_MAX = 1_000
"""Positions of a side that are looked at while it catches up."""
LACKING_TOLD_MAX = 20
CATCH_UP_S = 30.0
"""How long a look waits for the ledger."""
POLL_S = (0.02, 0.05, 0.1, 0.25, 0.5)
SETTLE_FACTOR = 1.5
"""A wallet process that applies events for less than so many `confirm_s` may hold more than it says."""


@dataclass(frozen=True, slots=True)
class WalletProcess:
    """A wallet process and the slots that it owns, of `slot_count` (a power of two): (first, end), the end not included."""

    address: str
    slots: tuple[tuple[int, int], ...]
    slot_count: int

    def owns(self, account_name: str) -> bool:
        """Whether an account lives there, unless it is striped."""
        slot = int.from_bytes(account_id(account_name)[14:], "big") & (self.slot_count - 1)
        return any(first <= slot < end for first, end in self.slots)


@dataclass(frozen=True, slots=True)
class WalletLook:
    """What one process holds of the accounts that were asked for, by name, credits less debits, and which events that includes."""

    balances: dict[str, int]
    applied: Applied
    start_time_ns: int


class Wallet(Protocol):
    """The wallet, all its processes. Every method raises DucatError where it cannot answer."""

    async def processes(self) -> list[WalletProcess]:
        """Together they own every slot; raises Unavailable otherwise."""
        ...

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """Names of accounts by code point."""
        ...

    async def look(self, process: WalletProcess, names: Sequence[str]) -> WalletLook:
        """What the process holds of these accounts."""
        ...


class Books(Protocol):
    """The ledger's own accounts."""

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """Names of accounts by code point."""
        ...

    async def balances(self, names: Sequence[str], applied: Applied) -> tuple[dict[str, int], list[LateEntry]]:
        """Credits less debits by name, and the entries of the last hours whose events are not in `applied`, both of one snapshot.
        Raises DucatError where those are too many."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessProgress:
    """How far a process has applied the feed. `lacking`: some of what the other side has applied and it has lacked for too long."""

    process: str
    prefix: int
    last: int
    lacking: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """`problem`: why not every account could be compared; empty = all were. `differences` are by name, the first
    DIFFERENCE_COUNT_MAX of `difference_count`. Under way: entries that were left out because the wallet has not applied their events."""

    problem: str
    account_count: int
    difference_count: int
    differences: tuple[Difference, ...]
    progress: tuple[ProcessProgress, ...]
    under_way_count: int
    under_way_age_s: float
    start_time_ns: int
    end_time_ns: int

    @property
    def ok(self) -> bool:
        """Every account was compared, and all agree."""
        return not self.problem and not self.difference_count


Tell = Callable[[Comparison, Sequence[Difference], bool], None]
"""Takes what was found since a comparison began, what of it is new, and whether that was its end."""


@dataclass(slots=True)
class _Tour:
    """A comparison that is under way, and where it goes on."""

    prefixes: list[str]
    start_time_ns: int
    after: str = ""
    account_count: int = 0
    difference_count: int = 0
    differences: list[Difference] = field(default_factory=list)
    under_way: list[LateEntry] = field(default_factory=list)


class CompareWallet:
    """Compares when asked, and all the time (`keep_comparing`)."""

    def __init__(
        self,
        wallet: Wallet,
        books: Books,
        applied: Callable[[], Applied],
        clock: Clock,
        *,
        grace_s: float,
        confirm_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`applied`: which events of the feed the ledger has applied. `grace_s`: for how long an event may be under way."""
        self._wallet, self._books, self._applied, self._clock = wallet, books, applied, clock
        self._grace_s, self._confirm_s = grace_s, confirm_s
        self._monotonic, self._sleep = monotonic, sleep
        self._one_at_a_time = asyncio.Lock()
        self._ledger = Progress(grace_s)
        self._processes: dict[str, Progress] = {}
        self._wallet_young_s = 0.0
        self._newest: Comparison | None = None
        self.last: Comparison | None = None
        """The last comparison of all accounts."""

    async def compare(self, name_prefix: str = "", max_age_s: float | None = None) -> Comparison:
        """All accounts whose names begin so. The last comparison of all will do where it is not older than `max_age_s`."""
        last = self.last
        is_recent = last is not None and self._clock.now_ns() - last.end_time_ns <= (max_age_s or 0.0) * 1e9
        if last is not None and is_recent and max_age_s is not None and not name_prefix:
            return last
        asked_ns = self._clock.now_ns()
        async with self._one_at_a_time:
            newest = self._newest
            if newest is not None and newest.start_time_ns > asked_ns and not name_prefix:
                return newest  # somebody else asked meanwhile
            tour = self._tour(name_prefix)
            problem = ""
            try:
                while tour.prefixes:
                    await self._step(tour)
            except DucatError as error:
                problem = str(error)
            found = self._end(tour, problem)
            if not name_prefix:
                self._newest = found
                self.last = self.last if problem else found
            return found

    async def keep_comparing(self, interval_s: float, tell: Tell) -> None:
        """Compares every `interval_s`, at most PAGES_PER_STEP looks a time, until cancelled, and tells what it found."""
        tour = self._tour()
        while True:
            await self._sleep(interval_s)
            problem = ""
            fresh: list[Difference] = []
            async with self._one_at_a_time:
                try:
                    fresh = await self._step(tour)
                except Exception as error:  # whatever it is, the ledger goes on without a verdict, and says so
                    problem = str(error) if isinstance(error, DucatError) else f"{type(error).__name__}: {error}"
            found = self._end(tour, problem)
            is_end = not tour.prefixes
            if is_end:
                self.last, tour = found, self._tour()
            tell(found, fresh, is_end)

    def _tour(self, name_prefix: str = "") -> _Tour:
        prefixes = [
            name_prefix if name_prefix.startswith(prefix) else prefix
            for prefix in CHART_PREFIXES
            if prefix.startswith(name_prefix) or name_prefix.startswith(prefix)
        ]
        return _Tour(prefixes, self._clock.now_ns())

    def _end(self, tour: _Tour, problem: str) -> Comparison:
        ages = [entry.age_s for entry in tour.under_way]
        return Comparison(
            problem=problem,
            account_count=tour.account_count,
            difference_count=tour.difference_count,
            differences=tuple(sorted(tour.differences, key=lambda one: one.account_name)),
            progress=self._progress(),
            under_way_count=len(ages),
            under_way_age_s=max(ages, default=0.0),
            start_time_ns=tour.start_time_ns,
            end_time_ns=self._clock.now_ns(),
        )

    async def _step(self, tour: _Tour) -> list[Difference]:
        """Goes on with a tour, some pages; the accounts in them that differ. What raises leaves it where it was."""
        processes = await self._wallet.processes()
        self._processes = {one.address: self._processes.get(one.address, Progress(self._grace_s)) for one in processes}
        prefixes, after = list(tour.prefixes), tour.after
        count = 0
        suspects: list[Difference] = []
        under_way: list[LateEntry] = []
        for _ in range(PAGES_PER_STEP):
            if not prefixes or len(suspects) >= SUSPECT_COUNT_MAX:
                break
            names, next_after = await self._page(prefixes[0], after)
            if names:
                found, under_way = await self._look(processes, names)
                suspects += found
                count += len(names)
            if next_after:
                after = next_after
            else:
                after = ""
                del prefixes[0]
        if suspects:
            suspects = await self._confirm([one.account_name for one in suspects])
        tour.prefixes, tour.after = prefixes, after
        tour.account_count += count
        tour.difference_count += len(suspects)
        tour.differences += suspects[: DIFFERENCE_COUNT_MAX - len(tour.differences)]
        tour.under_way = under_way
        return suspects

    async def _page(self, prefix: str, after: str) -> tuple[list[str], str]:
        """Some names of both sides behind `after`, and the name to go on after; empty where that was the last page."""
        sides = await asyncio.gather(
            self._wallet.names(prefix, after, PAGE_SIZE), self._books.names(prefix, after, PAGE_SIZE)
        )
        ends = [names[-1] for names in sides if len(names) >= PAGE_SIZE]
        end = min(ends, default="")
        names = {name for side in sides for name in side if not end or name <= end}
        return sorted(filter(_is_in_chart, names)), end

    async def _confirm(self, names: Sequence[str]) -> list[Difference]:
        """Those of the accounts that still differ, somewhat later."""
        await self._sleep(max(self._confirm_s, self._wallet_young_s))
        processes = await self._wallet.processes()
        found: list[Difference] = []
        for start in range(0, len(names), PAGE_SIZE):
            found += (await self._look(processes, names[start : start + PAGE_SIZE]))[0]
        if found and self._wallet_young_s:
            raise _no_verdict("a wallet process was started within the last seconds; it may hold more than it says yet")
        return found

    async def _look(
        self, processes: Sequence[WalletProcess], names: Sequence[str]
    ) -> tuple[list[Difference], list[LateEntry]]:
        """The accounts that differ, and the entries under way."""
        looks = await asyncio.gather(*(self._wallet.look(process, names) for process in processes))
        self._note_start(looks)
        held: dict[str, int] = {}
        for look in looks:
            for name, minor in look.balances.items():
                held[name] = held.get(name, 0) + minor
        await self._catch_up([look.applied for look in looks])
        balances, late = await self._books.balances(names, applied_by_all([look.applied for look in looks]))
        now_s = self._monotonic()
        head = max((entry.position for entry in late), default=0)
        for process, look in zip(processes, looks, strict=True):
            self._of(process).observe(look.applied, max(head, look.applied.last), now_s)
        under_way = [entry for entry in late if self._is_under_way(entry, processes, now_s)]
        return differences_of(names, held, balances, under_way, _currency_of), under_way

    def _of(self, process: WalletProcess) -> Progress:
        return self._processes.setdefault(process.address, Progress(self._grace_s))

    def _is_under_way(self, entry: LateEntry, processes: Sequence[WalletProcess], now_s: float) -> bool:
        owner = next((one for one in processes if one.owns(entry.owner)), processes[0])
        side = self._of(owner)
        return not side.applied.has(entry.position) and not side.is_overdue(entry.position, now_s)

    async def _catch_up(self, wanted: Sequence[Applied]) -> None:
        """Returns once the ledger has applied all of it, but for what it has lacked for too long."""
        deadline_s = self._monotonic() + CATCH_UP_S
        head = max(one.last for one in wanted)
        polls = 0
        while True:
            applied, now_s = self._applied(), self._monotonic()
            self._ledger.observe(applied, max(head, applied.last), now_s)
            missing = {position for one in wanted for position in lacking(applied, one, LACKING_COUNT_MAX)}
            awaited = [one for one in missing if not self._ledger.is_overdue(one, now_s)]
            if not awaited:
                return
            if now_s >= deadline_s:
                raise _no_verdict(
                    f"the ledger has not applied event {min(awaited)} yet, which the wallet has; it is at {applied.last}"
                )
            await self._sleep(POLL_S[min(polls, len(POLL_S) - 1)])
            polls += 1

    def _note_start(self, looks: Iterable[WalletLook]) -> None:
        age_s = (self._clock.now_ns() - max(look.start_time_ns for look in looks)) / 1e9
        self._wallet_young_s = max(0.0, SETTLE_FACTOR * self._confirm_s - age_s) if age_s >= 0 else 0.0

    def _progress(self) -> tuple[ProcessProgress, ...]:
        now_s = self._monotonic()
        sides = [("ledger", self._ledger, list(self._processes.values()))]
        sides += [(address, progress, [self._ledger]) for address, progress in self._processes.items()]
        found = []
        for name, side, others in sides:
            missing = {
                position for other in others for position in lacking(side.applied, other.applied, LACKING_COUNT_MAX)
            }
            overdue = sorted(one for one in missing if side.is_overdue(one, now_s))
            found.append(
                ProcessProgress(name, side.applied.prefix, side.applied.last, tuple(overdue[:LACKING_TOLD_MAX]))
            )
        return tuple(found)


def _is_in_chart(name: str) -> bool:
    try:
        account_of_name(name)
    except AccountNameInvalid:
        return False
    return True


def _currency_of(name: str) -> str:
    return account_of_name(name)[1]


def _no_verdict(text: str) -> Unavailable:
    return Unavailable(f"no verdict: {text}")
