"""Bounds what requests and the projector wait for a store that may not answer: the core never hangs on one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import asyncpg

from kernel.errors import Unavailable

__all__ = ["Patience", "answered_within"]

_Result = TypeVar("_Result")


async def answered_within(seconds: float, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`. Raises TimeoutError after `seconds`, also where the work does not end when it is cancelled: a pool waits for
    a server that has stopped to agree to the cancelling of a statement.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not task.done():
        task.cancel()
        task.add_done_callback(_forget)
        raise TimeoutError(f"no answer within {seconds:g} s")
    return task.result()


def _forget(task: asyncio.Task[Any]) -> None:
    """Takes what an abandoned task raised after all."""
    if not task.cancelled():
        task.exception()


class Patience:
    """Statements of requests: each may take `timeout_s`. After one without an answer those that come within `pause_s` are refused at once,
    so that requests neither queue up behind a server that has stopped nor use up its connections.
    """

    def __init__(self, what: str, *, timeout_s: float = 3.0, pause_s: float = 1.0) -> None:
        """`what` names the store and what it is for, as a caller reads it."""
        self._what = what
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._closed_until_s = 0.0

    async def answer(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of `work`. Raises Unavailable where the store does not answer or cannot; errors about the values pass through."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._closed_until_s:
            work.close()
            raise self._unavailable("did not answer a moment ago")
        try:
            return await answered_within(self._timeout_s, work)
        except (
            OSError,
            asyncpg.PostgresConnectionError,
            asyncpg.InterfaceError,
        ) as error:  # TimeoutError is an OSError
            self._closed_until_s = loop.time() + self._pause_s
            raise self._unavailable(f"does not answer ({type(error).__name__}: {error})") from error
        except asyncpg.DataError:
            raise
        except (asyncpg.PostgresError, asyncpg.InternalClientError) as error:
            raise self._unavailable(f"cannot answer ({type(error).__name__}: {error})") from error

    def _unavailable(self, problem: str) -> Unavailable:
        return Unavailable(f"{self._what} {problem}; try again later", metadata={"dependency": "postgres"})
