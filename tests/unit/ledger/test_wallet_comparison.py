"""Risk: money that is missing on one side and nobody told; an alarm where events are only under way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.clock import FixedClock
from kernel.errors import Unavailable
from ledger.domain import Applied, Difference, LateEntry, Progress, applied_by_all, lacking
from ledger.service import CompareWallet, Comparison, WalletLook, WalletProcess, compare_wallet
from runtime.feed import AppliedPositions

SLOTS = 4_096
GRACE_S, CONFIRM_S = 60.0, 20.0


@dataclass
class Event:
    """One event of the feed: `minor` from the PSP's clearing account to the seller's wallet."""

    position: int
    seller: str
    psp: str
    minor: int

    @property
    def postings(self) -> tuple[tuple[str, int], ...]:
        return (f"psp/{self.psp}/clearing/USD", -self.minor), (f"seller/{self.seller}/USD", self.minor)


def applied(*positions: int) -> Applied:
    found = AppliedPositions()
    for position in positions:
        found.add(position)
    return Applied.of(found.ranges())


@dataclass
class Side:
    """What one process has applied, and what it holds."""

    applied: set[int] = field(default_factory=set)
    balances: dict[str, int] = field(default_factory=dict)
    times_s: dict[int, float] = field(default_factory=dict)

    def apply(self, event: Event, now_s: float = 0.0) -> None:
        if event.position in self.applied:
            return
        self.applied.add(event.position)
        self.times_s[event.position] = now_s
        for name, minor in event.postings:
            self.add(name, minor)

    def skip(self, event: Event) -> None:
        """Of no concern to it: applied without an effect."""
        self.applied.add(event.position)

    def add(self, name: str, minor: int) -> None:
        self.balances[name] = self.balances.get(name, 0) + minor

    def stand(self) -> Applied:
        return applied(*self.applied)


class World:
    """A feed, a ledger and some wallet processes that apply it, each at its own pace. Time passes where the comparison sleeps."""

    def __init__(self, process_count: int = 1, *, started_ago_s: float = 3_600.0) -> None:
        self.clock = FixedClock()
        self.start_ns = self.clock.now_ns()
        self.events: list[Event] = []
        self.ledger = Side()
        bounds = [SLOTS * number // process_count for number in range(process_count + 1)]
        self.processes = [
            WalletProcess(f"wallet-{number}", ((bounds[number], bounds[number + 1]),), SLOTS)
            for number in range(process_count)
        ]
        self.wallets = {one.address: Side() for one in self.processes}
        self.started_ns = self.clock.now_ns() - int(started_ago_s * 1e9)
        self.meanwhile: Callable[[], None] = lambda: None
        self.down, self.broken = "", False
        self.comparison = CompareWallet(
            Wallet(self),
            Books(self),
            lambda: self.ledger.stand(),
            self.clock,
            grace_s=GRACE_S,
            confirm_s=CONFIRM_S,
            monotonic=self.now_s,
            sleep=self.sleep,
        )

    def now_s(self) -> float:
        return (self.clock.now_ns() - self.start_ns) / 1e9

    async def sleep(self, seconds: float) -> None:
        self.clock.advance(seconds=seconds)
        self.meanwhile()
        await asyncio.sleep(0)

    def publish(self, seller: str, minor: int, psp: str = "sandbox") -> Event:
        event = Event(len(self.events) + 1, seller, psp, minor)
        self.events.append(event)
        return event

    def owner(self, event: Event) -> str:
        return next(one.address for one in self.processes if one.owns(f"seller/{event.seller}/USD"))

    def to_wallets(self, event: Event) -> None:
        for address in self.wallets:
            self.to_wallet(address, event)

    def to_wallet(self, address: str, event: Event) -> None:
        if address == self.owner(event):
            self.wallets[address].apply(event)
        else:
            self.wallets[address].skip(event)

    def everywhere(self, event: Event) -> Event:
        self.to_wallets(event)
        self.ledger.apply(event, self.now_s())
        return event

    async def differences(self, name_prefix: str = "") -> dict[str, int]:
        """By how much which accounts differ; every account was compared."""
        found = await self.comparison.compare(name_prefix)
        assert found.problem == ""
        return {one.account_name: one.difference_minor for one in found.differences}


class Wallet:
    """ledger.service.Wallet over a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def processes(self) -> list[WalletProcess]:
        if self.world.down:
            raise Unavailable(f"{self.world.down} does not answer")
        return self.world.processes

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        return _page({name for side in self.world.wallets.values() for name in side.balances}, prefix, after, limit)

    async def look(self, process: WalletProcess, names: Sequence[str]) -> WalletLook:
        self.world.meanwhile()
        side = self.world.wallets[process.address]
        held = {name: side.balances[name] for name in names if name in side.balances}
        return WalletLook(held, side.stand(), self.world.started_ns)


class Books:
    """ledger.service.Books over a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        if self.world.broken:
            raise RuntimeError("the driver is in a state")
        return _page(self.world.ledger.balances, prefix, after, limit)

    async def balances(self, names: Sequence[str], applied: Applied) -> tuple[dict[str, int], list[LateEntry]]:
        self.world.meanwhile()
        ledger, now_s = self.world.ledger, self.world.now_s()
        late = [
            LateEntry(event.position, now_s - ledger.times_s.get(event.position, 0.0), event.postings)
            for event in self.world.events
            if event.position in ledger.times_s and not applied.has(event.position)
        ]
        return {name: ledger.balances[name] for name in names if name in ledger.balances}, late


def _page(names: Iterable[str], prefix: str, after: str, limit: int) -> list[str]:
    return sorted(name for name in names if name.startswith(prefix) and name > after)[:limit]


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1_000):
        if holds():
            return
        await asyncio.sleep(0)
    pytest.fail("never happened")


class Traffic:
    """Publishes and delivers at every moment at which a comparison waits for something; nothing stays away for 10 s."""

    def __init__(self, world: World, dice: random.Random, event_count: int = 60) -> None:
        self.world, self.dice, self.left = world, dice, event_count
        self.under_way: list[tuple[str, Event, float]] = []
        self.never: set[tuple[str, int]] = set()

    def __call__(self) -> None:
        dice, world = self.dice, self.world
        for _ in range(dice.randint(0, 3)):
            if self.left:
                self.left -= 1
                event = world.publish(f"S{dice.randint(1, 9)}", dice.randint(1, 9_999), dice.choice(("one", "two")))
                self.under_way += [(side, event, world.now_s()) for side in ("ledger", *world.wallets)]
        for each in dice.sample(self.under_way, k=len(self.under_way)):
            side, event, since_s = each
            if (side, event.position) not in self.never and (dice.random() < 0.3 or world.now_s() - since_s > 10):
                self.under_way.remove(each)
                if side == "ledger":
                    world.ledger.apply(event, world.now_s())
                else:
                    world.to_wallet(side, event)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
async def test_events_under_way_are_never_an_alarm(seed: int, process_count: int) -> None:
    world, dice = World(process_count), random.Random(seed)
    world.meanwhile = Traffic(world, dice)
    for _ in range(4):
        for _ in range(dice.randint(0, 5)):
            world.meanwhile()
        assert await world.differences() == {}
        world.clock.advance(seconds=dice.choice((0, 1, 60, 600)))


def lose_in_wallet(world: World, dice: random.Random) -> dict[str, int]:
    event = dice.choice(world.events)
    side = world.wallets[world.owner(event)]
    for name, minor in event.postings:
        side.add(name, -minor)
    return {name: -minor for name, minor in event.postings}


def lose_in_ledger(world: World, dice: random.Random) -> dict[str, int]:
    event = dice.choice(world.events)
    for name, minor in event.postings:
        world.ledger.add(name, -minor)
    return dict(event.postings)


def double_in_wallet(world: World, dice: random.Random) -> dict[str, int]:
    event = dice.choice(world.events)
    side = world.wallets[world.owner(event)]
    for name, minor in event.postings:
        side.add(name, minor)
    return dict(event.postings)


def transfer_directly(world: World, dice: random.Random) -> dict[str, int]:
    side = world.wallets[dice.choice(list(world.wallets))]
    side.add("seller/S1/USD", -77)
    side.add("seller/UNKNOWN/USD", 77)  # which the ledger does not have
    return {"seller/S1/USD": -77, "seller/UNKNOWN/USD": 77}


def lose_a_shard(world: World, dice: random.Random) -> dict[str, int]:
    side = world.wallets[dice.choice(list(world.wallets))]
    gone, side.balances = side.balances, {}
    return {name: -minor for name, minor in gone.items() if minor}


@pytest.mark.parametrize(
    "plant",
    [lose_in_wallet, lose_in_ledger, double_in_wallet, transfer_directly, lose_a_shard],
    ids=lambda one: one.__name__,
)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
async def test_what_is_planted_is_found_with_its_amount_while_events_go_on(
    plant: Callable[[World, random.Random], dict[str, int]], seed: int, process_count: int
) -> None:
    world, dice = World(process_count), random.Random(seed)
    for _ in range(10):
        world.everywhere(world.publish(f"S{dice.randint(1, 4)}", dice.randint(1, 9_999)))
    planted = plant(world, dice)
    world.meanwhile = Traffic(world, dice)
    assert await world.differences() == planted


@pytest.mark.parametrize("side", ["wallet-0", "ledger"])
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
async def test_an_event_that_one_side_never_applies_is_under_way_first_and_then_a_difference(
    side: str, seed: int
) -> None:
    world, dice = World(), random.Random(seed)
    traffic = Traffic(world, dice, event_count=0)
    world.everywhere(world.publish("S1", 100))
    lost = world.publish("S1", 5_000)
    if side == "ledger":
        world.to_wallets(lost)
    else:
        world.ledger.apply(lost, world.now_s())
    for _ in range(dice.randint(0, 2)):  # others that were applied later, or none
        world.everywhere(world.publish("S2", 7))
    world.meanwhile = traffic
    first = await world.comparison.compare()
    assert first.difference_count == 0
    assert (first.under_way_count, bool(first.problem)) == ((0, True) if side == "ledger" else (1, False))
    world.clock.advance(seconds=GRACE_S)
    sign = 1 if side == "ledger" else -1
    assert await world.differences() == {"psp/sandbox/clearing/USD": -5_000 * sign, "seller/S1/USD": 5_000 * sign}
    told = {one.process: one.lacking for one in (await world.comparison.compare()).progress}
    assert told[side] == (lost.position,)
    traffic.left = 20
    for _ in range(40):
        traffic()
        world.clock.advance(seconds=1)
    assert len(await world.differences()) == 2  # also where others go on behind it
    (world.to_wallets if side != "ledger" else world.ledger.apply)(lost)
    assert await world.differences() == {}


async def test_a_backlog_that_is_worked_off_is_no_difference_and_one_that_stands_still_is() -> None:
    world = World()
    for number in range(60):
        world.ledger.apply(world.publish("S1", number + 1), world.now_s())
    for event in world.events[:50]:  # more than a minute of it
        world.to_wallets(event)
        world.clock.advance(seconds=5)
        assert await world.differences() == {}
    world.clock.advance(seconds=GRACE_S)
    rest = sum(event.minor for event in world.events[50:])
    assert await world.differences() == {"psp/sandbox/clearing/USD": rest, "seller/S1/USD": -rest}


async def test_a_wallet_that_was_just_started_is_not_believed_at_once() -> None:
    """It holds what it applied before it was killed, and does not know yet that it did."""
    world = World(started_ago_s=1.0)
    event = world.everywhere(world.publish("S1", 100))
    known = world.wallets["wallet-0"].applied
    known.clear()

    def finds_out() -> None:
        if world.now_s() > 15:
            known.add(event.position)

    world.meanwhile = finds_out
    assert await world.differences() == {}

    world.meanwhile = lambda: None
    known.clear()
    world.started_ns = world.clock.now_ns()
    calls = 0

    async def restarts_again(seconds: float) -> None:
        nonlocal calls
        calls += 1
        world.clock.advance(seconds=seconds)
        world.started_ns = world.clock.now_ns()

    world.comparison._sleep = restarts_again
    found = await world.comparison.compare()
    assert calls == 1
    assert "started" in found.problem
    assert found.difference_count == 0


async def test_where_a_side_cannot_be_read_there_is_no_verdict_and_no_crash() -> None:
    world = World()
    world.everywhere(world.publish("S1", 100))
    told: list[tuple[Comparison, Sequence[Difference], bool]] = []
    world.down = "wallet-0"
    rounds = asyncio.ensure_future(world.comparison.keep_comparing(60.0, lambda *one: told.append(one)))
    await until(lambda: len(told) >= 2)
    assert all(not found.ok and "wallet-0 does not answer" in found.problem and not is_end for found, _, is_end in told)
    assert world.comparison.last is None
    world.broken = True
    world.down = ""
    await until(lambda: "RuntimeError" in told[-1][0].problem)  # nor where a driver raises something of its own
    world.broken = False
    await until(lambda: told[-1][2])
    assert told[-1][0].ok
    rounds.cancel()


async def test_rounds_are_bounded_and_reach_every_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_wallet, "PAGE_SIZE", 3)
    monkeypatch.setattr(compare_wallet, "PAGES_PER_STEP", 2)
    world = World()
    for number in range(20):
        world.everywhere(world.publish(f"S{number:02}", 100))
    del world.ledger.balances["seller/S19/USD"]
    del world.wallets["wallet-0"].balances["seller/S00/USD"]
    told: list[tuple[Comparison, Sequence[Difference], bool]] = []
    rounds = asyncio.ensure_future(world.comparison.keep_comparing(60.0, lambda *one: told.append(one)))
    await until(lambda: bool(told) and told[-1][2])
    rounds.cancel()
    assert len(told) > 3
    assert told[-1][0].account_count == 21
    assert [(one.account_name, one.wallet_minor, one.ledger_minor) for one in told[-1][0].differences] == [
        ("seller/S00/USD", 0, 100),
        ("seller/S19/USD", 100, 0),
    ]
    assert [one.account_name for _, fresh, _ in told for one in fresh] == ["seller/S00/USD", "seller/S19/USD"]


async def test_the_last_result_is_enough_where_its_age_is_allowed_and_a_prefix_is_compared_alone() -> None:
    world = World()
    world.everywhere(world.publish("S1", 100))
    world.everywhere(world.publish("S2", 100))
    first = await world.comparison.compare()
    world.wallets["wallet-0"].add("seller/S2/USD", 1)
    assert await world.comparison.compare(max_age_s=10) is first
    assert (await world.comparison.compare()).difference_count == 1
    assert await world.differences("seller/S1") == {}
    assert await world.differences("seller/S2/") == {"seller/S2/USD": 1}
    assert await world.differences("se") == {"seller/S2/USD": 1}
    assert (await world.comparison.compare("other/")).account_count == 0


# --- the arithmetic of positions


@given(st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)))
def test_ranges_say_what_the_sets_say(one: set[int], two: set[int], three: set[int]) -> None:
    sides = [applied(*one), applied(*two), applied(*three)]
    everything = range(1, 45)
    assert [position for position in everything if sides[0].has(position)] == sorted(one)
    assert [position for position in everything if applied_by_all(sides).has(position)] == sorted(one & two & three)
    assert lacking(sides[0], sides[1], 100) == sorted(two - one)
    assert lacking(sides[0], sides[1], 2) == sorted(two - one)[:2]
    gaps = [position for first, last in sides[0].gaps() for position in range(first, last + 1)]
    assert gaps == [position for position in range(1, max(one, default=0)) if position not in one]
    assert sides[0].prefix == next(position for position in range(41) if position + 1 not in one)


@pytest.mark.parametrize("ranges", [((0, 3),), ((1, 3), (4, 5)), ((5, 6), (1, 2)), ((3, 2),), ((1, 5), (5, 9))])
def test_ranges_that_are_not_ascending_and_apart_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Applied(ranges)


def test_a_side_that_stands_still_is_told_apart_from_one_that_moves() -> None:
    side = Progress(60)
    side.observe(applied(*range(1, 11)), 10, 0)
    side.observe(applied(*range(1, 11)), 12, 1_000)  # nothing was missing all the time before
    assert not side.is_overdue(11, 1_059)
    assert side.is_overdue(11, 1_060)
    side.observe(applied(*range(1, 11), 12), 12, 1_060)
    assert not side.is_overdue(11, 1_060)  # it moves, and the gap is new
    side.observe(applied(*range(1, 11), 12, 13), 14, 1_119)
    assert not side.is_overdue(14, 1_120)
    assert side.is_overdue(11, 1_120)
    assert not side.is_overdue(10, 9_999)
