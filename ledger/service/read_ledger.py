"""Use cases that read: accounts, entries, statements, the trial balance."""

from __future__ import annotations

from kernel.errors import FieldViolation, InvalidArgument, NotFound, ResourceExhausted
from kernel.page_token import page_token, position_of_token, token_invalid
from ledger.domain import Statement, TrialBalance, statement_of, trial_balance_of
from ledger.service.ports import AccountRow, EntryRow, Journal

__all__ = [
    "ACCOUNT_PAGE_SIZE_DEFAULT",
    "ENTRY_PAGE_SIZE_DEFAULT",
    "STATEMENT_LINE_COUNT_MAX",
    "ReadLedger",
]

ACCOUNT_PAGE_SIZE_DEFAULT = 100
ENTRY_PAGE_SIZE_DEFAULT = 50
STATEMENT_LINE_COUNT_MAX = 10_000

_POSITION_MAX = 2**63 - 1


class ReadLedger:
    """Reads; changes nothing."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def account(self, name: str) -> AccountRow:
        """Raises NotFound."""
        row = await self._journal.account(name)
        if row is None:
            raise NotFound(f"account {name!r} has no entry yet", metadata={"account": name})
        return row

    async def accounts(self, name_prefix: str, page_size: int, token: str) -> tuple[list[AccountRow], str]:
        """One page by name, and the token of the next one (empty on the last). Raises InvalidArgument for a foreign
        token.
        """
        limit = page_size or ACCOUNT_PAGE_SIZE_DEFAULT
        after = position_of_token(token, "accounts", name_prefix) if token else ""
        rows = await self._journal.accounts(name_prefix, after, limit + 1)
        more = page_token(rows[limit - 1].name, "accounts", name_prefix) if len(rows) > limit else ""
        return rows[:limit], more

    async def entries(
        self, merchant_reference: str, account_name: str, page_size: int, token: str
    ) -> tuple[list[EntryRow], str]:
        """One page, newest first, and the token of the next one (empty on the last). Raises InvalidArgument for a
        foreign token.
        """
        limit = page_size or ENTRY_PAGE_SIZE_DEFAULT
        filters = ("entries", merchant_reference, account_name)
        before = _POSITION_MAX
        if token:
            text = position_of_token(token, *filters)
            if not (len(text) < 20 and text.isascii() and text.isdecimal() and 0 < int(text) <= _POSITION_MAX):
                raise token_invalid()
            before = int(text)
        rows = await self._journal.entries(merchant_reference, account_name, before, limit + 1)
        more = page_token(str(rows[limit - 1].position), *filters) if len(rows) > limit else ""
        return rows[:limit], more

    async def trial_balance(self) -> TrialBalance:
        """From the postings, compared with the accounts' running sums in the same snapshot."""
        from_postings, from_accounts = await self._journal.sums()
        return trial_balance_of(from_postings, from_accounts)

    async def statement(self, account_name: str, start_us: int | None, end_us: int | None) -> Statement:
        """``start_us`` included, ``end_us`` not, unix microseconds, None means open.

        Raises NotFound, InvalidArgument for a period that ends before it starts, ResourceExhausted above
        STATEMENT_LINE_COUNT_MAX.
        """
        if start_us is not None and end_us is not None and end_us < start_us:
            violation = FieldViolation("end_time", "must not be before start_time")
            raise InvalidArgument("the period ends before it starts", violations=[violation])
        row = await self.account(account_name)
        debit, credit, movements = await self._journal.movements(
            account_name, start_us, end_us, STATEMENT_LINE_COUNT_MAX + 1
        )
        if len(movements) > STATEMENT_LINE_COUNT_MAX:
            raise ResourceExhausted(
                f"the period has more than {STATEMENT_LINE_COUNT_MAX} lines: ask for a shorter one",
                metadata={"limit": "STATEMENT_LINE_COUNT_MAX"},
            )
        return statement_of(account_name, row.kind, row.currency_code, debit, credit, movements)
