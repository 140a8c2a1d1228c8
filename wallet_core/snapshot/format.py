"""The snapshot file, format version 1: a consistent image of one shard's engine after the frame that ends at
`sequence`.

    header, 128 bytes                                  then pieces, each
      0  4B   magic "DUCS"                               0  u32  bytes of the piece
      4  u16  version = 1                                4  u32  CRC-32C of the piece
      6  u16  header bytes = 128                         8       the piece (the engine's image format), then zeros
      8  u16  shard                                              up to the next multiple of 8
     10  u16  flags = 0
     12  u32  epoch                                    and behind the last piece a trailer, 32 bytes
     16  u64  sequence number of the last event          0  u32  zero
     24  u64  timestamp of that event, unix ns           4  u32  CRC-32C of trailer bytes 8..31
     32  16B  digest of the state                        8  4B   magic "DUCE"
     48  16B  hash of the log frame that ends there     12  u32  CRC-32C over all the pieces' checksums, in order
     64  u64  pieces                                    16  u64  pieces
     72  u64  bytes of the file                         24  u64  bytes of the file
     80  u64  time of writing, unix ns
     88  32B  zero
    120  u32  CRC-32C over all the pieces' checksums
    124  u32  CRC-32C of header bytes 0..123           everything little endian

The file is written as `<sequence>.building`, the header last; then synced, renamed to `<sequence, 20
digits>.snap`, and the folder is synced. So a file that ends in .snap was complete once; what the checksums
are for is what came after.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from wallet_core.event_log import crc32c

MAGIC = b"DUCS"
MAGIC_END = b"DUCE"
VERSION = 1
HEADER_BYTES = 128
TRAILER_BYTES = 32
PIECE_HEADER = struct.Struct("<II")
PIECE_BYTES_MAX = 8 * 1024 * 1024

_HEADER = struct.Struct("<4sHHHHIQQ16s16sQQQ32xII")
_TRAILER = struct.Struct("<II4sIQQ")
assert _HEADER.size == HEADER_BYTES
assert _TRAILER.size == TRAILER_BYTES


class SnapshotDamaged(Exception):
    """The snapshot does not read back; the one before it, or the whole log, must do."""

    def __init__(self, file: str, offset: int, reason: str) -> None:
        super().__init__(f"snapshot {file} is damaged at byte {offset}: {reason}")
        self.file, self.offset, self.reason = file, offset, reason


@dataclass(frozen=True, slots=True)
class SnapshotHeader:
    """What a snapshot says of itself."""

    shard: int
    epoch: int
    sequence: int
    timestamp_ns: int
    digest: bytes
    frame_hash: bytes
    piece_count: int
    file_bytes: int
    create_time_ns: int
    pieces_crc: int


def pack_header(header: SnapshotHeader) -> bytes:
    """128 bytes."""
    head = _HEADER.pack(
        *(MAGIC, VERSION, HEADER_BYTES, header.shard, 0, header.epoch, header.sequence, header.timestamp_ns),
        *(header.digest, header.frame_hash, header.piece_count, header.file_bytes, header.create_time_ns),
        *(header.pieces_crc, 0),
    )[:-4]
    return head + crc32c(head).to_bytes(4, "little")


def unpack_header(data: bytes, file: str) -> SnapshotHeader:
    """Raises SnapshotDamaged."""
    if len(data) < HEADER_BYTES:
        raise SnapshotDamaged(file, 0, f"{len(data)} bytes, a header has {HEADER_BYTES}")
    (magic, version, header_bytes, shard, _, epoch, sequence, timestamp_ns, digest, frame_hash, pieces, size, created,
     pieces_crc, crc) = _HEADER.unpack(data[:HEADER_BYTES])  # fmt: skip
    if magic != MAGIC or crc32c(data[: HEADER_BYTES - 4]) != crc:
        raise SnapshotDamaged(file, 0, "the header does not match its checksum")
    if version != VERSION or header_bytes != HEADER_BYTES:
        raise SnapshotDamaged(file, 4, f"format version {version}, this program reads {VERSION}")
    return SnapshotHeader(shard, epoch, sequence, timestamp_ns, digest, frame_hash, pieces, size, created, pieces_crc)


def pack_trailer(piece_count: int, file_bytes: int, pieces_crc: int) -> bytes:
    """32 bytes."""
    rest = _TRAILER.pack(0, 0, MAGIC_END, pieces_crc, piece_count, file_bytes)[8:]
    return bytes(4) + crc32c(rest).to_bytes(4, "little") + rest
