"""The bus: how processes tell each other what happened. One port, two engines: Valkey Streams and Apache Kafka.

The promises, the same for both engines and held by one contract suite (tests/contract/bus):

- `publish` returns when the broker has every message durably; a failed publish may be repeated, so readers see duplicates.
- A group gets every message that the broker keeps at least once. A new group begins with the oldest one there, or behind all of them
  (`from_end`): what the broker no longer has, or has lost, is in the feed of its publisher (runtime/feed.py), which is the truth.
- `on_gap` is called when messages may have been lost, so that a consumer looks into the feed at once.
- Messages of one key are handled in the order of their publishing, one at a time. Different keys do not wait for each other.
- A message is acknowledged after its handler returned. A consumer that dies hands its messages to the others of its group.
- A handler that raises is tried again with exponential backoff; meanwhile later messages of that key wait and other keys go on.
  After `delivery_count_max` tries the message moves to the topic `<topic>.dead-letter` with the error, and its key goes on.
- A failure that says "the other side is down" (see `is_transient`) is never the message's fault: tried again, never dead-lettered.
- What the broker holds that is no message becomes a dead letter at once, with its raw bytes. No broker's answer, and no silence of it,
  ends a consumer.

Effects become exactly-once by the inbox (runtime/inbox.py), in the transaction of the effect. See docs/bus.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import asyncpg
import structlog

from kernel.errors import DeadlineExceeded, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from runtime.bus.kafka import KafkaBus
    from runtime.bus.valkey import ValkeyBus

__all__ = [
    "DEAD_LETTER_SUFFIX",
    "TOPICS",
    "Bus",
    "BusPolicy",
    "Message",
    "RetryLater",
    "dead_letter_topic",
    "is_transient",
    "open_bus",
]

DEAD_LETTER_SUFFIX = ".dead-letter"
_log = structlog.get_logger("runtime.bus")

TOPICS = ("payment.commands", "executor.events", "payment.events", "wallet.events")
"""What is published. Groups are made by those who read in them, so that no group exists that nobody reads."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `payload` is a serialized ducat.event.v1.Envelope, `message_id` is its event_id, `key` orders.

    `position` is its place in the publisher's feed of the topic, from 1; 0 where it was published without one.
    """

    topic: str
    key: str
    message_id: str
    payload: bytes
    traceparent: str = ""
    position: int = 0


@dataclass(frozen=True, slots=True)
class BusPolicy:
    """The limits of a consumer, the same for both engines."""

    delivery_count_max: int = 8
    """Tries of a message before it moves to the dead-letter topic."""
    claim_idle_ms: int = 5_000
    """How long the messages of a silent consumer wait before another consumer of its group takes them."""
    retry_base_ms: int = 100
    """Wait before the second try; it doubles with each further try."""
    retry_cap_ms: int = 10_000
    """Longest wait between two tries."""
    in_flight_max: int = 1_024
    """Messages that one consumer holds in memory: being handled, waiting for their key, or for their next try."""
    partition_count: int = 8
    """Partitions of a topic that does not exist yet: the most consumers of a group that work at the same time."""
    trim_interval_ms: int = 10_000
    """How often a Valkey stream is trimmed of what every group has handled, and how often the groups' lag is looked at."""
    group_idle_max_s: int = 86_400
    """A group without a living member holds back the trimming of a Valkey stream for this long; the feed has what it misses."""
    stream_length_max: int = 1_000_000
    """Messages that a Valkey stream keeps, about: the oldest go, read or not; the feed has them."""

    def __post_init__(self) -> None:
        if (
            min(
                self.delivery_count_max,
                self.retry_base_ms,
                self.in_flight_max,
                self.partition_count,
                self.trim_interval_ms,
                self.group_idle_max_s,
                self.stream_length_max,
            )
            < 1
        ):
            raise ValueError("BusPolicy: every limit must be at least 1")
        if self.claim_idle_ms < 100:
            raise ValueError(f"BusPolicy.claim_idle_ms: expected at least 100, got {self.claim_idle_ms}")
        if self.retry_cap_ms < self.retry_base_ms:
            raise ValueError("BusPolicy.retry_cap_ms: expected at least retry_base_ms")

    def backoff_s(self, failures: int) -> float:
        """Seconds to wait after the n-th failure (n >= 1)."""
        return float(min(self.retry_cap_ms, self.retry_base_ms << min(failures - 1, 20))) / 1000


class Bus(Protocol):
    """What a room sees of the bus; each room's service depends on its own narrower port."""

    async def publish(self, messages: Sequence[Message]) -> None:
        """Return when all messages are durable at the broker, in order. Raises Unavailable when they may not be: publish again."""

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
        """Run until cancelled: batches in order, one at a time, acknowledged when the handler returns.

        When the handler raises on a batch of more than one, each message is tried alone. With `from_end` a group that does not exist
        yet begins behind what is there. `on_gap` is called, on the event loop and between other work, whenever messages may have been
        lost: the connection was opened again, the topic or the group was gone, the broker's data changed. It must be quick.
        """

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
        """Run until cancelled: up to `concurrency` keys at the same time, each key in order, each message acknowledged alone.

        `from_end` and `on_gap` as for `consume`.
        """

    async def close(self) -> None:
        """Close connections. Cancel the consumers first."""


class RetryLater(Exception):
    """Raised by a handler: not this message's fault, try again with backoff and do not count it."""


_TRANSIENT: tuple[type[BaseException], ...] = (
    RetryLater,
    Unavailable,
    DeadlineExceeded,
    ResourceExhausted,
    ConnectionError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,  # connections, memory, disk
    asyncpg.OperatorInterventionError,  # shutdown, a cancelled statement
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,  # serialization, deadlock
    asyncpg.SyntaxOrAccessError,  # a table or a right that is missing: no message can be at fault
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    asyncpg.InternalClientError,
)


def is_transient(error: BaseException) -> bool:
    """True when the failure is of the surroundings and not of the message: tried again without end, never dead-lettered."""
    if isinstance(error, _TRANSIENT):
        return True
    if isinstance(error, asyncpg.InterfaceError):
        # "connection is closed", "pool is closing": asyncpg has no class of its own for it. Its DataError is a ValueError too, and quotes
        # the value that it refuses: whatever that says, it is the message's fault.
        return not isinstance(error, ValueError) and ("clos" in str(error) or "connection" in str(error))
    return isinstance(error, OSError)


def dead_letter_topic(topic: str) -> str:
    """Where the messages of a topic go that no try could handle."""
    return topic + DEAD_LETTER_SUFFIX


async def open_bus(
    backend: str,
    *,
    redis_url: str = "",
    kafka_bootstrap: str = "",
    policy: BusPolicy | None = None,
    name: str = "ducat",
    examine: bool = False,
) -> Bus:
    """The bus of the settings: `backend` is "valkey" or "kafka"; `name` is the process, seen in the broker's lists of consumers.

    With `examine` the broker is asked for the settings on which its word depends; what they may cost is a warning in the log.
    """
    policy = policy or BusPolicy()
    bus: ValkeyBus | KafkaBus
    if backend == "valkey":
        from runtime.bus.valkey import ValkeyBus

        bus = await ValkeyBus.open(redis_url, policy=policy, name=name)
    elif backend == "kafka":
        from runtime.bus.kafka import KafkaBus

        bus = await KafkaBus.open(kafka_bootstrap, policy=policy, name=name)
    else:
        raise ValueError(f"bus: expected 'valkey' or 'kafka', got {backend!r}")
    if examine:
        for sentence in await bus.weaknesses():
            _log.warning("the bus may forget", backend=backend, detail=sentence)
    return bus
