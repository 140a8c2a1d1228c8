"""The PSP on your own machine (sandbox/), spoken to like any other."""

from executor.psp.sandbox.client import SandboxPsp

__all__ = ["SandboxPsp"]
