"""Between the executor's own words and ducat.event.v1 on the bus."""

from __future__ import annotations

from typing import Any

from ducat.common.v1 import common_pb2
from ducat.event.v1 import event_pb2
from executor.domain.command import CancelOrder, Command, ExecuteOrder, ExecutePayout, ExecuteRefund
from executor.service.ports import Event
from kernel.money import Money

__all__ = ["command_of", "encode", "execute_order", "execute_payout", "execute_refund", "money", "set_time"]


def command_of(payload: bytes) -> Command | CancelOrder | None:
    """The command in an envelope; None where it is something that this version does not know."""
    envelope = event_pb2.Envelope.FromString(payload)
    match envelope.WhichOneof("body"):
        case "execute_order":
            return execute_order(envelope.execute_order)
        case "execute_refund":
            return execute_refund(envelope.execute_refund)
        case "execute_payout":
            return execute_payout(envelope.execute_payout)
        case "cancel_order":
            body = envelope.cancel_order
            return CancelOrder(body.payment_order_id, body.psp, body.psp_token)
    return None


def execute_order(body: event_pb2.ExecuteOrder) -> ExecuteOrder:
    return ExecuteOrder(
        body.payment_order_id,
        body.checkout_id,
        body.seller_account,
        _money(body.amount),
        body.psp,
        body.buyer_email,
        body.page_key,
    )


def execute_refund(body: event_pb2.ExecuteRefund) -> ExecuteRefund:
    return ExecuteRefund(body.refund_id, body.payment_order_id, body.psp, body.psp_token, _money(body.amount))


def execute_payout(body: event_pb2.ExecutePayout) -> ExecutePayout:
    return ExecutePayout(body.reference)


def encode(event: Event, time_ns: int, traceparent: str) -> bytes:
    """A serialized ducat.event.v1.Envelope."""
    fields: dict[str, Any] = {
        name: money(value) if isinstance(value, Money) else value for name, value in event.fields.items()
    }
    envelope = event_pb2.Envelope(event_id=event.event_id, traceparent=traceparent, **{event.kind: fields})
    set_time(envelope.occur_time, time_ns)
    return envelope.SerializeToString()


def money(value: Money) -> common_pb2.Money:
    return common_pb2.Money(currency_code=value.currency_code, amount_minor=value.amount_minor)


def set_time(timestamp: Any, time_ns: int) -> None:
    """Sets a google.protobuf.Timestamp."""
    timestamp.seconds, timestamp.nanos = divmod(time_ns, 1_000_000_000)


def _money(value: common_pb2.Money) -> Money:
    return Money(value.currency_code, value.amount_minor)
