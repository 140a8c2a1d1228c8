"""Risk: the read model loses, doubles or misreads an event of the log."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import asyncpg
import pytest
import redis.exceptions

from kernel.clock import FixedClock
from kernel.errors import Unavailable
from kernel.ids import account_id, derived_transfer_id
from tests.unit.wallet_core.service.memory_host import MemoryHost
from wallet_core.engine.codes import AccountFlags, EventKind, TransferFlags
from wallet_core.engine.events import Event, pack_event, unpack_events
from wallet_core.projection import Changes, fold
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.service.projector import Projector

NOW_NS = 1_753_056_000_000_000_000
NAMES = [f"seller/S-{number}/USD" for number in range(12)]


class MemoryStore:
    """A store in dictionaries that can fail before or after it has written."""

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self.cursors: dict[int, int] = {}
        self.items: list[tuple[int, int]] = []
        self.balances: dict[bytes, list[int]] = {}
        self.holds: dict[tuple[int, int], int] = {}
        self.failures: list[str] = []

    async def cursor(self, shard: int) -> int:
        return self.cursors.get(shard, 0)

    async def rebase(self, shard: int, oldest: int) -> int:
        assert oldest == 1
        return 0

    async def apply(self, changes: Changes) -> bool:
        failure = self.failures.pop() if self.failures else ""
        if failure == "before":
            raise Unavailable("lost before the write")
        if self.cursors.get(changes.shard, 0) != changes.after:
            return False
        self.items += [(changes.shard, item[0]) for item in changes.items]
        for account, sums in changes.balances.items():
            held = self.balances.setdefault(account, [0, 0, 0])
            for place in range(3):
                held[place] += sums[place]
        for sequence, amount in changes.placed:
            self.holds[changes.shard, sequence] = amount
        for sequence, debit, credit in changes.ended:
            amount = self.holds.pop((changes.shard, sequence))
            self.balances.setdefault(debit, [0, 0, 0])[1] -= amount
            self.balances.setdefault(credit, [0, 0, 0])[2] -= amount
        self.cursors[changes.shard] = changes.upto
        if failure == "after":
            raise Unavailable("lost after the write")
        return True


async def busy_host(seed: int = 1, rounds: int = 60) -> MemoryHost:
    """A host with a random history of transfers, holds, posts, voids, expiries and refusals."""
    chance = random.Random(seed)
    clock = FixedClock(NOW_NS)
    host = MemoryHost(clock)
    clearing = account_id("psp/sandbox/clearing/USD")
    await host.create_accounts([AccountRow(clearing, "USD", int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED))])
    await host.create_accounts([AccountRow(account_id(name), "USD") for name in NAMES])
    holds: list[tuple[bytes, bytes]] = []
    for number in range(rounds):
        clock.advance(seconds=chance.random())
        rows = []
        for place in range(chance.randint(1, 12)):
            seller = account_id(chance.choice(NAMES))
            transfer = derived_transfer_id(clock.now_ns() // 1_000_000, f"t{place}", str(number))
            kind = chance.random()
            amount = chance.randint(1, 500)
            if kind < 0.4:
                rows.append(TransferRow(transfer, clearing, seller, amount))
            elif kind < 0.6:
                rows.append(TransferRow(transfer, seller, clearing, amount))
            elif kind < 0.8 or not holds:
                flags, timeout = int(TransferFlags.HOLD), chance.choice([0, 0, 1])
                rows.append(TransferRow(transfer, seller, clearing, amount, flags, timeout_s=timeout))
                holds.append((transfer, seller))
            else:
                hold, seller = holds.pop(chance.randrange(len(holds)))
                flag = chance.choice([TransferFlags.POST, TransferFlags.VOID])
                part = chance.choice([0, 1]) if flag == TransferFlags.POST else 0
                rows.append(TransferRow(transfer, seller, clearing, part, int(flag), hold))
        await host.transfers(rows)
    return host


def live_sums(host: MemoryHost) -> dict[bytes, list[int]]:
    """What the engines have, of accounts that ever moved."""
    sums: dict[bytes, list[int]] = {}
    for engine in host.engines.values():
        for ordinal in range(engine.status().account_count):
            view = engine.account_by_ordinal(ordinal)
            held = sums.setdefault(view.id, [0, 0, 0])
            for place, value in enumerate((view.balance, view.held_out, view.held_in)):
                held[place] += value
    return sums


def projector(host: MemoryHost, *stores: MemoryStore) -> Projector:
    return Projector(host, stores, gather_s=0)


async def until_caught_up(projector: Projector, host: MemoryHost) -> None:
    running = asyncio.ensure_future(projector.run())
    try:
        async with asyncio.timeout(60):
            for shard in host.shard_ids:
                waiting = asyncio.ensure_future(projector.wait(shard, host.durable_sequence(shard), 20))
                await asyncio.wait([waiting, running], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    waiting.cancel()
                    await running
    finally:
        running.cancel()


def nonzero(sums: dict[bytes, list[int]]) -> dict[bytes, list[int]]:
    return {account: held for account, held in sums.items() if any(held)}


@pytest.mark.parametrize("seed", range(5))
async def test_folded_sums_are_the_balances_of_the_engine(seed: int) -> None:
    host = await busy_host(seed)
    store = MemoryStore()
    await until_caught_up(projector(host, store), host)
    assert nonzero(store.balances) == nonzero(live_sums(host))
    kinds = {
        event.kind for frames in host.log.values() for f in frames for event in unpack_events(f.body, f.first_sequence)
    }
    assert kinds >= {EventKind.HOLD_POSTED, EventKind.HOLD_VOIDED, EventKind.HOLD_EXPIRED, EventKind.TRANSFER_REFUSED}


async def test_a_crash_on_either_side_of_the_write_neither_loses_nor_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wallet_core.service.projector.RETRY_S", (0.0,))
    monkeypatch.setattr("wallet_core.service.projector.EVENT_COUNT_MAX", 16)
    host = await busy_host()
    one, other = MemoryStore("one"), MemoryStore("other")
    one.failures, other.failures = ["after", "before", "after", ""] * 3, ["before", "", "after"] * 4
    await until_caught_up(projector(host, one, other), host)
    for store in (one, other):
        assert nonzero(store.balances) == nonzero(live_sums(host))
        assert len(store.items) == len(set(store.items))
        assert store.items == sorted(store.items, key=lambda item: store.items.index(item))


async def test_a_store_that_was_emptied_is_filled_again_while_the_other_stands_still() -> None:
    host = await busy_host()
    one, other = MemoryStore("one"), MemoryStore("other")
    await until_caught_up(projector(host, one, other), host)
    before = len(other.items)
    one.__init__("one")  # type: ignore[misc]
    await until_caught_up(projector(host, one, other), host)
    assert nonzero(one.balances) == nonzero(live_sums(host))
    assert len(other.items) == before


async def test_a_reset_under_a_running_projector_is_noticed() -> None:
    host = await busy_host()
    store = MemoryStore()
    follower = projector(host, store)
    running = asyncio.ensure_future(follower.run())
    try:
        for shard in host.shard_ids:
            assert await follower.wait(shard, host.durable_sequence(shard), 10)
        store.__init__()  # type: ignore[misc]
        follower.reload()
        async with asyncio.timeout(60):
            while store.cursors != {shard: host.durable_sequence(shard) for shard in host.shard_ids}:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert nonzero(store.balances) == nonzero(live_sums(host))
    finally:
        running.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_read_model_ahead_of_its_log_is_a_problem_that_is_said_and_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wallet_core.service.projector.RETRY_S", (0.001,))
    host = await busy_host()
    ahead, other = MemoryStore("ahead"), MemoryStore("other")
    ahead.cursors[0] = 10**9
    failures: list[tuple[int, str, str]] = []
    well: list[tuple[int, str]] = []
    follower = Projector(
        host,
        [ahead, other],
        gather_s=0,
        on_failure=lambda *told: failures.append(told),
        on_well=lambda *told: well.append(told),
    )
    running = asyncio.ensure_future(follower.run())
    try:
        await until(lambda: len(failures) > 3)
        assert {(shard, store) for shard, store, _ in failures} == {(0, "ahead")}
        assert "ahead: the read model in ahead has event 1000000000 of shard 0" in follower.problem(0)
        assert "ducat wallet rebuild" in follower.problem(0)
        for shard in host.shard_ids:  # the other store has everything, and so has the other shard
            assert await follower.wait(shard, host.durable_sequence(shard), 10, "other")
        with pytest.raises(Unavailable, match="does not follow shard 0"):
            await follower.wait(0, 10**9, 10, "ahead")
        assert follower.problem(1) == ""
        assert not running.done()
        ahead.cursors[0] = 0  # a rebuild
        follower.reload()
        await until(lambda: follower.projected(0, "ahead") == host.durable_sequence(0))
        assert (follower.problem(0), well) == ("", [(0, "ahead")])
        assert nonzero(ahead.balances) == nonzero(live_sums(host))
    finally:
        running.cancel()


class Refusing(MemoryStore):
    """Raises whatever a driver may raise, on every call, until it is mended."""

    error: Exception | None = None

    async def cursor(self, shard: int) -> int:
        if self.error is not None:
            raise self.error
        return await super().cursor(shard)

    async def apply(self, changes: Changes) -> bool:
        if self.error is not None:
            raise self.error
        return await super().apply(changes)


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.TimeoutError("Timeout reading from socket"),
        redis.exceptions.ConnectionError("Connection closed by server"),
        redis.exceptions.BusyLoadingError("LOADING"),
        redis.exceptions.ReadOnlyError("READONLY"),
        redis.exceptions.OutOfMemoryError("OOM command not allowed"),
        redis.exceptions.NoScriptError("NOSCRIPT"),
        redis.exceptions.AuthenticationError("WRONGPASS"),
        redis.exceptions.ResponseError("WRONGTYPE"),
        asyncpg.UndefinedTableError("relation does not exist"),
        asyncpg.OutOfMemoryError("out of memory"),
        asyncpg.DiskFullError("could not extend file"),
        asyncpg.QueryCanceledError("statement timeout"),
        asyncpg.ConnectionDoesNotExistError("connection was closed"),
        asyncpg.InterfaceError("connection is closed"),
        TimeoutError(),
        OSError(113, "No route to host"),
        ValueError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", ["from the start", "later"])
async def test_nothing_that_a_store_raises_ends_the_projector(
    error: Exception, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wallet_core.service.projector.RETRY_S", (0.001,))
    host = await busy_host(rounds=4)
    sick, other = Refusing("sick"), MemoryStore("other")
    follower = projector(host, sick, other)
    sick.error = error if when == "from the start" else None
    running = asyncio.ensure_future(follower.run())
    try:
        if when == "later":
            assert await follower.wait(0, host.durable_sequence(0), 10)
            sick.error = error
            transfer = derived_transfer_id(NOW_NS // 10**6, "late", "1")
            clearing = account_id("psp/sandbox/clearing/USD")
            rows = [TransferRow(transfer, clearing, account_id(name), 1) for name in NAMES]
            await host.transfers(rows)
            follower.reload()
        await until(lambda: type(error).__name__ in follower.problem(0))
        assert await follower.wait(0, host.durable_sequence(0), 10, "other")
        sick.error = None
        for shard in host.shard_ids:
            assert await follower.wait(shard, host.durable_sequence(shard), 10)
        await until(lambda: follower.problem(0) == "")
        assert nonzero(sick.balances) == nonzero(other.balances) == nonzero(live_sums(host))
        assert len(sick.items) == len(set(sick.items))
        assert not running.done()
    finally:
        running.cancel()


async def test_a_store_that_is_behind_holds_nobody_up_and_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores at different places read for themselves; at the same place they share it."""
    monkeypatch.setattr("wallet_core.service.projector.EVENT_COUNT_MAX", 16)
    host = await busy_host()
    behind, other = MemoryStore("behind"), MemoryStore("other")
    await until_caught_up(projector(host, other), host)
    count = len(other.items)
    await until_caught_up(projector(host, behind, other), host)
    assert len(other.items) == count
    assert sorted(behind.items) == sorted(other.items)
    assert nonzero(behind.balances) == nonzero(live_sums(host))


async def test_read_your_writes_waits_for_the_event_and_gives_up_in_time() -> None:
    host = await busy_host()
    store = MemoryStore()
    follower = projector(host, store)
    durable = host.durable_sequence(0)
    assert not await follower.wait(0, durable, 0.01)
    running = asyncio.ensure_future(follower.run())
    try:
        assert await follower.wait(0, durable, 10)
        assert not await follower.wait(0, durable + 1, 0.01)
        await host.transfers(
            [TransferRow(derived_transfer_id(NOW_NS // 10**6, "x", "y"), account_id(NAMES[0]), account_id(NAMES[1]), 1)]
            * 1
        )
    finally:
        running.cancel()


def test_fold_reads_records_as_the_engine_room_writes_them() -> None:
    one, two = b"A" * 16, b"B" * 16
    keys = {3: (one, "USD"), 4: (two, "USD"), 9: (b"in-flight:USD\0\0\1", "USD")}
    kinds = EventKind
    records = [
        Event(7, kinds.MONEY_SENT, id=b"s" * 16, amount=5, debit_ordinal=3, credit_id=two, code=300, shard=1),
        Event(
            8,
            kinds.MONEY_RECEIVED,
            id=b"r" * 16,
            amount=6,
            debit_ordinal=9,
            credit_ordinal=4,
            number=1,
            code=9,
            shard=0,
        ),
        Event(9, kinds.CREDIT_REFUSED, id=b"c" * 16, amount=7, number=2, result=23, code=1, shard=0),
        Event(10, kinds.SAGA_SETTLED, number=2**40, shard=1),
        Event(11, kinds.MONEY_RETURNED, id=b"b" * 16, amount=5, debit_ordinal=9, credit_ordinal=3, result=20, shard=1),
        Event(12, kinds.ACCOUNT_OPENED, id=two, ordinal=4, currency="KWD"),
        Event(
            13, kinds.HOLD_POSTED, id=b"p" * 16, amount=1, debit_ordinal=3, credit_ordinal=4, hold_sequence=2**33 + 1
        ),
        Event(14, kinds.TRANSFER_REFUSED, id=b"f" * 16, amount=-1, result=24, code=65_535),
    ]
    body = b"".join(map(pack_event, records))
    changes = fold(1, 7, [(7, 123, body)], keys.__getitem__)
    assert (changes.after, changes.upto) == (7, 14)
    assert [item[0] for item in changes.items] == [8, 9, 11, 13, 14]
    sent = fold(1, 6, [(7, 123, body)], keys.__getitem__)
    assert sent.items[0] == (7, b"s" * 16, one, two, 5, int(kinds.MONEY_SENT), 1, 300, 123)
    assert sent.balances[b"in-flight:USD\0\0\1"] == [5 - 6 - 5, 0, 0]
    assert sent.balances[one] == [-5 + 5 - 1, 0, 0]
    assert changes.items[1] == (9, b"c" * 16, None, None, 7, int(kinds.CREDIT_REFUSED), 23, 1, 123)
    assert changes.items[2][6] == 20
    assert changes.items[-1] == (14, b"f" * 16, None, None, -1, int(kinds.TRANSFER_REFUSED), 24, 65_535, 123)
    assert changes.opened == {two: "KWD"}
    assert changes.ended == [(2**33 + 1, one, two)]
    with pytest.raises(ValueError, match="expected event 6, the page begins at 7"):
        fold(1, 5, [(7, 123, body)], keys.__getitem__)
