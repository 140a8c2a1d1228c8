"""What the shard host's tests share: ids, messages, and a host that is driven by hand."""

from __future__ import annotations

import hashlib
import select
from pathlib import Path
from typing import Any

from kernel.ids import account_id, uuid7
from wallet_core.engine.codes import AccountFlags
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardClock, ShardHost, ShardHostConfig, open_host

NOW_MS = 1_800_000_000_000
NOW_NS = NOW_MS * 1_000_000
SEGMENT = 1 << 20


def transfer_id(number: int, time_ms: int = NOW_MS) -> bytes:
    return uuid7(time_ms, hashlib.sha256(number.to_bytes(8, "big")).digest()[:10])


def account(number: int) -> bytes:
    return account_id(f"test/{number}")


def on_shard(shard: int, shard_count: int, index: int = 0) -> bytes:
    """The `index`-th test account that lives on a shard."""
    number = 0
    while True:
        found = account(number)
        slot = ((found[14] << 8) | found[15]) & 0x0FFF
        if slot * shard_count // 4096 == shard:
            if index == 0:
                return found
            index -= 1
        number += 1


def config(folder: Path, shard_count: int = 1, **options: Any) -> ShardHostConfig:
    settings: dict[str, Any] = {"segment_bytes": SEGMENT, "reserve_bytes": 0, "generation_ids": 1 << 16, **options}
    return ShardHostConfig(data_dir=folder, shard_count=shard_count, **settings)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def message(rows: list[TransferRow], batch_id: int = 7, settle: int = 0) -> bytes:
    """A TransferBatch written by hand, optional columns only where a row uses them."""
    out = b"\x08" + varint(batch_id)
    out += field(2, b"".join(row[0] for row in rows))
    out += field(3, b"".join(row[1] for row in rows))
    out += field(4, b"".join(row[2] for row in rows))
    out += field(5, b"".join(row[3].to_bytes(8, "little", signed=True) for row in rows))
    if any(row[4] for row in rows):
        out += field(6, b"".join(row[4].to_bytes(2, "little") for row in rows))
    if any(any(row[5]) for row in rows):
        out += field(7, b"".join(row[5] for row in rows))
    if any(row[6] for row in rows):
        out += field(8, b"".join(row[6].to_bytes(4, "little") for row in rows))
    if any(row[7] for row in rows):
        out += field(9, b"".join(row[7].to_bytes(2, "little") for row in rows))
    if settle:
        out += b"\x50" + varint(settle)
    return out


class Driver:
    """A host and the answers it has given so far."""

    def __init__(self, settings: ShardHostConfig, *, now_ns: int = NOW_NS) -> None:
        self.clock = ShardClock(now_ns)
        self.host: ShardHost = open_host(settings, clock=self.clock)
        self.host.start()
        self.answers: dict[int, Any] = {}
        self.ticket = 0

    def take(self, timeout_ms: int = 5_000) -> None:
        poll = select.poll()
        poll.register(self.host.fileno(), select.POLLIN)
        poll.poll(timeout_ms)
        for ticket, result in self.host.completions():
            assert ticket not in self.answers
            self.answers[ticket] = result

    def wait(self, ticket: int) -> Any:
        for _ in range(200):
            if ticket in self.answers:
                return self.answers.pop(ticket)
            if self.host.failed:
                failure = self.host.failure()
                assert failure is not None
                raise failure
            self.take()
        raise AssertionError(f"ticket {ticket} was never answered")

    def submit(self, rows: list[TransferRow], *, settled: bool = True) -> int:
        self.ticket += 1
        self.host.submit_rows(self.ticket, rows, settled=settled)
        return self.ticket

    def transfers(self, rows: list[TransferRow], *, settled: bool = True) -> list[int]:
        return list(self.wait(self.submit(rows, settled=settled)).codes)

    def send(self, data: bytes, *, wrapped: bool = False) -> Any:
        self.ticket += 1
        self.host.submit_message(self.ticket, data, wrapped=wrapped)
        return self.wait(self.ticket)

    def open_accounts(self, rows: list[AccountRow], *, update: bool = False) -> list[int]:
        self.ticket += 1
        self.host.submit_accounts(self.ticket, rows, update=update)
        return list(self.wait(self.ticket).codes)

    def balances(self, ids: list[bytes]) -> list[int | None]:
        self.ticket += 1
        self.host.submit_read(self.ticket, ids)
        return [None if state is None else state.balance for state in self.wait(self.ticket).accounts]

    def fund(self, ids: list[bytes], amount: int, source: bytes) -> None:
        """Open accounts and give each an amount from a striped source that may overdraw."""
        flags = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
        assert set(self.open_accounts([AccountRow(source, "USD", flags), *(AccountRow(i, "USD") for i in ids)])) == {1}
        rows = [TransferRow(transfer_id(10**9 + n), source, one, amount) for n, one in enumerate(ids)]
        assert set(self.transfers(rows)) == {1}

    def digests(self) -> dict[int, bytes]:
        return {one.shard: one.digest for one in self.host.shards()}

    def close(self) -> None:
        for shard in self.host.shard_ids:
            self.host.log(shard).hold_sync(False)  # a failed test must not hang in its teardown
        self.host.close()
