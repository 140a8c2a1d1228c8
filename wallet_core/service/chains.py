"""Runs chains across shards: those that this process was asked for, and those that somebody left half-way.

What has to be remembered is in the shards' logs (`chain_rules`), so nothing here outlives the process: after a crash, and
beside every coordinator, `watch` ends whatever is older than a few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from kernel.clock import Clock
from kernel.errors import DucatError
from wallet_core.engine.codes import AMOUNT_MAX, AccountResult, TransferFlags, TransferResult
from wallet_core.service import chain_rules
from wallet_core.service.chain_rules import MARKS, NO_CURRENCY, Ask, ChainMark, End
from wallet_core.service.port import AccountRow, AccountState, RowsAnswer, TransferRow

__all__ = ["ChainHost", "ChainPeers", "Chains", "NoPeers"]

ANSWER_S = 4.0
"""How long one step is tried before its answer counts as not known."""
RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5)
LOOK_S = 1.0
"""How often it is looked for chains that were left."""
GRACE_S = 8.0
"""How old a mark must be to be ended from outside; greater than what its own coordinator needs."""
BLOCKED_S_MAX = 60.0
"""A chain that cannot be ended yet (an account is frozen, a process is down) is tried again ever more rarely, up to this."""
MARKS_A_LOOK = 1_000
STRANGE_LOOKS = 30
"""So many looks one after the other must find more held than marks stand for, since chains come and go between the reads."""
MARKS_AT_ONCE = 32
KNOWN_CURRENCY_COUNT_MAX = 50_000

_T = TypeVar("_T")


class ChainHost(Protocol):
    """The shards of this process, as chains need them."""

    @property
    def shard_count(self) -> int:
        """Shards of the whole system."""

    @property
    def shard_ids(self) -> tuple[int, ...]:
        """Shards that this process owns."""

    def apply_step(self, shard: int, rows: Sequence[TransferRow]) -> Awaitable[RowsAnswer]:
        """Rows of one shard; a chain among them that would cross shards is refused."""

    def chain_marks(self, shard: int) -> Awaitable[list[ChainMark]]:
        """Every mark of a shard with its holds, every decision with none."""

    def create_accounts(self, rows: Sequence[AccountRow], *, always: bool = False) -> Awaitable[bytes]:
        """One AccountResult byte a row. always: does not wait for room, which requests may hold that wait for chains."""

    def accounts(self, ids: Sequence[bytes], *, always: bool = False) -> Awaitable[list[AccountState | None]]:
        """Accounts as they durably stand."""


class ChainPeers(Protocol):
    """The shards of other processes. Everything raises DucatError where a process does not answer."""

    async def apply_step(self, shard: int, rows: Sequence[TransferRow], currencies: Sequence[str]) -> RowsAnswer:
        """`Chains.apply_step` there."""

    async def currencies(self, shard: int, ids: Sequence[bytes]) -> list[str]:
        """`Chains.currencies` there."""

    async def mark_ids(self) -> tuple[set[bytes], set[int]]:
        """The ids of all marks and decisions of all other processes, and the shards that these own."""


class NoPeers:
    """All shards are here."""

    async def apply_step(self, shard: int, rows: Sequence[TransferRow], currencies: Sequence[str]) -> RowsAnswer:
        raise LookupError(f"nobody owns shard {shard}")

    async def currencies(self, shard: int, ids: Sequence[bytes]) -> list[str]:
        raise LookupError(f"nobody owns shard {shard}")

    async def mark_ids(self) -> tuple[set[bytes], set[int]]:
        return set(), set()


class _Refused(NamedTuple):
    """A RowsAnswer of rows that no shard was asked about."""

    codes: bytes
    positions: tuple[tuple[int, int], ...]


class Chains:
    """The coordinator of this process. `on_blocked(mark, seconds)`: a chain has waited so long for its end. `on_taken(ids)`:
    accounts that chains need are open with other flags; each is told once. `on_strange(amount)`: so much of what `chain/marks`
    holds is of no chain that can be ended: holds of callers, or chains begun by a version without the flag CHAIN. Told once."""

    def __init__(
        self,
        host: ChainHost,
        peers: ChainPeers,
        clock: Clock,
        *,
        answer_s: float = ANSWER_S,
        look_s: float = LOOK_S,
        grace_s: float = GRACE_S,
        on_blocked: Callable[[ChainMark, float], None] = lambda mark, seconds: None,
        on_look_failed: Callable[[Exception], None] = lambda error: None,
        on_taken: Callable[[list[bytes]], None] = lambda ids: None,
        on_strange: Callable[[int], None] = lambda amount: None,
    ) -> None:
        self._host, self._peers, self._clock = host, peers, clock
        self._answer_s, self._look_s, self._grace_s = answer_s, look_s, grace_s
        self._on_blocked, self._on_look_failed, self._on_taken = on_blocked, on_look_failed, on_taken
        self._on_strange = on_strange
        self._strange_looks, self._strange = 0, AMOUNT_MAX
        self._taken: set[bytes] = set()
        self._open: set[str] = set()
        self._known: dict[bytes, str] = {}
        self._later: set[asyncio.Task[None]] = set()
        self._seen: dict[bytes, float] = {}
        self._next: dict[bytes, tuple[float, float]] = {}  # blocked: when again, and the pause before that

    # ---- a chain from a caller

    async def run(
        self, rows: Sequence[TransferRow], routes: Sequence[tuple[int, int]]
    ) -> tuple[bytes, list[tuple[int, int]]]:
        """One TransferResult byte a row, and the positions that include them. IN_FLIGHT: not known yet, or decided and not yet
        followed by every shard; sending the same chain again tells."""
        codes = chain_rules.refused_at_once(rows)
        if codes is not None:
            return codes, []
        positions: dict[int, int] = {}
        try:
            async with asyncio.timeout(self._answer_s):
                currencies = await self._currencies_of(rows, routes)
        except (DucatError, TimeoutError):
            return bytes([TransferResult.IN_FLIGHT]) * len(rows), []
        chain = chain_rules.plan(rows, routes, currencies, self._host.shard_count)
        end: End = await self._drive(
            chain_rules.run(chain, self._clock.now_ns), tuple(dict.fromkeys(currencies)), positions
        )
        if end.committed and end.settled:
            self._soon(self._forget(chain.decision.id))
        return end.codes, list(positions.items())

    async def _currencies_of(self, rows: Sequence[TransferRow], routes: Sequence[tuple[int, int]]) -> list[str]:
        """Of the debit accounts of legs that cross; they never change."""
        wanted: dict[int, list[bytes]] = {}
        found: dict[bytes, str] = {}
        for row, (home, credit) in zip(rows, routes, strict=True):
            if home == credit:
                continue
            known = self._known.get(row.debit_id)
            if known is None:
                wanted.setdefault(home, []).append(row.debit_id)
            else:
                found[row.debit_id] = known
        for shard, ids in wanted.items():
            here = shard in self._host.shard_ids
            told = await (self.currencies(ids) if here else self._peers.currencies(shard, ids))
            found |= zip(ids, told, strict=True)
            if len(self._known) > KNOWN_CURRENCY_COUNT_MAX:
                self._known.clear()
            self._known |= {id_: one for id_, one in zip(ids, told, strict=True) if one != NO_CURRENCY}
        return [
            NO_CURRENCY if home == credit else found[row.debit_id]
            for row, (home, credit) in zip(rows, routes, strict=True)
        ]

    # ---- what other processes ask of this one

    async def currencies(self, ids: Sequence[bytes]) -> list[str]:
        """The currencies of accounts that live here, NO_CURRENCY where there is none."""
        return [
            NO_CURRENCY if state is None else state.currency for state in await self._host.accounts(ids, always=True)
        ]

    async def apply_step(self, shard: int, rows: Sequence[TransferRow], currencies: Sequence[str]) -> RowsAnswer:
        """Rows of one shard of this process. Opens what they need first. Where somebody has these accounts with other flags, holds
        are CROSS_SHARD_UNSUPPORTED: what was begun can still be given up."""
        is_open = True
        for currency in (NO_CURRENCY, *currencies):
            if currency not in self._open:
                is_open = await self._opened(currency) and is_open
        if not is_open and any(row.flags & TransferFlags.HOLD for row in rows):
            return _Refused(bytes([TransferResult.CROSS_SHARD_UNSUPPORTED]) * len(rows), ())
        return await self._host.apply_step(shard, rows)

    async def _opened(self, currency: str) -> bool:
        accounts = chain_rules.accounts_of(currency)
        results = await self._host.create_accounts(accounts, always=True)
        if set(results) == {AccountResult.OK}:
            self._open.add(currency)
            return True
        taken = {row.id for row, code in zip(accounts, results, strict=True) if code != AccountResult.OK} - self._taken
        if taken:
            self._taken |= taken
            self._on_taken(sorted(taken))
        return False

    async def mark_ids(self) -> set[bytes]:
        """The ids of all marks and decisions of this process's shards."""
        return {mark.id for shard in self._host.shard_ids for mark in await self._host.chain_marks(shard)}

    # ---- chains that were left

    async def watch(self) -> None:
        """Ends what is older than `grace_s` for ever, until cancelled."""
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self.look()
            except DucatError:
                continue  # the shards do not answer now
            except Exception as error:  # whatever a shard holds must not stop the process, again after each restart
                self._on_look_failed(error)

    async def look(self) -> int:
        """Ends what was seen `grace_s` ago and is still there; returns how many marks and decisions are left. Costs one read where
        there is none."""
        (marks_account,) = await self._host.accounts([MARKS], always=True)
        if marks_account is None or marks_account.held_out == 0:
            self._seen.clear()
            self._next.clear()
            self._look_for_strange(0)
            return 0
        found = [mark for shard in self._host.shard_ids for mark in await self._host.chain_marks(shard)]
        if all(mark.complete for mark in found):
            self._look_for_strange(marks_account.held_out - sum(len(mark.holds) + 1 for mark in found))
        now = asyncio.get_running_loop().time()
        self._seen = {mark.id: self._seen.get(mark.id, now) for mark in found}
        self._next = {id_: when for id_, when in self._next.items() if id_ in self._seen}
        old = [
            mark
            for mark in found
            if now - self._seen[mark.id] >= self._grace_s and self._next.get(mark.id, (0.0, 0.0))[0] <= now
        ]
        left = len(found)
        left -= await self._settle([mark for mark in old if not mark.is_decision][:MARKS_A_LOOK], now)
        decisions = [mark for mark in old if mark.is_decision][:MARKS_A_LOOK]
        if decisions:
            left -= await self._forget_those_without_marks(decisions)
        return left

    def _look_for_strange(self, amount: int) -> None:
        if amount <= 0:
            if self._strange_looks < STRANGE_LOOKS:
                self._strange_looks, self._strange = 0, AMOUNT_MAX
            return
        self._strange_looks += 1
        self._strange = min(amount, self._strange)
        if self._strange_looks == STRANGE_LOOKS:
            self._on_strange(self._strange)

    async def _settle(self, marks: Sequence[ChainMark], now: float) -> int:
        """How many could be ended. Some at once; of a home that does not answer no further ones are tried in this look."""
        count = 0
        away: set[int] = set()
        for at in range(0, len(marks), MARKS_AT_ONCE):
            part = marks[at : at + MARKS_AT_ONCE]
            tried = [mark for mark in part if chain_rules.home_of(mark.id) not in away]
            for mark in part:
                if mark not in tried:
                    self._pause(mark, now)
            steps = (chain_rules.settle(mark, self._host.shard_count, self._clock.now_ns) for mark in tried)
            for mark, done in zip(tried, await asyncio.gather(*map(self._drive, steps)), strict=True):
                if done is None:
                    away.add(chain_rules.home_of(mark.id))
                if not done:
                    self._blocked(mark, now)
                count += bool(done)
        return count

    def _pause(self, mark: ChainMark, now: float) -> None:
        pause = min(2 * self._next.get(mark.id, (0.0, self._look_s))[1], BLOCKED_S_MAX)
        self._next[mark.id] = (now + pause, pause)

    def _blocked(self, mark: ChainMark, now: float) -> None:
        self._pause(mark, now)
        self._on_blocked(mark, now - self._seen[mark.id])

    async def _forget_those_without_marks(self, decisions: Sequence[ChainMark]) -> int:
        """A decision may go once no shard has a mark of its chain; no new one can come, because all of them were there before it
        was placed. A shard that has moved to a process we do not know of may have one: then none is forgotten."""
        shards = range(self._host.shard_count)
        try:
            marks, asked = await self._peers.mark_ids()
            marks |= await self.mark_ids()
        except DucatError:
            return 0
        if not asked.union(self._host.shard_ids).issuperset(shards):
            return 0
        count = 0
        for decision in decisions:
            if not any(chain_rules.mark_of(decision.id, shard, self._host.shard_count) in marks for shard in shards):
                await self._forget(decision.id)
                count += 1
        return count

    # ---- driving

    async def _forget(self, decision_id: bytes) -> None:
        await self._drive(chain_rules.forget(decision_id, self._clock.now_ns()))

    def _soon(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _drive(
        self,
        steps: Generator[list[Ask], list[bytes | None], _T],
        currencies: Sequence[str] = (),
        positions: dict[int, int] | None = None,
    ) -> _T:
        """Asks the shards what the steps ask for, all of one yield at once."""
        answers: list[bytes | None] | None = None
        while True:
            try:
                asks = next(steps) if answers is None else steps.send(answers)
            except StopIteration as stop:
                result: _T = stop.value
                return result
            if len(asks) == 1:
                answers = [await self._ask(asks[0], currencies, positions)]
            else:
                answers = list(await asyncio.gather(*(self._ask(ask, currencies, positions) for ask in asks)))

    async def _ask(self, ask: Ask, currencies: Sequence[str], positions: dict[int, int] | None) -> bytes | None:
        """The answer, or None after `answer_s`. Asking again is harmless: the ids are the same."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._answer_s
        attempt = 0
        while True:
            try:
                async with asyncio.timeout_at(until):
                    if ask.shard in self._host.shard_ids:
                        answer = await self.apply_step(ask.shard, ask.rows, currencies)
                    else:
                        answer = await self._peers.apply_step(ask.shard, ask.rows, currencies)
                if TransferResult.WRONG_SHARD in answer.codes:
                    return None
                if positions is not None:
                    for shard, sequence in answer.positions:
                        positions[shard] = max(sequence, positions.get(shard, 0))
                return answer.codes
            except (DucatError, TimeoutError):
                delay = RETRY_S[min(attempt, len(RETRY_S) - 1)]
                attempt += 1
                if loop.time() + delay >= until:
                    return None
                await asyncio.sleep(delay)
