"""Risk: a bulk load whose columns do not say what the caller meant."""

from __future__ import annotations

import uuid

import numpy
import pytest

from ducat.batch import ROW_COUNT_MAX, account_ids, failed_transfers, transfer_batches, transfer_ids
from ducat.wallet.v1 import wallet_pb2
from kernel.ids import account_id, time_ms_of


def test_ids_are_distinct_uuids_of_version_7_with_the_time_asked_for() -> None:
    packed = transfer_ids(5_000, time_ms=1_753_056_000_123)
    ids = [packed[start : start + 16] for start in range(0, len(packed), 16)]
    assert len(set(ids)) == 5_000
    assert {uuid.UUID(bytes=one).version for one in ids} == {7}
    assert {uuid.UUID(bytes=one).variant for one in ids} == {uuid.RFC_4122}
    assert {time_ms_of(one) for one in ids} == {1_753_056_000_123}


def _columns(rows: int) -> tuple[bytes, bytes, bytes, list[int]]:
    return transfer_ids(rows), transfer_ids(rows), transfer_ids(rows), list(range(1, rows + 1))


def test_rows_survive_the_split_in_order_and_once() -> None:
    ids, debits, credits, amounts = _columns(2 * ROW_COUNT_MAX + 7)
    batches = list(
        transfer_batches(ids, debits, credits, amounts, codes=[row % 65_536 for row in amounts], first_batch_id=40)
    )
    assert [batch.batch_id for batch in batches] == [40, 41, 42]
    assert [len(batch.ids) // 16 for batch in batches] == [ROW_COUNT_MAX, ROW_COUNT_MAX, 7]
    assert b"".join(batch.ids for batch in batches) == ids
    assert b"".join(batch.credit_account_ids for batch in batches) == credits
    assert [amount for batch in batches for amount in batch.amounts_minor] == amounts


def test_every_form_of_a_column_makes_the_same_message() -> None:
    ids, debits, credits, amounts = _columns(9)
    plain = next(
        transfer_batches(ids, debits, credits, amounts, flags=[2] * 9, timeouts_s=[70_000] * 9, pending_ids=ids)
    )
    pieces = [ids[start : start + 16] for start in range(0, len(ids), 16)]
    from_lists = next(
        transfer_batches(
            pieces,
            [uuid.UUID(bytes=debits[start : start + 16]) for start in range(0, len(debits), 16)],
            numpy.frombuffer(credits, dtype="V16"),
            numpy.array(amounts, dtype=numpy.int32),
            flags=numpy.full(9, 2, dtype=numpy.uint8),
            timeouts_s=numpy.full(9, 70_000),
            pending_ids=numpy.frombuffer(ids, dtype=numpy.uint8).reshape(9, 16),
        )
    )
    assert from_lists == plain
    again = wallet_pb2.TransferBatch.FromString(plain.SerializeToString())
    assert list(again.amounts_minor) == amounts
    assert list(again.timeouts_s) == [70_000] * 9
    assert again.flags == b"\x02\x00" * 9


def test_a_split_never_cuts_a_linked_chain() -> None:
    ids, debits, credits, amounts = _columns(10)
    flags = [0, 0, 0, 1, 1, 0, 0, 1, 0, 0]
    batches = list(transfer_batches(ids, debits, credits, amounts, flags=flags, row_count_max=5))
    assert [len(batch.ids) // 16 for batch in batches] == [3, 4, 3]
    for batch in batches:
        assert not batch.flags[-2] & 1
    with pytest.raises(ValueError, match="chain"):
        list(transfer_batches(ids, debits, credits, amounts, flags=[1] * 10, row_count_max=5))


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("ids", b"x" * 17, "ids: expected 16 bytes a row"),
        ("debit_account_ids", b"x" * 16, "debit_account_ids: expected 2 rows"),
        ("credit_account_ids", [b"x" * 16, b"x" * 15], r"credit_account_ids\[1\]: expected 16 bytes, got 15"),
        ("amounts_minor", [1], "amounts_minor: expected 2 rows"),
        ("amounts_minor", [1, 2**63], "amounts_minor"),
        ("amounts_minor", [1, 2.5], "amounts_minor"),
        ("amounts_minor", numpy.array([1.0, 2.0]), "amounts_minor: expected integers"),
        ("amounts_minor", numpy.array([1, 2**63], dtype=numpy.uint64), "amounts_minor: a number does not fit"),
        ("flags", [1, 70_000], "flags"),
        ("codes", numpy.array([1, -1]), "codes: a number does not fit"),
    ],
)
def test_a_malformed_column_is_named(column: str, value: object, problem: str) -> None:
    columns: dict[str, object] = {
        "ids": transfer_ids(2),
        "debit_account_ids": transfer_ids(2),
        "credit_account_ids": transfer_ids(2),
        "amounts_minor": [1, 2],
    }
    columns[column] = value
    with pytest.raises(ValueError, match=problem):
        list(transfer_batches(**columns))


def test_results_list_only_what_failed_by_name_and_id() -> None:
    ids, debits, credits, amounts = _columns(4)
    batch = next(transfer_batches(ids, debits, credits, amounts))
    result = wallet_pb2.TransferBatchResult(batch_id=1, row_count=4, failed_rows=[3, 1], failed_results=bytes([24, 31]))
    failed = failed_transfers(result, batch)
    assert [(one.row, one.result) for one in failed] == [(1, "IN_FLIGHT"), (3, "INSUFFICIENT_FUNDS")]
    assert failed[1].transfer_id == ids[48:]
    assert failed_transfers(wallet_pb2.TransferBatchResult(row_count=4)) == []


def test_account_ids_are_those_of_the_service() -> None:
    assert account_ids(["seller/A/USD", "seller/B/USD"]) == account_id("seller/A/USD") + account_id("seller/B/USD")
