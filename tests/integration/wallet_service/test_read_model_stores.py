"""Risk: what PostgreSQL and Valkey hold is not what the shards hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio

from kernel.ids import account_id, derived_transfer_id
from runtime.bus import RetryLater
from runtime.postgres import Pool, create_pool
from tests.unit.wallet_core.service.memory_host import MemoryHost
from tests.unit.wallet_core.service.test_projection import NAMES, busy_host, live_sums, until_caught_up
from wallet_core.adapters.alone import NoReadModel
from wallet_core.adapters.directory import PostgresDirectory
from wallet_core.adapters.read_model import (
    PostgresStore,
    ReadModelReader,
    ValkeyStore,
    past_results,
    reset_postgres,
    reset_valkey,
)
from wallet_core.adapters.snapshot_base import newest_base
from wallet_core.engine.codes import AccountFlags, AccountResult, EventKind, TransferFlags, TransferResult
from wallet_core.projection import Changes
from wallet_core.service.port import AccountRow, NamedAccount, TransferRow
from wallet_core.service.projector import Projector
from wallet_core.service.wallet import AccountSpec, Wallet
from wallet_core.shard import ShardHostConfig, WalletHost


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    pool = await create_pool(postgres_dsn, "wallet")
    yield pool
    await pool.close()


@pytest.fixture
async def valkey(valkey_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(valkey_url)
    yield client
    await client.aclose()


def no_base(shard: int, sequence: int | None) -> None:
    return None


def follower(host: MemoryHost, pool: Pool, valkey: redis.asyncio.Redis) -> Projector:
    return Projector(host, [PostgresStore(pool), ValkeyStore(valkey, no_base)], gather_s=0)


async def balances_in(valkey: redis.asyncio.Redis) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    async for key in valkey.scan_iter(match="wallet:balance:*"):
        fields = await valkey.hgetall(key)
        sums = [int(fields.get(name, 0)) for name in (b"balance", b"held_out", b"held_in")]
        found[bytes.fromhex(key.decode().rpartition(":")[2])] = sums
        assert fields[b"currency"] == b"USD"
    return found


async def test_both_stores_equal_the_shards_and_a_rebuild_equals_them_again(
    pool: Pool, valkey: redis.asyncio.Redis
) -> None:
    host = await busy_host(3)
    await until_caught_up(follower(host, pool, valkey), host)
    assert await balances_in(valkey) == live_sums(host)
    rows = await pool.fetch("SELECT * FROM wallet.transfer ORDER BY shard, sequence_number")
    assert len(rows) > 100

    await reset_postgres(pool, host.shard_ids)
    assert await reset_valkey(valkey) > len(NAMES)
    await until_caught_up(follower(host, pool, valkey), host)
    assert await balances_in(valkey) == live_sums(host)
    assert await pool.fetch("SELECT * FROM wallet.transfer ORDER BY shard, sequence_number") == rows


async def test_a_trimmed_log_is_rebuilt_from_its_snapshot_and_old_statements_stay(
    pool: Pool, valkey: redis.asyncio.Redis, tmp_path: Path
) -> None:
    """Two snapshots let old segments go; then Valkey is lost and the read model is rebuilt."""
    config = ShardHostConfig(tmp_path, shard_count=1, segment_bytes=1 << 20, reserve_bytes=0)
    host = await WalletHost.open(config)
    try:
        await busy_shard(host, rounds=40)
        stores = [PostgresStore(pool), ValkeyStore(valkey, lambda shard, at: newest_base(config, shard, sequence=at))]
        projector = Projector(host, stores, gather_s=0)
        host.retain = projector.projected
        await host.snapshot(0)
        assert host.first_sequence(0) == 1
        await until_caught_up(projector, host)
        await host.snapshot(0)
        await busy_shard(host, rounds=20, label=1)
        await until_caught_up(projector, host)
        await host.snapshot(0)
        oldest = host.first_sequence(0)
        assert oldest > 1
        await busy_shard(host, rounds=4, label=2)
        await until_caught_up(projector, host)
        before = await balances_in(valkey)
        holds = await valkey.hgetall("wallet:0:holds")
        assert len(holds) > 10
        rows = await pool.fetch("SELECT * FROM wallet.transfer ORDER BY sequence_number")

        await reset_postgres(pool, [0])
        await reset_valkey(valkey)
        await until_caught_up(projector_again := Projector(host, stores, gather_s=0), host)
        assert await balances_in(valkey) == before
        assert await valkey.hgetall("wallet:0:holds") == holds
        assert await pool.fetch("SELECT * FROM wallet.transfer ORDER BY sequence_number") == rows
        assert rows[0]["sequence_number"] < oldest
        assert projector_again.projected(0) == host.durable_sequence(0)

        # cut off in the middle of loading: it goes on where it was
        await reset_valkey(valkey)
        base = newest_base(config, 0)
        assert base is not None
        first = next(base.steps())
        assert await stores[1]._write(first, "0", f"{base.sequence}/1")  # type: ignore[union-attr]
        await until_caught_up(Projector(host, stores, gather_s=0), host)
        assert await balances_in(valkey) == before
    finally:
        await host.close()


async def busy_shard(host: WalletHost, rounds: int, label: int = 0) -> None:
    clearing = account_id("psp/sandbox/clearing/USD")
    sellers = [account_id(f"{name}/{number}") for name in NAMES for number in range(250)]
    await host.create_accounts([AccountRow(clearing, "USD", int(AccountFlags.MAY_OVERDRAW))])
    await host.create_accounts([AccountRow(seller, "USD", int(AccountFlags.MAY_OVERDRAW)) for seller in sellers])
    for number in range(rounds):
        now_ms = time.time_ns() // 1_000_000
        rows = []
        for place in range(500):
            transfer = derived_transfer_id(now_ms, f"{label}.{number}", str(place))
            flags = int(TransferFlags.HOLD) if place % 10 == 0 else 0
            rows.append(TransferRow(transfer, sellers[(number * 7 + place) % len(sellers)], clearing, place + 1, flags))
        ended = [
            TransferRow(derived_transfer_id(now_ms, "end", f"{label}.{number}.{place}"), row.debit_id, clearing, 0,
                        int(TransferFlags.POST if place % 20 else TransferFlags.VOID), row.id)
            for place, row in enumerate(rows) if place % 10 == 0 and place < 300
        ]  # fmt: skip
        assert set(await host.transfers(rows)) == {1}
        assert set(await host.transfers(ended)) == {1}


async def test_a_batch_that_was_applied_is_not_applied_again(pool: Pool, valkey: redis.asyncio.Redis) -> None:
    seller, clearing = account_id(NAMES[0]), account_id("psp/sandbox/clearing/USD")
    changes = Changes(1, 0, 5, balances={seller: [7, 2, 0], clearing: [-7, 0, 2]}, placed=[(4, 2)])
    changes.items.append((3, b"t" * 16, clearing, seller, 7, 3, 1, 0, 123))
    for store in (PostgresStore(pool), ValkeyStore(valkey, no_base)):
        assert await store.cursor(1) == 0
        assert await store.apply(changes)
        assert not await store.apply(changes)
        assert await store.cursor(1) == 5
        assert not await store.apply(Changes(1, 4, 9, balances={seller: [1, 1, 1]}))
        assert await store.apply(Changes(1, 5, 9, ended=[(4, seller, clearing)]))
        assert await store.cursor(1) == 9
    assert await valkey.hgetall(f"wallet:balance:{seller.hex()}") == {b"balance": b"7", b"held_out": b"0"}
    assert await valkey.hgetall("wallet:1:holds") == {}
    recent = await valkey.lrange(f"wallet:recent:{seller.hex()}", 0, -1)
    assert recent == [f'[3,"{(b"t" * 16).hex()}",7,"{clearing.hex()}",1,3,123]'.encode()]


async def test_recent_transfers_are_the_newest_first_and_bounded(valkey: redis.asyncio.Redis) -> None:
    one, two = b"1" * 16, b"2" * 16
    store = ValkeyStore(valkey, no_base, recent_count_max=3)
    items = [(number, bytes([number] * 16), one, two, number, 3, 1, 0, number) for number in range(1, 8)]
    await store.cursor(0)
    await store.apply(Changes(0, 0, 2, items=items[:2]))
    await store.apply(Changes(0, 2, 7, items=items[2:]))
    recent = await valkey.lrange(f"wallet:recent:{one.hex()}", 0, -1)
    assert [int(line.split(b",")[5]) for line in recent] == [7, 6, 5]


async def test_pages_of_an_account_are_complete_in_order_and_without_repeats(
    pool: Pool, valkey: redis.asyncio.Redis
) -> None:
    host = await busy_host(4)
    projector = follower(host, pool, valkey)
    await until_caught_up(projector, host)
    reader = ReadModelReader(pool, projector)
    clearing = account_id("psp/sandbox/clearing/USD")  # striped: its transfers are on both shards
    whole = await reader.of_account(clearing, None, 10_000)
    assert {item.shard for item in whole} == {0, 1}
    keys = [(item.time_ns, item.shard, item.sequence) for item in whole]
    assert keys == sorted(set(keys), reverse=True)
    paged, before = [], None
    while page := await reader.of_account(clearing, before, 7):
        paged += page
        before = (page[-1].time_ns, page[-1].shard, page[-1].sequence)
    assert paged == whole
    wanted = whole[5]
    assert wanted in await reader.by_id([wanted.id, b"x" * 16])
    moved = next(item for item in whole if item.kind == EventKind.MONEY_MOVED)
    assert await past_results(pool)([moved.id, b"x" * 16]) == {moved.id: TransferResult.OK}


async def test_names_page_by_prefix_in_code_point_order(pool: Pool) -> None:
    directory = PostgresDirectory(pool)
    names = ["a/1", "a/10", "a/2", "a0", "b/1", "a/é", "a/\U0010ffff", "a%", "z"]
    await directory.add([NamedAccount(account_id(name), name, "USD") for name in names])
    await directory.add([NamedAccount(account_id("a/1"), "a/1", "EUR")])
    assert [entry.name for entry in await directory.page("a/", "", 10)] == ["a/1", "a/10", "a/2", "a/é", "a/\U0010ffff"]
    assert [entry.name for entry in await directory.page("a/", "a/10", 1)] == ["a/2"]
    assert len(await directory.page("", "", 100)) == len(names)
    assert [entry.name for entry in await directory.page("a%", "", 10)] == ["a%"]
    assert await directory.names([account_id("z"), b"?" * 16]) == {account_id("z"): "z"}


async def test_concurrent_followers_of_the_same_stores_do_not_double(pool: Pool, valkey: redis.asyncio.Redis) -> None:
    """Two processes that both believe that they own the shards (a takeover): cursors decide."""
    host = await busy_host(5)
    one, two = follower(host, pool, valkey), follower(host, pool, valkey)
    await asyncio.gather(until_caught_up(one, host), until_caught_up(two, host))
    assert await balances_in(valkey) == live_sums(host)


async def test_a_sum_over_shards_beyond_64_bits_does_not_stop_the_projector(valkey: redis.asyncio.Redis) -> None:
    """Each shard keeps its part within 2^62; three such parts are more than Valkey's integers hold."""
    store = ValkeyStore(valkey, no_base)
    account, other = account_id("psp/a/clearing/USD"), account_id("seller/b/USD")
    for shard in range(3):
        changes = Changes(shard, 0, 1)
        changes.balances[account] = [2**62 - 1, 2**62 - 1, 0]
        changes.balances[other] = [5, 0, 0]
        assert await store.apply(changes)
        assert await store.cursor(shard) == 1
    assert await valkey.hget(f"wallet:balance:{account.hex()}", "balance") == b"overflow"
    assert await valkey.hget(f"wallet:balance:{other.hex()}", "balance") == b"15"


async def test_a_name_that_postgresql_cannot_keep_is_refused_row_by_row(pool: Pool, tmp_path: Path) -> None:
    host = await WalletHost.open(ShardHostConfig(tmp_path, segment_bytes=1 << 20, reserve_bytes=0))
    wallet = Wallet(host, PostgresDirectory(pool), NoReadModel())
    specs = [AccountSpec(b"", name, "USD", 0, 0, 0) for name in ("seller/a\0/USD", "seller/b/USD")]
    assert list(await wallet.open_accounts(specs)) == [AccountResult.ID_INVALID, AccountResult.OK]
    views, _ = await wallet.list_accounts("seller/", "", 10)
    assert [view.name for view in views] == ["seller/b/USD"]
    assert await wallet.list_accounts("seller/\0", "", 10) == ([], "")
    await host.close()


async def test_a_reset_beside_running_followers_loses_no_part_of_a_sum(
    pool: Pool, valkey: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are removed one batch after the other; a follower that begins again in between would add to what goes next."""
    monkeypatch.setattr("wallet_core.adapters.read_model._REMOVE_COUNT", 1)
    monkeypatch.setattr("wallet_core.service.projector.RETRY_S", (0.001,))
    host = await busy_host(6)
    running = follower(host, pool, valkey)
    task = asyncio.ensure_future(running.run())
    try:
        for _ in range(5):
            results = await asyncio.gather(*(reset_valkey(valkey) for _ in range(3)), return_exceptions=True)
            assert any(isinstance(one, int) for one in results)  # the others were overtaken, and say so
            assert all(isinstance(one, int | RetryLater) for one in results)
            await reset_postgres(pool, host.shard_ids)
            running.reload(is_empty=True)
            await asyncio.sleep(0.01)
        for shard in host.shard_ids:
            assert await running.wait(shard, host.durable_sequence(shard), 20)
        assert await balances_in(valkey) == live_sums(host)
    finally:
        task.cancel()


async def test_a_reset_whose_process_died_is_ended_by_a_follower(
    pool: Pool, valkey: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wallet_core.adapters.read_model.RESET_TAKEOVER_S", 0.05)
    monkeypatch.setattr("wallet_core.service.projector.RETRY_S", (0.01,))
    host = await busy_host(6)
    await until_caught_up(follower(host, pool, valkey), host)
    await valkey.set("wallet:resetting", "somebody who died")
    await valkey.delete("wallet:0:cursor", f"wallet:balance:{account_id(NAMES[0]).hex()}")
    await until_caught_up(follower(host, pool, valkey), host)
    assert await balances_in(valkey) == live_sums(host)
    assert not await valkey.exists("wallet:resetting")
