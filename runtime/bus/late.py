"""A bus that is opened while the process already works: for a process that is worth something without its broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kernel.errors import Unavailable
from runtime.bus import Bus, Message

__all__ = ["LateBus"]


class LateBus:
    """Satisfies Bus. Spawn `run()`; until the bus is open `publish` raises Unavailable, and consumers wait."""

    def __init__(self, open_bus: Callable[[], Awaitable[Bus]]) -> None:
        """`open_bus` waits for the broker itself, and raises Unavailable where it gives up; whoever opens the bus closes it."""
        self._open_bus = open_bus
        self._opened: asyncio.Future[Bus] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Opens the bus. Raises what `open_bus` raises; may be run again then."""
        if not self._opened.done():
            self._opened.set_result(await self._open_bus())

    async def publish(self, messages: Sequence[Message]) -> None:
        """See Bus."""
        if not self._opened.done():
            raise Unavailable("the bus does not answer yet; publish again later")
        await self._opened.result().publish(messages)

    async def consume(
        self, topic: str, group: str, handler: Callable[[Sequence[Message]], Awaitable[None]], **options: Any
    ) -> None:
        """See Bus."""
        bus = await asyncio.shield(self._opened)
        await bus.consume(topic, group, handler, **options)

    async def consume_each(
        self, topic: str, group: str, handler: Callable[[Message], Awaitable[None]], **options: Any
    ) -> None:
        """See Bus."""
        bus = await asyncio.shield(self._opened)
        await bus.consume_each(topic, group, handler, **options)

    async def close(self) -> None:
        """Closes nothing: see `open_bus`."""
