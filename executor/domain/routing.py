"""Which PSP takes an order: the one that was asked for, else by currency, capability, health and weight, stable by the order's id."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Capability", "Provider", "candidates", "takes"]


class Capability(Enum):
    """What a PSP can do, as its adapter declares it."""

    PAY_IN = "pay_in"
    REFUND = "refund"
    PAYOUT = "payout"
    CANCEL = "cancel"
    QUERY = "query"


@dataclass(frozen=True, slots=True)
class Provider:
    """A configured PSP as routing sees it. `currency_codes` empty: all."""

    name: str
    capabilities: frozenset[Capability]
    currency_codes: frozenset[str] = frozenset()
    weight: int = 1


def takes(provider: Provider, capability: Capability, currency_code: str) -> bool:
    """True where the PSP can do this in this currency."""
    return capability in provider.capabilities and (
        not provider.currency_codes or currency_code in provider.currency_codes
    )


def candidates(
    providers: Iterable[Provider],
    *,
    reference: str,
    currency_code: str,
    capability: Capability,
    requested: str = "",
    unhealthy: frozenset[str] = frozenset(),
) -> list[str]:
    """Names of the PSPs that may take it, best first; empty where none can.

    A PSP that was asked for is the only candidate, healthy or not. Otherwise healthy ones come first, and among them the order is a
    weighted rendezvous hash: each reference keeps its order of PSPs in every process, and a PSP that goes or comes moves only its share.
    Unhealthy ones stay in the list, last: when nobody is healthy, somebody must still be tried. Weight 0 takes only what asks for it.
    """
    able = [provider for provider in providers if takes(provider, capability, currency_code)]
    if requested:
        return [requested] if any(provider.name == requested for provider in able) else []
    if len(able) == 1:
        return [able[0].name] if able[0].weight > 0 else []
    ranked = sorted(
        (provider for provider in able if provider.weight > 0),
        key=lambda provider: (provider.name in unhealthy, -_score(provider, reference), provider.name),
    )
    return [provider.name for provider in ranked]


def _score(provider: Provider, reference: str) -> float:
    digest = hashlib.blake2b(f"{provider.name}/{reference}".encode(), digest_size=8).digest()
    share = (int.from_bytes(digest, "big") + 1) / (2**64 + 1)
    return provider.weight / -math.log(share)
