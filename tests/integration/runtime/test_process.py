"""A whole process: starting, being ready, signals, crashes, refusing to start."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

import ducat.aio

ROOT = Path(__file__).resolve().parents[3]


class Child:
    """The small process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            line = (await self.process.stdout.readline()).decode().rstrip()
        self.lines.append(line)
        return line

    async def address(self) -> str:
        ready = re.fullmatch(r"ready payment (127\.0\.0\.1:\d+)", await self.line())
        assert ready, self.lines + (await self.end())[2]
        return ready[1]

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def end(self) -> tuple[int, list[str], list[str]]:
        """Exit code, what stands on stdout and stderr."""
        async with asyncio.timeout(60):
            out, errors = await self.process.communicate()
        return self.process.returncode or 0, out.decode().splitlines(), errors.decode().splitlines()


Start = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    children: list[Child] = []

    async def begin(what: str, **environment: str) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.runtime.small_process",
            what,
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "DUCAT_PAYMENT_LISTEN": "127.0.0.1:0",
                **environment,
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        children.append(Child(process))
        return children[-1]

    yield begin
    for child in children:
        if child.process.returncode is None:
            child.process.kill()
            await child.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_gracefully_after_the_running_calls(start: Start, number: signal.Signals) -> None:
    child = await start("grpc")
    async with ducat.aio.Client(address=await child.address()) as client:
        await client.payments.get_payment(checkout_id="CHK-1")
        running = asyncio.ensure_future(client.payments.cancel_payment(checkout_id="CHK-1"))
        assert await child.line() == "cancelling"
        child.kill(number)
        await running
    code, out, logged = await child.end()
    assert (code, out) == (0, ["cancelled", "served", "idle task ended"]), logged
    for line in logged:
        assert json.loads(line)["process"] == "payment"


async def test_a_second_signal_stops_at_once(start: Start) -> None:
    child = await start("grpc")
    async with ducat.aio.Client(address=await child.address(), retry=ducat.Retry(count_max=0)) as client:
        running = asyncio.ensure_future(client.payments.cancel_payment(checkout_id="CHK-1"))
        assert await child.line() == "cancelling"
        child.kill(signal.SIGTERM)
        await asyncio.sleep(0.2)
        child.kill(signal.SIGTERM)
        code, out, _ = await child.end()
        with pytest.raises(ducat.errors.Unavailable):
            await running
    assert code != 0
    assert "cancelled" not in out


async def test_a_task_that_crashes_stops_the_process_with_exit_1(start: Start) -> None:
    child = await start("crash")
    await child.address()
    code, out, logged = await child.end()
    assert code == 1
    assert out == ["served", "idle task ended"], "the rest still ended gracefully"
    crash = next(json.loads(line) for line in logged if "a task with a bug" in line)
    assert crash["task"] == "crash"
    assert "RuntimeError" in crash["traceback"]


async def test_a_signal_while_a_dependency_is_awaited_ends_the_start(start: Start) -> None:
    child = await start("wait", DUCAT_REDIS_URL="redis://127.0.0.1:1/0")
    assert await child.line() == "waiting"
    await asyncio.sleep(0.2)
    child.kill(signal.SIGTERM)
    code, _, logged = await child.end()
    assert code == 0, logged


async def test_http_serves_and_stops_gracefully(start: Start) -> None:
    child = await start("http")
    address = await child.address()
    async with aiohttp.ClientSession() as http, http.get(f"http://{address}/") as answer:
        assert await answer.text() == "hello"
    child.kill(signal.SIGTERM)
    code, out, logged = await child.end()
    assert (code, out[0]) == (0, "served"), logged


async def test_https_takes_a_new_certificate_without_a_restart_and_keeps_the_old_one_while_the_new_is_broken(
    start: Start, tmp_path: Path
) -> None:
    """Risk: a certificate runs out at the edge, months after it was replaced on disk."""
    paths = {name: tmp_path / f"{name}.pem" for name in ("cert", "key")}
    written_s = itertools.count(1_753_056_000)  # files of one kernel tick and one size would look the same

    def issue() -> ssl.SSLContext:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(paths["key"])
        issued.cert_chain_pems[0].write_to_path(paths["cert"])
        os.utime(paths["cert"], (0, next(written_s)))
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        return trusting

    async def get(trusting: ssl.SSLContext) -> int:
        async with aiohttp.ClientSession() as http, http.get(f"https://{address}/", ssl=trusting) as answer:
            return answer.status

    first = issue()
    child = await start("http", DUCAT_TLS_CERT_FILE=str(paths["cert"]), DUCAT_TLS_KEY_FILE=str(paths["key"]))
    address = await child.address()
    assert await get(first) == 200
    good_key = paths["key"].read_bytes()
    paths["key"].write_text("half a ke")
    assert await get(first) == 200
    paths["key"].write_bytes(good_key)
    for _ in range(2):
        second = issue()
        assert await get(second) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await get(first)
    child.kill(signal.SIGTERM)
    code, _, errors = await child.end()
    said = "".join(errors)
    assert (code, said.count("certificate reloaded"), said.count("certificate not reloaded")) == (0, 2, 1)


@pytest.mark.parametrize("what", ["grpc", "http"])
async def test_listening_beyond_loopback_without_tls_and_tokens_is_refused(start: Start, what: str) -> None:
    child = await start(what, DUCAT_PAYMENT_LISTEN="0.0.0.0:0")
    code, out, said = await child.end()
    assert code == 2
    assert not out
    assert "payment may not start" in said[0]
    for missing in ("tls_cert_file", "auth_tokens_file", "development secrets"):
        assert missing in said[0]


async def test_wrong_settings_are_named_and_exit_2(start: Start) -> None:
    child = await start("grpc", DUCAT_WALLET_SHARD_COUNT="many")
    code, _, said = await child.end()
    assert code == 2
    assert "wallet_shard_count" in said[0]
    assert "DUCAT_WALLET_SHARD_COUNT" in said[0]
    assert "many" not in said[0], "the value may be a secret"


async def test_metrics_have_an_address_of_their_own(start: Start) -> None:
    child = await start("grpc", DUCAT_METRICS_LISTEN_PAYMENT="127.0.0.1:0")
    address = await child.address()
    async with ducat.aio.Client(address=address) as client:
        await client.payments.get_payment(checkout_id="CHK-1")
    assert child.process.stderr is not None
    metrics = json.loads(await child.process.stderr.readline())["address"]
    async with aiohttp.ClientSession() as http, http.get(f"http://{metrics}/metrics") as answer:
        text = await answer.text()
    method = "/ducat.payment.v1.PaymentService/GetPayment"
    assert f'ducat_rpc_server_handled_total{{code="OK",method="{method}"}} 1.0' in text
    assert "process_cpu_seconds_total" in text
