"""What a call can raise: one class a canonical status, with the reason that the service gave.

    DucatError                       code, reason, message, metadata, violations, method, trace_id
    ├── InvalidArgument              a field rule is broken; `violations` names each field. A retry cannot help
    ├── NotFound
    ├── AlreadyExists                IDEMPOTENCY_MISMATCH: the same key was used before with other content
    ├── FailedPrecondition           the state does not allow it
    ├── OutOfRange                   a position that the log no longer, or not yet, has
    ├── Unauthenticated              no token, or one that is not known
    ├── PermissionDenied             the token lacks a scope: metadata["scope"]
    ├── ResourceExhausted            a named limit: metadata["limit"]; retry with backoff
    ├── Unavailable                  nothing answered, and the client's own retries are used up
    ├── DeadlineExceeded             the outcome is unknown: send the same request, with the same key, again
    ├── Cancelled                    the call was cancelled, by you or by the server's stop; the outcome is unknown
    ├── Unimplemented                part of the contract, not served there; the message says what to use
    └── Internal                     a bug of the service: report it with `trace_id`

`reason` is a name of ducat.common.v1.ErrorReason without its prefix, such as ``INSUFFICIENT_FUNDS``; decide by it,
never by the message.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "AlreadyExists",
    "Cancelled",
    "DeadlineExceeded",
    "DucatError",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "error_of",
]

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path (``payment_orders[0].amount``) and what is wrong."""

    field: str
    description: str


class DucatError(Exception):
    """Base of every error that a call raises."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        method: str = "",
        trace_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        """The canonical status."""
        self.reason = reason
        """A name of ErrorReason without its prefix; empty where no Ducat process answered."""
        self.metadata = metadata or {}
        """Facts that belong to the reason, such as ``scope``, ``state`` or ``limit``."""
        self.violations = violations
        """Each wrong field, where the request was invalid."""
        self.method = method
        """The method that was called, such as ``ducat.payment.v1.PaymentService/CreatePayment``."""
        self.trace_id = trace_id
        """Finds this call in the logs of every process."""

    def __str__(self) -> str:
        text = f"{self.reason or self.code.name}: {self.message}"
        for violation in self.violations:
            text += f"\n  {violation.field}: {violation.description}"
        return text


class InvalidArgument(DucatError):
    """A field rule is broken."""


class NotFound(DucatError):
    """There is no such thing."""


class AlreadyExists(DucatError):
    """The same idempotency key was used before with other content."""


class FailedPrecondition(DucatError):
    """The state does not allow it."""


class OutOfRange(DucatError):
    """A position that is no longer, or not yet, there."""


class Unauthenticated(DucatError):
    """No token, or one that is not known."""


class PermissionDenied(DucatError):
    """The token lacks a scope."""


class ResourceExhausted(DucatError):
    """A named limit is reached."""


class Unavailable(DucatError):
    """Nothing answered."""


class DeadlineExceeded(DucatError):
    """The outcome is unknown."""


class Cancelled(DucatError):
    """The call was cancelled; the outcome is unknown."""


class Unimplemented(DucatError):
    """Not served there."""


class Internal(DucatError):
    """A bug of the service."""


_CLASSES: dict[grpc.StatusCode, type[DucatError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.DATA_LOSS: Internal,
}


def error_of(error: grpc.RpcError, *, method: str = "", trace_id: str = "") -> DucatError:
    """The typed error of an RpcError of grpc or grpc.aio; raise it ``from`` that."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return Internal(str(error), code=grpc.StatusCode.UNKNOWN, method=method, trace_id=trace_id)
    code = error.code()
    reason = ""
    metadata: dict[str, str] = {}
    violations: tuple[FieldViolation, ...] = ()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            reason, metadata, violations = _details_of(value)
    cls = _CLASSES.get(code, Internal)
    return cls(
        error.details() or code.name,
        code=code,
        reason=reason,
        metadata=metadata,
        violations=violations,
        method=method,
        trace_id=metadata.get("trace_id") or trace_id,
    )


def _details_of(raw: bytes) -> tuple[str, dict[str, str], tuple[FieldViolation, ...]]:
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    for detail in status_pb2.Status.FromString(raw).details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            violations += [FieldViolation(each.field, each.description) for each in bad_request.field_violations]
    return reason, metadata, tuple(violations)
