"""Verify and translate webhooks, and note which attempts need no more asking."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from executor.domain.attempt import AttemptKind
from executor.domain.outcome import Notification, NotificationKind
from executor.service.ports import AttemptStore, Channel, PspAdapter
from kernel.clock import Clock
from kernel.errors import NotFound

__all__ = ["SETTLE_COUNT_MAX", "SETTLE_INTERVAL_S", "Notifications"]

SETTLE_INTERVAL_S = 1.0
SETTLE_COUNT_MAX = 512
"""So many are noted in one statement; more than that at once are left to the poller, which only asks once too often."""
REFERENCE_LENGTH_MAX = 128

_OBJECTS = {"order": AttemptKind.ORDER, "refund": AttemptKind.REFUND, "payout": AttemptKind.PAYOUT}


class Notifications:
    """`run()` writes the notes in groups; losing some in a crash costs one question to the PSP each."""

    def __init__(self, store: AttemptStore, adapters: Mapping[str, PspAdapter], clock: Clock) -> None:
        self._store = store
        self._adapters = adapters
        self._clock = clock
        self._settled: set[tuple[AttemptKind, str]] = set()
        self._changed = asyncio.Event()

    def verify(self, psp: str, headers: Mapping[str, str], body: bytes, channel: Channel) -> Sequence[Notification]:
        """The notifications of a webhook call.

        Raises NotFound (PROVIDER_UNKNOWN), PermissionDenied (SIGNATURE_INVALID), InvalidArgument.
        """
        adapter = self._adapters.get(psp)
        if adapter is None:
            raise NotFound(f"no PSP {psp!r} is configured", reason="PROVIDER_UNKNOWN", metadata={"psp": psp})
        adapter.verify(headers, body, channel, self._clock.now_ns() // 1_000_000_000)
        notifications = adapter.translate(body, channel)
        for notification in notifications:
            if notification.kind.is_final:
                self._note(notification)
        return notifications

    async def run(self) -> None:
        """Writes the notes until cancelled. Raises what the store raises, and keeps them then for the next call."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(SETTLE_INTERVAL_S)
            await self.flush()

    async def flush(self) -> None:
        """Writes the notes now."""
        self._changed.clear()
        settled, self._settled = self._settled, set()
        if not settled:
            return
        try:
            await self._store.settle(sorted(settled, key=lambda each: (each[0].value, each[1])), self._clock.now_ns())
        except BaseException:
            self._settled |= settled
            self._changed.set()
            raise

    def _note(self, notification: Notification) -> None:
        kind, reference = _OBJECTS.get(_object_of(notification.kind)), notification.merchant_reference
        is_ours = reference.isprintable() and 0 < len(reference) <= REFERENCE_LENGTH_MAX
        # What could not be stored would spoil the whole group, again and again.
        if kind is not None and is_ours and len(self._settled) < SETTLE_COUNT_MAX:
            self._settled.add((kind, reference))
            self._changed.set()


def _object_of(kind: NotificationKind) -> str:
    return kind.value.partition("_")[0]
