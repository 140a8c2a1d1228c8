"""The network between shards, and between clients and shards: messages are delayed, reordered, doubled and
lost; links are cut for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wallet_core.simulation.world import World

__all__ = ["CLIENTS", "Network"]

#: The clients' end of a link; shards are 0, 1, ….
CLIENTS = -1
DELAY_NS = (40_000, 400_000)
DELAY_LONG_NS = (2_000_000, 60_000_000)
CUT_NS = (5_000_000, 80_000_000)


class Network:
    """Each seed has a network of its own quality, from perfect to bad."""

    def __init__(self, world: World) -> None:
        self._world = world
        quality = world.chance()
        self._lost = 0.0 if quality < 0.2 else 0.06 * world.chance()
        self._doubled = 0.0 if quality < 0.2 else 0.08 * world.chance()
        self._late = 0.0 if quality < 0.1 else 0.15 * world.chance()
        self._cut_until: dict[tuple[int, int], int] = {}
        self._latest: dict[tuple[int, int], int] = {}

    def send(self, source: int, destination: int, call: Callable[..., None], *arguments: Any) -> None:
        """`call(*arguments)` at the destination, perhaps: once, twice or never, some time later."""
        world = self._world
        link = (source, destination)
        if world.faulty:
            if self._cut_until and self._cut_until.get(link, 0) > world.now_ns:
                world.fault("message lost in a partition")
                return
            if world.chance() < self._lost:
                world.fault("message lost")
                return
            if world.chance() < self._doubled:
                world.fault("message doubled")
                self._put(link, call, arguments)
        self._put(link, call, arguments)

    def _put(self, link: tuple[int, int], call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        world = self._world
        delay = world.between(*DELAY_NS)
        if world.faulty and world.chance() < self._late:
            world.fault("message delayed")
            delay = world.between(*DELAY_LONG_NS)
        at = world.after(delay, call, *arguments)
        if at < self._latest.get(link, 0):
            if world.faulty:
                world.fault("message reordered")
        else:
            self._latest[link] = at

    def cut(self) -> None:
        """Cut one shard off from others, or from the clients, in one direction or both, for a while."""
        world = self._world
        one = world.random.randrange(world.options.shards)
        others = [other for other in range(-1, world.options.shards) if other != one and world.chance() < 0.6]
        until = world.now_ns + world.between(*CUT_NS)
        one_way = world.chance() < 0.3
        for other in others:
            self._cut_until[one, other] = until
            if not one_way:
                self._cut_until[other, one] = until
        if others:
            world.fault("partition")
            world.note("network: cut", one, "from", others, "one way" if one_way else "")
