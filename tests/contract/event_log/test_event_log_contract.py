"""Every backend of the event log: what was acknowledged is there, in order, once, for one owner at a time."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from tests.contract.event_log.conftest import Harness
from tests.unit.wallet_core.shard.host_fixtures import Driver, account, transfer_id
from wallet_core.engine.codes import EventKind
from wallet_core.event_log import FileLog, LogDamaged, LogFenced, LogLocked
from wallet_core.service.port import TransferRow
from wallet_core.shard import open_host, rebuild
from wallet_core.snapshot import SnapshotWriter

SOURCE = account(0)
PEOPLE = [account(n) for n in range(1, 9)]


def append(log: FileLog, count: int = 10) -> None:
    first = log.next_sequence
    body = hashlib.sha256(first.to_bytes(8, "big")).digest()[:16] * 3 * count
    log.append(first, count, 1_800_000_000_000_000_000 + first * 1_000_000, bytes(16), body)


def pay(driver: Driver, first: int, count: int = 50) -> None:
    rows = [TransferRow(transfer_id(first + n), SOURCE, PEOPLE[n % 8], 1 + n) for n in range(count)]
    assert set(driver.transfers(rows)) == {1}


def test_what_was_synced_is_read_back_in_order_and_goes_on_after_a_restart(harness: Harness) -> None:
    log = harness.open("a")
    for _ in range(3):
        append(log)
        append(log, 7)
        log.sync()
    assert log.durable_sequence == 51
    append(log)  # never synced: not promised
    log.close()
    log = harness.open("a")
    assert log.next_sequence == 52
    append(log)
    log.sync()
    log.close()
    frames = harness.durable("a")
    assert [(frame.first_sequence, frame.count) for frame in frames] == [
        *((1, 10), (11, 7), (18, 10), (28, 7), (35, 10), (45, 7)),
        (52, 10),
    ]
    for before, frame in itertools.pairwise(frames):
        assert frame.previous_hash == before.hash
        assert frame.epoch >= before.epoch
    assert frames[-1].epoch > frames[0].epoch


def test_a_group_of_many_frames_over_the_end_of_a_segment(harness: Harness) -> None:
    log = harness.open("a")
    for _ in range(80):
        append(log, 100)  # 384 KiB in segments of 256
    log.sync()
    log.close()
    assert [frame.first_sequence for frame in harness.durable("a")] == list(range(1, 8001, 100))
    assert len(list(harness.log_folder("a").glob("*.seg"))) == 2


def test_two_owners_never_both_append(harness: Harness) -> None:
    first = harness.open("a")
    append(first)
    first.sync()
    try:
        second = harness.open("a" if harness.name == "file" else "b")
    except LogLocked:
        append(first)  # the first stays the owner
        first.sync()
        first.close()
        assert harness.durable("a")[-1].last_sequence == 20
        return
    append(first)  # the first does not know yet
    with pytest.raises(LogFenced):
        first.sync()
    with pytest.raises(LogFenced):  # and never again
        append(first)
    assert first.durable_sequence == 10
    append(second, 5)
    second.sync()
    first.close()
    second.close()
    assert [frame.count for frame in harness.durable("b")] == [10, 5]


@pytest.mark.parametrize("how", ["flipped", "missing", "repeated"])
def test_damage_at_the_last_durable_frame_is_refused_by_name(harness: Harness, how: str) -> None:
    log = harness.open("a")
    for _ in range(4):
        append(log)
        log.sync()
    log.close()
    place, offset = harness.damage("a", how)
    before = {path: path.read_bytes() for path in harness.log_folder("a").iterdir() if path.suffix == ".seg"}
    with pytest.raises(LogDamaged) as refused:
        harness.open("a")
    assert place in str(refused.value)
    assert refused.value.offset == offset, str(refused.value)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("snapshots", [True, False])
def test_another_node_takes_over_and_has_the_same_state(harness: Harness, snapshots: bool) -> None:
    driver = Driver(harness.config("a", 2))
    driver.fund(PEOPLE, 1000, SOURCE)
    pay(driver, 1)
    if snapshots:
        for shard in (0, 1):
            driver.host.image(shard, SnapshotWriter(harness.log_folder("a", shard).parent / "snapshots", shard))
    pay(driver, 1000)
    expected, balances = driver.digests(), driver.balances(PEOPLE)
    driver.close()

    harness.carry("a", "b", snapshots=snapshots)
    driver = Driver(harness.config("b", 2))
    assert driver.digests() == expected
    assert driver.balances(PEOPLE) == balances
    assert [one.snapshot_sequence > 0 for one in driver.host.shards()] == [snapshots] * 2
    pay(driver, 1)  # the ids are remembered too: nothing moves twice
    assert driver.digests() == expected
    pay(driver, 2000)
    expected = driver.digests()
    driver.close()
    for shard in (0, 1):
        engine, _ = rebuild(harness.config("b", 2), shard)
        assert engine.state_digest() == expected[shard]


@pytest.mark.parametrize("shard_count", [1, 2])
def test_kill_and_restore_here_and_elsewhere(harness: Harness, shard_count: int) -> None:
    sent, acknowledged = harness.run_and_kill("a", shard_count, 0.4)
    assert acknowledged
    expected = {}
    for node in ("a", "b"):
        if node == "b":
            harness.carry("a", "b", snapshots=False)
        host = open_host(harness.config(node, shard_count))
        digests = {one.shard: one.digest for one in host.shards()}
        expected = expected or digests
        assert digests == expected, "the node that takes over has another state"
        host.close()
    found = [
        frame.body[at : at + 16].hex()
        for shard in range(shard_count)
        for frame in harness.durable("b", shard)
        for at in range(0, len(frame.body), 48)
        if frame.body[at + 46] == EventKind.MONEY_MOVED
    ]
    assert len(found) == len(set(found)), "a transfer was applied twice"
    assert set(acknowledged) <= set(found), f"{len(set(acknowledged) - set(found))} acknowledged transfers were lost"
    assert set(found) <= set(sent), "transfers were recovered that nobody sent"
