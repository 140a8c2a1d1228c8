"""Opening and updating accounts: every result, and what an update may not do."""

from __future__ import annotations

import time

import pytest

from tests.unit.wallet_core.engine.harness import NOW, AccountRow, Pair, account_id, transfer_id
from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import AccountResult, TransferFlags
from wallet_core.engine.twin import Row, Twin

R = AccountResult
A, B, C = map(account_id, range(3))

OPENING: list[tuple[AccountResult, AccountRow]] = [
    (R.OK, AccountRow(A)),
    (R.OK, AccountRow(A, flags=4 | 8)),
    (R.OK, AccountRow(A, flags=1, overdraft_limit=7, balance_limit=9)),
    (R.ID_INVALID, AccountRow(bytes(16))),
    (R.ID_INVALID, AccountRow(b"\xff" * 16)),
    (R.ID_INVALID, AccountRow(b"in-flight:anybod")),
    (R.CURRENCY_INVALID, AccountRow(A, b"usd\0")),
    (R.CURRENCY_INVALID, AccountRow(A, b"USDX")),
    (R.CURRENCY_INVALID, AccountRow(A, b"US\0\0")),
    (R.FLAGS_INVALID, AccountRow(A, flags=2)),
    (R.FLAGS_INVALID, AccountRow(A, flags=8)),
    (R.FLAGS_INVALID, AccountRow(A, flags=16)),
    (R.FLAGS_INVALID, AccountRow(A, flags=0x8000)),
    (R.LIMIT_INVALID, AccountRow(A, overdraft_limit=-1)),
    (R.LIMIT_INVALID, AccountRow(A, balance_limit=-1)),
    (R.LIMIT_INVALID, AccountRow(A, flags=12, balance_limit=1)),
]


@pytest.mark.parametrize(("expected", "row"), OPENING)
def test_opening(expected: AccountResult, row: AccountRow) -> None:
    pair = Pair()
    assert pair.open([row]) == [expected]
    assert pair.engine.status().account_count == (expected == R.OK)
    pair.check_agreement()
    pair.check_replay()


def test_opening_again_is_harmless_with_the_same_content_only() -> None:
    pair = Pair()
    assert pair.open([AccountRow(A), AccountRow(A), AccountRow(A, flags=1), AccountRow(A, b"JPY\0")]) == [1, 1, 3, 3]
    assert pair.engine.status().sequence == 1
    assert pair.engine.status().repeated_count == 1


def test_too_many_accounts_is_an_answer_not_a_crash() -> None:
    pair = Pair(parameters={"accounts_max": 2})
    assert pair.open([AccountRow(A), AccountRow(B), AccountRow(C), AccountRow(A)]) == [1, 1, R.TOO_MANY_ACCOUNTS, 1]
    # the in-flight account that a send would need has no room either
    assert pair.transfer(Row(transfer_id(1), A, B, 1, credit_shard=1)) == 24
    pair = Pair(parameters={"accounts_max": 1})
    pair.open([AccountRow(A, flags=4)])
    assert pair.transfer(Row(transfer_id(1), A, B, 1, credit_shard=1)) == 32


def test_updating() -> None:
    pair = Pair()
    pair.open([AccountRow(A, flags=4), AccountRow(B), AccountRow(C, flags=12)])
    assert pair.update([AccountRow(B, flags=1, balance_limit=5)]) == [R.OK]
    assert pair.engine.account(B)[6:] == (0, 5, 1)  # type: ignore[index]
    sequence = pair.engine.status().sequence
    assert pair.update([AccountRow(B, flags=1, balance_limit=5)]) == [R.OK]
    assert pair.engine.status().sequence == sequence, "nothing changed, so nothing is logged"
    assert pair.update([AccountRow(account_id(9)), AccountRow(bytes(16))]) == [R.NOT_FOUND, R.ID_INVALID]
    assert pair.update([AccountRow(B, flags=12), AccountRow(C, flags=4)]) == [R.FLAGS_INVALID] * 2
    assert pair.update([AccountRow(B, overdraft_limit=-1)]) == [R.LIMIT_INVALID]
    pair.check_replay()


def test_closing_needs_an_empty_account() -> None:
    pair = Pair()
    pair.open([AccountRow(A, flags=4), AccountRow(B)])
    assert pair.transfer(Row(transfer_id(1), A, B, 5, TransferFlags.HOLD)) == 1
    assert pair.update([AccountRow(B, flags=2), AccountRow(A, flags=6)]) == [R.BALANCE_NOT_ZERO] * 2
    assert pair.transfer(Row(transfer_id(2), bytes(16), bytes(16), 0, TransferFlags.POST, transfer_id(1))) == 1
    assert pair.update([AccountRow(B, flags=2)]) == [R.BALANCE_NOT_ZERO]
    assert pair.transfer(Row(transfer_id(3), B, A, 5)) == 1
    assert pair.update([AccountRow(B, flags=2), AccountRow(A, flags=6)]) == [R.OK, R.OK]
    assert pair.update([AccountRow(B)]) == [R.OK], "an operator may open it again"
    pair.check_replay()


@pytest.mark.parametrize("make", [Engine, Twin])
def test_a_column_of_the_wrong_length_is_named(make: type[Engine] | type[Twin]) -> None:
    engine = make()
    for name, value in (("flags", b"\0"), ("overdraft_limits", bytes(9)), ("balance_limits", bytes(7))):
        with pytest.raises(ValueError, match=name):
            engine.open_accounts(A, b"USD\0", NOW, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=name):
            engine.update_accounts(A, NOW, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="currencies"):
        engine.open_accounts(A, b"USD", NOW)
    with pytest.raises(ValueError, match="ids"):
        engine.open_accounts(A[:-1], b"USD\0", NOW)


def test_many_accounts_grow_the_index_without_losing_one() -> None:
    """Several doublings, with lookups while the index moves."""
    engine = Engine()
    ids = [((i * 0x9E3779B97F4A7C15) % (1 << 64)).to_bytes(8, "big") * 2 for i in range(1, 60_001)]
    for start in range(0, len(ids), 500):
        part = ids[start : start + 500]
        results, _ = engine.open_accounts(b"".join(part), b"USD\0" * len(part), NOW)
        assert set(results) == {1}
        for known in ids[max(0, start - 1000) : start : 97] + part[::50]:
            assert engine.account(known) is not None
    assert [engine.account(id_).ordinal for id_ in ids[::7]] == list(range(0, 60_000, 7))  # type: ignore[union-attr]
    assert engine.account(b"x" * 16) is None
    assert engine.verify_digest()
    assert engine.status().memory_bytes - Engine().status().memory_bytes <= 128 * len(ids)


def test_ids_made_to_collide_cost_no_more_than_others() -> None:
    """Whoever chooses ids could let them all fall into one place of the index: 2**14 of these took 100 times as long."""
    count = 1 << 14
    golden = (0x9E3779B97F4A7C15).to_bytes(8, "little")  # what the hash multiplies with: the product was 0
    chosen = b"".join(golden + n.to_bytes(8, "little") for n in range(1, count + 1))
    usual = b"".join(map(account_id, range(count)))

    def seconds(ids: bytes) -> float:
        engine = Engine(0)
        begin = time.thread_time()
        results, _ = engine.open_accounts(ids, b"USD\0" * count, NOW)
        assert set(results) == {R.OK}
        return time.thread_time() - begin

    assert min(seconds(chosen) for _ in range(3)) < 10 * min(seconds(usual) for _ in range(3)) + 0.01


def test_growing_waits_for_the_table_that_another_thread_makes_but_not_for_ever() -> None:
    """The writer would find 16 MiB of fresh pages in one batch; every account is found at every load."""
    alone, prepared = Engine(generation_ids=1 << 10), Engine(generation_ids=1 << 10)
    prepared.prepare_memory()
    table = 4 << 16  # 65,536 slots: 0.6 full with 39,321 accounts, 0.75 with 49,152; the next one has twice as many
    begun = [engine.status().memory_bytes for engine in (alone, prepared)]
    opened, lag = 0, []
    for count in (39_000, 45_000, 49_000, 60_000):
        ids = b"".join(account_id(n) for n in range(opened, count))
        for engine in (alone, prepared):
            assert set(engine.open_accounts(ids, b"USD\0" * (count - opened), NOW)[0]) == {R.OK}
        grown = [engine.status().memory_bytes - was for engine, was in zip((alone, prepared), begun, strict=True)]
        lag.append((grown[0] - grown[1]) // table)
        opened = count
        for number in range(0, count, 7):
            view = prepared.account(account_id(number))
            assert view is not None
            assert view.ordinal == number
        assert prepared.account(account_id(count)) is None
    assert lag == [0, 1, 1, 0]
    assert alone.state_digest() == prepared.state_digest()
    while prepared.memory_wanted():
        prepared.prepare_memory()
