"""Risk: one parked notification that cannot be handled keeps every other one parked for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kernel.clock import SystemClock
from payment.domain.notification import Notification, NotificationKind
from payment.service.notifications import Notifications
from payment.service.ports import ChangeSet, Loaded


class Store:
    """Fails for the notification `bad`; keeps the ids of the others that it wrote."""

    def __init__(self) -> None:
        self.written: list[str] = []

    async def parked_notifications(self, _now: Any, _ids: Sequence[str], _limit: int) -> list[Notification]:
        return [Notification("sandbox", each, NotificationKind.UNKNOWN) for each in ("a", "bad", "b")]

    async def load_for_notifications(self, notifications: Sequence[Notification]) -> Loaded:
        if any(each.psp_event_id == "bad" for each in notifications):
            raise ValueError("bad")
        return Loaded()

    async def apply(self, changes: ChangeSet) -> bool:
        self.written += [each.notification.psp_event_id for each in changes.notifications]
        return False


async def test_one_that_fails_holds_up_no_other() -> None:
    store = Store()
    notifications = Notifications(store, None, SystemClock(), lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bad"):
        await notifications.retry_parked()
    assert sorted(store.written) == ["a", "b"]
