"""The bus on Valkey (or Redis 6.2 and later) Streams.

    bus:{payment.events}:0 … :7                 one stream a partition; a message goes to crc32(key) mod 8
        entry  k key · i message id · p payload · t traceparent (left out when empty) · n position in the feed (when > 0)
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

Trimming (XTRIM MINID) follows the slowest group: up to its oldest unacknowledged entry, or what it was delivered last. A group that has had
no living member for `group_idle_max_s` no longer counts, and no stream keeps more than about `stream_length_max` entries: the feed of the
publisher has them. Groups are made by their readers. One that has to be made again in the life of its reader begins where that was.

The server may lose its data, or parts of it, at any time, and anybody may write into it: a reader that meets an answer that it did not
expect begins again with a new connection, and tells its caller that there may be a gap (`on_gap`).

Needs `appendonly yes` and `appendfsync always` to keep its word through a power cut; not made for Valkey Cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import hiredis
import structlog

from kernel.errors import DucatError, NotPermitted, Unavailable
from runtime.bus import BusPolicy, Message
from runtime.bus._decode import decode, number
from runtime.bus._dispatch import Delivery, Dispatcher
from runtime.bus._resp import Address, Command, Link, ReplyError, RespConnection, open_connection, parse_url
from runtime.bus.dead_letter import LIST_MAX, DeadLetter
from runtime.bus.groups import Group, LagReport

__all__ = ["ValkeyBus"]

GONE_GRACE_S = 0.5
"""How long a member whose connection is gone may take to come back before its partitions are taken."""
ACK_DELAY_S = 0.02
"""Acknowledgements that come within this time share a command, and so one fsync. A crash in between only redelivers."""
CLAIM_BATCH = 256
CAP_EVERY = 1_000
"""Messages after which a publisher cuts its streams to their length: while nobody reads, nobody else does."""
PARTITION_COUNT_MAX = 4_096
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
for _, member in ipairs(redis.call('ZRANGEBYSCORE', members, now + 10 * ttl_ms, '+inf')) do forget(member) end
local is_new = redis.call('ZADD', members, now + ttl_ms, me)
if redis.call('HGET', leases, 'c:' .. me) ~= client then redis.call('HSET', leases, 'c:' .. me, client) end
redis.call('HSET', leases, 'seen', now)
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
return {share, mine, others, is_new}
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

_BROUGHT_BACK = "the feed brings it back, some seconds late"
_COSTS = {
    "appendonly": ("yes", f"a restart of the server forgets what is under way: {_BROUGHT_BACK}"),
    "appendfsync": (
        "always",
        f"a power cut takes about the last second of messages, although acknowledged: {_BROUGHT_BACK}",
    ),
    "maxmemory-policy": (
        "noeviction",
        f"a server short of memory throws streams, groups and leases away: {_BROUGHT_BACK}",
    ),
}
"""Setting: what it should be, and what it costs where it is not."""

_IDENTITY = (b"run_id:", b"master_replid:")

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

    def __init__(self, address: Address, *, policy: BusPolicy, name: str) -> None:
        self.address = address
        self.policy = policy
        self.name = name
        self.link = Link(address, name)
        self._topics: dict[str, _Topic] = {}
        self._uncapped = 0
        """Messages published since the streams were last cut to their length."""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        policy: BusPolicy | None = None,
        name: str = "ducat",
        wait_s: float = 60.0,
    ) -> ValkeyBus:
        """Wait with backoff up to `wait_s` for the server, then raise Unavailable. Raises NotPermitted at once."""
        bus = cls(parse_url(url), policy=policy or BusPolicy(), name=name)
        deadline = time.monotonic() + wait_s
        for tries in range(1_000_000):
            try:
                await bus.link.get()
                break
            except NotPermitted:
                raise
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
        self._uncapped += len(adds)
        if self._uncapped >= CAP_EVERY:
            self._uncapped = 0
            with contextlib.suppress(Unavailable, ConnectionError):  # the next thousand asks again
                await self.link.call([self.cap(stream) for topic in self._topics.values() for stream in topic.streams])

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
        """Close the shared connection."""
        self.link.close()

    async def weaknesses(self) -> list[str]:
        """What the server's settings may cost, one sentence each. Raises Unavailable."""
        try:
            replies = await self.link.call([("CONFIG", "GET", name) for name in _COSTS])
        except ConnectionError as error:
            raise Unavailable(
                f"the bus lost its connection while looking at the server's settings ({error})"
            ) from error
        found: list[str] = []
        for name, reply in zip(_COSTS, replies, strict=True):
            good, cost = _COSTS[name]
            value = _setting_of(reply)
            if value is None:
                found.append(f"{name} is unknown, the server does not tell; wanted: {good}. Otherwise {cost}")
            elif value != good:
                found.append(f"{name} is {value}, wanted: {good}. {cost[0].upper()}{cost[1:]}")
        return found

    # --- topics

    async def topic(self, name: str) -> _Topic:
        """The topic, with the number of partitions that was decided when it was first used, and with its groups."""
        known = self._topics.get(name)
        if known is not None:
            return known
        count_key = f"bus:{{{name}}}:partitions"
        try:
            replies = await self.link.call([("SET", count_key, self.policy.partition_count, "NX"), ("GET", count_key)])
        except ConnectionError as error:
            raise Unavailable(f"the bus lost its connection while looking up topic {name} ({error})") from error
        _check(replies, f"looking up topic {name}")
        count = number(replies[1])
        if not 1 <= count <= PARTITION_COUNT_MAX:
            raise Unavailable(
                f"Valkey's key {count_key}: expected the number of partitions of topic {name}, 1 to {PARTITION_COUNT_MAX}, got"
                f" {replies[1]!r}; set it to what it was (8 unless it was changed), as many as there are streams bus:{{{name}}}:N"
            )
        made = _Topic(name, tuple(f"bus:{{{name}}}:{partition}" for partition in range(count)))
        self._topics[name] = made
        return made

    def forget_topic(self, name: str) -> None:
        """Look it up again at its next use: the server lost its data."""
        self._topics.pop(name, None)

    def cap(self, stream: str) -> Command:
        """The command that cuts a stream to its length."""
        return ("XTRIM", stream, "MAXLEN", "~", self.policy.stream_length_max)

    # --- groups

    async def groups(self, topic: str) -> list[Group]:
        """See GroupStore."""
        made = await self.topic(topic)
        return (await _look(self.link.call, made, range(len(made.streams)))).groups()

    async def all_groups(self) -> tuple[list[Group], dict[str, str]]:
        """See GroupStore."""
        found: list[Group] = []
        broken: dict[str, str] = {}
        for name in await self._names_of("partitions"):
            try:
                found += await self.groups(name)
            except (DucatError, ReplyError) as error:  # a key of this topic is of another type, or is no number
                broken[name] = str(error)
        return found, broken

    async def remove_group(self, topic: str, group: str) -> None:
        """See GroupStore."""
        streams = (await self.topic(topic)).streams
        doing = f"removing group {group} of {topic}"
        listed = await self.link.call([("XINFO", "GROUPS", stream) for stream in streams])
        names = {
            known[b"name"]
            for reply in listed
            if not isinstance(reply, ReplyError)
            for known in map(_pairs, reply)
            if _text(known[b"name"]) == group
        }
        for name in names:
            prefix = f"bus:{{{topic}}}:".encode() + name
            keys: Command = ("DEL", prefix + b":leases", prefix + b":members")
            commands: list[Command] = [*(("XGROUP", "DESTROY", stream, name) for stream in streams), keys]
            _check(await self.link.call(commands), doing, "ERR The XGROUP", "ERR no such key")

    async def _names_of(self, kind: str) -> list[str]:
        """The topics that have a key of this kind, sorted."""
        found: set[str] = set()
        cursor = b"0"
        while True:
            (reply,) = await self.link.call([("SCAN", cursor, "MATCH", f"bus:{{*}}:{kind}", "COUNT", 1000)])
            _check([reply], "looking for topics")
            cursor, keys = reply
            found.update(key.decode(errors="replace").removeprefix("bus:{").removesuffix(f"}}:{kind}") for key in keys)
            if cursor == b"0":
                return sorted(found)

    # --- dead letters

    async def dead_letter_topics(self) -> list[str]:
        """See DeadLetterStore."""
        return await self._names_of("dead-letter")

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
        """See DeadLetterStore."""
        message = letter.message
        topic = await self.topic(message.topic)
        doing = f"retrying dead letter {letter.id} of {message.topic}"
        raw = _unpack(letter.raw)
        if raw:
            key = dict(zip(raw[0::2], raw[1::2], strict=False)).get(b"k", b"")
            add: Command = ("XADD", topic.streams[crc32(key) % len(topic.streams)], "*", *raw)
        else:
            add = ("XADD", topic.stream_of(message.key), "*", *_fields(message))
        _check(await self.link.call([add]), doing)
        await self.remove_dead_letter(letter)

    async def remove_dead_letter(self, letter: DeadLetter) -> None:
        """See DeadLetterStore."""
        stream = _dead_letter_stream(letter.message.topic)
        _check(await self.link.call([("XDEL", stream, letter.id)]), f"removing dead letter {letter.id}")

    async def bury(self, topic: _Topic, group: str, delivery: Delivery, error: str) -> None:
        """Move a message to the dead letters, then acknowledge it. Not in one transaction: that would acknowledge also where the first
        step is refused."""
        now_ms = _now_ms()
        message = delivery.message
        fields: Command = (
            *(
                ("k", message.key, "i", message.message_id, "raw", _pack(delivery.raw))
                if delivery.raw
                else _fields(message)
            ),
            *(
                "group",
                group,
                "error",
                error[:4_000].encode(errors="backslashreplace"),
                "deliveries",
                delivery.failures,
            ),
            *("first_ms", delivery.first_failed_ms or now_ms, "last_ms", now_ms),
        )
        doing = f"burying message {message.message_id} of {topic.name}"
        _check(await self.link.call([("XADD", _dead_letter_stream(topic.name), "*", *fields)]), doing)
        _check(await self.link.call([("XACK", topic.streams[delivery.partition], group, delivery.position)]), doing)


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
        from_end: bool,
        on_gap: Callable[[], None] | None,
    ) -> None:
        self._bus = bus
        self._from_end = from_end
        self._on_gap = on_gap
        self._topic_name = topic
        self._topic = _Topic(topic, ())
        self._group = group
        self._member = f"{bus.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._leases = f"bus:{{{topic}}}:{group}:leases"
        self._members = f"bus:{{{topic}}}:{group}:members"
        self._beat_interval_s = bus.policy.claim_idle_ms / 3000
        self._read_count = batch_max if concurrency == 1 else max(64, 2 * concurrency)
        self._last: dict[int, bytes] = {}
        """The last entry of each partition that was delivered here: where its group begins if it must be made again."""
        self._server = b""
        """Which server, with which data, as it says itself."""
        self._owned: set[int] = set()
        """Partitions that are read. A partition that is being let go is in `_draining` instead."""
        self._draining: dict[int, asyncio.Task[None]] = {}
        self._held: dict[int, set[bytes]] = {}
        """Entries of each partition from their offer to their acknowledgement at the server."""
        self._acks: dict[int, list[bytes]] = {}
        self._ack_timer: asyncio.TimerHandle | None = None
        self._others: dict[bytes, bytes] = {}
        self._gone_since: dict[bytes, float] = {}
        self._trim_at = 0.0
        self._lag = LagReport(topic)
        self._passed_over: set[str] = set()
        """Groups that hold back no trimming any more."""
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
        is_first = True
        while True:
            connection: RespConnection | None = None
            begun = time.monotonic()
            try:
                self._topic = await self._bus.topic(self._topic_name)
                connection = await open_connection(self._bus.address, self._member)
                await self._beat(connection, is_new_connection=True)
                if not is_first:
                    self._tell_gap("the connection was opened again")
                is_first = False
                await self._read(connection)
            except Exception as error:  # whatever the server is or says: this must not end the process
                if self._dispatcher.has_crashed:
                    raise
                self._bus.forget_topic(self._topic_name)
                if time.monotonic() - begun > 2 * BACKOFF_S[-1]:
                    failures = 0
                delay = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                is_known = isinstance(error, Unavailable | ConnectionError | TimeoutError | ReplyError)
                _log.log(
                    logging.WARNING if is_known else logging.ERROR,
                    "consumer connects again",
                    topic=self._topic_name,
                    group=self._group,
                    error=str(error),
                    delay_s=delay,
                    exc_info=None if is_known else error,
                )
                await asyncio.sleep(delay)
            finally:
                if connection is not None:
                    connection.close()

    def _tell_gap(self, reason: str) -> None:
        """Messages may have been lost: the caller looks into the feed."""
        _log.info("there may be a gap", topic=self._topic_name, group=self._group, reason=reason)
        if self._on_gap is not None:
            self._on_gap()

    async def _read(self, connection: RespConnection) -> None:
        loop = asyncio.get_running_loop()
        dispatcher = self._dispatcher
        beat_at = loop.time() + (GONE_GRACE_S if self._gone_since else self._beat_interval_s)
        while True:
            now = loop.time()
            if now >= beat_at:
                is_quick = await self._beat(connection, is_new_connection=False)
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
        for entry in entries:
            if entry is None or entry[1] is None or entry[0] in held:  # None: deleted since it was delivered
                continue
            position, fields = entry
            held.add(position)
            count = counts.get(position, 1) if counts else 1
            message, refusal = _message_of(self._topic_name, fields)
            delivery = Delivery(message, partition, position, count)
            if refusal:
                delivery.refusal, delivery.raw = refusal, fields
            deliveries.append(delivery)
        if deliveries:
            self._last[partition] = max(self._last.get(partition, b"0-0"), deliveries[-1].position, key=_position)
            self._dispatcher.offer(deliveries)

    # --- membership

    async def _beat(self, connection: RespConnection, *, is_new_connection: bool) -> bool:
        """Renew the membership, take and let go of partitions; True when the next beat should come soon."""
        dead = [member for member, since in self._gone_since.items() if time.monotonic() - since >= GONE_GRACE_S * 0.9]
        limits: Command = (self._bus.policy.claim_idle_ms, len(self._topic.streams), connection.client_id)
        replies = await connection.call([("EVAL", _BEAT, 2, self._leases, self._members, self._member, *limits, *dead)])
        _check(replies, "renewing the membership")
        share, mine, others, is_new_member = replies[0]
        if is_new_member and not is_new_connection:  # silent for too long, or the server forgot all of its data
            is_new_connection = True
            self._tell_gap("the membership was gone")
        self._gone_since = {member: since for member, since in self._gone_since.items() if member not in dead}
        self._others = {others[i]: others[i + 1] for i in range(0, len(others), 2)}  # bytes: anybody can write there
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
        living = {line.split(b" ", 1)[0].removeprefix(b"id=") for line in listed.splitlines()}
        now = time.monotonic()
        self._gone_since = {
            member: self._gone_since.get(member, now) for client, member in clients.items() if client not in living
        }
        return bool(self._gone_since)

    async def _take_over(self, connection: RespConnection, partitions: Sequence[int]) -> None:
        """Begin to read partitions: first what was delivered before, to whomever, and not acknowledged."""
        streams = self._topic.streams
        _check(
            await connection.call([self._create_group(partition) for partition in partitions]),
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
                if len(claimed) > 2 and claimed[2]:
                    self._tell_gap("messages were trimmed before they were acknowledged")
                self._offer(partition, claimed[1], {entry[0]: entry[3] for entry in pending})
                if claimed[0] == b"0-0":
                    del cursors[partition]
        await connection.call(
            [("EVAL", _SWEEP, 1, streams[partition], self._group, self._member) for partition in partitions]
        )

    def _create_group(self, partition: int) -> Command:
        begin = self._last.get(partition) or ("$" if self._from_end else "0")
        return ("XGROUP", "CREATE", self._topic.streams[partition], self._group, begin, "MKSTREAM")

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
        """Trim what every group that counts has handled; say how far the groups are; claim what a former reader was delivered after it
        had lost a partition. Raises Unavailable where the own group is gone."""
        if not self._owned:
            return
        is_reporter = 0 in self._owned  # one of the group is enough
        partitions = range(len(self._topic.streams)) if is_reporter else sorted(self._owned)
        look = await _look(connection.call, self._topic, partitions)
        mine = {partition: look.places[partition].get(self._group) for partition in self._owned}
        if not all(mine.values()):
            raise Unavailable(
                f"group {self._group} of {self._topic_name} is gone from {len(mine)} streams or some of them"
            )
        if look.server and self._server and look.server != self._server:
            self._tell_gap("this is another server, or another history of its data")
        self._server = look.server or self._server
        length_max = self._bus.policy.stream_length_max
        if any(place is not None and (place.is_torn or place.lag >= length_max) for place in mine.values()):
            self._tell_gap("the streams are full: messages may have been trimmed before they were delivered")
        if is_reporter:
            self._lag.note(look.groups(), time.monotonic())
        commands: list[Command] = []
        for partition in sorted(self._owned):
            stream = self._topic.streams[partition]
            keep_from = look.keep_from(partition, self._counts(look))
            if keep_from > (0, 1):
                commands.append(("XTRIM", stream, "MINID", f"{keep_from[0]}-{keep_from[1]}"))
            commands.append(self._bus.cap(stream))
        _check(await connection.call(commands), f"trimming {self._topic_name}")
        await self._take_strays(connection)

    def _counts(self, look: _Look) -> Callable[[str], bool]:
        """Which groups hold back trimming."""
        idle_max_ms = self._bus.policy.group_idle_max_s * 1000
        idle = {name for name in look.seen_ms if name != self._group and look.now_ms - look.seen_ms[name] > idle_max_ms}
        for name in idle - self._passed_over:
            _log.warning(
                "a group without readers no longer holds back trimming",
                topic=self._topic_name,
                group=name,
                idle_s=(look.now_ms - look.seen_ms[name]) // 1000,
                advice="its readers, if they come back, fetch what they missed from the feed; `ducat bus groups remove` if they"
                " are gone for good",
            )
        self._passed_over = idle
        return lambda name: name not in idle

    async def _take_strays(self, connection: RespConnection) -> None:
        partitions = sorted(self._owned)
        replies = await connection.call(
            [("XINFO", "CONSUMERS", self._topic.streams[partition], self._group) for partition in partitions]
        )
        stray = [
            partition
            for partition, reply in zip(partitions, replies, strict=True)
            if not isinstance(reply, ReplyError)
            and any(
                consumer[b"name"] != self._member.encode() and consumer[b"pending"] for consumer in map(_pairs, reply)
            )
        ]
        if stray:
            await self._take_over(connection, stray)


Position = tuple[int, int]
"""An entry id: milliseconds, sequence."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a group stands in one stream."""

    last: Position
    """The entry that it was delivered last."""
    pending: int
    oldest_pending: Position | None
    lag: int
    oldest_waiting: Position | None
    """The first entry that it was not delivered yet."""
    is_torn: bool
    """Entries were trimmed before they were delivered."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What the server says of the groups of a topic at one moment."""

    topic: str
    now_ms: int
    server: bytes
    places: dict[int, dict[str, _Place]]
    """Partition → group → place."""
    members: dict[str, int]
    seen_ms: dict[str, int]
    """Group → when it was last seen to have a living member."""

    def keep_from(self, partition: int, counts: Callable[[str], bool]) -> Position:
        """What must stay of a stream: everything from this entry on. (0, 0) where no group counts."""
        return min(
            (
                place.oldest_pending or (place.last[0], place.last[1] + 1)
                for name, place in self.places[partition].items()
                if counts(name)
            ),
            default=(0, 0),
        )

    def groups(self) -> list[Group]:
        """The sums over all partitions that were looked at."""
        return [self._group(name) for name in sorted(self.seen_ms)]

    def _group(self, name: str) -> Group:
        places = [groups[name] for groups in self.places.values() if name in groups]
        waiting = [place.oldest_pending[0] for place in places if place.oldest_pending]
        waiting += [place.oldest_waiting[0] for place in places if place.oldest_waiting]
        return Group(
            topic=self.topic,
            name=name,
            members=self.members[name],
            pending=sum(place.pending for place in places),
            lag=sum(place.lag for place in places),
            last_delivered_ms=max(place.last[0] for place in places),
            idle_s=0.0 if self.members[name] else max(0, self.now_ms - self.seen_ms[name]) / 1000,
            waiting_s=max(0, self.now_ms - min(waiting)) / 1000 if waiting else 0.0,
        )


Call = Callable[[Sequence[Command]], Awaitable[list[Any]]]


async def _look(call: Call, topic: _Topic, partitions: Sequence[int]) -> _Look:
    """Three round trips. A stream that does not exist, or is none, has no groups."""
    streams = [topic.streams[partition] for partition in partitions]
    about = [command for stream in streams for command in (("XINFO", "GROUPS", stream), ("XINFO", "STREAM", stream))]
    clock, *identity = await call([("TIME",), ("INFO", "server"), ("INFO", "replication"), *about])
    _check([clock], "asking for the time")
    server = b" ".join(
        line for text in identity[:2] if isinstance(text, bytes) for line in text.split() if line.startswith(_IDENTITY)
    )
    infos = identity[2:]
    rows = [
        (partition, stream, _pairs(group), _pairs(infos[2 * index + 1]))
        for index, (partition, stream) in enumerate(zip(partitions, streams, strict=True))
        if not isinstance(infos[2 * index], ReplyError) and not isinstance(infos[2 * index + 1], ReplyError)
        for group in infos[2 * index]
    ]
    names = sorted({group[b"name"] for _, _, group, _ in rows})
    now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
    commands: list[Command] = []
    for _, stream, group, _ in rows:
        commands.append(("XPENDING", stream, group[b"name"]))
        commands.append(("XRANGE", stream, b"(" + group[b"last-delivered-id"], "+", "COUNT", 1))
    for name in names:
        prefix = f"bus:{{{topic.name}}}:".encode() + name
        commands += [("ZCOUNT", prefix + b":members", now_ms, "+inf"), ("HGET", prefix + b":leases", "seen")]
    replies = await call(commands) if commands else []
    look = _Look(topic.name, now_ms, server, {partition: {} for partition in partitions}, {}, {})
    for index, (partition, _, group, stream_info) in enumerate(rows):
        place = _place_of(group, stream_info, replies[2 * index], replies[2 * index + 1])
        look.places[partition][_text(group[b"name"])] = place
    for index, name in enumerate(map(_text, names)):
        count, seen = replies[2 * (len(rows) + index) : 2 * (len(rows) + index) + 2]
        look.members[name] = count if isinstance(count, int) else 0
        delivered_ms = max(places[name].last[0] for places in look.places.values() if name in places)
        seen_ms = number(seen) if isinstance(seen, bytes) else 0
        look.seen_ms[name] = now_ms if look.members[name] else max(delivered_ms, seen_ms)
    return look


def _place_of(group: dict[bytes, Any], stream: dict[bytes, Any], pending: Any, following: Any) -> _Place:
    last = _position(group[b"last-delivered-id"])
    oldest = pending[1] if isinstance(pending, list) and pending[0] else None
    waiting = following[0][0] if isinstance(following, list) and following else None
    lag = group.get(b"lag")  # unknown to Redis 6, and where entries were deleted
    length = stream[b"length"]
    return _Place(
        last=last,
        pending=group[b"pending"],
        oldest_pending=_position(oldest) if oldest is not None else None,
        lag=0 if waiting is None else length if lag is None else min(lag, length),
        oldest_waiting=_position(waiting) if waiting is not None else None,
        is_torn=lag is not None and lag > length,
    )


def _text(name: bytes) -> str:
    """A group's name; anybody may have made it."""
    return name.decode(errors="backslashreplace")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _fields(message: Message) -> Command:
    fields: Command = ("k", message.key, "i", message.message_id, "p", message.payload)
    if message.traceparent:
        fields += ("t", message.traceparent)
    if message.position > 0:
        fields += ("n", message.position)
    return fields


def _message_of(topic: str, fields: Sequence[bytes]) -> tuple[Message, str]:
    """The message in an entry, and why it is none. The order of the fields does not matter."""
    get = dict(zip(fields[0::2], fields[1::2], strict=False)).get
    return decode(topic, get(b"k"), get(b"i"), get(b"p"), get(b"t"), get(b"n"))


def _letter_of(topic: str, entry_id: bytes, fields: Sequence[bytes]) -> DeadLetter:
    get = dict(zip(fields[0::2], fields[1::2], strict=False)).get
    raw = get(b"raw", b"")
    payload = get(b"p")
    if payload is None:
        of_raw = _unpack(raw)
        payload = dict(zip(of_raw[0::2], of_raw[1::2], strict=False)).get(b"p", b"")
    message, _ = decode(topic, get(b"k"), get(b"i"), payload, get(b"t"), get(b"n"))
    return DeadLetter(
        id=entry_id.decode(),
        message=message,
        group=get(b"group", b"").decode(errors="replace"),
        error=get(b"error", b"").decode(errors="replace"),
        delivery_count=number(get(b"deliveries")),
        first_failed_ms=number(get(b"first_ms")),
        last_failed_ms=number(get(b"last_ms")),
        raw=raw,
    )


def _setting_of(reply: Any) -> str | None:
    """The value in an answer to CONFIG GET of one setting; None where the server does not tell."""
    if isinstance(reply, list) and len(reply) == 2 and isinstance(reply[1], bytes):
        return reply[1].decode(errors="replace")
    return None


def _pack(fields: Sequence[bytes]) -> bytes:
    """An entry as it came, in one value."""
    pack: Any = hiredis.pack_command
    packed: bytes = pack(tuple(fields))
    return packed


def _unpack(raw: bytes) -> list[bytes]:
    """The fields of `_pack`; empty for anything else."""
    reader = hiredis.Reader()
    try:
        reader.feed(raw)
        fields = reader.gets()
    except Exception:
        return []
    is_whole = isinstance(fields, list) and fields and all(isinstance(field, bytes) for field in fields)
    return fields if is_whole and len(fields) % 2 == 0 else []


def _dead_letter_stream(topic: str) -> str:
    return f"bus:{{{topic}}}:dead-letter"


def _pairs(flat: Sequence[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[0::2], flat[1::2], strict=True))


def _position(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence)


def _check(replies: Iterable[Any], doing: str, *expected: str) -> None:
    """Raise Unavailable for an error among replies, other than an expected one."""
    for reply in replies:
        if isinstance(reply, ReplyError) and not str(reply).startswith(expected or ("\0",)):
            raise Unavailable(f"Valkey refused while {doing}: {reply}{_advice(reply)}") from reply


def _advice(reply: ReplyError) -> str:
    if str(reply).startswith("WRONGTYPE"):
        return "; a key of the bus (bus:{topic}:…) holds something else: rename or delete it"
    return ""
