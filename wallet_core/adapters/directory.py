"""The name directory in PostgreSQL: table wallet.account_name."""

from __future__ import annotations

from collections.abc import Sequence

from kernel.errors import Unavailable
from runtime.logs import get_logger
from runtime.postgres import Pool
from runtime.supervise import FailureLog
from wallet_core.adapters.patience import Patience
from wallet_core.service.port import NamedAccount

__all__ = ["PostgresDirectory"]

NAMES_TIMEOUT_S = 0.5
"""How long a read of accounts waits for their names."""

_ADD = """
INSERT INTO wallet.account_name (account_id, name, currency)
SELECT * FROM unnest($1::bytea[], $2::text[], $3::text[])
ON CONFLICT DO NOTHING
"""
_NAMES = "SELECT account_id, name FROM wallet.account_name WHERE account_id = ANY($1::bytea[])"
_PAGE = """
SELECT account_id, name, currency FROM wallet.account_name
WHERE name > $1 AND name >= $2 AND starts_with(name, $2) ORDER BY name LIMIT $3
"""
_PAGE_BELOW = """
SELECT account_id, name, currency FROM wallet.account_name
WHERE name > $1 AND name >= $2 AND name < $4 ORDER BY name LIMIT $3
"""


_log = get_logger("wallet.directory")


class PostgresDirectory:
    """Names by id, ids by name. Each call raises Unavailable while PostgreSQL does not answer, but for `names`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._patience = Patience("the directory of account names (PostgreSQL)")
        self._names_patience = Patience("the directory of account names (PostgreSQL)", timeout_s=NAMES_TIMEOUT_S)
        self._failures = FailureLog()

    async def add(self, accounts: Sequence[NamedAccount]) -> None:
        """Adds names; those that are there stay."""
        ids, names, currencies = [a.id for a in accounts], [a.name for a in accounts], [a.currency for a in accounts]
        await self._patience.answer(self._pool.execute(_ADD, ids, names, currencies))

    async def names(self, ids: Sequence[bytes]) -> dict[bytes, str]:
        """The names of those ids that have one. None of them while PostgreSQL does not answer: a balance is worth more than its name."""
        try:
            rows = await self._names_patience.answer(self._pool.fetch(_NAMES, list(ids)))
        except Unavailable as error:
            if self._failures.is_due("names"):
                _log.warning("accounts are shown without their names", error=str(error))
            return {}
        return {row[0]: row[1] for row in rows}

    async def page(self, prefix: str, after: str, limit: int) -> list[NamedAccount]:
        """Names that begin with `prefix` and sort after `after`, in code point order."""
        end = _after_prefix(prefix)
        if end is None:
            rows = await self._patience.answer(self._pool.fetch(_PAGE, after, prefix, limit))
        else:
            rows = await self._patience.answer(self._pool.fetch(_PAGE_BELOW, after, prefix, limit, end))
        return [NamedAccount(row[0], row[1], row[2]) for row in rows]


def _after_prefix(prefix: str) -> str | None:
    """The first text that sorts after everything with this prefix; None where there is no such text."""
    if not prefix or ord(prefix[-1]) >= 0xD7FF:
        return None
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
