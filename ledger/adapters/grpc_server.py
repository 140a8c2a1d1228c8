"""ducat.ledger.v1.LedgerService over the use cases."""

from __future__ import annotations

from typing import NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from ducat.common.v1 import common_pb2
from ducat.ledger.v1 import ledger_pb2, ledger_pb2_grpc
from kernel.errors import FieldViolation, InvalidArgument, Unimplemented
from ledger.domain import JournalEntry, balance_minor
from ledger.service import AccountRow, CompareWallet, Comparison, EntryRow, ReadLedger

__all__ = ["SCOPES", "SERVICE_NAME", "LedgerServicer", "add_to_server"]

SERVICE_NAME = "ducat.ledger.v1.LedgerService"
add_to_server = ledger_pb2_grpc.add_LedgerServiceServicer_to_server

_READS = (
    "GetAccount",
    "ListAccounts",
    "ListJournalEntries",
    "GetTrialBalance",
    "GetStatement",
    "ListBreaks",
    "CompareWallet",
)
_WRITES = ("ImportSettlement", "ResolveBreak")
SCOPES: dict[str, str] = {
    **{f"/{SERVICE_NAME}/{method}": "ledger.read" for method in _READS},
    **{f"/{SERVICE_NAME}/{method}": "ledger.write" for method in _WRITES},
}

_NO_RECONCILIATION = "reconciliation is not served yet: compare the PSP's report with ListJournalEntries until it is"
# 0001-01-01 to 9999-12-31, as google.protobuf.Timestamp defines it.
_SECONDS_MIN = -62_135_596_800
_SECONDS_MAX = 253_402_300_799
DIFFERENCES_TOLD_MAX = 1_000


class LedgerServicer(ledger_pb2_grpc.LedgerServiceServicer):
    """Errors are kernel.errors; the runtime's interceptor maps them."""

    def __init__(self, read_ledger: ReadLedger, compare_wallet: CompareWallet) -> None:
        self._read = read_ledger
        self._compare = compare_wallet

    async def GetAccount(
        self, request: ledger_pb2.GetAccountRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.GetAccountResponse:
        return ledger_pb2.GetAccountResponse(account=_account(await self._read.account(request.name)))

    async def ListAccounts(
        self, request: ledger_pb2.ListAccountsRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.ListAccountsResponse:
        rows, token = await self._read.accounts(request.name_prefix, request.page_size, request.page_token)
        return ledger_pb2.ListAccountsResponse(accounts=[_account(row) for row in rows], next_page_token=token)

    async def ListJournalEntries(
        self, request: ledger_pb2.ListJournalEntriesRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.ListJournalEntriesResponse:
        rows, token = await self._read.entries(
            request.merchant_reference, request.account_name, request.page_size, request.page_token
        )
        return ledger_pb2.ListJournalEntriesResponse(
            journal_entries=[_entry(row) for row in rows], next_page_token=token
        )

    async def GetTrialBalance(
        self, request: ledger_pb2.GetTrialBalanceRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.GetTrialBalanceResponse:
        balance = await self._read.trial_balance()
        return ledger_pb2.GetTrialBalanceResponse(
            lines=[
                ledger_pb2.TrialBalanceLine(
                    currency_code=sums.currency_code, debit_minor=sums.debit_minor, credit_minor=sums.credit_minor
                )
                for sums in balance.lines
            ],
            balanced=balance.balanced,
        )

    async def GetStatement(
        self, request: ledger_pb2.GetStatementRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.GetStatementResponse:
        statement = await self._read.statement(
            request.account_name,
            _us_of("start_time", request.start_time) if request.HasField("start_time") else None,
            _us_of("end_time", request.end_time) if request.HasField("end_time") else None,
        )
        return ledger_pb2.GetStatementResponse(
            account_name=statement.account_name,
            currency_code=statement.currency_code,
            opening_balance_minor=statement.opening_balance_minor,
            closing_balance_minor=statement.closing_balance_minor,
            lines=[
                ledger_pb2.StatementLine(
                    journal_entry_id=line.movement.journal_entry_id,
                    merchant_reference=line.movement.merchant_reference,
                    description=line.movement.description,
                    side=f"POSTING_SIDE_{line.movement.side.name}",
                    amount_minor=line.movement.amount_minor,
                    balance_minor=line.balance_minor,
                    occur_time=_timestamp(line.movement.occur_time_us),
                )
                for line in statement.lines
            ],
        )

    async def ImportSettlement(
        self, request: ledger_pb2.ImportSettlementRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.ImportSettlementResponse:
        _not_served()

    async def ListBreaks(
        self, request: ledger_pb2.ListBreaksRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.ListBreaksResponse:
        _not_served()

    async def ResolveBreak(
        self, request: ledger_pb2.ResolveBreakRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.ResolveBreakResponse:
        _not_served()

    async def CompareWallet(
        self, request: ledger_pb2.CompareWalletRequest, context: aio.ServicerContext[object, object]
    ) -> ledger_pb2.CompareWalletResponse:
        max_age_s = request.max_age.ToNanoseconds() / 1e9 if request.HasField("max_age") else None
        return _comparison(await self._compare.compare(request.name_prefix, max_age_s))


def _not_served() -> NoReturn:
    raise Unimplemented(_NO_RECONCILIATION)


def _account(row: AccountRow) -> ledger_pb2.Account:
    return ledger_pb2.Account(
        name=row.name,
        kind=f"ACCOUNT_KIND_{row.kind.name}",
        currency_code=row.currency_code,
        debit_minor=row.debit_minor,
        credit_minor=row.credit_minor,
        balance_minor=balance_minor(row.kind, row.debit_minor, row.credit_minor),
    )


def _entry(row: EntryRow) -> ledger_pb2.JournalEntry:
    entry: JournalEntry = row.entry
    return ledger_pb2.JournalEntry(
        journal_entry_id=entry.journal_entry_id,
        purpose=entry.purpose,
        merchant_reference=entry.merchant_reference,
        description=entry.description,
        postings=[
            ledger_pb2.Posting(
                account_name=posting.account_name,
                side=f"POSTING_SIDE_{posting.side.name}",
                amount=common_pb2.Money(currency_code=posting.currency_code, amount_minor=posting.amount_minor),
            )
            for posting in entry.postings
        ],
        occur_time=_timestamp(entry.occur_time_us),
        create_time=_timestamp(row.create_time_us),
    )


def _comparison(found: Comparison) -> ledger_pb2.CompareWalletResponse:
    return ledger_pb2.CompareWalletResponse(
        ok=found.ok,
        complete=not found.problem,
        problem=found.problem,
        account_count=found.account_count,
        difference_count=found.difference_count,
        differences=[
            ledger_pb2.AccountDifference(
                account_name=one.account_name,
                currency_code=one.currency_code,
                wallet_balance_minor=one.wallet_minor,
                ledger_balance_minor=one.ledger_minor,
                difference_minor=one.difference_minor,
            )
            for one in found.differences[:DIFFERENCES_TOLD_MAX]
        ],
        progress=[
            ledger_pb2.FeedProgress(
                process=one.process,
                applied_position=one.prefix,
                last_position=one.last,
                lacking_positions=one.lacking,
            )
            for one in found.progress
        ],
        under_way_count=found.under_way_count,
        under_way_age=Duration(
            seconds=int(found.under_way_age_s), nanos=int(found.under_way_age_s % 1 * 1_000_000_000)
        ),
        start_time=_timestamp(found.start_time_ns // 1000),
        end_time=_timestamp(found.end_time_ns // 1000),
    )


def _timestamp(us: int) -> Timestamp:
    return Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1000)


def _us_of(field: str, time: Timestamp) -> int:
    if not (_SECONDS_MIN <= time.seconds <= _SECONDS_MAX and 0 <= time.nanos < 1_000_000_000):
        violation = FieldViolation(field, "must be a time of the years 1 to 9999")
        raise InvalidArgument(f"{field} is not a time", violations=[violation])
    return time.seconds * 1_000_000 + time.nanos // 1000
