"""Risk: balances with the wrong events beside them; a reader that holds up the events, or waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ducat.wallet.v1 import shard_pb2
from kernel.clock import FixedClock
from kernel.errors import FailedPrecondition, Unavailable
from kernel.ids import account_id
from runtime.feed import AppliedPositions
from tests.unit.wallet_core.service.memory_host import MemoryDirectory, MemoryHost
from wallet_core.adapters.grpc import ShardServicer
from wallet_core.engine.codes import AccountFlags
from wallet_core.service import booked
from wallet_core.service.booked import BookedBalances
from wallet_core.service.port import AccountRow, NamedAccount, TransferRow, slot_of

CLEARING = "psp/sandbox/clearing/USD"
SELLERS = {
    shard: next(f"seller/S{n}/USD" for n in range(1_000) if slot_of(account_id(f"seller/S{n}/USD")) // 2048 == shard)
    for shard in (0, 1)
}


class Events:
    """Applies nothing; can be busy."""

    def __init__(self) -> None:
        self.applied = AppliedPositions()
        self.lock = asyncio.Lock()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        async with self.lock:
            yield


async def wallet(owned: tuple[int, ...] = (0, 1)) -> tuple[MemoryHost, Events, BookedBalances]:
    """Both sellers have 100 of the clearing account, as far as they are here."""
    clock = FixedClock()
    host, directory, events = MemoryHost(clock, owned=owned), MemoryDirectory(), Events()
    flags = AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED
    sellers = [SELLERS[shard] for shard in owned]
    names = [CLEARING, *sellers]
    await directory.add([NamedAccount(account_id(name), name, "USD") for name in names])
    await host.create_accounts([AccountRow(account_id(CLEARING), "USD", flags)])
    await host.create_accounts([AccountRow(account_id(name), "USD") for name in sellers])
    ids = [clock.now_ns() // 10**6 << 80 | 7 << 76 | 2 << 62 | number for number in range(len(sellers))]
    rows = [
        TransferRow(id_.to_bytes(16, "big"), account_id(CLEARING), account_id(name), 100)
        for id_, name in zip(ids, sellers, strict=True)
    ]
    assert set(await host.transfers(rows)) == {1}
    return host, events, BookedBalances(host, directory, events, clock)


async def test_a_process_tells_its_own_accounts_and_its_parts_of_striped_ones() -> None:
    asked = [CLEARING, SELLERS[0], SELLERS[1], "seller/NOBODY/USD", SELLERS[0]]
    held = {}
    for owned in ((0, 1), (0,), (1,)):
        _, events, balances = await wallet(owned)
        for position in (1, 2, 5):
            events.applied.add(position)
        found = await balances.read(asked)
        held[owned] = {name: state.balance for name, state in found.accounts}
        assert found.applied == ((1, 2), (5, 5))
    assert held == {
        (0, 1): {CLEARING: -200, SELLERS[0]: 100, SELLERS[1]: 100},
        (0,): {CLEARING: -100, SELLERS[0]: 100},
        (1,): {CLEARING: -100, SELLERS[1]: 100},
    }


async def test_who_cannot_read_between_two_events_is_told_so_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(booked, "PAUSE_WAIT_S", 0.02)
    monkeypatch.setattr(booked, "PAUSE_S_MAX", 0.02)
    host, events, balances = await wallet()
    async with events.lock:  # a batch that waits for the disk
        with pytest.raises(Unavailable, match="ask again"):
            await balances.read([CLEARING])

    async def stuck(ids: object) -> list[None]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(host, "accounts", stuck)
    with pytest.raises(Unavailable, match="ask again"):
        await balances.read([CLEARING])
    assert not events.lock.locked()


async def test_a_wallet_that_runs_alone_says_that_it_has_nothing_to_compare() -> None:
    host, _, _ = await wallet()
    servicer = ShardServicer(host, None, None, lambda: "")  # type: ignore[arg-type]
    with pytest.raises(FailedPrecondition, match="runs alone"):
        await servicer.ReadBookedBalances(shard_pb2.ReadBookedBalancesRequest(names=["x"]), None)
