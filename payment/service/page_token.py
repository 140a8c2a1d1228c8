"""Page tokens: where a page ended, bound to the filter that it was made with. Callers must not look inside.

A token holds nothing that its bearer could not read anyway, so it is not encrypted; the checksum over position and
filter refuses tokens that were cut, altered by accident, or made for another filter or method.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from datetime import UTC, datetime, timedelta

from kernel.errors import InvalidArgument
from payment.service.ports import Position

__all__ = ["page_token_of", "position_of"]

_VERSION = b"\x01"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CHECKSUM_BYTES = 8


def page_token_of(position: Position, scope: str) -> str:
    """The token of a position; `scope` names the method and the filter."""
    time, key = position
    body = _VERSION + ((time - _EPOCH) // timedelta(microseconds=1)).to_bytes(8, "big") + key.encode()
    return base64.urlsafe_b64encode(_checksum(body, scope) + body).decode().rstrip("=")


def position_of(token: str, scope: str) -> Position | None:
    """The position of a token, None for the empty one. Raises InvalidArgument with PAGE_TOKEN_INVALID."""
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        checksum, body = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
        if checksum != _checksum(body, scope) or body[:1] != _VERSION:
            raise ValueError
        return _EPOCH + timedelta(microseconds=int.from_bytes(body[1:9], "big")), body[9:].decode()
    except (binascii.Error, ValueError):
        raise InvalidArgument(
            "page_token: not one that this method gave out for this filter; begin again without a token",
            reason="PAGE_TOKEN_INVALID",
        ) from None


def _checksum(body: bytes, scope: str) -> bytes:
    return hashlib.sha256(scope.encode() + b"\0" + body).digest()[:_CHECKSUM_BYTES]
