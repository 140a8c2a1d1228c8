"""payment.events → the ledger: reads envelopes in batches and hands the facts in them to the use case."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ducat.event.v1 import event_pb2
from ledger.domain import Fact, FactKind
from ledger.service import PostFacts
from runtime.bus import Message
from runtime.logs import get_logger

__all__ = ["BATCH_MAX", "GROUP", "TOPIC", "LedgerConsumer", "fact_of"]

TOPIC = "payment.events"
GROUP = "ledger"
BATCH_MAX = 64
PACE_S = 0.05
"""Pause after a batch that was not full, so that the next one gathers more: a batch of 1 costs five times more CPU an
event than one of 64 (docs/ledger.md). Nobody waits for the ledger; the first event after a quiet time is taken at once.
"""

_logger = get_logger("ledger.bus")

# Envelope field → the kind of fact and the field with our reference. Every other event is skipped: a reader ignores
# what it does not know.
_FACTS: Mapping[str, tuple[Callable[[Any], FactKind], str]] = {
    "payment_order_succeeded": (lambda body: FactKind.CAPTURE, "payment_order_id"),
    "refund_completed": (
        lambda body: FactKind.REFUND_COMPLETED if body.succeeded else FactKind.REFUND_FAILED,
        "refund_id",
    ),
    "refund_claimed": (lambda body: FactKind.REFUND_CLAIMED, "refund_id"),
    "refund_reversed": (
        lambda body: FactKind.REFUND_UNCLAIMED if body.claimed else FactKind.REFUND_RETURNED,
        "refund_id",
    ),
    "payout_completed": (lambda body: FactKind.PAYOUT_COMPLETED, "reference"),
    "payout_released": (lambda body: FactKind.PAYOUT_RELEASED, "reference"),
    "payout_returned": (lambda body: FactKind.PAYOUT_RETURNED, "reference"),
    "dispute_opened": (lambda body: FactKind.DISPUTE_OPENED, "payment_order_id"),
    "dispute_closed": (lambda body: FactKind.DISPUTE_WON if body.won else FactKind.DISPUTE_LOST, "payment_order_id"),
}
_REPEATABLE = frozenset({FactKind.DISPUTE_OPENED, FactKind.DISPUTE_WON, FactKind.DISPUTE_LOST})
"""Facts that can happen to one order more than once: their event's id tells which."""


class LedgerConsumer:
    """The handler of the group `ledger`."""

    def __init__(self, post_facts: PostFacts, *, pace_s: float = PACE_S) -> None:
        self._post_facts = post_facts
        self._pace_s = pace_s

    async def handle(self, messages: Sequence[Message]) -> None:
        """One batch, one transaction. Raises for a message that is malformed or contradicts the journal; the bus
        isolates it.
        """
        facts = [(message, fact) for message in messages if (fact := _fact_in(message)) is not None]
        positions = {message.message_id: message.position for message, _ in facts}
        await self._post_facts.handle(((message.message_id, fact) for message, fact in facts), positions)
        if facts:
            _log_facts(facts)
        if len(messages) < BATCH_MAX and self._pace_s > 0:
            await asyncio.sleep(self._pace_s)


def _fact_in(message: Message) -> Fact | None:
    return fact_of(event_pb2.Envelope.FromString(message.payload))


def _log_facts(facts: Sequence[tuple[Message, Fact]]) -> None:
    """One line a batch, since a line costs as much as an entry; it has the trace of each payment in the batch."""
    _logger.info(
        "facts posted",
        references=[fact.merchant_reference for _, fact in facts],
        trace_ids=list(dict.fromkeys(message.traceparent[3:35] for message, _ in facts)),
    )


def fact_of(envelope: event_pb2.Envelope) -> Fact | None:
    """The fact in an envelope, or None where it is of no concern to the ledger."""
    field = envelope.WhichOneof("body")
    known = _FACTS.get(field) if field is not None else None
    if field is None or known is None:
        return None
    kind_of, reference_field = known
    body = getattr(envelope, field)
    time = envelope.occur_time
    kind = kind_of(body)
    return Fact(
        kind=kind,
        merchant_reference=getattr(body, reference_field),
        seller_account=body.seller_account,
        psp=body.psp,
        currency_code=body.amount.currency_code,
        amount_minor=body.amount.amount_minor,
        occur_time_us=time.seconds * 1_000_000 + time.nanos // 1000,
        occurrence=envelope.event_id if kind in _REPEATABLE else "",
    )
