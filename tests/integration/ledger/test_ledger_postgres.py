"""Risk: an entry half written, written twice, changed later; sums that drift; a batch that blocks the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import asyncpg
import pytest

from kernel.errors import InvalidArgument, NotFound, ResourceExhausted
from ledger.adapters import postgres
from ledger.adapters.postgres import PostgresJournal
from ledger.domain import Applied, CurrencySums, EntryInvalid, Fact, FactKind, JournalEntry, Posting, Side
from ledger.service import EntryContradicted, PostFacts, ReadLedger, Received, read_ledger
from runtime.postgres import Pool, create_pool

OCCUR_US = 1_753_056_000_123_456


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    opened = await create_pool(postgres_dsn, "ledger", max_size=4)
    yield opened
    await opened.close()


@pytest.fixture
def journal(pool: Pool) -> PostgresJournal:
    return PostgresJournal(pool)


@pytest.fixture
def post(journal: PostgresJournal) -> PostFacts:
    return PostFacts(journal)


@pytest.fixture
def read(journal: PostgresJournal) -> ReadLedger:
    return ReadLedger(journal)


def fact(
    reference: str,
    kind: FactKind = FactKind.CAPTURE,
    *,
    amount_minor: int = 7500,
    seller: str = "S1",
    currency_code: str = "USD",
    occur_us: int = OCCUR_US,
    message_id: str = "",
) -> tuple[str, Fact]:
    one = Fact(kind, reference, seller, "sandbox", currency_code, amount_minor, occur_us)
    return message_id or f"{kind.name}-{reference}", one


async def counts(pool: Pool) -> tuple[int, int, int, int]:
    tables = ("journal_entry", "posting", "account", "inbox")
    return tuple([await pool.fetchval(f"SELECT count(*) FROM ledger.{table}") for table in tables])  # type: ignore[return-value]


async def test_a_batch_is_written_whole(post: PostFacts, read: ReadLedger, pool: Pool) -> None:
    await post.handle(
        [
            fact("A", amount_minor=7500),
            fact("B", amount_minor=2500, seller="S2"),
            fact("P", FactKind.PAYOUT_COMPLETED, amount_minor=3000),
            fact("C", currency_code="JPY", amount_minor=10),
            fact("R", FactKind.REFUND_FAILED),
        ]
    )
    assert await counts(pool) == (4, 8, 6, 4)
    seller = await read.account("seller/S1/USD")
    assert (seller.debit_minor, seller.credit_minor) == (3000, 7500)
    clearing = await read.account("psp/sandbox/clearing/USD")
    assert (clearing.debit_minor, clearing.credit_minor) == (10000, 0)
    balance = await read.trial_balance()
    assert balance.balanced
    assert balance.lines == (CurrencySums("JPY", 10, 10), CurrencySums("USD", 13000, 13000))
    with pytest.raises(NotFound):
        await read.account("seller/nobody/USD")


async def test_a_replay_from_zero_changes_nothing(post: PostFacts, pool: Pool) -> None:
    facts = [fact(f"ORD-{number}", amount_minor=number + 1) for number in range(20)]
    await post.handle(facts)
    before = await counts(pool), await pool.fetch("SELECT * FROM ledger.account ORDER BY name")
    await post.handle(facts)
    random.Random(7).shuffle(facts)
    for each in facts:
        await post.handle([each])
    assert (await counts(pool), await pool.fetch("SELECT * FROM ledger.account ORDER BY name")) == before
    # The inbox is pruned after its retention; the entries' own ids hold forever.
    await pool.execute("DELETE FROM ledger.inbox")
    await post.handle(facts)
    after = await counts(pool), await pool.fetch("SELECT * FROM ledger.account ORDER BY name")
    assert after == before


async def test_the_same_fact_twice_in_one_batch_counts_once(post: PostFacts, read: ReadLedger) -> None:
    await post.handle([fact("A"), fact("A"), fact("A", message_id="another message")])
    assert (await read.account("seller/S1/USD")).credit_minor == 7500


async def test_a_contradiction_is_an_error_and_changes_nothing(post: PostFacts, pool: Pool) -> None:
    with pytest.raises(EntryContradicted, match="A"):
        await post.handle([fact("A"), fact("A", amount_minor=1, message_id="another message")])
    assert await counts(pool) == (0, 0, 0, 0)
    await post.handle([fact("A")])
    before = await counts(pool)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
        await post.handle([fact("B"), fact("A", amount_minor=1, message_id="another message")])
    assert await counts(pool) == before


async def test_overflow_leaves_nothing_behind(post: PostFacts, read: ReadLedger, pool: Pool) -> None:
    await post.handle([fact("A", amount_minor=2**63 - 2)])
    before = await counts(pool)
    with pytest.raises(asyncpg.NumericValueOutOfRangeError):
        await post.handle([fact("B", amount_minor=1, seller="S2"), fact("C", amount_minor=1)])
    assert await counts(pool) == before
    await post.handle([fact("B", amount_minor=1, seller="S2")])
    assert (await read.account("psp/sandbox/clearing/USD")).debit_minor == 2**63 - 1
    assert (await read.trial_balance()).balanced


async def test_a_malformed_fact_takes_nothing_with_it(post: PostFacts, pool: Pool) -> None:
    with pytest.raises(EntryInvalid):
        await post.handle([fact("A"), fact("B", amount_minor=0)])
    assert await counts(pool) == (0, 0, 0, 0)


async def test_overlapping_batches_at_once_neither_deadlock_nor_double(post: PostFacts, read: ReadLedger) -> None:
    facts = [fact(f"ORD-{number}", amount_minor=1, seller=f"S{number % 7}") for number in range(120)]
    shuffler = random.Random(11)

    async def one_consumer() -> None:
        mine = facts[:]
        shuffler.shuffle(mine)
        for start in range(0, len(mine), 30):
            await post.handle(mine[start : start + 30])

    await asyncio.gather(*(one_consumer() for _ in range(4)))
    assert (await read.account("psp/sandbox/clearing/USD")).debit_minor == 120
    assert (await read.trial_balance()).lines == (CurrencySums("USD", 120, 120),)


ENTRY = (
    "INSERT INTO ledger.journal_entry (id, purpose, merchant_reference, description, posting_count, content_digest,"
    " occur_time) VALUES (gen_random_uuid(), 'x', 'x', 'x', {count}, '\\x00112233445566778899aabbccddeeff', now())"
    " RETURNING position"
)
POSTINGS = (
    "INSERT INTO ledger.posting (entry_position, line, account, currency, side, amount_minor, occur_time)"
    " SELECT position, p.line, p.account, 'USD', p.side, p.amount, now() FROM e, (VALUES {rows})"
    " AS p (line, account, side, amount)"
)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (ENTRY.format(count=2), "does not have its 2 postings"),
        (ENTRY.format(count=1), "posting_count"),
        (
            f"WITH e AS ({ENTRY.format(count=2)}) "
            + POSTINGS.format(rows="(1, 'psp/sandbox/clearing/USD', 1, 100), (2, 'seller/S1/USD', 2, 99)"),
            "debits − credits = 1 USD",
        ),
        (
            f"WITH e AS ({ENTRY.format(count=3)}) "
            + POSTINGS.format(rows="(1, 'psp/sandbox/clearing/USD', 1, 100), (2, 'seller/S1/USD', 2, 100)"),
            "postings",
        ),
        (
            f"WITH e AS ({ENTRY.format(count=2)}) "
            + POSTINGS.format(rows="(1, 'psp/sandbox/clearing/USD', 1, 100), (2, 'seller/nobody/USD', 2, 100)"),
            "seller/nobody/USD: unknown",
        ),
        (
            f"WITH e AS ({ENTRY.format(count=2)}) "
            + POSTINGS.format(rows="(1, 'psp/sandbox/clearing/USD', 1, -5), (2, 'seller/S1/USD', 2, -5)"),
            "amount_minor",
        ),
        (
            "WITH e AS (SELECT 987654 AS position) "
            + POSTINGS.format(rows="(1, 'psp/sandbox/clearing/USD', 1, 5), (2, 'seller/S1/USD', 2, 5)"),
            "written whole",
        ),
        (
            "WITH e AS (SELECT min(position) AS position FROM ledger.journal_entry) "
            + POSTINGS.format(rows="(3, 'psp/sandbox/clearing/USD', 1, 5), (4, 'seller/S1/USD', 2, 5)"),
            "written whole",
        ),
        ("UPDATE ledger.posting SET amount_minor = 1", "append-only"),
        ("DELETE FROM ledger.posting", "append-only"),
        ("UPDATE ledger.journal_entry SET description = 'other'", "append-only"),
        ("DELETE FROM ledger.journal_entry", "append-only"),
        ("TRUNCATE ledger.posting", "append-only"),
        ("TRUNCATE ledger.journal_entry", "append-only"),
        ("UPDATE ledger.account SET debit_minor = -1", "debit_minor"),
    ],
)
async def test_the_database_itself_refuses(post: PostFacts, pool: Pool, statement: str, message: str) -> None:
    """Whoever writes past the service meets the same rules."""
    await post.handle([fact("A")])
    before = await counts(pool)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match=message):
        await pool.execute(statement)
    assert await counts(pool) == before


async def test_an_entry_built_by_hand_with_three_postings(journal: PostgresJournal, read: ReadLedger) -> None:
    entry = JournalEntry(
        "6f1e2c64-0e0b-5a62-8a3f-0e5b5e0f7a11",
        "capture",
        "ORD-F",
        "with a fee",
        OCCUR_US,
        (
            Posting("psp/sandbox/clearing/USD", Side.DEBIT, "USD", 97),
            Posting("psp/sandbox/fees/USD", Side.DEBIT, "USD", 3),
            Posting("seller/S1/USD", Side.CREDIT, "USD", 100),
        ),
    )
    await journal.post([Received("m", entry)])
    rows, _ = await read.entries("ORD-F", "", 0, "")
    assert [row.entry for row in rows] == [entry]
    assert rows[0].entry.occur_time_us == OCCUR_US


async def test_entries_newest_first_by_pages_and_filters(post: PostFacts, read: ReadLedger) -> None:
    await post.handle([fact(f"ORD-{number}", seller=f"S{number % 2}") for number in range(7)])
    await post.handle([fact("ORD-3", FactKind.REFUND_COMPLETED, seller="S1")])
    seen: list[tuple[str, str]] = []
    token = ""
    for _ in range(10):
        rows, token = await read.entries("", "", 3, token)
        seen += [(row.entry.purpose, row.entry.merchant_reference) for row in rows]
        if not token:
            break
    assert seen == [("refund", "ORD-3"), *(("capture", f"ORD-{number}") for number in reversed(range(7)))]

    rows, _ = await read.entries("ORD-3", "", 0, "")
    assert [row.entry.purpose for row in rows] == ["refund", "capture"]
    rows, _ = await read.entries("", "seller/S1/USD", 0, "")
    assert [row.entry.merchant_reference for row in rows] == ["ORD-3", "ORD-5", "ORD-3", "ORD-1"]
    rows, _ = await read.entries("ORD-3", "seller/S0/USD", 0, "")
    assert rows == []

    _, token = await read.entries("", "", 3, "")
    for filters in (("ORD-3", ""), ("", "seller/S1/USD")):
        with pytest.raises(InvalidArgument) as caught:
            await read.entries(*filters, 3, token)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


async def test_accounts_by_prefix_and_page(post: PostFacts, read: ReadLedger) -> None:
    await post.handle([fact(f"ORD-{number}", seller=f"S{number}_%") for number in range(5)])
    first, token = await read.accounts("seller/", 2, "")
    second, token = await read.accounts("seller/", 2, token)
    third, token = await read.accounts("seller/", 2, token)
    assert [row.name for row in (*first, *second, *third)] == [f"seller/S{number}_%/USD" for number in range(5)]
    assert token == ""
    assert (await read.accounts("seller/S%", 0, "")) == ([], "")


async def test_statement_over_a_period(post: PostFacts, read: ReadLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    await post.handle(
        [
            fact("A", amount_minor=100, occur_us=1_000_000),
            fact("B", amount_minor=50, occur_us=3_000_000),
            fact("P", FactKind.PAYOUT_COMPLETED, amount_minor=30, occur_us=2_000_000),
            fact("X", amount_minor=999, seller="S2", occur_us=2_000_000),
        ]
    )
    whole = await read.statement("seller/S1/USD", None, None)
    assert [(line.movement.merchant_reference, line.balance_minor) for line in whole.lines] == [
        ("A", 100),
        ("P", 70),
        ("B", 120),
    ]
    assert (whole.opening_balance_minor, whole.closing_balance_minor) == (0, 120)

    part = await read.statement("seller/S1/USD", 2_000_000, 3_000_000)
    assert [line.movement.merchant_reference for line in part.lines] == ["P"]
    assert (part.opening_balance_minor, part.closing_balance_minor) == (100, 70)

    later = await read.statement("seller/S1/USD", 9_000_000, None)
    assert (later.opening_balance_minor, later.closing_balance_minor, later.lines) == (120, 120, ())

    with pytest.raises(InvalidArgument):
        await read.statement("seller/S1/USD", 2, 1)
    with pytest.raises(NotFound):
        await read.statement("seller/nobody/USD", None, None)
    monkeypatch.setattr(read_ledger, "STATEMENT_LINE_COUNT_MAX", 2)
    with pytest.raises(ResourceExhausted, match="more than 2 lines"):
        await read.statement("seller/S1/USD", None, None)


async def test_the_trial_balance_sees_damage_below_it(post: PostFacts, read: ReadLedger, pool: Pool) -> None:
    await post.handle([fact("A")])
    assert (await read.trial_balance()).balanced
    await pool.execute("UPDATE ledger.account SET credit_minor = credit_minor + 1 WHERE name = 'seller/S1/USD'")
    assert not (await read.trial_balance()).balanced
    await pool.execute("UPDATE ledger.account SET credit_minor = credit_minor - 1 WHERE name = 'seller/S1/USD'")
    await pool.execute("ALTER TABLE ledger.posting DISABLE TRIGGER ALL")
    await pool.execute("UPDATE ledger.posting SET amount_minor = amount_minor + 1 WHERE side = 1")
    assert not (await read.trial_balance()).balanced


async def test_position_and_time_survive_the_way_through_the_database(
    post: PostFacts, journal: PostgresJournal
) -> None:
    await post.handle([fact("A"), fact("B")])
    rows = await journal.entries("", "", 2**63 - 1, 10)
    assert [row.entry.merchant_reference for row in rows] == ["B", "A"]
    assert rows[0].position > rows[1].position
    assert {row.entry.occur_time_us for row in rows} == {OCCUR_US}
    assert abs(rows[0].create_time_us - rows[1].create_time_us) == 0


# --- as the comparison with the wallet needs it (ledger/domain/comparison.py)


async def positioned(post: PostFacts, *references: tuple[str, int], seller: str = "S1") -> None:
    await post.handle(
        [fact(reference, seller=seller) for reference, _ in references],
        {f"CAPTURE-{reference}": position for reference, position in references},
    )


async def test_entries_beyond_what_is_applied_elsewhere_come_with_the_balances(
    post: PostFacts, journal: PostgresJournal
) -> None:
    await post.handle([fact("OLD")])  # from a version without positions
    await positioned(post, ("A", 1), ("B", 2), ("C", 5))
    await positioned(post, ("D", 3), ("E", 9), seller="S2")
    names = ["seller/S1/USD", "psp/sandbox/clearing/USD", "seller/nobody/USD"]
    balances, late = await journal.balances(names, Applied(((1, 1), (3, 3), (5, 5))))
    assert balances == {"seller/S1/USD": 4 * 7500, "psp/sandbox/clearing/USD": -6 * 7500}
    assert {entry.position: dict(entry.postings) for entry in late} == {
        2: {"psp/sandbox/clearing/USD": -7500, "seller/S1/USD": 7500},
        9: {"psp/sandbox/clearing/USD": -7500, "seller/S2/USD": 7500},
    }
    assert {entry.owner for entry in late} == {"seller/S1/USD", "seller/S2/USD"}
    assert all(0 <= entry.age_s < 60 for entry in late)
    assert (await journal.balances(names, Applied(((1, 9),))))[1] == []
    assert len((await journal.balances(names, Applied()))[1]) == 5


async def test_an_entry_keeps_the_position_that_it_was_written_with(post: PostFacts, journal: PostgresJournal) -> None:
    await positioned(post, ("A", 7))
    await post.handle(
        [fact("A", message_id="the same fact in another message")], {"the same fact in another message": 8}
    )
    assert [entry.position for entry in (await journal.balances([], Applied()))[1]] == [7]


async def test_too_many_entries_beyond_it_are_an_error_not_a_burden(
    post: PostFacts, journal: PostgresJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LATE_ENTRY_COUNT_MAX", 2)
    await positioned(post, ("A", 1), ("B", 2))
    assert len((await journal.balances([], Applied()))[1]) == 2
    await positioned(post, ("C", 3))
    with pytest.raises(ResourceExhausted, match="more than 2 events"):
        await journal.balances([], Applied())
    assert len((await journal.balances([], Applied(((1, 1),))))[1]) == 2


async def test_names_come_by_code_point_as_the_wallet_has_them(post: PostFacts, journal: PostgresJournal) -> None:
    sellers = ["a", "B", "é", "Z", "_", "10", "9"]
    await post.handle([fact(f"ORD-{number}", seller=seller) for number, seller in enumerate(sellers)])
    wanted = sorted(f"seller/{seller}/USD" for seller in sellers)
    assert await journal.names("seller/", "", 100) == wanted
    assert await journal.names("seller/", wanted[1], 3) == wanted[2:5]
    assert await journal.names("seller/B", "", 100) == ["seller/B/USD"]
    assert await journal.names("", "", 1) == ["psp/sandbox/clearing/USD"]


async def test_the_look_at_a_page_stays_on_its_indexes(post: PostFacts, journal: PostgresJournal, pool: Pool) -> None:
    await pool.execute("SET enable_seqscan = off")
    plan = await pool.fetch(
        "EXPLAIN " + postgres._BALANCES, ["seller/S1/USD"], [11], [2**62], postgres.LATE_AGE_MAX, 100
    )
    text = "\n".join(row[0] for row in plan)
    assert "journal_entry_feed_position" in text
    assert "Seq Scan" not in text
    plan = await pool.fetch("EXPLAIN " + postgres._NAMES, "seller/S1", "seller/", 100)
    assert "account_name_by_code_point" in "\n".join(row[0] for row in plan)
