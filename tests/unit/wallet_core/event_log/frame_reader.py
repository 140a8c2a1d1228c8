"""An independent reader of format version 1, written from docs/event-log-format.md with the standard library only."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

_TABLE = []
for _n in range(256):
    for _ in range(8):
        _n = (_n >> 1) ^ 0x82F63B78 if _n & 1 else _n >> 1
    _TABLE.append(_n)


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 255] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def read_segment(data: bytes, previous_hash: bytes = bytes(16)) -> list[dict[str, object]]:
    """Every frame of a segment, with each rule of the format asserted."""
    frames: list[dict[str, object]] = []
    at = 0
    while at + 96 <= len(data) and any(data[at : at + 96]):
        head = data[at : at + 96]
        magic, version, header_bytes, shard, flags, epoch = struct.unpack_from("<4sHHHHI", head, 0)
        first, count, body_bytes, timestamp_ns, durable = struct.unpack_from("<QIIQQ", head, 16)
        record_bytes, body_crc, header_crc = struct.unpack("<H6xII", head[80:])
        assert (magic, version, header_bytes, flags) == (b"DUCF", 1, 96, 0)
        assert crc32c(head[:92]) == header_crc
        assert head[48:64] == previous_hash
        body = data[at + 96 : at + 96 + body_bytes]
        assert crc32c(body) == body_crc
        assert count * record_bytes == body_bytes
        previous_hash = hashlib.sha256(head).digest()[:16]
        frames.append(
            {
                "shard": shard, "epoch": epoch, "first_sequence": first, "count": count, "timestamp_ns": timestamp_ns,
                "durable_sequence": durable, "digest": head[64:80], "body": body, "hash": previous_hash,
            }
        )  # fmt: skip
        at += 96 + (body_bytes + 7) // 8 * 8
    assert not any(data[at:])
    return frames


def read_file(path: Path) -> list[dict[str, object]]:
    return read_segment(path.read_bytes())
