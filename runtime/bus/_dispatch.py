"""From deliveries to handlers: order per key, tries, backoff, dead letters. The same for both engines; knows no broker.

    broker ── offer ──► ready ──► batch ───────────────► handler(batch) ── returns ──► done
                          │         └─ raises ─► each message alone, through its key's queue
                          └──► key's queue ──► handler([message]) ── returns ──► done
                                    └─ raises ─► wait (only this key) ─► again ─► … ─► bury

Rules:
- A key has at most one queue, and while it has one, later messages of the key join its end: order is kept through failures.
- Handlers run under `slots`: one slot for `consume` (one batch at a time), `concurrency` slots for `consume_each`. Waits hold no slot.
- What cannot be decoded is buried without a try (`Delivery.refusal`). Nothing that a broker holds can end a consumer.
- A partition that the broker takes away is revoked: what has not begun is forgotten (the next owner gets it), what runs may finish.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from runtime import trace
from runtime.bus import BusPolicy, Message, is_transient
from runtime.metrics import counter

__all__ = ["CRASH_FACTOR", "Delivery", "Dispatcher"]

CRASH_FACTOR = 4
"""A message whose consumers died this many times `delivery_count_max` is buried without another try."""

_handled = counter("ducat_bus_handled_total", "Messages that a handler took.", ("topic", "group"))
_failed = counter("ducat_bus_failed_total", "Tries of a handler that raised.", ("topic", "group"))
_buried = counter("ducat_bus_dead_letters_total", "Messages moved to the dead-letter topic.", ("topic", "group"))
_log = structlog.get_logger("runtime.bus")


class Undecodable(Exception):
    """What the broker holds is no message. Its text says what is wrong."""


@dataclass(slots=True, eq=False)
class Delivery:
    """A message and where it stands at the broker."""

    message: Message
    partition: int
    position: Any
    """The broker's name of it within its partition: an entry id or an offset."""
    delivered_count: int = 1
    """How often the broker gave it to a consumer, as far as it counts."""
    failures: int = 0
    """Tries that raised and count."""
    transient_failures: int = 0
    first_failed_ms: int = 0
    refusal: str = ""
    """Why it is no message (see _decode): it is buried without a try."""
    raw: Any = None
    """What the broker gave, in the engine's own form; kept only with a refusal."""


class _Key:
    """The queue of one key that cannot go with a batch, and the task that works it off."""

    __slots__ = ("is_revoked", "is_waiting", "partition", "queue", "task")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.queue: deque[Delivery] = deque()
        self.is_waiting = False
        self.is_revoked = False
        self.task: asyncio.Task[None] | None = None


class Dispatcher:
    """One consumer's deliveries. `offer` them, `run` until cancelled.

    `done(delivery)` is called when its handler has returned; `bury(delivery, error)` must move it to the dead-letter topic and
    acknowledge it, and is called until it returns.
    """

    def __init__(
        self,
        topic: str,
        group: str,
        handler: Callable[[Sequence[Message]], Awaitable[None]],
        *,
        batch_max: int,
        concurrency: int,
        policy: BusPolicy,
        now_ms: Callable[[], int],
        done: Callable[[Delivery], None],
        bury: Callable[[Delivery, str], Awaitable[None]],
    ) -> None:
        if batch_max < 1 or concurrency < 1:
            raise ValueError(f"expected batch_max and concurrency of at least 1, got {batch_max} and {concurrency}")
        self._topic = topic
        self._group = group
        self._handler = handler
        self._batch_max = batch_max
        self._in_batches = concurrency == 1 and batch_max > 1
        self._slots = asyncio.Semaphore(concurrency)
        self._policy = policy
        self._now_ms = now_ms
        self._done = done
        self._bury = bury
        self._in_flight_max = (
            policy.in_flight_max if self._in_batches else min(policy.in_flight_max, max(64, 2 * concurrency))
        )
        self._ready: deque[Delivery] = deque()
        self._keys: dict[tuple[int, str], _Key] = {}
        self._revoking: set[int] = set()
        self._batch_running = False
        self._batch_over = asyncio.Event()
        self._offered = asyncio.Event()
        self._wanting = asyncio.Event()
        self._wanting.set()
        self._crash: BaseException | None = None
        self._handled = _handled.labels(topic, group)
        self._failed = _failed.labels(topic, group)
        self._buried = _buried.labels(topic, group)
        self.in_flight = 0
        """Offered, and neither done, buried nor revoked."""

    def offer(self, deliveries: Iterable[Delivery]) -> None:
        """Take deliveries, in the broker's order."""
        before = len(self._ready)
        self._ready.extend(deliveries)
        self.in_flight += len(self._ready) - before
        self._offered.set()
        self._review_wanting()

    @property
    def has_crashed(self) -> bool:
        """True when `run` ended by a bug: there is no use in fetching more."""
        return self._crash is not None

    @property
    def wants(self) -> bool:
        """True when more may be fetched. Batches are only fetched when the last is done, so that they grow under load."""
        if self.in_flight >= self._in_flight_max:
            return False
        return not self._in_batches or not (self._ready or self._batch_running)

    async def wait_until_wants(self) -> None:
        """Return when `wants` is true. Raises what ended `run`, if it ended."""
        await self._wanting.wait()
        if self._crash is not None:
            raise self._crash

    async def run(self) -> None:
        """Hand out what is offered, until cancelled. What runs then is cancelled too: the broker delivers it again."""
        try:
            while True:
                if not self._ready:
                    self._offered.clear()
                    await self._offered.wait()
                if self._in_batches:
                    await self._run_batch()
                else:
                    while self._ready:
                        self._queue_alone(self._ready.popleft())
        except BaseException as error:
            self._crash = error
            self._wanting.set()
            raise
        finally:
            tasks = [key.task for key in self._keys.values() if key.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def revoke(self, partitions: Collection[int]) -> None:
        """Forget what has not begun of these partitions; return when nothing of them runs any more."""
        kept = deque(delivery for delivery in self._ready if delivery.partition not in partitions)
        self.in_flight -= len(self._ready) - len(kept)
        self._ready = kept
        running: list[asyncio.Task[None]] = []
        for key in self._keys.values():
            if key.partition in partitions and key.task is not None:
                key.is_revoked = True
                while len(key.queue) > (0 if key.is_waiting else 1):  # the head stays for the handler that has it
                    key.queue.pop()
                    self.in_flight -= 1
                if key.is_waiting:
                    key.task.cancel()
                running.append(key.task)
        self._review_wanting()
        self._revoking.update(partitions)
        try:
            if running:
                await asyncio.wait(running)
            if self._batch_running:
                await self._batch_over.wait()
        finally:
            self._revoking.difference_update(partitions)

    # --- batches

    async def _run_batch(self) -> None:
        batch: list[Delivery] = []
        while self._ready and len(batch) < self._batch_max:
            delivery = self._ready.popleft()
            if (
                (delivery.partition, delivery.message.key) in self._keys
                or delivery.delivered_count > self._policy.delivery_count_max
                or delivery.refusal
            ):
                self._queue_alone(delivery)  # its key waits, or it may be what killed its consumers: never in company
            else:
                batch.append(delivery)
        if not batch:
            return
        self._batch_running = True
        self._batch_over.clear()
        try:
            async with self._slots:
                try:
                    await self._handler([delivery.message for delivery in batch])
                except Exception as error:
                    self._split(batch, error)
                else:
                    self._handled.inc(len(batch))
                    self.in_flight -= len(batch)
                    for delivery in batch:
                        self._done(delivery)
        finally:
            self._batch_running = False
            self._batch_over.set()
            self._review_wanting()

    def _split(self, batch: list[Delivery], error: Exception) -> None:
        if len(batch) == 1:
            self._queue_alone(batch[0], error)
            return
        self._failed.inc()
        _log.info(
            "a batch failed, each message is tried alone",
            topic=self._topic,
            group=self._group,
            count=len(batch),
            error=_text(error),
        )
        for delivery in batch:
            self._queue_alone(delivery)

    # --- keys: one queue and one task for each key that cannot go with a batch

    def _queue_alone(self, delivery: Delivery, error: Exception | None = None) -> None:
        if delivery.partition in self._revoking:  # its batch failed while it was taken away
            self.in_flight -= 1
            return
        name = (delivery.partition, delivery.message.key)
        key = self._keys.get(name)
        if key is not None:
            key.queue.append(delivery)
            return
        key = self._keys[name] = _Key(delivery.partition)
        key.queue.append(delivery)
        key.task = asyncio.get_running_loop().create_task(self._run_key(name, key, error))
        key.task.add_done_callback(self._key_over)

    def _key_over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # not a handler's error: a bug of ours, or SystemExit
            self._crash = task.exception()
            self._wanting.set()

    async def _run_key(self, name: tuple[int, str], key: _Key, error: Exception | None) -> None:
        try:
            while key.queue:
                delivery = key.queue[0]
                error = error or await self._try(delivery)
                if error is None:
                    self._done(delivery)
                elif key.is_revoked:
                    return
                elif not await self._is_over(delivery, error, key):
                    error = None
                    continue
                error = None
                key.queue.popleft()
                self.in_flight -= 1
                self._review_wanting()
        finally:
            del self._keys[name]
            self.in_flight -= len(key.queue)
            self._review_wanting()

    async def _try(self, delivery: Delivery) -> Exception | None:
        if delivery.refusal:
            delivery.failures = self._policy.delivery_count_max
            return Undecodable(delivery.refusal)
        crash_count_max = CRASH_FACTOR * self._policy.delivery_count_max
        if delivery.delivered_count > crash_count_max and not delivery.failures:
            delivery.failures = self._policy.delivery_count_max
            return RuntimeError(
                f"delivered {delivery.delivered_count} times and never acknowledged: its consumers died or were stopped"
            )
        async with self._slots:
            with trace.bind(delivery.message.traceparent):
                try:
                    await self._handler((delivery.message,))
                except Exception as error:
                    self._note_failure(delivery, error)
                    return error
        self._handled.inc()
        return None

    def _note_failure(self, delivery: Delivery, error: Exception) -> None:
        self._failed.inc()
        delivery.first_failed_ms = delivery.first_failed_ms or self._now_ms()
        if is_transient(error):
            delivery.transient_failures += 1
        else:
            delivery.failures += 1
        _log.warning(
            "a message failed",
            topic=self._topic,
            group=self._group,
            key=delivery.message.key,
            message_id=delivery.message.message_id,
            failures=delivery.failures,
            transient_failures=delivery.transient_failures,
            error=_text(error),
            exc_info=error if delivery.failures == 1 else None,
        )

    async def _is_over(self, delivery: Delivery, error: Exception, key: _Key) -> bool:
        """Bury the message when its tries are used up; else wait for the next one."""
        if not delivery.failures and not delivery.transient_failures:  # failed as a batch of one
            self._note_failure(delivery, error)
        if delivery.failures >= self._policy.delivery_count_max:
            await self._bury_surely(delivery, _text(error), key)
            return True
        await self._wait(key, self._policy.backoff_s(delivery.failures + delivery.transient_failures))
        return False

    async def _bury_surely(self, delivery: Delivery, error: str, key: _Key) -> None:
        tries = 0
        while True:
            try:
                await self._bury(delivery, error)
                break
            except Exception as broker_error:
                tries += 1
                _log.warning(
                    "the dead-letter topic does not take a message",
                    topic=self._topic,
                    error=_text(broker_error),
                    tries=tries,
                )
                await self._wait(key, self._policy.backoff_s(tries))
        self._buried.inc()
        _log.error(
            "a message is a dead letter now",
            topic=self._topic,
            group=self._group,
            key=delivery.message.key,
            message_id=delivery.message.message_id,
            failures=delivery.failures,
            error=error,
        )

    async def _wait(self, key: _Key, delay_s: float) -> None:
        key.is_waiting = True
        try:
            await asyncio.sleep(delay_s)
        finally:
            key.is_waiting = False

    def _review_wanting(self) -> None:
        if self.wants or self._crash is not None:
            self._wanting.set()
        else:
            self._wanting.clear()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
