"""The load generator of the wallet benchmarks: a process of its own that speaks plain gRPC and prints one JSON object.

It is told everything on the command line as one JSON document, makes its transfers with numpy while it sends them,
keeps the balances that it expects, and checks every account at the end.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np

from ducat.wallet.v1 import wallet_pb2
from loadtest.bench.limits import CHANNEL_OPTIONS

__all__ = ["Plan", "account_ids", "main", "transfer_id_column"]

BATCH_ROWS = 8190
ID_OFFSET = 1 << 20
CREATE = "/ducat.wallet.v1.WalletService/CreateAccounts"
SUBMIT = "/ducat.wallet.v1.WalletService/SubmitTransfers"
TRANSFER = "/ducat.wallet.v1.WalletService/CreateTransfers"
GET = "/ducat.wallet.v1.WalletService/GetAccounts"


@dataclass(frozen=True)
class Plan:
    """What to do. ``pattern``: uniform, hot, or unary; ``window``: batches (or calls) under way at once."""

    address: str
    echo_address: str
    accounts: int
    transfers: int
    pattern: str = "uniform"
    window: int = 16
    seed: int = 1
    create_accounts: bool = True
    check_balances: bool = True
    first_number: int = 0
    submit: str = SUBMIT


def account_ids(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """16 bytes a row: big-endian account numbers from ID_OFFSET, so that slots, and with them shards, are used
    evenly.
    """
    ids = np.zeros((len(numbers), 2), dtype=">u8")
    ids[:, 0] = 0xACC0_0000_0000_0000
    ids[:, 1] = numbers + ID_OFFSET
    return ids.view(np.uint8).reshape(len(numbers), 16)


def transfer_id_column(first: int, count: int, time_ms: int) -> bytes:
    """Version-7 ids of one moment, distinct by a 56-bit counter."""
    words = np.empty((count, 2), dtype=">u8")
    words[:, 0] = (time_ms << 16) | 0x7000
    words[:, 1] = np.arange(first, first + count, dtype=np.uint64) | np.uint64(0x8000_0000_0000_0000)
    return words.tobytes()


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


class Generator:
    """Makes batches and remembers what every balance must be."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = np.random.default_rng(plan.seed)
        self.ids = account_ids(np.arange(plan.accounts, dtype=np.uint64))
        self.expected = np.zeros(plan.accounts, dtype=np.int64)
        self.sent = 0

    def batch(self, count: int) -> bytes:
        """A serialized SubmitTransfersRequest of `count` rows."""
        plan = self.plan
        if plan.pattern == "hot":
            others = self.random.integers(1, plan.accounts, count)
            into = self.random.random(count) < 0.5
            debit = np.where(into, others, 0)
            credit = np.where(into, 0, others)
        else:
            debit = self.random.integers(0, plan.accounts, count)
            credit = (debit + self.random.integers(1, plan.accounts, count)) % plan.accounts
        amounts = self.random.integers(1, 1000, count)
        np.subtract.at(self.expected, debit, amounts)
        np.add.at(self.expected, credit, amounts)
        first = plan.first_number + self.sent
        self.sent += count
        columns = (
            (0x12, transfer_id_column(first, count, time.time_ns() // 1_000_000)),
            (0x1A, self.ids[debit].tobytes()),
            (0x22, self.ids[credit].tobytes()),
            (0x2A, amounts.astype("<i8").tobytes()),
        )
        parts = [b"\x08", varint(first // BATCH_ROWS + 1)]
        for tag, column in columns:
            parts += (bytes([tag]), varint(len(column)), column)
        body = b"".join(parts)
        return b"".join((b"\x0a", varint(len(body)), body))


async def create_accounts(channel: grpc.aio.Channel, generator: Generator) -> None:
    call: Any = channel.unary_unary(CREATE, None, wallet_pb2.CreateAccountsResponse.FromString)
    ids = generator.ids
    for start in range(0, len(ids), BATCH_ROWS):
        request = wallet_pb2.CreateAccountsRequest(
            accounts=[
                wallet_pb2.AccountSpec(account_id=row.tobytes(), currency_code="USD", may_overdraw=True)
                for row in ids[start : start + BATCH_ROWS]
            ]
        )
        answer = await call(request.SerializeToString(), timeout=60)
        if set(answer.results) != {wallet_pb2.ACCOUNT_RESULT_OK}:
            raise SystemExit(f"CreateAccounts: {set(answer.results)}")


async def stream(
    channel: grpc.aio.Channel, generator: Generator, method: str, total: int, window: int
) -> dict[str, Any]:
    """Sends `total` transfers with `window` batches under way; every answer must say that no row failed."""
    call: Any = channel.stream_stream(method, None, None)()
    sent_at: list[float] = []
    took_ms: list[float] = []
    failed = 0
    left = total
    started = time.perf_counter()

    async def send() -> None:
        nonlocal left
        count = min(BATCH_ROWS, left)
        left -= count
        message = generator.batch(count)
        sent_at.append(time.perf_counter())
        await call.write(message)

    answered = 0
    engine_in = method == SUBMIT
    waiting: dict[int, float] = {}
    sent_numbers = 0

    async def send_numbered() -> None:
        nonlocal sent_numbers
        sent_numbers += 1
        await send()
        waiting[sent_numbers] = sent_at[-1]

    for _ in range(window):
        if left:
            await send_numbered()
    while answered < sent_numbers:
        answer = await call.read()
        if answer is grpc.aio.EOF:
            raise SystemExit(f"the stream ended early: {await call.code()} {await call.details()}")
        now = time.perf_counter()
        answered += 1
        if engine_in:
            result = wallet_pb2.SubmitTransfersResponse.FromString(answer).result
            failed += len(result.failed_results)
            number = result.batch_id - generator.plan.first_number // BATCH_ROWS
            took_ms.append((now - waiting.pop(number, sent_at[answered - 1])) * 1000)
        else:
            took_ms.append((now - sent_at[answered - 1]) * 1000)
        if left:
            await send_numbered()
    seconds = time.perf_counter() - started
    await call.done_writing()
    return {"seconds": seconds, "transfers": total, "failed": failed, "batch_ms": percentiles(took_ms)}


async def unary(call: Any, make: Any, total: int, window: int) -> dict[str, Any]:
    """`total` unary calls, `window` under way at once."""
    took_ms: list[float] = []
    failed = 0
    left = total

    async def worker() -> None:
        nonlocal left, failed
        while left > 0:
            left -= 1
            request = make()
            started = time.perf_counter()
            answer = await call(request)
            took_ms.append((time.perf_counter() - started) * 1000)
            failed += answer is None

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(window)))
    return {"seconds": time.perf_counter() - started, "calls": total, "failed": failed, "call_ms": percentiles(took_ms)}


def percentiles(values: list[float]) -> dict[str, float]:
    array = np.array(values)
    return {
        "p50": round(float(np.percentile(array, 50)), 3),
        "p99": round(float(np.percentile(array, 99)), 3),
        "max": round(float(array.max()), 3),
    }


async def check_balances(channel: grpc.aio.Channel, generator: Generator) -> bool:
    """Every account has the balance that the transfers make."""
    call: Any = channel.unary_unary(GET, None, wallet_pb2.GetAccountsResponse.FromString)
    for start in range(0, generator.plan.accounts, BATCH_ROWS):
        rows = generator.ids[start : start + BATCH_ROWS]
        request = wallet_pb2.GetAccountsRequest(account_ids=[row.tobytes() for row in rows])
        answer = await call(request.SerializeToString(), timeout=60)
        seen = np.fromiter((account.balance_minor for account in answer.accounts), np.int64, len(answer.accounts))
        if len(seen) != len(rows) or not np.array_equal(seen, generator.expected[start : start + len(rows)]):
            return False
    return True


def unary_request(generator: Generator) -> bytes:
    """One serialized CreateTransfersRequest of one row."""
    plan = generator.plan
    number = plan.first_number + generator.sent
    generator.sent += 1
    debit = number * 7919 % plan.accounts
    credit = (debit + 1 + number % (plan.accounts - 1)) % plan.accounts
    generator.expected[debit] -= 1
    generator.expected[credit] += 1
    transfer = wallet_pb2.Transfer(
        transfer_id=transfer_id_column(number, 1, time.time_ns() // 1_000_000),
        debit_account_id=generator.ids[debit].tobytes(),
        credit_account_id=generator.ids[credit].tobytes(),
        amount_minor=1,
    )
    return wallet_pb2.CreateTransfersRequest(transfers=[transfer]).SerializeToString()


OK_ANSWER = wallet_pb2.TRANSFER_RESULT_OK


async def run(plan: Plan) -> dict[str, Any]:
    generator = Generator(plan)
    report: dict[str, Any] = {}
    async with grpc.aio.insecure_channel(plan.address, options=CHANNEL_OPTIONS) as channel:
        if plan.create_accounts:
            await create_accounts(channel, generator)
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        print("started", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        if plan.pattern == "unary":
            transfer: Any = channel.unary_unary(TRANSFER, None, wallet_pb2.CreateTransfersResponse.FromString)

            async def call(request: bytes) -> Any:
                answer = await transfer(request, timeout=30)
                return answer if list(answer.results) == [OK_ANSWER] else None

            report |= await unary(call, lambda: unary_request(generator), plan.transfers, plan.window)
        else:
            report |= await stream(channel, generator, plan.submit, plan.transfers, plan.window)
        after = resource.getrusage(resource.RUSAGE_SELF)
        report["cpu_seconds"] = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
        print("measured", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        if plan.check_balances:
            report["balances"] = await check_balances(channel, generator)
    return report


async def run_echo(plan: Plan) -> dict[str, Any]:
    """The same load on a server that does nothing: unary echo, or the stream with the engine left out."""
    generator = Generator(plan)
    async with grpc.aio.insecure_channel(plan.echo_address, options=CHANNEL_OPTIONS) as channel:
        if plan.pattern != "unary":
            return await stream(channel, generator, "/bench.Echo/Stream", plan.transfers, plan.window)
        echo: Any = channel.unary_unary("/bench.Echo/Unary", None, None)
        return await unary(lambda request: echo(request, timeout=30), lambda: b"x" * 80, plan.transfers, plan.window)


def main() -> None:
    import uvloop

    document = json.loads(sys.argv[1])
    echo = document.pop("echo", False)
    report = uvloop.run((run_echo if echo else run)(Plan(**document)))
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
