"""TransferBatch as raw protobuf: what generated stubs write is understood, what is malformed is refused as a whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_fixtures import Driver, account, config, field, message, transfer_id, varint

from wallet_core.engine.codes import TransferResult
from wallet_core.service.port import TransferRow
from wallet_core.shard import BatchInvalid, HostBusy

SOURCE = account(1_000_000)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    one = Driver(config(tmp_path))
    one.fund([account(n) for n in range(10)], 1000, SOURCE)
    yield one
    one.close()


def rows(count: int, first: int = 0) -> list[TransferRow]:
    return [TransferRow(transfer_id(first + n), account(n % 10), account((n + 1) % 10), 1) for n in range(count)]


def test_a_batch_written_by_the_generated_stub(driver: Driver) -> None:
    from ducat.wallet.v1 import wallet_pb2

    sent = rows(100)
    batch = wallet_pb2.TransferBatch(
        batch_id=2**60,
        ids=b"".join(row.id for row in sent),
        debit_account_ids=b"".join(row[1] for row in sent),
        credit_account_ids=b"".join(row[2] for row in sent),
        amounts_minor=[row[3] for row in sent[:-1]] + [10**6],
        settle=wallet_pb2.SETTLE_MODE_SETTLED,
    )
    result = wallet_pb2.TransferBatchResult.FromString(driver.send(batch.SerializeToString()))
    assert (result.batch_id, result.row_count, result.replayed_count) == (2**60, 100, 0)
    assert list(result.failed_rows) == [99]
    assert result.failed_results == bytes([TransferResult.INSUFFICIENT_FUNDS])
    assert [(one.shard, one.sequence_number) for one in result.positions] == [
        (0, driver.host.durable_sequence(0))
    ]  # fmt: skip
    again = wallet_pb2.TransferBatchResult.FromString(driver.send(batch.SerializeToString()))
    assert (again.replayed_count, list(again.failed_rows)) == (100, [99])


def test_the_stream_wrapper(driver: Driver) -> None:
    from ducat.wallet.v1 import wallet_pb2

    request = wallet_pb2.SubmitTransfersRequest(batch=wallet_pb2.TransferBatch.FromString(message(rows(3))))
    response = wallet_pb2.SubmitTransfersResponse.FromString(driver.send(request.SerializeToString(), wrapped=True))
    assert response.result.row_count == 3
    with pytest.raises(BatchInvalid, match="no rows"):
        driver.host.submit_message(9, b"", wrapped=True)


def test_every_failing_row_is_listed(driver: Driver) -> None:
    from ducat.wallet.v1 import wallet_pb2

    rng = random.Random(3)
    sent = rows(1000)
    wrong = sorted(rng.sample(range(1000), 333))
    for n in wrong:
        sent[n] = sent[n]._replace(amount_minor=0)
    result = wallet_pb2.TransferBatchResult.FromString(driver.send(message(sent)))
    assert list(result.failed_rows) == wrong
    assert set(result.failed_results) == {TransferResult.AMOUNT_INVALID}


def test_unknown_fields_are_skipped_and_the_last_of_a_doubled_field_wins(driver: Driver) -> None:
    extra = (
        varint(99 << 3)
        + varint(5)
        + field(50, b"abc")
        + varint(51 << 3 | 1)
        + bytes(8)
        + varint(52 << 3 | 5)
        + bytes(4)
    )
    data = field(2, bytes(16)) + b"\x08" + varint(1) + extra + message(rows(2)) + extra
    from ducat.wallet.v1 import wallet_pb2

    result = wallet_pb2.TransferBatchResult.FromString(driver.send(data))
    assert (result.batch_id, result.row_count, list(result.failed_rows)) == (7, 2, [])


def test_packed_columns_in_pieces_and_unpacked(driver: Driver) -> None:
    from ducat.wallet.v1 import wallet_pb2

    sent = [row._replace(amount_minor=n + 1, flags=2, timeout_s=60) for n, row in enumerate(rows(4))]
    amounts = [row.amount_minor.to_bytes(8, "little") for row in sent]
    data = field(2, b"".join(row.id for row in sent)) + field(3, b"".join(row[1] for row in sent))
    data += field(4, b"".join(row[2] for row in sent)) + field(6, b"\x02\x00" * 4)
    data += field(5, amounts[0] + amounts[1]) + varint(5 << 3 | 1) + amounts[2] + field(5, amounts[3])
    data += field(8, b"\x3c\0\0\0") + varint(8 << 3 | 5) + b"\x3c\0\0\0" + field(8, b"\x3c\0\0\0" * 2)
    assert wallet_pb2.TransferBatch.FromString(data).amounts_minor == [1, 2, 3, 4]
    result = wallet_pb2.TransferBatchResult.FromString(driver.send(data))
    assert list(result.failed_rows) == []
    driver.ticket += 1
    driver.host.submit_read(driver.ticket, [account(n) for n in range(4)])
    assert [state.held_out for state in driver.wait(driver.ticket).accounts] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "where", "why"),
    [
        ({2: b"x" * 15}, "ids", "15 bytes is not a multiple of 16"),
        ({2: b""}, "ids", "no rows"),
        ({2: bytes(16 * 8191)}, "ids", "8191 rows, at most 8190"),
        ({3: bytes(16)}, "debit_account_ids", "1 rows, but ids has 2"),
        ({3: bytes(33)}, "debit_account_ids", "33 bytes is not a multiple of 16"),
        ({4: b""}, "credit_account_ids", "0 rows, but ids has 2"),
        ({5: bytes(24)}, "amounts_minor", "3 rows, but ids has 2"),
        ({5: bytes(17)}, "amounts_minor", "17 bytes is not a multiple of 8"),
        ({6: bytes(2)}, "flags", "1 rows, but ids has 2"),
        ({7: bytes(16)}, "pending_ids", "1 rows, but ids has 2"),
        ({8: bytes(4)}, "timeouts_s", "1 rows, but ids has 2"),
        ({9: bytes(3)}, "codes", "3 bytes is not a multiple of 2"),
    ],
)
def test_a_malformed_column_is_named_and_nothing_is_applied(
    driver: Driver, change: dict[int, bytes], where: str, why: str
) -> None:
    sent = rows(2)
    columns = {
        2: b"".join(row.id for row in sent),
        3: b"".join(row[1] for row in sent),
        4: b"".join(row[2] for row in sent),
        5: (1).to_bytes(8, "little") * 2,
        **change,
    }
    before = driver.host.durable_sequence(0)
    with pytest.raises(BatchInvalid, match=why) as refused:
        driver.host.submit_message(99, b"".join(field(number, data) for number, data in columns.items()))
    assert refused.value.field == where
    assert driver.host.rows_in_flight == 0
    assert driver.transfers(rows(1)) == [1]  # its id was not taken by the refused batch
    assert driver.host.durable_sequence(0) == before + 1


def test_settle_must_be_a_settle_mode(driver: Driver) -> None:
    with pytest.raises(BatchInvalid, match="SettleMode"):
        driver.host.submit_message(1, message(rows(1), settle=3))


def test_every_cut_and_every_flipped_byte_of_a_message_is_answered_or_refused(driver: Driver) -> None:
    """No input may crash the process, hang, or leak rows from the limits."""
    data = message([row._replace(flags=2, timeout_s=5, code=9, pending_id=bytes(16)) for row in rows(3, 500)])
    cases = [data[:length] for length in range(len(data))]
    for at in range(len(data)):
        for xor in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= xor
            cases.append(bytes(changed))
    refused = answered = 0
    for case in cases:
        try:
            driver.send(case)
            answered += 1
        except BatchInvalid:
            refused += 1
    assert refused > 100
    assert answered > 100
    assert driver.host.rows_in_flight == driver.host.bytes_in_flight == 0


def test_rows_that_do_not_fit_are_named(driver: Driver) -> None:
    good = rows(3)
    for bad, where in (
        (good[1]._replace(id=b"short"), r"rows\[1\]\.id"),
        (good[1]._replace(amount_minor=2**63), r"rows\[1\]"),
        (good[1]._replace(flags=70_000), r"rows\[1\]"),
        (good[1]._replace(pending_id="x"), r"rows\[1\]\.pending_id"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BatchInvalid, match=where):
            driver.host.submit_rows(1, [good[0], bad, good[2]])
    assert driver.host.rows_in_flight == 0
    assert driver.transfers(good) == [1, 1, 1]


def test_rows_and_bytes_under_way_are_bounded(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, rows_in_flight_max=100, bytes_in_flight_max=1 << 20))
    driver.fund([account(n) for n in range(10)], 1000, SOURCE)
    driver.host.log(0).hold_sync(True)
    first = driver.submit(rows(60))
    with pytest.raises(HostBusy, match="60 rows"):
        driver.submit(rows(60, 100))
    driver.host.log(0).hold_sync(False)
    assert set(driver.wait(first).codes) == {1}
    assert set(driver.transfers(rows(60, 100))) == {1}
    assert set(driver.transfers(rows(300, 1000))) == {1}  # larger than the limit: alone, it may pass
    driver.close()
