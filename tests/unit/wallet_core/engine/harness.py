"""The engine and its twin side by side: every command goes to both, and both must agree on everything."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wallet_core.engine._engine import Engine
from wallet_core.engine.events import EVENT_BYTES, unpack_events
from wallet_core.engine.twin import Row, Twin
from wallet_core.engine.views import EngineRefused

MS = 1_000_000
#: Some moment in 2027, in nanoseconds, and not on a whole millisecond.
NOW = 1_800_000_000_000 * MS + 123_456


def transfer_id(number: int, ms: int = NOW // MS) -> bytes:
    """A UUID version 7 of that time; distinct for distinct numbers below 2**32."""
    scrambled = (number * 0x9E3779B1) & 0xFFFFFFFF
    return ms.to_bytes(6, "big") + b"\x70" + bytes([number & 0xFF]) + b"\x80\x00\x00\x00" + scrambled.to_bytes(4, "big")


def account_id(number: int) -> bytes:
    return b"account" + b"\0" * 5 + number.to_bytes(4, "big")


def transfer_columns(rows: Sequence[Row]) -> dict[str, Any]:
    n = len(rows)
    return {
        "ids": b"".join(row.id for row in rows),
        "debit_ids": b"".join(row.debit_id for row in rows),
        "credit_ids": b"".join(row.credit_id for row in rows),
        "amounts": struct.pack(f"<{n}q", *(row.amount for row in rows)),
        "flags": struct.pack(f"<{n}H", *(row.flags for row in rows)),
        "pending_ids": b"".join(row.pending_id for row in rows),
        "timeouts_s": struct.pack(f"<{n}I", *(row.timeout_s for row in rows)),
        "codes": struct.pack(f"<{n}H", *(row.code for row in rows)),
        "credit_shards": struct.pack(f"<{n}H", *(row.credit_shard for row in rows)),
    }


@dataclass(slots=True)
class AccountRow:
    id: bytes
    currency: bytes = b"USD\0"
    flags: int = 0
    overdraft_limit: int = 0
    balance_limit: int = 0


def account_columns(rows: Sequence[AccountRow]) -> dict[str, Any]:
    n = len(rows)
    return {
        "ids": b"".join(row.id for row in rows),
        "currencies": b"".join(row.currency for row in rows),
        "flags": struct.pack(f"<{n}H", *(row.flags for row in rows)),
        "overdraft_limits": struct.pack(f"<{n}q", *(row.overdraft_limit for row in rows)),
        "balance_limits": struct.pack(f"<{n}q", *(row.balance_limit for row in rows)),
    }


@dataclass(slots=True)
class Frame:
    first_sequence: int
    timestamp_ns: int
    body: bytes


@dataclass
class Pair:
    """One shard, twice, and its log."""

    shard: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)

    agreed: bool = True

    def __post_init__(self) -> None:
        self.engine, self.twin = self.fresh()

    def fresh(self) -> tuple[Engine, Twin]:
        of_twin = {name: value for name, value in self.parameters.items() if name != "room_ids"}  # memory is no state
        return Engine(self.shard, **self.parameters), Twin(self.shard, **of_twin)

    @property
    def now_ns(self) -> int:
        return self.engine.status().now_ns

    def transfers(
        self, rows: Sequence[Row], now_ns: int = NOW, gather: Iterable[int] | None = None, *, chain_steps: bool = False
    ) -> list[int]:
        columns = transfer_columns(rows) | {"timestamp_ns": now_ns, "rows": gather, "chain_steps": chain_steps}
        results, events = self.engine.transfers(**columns)
        self._agree(events, (results, events), self.twin.transfers(**columns))
        return list(results)

    def transfer(self, row: Row, now_ns: int = NOW) -> int:
        return self.transfers([row], now_ns)[0]

    def open(self, rows: Sequence[AccountRow], now_ns: int = NOW) -> list[int]:
        columns = account_columns(rows)
        results, events = self.engine.open_accounts(timestamp_ns=now_ns, **columns)
        self._agree(events, (results, events), self.twin.open_accounts(timestamp_ns=now_ns, **columns))
        return list(results)

    def update(self, rows: Sequence[AccountRow], now_ns: int = NOW) -> list[int]:
        columns = account_columns(rows)
        del columns["currencies"]
        results, events = self.engine.update_accounts(timestamp_ns=now_ns, **columns)
        self._agree(events, (results, events), self.twin.update_accounts(timestamp_ns=now_ns, **columns))
        return list(results)

    def credits(
        self, source: int, first_number: int, rows: Sequence[tuple[bytes, bytes, int, bytes, int]], now_ns: int = NOW
    ) -> list[int] | None:
        """Rows of (id, credit id, amount, currency, code). None: both refused the call."""
        n = len(rows)
        columns = {
            "ids": b"".join(row[0] for row in rows),
            "credit_ids": b"".join(row[1] for row in rows),
            "amounts": struct.pack(f"<{n}q", *(row[2] for row in rows)),
            "currencies": b"".join(row[3] for row in rows),
            "codes": struct.pack(f"<{n}H", *(row[4] for row in rows)),
        }
        try:
            results, events = self.engine.credits(source, first_number, timestamp_ns=now_ns, **columns)
        except EngineRefused:
            try:
                self.twin.credits(source, first_number, timestamp_ns=now_ns, **columns)
            except EngineRefused:
                return None
            raise
        self._agree(events, (results, events), self.twin.credits(source, first_number, timestamp_ns=now_ns, **columns))
        return list(results)

    def outcomes(
        self, destination: int, upto: int, refused: Sequence[tuple[int, int]], now_ns: int = NOW
    ) -> bytes | None:
        try:
            events = self.engine.outcomes(destination, upto, refused, now_ns)
        except EngineRefused:
            try:
                self.twin.outcomes(destination, upto, refused, now_ns)
            except EngineRefused:
                return None
            raise
        self._agree(events, events, self.twin.outcomes(destination, upto, refused, now_ns))
        return events

    def expire(self, now_ns: int) -> bytes:
        events = self.engine.expire(now_ns)
        self._agree(events, events, self.twin.expire(now_ns))
        return events

    def relay(self, destination: Pair, now_ns: int = NOW, limit: int = 1000) -> None:
        """One round of the relay: sends over, outcomes back."""
        settled, _ = self.engine.sent(destination.shard)
        sends = self.engine.sends(destination.shard, settled + 1, limit)
        if sends:
            rows = [(s.id, s.credit_id, s.amount, s.currency.encode() + b"\0", s.code) for s in sends]
            assert destination.credits(self.shard, sends[0].number, rows, now_ns) is not None
            upto = sends[-1].number
            refused = [pair for pair in destination.engine.refusals(self.shard, settled + 1, 10_000) if pair[0] <= upto]
            assert self.outcomes(destination.shard, upto, refused, now_ns) is not None

    def _agree(self, events: bytes, native: object, plain: object) -> None:
        self.agreed = False
        assert native == plain, f"engine: {shown(native)}\ntwin: {shown(plain)}"
        assert self.engine.state_digest() == self.twin.state_digest()
        self.agreed = True
        if events:
            count = len(events) // EVENT_BYTES
            self.frames.append(Frame(self.engine.status().sequence - count + 1, self.now_ns, events))

    # What must hold at any time.

    def check_agreement(self) -> None:
        native, plain = self.engine.status(), self.twin.status()
        assert native._replace(memory_bytes=0) == plain
        assert self.engine.verify_digest()
        assert self.engine.next_deadline() == self.twin.next_deadline()
        assert_same_state(self.engine, self.twin)
        for total in self.engine.currency_totals().values():
            assert total.balance + total.in_flight == 0
            assert total.held_out == total.held_in

    def check_replay(self) -> None:
        """The log, replayed into an empty engine and an empty twin, gives this state."""
        engine, twin = self.fresh()
        for frame in self.frames:
            engine.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
            twin.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
        for replayed in (engine, twin):
            assert replayed.state_digest() == self.engine.state_digest()
            assert_same_state(replayed, self.engine)
        assert engine.verify_digest()

    def check_image(self) -> None:
        """An image, loaded into an empty engine, gives this state, ids included."""
        self.engine.image_begin()
        pieces = read_pieces(self.engine)
        self.engine.image_end()
        loaded = load_pieces(pieces, self.shard)
        assert loaded.state_digest() == self.engine.state_digest()
        ignored = {"memory_bytes": 0, "repeated_count": 0}
        assert loaded.status()._replace(**ignored) == self.engine.status()._replace(**ignored)
        assert_same_state(loaded, self.engine)


def shown(answer: object) -> str:
    """Results and events of a call, readable."""
    results, events = answer if isinstance(answer, tuple) else (b"", answer)
    assert isinstance(events, bytes)
    return f"{list(results)}, " + "".join(f"\n  {event}" for event in unpack_events(events, 1))


def read_pieces(engine: Engine) -> list[bytes]:
    pieces = []
    while piece := engine.image_piece():
        pieces.append(piece)
    return pieces


def load_pieces(pieces: Sequence[bytes], shard: int = 0) -> Engine:
    engine = Engine(shard)
    for piece in pieces:
        engine.load(piece)
    engine.loaded()
    return engine


def assert_same_state(a: Engine | Twin, b: Engine | Twin) -> None:
    count = a.status().account_count
    assert count == b.status().account_count
    assert [a.account_by_ordinal(i) for i in range(count)] == [b.account_by_ordinal(i) for i in range(count)]
    assert a.currency_totals() == b.currency_totals()
    assert a.next_deadline() == b.next_deadline()
    debits = [view.id for i in range(count) if (view := a.account_by_ordinal(i)) and view.held_out]
    holds = [hold for debit in debits for hold in a.holds(debit)]
    assert holds == [hold for debit in debits for hold in b.holds(debit)]
    assert len(holds) == a.status().hold_count
    assert holds == [b.hold_at(hold.sequence) for hold in holds]
    for shard in range(4):
        assert a.sent(shard) == b.sent(shard)
        assert a.sends(shard, 0, 10_000) == b.sends(shard, 0, 10_000)
        assert a.cursor(shard) == b.cursor(shard)
        assert a.refusals(shard, 0, 10_000) == b.refusals(shard, 0, 10_000)
