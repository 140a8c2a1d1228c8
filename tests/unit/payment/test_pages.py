"""Risk: a page of large payments reads many times what it shows, or its end is taken for the end of the list."""

from __future__ import annotations

from typing import Any

import pytest

from ducat.payment.v1 import payment_pb2
from payment.adapters import grpc
from payment.service.pages import EVERYTHING, read_page


async def walk(count: int, limit: int, bytes_each: int | None) -> tuple[list[int], list[int]]:
    """Sizes of the pages, and of the reads, of a whole list of `count` payments."""
    reads: list[int] = []

    async def read(after: Any, wanted: int) -> list[int]:
        start = 0 if after is None else after + 1
        reads.append(len(range(start, min(start + wanted, count))))
        return list(range(start, min(start + wanted, count)))

    after: Any = None
    pages: list[int] = []
    position: Any = lambda item: item  # noqa: E731
    while True:
        room: Any = EVERYTHING
        if bytes_each is not None:
            room = grpc._Page(lambda _: payment_pb2.Payment(checkout_id="b" * bytes_each), lambda _: None)
        page, has_more = await read_page(read, position, after, limit, room)
        assert page == list(range(sum(pages), sum(pages) + len(page)))
        pages.append(len(page))
        if not has_more:
            return pages, reads
        after = page[-1]


async def test_large_payments_are_read_twice_at_most() -> None:
    pages, reads = await walk(400, 500, 700_000)
    assert pages == [4] * 100
    assert sum(reads) <= 2 * 400


@pytest.mark.parametrize("bytes_each", [100, 20_000, 90_000])
async def test_what_is_read_and_not_shown_is_little(bytes_each: int) -> None:
    pages, reads = await walk(1_000, 500, bytes_each)
    assert sum(pages) == 1_000
    assert sum(reads) <= 1_000 + 8 * len(pages)


async def test_small_payments_take_few_reads() -> None:
    assert await walk(50, 50, 500) == ([50], [8, 42])
    assert await walk(51, 50, None) == ([50, 1], [8, 43, 1])


def test_a_payment_larger_than_a_page_comes_without_its_histories() -> None:
    """Risk: it is larger than a message may be, and the list stops there for good."""

    def message(_: object) -> payment_pb2.Payment:
        found = payment_pb2.Payment(checkout_id="CH")
        for _number in range(100):
            order = found.payment_orders.add(hosted_page_url="h" * 2_048)
            for _change in range(50):
                order.history.add(cause="c" * 1_000)
        return found

    page: Any = grpc._Page(message, grpc._without_histories)
    assert message(None).ByteSize() > 5_000_000
    assert page.fits(None)
    assert payment_pb2.ListPaymentsResponse(payments=page.messages).ByteSize() < grpc.PAGE_BYTES_MAX
    assert {order.hosted_page_url for order in page.messages[0].payment_orders} == {"h" * 2_048}
