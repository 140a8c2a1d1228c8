"""A payload that is no envelope, or an envelope full of nonsense, in each room: refused as the message's own fault, so that it becomes a
dead letter, or passed over; never taken for an outage, which would be tried for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ducat.event.v1.event_pb2 import Envelope
from executor.adapters.messages import command_of
from ledger.adapters.bus import fact_of
from payment.adapters.bus import report_of
from runtime.bus import BusPolicy, Message, is_transient
from runtime.bus._dispatch import Delivery, Dispatcher
from wallet_core.adapters.bus import step_of

ROOMS: dict[str, Callable[[bytes], object]] = {
    "payment": report_of,
    "executor": command_of,
    "ledger": lambda payload: fact_of(Envelope.FromString(payload)),
    "wallet": lambda payload: step_of(Message("payment.events", "k", "i", payload)),
}
BODIES = [field for field in Envelope.DESCRIPTOR.fields if field.containing_oneof is not None]


@st.composite
def nonsense(draw: st.DrawFn) -> bytes:
    """Bytes, or a known body with random content: strange texts, amounts and times."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=60))
    text = st.text(max_size=8) | st.just("\0") | st.just("closed connection")
    number = st.integers(-(2**63), 2**63 - 1)
    envelope = Envelope(event_id=draw(text), traceparent=draw(text))
    if draw(st.booleans()):
        envelope.occur_time.seconds, envelope.occur_time.nanos = draw(number), draw(st.integers(-(2**31), 2**31 - 1))
    field = draw(st.sampled_from(BODIES))
    body = getattr(envelope, field.name)
    body.SetInParent()
    for inner in body.DESCRIPTOR.fields:
        if inner.type == inner.TYPE_STRING and not hasattr(getattr(body, inner.name), "append"):
            setattr(body, inner.name, draw(text))
        elif inner.type == inner.TYPE_BYTES:
            setattr(body, inner.name, draw(st.binary(max_size=20)))
        elif inner.message_type is not None and inner.message_type.name == "Money" and draw(st.booleans()):
            getattr(body, inner.name).currency_code = draw(text)
            getattr(body, inner.name).amount_minor = draw(number)
    return envelope.SerializeToString()


@pytest.mark.parametrize("room", ROOMS)
@given(payload=nonsense())
def test_nonsense_is_the_messages_own_fault(room: str, payload: bytes) -> None:
    fault: Exception | None = None
    try:
        ROOMS[room](payload)
    except Exception as error:
        fault = error
    assert fault is None or not is_transient(fault), repr(fault)


@pytest.mark.parametrize("room", ROOMS)
async def test_payload_that_is_no_envelope_is_buried_and_the_next_passes(room: str) -> None:

    buried: list[str] = []
    over = asyncio.Event()

    async def handle(messages: Sequence[Message]) -> None:
        for message in messages:
            ROOMS[room](message.payload)

    async def bury(delivery: Delivery, error: str) -> None:
        buried.append(delivery.message.message_id)

    def done(delivery: Delivery) -> None:
        if delivery.message.message_id == "after":
            over.set()

    policy = BusPolicy(retry_base_ms=1, retry_cap_ms=1, delivery_count_max=2)
    dispatcher = Dispatcher(
        "t", "g", handle, batch_max=8, concurrency=1, policy=policy, now_ms=lambda: 1, done=done, bury=bury
    )
    task = asyncio.create_task(dispatcher.run())
    payloads = {"garbage": b"\xff\xff\xff", "cut": Envelope(event_id="e" * 50).SerializeToString()[:20], "after": b""}
    dispatcher.offer(
        Delivery(Message("t", "k", name, payload), 0, n) for n, (name, payload) in enumerate(payloads.items())
    )
    async with asyncio.timeout(30):
        await over.wait()
    assert buried == ["garbage", "cut"]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("error", "is_outage"),
    [
        (asyncpg.exceptions._base.InterfaceError("connection is closed"), True),
        (asyncpg.exceptions._base.DataError("invalid input for query argument $1: 'closed connection'"), False),
        (asyncpg.exceptions.CharacterNotInRepertoireError("invalid byte sequence"), False),
        (TimeoutError(), True),
    ],
)
def test_text_of_a_refused_value_does_not_make_it_an_outage(error: Exception, is_outage: bool) -> None:
    assert is_transient(error) is is_outage
