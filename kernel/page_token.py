"""Page tokens: where a page ended, bound to the method and the filter that it was made with. Callers must not look inside.

A token holds nothing that its bearer could not read anyway, so it is not encrypted. The checksum over position and
filter refuses tokens that were cut, altered by accident, or made for another filter or method; it is no signature, so
whoever reads a position checks it as any other input.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from kernel.errors import FieldViolation, InvalidArgument

__all__ = ["page_token", "position_of_token", "token_invalid"]

_CHECKSUM_BYTES = 8


def page_token(position: str, *filters: str) -> str:
    """The token of a position; `filters` name the method and the filter."""
    return base64.urlsafe_b64encode(_checksum(position.encode(), filters) + position.encode()).decode().rstrip("=")


def position_of_token(token: str, *filters: str) -> str:
    """The position of a token. Raises InvalidArgument (PAGE_TOKEN_INVALID) for one that these filters did not give."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        checksum, position = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
        if checksum == _checksum(position, filters) and position and b"\0" not in position:
            return position.decode()
    except (binascii.Error, ValueError):
        pass
    raise token_invalid()


def token_invalid() -> InvalidArgument:
    """What a caller is told of a token that is none."""
    violation = FieldViolation("page_token", "must be the next_page_token of an answer to the same filters")
    return InvalidArgument(
        "page_token: not one that this method gave out for this filter; begin again without a token",
        violations=[violation],
        reason="PAGE_TOKEN_INVALID",
    )


def _checksum(position: bytes, filters: tuple[str, ...]) -> bytes:
    return hashlib.sha256("\0".join(filters).encode() + b"\0" + position).digest()[:_CHECKSUM_BYTES]
