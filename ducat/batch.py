"""Bulk transfers as columns: builds `ducat.wallet.v1.TransferBatch` messages from plain lists, bytes or numpy
arrays, and reads from an answer only what failed.

    ids = transfer_ids(len(amounts))
    for batch in transfer_batches(ids, debit_account_ids, credit_account_ids, amounts):
        ...  # stub.SubmitTransfers(iter([SubmitTransfersRequest(batch=batch), …]))
    for failed in failed_transfers(result):
        print(failed.row, failed.result)

A column of ids may be bytes of 16 a row, a sequence of 16-byte ids or uuid.UUIDs, or a numpy array of 16
bytes a row (``uint8`` of shape (rows, 16), ``S16``, ``V16``). A column of numbers may be a sequence of ints
or any one-dimensional array of integers. Nothing here is private to Python: the messages are plain protobuf,
and any language can fill the same `bytes` columns.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ducat.ids import account_id
from ducat.wallet.v1 import wallet_pb2

__all__ = [
    "ROW_COUNT_MAX",
    "FailedTransfer",
    "account_ids",
    "failed_transfers",
    "transfer_batches",
    "transfer_ids",
]

ROW_COUNT_MAX = 8_190
"""Rows that one TransferBatch may have."""

_LINKED = 1
_VERSION_7 = bytes(0x70 | (byte & 0x0F) for byte in range(256))
_VARIANT_10 = bytes(0x80 | (byte & 0x3F) for byte in range(256))
_FIELD_AMOUNTS = b"\x2a"  # field 5, length-delimited: packed sfixed64
_FIELD_TIMEOUTS = b"\x42"  # field 8, length-delimited: packed fixed32
_RESULT_NAMES = {number: name.removeprefix("TRANSFER_RESULT_") for name, number in wallet_pb2.TransferResult.items()}


def transfer_ids(count: int, *, time_ms: int | None = None) -> bytes:
    """`count` new ids, 16 bytes each: UUIDs of version 7 with 74 random bits, all of the given time (unix ms,
    default now)."""
    now = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    ids = bytearray(os.urandom(16 * count))
    for index, byte in enumerate(now.to_bytes(6, "big")):
        ids[index::16] = bytes([byte]) * count
    ids[6::16] = ids[6::16].translate(_VERSION_7)
    ids[8::16] = ids[8::16].translate(_VARIANT_10)
    return bytes(ids)


def account_ids(names: Iterable[str]) -> bytes:
    """The ids of accounts by name, 16 bytes each: UUIDv5, so nothing is asked of the service."""
    return b"".join(map(account_id, names))


def transfer_batches(
    ids: Any,
    debit_account_ids: Any,
    credit_account_ids: Any,
    amounts_minor: Any,
    *,
    flags: Any = None,
    pending_ids: Any = None,
    timeouts_s: Any = None,
    codes: Any = None,
    settle: wallet_pb2.SettleMode = wallet_pb2.SETTLE_MODE_UNSPECIFIED,
    first_batch_id: int = 1,
    row_count_max: int = ROW_COUNT_MAX,
) -> Iterator[wallet_pb2.TransferBatch]:
    """The rows as messages of at most `row_count_max` rows, numbered from `first_batch_id`; a linked chain is
    never cut.

    Columns are described in the module's docstring; all that are given must have as many rows as `ids`.
    Raises ValueError that names the column: not 16 bytes an id, another length, a number that does not fit, a
    chain longer than a message.
    """
    if not 0 < row_count_max <= ROW_COUNT_MAX:
        raise ValueError(f"row_count_max: expected 1 to {ROW_COUNT_MAX}, got {row_count_max}")
    rows, id_bytes = _ids("ids", ids, None)
    debits = _ids("debit_account_ids", debit_account_ids, rows)[1]
    credits = _ids("credit_account_ids", credit_account_ids, rows)[1]
    amounts = _numbers("amounts_minor", amounts_minor, "q", rows)
    flag_bytes = b"" if flags is None else _numbers("flags", flags, "H", rows)
    pending = b"" if pending_ids is None else _ids("pending_ids", pending_ids, rows)[1]
    timeouts = b"" if timeouts_s is None else _numbers("timeouts_s", timeouts_s, "I", rows)
    code_bytes = b"" if codes is None else _numbers("codes", codes, "H", rows)
    batch_id = first_batch_id
    for start, end in _spans(rows, flag_bytes, row_count_max):
        batch = wallet_pb2.TransferBatch(
            batch_id=batch_id,
            ids=id_bytes[16 * start : 16 * end],
            debit_account_ids=debits[16 * start : 16 * end],
            credit_account_ids=credits[16 * start : 16 * end],
            flags=flag_bytes[2 * start : 2 * end],
            pending_ids=pending[16 * start : 16 * end],
            codes=code_bytes[2 * start : 2 * end],
            settle=settle,
        )
        _merge_packed(batch, _FIELD_AMOUNTS, amounts[8 * start : 8 * end])
        _merge_packed(batch, _FIELD_TIMEOUTS, timeouts[4 * start : 4 * end])
        yield batch
        batch_id += 1


class FailedTransfer(NamedTuple):
    """One transfer that is not OK: its row in the batch, its id (empty where the batch was not given), and
    the result's name, such as ``INSUFFICIENT_FUNDS``. ``IN_FLIGHT`` (settle mode DURABLE) is listed too:
    debited, the credit is still to come.
    """

    row: int
    transfer_id: bytes
    result: str


def failed_transfers(
    result: wallet_pb2.TransferBatchResult, batch: wallet_pb2.TransferBatch | None = None
) -> list[FailedTransfer]:
    """What failed, in the order of the rows. With the batch that was sent, the ids are filled in."""
    ids = b"" if batch is None else batch.ids
    return [
        FailedTransfer(row, ids[16 * row : 16 * row + 16], _RESULT_NAMES.get(code, str(code)))
        for row, code in sorted(zip(result.failed_rows, result.failed_results, strict=True))
    ]


def _spans(rows: int, flags: bytes, row_count_max: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < rows:
        end = min(start + row_count_max, rows)
        if flags and end < rows:
            while end > start and flags[2 * (end - 1)] & _LINKED:
                end -= 1
            if end == start:
                raise ValueError(f"flags: the linked chain at row {start} has more than {row_count_max} rows")
        yield start, end
        start = end


def _ids(name: str, column: Any, rows: int | None) -> tuple[int, bytes]:
    if isinstance(column, (bytes, bytearray, memoryview)):
        packed = bytes(column)
    elif hasattr(column, "tobytes") and hasattr(column, "dtype"):
        packed = column.tobytes()
        if column.size and len(packed) // column.shape[0] != 16:
            raise ValueError(f"{name}: expected 16 bytes a row, got {column.dtype} of shape {column.shape}")
    else:
        items: Sequence[Any] = column if isinstance(column, Sequence) else list(column)
        pieces = [item.bytes if isinstance(item, uuid.UUID) else item for item in items]
        for row, piece in enumerate(pieces):
            if len(piece) != 16:
                raise ValueError(f"{name}[{row}]: expected 16 bytes, got {len(piece)}")
        packed = b"".join(pieces)
    if len(packed) % 16:
        raise ValueError(f"{name}: expected 16 bytes a row, got {len(packed)} bytes")
    if rows is not None and len(packed) != 16 * rows:
        raise ValueError(f"{name}: expected {rows} rows as in ids, got {len(packed) // 16}")
    return len(packed) // 16, packed


def _numbers(name: str, column: Any, typecode: str, rows: int) -> bytes:
    width = array(typecode).itemsize
    if hasattr(column, "dtype"):
        packed = _array_numbers(name, column, typecode)
    else:
        try:
            numbers = array(typecode, column)
        except (OverflowError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        if sys.byteorder == "big":
            numbers.byteswap()
        packed = numbers.tobytes()
    if len(packed) != width * rows:
        raise ValueError(f"{name}: expected {rows} rows as in ids, got {len(packed) // width}")
    return packed


def _array_numbers(name: str, column: Any, typecode: str) -> bytes:
    if column.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers (minor units), got {column.dtype}")
    wanted = column.astype({"q": "<i8", "I": "<u4", "H": "<u2"}[typecode])
    if (wanted != column).any() or ((wanted < 0) != (column < 0)).any():
        raise ValueError(f"{name}: a number does not fit {wanted.dtype}")
    packed: bytes = wanted.tobytes()
    return packed


def _merge_packed(batch: wallet_pb2.TransferBatch, tag: bytes, packed: bytes) -> None:
    """A packed repeated field straight from its little-endian bytes: what the wire has, without a Python int
    a row."""
    if packed:
        batch.MergeFromString(tag + _varint(len(packed)) + packed)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
