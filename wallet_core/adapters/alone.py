"""What stands in for PostgreSQL where the shards serve alone (`wallet_alone`): no names, no read model, no bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from kernel.errors import Unimplemented
from wallet_core.service.port import NamedAccount, TransferItem

__all__ = ["NoDirectory", "NoReadModel"]


class NoDirectory:
    """Accounts have ids and no names."""

    async def add(self, accounts: Sequence[NamedAccount]) -> None:
        """Raises Unimplemented."""
        _refuse("names of accounts")

    async def names(self, ids: Sequence[bytes]) -> dict[bytes, str]:
        """No id has a name."""
        return {}

    async def page(self, prefix: str, after: str, limit: int) -> list[NamedAccount]:
        """Raises Unimplemented."""
        _refuse("names of accounts")


class NoReadModel:
    """Nothing of the past but what the logs have."""

    async def by_id(self, ids: Sequence[bytes]) -> list[TransferItem]:
        """Raises Unimplemented."""
        _refuse("the read model")

    async def of_account(
        self, account_id: bytes, before: tuple[int, int, int] | None, limit: int
    ) -> list[TransferItem]:
        """Raises Unimplemented."""
        _refuse("the read model")

    def projected(self, shard: int) -> int:
        """Nothing is projected."""
        return 0

    def problem(self, shard: int) -> str:
        """None."""
        return ""

    async def wait(self, shard: int, sequence: int, timeout_s: float) -> bool:
        """Raises Unimplemented."""
        _refuse("the read model")


def _refuse(what: str) -> NoReturn:
    raise Unimplemented(f"{what} need PostgreSQL; this wallet serves its shards alone (wallet_alone)")
