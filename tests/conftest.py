"""Real servers for the tests: one embedded PostgreSQL and one embedded Valkey a session, fresh contents a test.

`make test` runs five sessions (pytest-xdist), for a test waits about as long as it computes; a file of tests always in one of them,
and what needs Kafka in one of them too, for its broker is dear. Each session has servers and ports of its own, so they share nothing but
the machine; long files are begun first, so that all end at about the same time.

postgres_dsn   a fresh database, cloned from a template that has every room's migrations
valkey_url     the Valkey, emptied
bus            a Bus over a real Valkey, and over a real Kafka broker where there is one (see tests/kafka_broker.py)
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from runtime.bus import Bus, open_bus
from runtime.embedded import EmbeddedPostgres, EmbeddedValkey, _server
from runtime.migrations import migrate_all
from tests.kafka_broker import kafka_bootstrap, kafka_broker

__all__ = ["kafka_bootstrap", "kafka_broker"]

_database_number = itertools.count(1)

KAFKA = "what needs Kafka"
PLATFORM = "e2e/ on one platform"

MEMORY_FREE_MIN = 4 << 30

LONG_FILES = (
    KAFKA,
    PLATFORM,
    "e2e/test_faults.py",
    "contract/bus/test_bus_contract.py",
    "integration/runtime_data/test_outbox.py",
    "e2e/",
    "integration/",
    "test_source.py",
    "contract/",
    "simulation/",
    "unit/wallet_core/event_log/test_torn_tail.py",
)
"""By the time that they take, the longest first; then all others."""


ON_ONE_PLATFORM = (
    "tests/e2e/test_backup.py",
    "tests/e2e/test_checkout.py",
    "tests/e2e/test_examples.py",
    "tests/e2e/test_lost_bus.py",
)


def scope_of(node_id: str) -> str:
    """What a test shares a session with: all that needs Kafka, all that uses the one platform (tests/e2e/conftest.py), else its file."""
    if "kafka" in node_id:
        return KAFKA
    file = node_id.partition("::")[0]
    return PLATFORM if file in ON_ONE_PLATFORM else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, by `scope_of`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByScope(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ByScope(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """A worker takes ports from a part of the range that is its own: a port is free when it is picked and taken a moment later."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        _server.FREE_PORTS = _server.FREE_PORTS[number::count]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, where workers share them out; a run in one process keeps the usual order."""
    if hasattr(config, "workerinput"):

        def rank(item: pytest.Item) -> int:
            scope = scope_of(item.nodeid).removeprefix("tests/")
            return next((at for at, prefix in enumerate(LONG_FILES) if scope.startswith(prefix)), len(LONG_FILES))

        items.sort(key=rank)


def run_apart(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a thread with a loop of its own, so that a sync fixture leaves the test's loop alone."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


async def execute(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def _memory() -> Path | None:
    """Where files are memory, if there is room: making a database costs a third there, and none of these servers needs to be durable."""
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > MEMORY_FREE_MIN
    return shared if has_room else None


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """A short folder for the servers' data, gone after the session."""
    folder = Path(tempfile.mkdtemp(prefix="ducat-test-", dir=_memory()))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    """One PostgreSQL a session. Not durable: no test here pulls the plug of the machine."""
    server = EmbeddedPostgres(server_folder / "postgres", is_durable=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_template(postgres_server: EmbeddedPostgres) -> str:
    """The name of a database with every room's migrations applied; never connected to after that."""
    name = "ducat_template"
    run_apart(execute(postgres_server.dsn, f"CREATE DATABASE {name}"))
    run_apart(migrate_all(postgres_server.dsn_of(name)))
    return name


@pytest.fixture
def empty_postgres_dsn(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A fresh database without any table."""
    yield from _database(postgres_server, "template1")


@pytest.fixture
def postgres_dsn(postgres_server: EmbeddedPostgres, postgres_template: str) -> Iterator[str]:
    """A fresh database with every room's migrations applied."""
    yield from _database(postgres_server, postgres_template)


def _database(server: EmbeddedPostgres, template: str) -> Iterator[str]:
    """Copied as files: about a tenth of the time that copying through the log takes."""
    name = f"test_{next(_database_number)}"
    run_apart(execute(server.dsn, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY"))
    yield server.dsn_of(name)
    run_apart(execute(server.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def valkey_server(server_folder: Path) -> Iterator[EmbeddedValkey]:
    """One Valkey a session."""
    server = EmbeddedValkey(server_folder / "valkey")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey_url(valkey_server: EmbeddedValkey) -> str:
    """The session's Valkey, emptied."""
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
    return valkey_server.url


@pytest.fixture(params=["valkey", pytest.param("kafka", marks=pytest.mark.kafka)])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    """A bus over each backend. On Kafka topics outlive a test: name them with `unique`."""
    if request.param == "valkey":
        opened = await open_bus("valkey", redis_url=request.getfixturevalue("valkey_url"), name="test")
    else:
        opened = await open_bus("kafka", kafka_bootstrap=request.getfixturevalue("kafka_bootstrap"), name="test")
    yield opened
    await opened.close()
