"""What named accounts hold, together with which events of the feed that includes: one side of the comparison with the ledger.

The balances are read while no event is being applied, so they include exactly the events that are named beside them. Names are looked up
before and texts are made after, so that the events wait for one read of the shards and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from kernel.clock import Clock
from kernel.errors import Unavailable
from kernel.ids import account_id
from wallet_core.service.port import AccountState, Directory, Host

__all__ = ["Applied", "Booked", "BookedBalances", "Events"]

PAUSE_WAIT_S = 5.0
"""How long a read waits for the events that are being applied."""
PAUSE_S_MAX = 1.0
"""How long events wait for a read at most; one of 4,000 accounts takes a few milliseconds."""


class Applied(Protocol):
    """Which events of the feed this process has applied."""

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last position of each range, ascending and apart; the first begins at 1 and may be empty, (1, 0)."""


class Events(Protocol):
    """What applies the events of the feed."""

    @property
    def applied(self) -> Applied:
        """Which it has applied."""

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Nothing is being applied inside it."""


@dataclass(frozen=True, slots=True)
class Booked:
    """`accounts` (name, state): those that exist on the shards of this process. They include the events `applied`, as
    ranges; since `start_time_ns` this process applies them."""

    accounts: list[tuple[str, AccountState]]
    applied: tuple[tuple[int, int], ...]
    positions: tuple[tuple[int, int], ...]
    start_time_ns: int


class BookedBalances:
    """Reads them."""

    def __init__(self, host: Host, directory: Directory, events: Events, clock: Clock) -> None:
        self._host, self._directory, self._events = host, directory, events
        self._start_time_ns = clock.now_ns()

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """Names of the directory, by code point, which all processes share."""
        if "\0" in prefix or "\0" in after:  # no name has one
            return []
        return [entry.name for entry in await self._directory.page(prefix, after, limit)]

    async def read(self, names: Sequence[str]) -> Booked:
        """The accounts of these names at one moment between two events. Raises Unavailable where that moment does not come in time."""
        named = {account_id(name): name for name in names}
        ids = self._host.accounts_here(list(named))
        try:
            async with asyncio.timeout(PAUSE_WAIT_S) as limit, self._events.paused():
                limit.reschedule(asyncio.get_running_loop().time() + PAUSE_S_MAX)
                states = await self._host.accounts(ids)
                applied = self._events.applied.ranges()
                positions = tuple((shard, self._host.durable_sequence(shard)) for shard in self._host.shard_ids)
        except TimeoutError:
            raise Unavailable(
                "the balances could not be read between two events in time: the wallet is busy, or its disk is; ask again"
            ) from None
        accounts = [(named[state.id], state) for state in states if state is not None]
        return Booked(accounts, applied, positions, self._start_time_ns)
