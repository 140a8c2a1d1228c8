"""Risk: a linked chain over several shards is applied in part, twice, or leaves money held for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from host_fixtures import NOW_MS, NOW_NS, account, config, message, on_shard, transfer_id

from ducat.wallet.v1 import wallet_pb2
from kernel.clock import FixedClock
from kernel.errors import InvalidArgument, Unavailable
from kernel.ids import account_id
from wallet_core.engine.codes import AccountFlags, TransferFlags, TransferResult
from wallet_core.service import chain_rules
from wallet_core.service.chain_rules import MARKED, MARKS, transit_account
from wallet_core.service.chains import Chains, NoPeers
from wallet_core.service.port import ID_NONE, AccountRow, TransferRow
from wallet_core.shard import ShardClock, WalletHost
from wallet_core.shard.port import RowsResult, unpack_cut

SHARDS = 4
SOURCE = account(1_000_000)
A, B, C, D = (on_shard(shard, SHARDS) for shard in range(SHARDS))
A2, B2 = on_shard(0, SHARDS, 1), on_shard(1, SHARDS, 1)
PEOPLE = (A, B, C, D, A2, B2)
EURO = on_shard(3, SHARDS, 3)
LINKED, HOLD = int(TransferFlags.LINKED), int(TransferFlags.HOLD)
POST, VOID = int(TransferFlags.POST), int(TransferFlags.VOID)
R = TransferResult
FUND = 1_000


class World:
    """One process with all shards, and a coordinator that can be stopped at any of its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FixedClock(NOW_NS)
        self.native_clock = ShardClock(NOW_NS)
        self.host: WalletHost
        self.chains: Chains

    async def start(self, **options: int) -> World:
        settings = config(self.folder, SHARDS, snapshot_events=0, **options)
        self.host = await WalletHost.open(settings, clock=self.native_clock)
        self.chains = Chains(self.host, NoPeers(), self.clock, answer_s=1.0, grace_s=0.0)
        self.host.coordinate(self.chains.run)
        return self

    async def open(self) -> None:
        flags = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
        people = [AccountRow(one, "USD") for one in PEOPLE]
        rows = [AccountRow(SOURCE, "USD", flags), AccountRow(EURO, "EUR"), *people]
        assert set(await self.host.create_accounts(rows)) == {1}
        fund = [TransferRow(transfer_id(10**6 + n), SOURCE, one, FUND) for n, one in enumerate(PEOPLE)]
        assert set(await self.host.transfers(fund)) == {R.OK}

    async def chain(self, *rows: TransferRow) -> list[int]:
        return list(await self.host.transfers(linked(rows)))

    async def balances(self) -> list[int]:
        states = await self.host.accounts(PEOPLE)
        return [state.balance for state in states if state is not None]

    async def is_clean(self) -> None:
        """No money is held, none is between shards, and nothing is left of any chain."""
        for _ in range(100):
            marks, transit = await self.host.accounts([MARKS, transit_account("USD")])
            if marks is None or marks.held_out == 0:
                break
            await asyncio.sleep(0.01)
            await self.chains.look()
        assert marks is None or (marks.held_out, marks.held_in) == (0, 0)
        assert transit is None or (transit.balance, transit.held_out, transit.held_in) == (0, 0, 0)
        assert all(
            state is not None and (state.held_out, state.held_in) == (0, 0)
            for state in await self.host.accounts(PEOPLE)
        )
        for total in await self.host.totals():
            assert total.balance + total.in_flight == 0


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    one = await World(tmp_path).start()
    await one.open()
    yield one
    await one.host.close()


def linked(rows: Sequence[TransferRow]) -> list[TransferRow]:
    return [row._replace(flags=row.flags | LINKED) for row in rows[:-1]] + list(rows[-1:])


def move(number: int, debit: bytes, credit: bytes, amount: int, **fields: int) -> TransferRow:
    return TransferRow(transfer_id(number), debit, credit, amount, **fields)  # type: ignore[arg-type]


async def test_all_legs_are_applied_and_nothing_is_left(world: World) -> None:
    rows = [move(1, A, B, 10), move(2, C, D, 20), move(3, A2, A, 30), move(4, SOURCE, C, 40), move(5, B, SOURCE, 50)]
    assert await world.chain(*rows) == [R.OK] * 5
    assert await world.balances() == [1020, 960, 1020, 1020, 970, 1000]
    assert await world.chain(*rows) == [R.OK] * 5  # again: the same answer, no effect
    assert await world.balances() == [1020, 960, 1020, 1020, 970, 1000]
    await world.is_clean()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (move(2, C, D, 5_000), R.INSUFFICIENT_FUNDS),
        (move(2, C, on_shard(3, SHARDS, 7), 5), R.CREDIT_ACCOUNT_NOT_FOUND),
        (move(2, on_shard(2, SHARDS, 7), D, 5), R.DEBIT_ACCOUNT_NOT_FOUND),
        (move(2, C, EURO, 5), R.CURRENCY_MISMATCH),
        (move(2, C, D, 0), R.AMOUNT_INVALID),
        (move(2, C, C, 5), R.ACCOUNTS_SAME),
        (move(2, C, D, 5, flags=int(TransferFlags.HOLD)), R.CROSS_SHARD_UNSUPPORTED),
        (move(2, C, D, 5, flags=int(TransferFlags.BALANCING_DEBIT)), R.CROSS_SHARD_UNSUPPORTED),
        (move(2, C, D, 5, timeout_s=3), R.TIMEOUT_INVALID),
        (move(2, C, D, 5, flags=1 << 9), R.FLAGS_INVALID),
        (move(2, C, D, 5, flags=int(TransferFlags.CHAIN)), R.FLAGS_INVALID),
        (TransferRow(bytes(16), C, D, 5), R.ID_INVALID),
        (TransferRow(transfer_id(2, NOW_MS + 3_600_000), C, D, 5), R.ID_AHEAD),
        (TransferRow(transfer_id(2, NOW_MS - 30 * 86_400_000), C, D, 5), R.ID_TOO_OLD),
        (move(1, C, D, 5), R.ID_REUSED),
    ],
    ids=lambda value: value.name if isinstance(value, TransferResult) else "",
)
async def test_one_bad_row_fails_the_chain(world: World, bad: TransferRow, code: int) -> None:
    rows = (move(1, A, B, 10), bad, move(3, B, C, 10))
    expected = [R.LINKED_FAILED, code, R.LINKED_FAILED] if code != R.ID_TOO_OLD else [code] * 3
    assert await world.chain(*rows) == expected
    assert await world.chain(*rows) == expected
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_a_limit_and_frozen_or_closed_accounts_are_found_before_anything_moves(world: World) -> None:
    update = [AccountRow(B, "USD", 0, 0, FUND + 5), AccountRow(D, "USD", int(AccountFlags.FROZEN))]
    assert set(await world.host.create_accounts(update, update=True)) == {1}
    assert await world.chain(move(1, A, C, 6), move(2, A, B, 6)) == [R.LINKED_FAILED, R.BALANCE_LIMIT_EXCEEDED]
    assert await world.chain(move(3, A, C, 6), move(4, A, D, 1)) == [R.LINKED_FAILED, R.CREDIT_ACCOUNT_FROZEN]
    assert await world.chain(move(5, A, C, 6), move(6, D, A, 1)) == [R.LINKED_FAILED, R.DEBIT_ACCOUNT_FROZEN]
    # two legs that fit one by one, and not together
    assert await world.chain(move(7, A, B, 3), move(8, C, B, 3)) == [R.LINKED_FAILED, R.BALANCE_LIMIT_EXCEEDED]
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_every_row_that_fails_by_itself_says_why(world: World) -> None:
    rows = (move(1, A, B, 5_000), move(2, B, C, 10), move(3, D, on_shard(2, SHARDS, 9), 1))
    assert await world.chain(*rows) == [R.INSUFFICIENT_FUNDS, R.LINKED_FAILED, R.CREDIT_ACCOUNT_NOT_FOUND]


async def test_an_id_of_a_chain_means_nothing_else(world: World) -> None:
    first = move(1, A, B, 10)
    assert await world.chain(first, move(2, C, D, 10)) == [R.OK, R.OK]
    assert await world.chain(first, move(3, C, D, 10)) == [R.ID_REUSED, R.LINKED_FAILED]  # another chain
    assert await world.chain(first._replace(credit_id=D), move(4, C, D, 1)) == [R.ID_REUSED, R.LINKED_FAILED]
    assert list(await world.host.transfers([first])) == [R.ID_REUSED]  # by itself
    assert await world.balances() == [990, 1010, 990, 1010, 1000, 1000]
    await world.is_clean()


async def test_the_column_stream_takes_chains_beside_other_rows(world: World) -> None:
    rows = [
        move(1, A, A2, 1),
        *linked([move(2, A, B, 10), move(3, C, D, 5_000)]),
        *linked([move(4, B, C, 7), move(5, D, A, 7)]),
        *linked([move(6, A, A2, 2), move(7, A2, A, 2)]),  # of one shard
        move(8, A, D, 3),
        move(9, A, B, 1, flags=LINKED),  # and one that has no end
    ]
    batch = wallet_pb2.TransferBatch.FromString(message(rows, settle=2))
    raw = wallet_pb2.SubmitTransfersRequest(batch=batch).SerializeToString()
    answer = wallet_pb2.SubmitTransfersResponse.FromString(await world.host.transfer_batch(raw, wrapped=True))
    failed = dict(zip(answer.result.failed_rows, answer.result.failed_results, strict=True))
    assert failed == {1: R.LINKED_FAILED, 2: R.INSUFFICIENT_FUNDS, 8: R.CHAIN_OPEN}
    assert await world.balances() == [FUND - 1 + 7 - 3, FUND - 7, FUND + 7, FUND - 7 + 3, FUND + 1, FUND]
    assert {position.shard for position in answer.result.positions} == set(range(SHARDS))
    await world.is_clean()


async def test_a_chain_that_reaches_into_the_next_callers_rows_is_refused(world: World) -> None:
    assert await world.chain(move(1, A, B, 1), move(2, C, D, 1, flags=LINKED)) == [R.CHAIN_OPEN] * 2


async def test_the_same_chain_from_two_callers_at_once_is_one(world: World) -> None:
    rows = (move(1, A, B, 10), move(2, C, D, 10))
    answers = await asyncio.gather(*(world.chain(*rows) for _ in range(8)))
    assert answers == [[R.OK, R.OK]] * 8
    assert await world.balances() == [990, 1010, 990, 1010, 1000, 1000]
    await world.is_clean()


async def test_chains_that_compete_for_the_last_money_never_take_it_twice(world: World) -> None:
    chains = [(move(10 * n, A, B, 300), move(10 * n + 1, C, D, 300)) for n in range(1, 9)]
    answers = await asyncio.gather(*(world.chain(*rows) for rows in chains))
    applied = sum(answer == [R.OK, R.OK] for answer in answers)
    assert applied == 3
    assert await world.balances() == [100, 1900, 100, 1900, 1000, 1000]
    await world.is_clean()


async def test_a_frozen_account_delays_the_end_and_loses_nothing(world: World) -> None:
    """Frozen after the hold was placed: the chain is decided, the frozen shard follows once the account is thawed."""

    async def freeze(*flags: AccountFlags) -> None:
        rows = [AccountRow(D, "USD", int(sum(flags, AccountFlags(0))))]
        assert list(await world.host.create_accounts(rows, update=True)) == [1]

    rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
    steps = Steps(world, rows)
    await steps.take(2)  # tried and decided
    await freeze(AccountFlags.FROZEN)
    closing = await world.host.create_accounts([AccountRow(C, "USD", int(AccountFlags.CLOSED))], update=True)
    assert list(closing) == [8]  # BALANCE_NOT_ZERO: what is held keeps an account open
    assert list((await world.chains.run(rows, steps.routes))[0]) == [R.IN_FLIGHT] * 2
    assert await world.balances() == [990, 1010, 980, 1000, 1000, 1000]
    assert await world.chains.look() > 0
    await freeze()
    world.clock.advance(seconds=1)  # each attempt has ids of its own time
    assert list((await world.chains.run(rows, steps.routes))[0]) == [R.OK] * 2
    assert await world.balances() == [990, 1010, 980, 1020, 1000, 1000]
    await world.is_clean()


class Steps:
    """Drives the rules by hand, one ask at a time, as a coordinator that may die between any two."""

    def __init__(self, world: World, rows: Sequence[TransferRow]) -> None:
        self.world = world
        place = {one: shard for shard, one in enumerate((A, B, C, D))}
        self.routes = [(place[row.debit_id], place[row.credit_id]) for row in rows]
        self.plan = chain_rules.plan(rows, self.routes, ["USD"] * len(rows), SHARDS)
        self.steps = chain_rules.run(self.plan, world.clock.now_ns)

    async def take(self, count: int, part: int | None = None) -> None:
        """So many steps; of the last one only the first `part` shards."""
        asks = next(self.steps)
        for number in range(count):
            here = asks if number < count - 1 or part is None else asks[:part]
            answers: list[bytes | None] = [
                (await self.world.chains.apply_step(ask.shard, ask.rows, ("USD",))).codes for ask in here
            ]
            if number == count - 1 and part is not None:
                return
            try:
                asks = self.steps.send(answers)
            except StopIteration:
                return


def crash_points() -> Iterator[tuple[int, int | None, bool]]:
    """Steps taken, shards of the last one, whether the chain was decided by then."""
    yield from ((1, part, False) for part in range(5))
    yield (1, None, False)
    yield (2, None, True)
    yield from ((3, part, True) for part in range(5))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("count", "part", "decided"), list(crash_points()))
@pytest.mark.parametrize("repeated", [False, True])
async def test_a_coordinator_that_dies_leaves_all_or_nothing(
    tmp_path: Path, count: int, part: int | None, decided: bool, restart: bool, repeated: bool
) -> None:
    world = await World(tmp_path).start()
    try:
        await world.open()
        rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
        await Steps(world, rows).take(count, part)
        if restart:
            await world.host.close()
            await world.start()
        if repeated:  # the client asks again before anybody has cleaned up
            assert list(await world.host.transfers(rows)) == [R.OK] * 2
            decided = True
        for _ in range(3):
            await world.chains.look()
        assert await world.balances() == ([990, 1010, 980, 1020, 1000, 1000] if decided else [FUND] * 6)
        await world.is_clean()
        begun = decided or part != 0
        again = [R.OK] * 2 if decided or not begun else [R.LINKED_FAILED] * 2
        assert list(await world.host.transfers(rows)) == again
        await world.is_clean()
    finally:
        await world.host.close()


async def test_steps_that_arrive_late_or_twice_change_nothing(world: World) -> None:
    rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
    steps = Steps(world, rows)
    await steps.take(1, 2)
    for _ in range(3):
        await world.chains.look()  # somebody else gives the chain up …
    for ask in steps.plan.tries:  # … and only then the tries arrive
        await world.chains.apply_step(ask.shard, ask.rows, ("USD",))
    late = await world.chains.apply_step(steps.plan.home, [steps.plan.decision], ())
    assert list(late.codes) == [R.ID_REUSED]  # nobody can commit any more
    for _ in range(3):
        await world.chains.look()
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_a_decision_outlives_the_memory_of_its_id(tmp_path: Path) -> None:
    """The shards forget ids under load; what was committed must still be known, and what was not must not become it."""
    world = World(tmp_path)
    world.host = await WalletHost.open(
        config(tmp_path, SHARDS, snapshot_events=0, generation_ids=64, id_count_max=128), clock=world.native_clock
    )
    world.chains = Chains(world.host, NoPeers(), world.clock, answer_s=1.0, grace_s=0.0)
    world.host.coordinate(world.chains.run)
    try:
        await world.open()
        committed, undecided = (
            linked([move(1, A, B, 10), move(2, C, D, 20)]),
            linked([move(3, A, B, 1), move(4, C, D, 2)]),
        )
        await Steps(world, committed).take(3, 1)
        steps = Steps(world, undecided)
        await steps.take(1)
        world.clock.advance(seconds=2)
        later = NOW_MS + 2_000
        world.native_clock.set(later * 1_000_000)
        own = {shard: on_shard(shard, SHARDS, 1) for shard in range(SHARDS)}
        opened = [AccountRow(one, "USD") for one in own.values() if one not in PEOPLE]
        assert set(await world.host.create_accounts(opened)) == {1}
        flood = [TransferRow(transfer_id(1_000 + n, NOW_MS + 1 + n), SOURCE, own[n % SHARDS], 1) for n in range(1_600)]
        assert set(await world.host.transfers(flood)) == {R.OK}
        assert list((await world.chains.apply_step(steps.plan.home, [steps.plan.decision], ())).codes) == [R.ID_TOO_OLD]
        for _ in range(3):
            await world.chains.look()
        assert (await world.balances())[:4] == [990, 1010, 980, 1020]
        await world.is_clean()
    finally:
        await world.host.close()


async def test_a_shard_that_does_not_answer_fails_the_chain_for_good(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., object] = world.host.apply_step

    async def silent(shard: int, rows: Sequence[TransferRow]) -> RowsResult:
        if any(row.credit_id == D for row in rows):
            raise TimeoutError
        return await real(shard, rows)  # type: ignore[misc,no-any-return]

    monkeypatch.setattr(world.host, "apply_step", silent)
    rows = (move(1, A, B, 10), move(2, C, D, 20))
    assert await world.chain(*rows) == [R.LINKED_FAILED] * 2
    monkeypatch.undo()
    assert await world.chain(*rows) == [R.LINKED_FAILED] * 2
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_without_a_coordinator_chains_across_shards_are_refused(world: World) -> None:
    codes = (await world.host.apply_step(0, linked([move(1, A, B, 1), move(2, C, D, 1)]))).codes
    assert list(codes) == [R.CROSS_SHARD_UNSUPPORTED] * 2


async def from_before(world: World, rows: Sequence[TransferRow]) -> bytes:
    """Rows that a caller had applied while nothing was kept from him."""
    await world.host.close()
    host = await WalletHost.open(config(world.folder, SHARDS, snapshot_events=0), clock=world.native_clock)
    codes = await host.transfers(rows)
    await host.close()
    await world.start()
    return codes


async def test_what_callers_did_on_the_accounts_of_marks_means_nothing(world: World) -> None:
    """Holds there are no marks, whatever their ids and amounts, and whatever was held just before them."""
    assert await world.chain(move(1, A, B, 10), move(2, C, D, 10)) == [R.OK] * 2
    payout = move(3, A, A2, 900, flags=HOLD)
    assert list(await world.host.transfers([payout])) == [R.OK]
    steps = Steps(world, linked([move(4, A, B, 10), move(5, C, D, 20)]))
    ids = [transfer_id(number) for number in range(200, 300)]
    ids += [mark.id for mark in steps.plan.marks] + [steps.plan.decision.id]
    foreign = [TransferRow(id_, MARKS, MARKED, 2 + number, HOLD) for number, id_ in enumerate(ids)]
    assert set(await from_before(world, foreign)) == {R.OK}
    (state,) = await world.host.accounts([MARKS])
    assert state is not None
    assert state.held_out > 0
    assert await world.chains.look() == 0
    (state,) = await world.host.accounts([A])
    assert state is not None
    assert state.held_out == 900
    ends = [TransferRow(transfer_id(1_000 + n), MARKS, MARKED, 0, VOID, row.id) for n, row in enumerate(foreign)]
    post = move(6, A, A2, 0, flags=POST)._replace(pending_id=payout.id)
    assert set(await from_before(world, [*ends, post])) == {R.OK}
    assert await world.chain(move(7, A, A2, 1), move(8, A2, A, 1)) == [R.OK] * 2
    await world.is_clean()


async def test_no_chain_makes_a_mark_of_its_own(world: World) -> None:
    """A leg that debits the account of marks would be a mark, under an id and for a number of holds that the caller chooses: one that
    names the decision of another chain, which was committed."""
    done = Steps(world, linked([move(1, A, B, 1), move(2, C, D, 1)]))
    await done.take(2)
    forged = chain_rules.mark_of(done.plan.decision.id, 1, SHARDS)
    own = on_shard(1, SHARDS, 5)
    assert list(await world.host.create_accounts([AccountRow(own, "XXX", int(AccountFlags.MAY_OVERDRAW))])) == [1]
    for debit, credit in ((MARKS, own), (own, MARKS), (MARKED, own), (own, MARKED), (MARKS, MARKED)):
        rows = [move(5, C, B, 500), TransferRow(forged, debit, credit, 2), move(6, D, A, 5_000)]
        assert await world.chain(*rows) == [R.CROSS_SHARD_UNSUPPORTED] * 3
        assert chain_rules.refused_at_once(rows) is not None  # by the rules as well, whoever asks
    for _ in range(3):
        await world.chains.look()
    assert await world.balances() == [999, 1001, 999, 1001, 1000, 1000]
    await world.is_clean()


async def test_a_look_that_fails_does_not_end_the_process(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = []
    chains = Chains(world.host, NoPeers(), world.clock, look_s=0.0, on_look_failed=failures.append)
    monkeypatch.setattr(chains, "look", lambda: 1 // 0)
    with pytest.raises(TimeoutError):  # nothing else ends it
        await asyncio.wait_for(chains.watch(), 0.05)
    assert len(failures) > 1
    assert {type(one) for one in failures} == {ZeroDivisionError}


async def test_a_mark_that_stands_for_more_than_a_chain_has_stands_for_nothing(world: World) -> None:
    """With the id of a mark of this shard: whatever was held before it is somebody else's."""
    assert await world.chain(move(1, A, B, 10), move(2, C, D, 10)) == [R.OK] * 2
    payout = move(3, A, A2, 900, flags=HOLD)
    assert list(await world.host.transfers([payout])) == [R.OK]
    id_ = chain_rules.mark_of(transfer_id(4)[:13] + bytes(3), 0, SHARDS)
    mark = TransferRow(id_, MARKS, MARKED, 10**12, HOLD | int(TransferFlags.CHAIN))
    assert list((await world.host.apply_step(0, [mark])).codes) == [R.OK]
    assert [(mark.holds, mark.complete) for mark in await world.host.chain_marks(0)] == [((), False)]
    await world.chains.look()
    (state,) = await world.host.accounts([A])
    assert state is not None
    assert state.held_out == 900


@pytest.mark.parametrize("committed", [False, True])
async def test_nobody_ends_what_a_chain_holds_by_hand(world: World, committed: bool) -> None:
    """The ids are in the events that callers watch. Nor does it end by being named in a chain of his, or after it was decided."""
    rows = linked([move(1, A, B, 400), move(2, C, D, 300)])
    steps = Steps(world, rows)
    await steps.take(1 + committed)
    ours = [id_ for mark in steps.plan.marks for id_ in (mark.id, *(hold[0] for hold in mark.holds))]
    ours.append(steps.plan.decision.id)
    number = 1_000

    async def meddle() -> None:
        nonlocal number
        for id_ in ours:
            for kind in (VOID, POST):
                number += 10
                by_hand = TransferRow(transfer_id(number), ID_NONE, ID_NONE, 0, kind, id_)
                assert list(await world.host.transfers([by_hand])) == [R.HOLD_NOT_FOUND]
                for accounts in ((A, B), (MARKS, MARKED), (A, transit_account("USD")), (transit_account("USD"), B)):
                    number += 10
                    named = TransferRow(transfer_id(number), *accounts, 0, kind, id_)
                    single = named._replace(
                        id=transfer_id(number + 1), credit_id=A2 if accounts[0] == A else accounts[1]
                    )
                    assert list(await world.host.transfers([single])) in (
                        [R.HOLD_NOT_FOUND],
                        [R.CROSS_SHARD_UNSUPPORTED],
                    )
                    chained = named._replace(id=transfer_id(number + 2), credit_id=single.credit_id)
                    answers = await world.chain(chained, move(number + 3, A, A2, 1))
                    assert R.OK not in answers

    await meddle()
    assert [mark.complete for mark in await world.host.chain_marks(0)] == [True] * (1 + committed)
    for _ in range(3):
        await world.chains.look()
    await meddle()  # over, they are unknown as before: whether they were posted is nobody's business
    assert await world.balances() == ([600, 1400, 700, 1300, 1000, 1000] if committed else [FUND] * 6)
    await world.is_clean()


async def test_the_flag_of_chains_is_taken_from_no_caller(world: World, tmp_path: Path) -> None:
    """By every way in that has flags."""
    rows = linked([move(1, A, B, 400), move(2, C, D, 300)])
    steps = Steps(world, rows)
    await steps.take(1)
    (hold, *_), chain = steps.plan.marks[0].holds, int(TransferFlags.CHAIN)
    forged = [
        TransferRow(transfer_id(70), ID_NONE, ID_NONE, 0, VOID | chain, hold[0]),
        TransferRow(transfer_id(71), hold[1], hold[2], 0, POST | chain, hold[0]),
        TransferRow(transfer_id(72), MARKS, MARKED, 2, HOLD | chain),
        move(73, A, A2, 1, flags=HOLD | chain),
        move(74, A, A2, 1, flags=chain),
        move(75, A, B, 1, flags=chain),
    ]
    wrong = [R.FLAGS_INVALID] * len(forged)
    wrong[1:3] = [R.CROSS_SHARD_UNSUPPORTED] * 2  # they name accounts that are kept from callers
    assert list(await world.host.transfers(forged)) == wrong
    raw = message(forged, settle=2)
    batch = wallet_pb2.SubmitTransfersRequest(batch=wallet_pb2.TransferBatch.FromString(raw)).SerializeToString()
    answers = [await world.host.transfer_batch(raw)]
    answers.append(
        wallet_pb2.SubmitTransfersResponse.FromString(
            await world.host.transfer_batch(batch, wrapped=True)
        ).result.SerializeToString()
    )
    for answer in answers:
        assert list(wallet_pb2.TransferBatchResult.FromString(answer).failed_results) == wrong
    for row in forged:  # in a chain of one shard, and of several
        for other in (move(80, A, A2, 1), move(81, A, B, 1)):
            assert R.OK not in await world.chain(other, row)
            assert R.OK not in await world.chain(row, other)
    lone = await WalletHost.open(config(tmp_path / "lone", 1, snapshot_events=0), clock=world.native_clock)
    try:
        assert list(await lone.transfers(forged)) == [R.FLAGS_INVALID] * len(forged)
    finally:
        await lone.close()
    assert [mark.complete for mark in await world.host.chain_marks(0)] == [True]
    for _ in range(3):
        await world.chains.look()
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


@pytest.mark.parametrize("refused", [False, True])
async def test_the_id_of_a_decision_used_by_somebody_else_is_no_commit(world: World, refused: bool) -> None:
    """Who knows a chain's rows knows the id of its decision. Taken for a commit, a chain of which one shard refused its part would
    be posted on the others: money from nowhere."""
    rows = linked([move(1, A, B, 2_000 if refused else 400), move(2, C, D, 300)])
    steps = Steps(world, rows)
    own = move(0, A, A2, 1)._replace(id=steps.plan.decision.id)
    assert list(await world.host.transfers([own])) == [R.OK]
    expected = [R.INSUFFICIENT_FUNDS if refused else R.LINKED_FAILED, R.LINKED_FAILED]
    assert list(await world.host.transfers(rows)) == expected
    for _ in range(3):
        await world.chains.look()
    assert list(await world.host.transfers(rows)) == expected
    assert await world.balances() == [FUND - 1, FUND, FUND, FUND, FUND + 1, FUND]
    await world.is_clean()


async def test_the_id_of_a_decision_used_for_a_leg_of_another_chain_is_no_commit(world: World) -> None:
    """A leg is a hold with the flag as well; when its chain is given up it looks like a decision that is over."""
    rows = linked([move(1, A, B, 2_000), move(2, C, D, 300)])  # refused on shard 0
    steps = Steps(world, rows)
    leg = move(0, A2, B, 1)._replace(id=steps.plan.decision.id)
    assert await world.chain(leg, move(3, D, C, 5_000)) == [R.LINKED_FAILED, R.INSUFFICIENT_FUNDS]
    for _ in range(2):
        assert R.OK not in await world.host.transfers(rows)
        await world.chains.look()
    held = await world.host.accounts(PEOPLE)
    assert await world.balances() == [FUND] * 6, held


async def test_a_chain_sent_again_when_all_is_over_and_a_shard_has_forgotten_says_so(world: World) -> None:
    rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
    assert list(await world.host.transfers(rows)) == [R.OK] * 2
    await world.is_clean()
    steps = Steps(world, rows)
    asks = next(steps.steps)
    answers: list[bytes | None] = [bytes([R.ID_TOO_OLD]) * len(ask.rows) for ask in asks]
    end = None
    while end is None:
        try:
            asks = steps.steps.send(answers)
        except StopIteration as stop:
            end = stop.value
        else:
            answers = [(await world.chains.apply_step(ask.shard, ask.rows, ())).codes for ask in asks]
    assert (end.codes, end.committed, end.settled) == (bytes([R.OK] * 2), True, True)


async def test_a_decision_that_is_refused_is_no_commit(world: World) -> None:
    """The account of marks is frozen when all holds are placed: the decision's id is used up, by a refusal."""
    assert await world.chain(move(1, A, B, 1), move(2, C, D, 1)) == [R.OK] * 2
    steps = Steps(world, linked([move(3, A, B, 400), move(4, C, D, 300)]))
    await steps.take(1)
    flags = AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED
    assert list(
        await world.host.create_accounts(
            [AccountRow(MARKS, "XXX", int(flags | AccountFlags.FROZEN))], update=True, always=True
        )
    ) == [1]
    decided = await world.chains.apply_step(steps.plan.home, [steps.plan.decision], ())
    assert list(decided.codes) == [R.DEBIT_ACCOUNT_FROZEN]
    for _ in range(3):
        await world.chains.look()
    assert await world.balances() == [999, 1001, 999, 1001, 1000, 1000]
    await world.is_clean()


@pytest.mark.parametrize("currency", ["XXX", "USD"])
async def test_an_abort_needs_no_account_that_somebody_may_open(world: World, currency: str) -> None:
    assert await world.chain(move(8, A, B, 1), move(9, B, A, 1)) == [R.OK] * 2
    steps = Steps(world, linked([move(1, A, B, 400), move(2, C, D, 300)]))
    names = [b"chain-aborted:\0\0", b"chain-refused:\0\0"]  # of home 0
    assert chain_rules._abort(steps.plan.decision.id, 0)[1] in names
    opened = [AccountRow(one, currency, int(AccountFlags.MAY_OVERDRAW)) for one in names]
    assert set(await world.host.create_accounts(opened)) == {1}
    await steps.take(1)
    for _ in range(3):
        await world.chains.look()
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_a_decision_is_kept_while_a_shard_is_asked_by_nobody(world: World) -> None:
    """It has moved to a process that this one does not know of, and may have a mark whose end hangs on the decision."""

    class Elsewhere(NoPeers):
        async def mark_ids(self) -> tuple[set[bytes], set[int]]:
            return set(), known

    known = {2}
    rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
    steps = Steps(world, rows)
    await steps.take(4)
    assert await world.balances() == [990, 1010, 980, 1020, 1000, 1000]

    class Host:
        shard_ids = (0, 1)

        def __getattr__(self, name: str) -> object:
            return getattr(world.host, name)

    chains = Chains(Host(), Elsewhere(), world.clock, grace_s=0.0)  # type: ignore[arg-type]
    assert await chains.look() == 1
    known.add(3)
    assert await chains.look() == 0
    await world.is_clean()


async def test_a_mark_never_stands_for_holds_of_another_chain(world: World) -> None:
    """A leg that was there before (somebody looked for two chains with the same tag) is not behind the mark. What is in its place
    belongs to others."""
    steps = Steps(world, linked([move(1, A, B, 400), move(2, A, C, 300)]))
    await steps.take(1)
    (ask, *_), (mark, *_) = steps.plan.tries, steps.plan.marks
    other = chain_rules.mark_of(transfer_id(9)[:13] + bytes(3), 0, SHARDS)
    rows = [ask.rows[0], ask.rows[2]._replace(id=other, amount_minor=2)]
    assert list((await world.chains.apply_step(0, rows, ())).codes) == [R.OK, R.OK]
    found = {one.id: (one.holds, one.complete) for one in await world.host.chain_marks(0)}
    assert found == {mark.id: (mark.holds, True), other: ((), False)}


async def test_a_committed_chain_with_a_leg_that_is_gone_waits_and_is_reported(world: World) -> None:
    """Only a mistake of the coordinator's own can bring that about: the rest of it stays as it is."""
    waiting: list[chain_rules.ChainMark] = []
    world.chains = Chains(
        world.host, NoPeers(), world.clock, grace_s=0.0, on_blocked=lambda mark, seconds: waiting.append(mark)
    )
    rows = linked([move(1, A, B, 400), move(2, A, B, 300)])
    steps = Steps(world, rows)
    await steps.take(2)  # tried and committed, the settle steps get lost
    mistake = TransferRow(transfer_id(77), ID_NONE, ID_NONE, 0, VOID | int(TransferFlags.CHAIN), transfer_id(1))
    assert list((await world.host.apply_step(0, [mistake])).codes) == [R.OK]
    for _ in range(3):
        world.clock.advance(seconds=100)
        assert await world.chains.look() > 0
    assert {(mark.shard, len(mark.holds), mark.complete) for mark in waiting} == {(0, 1, False)}
    assert list((await world.chains.run(rows, steps.routes))[0]) == [R.IN_FLIGHT] * 2  # and never OK
    (state,) = await world.host.accounts([A])
    assert state is not None
    assert state.held_out == 300


async def test_chains_end_while_the_requests_that_they_belong_to_hold_all_the_room(tmp_path: Path) -> None:
    """What a chain asks for must not wait for the room that its own request has."""
    world = await World(tmp_path).start(rows_in_flight_max=20)
    try:
        await world.open()
        batches = []
        for number in range(12):
            alone = [move(1_000 + 20 * number + n, A2, A, 1) for n in range(6)]
            chain = linked([move(1_018 + 20 * number, A, B, 1), move(1_019 + 20 * number, C, D, 1)])
            batches.append(message([*alone, *chain], settle=2))
        async with asyncio.timeout(30):
            answers = await asyncio.gather(*(world.host.transfer_batch(batch) for batch in batches))
            assert [list(wallet_pb2.TransferBatchResult.FromString(one).failed_rows) for one in answers] == [[]] * 12
            assert await world.balances() == [FUND + 72 - 12, FUND + 12, FUND - 12, FUND + 12, FUND - 72, FUND]
            await world.is_clean()
    finally:
        await world.host.close()


async def test_a_read_that_does_not_answer_leaves_no_chain_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = Chains(world.host, NoPeers(), world.clock, answer_s=0.05)

    async def silent(ids: Sequence[bytes], *, always: bool = False) -> list[None]:
        await asyncio.sleep(3600)
        return []

    monkeypatch.setattr(world.host, "accounts", silent)
    rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
    async with asyncio.timeout(10):
        assert list((await chains.run(rows, [(0, 1), (2, 3)]))[0]) == [R.IN_FLIGHT] * 2


async def test_a_shard_that_is_read_only_fails_no_steps_of_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one turn of the loop: those of a healthy shard are applied, and must not be told that they failed."""
    asked: list[set[bytes]] = []
    real = world.host.native.submit_rows

    class Native:
        def __getattr__(self, name: str) -> object:
            return getattr(native, name)

        def submit_rows(self, ticket: int, rows: Sequence[TransferRow], **options: bool) -> None:
            asked.append({row.debit_id for row in rows})
            real(ticket, rows, **options)

    native = world.host.native
    monkeypatch.setattr(world.host, "_native", Native())
    steps = [(0, move(1, A, A2, 1)), (1, move(2, B, B2, 1)), (0, move(3, A2, A, 1))]
    answers = await asyncio.gather(*(world.host.apply_step(shard, [row]) for shard, row in steps))
    assert [list(answer.codes) for answer in answers] == [[R.OK]] * 3
    assert asked == [{A, A2}, {B}]
    assert [{one.shard for one in answer.positions} for answer in answers] == [{0}, {1}, {0}]


@pytest.mark.parametrize("name", ["chain/marks", "chain/marked", "chain/transit/USD"])
async def test_chains_are_refused_where_somebody_else_has_their_accounts(world: World, name: str) -> None:
    taken: list[list[bytes]] = []
    world.chains = Chains(world.host, NoPeers(), world.clock, answer_s=1.0, on_taken=taken.append)
    world.host.coordinate(world.chains.run)
    foreign = AccountRow(account_id(name), "USD" if "USD" in name else "XXX")
    assert list(await world.host.create_accounts([foreign], always=True)) == [R.OK]  # from before it was reserved
    rows = (move(1, A, B, 10), move(2, C, D, 20))
    for _ in range(2):
        assert await world.chain(*rows) == [R.CROSS_SHARD_UNSUPPORTED] * 2
    assert taken == [[foreign.id]]
    assert await world.balances() == [FUND] * 6
    assert list(await world.host.transfers([move(3, A, B, 1)])) == [R.OK]


async def test_marks_of_a_home_that_is_away_keep_no_others_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs what an answer may take; not one after the other, and not all of them."""
    count = 70
    for number in range(count):
        await Steps(world, linked([move(10 * number, B, A, 1), move(10 * number + 1, A, B, 1)])).take(1)
    await Steps(world, linked([move(5_000, A, C, 10), move(5_001, C, A, 20)])).take(1)
    asked: list[int] = []
    real = world.chains._ask

    async def ask(ask: chain_rules.Ask, *more: object) -> bytes | None:
        asked.append(ask.shard)
        return None if ask.shard == 1 else await real(ask, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(world.chains, "_ask", ask)
    assert await world.chains.look() == 2 * count
    assert asked.count(1) <= 32
    assert await world.chains.look() == 2 * count  # all of them pause
    assert asked.count(1) <= 32
    monkeypatch.undo()
    world.chains._next.clear()
    await world.is_clean()
    assert await world.balances() == [FUND] * 6


@pytest.mark.parametrize("size", [4, 16, 40])
async def test_an_answer_for_which_there_is_no_memory_does_not_stop_the_shard(world: World, size: int) -> None:
    await Steps(world, linked([move(1, A, B, 10), move(2, C, D, 20)])).take(1)
    world.host.native.blob_bytes_max = size
    with pytest.raises(Unavailable):
        await world.host.chain_marks(0)
    with pytest.raises(Unavailable):  # and never what fits of it
        await world.host.cut(0)
    world.host.native.blob_bytes_max = 1 << 30
    assert len(unpack_cut(0, await world.host.cut(0)).links) == SHARDS - 1
    await world.chains.look()
    await world.is_clean()


async def test_the_longest_chain_is_one_and_a_longer_one_is_refused(world: World) -> None:
    rows = [move(n, *((A, B), (C, D), (SOURCE, A), (B, A2))[n % 4], 1) for n in range(chain_rules.LEG_COUNT_MAX + 1)]
    assert await world.chain(*rows) == [R.CROSS_SHARD_UNSUPPORTED] * len(rows)
    assert await world.chain(*rows[1:]) == [R.OK] * chain_rules.LEG_COUNT_MAX
    assert await world.chain(*rows[1:]) == [R.OK] * chain_rules.LEG_COUNT_MAX
    assert await world.balances() == [FUND, FUND, FUND - 256, FUND + 256, FUND + 256, FUND]
    own = [move(5_000 + n, A, B, 1) for n in range(chain_rules.LEG_COUNT_MAX)]  # each has a hold on shard 0
    assert set(await world.host.transfers([move(9_999, SOURCE, A, 100)])) == {R.OK}
    await Steps(world, linked(own)).take(1)
    assert [len(mark.holds) for mark in await world.host.chain_marks(0)] == [chain_rules.LEG_COUNT_MAX]
    await world.is_clean()


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_snapshot_between_two_steps_knows_whose_holds_they_are(tmp_path: Path, count: int) -> None:
    world = await World(tmp_path).start()
    try:
        await world.open()
        rows = linked([move(1, A, B, 400), move(2, C, D, 300)])
        steps = Steps(world, rows)
        await steps.take(count, 1 if count == 3 else None)
        for shard in range(SHARDS):
            await world.host.snapshot(shard)
        await world.host.close()
        await world.start()
        for number, mark in enumerate(steps.plan.marks):
            by_hand = TransferRow(transfer_id(100 + number), ID_NONE, ID_NONE, 0, VOID, mark.holds[0][0])
            assert list(await world.host.transfers([by_hand])) == [R.HOLD_NOT_FOUND]
        for _ in range(3):
            await world.chains.look()
        assert await world.balances() == ([600, 1400, 700, 1300, 1000, 1000] if count > 1 else [FUND] * 6)
        await world.is_clean()
    finally:
        await world.host.close()


RESERVED = ["chain/marks", "chain/marked", "chain/transit/USD", "chain/transit/EUR"]


async def test_callers_cannot_stop_chains_by_the_accounts_that_these_need(world: World) -> None:
    """By filling, draining, freezing or opening them; neither before the first chain nor later."""
    for turn in range(2):
        at = 100 * turn
        refused = R.CROSS_SHARD_UNSUPPORTED
        for number, one in enumerate(map(account_id, RESERVED)):
            base = 1_000 + 10 * (at + number)
            rows = [
                move(base, one, A, 5),
                move(base + 1, A, one, 5),
                move(base + 2, one, MARKED if one == MARKS else MARKS, 5, flags=HOLD),
                move(base + 3, SOURCE, one, 5),
                TransferRow(transfer_id(base + 4), one, ID_NONE, 0, VOID, transfer_id(base + 2)),
            ]
            assert list(await world.host.transfers(rows)) == [refused] * 5
            assert [list(await world.host.transfers([row])) for row in rows] == [[refused]] * 5
            answer = wallet_pb2.TransferBatchResult.FromString(await world.host.transfer_batch(message(rows, settle=2)))
            assert list(answer.failed_results) == [refused] * 5
            calls = [
                wallet_pb2.Transfer(
                    transfer_id=row.id, debit_account_id=row.debit_id, credit_account_id=row.credit_id, amount_minor=5
                )
                for row in rows[:2]
            ]
            call = world.host.transfer_call(wallet_pb2.CreateTransfersRequest(transfers=calls).SerializeToString())
            assert call is not None
            assert [int(one) for one in wallet_pb2.CreateTransfersResponse.FromString(await call).results] == [
                refused
            ] * 2
            for chain in (
                (move(base + 5, A, A2, 1), rows[0]),
                (rows[1], move(base + 6, C, D, 1), move(base + 7, D, C, 1)),
            ):
                assert await world.chain(*chain) == [refused] * len(chain)
            flags = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED | AccountFlags.FROZEN)
            own = AccountRow(account(5_000 + at + number), "USD")
            for update in (False, True):
                specs = [AccountRow(one, "XXX", flags), own]
                assert list(await world.host.create_accounts(specs, update=update)) == [2, 1]  # ID_INVALID
            spec = wallet_pb2.AccountSpec(account_id=one, currency_code="USD")
            raw = wallet_pb2.CreateAccountsRequest(accounts=[spec]).SerializeToString()
            assert await world.host.account_message(raw) is None
        assert await world.chain(move(at, A, B, 10), move(at + 1, C, D, 20)) == [R.OK] * 2
        assert await world.chain(move(at + 2, B, A, 10), move(at + 3, D, C, 20)) == [R.OK] * 2
        mixed = [move(at + 4, A, A2, 1), move(at + 5, MARKS, A, 1), move(at + 6, A2, A, 1)]
        assert list(await world.host.transfers(mixed)) == [R.OK, refused, R.OK]
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_the_transit_account_of_a_currency_that_nobody_listed_is_reserved_too(world: World) -> None:
    people = [on_shard(shard, SHARDS, 40) for shard in range(SHARDS)]
    may = int(AccountFlags.MAY_OVERDRAW)
    assert set(await world.host.create_accounts([AccountRow(one, "QQQ", may) for one in people])) == {1}
    p, q, r, s = people
    assert await world.chain(move(1, p, q, 5), move(2, r, s, 5)) == [R.OK] * 2
    assert list(await world.host.transfers([move(3, transit_account("QQQ"), p, 5)])) == [R.CROSS_SHARD_UNSUPPORTED]


async def test_a_chain_whose_first_id_is_ahead_says_so(world: World) -> None:
    C2 = on_shard(2, SHARDS, 1)  # noqa: N806
    assert list(await world.host.create_accounts([AccountRow(C2, "USD")])) == [1]
    ahead = NOW_MS + 3_600_000
    for rows in (
        (TransferRow(transfer_id(1, ahead), A, B, 5), move(2, C, D, 10)),
        (TransferRow(transfer_id(3, ahead), A, A2, 5), move(4, C, D, 10)),
    ):
        assert await world.chain(*rows) == [R.ID_AHEAD] * 2  # the hold on D has the first row's time as well
    local = (TransferRow(transfer_id(5, ahead), A, A2, 5), move(6, C, C2, 10))
    assert await world.chain(*local) == [R.ID_AHEAD, R.LINKED_FAILED]
    assert [state and state.held_out for state in await world.host.accounts(PEOPLE)] == [0] * 6
    assert await world.balances() == [FUND] * 6
    await world.is_clean()


async def test_holds_on_the_account_of_marks_that_are_of_no_chain_are_reported_once(world: World) -> None:
    told: list[int] = []
    world.chains = Chains(world.host, NoPeers(), world.clock, answer_s=1.0, grace_s=0.0, on_strange=told.append)
    await world.host.create_accounts(chain_rules.accounts_of("USD"), always=True)
    await Steps(world, linked([move(1, A, B, 10), move(2, C, D, 20)])).take(2)
    for _ in range(40):
        await world.chains.look()
    assert told == []
    unflagged = TransferRow(transfer_id(9), MARKS, MARKED, 3, HOLD)
    assert list((await world.host.apply_step(0, [unflagged])).codes) == [R.OK]
    for _ in range(70):
        await world.chains.look()
    assert told == [3]


async def test_a_wrong_step_refuses_no_step_of_another_chain(world: World) -> None:
    rows = linked([move(1, A, B, 10), move(2, C, D, 20)])
    good = next(Steps(world, rows).steps)[0]
    await world.chains.apply_step(0, [move(50, A, A2, 1)], ("USD",))
    wrong = [
        [TransferRow(b"short", A, B, 1)],
        [move(51, A, A2, 1 << 70)],
        [move(52, A, A2, 1, flags=LINKED)],
        [],
    ]
    for at, one in enumerate(wrong):
        answers = await asyncio.gather(
            world.chains.apply_step(0, one, ("USD",)),
            world.chains.apply_step(0, good.rows, ("USD",)),
            world.chains.apply_step(0, [move(60 + at, A, A2, 1)], ("USD",)),
            return_exceptions=True,
        )
        assert isinstance(answers[0], InvalidArgument)
        assert [list(answer.codes) for answer in answers[1:]] == [[R.OK] * len(good.rows), [R.OK]]  # type: ignore[union-attr]
