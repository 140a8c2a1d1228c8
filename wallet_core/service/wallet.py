"""The wallet's use cases on accounts, over the shard host and the name directory. Transfers go to the host
directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernel.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, OutOfRange
from kernel.ids import account_id
from wallet_core.engine.codes import AccountFlags, AccountResult
from wallet_core.service.port import (
    SLOT_COUNT,
    AccountRow,
    AccountState,
    Directory,
    Host,
    NamedAccount,
    ReadModel,
    TransferItem,
    slot_of,
)

__all__ = ["READ_WAIT_S", "AccountSpec", "AccountView", "Wallet"]

READ_WAIT_S = 5.0
"""How long a read waits for the position that its caller asked for."""

_KEPT = AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED
_CURRENCY_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True, slots=True)
class AccountSpec:
    """One account to open or update: by id, by name, or by both where they agree. `flags` are
    AccountFlags."""

    id: bytes
    name: str
    currency: str
    flags: int
    overdraft_limit: int
    balance_limit: int


@dataclass(frozen=True, slots=True)
class AccountView:
    """An account with its name. `positions` (shard, sequence number): the figures include at least these."""

    state: AccountState
    name: str
    positions: tuple[tuple[int, int], ...]


class Wallet:
    """Opens, changes and reads accounts; reads past transfers."""

    def __init__(
        self, host: Host, directory: Directory, read_model: ReadModel, *, read_wait_s: float = READ_WAIT_S
    ) -> None:
        self._host = host
        self._directory = directory
        self._read_model = read_model
        self._read_wait_s = read_wait_s

    async def open_accounts(self, specs: Sequence[AccountSpec]) -> bytes:
        """One AccountResult byte a spec. Names are written first, so that no open account lacks its name."""
        results = bytearray(len(specs))
        rows: list[AccountRow] = []
        places: list[int] = []
        names: list[NamedAccount] = []
        for place, spec in enumerate(specs):
            account = resolve_id(spec.id, spec.name)
            if account is None or "\0" in spec.name:  # which no directory can keep
                results[place] = AccountResult.ID_INVALID
                continue
            if spec.name and len(spec.currency) == 3 and _CURRENCY_LETTERS.issuperset(spec.currency):
                names.append(NamedAccount(account, spec.name, spec.currency))
            currency = spec.currency if spec.currency.isascii() else "?"  # a result like any other, not an error of all
            rows.append(AccountRow(account, currency, spec.flags, spec.overdraft_limit, spec.balance_limit))
            places.append(place)
        if names:
            await self._directory.add(names)
        return await self._submit(rows, places, results, update=False)

    async def update_accounts(self, specs: Sequence[AccountSpec]) -> bytes:
        """One AccountResult byte a spec: limits, frozen and closed become what the spec says. A currency may
        be left out; where it is given it must be the account's. May-overdraw and striped stay what they are;
        asking for one that the account does not have is FLAGS_INVALID, and so is opening a closed account
        again.
        """
        results = bytearray(len(specs))
        ids = [resolve_id(spec.id, spec.name) for spec in specs]
        current = iter(await self._host.accounts([account for account in ids if account is not None]))
        rows: list[AccountRow] = []
        places: list[int] = []
        for place, (spec, account) in enumerate(zip(specs, ids, strict=True)):
            if account is None:
                results[place] = AccountResult.ID_INVALID
                continue
            state = next(current)
            if state is None:
                results[place] = AccountResult.NOT_FOUND
            elif spec.currency and spec.currency != state.currency:
                results[place] = AccountResult.CURRENCY_INVALID
            elif spec.flags & _KEPT & ~state.flags or (
                state.has(AccountFlags.CLOSED) and not spec.flags & AccountFlags.CLOSED
            ):
                results[place] = AccountResult.FLAGS_INVALID
            else:
                flags = spec.flags | (state.flags & _KEPT)
                rows.append(AccountRow(account, state.currency, flags, spec.overdraft_limit, spec.balance_limit))
                places.append(place)
        return await self._submit(rows, places, results, update=True)

    async def _submit(self, rows: list[AccountRow], places: list[int], results: bytearray, *, update: bool) -> bytes:
        if rows:
            for place, result in zip(places, await self._host.create_accounts(rows, update=update), strict=True):
                results[place] = result
        return bytes(results)

    async def accounts(
        self, ids: Sequence[bytes], names: Sequence[str], at_least: Sequence[tuple[int, int]] = ()
    ) -> list[AccountView]:
        """The accounts that exist: first those by id, then those by name. Waits until `at_least` (shard,
        sequence) is durable."""
        for place, account in enumerate(ids):
            if len(account) != 16:
                field = f"account_ids[{place}]"
                raise _wrong(field, f"expected 16 bytes, got {len(account)}")
        await self.wait_durable(at_least)
        named = {account_id(name): name for name in names}
        wanted = [*ids, *(account_id(name) for name in names)]
        before = self._positions()
        states = await self._host.accounts(wanted)
        nameless = [state.id for state in states if state is not None and state.id not in named]
        if nameless:
            named |= await self._directory.names(nameless)
        return [self._view(state, named, before) for state in states if state is not None]

    async def accounts_message(self, message: bytes) -> bytes | None:
        """A serialized GetAccountsRequest in, a serialized GetAccountsResponse out: `accounts` without an object an account.
        None where it asks for more than accounts of this process by their ids."""
        found = await self._host.read_message(message)
        if found is None:
            return None
        ids = found.ids
        return found.message(await self._directory.names(ids) if ids else {})

    async def account(self, account: bytes, name: str) -> AccountView:
        """One account as it stands. Raises NotFound."""
        key = self.account_key(account, name)
        views = await self.accounts([key], [])
        if not views:
            raise NotFound(f"no account {name or key.hex()}", metadata={"account": name or key.hex()})
        return views[0]

    def account_key(self, account: bytes, name: str) -> bytes:
        """The id that a request means. Raises InvalidArgument where it means none, or the two disagree."""
        key = resolve_id(account, name)
        if key is None:
            if account and name and len(account) == 16:
                raise _wrong("account_id", f"is not the id of the name {name!r}; send one of the two")
            raise _wrong("account_id", f"expected 16 bytes or a name, got {len(account)} bytes and no name")
        return key

    async def list_accounts(self, prefix: str, after: str, limit: int) -> tuple[list[AccountView], str]:
        """A page of accounts by name, and the name to go on after ("" = that was the last page)."""
        if "\0" in prefix or "\0" in after:  # no name has one
            return [], ""
        page = await self._directory.page(prefix, after, limit + 1)
        more = len(page) > limit
        page = page[:limit]
        named = {entry.id: entry.name for entry in page}
        before = self._positions()
        views = [self._view(state, named, before) for state in await self._ours(list(named)) if state is not None]
        return views, page[-1].name if more else ""

    async def _ours(self, ids: Sequence[bytes]) -> list[AccountState | None]:
        """Accounts as they stand, without those of other processes' shards."""
        if len(self._host.shard_ids) == self._host.shard_count:
            return await self._host.accounts(ids)
        found: list[AccountState | None] = []
        for account in ids:
            try:
                found += await self._host.accounts([account])
            except FailedPrecondition:  # WRONG_SHARD, and not striped: its owner lists it
                continue
        return found

    async def transfers(self, ids: Sequence[bytes]) -> list[TransferItem]:
        """What the read model has under these transfer ids."""
        for place, transfer in enumerate(ids):
            if len(transfer) != 16:
                raise _wrong(f"transfer_ids[{place}]", f"expected 16 bytes, got {len(transfer)}")
        return await self._read_model.by_id(ids)

    async def account_transfers(
        self,
        account: bytes,
        before: tuple[int, int, int] | None,
        limit: int,
        at_least: Sequence[tuple[int, int]] = (),
    ) -> tuple[list[TransferItem], tuple[int, int, int] | None]:
        """A page of an account's transfers, newest first, and the key to go on before (None = that was the
        last page)."""
        for shard, sequence in at_least:
            self._own(shard)
            if not await self._read_model.wait(shard, sequence, self._read_wait_s):
                raise _behind(shard, sequence, self._read_model.projected(shard), "read model")
        items = await self._read_model.of_account(account, before, limit + 1)
        if len(items) <= limit:
            return items, None
        last = items[limit - 1]
        return items[:limit], (last.time_ns, last.shard, last.sequence)

    async def wait_durable(self, positions: Sequence[tuple[int, int]]) -> None:
        """Returns once the shards' logs have come that far. Raises OutOfRange where that takes too long."""
        for shard, sequence in positions:
            self._own(shard)
            at = self._host.durable_sequence(shard)
            if at < sequence:
                at = await self._host.wait_durable(shard, sequence - 1, self._read_wait_s)
                if at < sequence:
                    raise _behind(shard, sequence, at, "log")

    async def name_of(self, account: bytes) -> str:
        """The name of an account; empty where it has none."""
        return (await self._directory.names([account])).get(account, "")

    def projected(self, shard: int) -> int:
        """The number of the last event that the read model has."""
        return self._read_model.projected(shard)

    def read_model_problem(self, shard: int) -> str:
        """What keeps the read model from following a shard; empty where nothing does."""
        return self._read_model.problem(shard)

    def shard_of(self, account: bytes) -> int:
        """The shard of an account that is not striped."""
        return slot_of(account) * self._host.shard_count // SLOT_COUNT

    def _own(self, shard: int) -> None:
        if shard not in self._host.shard_ids:
            owned = ", ".join(map(str, self._host.shard_ids))
            raise FailedPrecondition(
                f"shard {shard} is not owned by this process (it has {owned}); ask ListShards for its address",
                reason="WRONG_SHARD",
                metadata={"shard": str(shard)},
            )

    def _positions(self) -> dict[int, int]:
        return {shard: self._host.durable_sequence(shard) for shard in self._host.shard_ids}

    def _view(self, state: AccountState, named: dict[bytes, str], before: dict[int, int]) -> AccountView:
        if state.has(AccountFlags.STRIPED):
            positions = tuple(before.items())
        else:
            shard = self.shard_of(state.id)
            positions = ((shard, before.get(shard, 0)),)
        return AccountView(state, named.get(state.id, ""), positions)


def resolve_id(account: bytes, name: str) -> bytes | None:
    """The 16 bytes that an id or a name stands for; None where neither does, or they disagree."""
    if name:
        named = account_id(name)
        return named if account in (b"", named) else None
    return account if len(account) == 16 else None


def _wrong(field: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {problem}", violations=[FieldViolation(field, problem)])


def _behind(shard: int, wanted: int, at: int, what: str) -> OutOfRange:
    return OutOfRange(
        f"shard {shard}: the {what} is at event {at}, {wanted} was asked for and did not come in time",
        metadata={"shard": str(shard), "sequence_number": str(at)},
    )
