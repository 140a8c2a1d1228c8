"""A transfer id is known on one shard only, so the same transfer must go to the same shard for ever: whatever was opened
since, whatever came between, whatever was restarted. Where it does not, money moves twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from host_fixtures import NOW_NS, Driver, account, config, message, on_shard, transfer_id

from wallet_core.engine.codes import AccountFlags, AccountResult, TransferFlags, TransferResult
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardClock, WalletHost
from wallet_core.shard.port import HostClosed

SHARDS = 2
STRIPED = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
HOLD, POST, VOID = int(TransferFlags.HOLD), int(TransferFlags.POST), int(TransferFlags.VOID)
SOURCE = account(1_000_000)


def test_a_plain_account_stays_plain_though_somebody_asked_to_stripe_it(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, SHARDS))
    plain, other = on_shard(0, SHARDS), on_shard(1, SHARDS)
    driver.fund([plain, other], 100, SOURCE)
    assert driver.open_accounts([AccountRow(plain, "USD", STRIPED)]) == [AccountResult.ALREADY_EXISTS]
    rows = [TransferRow(transfer_id(1), plain, other, 60), TransferRow(transfer_id(2), plain, other, 60)]
    assert driver.transfers(rows) == [TransferResult.OK, TransferResult.INSUFFICIENT_FUNDS]
    driver.close()
    again = Driver(config(tmp_path, SHARDS))
    assert again.transfers(rows) == [TransferResult.OK, TransferResult.INSUFFICIENT_FUNDS]
    assert again.transfers([TransferRow(transfer_id(3), plain, other, 60)]) == [TransferResult.INSUFFICIENT_FUNDS]
    assert again.balances([plain, other]) == [40, 160]
    again.close()


async def test_a_transfer_right_behind_the_opening_of_its_striped_account_applies_once(tmp_path: Path) -> None:
    host = await WalletHost.open(config(tmp_path, SHARDS), clock=ShardClock(NOW_NS))
    striped, seller = on_shard(0, SHARDS), on_shard(1, SHARDS)
    assert set(await host.create_accounts([AccountRow(seller, "USD")])) == {1}
    row = TransferRow(transfer_id(1), striped, seller, 5)
    opening = asyncio.create_task(host.create_accounts([AccountRow(striped, "USD", STRIPED)]))
    await asyncio.sleep(0)
    first, _ = await asyncio.gather(host.transfers([row]), opening)
    assert list(await host.transfers([row])) == list(first) == [TransferResult.OK]
    (state,) = await host.accounts([seller])
    assert state is not None
    assert state.balance == 5
    await host.close()


async def test_a_batch_that_looks_for_its_hold_beside_the_opening_of_a_striped_account_applies_once(
    tmp_path: Path,
) -> None:
    host = await WalletHost.open(config(tmp_path, SHARDS), clock=ShardClock(NOW_NS))
    seller, striped = on_shard(0, SHARDS), on_shard(1, SHARDS)
    assert set(await host.create_accounts([AccountRow(seller, "USD")])) == {1}
    rows = [  # where the hold is must be asked first: the batch is routed a turn later than it was submitted
        TransferRow(transfer_id(1), bytes(16), bytes(16), 0, VOID, transfer_id(99)),
        TransferRow(transfer_id(2), striped, seller, 700),
    ]
    before = asyncio.create_task(host.transfer_batch(message(rows)))
    await asyncio.sleep(0)
    assert list(await host.create_accounts([AccountRow(striped, "USD", STRIPED)])) == [AccountResult.OK]
    assert await host.transfer_batch(message(rows))
    assert await before
    found = await host.accounts([seller, striped])
    assert [state and state.balance for state in found] == [700, -700]
    await host.close()


def test_what_was_located_is_answered_when_the_host_stops_before_it_is_routed(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, SHARDS))
    driver.host.submit_rows(1, [TransferRow(transfer_id(1), bytes(16), bytes(16), 0, VOID, transfer_id(99))])
    driver.host.close()  # the shards have looked for the hold; nobody took their answer
    driver.take()
    assert isinstance(driver.answers[1], HostClosed)
    assert driver.host.rows_in_flight == 0


@pytest.mark.parametrize("named", ["debit", "credit"])
def test_a_post_that_names_one_of_its_accounts_finds_its_hold(tmp_path: Path, named: str) -> None:
    driver = Driver(config(tmp_path, SHARDS))
    people = [on_shard(shard, SHARDS, n) for shard in range(SHARDS) for n in range(2)]
    driver.fund(people, 100, SOURCE)
    holds = [TransferRow(transfer_id(n), one, SOURCE, 100, HOLD) for n, one in enumerate(people)]
    assert set(driver.transfers(holds)) == {1}
    none = bytes(16)
    posts = [
        TransferRow(
            transfer_id(100 + n),
            hold.debit_id if named == "debit" else none,
            hold.credit_id if named == "credit" else none,
            40,
            POST,
            hold.id,
        )
        for n, hold in enumerate(holds)
    ]
    assert set(driver.transfers(posts)) == {1}
    assert set(driver.transfers(posts)) == {1}
    assert set(driver.balances(people)) == {60}
    driver.close()


def test_a_hold_older_than_the_memory_for_ids_can_still_be_ended(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, SHARDS, generation_ids=16, id_count_max=32))
    people = [on_shard(shard, SHARDS) for shard in range(SHARDS)]
    driver.fund(people, 10_000, SOURCE)
    holds = [TransferRow(transfer_id(n), one, SOURCE, 100, HOLD) for n, one in enumerate(people)]
    assert set(driver.transfers(holds)) == {1}
    for n in range(100):
        rows = [
            TransferRow(transfer_id(1000 + 2 * n + s, NOW_NS // 10**6 + 1 + n), one, SOURCE, 1)
            for s, one in enumerate(people)
        ]
        assert set(driver.transfers(rows)) == {1}
    later = NOW_NS // 10**6 + 200
    ends = [
        TransferRow(transfer_id(9000 + n, later), bytes(16), bytes(16), 0, VOID, hold.id)
        for n, hold in enumerate(holds)
    ]
    assert set(driver.transfers(ends)) == {1}
    assert set(driver.transfers(ends)) == {1}
    assert [one.hold_count for one in driver.host.shards()] == [0] * SHARDS
    driver.close()
