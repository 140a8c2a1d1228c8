"""A clock that somebody sets does not end holds or make ids too old: what shards write with a time stays so for ever."""

from __future__ import annotations

import time
from pathlib import Path

from host_fixtures import Driver, account, config, transfer_id

from wallet_core.engine.codes import AccountFlags, TransferFlags, TransferResult
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardClock
from wallet_core.shard.port import shard_folder
from wallet_core.snapshot import SnapshotWriter

S = 1_000_000_000
DAY = 86_400 * S
R = TransferResult


def near(clock: ShardClock, expected_ns: int) -> bool:
    return abs(clock.now_ns - expected_ns) < 60 * S


def test_small_steps_are_followed_and_great_ones_are_not() -> None:
    clock = ShardClock()
    now = time.time_ns()
    assert near(clock, now)
    for shift in (1800 * S, 4000 * S, 3500 * S, 7000 * S, 3500 * S):
        clock.shift(shift)
        assert near(clock, now + shift)
        assert clock.held_step_s == 0
    at = now + 3500 * S
    for shift in (3 * DAY, -3 * DAY, 3 * DAY):
        clock.shift(shift)
        assert near(clock, at), "time goes on from before"
        assert round(clock.held_step_s / 10) == round((shift / S - 3500) / 10)
    clock.shift(3600 * S)
    assert near(clock, now + 3600 * S)
    assert clock.held_step_s == 0


def test_a_clock_that_is_set_ahead_by_days_and_back_ends_no_hold(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path), now_ns=0)
    rich, poor = account(1), account(2)
    rows = [AccountRow(rich, "USD", int(AccountFlags.MAY_OVERDRAW)), AccountRow(poor, "USD")]
    assert driver.open_accounts(rows) == [1, 1]
    hold = TransferRow(transfer_id(1, now_ms()), rich, poor, 5, int(TransferFlags.HOLD), bytes(16), 7200)
    assert driver.transfers([hold]) == [R.OK]
    driver.clock.shift(30 * DAY)
    assert driver.transfers([TransferRow(transfer_id(2, now_ms()), rich, poor, 1)]) == [R.OK], "honest ids are let in"
    driver.clock.shift(0)
    post = TransferRow(transfer_id(3, now_ms()), bytes(16), bytes(16), 0, int(TransferFlags.POST), hold.id)
    assert driver.transfers([post]) == [R.OK]
    (figures,) = driver.host.shards()
    assert abs(figures.now_ns - time.time_ns()) < 60 * S
    driver.close()


def test_the_window_of_ids_may_be_changed_though_there_is_a_snapshot(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, id_window_ms=7 * 86_400_000))
    rich, poor = account(1), account(2)
    rows = [AccountRow(rich, "USD", int(AccountFlags.MAY_OVERDRAW)), AccountRow(poor, "USD")]
    assert driver.open_accounts(rows) == [1, 1]
    sent = TransferRow(transfer_id(1), rich, poor, 5)
    assert driver.transfers([sent]) == [R.OK]
    driver.host.image(0, SnapshotWriter(shard_folder(tmp_path, 0) / "snapshots", 0))
    driver.close()
    again = Driver(config(tmp_path, id_window_ms=1000))
    assert again.transfers([sent]) == [R.OK]
    again.clock.set(again.clock.now_ns + 2 * S)
    assert again.transfers([sent]) == [R.ID_TOO_OLD]
    again.close()
    third = Driver(config(tmp_path, id_window_ms=7 * 86_400_000))
    assert third.balances([poor]) == [5]
    third.clock.set(third.clock.now_ns + 2 * S)
    assert third.transfers([sent]) == [R.OK], "what is not forgotten is answered"
    assert third.balances([poor]) == [5]
    third.close()


def now_ms() -> int:
    return time.time_ns() // 1_000_000
