"""The one table of errors, and what foreign errors become."""

from __future__ import annotations

import inspect

import asyncpg
import pytest
import redis.exceptions

from ducat import errors as client_errors
from ducat.common.v1 import common_pb2
from kernel import errors as kernel_errors
from kernel.errors import DeadlineExceeded, DucatError, Internal, InvalidArgument, NotFound, Unavailable
from runtime import errors

KERNEL = {
    each
    for _, each in inspect.getmembers(kernel_errors, inspect.isclass)
    if issubclass(each, DucatError)
    and each is not kernel_errors.NotPermitted  # of our own dependencies: Unavailable to callers
}
REASONS = {name.removeprefix("ERROR_REASON_") for name in common_pb2.ErrorReason.keys()}  # noqa: SIM118


def test_every_error_has_one_row_and_a_code_of_its_own() -> None:
    assert {row.error for row in errors.TABLE} == KERNEL - {DucatError}
    assert len({row.code for row in errors.TABLE}) == len(errors.TABLE)


def test_every_default_reason_is_in_the_contract() -> None:
    assert {each.default_reason for each in KERNEL} <= REASONS


def test_the_client_has_the_same_tree() -> None:
    ours = {each.__name__ for each in KERNEL}
    theirs = {
        name
        for name, each in inspect.getmembers(client_errors, inspect.isclass)
        if issubclass(each, client_errors.DucatError)
    }
    assert theirs == ours | {"Cancelled"}


def test_a_subclass_goes_out_as_its_base() -> None:
    class OrderNotFound(NotFound):
        pass

    assert errors.row_of(OrderNotFound("x")).error is NotFound
    assert errors.http_status_of(OrderNotFound("x")) == 404
    assert errors.row_of(DucatError("x")).error is Internal


@pytest.mark.parametrize(
    ("foreign", "dependency"),
    [
        (asyncpg.ConnectionDoesNotExistError("gone"), "postgres"),
        (asyncpg.CannotConnectNowError("starting up"), "postgres"),
        (asyncpg.TooManyConnectionsError("full"), "postgres"),
        (asyncpg.AdminShutdownError("stopping"), "postgres"),
        (asyncpg.QueryCanceledError("statement timeout"), "postgres"),
        (asyncpg.OutOfMemoryError("out of memory"), "postgres"),
        (asyncpg.DiskFullError("no space left"), "postgres"),
        (asyncpg.PostgresIOError("input/output error"), "postgres"),
        (asyncpg.ReadOnlySQLTransactionError("a standby"), "postgres"),
        (asyncpg.InterfaceError("connection is closed"), "postgres"),
        (asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"), "postgres"),
        (redis.exceptions.ConnectionError("gone"), "valkey"),
        (redis.exceptions.TimeoutError("slow"), "valkey"),
        (redis.exceptions.BusyLoadingError("loading"), "valkey"),
        (ConnectionRefusedError(111, "refused"), "network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_dependency_that_does_not_answer_is_unavailable(foreign: Exception, dependency: str) -> None:
    error = errors.as_ducat_error(foreign)
    assert type(error) is Unavailable
    assert error.metadata["dependency"] == dependency


def test_a_timeout_leaves_the_outcome_unknown() -> None:
    assert type(errors.as_ducat_error(TimeoutError())) is DeadlineExceeded


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("secret detail"),
        KeyError("secret detail"),
        asyncpg.UniqueViolationError("secret detail"),
        asyncpg.InterfaceError("secret detail"),
        redis.exceptions.ResponseError("secret detail"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_a_bug_and_gives_nothing_away(bug: Exception) -> None:
    error = errors.as_ducat_error(bug)
    assert type(error) is Internal
    assert "secret" not in error.message + str(error.metadata)
    _, message, raw = errors.to_status(error)
    assert "secret" not in message
    assert b"secret" not in raw


def test_ours_pass_as_they_are() -> None:
    error = NotFound("x")
    assert errors.as_ducat_error(error) is error


def test_text_that_postgresql_cannot_hold_is_the_callers_mistake() -> None:
    """Risk: a NUL in any field of any call is answered as if it were our bug."""
    known = errors.as_ducat_error(
        asyncpg.CharacterNotInRepertoireError('invalid byte sequence for encoding "UTF8": 0x00')
    )
    assert isinstance(known, InvalidArgument)
    assert "NUL" in known.message
