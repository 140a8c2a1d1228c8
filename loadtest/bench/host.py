"""Durable transfers through the shard host without gRPC: what engine, log and disk do together.

    python -m loadtest.bench.host [--accounts 10000] [--transfers 2000000] [--shards 1] [--window 8] [--kafka HOST:PORT] [--json]

Messages are built beforehand; all ids are distinct; fdatasync is on. Afterwards every balance is checked against a sum
made outside, every transfer is looked up in the log, and a restart must give the same digest. The machine's own limit
is measured in the same run: direct writes and fdatasync of the same number of bytes in the same group size.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wallet_core.event_log import read_frames
from wallet_core.service.port import AccountRow
from wallet_core.shard import ShardHost, ShardHostConfig, open_host
from wallet_core.shard.port import shard_folder

if TYPE_CHECKING:
    from wallet_core.event_log.kafka import KafkaLogConfig

ROWS = 8190
OVERDRAFT = 10**12


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def transfer_ids(count: int, time_ms: int, rng: np.random.Generator) -> np.ndarray:
    """UUIDs of version 7, one millisecond per 8,190 of them."""
    ids = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    times = (time_ms + np.arange(count, dtype=np.int64) // ROWS).astype(">u8").view(np.uint8).reshape(count, 8)
    ids[:, :6] = times[:, 2:]
    ids[:, 6] = ids[:, 6] & 0x0F | 0x70
    ids[:, 8] = ids[:, 8] & 0x3F | 0x80
    return ids


def message(batch: int, ids: np.ndarray, debit: np.ndarray, credit: np.ndarray, amounts: np.ndarray) -> bytes:
    """One serialized TransferBatch."""
    out = b"\x08" + varint(batch)
    columns = (ids.tobytes(), debit.tobytes(), credit.tobytes(), amounts.astype("<i8").tobytes())
    for field, column in zip((0x12, 0x1A, 0x22, 0x2A), columns, strict=True):
        out += bytes([field]) + varint(len(column)) + column
    return out


def failed_rows(result: bytes) -> int:
    """Rows that are not OK in a TransferBatchResult (length of field 5)."""
    at = 0
    while at < len(result):
        tag = result[at]
        at += 1
        value = shift = 0
        while True:
            byte = result[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if tag & 7 == 2:
            if tag >> 3 == 5:
                return value
            at += value
    return 0


def drive(host: ShardHost, messages: list[bytes], window: int) -> tuple[float, list[float], int]:
    """Keep `window` messages under way; returns seconds, latencies, failed rows."""
    poll = select.poll()
    poll.register(host.fileno(), select.POLLIN)
    began: dict[int, float] = {}
    latencies: list[float] = []
    failed = following = 0
    start = time.perf_counter()
    while len(latencies) < len(messages):
        while following < len(messages) and len(began) < window:
            began[following] = time.perf_counter()
            host.submit_message(following, messages[following])
            following += 1
        poll.poll(10_000)
        if host.failed:
            raise SystemExit(f"the host stopped: {host.failure()}")
        now = time.perf_counter()
        for ticket, result in host.completions():
            if isinstance(result, Exception):
                raise result
            latencies.append(now - began.pop(ticket))
            failed += failed_rows(result)
    return time.perf_counter() - start, latencies, failed


def accounts(host: ShardHost, ids: np.ndarray) -> None:
    poll = select.poll()
    poll.register(host.fileno(), select.POLLIN)
    for at in range(0, len(ids), ROWS):
        host.submit_accounts(0, [AccountRow(i.tobytes(), "USD", 0, OVERDRAFT) for i in ids[at : at + ROWS]])
        poll.poll(10_000)
        [(_, result)] = host.completions()
        if set(result.codes) != {1}:
            raise SystemExit(f"accounts could not be opened: {set(result.codes)}")


def disk_limit(folder: Path, total: int, group: int) -> float:
    """Bytes a second of direct writes, each followed by fdatasync, over blocks that were written before."""
    group = max(4096, group - group % 4096)
    count = max(20, min(total // group, 2000))
    path = folder / "limit"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    buffer = mmap.mmap(-1, group)
    try:
        for i in range(count):
            os.pwrite(fd, buffer, i * group)
        os.fsync(fd)
        buffer[:] = b"\x5a" * group
        start = time.perf_counter()
        for i in range(count):
            os.pwrite(fd, buffer, i * group)
            os.fdatasync(fd)
        return count * group / (time.perf_counter() - start)
    finally:
        os.close(fd)
        path.unlink()


def balances(host: ShardHost, ids: np.ndarray) -> dict[bytes, int]:
    poll = select.poll()
    poll.register(host.fileno(), select.POLLIN)
    found = {}
    for at in range(0, len(ids), ROWS):
        host.submit_read(0, [i.tobytes() for i in ids[at : at + ROWS]])
        poll.poll(10_000)
        [(_, result)] = host.completions()
        found.update((state.id, state.balance) for state in result.accounts)
    return found


def logged_ids(root: Path, shards: int, ids: np.ndarray) -> int:
    """How many of the ids the log holds exactly once."""
    found = []
    for shard in range(shards):
        for frame in read_frames(shard_folder(root, shard) / "log", shard):
            records = np.frombuffer(frame.body, dtype=np.uint8).reshape(-1, 48)
            found.append(records[(records[:, 46] == 3) | (records[:, 46] == 9), :16])
    there = np.sort(np.ascontiguousarray(np.concatenate(found)).view("V16").ravel().view("S16"))
    wanted = np.sort(np.ascontiguousarray(ids).view("S16").ravel())
    return len(ids) if np.array_equal(there, wanted) else int(np.isin(wanted, there).sum())


def run(options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    root = Path(tempfile.mkdtemp(prefix="host-bench-", dir=options.folder))
    config = ShardHostConfig(
        data_dir=root,
        shard_count=options.shards,
        reserve_bytes=1 << 26,
        sync=not options.no_sync,
        kafka=kafka_log(options.kafka),
        rows_in_flight_max=(options.window + 1) * ROWS,
        bytes_in_flight_max=1 << 30,
    )
    try:
        host = open_host(config)
        host.start()
        account_ids = rng.integers(0, 256, (options.accounts, 16), dtype=np.uint8)
        accounts(host, account_ids)
        time_ms = time.time_ns() // 10**6
        count = options.transfers
        ids = transfer_ids(count, time_ms, rng)
        debit = rng.integers(0, options.accounts, count)
        credit = (debit + rng.integers(1, options.accounts, count)) % options.accounts
        if options.hot:
            debit[:] = 0
            credit = rng.integers(1, options.accounts, count)
        amounts = rng.integers(1, 1000, count)
        messages = [
            message(n, ids[s], account_ids[debit[s]], account_ids[credit[s]], amounts[s])
            for n, s in enumerate(slice(at, at + ROWS) for at in range(0, count, ROWS))
        ]
        for shard in host.shard_ids:
            host.log(shard).wait_prepared()
        before = host.shards()
        cpu = resource.getrusage(resource.RUSAGE_SELF)
        seconds, latencies, failed = drive(host, messages, options.window)
        used = resource.getrusage(resource.RUSAGE_SELF)
        after = host.shards()
        latencies.sort()
        log_bytes = sum(b.log_bytes - a.log_bytes for a, b in zip(before, after, strict=True))
        syncs = sum(b.sync_count - a.sync_count for a, b in zip(before, after, strict=True))
        expected = np.zeros(options.accounts, dtype=np.int64)
        np.add.at(expected, debit, -amounts)
        np.add.at(expected, credit, amounts)
        found = balances(host, account_ids)
        balances_ok = all(found[account_ids[i].tobytes()] == expected[i] for i in range(options.accounts))
        totals = host.totals()
        digests = {s.shard: s.digest for s in host.shards()}
        host.close()
        limit = disk_limit(root, log_bytes, log_bytes // max(syncs, 1))
        logged = 0
        if not options.no_check:
            logged = logged_ids(root, options.shards, ids)
        start = time.perf_counter()
        host = open_host(config)
        replay_seconds = time.perf_counter() - start
        same = {s.shard: s.digest for s in host.shards()} == digests
        host.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    rate = count / seconds
    return {
        "scenario": "host-hot" if options.hot else "host-uniform",
        "accounts": options.accounts,
        "transfers": count,
        "shards": options.shards,
        "transfers_per_second": round(rate),
        "batch_ms": {
            "p50": round(latencies[len(latencies) // 2] * 1e3, 2),
            "p99": round(latencies[len(latencies) * 99 // 100] * 1e3, 2),
            "max": round(latencies[-1] * 1e3, 2),
        },
        "cpu_seconds": round(used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime, 3),
        "cpu_user_seconds": round(used.ru_utime - cpu.ru_utime, 3),
        "page_faults": used.ru_minflt - cpu.ru_minflt,
        "seconds": round(seconds, 3),
        "bytes_per_transfer": round(log_bytes / count, 2),
        "sync_count": syncs,
        "limits": {"fdatasync_bytes_per_second": round(limit)},
        "ratios": {"disk": round(log_bytes / seconds / limit, 3)},
        "replay_events_per_second": round(sum(s.sequence for s in after) / replay_seconds),
        "checks": {
            "failed_rows": failed,
            "balances": balances_ok and all(t.balance + t.in_flight == 0 for t in totals),
            "log": options.no_check or logged == count,
            "digest_after_restart": same,
        },
    }


def passed(checks: dict[str, Any]) -> bool:
    """No row failed, and every other check says True itself: False equals 0, and 1 equals True."""
    others = (value is True for name, value in checks.items() if name != "failed_rows")
    return type(checks["failed_rows"]) is int and checks["failed_rows"] == 0 and all(others)


def kafka_log(bootstrap: str) -> KafkaLogConfig | None:
    """A topic of its own for each run; nobody deletes it."""
    if not bootstrap:
        return None
    from wallet_core.event_log.kafka import KafkaLogConfig

    return KafkaLogConfig(bootstrap, topic=f"ducat.bench.{os.getpid()}.{time.time_ns()}", timeout_ms=60_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accounts", type=int, default=10_000)
    parser.add_argument("--transfers", type=int, default=2_000_000)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--window", type=int, default=8, help="messages under way")
    parser.add_argument("--hot", action="store_true", help="every transfer debits one account")
    parser.add_argument("--no-sync", action="store_true", help="without fdatasync: to see what it costs")
    parser.add_argument("--no-check", action="store_true", help="do not look every id up in the log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default=None, help="where the log is written (default: the temporary folder)")
    parser.add_argument(
        "--kafka", default="", help="brokers, host:port: the log is in Kafka, a topic of its own each run"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:26} {value}")
    if not passed(result["checks"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
