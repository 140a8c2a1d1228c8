"""A page of a list that ends early where the next item would not fit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from payment.service.ports import Position

__all__ = ["CHUNK_COUNT", "EVERYTHING", "FIRST_CHUNK_COUNT", "Everything", "Room", "read_page"]

FIRST_CHUNK_COUNT = 8
"""Items that are read before any has shown how large they are: the largest payments are hundreds of kilobytes each."""
CHUNK_COUNT = 64
"""Items that are read at once, at most."""

Item = TypeVar("Item")
Taken = TypeVar("Taken", contravariant=True)


class Room(Protocol[Taken]):
    """What a page has room for."""

    def fits(self, item: Taken) -> bool:
        """Takes the next item of a page, or says no: then the page ends before it. The first one always fits."""

    def left_count(self) -> int:
        """How many more are likely to fit, of the size of those that it has."""


class Everything:
    """For a page that only its count bounds."""

    def fits(self, _item: object) -> bool:
        return True

    def left_count(self) -> int:
        return CHUNK_COUNT


EVERYTHING = Everything()


async def read_page(
    read: Callable[[Position | None, int], Awaitable[list[Item]]],
    position: Callable[[Item], Position],
    after: Position | None,
    limit: int,
    room: Room[Item],
) -> tuple[list[Item], bool]:
    """Up to `limit` items after a position, fewer where one does not fit, and whether there are more."""
    page: list[Item] = []
    while True:
        likely = room.left_count() + 1 if page else FIRST_CHUNK_COUNT  # one more says whether there is one
        wanted = min(limit + 1 - len(page), likely, CHUNK_COUNT)
        found = await read(after, wanted)
        for item in found:
            if len(page) == limit or not room.fits(item):
                return page, True
            page.append(item)
        if len(found) < wanted:
            return page, False
        after = position(page[-1])
