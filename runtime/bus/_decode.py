"""From a broker's bytes to a message. Anybody may write to a broker: nothing here raises, whatever the bytes are.

What is no message is refused with the reason: the dispatcher buries it without a try, and the engine keeps its raw form beside the dead
letter. The feed of its publisher has the true one, so a damaged copy costs a detour and no money.
"""

from __future__ import annotations

from runtime.bus import Message

__all__ = ["KEY_BYTES_MAX", "MESSAGE_ID_BYTES_MAX", "decode", "number"]

KEY_BYTES_MAX = 4_096
MESSAGE_ID_BYTES_MAX = 512
TRACEPARENT_BYTES_MAX = 256
SHOWN_MAX = 100
"""Characters of a refused key or message id that are kept to show it."""


def decode(
    topic: str,
    key: bytes | None,
    message_id: bytes | None,
    payload: bytes | None,
    traceparent: bytes | None = None,
    position: bytes | None = None,
) -> tuple[Message, str]:
    """The message, and why it must be refused: empty where nothing is wrong. None stands for a field that is not there.

    The message of a refusal is only fit to be shown. A traceparent that makes no sense is left out: it is no part of what happened.
    """
    try:
        if (
            key is not None
            and message_id
            and payload is not None
            and len(key) <= KEY_BYTES_MAX
            and len(message_id) <= MESSAGE_ID_BYTES_MAX
            and b"\0" not in key
            and b"\0" not in message_id
        ):
            trace = _trace(traceparent) if traceparent else ""
            place = _place(position) if position is not None else 0
            return Message(topic, key.decode(), message_id.decode(), payload, trace, place), ""
    except ValueError:  # no UTF-8, no number
        pass
    shown = Message(topic, _shown(key), _shown(message_id), payload or b"")
    return shown, _refusal(key, message_id, payload, position)


def number(text: bytes | str | None) -> int:
    """A number of an operator's list, such as a count of tries; 0 for anything else."""
    try:
        return int(text or 0)
    except ValueError:
        return 0


def _trace(traceparent: bytes) -> str:
    if len(traceparent) <= TRACEPARENT_BYTES_MAX and traceparent.isascii():
        return traceparent.decode()
    return ""


def _place(position: bytes) -> int:
    if len(position) > 19 or not position.isdigit() or (place := int(position)) >= 1 << 63:
        raise ValueError("position")
    return place


def _refusal(key: bytes | None, message_id: bytes | None, payload: bytes | None, position: bytes | None) -> str:
    wrong = [
        *_wrong_text("key", key, KEY_BYTES_MAX),
        *_wrong_text("message id", message_id, MESSAGE_ID_BYTES_MAX),
        *(["the message id is empty"] if message_id == b"" else []),
        *(["the payload is missing"] if payload is None else []),
    ]
    if position is not None:
        try:
            _place(position)
        except ValueError:
            wrong.append(f"the position is no number of a feed: {position[:SHOWN_MAX]!r}")
    return f"this is no message of the bus: {'; '.join(wrong)}. Its publisher's feed has the true one"


def _wrong_text(name: str, text: bytes | None, bytes_max: int) -> list[str]:
    if text is None:
        return [f"the {name} is missing"]
    if len(text) > bytes_max:
        return [f"the {name} has {len(text):,} bytes, at most {bytes_max:,} are allowed"]
    if b"\0" in text:
        return [f"the {name} has a zero byte"]
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return [f"the {name} is no UTF-8 ({error.reason} at byte {error.start})"]
    return []


def _shown(text: bytes | None) -> str:
    return (
        (text or b"")[: 4 * SHOWN_MAX].decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")[:SHOWN_MAX]
    )
