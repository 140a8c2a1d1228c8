"""Nothing is shown before it is durable; after a failure nothing is shown at all; a restart finds what was acknowledged."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from host_fixtures import NOW_NS, SEGMENT, Driver, account, config, message, on_shard, transfer_id

from wallet_core.engine.codes import TransferFlags, TransferResult
from wallet_core.event_log import DiskNearlyFull, LogLocked, LogPoisoned, read_frames
from wallet_core.service.port import TransferRow
from wallet_core.shard import HostClosed, open_host
from wallet_core.shard.port import shard_folder

SOURCE = account(1_000_000)


def rows(count: int, first: int = 0) -> list[TransferRow]:
    return [TransferRow(transfer_id(first + n), account(n % 10), account((n + 1) % 10), 1) for n in range(count)]


def opened(folder: Path, **options: object) -> Driver:
    driver = Driver(config(folder, **options))
    if driver.host.durable_sequence(0) == 0:
        driver.fund([account(n) for n in range(10)], 1000, SOURCE)
    return driver


def test_results_and_reads_wait_for_the_sync(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    durable = driver.host.durable_sequence(0)
    driver.host.log(0).hold_sync(True)
    sent = driver.submit(rows(5))
    again = driver.submit(rows(5))  # the same ids: the result is known, but not durable yet
    driver.ticket += 1
    read = driver.ticket
    driver.host.submit_read(read, [account(0)])
    driver.take(100)
    assert driver.answers == {}
    assert driver.host.durable_sequence(0) == durable
    driver.host.log(0).hold_sync(False)
    assert list(driver.wait(sent).codes) == [1] * 5
    assert driver.wait(again).replayed_count == 5
    assert driver.wait(read).accounts[0].balance == 999
    assert driver.host.durable_sequence(0) == durable + 5
    driver.close()


def test_work_goes_on_while_the_disk_is_busy_and_shares_one_sync(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    log = driver.host.log(0)
    syncs = log.sync_count
    log.hold_sync(True)
    tickets = [driver.submit(rows(1, n)) for n in range(50)]
    while driver.host.shards()[0].queued_count:
        pass
    log.hold_sync(False)
    for ticket in tickets:
        assert list(driver.wait(ticket).codes) == [1]
    assert log.sync_count - syncs <= 3
    driver.close()


@pytest.mark.parametrize(
    ("call", "error", "short"), [("fdatasync", errno.EIO, 0), ("write", errno.EIO, 0), ("write", 0, 512)]
)
def test_a_failed_sync_or_write_acknowledges_nothing_more(tmp_path: Path, call: str, error: int, short: int) -> None:
    driver = opened(tmp_path)
    assert driver.transfers(rows(3)) == [1, 1, 1]
    durable = driver.host.durable_sequence(0)
    driver.host.log(0).inject(call, 1, error, short)  # type: ignore[arg-type]
    lost = driver.submit(rows(3, 100))
    with pytest.raises(LogPoisoned):
        driver.wait(lost)
    assert driver.host.failed
    assert driver.host.shards()[0].state == "poisoned"
    assert driver.host.durable_sequence(0) == durable
    with pytest.raises(HostClosed):
        driver.submit(rows(1, 200))
    driver.close()
    again = Driver(config(tmp_path))
    found = again.transfers(rows(3))
    assert found == [1, 1, 1]
    assert again.host.durable_sequence(0) in (durable, durable + 3)
    again.close()


def test_a_nearly_full_disk_refuses_writes_serves_reads_and_recovers(tmp_path: Path) -> None:
    driver = opened(tmp_path, segment_bytes=65536)
    log = driver.host.log(0)
    log.inject("fallocate", 1, errno.ENOSPC)
    refused = None
    accepted = 0
    for n in range(60):
        result = driver.wait(driver.submit(rows(40, 1000 * (n + 1))))
        log.wait_prepared()
        if isinstance(result, DiskNearlyFull):
            refused = 1000 * (n + 1)
            break
        accepted += 1
    assert refused is not None
    assert accepted > 10
    assert driver.host.shards()[0].state == "read-only"
    assert driver.balances([account(0)]) != [None]
    assert isinstance(driver.send(message(rows(2, 900))), DiskNearlyFull)
    log.inject("fallocate", 0)
    log.recheck_space()
    log.wait_prepared()
    assert set(driver.transfers(rows(40, refused))) == {1}
    assert driver.host.shards()[0].state == "serving"
    driver.close()


def test_one_full_disk_of_several_refuses_its_own_rows_only_and_says_which(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, 2, segment_bytes=65536))
    full, fine = [on_shard(0, 2, n) for n in range(2)], [on_shard(1, 2, n) for n in range(2)]
    driver.fund([*full, *fine], 100_000, SOURCE)
    known = TransferRow(transfer_id(500), *full, 7)
    assert driver.transfers([known]) == [1]
    log = driver.host.log(0)
    log.inject("fallocate", 1, errno.ENOSPC)
    for n in range(60):
        filling = [TransferRow(transfer_id(1000 * (n + 1) + i), *full, 1) for i in range(40)]
        result = driver.wait(driver.submit(filling))
        log.wait_prepared()
        if isinstance(result, DiskNearlyFull):
            break
    assert [one.state for one in driver.host.shards()] == ["read-only", "serving"]
    before = driver.balances([*full, *fine])
    mixed = [TransferRow(transfer_id(n), *(full if n % 3 == 0 else fine), 1) for n in range(6)]
    later = TransferResult.TOO_MANY_PENDING
    assert driver.transfers(mixed) == [later, 1, 1, later, 1, 1]
    after = [*before[:2], before[2] - 4, before[3] + 4]  # type: ignore[operator]
    assert driver.balances([*full, *fine]) == after, "what the result says, no more and no less"
    assert driver.transfers(mixed) == [later, 1, 1, later, 1, 1]
    assert isinstance(driver.send(message(mixed[::3])), DiskNearlyFull), "of which nothing was applied"
    again = [known, known._replace(amount_minor=8), mixed[0], mixed[1]]
    assert driver.transfers(again) == [1, TransferResult.ID_REUSED, later, 1], (
        "what was applied before is told, not denied"
    )
    assert driver.balances([*full, *fine]) == after
    log.inject("fallocate", 0)
    log.recheck_space()
    log.wait_prepared()
    assert driver.transfers(mixed) == [1] * 6
    assert driver.balances([*full, *fine]) == [after[0] - 2, after[1] + 2, *after[2:]]  # type: ignore[operator]
    driver.close()


def test_a_restart_gives_the_same_state_and_remembers_results(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    sent = rows(500)
    sent[7] = sent[7]._replace(amount_minor=10**9)
    before = driver.transfers(sent)
    assert before[7] == TransferResult.INSUFFICIENT_FUNDS
    digests, balances = driver.digests(), driver.balances([account(n) for n in range(10)])
    driver.close()
    again = Driver(config(tmp_path))
    assert again.digests() == digests
    assert again.balances([account(n) for n in range(10)]) == balances
    result = again.wait(again.submit(sent))
    assert (list(result.codes), result.replayed_count) == (before, 500)
    assert again.host.check_digests() == {0: True}
    assert again.host.shards()[0].epoch == 2
    again.close()


def test_a_second_host_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    with pytest.raises(LogLocked):
        open_host(config(tmp_path))
    driver.close()
    open_host(config(tmp_path)).close()


def test_frames_carry_the_clock_which_never_runs_backwards(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    driver.clock.set(NOW_NS + 5_000_000_000)
    driver.transfers(rows(1))
    driver.clock.set(NOW_NS + 1_000_000_000)
    driver.transfers(rows(1, 10))
    driver.clock.set(NOW_NS + 6_000_000_000)
    driver.transfers(rows(1, 20))
    driver.close()
    times = [frame.timestamp_ns - NOW_NS for frame in read_frames(shard_folder(tmp_path, 0) / "log", 0)]
    assert times[-3:] == [5_000_000_000, 5_000_000_000, 6_000_000_000]


def test_holds_expire_by_the_clock_without_any_traffic(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    hold = TransferRow(transfer_id(1), account(0), account(1), 300, int(TransferFlags.HOLD), bytes(16), 10)
    assert driver.transfers([hold]) == [1]
    durable = driver.host.durable_sequence(0)
    driver.clock.set(NOW_NS + 11_000_000_000)
    driver.host.tick()
    for _ in range(1000):
        if driver.host.durable_sequence(0) > durable:
            break
        driver.take(5)
    assert driver.host.durable_sequence(0) == durable + 1
    post = TransferRow(transfer_id(2), bytes(16), bytes(16), 0, int(TransferFlags.POST), hold.id)
    assert driver.transfers([post]) == [TransferResult.HOLD_EXPIRED]
    driver.close()


def test_closing_drains_what_was_submitted(tmp_path: Path) -> None:
    driver = opened(tmp_path)
    tickets = [driver.submit(rows(1, n)) for n in range(200)]
    driver.close()
    driver.take(0)
    assert all(list(driver.answers[ticket].codes) == [1] for ticket in tickets)
    again = Driver(config(tmp_path))
    assert again.wait(again.submit(rows(1, 199))).replayed_count == 1
    again.close()


def test_segments_roll_under_the_host(tmp_path: Path) -> None:
    driver = opened(tmp_path, segment_bytes=65536)
    for n in range(60):
        assert set(driver.transfers(rows(100, 1000 * n))) == {1}
    digests = driver.digests()
    driver.close()
    assert len(list((shard_folder(tmp_path, 0) / "log").glob("*.seg"))) > 3
    again = Driver(config(tmp_path, segment_bytes=SEGMENT))
    assert again.digests() == digests
    again.close()
