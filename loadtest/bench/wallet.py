"""The wallet benchmarks: each starts its own server process and client process over loopback gRPC, with fdatasync on.

Every scenario measures the machine's limits in the same run (`limits`), prints ratios to them, and checks the
outcome: every balance against what the client expects, and every transfer in the event log against what was sent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from ducat.wallet.v1 import shard_pb2, wallet_pb2, wallet_service_pb2_grpc
from loadtest.bench.client import Plan, account_ids, percentiles
from loadtest.bench.limits import CHANNEL_OPTIONS, disk_limits, fresh_memory_bytes_per_second
from wallet_core.event_log.file import read_frames
from wallet_core.event_log.format import HEADER_BYTES
from wallet_core.event_log.port import Frame

__all__ = ["SCENARIOS", "Scenario", "print_report", "run", "tigerbeetle_ratio"]

READY_S_MAX = 120.0
POLL_S = 0.01
SAMPLE_ACCOUNTS = 8190
READY_IDS = 2 << 20  # with room for fewer, more is made at once, beside the stream
RECORD_BYTES, KIND_OFFSET = 48, 46
KIND_MOVED, KIND_SENT = 3, 9


@dataclass(frozen=True)
class Scenario:
    """What one benchmark does. ``smoke`` counts show that it works, not how fast it is."""

    about: str
    accounts: int
    transfers: int
    measure: Callable[[Scenario, Path, Counts], dict[str, Any]]
    pattern: str = "uniform"
    shards: int = 1
    window: int = 3
    smoke_accounts: int = 1_000
    smoke_transfers: int = 40_950


@dataclass(frozen=True)
class Counts:
    accounts: int
    transfers: int


# Processes


class Server:
    """A wallet server of its own: no read model, no bus, one folder. `room_ids`: of each shard, see the setting."""

    def __init__(self, folder: Path, shards: int, *, snapshots: bool = True, room_ids: int = 0) -> None:
        environment = {
            **os.environ,
            "DUCAT_WALLET_LISTEN": "127.0.0.1:0",
            "DUCAT_WALLET_SHARD_COUNT": str(shards),
            "DUCAT_WALLET_ALONE": "true",
            "DUCAT_DATA_DIR": str(folder),
            "DUCAT_LOG_LEVEL": "warning",
            "DUCAT_WALLET_ROOM_IDS": str(room_ids),
            **({} if snapshots else {"DUCAT_WALLET_SNAPSHOT_EVENTS": "0"}),
        }
        self.started = time.perf_counter()
        self.child = subprocess.Popen(
            [sys.executable, "-m", "wallet_core"], stdout=subprocess.PIPE, env=environment, text=True
        )
        self.address = _ready_address(self.child)
        self.start_seconds = time.perf_counter() - self.started

    def cpu_seconds(self) -> float:
        return _stat_seconds(self.child.pid)

    def memory_bytes(self) -> int:
        """Resident bytes, as the kernel counts them."""
        pages = int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(60)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


@contextmanager
def serving(folder: Path, shards: int, *, snapshots: bool = True, room_ids: int = 0) -> Iterator[Server]:
    """A server while the block runs. `snapshots`: it takes some by itself."""
    server = Server(folder, shards, snapshots=snapshots, room_ids=room_ids)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def echoing() -> Iterator[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "loadtest.bench.limits"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_keeping_memory(),
        text=True,
    )
    try:
        yield _ready_address(child)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(10)


class Client:
    """The load generator's process. It waits twice: before it measures, and after, before it checks."""

    def __init__(self, plan: Plan, *, echo: bool = False, quiet: bool = False) -> None:
        document = json.dumps({**asdict(plan), "echo": echo})
        self.child = subprocess.Popen(
            [sys.executable, "-m", "loadtest.bench.client", document],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            env=_keeping_memory(),
            text=True,
        )

    def wait_for(self, word: str) -> None:
        assert self.child.stdout is not None
        line = self.child.stdout.readline().strip()
        if line != word:
            raise RuntimeError(f"bench client: expected {word!r}, got {line!r}")

    def go_on(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        report: dict[str, Any] = json.loads(self.child.stdout.readline())
        self.child.wait(30)
        return report


def load(server: Server, plan: Plan) -> dict[str, Any]:
    """Runs one plan and adds the server's CPU seconds of the measured part."""
    client = Client(plan)
    client.wait_for("started")
    before = server.cpu_seconds()
    client.go_on()
    client.wait_for("measured")
    spent = server.cpu_seconds() - before
    client.go_on()
    report = client.result()
    report["server_cpu_seconds"] = spent
    return report


def echo(plan: Plan) -> dict[str, Any]:
    return Client(plan, echo=True).result()


def _keeping_memory() -> dict[str, str]:
    """The environment of a process that builds half a megabyte again and again: glibc gives each back to the kernel, and has it
    zeroed anew, which is a quarter of such a client's CPU time (docs/client.md).
    """
    return {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "33554432", **os.environ}


def _ready_address(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    deadline = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline:
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{child.args!r} ended before it was ready (exit code {child.wait()})")
        if line.startswith("ready "):
            return line.split()[-1]
    raise RuntimeError(f"{child.args!r} was not ready in {READY_S_MAX:.0f} s")


def _stat_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Scenarios


def measure_stream(scenario: Scenario, folder: Path, counts: Counts) -> dict[str, Any]:
    """Durable transfers in columns over one stream, beside the same stream with the engine left out. The server has found the
    memory for the ids of all transfers when it begins (`room_ids`, DUCAT_WALLET_ROOM_IDS), as one that has run for a while has:
    that uses the memory of ids that it has forgotten again.
    """
    limits = disk_limits(folder)
    limits["fresh_memory_bytes_per_second"] = fresh_memory_bytes_per_second()
    sides = 1 if scenario.shards == 1 else 2  # a transfer that crosses is known on two shards
    room_ids = sides * counts.transfers // scenario.shards + READY_IDS
    with serving(folder, scenario.shards, room_ids=room_ids) as server:
        plan = Plan(
            address=server.address,
            echo_address="",
            accounts=counts.accounts,
            transfers=counts.transfers,
            pattern=scenario.pattern,
            window=scenario.window,
        )
        report = load(server, plan)
    with echoing() as address:
        left_out = echo(
            Plan(**{**asdict(plan), "echo_address": address, "transfers": min(counts.transfers, 2_000_000)})
        )
        unary_plan = {**asdict(plan), "echo_address": address, "pattern": "unary", "transfers": 5_000, "window": 128}
        empty = echo(Plan(**unary_plan))
    per_second = report["transfers"] / report["seconds"]
    limits["stream_transfers_per_second"] = left_out["transfers"] / left_out["seconds"]
    limits["echo_calls_per_second"] = empty["calls"] / empty["seconds"]
    log = read_logs(folder, counts.transfers)
    return {
        "transfers_per_second": per_second,
        "batch_ms": report["batch_ms"],
        "cpu_seconds": {"client": report["cpu_seconds"], "server": report["server_cpu_seconds"]},
        "bytes_per_transfer": log.payload_bytes / counts.transfers,
        "accounts_per_second": report["accounts_per_second"],
        "room_ids": room_ids,
        "limits": limits,
        "ratios": {
            "engine_left_out": per_second / limits["stream_transfers_per_second"],
            "disk_bandwidth": per_second * 48 / limits["fdatasync_1m_bytes_per_second"],
            **tigerbeetle_ratio(folder, per_second, counts),
        },
        "checks": {
            "balances": report["failed"] == 0 and report["balances"],
            "log": log.has_all_transfers,
        },
    }


def measure_unary(scenario: Scenario, folder: Path, counts: Counts) -> dict[str, Any]:
    """Single transfers by unary calls, beside an empty unary echo at the same concurrency."""
    limits = disk_limits(folder)
    with serving(folder, scenario.shards) as server, echoing() as address:
        plan = Plan(
            address=server.address,
            echo_address=address,
            accounts=counts.accounts,
            transfers=counts.transfers,
            pattern="unary",
            window=scenario.window,
        )
        report = load(server, plan)
    log = read_logs(folder, counts.transfers)
    empty = report["echo"]  # in turn with the transfers, a tenth of each at a time
    per_second = report["calls"] / report["seconds"]
    limits["echo_calls_per_second"] = empty["calls"] / empty["seconds"]
    limits["echo_ms"] = empty["call_ms"]
    return {
        "transfers_per_second": per_second,
        "batch_ms": report["call_ms"],
        "cpu_seconds": {"client": report["cpu_seconds"], "server": report["server_cpu_seconds"]},
        "bytes_per_transfer": log.payload_bytes / counts.transfers,
        "limits": limits,
        "ratios": {"echo": per_second / limits["echo_calls_per_second"]},
        "checks": {
            "balances": report["failed"] == 0 and report["balances"],
            "log": log.has_all_transfers,
        },
    }


def measure_snapshot(scenario: Scenario, folder: Path, counts: Counts) -> dict[str, Any]:
    """A stream under full load, and a snapshot of the shard in the middle of it. Every batch is a commit that somebody waits
    for. `snapshot.batch_ms` is of the batches that were under way while the snapshot was being written, `batch_ms` of as many
    right before it. `delay_ms` is what they took beyond the usual batch before (its p50, `batch_ms.p50`): `max` is not made
    smaller by a stall that happened without the snapshot. `delay_ms_before` reads the batches before in the same way: what is
    not more than that is no delay by the snapshot. The rate beside it is held against the rate before it, too.
    `writer` is what the shard's writer itself counted, beside the snapshot and before it, and `writer_pause_ms` how long it did
    nothing but begin and end the image.
    """
    limits = disk_limits(folder)
    with serving(folder, scenario.shards, snapshots=False) as server:
        plan = Plan(
            address=server.address,
            echo_address="",
            accounts=counts.accounts,
            transfers=counts.transfers,
            window=scenario.window,
        )
        with _shards(server) as shards, _snapshot_at(shards, counts.accounts + counts.transfers // 3) as taking:
            report = load(server, plan)
            taken = taking.result(timeout=READY_S_MAX)
    beside = _beside(np.array(report["spans"]), taken["began"], taken["ended"])
    seconds = taken["ended"] - taken["began"]
    log = read_logs(folder, counts.transfers)
    limits["fdatasync_beside_nothing_ms"] = 1000 / limits["fdatasync_4k_per_second"]
    return {
        "transfers_per_second": report["transfers"] / report["seconds"],
        "batch_ms": beside["before_ms"],
        "cpu_seconds": {"client": report["cpu_seconds"], "server": report["server_cpu_seconds"]},
        "bytes_per_transfer": log.payload_bytes / counts.transfers,
        "snapshot": {
            "bytes": taken["bytes"],
            "seconds": seconds,
            "bytes_per_second": taken["bytes"] / seconds,
            "batches": beside["batches"],
            "batches_before": beside["batches_before"],
            "batch_ms": beside["beside_ms"],
            "delay_ms": beside["delay_ms"],
            "delay_ms_before": beside["delay_ms_before"],
            "writer_pause_ms": taken["writer_pause_ms"],
            "writer": taken["writer"],
        },
        "limits": limits,
        "ratios": {
            "rate_beside_snapshot": beside["rate"],
            "disk_bandwidth": taken["bytes"] / seconds / limits["fdatasync_1m_bytes_per_second"],
        },
        "checks": {
            "balances": report["failed"] == 0 and report["balances"],
            "log": log.has_all_transfers,
            "snapshot_in_mid_stream": beside["batches"] > 0 and beside["batches_before"] > 0,
        },
    }


def _beside(spans: np.ndarray[Any, Any], began: float, ended: float) -> dict[str, Any]:
    """Batches (start and end of each, in seconds) under way from `began` to `ended`, against as many that ended right before."""
    under_way = (spans[:, 1] >= began) & (spans[:, 0] <= ended)
    before = spans[spans[:, 1] < began]
    before = before[np.argsort(before[:, 1])][-int(under_way.sum()) :]
    none = {"p50": 0.0, "p99": 0.0, "max": 0.0}
    before_ms, beside_ms = (
        percentiles(list((some[:, 1] - some[:, 0]) * 1000)) if len(some) else none
        for some in (before, spans[under_way])
    )
    done = int(((spans[:, 1] >= began) & (spans[:, 1] <= ended)).sum())
    rate_before = len(before) / (began - before[:, 0].min()) if len(before) else 0.0
    return {
        "batches": int(under_way.sum()),
        "batches_before": len(before),
        "before_ms": before_ms,
        "beside_ms": beside_ms,
        "delay_ms": {name: round(beside_ms[name] - before_ms["p50"], 3) for name in beside_ms},
        "delay_ms_before": {name: round(before_ms[name] - before_ms["p50"], 3) for name in before_ms},
        "rate": done / (ended - began) / rate_before if rate_before else 0.0,
    }


def measure_restore(scenario: Scenario, folder: Path, counts: Counts) -> dict[str, Any]:
    """A shard with accounts and transfers, a snapshot taken half way: how soon a new process has it back, from snapshot and
    log, and from the log alone. `seconds` and `cpu_seconds` are from the start of the process until it serves, less those of
    a server that has nothing to restore (the median of three starts); a rate is None where that difference is less than five
    times their spread, which says nothing. The state must have the digest that it had before the stop, and accounts their balances.
    """
    limits = disk_limits(folder)
    with serving(folder, scenario.shards, snapshots=False) as server, _shards(server) as shards:
        plan = Plan(address=server.address, echo_address="", accounts=counts.accounts, transfers=counts.transfers)
        with _snapshot_at(shards, counts.accounts + counts.transfers // 2) as taking:
            report = load(server, plan)
            taken = taking.result(timeout=READY_S_MAX)
        before = _state(server, shards, counts)
    with tempfile.TemporaryDirectory(dir=folder.parent) as bare:
        starts = []
        for _ in range(4):
            with serving(Path(bare), scenario.shards, snapshots=False) as nothing:
                starts.append((nothing.start_seconds, nothing.cpu_seconds()))
        starts = starts[1:]  # the first one makes the log, which a restart does not
    empty = [one for one, _ in starts]
    limits["empty_start_seconds"] = float(np.median(empty))
    limits["empty_start_spread_seconds"] = max(empty) - min(empty)
    limits["empty_start_cpu_seconds"] = float(np.median([cpu for _, cpu in starts]))
    whole = _restart(scenario, folder, counts, limits, before)
    for snapshots in folder.glob("**/snapshots"):
        snapshots.rename(snapshots.with_name("snapshots.away"))
    log_alone = _restart(scenario, folder, counts, limits, before)
    for one in (whole, log_alone):
        one["accounts_per_second"] = _rate(counts.accounts, one["seconds"], limits)
    whole["replayed_events"] = before["sequence"] - taken["sequence"]
    log_alone["replayed_events"] = before["sequence"]
    log_alone["events_per_second"] = _rate(log_alone["replayed_events"], log_alone["seconds"], limits)
    log = read_logs(folder, counts.transfers)
    return {
        "transfers_per_second": report["transfers"] / report["seconds"],
        "batch_ms": report["batch_ms"],
        "cpu_seconds": {"client": report["cpu_seconds"], "server": log_alone["cpu_seconds"]},
        "bytes_per_transfer": log.payload_bytes / counts.transfers,
        "snapshot_bytes": taken["bytes"],
        "restore": {"snapshot_and_log": whole, "log_alone": log_alone},
        "replay_events_per_second": log_alone["events_per_second"],
        "restore_seconds": whole["seconds"],
        "limits": limits,
        "ratios": {
            "disk_bandwidth": _rate(
                log.payload_bytes / limits["fdatasync_1m_bytes_per_second"], log_alone["seconds"], limits
            )
        },
        "checks": {
            "balances": bool(report["failed"] == 0 and report["balances"] and whole["same"] and log_alone["same"]),
            "log": log.has_all_transfers,
        },
    }


def _rate(count: float, seconds: float, limits: dict[str, float]) -> float | None:
    """None where the seconds are lost in how much one empty start differs from another."""
    return count / seconds if seconds > 0 and seconds >= 5 * limits["empty_start_spread_seconds"] else None


def _restart(
    scenario: Scenario, folder: Path, counts: Counts, limits: dict[str, float], before: dict[str, Any]
) -> dict[str, Any]:
    with serving(folder, scenario.shards, snapshots=False) as server:
        cpu_seconds = server.cpu_seconds() - limits["empty_start_cpu_seconds"]
        with _shards(server) as shards:
            same = _state(server, shards, counts) == before
    seconds = server.start_seconds - limits["empty_start_seconds"]
    return {"seconds": seconds, "start_seconds": server.start_seconds, "cpu_seconds": cpu_seconds, "same": same}


@contextmanager
def _shards(server: Server) -> Iterator[wallet_service_pb2_grpc.ShardServiceStub]:
    with grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield wallet_service_pb2_grpc.ShardServiceStub(channel)


@contextmanager
def _snapshot_at(shards: wallet_service_pb2_grpc.ShardServiceStub, sequence: int) -> Iterator[Future[dict[str, Any]]]:
    """Takes a snapshot of shard 0 in a thread once the shard has come so far. The future says when it began and ended, by the
    machine's monotonic clock.
    """
    leaving = threading.Event()

    def take() -> dict[str, Any]:
        while shards.ListShards(shard_pb2.ListShardsRequest()).shards[0].durable_sequence_number < sequence:
            if leaving.wait(POLL_S):
                raise RuntimeError(f"the shard has not come to event {sequence}")
        began = time.perf_counter()
        answer = shards.CreateSnapshot(shard_pb2.CreateSnapshotRequest(shard=0))
        ended = time.perf_counter()
        return {
            "began": began,
            "ended": ended,
            "sequence": answer.snapshot.sequence_number,
            "bytes": answer.snapshot.size_bytes,
            "writer_pause_ms": {
                "max": answer.writer_beside.pause_ns_max / 1e6,
                "total": answer.writer_beside.pause_ns / 1e6,
            },
            "writer": {
                "before": _writer(answer.writer_before),
                "beside": _writer(answer.writer_beside),
            },
        }

    with ThreadPoolExecutor(1) as beside:
        try:
            yield beside.submit(take)
        finally:
            leaving.set()


def _writer(times: shard_pb2.WriterTimes) -> dict[str, float]:
    """Batches and commits of the shard's writer, in ms; `apply_cpu_us_a_transfer` is of its threads alone."""
    return {
        "batches": times.batches,
        "apply_cpu_us_a_transfer": times.apply_cpu_ns / 1e3 / max(times.rows, 1),
        "apply_cpu_ms_max": times.apply_cpu_ns_max / 1e6,
        "apply_ms_max": times.apply_ns_max / 1e6,
        "commits": times.commits,
        "commit_ms_max": times.commit_ns_max / 1e6,
    }


def _state(server: Server, shards: wallet_service_pb2_grpc.ShardServiceStub, counts: Counts) -> dict[str, Any]:
    """What must be the same after a restore: position and digest, which covers every balance, and what some accounts
    answer.
    """
    [shard] = shards.ListShards(shard_pb2.ListShardsRequest()).shards
    numbers = np.linspace(0, counts.accounts - 1, min(counts.accounts, SAMPLE_ACCOUNTS)).astype(np.uint64)
    with grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        request = wallet_pb2.GetAccountsRequest(account_ids=[row.tobytes() for row in account_ids(numbers)])
        found = wallet_service_pb2_grpc.WalletServiceStub(channel).GetAccounts(request).accounts
    return {
        "sequence": shard.sequence_number,
        "digest": shard.digest,
        "accounts": shard.account_count,
        "balances": [account.balance_minor for account in found],
    }


def measure_memory(scenario: Scenario, folder: Path, counts: Counts) -> dict[str, Any]:
    """Resident bytes an account, accounts alone."""
    with serving(folder, scenario.shards) as server:
        before = server.memory_bytes()
        plan = Plan(
            address=server.address,
            echo_address="",
            accounts=counts.accounts,
            transfers=counts.transfers,
            check_balances=True,
        )
        client = Client(plan)
        client.wait_for("started")
        after = server.memory_bytes()
        client.go_on()
        client.wait_for("measured")
        client.go_on()
        report = client.result()
    log = read_logs(folder, counts.transfers)
    return {
        "transfers_per_second": report["transfers"] / report["seconds"],
        "batch_ms": report["batch_ms"],
        "cpu_seconds": {"client": report["cpu_seconds"], "server": 0.0},
        "bytes_per_transfer": log.payload_bytes / counts.transfers,
        "bytes_per_account": (after - before) / counts.accounts,
        "limits": {},
        "ratios": {},
        "checks": {
            "balances": report["failed"] == 0 and report["balances"],
            "log": log.has_all_transfers,
        },
    }


SCENARIOS: dict[str, Scenario] = {
    "uniform-10k": Scenario("10 thousand accounts, 2 M transfers", 10_000, 2_000_000, measure_stream),
    "uniform-1m": Scenario("1 million accounts, 10 M transfers", 1_000_000, 10_000_000, measure_stream),
    "uniform-10m": Scenario("10 million accounts, 10 M transfers", 10_000_000, 10_000_000, measure_stream),
    "hot-account": Scenario("every transfer through one account", 10_000, 2_000_000, measure_stream, pattern="hot"),
    "cross-shard": Scenario("4 shards, three of four transfers cross", 10_000, 2_000_000, measure_stream, shards=4),
    "unary": Scenario(
        "single transfers, 128 at once", 10_000, 30_000, measure_unary, window=128, smoke_transfers=2_000
    ),
    "unary-idle": Scenario(
        "single transfers, one at a time", 10_000, 3_000, measure_unary, window=1, smoke_transfers=200
    ),
    "restore": Scenario(
        "a start from snapshot and log, and from the log alone", 1_000_000, 10_000_000, measure_restore
    ),
    "snapshot": Scenario(
        "a snapshot beside a stream under full load",
        1_000_000,
        10_000_000,
        measure_snapshot,
        smoke_accounts=10_000,
        smoke_transfers=819_000,
    ),
    "memory": Scenario("resident bytes an account", 2_000_000, 8_190, measure_memory, smoke_transfers=8_190),
}


def run(
    name: str,
    *,
    transfers: int | None = None,
    accounts: int | None = None,
    smoke: bool = False,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Runs one scenario; the dict is what `--json` prints."""
    scenario = SCENARIOS[name]
    counts = Counts(
        accounts or (scenario.smoke_accounts if smoke else scenario.accounts),
        transfers or (scenario.smoke_transfers if smoke else scenario.transfers),
    )
    folder = Path(tempfile.mkdtemp(prefix="ducat-bench-", dir=data_dir))
    (folder / "data").mkdir()
    try:
        report = scenario.measure(scenario, folder / "data", counts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"scenario": name, "accounts": counts.accounts, "transfers": counts.transfers, **report}


@dataclass(frozen=True)
class LogFound:
    """What the event logs under a folder have. `payload_bytes`: frames, headers included, without the preallocated rest of the
    last segment."""

    payload_bytes: int
    has_all_transfers: bool


def read_logs(folder: Path, count: int) -> LogFound:
    """Reads every frame once; all transfers: exactly 0 … count - 1, each once. A frame and a byte a transfer are kept."""
    seen = np.zeros(count, dtype=np.bool_)
    found = payload_bytes = 0
    is_known = True
    for frame in _frames(folder):
        payload_bytes += HEADER_BYTES + len(frame.body)
        if not frame.body:
            continue
        kinds = np.frombuffer(frame.body, dtype=np.uint8)[KIND_OFFSET::RECORD_BYTES]
        words = np.frombuffer(frame.body, dtype="<u8").reshape(len(kinds), -1)
        moved = words[(kinds == KIND_MOVED) | (kinds == KIND_SENT), 1]
        numbers = moved.byteswap() & np.uint64(
            0x00FF_FFFF_FFFF_FFFF
        )  # ids are big-endian, their last 56 bits the number
        is_known = is_known and (len(numbers) == 0 or int(numbers.max()) < count)
        if is_known:
            seen[numbers] = True
        found += len(numbers)
    return LogFound(payload_bytes, is_known and found == count and bool(seen.all()))


def _frames(folder: Path) -> Iterator[Frame]:
    for log in sorted(folder.glob("**/log")):
        yield from read_frames(log, int(log.parent.name.removeprefix("shard-")))


def tigerbeetle_ratio(folder: Path, per_second: float, counts: Counts) -> dict[str, float]:
    """Its own benchmark at the same counts, where TIGERBEETLE names its binary: one replica, batches of 8,189, its data file
    on the same disk (it is removed afterwards).
    """
    binary = os.environ.get("TIGERBEETLE")
    if not binary:
        return {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        done = subprocess.run(
            [
                os.path.abspath(binary),
                "benchmark",
                f"--account-count={counts.accounts}",
                f"--transfer-count={counts.transfers}",
            ],
            capture_output=True,
            text=True,
            timeout=1800,
            cwd=place,
        )
    shown = done.stdout + done.stderr
    for line in shown.splitlines() if done.returncode == 0 else ():
        if line.startswith("load accepted ="):
            return {"tigerbeetle": per_second / float(line.split("=")[1].split()[0])}
    raise RuntimeError(
        f"tigerbeetle benchmark: exit code {done.returncode}, and no line 'load accepted = … tx/s' in what it said:"
        f"\n{shown[-2000:]}"
    )


def print_report(report: dict[str, Any]) -> None:
    """The same figures for people."""
    print(f"{report['scenario']}: {SCENARIOS[report['scenario']].about}")
    print(f"  accounts {report['accounts']:,}, transfers {report['transfers']:,}")
    print(f"  {report['transfers_per_second']:,.0f} transfers/s")
    print("  batch ms  " + ", ".join(f"{name} {value}" for name, value in report["batch_ms"].items()))
    print("  CPU s     " + ", ".join(f"{name} {value:.2f}" for name, value in report["cpu_seconds"].items()))
    print(f"  log       {report['bytes_per_transfer']:.1f} bytes a transfer")
    for name in ("replay_events_per_second", "restore_seconds", "bytes_per_account"):
        if report.get(name) is not None:
            print(f"  {name.replace('_', ' ')}  {report[name]:,.2f}")
    restored = report.get("restore", {})
    groups = {
        **restored,
        **{
            name: report[name]
            for name in ("accounts_per_second", "snapshot", "limits", "ratios", "checks")
            if name in report
        },
    }
    for group, values in groups.items():
        for name, value in values.items():
            print(f"  {group:<9} {name} {value if not isinstance(value, float) else f'{value:,.3f}'}")
