"""Ids that a caller makes itself, by the rules that the protos name: nothing is asked of the service."""

from __future__ import annotations

import hashlib
import uuid

__all__ = ["ACCOUNT_NAMESPACE", "account_id"]

ACCOUNT_NAMESPACE = uuid.UUID("5c2a2c1e-6f0b-5d3b-9d5e-0b1f7a4c9e21")
"""See `account_id` in ducat/wallet/v1/wallet.proto."""

_NAMESPACE = ACCOUNT_NAMESPACE.bytes


def account_id(name: str) -> bytes:
    """The 16 bytes of UUIDv5(ACCOUNT_NAMESPACE, name) of an account's name, such as ``seller/SELL-XYZ-1/USD``."""
    found = bytearray(hashlib.sha1(_NAMESPACE + name.encode(), usedforsecurity=False).digest()[:16])
    found[6] = 0x50 | (found[6] & 0x0F)
    found[8] = 0x80 | (found[8] & 0x3F)
    return bytes(found)
