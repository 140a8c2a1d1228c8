"""The engine's plain Python twin: slow, readable, and the oracle of its tests. Production never uses it.

It has the Python face of `_engine.Engine`: the same columns in, the same results, event bytes, digest and
answers out, for any history. It keeps dictionaries where the engine keeps tables, and undoes a failed chain
by restoring a copy of the state, so the two have little code in common that could be wrong in both.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from wallet_core.engine.codes import (
    AMOUNT_MAX,
    HOLDS_EXPIRED_MAX,
    ID_AHEAD_MS,
    ID_EARLY_MS,
    SHARD_COUNT_MAX,
    SHARD_LOCAL,
    AccountFlags,
    AccountResult,
    EventKind,
    TransferFlags,
    TransferResult,
    in_flight_account_id,
)
from wallet_core.engine.events import EVENT_BYTES, Event, pack_event, unpack_events
from wallet_core.engine.views import (
    AccountView,
    Counters,
    CurrencyTotals,
    EnginePoisoned,
    EngineRefused,
    HoldView,
    SendView,
)

__all__ = ["Twin"]

K: Final = (
    0x9E3779B97F4A7C15,
    0xD1B54A32D192ED03,
    0xA0761D6478BD642F,
    0xE7037ED1A0B428DB,
    0x8EBC6AF09C88C6E3,
    0x589965CC75374CC3,
    0x1D8E4E27C47D124F,
    0xEB44ACCAB455D165,
)
U64: Final = (1 << 64) - 1
INT64_MAX: Final = (1 << 63) - 1
INT64_MIN: Final = -(1 << 63)
#: Of one currency, what may be under way to other shards. With AMOUNT_MAX it makes INT64_MAX.
UNSETTLED_MAX: Final = 1 << 62
ZERO_ID: Final = bytes(16)
CURRENCY_COUNT_MAX: Final = 1024

A, F, R = AccountFlags, TransferFlags, TransferResult
ALL_TRANSFER_FLAGS: Final = 127
ALL_ACCOUNT_FLAGS: Final = 15


def mum(a: int, b: int) -> int:
    product = (a & U64) * (b & U64)
    return (product & U64) ^ (product >> 64)


def halves(id_: bytes) -> tuple[int, int]:
    return int.from_bytes(id_[:8], "little"), int.from_bytes(id_[8:], "little")


def fingerprint_of(row: Row) -> int:
    (d0, d1), (c0, c1), (p0, p1) = halves(row.debit_id), halves(row.credit_id), halves(row.pending_id)
    h1 = mum(d0 ^ K[0], d1 ^ K[1])
    h2 = mum(c0 ^ K[2], c1 ^ K[3])
    h3 = mum((row.amount & U64) ^ K[4], (row.flags | row.code << 16 | row.timeout_s << 32) ^ K[5])
    if p0 or p1:
        h3 ^= mum(p0 ^ K[6], p1 ^ K[7])
    return mum(h1 + h3, h2 ^ K[1]) >> 16


def id_time_ms(id_: bytes) -> int:
    return int.from_bytes(id_[:6], "big")


def is_v7(id_: bytes) -> bool:
    return id_[6] >> 4 == 7 and id_[8] >> 6 == 2


@dataclass(slots=True)
class Row:
    """One transfer command."""

    id: bytes
    debit_id: bytes
    credit_id: bytes
    amount: int
    flags: int = 0
    pending_id: bytes = ZERO_ID
    timeout_s: int = 0
    code: int = 0
    credit_shard: int = SHARD_LOCAL


@dataclass(slots=True)
class Account:
    id: bytes
    ordinal: int
    currency: bytes
    flags: int
    overdraft_limit: int
    balance_limit: int
    balance: int = 0
    held_out: int = 0
    held_in: int = 0

    def available(self) -> int:
        return self.balance - self.held_out + self.overdraft_limit

    def attributes(self) -> int:
        id0, id1 = halves(self.id)
        limits = self.overdraft_limit * K[5] + self.balance_limit
        word = int.from_bytes(self.currency, "little") | self.flags << 32
        return mum(id0 ^ K[2], id1 ^ K[3]) + mum(word ^ K[4], (limits & U64) ^ K[6])


@dataclass(slots=True, frozen=True)
class Hold:
    id: bytes
    sequence: int
    deadline_ms: int
    amount: int
    debit: int
    credit: int
    code: int
    flags: int  # CHAIN or 0


@dataclass(slots=True)
class Known:
    """What is remembered of a transfer id."""

    fingerprint: int
    result: int
    flags: int = 0  # CHAIN or 0
    ended: int = 0  # of a hold: the result that a later post or void gets


@dataclass(slots=True)
class Generation:
    ids: dict[bytes, Known] = field(default_factory=dict)
    max_ms: int = 0


@dataclass(slots=True)
class Sends:
    """Towards one destination."""

    settled: int = 0
    last: int = 0
    returned: int = 0
    pending: dict[int, SendView] = field(default_factory=dict)


@dataclass(slots=True)
class Cursor:
    """From one source."""

    applied: int = 0
    refused: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    accounts: list[Account] = field(default_factory=list)
    ordinals: dict[bytes, int] = field(default_factory=dict)
    generations: list[Generation] = field(default_factory=list)
    early: list[Generation] = field(default_factory=list)  # of ids that came long before their time
    holds: dict[bytes, Hold] = field(default_factory=dict)
    sends: dict[int, Sends] = field(default_factory=dict)
    cursors: dict[int, Cursor] = field(default_factory=dict)
    in_flight: dict[bytes, int] = field(default_factory=dict)
    unsettled: dict[bytes, int] = field(default_factory=dict)  # of a currency, the amounts of all pending sends
    sequence: int = 0
    now_ns: int = 0
    floor_ms: int = 0
    chain: int = 0


class Contradiction(Exception):
    """A replayed record that cannot follow on the state."""


class Twin:
    """The Python face of `_engine.Engine`, over plain objects."""

    def __init__(
        self,
        shard: int = 0,
        *,
        id_window_ms: int = 7 * 24 * 3600 * 1000,
        id_count_max: int = 1 << 26,
        generation_ids: int = 1 << 20,
        accounts_max: int = 1 << 28,
        holds_max: int = 1 << 26,
        unsettled_max: int = 1 << 22,
    ) -> None:
        self.shard = shard
        self.id_window_ms = id_window_ms
        self.generation_ids = generation_ids
        self.generation_count_max = id_count_max // generation_ids
        self.accounts_max = accounts_max
        self.holds_max = holds_max
        self.unsettled_max = unsettled_max
        self.state = State()
        self.events: list[bytes] = []
        self.repeated_count = 0
        self.chain_steps = False  # of the call
        self.poisoned = False

    # Commands.

    def transfers(
        self,
        ids: bytes,
        debit_ids: bytes,
        credit_ids: bytes,
        amounts: bytes,
        timestamp_ns: int,
        *,
        flags: bytes | None = None,
        pending_ids: bytes | None = None,
        timeouts_s: bytes | None = None,
        codes: bytes | None = None,
        credit_shards: bytes | None = None,
        rows: Iterable[int] | None = None,
        chain_steps: bool = False,
    ) -> tuple[bytes, bytes]:
        count = _count("ids", ids)
        columns = zip(
            _ids("ids", ids, count),
            _ids("debit_ids", debit_ids, count),
            _ids("credit_ids", credit_ids, count),
            _numbers("amounts", amounts, count, "q", 0),
            _numbers("flags", flags, count, "H", 0),
            _ids("pending_ids", pending_ids, count),
            _numbers("timeouts_s", timeouts_s, count, "I", 0),
            _numbers("codes", codes, count, "H", 0),
            _numbers("credit_shards", credit_shards, count, "H", SHARD_LOCAL),
            strict=True,
        )
        table = [Row(*values) for values in columns]
        order = list(range(count)) if rows is None else list(rows)
        for row in order:
            if row >= count:
                raise ValueError(f"rows: {row} is not below {count}")
        self._begin(timestamp_ns)
        self.chain_steps = chain_steps
        results = bytearray(count)
        at = 0
        while at < len(order):
            end = at
            while end < len(order) and table[order[end]].flags & F.LINKED:
                end += 1
            if end == at:
                results[order[at]] = self._single(table[order[at]])
            elif end == len(order):
                for index in order[at:end]:
                    results[index] = R.CHAIN_OPEN
            else:
                chain = order[at : end + 1]
                for index, result in zip(chain, self._chain([table[index] for index in chain]), strict=True):
                    results[index] = result
            at = max(end, at) + 1
        return bytes(results), self._finish()

    def open_accounts(
        self,
        ids: bytes,
        currencies: bytes,
        timestamp_ns: int,
        *,
        flags: bytes | None = None,
        overdraft_limits: bytes | None = None,
        balance_limits: bytes | None = None,
    ) -> tuple[bytes, bytes]:
        count = _count("ids", ids)
        if len(currencies) != 4 * count:
            raise ValueError(f"currencies: expected {count} x 4 = {4 * count} bytes, got {len(currencies)}")
        rows = zip(
            _ids("ids", ids, count),
            [currencies[4 * i : 4 * i + 4] for i in range(count)],
            _numbers("flags", flags, count, "H", 0),
            _numbers("overdraft_limits", overdraft_limits, count, "q", 0),
            _numbers("balance_limits", balance_limits, count, "q", 0),
            strict=True,
        )
        self._begin(timestamp_ns)
        results = bytes(self._open_account(*row) for row in rows)
        return results, self._finish()

    def update_accounts(
        self,
        ids: bytes,
        timestamp_ns: int,
        *,
        flags: bytes | None = None,
        overdraft_limits: bytes | None = None,
        balance_limits: bytes | None = None,
    ) -> tuple[bytes, bytes]:
        count = _count("ids", ids)
        rows = zip(
            _ids("ids", ids, count),
            _numbers("flags", flags, count, "H", 0),
            _numbers("overdraft_limits", overdraft_limits, count, "q", 0),
            _numbers("balance_limits", balance_limits, count, "q", 0),
            strict=True,
        )
        self._begin(timestamp_ns)
        results = bytes(self._update_account(*row) for row in rows)
        return results, self._finish()

    def credits(
        self,
        source_shard: int,
        first_number: int,
        ids: bytes,
        credit_ids: bytes,
        amounts: bytes,
        currencies: bytes,
        timestamp_ns: int,
        *,
        codes: bytes | None = None,
    ) -> tuple[bytes, bytes]:
        count = _count("ids", ids)
        if len(currencies) != 4 * count:
            raise ValueError(f"currencies: expected {count} x 4 = {4 * count} bytes, got {len(currencies)}")
        rows = list(
            zip(
                _ids("ids", ids, count),
                _ids("credit_ids", credit_ids, count),
                _numbers("amounts", amounts, count, "q", 0),
                [currencies[4 * i : 4 * i + 4] for i in range(count)],
                _numbers("codes", codes, count, "H", 0),
                strict=True,
            )
        )
        self._refuse_if_poisoned()
        cursor = self.state.cursors.get(source_shard, Cursor())
        if source_shard >= SHARD_COUNT_MAX or source_shard == self.shard or not 1 <= first_number <= cursor.applied + 1:
            raise EngineRefused("the call contradicts the engine's state; nothing was applied")
        if rows:
            self.state.cursors[source_shard] = cursor
        self._begin(timestamp_ns)
        results = bytearray()
        for number, row in enumerate(rows, first_number):
            if number <= cursor.applied:
                self.repeated_count += 1
                results.append(cursor.refused.get(number, R.OK))
            else:
                results.append(self._credit(source_shard, cursor, number, *row))
        return bytes(results), self._finish()

    def outcomes(
        self, destination_shard: int, upto_number: int, refused: Iterable[tuple[int, int]], timestamp_ns: int
    ) -> bytes:
        self._refuse_if_poisoned()
        pairs = list(refused)
        numbers = [number for number, _ in pairs]
        sends = self.state.sends.get(destination_shard, Sends())
        if (
            upto_number > sends.last
            or numbers != sorted(set(numbers))
            or any(number < 1 or number > upto_number or result <= R.OK for number, result in pairs)
        ):
            raise EngineRefused("the call contradicts the engine's state; nothing was applied")
        self._begin(timestamp_ns)
        if upto_number > sends.settled:
            for number, result in pairs:
                if number > sends.settled:
                    send = sends.pending[number]
                    self._emit_apply(
                        Event(
                            0,
                            EventKind.MONEY_RETURNED,
                            id=send.id,
                            amount=send.amount,
                            debit_ordinal=self.state.in_flight[send.currency.encode() + b"\0"],
                            credit_ordinal=send.debit_ordinal,
                            number=number,
                            result=result,
                            code=send.code,
                            shard=destination_shard,
                        )
                    )
            self._emit_apply(Event(0, EventKind.SAGA_SETTLED, id=ZERO_ID, number=upto_number, shard=destination_shard))
        return self._finish()

    def expire(self, timestamp_ns: int) -> bytes:
        self._begin(timestamp_ns)
        return self._finish()

    # Reads.

    def account(self, account_id: bytes) -> AccountView | None:
        ordinal = self.state.ordinals.get(account_id)
        return None if ordinal is None else self.account_by_ordinal(ordinal)

    def account_by_ordinal(self, ordinal: int) -> AccountView | None:
        if ordinal >= len(self.state.accounts):
            return None
        a = self.state.accounts[ordinal]
        currency = a.currency.rstrip(b"\0").decode()
        limits = (a.overdraft_limit, a.balance_limit)
        return AccountView(a.ordinal, a.id, currency, a.balance, a.held_out, a.held_in, *limits, a.flags)

    def result(self, transfer_id: bytes) -> int:
        known = self._known(transfer_id)
        return known.result if known else 0

    def next_deadline(self) -> int:
        return min((hold.deadline_ms for hold in self.state.holds.values() if hold.deadline_ms), default=0) * 1_000_000

    def state_digest(self) -> bytes:
        linear = 0
        for a in self.state.accounts:
            for value, key in ((a.balance, 1), (a.held_out, 2), (a.held_in, 3), (a.attributes(), 4)):
                linear += value * mum(a.ordinal + K[0], K[key])
        return struct.pack("<QQ", linear & U64, self.state.chain)

    def verify_digest(self) -> bool:
        return True  # computed from scratch every time

    def status(self) -> Counters:
        s = self.state
        return Counters(
            sequence=s.sequence,
            now_ns=s.now_ns,
            floor_ms=s.floor_ms,
            account_count=len(s.accounts),
            hold_count=len(s.holds),
            id_count=sum(len(generation.ids) for generation in s.early + s.generations),
            generation_count=len(s.early) + len(s.generations),
            unsettled_count=sum(len(sends.pending) for sends in s.sends.values()),
            refusal_count=sum(len(cursor.refused) for cursor in s.cursors.values()),
            repeated_count=self.repeated_count,
            memory_bytes=0,
            poisoned=self.poisoned,
        )

    def currency_totals(self) -> dict[str, CurrencyTotals]:
        totals: dict[str, CurrencyTotals] = {}
        for a in self.state.accounts:
            name = a.currency.rstrip(b"\0").decode()
            t = totals.get(name, CurrencyTotals(0, 0, 0, 0, 0))
            if a.flags & A.IN_FLIGHT:
                totals[name] = t._replace(in_flight=a.balance)
            else:
                sums = (t.balance + a.balance, t.in_flight, t.held_out + a.held_out, t.held_in + a.held_in)
                totals[name] = CurrencyTotals(t.accounts + 1, *map(_wrapped, sums))
        return totals

    def holds(self, debit_id: bytes) -> list[HoldView]:
        ordinal = self.state.ordinals.get(debit_id)
        found = [self._hold_view(hold) for hold in self.state.holds.values() if hold.debit == ordinal]
        return sorted(found, key=lambda view: view.sequence)

    def hold_at(self, sequence: int) -> HoldView | None:
        found = [hold for hold in self.state.holds.values() if hold.sequence == sequence]
        return self._hold_view(found[0]) if found else None

    def _hold_view(self, hold: Hold) -> HoldView:
        debit, credit = self.state.accounts[hold.debit].id, self.state.accounts[hold.credit].id
        return HoldView(hold.sequence, hold.id, debit, credit, hold.amount, hold.deadline_ms, hold.code, hold.flags)

    def sent(self, destination_shard: int) -> tuple[int, int]:
        sends = self.state.sends.get(destination_shard, Sends())
        return sends.settled, sends.last

    def sends(self, destination_shard: int, from_number: int, limit: int) -> list[SendView]:
        pending = self.state.sends.get(destination_shard, Sends()).pending
        return [pending[number] for number in sorted(pending) if number >= from_number][:limit]

    def cursor(self, source_shard: int) -> int:
        return self.state.cursors.get(source_shard, Cursor()).applied

    def refusals(self, source_shard: int, from_number: int, limit: int) -> list[tuple[int, int]]:
        refused = self.state.cursors.get(source_shard, Cursor()).refused
        return sorted((number, result) for number, result in refused.items() if number >= from_number)[:limit]

    def forget(self, source_shard: int, upto_number: int) -> None:
        cursor = self.state.cursors.get(source_shard, Cursor())
        cursor.refused = {number: result for number, result in cursor.refused.items() if number > upto_number}

    # One frame of a log.

    def replay_frame(self, records: bytes, first_sequence: int, timestamp_ns: int) -> None:
        self._refuse_if_poisoned()
        if first_sequence != self.state.sequence + 1:
            self.poisoned = True
            raise EngineRefused(f"event {first_sequence} contradicts the state: sequence number")
        self._advance(timestamp_ns)
        for event in unpack_events(records, first_sequence):
            try:
                self._check(event)
            except Contradiction as reason:
                self.poisoned = True
                raise EngineRefused(f"event {event.sequence} contradicts the state: {reason}") from None
            self._apply(event)
            self._count_event(pack_event(event))

    # Beginning and end of a call.

    def _refuse_if_poisoned(self) -> None:
        if self.poisoned:
            raise EnginePoisoned("the engine is poisoned")

    def _begin(self, timestamp_ns: int) -> None:
        self._refuse_if_poisoned()
        self.events = []
        self._advance(timestamp_ns)
        due = [hold for hold in self.state.holds.values() if self._is_due(hold)]
        for hold in sorted(due, key=lambda hold: (hold.deadline_ms, hold.sequence))[:HOLDS_EXPIRED_MAX]:
            self._emit_apply(
                Event(
                    0,
                    EventKind.HOLD_EXPIRED,
                    id=hold.id,
                    amount=hold.amount,
                    debit_ordinal=hold.debit,
                    credit_ordinal=hold.credit,
                    hold_sequence=hold.sequence,
                    code=hold.code,
                )
            )

    def _is_due(self, hold: Hold) -> bool:
        return 0 < hold.deadline_ms <= self.now_ms

    def _finish(self) -> bytes:
        # The chained half of the digest is brought up to date event by event, see _count_event.
        return b"".join(self.events)

    @property
    def now_ms(self) -> int:
        return self.state.now_ns // 1_000_000

    def _advance(self, timestamp_ns: int) -> None:
        s = self.state
        s.now_ns = max(s.now_ns, timestamp_ns)
        if self.now_ms - self.id_window_ms > s.floor_ms:
            s.floor_ms = self.now_ms - self.id_window_ms
            s.early = [generation for generation in s.early if generation.max_ms > s.floor_ms]
            *older, last = s.generations or [Generation()]
            older = [generation for generation in older if generation.max_ms > s.floor_ms]
            s.generations = [*older, last] if s.generations else []

    # Accounts.

    def _open_account(self, id_: bytes, currency: bytes, flags: int, overdraft: int, limit: int) -> AccountResult:
        result, repeated = self._open_account_check(id_, currency, flags, overdraft, limit)
        if repeated:
            self.repeated_count += 1
        elif result is AccountResult.OK:
            self._emit_apply(
                Event(
                    0,
                    EventKind.ACCOUNT_OPENED,
                    id=id_,
                    overdraft_limit=overdraft,
                    balance_limit=limit,
                    ordinal=len(self.state.accounts),
                    currency=currency.rstrip(b"\0").decode(),
                    flags=flags,
                )
            )
        return result

    def _open_account_check(
        self, id_: bytes, currency: bytes, flags: int, overdraft: int, limit: int
    ) -> tuple[AccountResult, bool]:
        if not _account_id_is_valid(id_):
            return AccountResult.ID_INVALID, False
        if id_ in self.state.ordinals:
            a = self.state.accounts[self.state.ordinals[id_]]
            same = (a.currency, a.flags, a.overdraft_limit, a.balance_limit) == (currency, flags, overdraft, limit)
            return (AccountResult.OK, True) if same else (AccountResult.ALREADY_EXISTS, False)
        if not all(0x41 <= letter <= 0x5A for letter in currency[:3]) or currency[3]:
            return AccountResult.CURRENCY_INVALID, False
        if flags & A.CLOSED:
            return AccountResult.FLAGS_INVALID, False
        result = _account_fields_check(flags, overdraft, limit)
        if result is AccountResult.OK and len(self.state.accounts) >= self.accounts_max:
            return AccountResult.TOO_MANY_ACCOUNTS, False
        return result, False

    def _update_account(self, id_: bytes, flags: int, overdraft: int, limit: int) -> AccountResult:
        result = self._update_account_check(id_, flags, overdraft, limit)
        if result is AccountResult.OK:
            a = self.state.accounts[self.state.ordinals[id_]]
            if (a.flags, a.overdraft_limit, a.balance_limit) != (flags, overdraft, limit):
                self._emit_apply(
                    Event(
                        0,
                        EventKind.ACCOUNT_UPDATED,
                        id=id_,
                        overdraft_limit=overdraft,
                        balance_limit=limit,
                        ordinal=a.ordinal,
                        currency=a.currency.rstrip(b"\0").decode(),
                        flags=flags,
                    )
                )
        return result

    def _update_account_check(self, id_: bytes, flags: int, overdraft: int, limit: int) -> AccountResult:
        if not _account_id_is_valid(id_):
            return AccountResult.ID_INVALID
        result = _account_fields_check(flags, overdraft, limit)
        if result is not AccountResult.OK:
            return result
        if id_ not in self.state.ordinals:
            return AccountResult.NOT_FOUND
        a = self.state.accounts[self.state.ordinals[id_]]
        if (flags ^ a.flags) & A.STRIPED:
            return AccountResult.FLAGS_INVALID
        if flags & A.CLOSED and (a.balance or a.held_out or a.held_in):
            return AccountResult.BALANCE_NOT_ZERO
        return AccountResult.OK

    # Transfers.

    def _single(self, row: Row) -> int:
        result, event, _ = self._judge(row, chained=False)
        if event is not None:
            self._execute(row, event)
        elif R.HOLD_NOT_FOUND <= result <= R.LINKED_FAILED and not self._known(row.id):
            self._refuse(row, result)
        return result

    def _chain(self, rows: list[Row]) -> list[int]:
        """All or none. Rows are tried on the real state; if one fails, a copy from before comes back."""
        before = copy.deepcopy(self.state), len(self.events)
        results: list[int] = []
        news: list[bool] = []
        for row in rows:
            result, event, repeated = self._judge(row, chained=True)
            results.append(result)
            news.append(not repeated)
            if result != R.OK:
                break
            if event is not None:
                self._execute(row, event)
        else:
            return results
        failed = len(results) - 1
        tried = self.state
        self.state, events = before
        del self.events[events:]
        # The id table alone keeps what the attempt brought: the ids in their order, generations, and the
        # floor.
        self.state.generations, self.state.early, self.state.floor_ms = tried.generations, tried.early, tried.floor_ms
        for hold in self.state.holds.values():
            if known := self._known(hold.id):
                known.ended = 0
        for index, row in enumerate(rows):
            known = self._known(row.id)
            if index < failed:
                if news[index]:
                    results[index] = R.LINKED_FAILED
                    if known:
                        known.result = R.LINKED_FAILED
                        known.ended = 0
                    self._emit(self._refusal(row, R.LINKED_FAILED))
                elif known:
                    results[index] = known.result
            elif index == failed:
                if news[index] and R.HOLD_NOT_FOUND <= results[index] <= R.LINKED_FAILED:
                    self._refuse(row, results[index])
            else:
                result, repeated = self._judge_id(row)
                if result == R.OK and not repeated:
                    result = R.LINKED_FAILED
                    if row.flags & F.CHAIN and not self.chain_steps:
                        result = R.FLAGS_INVALID
                    else:
                        self._refuse(row, result)
                results.append(result)
        return results

    def _judge_id(self, row: Row) -> tuple[int, bool]:
        """Guards 2 to 5, and the answer to a repeated id. (result, repeated)"""
        if not is_v7(row.id):
            return R.ID_INVALID, False
        if id_time_ms(row.id) <= self.state.floor_ms:
            return R.ID_TOO_OLD, False
        if id_time_ms(row.id) > self.now_ms + ID_AHEAD_MS:
            return R.ID_AHEAD, False
        known = self._known(row.id)
        if known is None:
            return (R.ID_AHEAD if self._is_early(row.id) and not self._early_has_room() else R.OK), False
        if row.flags & F.CHAIN and not self.chain_steps:  # before its content is compared with what is remembered
            return R.FLAGS_INVALID, False
        if known.fingerprint != fingerprint_of(row) or known.flags != row.flags & F.CHAIN:
            return R.ID_REUSED, False
        self.repeated_count += 1
        return known.result, True

    def _judge(self, row: Row, *, chained: bool) -> tuple[int, Event | None, bool]:
        """The result, the event that makes it so (None = refused or repeated), and whether it is repeated."""
        result, repeated = self._judge_id(row)
        if result != R.OK or repeated:
            return result, None, repeated
        result = self._row_guards(row, chained)
        if result != R.OK:
            return result, None, False
        if row.credit_shard != SHARD_LOCAL:
            guard: Callable[[Row], tuple[int, Event | None]] = self._judge_send
        elif row.flags & (F.POST | F.VOID):
            guard = self._judge_finish
        else:
            guard = self._judge_move
        return *guard(row), False

    def _row_guards(self, row: Row, chained: bool) -> int:
        kinds = row.flags & (F.HOLD | F.POST | F.VOID)
        finishing = kinds in (F.POST, F.VOID)
        balancing = row.flags & (F.BALANCING_DEBIT | F.BALANCING_CREDIT)
        if row.flags & ~ALL_TRANSFER_FLAGS or kinds.bit_count() > 1 or (finishing and balancing):
            return R.FLAGS_INVALID
        if row.flags & F.CHAIN and (not self.chain_steps or not kinds or balancing):
            return R.FLAGS_INVALID
        if not 0 <= row.amount <= AMOUNT_MAX or (row.amount == 0 and not finishing and not balancing):
            return R.AMOUNT_INVALID
        if finishing:
            if not is_v7(row.pending_id) or row.pending_id == row.id:
                return R.PENDING_ID_INVALID
        elif row.pending_id != ZERO_ID:
            return R.PENDING_ID_INVALID
        if row.timeout_s and kinds != F.HOLD:
            return R.TIMEOUT_INVALID
        if row.debit_id == row.credit_id and not (finishing and row.debit_id == ZERO_ID):
            return R.ACCOUNTS_SAME
        if row.credit_shard != SHARD_LOCAL:
            if row.flags or chained or row.credit_shard >= SHARD_COUNT_MAX or row.credit_shard == self.shard:
                return R.CROSS_SHARD_UNSUPPORTED
            if len(self.state.sends.get(row.credit_shard, Sends()).pending) >= self.unsettled_max:
                return R.TOO_MANY_PENDING
        if kinds == F.HOLD and len(self.state.holds) >= self.holds_max:
            return R.TOO_MANY_PENDING
        return R.OK

    def _judge_move(self, row: Row) -> tuple[int, Event | None]:
        debit, credit = self._usable(row.debit_id), self._usable(row.credit_id)
        if debit is None:
            return R.DEBIT_ACCOUNT_NOT_FOUND, None
        if credit is None:
            return R.CREDIT_ACCOUNT_NOT_FOUND, None
        result = _flag_guards(debit, credit)
        if result != R.OK:
            return result, None
        amount = row.amount
        if row.flags & (F.BALANCING_DEBIT | F.BALANCING_CREDIT):
            if amount == 0:
                if row.flags & F.BALANCING_DEBIT and debit.flags & A.MAY_OVERDRAW:
                    amount = debit.balance - debit.held_out
                    if amount < 1:
                        return R.INSUFFICIENT_FUNDS, None
                elif not (row.flags & F.BALANCING_DEBIT or credit.balance_limit) and debit.flags & A.MAY_OVERDRAW:
                    return R.BALANCE_OVERFLOW, None
                amount = min(amount or AMOUNT_MAX, AMOUNT_MAX)
            if row.flags & F.BALANCING_DEBIT and not debit.flags & A.MAY_OVERDRAW:
                amount = min(amount, debit.available())
                if amount < 1:
                    return R.INSUFFICIENT_FUNDS, None
            if row.flags & F.BALANCING_CREDIT and credit.balance_limit:
                amount = min(amount, credit.balance_limit - credit.balance - credit.held_in)
                if amount < 1:
                    return R.BALANCE_LIMIT_EXCEEDED, None
        result = _money_guards(debit, credit, amount)
        if result != R.OK:
            return result, None
        event = Event(
            0,
            EventKind.MONEY_MOVED,
            id=row.id,
            amount=amount,
            debit_ordinal=debit.ordinal,
            credit_ordinal=credit.ordinal,
            code=row.code,
            fingerprint=fingerprint_of(row),
            flags=row.flags,
        )
        if row.flags & F.HOLD:
            event = replace(event, kind=EventKind.HOLD_PLACED, deadline_ms=self._deadline(row))
        return R.OK, event

    def _deadline(self, row: Row) -> int:
        if not row.timeout_s or row.flags & F.CHAIN:
            return 0
        return -(-self.state.now_ns // 1_000_000) + 1000 * row.timeout_s

    def _judge_finish(self, row: Row) -> tuple[int, Event | None]:
        hold = self.state.holds.get(row.pending_id)
        known = self._known(row.pending_id) if hold is None else hold
        if known is None or not self._may_end(known, row):
            return R.HOLD_NOT_FOUND, None
        if isinstance(known, Known):
            return known.ended or R.HOLD_NOT_FOUND, None
        hold = known
        if self._is_due(hold):
            return R.HOLD_EXPIRED, None
        debit, credit = self.state.accounts[hold.debit], self.state.accounts[hold.credit]
        if row.debit_id not in (ZERO_ID, debit.id) or row.credit_id not in (ZERO_ID, credit.id):
            return R.HOLD_MISMATCH, None
        amount = row.amount or hold.amount
        if row.flags & F.VOID:
            if amount != hold.amount:
                return R.HOLD_MISMATCH, None
        else:
            if amount > hold.amount:
                return R.HOLD_AMOUNT_EXCEEDED, None
            result = _flag_guards(debit, credit)
            if result != R.OK:
                return result, None
        return R.OK, Event(
            0,
            EventKind.HOLD_VOIDED if row.flags & F.VOID else EventKind.HOLD_POSTED,
            id=row.id,
            amount=amount,
            debit_ordinal=hold.debit,
            credit_ordinal=hold.credit,
            hold_sequence=hold.sequence,
            code=row.code,
            fingerprint=fingerprint_of(row),
            flags=row.flags,
        )

    def _may_end(self, known: Hold | Known, row: Row) -> bool:
        """Holds of chains and those of callers do not exist for each other."""
        return known.flags == row.flags & F.CHAIN

    def _judge_send(self, row: Row) -> tuple[int, Event | None]:
        debit = self._usable(row.debit_id)
        if debit is None:
            return R.DEBIT_ACCOUNT_NOT_FOUND, None
        if debit.flags & A.CLOSED:
            return R.DEBIT_ACCOUNT_CLOSED, None
        if debit.flags & A.FROZEN:
            return R.DEBIT_ACCOUNT_FROZEN, None
        nowhere = Account(ZERO_ID, 0, debit.currency, 0, 0, 0)
        in_flight = self.state.in_flight.get(debit.currency)
        result = _money_guards(debit, nowhere if in_flight is None else self.state.accounts[in_flight], row.amount)
        if result != R.OK:
            return result, None
        if in_flight is None and not self._in_flight_has_room():
            return R.TOO_MANY_PENDING, None
        if self._unsettled_overflows(debit, row.amount):
            return R.BALANCE_OVERFLOW, None
        return R.IN_FLIGHT, Event(
            0,
            EventKind.MONEY_SENT,
            id=row.id,
            amount=row.amount,
            debit_ordinal=debit.ordinal,
            credit_id=row.credit_id,
            code=row.code,
            shard=row.credit_shard,
        )

    def _unsettled_overflows(self, debit: Account, amount: int) -> bool:
        return self.state.unsettled.get(debit.currency, 0) + amount > UNSETTLED_MAX

    def _execute(self, row: Row, event: Event) -> None:
        if event.kind is EventKind.MONEY_SENT:
            self._in_flight(self.state.accounts[event.debit_ordinal].currency)
        self._emit_apply(event)

    def _refusal(self, row: Row, result: int) -> Event:
        return Event(
            0,
            EventKind.TRANSFER_REFUSED,
            id=row.id,
            amount=row.amount,
            result=result,
            code=row.code,
            fingerprint=fingerprint_of(row),
            flags=row.flags & 0xFF,
        )

    def _refuse(self, row: Row, result: int) -> None:
        self._emit_apply(self._refusal(row, result))

    def _usable(self, account_id: bytes) -> Account | None:
        ordinal = self.state.ordinals.get(account_id)
        if ordinal is None or self.state.accounts[ordinal].flags & A.IN_FLIGHT:
            return None
        return self.state.accounts[ordinal]

    # Sagas.

    def _in_flight_has_room(self) -> bool:
        return len(self.state.in_flight) < CURRENCY_COUNT_MAX and len(self.state.accounts) < self.accounts_max

    def _in_flight(self, currency: bytes) -> int:
        if currency not in self.state.in_flight:
            self._emit_apply(
                Event(
                    0,
                    EventKind.ACCOUNT_OPENED,
                    id=in_flight_account_id(currency, self.shard),
                    ordinal=len(self.state.accounts),
                    currency=currency.rstrip(b"\0").decode(),
                    flags=A.MAY_OVERDRAW | A.IN_FLIGHT,
                )
            )
        return self.state.in_flight[currency]

    def _credit(
        self,
        source: int,
        cursor: Cursor,
        number: int,
        id_: bytes,
        credit_id: bytes,
        amount: int,
        currency: bytes,
        code: int,
    ) -> int:
        result = self._credit_guards(credit_id, amount, currency)
        event = Event(
            0, EventKind.CREDIT_REFUSED, id=id_, amount=amount, number=number, result=result, code=code, shard=source
        )
        if result == R.OK:
            event = replace(
                event,
                kind=EventKind.MONEY_RECEIVED,
                result=0,
                debit_ordinal=self._in_flight(currency),
                credit_ordinal=self.state.ordinals[credit_id],
            )
        self._emit_apply(event)
        return result

    def _credit_guards(self, credit_id: bytes, amount: int, currency: bytes) -> int:
        if not 0 < amount <= AMOUNT_MAX:
            return R.AMOUNT_INVALID
        credit = self._usable(credit_id)
        if credit is None:
            return R.CREDIT_ACCOUNT_NOT_FOUND
        if credit.currency != currency:
            return R.CURRENCY_MISMATCH
        if credit.flags & A.CLOSED:
            return R.CREDIT_ACCOUNT_CLOSED
        if credit.flags & A.FROZEN:
            return R.CREDIT_ACCOUNT_FROZEN
        if credit.balance_limit and credit.balance + credit.held_in + amount > credit.balance_limit:
            return R.BALANCE_LIMIT_EXCEEDED
        in_flight = self.state.in_flight.get(currency)
        balance = 0 if in_flight is None else self.state.accounts[in_flight].balance
        if _credit_overflows(credit, amount):
            return R.BALANCE_OVERFLOW
        if in_flight is None:
            return R.OK if self._in_flight_has_room() else R.CREDIT_ACCOUNT_NOT_FOUND
        return R.BALANCE_OVERFLOW if balance - amount < -AMOUNT_MAX else R.OK

    # The id table.

    def _known(self, id_: bytes) -> Known | None:
        for generation in self.state.early + self.state.generations:
            if id_ in generation.ids:
                return generation.ids[id_]
        return None

    def _is_early(self, id_: bytes) -> bool:
        return id_time_ms(id_) > self.now_ms + ID_EARLY_MS

    def _early_has_room(self) -> bool:
        early = self.state.early
        if early and len(early[-1].ids) < self.generation_ids:
            return True
        return sum(generation.max_ms > self.now_ms for generation in early) < max(self.generation_count_max // 4, 1)

    def _remember(self, id_: bytes, known: Known) -> None:
        s = self.state
        early = bool(self._is_early(id_) and s.generations and self._early_has_room())
        kind = s.early if early else s.generations
        if not kind or len(kind[-1].ids) == self.generation_ids:
            if len(s.early) + len(s.generations) == self.generation_count_max:
                lowest = min(s.early + (s.generations[:-1] if early else s.generations), key=lambda one: one.max_ms)
                s.floor_ms = max(s.floor_ms, lowest.max_ms)
                s.early = [one for one in s.early if one is not lowest]
                s.generations = [one for one in s.generations if one is not lowest]
            (s.early if early else s.generations).append(Generation())
        generation = (s.early if early else s.generations)[-1]
        generation.ids[id_] = known
        generation.max_ms = max(generation.max_ms, id_time_ms(id_))

    # Events: what each does to the state, live and on replay alike.

    def _emit(self, event: Event) -> Event:
        event = replace(event, sequence=self.state.sequence + 1)
        record = pack_event(event)
        self.events.append(record)
        self._count_event(record)
        return event

    def _count_event(self, record: bytes) -> None:
        w = struct.unpack("<6Q", record)
        r = mum(w[0] ^ K[0], w[1] ^ K[1]) ^ mum(w[2] ^ K[2], w[3] ^ K[3]) ^ mum(w[4] ^ K[4], w[5] ^ K[5])
        self.state.chain = (mum(self.state.chain ^ r, K[6]) + K[7]) & U64
        self.state.sequence += 1

    def _emit_apply(self, event: Event) -> None:
        self._apply(self._emit(event))

    def _move(self, debit: int, credit: int, amount: int) -> None:
        self.state.accounts[debit].balance -= amount
        self.state.accounts[credit].balance += amount
        # A bug, if not: no guard stands before money that comes back.
        assert self.state.accounts[debit].balance >= INT64_MIN, "a balance below int64"
        assert self.state.accounts[credit].balance + self.state.accounts[credit].held_in <= INT64_MAX, "above int64"

    def _apply(self, event: Event) -> None:
        s, kind = self.state, event.kind
        if kind is EventKind.ACCOUNT_OPENED:
            currency = event.currency.encode().ljust(4, b"\0")
            limits = (event.overdraft_limit, event.balance_limit)
            s.accounts.append(Account(event.id, event.ordinal, currency, event.flags, *limits))
            s.ordinals[event.id] = event.ordinal
            if event.flags & A.IN_FLIGHT:
                s.in_flight[currency] = event.ordinal
        elif kind is EventKind.ACCOUNT_UPDATED:
            a = s.accounts[event.ordinal]
            a.flags, a.overdraft_limit, a.balance_limit = event.flags, event.overdraft_limit, event.balance_limit
        elif kind is EventKind.MONEY_MOVED:
            self._remember(event.id, Known(event.fingerprint, R.OK))
            self._move(event.debit_ordinal, event.credit_ordinal, event.amount)
        elif kind is EventKind.HOLD_PLACED:
            flags = event.flags & F.CHAIN
            self._remember(event.id, Known(event.fingerprint, R.OK, flags))
            s.accounts[event.debit_ordinal].held_out += event.amount
            s.accounts[event.credit_ordinal].held_in += event.amount
            accounts = (event.debit_ordinal, event.credit_ordinal)
            times = (event.sequence, event.deadline_ms)
            s.holds[event.id] = Hold(event.id, *times, event.amount, *accounts, event.code, flags)
        elif kind in (EventKind.HOLD_POSTED, EventKind.HOLD_VOIDED, EventKind.HOLD_EXPIRED):
            self._apply_finished(event)
        elif kind is EventKind.TRANSFER_REFUSED:
            self._remember(event.id, Known(event.fingerprint, event.result, event.flags & F.CHAIN))
        elif kind is EventKind.MONEY_SENT:
            self._apply_sent(event)
        elif kind in (EventKind.MONEY_RECEIVED, EventKind.CREDIT_REFUSED):
            cursor = s.cursors.setdefault(event.shard, Cursor())
            cursor.applied = event.number
            if kind is EventKind.CREDIT_REFUSED:
                cursor.refused[event.number] = event.result
            else:
                self._move(event.debit_ordinal, event.credit_ordinal, event.amount)
        elif kind is EventKind.MONEY_RETURNED:
            self._move(event.debit_ordinal, event.credit_ordinal, event.amount)
            s.sends[event.shard].returned = event.number
            if known := self._known(event.id):
                known.result = event.result
        else:
            sends = s.sends[event.shard]
            for number in range(sends.settled + 1, event.number + 1):
                send = sends.pending.pop(number)
                s.unsettled[send.currency.encode() + b"\0"] -= send.amount
                known = self._known(send.id)
                if known and known.result == R.IN_FLIGHT:
                    known.result = R.OK
            sends.settled = event.number

    def _apply_finished(self, event: Event) -> None:
        hold = next(hold for hold in self.state.holds.values() if hold.sequence == event.hold_sequence)
        if event.kind is not EventKind.HOLD_EXPIRED:
            self._remember(event.id, Known(event.fingerprint, R.OK, event.flags & F.CHAIN))
        del self.state.holds[hold.id]
        self.state.accounts[hold.debit].held_out -= hold.amount
        self.state.accounts[hold.credit].held_in -= hold.amount
        if event.kind is EventKind.HOLD_POSTED:
            self._move(hold.debit, hold.credit, event.amount)
        if known := self._known(hold.id):
            known.ended = {
                EventKind.HOLD_POSTED: R.HOLD_ALREADY_POSTED,
                EventKind.HOLD_VOIDED: R.HOLD_ALREADY_VOIDED,
                EventKind.HOLD_EXPIRED: R.HOLD_EXPIRED,
            }[event.kind]

    def _apply_sent(self, event: Event) -> None:
        debit = self.state.accounts[event.debit_ordinal]
        row = Row(event.id, debit.id, event.credit_id, event.amount, code=event.code)
        self._remember(event.id, Known(fingerprint_of(row), R.IN_FLIGHT))
        self._move(debit.ordinal, self.state.in_flight[debit.currency], event.amount)
        self.state.unsettled[debit.currency] = self.state.unsettled.get(debit.currency, 0) + event.amount
        sends = self.state.sends.setdefault(event.shard, Sends())
        sends.last += 1
        sends.pending[sends.last] = SendView(
            sends.last,
            event.sequence,
            event.id,
            event.credit_id,
            event.amount,
            debit.currency.rstrip(b"\0").decode(),
            debit.ordinal,
            event.code,
        )

    # Pair assertions: what a replayed record must find. Less than the engine checks, but never more.

    def _check(self, event: Event) -> None:
        s, kind = self.state, event.kind
        if kind is EventKind.ACCOUNT_OPENED:
            _must(event.ordinal == len(s.accounts) and event.id not in s.ordinals, "account")
        elif kind is EventKind.ACCOUNT_UPDATED:
            _must(s.ordinals.get(event.id) == event.ordinal, "account update")
        elif kind in (EventKind.MONEY_MOVED, EventKind.HOLD_PLACED, EventKind.MONEY_RECEIVED, EventKind.MONEY_RETURNED):
            _must(max(event.debit_ordinal, event.credit_ordinal) < len(s.accounts), "accounts")
            _must(0 < event.amount <= AMOUNT_MAX, "amount")
            debit, credit = s.accounts[event.debit_ordinal], s.accounts[event.credit_ordinal]
            if kind is not EventKind.MONEY_RETURNED:
                _must(_flag_guards(debit, credit) == R.OK, "currency or account flags")
                _must(_money_guards(debit, credit, event.amount) == R.OK, "funds or limits")
        if kind in (
            EventKind.MONEY_MOVED,
            EventKind.HOLD_PLACED,
            EventKind.HOLD_POSTED,
            EventKind.HOLD_VOIDED,
            EventKind.TRANSFER_REFUSED,
            EventKind.MONEY_SENT,
        ):
            _must(is_v7(event.id) and self._known(event.id) is None, "transfer id was there before")
        if kind in (EventKind.HOLD_POSTED, EventKind.HOLD_VOIDED, EventKind.HOLD_EXPIRED):
            _must(any(hold.sequence == event.hold_sequence for hold in s.holds.values()), "hold not found")
        if kind is EventKind.MONEY_SENT:
            _must(event.debit_ordinal < len(s.accounts) and 0 < event.amount <= AMOUNT_MAX, "accounts")
            debit = s.accounts[event.debit_ordinal]
            _must(debit.currency in s.in_flight, "accounts")
            _must(
                _money_guards(debit, s.accounts[s.in_flight[debit.currency]], event.amount) == R.OK, "funds or limits"
            )
            _must(not self._unsettled_overflows(debit, event.amount), "funds or limits")
        if kind in (EventKind.MONEY_RECEIVED, EventKind.CREDIT_REFUSED):
            _must(event.number == s.cursors.get(event.shard, Cursor()).applied + 1, "saga number")
        if kind in (EventKind.MONEY_RETURNED, EventKind.SAGA_SETTLED):
            sends = s.sends.get(event.shard, Sends())
            _must(sends.settled < event.number <= sends.last, "saga number")


def _must(holds: bool, reason: str) -> None:
    if not holds:
        raise Contradiction(reason)


def _account_id_is_valid(id_: bytes) -> bool:
    return id_ not in (ZERO_ID, b"\xff" * 16) and not id_.startswith(b"in-flight:")


def _account_fields_check(flags: int, overdraft: int, limit: int) -> AccountResult:
    if flags & ~ALL_ACCOUNT_FLAGS or (flags & A.STRIPED and not flags & A.MAY_OVERDRAW):
        return AccountResult.FLAGS_INVALID
    if overdraft < 0 or limit < 0 or (flags & A.STRIPED and (overdraft or limit)):
        return AccountResult.LIMIT_INVALID
    return AccountResult.OK


def _flag_guards(debit: Account, credit: Account) -> int:
    if debit.currency != credit.currency:
        return R.CURRENCY_MISMATCH
    if debit.flags & A.CLOSED:
        return R.DEBIT_ACCOUNT_CLOSED
    if credit.flags & A.CLOSED:
        return R.CREDIT_ACCOUNT_CLOSED
    if debit.flags & A.FROZEN:
        return R.DEBIT_ACCOUNT_FROZEN
    if credit.flags & A.FROZEN:
        return R.CREDIT_ACCOUNT_FROZEN
    return R.OK


def _wrapped(total: int) -> int:
    """A sum over accounts as the engine gives it: modulo 2^64, as int64."""
    return (total - INT64_MIN & U64) + INT64_MIN


def _credit_overflows(credit: Account, amount: int) -> bool:
    return credit.balance + credit.held_in + amount > AMOUNT_MAX


def _money_guards(debit: Account, credit: Account, amount: int) -> int:
    if not debit.flags & A.MAY_OVERDRAW and debit.available() < amount:
        return R.INSUFFICIENT_FUNDS
    if credit.balance_limit and credit.balance + credit.held_in + amount > credit.balance_limit:
        return R.BALANCE_LIMIT_EXCEEDED
    if debit.held_out + amount > INT64_MAX or debit.balance - debit.held_out - amount < -AMOUNT_MAX:
        return R.BALANCE_OVERFLOW
    return R.BALANCE_OVERFLOW if _credit_overflows(credit, amount) else R.OK


def _count(name: str, column: bytes) -> int:
    if len(column) % 16:
        raise ValueError(f"{name}: {len(column)} bytes are no multiple of 16")
    return len(column) // 16


def _ids(name: str, column: bytes | None, count: int) -> list[bytes]:
    if column is None:
        return [ZERO_ID] * count
    if len(column) != 16 * count:
        raise ValueError(f"{name}: expected {count} x 16 = {16 * count} bytes, got {len(column)}")
    return [column[16 * i : 16 * i + 16] for i in range(count)]


def _numbers(name: str, column: bytes | None, count: int, format_: str, default: int) -> list[int]:
    if column is None:
        return [default] * count
    packing = struct.Struct(f"<{count}{format_}")
    if len(column) != packing.size:
        unit = struct.calcsize("<" + format_)
        raise ValueError(f"{name}: expected {count} x {unit} = {packing.size} bytes, got {len(column)}")
    return list(packing.unpack(column))


assert EVENT_BYTES == 48
