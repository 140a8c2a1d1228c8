"""A page of a list that ends early where the next item would not fit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from payment.service.ports import Position

__all__ = ["CHUNK_COUNT", "Fits", "everything_fits", "read_page"]

CHUNK_COUNT = 64
"""Items that are read at once: the largest payments are hundreds of kilobytes each."""

Item = TypeVar("Item")
Fits = Callable[[Item], bool]
"""Takes the next item of a page, or says no: then the page ends before it. The first one always fits."""


def everything_fits(_item: object) -> bool:
    """For a page that only its count bounds."""
    return True


async def read_page(
    read: Callable[[Position | None, int], Awaitable[list[Item]]],
    position: Callable[[Item], Position],
    after: Position | None,
    limit: int,
    fits: Fits[Item],
) -> tuple[list[Item], bool]:
    """Up to `limit` items after a position, fewer where one does not fit, and whether there are more."""
    page: list[Item] = []
    while True:
        wanted = min(limit + 1 - len(page), CHUNK_COUNT)
        found = await read(after, wanted)
        for item in found:
            if len(page) == limit or not fits(item):
                return page, True
            page.append(item)
        if len(found) < wanted:
            return page, False
        after = position(page[-1])
