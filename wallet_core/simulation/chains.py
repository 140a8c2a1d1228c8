"""Chains across shards in the simulation: the real rules (`wallet_core.service.chain_rules`), with coordinators that die with their
shard, steps that travel over the network, and a look for what was left.

A coordinator lives on the shard of the chain's first row. What it knows is gone when that shard crashes; nothing but the
logs survives, as in production.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from wallet_core.engine.codes import SHARD_LOCAL, TransferResult
from wallet_core.service import chain_rules
from wallet_core.service.chain_rules import Ask, ChainMark, End, Plan
from wallet_core.service.port import TransferRow
from wallet_core.simulation.network import CLIENTS, Network
from wallet_core.simulation.shard import DISK_FULL, Request, SimulatedShard
from wallet_core.simulation.world import Violation, World

__all__ = ["Chain", "Coordinators", "check_cross_chains"]

R = TransferResult
PATIENCE_NS = (2_000_000, 6_000_000)
ATTEMPTS_MAX = 3
CLIENT_PATIENCE_NS = (15_000_000, 40_000_000)
LOOK_NS = (6_000_000, 20_000_000)
GRACE_NS = 25_000_000
REMEMBERED = frozenset({*range(R.HOLD_NOT_FOUND, R.LINKED_FAILED + 1)})


@dataclass(slots=True, eq=False)
class Chain:
    """What a client sent, and what it was told."""

    rows: list[TransferRow]
    routes: list[tuple[int, int]]
    plan: Plan
    client: int = -1
    codes: bytes = b""  # the last answer
    applied: bool = False  # somebody was told so
    refused: bool = False
    done: bool = False


@dataclass(slots=True, eq=False)
class _Run:
    """One generator of steps on one life of one shard."""

    shard: int
    life: int
    steps: Generator[list[Ask], list[bytes | None], Any]
    then: Callable[[Any], None]
    answers: list[bytes | None] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)
    round: int = 0


class Coordinators:
    """Those of all shards."""

    def __init__(self, world: World, network: Network, shards: list[SimulatedShard]) -> None:
        self.world, self.network, self.shards = world, network, shards
        self.chains: list[Chain] = []
        self.open = 0
        self.told: Callable[[Chain], None] = lambda chain: None
        self._seen: list[dict[bytes, int]] = [{} for _ in shards]
        self._lives = [0 for _ in shards]
        for shard in shards:
            world.after(world.between(*LOOK_NS), self._look, shard.shard)

    # ---- clients

    def begin(self, chain: Chain) -> None:
        """A client sends a chain, and again until it has an answer."""
        self.chains.append(chain)
        self.open += 1
        self._send(chain)

    def _send(self, chain: Chain) -> None:
        self.network.send(CLIENTS, chain.plan.home, self._receive, chain)
        self.world.after(self.world.between(*CLIENT_PATIENCE_NS), self._again, chain)

    def _again(self, chain: Chain) -> None:
        if not chain.done:
            self.world.counts["chain repeated"] += 1
            self._send(chain)

    def repeat(self) -> None:
        """A client sends an old chain again."""
        if self.chains:
            chain = self.chains[self.world.random.randrange(len(self.chains))]
            self.network.send(CLIENTS, chain.plan.home, self._receive, chain)

    def _answered(self, chain: Chain, codes: bytes) -> None:
        if set(codes) == {R.OK}:
            chain.applied = True
        elif R.IN_FLIGHT not in codes and REMEMBERED.issuperset(codes):
            chain.refused = True
        if chain.applied and chain.refused:
            raise Violation("a repeated id is answered differently", f"chain {chain.rows[0].id.hex()}: {codes.hex()}")
        chain.codes = codes
        if R.IN_FLIGHT not in codes and not chain.done:
            chain.done = True
            self.open -= 1
            kind = "chain across shards applied" if chain.applied else "chain across shards refused"
            self.world.counts[kind] += 1
            self.told(chain)

    # ---- coordinators

    def _receive(self, chain: Chain) -> None:
        home = self.shards[chain.plan.home]
        if not home.up:
            self.world.fault("message to a dead shard")
            return
        life = home.life

        def end(found: End) -> None:
            self.network.send(home.shard, CLIENTS, self._answered, chain, found.codes)
            if found.committed and found.settled:
                steps = home.chain_rules.forget(chain.plan.decision.id, self._now(home))
                self._start(_Run(home.shard, life, steps, lambda _: None))

        steps = home.chain_rules.run(chain.plan, lambda: self._now(home))
        self._start(_Run(home.shard, life, steps, end))

    def _now(self, shard: SimulatedShard) -> int:
        return self.world.now_ns + shard.skew_ns

    def _start(self, run: _Run) -> None:
        self._next(run, None)

    def _next(self, run: _Run, answers: list[bytes | None] | None) -> None:
        try:
            run.asks = next(run.steps) if answers is None else run.steps.send(answers)
        except StopIteration as stop:
            run.then(stop.value)
            return
        run.round += 1
        run.answers = [None] * len(run.asks)
        run.waiting = set(range(len(run.asks)))
        for place in range(len(run.asks)):
            self._ask(run, run.round, place, 0)

    def _ask(self, run: _Run, round_: int, place: int, attempt: int) -> None:
        """Ask a shard, and again a few times; after that the answer is not known."""
        if self._is_gone(run) or run.round != round_ or place not in run.waiting:
            return
        if attempt == ATTEMPTS_MAX:
            self.world.counts["chain step without an answer"] += 1
            self._take(run, round_, place, None)
            return
        ask = run.asks[place]
        columns, options = _columns(ask.rows)
        request = Request(ask.shard, "transfers", columns, options)
        request.asker = run.shard

        def reply(_: Request, result: Any) -> None:
            if result is not DISK_FULL:
                self._take(run, round_, place, result)

        request.reply = reply
        self.network.send(run.shard, ask.shard, self.shards[ask.shard].receive, request)
        self.world.after(self.world.between(*PATIENCE_NS), self._ask, run, round_, place, attempt + 1)

    def _take(self, run: _Run, round_: int, place: int, answer: bytes | None) -> None:
        if self._is_gone(run) or run.round != round_ or place not in run.waiting:
            return
        run.waiting.discard(place)
        run.answers[place] = answer
        if not run.waiting:
            self._next(run, run.answers)

    def _is_gone(self, run: _Run) -> bool:
        shard = self.shards[run.shard]
        return not shard.up or shard.life != run.life

    # ---- chains that were left

    def _look(self, at: int) -> None:
        shard = self.shards[at]
        if shard.up:
            if self._lives[at] != shard.life:
                self._seen[at], self._lives[at] = {}, shard.life
            life = shard.life
            self._read_marks(at, at, lambda marks: self._end_old(at, life, marks))
        self.world.after(self.world.between(*LOOK_NS), self._look, at)

    def _read_marks(self, asker: int, at: int, then: Callable[[list[ChainMark]], None]) -> None:
        request = Request(at, "marks", ())
        request.asker, request.reply = asker, lambda _, marks: then(marks)
        self.network.send(asker, at, self.shards[at].receive, request)

    def _end_old(self, at: int, life: int, marks: list[ChainMark]) -> None:
        shard, now = self.shards[at], self.world.now_ns
        if not shard.up or shard.life != life:
            return
        seen = self._seen[at] = {mark.id: self._seen[at].get(mark.id, now) for mark in marks}
        old = [mark for mark in marks if now - seen[mark.id] >= GRACE_NS]
        for mark in old:
            if not mark.is_decision:
                steps = shard.chain_rules.settle(mark, len(self.shards), lambda: self._now(shard))
                self._start(_Run(at, life, steps, self._ended))
            else:
                self._forget_if_over(at, life, mark)

    def _ended(self, done: bool | None) -> None:
        if done:
            self.world.counts["chain ended by another"] += 1

    def _forget_if_over(self, at: int, life: int, decision: ChainMark) -> None:
        """Asks every shard for its marks; the decision goes once none has one of its chain."""
        shard, count = self.shards[at], len(self.shards)
        wanted = {chain_rules.mark_of(decision.id, one, count) for one in range(count)}
        answered: set[int] = set()

        def take(one: int, marks: list[ChainMark]) -> None:
            if wanted.isdisjoint(mark.id for mark in marks) and shard.up and shard.life == life and one not in answered:
                answered.add(one)
                if len(answered) == count:
                    self._start(_Run(at, life, shard.chain_rules.forget(decision.id, self._now(shard)), lambda _: None))

        for one in range(count):
            self._read_marks(at, one, lambda marks, one=one: take(one, marks))  # type: ignore[misc]

    # ---- the end

    def all_ended(self) -> bool:
        """Every client has its answer and no shard has anything left of a chain."""
        return self.open == 0 and not any(shard.up and shard.engine.holds(chain_rules.MARKS) for shard in self.shards)


def _columns(rows: Sequence[TransferRow]) -> tuple[tuple[bytes, ...], dict[str, Any]]:
    count = len(rows)
    ids, debits, credits_, amounts, flags, pending, timeouts, codes = zip(*rows, strict=True)
    return (
        (b"".join(ids), b"".join(debits), b"".join(credits_), struct.pack(f"<{count}q", *amounts)),
        {
            "flags": struct.pack(f"<{count}H", *flags),
            "pending_ids": b"".join(pending),
            "timeouts_s": struct.pack(f"<{count}I", *timeouts),
            "codes": struct.pack(f"<{count}H", *codes),
            "credit_shards": struct.pack(f"<{count}H", *[SHARD_LOCAL] * count),
            "chain_steps": True,
        },
    )


def check_cross_chains(chains: Sequence[Chain], ended: Sequence[dict[bytes, int]], posted: int) -> None:
    """All or none, and what clients were told. `ended`: of each shard, how each of its holds ended; `posted`: as it looks
    where the money moved."""
    for chain in chains:
        ends = [ended[mark.shard].get(id_) == posted for mark in chain.plan.marks for id_, _, _ in mark.holds]
        name = f"chain {chain.rows[0].id.hex()}"
        if any(ends) and not all(ends):
            raise Violation("half a chain", f"{name}: {sum(ends)} of {len(ends)} holds were posted")
        if chain.applied and not all(ends):
            raise Violation("lost acknowledgement", f"{name} was answered OK and did not happen")
        if chain.refused and any(ends):
            raise Violation("lost acknowledgement", f"{name} was answered {chain.codes.hex()} and happened")
