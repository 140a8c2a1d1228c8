"""A schema with an outbox, a feed and an inbox, made from the very DDL that the rooms copy out of the docstrings."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import asyncpg
import pytest

from runtime import inbox, outbox
from runtime.feed import follower, publisher
from runtime.postgres import Pool, create_pool

SCHEMA = "room"


def ddl_of(module_doc: str) -> str:
    """The indented SQL of a module's docstring, for SCHEMA instead of `payment`."""
    found = re.findall(r"^    (CREATE .*?;)$", module_doc, re.MULTILINE | re.DOTALL)
    return "\n".join(found).replace("payment.", f"{SCHEMA}.")


@pytest.fixture
async def pool(empty_postgres_dsn: str) -> AsyncIterator[Pool]:
    connection = await asyncpg.connect(empty_postgres_dsn)
    tables = "\n".join(ddl_of(module.__doc__ or "") for module in (outbox, inbox, publisher, follower))
    await connection.execute(f"CREATE SCHEMA {SCHEMA}; {tables}")
    await connection.close()
    made = await create_pool(empty_postgres_dsn, SCHEMA, min_size=1, max_size=12)
    yield made
    await made.close()
