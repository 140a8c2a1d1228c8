"""Clients: random work of every kind, repeated after lost answers, with every answer kept and compared."""

from __future__ import annotations

import struct
from typing import Any, Final

from wallet_core.engine.codes import AMOUNT_MAX, SHARD_LOCAL, AccountFlags, TransferFlags, TransferResult
from wallet_core.service import chain_rules
from wallet_core.service.port import TransferRow
from wallet_core.shard.port import SLOT_COUNT
from wallet_core.simulation.chains import Chain, Coordinators
from wallet_core.simulation.network import CLIENTS, Network
from wallet_core.simulation.shard import DISK_FULL, Request, SimulatedShard
from wallet_core.simulation.world import Violation, World

__all__ = ["Book", "Clients", "row_columns"]

F, R, A = TransferFlags, TransferResult, AccountFlags
ZERO_ID: Final = bytes(16)
LINKED, HOLD, POST, VOID = int(F.LINKED), int(F.HOLD), int(F.POST), int(F.VOID)
OK, IN_FLIGHT, TOO_OLD, REUSED = int(R.OK), int(R.IN_FLIGHT), int(R.ID_TOO_OLD), int(R.ID_REUSED)
#: Results that the engine remembers with the id.
REMEMBERED: Final = frozenset({OK, IN_FLIGHT, *range(R.HOLD_NOT_FOUND, R.LINKED_FAILED + 1)})
CURRENCIES: Final = (b"USD\0", b"EUR\0")
THINK_NS = (20_000, 500_000)
PATIENCE_NS = (3_000_000, 12_000_000)
MEDDLE_NS = 3_000_000
ATTEMPTS_KEPT = 64

Row = tuple[bytes, bytes, bytes, int, int, bytes, int, int, int]
# id, debit id, credit id, amount, flags, pending id, timeout s, code, credit shard


def row_columns(rows: list[Row]) -> tuple[tuple[bytes, ...], dict[str, bytes]]:
    """Rows as the columns of `Engine.transfers`: (ids, debit ids, credit ids, amounts), the others by name."""
    count = len(rows)
    ids, debits, credits_, amounts, flags, pending, timeouts, codes, shards = zip(*rows, strict=True)
    return (
        (b"".join(ids), b"".join(debits), b"".join(credits_), struct.pack(f"<{count}q", *amounts)),
        {
            "flags": struct.pack(f"<{count}H", *flags),
            "pending_ids": b"".join(pending),
            "timeouts_s": struct.pack(f"<{count}I", *timeouts),
            "codes": struct.pack(f"<{count}H", *codes),
            "credit_shards": struct.pack(f"<{count}H", *shards),
        },
    )


class Book:
    """Every answer that a client has had. The same id with the same content is answered the same for ever:
    only in flight becomes something else, once, and an id may become too old."""

    def __init__(self) -> None:
        self.answers: dict[tuple[Any, ...], int] = {}  # (shard, row) → remembered result
        self.owner: dict[tuple[int, bytes], tuple[Any, ...]] = {}  # (shard, id) → the row that has it

    def take(self, key: tuple[Any, ...], result: int, *, direct: bool = False) -> None:
        """One more answer for a row. Only `direct` answers come for sure in the order they were given: by
        the network an old "in flight" may come late."""
        before = self.answers.get(key)
        if result in REMEMBERED:
            if before is None or (before == IN_FLIGHT and result != before):
                owner = self.owner.setdefault((key[0], key[1][0]), key)
                if owner != key:
                    raise Violation(
                        "one id, two contents",
                        f"{key[1][0].hex()} is {owner[1][1:]} and {key[1][1:]} on shard {key[0]}",
                    )
                self.answers[key] = result
                return
            if before == result or (result == IN_FLIGHT and key[1][8] != SHARD_LOCAL and not direct):
                return
        elif result == TOO_OLD or before is None:
            return
        raise Violation(
            "a repeated id is answered differently",
            f"transfer {key[1][0].hex()} on shard {key[0]}: first {R(before).name}, then {R(result).name}",
        )


class Clients:
    """The clients of one simulation: each has one request under way and thinks between two."""

    def __init__(self, world: World, network: Network, shards: list[SimulatedShard]) -> None:
        self.world, self.network, self.shards = world, network, shards
        self.book = Book()
        self.heavy = world.chance() < world.options.heavy_share  # large batches, so that segments fill
        self.open = 0  # requests that have no answer yet
        self.requests: list[Request] = []  # answered transfers, to repeat
        self.striped = {currency: self._account_id(0) for currency in CURRENCIES}
        self.plain: dict[bytes, list[list[bytes]]] = {}  # currency → shard → account ids
        self.of_currency: dict[bytes, set[bytes]] = {}
        self.holds: list[tuple[int, Row]] = []
        self.sends: list[Request] = []  # in flight when last heard of
        self.reads: dict[int, int] = {}  # shard → the highest sequence number read
        self.rows: list[tuple[int, Row]] = []
        self.coordinators = Coordinators(world, network, shards)
        self.coordinators.told = self._chain_told
        self.opened: set[int] = set()  # shards whose accounts are there for sure
        for shard in shards:
            shard.answer = self.answered
            self._open_accounts(shard.shard)
        for client in range(world.options.clients):
            world.after(world.between(*THINK_NS), self._act, client)

    # ---- ids ----

    def _account_id(self, shard: int) -> bytes:
        count = len(self.shards)
        low = -(-shard * SLOT_COUNT // count)
        high = -(-(shard + 1) * SLOT_COUNT // count)
        slot = self.world.random.randrange(low, high)
        return self.world.random.randbytes(14) + slot.to_bytes(2, "big")

    def _transfer_id(self, ahead_ms: int = 0) -> bytes:
        time_ms = self.world.now_ns // 1_000_000 + ahead_ms
        bits = self.world.random.getrandbits(74)
        return (time_ms << 80 | 7 << 76 | (bits >> 62) << 64 | 2 << 62 | bits & (1 << 62) - 1).to_bytes(16, "big")

    # ---- requests ----

    def _send(self, request: Request) -> None:
        request.attempts += 1
        shard = self.shards[request.shard]
        if request.attempts > 1:
            self.world.counts["request repeated"] += 1
        self.network.send(CLIENTS, request.shard, shard.receive, request)
        if not request.answered:
            self.world.after(self.world.between(*PATIENCE_NS), self._patience, request)

    def _patience(self, request: Request) -> None:
        if not request.answered:
            self._send(request)

    def _begin(self, request: Request, client: int) -> None:
        request.client = client
        self.open += 1
        self._send(request)

    def answered(self, request: Request, result: Any) -> None:
        """From the network: an answer, perhaps a second one."""
        if result is DISK_FULL:
            return  # patience sends it again
        if request.call == "transfers":
            self._take_transfers(request, result)
        elif request.call == "account":
            sequence, _ = result
            self.reads[request.shard] = max(self.reads.get(request.shard, 0), sequence)
        elif request.call == "open_accounts":
            if any(code not in (1, 3) for code in result):
                # 3 (other content): somebody has changed the account since
                raise Violation("accounts cannot be opened", f"{result.hex()} on {request.shard}")
            self.opened.add(request.shard)
        if not request.answered:
            request.answered = True
            self.open -= 1
            if request.client >= 0:
                self.world.after(self.world.between(*THINK_NS), self._act, request.client)

    def _take_transfers(self, request: Request, results: bytes) -> None:
        take = self.book.take
        for key, result in zip(request.keys, results, strict=True):
            take(key, result)
        if request.answered:
            return
        request.final = results
        self.requests.append(request)
        if request.crosses and IN_FLIGHT in results:
            self.sends.append(request)
        for key, result in zip(request.keys, results, strict=True):
            row = key[1]
            if result == OK and row[4] & HOLD:
                self.holds.append((request.shard, row))

    # ---- what clients do ----

    def _act(self, client: int) -> None:
        world = self.world
        if not world.faulty:
            return
        dice = world.chance()
        if dice < 0.15 and len(self.opened) == len(self.shards) > 1:
            self._begin_chain(client)
        elif dice < 0.80:
            self._begin(self._batch(), client)
        elif dice < 0.87 and self.requests:
            self._repeat(client)
        elif dice < 0.91 and self.sends:
            request = self.sends.pop(world.random.randrange(len(self.sends)))
            self._send(request)
            world.after(world.between(*THINK_NS), self._act, client)
        elif dice < 0.96:
            shard = world.random.randrange(len(self.shards))
            self._begin(Request(shard, "account", (self._some(shard),)), client)
        else:
            self._begin(self._update(), client)

    def _begin_chain(self, client: int) -> None:
        """Plain transfers over several shards, all or none; sometimes an old one again."""
        if self.world.chance() < 0.15:
            self.coordinators.repeat()
            self.world.after(self.world.between(*THINK_NS), self._act, client)
            return
        random, chance = self.world.random, self.world.chance
        rows, routes, currencies = [], [], []
        length = random.randrange(2, 5)
        shard = random.randrange(len(self.shards))
        for at in range(length):
            row = self._local(shard) if chance() < 0.25 else self._cross(shard)
            linked = LINKED if at < length - 1 else 0
            rows.append(TransferRow(*row[:3], 1 + row[3] // 8, linked, ZERO_ID, 0, row[7]))
            routes.append((shard, shard if row[8] == SHARD_LOCAL else row[8]))
            currencies.append(next(name[:3].decode() for name in CURRENCIES if row[1] in self.of_currency[name]))
            shard = random.randrange(len(self.shards))
        if chain_rules.refused_at_once(rows) is not None:
            self.world.after(self.world.between(*THINK_NS), self._act, client)
            return
        rules = self.shards[routes[0][0]].chain_rules
        self.coordinators.begin(Chain(rows, routes, rules.plan(rows, routes, currencies, len(self.shards)), client))
        for _ in range(random.choice((0, 0, 1, 2))):
            self.world.after(self.world.between(0, MEDDLE_NS), self._meddle)

    def _chain_told(self, chain: Chain) -> None:
        self.world.after(self.world.between(*THINK_NS), self._act, chain.client)

    def thaw(self) -> None:
        """Every account takes part again, so that chains which wait for a frozen one can end."""
        for shard in range(len(self.shards)):
            ids = [one for own in self.plain.values() for one in own[shard]]
            request = Request(shard, "update_accounts", (b"".join(ids),))
            request.options = {
                "flags": bytes(2 * len(ids)),
                "overdraft_limits": bytes(8 * len(ids)),
                "balance_limits": bytes(8 * len(ids)),
            }
            self._begin(request, -1)

    def _repeat(self, client: int) -> None:
        """An old request again: the same answer must come, and nothing must happen."""
        recent = self.requests[-ATTEMPTS_KEPT:]
        self._send(recent[self.world.random.randrange(len(recent))])
        self.world.after(self.world.between(*THINK_NS), self._act, client)

    def _open_accounts(self, shard: int) -> None:
        random = self.world.random
        ids, currencies, flags, overdrafts, limits = [], [], [], [], []
        for currency in CURRENCIES:
            own: list[bytes] = []
            for _ in range(random.randrange(2, 5)):
                own.append(self._account_id(shard))
                ids.append(own[-1])
                currencies.append(currency)
                flags.append(0)
                overdrafts.append(random.choice((0, 0, 500, 100_000)))
                limits.append(random.choice((0, 0, 0, 3_000)))
            ids.append(self.striped[currency])
            currencies.append(currency)
            flags.append(int(A.STRIPED | A.MAY_OVERDRAW))
            overdrafts.append(0)
            limits.append(0)
            self.plain.setdefault(currency, [[] for _ in self.shards])[shard] = own
            self.of_currency.setdefault(currency, {self.striped[currency]}).update(own)
        for currency in CURRENCIES:
            for account in chain_rules.accounts_of(currency[:3].decode()):
                if account.id not in ids:
                    ids.append(account.id)
                    currencies.append(account.currency.encode() + b"\0")
                    flags.append(account.flags)
                    overdrafts.append(0)
                    limits.append(0)
        count = len(ids)
        request = Request(shard, "open_accounts", (b"".join(ids), b"".join(currencies)))
        request.options = {
            "flags": struct.pack(f"<{count}H", *flags),
            "overdraft_limits": struct.pack(f"<{count}q", *overdrafts),
            "balance_limits": struct.pack(f"<{count}q", *limits),
        }
        self._begin(request, -1)

    def _update(self) -> Request:
        random = self.world.random
        shard = random.randrange(len(self.shards))
        flags = random.choice((0, 0, 0, 0, int(A.FROZEN), int(A.CLOSED), int(A.MAY_OVERDRAW)))
        overdraft, limit = random.choice((0, 500, 100_000)), random.choice((0, 0, 0, 3_000))
        request = Request(shard, "update_accounts", (self._some(shard),))
        request.options = {
            "flags": struct.pack("<H", flags),
            "overdraft_limits": struct.pack("<q", overdraft),
            "balance_limits": struct.pack("<q", limit),
        }
        return request

    def _some(self, shard: int) -> bytes:
        own = self.plain[CURRENCIES[self.world.random.random() < 0.3]][shard]
        return own[self.world.random.randrange(len(own))]

    def _batch(self) -> Request:
        world = self.world
        random, chance = world.random, world.chance
        shard = random.randrange(len(self.shards))
        if self.heavy and chance() < 0.5:
            return self._bulk(shard)
        count = 1 + int(chance() * chance() * 8)
        rows: list[Row] = []
        while len(rows) < count:
            if chance() < 0.05:
                rows.extend(self._chain(shard))
            else:
                rows.append(self._row(shard))
        return self._request(shard, rows)

    def _bulk(self, shard: int) -> Request:
        """Many plain transfers into one account: long writes, full segments."""
        row = self._local(shard)
        first = int.from_bytes(self._transfer_id(), "big") & ~0xFFFF
        count = self.world.random.randrange(300, 700)
        own = self.plain[CURRENCIES[0]][shard]
        accounts = (self.striped[CURRENCIES[0]], own[self.world.random.randrange(len(own))])
        rows = [
            ((first + i).to_bytes(16, "big"), *accounts, 1, 0, ZERO_ID, 0, row[7], SHARD_LOCAL) for i in range(count)
        ]
        return self._request(shard, rows)

    def _request(self, shard: int, rows: list[Row]) -> Request:
        columns, options = row_columns(rows)
        crosses = any(row[8] != SHARD_LOCAL for row in rows)
        return Request(shard, "transfers", columns, options, [(shard, row) for row in rows], crosses=crosses)

    def _chain(self, shard: int) -> list[Row]:
        rows = []
        length = self.world.random.randrange(2, 5)
        for at in range(length):
            row = self._local(shard)
            flags = row[4] | LINKED if at < length - 1 else row[4]
            rows.append((*row[:4], flags, *row[5:]))
        return rows

    def _row(self, shard: int) -> Row:
        chance = self.world.chance
        dice = chance()
        if dice < 0.34 and len(self.shards) > 1:
            row = self._cross(shard)
        elif dice < 0.72:
            row = self._local(shard)
        elif dice < 0.84:
            row = self._hold(shard)
        elif dice < 0.93 and self.holds:
            return self._finish(shard)
        elif dice < 0.96 and self.rows:
            return self._collide(shard)
        else:
            row = self._odd(shard)
        if chance() < 0.25:
            self.rows.append((shard, row))
        return row

    def _amount(self) -> int:
        return 1 + int(self.world.chance() * self.world.chance() * 900)

    def _local(self, shard: int) -> Row:
        random, chance = self.world.random, self.world.chance
        currency = CURRENCIES[chance() < 0.3]
        own = self.plain[currency][shard]
        debit, credit = own[random.randrange(len(own))], own[random.randrange(len(own))]
        dice = chance()
        if dice < 0.45:
            debit = self.striped[currency]
        elif dice < 0.6:
            credit = self.striped[currency]
        if debit == credit:
            credit = self.striped[currency]
        flags = 0
        if chance() < 0.06:
            flags = random.choice((int(F.BALANCING_DEBIT), int(F.BALANCING_CREDIT), 48))
        return (
            self._transfer_id(),
            debit,
            credit,
            self._amount(),
            flags,
            ZERO_ID,
            0,
            random.getrandbits(4),
            SHARD_LOCAL,
        )

    def _cross(self, shard: int) -> Row:
        random, chance = self.world.random, self.world.chance
        currency = CURRENCIES[chance() < 0.3]
        other = random.randrange(len(self.shards) - 1)
        other += other >= shard
        debits = self.plain[currency][shard]
        credits_ = self.plain[currency if chance() < 0.95 else CURRENCIES[chance() < 0.5]][other]
        credit = credits_[random.randrange(len(credits_))] if chance() < 0.95 else self._account_id(other)
        return (
            *(self._transfer_id(), debits[random.randrange(len(debits))], credit, self._amount()),
            *(0, ZERO_ID, 0, random.getrandbits(4), other),
        )

    def _hold(self, shard: int) -> Row:
        row = self._local(shard)
        timeout_s = self.world.random.choice((0, 0, 1, 2, 30))
        return (*row[:4], HOLD | row[4], ZERO_ID, timeout_s, *row[7:])

    def _finish(self, shard: int) -> Row:
        random, chance = self.world.random, self.world.chance
        known = [one for one in self.holds[-12:] if one[0] == shard]
        if not known:
            return self._local(shard)
        _, hold = known[random.randrange(len(known))]
        accounts = (hold[1], hold[2]) if chance() < 0.5 else (ZERO_ID, ZERO_ID)
        post = chance() < 0.65
        amount = 0 if chance() < 0.5 or not post else max(1, int(hold[3] * 1.1 * chance()))
        return (self._transfer_id(), *accounts, amount, POST if post else VOID, hold[0], 0, 0, SHARD_LOCAL)

    def _meddle(self) -> None:
        """Against a chain across shards that was begun lately, by somebody who knows all its ids: what it holds is posted or voided
        by hand, with the flag of chains or without, or one of its ids is used for something else."""
        random, chance = self.world.random, self.world.chance
        plan = random.choice(self.coordinators.chains[-3:]).plan
        mark = random.choice(plan.marks)
        shard, held = mark.shard, [*mark.holds, (mark.id, chain_rules.MARKS, chain_rules.MARKED)]
        if shard == plan.home:
            held += [(plan.decision.id, chain_rules.MARKS, chain_rules.MARKED)] * 2
        id_, *accounts = random.choice(held)
        row: Row = (id_, *self._local(shard)[1:])
        if chance() < 0.6:
            debit, credit = accounts if chance() < 0.5 else (ZERO_ID, ZERO_ID)
            flags = random.choice((POST, VOID)) | (int(F.CHAIN) if chance() < 0.25 else 0)
            row = (self._transfer_id(), debit, credit, 0, flags, id_, 0, 0, SHARD_LOCAL)
        self.world.counts["row against a chain"] += 1
        self._begin(self._request(shard, [row]), -1)

    def _collide(self, shard: int) -> Row:
        """An id that was used, with other content."""
        known = [row for home, row in self.rows[-24:] if home == shard]
        if not known:
            return self._local(shard)
        row = known[self.world.random.randrange(len(known))]
        return (*row[:3], row[3] + 1, *row[4:])

    def _odd(self, shard: int) -> Row:
        """Rows that a guard must catch."""
        row = self._local(shard)
        choice = self.world.random.randrange(7)
        if choice == 0:
            return (self.world.random.randbytes(16), *row[1:])
        if choice == 1:
            return (self._transfer_id(600_000), *row[1:])
        if choice == 2:
            return (self._transfer_id(-300_000), *row[1:])
        if choice == 3:
            return (*row[:3], -row[3] if row[3] % 2 else 0, *row[4:])
        if choice == 4:
            return (row[0], self._account_id(shard), *row[2:])
        if choice == 5:
            return (*row[:3], ((1 << 63) if row[3] % 3 == 0 else AMOUNT_MAX) - row[3], *row[4:])
        return (*row[:4], HOLD | POST, *row[5:])


assert not {REUSED, TOO_OLD} & REMEMBERED
