"""Which adapters exist: one line a PSP."""

from __future__ import annotations

from collections.abc import Callable

from executor.psp.base import PspAdapter, PspConfig
from executor.psp.sandbox import SandboxPsp

__all__ = ["ADAPTERS"]

ADAPTERS: dict[str, Callable[[PspConfig], PspAdapter]] = {
    "sandbox": SandboxPsp,
}
"""By the name that a configured PSP gives as its `adapter`."""
