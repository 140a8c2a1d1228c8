"""The journal in PostgreSQL.

A batch is one statement, and so one round trip and one transaction: inbox, entries, postings and running sums, each as
a set. The triggers of migrations/0001_ledger.sql check it whole at its end. Locks are taken in one order (message ids
sorted, then accounts by name), so batches that overlap wait for each other and never deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from kernel.errors import ResourceExhausted
from ledger.domain import (
    AccountKind,
    Applied,
    CurrencySums,
    JournalEntry,
    LateEntry,
    Movement,
    Posting,
    Side,
    account_of_name,
)
from ledger.service import AccountRow, EntryRow, Received
from runtime.postgres import KeptConnections, Pool

__all__ = ["CONSUMER", "PostgresJournal"]

CONSUMER = "ledger"

# A known entry id with another digest takes the UPDATE branch, which the append-only trigger refuses: a contradiction
# is an error, a repetition is nothing.
_POST = """
WITH input AS (
    SELECT *
      FROM unnest($2::text[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::int2[], $8::bytea[], $9::int8[],
                  $17::int8[]) WITH ORDINALITY
           AS i (message_id, id, purpose, merchant_reference, description, posting_count, digest, occur_us, feed_position, place)
), message AS (
    INSERT INTO ledger.inbox (consumer, message_id) SELECT $1, message_id FROM input ORDER BY message_id
    ON CONFLICT DO NOTHING RETURNING message_id
), entry AS (
    INSERT INTO ledger.journal_entry AS known
           (id, purpose, merchant_reference, description, posting_count, content_digest, occur_time, feed_position)
    SELECT id, purpose, merchant_reference, description, posting_count, digest,
           timestamptz 'epoch' + occur_us * interval '1 microsecond', nullif(feed_position, 0)
      FROM input JOIN message USING (message_id) ORDER BY place
    ON CONFLICT (id) DO UPDATE SET content_digest = excluded.content_digest
     WHERE known.content_digest <> excluded.content_digest
    RETURNING id, position, occur_time
), written AS (
    SELECT entry.position, entry.occur_time, p.*
      FROM unnest($10::uuid[], $11::int2[], $12::text[], $13::int2[], $14::text[], $15::int2[], $16::int8[])
           AS p (id, line, account, kind, currency, side, amount_minor)
      JOIN entry USING (id)
), sums AS (
    INSERT INTO ledger.account AS a (name, kind, currency, debit_minor, credit_minor)
    SELECT account, kind, currency,
           coalesce(sum(amount_minor) FILTER (WHERE side = 1), 0),
           coalesce(sum(amount_minor) FILTER (WHERE side = 2), 0)
      FROM written GROUP BY account, kind, currency ORDER BY account
    ON CONFLICT (name) DO UPDATE SET debit_minor = a.debit_minor + excluded.debit_minor,
                                     credit_minor = a.credit_minor + excluded.credit_minor, update_time = now()
)
INSERT INTO ledger.posting (entry_position, line, account, currency, side, amount_minor, occur_time)
SELECT position, line, account, currency, side, amount_minor, occur_time FROM written
"""

_ACCOUNT = "SELECT name, kind, currency, debit_minor, credit_minor FROM ledger.account WHERE name = $1"
_ACCOUNTS = """
SELECT name, kind, currency, debit_minor, credit_minor FROM ledger.account
 WHERE starts_with(name, $1) AND name > $2 ORDER BY name LIMIT $3
"""

_ENTRIES = """
SELECT position, id, purpose, merchant_reference, description, occur_time, create_time FROM ledger.journal_entry
 WHERE position < $1 ORDER BY position DESC LIMIT $2
"""
_ENTRIES_OF_REFERENCE = """
SELECT position, id, purpose, merchant_reference, description, occur_time, create_time FROM ledger.journal_entry
 WHERE position < $1 AND merchant_reference = $3 ORDER BY position DESC LIMIT $2
"""
_ENTRIES_OF_ACCOUNT = """
SELECT position, id, purpose, merchant_reference, description, occur_time, create_time FROM ledger.journal_entry
 WHERE position < $1 AND ($3 = '' OR merchant_reference = $3)
   AND position IN (SELECT entry_position FROM ledger.posting WHERE account = $4)
 ORDER BY position DESC LIMIT $2
"""
_POSTINGS = """
SELECT entry_position, account, side, currency, amount_minor FROM ledger.posting WHERE entry_position = ANY($1::int8[])
 ORDER BY entry_position, line
"""

_SUMS = """
SELECT true AS of_postings, currency, coalesce(sum(amount_minor) FILTER (WHERE side = 1), 0) AS debit,
       coalesce(sum(amount_minor) FILTER (WHERE side = 2), 0) AS credit
  FROM ledger.posting GROUP BY currency
UNION ALL
SELECT false, currency, sum(debit_minor), sum(credit_minor) FROM ledger.account GROUP BY currency
"""

# The opening sums ride on every line, so that both come from one snapshot; a period without lines still has its one
# row.
_MOVEMENTS = """
WITH opening AS (
    SELECT coalesce(sum(amount_minor) FILTER (WHERE side = 1), 0) AS debit,
           coalesce(sum(amount_minor) FILTER (WHERE side = 2), 0) AS credit
      FROM ledger.posting WHERE account = $1 AND occur_time < $2
)
SELECT opening.debit, opening.credit, line.* FROM opening LEFT JOIN (
    SELECT e.id, e.merchant_reference, e.description, p.side, p.amount_minor, p.occur_time, p.entry_position, p.line
      FROM ledger.posting AS p JOIN ledger.journal_entry AS e ON e.position = p.entry_position
     WHERE p.account = $1
       AND ($2::timestamptz IS NULL OR p.occur_time >= $2) AND ($3::timestamptz IS NULL OR p.occur_time < $3)
     ORDER BY p.occur_time, p.entry_position, p.line LIMIT $4
) AS line ON true
 ORDER BY line.occur_time, line.entry_position, line.line
"""

# Both in one statement, so of one snapshot: what accounts hold, and the postings of entries whose events are not applied elsewhere.
_NAMES = """
SELECT name FROM ledger.account
 WHERE name COLLATE "C" > $1 AND name COLLATE "C" >= $2 AND starts_with(name, $2) ORDER BY name COLLATE "C" LIMIT $3
"""
_BALANCES = """
WITH late AS (
    SELECT e.position, e.feed_position, extract(epoch FROM now() - e.create_time)::float8 AS age_s
      FROM unnest($2::int8[], $3::int8[]) AS gap (first, last)
      JOIN ledger.journal_entry AS e ON e.feed_position BETWEEN gap.first AND gap.last
     WHERE e.feed_position IS NOT NULL AND e.create_time > now() - $4::interval
     LIMIT $5
)
SELECT NULL::int8 AS position, NULL::int8 AS feed_position, NULL::float8 AS age_s, name,
       credit_minor - debit_minor AS minor
  FROM ledger.account WHERE name = ANY($1::text[])
UNION ALL
SELECT late.position, late.feed_position, late.age_s, p.account, CASE p.side WHEN 2 THEN p.amount_minor ELSE -p.amount_minor END
  FROM late JOIN ledger.posting AS p ON p.entry_position = late.position
"""
LATE_ENTRY_COUNT_MAX = 20_000
LATE_AGE_MAX = timedelta(hours=1)
"""An entry is as old as the ledger's part in it; one that the wallet has not applied after so long is no longer under way."""
_POSITION_MAX = 2**63 - 1

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class PostgresJournal:
    """ledger.service.Journal and Books over the schema `ledger`."""

    def __init__(self, pool: Pool | KeptConnections) -> None:
        self._pool = pool

    async def post(self, received: Sequence[Received]) -> None:
        lines = [
            (each.entry.journal_entry_id, number, posting.account_name, account_of_name(posting.account_name)[0].value,
             posting.currency_code, posting.side.value, posting.amount_minor)
            for each in received
            for number, posting in enumerate(each.entry.postings, 1)
        ]  # fmt: skip
        await self._pool.execute(
            _POST,
            CONSUMER,
            [each.message_id for each in received],
            [each.entry.journal_entry_id for each in received],
            [each.entry.purpose for each in received],
            [each.entry.merchant_reference for each in received],
            [each.entry.description for each in received],
            [len(each.entry.postings) for each in received],
            [each.entry.content_digest() for each in received],
            [each.entry.occur_time_us for each in received],
            *zip(*lines, strict=True),
            [each.feed_position for each in received],
        )

    async def account(self, name: str) -> AccountRow | None:
        row = await self._pool.fetchrow(_ACCOUNT, name)
        return None if row is None else _account_row(row)

    async def accounts(self, name_prefix: str, after_name: str, limit: int) -> list[AccountRow]:
        return [_account_row(row) for row in await self._pool.fetch(_ACCOUNTS, name_prefix, after_name, limit)]

    async def entries(
        self, merchant_reference: str, account_name: str, before_position: int, limit: int
    ) -> list[EntryRow]:
        if account_name:
            rows = await self._pool.fetch(_ENTRIES_OF_ACCOUNT, before_position, limit, merchant_reference, account_name)
        elif merchant_reference:
            rows = await self._pool.fetch(_ENTRIES_OF_REFERENCE, before_position, limit, merchant_reference)
        else:
            rows = await self._pool.fetch(_ENTRIES, before_position, limit)
        postings: dict[int, list[Posting]] = {row["position"]: [] for row in rows}
        for row in await self._pool.fetch(_POSTINGS, list(postings)):
            posting = Posting(row["account"], Side(row["side"]), row["currency"], row["amount_minor"])
            postings[row["entry_position"]].append(posting)
        # Built through JournalEntry: an entry that is not balanced cannot be read either.
        return [_entry_row(row, postings[row["position"]]) for row in rows]

    async def sums(self) -> tuple[list[CurrencySums], list[CurrencySums]]:
        from_postings: list[CurrencySums] = []
        from_accounts: list[CurrencySums] = []
        for row in await self._pool.fetch(_SUMS):
            sums = CurrencySums(row["currency"], int(row["debit"]), int(row["credit"]))
            (from_postings if row["of_postings"] else from_accounts).append(sums)
        return from_postings, from_accounts

    async def movements(
        self, account_name: str, start_us: int | None, end_us: int | None, limit: int
    ) -> tuple[int, int, list[Movement]]:
        rows = await self._pool.fetch(_MOVEMENTS, account_name, _time_of(start_us), _time_of(end_us), limit)
        movements = [
            Movement(
                journal_entry_id=str(row["id"]),
                merchant_reference=row["merchant_reference"],
                description=row["description"],
                side=Side(row["side"]),
                amount_minor=row["amount_minor"],
                occur_time_us=_us_of(row["occur_time"]),
            )
            for row in rows
            if row["id"] is not None
        ]
        return int(rows[0]["debit"]), int(rows[0]["credit"]), movements

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        """Names of accounts by code point, as ledger.service.Books says."""
        return [row[0] for row in await self._pool.fetch(_NAMES, after, prefix, limit)]

    async def balances(self, names: Sequence[str], applied: Applied) -> tuple[dict[str, int], list[LateEntry]]:
        """What accounts hold, and the entries whose events are not in ``applied``, as ledger.service.Books says. Raises
        ResourceExhausted.
        """
        gaps = [*applied.gaps(), (applied.last + 1, _POSITION_MAX)]
        firsts, lasts = zip(*gaps, strict=True)
        rows = await self._pool.fetch(_BALANCES, names, firsts, lasts, LATE_AGE_MAX, LATE_ENTRY_COUNT_MAX + 1)
        balances: dict[str, int] = {}
        late: dict[int, list[Any]] = {}
        for row in rows:
            if row["position"] is None:
                balances[row["name"]] = row["minor"]
            else:
                late.setdefault(row["position"], []).append(row)
        if len(late) > LATE_ENTRY_COUNT_MAX:
            raise ResourceExhausted(
                f"no verdict: the wallet has not applied more than {LATE_ENTRY_COUNT_MAX} events that the ledger has; it catches up",
                metadata={"limit": "LATE_ENTRY_COUNT_MAX"},
            )
        return balances, [
            LateEntry(of[0]["feed_position"], of[0]["age_s"], tuple((row["name"], row["minor"]) for row in of))
            for of in late.values()
        ]


def _account_row(row: Any) -> AccountRow:
    return AccountRow(row["name"], AccountKind(row["kind"]), row["currency"], row["debit_minor"], row["credit_minor"])


def _entry_row(row: Any, postings: list[Posting]) -> EntryRow:
    entry = JournalEntry(
        journal_entry_id=str(row["id"]),
        purpose=row["purpose"],
        merchant_reference=row["merchant_reference"],
        description=row["description"],
        occur_time_us=_us_of(row["occur_time"]),
        postings=tuple(postings),
    )
    return EntryRow(row["position"], entry, _us_of(row["create_time"]))


def _us_of(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def _time_of(us: int | None) -> datetime | None:
    return None if us is None else _EPOCH + us * _MICROSECOND
