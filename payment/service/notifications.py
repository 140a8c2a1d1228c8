"""Notifications of PSPs: verify, decide, store with the effect, answer after the commit.

Each is stored once by (psp, psp_event_id), in the transaction of its effect. What fits nothing yet (a webhook that
overtook our own commit of the PSP's id, a dispute before the success) is *parked*: stored with a 2xx, so that the
PSP's own retries do not decide whether we hear of it, and tried again when an order with that PSP object appears, and
on a schedule. What contradicts us is *flagged*: nothing moves, the order says so in `attention`, and a line at error
level tells operators.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from kernel.clock import Clock
from kernel.errors import InvalidArgument
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PaymentOrder
from payment.service.payments import until_fresh
from payment.service.ports import (
    ChangeSet,
    Loaded,
    NotificationVerifier,
    PspObjectTaken,
    RecordedNotification,
    StaleState,
    Store,
    Subject,
    now_of,
)

__all__ = [
    "CALLS_MAX",
    "PARKED_BATCH_MAX",
    "PARKED_FOR",
    "Counts",
    "Notifications",
    "Report",
    "claims_of",
    "decide_notification",
]

CALLS_MAX = 64
"""Webhook calls of one transaction."""
PARKED_BATCH_MAX = 200
PARKED_RETRY_BASE = timedelta(seconds=60)
PARKED_RETRY_MAX = timedelta(hours=6)
PARKED_TRIES_MAX = 40
PARKED_FOR = timedelta(days=8)
"""About how long a parked notification is tried: PARKED_TRIES_MAX tries, 6 h apart in the end. It stays
stored after that.
"""

Report = Callable[[Outcome, Notification, Subject | None], None]
"""Tells an operator of a notification that is parked or flagged."""


@dataclass(slots=True)
class Counts:
    """What became of the notifications of one webhook call."""

    applied: int = 0
    duplicate: int = 0
    ignored: int = 0
    subjects: list[Subject] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """The notifications of one webhook call, and the caller that waits for their commit."""

    notifications: Sequence[Notification]
    done: asyncio.Future[Counts]
    context: Context = field(default_factory=copy_context)
    """The caller's: what is reported of this call carries its trace, whoever's task does the work."""


class Notifications:
    """The use cases of notifications.

    Webhook calls that come while a transaction is under way wait for it and then share the next one, up to CALLS_MAX of them: an idle
    service answers each at once, a busy one pays for a commit, a wake-up and a relay once a batch. A call that fails is tried alone,
    so that none can spoil its neighbours.
    """

    def __init__(self, store: Store, verifier: NotificationVerifier, clock: Clock, report: Report) -> None:
        self._store = store
        self._verifier = verifier
        self._clock = clock
        self._report = report
        self._waiting: deque[_Call] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def record(self, psp: str, body: bytes, headers: Mapping[str, str], channel: int) -> Counts:
        """One webhook call, as it came. Returns after the commit."""
        return await self.apply(await self._verifier.verify(psp, body, headers, channel))

    async def apply(self, notifications: Sequence[Notification]) -> Counts:
        """Apply verified notifications, each once; parked ones again. Returns after the commit."""
        for notification in notifications:
            if not notification.psp_event_id:
                raise InvalidArgument(
                    f"{notification.psp}: a notification without an id cannot be applied exactly once"
                )
        if not notifications:
            return Counts()
        call = _Call(notifications, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="notifications")
        return await call.done

    async def retry_parked(self, psp_object_ids: Sequence[str] = ()) -> int:
        """Try parked notifications again: those of the given PSP objects, or those that are due. Returns how many fit now."""
        now = None if psp_object_ids else now_of(self._clock)
        parked = await self._store.parked_notifications(now, psp_object_ids, PARKED_BATCH_MAX)
        # As calls of their own: they share transactions all the same, and one that fails holds up no other.
        done = await asyncio.gather(*(self.apply([each]) for each in parked), return_exceptions=True)
        for each in done:
            if isinstance(each, BaseException):
                raise each
        return sum(each.applied for each in done if isinstance(each, Counts))

    async def _work(self) -> None:
        try:
            while self._waiting:
                calls = [self._waiting.popleft() for _ in range(min(CALLS_MAX, len(self._waiting)))]
                if not await self._try(calls):
                    for call in calls:
                        await self._try([call])
        finally:
            self._worker = None

    async def _try(self, calls: Sequence[_Call]) -> bool:
        """One transaction. False where several failed together, and each is to be tried alone."""
        try:
            results = await until_fresh(lambda: self._attempt(calls))
        except Exception as error:
            if len(calls) > 1:
                return False
            if not calls[0].done.done():
                calls[0].done.set_exception(error)
            return True
        for call, counts in zip(calls, results, strict=True):
            if not call.done.done():
                call.done.set_result(counts)
        return True

    async def _attempt(self, calls: Sequence[_Call]) -> list[Counts]:
        notifications = [each for call in calls for each in call.notifications]
        loaded = await self._store.load_for_notifications(notifications)
        claims = claims_of(notifications, loaded)
        if claims:
            await self._store.load_holders(loaded, claims)
        changes = ChangeSet(now_of(self._clock))
        seen = set(loaded.known)
        unusual: list[tuple[Context, Outcome, Notification, Subject | None]] = []
        touched: dict[int, Subject] = {}
        results: list[Counts] = []
        for call in calls:
            counts = Counts()
            results.append(counts)
            for notification in call.notifications:
                key = (notification.psp, notification.psp_event_id)
                if key in seen:
                    counts.duplicate += 1
                    continue
                seen.add(key)
                outcome, subject = decide_notification(notification, loaded, changes)
                if subject is not None:
                    touched[id(subject)] = subject
                if outcome is Outcome.APPLIED:
                    counts.applied += 1
                    counts.subjects.append(subject)  # type: ignore[arg-type]  # nothing is applied to nothing
                else:
                    counts.ignored += 1
                    if outcome is not Outcome.IGNORED:
                        unusual.append((call.context, outcome, notification, subject))
                changes.notifications.append(_recorded(notification, outcome, subject, changes.now))
        changes.collect(list(touched.values()))
        if not changes.is_empty:
            try:
                await self._store.apply(changes)
            except PspObjectTaken as error:
                raise StaleState(str(error)) from error  # another order got it meanwhile: the next load sees who
        for context, outcome, notification, subject in unusual:
            context.run(self._report, outcome, notification, subject)
        return results


def decide_notification(
    notification: Notification, loaded: Loaded, changes: ChangeSet
) -> tuple[Outcome, Subject | None]:
    """What a notification does to what it is about; its facts go to `changes`."""
    subject = _subject_of(notification, loaded)
    if subject is None:
        # An unknown type says nothing about anything; a known one waits for what it is about.
        return (Outcome.PARKED if notification.kind.subject else Outcome.IGNORED), None
    if isinstance(subject, PaymentOrder):
        outcome = subject.notify(notification, changes.now, _other_holder(notification, subject, loaded))
    else:
        outcome = subject.notify(notification, changes.now)
    changes.take_facts(subject)
    return outcome, subject


def claims_of(notifications: Sequence[Notification], loaded: Loaded) -> list[Notification]:
    """The successes that would give their order a PSP object that it does not have: another order may have it."""
    return [
        each
        for each in notifications
        if (order := loaded.orders.get(each.merchant_reference)) is not None and _is_claim(each, order)
    ]


def _is_claim(notification: Notification, order: PaymentOrder) -> bool:
    if notification.kind is not NotificationKind.ORDER_SUCCEEDED or not notification.psp_object_id:
        return False
    return (notification.psp, notification.psp_object_id) != (order.psp, order.psp_token)


def _other_holder(notification: Notification, order: PaymentOrder, loaded: Loaded) -> str:
    """The other order that has the notification's PSP object, also one that got it a moment ago in the same batch."""
    if not _is_claim(notification, order):
        return ""
    has = (notification.psp, notification.psp_object_id)
    return next(
        (
            each.payment_order_id
            for each in loaded.orders.values()
            if each is not order and (each.psp, each.psp_token) == has
        ),
        "",
    )


def _subject_of(notification: Notification, loaded: Loaded) -> Subject | None:
    kind = notification.kind.subject
    if kind == "order":
        order = loaded.orders.get(notification.merchant_reference)
        if order is not None:
            return order
        return next(
            (
                each
                for each in loaded.orders.values()
                if each.psp_token and (each.psp, each.psp_token) == (notification.psp, notification.psp_object_id)
            ),
            None,
        )
    if kind == "payout":
        payout = loaded.payouts.get(notification.merchant_reference)
        if payout is not None:
            return payout
        return next(
            (
                each
                for each in loaded.payouts.values()
                if each.psp_payout_id
                and (each.psp, each.psp_payout_id) == (notification.psp, notification.psp_object_id)
            ),
            None,
        )
    return None


def _recorded(
    notification: Notification, outcome: Outcome, subject: Subject | None, now: datetime
) -> RecordedNotification:
    reference = notification.merchant_reference
    if subject is not None:
        reference = getattr(subject, "payment_order_id", "") or getattr(subject, "reference", "")
    if outcome is not Outcome.PARKED:
        return RecordedNotification(notification, outcome, reference, notification.attempt_count)
    tries = notification.attempt_count
    wait = min(PARKED_RETRY_BASE * 2 ** min(tries, 16), PARKED_RETRY_MAX)
    return RecordedNotification(
        notification, outcome, reference, tries + 1, now + wait if tries < PARKED_TRIES_MAX else None
    )
