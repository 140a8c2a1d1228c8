"""What the sandbox PSP can do: everything, in every currency, with ISO 4217's exponents."""

from __future__ import annotations

from executor.domain.routing import Capability
from executor.psp.base import Capabilities

__all__ = ["CAPABILITIES"]

CAPABILITIES = Capabilities(operations=frozenset(Capability))
