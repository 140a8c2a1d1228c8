"""What a process asks for: PostgreSQL with its migrations, Valkey, the bus, channels."""

from __future__ import annotations

import pytest

from runtime import process as process_module
from runtime.process import Process
from runtime.settings import SettingsInvalid
from tests.integration.runtime.serving import PaymentServicer, load, serving


async def test_postgres_refuses_a_schema_that_lacks_migrations_and_opens_one_that_has_them(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import migrations

    async with Process.start("ledger", load(database_url=postgres_dsn)) as process:
        pool = await process.postgres("ledger")
        assert await pool.fetchval("SHOW search_path") == "ledger"
        assert await pool.fetchval("SHOW application_name") == "ducat-ledger"
    assert pool.is_closing()

    async def one_more(_source: object, _room: str) -> list[str]:
        return ["0099_more.sql"]

    monkeypatch.setattr(migrations, "pending", one_more)
    with pytest.raises(SettingsInvalid, match=r"0099_more.sql.*ducat migrate"):
        async with Process.start("ledger", load(database_url=postgres_dsn)) as process:
            await process.postgres("ledger")


async def test_valkey_and_bus_are_opened_and_closed(valkey_url: str) -> None:
    async with Process.start("wallet", load(redis_url=valkey_url)) as process:
        client = await process.valkey()
        assert await client.ping()
        bus = await process.bus()
        await bus.publish([])


async def test_a_dependency_that_is_not_configured_is_named() -> None:
    for ask in (lambda p: p.postgres("ledger"), lambda p: p.valkey(), lambda p: p.bus()):
        with pytest.raises(SettingsInvalid, match=r"set DUCAT_(DATABASE|REDIS)_URL"):
            async with Process.start("ledger", load()) as process:
                await ask(process)


async def test_waiting_for_a_dependency_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "DEPENDENCY_WAIT_S", 0.2)
    with pytest.raises(process_module.Unavailable, match="Valkey does not answer"):
        async with Process.start("wallet", load(redis_url="redis://127.0.0.1:1/0")) as process:
            await process.valkey()


async def test_channels_are_shared_by_address_and_closed_at_the_end() -> None:
    async with serving(PaymentServicer(), load()) as server, Process.start("wallet", load()) as process:
        first = await process.channel(server.address)
        assert await process.channel(server.address) is first
        assert await process.channel("127.0.0.1:1") is not first


async def test_a_token_is_not_sent_in_the_clear_beyond_loopback() -> None:
    async with Process.start("wallet", load(auth_token="ducat_x")) as process:
        await process.channel("127.0.0.1:1")
        with pytest.raises(SettingsInvalid, match="in the clear"):
            await process.channel("payment.internal:50051")
