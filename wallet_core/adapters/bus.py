"""Reads `payment.events` in batches and moves money; answers holds on `wallet.events`.

Order of things for one batch: all transfers durable in one transfer batch → answers committed to the wallet's outbox →
acknowledged, and recorded in the inbox a moment later. A crash anywhere in between runs the batch again, which changes
nothing (ids are derived from the events) and gives the same answers under the same message ids. WalletCredited is not
published: nobody waits for it, the read model and WatchEvents tell the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

import structlog

from ducat.common.v1.common_pb2 import Money
from ducat.event.v1 import event_pb2
from kernel.clock import Clock
from kernel.errors import InvalidArgument
from kernel.ids import derived_event_id
from runtime import outbox, trace
from runtime.bus import Message
from runtime.feed import AppliedPositions
from runtime.outbox import OutboxRelay
from runtime.postgres import Pool, transaction
from wallet_core.engine.codes import TransferResult
from wallet_core.service import flows
from wallet_core.service.flows import Flows, Outcome, Step

__all__ = ["ANSWER_TOPIC", "BATCH_MAX", "CONSUMER", "GROUP", "TOPIC", "Answers", "OutboxAnswers", "PaymentEvents"]

TOPIC = "payment.events"
GROUP = "wallet"
CONSUMER = "wallet"
"""In the feed and in the inbox: one for all processes, each of which applies a part."""
ANSWER_TOPIC = "wallet.events"
BATCH_MAX = 256

_PAYOUT = event_pb2.FUNDS_PURPOSE_PAYOUT
_REFUND = event_pb2.FUNDS_PURPOSE_REFUND
_PURPOSES = {"payout-hold": _PAYOUT, "refund-hold": _REFUND}
_PURPOSE_NAMES = {_PAYOUT: "payout", _REFUND: "refund"}
_log = structlog.get_logger("wallet.bus")


class Answers(Protocol):
    """Where answers go."""

    async def publish(self, messages: Sequence[Message]) -> None:
        """Returns when they can no longer be lost."""


class OutboxAnswers:
    """Answers through the outbox of the schema `wallet`."""

    def __init__(self, pool: Pool, relay: OutboxRelay) -> None:
        self._pool = pool
        self._relay = relay

    async def publish(self, messages: Sequence[Message]) -> None:
        """One transaction."""
        await transaction(self._pool, lambda connection: outbox.insert(connection, messages, notify=False))
        self._relay.wake()


class PaymentEvents:
    """The handler of `payment.events`, from the bus and from the feed."""

    def __init__(
        self, flows: Flows, answers: Answers, clock: Clock, *, note: Callable[[Sequence[Message]], None] | None = None
    ) -> None:
        """`note` is told of messages that are done: those that were applied here, and those that concern no seller.
        One of another process's seller is that process's."""
        self._flows = flows
        self._answers = answers
        self._clock = clock
        self._note = note
        self._applying = asyncio.Lock()
        self.applied = AppliedPositions()
        """Positions of the feed that are applied here, or that this process has nothing to do with."""

    def owns(self, message: Message) -> bool:
        """Whether a message is this process's to apply, or nobody's. Raises InvalidArgument for one that makes no
        sense."""
        step = step_of(message)
        return step is None or self._flows.owns(step)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No event is being applied while it lasts: the balances are those of `applied`. Keep it short."""
        async with self._applying:
            yield

    async def handle(self, messages: Sequence[Message]) -> None:
        """Applies a batch and sends its answers. Raises for a message that cannot be applied: the bus then tries each
        alone, again later, and keeps it as a dead letter with the error's text. Nothing is dropped silently.
        """
        steps: list[Step] = []
        sources: list[Message] = []
        done: list[Message] = []
        for message in messages:
            step = step_of(message)
            if step is None:
                done.append(message)
            elif self._flows.owns(step):
                steps.append(step)
                sources.append(message)
        async with self._applying:
            if steps:
                await self._apply(steps, sources)
            for message in messages:
                self.applied.add(message.position)
        if self._note is not None:
            self._note(done + sources)

    async def _apply(self, steps: Sequence[Step], sources: Sequence[Message]) -> None:
        outcomes = await self._flows.run(steps)
        answers = [
            await self._answer(outcome, source)
            for outcome, source in zip(outcomes, sources, strict=True)
            if outcome.step.refusal_is_answer
        ]
        if answers:
            await self._answers.publish(answers)
        # One line a batch, since a line costs as much as a transfer; it has the trace of each payment in the batch.
        _log.info(
            "moved",
            references=[step.reference for step in steps],
            trace_ids=list(dict.fromkeys(source.traceparent[3:35] for source in sources)),
        )

    async def _answer(self, outcome: Outcome, source: Message) -> Message:
        step = outcome.step
        purpose = _PURPOSES[step.kind]
        held = outcome.result == TransferResult.OK
        kind = "funds_held" if held else "funds_refused"
        envelope = event_pb2.Envelope(
            event_id=derived_event_id(f"{kind}/{_PURPOSE_NAMES[purpose]}", step.reference),
            traceparent=source.traceparent,
        )
        envelope.occur_time.FromNanoseconds(self._clock.now_ns())
        if held:
            envelope.funds_held.purpose = purpose
            envelope.funds_held.reference = step.reference
            envelope.funds_held.hold_id = outcome.transfer_id
        else:
            envelope.funds_refused.purpose = purpose
            envelope.funds_refused.reference = step.reference
            envelope.funds_refused.result = outcome.result.name
            if purpose == _REFUND and outcome.result == TransferResult.INSUFFICIENT_FUNDS:
                left = envelope.funds_refused.available  # the refund then asks for that much
                left.currency_code, left.amount_minor = step.currency, await self._flows.available(step.debit)
            with trace.bind(source.traceparent):
                _log.info("funds refused", reference=step.reference, account=step.debit, result=outcome.result.name)
        payload = envelope.SerializeToString()
        return Message(ANSWER_TOPIC, step.reference, envelope.event_id, payload, source.traceparent)


def step_of(message: Message) -> Step | None:
    """The transfer that a message asks for; None where it asks for none. Raises InvalidArgument for one that
    makes no sense."""
    try:
        envelope = event_pb2.Envelope.FromString(message.payload)
    except Exception as error:
        raise InvalidArgument(
            f"message {message.message_id}: payload is no ducat.event.v1.Envelope: {error}"
        ) from error
    body = envelope.WhichOneof("body")
    build = _STEPS.get(body or "")
    if build is None:
        return None
    occur_time = envelope.occur_time
    time_ms = occur_time.seconds * 1000 + occur_time.nanos // 1_000_000
    if time_ms <= 0:
        raise InvalidArgument(
            f"event {envelope.event_id} ({body}): occur_time is missing; transfer ids are derived from it"
        )
    event = getattr(envelope, body or "")
    money: Money = event.amount
    if len(money.currency_code) != 3 or money.amount_minor <= 0:
        raise InvalidArgument(
            f"event {envelope.event_id} ({body}): expected a positive amount in an ISO 4217 currency,"
            f" got {money.amount_minor} {money.currency_code!r}"
        )
    if not event.seller_account or not event.psp:
        raise InvalidArgument(f"event {envelope.event_id} ({body}): seller_account and psp must not be empty")
    step = build(event, money, time_ms)
    if step is not None and body in _REPEATABLE:
        return replace(step, reference=f"{step.reference}/{envelope.event_id}")
    return step


def _capture(event: event_pb2.PaymentOrderSucceeded, money: Money, time_ms: int) -> Step:
    return flows.capture(
        event.payment_order_id, event.psp, event.seller_account, money.currency_code, money.amount_minor, time_ms
    )


def _payout_requested(event: event_pb2.PayoutRequested, money: Money, time_ms: int) -> Step:
    return flows.payout_hold(
        event.reference, event.psp, event.seller_account, money.currency_code, money.amount_minor, time_ms
    )


def _payout_completed(event: event_pb2.PayoutCompleted, money: Money, time_ms: int) -> Step:
    hold_id = _hold_id(event.hold_id, "payout_completed", event.reference)
    currency, amount = money.currency_code, money.amount_minor
    return flows.payout_post(event.reference, event.psp, event.seller_account, currency, amount, time_ms, hold_id)


def _payout_released(event: event_pb2.PayoutReleased, money: Money, time_ms: int) -> Step | None:
    if not event.hold_id:
        return None
    hold_id = _hold_id(event.hold_id, "payout_released", event.reference)
    return flows.payout_void(event.reference, event.psp, event.seller_account, money.currency_code, time_ms, hold_id)


def _payout_returned(event: event_pb2.PayoutReturned, money: Money, time_ms: int) -> Step:
    return flows.payout_return(
        event.reference, event.psp, event.seller_account, money.currency_code, money.amount_minor, time_ms
    )


def _refund_requested(event: event_pb2.RefundRequested, money: Money, time_ms: int) -> Step:
    return flows.refund_hold(
        event.hold_reference or event.refund_id,
        event.psp,
        event.seller_account,
        money.currency_code,
        money.amount_minor,
        time_ms,
    )


def _refund_completed(event: event_pb2.RefundCompleted, money: Money, time_ms: int) -> Step | None:
    currency, amount = money.currency_code, money.amount_minor
    if event.succeeded:
        hold_id = _hold_id(event.hold_id, "refund_completed", event.refund_id)
        return flows.refund_post(event.refund_id, event.psp, event.seller_account, currency, amount, time_ms, hold_id)
    if not event.hold_id:
        return None
    hold_id = _hold_id(event.hold_id, "refund_completed", event.refund_id)
    return flows.refund_void(event.refund_id, event.psp, event.seller_account, currency, time_ms, hold_id)


def _refund_claimed(event: event_pb2.RefundClaimed, money: Money, time_ms: int) -> Step:
    currency, amount = money.currency_code, money.amount_minor
    return flows.refund_claim(event.refund_id, event.psp, event.seller_account, currency, amount, time_ms)


def _refund_reversed(event: event_pb2.RefundReversed, money: Money, time_ms: int) -> Step:
    build = flows.refund_unclaim if event.claimed else flows.refund_return
    return build(event.refund_id, event.psp, event.seller_account, money.currency_code, money.amount_minor, time_ms)


def _dispute_opened(event: event_pb2.DisputeOpened, money: Money, time_ms: int) -> Step:
    currency, amount = money.currency_code, money.amount_minor
    return flows.dispute_opened(event.payment_order_id, event.psp, event.seller_account, currency, amount, time_ms)


def _dispute_closed(event: event_pb2.DisputeClosed, money: Money, time_ms: int) -> Step | None:
    if not event.won:
        return None
    currency, amount = money.currency_code, money.amount_minor
    return flows.dispute_won(event.payment_order_id, event.psp, event.seller_account, currency, amount, time_ms)


def _hold_id(hold_id: bytes, body: str, reference: str) -> bytes:
    if len(hold_id) != 16:
        raise InvalidArgument(f"{body} of {reference}: hold_id: expected 16 bytes, got {len(hold_id)}")
    return hold_id


_STEPS: dict[str, Callable[..., Step | None]] = {
    "payment_order_succeeded": _capture,
    "payout_requested": _payout_requested,
    "payout_completed": _payout_completed,
    "payout_released": _payout_released,
    "payout_returned": _payout_returned,
    "refund_requested": _refund_requested,
    "refund_completed": _refund_completed,
    "refund_claimed": _refund_claimed,
    "refund_reversed": _refund_reversed,
    "dispute_opened": _dispute_opened,
    "dispute_closed": _dispute_closed,
}
"""Bodies that move money. Others (payment_completed, payment_order_closed) need nothing of the wallet."""
_REPEATABLE = frozenset({"dispute_opened", "dispute_closed"})
"""What can happen to one order more than once: the event's id tells which."""
