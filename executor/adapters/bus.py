"""payment.commands → the use cases. The answers leave through the outbox (executor.events)."""

from __future__ import annotations

from executor.adapters.messages import command_of
from executor.domain.command import CancelOrder
from executor.service.execute import Executor
from runtime import trace
from runtime.bus import Message
from runtime.logs import get_logger

__all__ = ["GROUP", "TOPIC", "CommandConsumer"]

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
            await self._executor.cancel(command)
        else:
            await self._executor.execute(command, message.traceparent or trace.current())
