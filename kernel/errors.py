"""Every error that a caller can see.

    DucatError                       reason, message, metadata
    ├── InvalidArgument              + violations: one FieldViolation a wrong field
    ├── NotFound
    ├── AlreadyExists                same idempotency key, other content
    ├── FailedPrecondition           the state does not allow it
    ├── OutOfRange                   a position that the log no longer, or not yet, has
    ├── ResourceExhausted            a named limit
    ├── Unavailable                  a dependency does not answer; retry
    ├── DeadlineExceeded             unknown outcome; retry with the same key
    ├── Unauthenticated
    ├── PermissionDenied             scope or webhook signature
    ├── Unimplemented
    └── Internal                     a bug

`reason` is a name of ducat.common.v1.ErrorReason without its prefix. The gRPC status and the HTTP status of each
class, and the way back, are one table in runtime/errors.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "AlreadyExists",
    "DeadlineExceeded",
    "DucatError",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "NotPermitted",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path (``payment_orders[0].amount``) and what was expected, what came, what to do."""

    field: str
    description: str


class DucatError(Exception):
    """Base of every error that a caller can see."""

    default_reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidArgument(DucatError):
    """The request breaks a rule; a retry cannot help."""

    default_reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)


class NotFound(DucatError):
    """The named resource does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExists(DucatError):
    """The same idempotency key was used before with other content."""

    default_reason = "IDEMPOTENCY_MISMATCH"


class FailedPrecondition(DucatError):
    """The state of the resource does not allow this."""

    default_reason = "INVALID_STATE"


class OutOfRange(DucatError):
    """A position that is no longer, or not yet, there."""

    default_reason = "SEQUENCE_OUT_OF_RANGE"


class ResourceExhausted(DucatError):
    """A named limit is reached; retry with backoff."""

    default_reason = "OVERLOADED"


class Unavailable(DucatError):
    """A dependency does not answer; retry with backoff."""

    default_reason = "UNAVAILABLE"


class NotPermitted(Unavailable):
    """A dependency is there and does not take our user, our password or our commands: a retry helps once somebody has changed that."""


class DeadlineExceeded(DucatError):
    """The deadline passed and the outcome is unknown; retry with the same idempotency key."""

    default_reason = "DEADLINE_EXCEEDED"


class Unauthenticated(DucatError):
    """No token, or one that is not known."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(DucatError):
    """The token lacks a scope, or a webhook's signature does not hold."""

    default_reason = "SCOPE_MISSING"


class Unimplemented(DucatError):
    """Part of the contract, not served here; the message says what to use."""

    default_reason = "UNIMPLEMENTED"


class Internal(DucatError):
    """A bug."""

    default_reason = "INTERNAL"
