"""One table: DucatError class ↔ gRPC status ↔ HTTP status, and the two borders where errors cross it.

Out: `to_status` makes the rich status (google.rpc.Status with ErrorInfo{reason, domain "ducat", metadata} and, for
invalid input, BadRequest) that the gRPC server sends. Back: `from_rpc_error` makes the same typed error of it in the
caller's process. `as_ducat_error` is where foreign errors (PostgreSQL, Valkey, gRPC, timeouts) become ours; what it
does not know is a bug: Internal, with a message that gives nothing away but the trace id.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2

from kernel.errors import (
    AlreadyExists,
    DeadlineExceeded,
    DucatError,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from runtime import trace

__all__ = [
    "DETAILS_KEY",
    "DOMAIN",
    "RETRY_AFTER_KEY",
    "TABLE",
    "Row",
    "as_ducat_error",
    "from_rpc_error",
    "http_status_of",
    "raise_from_rpc_error",
    "row_of",
    "to_status",
    "typed_rpc_errors",
]

DOMAIN = "ducat"
RETRY_AFTER_KEY = "retry_after_s"
"""Metadata of an error: whole seconds after which a retry makes sense. Goes out as google.rpc.RetryInfo too, and at the REST edge
as Retry-After."""
DETAILS_KEY = "grpc-status-details-bin"
VIOLATIONS_MAX = 100
"""Most field violations in one answer: a status travels in trailing metadata, which is bounded."""
TEXT_BYTES_MAX = 600
"""Of a message or a metadata value. A message travels twice: in the status, and as grpc-message, where percent-encoding
may make it three times as long."""
STATUS_BYTES_MAX = 4_000
"""gRPC drops trailing metadata above 8 KiB, and the whole status with it; base64 adds a third."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    error: type[DucatError]
    code: grpc.StatusCode
    http_status: int


TABLE: tuple[Row, ...] = (
    Row(InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT, 400),
    Row(NotFound, grpc.StatusCode.NOT_FOUND, 404),
    Row(AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, 409),
    Row(FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION, 409),
    Row(OutOfRange, grpc.StatusCode.OUT_OF_RANGE, 416),
    Row(ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    Row(Unavailable, grpc.StatusCode.UNAVAILABLE, 503),
    Row(DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    Row(Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, 401),
    Row(PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, 403),
    Row(Unimplemented, grpc.StatusCode.UNIMPLEMENTED, 501),
    Row(Internal, grpc.StatusCode.INTERNAL, 500),
)

_BY_CLASS = {row.error: row for row in TABLE}
_BY_CODE = {row.code: row for row in TABLE} | {
    grpc.StatusCode.CANCELLED: _BY_CLASS[
        Unavailable
    ],  # the peer went away in the middle: outcome unknown, retry with the same key
    grpc.StatusCode.ABORTED: _BY_CLASS[Unavailable],
    grpc.StatusCode.UNKNOWN: _BY_CLASS[Internal],
    grpc.StatusCode.DATA_LOSS: _BY_CLASS[Internal],
}


def row_of(error: DucatError) -> Row:
    """The row of an error's class, or of the nearest base that has one."""
    for cls in type(error).__mro__:
        row = _BY_CLASS.get(cls)
        if row is not None:
            return row
    return _BY_CLASS[Internal]


def http_status_of(error: DucatError) -> int:
    """The HTTP status of an error at the REST edge."""
    return row_of(error).http_status


def to_status(error: DucatError) -> tuple[grpc.StatusCode, str, bytes]:
    """The gRPC code, the message, and the serialized google.rpc.Status that goes out as trailing metadata
    ``DETAILS_KEY``.

    An Internal error carries its ``trace_id``, so that a caller can name it.
    """
    row = row_of(error)
    message = _cut(error.message)
    metadata = {key: _cut(value) for key, value in error.metadata.items()}
    if row.error is Internal:
        metadata.setdefault("trace_id", trace.trace_id())
    violations = error.violations[:VIOLATIONS_MAX] if isinstance(error, InvalidArgument) else ()
    while True:
        raw = _status(row, error.reason, message, metadata, violations).SerializeToString()
        if len(raw) <= STATUS_BYTES_MAX or not violations:
            return row.code, message, raw
        violations = violations[: len(violations) // 2]


def _cut(text: str) -> str:
    raw = text.encode(errors="replace")
    return text if len(raw) <= TEXT_BYTES_MAX else raw[: TEXT_BYTES_MAX - 3].decode(errors="ignore") + "…"


def _status(
    row: Row, reason: str, message: str, metadata: dict[str, str], violations: Sequence[FieldViolation]
) -> status_pb2.Status:
    status = status_pb2.Status(code=row.code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    if metadata.get(RETRY_AFTER_KEY, "").isdecimal():
        retry_info = error_details_pb2.RetryInfo()
        retry_info.retry_delay.seconds = int(metadata[RETRY_AFTER_KEY])
        status.details.add().Pack(retry_info)
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for violation in violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad_request)
    return status


def from_rpc_error(error: grpc.RpcError) -> DucatError:
    """The typed error that a server raised, of the RpcError that its caller got. Raise it ``from`` the RpcError."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    message = (error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None) or str(code.name)
    row = _BY_CODE.get(code, _BY_CLASS[Internal])
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    status = status_pb2.Status()
    raw = _details_of(error)
    if raw is not None:
        status.ParseFromString(raw)
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            violations += [FieldViolation(each.field, each.description) for each in bad_request.field_violations]
    if row.error is InvalidArgument:
        return InvalidArgument(message, violations=violations, reason=reason, metadata=metadata)
    return row.error(message, reason=reason, metadata=metadata)


def raise_from_rpc_error(error: grpc.RpcError) -> NoReturn:
    """Raises the typed error of an RpcError."""
    raise from_rpc_error(error) from error


@contextmanager
def typed_rpc_errors() -> Iterator[None]:
    """Turns every RpcError of a block into its typed error: ``with typed_rpc_errors(): await stub.Get…(request)``."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def _details_of(error: grpc.RpcError) -> bytes | None:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return None
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return value if isinstance(value, bytes) else value.encode()
    return None


def as_ducat_error(error: BaseException) -> DucatError:
    """What a caller is told about any error: ours as it is; a dependency that does not answer as Unavailable; a passed
    deadline as DeadlineExceeded; anything else is a bug and says only so.
    """
    if isinstance(error, DucatError):
        return error
    if isinstance(error, grpc.RpcError):
        inner = from_rpc_error(error)
        if isinstance(inner, Unavailable | DeadlineExceeded | ResourceExhausted):
            return inner
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return DeadlineExceeded("the deadline passed; the outcome is unknown: retry with the same idempotency key")
    if _is_unstorable_text(error):
        return InvalidArgument("text must not hold the character NUL")
    if _is_dependency_down(error):
        return Unavailable(
            "a dependency does not answer; retry with backoff", metadata={"dependency": _dependency(error)}
        )
    return Internal("internal error; report it with the trace_id of the metadata")


def _is_dependency_down(error: BaseException) -> bool:
    """Looks drivers up in sys.modules: a process that never imported one cannot have raised its errors."""
    if isinstance(error, ConnectionError):
        return True
    asyncpg = sys.modules.get("asyncpg")
    if asyncpg is not None and isinstance(
        error,
        asyncpg.PostgresConnectionError
        | asyncpg.InsufficientResourcesError
        | asyncpg.OperatorInterventionError
        | asyncpg.PostgresSystemError
        | asyncpg.ReadOnlySQLTransactionError
        | asyncpg.InternalClientError  # what a connection says that was cut in the middle of a statement
        | asyncpg.InterfaceError,
    ):
        return not isinstance(error, asyncpg.InterfaceError) or "clos" in str(error)
    redis = sys.modules.get("redis.exceptions")
    return redis is not None and isinstance(
        error, redis.ConnectionError | redis.TimeoutError | redis.BusyLoadingError | redis.ReadOnlyError
    )


def _is_unstorable_text(error: BaseException) -> bool:
    """NUL is fine in a protobuf string and in no PostgreSQL text; whatever text is stored or looked up came from a caller."""
    asyncpg = sys.modules.get("asyncpg")
    return asyncpg is not None and isinstance(
        error, asyncpg.CharacterNotInRepertoireError | asyncpg.UntranslatableCharacterError
    )


def _dependency(error: BaseException) -> str:
    module = type(error).__module__.partition(".")[0]
    return {"asyncpg": "postgres", "redis": "valkey"}.get(module, "network")
