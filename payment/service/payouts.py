"""Payouts: create, read, list, cancel, and what the executor needs to send one."""

from __future__ import annotations

from functools import partial

from kernel.clock import Clock
from kernel.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from kernel.state_table import TransitionRefused
from payment.domain.facts import Fact, FactKind
from payment.domain.payout import Payout, PayoutState
from payment.domain.requests import PayoutRequest, Providers, check_payout, choose_provider, new_payout, payout_hash
from payment.service.page_token import page_token_of, position_of
from payment.service.pages import EVERYTHING, Room, read_page
from payment.service.payments import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, until_fresh
from payment.service.ports import ChangeSet, PayoutFilter, Position, Store, Stored, now_of

__all__ = ["Payouts"]


class Payouts:
    """The use cases of payouts."""

    def __init__(self, store: Store, clock: Clock, *, providers: Providers) -> None:
        self._store = store
        self._clock = clock
        self._providers = providers

    async def create(self, request: PayoutRequest, traceparent: str = "") -> tuple[Payout, bool]:
        """The payout, and whether it was there already. Raises InvalidArgument with every violation, AlreadyExists."""
        now = now_of(self._clock)
        request, wrong = check_payout(request, self._providers, now)
        if wrong:
            if await self._store.payout_hash(request.reference) == payout_hash(request):
                return await self.get(request.reference), True  # it was right by the settings of its time
            bank = all(violation.field.startswith("recipient.") for violation in wrong)
            raise InvalidArgument(
                f"{wrong[0].field}: {wrong[0].description}",
                violations=wrong,
                reason="BANK_DETAILS_INVALID" if bank else "",
            )
        payout = new_payout(
            request, choose_provider(request.psp, request.currency_code, self._providers), now, traceparent
        )
        if payout.state is PayoutState.HOLDING:
            payout.facts.append(Fact(FactKind.PAYOUT_REQUESTED))
        stored = await self._store.create_payout(payout, payout_hash(request))
        if stored is Stored.CREATED:
            return payout, False
        if stored is Stored.MISMATCH:
            raise AlreadyExists(
                f"reference {request.reference!r} was used before with other content; "
                "use a new reference, or send the first content again",
                metadata={"reference": request.reference},
            )
        return await self.get(request.reference), True

    async def get(self, reference: str) -> Payout:
        """One payout, bank details unmasked: mask them before they leave. Raises NotFound."""
        payout = await self._store.read_payout(reference) if "\0" not in reference else None
        if payout is None:
            raise NotFound(f"no payout has the reference {reference!r}", metadata={"reference": reference})
        return payout

    async def list(
        self, filter: PayoutFilter, page_size: int, page_token: str, room: Room[Payout] = EVERYTHING
    ) -> tuple[list[Payout], str]:
        """One page, newest first, and the token of the next one. It ends early where the next one does not fit."""
        limit = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        scope = f"payouts/{filter.seller_account}/{filter.state or 0:d}"
        if "\0" in scope:  # no stored text holds one
            return [], ""

        def position(of: Payout) -> Position:
            return of.create_time, of.reference

        read, after = partial(self._store.list_payouts, filter), position_of(page_token, scope)
        page, has_more = await read_page(read, position, after, limit, room)
        return page, page_token_of(position(page[-1]), scope) if has_more else ""

    async def cancel(self, reference: str, reason: str) -> Payout:
        """Cancels a payout whose money is not held yet. Idempotent. Raises NotFound, FailedPrecondition."""

        async def attempt() -> Payout:
            payout = await self.get(reference)
            changes = ChangeSet(now_of(self._clock))
            try:
                payout.cancel(reason.replace("\0", ""), changes.now)
            except TransitionRefused as error:
                raise FailedPrecondition(
                    f"payout {reference!r} is {payout.state.name}: too late, the provider may have it or it is final",
                    metadata={"state": payout.state.name},
                ) from error
            changes.collect([payout])
            if not changes.is_empty:
                await self._store.apply(changes)
            return payout

        payout = await until_fresh(attempt)
        return await self.get(reference) if payout.is_changed else payout
