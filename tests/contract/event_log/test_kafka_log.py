"""What only a log beyond the machine can meet: brokers that go away, an owner that does not know it was replaced, a local copy and a
partition that differ."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import KafkaException

from tests.contract.event_log.conftest import START, KafkaHarness
from tests.contract.event_log.test_event_log_contract import PEOPLE, SOURCE, append, pay
from tests.kafka_broker import KafkaBroker
from tests.unit.wallet_core.shard.host_fixtures import Driver, transfer_id
from wallet_core.event_log import (
    EventLogError,
    LogFenced,
    LogGap,
    LogNotCommitted,
    StoreDamaged,
    StoreUnusable,
    pack_frame,
    read_frames,
)
from wallet_core.event_log.kafka import KafkaFrames, KafkaPartition, ensure_topic, fetch_missing
from wallet_core.service.port import TransferRow
from wallet_core.shard import WalletHost, open_host
from wallet_core.snapshot import SnapshotWriter

pytestmark = pytest.mark.kafka


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def test_a_fenced_owner_acknowledges_nothing_more(kafka_harness: KafkaHarness) -> None:
    old = Driver(kafka_harness.config("a"))
    old.fund(PEOPLE, 1000, SOURCE)
    new = Driver(kafka_harness.config("b"))
    with pytest.raises(LogFenced, match="partition 0: another owner has taken this shard over"):
        old.transfers([TransferRow(transfer_id(1), SOURCE, PEOPLE[0], 5)])
    assert old.host.failed
    assert not old.answers
    pay(new, 100)
    expected, balances = new.digests(), new.balances(PEOPLE)
    new.close()
    old.close()
    again = Driver(kafka_harness.config("a"))  # its folder lacks what the other wrote
    assert again.digests() == expected
    assert again.balances(PEOPLE) == balances
    again.close()


async def test_the_process_is_told_to_stop_when_it_was_fenced(kafka_harness: KafkaHarness) -> None:
    failures: list[Exception] = []
    host = await WalletHost.open(kafka_harness.config("a"), on_failure=failures.append)
    taken = await asyncio.to_thread(KafkaFrames, kafka_harness.kafka, 0)
    with pytest.raises(Exception, match="another owner"):
        await host.create_accounts([(SOURCE, "USD", 0, 0, 0)])  # type: ignore[list-item]
    assert len(failures) == 1
    assert isinstance(failures[0], LogFenced)
    taken.close()
    await host.close()


def test_a_broker_goes_away_under_load(kafka_harness: KafkaHarness, kafka_broker: KafkaBroker | None) -> None:
    """One owner waits for it and goes on, another, less patient, stops. Neither acknowledges what is not committed."""
    if kafka_broker is None:
        pytest.skip("the broker is not ours to kill")
    patient = kafka_harness
    patient.kafka = replace(patient.kafka, timeout_ms=90_000)
    hasty = KafkaHarness(patient.folder / "hasty", patient.kafka.bootstrap)
    hasty.kafka = replace(hasty.kafka, timeout_ms=2_000)
    waits, stops = Load(patient), Load(hasty)
    with waits, stops:
        until(lambda: min(len(waits.acknowledged), len(stops.acknowledged)) >= 100, "the load runs")
        kafka_broker.kill()
        try:
            time.sleep(0.5)  # answers that were under way
            before = [(len(one.acknowledged), one.driver.host.durable_sequence(0)) for one in (waits, stops)]
            until(lambda: stops.failure is not None, "the hasty owner gives up")
            after = [(len(one.acknowledged), one.driver.host.durable_sequence(0)) for one in (waits, stops)]
            assert after == before, "acknowledged without a broker"
        finally:
            kafka_broker.start()
        until(lambda: len(waits.acknowledged) > before[0][0] + 100, "the patient owner goes on")
    assert waits.failure is None
    assert isinstance(stops.failure, LogNotCommitted)
    assert stops.driver.host.failed
    local = list(read_frames(hasty.log_folder("a"), 0))
    assert local[-1].last_sequence == before[1][1], "the local copy is ahead of what was committed"
    check_takeover(patient, waits.driver.digests(), waits.acknowledged)
    hasty.kafka = replace(hasty.kafka, timeout_ms=30_000)
    restarted = Driver(hasty.config("a"))
    pay(restarted, 1)
    expected = restarted.digests()
    restarted.close()
    check_takeover(hasty, expected, stops.acknowledged)


class Load:
    """An owner of one shard, and a thread that sends it transfers."""

    def __init__(self, harness: KafkaHarness) -> None:
        self.driver = Driver(harness.config("a"))
        self.driver.fund(PEOPLE, 1000, SOURCE)
        self.acknowledged: list[bytes] = []
        self.failure: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 10_000
        while not self._stopping.is_set():
            ids = [transfer_id(number + n) for n in range(20)]
            number += 20
            try:
                codes = self.driver.transfers([TransferRow(one, SOURCE, PEOPLE[0], 1) for one in ids])
            except EventLogError as error:
                self.failure = error
                return
            assert set(codes) == {1}
            self.acknowledged.extend(ids)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self.driver.close()


def check_takeover(harness: KafkaHarness, expected: dict[int, bytes], acknowledged: list[bytes]) -> None:
    driver = Driver(harness.config("elsewhere"))
    try:
        assert driver.digests() == expected
        for at in range(0, len(acknowledged), 8000):
            driver.ticket += 1
            driver.host.submit_results(driver.ticket, acknowledged[at : at + 8000])
            assert set(driver.wait(driver.ticket)) == {1}, "an acknowledged transfer is not remembered"
    finally:
        driver.close()


@pytest.mark.parametrize("how", ["flipped", "cut", "older"])
def test_the_partition_wins_over_a_local_copy_that_a_power_cut_left(kafka_harness: KafkaHarness, how: str) -> None:
    driver = Driver(kafka_harness.config("a"))
    driver.fund(PEOPLE, 1000, SOURCE)
    driver.host.image(0, SnapshotWriter(kafka_harness.log_folder("a").parent / "snapshots", 0))
    for n in range(5):
        pay(driver, 1000 * n)
    expected = driver.digests()
    driver.close()
    [path] = kafka_harness.log_folder("a").glob("*.seg")
    data = bytearray(path.read_bytes())
    end = len(data.rstrip(b"\0"))
    if how == "flipped":
        data[end - 3000] ^= 1
    else:
        data[end // 2 :] = bytes(len(data) - end // 2)
    path.write_bytes(data)
    if how == "older":  # the whole folder of an earlier day: nothing is damaged, the mark fits, events are missing
        (path.parent / "durable.mark").unlink()
    problems: list[str] = []
    host = open_host(
        kafka_harness.config("a"), progress=lambda one: problems.append(one.problem) if one.problem else None
    )
    assert {one.shard: one.digest for one in host.shards()} == expected
    host.close()
    kept = list(kafka_harness.log_folder("a").parent.glob("log.damaged-*"))
    assert (len(kept), len(problems)) == ((0, 0) if how == "older" else (1, 1))
    stored = [one.data for one in KafkaFrames(kafka_harness.kafka, 0).read()]
    local = b"".join(path.read_bytes() for path in sorted(kafka_harness.log_folder("a").glob("*.seg"))).rstrip(b"\0")
    assert b"".join(stored).rstrip(b"\0").endswith(local), "the copy is not the partition's bytes"


def test_a_partition_that_lost_what_it_acknowledged_is_refused(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    for _ in range(3):
        append(log)
        log.sync()
    log.close()
    frames = list(KafkaFrames(kafka_harness.kafka, 0).read())
    kafka_harness.kafka = replace(kafka_harness.kafka, topic=f"{kafka_harness.kafka.topic}.lost")
    with pytest.raises(StoreDamaged, match=r"it ends with event 0, but .* knows that events up to 30 were durable"):
        kafka_harness.open("a")
    kafka_harness.put([one.data for one in frames[:2]], [one.frame.timestamp_ns for one in frames])
    with pytest.raises(StoreDamaged, match="it ends with event 20"):
        kafka_harness.open("a")


def test_a_partition_of_another_history_is_refused(kafka_harness: KafkaHarness) -> None:
    other = KafkaHarness(kafka_harness.folder / "other", kafka_harness.kafka.bootstrap)
    for harness, count in ((kafka_harness, 10), (other, 9)):
        log = harness.open("a")
        append(log, count)
        append(log, 20 - count)
        append(log)
        log.sync()
        log.close()
    kafka_harness.kafka = other.kafka
    with pytest.raises(StoreDamaged, match="its event 30 is of another history"):
        kafka_harness.open("a")


def test_an_empty_folder_and_a_partition_whose_beginning_is_gone(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    for _ in range(3):
        append(log)
        log.sync()
    log.close()
    frames = list(KafkaFrames(kafka_harness.kafka, 0).read())
    kafka_harness.kafka = replace(kafka_harness.kafka, topic=f"{kafka_harness.kafka.topic}.cut")
    ensure_topic(kafka_harness.kafka, 1)
    kafka_harness.put([one.data for one in frames[1:]], [one.frame.timestamp_ns for one in frames[1:]])
    with pytest.raises(LogGap, match="sequence number 1 was asked for, the oldest kept is 11"):
        kafka_harness.open("b")
    kafka_harness.open("a").close()  # who has the beginning goes on


def test_a_damaged_copy_stays_where_it_is_if_the_partition_cannot_replace_it(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    for _ in range(3):
        append(log)
        log.sync()
    log.close()
    frames = list(KafkaFrames(kafka_harness.kafka, 0).read())
    kafka_harness.kafka = replace(kafka_harness.kafka, topic=f"{kafka_harness.kafka.topic}.cut")
    ensure_topic(kafka_harness.kafka, 1)
    kafka_harness.put([one.data for one in frames[1:]], [one.frame.timestamp_ns for one in frames[1:]])
    [path] = kafka_harness.log_folder("a").glob("*.seg")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogGap, match="sequence number 1 was asked for, the oldest kept is 11"):
        kafka_harness.open("a")
    assert path.read_bytes() == data
    assert not list(path.parent.parent.glob("*damaged*"))


def test_a_zombie_that_nobody_fences_is_found_by_the_chain(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    append(log)
    log.sync()
    append(log)
    log.sync()
    log.close()
    [_, second] = KafkaFrames(kafka_harness.kafka, 0).read()
    kafka_harness.put([second.data], [second.frame.timestamp_ns])
    with pytest.raises(StoreDamaged, match=r"partition 0 at offset 4: the frame does not continue the hash chain"):
        kafka_harness.open("b")


def test_a_transaction_that_never_ended_does_not_count(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    append(log)
    log.sync()
    [frame] = read_frames(kafka_harness.log_folder("a"), 0)
    following = pack_frame(
        shard=0,
        epoch=frame.epoch,
        first_sequence=11,
        count=1,
        timestamp_ns=frame.timestamp_ns + 1,
        durable_sequence=10,
        previous_hash=frame.hash,
        digest=bytes(16),
        body=bytes(48),
    )
    assert isinstance(log.store, KafkaFrames)
    producer = log.store._producer
    producer.begin_transaction()  # killed between produce and commit: the broker has the record
    producer.produce(kafka_harness.kafka.topic, value=following, partition=0)
    assert producer.flush(10) == 0
    second = kafka_harness.open("b")
    assert second.next_sequence == 11
    append(second, 5)
    second.sync()
    with pytest.raises(KafkaException, match="fenced"):
        producer.commit_transaction(10)
    log.close()
    second.close()
    assert [one.count for one in kafka_harness.durable("b")] == [10, 5]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"previous_hash": bytes(16)}, "does not continue the hash chain"),
        ({"first_sequence": 12}, "event 11 is missing, event 12 comes next"),
        ({"first_sequence": 10, "count": 2}, "event 11 is inside a frame that begins before it"),
        ({"epoch": 0}, "epoch or time is older"),
        ({"timestamp_ns": 1_800_000_000_000_000_000}, "epoch or time is older"),
        ({"shard": 1}, "the frame belongs to shard 1"),
    ],
)
def test_a_frame_out_of_its_place_is_refused(kafka_harness: KafkaHarness, wrong: dict[str, Any], said: str) -> None:
    log = kafka_harness.open("a")
    append(log)
    log.sync()
    log.close()
    [one] = KafkaFrames(kafka_harness.kafka, 0).read()
    right: dict[str, Any] = {
        "shard": 0,
        "epoch": 1,
        "first_sequence": 11,
        "count": 1,
        "timestamp_ns": one.frame.timestamp_ns + 1,
        "durable_sequence": 10,
        "previous_hash": one.frame.hash,
        "digest": bytes(16),
    }
    fields = {**right, **wrong}
    kafka_harness.put([pack_frame(**fields, body=bytes(48 * fields["count"]))], [right["timestamp_ns"]])
    for node in ("a", "b"):  # with the frame before in the folder, and with nothing
        with pytest.raises(StoreDamaged, match=rf"partition 0 at offset 2: .*{said}"):
            kafka_harness.open(node)


def test_a_frame_larger_than_a_record(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    append(log)
    log.append(11, 60_000, 1_800_000_001_000_000_000, bytes(16), os.urandom(48 * 60_000))
    append_at = 1_800_000_002_000_000_000
    log.append(60_011, 3, append_at, bytes(16), bytes(144))
    log.sync()
    log.close()
    partition = KafkaFrames(kafka_harness.kafka, 0)
    assert [one.frame.count for one in partition.read()] == [10, 60_000, 3]
    assert [one.frame.count for one in partition.read(append_at)] == [3]
    last = partition.last()
    assert last is not None
    assert last.frame.last_sequence == 60_013
    kafka_harness.open("b").close()
    assert [frame.count for frame in read_frames(kafka_harness.log_folder("b"), 0)] == [10, 60_000, 3]


def test_a_start_behind_a_snapshot_reads_only_what_follows(kafka_harness: KafkaHarness) -> None:
    log = kafka_harness.open("a")
    for _ in range(200):
        append(log)
    log.sync()
    frames = list(read_frames(kafka_harness.log_folder("a"), 0))
    log.close()
    at = frames[149]
    end = replace(START, next_sequence=1501, hash=at.hash, epoch=1, timestamp_ns=at.timestamp_ns)
    folder = kafka_harness.log_folder("b")
    folder.mkdir(parents=True)
    read: list[int] = []

    class Counting(KafkaPartition):
        def _records(self, consumer: object, start: int, high: int):  # type: ignore[no-untyped-def]
            for record in super()._records(consumer, start, high):
                read.append(record.offset())
                yield record

    store = Counting(kafka_harness.kafka, 0)
    until(lambda: (last := store.last()) is not None and last.frame.last_sequence == 2000, "the last commit is seen")
    read.clear()
    fetch_missing(store, folder, end, end, segment_bytes=1 << 18, reserve_bytes=0, record_bytes=48)
    copied = list(read_frames(folder, 0, 1501))
    assert [one.hash for one in copied] == [one.hash for one in frames[150:]]
    assert len(set(read)) < 60, "the partition was read from further back than needed"


@pytest.mark.parametrize(
    ("rule", "value"),
    [("retention.ms", "604800000"), ("cleanup.policy", "compact"), ("unclean.leader.election.enable", "true")],
)
def test_a_topic_that_would_lose_events_is_refused(kafka_harness: KafkaHarness, rule: str, value: str) -> None:
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient(kafka_harness.kafka.client())
    made = {"retention.ms": "-1", rule: value}
    admin.create_topics([NewTopic(kafka_harness.kafka.topic, 1, 1, config=made)])[kafka_harness.kafka.topic].result(15)
    with pytest.raises(StoreUnusable, match=f"{rule} is {value}"):
        ensure_topic(kafka_harness.kafka, 1)


def test_more_replicas_than_the_cluster_has_are_refused(kafka_harness: KafkaHarness) -> None:
    with pytest.raises(StoreUnusable, match=r"min\.insync\.replicas = 9 cannot be had of \d broker"):
        ensure_topic(replace(kafka_harness.kafka, min_insync_replicas=9), 1)
    ensure_topic(kafka_harness.kafka, 1)
    with pytest.raises(StoreUnusable, match=r"min\.insync\.replicas is \d, it must be 9"):
        ensure_topic(replace(kafka_harness.kafka, min_insync_replicas=9), 1)
