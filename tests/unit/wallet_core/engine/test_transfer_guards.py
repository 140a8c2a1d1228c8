"""Every transfer result, and that the first guard in the documented order wins. Engine and twin answer alike (harness)."""

from __future__ import annotations

import struct

import pytest

from tests.unit.wallet_core.engine.harness import MS, NOW, AccountRow, Pair, account_id, transfer_id
from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import AMOUNT_MAX, TransferFlags, TransferResult, in_flight_account_id
from wallet_core.engine.twin import Row, Twin

F, R = TransferFlags, TransferResult
BANK, ANN, BOB, YEN, FROZEN, CLOSED, CAPPED, NOBODY, HOUSE = map(account_id, range(9))
DAY_MS = 86_400_000


@pytest.fixture
def pair() -> Pair:
    pair = Pair(parameters={"holds_max": 3, "unsettled_max": 2})
    opened = pair.open(
        [
            AccountRow(BANK, flags=4),
            AccountRow(ANN, overdraft_limit=5),
            AccountRow(BOB),
            AccountRow(YEN, b"JPY\0"),
            AccountRow(FROZEN, flags=1),
            AccountRow(CLOSED),
            AccountRow(CAPPED, balance_limit=50),
            AccountRow(HOUSE, flags=4),
        ]
    )
    assert opened == [1] * 8
    assert pair.update([AccountRow(CLOSED, flags=2)]) == [1]
    assert pair.transfer(Row(transfer_id(1), BANK, ANN, 100)) == R.OK
    return pair


def plain(debit: bytes = ANN, credit: bytes = BOB, amount: int = 10, **rest: int | bytes) -> Row:
    return Row(transfer_id(1000), debit, credit, amount, **rest)  # type: ignore[arg-type]


def at(ms: int) -> bytes:
    return transfer_id(1000, NOW // MS + ms)


CASES: list[tuple[TransferResult, Row]] = [
    (R.OK, plain()),
    (R.OK, plain(amount=105)),
    (R.ID_INVALID, Row(bytes(16), ANN, BOB, 10)),
    (R.ID_INVALID, Row(b"\xff" * 16, ANN, BOB, 10)),
    (R.ID_INVALID, Row(at(0)[:6] + b"\x40" + at(0)[7:], ANN, BOB, 10)),
    (R.ID_INVALID, Row(at(0)[:8] + b"\xc0" + at(0)[9:], ANN, BOB, 10)),
    (R.ID_TOO_OLD, Row(at(-7 * DAY_MS), ANN, BOB, 10)),
    (R.OK, Row(at(-7 * DAY_MS + 1), ANN, BOB, 10)),
    (R.ID_AHEAD, Row(at(300_001), ANN, BOB, 10)),
    (R.OK, Row(at(300_000), ANN, BOB, 10)),
    (R.ID_REUSED, Row(transfer_id(1), BANK, ANN, 101)),
    (R.ID_REUSED, Row(transfer_id(1), BANK, BOB, 100)),
    (R.ID_REUSED, Row(transfer_id(1), BANK, ANN, 100, code=1)),
    (R.ID_REUSED, Row(transfer_id(1), BANK, ANN, 100, pending_id=transfer_id(9))),
    (R.FLAGS_INVALID, plain(flags=64)),
    (R.FLAGS_INVALID, plain(flags=F.CHAIN | F.HOLD)),
    (R.FLAGS_INVALID, plain(flags=F.CHAIN | F.POST, pending_id=transfer_id(2))),
    (R.FLAGS_INVALID, plain(flags=F.CHAIN | F.VOID, amount=0, pending_id=transfer_id(2))),
    (R.FLAGS_INVALID, plain(flags=F.HOLD | F.POST)),
    (R.FLAGS_INVALID, plain(flags=F.POST | F.VOID, pending_id=transfer_id(2))),
    (R.FLAGS_INVALID, plain(flags=F.POST | F.BALANCING_DEBIT, pending_id=transfer_id(2))),
    (R.AMOUNT_INVALID, plain(amount=0)),
    (R.AMOUNT_INVALID, plain(amount=-1)),
    (R.AMOUNT_INVALID, plain(amount=-1, flags=F.POST, pending_id=transfer_id(2))),
    (R.AMOUNT_INVALID, plain(debit=BANK, amount=AMOUNT_MAX + 1)),
    (R.AMOUNT_INVALID, plain(debit=BANK, amount=AMOUNT_MAX + 1, flags=F.BALANCING_DEBIT)),
    (R.AMOUNT_INVALID, plain(debit=BANK, amount=AMOUNT_MAX + 1, credit_shard=1)),
    (R.AMOUNT_INVALID, plain(amount=(1 << 63) - 1, flags=F.POST, pending_id=transfer_id(2))),
    (R.PENDING_ID_INVALID, plain(flags=F.POST)),
    (R.PENDING_ID_INVALID, plain(flags=F.VOID, pending_id=transfer_id(1000))),
    (R.PENDING_ID_INVALID, plain(pending_id=transfer_id(2))),
    (R.TIMEOUT_INVALID, plain(timeout_s=1)),
    (R.TIMEOUT_INVALID, plain(timeout_s=1, flags=F.VOID, pending_id=transfer_id(2))),
    (R.ACCOUNTS_SAME, plain(credit=ANN)),
    (R.CROSS_SHARD_UNSUPPORTED, plain(credit_shard=1, flags=F.HOLD)),
    (R.CROSS_SHARD_UNSUPPORTED, plain(credit_shard=1, flags=F.BALANCING_DEBIT)),
    (R.CROSS_SHARD_UNSUPPORTED, plain(credit_shard=0)),
    (R.CROSS_SHARD_UNSUPPORTED, plain(credit_shard=256)),
    (R.HOLD_NOT_FOUND, plain(flags=F.POST, pending_id=transfer_id(2))),
    (R.HOLD_NOT_FOUND, plain(flags=F.VOID, pending_id=transfer_id(1))),
    (R.DEBIT_ACCOUNT_NOT_FOUND, plain(debit=NOBODY, credit=account_id(99))),
    (R.DEBIT_ACCOUNT_NOT_FOUND, plain(debit=NOBODY, credit_shard=1)),
    (R.CREDIT_ACCOUNT_NOT_FOUND, plain(credit=NOBODY)),
    (R.CURRENCY_MISMATCH, plain(credit=YEN)),
    (R.DEBIT_ACCOUNT_CLOSED, plain(debit=CLOSED, credit=FROZEN)),
    (R.DEBIT_ACCOUNT_CLOSED, plain(debit=CLOSED, credit_shard=1)),
    (R.CREDIT_ACCOUNT_CLOSED, plain(debit=FROZEN, credit=CLOSED)),
    (R.DEBIT_ACCOUNT_FROZEN, plain(debit=FROZEN)),
    (R.DEBIT_ACCOUNT_FROZEN, plain(debit=FROZEN, credit_shard=1)),
    (R.CREDIT_ACCOUNT_FROZEN, plain(credit=FROZEN, amount=1000)),
    (R.INSUFFICIENT_FUNDS, plain(amount=106)),
    (R.INSUFFICIENT_FUNDS, plain(amount=106, credit=CAPPED)),
    (R.INSUFFICIENT_FUNDS, plain(amount=106, credit_shard=1)),
    (R.INSUFFICIENT_FUNDS, plain(debit=BOB, credit=ANN, amount=0, flags=F.BALANCING_DEBIT)),
    (R.BALANCE_LIMIT_EXCEEDED, plain(credit=CAPPED, amount=51)),
    (R.OK, plain(credit=CAPPED, amount=50)),
    (R.BALANCE_OVERFLOW, plain(debit=BANK, credit=ANN, amount=AMOUNT_MAX - 99)),
    (R.OK, plain(debit=BANK, credit=ANN, amount=AMOUNT_MAX - 100)),
    (R.BALANCE_OVERFLOW, plain(debit=BANK, credit=BOB, amount=AMOUNT_MAX - 99)),
    (R.OK, plain(debit=BANK, credit=BOB, amount=AMOUNT_MAX - 100)),
    (R.BALANCE_OVERFLOW, plain(debit=BANK, credit=BOB, amount=AMOUNT_MAX - 99, flags=F.HOLD)),
    (R.BALANCE_OVERFLOW, plain(debit=BANK, credit_shard=1, amount=AMOUNT_MAX - 99)),
    (R.BALANCE_OVERFLOW, plain(debit=BANK, credit=ANN, amount=0, flags=F.BALANCING_CREDIT)),
    (R.CHAIN_OPEN, plain(flags=F.LINKED)),
    (R.IN_FLIGHT, plain(credit_shard=1, credit=NOBODY)),
    (R.OK, plain(flags=F.HOLD, timeout_s=60)),
    (R.OK, plain(amount=0, flags=F.BALANCING_DEBIT)),
]


@pytest.mark.parametrize(("expected", "row"), CASES, ids=[f"{i}-{c[0].name}" for i, c in enumerate(CASES)])
def test_each_result(pair: Pair, expected: TransferResult, row: Row) -> None:
    before = [pair.engine.account_by_ordinal(i) for i in range(8)]
    assert pair.transfer(row) == expected
    if expected not in (R.OK, R.IN_FLIGHT):
        assert [pair.engine.account_by_ordinal(i) for i in range(8)] == before
    pair.check_agreement()
    pair.check_replay()


@pytest.mark.parametrize(("expected", "row"), CASES, ids=[f"{i}-{c[0].name}" for i, c in enumerate(CASES)])
def test_the_same_command_gets_the_same_answer(pair: Pair, expected: TransferResult, row: Row) -> None:
    """Remembered answers come again though the accounts have changed; the others are judged anew."""
    first = pair.transfer(row)
    frames = len(pair.frames)
    assert first == expected
    assert pair.transfer(row) == expected
    if first in (R.OK, R.IN_FLIGHT) or 11 <= first <= 27:
        assert len(pair.frames) == frames
        assert pair.transfer(Row(transfer_id(1001), HOUSE, BOB, 1)) == R.OK
        assert pair.transfer(row) == expected
    else:
        assert pair.engine.result(row.id) == (R.OK if first == R.ID_REUSED else 0)


def test_every_result_is_produced_somewhere() -> None:
    here = {expected for expected, _ in CASES}
    elsewhere = {
        R.HOLD_ALREADY_POSTED,
        R.HOLD_ALREADY_VOIDED,
        R.HOLD_EXPIRED,
        R.HOLD_MISMATCH,
        R.HOLD_AMOUNT_EXCEEDED,
        R.LINKED_FAILED,
        R.TOO_MANY_PENDING,
    }
    assert here | elsewhere == set(R) - {R.WRONG_SHARD}  # the shard host's alone


def test_guards_run_in_the_order_of_their_numbers(pair: Pair) -> None:
    """A row with everything wrong, mended one fault at a time, gets the results in rising order."""
    wrong = {
        "id": bytes(16),
        "flags": F.HOLD | F.POST,
        "amount": -1,
        "pending_id": transfer_id(2),
        "timeout_s": 1,
        "debit_id": NOBODY,
        "credit_id": NOBODY,
    }
    steps: list[tuple[TransferResult, dict[str, int | bytes]]] = [
        (R.ID_INVALID, {"id": at(-8 * DAY_MS)}),
        (R.ID_TOO_OLD, {"id": at(400_000)}),
        (R.ID_AHEAD, {"id": transfer_id(1)}),
        (R.ID_REUSED, {"id": transfer_id(1001)}),
        (R.FLAGS_INVALID, {"flags": 0}),
        (R.AMOUNT_INVALID, {"amount": AMOUNT_MAX}),
        (R.PENDING_ID_INVALID, {"pending_id": bytes(16)}),
        (R.TIMEOUT_INVALID, {"timeout_s": 0}),
        (R.ACCOUNTS_SAME, {"debit_id": account_id(99)}),
        (R.DEBIT_ACCOUNT_NOT_FOUND, {"id": transfer_id(1002), "debit_id": CLOSED}),
        (R.CREDIT_ACCOUNT_NOT_FOUND, {"id": transfer_id(1003), "credit_id": YEN}),
        (R.CURRENCY_MISMATCH, {"id": transfer_id(1004), "credit_id": FROZEN}),
        (R.DEBIT_ACCOUNT_CLOSED, {"id": transfer_id(1005), "debit_id": FROZEN, "credit_id": CLOSED}),
        (R.CREDIT_ACCOUNT_CLOSED, {"id": transfer_id(1006), "credit_id": CAPPED}),
        (R.DEBIT_ACCOUNT_FROZEN, {"id": transfer_id(1007), "debit_id": ANN, "credit_id": FROZEN}),
        (R.CREDIT_ACCOUNT_FROZEN, {"id": transfer_id(1008), "credit_id": CAPPED}),
        (R.INSUFFICIENT_FUNDS, {"id": transfer_id(1009), "debit_id": BANK}),
        (R.BALANCE_LIMIT_EXCEEDED, {"id": transfer_id(1010), "credit_id": ANN}),
        (R.BALANCE_OVERFLOW, {"id": transfer_id(1011), "amount": 1}),
        (R.OK, {}),
    ]
    assert [expected for expected, _ in steps[:-1]] == sorted(expected for expected, _ in steps[:-1])
    fields = wrong
    for expected, mended in steps:
        assert pair.transfer(Row(**fields)) == expected  # type: ignore[arg-type]
        fields = fields | mended


def test_nobody_names_the_in_flight_account(pair: Pair) -> None:
    assert pair.transfer(plain(credit_shard=1, credit=NOBODY)) == R.IN_FLIGHT
    in_flight = in_flight_account_id(b"USD\0", 0)
    assert pair.engine.account(in_flight).balance == 10  # type: ignore[union-attr]
    assert pair.transfer(Row(transfer_id(2), in_flight, ANN, 1)) == R.DEBIT_ACCOUNT_NOT_FOUND
    assert pair.transfer(Row(transfer_id(3), ANN, in_flight, 1)) == R.CREDIT_ACCOUNT_NOT_FOUND
    assert pair.open([AccountRow(in_flight_account_id(b"EUR\0", 0))]) == [2]
    assert pair.update([AccountRow(in_flight, flags=1)]) == [2]


def test_balancing_moves_what_the_limits_allow(pair: Pair) -> None:
    assert pair.transfer(plain(amount=1000, flags=F.BALANCING_DEBIT)) == R.OK
    assert pair.engine.account(ANN).balance == -5  # type: ignore[union-attr]
    assert pair.transfer(Row(transfer_id(2), BOB, CAPPED, 0, F.BALANCING_DEBIT | F.BALANCING_CREDIT)) == R.OK
    assert pair.engine.account(CAPPED).balance == 50  # type: ignore[union-attr]
    assert pair.transfer(Row(transfer_id(3), BOB, CAPPED, 0, F.BALANCING_CREDIT)) == R.BALANCE_LIMIT_EXCEEDED
    # the content is what was asked for, not what was moved
    assert pair.transfer(plain(amount=1000, flags=F.BALANCING_DEBIT)) == R.OK
    assert pair.transfer(plain(amount=105, flags=F.BALANCING_DEBIT)) == R.ID_REUSED


def test_without_a_maximum_an_account_that_may_overdraw_gives_what_it_has(pair: Pair) -> None:
    """Not all that 64 bits hold."""
    bank = Row(transfer_id(2), BANK, ANN, 0, F.BALANCING_DEBIT)
    assert pair.engine.account(BANK).balance == -100  # type: ignore[union-attr]
    assert pair.transfer(bank) == R.INSUFFICIENT_FUNDS
    assert pair.open([AccountRow(account_id(50), flags=4), AccountRow(account_id(51), flags=4)]) == [1, 1]
    rich, poor = account_id(50), account_id(51)
    assert pair.transfer(Row(transfer_id(3), ANN, rich, 30)) == R.OK
    assert pair.transfer(Row(transfer_id(4), rich, BOB, 10, F.HOLD)) == R.OK
    assert pair.transfer(Row(transfer_id(5), rich, poor, 0, F.BALANCING_DEBIT)) == R.OK
    assert pair.engine.account(poor).balance == 20  # type: ignore[union-attr]
    assert pair.transfer(Row(transfer_id(6), rich, poor, 0, F.BALANCING_CREDIT)) == R.BALANCE_OVERFLOW
    assert pair.transfer(Row(transfer_id(7), rich, poor, 5, F.BALANCING_DEBIT)) == R.OK, "with a maximum, as ever"
    pair.check_replay()


COLUMNS = ["debit_ids", "credit_ids", "amounts", "flags", "pending_ids", "timeouts_s", "codes", "credit_shards"]


@pytest.mark.parametrize("make", [Engine, Twin])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_the_wrong_length_is_named(make: type[Engine] | type[Twin], name: str) -> None:
    columns = {
        "ids": transfer_id(1) + transfer_id(2),
        "debit_ids": ANN * 2,
        "credit_ids": BOB * 2,
        "amounts": struct.pack("<2q", 1, 1),
        "flags": bytes(4),
        "pending_ids": bytes(32),
        "timeouts_s": bytes(8),
        "codes": bytes(4),
        "credit_shards": b"\xff" * 4,
    }
    engine = make()
    with pytest.raises(ValueError, match=name):
        engine.transfers(timestamp_ns=NOW, **(columns | {name: columns[name][:-1]}))
    with pytest.raises(ValueError, match="ids"):
        engine.transfers(timestamp_ns=NOW, **(columns | {"ids": columns["ids"][:-1]}))
    with pytest.raises(ValueError, match="rows"):
        engine.transfers(timestamp_ns=NOW, rows=[2], **columns)
    assert engine.status().sequence == 0


@pytest.mark.parametrize("make", [Engine, Twin])
def test_missing_columns_are_zero(make: type[Engine] | type[Twin]) -> None:
    engine = make()
    engine.open_accounts(ANN + BOB, b"USD\0" * 2, NOW, flags=struct.pack("<2H", 4, 0))
    results, _ = engine.transfers(transfer_id(1), ANN, BOB, struct.pack("<q", 1), NOW)
    again, events = engine.transfers(
        transfer_id(1),
        ANN,
        BOB,
        struct.pack("<q", 1),
        NOW,
        flags=bytes(2),
        pending_ids=bytes(16),
        timeouts_s=bytes(4),
        codes=bytes(2),
        credit_shards=b"\xff\xff",
    )
    assert (results, again, events) == (b"\x01", b"\x01", b"")
