"""Sends webhooks until they are taken, and moves payouts on: one timer over a heap of due tasks.

A delivery that gets no 2xx is tried again with growing waits, for as long as the task exists, as real PSPs do for days. At most
`CONCURRENCY_MAX` are under way. What was delivered is forgotten in groups, so a killed sandbox may deliver the last few again: at least
once, never not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import hmac
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from runtime.http_client import HttpPool, NoReply, NotSent
from runtime.logs import get_logger
from sandbox.store import Store, Task

__all__ = ["BACKOFF_S", "CONCURRENCY_MAX", "HEADER", "Deliveries", "sign"]

HEADER = "Sandbox-Signature"
CONCURRENCY_MAX = 32
BACKOFF_S = (0.1, 0.3, 1, 3, 10, 30, 60, 300, 900, 3600)
TIMEOUT_S = 10.0
ORIGIN_COUNT_MAX = 64
FORGET_COUNT = 64
"""Delivered tasks are deleted together once they are so many, or when the queue is empty."""

_logger = get_logger("sandbox.deliveries")


def sign(secret: str, body: bytes, now_s: int) -> str:
    """The value of the header: ``t=<unix>,v1=<hex HMAC-SHA256 of "{t}.{body}">``."""
    signature = hmac.new(secret.encode(), f"{now_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={now_s},v1={signature}"


class Deliveries:
    """`advance(task)` does a task without a URL. `run()` works until it is cancelled."""

    def __init__(self, store: Store, secrets: Mapping[str, str], advance: Callable[[Task], None]) -> None:
        self._store = store
        self._secrets = secrets
        self._advance = advance
        self._heap: list[tuple[int, int, Task]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._delivered: list[int] = []
        self._changed = asyncio.Event()
        self._pools: dict[str, HttpPool] = {}

    def schedule(self, task: Task) -> None:
        """A new task; its transaction has been committed."""
        heapq.heappush(self._heap, (task.due_ms, task.id, task))
        self._changed.set()

    @property
    def pending_count(self) -> int:
        return len(self._heap) + len(self._running)

    async def run(self) -> None:
        """Takes up what the store still has, then works until cancelled."""
        for task in self._store.tasks():
            self.schedule(task)
        try:
            await self._work()
        finally:
            for running in self._running:
                running.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            for pool in self._pools.values():
                await pool.close()
            self._forget()

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            self._start_due()
            wait_s = None
            if self._heap and len(self._running) < CONCURRENCY_MAX:
                wait_s = max(0.001, (self._heap[0][0] - _now_ms()) / 1000)
            if wait_s is None:
                await self._changed.wait()
                continue
            timer = asyncio.get_running_loop().call_later(wait_s, self._changed.set)
            await self._changed.wait()
            timer.cancel()

    def _start_due(self) -> None:
        now_ms = _now_ms()
        while self._heap and self._heap[0][0] <= now_ms and len(self._running) < CONCURRENCY_MAX:
            task = heapq.heappop(self._heap)[2]
            if not task.url:
                self._advance(task)
                continue
            running = asyncio.get_running_loop().create_task(self._deliver(task))
            self._running.add(running)
            running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._running.discard(running)
        if self._heap:
            self._changed.set()
        elif not self._running or len(self._delivered) >= FORGET_COUNT:
            self._forget()
        if not running.cancelled() and running.exception() is not None:
            _logger.error("a delivery crashed", exc_info=running.exception())

    async def _deliver(self, task: Task) -> None:
        body = task.payload.encode()
        failure = await self._post(task, body)
        if not failure:
            self._delivered.append(task.id)
            if len(self._delivered) >= FORGET_COUNT:
                self._forget()
            return
        delay_s = BACKOFF_S[min(task.try_count, len(BACKOFF_S) - 1)]
        task.try_count += 1
        task.due_ms = _now_ms() + int(delay_s * 1000)
        self._store.postpone(task)
        if task.try_count in (1, 5) or task.try_count % 10 == 0:
            _logger.info("webhook not taken", url=task.url, tries=task.try_count, failure=failure, retry_in_s=delay_s)
        self.schedule(task)

    async def _post(self, task: Task, body: bytes) -> str:
        """An empty text for a 2xx, else what went wrong. A redirect is a failure."""
        secret = self._secrets.get(task.psp)
        if secret is None:
            return f"no PSP {task.psp!r} is configured any more"
        headers = {"Content-Type": "application/json", HEADER: sign(secret, body, int(time.time()))}
        try:
            pool, target = self._pool_of(task.url)
            reply = await pool.request("POST", target, headers, body)
        except (NotSent, NoReply, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if 200 <= reply.status < 300 else f"HTTP {reply.status}"

    def _pool_of(self, url: str) -> tuple[HttpPool, str]:
        """The connections to a URL's origin, and the rest of the URL."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        pool = self._pools.get(origin)
        if pool is None:
            if len(self._pools) >= ORIGIN_COUNT_MAX:
                raise ValueError(f"more than {ORIGIN_COUNT_MAX} webhook origins")
            pool = self._pools[origin] = HttpPool(origin, timeout_s=TIMEOUT_S, connection_count_max=CONCURRENCY_MAX)
        return pool, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _forget(self) -> None:
        delivered, self._delivered = self._delivered, []
        self._store.done(delivered)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
