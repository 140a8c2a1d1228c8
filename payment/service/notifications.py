"""Notifications of PSPs: verify, decide, store with the effect, answer after the commit.

Each is stored once by (psp, psp_event_id), in the transaction of its effect. What fits nothing yet (a webhook that
overtook our own commit of the PSP's id, a dispute before the success) is *parked*: stored with a 2xx, so that the
PSP's own retries do not decide whether we hear of it, and tried again when an order with that PSP object appears, when
the order is paid (`wake`), and on a schedule. What contradicts us is *flagged*: nothing moves, a finding is kept, the order
says so in `attention`, and a line at error level tells operators. A refund that was made at the PSP is booked
(payment/domain/refund.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from kernel.clock import Clock
from kernel.errors import InvalidArgument
from payment.domain.finding import Finding, FindingKind, FindingSubject, finding_of
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PAID_STATES, PaymentOrder, PaymentOrderState
from payment.domain.payout import Payout
from payment.domain.refund import Refund, RefundState, told_refund_id
from payment.service.payments import until_fresh
from payment.service.ports import (
    ChangeSet,
    Loaded,
    NotificationVerifier,
    PspObjectTaken,
    RecordedNotification,
    Resolution,
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
EARLY_MAX = 1_000
"""Orders whose payment is waited for by parked notifications, of this process; others wait for the schedule."""

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
        self._early: dict[tuple[str, str], dict[str, Notification]] = {}
        """Parked notifications by what they wait for (`_awaited`), then by event: a hint, the schedule tries them in any case."""

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
        return await self._enqueue(notifications)

    def wake(self, orders: Sequence[PaymentOrder]) -> None:
        """Tries what was told of these orders before they were paid, such as a refund that overtook the success, where they are paid now.
        Call it after the commit."""
        if not self._early:
            return
        for order in orders:
            if order.stored_state in PAID_STATES or order.state not in PAID_STATES:
                continue
            early = self._early.pop(("", order.payment_order_id), {})
            early |= self._early.pop((order.psp, order.psp_token), {})
            if early:
                # Nobody waits for it: one that fails is parked as before, and tried on schedule.
                self._enqueue(list(early.values())).add_done_callback(lambda done: done.cancelled() or done.exception())

    def _enqueue(self, notifications: Sequence[Notification]) -> asyncio.Future[Counts]:
        call = _Call(notifications, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="notifications")
        return call.done

    def _note_early(self, recorded: RecordedNotification, subject: Subject | None) -> None:
        notification = recorded.notification
        if recorded.outcome is not Outcome.PARKED or notification.kind.subject not in ("order", "refund"):
            return
        again = replace(notification, attempt_count=recorded.attempt_count)
        early = self._early.setdefault(_awaited(notification, subject), {})
        if len(early) < PARKED_BATCH_MAX:
            early[notification.psp_event_id] = again
        if len(self._early) > EARLY_MAX:
            del self._early[next(iter(self._early))]

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
        subjects: list[Subject | None] = []
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
                finding_count = len(changes.findings)
                outcome, subject = decide_notification(notification, loaded, changes)
                if subject is not None:
                    touched[id(subject)] = subject
                    if isinstance(subject, Refund) and (order := loaded.orders.get(subject.payment_order_id)):
                        touched[id(order)] = order
                if outcome is Outcome.APPLIED:
                    counts.applied += 1
                    counts.subjects.append(subject)  # type: ignore[arg-type]  # nothing is applied to nothing
                else:
                    counts.ignored += 1
                recorded = _recorded(notification, outcome, subject, changes.now)
                is_given_up = outcome is Outcome.PARKED and recorded.next_attempt_time is None
                if is_given_up:
                    changes.findings.append(_given_up(notification, subject, changes.now))
                is_new = notification.attempt_count == 0 or is_given_up
                if is_new and len(changes.findings) > finding_count:
                    unusual.append((call.context, Outcome.FLAGGED, notification, subject))
                elif outcome not in (Outcome.IGNORED, Outcome.APPLIED):
                    unusual.append((call.context, outcome, notification, subject))
                changes.notifications.append(recorded)
                subjects.append(subject)
        changes.collect(list(touched.values()))
        if not changes.is_empty:
            try:
                await self._store.apply(changes)
            except PspObjectTaken as error:
                raise StaleState(str(error)) from error  # another order got it meanwhile: the next load sees who
        for recorded, subject in zip(changes.notifications, subjects, strict=True):
            self._note_early(recorded, subject)
        self.wake(changes.orders)
        for context, outcome, notification, subject in unusual:
            context.run(self._report, outcome, notification, subject)
        return results


def decide_notification(
    notification: Notification, loaded: Loaded, changes: ChangeSet
) -> tuple[Outcome, Subject | None]:
    """What a notification does to what it is about; its facts go to `changes`."""
    if notification.kind.subject == "refund":
        return _decide_refund(notification, loaded, changes)
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


def _decide_refund(notification: Notification, loaded: Loaded, changes: ChangeSet) -> tuple[Outcome, Subject | None]:
    """A refund is one object of the PSP, whatever event tells of it. Its order is the one whose payment it gives back."""
    known = next(
        (
            each
            for each in loaded.refunds.values()
            if each.psp_refund_id and (each.psp, each.psp_refund_id) == (notification.psp, notification.psp_object_id)
        ),
        None,
    )
    if known is not None:
        return _decide_known_refund(notification, known, loaded.orders.get(known.payment_order_id), changes)
    order = next(
        (
            each
            for each in loaded.orders.values()
            if each.psp_token and (each.psp, each.psp_token) == (notification.psp, notification.psp_payment_id)
        ),
        None,
    )
    if order is None:
        return Outcome.PARKED, None
    succeeded = notification.kind is NotificationKind.REFUND_SUCCEEDED
    is_paid = order.state in PAID_STATES
    contradiction = _refund_contradiction(notification, order)
    if contradiction is None and not is_paid:
        if succeeded:
            order.flag(FindingKind.REFUND_OF_UNPAID, _told_of_unpaid(notification), notification, changes.now)
            changes.take_facts(order)
        return Outcome.PARKED, order  # the success of the payment may be on its way
    if is_paid and succeeded:
        before = order.finding(FindingKind.REFUND_OF_UNPAID, _told_of_unpaid(notification), notification, changes.now)
        changes.resolutions[before.finding_id] = Resolution(
            "the order is paid here now, and the refund was looked at again", "payment", f"payment:{before.finding_id}"
        )
    if contradiction is not None:
        kind, text = contradiction
        order.flag(kind, f"{notification.psp} {text}: not booked", notification, changes.now)
        changes.take_facts(order)
        return Outcome.FLAGGED, order
    refund = Refund(
        refund_id=told_refund_id(notification.psp, notification.psp_object_id),
        payment_order_id=order.payment_order_id,
        checkout_id=order.checkout_id,
        seller_account=order.seller_account,
        currency_code=order.currency_code,
        amount_minor=notification.amount_minor or 0,
        state=RefundState.SUCCEEDED if succeeded else RefundState.FAILED,
        psp=notification.psp,
        psp_refund_id=notification.psp_object_id,
        create_time=changes.now,
        update_time=changes.now,
        reason=f"made at {notification.psp}",
        failure_reason="" if succeeded else notification.failure[:1000],
        traceparent=order.traceparent,
    )
    if succeeded:
        order.add_refund(refund.amount_minor, notification.cause, changes.now)
    refund.begin(notification.cause, changes.now)
    loaded.refunds[refund.refund_id] = refund
    changes.take_facts(refund)
    return Outcome.APPLIED, refund


def _decide_known_refund(
    notification: Notification, refund: Refund, order: PaymentOrder | None, changes: ChangeSet
) -> tuple[Outcome, Subject | None]:
    if order is None:
        return Outcome.PARKED, None
    told = notification.amount_minor
    if told is not None and (notification.currency_code, told) != (refund.currency_code, refund.amount_minor):
        text = (
            f"{notification.psp} says that refund {notification.psp_object_id} is {told} {notification.currency_code}, "
            f"it told {refund.amount_minor} {refund.currency_code} before (minor units): not changed"
        )
        order.flag(FindingKind.REFUND_UNCLEAR, text, notification, changes.now)
        changes.take_facts(order)
        return Outcome.FLAGGED, order
    if notification.kind is NotificationKind.REFUND_SUCCEEDED:
        if refund.state is RefundState.SUCCEEDED:
            return Outcome.IGNORED, refund
        text = (
            f"{notification.psp} says that refund {notification.psp_object_id} succeeded, it told before that it "
            "failed: not booked; where it did succeed in the end, charge the seller by hand"
        )
        order.flag(FindingKind.REFUND_UNCLEAR, text, notification, changes.now)
        changes.take_facts(order)
        return Outcome.FLAGGED, order
    if not refund.fail(notification, changes.now):
        return Outcome.IGNORED, refund
    order.remove_refund(refund.amount_minor, notification.cause, changes.now)
    changes.take_facts(refund)
    return Outcome.APPLIED, refund


def _told_of_unpaid(notification: Notification) -> str:
    return (
        f"{notification.psp} says refund {notification.psp_object_id} gave {notification.amount_minor} "
        f"{notification.currency_code} back, but the order is not paid here: not booked"
    )


def _refund_contradiction(notification: Notification, order: PaymentOrder) -> tuple[FindingKind, str] | None:
    amount, currency = notification.amount_minor, notification.currency_code
    refund = f"refund {notification.psp_object_id}"
    if not notification.psp_object_id or amount is None or amount <= 0:
        said = "no amount" if amount is None else f"{amount} {currency}"
        return FindingKind.REFUND_UNCLEAR, f"tells of a refund without its id or amount ({said})"
    if currency != order.currency_code:
        text = f"says {refund} is {amount} {currency}, the order is in {order.currency_code} (minor units)"
        return FindingKind.REFUND_UNCLEAR, text
    if order.state not in PAID_STATES:
        return None
    if notification.kind is NotificationKind.REFUND_FAILED:
        return None  # nothing is booked; it is kept so that its success, told late, is not either
    if order.state in (PaymentOrderState.DISPUTED, PaymentOrderState.DISPUTE_LOST):
        text = f"says {refund} gave {amount} {currency} back, but the dispute took the money from the seller already"
        return FindingKind.REFUND_OF_DISPUTED, text
    left = order.amount_minor - order.refunded_minor
    if amount > left:
        text = f"says {refund} gave {amount} {currency} back, but only {left} of the order are left (minor units)"
        return FindingKind.REFUND_TOO_LARGE, text
    return None


def _given_up(notification: Notification, subject: Subject | None, now: datetime) -> Finding:
    """A notification that is not tried any more."""
    about = (
        f"about our {notification.merchant_reference}" if notification.merchant_reference else "without our reference"
    )
    state = subject.state.name if subject is not None else "unknown here"
    return finding_of(
        FindingKind.NOTIFICATION_GIVEN_UP,
        FindingSubject.NOTIFICATION,
        notification.psp_event_id,
        f"{notification.psp} tells {notification.kind.name} of {notification.psp_object_id} ({about}), which fitted nothing "
        f"in {notification.attempt_count + 1} tries: what it is about is {state}; it is not tried again",
        notification,
        now,
        {"state": state, "reference": _reference_of(subject)},
        {
            "state": notification.kind.name,
            "psp_object_id": notification.psp_object_id,
            "amount_minor": notification.amount_minor,
            "currency_code": notification.currency_code,
        },
        checkout_id=getattr(subject, "checkout_id", ""),
        seller_account=getattr(subject, "seller_account", ""),
    )


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


def _subject_of(notification: Notification, loaded: Loaded) -> PaymentOrder | Payout | None:
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
    reference = _reference_of(subject) or notification.merchant_reference
    if outcome is not Outcome.PARKED:
        return RecordedNotification(notification, outcome, reference, notification.attempt_count)
    tries = notification.attempt_count
    wait = min(PARKED_RETRY_BASE * 2 ** min(tries, 16), PARKED_RETRY_MAX)
    return RecordedNotification(
        notification, outcome, reference, tries + 1, now + wait if tries < PARKED_TRIES_MAX else None
    )


def _awaited(notification: Notification, subject: Subject | None) -> tuple[str, str]:
    """The order that a parked notification waits for: by its id where it is known, else by the PSP's payment."""
    if isinstance(subject, PaymentOrder):
        return "", subject.payment_order_id
    if notification.kind.subject == "order" and notification.merchant_reference:
        return "", notification.merchant_reference
    return notification.psp, notification.psp_payment_id or notification.psp_object_id


def _reference_of(subject: Subject | None) -> str:
    """The order, also of a refund, or the payout."""
    return getattr(subject, "payment_order_id", "") or getattr(subject, "reference", "")
