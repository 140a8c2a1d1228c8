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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import numpy as np

from ducat.wallet.v1 import wallet_pb2
from loadtest.bench.limits import CHANNEL_OPTIONS

Column = np.ndarray[Any, Any]

__all__ = ["Plan", "account_ids", "main", "transfer_id_column"]

BATCH_ROWS = 8190
UNARY_TURNS = 10
ACCOUNT_CALLS = 4
"""Calls that open or read accounts, under way at once."""
VARINT_BYTES_MAX = 10
USD_FIELD = np.frombuffer(b"\x1a\x03USD", dtype=np.uint8)
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


def account_ids(numbers: Column) -> Column:
    """16 bytes a row: big-endian account numbers from ID_OFFSET, so that slots, and with them shards, are used
    evenly.
    """
    ids = np.empty((len(numbers), 2), dtype=">u8")
    ids[:, 0] = 0xACC0_0000_0000_0000
    ids[:, 1] = numbers + np.uint64(ID_OFFSET)
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
    """Makes batches, and knows what every balance must be afterwards: it draws the same numbers again, so that nothing is
    remembered and summed while the clock runs.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = np.random.default_rng(plan.seed)
        self.sent = 0
        self.counts: list[int] = []

    def draw(self, random: np.random.Generator, count: int) -> tuple[Column, Column, Column]:
        """Numbers of the debit and the credit accounts, and amounts, of the next `count` transfers."""
        plan = self.plan
        if plan.pattern == "hot":
            others = random.integers(1, plan.accounts, count, dtype=np.uint32)
            into = random.random(count, dtype=np.float32) < 0.5
            debit, credit = np.where(into, others, np.uint32(0)), np.where(into, np.uint32(0), others)
        else:
            debit = random.integers(0, plan.accounts, count, dtype=np.uint32)
            credit = (debit + random.integers(1, plan.accounts, count, dtype=np.uint32)) % np.uint32(plan.accounts)
        return debit, credit, random.integers(1, 1000, count, dtype=np.uint16)

    def batch(self, count: int) -> bytes:
        """A serialized SubmitTransfersRequest of `count` rows."""
        debit, credit, amounts = self.draw(self.random, count)
        first = self.plan.first_number + self.sent
        self.sent += count
        self.counts.append(count)
        columns = (
            (b"\x12", transfer_id_column(first, count, time.time_ns() // 1_000_000)),
            (b"\x1a", account_ids(debit).data),
            (b"\x22", account_ids(credit).data),
            (b"\x2a", amounts.astype("<i8").data),
        )
        parts: list[Any] = [b"\x08", varint(first // BATCH_ROWS + 1)]
        for tag, column in columns:
            parts += (tag, varint(memoryview(column).nbytes), column)
        length = sum(memoryview(part).nbytes for part in parts)
        return b"".join((b"\x0a", varint(length), *parts))

    def unary_request(self) -> bytes:
        """One serialized CreateTransfersRequest of one row."""
        number = self.plan.first_number + self.sent
        self.sent += 1
        debit, credit = self.unary_sides(number)
        ids = account_ids(np.array((debit, credit)))
        transfer = wallet_pb2.Transfer(
            transfer_id=transfer_id_column(number, 1, time.time_ns() // 1_000_000),
            debit_account_id=ids[0].tobytes(),
            credit_account_id=ids[1].tobytes(),
            amount_minor=1,
        )
        return wallet_pb2.CreateTransfersRequest(transfers=[transfer]).SerializeToString()

    def unary_sides(self, number: int) -> tuple[int, int]:
        accounts = self.plan.accounts
        debit = number * 7919 % accounts
        return debit, (debit + 1 + number % (accounts - 1)) % accounts

    def expected(self) -> Column:
        """The balance of every account after all that was sent."""
        balances = np.zeros(self.plan.accounts, dtype=np.int64)
        if self.plan.pattern == "unary":
            for number in range(self.plan.first_number, self.plan.first_number + self.sent):
                debit, credit = self.unary_sides(number)
                balances[debit] -= 1
                balances[credit] += 1
            return balances
        random = np.random.default_rng(self.plan.seed)
        for count in self.counts:
            debits, credits, amounts = self.draw(random, count)
            np.subtract.at(balances, debits, amounts.astype(np.int64))
            np.add.at(balances, credits, amounts.astype(np.int64))
        return balances


def account_specs(ids: Column) -> bytes:
    """A serialized CreateAccountsRequest: one spec, repeated, with the ids laid over it."""
    spec = wallet_pb2.AccountSpec(account_id=bytes(16), currency_code="USD", may_overdraw=True)
    one = np.frombuffer(wallet_pb2.CreateAccountsRequest(accounts=[spec]).SerializeToString(), dtype=np.uint8)
    rows = np.tile(one, (len(ids), 1))
    rows[:, 4:20] = ids  # behind the two tags and lengths
    return rows.tobytes()


async def create_accounts(channel: grpc.aio.Channel, generator: Generator) -> None:
    call: Any = channel.unary_unary(CREATE, None, None)

    async def create(ids: Column) -> bool:
        answer: bytes = await call(account_specs(ids), timeout=60)
        if answer == b"\x0a" + varint(len(ids)) + bytes([wallet_pb2.ACCOUNT_RESULT_OK]) * len(ids):
            return True
        raise SystemExit(f"CreateAccounts: {set(wallet_pb2.CreateAccountsResponse.FromString(answer).results)}")

    await for_all_accounts(generator.plan.accounts, create)


async def for_all_accounts(count: int, work: Callable[[Column], Awaitable[bool]]) -> bool:
    """Runs `work` on the ids of all accounts, 8,190 at a time, ACCOUNT_CALLS of them under way; whether each said yes."""
    starts = iter(range(0, count, BATCH_ROWS))
    is_good = True

    async def worker() -> None:
        nonlocal is_good
        for start in starts:
            numbers = np.arange(start, min(start + BATCH_ROWS, count), dtype=np.uint64)
            is_good = await work(account_ids(numbers)) and is_good

    await asyncio.gather(*(worker() for _ in range(ACCOUNT_CALLS)))
    return is_good


async def stream(
    channel: grpc.aio.Channel, generator: Generator, method: str, total: int, window: int
) -> dict[str, Any]:
    """Sends `total` transfers with `window` batches under way; every answer must say that no row failed."""
    call: Any = channel.stream_stream(method, None, None)()
    sent_at: list[float] = []
    took_ms: list[float] = []
    spans: list[tuple[float, float]] = []  # when each batch was sent and answered, by the machine's monotonic clock
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
            spans.append((waiting.pop(number, sent_at[answered - 1]), now))
            took_ms.append((now - spans[-1][0]) * 1000)
        else:
            took_ms.append((now - sent_at[answered - 1]) * 1000)
        if left:
            await send_numbered()
    seconds = time.perf_counter() - started
    await call.done_writing()
    report = {"seconds": seconds, "transfers": total, "failed": failed, "batch_ms": percentiles(took_ms)}
    return {**report, "spans": spans}


class Unary:
    """Unary calls, `window` under way at once. Requests are made before the clock starts, answers are looked at after it
    has stopped: what is measured is the calls.
    """

    def __init__(self, call: Any, window: int) -> None:
        self.call, self.window = call, window
        self.answers: list[bytes] = []
        self.took_ms: list[float] = []
        self.seconds = 0.0

    async def run(self, requests: list[bytes]) -> None:
        left = iter(requests)
        call, answers, took_ms = self.call, self.answers, self.took_ms

        async def worker() -> None:
            for request in left:
                started = time.perf_counter()
                answers.append(await call(request, timeout=30))
                took_ms.append((time.perf_counter() - started) * 1000)

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(self.window)))
        self.seconds += time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "calls": len(self.answers), "call_ms": percentiles(self.took_ms)}


async def unary_beside_echo(channel: grpc.aio.Channel, generator: Generator) -> dict[str, Any]:
    """Single transfers and, in turn, as many empty echoes of requests of the same length: the machine is not the same from
    one second to the next, so what is compared must be.
    """
    plan = generator.plan
    requests = [generator.unary_request() for _ in range(plan.transfers)]
    async with grpc.aio.insecure_channel(plan.echo_address, options=CHANNEL_OPTIONS) as echo_channel:
        transfers = Unary(channel.unary_unary(TRANSFER, None, None), plan.window)
        echoes = Unary(echo_channel.unary_unary("/bench.Echo/Unary", None, None), plan.window)
        size = -(-len(requests) // UNARY_TURNS)
        cpu_s = 0.0
        for start in range(0, len(requests), size):
            await echoes.run([bytes(len(each)) for each in requests[start : start + size]])
            before = cpu_seconds()
            await transfers.run(requests[start : start + size])
            cpu_s += cpu_seconds() - before
    parse = wallet_pb2.CreateTransfersResponse.FromString
    failed = sum(list(parse(answer).results) != [wallet_pb2.TRANSFER_RESULT_OK] for answer in transfers.answers)
    return {**transfers.report(), "failed": failed, "cpu_seconds": cpu_s, "echo": echoes.report()}


def cpu_seconds() -> float:
    """Of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def percentiles(values: list[float]) -> dict[str, float]:
    array = np.array(values)
    return {
        "p50": round(float(np.percentile(array, 50)), 3),
        "p99": round(float(np.percentile(array, 99)), 3),
        "max": round(float(array.max()), 3),
    }


async def check_balances(channel: grpc.aio.Channel, generator: Generator, expected: Column) -> bool:
    """Every account has the balance that the transfers make."""
    call: Any = channel.unary_unary(GET, None, None)

    async def check(ids: Column) -> bool:
        request = np.empty((len(ids), 18), dtype=np.uint8)
        request[:, :2], request[:, 2:] = (0x0A, 16), ids
        seen = balances_in(await call(request.tobytes(), timeout=60), ids)
        first = int(ids[0].view(">u8")[1]) - ID_OFFSET
        return seen is not None and np.array_equal(seen, expected[first : first + len(ids)])

    return await for_all_accounts(generator.plan.accounts, check)


def balances_in(answer: bytes, ids: Column) -> Column | None:
    """The balances of a serialized GetAccountsResponse, read where a writer puts them that writes fields in their order and no
    zeros: id, currency, balance. None where it has not exactly these accounts, without names and in USD, in this order. They
    are looked for by how their ids (`account_ids`) begin.
    """
    raw = np.frombuffer(answer + bytes(1 + VARINT_BYTES_MAX), dtype=np.uint8)  # the tail of the last account, at most
    starts = np.flatnonzero((raw[2:-3] == 0x0A) & (raw[3:-2] == 16) & (raw[4:-1] == 0xAC) & (raw[5:] == 0xC0))
    if len(starts) != len(ids) or starts[0] != 0:
        return None
    lengths = np.diff(starts, append=len(answer)) - 2
    head = np.empty((len(ids), 25), dtype=np.uint8)
    head[:, 0] = head[:, 2] = 0x0A
    head[:, 1], head[:, 3], head[:, 4:20], head[:, 20:] = lengths, 16, ids, USD_FIELD
    if lengths.max() > 127 or not np.array_equal(np.lib.stride_tricks.sliding_window_view(raw, 25)[starts], head):
        return None
    tail = np.lib.stride_tricks.sliding_window_view(raw, 1 + VARINT_BYTES_MAX)[starts + 25]
    is_more = np.logical_and.accumulate(tail[:, 1:] > 0x7F, axis=1)
    figures = (tail[:, 1:] & np.uint8(0x7F)).astype(np.uint64) << np.arange(0, 70, 7, dtype=np.uint64)
    figures[:, 1:] *= is_more[:, :-1]
    balances: Column = np.bitwise_or.reduce(figures, axis=1).view(np.int64)
    balances[tail[:, 0] != 0x20] = 0
    return balances


async def run(plan: Plan) -> dict[str, Any]:
    generator = Generator(plan)
    async with grpc.aio.insecure_channel(plan.address, options=CHANNEL_OPTIONS) as channel:
        accounts_per_second = {}
        if plan.create_accounts:
            started = time.perf_counter()
            await create_accounts(channel, generator)
            accounts_per_second["opened"] = plan.accounts / (time.perf_counter() - started)
        before = cpu_seconds()
        print("started", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        if plan.pattern == "unary":
            report = await unary_beside_echo(channel, generator)
        else:
            report = await stream(channel, generator, plan.submit, plan.transfers, plan.window)
            report["cpu_seconds"] = cpu_seconds() - before
        print("measured", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        if plan.check_balances:
            expected = generator.expected()
            started = time.perf_counter()
            report["balances"] = await check_balances(channel, generator, expected)
            accounts_per_second["read"] = plan.accounts / (time.perf_counter() - started)
    return {**report, "accounts_per_second": accounts_per_second}


async def run_echo(plan: Plan) -> dict[str, Any]:
    """The same load on a server that does nothing: unary echo, or the stream with the engine left out."""
    async with grpc.aio.insecure_channel(plan.echo_address, options=CHANNEL_OPTIONS) as channel:
        if plan.pattern != "unary":
            return await stream(channel, Generator(plan), "/bench.Echo/Stream", plan.transfers, plan.window)
        echoes = Unary(channel.unary_unary("/bench.Echo/Unary", None, None), plan.window)
        await echoes.run([bytes(80)] * plan.transfers)
        return echoes.report()


def main() -> None:
    import uvloop

    document = json.loads(sys.argv[1])
    echo = document.pop("echo", False)
    report = uvloop.run((run_echo if echo else run)(Plan(**document)))
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
