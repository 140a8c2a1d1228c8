"""A trace id that follows a payment through every process: W3C trace context in a context variable.

A ``traceparent`` is ``00-<32 hex trace id>-<16 hex span id>-<2 hex flags>``
(https://www.w3.org/TR/trace-context/#traceparent-header). What comes in is bound by the gRPC server, the gateway and
the bus; what goes out is `child()` of it; every log line carries its trace id. Tasks inherit the variable, as every
context variable. Spans exist only with `otel_endpoint` (runtime/telemetry.py).
"""

from __future__ import annotations

import os
import re
from contextvars import ContextVar, Token
from types import TracebackType

__all__ = ["bind", "child", "current", "ensure", "new", "set_current", "trace_id"]

_VALID = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[str] = ContextVar("ducat_traceparent", default="")


def new() -> str:
    """A new traceparent, sampled."""
    random = os.urandom(24).hex()
    return f"00-{random[:32]}-{random[32:]}-01"


def current() -> str:
    """The traceparent of this task, or an empty string outside of any trace."""
    return _current.get()


def trace_id() -> str:
    """The 32 hexadecimal digits of the trace id, or an empty string outside of any trace."""
    return _current.get()[3:35]


def child() -> str:
    """A traceparent for a call or message that goes out: the same trace, a new span, or a new trace."""
    parent = _current.get()
    return f"{parent[:36]}{os.urandom(8).hex()}{parent[52:]}" if parent else new()


def ensure() -> str:
    """The traceparent of this task; binds a new one where there is none."""
    traceparent = _current.get()
    if not traceparent:
        traceparent = new()
        _current.set(traceparent)
    return traceparent


def set_current(traceparent: str) -> str:
    """Binds ``traceparent`` to this task, or a new one where it is empty or malformed; returns what was bound."""
    if _VALID.fullmatch(traceparent) is None:
        traceparent = new()
    _current.set(traceparent)
    return traceparent


class bind:  # noqa: N801 - reads as a statement: `with trace.bind(message.traceparent):`
    """Binds a traceparent for the length of a block; an empty or malformed one starts a new trace."""

    __slots__ = ("_token", "_traceparent")

    def __init__(self, traceparent: str = "") -> None:
        self._traceparent = traceparent if _VALID.fullmatch(traceparent) else new()

    def __enter__(self) -> str:
        self._token: Token[str] = _current.set(self._traceparent)
        return self._traceparent

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._token)
