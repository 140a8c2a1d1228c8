"""Tasks that go on: what a task beside the core raises is counted, logged and tried again, and never stops the process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from kernel.errors import DucatError
from runtime.logs import get_logger
from runtime.metrics import counter

__all__ = ["FailureLog", "keep_running"]

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RAN_WELL_S = 30.0
"""A run that lasted so long counts as a success: the next failure is tried again at once."""
LOG_INTERVAL_S = 60.0
"""How often the same failure is logged while it lasts."""

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


async def keep_running(name: str, work: Callable[[], Awaitable[object]]) -> None:
    """Runs `work()`, again with backoff whenever it raises; returns where it returns. Only a cancel ends it otherwise.

    For tasks that can begin anew at any time. What makes it wrong to go on, such as a failed sync of a shard, does not belong here.
    """
    loop = asyncio.get_running_loop()
    failures = FailureLog()
    count = 0
    while True:
        begin_s = loop.time()
        try:
            await work()
            return
        except Exception as error:
            _failed.labels(name).inc()
            count = 0 if loop.time() - begin_s >= RAN_WELL_S else count
            delay_s = RETRY_S[min(count, len(RETRY_S) - 1)] * (0.75 + random.random() / 2)  # noqa: S311 - jitter, not a secret
            count += 1
            text = f"{type(error).__name__}: {error}"
            if failures.is_due(text):
                trace = None if isinstance(error, DucatError | OSError) else error  # the text of those says all
                _log.error(
                    "a task failed and runs again", task=name, error=text, retry_s=round(delay_s, 2), exc_info=trace
                )
        await asyncio.sleep(delay_s)
