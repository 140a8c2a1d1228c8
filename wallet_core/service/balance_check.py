"""The live proof that no money appears or vanishes: over all shards of all processes, for every currency, the balances and
the money in flight add up to zero.

The shards move on while they are read, so their sums are brought to a *consistent cut*: a set of positions, one a shard,
such that no effect is included without its cause. Every shard gives its sums and its links to the others after one
event of its choice (`ShardCut`); then each is rolled forward along its durable log,

    1. to where its log had come once the last cut had been read (what a shard has forgotten about a refusal, its source has
       settled by then);
    2. while it has received more from a shard than that shard has sent: the source goes on;
    3. while it has settled more towards a shard than that shard has received: the destination goes on.

2 and 3 end: a delivery leaves only once its cause is durable, so the whole durable logs are such a cut.

Money in flight is then counted from the queues, not from the in-flight accounts: a send that is not settled is in
flight unless its destination has received it and not refused it. The in-flight accounts are sums over what
the engine did; the queues and cursors are what really is under way. So a credit that was applied twice, a send that
got lost, a compensation that was forgotten, or a balance that changed by itself all show as a difference, of
exactly their amount. (Two faults that cancel each other out to the last unit in one currency would not.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Protocol

from kernel.errors import Unavailable
from wallet_core.engine.codes import EventKind
from wallet_core.engine.events import EVENT_BYTES
from wallet_core.service.port import EventPage

__all__ = ["BalanceReport", "CurrencyBalance", "CutSource", "Link", "ShardCut", "check_balances", "saga_accounts"]

PAGE_EVENTS = 16_384
ROUNDS_MAX = 10_000
"""Pages that one check reads at most before it gives up."""

_MONEY = Struct("<16sqIIIHHIHBB")  # of kind 9 only amount, debit, kind and shard
_KIND = 46
_SENT, _RECEIVED, _REFUSED = EventKind.MONEY_SENT, EventKind.MONEY_RECEIVED, EventKind.CREDIT_REFUSED
_SETTLED, _RETURNED = EventKind.SAGA_SETTLED, EventKind.MONEY_RETURNED


@dataclass(slots=True)
class Link:
    """One shard's side of the traffic with another. `sends`: (amount, currency) of the numbers settled + 1 to sent."""

    settled: int = 0
    sent: int = 0
    received: int = 0
    sends: list[tuple[int, str]] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)


@dataclass(slots=True)
class ShardCut:
    """A shard after event `sequence`. `books`: currency → [balances but the in-flight account's, balance of the in-flight
    account]; `links`: other shard → Link."""

    shard: int
    sequence: int
    books: dict[str, list[int]]
    links: dict[int, Link]


class CutSource(Protocol):
    """All shards of the system, wherever they are."""

    @property
    def shard_count(self) -> int:
        """How many."""

    async def cut(self, shard: int) -> ShardCut:
        """The shard after some event; what it says is durable."""

    async def durable(self, shard: int) -> int:
        """The number of its last durable event."""

    async def events(self, shard: int, after: int, limit: int) -> tuple[Sequence[EventPage], Mapping[int, str]]:
        """Durable events that follow `after`, whole frames (none: there are none now), and the currencies of `saga_accounts`
        of them."""


@dataclass(frozen=True, slots=True)
class CurrencyBalance:
    """One currency over all shards, minor units. `imbalance` = balance + in flight, and must be 0."""

    currency: str
    balance: int
    in_flight: int
    imbalance: int


@dataclass(frozen=True, slots=True)
class BalanceReport:
    """`positions`: the cut, (shard, sequence number). `uneven_shards`: (shard, currency, amount) whose own accounts, with
    the in-flight account, do not add up to zero; they must, because every event is a double entry."""

    currencies: tuple[CurrencyBalance, ...]
    positions: tuple[tuple[int, int], ...]
    uneven_shards: tuple[tuple[int, str, int], ...]

    @property
    def ok(self) -> bool:
        """No money appeared or vanished."""
        return not self.uneven_shards and all(one.imbalance == 0 for one in self.currencies)


async def check_balances(source: CutSource) -> BalanceReport:
    """Raises Unavailable where the shards cannot be read together now."""
    shards = range(source.shard_count)
    cuts = await asyncio.gather(*(source.cut(shard) for shard in shards))
    ends = [await source.durable(shard) for shard in shards]
    for cut, end in zip(cuts, ends, strict=True):
        while cut.sequence < end:
            await _go_on(source, cut)
    for _ in range(ROUNDS_MAX):
        behind = _behind(cuts)
        if behind is None:
            return _report(cuts)
        await _go_on(source, cuts[behind])
    raise Unavailable("the shards move faster than the check can follow; try again later")


def _behind(cuts: Sequence[ShardCut]) -> int | None:
    """A shard that must go on for the cut to be consistent."""
    for source in cuts:
        for shard, link in source.links.items():
            received = cuts[shard].links[source.shard].received
            if received > link.sent:
                return source.shard
            if received < link.settled:
                return shard
    return None


async def _go_on(source: CutSource, cut: ShardCut) -> None:
    pages, currencies = await source.events(cut.shard, cut.sequence, PAGE_EVENTS)
    if not pages:
        raise Unavailable(f"shard {cut.shard}: its log ends at {cut.sequence}, before what other shards had from it")
    for page in pages:
        _roll_forward(cut, page, currencies)


def saga_accounts(pages: Iterable[EventPage]) -> list[int]:
    """The ordinals of the accounts whose currency tells that of a saga record."""
    found = set()
    for page in pages:
        body = page.body
        for at in _crossing(body):
            if body[at + _KIND] not in (_SETTLED, _REFUSED):
                place = at + 24 if body[at + _KIND] == _SENT else at + 28
                found.add(int.from_bytes(body[place : place + 4], "little"))
    return sorted(found)


def _crossing(body: bytes) -> list[int]:
    """Where the records of sagas are; all others move money within the shard, which changes no sum."""
    return [index * EVENT_BYTES for index, kind in enumerate(body[_KIND::EVENT_BYTES]) if kind >= _SENT]


def _roll_forward(cut: ShardCut, page: EventPage, currencies: Mapping[int, str]) -> None:
    """Applies one frame to the sums. `currencies`: by ordinal, of the accounts in saga records."""
    body = page.body
    for at in _crossing(body):
        _, amount, debit, credit, low, middle, _, _, _, kind, shard = _MONEY.unpack_from(body, at)
        number = low | middle << 32
        link = cut.links[shard]
        if kind == _SENT:
            currency = currencies[debit]
            link.sent += 1
            link.sends.append((amount, currency))
            _add(cut, currency, -amount)
        elif kind == _RECEIVED:
            link.received = number
            _add(cut, currencies[credit], amount)
        elif kind == _REFUSED:
            link.received = number
            link.refused.add(number)
        elif kind == _RETURNED:
            _add(cut, currencies[credit], amount)
        elif kind == _SETTLED:
            del link.sends[: number - link.settled]
            link.settled = number
    cut.sequence = page.last_sequence


def _add(cut: ShardCut, currency: str, amount: int) -> None:
    """Into the accounts and out of the in-flight account."""
    book = cut.books.setdefault(currency, [0, 0])
    book[0] += amount
    book[1] -= amount


def _report(cuts: Sequence[ShardCut]) -> BalanceReport:
    balances: dict[str, int] = {}
    in_flight: dict[str, int] = {}
    uneven = []
    for cut in cuts:
        for currency, (balance, on_the_way) in cut.books.items():
            balances[currency] = balances.get(currency, 0) + balance
            if off := _signed(balance + on_the_way):
                uneven.append((cut.shard, currency, off))
        for shard, link in cut.links.items():
            there = cuts[shard].links[cut.shard]
            for number, (amount, currency) in enumerate(link.sends, link.settled + 1):
                if number > there.received or number in there.refused:
                    in_flight[currency] = in_flight.get(currency, 0) + amount
    currencies = []
    for currency in sorted(balances.keys() | in_flight.keys()):
        balance, under_way = balances.get(currency, 0), in_flight.get(currency, 0)
        currencies.append(CurrencyBalance(currency, _signed(balance), under_way, _signed(balance + under_way)))
    return BalanceReport(tuple(currencies), tuple((cut.shard, cut.sequence) for cut in cuts), tuple(uneven))


def _signed(value: int) -> int:
    """Sums over accounts are kept modulo 2^64 (docs/event-records.md, Limits)."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
