"""Findings: list, resolve, count."""

from __future__ import annotations

from functools import partial

from kernel.clock import Clock
from kernel.errors import AlreadyExists, FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from payment.domain.finding import Finding, FindingKind
from payment.service.page_token import page_token_of, position_of
from payment.service.pages import EVERYTHING, Room, read_page
from payment.service.payments import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX
from payment.service.ports import FindingFilter, Position, RequestIdTaken, Resolution, Store, now_of

__all__ = ["Findings"]


class Findings:
    """The use cases of findings."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def list(
        self, filter: FindingFilter, page_size: int, page_token: str, room: Room[Finding] = EVERYTHING
    ) -> tuple[list[Finding], str]:
        """One page, newest first, and the token of the next one. It ends early where the next one does not fit."""
        limit = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        scope = "/".join(
            (
                f"findings/{filter.open_only:d}/{filter.kind or 0:d}/{filter.subject or 0:d}/{filter.psp}",
                f"{filter.seller_account}/{filter.reference}/{filter.checkout_id}/{filter.start}/{filter.end}",
            )
        )
        if "\0" in scope:  # no stored text holds one
            return [], ""

        def position(of: Finding) -> Position:
            return of.create_time, of.finding_id

        read, after = partial(self._store.list_findings, filter), position_of(page_token, scope)
        page, has_more = await read_page(read, position, after, limit, room)
        return page, page_token_of(position(page[-1]), scope) if has_more else ""

    async def resolve(self, finding_id: str, resolution: Resolution) -> Finding:
        """Resolves an open finding; idempotent by the request id. Raises NotFound, FailedPrecondition for one that is
        resolved already, AlreadyExists where the request id resolved another one or gave another reason, InvalidArgument for a
        reason of blanks.
        """
        reason, resolved_by = (each.replace("\0", "").strip() for each in (resolution.reason, resolution.resolved_by))
        if not reason:
            violation = FieldViolation("reason", "says why the finding is resolved: expected more than blanks")
            raise InvalidArgument(f"{violation.field}: {violation.description}", violations=[violation])
        resolution = Resolution(reason, resolved_by, resolution.request_id)
        known = "\0" not in finding_id and "\0" not in resolution.request_id
        mismatch = AlreadyExists(
            f"request_id {resolution.request_id!r} was used before with another finding or reason; use a new one",
            metadata={"request_id": resolution.request_id},
        )
        try:
            if known:
                await self._store.resolve_finding(finding_id, resolution, now_of(self._clock))
        except RequestIdTaken as error:
            raise mismatch from error
        found = await self._store.read_finding(finding_id) if known else None
        if found is None:
            raise NotFound(f"there is no finding {finding_id!r}", metadata={"finding_id": finding_id})
        finding, request_id = found
        if request_id != resolution.request_id:
            raise FailedPrecondition(
                f"finding {finding_id} was resolved before, by {finding.resolved_by or 'nobody named'}: {finding.reason}",
                metadata={"finding_id": finding_id, "resolved_by": finding.resolved_by},
            )
        if finding.reason != resolution.reason:
            raise mismatch
        return finding

    async def open_counts(self) -> dict[FindingKind, int]:
        """How many are open, of every kind."""
        counts = await self._store.open_finding_counts()
        return {kind: counts.get(kind, 0) for kind in FindingKind}
