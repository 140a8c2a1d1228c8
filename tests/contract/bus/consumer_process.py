"""A consumer in a process of its own, so that a test can kill it with SIGKILL. Not a test."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from runtime.bus import BusPolicy, Message, open_bus


async def main(
    backend: str, address: str, topic: str, group: str, mode: str, delivery_count_max: str, session_timeout_ms: str
) -> None:
    if backend == "kafka":
        from runtime.bus import kafka

        kafka.SESSION_TIMEOUT_MS_MIN = int(session_timeout_ms)
    policy = BusPolicy(
        claim_idle_ms=900, retry_base_ms=20, retry_cap_ms=100, delivery_count_max=int(delivery_count_max)
    )
    bus = await open_bus(backend, redis_url=address, kafka_bootstrap=address, policy=policy, name="child")

    async def handle(messages: Sequence[Message]) -> None:
        for message in messages:
            print("took", message.message_id, flush=True)
        if mode == "hang":
            await asyncio.sleep(600)
        if mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    print("ready", flush=True)
    await bus.consume(topic, group, handle)


asyncio.run(main(*sys.argv[1:]))
