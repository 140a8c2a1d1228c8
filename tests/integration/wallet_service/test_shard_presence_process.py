"""Risk: a wallet process serves shards that are not the ones it had, or the way out of a refusal leaves the database and the log apart."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import asyncpg
import pytest

from ducat.wallet.v1 import shard_pb2, wallet_pb2
from kernel.ids import account_id
from tests import prefork
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from wallet_core.adapters.ownership import LOCK, Ownership, ShardTaken
from wallet_core.adapters.presence import adopt, known_shards, lacking, note_seen, rebind
from wallet_core.shard import KnownShard, ShardForeign
from wallet_core.shard.identity import new_identity

RICH = "psp/sandbox/clearing/USD"


async def run(env: dict[str, str], *words: str) -> tuple[int, str, str]:
    process = await prefork.start(*words, env=env, keep_stderr=True)
    async with asyncio.timeout(60):
        out, said = await process.communicate()
    return process.returncode or 0, out.decode(), said.decode()


async def open_accounts(wallet: WalletProcess, first: int, count: int) -> None:
    names = [f"seller/{number}/USD" for number in range(first, first + count)]
    request = wallet_pb2.CreateAccountsRequest(
        accounts=[wallet_pb2.AccountSpec(name=name, currency_code="USD") for name in names]
    )
    await wallet.wallet.CreateAccounts(request)


async def durable(wallet: WalletProcess) -> dict[int, int]:
    shards = (await wallet.shards.ListShards(shard_pb2.ListShardsRequest())).shards
    return {shard.shard: shard.durable_sequence_number for shard in shards}


async def test_a_shard_that_is_missing_older_or_restored(
    start_wallet: StartWallet, postgres_dsn: str, tmp_path: Path
) -> None:
    wallet = await start_wallet(wallet_scrub_bytes_per_s=1 << 30)
    await open_accounts(wallet, 0, 20)
    early = await durable(wallet)
    async with asyncio.timeout(10):  # the scrub reads small logs at once
        while True:
            shards = (await wallet.shards.ListShards(shard_pb2.ListShardsRequest())).shards
            if all(shard.HasField("scrub_time") for shard in shards):
                break
            await asyncio.sleep(0.05)
    assert await wallet.stop() == 0
    folder = tmp_path / "wallet"
    shutil.copytree(folder, tmp_path / "copy")
    wallet = await start_wallet()
    await open_accounts(wallet, 20, 20)
    late = await durable(wallet)
    assert await wallet.stop() == 0
    connection = await asyncpg.connect(postgres_dsn)
    try:
        known = await known_shards(connection)
        assert {shard: one.sequence for shard, one in known.items()} == late

        # an unmounted disk
        (folder / "shard-0000").rename(tmp_path / "unmounted")
        code, out, said = await run(wallet.env, "wallet_core")
        assert (code, out) == (1, "")
        assert "Traceback" not in said
        assert f"shard 0: expected its log in {folder}/shard-0000/log up to event {late[0]}" in said
        assert "ducat wallet restore --shard 0" in said
        assert "ducat wallet accept --shard 0" in said
        assert not (folder / "shard-0000").exists()

        # an older copy: restored, and PostgreSQL goes on with it
        words = ("ops", "wallet", "restore", "--shard", "0", "--from", str(tmp_path / "copy"), "--json")
        code, out, said = await run(wallet.env, *words)
        assert code == 0, said
        report = json.loads(out)
        assert report["sequence_number"] == early[0]
        assert f"ends with event {early[0]} (it had seen {late[0]})" in report["steps"][-2]
        assert "empty the read model in Valkey" in report["steps"][-1]
        assert (await known_shards(connection))[0] == KnownShard(report["identity"], early[0])

        # the disk that was lost comes back instead: it is not the shard any more
        (folder / "shard-0000").rename(tmp_path / "restored")
        (tmp_path / "unmounted").rename(folder / "shard-0000")
        code, _, said = await run(wallet.env, "wallet_core")
        assert code == 1
        assert "copy from before the shard was restored" in said
        shutil.rmtree(folder / "shard-0000")

        # nothing at all: said, then accepted
        code, out, said = await run(wallet.env, "ops", "wallet", "accept", "--shard", "0")
        assert code == 0, said
        assert f"seen: event {early[0]}; {early[0]} events are not in the log (events 1 to {early[0]})" in out
        assert "no message of payment.events was recorded since" in out
        assert "is lost" in out
        assert "nothing was changed" in out
        assert not (folder / "shard-0000").exists()
        code, out, said = await run(wallet.env, "ops", "wallet", "accept", "--shard", "0", "--yes", "--json")
        assert code == 0, said
        assert json.loads(out)["accepted"] is True
    finally:
        await connection.close()
    wallet = await start_wallet()
    assert await durable(wallet) == {0: 0, 1: late[1]}
    code, _, said = await run(wallet.env, "ops", "wallet", "accept", "--shard", "0", "--yes")
    assert code == 1
    assert "is in use by process" in said
    assert "Traceback" not in said


@pytest.fixture
async def connection(postgres_dsn: str) -> asyncpg.Connection:
    opened = await asyncpg.connect(postgres_dsn)
    yield opened
    await opened.close()


async def test_what_was_seen_only_grows_and_only_for_its_identity(connection: asyncpg.Connection) -> None:
    mine, other = new_identity(), new_identity()
    await note_seen(connection, [(1, mine, 5), (0, mine, 3)])
    await note_seen(connection, [(1, mine, 4), (0, other, 9)])
    assert await known_shards(connection) == {0: KnownShard(mine, 3), 1: KnownShard(mine, 5)}
    await note_seen(connection, [(1, mine, 6)])
    assert (await known_shards(connection))[1].sequence == 6
    await note_seen(connection, [])
    with pytest.raises(ShardForeign, match="another process has made this shard"):
        await adopt(connection, [(0, other, 9)])


async def test_the_read_model_of_the_version_before_is_a_witness(connection: asyncpg.Connection) -> None:
    await connection.execute("INSERT INTO wallet.projection (shard, sequence_number) VALUES (3, 77)")
    assert await known_shards(connection) == {3: KnownShard("", 77)}
    identity = new_identity()
    await note_seen(connection, [(3, identity, 70)])
    assert await known_shards(connection) == {3: KnownShard(identity, 77)}


async def test_rebind_brings_everything_back_to_the_end_of_the_log(connection: asyncpg.Connection) -> None:
    before, after = new_identity(), new_identity()
    await note_seen(connection, [(0, before, 100), (1, before, 50)])
    await connection.execute("INSERT INTO wallet.projection (shard, sequence_number) VALUES (0, 90), (1, 50)")
    await connection.execute(
        "INSERT INTO wallet.transfer SELECT shard, number, $1, $1, $1, 1, 1, 1, 0, 1"
        " FROM generate_series(0, 1) AS shard, generate_series(40, 60) AS number",
        account_id(RICH),
    )
    await connection.execute(
        "INSERT INTO wallet.inbox (consumer, message_id, position) VALUES ('wallet', 'a', 7), ('wallet', 'b', 8), ('other', 'a', 1);"
        "INSERT INTO wallet.feed_cursor (topic, consumer, feed_id, compared_position, proven_position)"
        " VALUES ('payment.events', 'wallet', 'kept', 9, 8);"
        "INSERT INTO wallet.feed_missing (topic, consumer, position, message_id, key, try_count)"
        " VALUES ('payment.events', 'wallet', 9, 'c', 'k', 8)"
    )
    assert await lacking(connection, 0, sequence=50, time_ns=0) == (100, 10, 2)
    done = await rebind(connection, 0, identity=after, sequence=50, time_ns=0)
    assert done == (100, 10, 2)
    assert await lacking(connection, 0, sequence=50, time_ns=0) == (50, 0, 0)
    assert await lacking(connection, 7, sequence=0, time_ns=0) == (None, 0, 0)
    cursor = await connection.fetchrow("SELECT feed_id, compared_position, proven_position FROM wallet.feed_cursor")
    assert tuple(cursor) == ("kept", 6, 6), "the feed brings everything since the log's end"
    assert await connection.fetchval("SELECT count(*) FROM wallet.feed_missing") == 0, (
        "what was given up is tried again"
    )
    assert await connection.fetchval("SELECT consumer FROM wallet.inbox") == "other"
    assert await known_shards(connection) == {0: KnownShard(after, 50), 1: KnownShard(before, 50)}
    left = await connection.fetch(
        "SELECT shard, max(sequence_number) FROM wallet.transfer GROUP BY shard ORDER BY shard"
    )
    assert [tuple(row) for row in left] == [(0, 50), (1, 60)]
    assert await connection.fetchval("SELECT sequence_number FROM wallet.projection WHERE shard = 0") == 50
    assert await rebind(connection, 0, identity=before, sequence=50, time_ns=0) == (50, 0, 0)


async def test_a_copy_of_a_shard_is_not_served_beside_it(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identity and length of a copied folder are right; only the database can tell that somebody serves the shard already."""
    monkeypatch.setattr("socket.gethostname", lambda: "one")
    owner = Ownership(postgres_dsn, [0, 1])
    await owner.take()
    keeping = asyncio.create_task(owner.keep())
    monkeypatch.setattr("socket.gethostname", lambda: "other")
    other = Ownership(postgres_dsn, [1])
    with pytest.raises(
        ShardTaken, match=r"shard 1: another process serves it: ducat-wallet-owner \d+ one, from this machine"
    ):
        await other.take(wait_s=0)
    connection = await asyncpg.connect(postgres_dsn)
    try:
        # the owner's connection is cut: it has the locks again before anybody else is let in
        ours = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'ducat-wallet-owner%one'"
        await connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({ours}) AS backend")
        async with asyncio.timeout(10):
            held = 0
            while held != 2:
                await asyncio.sleep(0.02)
                held = await connection.fetchval(
                    f"SELECT count(*) FROM pg_locks WHERE classid = {LOCK} AND pid IN ({ours})"
                )
        # another one came first all the same: this process ends
        keeping.cancel()
        await owner.close()
        await other.take()
        with pytest.raises(ShardTaken):
            await owner.keep()
    finally:
        await connection.close()
        await other.close()
    await owner.take()  # who has ended holds nothing
    await owner.close()
