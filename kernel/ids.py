"""Deterministic ids: the same business fact gives the same id in every process and at every replay.

Account ids are UUIDv5 of the account's name. Transfer ids must be UUIDs of version 7 (the wallet's memory of ids is
bounded by their time), so ids that are derived from a business fact are *shaped* like version 7: the 48-bit time is
the fact's own time in milliseconds and the remaining bits come from a SHA-256 of what the fact is. See
docs/decisions/0001-transfer-ids.md.
"""

from __future__ import annotations

import hashlib
import uuid

__all__ = [
    "ACCOUNT_NAMESPACE",
    "EVENT_NAMESPACE",
    "account_id",
    "derived_event_id",
    "derived_transfer_id",
    "time_ms_of",
    "uuid7",
]

ACCOUNT_NAMESPACE = uuid.UUID("5c2a2c1e-6f0b-5d3b-9d5e-0b1f7a4c9e21")
EVENT_NAMESPACE = uuid.UUID("8a1de2a0-3f0c-5b9e-8b55-7f7a0a3f4d10")

_NAMESPACE_OF_ACCOUNTS = ACCOUNT_NAMESPACE.bytes
_TIME_MS_MAX = (1 << 48) - 1


def account_id(name: str) -> bytes:
    """16 bytes: UUIDv5 of an account's name, such as ``seller/SELL-XYZ-1/USD``. By hand: uuid.uuid5 costs five times as much."""
    found = bytearray(hashlib.sha1(_NAMESPACE_OF_ACCOUNTS + name.encode(), usedforsecurity=False).digest()[:16])
    found[6] = 0x50 | (found[6] & 0x0F)
    found[8] = 0x80 | (found[8] & 0x3F)
    return bytes(found)


def derived_event_id(kind: str, reference: str) -> str:
    """A UUIDv5 as text for an event that has a natural key, such as ``("payment_order_succeeded", "ORD-123-A")``."""
    return str(uuid.uuid5(EVENT_NAMESPACE, f"{kind}/{reference}"))


def derived_transfer_id(time_ms: int, kind: str, reference: str) -> bytes:
    """16 bytes, shaped like a UUID of version 7: ``time_ms`` is when the business fact happened (unix milliseconds,
    stored with the fact, so that a replay gives the same id), ``kind`` and ``reference`` say what it is, such as
    ``("capture", "ORD-123-A")``.
    """
    return _version_7(time_ms, hashlib.sha256(f"{time_ms}/{kind}/{reference}".encode()).digest()[:10])


def uuid7(time_ms: int, random: bytes) -> bytes:
    """16 bytes: a UUID of version 7 from the time in unix milliseconds and ten random bytes (74 bits of them are
    used)."""
    if len(random) != 10:
        raise ValueError(f"random: expected 10 bytes, got {len(random)}")
    return _version_7(time_ms, random)


def time_ms_of(transfer_id: bytes) -> int:
    """The unix milliseconds in a UUID of version 7."""
    return int.from_bytes(transfer_id[:6], "big")


def _version_7(time_ms: int, rest: bytes) -> bytes:
    if not 0 < time_ms <= _TIME_MS_MAX:
        raise ValueError(f"time_ms: expected 1 to {_TIME_MS_MAX}, got {time_ms}")
    body = bytearray(rest)
    body[0] = 0x70 | (body[0] & 0x0F)
    body[2] = 0x80 | (body[2] & 0x3F)
    return time_ms.to_bytes(6, "big") + bytes(body)
