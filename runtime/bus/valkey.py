"""The bus on Valkey (or Redis 6.2 and later) Streams.

    bus:{payment.events}:0 … :7                 one stream a partition; a message goes to crc32(key) mod 8
        entry  k key · i message id · p payload · t traceparent (left out when empty)
    bus:{payment.events}:partitions             how many, decided once
    bus:{payment.events}:<group>:leases         partition → member that reads it; c:<member> → its connection's id
    bus:{payment.events}:<group>:members        member → when its membership ends (server time, ms)
    bus:{payment.events}:dead-letter            stream of dead letters

Consumer groups alone give no order per key: two consumers of a group get neighbouring messages of the same key. So each partition is read
by one consumer of a group at a time, as on Kafka. Members share the partitions out among themselves with one small script, `_BEAT`, that
each runs every third of `claim_idle_ms`: it renews the membership, counts the living, and takes free partitions up to a fair share. Who has
more than its share finishes what runs and lets go. A partition's new reader first claims (XAUTOCLAIM) everything that was delivered to
others and not acknowledged, in order, then reads on. A member that falls silent loses its partitions after `claim_idle_ms`; one whose
connection the server no longer has, as after SIGKILL, after `GONE_GRACE_S`. A member that is slow but alive loses nothing: its beat does
not wait for its handlers.

Rejected: XAUTOCLAIM by idle time between equal consumers. It steals from a slow handler unless each message is refreshed on its own, waits
`claim_idle_ms` after each restart, and breaks the order of keys with more than one consumer.

Trimming (XTRIM MINID) follows the slowest group: up to its oldest unacknowledged entry, or what it was delivered last. Groups of
`TOPIC_GROUPS` are created with the topic, so that a reader that has not started yet counts too.

Needs `appendonly yes` and `appendfsync always` to keep its word through a power cut; not made for Valkey Cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import structlog

from kernel.errors import Unavailable
from runtime.bus import TOPIC_GROUPS, BusPolicy, Message
from runtime.bus._dispatch import Delivery, Dispatcher
from runtime.bus._resp import Address, Command, Link, ReplyError, RespConnection, open_connection, parse_url
from runtime.bus.dead_letter import LIST_MAX, DeadLetter

__all__ = ["ValkeyBus"]

GONE_GRACE_S = 0.5
"""How long a member whose connection is gone may take to come back before its partitions are taken."""
ACK_DELAY_S = 0.02
"""Acknowledgements that come within this time share a command, and so one fsync. A crash in between only redelivers."""
CLAIM_BATCH = 256
LEAVE_TIMEOUT_S = 1.0
BACKOFF_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.0)

_BEAT = """
local leases, members, me = KEYS[1], KEYS[2], ARGV[1]
local ttl_ms, partition_count, client = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function forget(member)
  redis.call('ZREM', members, member)
  redis.call('HDEL', leases, 'c:' .. member)
end
for i = 5, #ARGV do forget(ARGV[i]) end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', members, '-inf', now)) do forget(member) end
redis.call('ZADD', members, now + ttl_ms, me)
if redis.call('HGET', leases, 'c:' .. me) ~= client then redis.call('HSET', leases, 'c:' .. me, client) end
local living, others, count = {}, {}, 0
for _, member in ipairs(redis.call('ZRANGE', members, 0, -1)) do
  living[member] = true
  count = count + 1
  if member ~= me then
    others[#others + 1] = member
    others[#others + 1] = redis.call('HGET', leases, 'c:' .. member) or ''
  end
end
local share = math.ceil(partition_count / count)
local mine, free = {}, {}
for partition = 0, partition_count - 1 do
  local holder = redis.call('HGET', leases, partition)
  if holder == me then mine[#mine + 1] = partition
  elseif not holder or not living[holder] then free[#free + 1] = partition end
end
for _, partition in ipairs(free) do
  if #mine < share then
    redis.call('HSET', leases, partition, me)
    mine[#mine + 1] = partition
  end
end
return {share, mine, others}
"""

_RELEASE = """
for i = 2, #ARGV do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
"""

_LEAVE = """
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], 'c:' .. ARGV[1])
for i = 2, #ARGV do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
"""

# Consumers of the group that hold nothing any more, in one step with the look: deleting one that holds something would lose it.
_SWEEP = """
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  if consumer[2] ~= ARGV[2] and consumer[4] == 0 then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer[2]) end
end
"""

_log = structlog.get_logger("runtime.bus.valkey")


@dataclass(frozen=True, slots=True)
class _Topic:
    name: str
    streams: tuple[str, ...]

    def stream_of(self, key: str) -> str:
        return self.streams[crc32(key.encode()) % len(self.streams)]


class ValkeyBus:
    """A Bus and a DeadLetterStore. One shared connection for commands, and one more for each consumer that waits."""

    def __init__(
        self, address: Address, *, policy: BusPolicy, name: str, groups: Mapping[str, tuple[str, ...]] = TOPIC_GROUPS
    ) -> None:
        self.address = address
        self.policy = policy
        self.name = name
        self.link = Link(address, name)
        self._groups = groups
        self._topics: dict[str, _Topic] = {}

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        policy: BusPolicy | None = None,
        name: str = "ducat",
        groups: Mapping[str, tuple[str, ...]] = TOPIC_GROUPS,
        wait_s: float = 60.0,
    ) -> ValkeyBus:
        """Wait with backoff up to `wait_s` for the server, then raise Unavailable."""
        bus = cls(parse_url(url), policy=policy or BusPolicy(), name=name, groups=groups)
        deadline = time.monotonic() + wait_s
        for tries in range(1_000_000):
            try:
                await bus.link.get()
                break
            except Unavailable:
                delay = BACKOFF_S[min(tries, len(BACKOFF_S) - 1)]
                if time.monotonic() + delay > deadline:
                    raise
                await asyncio.sleep(delay)
        return bus

    async def publish(self, messages: Sequence[Message]) -> None:
        """One round trip; several messages are one transaction, so that a repeated publish cannot reorder a key."""
        if not messages:
            return
        adds: list[Command] = []
        for message in messages:
            topic = self._topics.get(message.topic) or await self.topic(message.topic)
            adds.append(("XADD", topic.stream_of(message.key), "*", *_fields(message)))
        try:
            if len(adds) == 1:
                answers = await self.link.call(adds)
            else:
                executed = (await self.link.call([("MULTI",), *adds, ("EXEC",)]))[-1]
                answers = executed if isinstance(executed, list) else [executed]
        except ConnectionError as error:
            raise Unavailable(
                f"the bus lost its connection while publishing {len(adds)} messages; publish again ({error})"
            ) from error
        _check(answers, f"publishing {len(adds)} messages to {messages[0].topic}")

    async def consume(
        self,
        topic: str,
        group: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        *,
        batch_max: int = 64,
    ) -> None:
        """See Bus."""
        await _Consumer(self, topic, group, handler, batch_max=batch_max, concurrency=1).run()

    async def consume_each(
        self,
        topic: str,
        group: str,
        handler: Callable[[Message], Awaitable[None]],
        *,
        concurrency: int = 32,
    ) -> None:
        """See Bus."""

        async def handle(messages: Sequence[Message]) -> None:
            await handler(messages[0])

        await _Consumer(self, topic, group, handle, batch_max=1, concurrency=concurrency).run()

    async def close(self) -> None:
        """Close the shared connection."""
        self.link.close()

    # --- topics

    async def topic(self, name: str) -> _Topic:
        """The topic, with the number of partitions that was decided when it was first used, and with its groups."""
        known = self._topics.get(name)
        if known is not None:
            return known
        count_key = f"bus:{{{name}}}:partitions"
        try:
            replies = await self.link.call([("SET", count_key, self.policy.partition_count, "NX"), ("GET", count_key)])
            _check(replies, f"looking up topic {name}")
            made = _Topic(name, tuple(f"bus:{{{name}}}:{partition}" for partition in range(int(replies[1]))))
            groups = self._groups.get(name, ())
            if groups:
                commands = [_create_group(stream, group) for group in groups for stream in made.streams]
                _check(await self.link.call(commands), f"creating the groups of topic {name}", "BUSYGROUP")
        except ConnectionError as error:
            raise Unavailable(f"the bus lost its connection while looking up topic {name} ({error})") from error
        self._topics[name] = made
        return made

    def groups_of(self, name: str) -> tuple[str, ...]:
        """The groups that a topic must have before it may be trimmed."""
        return self._groups.get(name, ())

    def forget_topic(self, name: str) -> None:
        """Look it up again at its next use: the server lost its data."""
        self._topics.pop(name, None)

    # --- dead letters

    async def dead_letter_topics(self) -> list[str]:
        """See DeadLetterStore."""
        found: set[str] = set()
        cursor = b"0"
        while True:
            (reply,) = await self.link.call([("SCAN", cursor, "MATCH", "bus:{*}:dead-letter", "COUNT", 1000)])
            _check([reply], "looking for dead letters")
            cursor, keys = reply
            found.update(key.decode().removeprefix("bus:{").removesuffix("}:dead-letter") for key in keys)
            if cursor == b"0":
                return sorted(found)

    async def dead_letters(self, topic: str, *, limit: int = LIST_MAX) -> list[DeadLetter]:
        """See DeadLetterStore."""
        letters: list[DeadLetter] = []
        start = "-"
        while len(letters) < limit:
            count = min(limit - len(letters), 1_000)
            (entries,) = await self.link.call([("XRANGE", _dead_letter_stream(topic), start, "+", "COUNT", count)])
            _check([entries], f"reading the dead letters of {topic}")
            letters += [_letter_of(topic, position, fields) for position, fields in entries]
            if len(entries) < count:
                break
            start = "(" + entries[-1][0].decode()
        return letters

    async def republish_dead_letter(self, letter: DeadLetter) -> None:
        """See DeadLetterStore; both steps in one transaction here."""
        message = letter.message
        topic = await self.topic(message.topic)
        commands: list[Command] = [
            ("MULTI",),
            ("XADD", topic.stream_of(message.key), "*", *_fields(message)),
            ("XDEL", _dead_letter_stream(message.topic), letter.id),
            ("EXEC",),
        ]
        _check((await self.link.call(commands))[-1:], f"retrying dead letter {letter.id} of {message.topic}")

    async def bury(self, topic: _Topic, group: str, delivery: Delivery, error: str) -> None:
        """Move a message to the dead letters and acknowledge it, in one transaction."""
        now_ms = _now_ms()
        fields = (
            *_fields(delivery.message),
            *("group", group, "error", error[:4_000], "deliveries", delivery.failures),
            *("first_ms", delivery.first_failed_ms or now_ms, "last_ms", now_ms),
        )
        commands: list[Command] = [
            ("MULTI",),
            ("XADD", _dead_letter_stream(topic.name), "*", *fields),
            ("XACK", topic.streams[delivery.partition], group, delivery.position),
            ("EXEC",),
        ]
        _check((await self.link.call(commands))[-1:], f"burying message {delivery.message.message_id} of {topic.name}")


class _Consumer:
    """One consumer: keeps its membership, reads its partitions, acknowledges what the dispatcher has done."""

    def __init__(
        self,
        bus: ValkeyBus,
        topic: str,
        group: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        *,
        batch_max: int,
        concurrency: int,
    ) -> None:
        self._bus = bus
        self._topic_name = topic
        self._topic = _Topic(topic, ())
        self._group = group
        self._member = f"{bus.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._leases = f"bus:{{{topic}}}:{group}:leases"
        self._members = f"bus:{{{topic}}}:{group}:members"
        self._beat_interval_s = bus.policy.claim_idle_ms / 3000
        self._read_count = batch_max if concurrency == 1 else max(64, 2 * concurrency)
        self._owned: set[int] = set()
        """Partitions that are read. A partition that is being let go is in `_draining` instead."""
        self._draining: dict[int, asyncio.Task[None]] = {}
        self._held: dict[int, set[bytes]] = {}
        """Entries of each partition from their offer to their acknowledgement at the server."""
        self._acks: dict[int, list[bytes]] = {}
        self._ack_timer: asyncio.TimerHandle | None = None
        self._others: dict[str, str] = {}
        self._gone_since: dict[str, float] = {}
        self._trim_at = 0.0
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
        dispatching = asyncio.get_running_loop().create_task(self._dispatcher.run())
        try:
            await self._keep_reading()
        finally:
            dispatching.cancel()
            for task in self._draining.values():
                task.cancel()
            await asyncio.gather(dispatching, *self._draining.values(), return_exceptions=True)
            if self._ack_timer is not None:
                self._ack_timer.cancel()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    await self._leave()

    # --- reading

    async def _keep_reading(self) -> None:
        failures = 0
        while True:
            connection: RespConnection | None = None
            begun = time.monotonic()
            try:
                self._topic = await self._bus.topic(self._topic_name)
                connection = await open_connection(self._bus.address, self._member)
                await self._read(connection)
            except (Unavailable, ConnectionError, ReplyError) as error:
                if isinstance(error, ReplyError) and str(error).startswith("NOGROUP"):
                    self._bus.forget_topic(self._topic_name)
                if time.monotonic() - begun > 2 * BACKOFF_S[-1]:
                    failures = 0
                delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                _log.warning(
                    "consumer connects again",
                    topic=self._topic_name,
                    group=self._group,
                    error=str(error),
                    delay_s=delay,
                )
                await asyncio.sleep(delay)
            finally:
                if connection is not None:
                    connection.close()

    async def _read(self, connection: RespConnection) -> None:
        loop = asyncio.get_running_loop()
        dispatcher = self._dispatcher
        beat_at = 0.0
        is_new = True
        while True:
            now = loop.time()
            if now >= beat_at:
                is_quick = await self._beat(connection, is_new_connection=is_new)
                is_new = False
                beat_at = now + (GONE_GRACE_S if is_quick else self._beat_interval_s)
                continue
            if not dispatcher.wants:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(beat_at - now):
                        await dispatcher.wait_until_wants()
                continue
            await dispatcher.wait_until_wants()  # raises what ended it
            if not self._owned:
                await asyncio.sleep(beat_at - now)
                continue
            # The block ends before the membership could: no message is delivered to a reader that lost the partition meanwhile.
            partitions = sorted(self._owned)
            read: Command = (
                *("XREADGROUP", "GROUP", self._group, self._member, "COUNT", self._read_count),
                *("BLOCK", max(1, int((beat_at - now) * 1000)), "STREAMS"),
                *(self._topic.streams[partition] for partition in partitions),
                *(">" for _ in partitions),
            )
            (streams,) = await connection.send((read,), beat_at - now + 10.0)
            if isinstance(streams, ReplyError):
                raise streams
            for stream, entries in streams or ():
                self._offer(int(stream[stream.rindex(b":") + 1 :]), entries)

    def _offer(self, partition: int, entries: Iterable[Any], counts: Mapping[bytes, int] | None = None) -> None:
        if partition not in self._owned:  # let go while the answer was on its way: its next reader claims them
            return
        held = self._held.setdefault(partition, set())
        deliveries: list[Delivery] = []
        for position, fields in entries:
            if fields is None or position in held:
                continue
            held.add(position)
            count = counts.get(position, 1) if counts else 1
            deliveries.append(Delivery(_message_of(self._topic_name, fields), partition, position, count))
        if deliveries:
            self._dispatcher.offer(deliveries)

    # --- membership

    async def _beat(self, connection: RespConnection, *, is_new_connection: bool) -> bool:
        """Renew the membership, take and let go of partitions; True when the next beat should come soon."""
        dead = [member for member, since in self._gone_since.items() if time.monotonic() - since >= GONE_GRACE_S * 0.9]
        limits: Command = (self._bus.policy.claim_idle_ms, len(self._topic.streams), connection.client_id)
        replies = await connection.call([("EVAL", _BEAT, 2, self._leases, self._members, self._member, *limits, *dead)])
        _check(replies, "renewing the membership")
        share, mine, others = replies[0]
        self._gone_since = {member: since for member, since in self._gone_since.items() if member not in dead}
        self._others = {others[i].decode(): others[i + 1].decode() for i in range(0, len(others), 2)}
        leased = set(mine)
        lost = self._owned - leased
        surplus = sorted(self._owned & leased)[share:] if len(leased) > share else []
        if lost or surplus:
            self._owned.difference_update(lost, surplus)
            self._drain(lost, is_leased=False)
            self._drain(surplus, is_leased=True)
        fresh = leased - self._draining.keys() - (set() if is_new_connection else self._owned)
        if fresh:
            await self._take_over(connection, sorted(fresh))
        if self._acks and self._ack_timer is None:  # put back when the shared connection was lost
            await self._acknowledge_over(connection)
        if time.monotonic() >= self._trim_at:
            self._trim_at = time.monotonic() + self._bus.policy.trim_interval_ms / 1000
            await self._trim(connection)
        return await self._look_for_gone(connection)

    async def _look_for_gone(self, connection: RespConnection) -> bool:
        """Note members whose connection the server no longer has; True when there are any."""
        clients = {client: member for member, client in self._others.items() if client}
        if not clients:
            self._gone_since = {}
            return False
        (listed,) = await connection.call([("CLIENT", "LIST", "ID", *clients)])
        if isinstance(listed, ReplyError):  # not allowed on this server: the membership's end must do
            return False
        living = {line.split(b" ", 1)[0].removeprefix(b"id=").decode() for line in listed.splitlines()}
        now = time.monotonic()
        self._gone_since = {
            member: self._gone_since.get(member, now) for client, member in clients.items() if client not in living
        }
        return bool(self._gone_since)

    async def _take_over(self, connection: RespConnection, partitions: Sequence[int]) -> None:
        """Begin to read partitions: first what was delivered before, to whomever, and not acknowledged."""
        streams = self._topic.streams
        _check(
            await connection.call([_create_group(streams[partition], self._group) for partition in partitions]),
            f"creating group {self._group} of {self._topic_name}",
            "BUSYGROUP",
        )
        self._owned.update(partitions)
        cursors: dict[int, bytes] = dict.fromkeys(partitions, b"0-0")
        while cursors:
            commands: list[Command] = []
            for partition, cursor in cursors.items():
                commands.append(
                    ("XAUTOCLAIM", streams[partition], self._group, self._member, 0, cursor, "COUNT", CLAIM_BATCH)
                )
                commands.append(("XPENDING", streams[partition], self._group, cursor, "+", CLAIM_BATCH))
            replies = await connection.call(commands)
            _check(replies, f"claiming messages of {self._topic_name}")
            for index, partition in enumerate(list(cursors)):
                claimed, pending = replies[2 * index], replies[2 * index + 1]
                cursors[partition] = claimed[0]
                self._offer(partition, claimed[1], {entry[0]: entry[3] for entry in pending})
                if claimed[0] == b"0-0":
                    del cursors[partition]
        await connection.call(
            [("EVAL", _SWEEP, 1, streams[partition], self._group, self._member) for partition in partitions]
        )

    def _drain(self, partitions: Collection[int], *, is_leased: bool) -> None:
        if not partitions:
            return
        task = asyncio.get_running_loop().create_task(self._let_go(sorted(partitions), is_leased))
        for partition in partitions:
            self._draining[partition] = task

    async def _let_go(self, partitions: Sequence[int], is_leased: bool) -> None:
        """Finish what runs, acknowledge it, then give the lease back."""
        try:
            await self._dispatcher.revoke(partitions)
            taken, commands = self._take_acks()
            if is_leased:
                commands.append(("EVAL", _RELEASE, 1, self._leases, self._member, *partitions))
            if commands:
                try:
                    self._acknowledged(taken, await self._bus.link.call(commands))
                except (Unavailable, ConnectionError):  # the next beat asks again: the lease is still ours
                    self._put_back(taken)
        finally:
            for partition in partitions:
                self._draining.pop(partition, None)
                self._held.pop(partition, None)
                self._acks.pop(partition, None)

    async def _leave(self) -> None:
        taken, commands = self._take_acks()
        partitions = sorted(self._owned | self._draining.keys())
        commands.append(("EVAL", _LEAVE, 2, self._leases, self._members, self._member, *partitions))
        self._acknowledged(taken, await self._bus.link.call(commands))

    # --- acknowledging

    def _done(self, delivery: Delivery) -> None:
        self._acks.setdefault(delivery.partition, []).append(delivery.position)
        if self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(ACK_DELAY_S, self._flush)

    async def _bury(self, delivery: Delivery, error: str) -> None:
        await self._bus.bury(self._topic, self._group, delivery, error)
        held = self._held.get(delivery.partition)
        if held is not None:
            held.discard(delivery.position)

    def _flush(self) -> None:
        """Acknowledge over the shared connection. Where it is lost, the acknowledgements wait for the next beat."""
        self._ack_timer = None
        connection = self._bus.link.opened
        if not self._acks or connection is None:
            return
        taken, commands = self._take_acks()

        def answered(future: asyncio.Future[list[Any]]) -> None:
            if future.cancelled() or future.exception() is not None:
                self._put_back(taken)
            else:
                self._acknowledged(taken, future.result())

        connection.send(commands).add_done_callback(answered)

    async def _acknowledge_over(self, connection: RespConnection) -> None:
        taken, commands = self._take_acks()
        try:
            self._acknowledged(taken, await connection.call(commands))
        except BaseException:
            self._put_back(taken)
            raise

    def _take_acks(self) -> tuple[dict[int, list[bytes]], list[Command]]:
        taken, self._acks = self._acks, {}
        streams = self._topic.streams
        return taken, [("XACK", streams[partition], self._group, *positions) for partition, positions in taken.items()]

    def _put_back(self, taken: Mapping[int, list[bytes]]) -> None:
        for partition, positions in taken.items():
            if partition in self._owned or partition in self._draining:
                self._acks.setdefault(partition, []).extend(positions)

    def _acknowledged(self, taken: Mapping[int, list[bytes]], replies: Sequence[Any]) -> None:
        for (partition, positions), reply in zip(taken.items(), replies, strict=False):
            if isinstance(reply, ReplyError):
                self._put_back({partition: positions})
            elif partition in self._held:
                self._held[partition].difference_update(positions)

    # --- trimming

    async def _trim(self, connection: RespConnection) -> None:
        """Trim what every group has handled, and claim what a former reader was delivered after it had lost a partition."""
        partitions = sorted(self._owned)
        streams = [self._topic.streams[partition] for partition in partitions]
        if not streams:
            return
        infos = await connection.call(
            [
                command
                for stream in streams
                for command in (("XINFO", "GROUPS", stream), ("XINFO", "CONSUMERS", stream, self._group))
            ]
        )
        _check(infos, f"looking at the groups of {self._topic_name}", "ERR no such key")
        groups = [[_pairs(group) for group in infos[2 * index]] for index in range(len(streams))]
        stray = [
            partition
            for index, partition in enumerate(partitions)
            if any(
                consumer[b"name"] != self._member.encode() and consumer[b"pending"]
                for consumer in map(_pairs, infos[2 * index + 1])
            )
        ]
        pending: list[Command] = [
            ("XPENDING", stream, group[b"name"])
            for stream, of_stream in zip(streams, groups, strict=True)
            for group in of_stream
            if group[b"pending"]
        ]
        summaries = iter(await connection.call(pending) if pending else ())
        trims: list[Command] = []
        for stream, of_stream in zip(streams, groups, strict=True):
            keep_from: list[tuple[int, int]] = [
                (0, 0)
                for name in self._bus.groups_of(self._topic_name)
                if name.encode() not in {group[b"name"] for group in of_stream}
            ]
            for group in of_stream:
                oldest = next(summaries)[1] if group[b"pending"] else None
                if oldest is not None:
                    keep_from.append(_position(oldest))
                else:
                    milliseconds, sequence = _position(group[b"last-delivered-id"])
                    keep_from.append((milliseconds, sequence + 1))
            if keep_from and min(keep_from) > (0, 1):
                milliseconds, sequence = min(keep_from)
                trims.append(("XTRIM", stream, "MINID", f"{milliseconds}-{sequence}"))
        if trims:
            _check(await connection.call(trims), f"trimming {self._topic_name}")
        if stray:
            await self._take_over(connection, stray)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _fields(message: Message) -> Command:
    if message.traceparent:
        return ("k", message.key, "i", message.message_id, "p", message.payload, "t", message.traceparent)
    return ("k", message.key, "i", message.message_id, "p", message.payload)


def _message_of(topic: str, fields: Sequence[bytes]) -> Message:
    if fields[0::2][:3] == [b"k", b"i", b"p"]:
        traceparent = fields[7].decode() if len(fields) > 7 and fields[6] == b"t" else ""
        return Message(topic, fields[1].decode(), fields[3].decode(), fields[5], traceparent)
    found = dict(zip(fields[0::2], fields[1::2], strict=True))  # not ours; the handler will refuse it
    return Message(topic, found.get(b"k", b"").decode(errors="replace"), "", found.get(b"p", b""))


def _letter_of(topic: str, position: bytes, fields: Sequence[bytes]) -> DeadLetter:
    found = dict(zip(fields[0::2], fields[1::2], strict=True))
    return DeadLetter(
        id=position.decode(),
        message=_message_of(topic, fields),
        group=found[b"group"].decode(),
        error=found[b"error"].decode(errors="replace"),
        delivery_count=int(found[b"deliveries"]),
        first_failed_ms=int(found[b"first_ms"]),
        last_failed_ms=int(found[b"last_ms"]),
    )


def _dead_letter_stream(topic: str) -> str:
    return f"bus:{{{topic}}}:dead-letter"


def _create_group(stream: str, group: str) -> Command:
    return ("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")


def _pairs(flat: Sequence[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[0::2], flat[1::2], strict=True))


def _position(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence)


def _check(replies: Iterable[Any], doing: str, *expected: str) -> None:
    """Raise for an error among replies, other than an expected one: Unavailable where waiting helps, else the ReplyError."""
    for reply in replies:
        if isinstance(reply, ReplyError) and not str(reply).startswith(expected or ("\0",)):
            if reply.is_transient:
                raise Unavailable(f"Valkey refused while {doing}: {reply}") from reply
            raise reply
