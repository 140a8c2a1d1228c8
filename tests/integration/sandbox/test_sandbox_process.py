"""The sandbox as a process: SIGKILL in the middle of a run loses no intent and no webhook."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp

from tests.contract.psp.sandbox_server import Gateway, Server

ROOT = Path(__file__).parents[3]


async def start(environment: dict[str, str]) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sandbox", cwd=ROOT, stdout=asyncio.subprocess.PIPE, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert line.startswith("ready sandbox "), line
    return process


async def test_killed_in_the_middle_tells_every_payment(tmp_path: Path) -> None:
    gateway = Gateway()
    gateway.refuse = True
    server = Server(gateway)
    await server.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        "DUCAT_DATA_DIR": str(tmp_path),
        "DUCAT_SANDBOX_LISTEN": listen,
        "DUCAT_SANDBOX_URL": f"http://{listen}",
        "DUCAT_GATEWAY_URL": server.url,
        "DUCAT_LOG_LEVEL": "warning",
    }
    process = await start(environment)
    paid = []
    async with aiohttp.ClientSession() as http:
        for number in range(20):
            headers = {"Authorization": "Bearer sk_test_sandbox", "Idempotency-Key": f"ORD-{number}"}
            body = {"amount": 75, "currency": "jpy", "return_url": "http://127.0.0.1:9/return"}
            created = await http.post(f"http://{listen}/sandbox2/v1/payment_intents", json=body, headers=headers)
            intent = await created.json()
            assert created.status == 200, intent
            page = await http.post(
                intent["hosted_page_url"], data={"card_number": "4242424242424242"}, allow_redirects=False
            )
            assert page.status == 303
            paid.append(intent["id"])
        process.send_signal(signal.SIGKILL)
        await process.wait()
        gateway.refuse = False
        process = await start(environment)
        await gateway.until(lambda gateway: len({_object(body) for _, _, body in gateway.calls}) == 20, 20)
        assert {_object(body) for _, _, body in gateway.calls} == set(paid)
        assert {path for path, _, _ in gateway.calls} == {"/webhooks/sandbox2"}
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    await server.kill()


def _object(body: bytes) -> str:
    return str(json.loads(body)["data"]["object"]["id"])
