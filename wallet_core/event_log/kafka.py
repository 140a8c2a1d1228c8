"""The event log on Apache Kafka: one shard's frames in one partition, a transaction a group commit.

    apply ─ group ─► commit ─ GIL ─► KafkaFrames.append: begin · produce each frame · commit ─► partition
                      └────────────► the same bytes to the local segments (no sync) ─► results leave

- A record's value is a frame, the very bytes of docs/event-log-format.md. A frame larger than `RECORD_BYTES_MAX` (only the expiry of
  very many holds at once makes one) goes on in the records behind it, whose key is `CONTINUED`.
- `init_transactions` of a new owner ends every open transaction of the one before and fences it: its next append fails.
  Only then is the partition read (read_committed), so that nothing can come behind what was read.
- The local segments are the copy that all readers read. They are written after the commit: at every start they are a prefix of the
  partition, or they are damaged by a power cut, or the cluster has lost what it acknowledged. The first is completed, the second set
  aside and fetched again, the third refused.
- The first append that fails ends the log, whatever the reason: the outcome of a commit may be unknown, and only a new
  `init_transactions` settles it. A broker that is away for less than `timeout_ms` is waited for.
- A record's timestamp is its frame's, which never goes back: Kafka's time index finds the frames behind a snapshot with one question.
- Each frame names shard, epoch, sequence number and the hash of the frame before. So what a writer without transactions put into
  the partition, which nobody fences, is found when it is read.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

from wallet_core.event_log._file import read_mark
from wallet_core.event_log.file import LogEnd, make_folder, open_log, segments, settle_end, sync_folder
from wallet_core.event_log.format import HEADER_BYTES, FrameInvalid, unpack_frame
from wallet_core.event_log.port import (
    Frame,
    LogDamaged,
    LogFenced,
    LogGap,
    LogNotCommitted,
    StoreDamaged,
    StoreUnusable,
)

__all__ = ["TOPIC", "KafkaFrames", "KafkaLogConfig", "KafkaPartition", "StoredFrame", "ensure_topic", "fetch_missing"]

TOPIC = "ducat.wallet.log"
RECORD_BYTES_MAX = 917_504
"""Below the megabyte that clients and brokers take by default; a batch of 8,190 rows makes at most 786,336 bytes."""
TOPIC_RECORD_BYTES = 1_048_588  # what brokers take by default
RECORD_OVERHEAD_BYTES = 4096
"""What a batch of one record has around it, rounded up."""
CONTINUED = b"+"
"""Key of a record that continues the frame in the record before."""
REPLICAS_WANTED = 3
IN_SYNC_WANTED = 2
ADMIN_TIMEOUT_S = 15.0
FETCH_BYTES = 8 * 1024 * 1024
COPY_BYTES = 8 * 1024 * 1024
"""Fetched frames that are written to the local segments at once."""

_FENCED = (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH)
_BODY_AND_TIME = struct.Struct("<IQ")  # header bytes 28:40
_library_log = logging.getLogger("wallet_core.event_log.kafka.librdkafka")


@dataclass(frozen=True, slots=True)
class KafkaLogConfig:
    """Where the logs are. `min_insync_replicas` 0: 2, or 1 where the cluster has a single broker; each partition has as many
    replicas at least. `timeout_ms`: how long an append waits for the brokers before the process stops. `options` are
    librdkafka's, such as TLS and SASL."""

    bootstrap: str
    topic: str = TOPIC
    min_insync_replicas: int = 0
    timeout_ms: int = 30_000
    options: Mapping[str, str] = field(default_factory=dict)

    def transactional_id(self, shard: int) -> str:
        """`wallet-shard-N`; another topic is another system, which must not fence this one."""
        return f"wallet-shard-{shard}" if self.topic == TOPIC else f"{self.topic}-wallet-shard-{shard}"

    def client(self) -> dict[str, Any]:
        """What every client of these brokers is made with."""
        return {
            "bootstrap.servers": self.bootstrap,
            "client.id": "ducat-wallet-log",
            "socket.nagle.disable": True,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1_000,
            "allow.auto.create.topics": False,
            "log_level": 2,
            "logger": _library_log,
            **self.options,
        }


def ensure_topic(config: KafkaLogConfig, shard_count: int) -> None:
    """Make the topic with a partition a shard, or check that the one there keeps a log safely. Raises StoreUnusable."""
    place = f"topic {config.topic} at {config.bootstrap}"
    admin = AdminClient(config.client())
    try:
        cluster = admin.list_topics(timeout=ADMIN_TIMEOUT_S)
        if config.topic not in cluster.topics:
            replicas = min(REPLICAS_WANTED, len(cluster.brokers))
            in_sync = config.min_insync_replicas or min(IN_SYNC_WANTED, replicas)
            if in_sync > replicas:
                raise StoreUnusable(
                    place, f"min.insync.replicas = {in_sync} cannot be had of {len(cluster.brokers)} brokers"
                )
            made = NewTopic(
                config.topic, num_partitions=shard_count, replication_factor=replicas, config=_rules(in_sync)
            )
            future = admin.create_topics([made], operation_timeout=ADMIN_TIMEOUT_S)[config.topic]
            try:
                future.result(ADMIN_TIMEOUT_S)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another process of the system made it
                    raise
            cluster = _wait_for_topic(admin, config.topic)
        partitions = cluster.topics[config.topic].partitions
        if len(partitions) != shard_count:
            raise StoreUnusable(
                place,
                f"it has {len(partitions)} partitions, there are {shard_count} shards; each needs its own, for ever",
            )
        replicas = min(len(one.replicas) for one in partitions.values())
        resource = ConfigResource(ResourceType.TOPIC, config.topic)
        found = admin.describe_configs([resource], request_timeout=ADMIN_TIMEOUT_S)[resource].result(ADMIN_TIMEOUT_S)
    except KafkaException as error:
        raise StoreUnusable(place, f"Kafka does not answer as it should: {error.args[0].str()}") from error
    in_sync = config.min_insync_replicas or min(IN_SYNC_WANTED, max(len(cluster.brokers), replicas))
    problems = [
        f"{name} is {found[name].value}, it must be {wanted}"
        for name, wanted in (
            ("cleanup.policy", "delete"),
            ("retention.ms", "-1"),
            ("retention.bytes", "-1"),
            ("message.timestamp.type", "CreateTime"),
        )
        if found[name].value != wanted
    ]
    if replicas < in_sync:  # made while the other brokers were down: it stays so
        problems.append(f"a partition has {replicas} replicas, it must have {in_sync} or more; add some")
    if int(found["max.message.bytes"].value) < RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES:
        problems.append(
            f"max.message.bytes is {found['max.message.bytes'].value}, "
            f"it must be {RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES} or more"
        )
    if int(found["min.insync.replicas"].value) < in_sync:
        problems.append(f"min.insync.replicas is {found['min.insync.replicas'].value}, it must be {in_sync} or more")
    if found["unclean.leader.election.enable"].value == "true":
        problems.append("unclean.leader.election.enable is true, it must be false")
    if problems:
        raise StoreUnusable(place, f"acknowledged events could be lost: {'; '.join(problems)}")


def _rules(in_sync: int) -> dict[str, str]:
    """Nothing is ever deleted by itself, and the timestamps are the frames' own, whatever the brokers' clocks say."""
    return {
        "cleanup.policy": "delete",
        "retention.ms": "-1",
        "retention.bytes": "-1",
        "min.insync.replicas": str(in_sync),
        "unclean.leader.election.enable": "false",
        "compression.type": "producer",
        "max.message.bytes": str(TOPIC_RECORD_BYTES),
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(2**63 - 1),
        "message.timestamp.before.max.ms": str(2**63 - 1),
    }


def _wait_for_topic(admin: Any, topic: str) -> Any:
    deadline = time.monotonic() + ADMIN_TIMEOUT_S
    while True:
        cluster = admin.list_topics(topic, timeout=ADMIN_TIMEOUT_S)
        partitions = cluster.topics[topic].partitions
        if partitions and all(one.leader >= 0 for one in partitions.values()):
            return cluster
        if time.monotonic() > deadline:
            raise StoreUnusable(f"topic {topic}", "it was made, but has no leader yet; try again")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A frame as it stands in the partition: checked by itself, not yet in its place in the history."""

    offset: int
    frame: Frame
    data: bytes


class KafkaPartition:
    """One shard's partition, to read: whatever is committed. Disturbs no owner, and may not see yet what was committed a moment ago:
    the brokers answer the owner before they have marked its records. A new owner (KafkaFrames) sees all."""

    def __init__(self, config: KafkaLogConfig, shard: int) -> None:
        self.config, self.shard = config, shard

    @property
    def place(self) -> str:
        """The partition, for people."""
        return f"topic {self.config.topic}, partition {self.shard}"

    def read(self, from_time_ns: int = 0) -> Iterator[StoredFrame]:
        """Committed frames to the end, from the first one whose time is not below `from_time_ns` (by the millisecond); at least
        the last one, whatever its time. Raises StoreDamaged, StoreUnusable."""
        with self._consumer() as consumer:
            low, high = self._bounds(consumer)
            start = low
            if from_time_ns > 0 and low < high:
                wanted = TopicPartition(self.config.topic, self.shard, from_time_ns // 1_000_000)
                with self._mapped():
                    [found] = consumer.offsets_for_times([wanted], timeout=ADMIN_TIMEOUT_S)
                start = found.offset if 0 <= found.offset < high else high
            if start >= high:
                start = self._last_offset(consumer, low, high)
            if start < high:
                yield from self._frames(consumer, start, high)

    def last(self) -> StoredFrame | None:
        """The last committed frame; None if there is none. Raises as `read` does."""
        with self._consumer() as consumer:
            low, high = self._bounds(consumer)
            start = self._last_offset(consumer, low, high)
            found = None
            if start < high:
                for one in self._frames(consumer, start, high):
                    found = one
            return found

    @contextlib.contextmanager
    def _consumer(self) -> Iterator[Any]:
        consumer: Any = Consumer(
            {
                **self.config.client(),
                "group.id": self.config.transactional_id(self.shard),  # the library wants one; no group is joined
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "fetch.message.max.bytes": FETCH_BYTES,
                "fetch.wait.max.ms": 50,
            }
        )
        try:
            yield consumer
        finally:
            consumer.close()

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except KafkaException as error:
            raise StoreUnusable(self.place, f"it cannot be read: {error.args[0].str()}") from error

    def _bounds(self, consumer: Any) -> tuple[int, int]:
        """Offset of the oldest record that is kept, and behind the last committed one."""
        with self._mapped():
            found = consumer.get_watermark_offsets(
                TopicPartition(self.config.topic, self.shard), timeout=self.config.timeout_ms / 1000
            )
        if found is None:
            raise StoreUnusable(self.place, "it cannot be read: the brokers do not answer")
        low, high = found
        return low, high

    def _records(self, consumer: Any, start: int, high: int) -> Iterator[Any]:
        """Committed records from `start` up to the end `high`."""
        consumer.assign([TopicPartition(self.config.topic, self.shard, start)])
        seen_s = time.monotonic()
        while True:
            with self._mapped():
                record = consumer.poll(0.5)
            if record is None:
                if time.monotonic() - seen_s > self.config.timeout_ms / 1000:
                    raise StoreUnusable(self.place, f"offset {high} was not reached: the brokers do not answer")
                continue
            error = record.error()
            if error is None:
                seen_s = time.monotonic()
                yield record
                if record.offset() + 1 >= high:
                    return
            elif error.code() == KafkaError._PARTITION_EOF:
                if record.offset() >= high:
                    return
            elif not error.retriable():
                raise StoreUnusable(self.place, f"it cannot be read: {error.str()}")

    def _last_offset(self, consumer: Any, low: int, high: int) -> int:
        """Where the last frame begins; `high` if there is none. Behind it are only control records and ended transactions."""
        back = 8
        while True:
            start = max(low, high - back)
            found = [one.offset() for one in self._records(consumer, start, high) if one.key() != CONTINUED]
            if found or start == low:
                return found[-1] if found else high
            back *= 8

    def _frames(self, consumer: Any, start: int, high: int) -> Iterator[StoredFrame]:
        parts: list[bytes] = []
        begin = wanted = have = 0
        for record in self._records(consumer, start, high):
            offset, value = record.offset(), record.value() or b""
            if (record.key() == CONTINUED) != bool(parts):
                reason = "a frame ends before its time" if parts else "a record continues a frame that did not begin"
                raise StoreDamaged(self.place, offset, reason)
            if not parts:
                begin, have = offset, 0
                if len(value) < HEADER_BYTES:
                    raise StoreDamaged(self.place, offset, f"a record of {len(value)} bytes is no frame")
                body, _ = _BODY_AND_TIME.unpack_from(value, 28)
                wanted = HEADER_BYTES + (body + 7 & ~7)
            parts.append(value)
            have += len(value)
            if have > wanted or (have < wanted and len(value) != RECORD_BYTES_MAX):
                raise StoreDamaged(self.place, offset, f"a frame of {wanted} bytes was announced, {have} came")
            if have == wanted:
                data = parts[0] if len(parts) == 1 else b"".join(parts)
                parts = []
                yield StoredFrame(begin, self._checked(begin, data), data)
        if parts:
            raise StoreDamaged(self.place, begin, "the partition ends inside a frame")

    def _checked(self, offset: int, data: bytes) -> Frame:
        try:
            frame, _ = unpack_frame(data)
        except FrameInvalid as error:
            raise StoreDamaged(self.place, offset, f"the record is no intact frame ({error})") from None
        if frame.shard != self.shard:
            raise StoreDamaged(self.place, offset, f"the frame belongs to shard {frame.shard}")
        return frame


class KafkaFrames(KafkaPartition):
    """One shard's partition, owned: making one fences every owner before it (satisfies FrameStore). Blocks; one call of
    `append` at a time. Raises StoreUnusable, LogFenced (somebody newer came at the same moment)."""

    def __init__(self, config: KafkaLogConfig, shard: int) -> None:
        super().__init__(config, shard)
        self.offset = -1
        """Of the last record that was committed here."""
        self._failed: KafkaError | None = None
        self._producer: Any = Producer(
            {
                **config.client(),
                "transactional.id": config.transactional_id(shard),
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 0,  # a group is whole when it comes here
                "message.timeout.ms": config.timeout_ms,
                "transaction.timeout.ms": config.timeout_ms,
                "partitioner": "consistent",
            }
        )
        try:
            self._producer.init_transactions(config.timeout_ms / 1000)
        except KafkaException as error:
            failure = error.args[0]
            if failure.code() in _FENCED:
                raise LogFenced(self.place) from error
            raise StoreUnusable(self.place, f"it cannot be owned: {failure.str()}") from error

    def append(self, frames: memoryview) -> int:
        """See FrameStore."""
        produce, topic, shard = self._producer.produce, self.config.topic, self.shard
        at, end = 0, len(frames)
        try:
            self._producer.begin_transaction()
            while at < end:
                body, time_ns = _BODY_AND_TIME.unpack_from(frames, at + 28)
                behind = at + HEADER_BYTES + (body + 7 & ~7)
                key = None
                while at < behind:
                    cut = min(behind, at + RECORD_BYTES_MAX)
                    produce(
                        topic,
                        value=bytes(frames[at:cut]),
                        key=key,
                        partition=shard,
                        timestamp=time_ns // 1_000_000,
                        on_delivery=self._report,
                    )
                    at, key = cut, CONTINUED
            self._producer.commit_transaction(self.config.timeout_ms / 1000)
        except KafkaException as error:
            failure: KafkaError = self._failed or error.args[0]
            if failure.code() in _FENCED or error.args[0].code() in _FENCED:
                raise LogFenced(self.place) from error
            raise LogNotCommitted(self.place, failure.str()) from error
        except BufferError as error:
            raise LogNotCommitted(self.place, "the producer's queue is full") from error
        return self.offset

    def _report(self, error: KafkaError | None, record: Any) -> None:
        if error is not None:
            self._failed = self._failed or error
        else:
            self.offset = record.offset()

    def close(self) -> None:
        """See FrameStore. A transaction that is open stays so until the next owner, or a timeout, ends it."""
        self._producer = None


def fetch_missing(
    store: KafkaPartition,
    folder: Path,
    begin: LogEnd,
    oldest: LogEnd,
    *,
    segment_bytes: int,
    reserve_bytes: int,
    record_bytes: int,
    direct: bool = True,
    progress: Callable[[int], None] | None = None,
) -> str | None:
    """Make a log folder, which is locked, equal to the partition. `begin` is where recovery will read from, behind the snapshot
    (`next_sequence` 1 without one); `oldest` is where a folder without usable segments begins: behind the oldest snapshot. `progress` is
    told the number of events fetched. Returns the name under which a damaged copy was set aside. Raises StoreDamaged, LogGap,
    StoreUnusable, DiskNearlyFull, OSError. Nothing is changed before the partition is known to reach as far as the folder does."""
    shard = store.shard
    mark = read_mark(folder)
    last = store.last()
    _check_reach(store, folder, last, max(begin.next_sequence - 1, mark[0] if mark else 0))
    end, aside = oldest, None
    if segments(folder):
        try:
            end = settle_end(
                folder,
                shard,
                from_sequence=begin.next_sequence,
                from_hash=begin.hash if begin.next_sequence > 1 else None,
                direct=direct,
            )
            end = replace(end, timestamp_ns=max(end.timestamp_ns, begin.timestamp_ns))  # 0 where no frame follows yet
        except (LogDamaged, LogGap):
            with contextlib.closing(_following(store, oldest)) as frames:
                next(frames, None)  # raises where the partition does not lead on from there either
            aside = _set_aside(folder)
    elif mark is not None:
        aside = _set_aside(folder)
    _check_reach(store, folder, last, end.next_sequence - 1)
    if last is None:
        return aside
    if last.frame.last_sequence == end.next_sequence - 1:
        if last.frame.hash != end.hash:
            raise _other_history(store, last)
        return aside
    _copy(store, folder, end, segment_bytes, reserve_bytes, record_bytes, direct, progress)
    return aside


def _check_reach(store: KafkaPartition, folder: Path, last: StoredFrame | None, known: int) -> None:
    found = last.frame.last_sequence if last else 0
    if found < known:
        raise StoreDamaged(
            store.place,
            last.offset if last else 0,
            f"it ends with event {found}, but {folder.parent} knows that events up to {known} were durable: the cluster has "
            f"lost them, or this is the topic of another system, or the folder of a log that was never in Kafka",
        )


def _other_history(store: KafkaPartition, at: StoredFrame) -> StoreDamaged:
    return StoreDamaged(
        store.place, at.offset, f"its event {at.frame.last_sequence} is of another history than the local one"
    )


def _copy(
    store: KafkaPartition,
    folder: Path,
    end: LogEnd,
    segment_bytes: int,
    reserve_bytes: int,
    record_bytes: int,
    direct: bool,
    progress: Callable[[int], None] | None,
) -> None:
    copy = open_log(
        folder,
        store.shard,
        end=end,
        lock=-1,  # the caller has it
        segment_bytes=segment_bytes,
        reserve_bytes=reserve_bytes,
        record_bytes=record_bytes,
        sync=False,
        direct=direct,
    )
    try:
        waiting = events = 0
        for one in _following(store, end):
            copy.append_copy(one.data)
            waiting += len(one.data)
            events += one.frame.count
            if waiting >= COPY_BYTES:
                copy.sync()
                waiting = 0
                if progress is not None:
                    progress(events)
        copy.sync()
    finally:
        copy.close()
    if progress is not None:
        progress(events)


def _following(store: KafkaPartition, end: LogEnd) -> Generator[StoredFrame]:
    """The frames behind `end`, each in its place in the history. Raises StoreDamaged, LogGap."""
    following, previous_hash, epoch, time_ns = end.next_sequence, end.hash, 0, end.timestamp_ns
    before: StoredFrame | None = None
    for one in store.read(end.timestamp_ns if following > 1 else 0):
        frame = one.frame
        if frame.first_sequence < following:  # from the same millisecond as the last that is here
            if frame.last_sequence >= following:
                raise StoreDamaged(
                    store.place, one.offset, f"event {following} is inside a frame that begins before it"
                )
            if before is not None and frame.previous_hash != before.frame.hash:
                raise StoreDamaged(store.place, one.offset, "the frame does not continue the hash chain")
            if frame.last_sequence == following - 1 and frame.hash != end.hash:
                raise _other_history(store, one)
            before, epoch = one, frame.epoch  # the local end's own may be higher: an opening counts it up
            continue
        if frame.first_sequence > following:
            if before is None:
                raise LogGap(store.place, following, frame.first_sequence)
            raise StoreDamaged(
                store.place, one.offset, f"event {following} is missing, event {frame.first_sequence} comes next"
            )
        if frame.previous_hash != previous_hash:
            raise StoreDamaged(store.place, one.offset, "the frame does not continue the hash chain")
        if frame.epoch < epoch or frame.timestamp_ns < time_ns:
            raise StoreDamaged(store.place, one.offset, "the frame's epoch or time is older than the frame before")
        following, previous_hash = frame.last_sequence + 1, frame.hash
        epoch, time_ns, before = frame.epoch, frame.timestamp_ns, one
        yield one


def _set_aside(folder: Path) -> str:
    """Rename a local log that cannot be used; the partition has it all."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    folder.rename(aside)
    make_folder(folder)
    sync_folder(folder.parent)
    return str(aside)
