"""A linked chain that touches several shards, as steps that each one shard takes alone. No I/O, no clock: `run` and
`settle` are generators that yield what shards are asked and are sent what they answered. The simulator drives the same
code (docs/decisions/0004-chains-across-shards.md).

    try      each shard, at once       one local chain: a hold for every leg that touches the shard, then a *mark*
    decide   the first row's shard     the *decision* is placed (commit) or its id is used up by a refusal (abort)
    settle   each shard, at once       one local chain: the mark is voided, every hold is posted (or voided)
    forget   the first row's shard     the decision is voided, once no shard has a mark of the chain

Whoever finds a mark can end the chain: the mark's id names the decision's id, and asking for an abort tells which of
the two it was. A step that is taken twice has no effect the second time.

Marks and decisions are holds between two striped accounts of a currency of their own. A mark of amount n + 1 stands for
the n holds that were placed just before it, in the same frame: nothing can come between the events of a local chain.
A decision has amount 1. Legs that cross shards go through a striped transit account of their currency: holds on
both sides, so that neither side can refuse later. The row's own id is that of the hold on its debit account.

Every row of a step has the flag CHAIN, which a shard takes from coordinators alone. So nobody else can place, post or void
such a hold, whatever ids he knows, and what he does under an id of ours is another command than ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from kernel.ids import account_id, derived_transfer_id, time_ms_of
from kernel.money import CURRENCY_EXPONENTS
from wallet_core.engine.codes import AMOUNT_MAX, AccountFlags, TransferFlags, TransferResult
from wallet_core.service.port import ID_NONE, SLOT_COUNT, AccountRow, TransferRow

__all__ = [
    "LEG_COUNT_MAX",
    "MARKED",
    "MARKS",
    "NO_CURRENCY",
    "RESERVED",
    "Ask",
    "ChainMark",
    "End",
    "Plan",
    "accounts_of",
    "forget",
    "home_of",
    "mark_of",
    "plan",
    "refused_at_once",
    "run",
    "settle",
    "transit_account",
]

LEG_COUNT_MAX = 1_024
"""Rows of one chain across shards."""
NO_CURRENCY = "XXX"
"""ISO 4217's code for no currency: that of marks and decisions, and of legs whose debit account does not exist."""
MARKS = account_id("chain/marks")
"""Debit account of marks and decisions; nothing but their holds is ever on it."""
MARKED = account_id("chain/marked")
"""Their credit account."""

_MARKS_ACCOUNTS = frozenset({MARKS, MARKED})

F, R = TransferFlags, TransferResult
_LINKED = int(F.LINKED)
_HOLD, _POST, _VOID = int(F.HOLD | F.CHAIN), int(F.POST | F.CHAIN), int(F.VOID | F.CHAIN)
_OF_CALLERS = F.LINKED | F.HOLD | F.POST | F.VOID | F.BALANCING_DEBIT | F.BALANCING_CREDIT
_DONE_BEFORE = frozenset({R.HOLD_NOT_FOUND, R.HOLD_ALREADY_VOIDED})
_REMEMBERED = range(R.HOLD_NOT_FOUND, R.LINKED_FAILED + 1)

Step = Generator[list["Ask"], list["bytes | None"], "bool | None"]


class Ask(NamedTuple):
    """Rows for one shard, all or none. The answer is one TransferResult byte a row; None: not known whether they were
    applied."""

    shard: int
    rows: list[TransferRow]


class ChainMark(NamedTuple):
    """A mark that a shard has, with the holds that it stands for: (id, debit account, credit account). Not complete: some of
    them are no longer held, which nobody but a mistake of ours can bring about. A decision is complete and has none."""

    shard: int
    id: bytes
    holds: tuple[tuple[bytes, bytes, bytes], ...]
    complete: bool = True

    @property
    def is_decision(self) -> bool:
        """A mark stands for at least one hold."""
        return self.complete and not self.holds


@dataclass(frozen=True, slots=True)
class Plan:
    """A chain, laid out. `owners[i][j]`: the chain's row that the j-th row of try i belongs to."""

    count: int
    tries: list[Ask]
    owners: list[list[int]]
    marks: list[ChainMark]
    decision: TransferRow
    shard_count: int

    @property
    def home(self) -> int:
        """The shard of the decision."""
        return home_of(self.decision.id)


@dataclass(frozen=True, slots=True)
class End:
    """What became of a chain. `settled`: every shard has posted or voided its holds."""

    codes: bytes
    committed: bool | None
    settled: bool


def accounts_of(currency: str) -> list[AccountRow]:
    """What must be open on a shard before it takes steps of chains with legs of this currency."""
    flags = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
    return [
        AccountRow(MARKS, NO_CURRENCY, flags),
        AccountRow(MARKED, NO_CURRENCY, flags),
        AccountRow(transit_account(currency), currency, flags),
    ]


@lru_cache(1_024)
def transit_account(currency: str) -> bytes:
    """Where the money of committed chains is between two shards."""
    return account_id(f"chain/transit/{currency}")


RESERVED = frozenset({MARKS, MARKED, *map(transit_account, CURRENCY_EXPONENTS)})
"""Accounts that callers may neither open, update nor name in a transfer where chains across shards are coordinated. A
coordinator that opens the transit account of any other currency reserves it as well."""


def refused_at_once(rows: Sequence[TransferRow]) -> bytes | None:
    """The results of a chain that can never be applied across shards: rows that are no plain transfers say
    CROSS_SHARD_UNSUPPORTED or what else is wrong with them, the others LINKED_FAILED. None: try it."""
    codes = [_row_wrong(row) for row in rows]
    if len(rows) > LEG_COUNT_MAX:
        codes = [R.CROSS_SHARD_UNSUPPORTED] * len(rows)
    seen: set[bytes] = set()
    for place, row in enumerate(rows):
        if row.id in seen and codes[place] == R.OK:
            codes[place] = R.ID_REUSED
        seen.add(row.id)
    if all(code == R.OK for code in codes):
        return None
    return bytes(R.LINKED_FAILED if code == R.OK else code for code in codes)


def _row_wrong(row: TransferRow) -> TransferResult:
    """The guards of the engine that depend on the row alone, in their order."""
    if row.id[6] >> 4 != 7 or row.id[8] >> 6 != 2:
        return R.ID_INVALID
    if row.flags & ~_LINKED:
        return R.FLAGS_INVALID if row.flags & ~int(_OF_CALLERS) else R.CROSS_SHARD_UNSUPPORTED
    if row.debit_id in _MARKS_ACCOUNTS or row.credit_id in _MARKS_ACCOUNTS:  # a mark of the caller's making
        return R.CROSS_SHARD_UNSUPPORTED
    if not 0 < row.amount_minor <= AMOUNT_MAX:
        return R.AMOUNT_INVALID
    if row.pending_id != ID_NONE:
        return R.PENDING_ID_INVALID
    if row.timeout_s:
        return R.TIMEOUT_INVALID
    return R.ACCOUNTS_SAME if row.debit_id == row.credit_id else R.OK


def plan(
    rows: Sequence[TransferRow], routes: Sequence[tuple[int, int]], currencies: Sequence[str], shard_count: int
) -> Plan:
    """`routes`: shard of each row and of its credit account. `currencies`: those of the debit accounts of legs that cross,
    NO_CURRENCY for one that does not exist. The same rows give the same plan."""
    hashed = hashlib.sha256(str(len(rows)).encode())
    for row in rows:
        hashed.update(b"%b%b%b%d/%d/%d/" % (row.id, row.debit_id, row.credit_id, row.amount_minor, row.flags, row.code))
    digest = hashed.digest()
    time_ms = time_ms_of(rows[0].id)
    timeout_s = int.from_bytes(digest[:4], "big")  # no deadline, for these holds have none: it is in their fingerprints
    holds: dict[int, list[TransferRow]] = {routes[0][0]: []}
    owners: dict[int, list[int]] = {routes[0][0]: []}
    for place, (row, (home, credit), currency) in enumerate(zip(rows, routes, currencies, strict=True)):
        between = transit_account(currency)
        for shard, id_, debit_id, credit_id in (
            (home, row.id, row.debit_id, row.credit_id if credit == home else between),
            (credit, derived_transfer_id(time_ms, f"chain-credit-{place}", digest.hex()), between, row.credit_id),
        ):
            if id_ == row.id or credit != home:
                held = TransferRow(id_, debit_id, credit_id, row.amount_minor, _HOLD, ID_NONE, timeout_s, row.code)
                holds.setdefault(shard, []).append(held)
                owners.setdefault(shard, []).append(place)
    key = _key(time_ms, digest, routes[0][0])
    tries, marks = [], []
    for shard, held_here in holds.items():
        mark = _marker(_placed(key, _first_slot(shard, shard_count)), len(held_here) + 1, timeout_s)
        tries.append(Ask(shard, _linked([*held_here, mark])))
        marks.append(ChainMark(shard, mark.id, tuple((row.id, row.debit_id, row.credit_id) for row in held_here)))
    decision = _marker(_decision_id(key, shard_count), 1, timeout_s)
    return Plan(len(rows), tries, [owners[ask.shard] for ask in tries], marks, decision, shard_count)


def run(chain: Plan, now_ns: Callable[[], int]) -> Generator[list[Ask], list[bytes | None], End]:
    """Try, decide, settle. Nothing is voided before an abort is durable, nothing posted before a commit is."""
    answers = yield chain.tries
    tried = all(answer is not None and set(answer) == {R.OK} for answer in answers)
    committed = yield from (
        _commit(chain, now_ns) if tried else _learn(chain.marks[0].id, chain.shard_count, now_ns, chain)
    )
    if committed is None:
        # Its first id is ahead of the home's clock, so even an abort is: this attempt never decides, and what a shard with a faster
        # clock holds is given up by whoever finds it.
        ahead = _is_ahead(chain, answers)
        return End(_refusals(chain, answers) if ahead else bytes([R.IN_FLIGHT]) * chain.count, None, False)
    settled = yield from _settle_all(chain.marks, now_ns(), committed=committed)
    if not committed:
        return End(_refusals(chain, answers), False, settled)
    return End(bytes([R.OK if settled else R.IN_FLIGHT]) * chain.count, True, settled)


def settle(mark: ChainMark, shard_count: int, now_ns: Callable[[], int]) -> Step:
    """Ends a chain on a shard that was left with a mark: as it was decided, and if it was not, by an abort. True once the
    mark is gone; None: not known how it was decided. A commit of which holds are missing is left as it is: to post the
    others would look like all of it."""
    committed = yield from _learn(mark.id, shard_count, now_ns)
    if committed is None:
        return None
    if committed and not mark.complete:
        return False
    return (yield from _settle_all([mark], now_ns(), committed=committed))


def forget(decision_id: bytes, now_ns: int) -> Step:
    """Voids a decision. Only for one of which no shard has a mark."""
    (answer,) = yield [Ask(home_of(decision_id), [_ending(decision_id, MARKS, MARKED, _VOID, now_ns)])]
    return answer is not None


def mark_of(decision_id: bytes, shard: int, shard_count: int) -> bytes:
    """The id of the mark that a shard would have of the chain of a decision."""
    return _placed(decision_id, _first_slot(shard, shard_count))


# ---- steps


def _commit(chain: Plan, now_ns: Callable[[], int]) -> Step:
    (answer,) = yield [Ask(chain.home, [chain.decision])]
    if answer is None:
        return None
    if answer[0] == R.OK:
        return True
    return (yield from _learn(chain.marks[0].id, chain.shard_count, now_ns))


def _learn(mark_id: bytes, shard_count: int, now_ns: Callable[[], int], chain: Plan | None = None) -> Step:
    """Aborts unless the decision was a commit: True = committed, False = aborted for good, None = not known. Who has the chain's
    rows also learns of a commit that is over."""
    decision_id = _decision_id(mark_id, shard_count)
    home = home_of(mark_id)
    (answer,) = yield [Ask(home, [_abort(decision_id, _first_slot(home, shard_count))])]
    if answer is None:
        return None
    if answer[0] not in (R.ID_REUSED, R.ID_TOO_OLD):
        return False if answer[0] in _REMEMBERED else None
    # The id is used, by a commit or by anything else, or it is no longer remembered: nobody can commit any more. A commit that
    # some shard has yet to follow still has its hold: asking for more than it has tells. One that was voided may have been a leg of
    # some other chain.
    if chain is not None:
        (answer,) = yield [Ask(home, [chain.decision])]
        if answer is None or answer[0] == R.OK:
            return None if answer is None else True
    probe = _ending(decision_id, MARKS, MARKED, _POST, now_ns())._replace(amount_minor=2)
    (answer,) = yield [Ask(home, [probe])]
    if answer is None or answer[0] not in _REMEMBERED or answer[0] == R.HOLD_ALREADY_VOIDED:
        return None
    return answer[0] == R.HOLD_AMOUNT_EXCEEDED


def _settle_all(
    marks: Sequence[ChainMark], now_ns: int, *, committed: bool
) -> Generator[list[Ask], list[bytes | None], bool]:
    """Posts or voids. The mark goes in the same local chain, so a shard does it once and whole; where the mark is not
    there any more, somebody else did it."""
    kind = _POST if committed else _VOID
    asks = []
    for mark in marks:
        rows = [_ending(mark.id, MARKS, MARKED, _VOID, now_ns)]
        rows += [_ending(id_, debit_id, credit_id, kind, now_ns) for id_, debit_id, credit_id in mark.holds]
        asks.append(Ask(mark.shard, _linked(rows)))
    answers = yield asks
    return all(answer is not None and (set(answer) == {R.OK} or answer[0] in _DONE_BEFORE) for answer in answers)


def _is_ahead(chain: Plan, answers: Sequence[bytes | None]) -> bool:
    """Does a shard say ID_AHEAD of its mark or of the chain's first row? The decision's id is of the same time."""
    return any(
        answer[-1] == R.ID_AHEAD
        or any(code == R.ID_AHEAD and not place for code, place in zip(answer, owners, strict=False))
        for answer, owners in zip(answers, chain.owners, strict=True)
        if answer
    )


def _refusals(chain: Plan, answers: Sequence[bytes | None]) -> bytes:
    """Rows that failed by themselves say why, by the first guard of either side; the others LINKED_FAILED, and so do those for
    which a shard had no room, since a chain that was given up stays so. All say ID_TOO_OLD where a shard says so of any: it may have
    forgotten what it once applied, so nobody can say that the chain failed."""
    if any(R.ID_TOO_OLD in answer for answer in answers if answer):
        return bytes([R.ID_TOO_OLD]) * chain.count
    codes = [int(R.LINKED_FAILED)] * chain.count
    found: dict[int, int] = {}
    for answer, owners in zip(answers, chain.owners, strict=True):
        for code, place in zip(answer or b"", owners, strict=False):
            if code not in (R.OK, R.LINKED_FAILED, R.TOO_MANY_PENDING):  # not the last: it can never be sent again
                found[place] = min(code, found.get(place, code))
        if answer and answer[-1] == R.ID_AHEAD:  # the mark has the time of the first row
            found.setdefault(0, R.ID_AHEAD)
    for place, code in found.items():
        codes[place] = code
    return bytes(codes)


# ---- rows


def _linked(rows: list[TransferRow]) -> list[TransferRow]:
    return [row._replace(flags=row.flags | _LINKED) for row in rows[:-1]] + rows[-1:]


def _marker(id_: bytes, amount: int, timeout_s: int) -> TransferRow:
    return TransferRow(id_, MARKS, MARKED, amount, _HOLD, ID_NONE, timeout_s)


def _abort(decision_id: bytes, slot: int) -> TransferRow:
    """Uses the id up and moves nothing: it voids a hold of the year 1970, which no shard ever took. The accounts only say where it
    goes, and it makes no difference whether somebody opens them."""
    at = slot.to_bytes(2, "big")
    never = bytes(6) + b"\x70\0\x80" + bytes(5) + at
    return TransferRow(decision_id, b"chain-aborted:" + at, b"chain-refused:" + at, 0, _VOID, never)


def _ending(hold_id: bytes, debit_id: bytes, credit_id: bytes, kind: int, now_ns: int) -> TransferRow:
    """A post or void of now: of its own id nothing depends, the hold itself tells whether it was ended before."""
    id_ = derived_transfer_id(now_ns // 1_000_000, f"chain-{kind}", f"{hold_id.hex()}/{now_ns}")
    return TransferRow(id_, debit_id, credit_id, 0, kind, hold_id)


# ---- ids of marks and decisions: version 7, 54 bits of the chain's digest, 8 of the home shard, 12 of a slot


def _key(time_ms: int, digest: bytes, home: int) -> bytes:
    tag = int.from_bytes(digest[4:12], "big") >> 10
    bits = time_ms << 80 | 7 << 76 | (tag >> 42) << 64 | 2 << 62 | (tag & (1 << 42) - 1) << 20 | home << 12
    return bits.to_bytes(16, "big")


def _placed(key: bytes, slot: int) -> bytes:
    """The same id in another slot: two striped accounts are routed by the id."""
    return key[:14] + (int.from_bytes(key[14:], "big") & 0xF000 | slot).to_bytes(2, "big")


def home_of(id_: bytes) -> int:
    """The shard of the decision that a mark or decision names."""
    return int.from_bytes(id_[13:15], "big") >> 4 & 0xFF


def _decision_id(key: bytes, shard_count: int) -> bytes:
    return _placed(key, _first_slot(home_of(key), shard_count) + 1)


def _first_slot(shard: int, shard_count: int) -> int:
    return -(-shard * SLOT_COUNT // shard_count)
