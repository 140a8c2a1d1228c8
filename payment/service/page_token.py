"""Positions in lists that are ordered by time and key, as page tokens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from kernel.page_token import page_token, position_of_token, token_invalid
from payment.service.ports import Position

__all__ = ["page_token_of", "position_of"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def page_token_of(position: Position, scope: str) -> str:
    """The token of a position; `scope` names the method and the filter."""
    time, key = position
    return page_token(f"{(time - _EPOCH) // timedelta(microseconds=1)}/{key}", scope)


def position_of(token: str, scope: str) -> Position | None:
    """The position of a token, None for the empty one. Raises InvalidArgument with PAGE_TOKEN_INVALID."""
    if not token:
        return None
    microseconds, _, key = position_of_token(token, scope).partition("/")
    try:
        return _EPOCH + timedelta(microseconds=int(microseconds)), key
    except (ValueError, OverflowError):
        raise token_invalid() from None
