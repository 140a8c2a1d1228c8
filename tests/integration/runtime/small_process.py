"""A small Ducat process that the tests start: `python -m tests.integration.runtime.small_process <what>`.

grpc: serves payments; GetPayment answers at once, CancelPayment after a second. http: serves "hello" at every path.
crash: a spawned task raises after the process is ready. wait: waits for a Valkey that never answers.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from ducat.payment.v1 import payment_service_pb2_grpc
from runtime.process import Process, run
from runtime.settings import Settings
from tests.integration.runtime.serving import SCOPES, SERVICE, PaymentServicer


class SlowCancel(PaymentServicer):
    async def CancelPayment(self, request: Any, context: Any) -> Any:
        print("cancelling", flush=True)
        await asyncio.sleep(1)
        answer = await super().CancelPayment(request, context)
        print("cancelled", flush=True)
        return answer


async def hello(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def crash() -> None:
    await asyncio.sleep(0.1)
    raise RuntimeError("a task with a bug")


async def idle() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        print("idle task ended", flush=True)


async def main() -> None:
    what = sys.argv[1]
    settings = Settings.load()
    async with Process.start("payment", settings) as process:
        process.spawn(idle(), name="idle")
        if what == "wait":
            print("waiting", flush=True)
            await process.valkey()
        if what == "crash":
            process.spawn(crash(), name="crash")
        if what == "http":
            await process.serve_http(settings.payment_listen, hello)
        else:
            servicer = (SlowCancel(), payment_service_pb2_grpc.add_PaymentServiceServicer_to_server, SERVICE)
            await process.serve_grpc(settings.payment_listen, [servicer], SCOPES)
        print("served", flush=True)


if __name__ == "__main__":
    run(main)
