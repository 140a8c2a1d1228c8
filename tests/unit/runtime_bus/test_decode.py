"""From bytes to a message: whatever a broker holds, nothing raises, and what is refused is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bus import Message
from runtime.bus._decode import KEY_BYTES_MAX, MESSAGE_ID_BYTES_MAX, decode, number
from runtime.bus.valkey import _fields, _message_of, _pack, _unpack

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PART = st.none() | st.binary(max_size=40) | st.text(max_size=10).map(str.encode) | st.just(b"7")


def test_good_message_comes_back_as_it_was() -> None:
    sent = Message("t", "schlüssel", "id-é", b"\xff\0", TRACE, 2**63 - 1)
    parts = ("schlüssel".encode(), "id-é".encode(), b"\xff\0", TRACE.encode(), b"%d" % (2**63 - 1))
    assert decode("t", *parts) == (sent, "")
    assert decode("t", b"", b"i", b"") == (Message("t", "", "i", b""), "")


@pytest.mark.parametrize("traceparent", [b"\xff", b"x" * 10_000])
def test_traceparent_is_no_reason_to_refuse(traceparent: bytes) -> None:
    assert decode("t", b"k", b"i", b"p", traceparent) == (Message("t", "k", "i", b"p"), "")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((None, b"i", b"p"), "the key is missing"),
        ((b"k", None, b"p"), "the message id is missing"),
        ((b"k", b"", b"p"), "the message id is empty"),
        ((b"k", b"i", None), "the payload is missing"),
        ((b"\xff", b"i", b"p"), "the key is no UTF-8 (invalid start byte at byte 0)"),
        ((b"k", b"a\xff", b"p"), "the message id is no UTF-8 (invalid start byte at byte 1)"),
        ((b"k\0", b"i", b"p"), "the key has a zero byte"),
        ((b"k" * (KEY_BYTES_MAX + 1), b"i", b"p"), "the key has 4,097 bytes, at most 4,096 are allowed"),
        ((b"k", b"i" * (MESSAGE_ID_BYTES_MAX + 1), b"p"), "the message id has 513 bytes, at most 512 are allowed"),
        ((b"k", b"i", b"p", b"", b"1.5"), "the position is no number of a feed: b'1.5'"),
        ((b"k", b"i", b"p", b"", b"-1"), "the position is no number of a feed: b'-1'"),
        ((b"k", b"i", b"p", b"", b"9223372036854775808"), "the position is no number of a feed"),
        ((None, None, None), "the key is missing; the message id is missing; the payload is missing"),
    ],
)
def test_refusal_says_what_is_wrong(parts: tuple[bytes | None, ...], said: str) -> None:
    message, refusal = decode("t", *parts)  # type: ignore[arg-type]
    assert said in refusal
    assert message.topic == "t"
    assert len(message.key) <= 100


@given(PART, PART, PART, PART, PART)
def test_no_bytes_raise_and_what_passes_can_be_sent_again(
    key: bytes | None, message_id: bytes | None, payload: bytes | None, trace: bytes | None, position: bytes | None
) -> None:
    message, refusal = decode("t", key, message_id, payload, trace, position)
    message.key.encode()
    message.message_id.encode()
    if not refusal:
        assert "\0" not in message.key + message.message_id
        fields = [part if isinstance(part, bytes) else str(part).encode() for part in _fields(message)]
        assert _message_of("t", fields) == (message, "")


@given(st.lists(st.binary(max_size=20), max_size=12))
def test_any_fields_of_an_entry_are_decoded_or_refused_and_kept(fields: list[bytes]) -> None:
    _message_of("t", fields)
    if fields and len(fields) % 2 == 0:
        assert _unpack(_pack(fields)) == fields


@given(st.binary(max_size=60))
def test_raw_form_that_somebody_else_wrote_is_no_entry(raw: bytes) -> None:
    assert all(isinstance(field, bytes) for field in _unpack(raw))


def test_order_of_fields_does_not_matter() -> None:
    fields = [b"n", b"3", b"p", b"x", b"t", TRACE.encode(), b"i", b"1", b"k", b"key", b"z", b"new"]
    assert _message_of("t", fields) == (Message("t", "key", "1", b"x", TRACE, 3), "")


def test_numbers_of_strangers() -> None:
    assert [number(text) for text in (b"12", b"many", b"", None, "7")] == [12, 0, 0, 0, 7]
