"""The bus on Apache Kafka: a topic is a topic, a key is a key, a group is a group.

    asyncio loop                              threads
    publish ── produce() ───────────────────► librdkafka ─► broker (acks=all, idempotent)
       ▲────── call_soon_threadsafe ◄──────── poll thread: delivery reports
    dispatcher ◄── call_soon_threadsafe ◄──── consumer thread: poll(), rebalances, heartbeats
       └─ done ─► contiguous offsets ────────► commit()

- One synchronous Producer with one poll thread (confluent-kafka's AIOProducer flushes on inactivity, 0.1 s at the least).
- An offset is committed when it and every one before it in its partition has had its effect. What lies beyond is handled
  again after a crash.
- The consumer thread never stops polling for longer than a second, so that a long handler neither leaves the group nor holds up a
  rebalance; while the dispatcher wants nothing, the partitions are paused. Every call to the consumer is made in its thread.
- A partition that goes to another consumer is revoked first: what runs finishes (`REVOKE_TIMEOUT_S`) and is committed, the rest is
  forgotten.
- One request in flight a connection, although the producer is idempotent. A broker takes any sequence number as a producer's first in a
  partition: when the first batch met a leader that was not ready and the second, already under way, got in, librdkafka calls the first
  "implicitly acked" and it is gone.
- A failed delivery report ends the producer (`enable.gapless.guarantee`): a message may not overtake one that failed before it.
- The dead-letter topic is compacted and keyed by the dead letter's id: a retried one is removed by a tombstone.

Kafka counts no deliveries: failures are counted in memory, and begin at zero in a new process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from kernel.errors import FailedPrecondition, InvalidArgument, Unavailable
from runtime.bus import DEAD_LETTER_SUFFIX, TOPICS, BusPolicy, Message, dead_letter_topic
from runtime.bus._decode import decode, number
from runtime.bus._dispatch import Delivery, Dispatcher
from runtime.bus.dead_letter import LIST_MAX, DeadLetter
from runtime.bus.groups import Group

__all__ = ["KafkaBus"]

MESSAGE_TIMEOUT_MS = 30_000
"""How long a publish may take before it fails."""
POLL_S = 0.5
"""Longest block of a thread: how fast it sees that it should end. Messages and reports wake it at once."""
HANDLER_PATIENCE_S = 1.0
"""How long a consumer thread waits for the dispatcher before it pauses its partitions and polls on."""
COMMIT_INTERVAL_S = 0.05
"""Offsets that are ready within this time share a commit."""
REVOKE_TIMEOUT_S = 30.0
TOPIC_PROPAGATION_MS = 5_000
"""How long a new consumer waits for a topic to show up before it takes it for deleted."""
LOST_S, LOST_S_MAX = 15.0, 600.0
"""How long lost partitions may stay away before a new consumer asks for them; then twice as long, for a large group has none for all."""
UNCOMMITTED_MAX = 20_000
"""Offsets of a partition that may be delivered beyond one whose message waits for its next try."""
SESSION_TIMEOUT_MS_MIN = 6_000
"""A broker's default for group.min.session.timeout.ms."""
DEAD_LETTER_BYTES_MAX = 8 * 1024 * 1024
"""A message that was just small enough for its topic, with the error and its story beside it."""
RETENTION_MS = 14 * 86_400_000
"""Of topics that this bus makes. Must stay below the inbox's retention: a lost group offset replays from the oldest message."""
ADMIN_TIMEOUT_S = 15.0
PRODUCE_QUEUE_WAIT_S = 0.01
COMPLAIN_INTERVAL_S = 10.0
TRIES_MAX = 1_000_000
BACKOFF_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.0)

_TOPIC_GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
_HEADER_ID, _HEADER_TRACE, _HEADER_POSITION = "message-id", "traceparent", "position"
_log = structlog.get_logger("runtime.bus.kafka")
_library_log = logging.getLogger("runtime.bus.kafka.librdkafka")


class KafkaBus:
    """A Bus and a DeadLetterStore."""

    def __init__(
        self, bootstrap: str, *, policy: BusPolicy, name: str, options: Mapping[str, str] | None = None
    ) -> None:
        self.policy = policy
        self.name = name
        self._complain_at = 0.0
        self.settings: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "client.id": name,
            "socket.nagle.disable": True,
            "socket.keepalive.enable": True,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 2_000,
            "allow.auto.create.topics": False,
            "log_level": 2,  # the library says "connection refused" dozens of times a second; complain says it now and then
            "logger": _library_log,
            "error_cb": self.complain,
            **(options or {}),
        }
        self._loop = asyncio.get_running_loop()
        self._producer = _ThreadedProducer(self.settings, self._loop)
        self._topics: set[str] = set()
        self._creating = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        bootstrap: str,
        *,
        policy: BusPolicy | None = None,
        name: str = "ducat",
        options: Mapping[str, str] | None = None,
        wait_s: float = 60.0,
    ) -> KafkaBus:
        """Wait up to `wait_s` for a broker, then raise Unavailable. `options` are librdkafka's, such as TLS and SASL."""
        if not bootstrap:
            raise ValueError("kafka_bootstrap is empty: name the brokers, such as broker-1:9092,broker-2:9092")
        bus = cls(bootstrap, policy=policy or BusPolicy(), name=name, options=options)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                await bus.ensure_topics(TOPICS)
                return bus
            except Unavailable:
                if time.monotonic() > deadline:
                    await bus.close()
                    raise

    async def publish(self, messages: Sequence[Message]) -> None:
        """All messages in the producer's queue at once; returns when the last is acknowledged by all in-sync replicas."""
        if not messages:
            return
        topics = {message.topic for message in messages}
        if not topics <= self._topics:
            await self.ensure_topics(topics)
        try:
            await self._producer.send([_record_of(message) for message in messages])
        except Unavailable:
            self._topics -= topics  # one of them may have been deleted: the next publish makes it again
            raise

    async def consume(
        self,
        topic: str,
        group: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        *,
        batch_max: int = 64,
        from_end: bool = False,
        on_gap: Callable[[], None] | None = None,
    ) -> None:
        """See Bus."""
        consumer = _Consumer(
            self, topic, group, handler, batch_max=batch_max, concurrency=1, from_end=from_end, on_gap=on_gap
        )
        await consumer.run()

    async def consume_each(
        self,
        topic: str,
        group: str,
        handler: Callable[[Message], Awaitable[None]],
        *,
        concurrency: int = 32,
        from_end: bool = False,
        on_gap: Callable[[], None] | None = None,
    ) -> None:
        """See Bus."""

        async def handle(messages: Sequence[Message]) -> None:
            await handler(messages[0])

        consumer = _Consumer(
            self, topic, group, handle, batch_max=1, concurrency=concurrency, from_end=from_end, on_gap=on_gap
        )
        await consumer.run()

    async def close(self) -> None:
        """Send what is queued, then end the poll thread."""
        await asyncio.to_thread(self._producer.close)

    async def weaknesses(self) -> list[str]:
        """What the brokers' settings may cost, one sentence each. Raises Unavailable."""
        metadata = await self.metadata()
        broker_count = len(metadata.brokers)
        resources = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in TOPICS]
        admin = self._admin()
        found: list[str] = []
        for resource, future in admin.describe_configs(resources, request_timeout=ADMIN_TIMEOUT_S).items():
            try:
                insync_min = (await asyncio.wrap_future(future))["min.insync.replicas"].value
            except KafkaException as error:
                return [f"the topics' settings are unknown: {error.args[0].str()}"]
            partitions = metadata.topics[resource.name].partitions if resource.name in metadata.topics else {}
            replicas = min((len(partition.replicas) for partition in partitions.values()), default=0)
            if replicas == 1 or number(insync_min) < 2:
                found.append(resource.name)
        if not found:
            return []
        return [
            f"{', '.join(found)}: one broker alone may have acknowledged a message ({broker_count} brokers; a replication factor of 3"
            " with min.insync.replicas=2 is right). If its disk is lost, messages are: the feed brings them back, seconds late"
        ]

    # --- topics

    async def metadata(self) -> Any:
        """What the brokers say of the cluster. Raises Unavailable."""
        try:
            return await asyncio.to_thread(self._admin().list_topics, timeout=5.0)
        except KafkaException as error:
            raise Unavailable(
                f"Kafka does not answer at {self.settings['bootstrap.servers']}: {error.args[0].str()}"
            ) from error

    async def ensure_topics(self, topics: Collection[str]) -> None:
        """Make the topics that do not exist; the number of partitions of one that exists is left alone."""
        async with self._creating:
            missing = [topic for topic in topics if topic not in self._topics]
            if not missing:
                return
            admin = self._admin()  # must live until the answer is there
            futures = admin.create_topics(
                [self._new_topic(topic) for topic in missing],
                operation_timeout=ADMIN_TIMEOUT_S,
                request_timeout=ADMIN_TIMEOUT_S,
            )
            for topic, future in futures.items():
                try:
                    await asyncio.wrap_future(future)
                except KafkaException as error:
                    await self._check_refusal(topic, error)
                self._topics.add(topic)

    def forget_topic(self, topic: str) -> None:
        """Make sure at its next use that it exists: it was deleted."""
        self._topics.discard(topic)

    def _new_topic(self, topic: str) -> Any:
        if topic.endswith(DEAD_LETTER_SUFFIX):
            config = {"cleanup.policy": "compact", "max.message.bytes": str(DEAD_LETTER_BYTES_MAX)}
            return NewTopic(topic, num_partitions=1, replication_factor=-1, config=config)
        config = {"retention.ms": str(RETENTION_MS), "message.timestamp.type": "LogAppendTime"}
        return NewTopic(topic, num_partitions=self.policy.partition_count, replication_factor=-1, config=config)

    async def _check_refusal(self, topic: str, error: KafkaException) -> None:
        """Return when the topic exists all the same; else raise Unavailable."""
        code, text = error.args[0].code(), error.args[0].str()
        if code == KafkaError.TOPIC_ALREADY_EXISTS:
            return
        if code in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED):
            if topic in (await self.metadata()).topics:  # made by an operator
                return
            raise Unavailable(f"topic {topic} does not exist and may not be made: {text}") from error
        raise Unavailable(f"topic {topic} cannot be made now: {text}") from error

    def complain(self, error: KafkaError) -> None:
        """Called in the library's threads."""
        now = time.monotonic()
        if error.fatal() or now >= self._complain_at:
            self._complain_at = now + COMPLAIN_INTERVAL_S
            _log.warning("Kafka is in trouble", error=error.str(), code=error.name(), is_fatal=error.fatal())

    def _admin(self) -> Any:
        return AdminClient(dict(self.settings))

    # --- groups

    async def groups(self, topic: str) -> list[Group]:
        """See GroupStore. A group is of all topics here; it is listed under each of which it has an offset."""
        return await self._groups_of({topic})

    async def all_groups(self) -> tuple[list[Group], dict[str, str]]:
        """See GroupStore."""
        return await self._groups_of({name for name in (await self.metadata()).topics if not name.startswith("__")}), {}

    async def _groups_of(self, topics: set[str]) -> list[Group]:
        try:
            return await asyncio.to_thread(self._read_groups, topics)
        except KafkaException as error:
            raise Unavailable(f"Kafka's groups cannot be read: {error.args[0].str()}") from error

    async def remove_group(self, topic: str, group: str) -> None:
        """See GroupStore. Refused while it has members or reads other topics too: Kafka only removes the whole group."""
        others = sorted(
            known.topic for known in (await self.all_groups())[0] if known.name == group and known.topic != topic
        )
        if others:
            raise FailedPrecondition(
                f"group {group} also reads {', '.join(others)}: Kafka removes it from all topics or none; use kafka-consumer-groups"
                " --delete-offsets for one topic"
            )
        admin = self._admin()
        (future,) = admin.delete_consumer_groups([group], request_timeout=ADMIN_TIMEOUT_S).values()
        try:
            await asyncio.wrap_future(future)
        except KafkaException as error:
            raise FailedPrecondition(f"Kafka does not remove group {group}: {error.args[0].str()}") from error

    def _read_groups(self, topics: set[str]) -> list[Group]:
        """Blocks. What is committed beside the ends of the partitions."""
        admin = self._admin()
        listed = admin.list_consumer_groups(request_timeout=ADMIN_TIMEOUT_S).result().valid
        names = sorted(group.group_id for group in listed)
        found: list[Group] = []
        if not names:
            return found
        described = admin.describe_consumer_groups(names, request_timeout=ADMIN_TIMEOUT_S)
        for name in names:
            members = described[name].result().members
            (future,) = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(name)]).values()
            committed = [offset for offset in future.result().topic_partitions if offset.topic in topics]
            for topic in sorted({offset.topic for offset in committed}):
                of_topic = [offset for offset in committed if offset.topic == topic]
                ends = admin.list_offsets(
                    {
                        TopicPartition(topic, offset.partition): OffsetSpec.latest()  # type: ignore[no-untyped-call]
                        for offset in of_topic
                    },
                    request_timeout=ADMIN_TIMEOUT_S,
                )
                at = {place.partition: end.result().offset for place, end in ends.items()}
                living = [
                    member
                    for member in members
                    if any(place.topic == topic for place in member.assignment.topic_partitions)
                ]
                found.append(
                    Group(
                        topic=topic,
                        name=name,
                        members=len(living),
                        pending=0,
                        lag=sum(max(0, at[offset.partition] - max(0, offset.offset)) for offset in of_topic),
                        last_delivered_ms=0,
                        idle_s=0.0 if living else None,
                        waiting_s=0.0,
                    )
                )
        return sorted(found, key=lambda group: (group.topic, group.name))

    # --- dead letters

    async def dead_letter_topics(self) -> list[str]:
        """See DeadLetterStore."""
        names = (await self.metadata()).topics
        return sorted(name.removesuffix(DEAD_LETTER_SUFFIX) for name in names if name.endswith(DEAD_LETTER_SUFFIX))

    async def dead_letters(self, topic: str, *, limit: int = LIST_MAX) -> list[DeadLetter]:
        """See DeadLetterStore. Reads the whole dead-letter topic: it is compacted."""
        if dead_letter_topic(topic) not in (await self.metadata()).topics:
            return []
        letters = await asyncio.to_thread(self._read_dead_letters, topic)
        return letters[:limit]

    async def republish_dead_letter(self, letter: DeadLetter) -> None:
        """See DeadLetterStore."""
        await self.ensure_topics([letter.message.topic])
        await self._producer.send([_raw_record_of(letter) if letter.raw else _record_of(letter.message)])
        await self.remove_dead_letter(letter)

    async def remove_dead_letter(self, letter: DeadLetter) -> None:
        """See DeadLetterStore."""
        await self._producer.send([(dead_letter_topic(letter.message.topic), letter.id.encode(), None, [])])

    async def bury(self, group: str, delivery: Delivery, error: str) -> None:
        """Write a dead letter; the offset of its message is committed after that."""
        message = delivery.message
        topic = dead_letter_topic(message.topic)
        await self.ensure_topics([topic])
        now_ms = _now_ms()
        headers: Headers = [
            *(_raw_headers_of(*delivery.raw) if delivery.refusal else ()),
            *_headers_of(message),
            ("key", message.key.encode()),
            ("group", group.encode()),
            ("error", error[:4_000].encode(errors="backslashreplace")),
            ("deliveries", str(delivery.failures).encode()),
            ("first-failed-ms", str(delivery.first_failed_ms or now_ms).encode()),
            ("last-failed-ms", str(now_ms).encode()),
        ]
        name = f"{group}/{delivery.partition}/{delivery.position}".encode()
        try:
            await self._producer.send([(topic, name, message.payload, headers)])
        except _TooLarge:
            note = (
                f"{error[:1_000]} (too large for {topic}: what is kept is only that it was there, at {name.decode()})"
            )
            kept: Headers = [(name, value) for name, value in headers if not name.startswith("raw") and name != "error"]
            await self._producer.send([(topic, name, b"", [*kept, ("error", note.encode(errors="backslashreplace"))])])

    def _read_dead_letters(self, topic: str) -> list[DeadLetter]:
        name = dead_letter_topic(topic)
        consumer = Consumer({**self.settings, "group.id": f"{self.name}-dead-letter-list", "enable.auto.commit": False})
        try:
            low, high = consumer.get_watermark_offsets(TopicPartition(name, 0), timeout=ADMIN_TIMEOUT_S)
            letters: dict[str, DeadLetter] = {}
            if low == high:
                return []
            consumer.assign([TopicPartition(name, 0, OFFSET_BEGINNING)])
            deadline = time.monotonic() + ADMIN_TIMEOUT_S
            while consumer.position([TopicPartition(name, 0)])[0].offset < high:
                record = consumer.poll(0.2)
                if record is None or record.error():
                    if time.monotonic() > deadline:
                        raise Unavailable(f"topic {name} cannot be read to its end within {ADMIN_TIMEOUT_S:g} s")
                    continue
                identity = (record.key() or b"").decode(errors="replace")
                letters.pop(identity, None)
                if record.value() is not None:
                    letters[identity] = _letter_of(topic, identity, record)
            return list(letters.values())
        except KafkaException as error:
            raise Unavailable(f"topic {name} cannot be read: {error.args[0].str()}") from error
        finally:
            consumer.close()


Headers = list[tuple[str, bytes | None]]
Record = tuple[str, bytes | None, bytes | None, Headers]
"""Topic, key, value, headers."""


class _TooLarge(Unavailable):
    """The broker does not take a message of this size."""


def _unavailable(error: KafkaError) -> type[Unavailable]:
    return _TooLarge if error.code() == KafkaError.MSG_SIZE_TOO_LARGE else Unavailable


class _Pending:
    """One publish: counts delivery reports in the poll thread, and wakes the loop once."""

    __slots__ = ("count", "error", "future", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.loop = loop
        self.count = count
        self.error: KafkaError | None = None
        self.future: asyncio.Future[KafkaError | None] = loop.create_future()

    def report(self, error: KafkaError | None, _record: Any) -> None:
        if error is not None:
            self.error = error
        self.count -= 1
        if self.count == 0:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self.loop.call_soon_threadsafe(self.resolve)

    def resolve(self) -> None:
        if not self.future.done():
            self.future.set_result(self.error)


class _ThreadedProducer:
    """The producer and its poll thread; replaced as a whole after a failure."""

    def __init__(self, settings: Mapping[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self._settings = {
            **settings,
            "enable.idempotence": True,
            "enable.gapless.guarantee": True,
            "acks": "all",
            "max.in.flight.requests.per.connection": 1,
            "linger.ms": 1,
            "message.timeout.ms": MESSAGE_TIMEOUT_MS,
            "message.max.bytes": DEAD_LETTER_BYTES_MAX,  # each topic has its own limit, at the broker
            "partitioner": "murmur2_random",  # the same as Java's producers
        }
        self._loop = loop
        self._is_closing = False
        self._ordered = asyncio.Lock()
        self._producer: Any = None
        self._thread: threading.Thread | None = None
        self._begin()

    async def send(self, records: Sequence[Record]) -> None:
        """Return when all records are acknowledged. Raises Unavailable, also when some may have been written."""
        pending = _Pending(self._loop, len(records))
        producer = self._producer
        async with self._ordered:  # two publishes do not mix while one waits for room in the queue
            for topic, key, value, headers in records:
                while True:
                    try:
                        producer.produce(topic, value, key, headers=headers, on_delivery=pending.report)
                        break
                    except BufferError:
                        await asyncio.sleep(PRODUCE_QUEUE_WAIT_S)
                    except KafkaException as error:
                        self._replace(producer)
                        raise _unavailable(error.args[0])(
                            f"Kafka does not take messages for {topic}: {error.args[0].str()}; publish again"
                        ) from error
        failure = await pending.future
        if failure is not None:
            self._replace(producer)
            raise _unavailable(failure)(
                f"Kafka did not acknowledge {len(records)} messages for {records[0][0]}: {failure.str()}; publish again"
            )

    def close(self) -> None:
        """Blocks: flush, end the thread."""
        self._is_closing = True
        self._producer.flush(5.0)
        if self._thread is not None:
            self._thread.join(5.0)

    def _begin(self) -> None:
        producer = self._producer = Producer(self._settings)
        self._thread = threading.Thread(target=self._poll, args=(producer,), name="bus-producer", daemon=True)
        self._thread.start()

    def _replace(self, failed: Any) -> None:
        if failed is not self._producer or self._is_closing:
            return
        _log.warning("the Kafka producer is replaced")
        self._begin()
        failed.purge()  # what was queued fails with a report to its publisher, and is never sent behind its back

    def _poll(self, producer: Any) -> None:
        while not (self._is_closing and len(producer) == 0):
            producer.poll(POLL_S)
            if producer is not self._producer and len(producer) == 0:
                return


class _Track:
    """A partition's offsets: delivered in order, done in any order, committed up to the first that is not done."""

    __slots__ = ("committed", "delivered", "done", "expected")

    def __init__(self) -> None:
        self.delivered: deque[int] = deque()
        self.done: set[int] = set()
        self.committed = -1
        self.expected = -1
        """The offset that comes next; -1 before the first one."""

    def advance(self) -> int | None:
        """The next offset to read after a crash, when it has moved since the last call."""
        position = None
        while self.delivered and self.delivered[0] in self.done:
            position = self.delivered.popleft()
            self.done.discard(position)
        if position is None:
            return None
        self.committed = position + 1
        return self.committed


class _Consumer:
    """One consumer: a thread that polls and rebalances, a dispatcher on the loop."""

    def __init__(
        self,
        bus: KafkaBus,
        topic: str,
        group: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        *,
        batch_max: int,
        concurrency: int,
        from_end: bool,
        on_gap: Callable[[], None] | None,
    ) -> None:
        self._bus = bus
        self._from_end = from_end
        self._on_gap = on_gap
        self._assignments = 0
        self._was_down = False
        self._is_topic_gone = False
        self._lost_at: float | None = None
        """When partitions were lost, or were lacking again; None once there are some."""
        self._lost_s = LOST_S
        self._making: concurrent.futures.Future[None] | None = None
        """The topic, after it was deleted."""
        self._topic = topic
        self._group = group
        self._fetch_count = batch_max if concurrency == 1 else max(64, 2 * concurrency)
        self._loop = asyncio.get_running_loop()
        self._tracks: dict[int, _Track] = {}
        self._consumer: Any = None
        self._stopping = False
        self._may_fetch = threading.Event()
        self._offered = asyncio.Event()
        self._commit_lock = threading.Lock()
        self._to_commit: dict[int, int] = {}
        self._commit_at = 0.0
        self._dispatcher = Dispatcher(
            topic,
            group,
            handler,
            batch_max=batch_max,
            concurrency=concurrency,
            policy=bus.policy,
            now_ms=_now_ms,
            done=self._done,
            bury=self._bury,
        )

    async def run(self) -> None:
        await self._make_topic()
        ended: asyncio.Future[None] = self._loop.create_future()
        thread = threading.Thread(
            target=self._run_thread, args=(ended,), name=f"bus-{self._topic}-{self._group}", daemon=True
        )
        dispatching = self._loop.create_task(self._dispatcher.run())
        signalling = self._loop.create_task(self._signal_wants())
        thread.start()
        try:
            await asyncio.wait({dispatching, signalling, ended}, return_when=asyncio.FIRST_COMPLETED)
            for awaitable in (dispatching, signalling, ended):
                if awaitable.done():
                    awaitable.result()
        finally:
            self._stopping = True
            self._may_fetch.set()
            dispatching.cancel()
            signalling.cancel()
            if self._making is not None:
                self._making.cancel()
            await asyncio.gather(dispatching, signalling, return_exceptions=True)
            await asyncio.shield(asyncio.wait({ended}))

    # --- on the loop

    async def _make_topic(self) -> None:
        """Return when the topic exists."""
        for tries in range(TRIES_MAX):
            try:
                await self._bus.ensure_topics([self._topic])
                return
            except Unavailable as error:
                delay = BACKOFF_S[min(tries, len(BACKOFF_S) - 1)]
                _log.warning("a consumer waits for its topic", topic=self._topic, error=str(error), delay_s=delay)
                await asyncio.sleep(delay)

    def _tell_gap(self, reason: str) -> None:
        """Messages may have been lost: the caller looks into the feed."""
        _log.info("there may be a gap", topic=self._topic, group=self._group, reason=reason)
        if self._on_gap is not None:
            self._on_gap()

    async def _signal_wants(self) -> None:
        """Let the thread fetch whenever the dispatcher wants more than it was offered so far."""
        while True:
            await self._dispatcher.wait_until_wants()
            if any(len(track.delivered) >= UNCOMMITTED_MAX for track in self._tracks.values()):
                await asyncio.sleep(POLL_S)  # a message waits for its next try, and too much was done beyond it
                continue
            self._may_fetch.set()
            await self._offered.wait()
            self._offered.clear()

    def _offer(self, records: Sequence[Any]) -> None:
        deliveries: list[Delivery] = []
        for record in records:
            track = self._tracks.get(record.partition())
            if track is None:
                continue
            offset = record.offset()
            if track.expected not in (offset, -1):
                self._tell_gap(f"partition {record.partition()} goes on at offset {offset}, not at {track.expected}")
            track.expected = offset + 1
            track.delivered.append(offset)
            deliveries.append(_delivery_of(record))
        self._dispatcher.offer(deliveries)
        self._offered.set()

    def _done(self, delivery: Delivery) -> None:
        track = self._tracks.get(delivery.partition)
        if track is None:
            return
        track.done.add(delivery.position)
        position = track.advance()
        if position is not None:
            with self._commit_lock:
                self._to_commit[delivery.partition] = position

    async def _bury(self, delivery: Delivery, error: str) -> None:
        await self._bus.bury(self._group, delivery, error)
        self._done(delivery)

    async def _assign(self, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._tracks[partition] = _Track()
        self._assignments += 1
        if self._assignments > 1 and partitions:
            self._tell_gap("partitions were assigned again")

    async def _revoke(self, partitions: Sequence[int]) -> list[Any]:
        """Finish or forget what these partitions have under way; what is to be committed of them, all of it, once more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REVOKE_TIMEOUT_S):
                await self._dispatcher.revoke(partitions)
        with self._commit_lock:
            for partition in partitions:
                self._to_commit.pop(partition, None)
        tracks = {partition: self._tracks.pop(partition, None) for partition in partitions}
        return [
            TopicPartition(self._topic, partition, track.committed)
            for partition, track in tracks.items()
            if track is not None and track.committed >= 0
        ]

    # --- in the thread

    def _run_thread(self, ended: asyncio.Future[None]) -> None:
        failure: BaseException | None = None
        tries = 0
        while not self._stopping:
            begun = time.monotonic()
            try:
                self._poll_until_stopped()
            except Exception as error:
                if time.monotonic() - begun > 10 * BACKOFF_S[-1]:
                    tries = 0
                delay = BACKOFF_S[min(tries, len(BACKOFF_S) - 1)]
                tries += 1
                _log.warning(
                    "consumer starts again",
                    topic=self._topic,
                    group=self._group,
                    error=str(error),
                    delay_s=delay,
                    exc_info=None if isinstance(error, KafkaException) else error,
                )
                time.sleep(delay)
            except BaseException as error:
                failure = error
                break
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(_resolve, ended, failure)

    def _poll_until_stopped(self) -> None:
        self._is_topic_gone = False
        session_timeout_ms = max(SESSION_TIMEOUT_MS_MIN, self._bus.policy.claim_idle_ms)
        consumer = self._consumer = Consumer(
            {
                **self._bus.settings,
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": session_timeout_ms,
                "heartbeat.interval.ms": min(2_000, session_timeout_ms // 3),
                "queued.min.messages": 1_000,
                "queued.max.messages.kbytes": 16_384,
                "fetch.min.bytes": 1,
                "fetch.wait.max.ms": 500,
                "topic.metadata.refresh.interval.ms": 60_000,
                "topic.metadata.propagation.max.ms": TOPIC_PROPAGATION_MS,
                "error_cb": self._on_error,
            }
        )
        try:
            consumer.subscribe(
                [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            while not self._stopping:
                self._commit(consumer)
                if self._is_topic_gone:
                    self._begin_again("the topic was gone")
                if self._lost_at is not None and time.monotonic() - self._lost_at > self._lost_s:
                    self._lost_at, self._lost_s = time.monotonic(), min(2 * self._lost_s, LOST_S_MAX)
                    self._begin_again("lost partitions did not come back")
                if self._may_fetch.wait(HANDLER_PATIENCE_S):
                    self._fetch(consumer)
                else:
                    self._poll_paused(consumer)
        finally:
            try:
                consumer.close()  # calls _on_revoke for what is left
            finally:
                self._consumer = None

    def _begin_again(self, reason: str) -> None:
        """Make the topic where it is gone, and go on with a new consumer. Raises KafkaException.

        A consumer that rejoins its group before its topic is there again (a broker that lost its disk) is never given a partition.
        """
        self._tell_gap_from_thread(reason)
        if self._making is None or self._making.done():
            self._bus.forget_topic(self._topic)
            self._making = asyncio.run_coroutine_threadsafe(self._make_topic(), self._loop)
        raise KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART, f"topic {self._topic}: {reason}"))

    def _fetch(self, consumer: Any) -> None:
        record = consumer.poll(POLL_S)
        if record is None:
            return
        records = [record]
        while len(records) < self._fetch_count and (record := consumer.poll(0)) is not None:
            records.append(record)
        good = [record for record in records if not self._failed(record)]
        if good and not self._stopping:
            self._may_fetch.clear()
            self._loop.call_soon_threadsafe(self._offer, good)

    def _poll_paused(self, consumer: Any) -> None:
        """Stay in the group while handlers are busy: poll, but get no messages."""
        paused = consumer.assignment()
        consumer.pause(paused)
        try:
            while not self._may_fetch.wait(0):
                self._commit(consumer)
                record = consumer.poll(POLL_S)
                if record is not None and not self._failed(record):  # of a partition that was assigned meanwhile
                    self._loop.call_soon_threadsafe(self._offer, [record])
                    paused = consumer.assignment()
                    consumer.pause(paused)
        finally:
            with contextlib.suppress(KafkaException):  # one of them may have been taken away
                consumer.resume([partition for partition in consumer.assignment() if partition in paused])

    def _commit(self, consumer: Any) -> None:
        """Only ever in this thread: confluent-kafka's commit() waits for a poll() of another thread with the interpreter's lock in hand."""
        if not self._to_commit or time.monotonic() < self._commit_at:
            return
        with self._commit_lock:
            positions, self._to_commit = self._to_commit, {}
        self._commit_at = time.monotonic() + COMMIT_INTERVAL_S
        with contextlib.suppress(KafkaException):  # a later commit says the same and more
            consumer.commit(
                offsets=[TopicPartition(self._topic, partition, position) for partition, position in positions.items()],
                asynchronous=True,
            )

    def _on_error(self, error: KafkaError) -> None:
        """What the library says beside the records."""
        self._bus.complain(error)
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._was_down = True
        if error.code() in _TOPIC_GONE:
            self._is_topic_gone = True

    def _failed(self, record: Any) -> bool:
        """Whether it is an error instead of a record. Raises KafkaException for one that only a new consumer gets over."""
        error = record.error()
        if error is None:
            if self._was_down:
                self._was_down = False
                self._tell_gap_from_thread("all brokers were down")
            return False
        if error.fatal():
            raise KafkaException(error)
        if error.code() == KafkaError._PARTITION_EOF:
            return True
        _log.warning("Kafka reports an error", topic=self._topic, group=self._group, error=error.str())
        if error.code() in _TOPIC_GONE:
            self._is_topic_gone = True
        if error.code() in (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET):
            self._tell_gap_from_thread("the offset was out of range")
        return True

    def _tell_gap_from_thread(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._tell_gap, reason)

    def _on_assign(self, consumer: Any, partitions: Sequence[Any]) -> None:
        if partitions:
            self._lost_at, self._lost_s = None, LOST_S
        if self._from_end and partitions:
            self._begin_at_end(consumer, partitions)
        self._on_loop(self._assign([partition.partition for partition in partitions]))

    def _begin_at_end(self, consumer: Any, partitions: Sequence[Any]) -> None:
        """Where the group has no offset yet, commit the end, so that the group exists from here on."""
        try:
            known = consumer.committed(
                [TopicPartition(self._topic, partition.partition) for partition in partitions], timeout=ADMIN_TIMEOUT_S
            )
            fresh = [TopicPartition(self._topic, partition.partition) for partition in known if partition.offset < 0]
            for partition in fresh:
                _, partition.offset = consumer.get_watermark_offsets(partition, timeout=ADMIN_TIMEOUT_S)
            if fresh:
                consumer.commit(offsets=fresh, asynchronous=False)
        except KafkaException as error:  # then from the beginning: more, not less
            _log.warning(
                "a new group begins with the oldest message", topic=self._topic, group=self._group, error=str(error)
            )

    def _on_revoke(self, consumer: Any, partitions: Sequence[Any]) -> None:
        offsets = self._on_loop(self._revoke([partition.partition for partition in partitions]))
        if offsets and not self._is_topic_gone:  # they would hide the first messages of a topic that is made again
            with contextlib.suppress(KafkaException):
                consumer.commit(offsets=offsets, asynchronous=False)
        self._unpause(consumer, partitions)

    def _on_lost(self, consumer: Any, partitions: Sequence[Any]) -> None:
        _log.warning("partitions were lost", topic=self._topic, group=self._group, count=len(partitions))
        self._tell_gap_from_thread("partitions were lost")
        self._lost_at = time.monotonic()
        self._on_loop(self._revoke([partition.partition for partition in partitions]))
        self._unpause(consumer, partitions)

    def _unpause(self, consumer: Any, partitions: Sequence[Any]) -> None:
        """librdkafka remembers a pause beyond the assignment: a partition that leaves paused would come back silent."""
        with contextlib.suppress(KafkaException):
            consumer.resume(partitions)

    def _on_loop(self, coroutine: Any) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(REVOKE_TIMEOUT_S + 5.0)
        except (RuntimeError, TimeoutError):  # the loop was closed: the process ends
            coroutine.close()
            return None


def _resolve(future: asyncio.Future[None], failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)


def _headers_of(message: Message) -> Headers:
    headers: Headers = [(_HEADER_ID, message.message_id.encode())]
    if message.traceparent:
        headers.append((_HEADER_TRACE, message.traceparent.encode()))
    if message.position > 0:
        headers.append((_HEADER_POSITION, b"%d" % message.position))
    return headers


def _record_of(message: Message) -> Record:
    return message.topic, message.key.encode(), message.payload, _headers_of(message)


def _delivery_of(record: Any) -> Delivery:
    """The message in a record. Never raises: anybody may write into a topic."""
    key, value = record.key(), record.value()
    headers: list[tuple[str, bytes | None]] = []
    with contextlib.suppress(Exception):  # names that are no UTF-8
        headers = record.headers() or []
    get = dict(headers).get
    message, refusal = decode(record.topic(), key, get(_HEADER_ID), value, get(_HEADER_TRACE), get(_HEADER_POSITION))
    delivery = Delivery(message, record.partition(), record.offset())
    if refusal:
        delivery.refusal, delivery.raw = refusal, (key, value is None, headers)
    return delivery


def _raw_headers_of(key: bytes | None, is_null: bool, headers: Headers) -> Headers:
    """What of a record that is no message goes into its dead letter, beside the value."""
    return [
        ("raw", b"null" if is_null else b"value"),
        *([] if key is None else [("raw-key", key)]),
        *((f"raw.{name}", value) for name, value in headers),
    ]


def _raw_of(headers: Headers) -> bytes:
    """The same as text: key, whether the value was null, headers."""
    get = dict(headers).get
    kind, key = get("raw"), get("raw-key")
    if kind is None:
        return b""
    hexed = [
        [name.removeprefix("raw."), None if value is None else value.hex()]
        for name, value in headers
        if name.startswith("raw.")
    ]
    return json.dumps([None if key is None else key.hex(), kind == b"null", hexed]).encode()


def _raw_record_of(letter: DeadLetter) -> Record:
    """What `_raw_of` tells. Raises InvalidArgument where it is something else."""
    try:
        key, is_null, hexed = json.loads(letter.raw)
        headers: Headers = [(str(name), None if text is None else bytes.fromhex(text)) for name, text in hexed]
        raw_key = None if key is None else bytes.fromhex(key)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"dead letter {letter.id}: its raw form cannot be read: {error}") from error
    return letter.message.topic, raw_key, None if is_null else letter.message.payload, headers


def _letter_of(topic: str, identity: str, record: Any) -> DeadLetter:
    headers: Headers = []
    with contextlib.suppress(Exception):  # names that are no UTF-8
        headers = record.headers() or []
    get = dict(headers).get
    message, _ = decode(topic, get("key"), get(_HEADER_ID), record.value(), get(_HEADER_TRACE), get(_HEADER_POSITION))
    return DeadLetter(
        id=identity,
        message=message,
        group=(get("group") or b"").decode(errors="replace"),
        error=(get("error") or b"").decode(errors="replace"),
        delivery_count=number(get("deliveries")),
        first_failed_ms=number(get("first-failed-ms")),
        last_failed_ms=number(get("last-failed-ms")),
        raw=_raw_of(headers),
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
