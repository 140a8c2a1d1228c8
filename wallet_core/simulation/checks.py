"""What must hold after every seed, from a reference model of its own: the union of all logs, read record by
record.

Events are what was decided; the model does not decide again. It adds up what they say and demands that it
fits together: every transfer id has at most one effect, every hold ends at most once, every send is received
or refused exactly once, with the same id, account, amount and currency, every refusal is returned exactly
once, and balances and held amounts are those of the live engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import Struct
from typing import Any

from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import EventKind, TransferResult
from wallet_core.engine.twin import Twin
from wallet_core.service.chain_rules import MARKS, transit_account
from wallet_core.simulation.chains import check_cross_chains
from wallet_core.simulation.clients import CURRENCIES, IN_FLIGHT, LINKED, OK, Book, Clients
from wallet_core.simulation.shard import EVENT_BYTES, AppliedFrame, SimulatedShard
from wallet_core.simulation.world import Violation

__all__ = ["check_answers", "check_books", "check_chains", "check_repeats", "check_replay", "check_twin"]

K = EventKind
_MONEY = Struct("<16sqIIIHHIHBB")
_SENT = Struct("<16sqI16sHBB")
_ACCOUNT = Struct("<16sqqI4sHxxxxBB")
OPENED, UPDATED, MOVED, PLACED = int(K.ACCOUNT_OPENED), int(K.ACCOUNT_UPDATED), int(K.MONEY_MOVED), int(K.HOLD_PLACED)
POSTED, VOIDED, EXPIRED = int(K.HOLD_POSTED), int(K.HOLD_VOIDED), int(K.HOLD_EXPIRED)
REFUSED, SENT, RECEIVED = int(K.TRANSFER_REFUSED), int(K.MONEY_SENT), int(K.MONEY_RECEIVED)
CREDIT_REFUSED, SETTLED, RETURNED = int(K.CREDIT_REFUSED), int(K.SAGA_SETTLED), int(K.MONEY_RETURNED)


@dataclass(slots=True)
class _Send:
    id: bytes
    credit_id: bytes
    amount: int
    currency: bytes
    returned: int = 0  # the result that it came back with


@dataclass(slots=True)
class _Model:
    """One shard, as its events tell it."""

    shard: int
    accounts: list[tuple[bytes, bytes]] = field(default_factory=list)  # id, currency
    balances: list[int] = field(default_factory=list)
    held_out: list[int] = field(default_factory=list)
    held_in: list[int] = field(default_factory=list)
    in_flight: dict[bytes, int] = field(default_factory=dict)  # currency → ordinal
    effects: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # transfer id → kind, result or number
    destinations: dict[bytes, int] = field(default_factory=dict)
    holds: dict[int, tuple[int, int, int, bytes]] = field(default_factory=dict)  # sequence → debit, credit, amount, id
    ended: dict[bytes, int] = field(default_factory=dict)  # hold id → kind of the event that ended it
    sends: dict[int, list[_Send]] = field(default_factory=dict)  # destination → in order
    settled: dict[int, int] = field(default_factory=dict)
    received: dict[int, list[tuple[bytes, int, bytes, int]]] = field(default_factory=dict)
    # source → in order: id, amount, credit account, 0 or the refusal


def _broken(rule: str, model: _Model, sequence: int, what: str) -> Violation:
    return Violation(rule, f"shard {model.shard}, event {sequence}: {what}")


def _read(shard: int, frames: list[AppliedFrame]) -> _Model:
    m = _Model(shard)
    effects, balances, held_out, held_in = m.effects, m.balances, m.held_out, m.held_in
    for frame in frames:
        body = frame.body
        for at in range(0, len(body), EVENT_BYTES):
            sequence = frame.first_sequence + at // EVENT_BYTES
            kind = body[at + 46]
            if kind in (OPENED, UPDATED):
                id_, _, _, ordinal, currency, flags, _, _ = _ACCOUNT.unpack_from(body, at)
                if kind == OPENED:
                    if ordinal != len(balances):
                        raise _broken("double effect", m, sequence, f"account ordinal {ordinal} again")
                    m.accounts.append((id_, currency))
                    balances.append(0)
                    held_out.append(0)
                    held_in.append(0)
                    if flags & 16:
                        m.in_flight[currency] = ordinal
                continue
            if kind == SENT:
                id_, amount, debit, credit_id, _, _, destination = _SENT.unpack_from(body, at)
                if id_ in effects:
                    raise _broken("double effect", m, sequence, f"transfer {id_.hex()}")
                currency = m.accounts[debit][1]
                sends = m.sends.setdefault(destination, [])
                sends.append(_Send(id_, credit_id, amount, currency))
                effects[id_] = (kind, len(sends))
                m.destinations[id_] = destination
                balances[debit] -= amount
                balances[m.in_flight[currency]] += amount
                continue
            id_, amount, debit, credit, low, middle, _, result, _, _, other = _MONEY.unpack_from(body, at)
            number = low | middle << 32
            if kind <= REFUSED and kind != EXPIRED:
                if id_ in effects:
                    raise _broken("double effect", m, sequence, f"transfer {id_.hex()}")
                effects[id_] = (kind, number if kind == REFUSED else 0)
            if kind == MOVED:
                balances[debit] -= amount
                balances[credit] += amount
            elif kind == PLACED:
                m.holds[sequence] = (debit, credit, amount, id_)
                held_out[debit] += amount
                held_in[credit] += amount
            elif kind in (POSTED, VOIDED, EXPIRED):
                hold = m.holds.pop(number, None)
                if hold is None:
                    raise _broken("double effect", m, sequence, f"the hold of event {number} ends again")
                m.ended[hold[3]] = kind
                held_out[hold[0]] -= hold[2]
                held_in[hold[1]] -= hold[2]
                if kind == POSTED:
                    balances[hold[0]] -= amount
                    balances[hold[1]] += amount
            elif kind in (RECEIVED, CREDIT_REFUSED):
                received = m.received.setdefault(other, [])
                if number != len(received) + 1:
                    raise _broken(
                        "double effect", m, sequence, f"send {number} of shard {other} follows on {len(received)}"
                    )
                if kind == RECEIVED:
                    received.append((id_, amount, m.accounts[credit][0], 0))
                    balances[debit] -= amount
                    balances[credit] += amount
                else:
                    received.append((id_, amount, b"", result))
            elif kind == RETURNED:
                send = m.sends[other][number - 1]
                if send.returned:
                    raise _broken("double effect", m, sequence, f"send {number} to shard {other} returns again")
                send.returned = result
                balances[debit] -= amount
                balances[credit] += amount
            elif kind == SETTLED:
                m.settled[other] = number
    return m


def check_books(shards: list[SimulatedShard]) -> list[_Model]:
    """Conservation, no double effect, sagas complete, balances of the live engines."""
    models = [_read(shard.shard, shard.frames) for shard in shards]
    totals: dict[bytes, int] = {}
    for model, shard in zip(models, shards, strict=True):
        engine = shard.engine
        for ordinal, (id_, currency) in enumerate(model.accounts):
            view = engine.account_by_ordinal(ordinal)
            assert view is not None
            expected = (id_, model.balances[ordinal], model.held_out[ordinal], model.held_in[ordinal])
            found = (view.id, view.balance, view.held_out, view.held_in)
            if found != expected:
                raise Violation(
                    "balance", f"shard {shard.shard} account {id_.hex()}: {found[1:]}, its events give {expected[1:]}"
                )
            totals[currency] = totals.get(currency, 0) + view.balance
        counters = engine.status()
        if counters.account_count != len(model.accounts) or counters.hold_count != len(model.holds):
            raise Violation("balance", f"shard {shard.shard}: accounts or holds without an event")
    for currency, total in totals.items():
        if total:
            raise Violation("conservation", f"all balances and money in flight of {currency[:3].decode()}: {total}")
    for model in models:
        for ordinal in model.in_flight.values():
            totals[model.accounts[ordinal][1]] += model.balances[ordinal]
    for currency, total in totals.items():
        if total:
            raise Violation("conservation", f"{total} {currency[:3].decode()} still in flight after everything settled")
    _check_sagas(models)
    _check_between(models)
    return models


def _check_between(models: list[_Model]) -> None:
    """Chains: what left one shard has arrived on another, and nothing is held for one any more."""
    for currency in CURRENCIES:
        transit = transit_account(currency[:3].decode())
        total = 0
        for model in models:
            for ordinal, (id_, _) in enumerate(model.accounts):
                if id_ == transit:
                    total += model.balances[ordinal]
                if id_ in (transit, MARKS) and (model.held_out[ordinal] or model.held_in[ordinal]):
                    raise Violation("a chain did not end", f"shard {model.shard}: money is held on {id_.hex()}")
        if total:
            raise Violation("conservation", f"{total} {currency[:3].decode()} left between the shards of chains")


def _check_sagas(models: list[_Model]) -> None:
    for source in models:
        for destination, sends in source.sends.items():
            link = f"from shard {source.shard} to {destination}"
            received = models[destination].received.get(source.shard, [])
            if len(received) != len(sends) or source.settled.get(destination, 0) != len(sends):
                raise Violation(
                    "a saga did not end",
                    f"{link}: {len(sends)} sent, {len(received)} received, {source.settled.get(destination, 0)} settled",
                )
            for number, (send, (id_, amount, credit_id, refused)) in enumerate(zip(sends, received, strict=True), 1):
                if id_ != send.id or amount != send.amount or (not refused and credit_id != send.credit_id):
                    raise Violation("a saga changed on its way", f"{link}, number {number}")
                if send.returned != refused:
                    raise Violation(
                        "compensation",
                        f"{link}, number {number}: refused with {refused}, returned with {send.returned}",
                    )
    for destination_model in models:
        for source_shard, received in destination_model.received.items():
            if len(received) > len(models[source_shard].sends.get(destination_model.shard, [])):
                raise Violation("money from nowhere", f"shard {destination_model.shard} received more than was sent")


def check_answers(book: Book, models: list[_Model]) -> None:
    """Every answer that a client got is in the logs: acknowledged ⊆ recovered."""
    for (shard, row), answer in book.answers.items():
        model = models[shard]
        kind, fact = model.effects.get(row[0], (0, 0))
        if kind == SENT:
            returned = model.sends[model.destinations[row[0]]][fact - 1].returned
            truth = returned or OK
            right = answer in (truth, IN_FLIGHT)
        elif kind == REFUSED:
            right = answer == fact
        else:
            right = kind != 0 and answer == OK
        if not right:
            raise Violation(
                "lost acknowledgement",
                f"transfer {row[0].hex()} on shard {shard} was answered {TransferResult(answer).name}, "
                f"the log has {K(kind).name if kind else 'nothing'} {fact}",
            )


def check_chains(clients: Clients, models: list[_Model]) -> None:
    """Linked transfers: all or none."""
    check_cross_chains(clients.coordinators.chains, [model.ended for model in models], POSTED)
    for request in clients.requests:
        chain: list[int] = []
        for (_, row), result in zip(request.keys, request.final, strict=True):
            chain.append(result)
            if not row[4] & LINKED:
                if OK in chain and set(chain) != {OK}:
                    raise Violation("half a chain", f"shard {request.shard}, {row[0].hex()}: {chain}")
                chain = []


def check_replay(shards: list[SimulatedShard]) -> None:
    """The whole history in a fresh engine: same digest, same counts, same answers."""
    for shard in shards:
        fresh = shard.new_engine()
        for frame in shard.frames:
            try:
                fresh.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
            except Exception as error:
                raise Violation("replay", f"shard {shard.shard}: {error}") from error
            if fresh.state_digest() != frame.digest:
                raise Violation("replay differs", f"shard {shard.shard} at event {frame.first_sequence}")
        _same(shard, shard.engine, fresh, "replay differs")


def _same(shard: SimulatedShard, live: Engine, other: Engine | Twin, rule: str) -> None:
    if live.state_digest() != other.state_digest():
        raise Violation(rule, f"shard {shard.shard}: the digests at the end")
    here, there = live.status(), other.status()
    for name in ("sequence", "account_count", "hold_count", "unsettled_count"):
        if getattr(here, name) != getattr(there, name):
            raise Violation(rule, f"shard {shard.shard}: {name} {getattr(here, name)} and {getattr(there, name)}")
    for peer in range(len(shard.shards)):
        if peer != shard.shard and (live.sent(peer), live.cursor(peer)) != (other.sent(peer), other.cursor(peer)):
            raise Violation(rule, f"shard {shard.shard}: cursors with shard {peer}")


def check_twin(shards: list[SimulatedShard]) -> None:
    """The same history in the Python twin: same digest after every frame, same accounts."""
    for shard in shards:
        config = shard.config
        twin = Twin(
            shard.shard,
            id_window_ms=config.id_window_ms,
            id_count_max=config.id_count_max,
            generation_ids=config.generation_ids,
        )
        for frame in shard.frames:
            try:
                twin.replay_frame(frame.body, frame.first_sequence, frame.timestamp_ns)
            except Exception as error:
                raise Violation("twin", f"shard {shard.shard}: {error}") from error
            if twin.state_digest() != frame.digest:
                raise Violation("twin differs", f"shard {shard.shard} at event {frame.first_sequence}")
        _same(shard, shard.engine, twin, "twin differs")
        for ordinal in range(len(twin.state.accounts)):
            if twin.account_by_ordinal(ordinal) != shard.engine.account_by_ordinal(ordinal):
                raise Violation("twin differs", f"shard {shard.shard}, account {ordinal}")


def check_repeats(clients: Clients, shards: list[SimulatedShard]) -> int:
    """Every answered batch once more, on the recovered engines: the same answers, no new event of a row
    that has its answer. Returns the number of rows."""
    count = 0
    for request in clients.requests:
        transfers: Any = shards[request.shard].engine.transfers
        results, _ = transfers(*request.columns, shards[request.shard].now_ns, **request.options)
        count += len(results)
        for key, result in zip(request.keys, results, strict=True):
            clients.book.take(key, result, direct=True)
    return count
