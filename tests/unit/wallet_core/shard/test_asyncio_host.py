"""The asyncio face: single transfers share frames, callers do not hurt each other, room is shared in order."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from host_fixtures import NOW_NS, account, config, message, transfer_id

from kernel.errors import FailedPrecondition, InvalidArgument, OutOfRange, Unavailable
from wallet_core.engine.codes import AccountFlags, TransferFlags, TransferResult
from wallet_core.event_log import DiskNearlyFull
from wallet_core.service.port import AccountRow, SnapshotInfo, TransferRow
from wallet_core.shard import HostClosed, ShardClock, ShardHost, WalletHost
from wallet_core.shard import host as host_module

SOURCE = account(1_000_000)
PEOPLE = [account(n) for n in range(10)]


async def opened(folder: Path, **options: object) -> WalletHost:
    host = await WalletHost.open(config(folder, **options), clock=ShardClock(NOW_NS))  # type: ignore[arg-type]
    flags = int(AccountFlags.MAY_OVERDRAW)
    rows = [AccountRow(SOURCE, "USD", flags), *(AccountRow(one, "USD") for one in PEOPLE)]
    assert set(await host.create_accounts(rows)) == {1}
    return host


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[WalletHost]:
    one = await opened(tmp_path)
    yield one
    await one.close()


def give(number: int, amount: int = 1) -> TransferRow:
    return TransferRow(transfer_id(number), SOURCE, PEOPLE[number % 10], amount)


async def test_concurrent_single_transfers_share_a_frame(host: WalletHost) -> None:
    frames = host.native.log(0).frame_count
    codes = await asyncio.gather(*(host.transfers([give(n)]) for n in range(128)))
    assert set(codes) == {b"\x01"}
    assert host.native.log(0).frame_count - frames == 1


async def test_a_wrong_row_hurts_only_its_caller(host: WalletHost) -> None:
    results = await asyncio.gather(
        *(host.transfers([give(n)]) for n in range(5)),
        host.transfers([give(6)._replace(id=b"short")]),
        *(host.transfers([give(n)]) for n in range(10, 15)),
        return_exceptions=True,
    )
    assert [one for one in results if one != b"\x01"] == [results[5]]
    assert isinstance(results[5], InvalidArgument)
    assert results[5].reason == "BATCH_INVALID"
    assert results[5].violations[0].field == "rows[0].id"


async def test_an_open_chain_does_not_reach_into_the_next_callers_rows(host: WalletHost) -> None:
    linked = int(TransferFlags.LINKED)
    first, second = await asyncio.gather(
        host.transfers([give(1), give(2)._replace(flags=linked)]), host.transfers([give(3)])
    )
    assert list(first) == [TransferResult.OK, TransferResult.CHAIN_OPEN]
    assert list(second) == [TransferResult.OK]


async def test_a_cancelled_caller_does_not_stop_its_transfer(host: WalletHost) -> None:
    host.native.log(0).hold_sync(True)
    task = asyncio.create_task(host.transfers([give(1, 7)]))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    host.native.log(0).hold_sync(False)
    states = await host.accounts([PEOPLE[1]])
    assert states[0] is not None
    assert states[0].balance == 7


async def test_back_pressure_lets_everyone_through_in_the_end(tmp_path: Path) -> None:
    host = await opened(tmp_path, rows_in_flight_max=50)
    most = 0

    async def one(number: int) -> bytes:
        nonlocal most
        codes = await host.transfers([give(number * 100 + n) for n in range(20)])
        most = max(most, host.native.rows_in_flight)
        return codes

    codes = await asyncio.gather(*(one(n) for n in range(60)))
    assert set(codes) == {b"\x01" * 20}
    assert most <= 50
    big = await asyncio.gather(
        *(host.transfer_batch(message([give(10_000 + n * 500 + i) for i in range(300)])) for n in range(5))
    )
    assert len(big) == 5
    await host.close()


async def test_a_malformed_message_is_an_invalid_argument(host: WalletHost) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await host.transfer_batch(b"\x12\x05abcde")
    assert refused.value.reason == "BATCH_INVALID"
    assert refused.value.violations[0].field == "ids"


async def test_a_message_too_large_for_any_batch_does_not_wait_for_its_turn(host: WalletHost) -> None:
    """32 of them are read ahead on every stream, each of up to 8 MiB."""
    with pytest.raises(InvalidArgument, match="1048577 bytes, at most 1048576"):
        await host.transfer_batch(
            message([give(1)]) + b"\x7a\xfd\xff\x3f" + bytes(1_048_577 - len(message([give(1)])) - 4)
        )


async def test_a_poisoned_log_fails_everyone_and_is_reported_once(tmp_path: Path) -> None:
    failures: list[Exception] = []
    host = await opened(tmp_path)
    host.on_failure = failures.append
    host.native.log(0).inject("fdatasync", 1, errno.EIO)
    results = await asyncio.gather(*(host.transfers([give(n)]) for n in range(10)), return_exceptions=True)
    assert all(isinstance(one, Unavailable) for one in results)
    with pytest.raises(Unavailable, match="fdatasync failed"):
        await host.transfers([give(99)])
    assert len(failures) == 1
    await host.close()


async def test_a_full_disk_is_unavailable_read_only(tmp_path: Path) -> None:
    host = await opened(tmp_path, segment_bytes=65536)
    log = host.native.log(0)
    log.inject("fallocate", 1, errno.ENOSPC)
    with pytest.raises(Unavailable) as refused:  # noqa: PT012 - which batch meets the end depends on the record size
        for n in range(100):
            await host.transfers([give(n * 100 + i) for i in range(40)])
            log.wait_prepared()
    assert refused.value.reason == "SHARD_READ_ONLY"
    assert (await host.accounts([SOURCE]))[0] is not None
    await host.close()


async def test_events_are_read_from_any_number_on(host: WalletHost) -> None:
    await host.transfers([give(n) for n in range(100)])
    await host.transfers([give(n) for n in range(100, 105)])
    durable = host.durable_sequence(0)
    assert host.first_sequence(0) == 1
    pages = host.read_events(0, 1, 10**6)
    assert sum(page.count for page in pages) == durable
    assert [page.first_sequence for page in pages[1:]] == [page.last_sequence + 1 for page in pages[:-1]]
    part = host.read_events(0, 50, 10)
    assert part[0].first_sequence == 50
    assert part[0].body == pages[1].body[(50 - pages[1].first_sequence) * 48 :]
    assert host.read_events(0, durable + 1, 10) == []
    await host.transfers([give(200)])
    assert [page.count for page in host.read_events(0, durable + 1, 10)] == [1]
    assert host.account_keys(0, [1]) == [(PEOPLE[0], "USD")]
    with pytest.raises(LookupError):
        host.account_keys(0, [10_000])


async def test_waiting_for_a_sequence_number(host: WalletHost) -> None:
    durable = host.durable_sequence(0)
    assert await host.wait_durable(0, durable, 0.01) == durable
    waiter = asyncio.create_task(host.wait_durable(0, durable, 5))
    await asyncio.sleep(0.01)
    await host.transfers([give(1)])
    assert await waiter == durable + 1


async def test_reading_below_retention_is_out_of_range(tmp_path: Path) -> None:
    host = await opened(tmp_path, segment_bytes=65536)
    for turn in range(3):
        for n in range(20):
            await host.transfers([give(10_000 * turn + n * 100 + i) for i in range(100)])
        await host.snapshot(0)
    assert len(host.snapshots(0)) == 2
    assert host.first_sequence(0) > 1
    with pytest.raises(OutOfRange):
        host.read_events(0, 1, 10)
    await host.close()
    again = await WalletHost.open(config(tmp_path, segment_bytes=65536), clock=ShardClock(NOW_NS))
    assert again.shards()[0].snapshot_sequence == host.shards()[0].sequence
    await again.close()


async def test_closing_gives_up_a_snapshot_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wallet_core.snapshot import SnapshotWriter

    host = await opened(tmp_path)
    began, close = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    begin = SnapshotWriter.begin

    def slow(self: SnapshotWriter, *arguments: Any) -> None:
        begin(self, *arguments)
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(close.wait(), loop).result(10)

    monkeypatch.setattr(SnapshotWriter, "begin", slow)
    taking = asyncio.create_task(host.snapshot(0))
    await began.wait()
    closing = asyncio.create_task(host.close())
    await asyncio.sleep(0.01)
    close.set()
    with pytest.raises(HostClosed):
        await taking
    await closing
    assert list((tmp_path / "shard-0000" / "snapshots").iterdir()) == []


async def test_accounts_of_other_processes_are_a_failed_precondition(tmp_path: Path) -> None:
    host = await WalletHost.open(config(tmp_path, 4, shard_ids=(0,)), clock=ShardClock(NOW_NS))
    with pytest.raises(FailedPrecondition) as refused:
        await host.accounts(PEOPLE)
    assert refused.value.reason == "WRONG_SHARD"
    await host.close()


async def test_after_closing_everything_is_unavailable(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    await host.close()
    with pytest.raises(Unavailable):
        await host.transfers([give(1)])


async def test_closing_answers_what_was_taken_and_refuses_what_comes_later(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    host.native.log(0).hold_sync(True)
    under_way = asyncio.create_task(host.transfer_batch(message([give(1)])))
    gathered = asyncio.create_task(host.transfers([give(2)]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(host.close())
    await asyncio.sleep(0)
    late = await asyncio.gather(host.transfers([give(3)]), host.transfers([give(4)]), return_exceptions=True)
    alone = await asyncio.gather(host.transfers([give(5)]), return_exceptions=True)
    assert [type(one) for one in [*late, *alone]] == [Unavailable] * 3
    assert not under_way.done()
    assert not gathered.done()
    host.native.log(0).hold_sync(False)
    async with asyncio.timeout(5):
        assert await under_way
        assert await gathered == b"\x01"
        await closing


async def until(reached: Callable[[], object], what: str) -> None:
    for _ in range(1_000):
        if reached():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never {what}")


async def test_snapshots_are_taken_by_themselves_and_the_log_stays_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_SNAPSHOT_LOOK_S", 0.01)
    events = 3_000  # 144 kB of records, in segments of 64 KiB
    host = await opened(tmp_path, shard_count=2, segment_bytes=65536, snapshot_events=events)
    running: list[int] = []
    together: list[int] = []
    write = host._write_snapshot

    def watched(shard: int) -> SnapshotInfo:
        running.append(shard)
        together.append(len(running))
        taken = write(shard)
        running.remove(shard)
        return taken

    monkeypatch.setattr(host, "_write_snapshot", watched)
    at = 0
    for turn in range(4):
        before = {one.shard: one for one in host.shards()}
        for _ in range(8):
            assert set(await host.transfers([give(at + n) for n in range(1_000)])) == {1}
            at += 1_000
        await until(
            lambda before=before: all(
                one.snapshot_sequence > before[one.shard].snapshot_sequence
                and one.durable_sequence - one.snapshot_sequence < events
                for one in host.shards()
            ),
            f"a snapshot of each shard in turn {turn}",
        )
    assert set(together) == {1}
    for shard in (0, 1):
        newest, older = host.snapshots(shard)
        first = host.first_sequence(shard)
        assert 1 < first <= older.sequence + 1  # cut, and still there from the second newest on
        assert newest.sequence - first < 16_000
    figures = {one.shard: (one.snapshot_sequence, one.digest) for one in host.shards()}
    await host.close()
    again = await opened(tmp_path, shard_count=2, segment_bytes=65536, snapshot_events=events)
    assert {one.shard: (one.snapshot_sequence, one.digest) for one in again.shards()} == figures
    await again.close()


async def test_under_load_a_snapshot_waits_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_SNAPSHOT_LOOK_S", 0.01)
    host = await opened(tmp_path, snapshot_events=100)
    busy = Busy(host._native)
    monkeypatch.setattr(host, "_native", busy)
    assert set(await host.transfers([give(n) for n in range(300)])) == {1}
    looks = busy.looks
    await until(lambda: busy.looks > looks + 5, "looked at")
    assert host.shards()[0].snapshot_sequence == 0
    assert set(await host.transfers([give(n) for n in range(300, 400)])) == {1}
    await until(lambda: host.shards()[0].snapshot_sequence >= 400, "taken, however busy")
    monkeypatch.setattr(host, "_native", busy._native)
    await host.close()


class Busy:
    """A native host that always has rows under way."""

    def __init__(self, native: ShardHost) -> None:
        self._native = native
        self.looks = 0

    @property
    def rows_in_flight(self) -> int:
        self.looks += 1
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


async def test_a_snapshot_that_fails_is_told_and_hurts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_SNAPSHOT_LOOK_S", 0.01)
    monkeypatch.setattr(host_module, "_SNAPSHOT_RETRY_S", 0.02)
    host = await opened(tmp_path, snapshot_events=20)  # opening the accounts makes 11
    told: list[int] = []
    host.on_snapshot_failure = lambda shard, error: told.append(shard)
    write, full = host._write_snapshot, [DiskNearlyFull("there", 0, 1)] * 2

    def fail_at_first(shard: int) -> SnapshotInfo:
        if full:
            raise full.pop()
        return write(shard)

    monkeypatch.setattr(host, "_write_snapshot", fail_at_first)
    assert set(await host.transfers([give(n) for n in range(20)])) == {1}
    await until(lambda: host.shards()[0].snapshot_sequence, "tried again")
    assert told == [0, 0]
    await host.close()


async def test_no_snapshot_is_taken_unasked_where_that_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_SNAPSHOT_LOOK_S", 0.001)
    host = await opened(tmp_path, snapshot_events=0)
    assert set(await host.transfers([give(n) for n in range(20)])) == {1}
    assert host._snapshots_task is None
    await host.close()


async def test_whoever_waits_for_events_hears_of_a_failure(tmp_path: Path) -> None:
    """A follower that was told "nothing new" at once, again and again, held the event loop: the process never stopped."""
    host = await opened(tmp_path)
    durable = host.durable_sequence(0)
    waiter = asyncio.create_task(host.wait_durable(0, durable, 30))
    await asyncio.sleep(0.01)
    host.native.log(0).inject("fdatasync", 1, errno.EIO)
    with pytest.raises(Unavailable):
        await host.transfers([give(1)])
    with pytest.raises(Unavailable, match="fdatasync failed"):
        await asyncio.wait_for(waiter, 5)
    with pytest.raises(Unavailable, match="fdatasync failed"):
        await host.wait_durable(0, durable, 30)
    await host.close()


async def test_a_reader_that_retention_overtook_is_told_so(tmp_path: Path) -> None:
    """It got no events, though there were some, for ever."""
    host = await opened(tmp_path, segment_bytes=65536)
    for turn in range(3):
        for n in range(20):
            await host.transfers([give(10_000 * turn + n * 100 + i) for i in range(100)])
        if turn == 0:
            position = host.read_events(0, 1, 10)[-1].last_sequence + 1
        await host.snapshot(0)
    assert host.first_sequence(0) > position
    with pytest.raises(OutOfRange):  # noqa: PT012 - the segment that it has open can still be read
        while position <= host.durable_sequence(0):
            pages = host.read_events(0, position, 1000)
            assert pages, "no events and no word"
            position = pages[-1].last_sequence + 1
    await host.close()
