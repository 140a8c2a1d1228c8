"""Risk: a task beside the core stops the process, spins, floods the log, or swallows a cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg
import grpc
import pytest
import redis.exceptions
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from kernel.errors import Unavailable
from runtime import supervise
from runtime.bus import Bus, Message, is_transient
from runtime.bus.late import LateBus
from runtime.process import Process, ProcessCrashed
from runtime.settings import Settings, SettingsInvalid
from runtime.supervise import FailureLog, keep_running


async def test_a_task_that_raises_runs_again_until_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RETRY_S", (0.0,))
    errors = [ValueError("a bug"), redis.exceptions.TimeoutError("stalled"), ExceptionGroup("two", [OSError(5)])]

    async def work() -> None:
        if errors:
            raise errors.pop()

    await asyncio.wait_for(keep_running("work", work), 10)
    assert errors == []


class _Mute(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


_ODD: list[Callable[[], BaseException]] = [
    lambda: ValueError("a bug"),
    lambda: _Mute(),
    lambda: StopAsyncIteration(),
    lambda: BaseExceptionGroup("odd", [asyncio.CancelledError(), ValueError("inside")]),
    lambda: asyncio.CancelledError(),  # of something that work waited for: nobody cancelled work
    lambda: RecursionError("deep"),
    lambda: MemoryError(),
    lambda: grpc.RpcError(),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"),
    lambda: type("Bare", (BaseException,), {})("no Exception at all"),
]


@pytest.mark.parametrize("make", _ODD, ids=lambda make: type(make()).__name__)
async def test_no_odd_error_of_a_task_ends_the_process_or_stays_silent(
    make: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "RETRY_S", (0.0,))
    name = f"odd {type(make()).__name__}"
    process = Process.start("ledger", Settings())
    runs = 0
    well = asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs <= 3:
            raise make()
        well.set()
        await asyncio.Event().wait()

    with capture_logs() as logs:
        task = process.keep(work, name=name)
        await asyncio.wait_for(well.wait(), 10)
    assert not process.is_stopping
    assert REGISTRY.get_sample_value("ducat_task_failures_total", {"task": name}) == 3
    (line,) = [one for one in logs if one["log_level"] == "error"]
    assert line["task"] == name
    assert isinstance(line["exc_info"], BaseException)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_failure_whose_text_changes_has_one_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RETRY_S", (0.0,))
    texts = ["id 1", "id 2", "id 3"]

    async def work() -> None:
        if texts:
            raise KeyError(texts.pop(0))

    with capture_logs() as logs:
        await keep_running("work", work)
    assert [bool(line["exc_info"]) for line in logs] == [True, False, False]
    assert [line["error"] for line in logs] == [f"KeyError: 'id {n}'" for n in (1, 2, 3)]


async def test_what_a_group_of_failures_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own text is the same whatever is in it, and an outage needs no traceback there either."""
    monkeypatch.setattr(supervise, "RETRY_S", (0.0,))
    errors = [ExceptionGroup("timers", [OSError("away"), ExceptionGroup("more", [Unavailable("no broker")])])]

    async def work() -> None:
        if errors:
            raise errors.pop()

    with capture_logs() as logs:
        await keep_running("work", work)
    (line,) = logs
    assert (line["error"], line["exc_info"]) == ("OSError: away; Unavailable: no broker", None)


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: ExceptionGroup("two", [OSError(), error])])
async def test_wrong_settings_stop_the_process_cleanly(wrap: Callable[[Exception], Exception]) -> None:
    async def work() -> None:
        raise wrap(SettingsInvalid("auth_token would cross the network in the clear"))

    process = Process.start("ledger", Settings())
    with capture_logs() as logs:
        process.keep(work, name="work")
        await asyncio.wait_for(process.until_stopped(), 10)
    assert [line["event"] for line in logs] == ["a task crashed, so the process stops"]
    with pytest.raises((SettingsInvalid, ProcessCrashed), match=r"in the clear|two"):
        await process.__aexit__(None, None, None)


async def test_an_error_while_a_task_is_stopped_does_not_begin_it_again() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("cannot close")

    task = asyncio.ensure_future(keep_running("work", work))
    await begun.wait()
    task.cancel()
    with capture_logs() as logs, pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert [line["event"] for line in logs] == ["a task failed while it was stopped"]


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
