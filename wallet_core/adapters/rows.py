"""Rows as a serialized TransferBatch, written byte by byte: for a single row that is several times cheaper
than a message object."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from ducat.wallet.v1 import wallet_pb2
from kernel.errors import InvalidArgument
from wallet_core.service.port import ID_NONE, TransferRow

__all__ = ["batch_message", "batch_rows", "create_transfers_response", "result_bytes"]

_OK = bytes([wallet_pb2.TRANSFER_RESULT_OK])

# field number << 3 | 2 (length-delimited), as in wallet.proto
_IDS, _DEBITS, _CREDITS, _AMOUNTS = b"\x12", b"\x1a", b"\x22", b"\x2a"
_FLAGS, _PENDING, _TIMEOUTS, _CODES = b"\x32", b"\x3a", b"\x42", b"\x4a"
_SETTLE = b"\x50"  # field 10, varint
_RESULTS, _POSITIONS = b"\x0a", b"\x12"
_SHARD, _SEQUENCE = b"\x08", b"\x10"
_BYTES = [bytes([number]) for number in range(0x80)]
_Q, _H, _I = struct.Struct("<q").pack, struct.Struct("<H").pack, struct.Struct("<I").pack


def batch_message(rows: Sequence[TransferRow], settle: int = 0) -> bytes:
    """A TransferBatch of these rows. Columns that hold only zeros are left out."""
    tail = _SETTLE + bytes([settle]) if settle else b""
    if len(rows) == 1:
        transfer, debit, credit, amount, flags, pending, timeout_s, code = rows[0]
        message = b"\x12\x10%b\x1a\x10%b\x22\x10%b\x2a\x08%b" % (transfer, debit, credit, _Q(amount))
        if flags:
            message += b"\x32\x02" + _H(flags)
        if pending != ID_NONE:
            message += b"\x3a\x10" + pending
        if timeout_s:
            message += b"\x42\x04" + _I(timeout_s)
        if code:
            message += b"\x4a\x02" + _H(code)
        return message + tail
    ids, debits, credits, amounts, flags_, pendings, timeouts, codes = zip(*rows, strict=True)
    count = len(rows)
    parts = [
        _field(_IDS, b"".join(ids)),
        _field(_DEBITS, b"".join(debits)),
        _field(_CREDITS, b"".join(credits)),
        _field(_AMOUNTS, struct.pack(f"<{count}q", *amounts)),
    ]
    if any(flags_):
        parts.append(_field(_FLAGS, struct.pack(f"<{count}H", *flags_)))
    if any(pending != ID_NONE for pending in pendings):
        parts.append(_field(_PENDING, b"".join(pendings)))
    if any(timeouts):
        parts.append(_field(_TIMEOUTS, struct.pack(f"<{count}I", *timeouts)))
    if any(codes):
        parts.append(_field(_CODES, struct.pack(f"<{count}H", *codes)))
    parts.append(tail)
    return b"".join(parts)


def batch_rows(batch: wallet_pb2.TransferBatch) -> list[TransferRow]:
    """The rows of a TransferBatch that `batch_message` made. Raises InvalidArgument."""
    count = len(batch.ids) // 16
    if len(batch.flags) not in (0, 2 * count) or len(batch.codes) not in (0, 2 * count):
        raise InvalidArgument("batch: its columns have different lengths", reason="BATCH_INVALID")
    columns = (
        _pieces(batch.ids, 16, count),
        _pieces(batch.debit_account_ids, 16, count),
        _pieces(batch.credit_account_ids, 16, count),
        list(batch.amounts_minor),
        [flags for (flags,) in struct.iter_unpack("<H", batch.flags or bytes(2 * count))],
        _pieces(batch.pending_ids or bytes(16 * count), 16, count),
        list(batch.timeouts_s) or [0] * count,
        [code for (code,) in struct.iter_unpack("<H", batch.codes or bytes(2 * count))],
    )
    if count == 0 or any(len(column) != count for column in columns):
        raise InvalidArgument("batch: its columns have different lengths", reason="BATCH_INVALID")
    return [TransferRow(*row) for row in zip(*columns, strict=True)]


def _pieces(column: bytes, width: int, count: int) -> list[bytes]:
    if len(column) != width * count:
        raise InvalidArgument(f"batch: {len(column)} bytes for {count} rows of {width}", reason="BATCH_INVALID")
    return [column[at : at + width] for at in range(0, len(column), width)]


def create_transfers_response(codes: bytes, positions: Iterable[tuple[int, int]]) -> bytes:
    """A serialized CreateTransfersResponse: packed results, then one ShardPosition a shard."""
    parts = [_field(_RESULTS, codes)]  # each TransferResult is below 128, so its varint is the byte itself
    for shard, sequence in positions:
        inner = (_SHARD + _varint(shard) if shard else b"") + _SEQUENCE + _varint(sequence)
        parts.append(_field(_POSITIONS, inner))
    return b"".join(parts)


def result_bytes(answer: wallet_pb2.TransferBatchResult, count: int) -> bytes:
    """One TransferResult byte a row."""
    results = bytearray(_OK * count)
    for row, result in zip(answer.failed_rows, answer.failed_results, strict=True):
        results[row] = result
    return bytes(results)


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _BYTES[number]
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
