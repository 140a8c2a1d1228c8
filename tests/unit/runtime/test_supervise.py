"""Risk: a task beside the core stops the process, spins, floods the log, or swallows a cancel."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import redis.exceptions

from kernel.errors import Unavailable
from runtime import supervise
from runtime.bus import Bus, Message, is_transient
from runtime.bus.late import LateBus
from runtime.supervise import FailureLog, keep_running


async def test_a_task_that_raises_runs_again_until_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RETRY_S", (0.0,))
    errors = [ValueError("a bug"), redis.exceptions.TimeoutError("stalled"), ExceptionGroup("two", [OSError(5)])]

    async def work() -> None:
        if errors:
            raise errors.pop()

    await asyncio.wait_for(keep_running("work", work), 10)
    assert errors == []


async def test_a_cancel_ends_it_at_work_and_between_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RETRY_S", (60.0,))
    begun = asyncio.Event()

    async def stay() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def fail() -> None:
        begun.set()
        raise ValueError("a bug")

    for work in (stay, fail):
        begun.clear()
        task = asyncio.ensure_future(keep_running("work", work))
        await begun.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_same_failure_is_logged_once_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    log = FailureLog()
    assert [log.is_due(text) for text in ("a", "a", "b", "b", "a")] == [True, False, True, False, True]
    monkeypatch.setattr(supervise, "LOG_INTERVAL_S", 0.0)
    assert log.is_due("a")


class _Bus:
    def __init__(self) -> None:
        self.published: list[Message] = []
        self.consumed: list[object] = []

    async def publish(self, messages: list[Message]) -> None:
        self.published += messages

    async def consume(self, *what: object, **options: object) -> None:
        self.consumed += [*what[:2], options]


async def test_a_bus_that_is_not_open_yet_refuses_to_publish_and_lets_consumers_wait() -> None:
    inner, tries = _Bus(), [Unavailable("no broker")]

    async def open_it() -> Bus:
        if tries:
            raise tries.pop()
        return inner  # type: ignore[return-value]

    async def handle(messages: object) -> None: ...

    bus = LateBus(open_it)
    message = Message("topic", "key", "id", b"")
    with pytest.raises(Unavailable, match="publish again later"):
        await bus.publish([message])
    waiting = asyncio.ensure_future(bus.consume("topic", "group", handle, batch_max=7))
    gone = asyncio.ensure_future(bus.consume("topic", "gone", handle))
    await asyncio.sleep(0)
    gone.cancel()  # must not take the opening away from the others
    with pytest.raises(Unavailable, match="no broker"):
        await bus.run()
    assert not waiting.done()
    await bus.run()
    await bus.run()
    await waiting
    await bus.publish([message])
    assert (inner.published, inner.consumed) == ([message], ["topic", "group", {"batch_max": 7}])


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.OutOfMemoryError("out of memory"),
        asyncpg.QueryCanceledError("statement timeout"),
        asyncpg.PostgresIOError("input/output error"),
        asyncpg.ReadOnlySQLTransactionError("a standby"),
        asyncpg.UndefinedTableError("not migrated"),
        asyncpg.InsufficientPrivilegeError("no right"),
        asyncpg.DeadlockDetectedError("deadlock"),
        asyncpg.ConnectionDoesNotExistError("cut"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_database_lacks_makes_no_dead_letter(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error", [asyncpg.UniqueViolationError(""), asyncpg.NumericValueOutOfRangeError(""), KeyError()]
)
def test_what_is_wrong_with_a_message_counts(error: Exception) -> None:
    assert not is_transient(error)
