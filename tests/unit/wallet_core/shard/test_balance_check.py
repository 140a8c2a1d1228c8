"""Risk: money appears or vanishes and nobody notices, or the check cries wolf while shards move on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from host_fixtures import NOW_NS, account, config, on_shard, transfer_id
from prometheus_client import REGISTRY

from kernel.clock import FixedClock
from kernel.errors import Unavailable
from wallet_core.adapters.peers import AllShards, Peers
from wallet_core.bootstrap import _keep_checking
from wallet_core.engine.codes import AccountFlags, TransferResult
from wallet_core.service.balance_check import ShardCut, check_balances
from wallet_core.service.chains import Chains, NoPeers
from wallet_core.service.port import AccountRow, EventPage, TransferRow
from wallet_core.shard import ShardClock, WalletHost

SHARDS = 4
SOURCE, EURO_SOURCE = account(1_000_000), account(1_000_001)
PEOPLE = [on_shard(shard, SHARDS, index) for shard in range(SHARDS) for index in range(4)]
FROZEN = [on_shard(shard, SHARDS, 9) for shard in range(SHARDS)]
EUROS = [on_shard(shard, SHARDS, 8) for shard in range(SHARDS)]
FUND = 10_000


class Cuts(AllShards):
    """The shards of one process. `wait_s`: cuts are taken so far apart, shard by shard, in random order."""

    def __init__(self, host: WalletHost, seed: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(host, Peers({}, lambda address: asyncio.Future()))  # type: ignore[arg-type]
        self._random, self._wait_s = random.Random(seed), wait_s
        self.pages_read = self.checks = 0

    async def cut(self, shard: int) -> ShardCut:
        self.checks += shard == 0
        await asyncio.sleep(self._random.random() * self._wait_s)
        return await super().cut(shard)

    async def events(self, shard: int, after: int, limit: int) -> tuple[Sequence[EventPage], Mapping[int, str]]:
        found = await super().events(shard, after, min(limit, 64))
        self.pages_read += len(found[0])
        return found


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[WalletHost]:
    one = await WalletHost.open(config(tmp_path, SHARDS, snapshot_events=0), clock=ShardClock(NOW_NS))
    chains = Chains(one, NoPeers(), FixedClock(NOW_NS), answer_s=2.0)
    one.coordinate(chains.run)
    striped = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
    await one.create_accounts(
        [
            AccountRow(SOURCE, "USD", striped),
            AccountRow(EURO_SOURCE, "EUR", striped),
            *(AccountRow(each, "USD") for each in PEOPLE),
            *(AccountRow(each, "USD", int(AccountFlags.FROZEN)) for each in FROZEN),
            *(AccountRow(each, "EUR") for each in EUROS),
        ]
    )
    fund = [TransferRow(transfer_id(10**9 + n), SOURCE, each, FUND) for n, each in enumerate(PEOPLE)]
    fund += [TransferRow(transfer_id(10**9 + 10**6 + n), EURO_SOURCE, each, FUND) for n, each in enumerate(EUROS)]
    assert set(await one.transfers(fund)) == {TransferResult.OK}
    yield one
    for shard in range(SHARDS):
        one.native.log(shard).hold_sync(False)
    await one.close()


def busy_rows(rng: random.Random, first: int, count: int) -> list[TransferRow]:
    """Mostly across shards; some are refused there and come back; some are chains."""
    rows = []
    for n in range(count):
        dice = rng.random()
        people = EUROS if dice < 0.2 else PEOPLE
        debit, credit = rng.sample(people, 2)
        if 0.2 <= dice < 0.35:
            credit = rng.choice(FROZEN)
        linked = int(dice > 0.97 and n < count - 1)
        rows.append(TransferRow(transfer_id(first + n), debit, credit, rng.randint(1, 40), linked))
    return rows


async def test_it_stays_quiet_under_load_and_sees_money_in_flight(host: WalletHost) -> None:
    stop, sent, in_flight, pages = False, 0, 0, 0

    async def load(seed: int) -> None:
        nonlocal sent
        rng = random.Random(seed)
        while not stop:
            rows = busy_rows(rng, seed * 10**7 + sent, 120)
            sent += len(rows)
            await host.transfers(rows)

    loads = [asyncio.ensure_future(load(seed)) for seed in range(1, 4)]
    checks = 0
    try:
        for seed in range(8):
            source = Cuts(host, seed, wait_s=0.03)
            report = await check_balances(source)
            assert report.ok, report
            assert {one.currency for one in report.currencies} >= {"USD", "EUR"}
            in_flight += sum(one.in_flight for one in report.currencies)
            pages += source.pages_read
            checks += 1
    finally:
        stop = True
        await asyncio.gather(*loads)
    assert in_flight > 0, "money was in flight, and no cut saw any"
    assert pages > 0, "no cut had to be rolled forward"
    assert sent > 1_000
    report = await check_balances(Cuts(host))
    assert report.ok
    assert all(one.balance == 0 or one.in_flight == 0 for one in report.currencies)


class Planted(Cuts):
    """What a cut says is changed before it is added up."""

    def __init__(self, host: WalletHost, shard: int, change: str) -> None:
        super().__init__(host)
        self._at, self._change = shard, change

    async def cut(self, shard: int) -> ShardCut:
        cut = await super().cut(shard)
        if shard != self._at:
            return cut
        if self._change == "an account changed by itself":
            cut.books["USD"][0] += 7
        elif self._change == "a credit was applied twice":  # as the engine books it: in-flight account and balance
            cut.books["USD"][0] += 7
            cut.books["USD"][1] -= 7
        elif self._change == "a send got lost":
            cut.books["USD"][0] -= 7
            cut.books["USD"][1] += 7
        return cut


@pytest.mark.parametrize(
    ("change", "off", "uneven"),
    [
        ("an account changed by itself", 7, True),
        ("a credit was applied twice", 7, False),
        ("a send got lost", -7, False),
    ],
)
async def test_it_finds_money_that_is_wrong(host: WalletHost, change: str, off: int, uneven: bool) -> None:
    await host.transfers(busy_rows(random.Random(1), 1, 200))
    assert (await check_balances(Cuts(host))).ok
    report = await check_balances(Planted(host, 2, change))
    assert not report.ok
    assert {one.currency: one.imbalance for one in report.currencies if one.imbalance} == {"USD": off}
    assert report.uneven_shards == (((2, "USD", 7),) if uneven else ())


class Frozen(Cuts):
    """Answers with cuts that were taken before, whatever the shards do since."""

    def __init__(self, host: WalletHost, cuts: Sequence[ShardCut], ends: Mapping[int, int]) -> None:
        super().__init__(host)
        self._cuts, self._ends = cuts, ends

    async def cut(self, shard: int) -> ShardCut:
        one = self._cuts[shard]
        links = {
            peer: replace(link, sends=list(link.sends), refused=set(link.refused)) for peer, link in one.links.items()
        }
        return replace(one, books={name: list(book) for name, book in one.books.items()}, links=links)

    async def durable(self, shard: int) -> int:
        return self._ends[shard]


async def test_cuts_of_very_different_times_are_brought_together(host: WalletHost) -> None:
    """Each shard's cut from another moment of a busy history, in every order of two moments."""
    moments = []
    for part in range(4):
        source = Cuts(host)
        moments.append([await source.cut(shard) for shard in range(SHARDS)])
        await host.transfers(busy_rows(random.Random(part), 1 + 1_000 * part, 150))
    rng = random.Random(5)
    for _ in range(30):
        cuts = [moments[rng.randrange(4)][shard] for shard in range(SHARDS)]
        # a shard's cut is never younger than where the logs had come once the last was read
        ends = {
            shard: host.durable_sequence(shard) if rng.random() < 0.5 else cuts[shard].sequence
            for shard in range(SHARDS)
        }
        ends = {shard: max(ends[shard], moments[3][shard].sequence) for shard in range(SHARDS)}
        report = await check_balances(Frozen(host, cuts, ends))
        assert report.ok, (report, [cut.sequence for cut in cuts])


async def test_money_on_the_way_is_counted_once(host: WalletHost) -> None:
    """Shard 0 has sent, shard 1 cannot make anything durable: five times 7 are in flight, and nothing is missing."""
    cuts = [await Cuts(host).cut(shard) for shard in range(SHARDS)]
    host.native.log(1).hold_sync(True)
    rows = [TransferRow(transfer_id(n), PEOPLE[0], PEOPLE[4], 7) for n in range(1, 6)]
    under_way = asyncio.ensure_future(host.transfers(rows))
    while host.durable_sequence(0) == cuts[0].sequence:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    cuts[0] = await Cuts(host).cut(0)
    ends = {shard: cut.sequence for shard, cut in enumerate(cuts)}
    report = await check_balances(Frozen(host, cuts, ends))
    assert report.ok
    assert [(one.currency, one.balance, one.in_flight) for one in report.currencies] == [
        ("EUR", 0, 0),
        ("USD", -35, 35),
        ("XXX", 0, 0),
    ][: len(report.currencies)]
    host.native.log(1).hold_sync(False)
    assert set(await under_way) == {TransferResult.OK}
    report = await check_balances(Cuts(host))
    assert report.ok
    assert {one.in_flight for one in report.currencies} == {0}


async def test_a_log_that_ends_too_early_is_no_verdict(host: WalletHost) -> None:
    class Short(Cuts):
        async def durable(self, shard: int) -> int:
            return await super().durable(shard) + 1

    with pytest.raises(Unavailable):
        await check_balances(Short(host))


async def test_the_background_check_sets_the_gauge_and_logs_an_error(host: WalletHost) -> None:
    """Quiet while all is well; a planted imbalance is in the gauge and in the log within one interval."""
    await host.transfers(busy_rows(random.Random(3), 1, 100))

    async def run(source: Cuts) -> list[MutableMapping[str, Any]]:
        with structlog.testing.capture_logs() as logs:
            task = asyncio.ensure_future(_keep_checking(host, source, 0.01))
            while source.checks < 3:
                assert not task.done(), task.exception()
                await asyncio.sleep(0.01)
            task.cancel()
        return [entry for entry in logs if entry["log_level"] == "error"]

    def gauge() -> float | None:
        return REGISTRY.get_sample_value("ducat_wallet_imbalance_minor", {"currency": "USD"})

    assert await run(Cuts(host)) == []
    assert gauge() == 0
    (first, *_) = await run(Planted(host, 1, "a credit was applied twice"))
    assert gauge() == 7
    assert first["imbalances"] == {"USD": 7}
    assert await run(Cuts(host)) == []
    assert gauge() == 0
