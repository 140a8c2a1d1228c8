"""Two shards, each engine and twin side by side, and everything that may happen to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.unit.wallet_core.engine.harness import (
    MS,
    NOW,
    AccountRow,
    Frame,
    Pair,
    account_id,
    assert_same_state,
    load_pieces,
    transfer_id,
)
from wallet_core.engine.codes import AMOUNT_MAX, SHARD_LOCAL, TransferFlags, TransferResult, in_flight_account_id
from wallet_core.engine.twin import Row

F = TransferFlags

ACCOUNTS = 5  # of each shard
AMOUNTS = [1, 2, 5, 10, 30, 100]
WILD_AMOUNTS = [0, -1, AMOUNT_MAX, AMOUNT_MAX + 1, (1 << 63) - 1]
#: A few of these fill an account, the in-flight account or what may be under way.
GREAT_AMOUNTS = [1, 900, 1000, AMOUNT_MAX // 2, AMOUNT_MAX - 1000, AMOUNT_MAX - 1, AMOUNT_MAX]
WILD_FLAGS = [6, 10, 12, 20, 24, 33, 48, 49, 64, 65, 82, 128, 192, 1 << 14]
TIMEOUTS = [0, 1, 1, 3600]
STEPS_NS = [0] * 8 + [1, MS, 1000 * MS, 1000 * MS, 1500 * MS, 3600_000 * MS, 8 * 86_400_000 * MS, -1000 * MS]
ID_OFFSETS_MS = [-1000, -999, 300_000, 300_001, -7 * 86_400_000, 1000, 1001, 1002, 2000, 60_000]
LIMITS = [0, 0, 0, 0, 0, 50, 200, (1 << 63) - 1, -1]
SHAPES = (
    ["plain"] * 8
    + ["hold"] * 5
    + ["post", "part", "void"] * 3
    + ["step"] * 4
    + ["send"] * 5
    + [
        "balancing debit",
        "balancing credit",
        "again",
        "again",
        "other",
        "odd id",
        "odd id",
        "wild flags",
        "wild amount",
        "wild",
    ]
)
CURRENCIES = [b"USD\0"] * 6 + [b"JPY\0", b"usd\0", b"USDX"]
ACCOUNT_FLAGS = [0, 0, 0, 4, 4, 4, 12, 1, 2, 8, 16, 64]
GENERATION_IDS = [1, 12, 1000, 1000, 1000]
GENERATIONS = [2, 3, 9]
WINDOWS_MS = [1000] + [7 * 86_400_000] * 4
ROOM = [2, 100, 100]


class World:
    """Commands as small numbers, so that a seeded generator or hypothesis can draw them."""

    def __init__(self, generation_ids: int, generations: int, window_ms: int, room: int, overdrawing: int = 1) -> None:
        parameters = {
            "generation_ids": generation_ids,
            "id_count_max": generation_ids * generations,
            "id_window_ms": window_ms,
            "holds_max": room,
            "unsettled_max": room,
            "accounts_max": ACCOUNTS + room - 1,
        }
        self.pairs = [Pair(shard, parameters) for shard in (0, 1)]
        self.now = NOW
        self.ids = 0
        self.holds = [transfer_id(1, NOW // MS)]
        self.used: list[Row] = [Row(transfer_id(0), account_id(0), account_id(1), 1)]
        self.images: dict[int, tuple[bytes, int, list[bytes], dict[bytes, int]]] = {}
        for pair in self.pairs:
            flags = [4] * overdrawing + [0] * (ACCOUNTS - 1 - overdrawing)
            rows = [AccountRow(self.account(pair.shard, i), flags=flags[i]) for i in range(ACCOUNTS - 1)]
            pair.open(rows, self.now)
            pair.transfers([self.fresh(pair.shard, 0, i, 1000) for i in range(1, ACCOUNTS - 1)], self.now)

    def account(self, shard: int, number: int) -> bytes:
        if number > ACCOUNTS:
            return in_flight_account_id(b"USD\0", shard)
        return account_id(shard * 100 + number)

    def fresh(self, shard: int, debit: int, credit: int, amount: int) -> Row:
        self.ids += 1
        ids = (transfer_id(self.ids, self.now // MS), self.account(shard, debit), self.account(shard, credit))
        row = Row(*ids, amount)
        self.used.append(row)
        return row

    def row(self, shard: int, spec: tuple[Any, ...]) -> Row:
        shape, pick, debit, credit, amount, timeout, linked = spec
        before = self.used[-1 - pick % len(self.used)]
        if shape == "again":
            return before
        if pick:  # two different accounts, open unless closed since
            debit, credit = debit % (ACCOUNTS - 1), (debit + 1 + credit % (ACCOUNTS - 2)) % (ACCOUNTS - 1)
        row = self.fresh(shard, debit, credit, amount)
        row.flags, row.code = linked, pick
        if shape == "hold":
            row.flags |= F.HOLD
            row.timeout_s = timeout
        elif shape in ("post", "part", "void"):
            row.flags |= F.VOID if shape == "void" else F.POST
            row.amount = amount if shape == "part" else 0
            row.pending_id = self.holds[-1 - pick % min(len(self.holds), 4)]
            if pick < 25:
                row.debit_id = row.credit_id = bytes(16)
        elif shape == "step":  # of a chain across shards
            row.flags |= F.CHAIN | [F.HOLD, F.HOLD, F.POST, F.VOID][pick % 4]
            row.timeout_s = timeout if row.flags & F.HOLD else 0
            if not row.flags & F.HOLD:
                row.amount, row.pending_id = amount * (pick % 2), self.holds[-1 - pick % min(len(self.holds), 4)]
                row.debit_id = row.credit_id = bytes(16)
        elif shape == "send":
            row.flags, row.credit_shard = 0, 1 - shard
            row.credit_id = self.account(1 - shard, spec[3])
        elif shape == "balancing debit":
            row.flags |= F.BALANCING_DEBIT
            row.amount = amount * (pick % 2)
        elif shape == "balancing credit":
            row.flags |= F.BALANCING_CREDIT | (F.HOLD if pick % 2 else 0)
        elif shape == "other":
            row.id = before.id
        elif shape == "odd id":
            odd = [bytes(16), b"\xff" * 16] + [transfer_id(self.ids, self.now // MS + ms) for ms in ID_OFFSETS_MS]
            row.id = odd[pick % len(odd)]
        elif shape == "wild flags":
            row.flags = WILD_FLAGS[pick % len(WILD_FLAGS)]
        elif shape == "wild amount":
            row.amount = WILD_AMOUNTS[pick % len(WILD_AMOUNTS)]
        elif shape == "wild":
            row.debit_id, row.credit_id = self.account(shard, debit), self.account(shard, credit)
            row.credit_shard = [SHARD_LOCAL, SHARD_LOCAL, shard, 300][pick % 4]
            row.timeout_s = timeout
            row.pending_id = before.id if pick % 3 == 0 else bytes(16)
        return row

    def transfers(
        self, shard: int, specs: Sequence[tuple[Any, ...]], step: int, gather: bool, closed: bool, chain_steps: bool
    ) -> None:
        self.now += step
        rows = [self.row(shard, spec) for spec in specs]
        order = list(range(len(rows)))[::-2] if gather else list(range(len(rows)))
        if closed:
            last = rows[order[-1]]
            rows[order[-1]] = replace(last, flags=last.flags & ~F.LINKED)
        results = self.pairs[shard].transfers(rows, self.now, order if gather else None, chain_steps=chain_steps)
        self.holds += [rows[i].id for i in order if rows[i].flags & F.HOLD and results[i] == TransferResult.OK]

    def accounts(self, shard: int, specs: Sequence[tuple[Any, ...]], update: bool) -> None:
        rows = [AccountRow(self.account(shard, number), *rest) for number, *rest in specs]
        if update:
            self.pairs[shard].update(rows, self.now)
        else:
            self.pairs[shard].open(rows, self.now)

    def expire(self, shard: int, step: int) -> None:
        self.now += step
        self.pairs[shard].expire(self.now)

    def relay_credits(self, source: int, start: int, limit: int) -> None:
        a, b = self.pairs[source], self.pairs[1 - source]
        settled, last = a.engine.sent(b.shard)
        first = max(settled + 1, b.engine.cursor(a.shard) + 1 + start)
        sends = a.engine.sends(b.shard, first, limit)
        if sends:
            rows = [(s.id, s.credit_id, s.amount, s.currency.encode() + b"\0", s.code) for s in sends]
            b.credits(a.shard, first, rows, self.now)
        else:
            b.credits(a.shard, last + 5, [(transfer_id(0), account_id(0), 1, b"USD\0", 0)], self.now)

    def relay_outcomes(self, source: int, back: int, lie: bool) -> None:
        a, b = self.pairs[source], self.pairs[1 - source]
        settled, last = a.engine.sent(b.shard)
        upto = max(b.engine.cursor(a.shard) - back, 0)
        refused = [pair for pair in b.engine.refusals(a.shard, settled, 100) if pair[0] <= upto]
        if lie:
            assert a.outcomes(b.shard, last + 1, refused, self.now) is None
        assert a.outcomes(b.shard, upto, refused, self.now) is not None

    def begin_image(self, shard: int) -> None:
        if shard not in self.images:
            pair = self.pairs[shard]
            pair.engine.image_begin()
            results = {row.id: pair.engine.result(row.id) for row in self.used}
            self.images[shard] = (pair.engine.state_digest(), len(pair.frames), [], results)

    def read_image(self, shard: int, pieces: int) -> None:
        if shard in self.images:
            read = (self.pairs[shard].engine.image_piece() for _ in range(pieces))
            self.images[shard][2].extend(piece for piece in read if piece)

    def end_image(self, shard: int) -> None:
        if shard in self.images:
            self.finish_image(shard)

    def finish_image(self, shard: int) -> None:
        """What was read beside the writer is the state at the image's beginning, and the log leads on from it."""
        pair = self.pairs[shard]
        digest, frame_count, pieces, results = self.images.pop(shard)
        while piece := pair.engine.image_piece():
            pieces.append(piece)
        pair.engine.image_end()
        loaded = load_pieces(pieces, shard)
        assert loaded.state_digest() == digest
        assert {id_: loaded.result(id_) for id_ in results} == results
        follow(loaded, pair.frames[frame_count:])
        assert loaded.state_digest() == pair.engine.state_digest()
        assert_same_state(loaded, pair.engine)

    def check(self) -> None:
        for pair in self.pairs:
            pair.check_agreement()
        self.check_money()

    def check_money(self) -> None:
        """Over all shards: balances + in flight = 0, and in flight is what was neither credited nor returned."""
        totals = [pair.engine.currency_totals() for pair in self.pairs]
        for currency in {name for total in totals for name in total}:
            in_flight = sum(total[currency].in_flight for total in totals if currency in total)
            assert in_flight + sum(total[currency].balance for total in totals if currency in total) == 0
            pending = 0
            for a, b in (self.pairs, self.pairs[::-1]):
                refused = {number for number, _ in b.engine.refusals(a.shard, 0, 10_000)}
                for send in a.engine.sends(b.shard, 0, 10_000):
                    if send.currency == currency and (send.number > b.engine.cursor(a.shard) or send.number in refused):
                        pending += send.amount
            assert in_flight == pending

    def finish(self) -> None:
        if not all(pair.agreed for pair in self.pairs):
            return
        for shard in list(self.images):
            self.finish_image(shard)
        for pair in self.pairs:
            pair.check_replay()
            pair.check_image()
            # an id that both still remember is answered alike after a replay
            replayed, _ = pair.fresh()
            follow(replayed, pair.frames)
            floor = max(replayed.status().floor_ms, pair.engine.status().floor_ms)
            for row in self.used:
                if int.from_bytes(row.id[:6], "big") > floor:
                    assert replayed.result(row.id) == pair.engine.result(row.id)


def follow(engine: Any, frames: list[Frame]) -> None:
    for frame in frames:
        engine.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
