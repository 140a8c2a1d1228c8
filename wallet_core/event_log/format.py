"""The frame of the event log, format version 1, in Python: for tools, tests and backends that are not the
file writer.

    0  u32  magic "DUCF"             40  u64  durable sequence number when this frame was written
    4  u16  version = 1              48  16B  hash of the frame before (zeros before the first)
    6  u16  header bytes = 96        64  16B  digest of the engine's state after this frame
    8  u16  shard                    80  u16  bytes of one record
   10  u16  flags = 0                82  6B   zero
   12  u32  epoch                    88  u32  CRC-32C of the body
   16  u64  first sequence number    92  u32  CRC-32C of header bytes 0..91
   24  u32  count of records         96  body: count records, then zeros up to the next multiple of 8
   28  u32  body bytes
   32  u64  timestamp, unix ns       everything little endian; frame hash = SHA-256(header)[:16]

docs/event-log-format.md draws segments, the durable mark and the rules for opening.
"""

from __future__ import annotations

import struct

from wallet_core.event_log._file import crc32c, frame_hash
from wallet_core.event_log.port import Frame

MAGIC = b"DUCF"
VERSION = 1
HEADER_BYTES = 96
HASH_ZERO = bytes(16)

_HEADER = struct.Struct("<4sHHHHIQIIQQ16s16sHHIII")
assert _HEADER.size == HEADER_BYTES


class FrameInvalid(ValueError):
    """These bytes are no frame of version 1."""


def pack_frame(
    *,
    shard: int,
    epoch: int,
    first_sequence: int,
    count: int,
    timestamp_ns: int,
    durable_sequence: int,
    previous_hash: bytes,
    digest: bytes,
    body: bytes,
) -> bytes:
    """One frame as bytes, padded to a multiple of 8. `len(body)` must be a multiple of `count`."""
    if count < 1 or len(body) % count:
        raise FrameInvalid(f"{count} records do not divide a body of {len(body)} bytes")
    fields = (
        *(MAGIC, VERSION, HEADER_BYTES, shard, 0, epoch, first_sequence, count, len(body), timestamp_ns),
        *(durable_sequence, previous_hash, digest, len(body) // count, 0, 0, crc32c(body)),
    )
    head = _HEADER.pack(*fields, 0)[:-4]
    return head + crc32c(head).to_bytes(4, "little") + body + bytes(-len(body) % 8)


def unpack_frame(data: bytes | memoryview, offset: int = 0) -> tuple[Frame, int]:
    """The frame at `offset` and the offset behind it. Raises FrameInvalid if checksums or lengths do not
    hold."""
    view = memoryview(data)[offset:]
    if len(view) < HEADER_BYTES:
        raise FrameInvalid(f"{len(view)} bytes are left at {offset}, a header has {HEADER_BYTES}")
    head = bytes(view[:HEADER_BYTES])
    (magic, version, header_bytes, shard, _, epoch, first_sequence, count, body_bytes, timestamp_ns, durable_sequence,
     previous_hash, digest, record_bytes, _, _, body_crc, header_crc) = _HEADER.unpack(head)  # fmt: skip
    if magic != MAGIC or crc32c(head[:-4]) != header_crc:
        raise FrameInvalid(f"no frame header at {offset}: magic {magic!r} or checksum differ")
    if version != VERSION or header_bytes != HEADER_BYTES:
        raise FrameInvalid(f"frame at {offset} has format version {version}, this program reads {VERSION}")
    body = bytes(view[HEADER_BYTES : HEADER_BYTES + body_bytes])
    if len(body) != body_bytes or count * record_bytes != body_bytes or crc32c(body) != body_crc:
        raise FrameInvalid(f"the body of the frame at {offset} is cut off or does not match its checksum")
    frame = Frame(
        shard=shard,
        epoch=epoch,
        first_sequence=first_sequence,
        count=count,
        timestamp_ns=timestamp_ns,
        durable_sequence=durable_sequence,
        previous_hash=previous_hash,
        digest=digest,
        body=body,
        hash=frame_hash(head),
    )
    return frame, offset + HEADER_BYTES + body_bytes + (-body_bytes % 8)
