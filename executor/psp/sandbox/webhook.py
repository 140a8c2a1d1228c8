"""The sandbox's webhook signature: header `Sandbox-Signature`, built like Stripe's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from executor.psp.base import verify_timestamped_hmac

__all__ = ["HEADER", "verify"]

HEADER = "sandbox-signature"


def verify(headers: Mapping[str, str], body: bytes, secrets: Sequence[str], now_s: int) -> None:
    """Raises PermissionDenied (SIGNATURE_INVALID) unless the body is signed with one of `secrets`, and lately."""
    verify_timestamped_hmac(headers.get(HEADER, ""), body, secrets, now_s, name="Sandbox-Signature")
