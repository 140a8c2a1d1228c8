"""payment.commands → the use cases. The answers leave through the outbox (executor.events)."""

from __future__ import annotations

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
    """The handler of the group `executor`. Idempotent by the command's own reference, so it needs no inbox."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def handle(self, message: Message) -> None:
        """Returns once the command's outcome, or that it is unknown, is stored. Raises where the surroundings fail (the bus tries again)
        and where the message can never work (the bus moves it to the dead-letter topic)."""
        command = command_of(message.payload)
        if command is None:
            _logger.warning("a command of an unknown kind is skipped", message_id=message.message_id)
            return
        if isinstance(command, CancelOrder):
            attempt = await self._executor.cancel(command)
        else:
            attempt = await self._executor.execute(command, message.traceparent or trace.current())
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
