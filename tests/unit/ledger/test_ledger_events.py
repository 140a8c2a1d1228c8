"""Risk: an event that is read as another one, an unknown event that stops the ledger."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from ducat.common.v1 import common_pb2
from ducat.event.v1 import event_pb2
from ledger.adapters.bus import LedgerConsumer, fact_of
from ledger.domain import Fact, FactKind
from ledger.service import PostFacts, Received
from runtime.bus import Message

USD = common_pb2.Money(currency_code="USD", amount_minor=7500)
WHEN = Timestamp(seconds=1_753_056_000, nanos=123_456_789)
WHEN_US = 1_753_056_000_123_456


def envelope(**body: Any) -> event_pb2.Envelope:
    return event_pb2.Envelope(event_id="e", occur_time=WHEN, **body)


def common(**more: Any) -> dict[str, Any]:
    return {"seller_account": "S", "amount": USD, "psp": "sandbox", **more}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (
            {"payment_order_succeeded": event_pb2.PaymentOrderSucceeded(**common(payment_order_id="R"))},
            FactKind.CAPTURE,
        ),
        (
            {
                "refund_completed": event_pb2.RefundCompleted(
                    **common(refund_id="R", payment_order_id="O", succeeded=True)
                )
            },
            FactKind.REFUND_COMPLETED,
        ),
        (
            {"refund_completed": event_pb2.RefundCompleted(**common(refund_id="R", payment_order_id="O"))},
            FactKind.REFUND_FAILED,
        ),
        (
            {"refund_claimed": event_pb2.RefundClaimed(**common(refund_id="R", payment_order_id="O"))},
            FactKind.REFUND_CLAIMED,
        ),
        (
            {"refund_reversed": event_pb2.RefundReversed(**common(refund_id="R", payment_order_id="O"))},
            FactKind.REFUND_RETURNED,
        ),
        (
            {"refund_reversed": event_pb2.RefundReversed(**common(refund_id="R", payment_order_id="O", claimed=True))},
            FactKind.REFUND_UNCLAIMED,
        ),
        ({"payout_completed": event_pb2.PayoutCompleted(**common(reference="R"))}, FactKind.PAYOUT_COMPLETED),
        ({"payout_released": event_pb2.PayoutReleased(**common(reference="R"))}, FactKind.PAYOUT_RELEASED),
        ({"payout_returned": event_pb2.PayoutReturned(**common(reference="R"))}, FactKind.PAYOUT_RETURNED),
        ({"dispute_opened": event_pb2.DisputeOpened(**common(payment_order_id="R"))}, FactKind.DISPUTE_OPENED),
        ({"dispute_closed": event_pb2.DisputeClosed(**common(payment_order_id="R", won=True))}, FactKind.DISPUTE_WON),
        ({"dispute_closed": event_pb2.DisputeClosed(**common(payment_order_id="R"))}, FactKind.DISPUTE_LOST),
    ],
    ids=lambda value: value.name if isinstance(value, FactKind) else "",
)
def test_every_event_that_moves_money_is_read_as_what_it_is(body: dict[str, Any], kind: FactKind) -> None:
    occurrence = "e" if kind.name.startswith("DISPUTE") else ""
    assert fact_of(envelope(**body)) == Fact(kind, "R", "S", "sandbox", "USD", 7500, WHEN_US, occurrence)


def test_every_other_event_is_skipped_also_one_that_is_newer_than_this_program() -> None:
    known = {
        "payment_order_succeeded",
        "refund_completed",
        "refund_claimed",
        "refund_reversed",
        "payout_completed",
        "payout_released",
        "payout_returned",
        "dispute_opened",
        "dispute_closed",
    }
    for field in event_pb2.Envelope.DESCRIPTOR.oneofs_by_name["body"].fields:
        if field.name not in known:
            other = envelope()
            getattr(other, field.name).SetInParent()
            assert fact_of(other) is None, field.name
    newer = envelope().SerializeToString() + b"\xfa\x3e\x02\x08\x01"  # field 1007, which nobody knows yet
    assert fact_of(event_pb2.Envelope.FromString(newer)) is None


class Kept:
    """A journal that keeps what it is given."""

    def __init__(self) -> None:
        self.batches: list[list[Received]] = []

    async def post(self, received: list[Received]) -> None:
        self.batches.append(received)


async def test_a_batch_reaches_the_journal_as_one_and_each_entry_once() -> None:
    kept = Kept()
    consumer = LedgerConsumer(PostFacts(kept), pace_s=0)  # type: ignore[arg-type]
    first = event_pb2.PaymentOrderSucceeded(**common(payment_order_id="A"))
    second = event_pb2.PaymentOrderSucceeded(**common(payment_order_id="B"))
    released = event_pb2.PayoutReleased(**common(reference="P"))
    messages = [
        Message("payment.events", "k", f"m{number}", envelope(**body).SerializeToString())
        for number, body in enumerate(
            [
                {"payment_order_succeeded": first},
                {"payout_released": released},
                {"payment_order_succeeded": second},
                {"payment_order_succeeded": first},
            ]
        )
    ]
    await consumer.handle(messages)
    assert [[each.message_id for each in batch] for batch in kept.batches] == [["m0", "m2"]]
    await consumer.handle(messages[1:2])
    assert len(kept.batches) == 1  # nothing to write, nothing asked of the database
