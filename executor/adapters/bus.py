"""payment.commands → the use cases. The answers leave through the outbox (executor.events)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from executor.adapters.messages import command_of
from executor.domain.attempt import Attempt, AttemptState
from executor.domain.command import CancelOrder
from executor.service.execute import Executor
from runtime import trace
from runtime.bus import Message
from runtime.logs import get_logger

__all__ = ["GROUP", "TOPIC", "CommandConsumer", "log_attempt"]

TOPIC = "payment.commands"
GROUP = "executor"
_logger = get_logger("executor.bus")


class CommandConsumer:
    """The handler of the group `executor`. Idempotent by the command's own reference; its inbox only proves what was handled."""

    def __init__(self, executor: Executor, *, concurrency: int = 1) -> None:
        """`concurrency`: orders that `ensure` runs at once."""
        self._executor = executor
        self._slots = asyncio.Semaphore(concurrency)

    async def handle(self, message: Message) -> None:
        """Returns once the command's outcome, or that it is unknown, is stored. Raises where the surroundings fail (the bus tries again)
        and where the message can never work (the bus moves it to the dead-letter topic)."""
        await self._run(message, takes_over=True)

    async def ensure(self, messages: Sequence[Message]) -> None:
        """The same for commands from the feed, which the bus may be bringing right now: one that is being sent is left to its sender.
        Keys run side by side, the commands of a key in their order. Raises the first error when all have ended."""
        by_key: dict[str, list[Message]] = {}
        for message in messages:
            by_key.setdefault(message.key, []).append(message)

        async def run(commands: Sequence[Message]) -> None:
            async with self._slots:
                for message in commands:
                    with trace.bind(message.traceparent):
                        await self._run(message, takes_over=False)

        outcomes = await asyncio.gather(*map(run, by_key.values()), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _run(self, message: Message, *, takes_over: bool) -> None:
        command = command_of(message.payload)
        if command is None:
            _logger.warning("a command of an unknown kind is skipped", message_id=message.message_id)
            return
        if isinstance(command, CancelOrder):
            attempt = await self._executor.cancel(command)
        else:
            traceparent = message.traceparent or trace.current()
            attempt = await self._executor.execute(command, traceparent, takes_over=takes_over)
        if attempt is not None:
            log_attempt("cancel asked" if isinstance(command, CancelOrder) else "executed", attempt)


def log_attempt(event: str, attempt: Attempt) -> None:
    """One line an attempt, with the trace id of the payment; a warning where its outcome is not known yet."""
    is_known = attempt.state in (AttemptState.ACCEPTED, AttemptState.REJECTED)
    log = _logger.info if is_known else _logger.warning
    facts = {"kind": attempt.kind.name.lower(), "reference": attempt.reference, "psp": attempt.psp}
    if attempt.code or attempt.reason:
        facts |= {"code": attempt.code, "reason": attempt.reason}
    log(event, state=attempt.state.name, **facts)
