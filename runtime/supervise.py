"""Tasks that go on: what a task of a process raises is counted, logged and tried again, and stops nothing else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from traceback import walk_tb

from kernel.errors import DucatError
from runtime.logs import get_logger
from runtime.metrics import counter

__all__ = ["FailureLog", "keep_running"]

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RAN_WELL_S = 30.0
"""A run that lasted so long counts as a success: the next failure is tried again at once."""
LOG_INTERVAL_S = 60.0
"""How often the same failure is logged while it lasts."""
TEXT_LENGTH_MAX = 2_000

_failed = counter("ducat_task_failures_total", "Runs of a task that ended with an error and began again.", ("task",))
_log = get_logger("supervise")


class FailureLog:
    """Says whether a failure is worth a line: one that is new, or that has lasted for another `LOG_INTERVAL_S`."""

    def __init__(self) -> None:
        self._text = ""
        self._told_s = 0.0

    def is_due(self, text: str) -> bool:
        """Whether `text` is to be logged now; True is said once."""
        now_s = asyncio.get_running_loop().time()
        if text == self._text and now_s - self._told_s < LOG_INTERVAL_S:
            return False
        self._text, self._told_s = text, now_s
        return True


async def keep_running(
    name: str, work: Callable[[], Awaitable[object]], *, fatal: tuple[type[BaseException], ...] = ()
) -> None:
    """Runs `work()`, again with backoff whenever it raises; returns where it returns.

    Only a cancel of this task ends it otherwise, or an error of `fatal`, which it raises: a mistake that another run cannot mend. A
    cancel that comes out of `work` by itself (something that it waited for was cancelled) is a failure like others.

    For tasks that can begin anew at any time. What makes it wrong to go on, such as a failed sync of a shard, does not belong here.
    """
    loop = asyncio.get_running_loop()
    failures = FailureLog()
    traced: tuple[object, ...] = ()
    count = 0
    while True:
        begin_s = loop.time()
        try:
            await work()
            return
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            if any(isinstance(one, fatal) for one in _leaves(error)):
                raise
            if _is_cancelled():
                if isinstance(error, asyncio.CancelledError):
                    raise
                _log.warning("a task failed while it was stopped", task=name, error=_text(error), exc_info=error)
                raise asyncio.CancelledError from error
            _failed.labels(name).inc()
            count = 0 if loop.time() - begin_s >= RAN_WELL_S else count
            delay_s = RETRY_S[min(count, len(RETRY_S) - 1)] * (0.75 + random.random() / 2)  # noqa: S311 - jitter, not a secret
            count += 1
            text = _text(error)
            if failures.is_due(text):
                place = _place(error)
                trace = None if place == traced or all(map(_says_all, _leaves(error))) else error
                traced = place if trace is not None else traced
                _log.error(
                    "a task failed and runs again", task=name, error=text, retry_s=round(delay_s, 2), exc_info=trace
                )
        await asyncio.sleep(delay_s)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def _text(error: BaseException) -> str:
    """Of a group what is in it: its own text only counts them."""
    return "; ".join(dict.fromkeys(map(_said, _leaves(error))))[:TEXT_LENGTH_MAX]


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, which cannot say what it is"


def _place(error: BaseException) -> tuple[object, ...]:
    """What was raised and where: the same as before needs no second traceback, even with another text."""
    places = []
    for one in _leaves(error):
        frame, line = next(reversed(list(walk_tb(one.__traceback__))), (None, 0))
        places.append((type(one), frame.f_code.co_filename if frame else "", line))
    return tuple(places)


def _says_all(error: BaseException) -> bool:
    """The text of such an error says all: the surroundings failed, or it was written for people."""
    from runtime.bus import is_transient

    return isinstance(error, DucatError) or is_transient(error)
