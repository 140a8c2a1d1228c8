"""Payments: create, read, list, cancel, watch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from secrets import token_bytes
from typing import TypeVar

from kernel.clock import Clock
from kernel.errors import AlreadyExists, FieldViolation, InvalidArgument, NotFound, Unavailable
from payment.domain.payment import PAGE_KEY_BYTES, Payment
from payment.domain.requests import (
    PaymentRequest,
    Providers,
    check_payment,
    new_payment,
    payment_hash,
    used_order_violations,
)
from payment.service.page_token import page_token_of, position_of
from payment.service.pages import EVERYTHING, Room, read_page
from payment.service.ports import (
    Changes,
    ChangeSet,
    OrderIdsTaken,
    PaymentFilter,
    Position,
    StaleState,
    Store,
    Stored,
    now_of,
)

__all__ = ["PAGE_SIZE_DEFAULT", "PAGE_SIZE_MAX", "STALE_TRIES_MAX", "Payments", "until_fresh"]

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 500
STALE_TRIES_MAX = 50
"""How often a decision is made again because somebody else was faster. Each time somebody did get through, so this is
a bound on the crowd around one order, not on time.
"""

Result = TypeVar("Result")


async def until_fresh(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Load, decide and write; again where the state changed in between. Raises Unavailable after STALE_TRIES_MAX."""
    for _ in range(STALE_TRIES_MAX):
        try:
            return await attempt()
        except StaleState:
            continue
    raise Unavailable(f"the state changed {STALE_TRIES_MAX} times while this was decided; retry with backoff")


class Payments:
    """The use cases of payments."""

    def __init__(
        self,
        store: Store,
        changes: Changes,
        clock: Clock,
        *,
        providers: Providers,
        orders_max: int,
        expiry: timedelta,
        random: Callable[[int], bytes] = token_bytes,
    ) -> None:
        self._store = store
        self._changes = changes
        self._clock = clock
        self._providers = providers
        self._orders_max = orders_max
        self._expiry = expiry
        self._random = random

    async def create(self, request: PaymentRequest, traceparent: str = "") -> tuple[Payment, bool]:
        """The payment, and whether it was there already. Raises InvalidArgument with every violation, AlreadyExists."""
        wrong = check_payment(request, self._providers, self._orders_max)
        if wrong:
            if await self._store.payment_hash(request.checkout_id) == payment_hash(request):
                return await self.get(request.checkout_id), True  # it was right by the settings of its time
            ids = [order.payment_order_id for order in request.orders[: self._orders_max]]
            wrong += used_order_violations(request, await self._store.taken_order_ids(request.checkout_id, ids))
            raise _invalid(wrong)
        now = now_of(self._clock)
        payment = new_payment(request, now, traceparent, self._random(PAGE_KEY_BYTES).hex())
        try:
            stored = await self._store.create_payment(payment, payment_hash(request), now + self._expiry, traceparent)
        except OrderIdsTaken as error:
            raise _invalid(used_order_violations(request, error.payment_order_ids)) from error
        if stored is Stored.CREATED:
            return payment, False
        if stored is Stored.MISMATCH:
            raise AlreadyExists(
                f"checkout_id {request.checkout_id!r} was used before with other content; "
                "use a new id, or send the first content again",
                metadata={"checkout_id": request.checkout_id},
            )
        return await self.get(request.checkout_id), True

    async def get(self, checkout_id: str) -> Payment:
        """One payment. Raises NotFound."""
        payment = await self._store.read_payment(checkout_id) if "\0" not in checkout_id else None
        if payment is None:
            raise NotFound(f"no payment has the checkout_id {checkout_id!r}", metadata={"checkout_id": checkout_id})
        return payment

    async def page(self, page_key: str) -> Payment:
        """The payment of a buyer's page. Raises NotFound, the same for every wrong key."""
        payment = await self._store.read_page(page_key)
        if payment is None:
            raise NotFound("no page has this address")
        return payment

    async def list(
        self, filter: PaymentFilter, page_size: int, page_token: str, room: Room[Payment] = EVERYTHING
    ) -> tuple[list[Payment], str]:
        """One page, newest first, and the token of the next one. It ends early where the next one does not fit."""
        limit = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        scope = f"payments/{filter.buyer_id}/{filter.seller_account}/{filter.open_only:d}{'/findings' if filter.has_findings else ''}"
        if "\0" in scope:  # no stored text holds one
            return [], ""

        def position(of: Payment) -> Position:
            return of.create_time, of.checkout_id

        read, after = partial(self._store.list_payments, filter), position_of(page_token, scope)
        page, has_more = await read_page(read, position, after, limit, room)
        return page, page_token_of(position(page[-1]), scope) if has_more else ""

    async def cancel(self, checkout_id: str, reason: str) -> Payment:
        """Cancels what is not paid: at once where no PSP has the order, else the PSP is asked to. Idempotent.
        Raises NotFound.
        """

        async def attempt() -> Payment:
            payment = await self.get(checkout_id)
            changes = ChangeSet(now_of(self._clock))
            for order in payment.orders:
                order.cancel(reason.replace("\0", ""), changes.now)
            changes.collect(payment.orders)
            if not changes.is_empty:
                await self._store.apply(changes)
            return payment

        payment = await until_fresh(attempt)
        return await self.get(checkout_id) if any(order.is_changed for order in payment.orders) else payment

    async def watch(self, checkout_id: str) -> AsyncIterator[Payment]:
        """The payment at once, then after each change, until it is done. Raises NotFound."""
        shown: list[int] = []
        async for _ in self._changes.watch(checkout_id):
            payment = await self.get(checkout_id)
            revisions = [order.revision for order in payment.orders]
            if revisions != shown:
                shown = revisions
                yield payment
            if payment.is_done:
                return


def _invalid(wrong: list[FieldViolation]) -> InvalidArgument:
    first = wrong[0]
    return InvalidArgument(f"{first.field}: {first.description}", violations=wrong)
