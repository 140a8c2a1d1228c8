"""Money that crosses shards: conserved at every moment, applied once, settled or returned, also over a restart."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from host_fixtures import NOW_NS, Driver, account, config, message, on_shard, transfer_id

from ducat.wallet.v1 import relay_pb2
from kernel.errors import InvalidArgument
from wallet_core.adapters.relay import Relay, RelayServicer, _Numbers, forget_numbers
from wallet_core.engine.codes import AccountFlags, TransferFlags, TransferResult
from wallet_core.event_log import LogPoisoned
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import HostClosed, ShardsMismatch, open_host

SHARDS = 4
SOURCE = account(1_000_000)
PEOPLE = [on_shard(shard, SHARDS, index) for shard in range(SHARDS) for index in range(5)]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    one = Driver(config(tmp_path, SHARDS))
    one.fund(PEOPLE, 10_000, SOURCE)
    yield one
    one.close()


def random_rows(count: int, seed: int, first: int = 0) -> list[TransferRow]:
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        debit, credit = rng.sample(PEOPLE, 2)
        rows.append(TransferRow(transfer_id(first + n), debit, credit, rng.randint(1, 20)))
    return rows


def expected(rows: list[TransferRow], codes: list[int]) -> list[int]:
    balances = dict.fromkeys(PEOPLE, 10_000)
    for row, code in zip(rows, codes, strict=True):
        if code == TransferResult.OK:
            balances[row[1]] -= row[3]
            balances[row[2]] += row[3]
    return [balances[one] for one in PEOPLE]


def settle(driver: Driver) -> None:
    """Until nothing is under way between the shards."""
    for _ in range(500):
        if sum(one.unsettled_count for one in driver.host.shards()) == 0 and all(
            one.queued_count == 0 for one in driver.host.shards()
        ):
            return
        driver.take(5)
    raise AssertionError("the sagas never settled")


def test_settled_batches_answer_with_the_final_result(driver: Driver) -> None:
    rows = random_rows(3000, 1)
    codes = driver.transfers(rows)
    assert set(codes) == {TransferResult.OK}
    assert driver.balances(PEOPLE) == expected(rows, codes)
    (usd,) = driver.host.totals()
    assert usd.balance + usd.in_flight == 0
    again = driver.wait(driver.submit(rows))
    assert (list(again.codes), again.replayed_count) == (codes, 3000)
    assert driver.balances(PEOPLE) == expected(rows, codes)


def test_durable_batches_answer_in_flight_and_settle_later(driver: Driver) -> None:
    row = TransferRow(transfer_id(1), on_shard(0, SHARDS), on_shard(3, SHARDS), 5)
    driver.host.log(3).hold_sync(True)
    assert driver.transfers([row], settled=False) == [TransferResult.IN_FLIGHT]
    waiting = driver.submit([row])  # the same id again, and this one wants to know how it ends
    driver.take(100)
    assert waiting not in driver.answers
    driver.host.log(3).hold_sync(False)
    assert list(driver.wait(waiting).codes) == [TransferResult.OK]
    assert driver.balances([row[1], row[2]]) == [9_995, 10_005]


def test_a_credit_never_runs_ahead_of_its_debits_disk(driver: Driver) -> None:
    row = TransferRow(transfer_id(1), on_shard(0, SHARDS), on_shard(3, SHARDS), 5)
    before = driver.host.durable_sequence(3)
    driver.host.log(0).hold_sync(True)
    ticket = driver.submit([row])
    driver.take(100)
    assert driver.host.shards()[3].sequence == before, "the credit was applied before the debit was durable"
    driver.host.log(0).hold_sync(False)
    assert list(driver.wait(ticket).codes) == [TransferResult.OK]


def test_a_refused_credit_returns_the_money(driver: Driver) -> None:
    debit, credit = on_shard(0, SHARDS), on_shard(2, SHARDS)
    frozen = AccountRow(credit, "USD", int(AccountFlags.FROZEN))
    assert driver.open_accounts([frozen], update=True) == [1]
    nobody = on_shard(1, SHARDS, 77)
    euros = on_shard(3, SHARDS, 78)
    assert driver.open_accounts([AccountRow(euros, "EUR")]) == [1]
    rows = [
        TransferRow(transfer_id(1), debit, credit, 5),
        TransferRow(transfer_id(2), debit, nobody, 6),
        TransferRow(transfer_id(3), debit, euros, 7),
        TransferRow(transfer_id(4), debit, on_shard(1, SHARDS), 8),
    ]
    codes = [
        TransferResult.CREDIT_ACCOUNT_FROZEN,
        TransferResult.CREDIT_ACCOUNT_NOT_FOUND,
        TransferResult.CURRENCY_MISMATCH,
        TransferResult.OK,
    ]
    assert driver.transfers(rows) == codes
    assert driver.balances([debit]) == [9_992]
    assert driver.transfers(rows) == codes  # remembered
    for total in driver.host.totals():
        assert (total.balance, total.in_flight) == (0, 0)


def test_sagas_go_on_after_a_restart(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, SHARDS))
    driver.fund(PEOPLE, 10_000, SOURCE)
    rows = random_rows(400, 2)
    for shard in range(SHARDS):
        driver.host.log(shard).inject("fdatasync", 3, errno.EIO)
    with pytest.raises((LogPoisoned, HostClosed)):  # noqa: PT012 - which batch dies depends on timing
        for at in range(0, 400, 20):
            driver.wait(driver.submit(rows[at : at + 20], settled=False))
    driver.close()
    again = Driver(config(tmp_path, SHARDS))
    settle(again)
    codes = again.transfers(rows)  # whatever was not recovered is applied now, the rest is answered from memory
    settle(again)
    assert set(codes) == {TransferResult.OK}
    assert again.balances(PEOPLE) == expected(rows, codes)
    (usd,) = again.host.totals()
    assert (usd.balance, usd.in_flight) == (0, 0)
    digests = again.digests()
    again.close()
    third = Driver(config(tmp_path, SHARDS))
    settle(third)
    assert third.digests() == digests
    third.close()


def test_striped_accounts_never_cross(driver: Driver) -> None:
    sent = driver.host.shards()
    rows = [TransferRow(transfer_id(n), SOURCE, one, 1) for n, one in enumerate(PEOPLE)]
    rows += [TransferRow(transfer_id(100 + n), one, SOURCE, 1) for n, one in enumerate(PEOPLE)]
    assert set(driver.transfers(rows)) == {1}
    after = driver.host.shards()
    assert [b.sequence - a.sequence for a, b in zip(sent, after, strict=True)] == [10] * SHARDS
    assert driver.balances([SOURCE]) == [-10_000 * len(PEOPLE)]


def test_a_hold_is_found_on_whatever_shard_it_lives(driver: Driver) -> None:
    holds = []
    for n, one in enumerate(PEOPLE):
        holds.append(TransferRow(transfer_id(n), one, SOURCE, 100, int(TransferFlags.HOLD)))
    assert set(driver.transfers(holds)) == {1}
    posts = [
        TransferRow(transfer_id(1000 + n), bytes(16), bytes(16), 40, int(TransferFlags.POST), hold.id)
        for n, hold in enumerate(holds)
    ]
    nowhere = TransferRow(transfer_id(5000), bytes(16), bytes(16), 0, int(TransferFlags.VOID), transfer_id(9999))
    codes = driver.transfers([*posts, nowhere])
    assert set(codes[:-1]) == {1}
    assert codes[-1] == TransferResult.HOLD_NOT_FOUND
    assert set(driver.balances(PEOPLE)) == {9_960}
    assert driver.transfers([nowhere]) == [TransferResult.HOLD_NOT_FOUND]


def test_a_chain_over_two_home_shards_is_refused_as_a_whole(driver: Driver) -> None:
    linked = int(TransferFlags.LINKED)
    rows = [
        TransferRow(transfer_id(1), on_shard(0, SHARDS), on_shard(0, SHARDS, 1), 5, linked),
        TransferRow(transfer_id(2), on_shard(1, SHARDS), on_shard(1, SHARDS, 1), 5),
        TransferRow(transfer_id(3), on_shard(2, SHARDS), on_shard(2, SHARDS, 1), 5, linked),
        TransferRow(transfer_id(4), on_shard(2, SHARDS, 1), on_shard(2, SHARDS), 5),
    ]
    unsupported = TransferResult.CROSS_SHARD_UNSUPPORTED
    assert driver.transfers(rows) == [unsupported, unsupported, 1, 1]
    assert set(driver.balances(PEOPLE)) == {10_000}


def test_rows_of_shards_that_live_elsewhere_are_refused_row_by_row(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, SHARDS, shard_ids=(0, 1)))
    here = [on_shard(0, SHARDS), on_shard(1, SHARDS)]
    there = on_shard(3, SHARDS)
    assert driver.open_accounts([AccountRow(one, "USD", 0, 1000) for one in (*here, there)]) == [1, 1, 9]
    rows = [TransferRow(transfer_id(1), here[0], here[1], 5), TransferRow(transfer_id(2), there, here[1], 5)]
    assert driver.transfers(rows) == [TransferResult.OK, TransferResult.WRONG_SHARD]
    assert driver.host.foreign_shard([*here, there]) == 3
    driver.close()


def test_the_relay_seam_carries_sagas_between_two_processes(tmp_path: Path) -> None:
    """Two hosts stand for two processes; a relay that loses, doubles and reorders deliveries still settles everything."""
    hosts = [Driver(config(tmp_path, SHARDS, shard_ids=(0, 1))), Driver(config(tmp_path, SHARDS, shard_ids=(2, 3)))]
    for n, one in enumerate(hosts):
        own = [person for person in PEOPLE if one.host.foreign_shard([person]) < 0]
        one.fund(own, 10_000, account(2_000_000 + n))
    rng = random.Random(5)
    rows = list(random_rows(600, 6))
    tickets = []
    for one in hosts:
        mine = [row for row in rows if one.host.foreign_shard([row[1]]) < 0]
        tickets.append((one, mine, one.submit(mine)))

    def relay(*, faulty: bool) -> None:
        for one, other in ((hosts[0], hosts[1]), (hosts[1], hosts[0])):
            found = one.host.outbound()
            if faulty:
                found = [d for d in found if rng.random() > 0.3 for _ in range(rng.choice((1, 1, 2)))]
                rng.shuffle(found)
            for delivery in found:
                other.host.deliver(*delivery)

    for turn in range(400):
        relay(faulty=turn < 30)
        if turn % 10 == 9:  # what a relay does after a lost connection
            for one in hosts:
                for shard in one.host.shard_ids:
                    for destination in range(SHARDS):
                        if destination not in one.host.shard_ids:
                            one.host.resend(shard, destination)
        for one in hosts:
            one.take(2)
        if all(ticket in one.answers for one, _, ticket in tickets):
            break
    codes = {}
    for one, mine, ticket in tickets:
        codes.update(zip((row.id for row in mine), one.answers[ticket].codes, strict=True))
    assert set(codes.values()) == {TransferResult.OK}
    found = {}
    for one in hosts:
        own = [person for person in PEOPLE if one.host.foreign_shard([person]) < 0]
        found.update(zip(own, one.balances(own), strict=True))
    assert [found[person] for person in PEOPLE] == expected(rows, [1] * len(rows))
    assert sum(total.balance + total.in_flight for one in hosts for total in one.host.totals()) == 0
    for one in hosts:
        one.close()


class TwoProcesses:
    """Shard 0 in one host, shard 1 in another, and a relay that the test turns by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rich, self.poor, self.frozen = on_shard(0, 2), on_shard(1, 2), on_shard(1, 2, 1)
        self.one, self.two = self.opened(0), self.opened(1)
        assert self.one.open_accounts([AccountRow(self.rich, "USD", int(AccountFlags.MAY_OVERDRAW))]) == [1]
        frozen = AccountRow(self.frozen, "USD", int(AccountFlags.FROZEN))
        assert self.two.open_accounts([AccountRow(self.poor, "USD"), frozen]) == [1, 1]

    def opened(self, shard: int) -> Driver:
        return Driver(config(self.folder / str(shard), 2, shard_ids=(shard,)))

    def carry(self, sender: Driver, receiver: Driver, *kinds: str, lose: bool = False) -> list[tuple[Any, ...]]:
        """Waits for deliveries of these kinds, the last one at least, and hands them over, or loses them."""
        for _ in range(500):
            found: list[tuple[Any, ...]] = [one for one in sender.host.outbound() if one[1] in kinds]
            if found and found[-1][1] == kinds[-1]:
                for one in found if not lose else ():
                    receiver.host.deliver(*one)
                return found
            sender.take(5)
        raise AssertionError(f"nothing of {kinds} came")

    def send(self, rows: list[TransferRow], *, lose: bool) -> list[tuple[Any, ...]]:
        """Debits, credits, and the outcome on its way back, or lost."""
        assert set(self.one.transfers(rows, settled=False)) == {TransferResult.IN_FLIGHT}
        self.carry(self.one, self.two, "credits")
        return self.carry(self.two, self.one, "outcomes", lose=lose)

    def go_back(self, shard: int, count: int) -> None:
        """Transfers of 10 that settle; then one side is as it was before them."""
        for one in (self.one, self.two):
            one.close()
        shutil.copytree(self.folder / str(shard), self.folder / "old")
        self.one, self.two = self.opened(0), self.opened(1)
        lost = [TransferRow(transfer_id(n), self.rich, self.poor, 10) for n in range(count)]
        self.send(lost, lose=False)
        self.check(lost, [TransferResult.OK] * count)
        for one in (self.one, self.two):
            one.close()
        shutil.rmtree(self.folder / str(shard))
        (self.folder / "old").rename(self.folder / str(shard))
        self.one, self.two = self.opened(0), self.opened(1)

    def settle(self) -> None:
        for _ in range(500):
            if self.unsettled == 0:
                return
            self.one.take(5)
        raise AssertionError(f"{self.unsettled} sagas never settled")

    @property
    def unsettled(self) -> int:
        return self.one.host.shards()[0].unsettled_count

    def check(self, rows: list[TransferRow], codes: list[int]) -> None:
        """Final results, balances, and not a cent more or less."""
        self.settle()
        assert self.one.transfers(rows) == codes
        moved = sum(row[3] for row, code in zip(rows, codes, strict=True) if code == TransferResult.OK)
        assert self.one.balances([self.rich]) == [-moved]
        assert self.two.balances([self.poor, self.frozen]) == [moved, 0]
        totals = [*self.one.host.totals(), *self.two.host.totals()]
        assert sum(one.balance for one in totals) == sum(one.in_flight for one in totals) == 0

    def close(self) -> None:
        self.one.close()
        self.two.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[TwoProcesses]:
    made = TwoProcesses(tmp_path)
    yield made
    made.close()


FROZEN = TransferResult.CREDIT_ACCOUNT_FROZEN


def test_the_outcome_after_a_lost_one_still_returns_what_was_refused(processes: TwoProcesses) -> None:
    """It says "settled up to 2": without the refusal of 1 the debit shard would answer OK, and the money be gone."""
    first = TransferRow(transfer_id(1), processes.rich, processes.frozen, 100)
    second = TransferRow(transfer_id(2), processes.rich, processes.poor, 7)
    processes.send([first], lose=True)
    processes.send([second], lose=False)
    processes.check([first, second], [FROZEN, TransferResult.OK])


def test_an_outcome_that_cannot_name_all_refusals_waits_for_the_sends_to_come_again(processes: TwoProcesses) -> None:
    refused = [TransferRow(transfer_id(n), processes.rich, processes.frozen, 1) for n in range(600)]
    fine = TransferRow(transfer_id(1_000), processes.rich, processes.poor, 7)
    (lost,) = processes.send(refused, lose=True)
    assert lost[3] == lost[5] == 600
    (short,) = processes.send([fine], lose=False)
    assert (short[3], short[5], short[7]) == (601, 0, 600)
    for _ in range(500):
        if processes.one.host.gap_count(0):
            break
        processes.one.take(5)
    assert (processes.one.host.gap_count(0), processes.unsettled) == (1, 601)
    processes.one.host.resend(0, 1)
    processes.carry(processes.one, processes.two, "credits")
    (whole,) = processes.carry(processes.two, processes.one, "outcomes")
    assert (whole[3], whole[5], whole[7]) == (601, 600, 0)
    processes.check([*refused, fine], [*[FROZEN] * 600, TransferResult.OK])


@pytest.mark.parametrize("dies", ["credit side", "debit side", "both"])
def test_a_death_between_credit_and_outcome_is_mended_by_asking_again(processes: TwoProcesses, dies: str) -> None:
    rows = [
        TransferRow(transfer_id(1), processes.rich, processes.frozen, 100),
        TransferRow(transfer_id(2), processes.rich, processes.poor, 7),
        TransferRow(transfer_id(3), processes.rich, processes.frozen, 50),
    ]
    processes.send(rows[:2], lose=False)
    processes.settle()
    processes.carry(processes.one, processes.two, "forget", lose=True)
    processes.send(rows[2:], lose=True)
    if dies != "debit side":
        processes.two.close()
        processes.two = processes.opened(1)
    if dies != "credit side":
        processes.one.close()
        processes.one = processes.opened(0)
    else:
        processes.one.host.resend(0, 1, stalled=True)  # sees the send for the first time
        processes.one.host.resend(0, 1, stalled=True)
    processes.carry(processes.one, processes.two, "credits")
    (outcome,) = processes.carry(processes.two, processes.one, "outcomes")
    # The first refusal was never forgotten by name, and came back with the recovery; but the source said where it is.
    assert (outcome[3], outcome[5], outcome[7]) == (3, 1, 2)
    processes.check(rows, [FROZEN, TransferResult.OK, FROZEN])


def test_only_what_does_not_move_is_sent_again_and_ever_more_rarely(processes: TwoProcesses) -> None:
    def asked() -> bool:
        processes.one.host.resend(0, 1, stalled=True)
        same = AccountRow(processes.rich, "USD", int(AccountFlags.MAY_OVERDRAW))
        assert processes.one.open_accounts([same]) == [1]  # behind it in the queue, and in a later group
        return bool(processes.one.host.outbound())

    assert not asked()
    rows = [TransferRow(transfer_id(n), processes.rich, processes.poor, 1) for n in range(2)]
    processes.one.transfers(rows[:1], settled=False)
    processes.carry(processes.one, processes.two, "credits")
    assert [asked() for _ in range(10)] == [False, True, True, False, True, False, False, False, True, False]
    processes.carry(processes.two, processes.one, "outcomes")
    processes.settle()
    assert not asked()
    processes.one.transfers(rows[1:], settled=False)
    processes.carry(processes.one, processes.two, "credits")
    assert [asked() for _ in range(2)] == [False, True]
    processes.carry(processes.two, processes.one, "outcomes")
    processes.check(rows, [TransferResult.OK, TransferResult.OK])


def test_a_relay_that_loses_outcomes_at_random_settles_everything_rightly(processes: TwoProcesses) -> None:
    rng = random.Random(11)
    rows = [
        TransferRow(transfer_id(n), processes.rich, rng.choice((processes.poor, processes.frozen)), rng.randint(1, 9))
        for n in range(1_500)
    ]
    tickets = [processes.one.submit(rows[at : at + 25]) for at in range(0, len(rows), 25)]
    for turn in range(3_000):
        for sender, receiver in ((processes.one, processes.two), (processes.two, processes.one)):
            for delivery in sender.host.outbound():
                if rng.random() > 0.4:
                    receiver.host.deliver(*delivery)
            sender.take(1)
        processes.one.host.resend(0, 1, stalled=turn % 20 != 0)
        if all(ticket in processes.one.answers for ticket in tickets):
            break
    codes = [code for ticket in tickets for code in processes.one.wait(ticket).codes]
    assert codes == [TransferResult.OK if row[2] == processes.poor else FROZEN for row in rows]
    processes.check(rows, codes)


@pytest.mark.parametrize(("kind", "number", "after"), [("credits", 3, 3), ("outcomes", 3, 4), ("forget", 1, 2)])
def test_deliveries_that_contradict_themselves_are_refused(
    processes: TwoProcesses, kind: Any, number: int, after: int
) -> None:
    count = int(kind == "credits")
    with pytest.raises(ValueError, match="number"):
        processes.two.host.deliver(1, kind, 0, number, 0, count, bytes(46 * count), after)


async def test_a_delivery_with_a_number_beyond_all_shards_is_the_peers_mistake(processes: TwoProcesses) -> None:
    host: Any = SimpleNamespace(shard_ids=(1,), native=processes.two.host)
    servicer = RelayServicer(host, chains=None)  # type: ignore[arg-type]
    delivery = relay_pb2.Delivery(destination_shard=1, kind=1, source_shard=2**32 - 1, number=1, count=1)  # type: ignore[arg-type]
    delivery.payload = bytes(46)
    with pytest.raises(InvalidArgument, match=r"deliveries\[0\]"):
        await servicer.Deliver(relay_pb2.DeliverRequest(deliveries=[delivery]), None)


def test_a_message_is_split_and_merged(driver: Driver) -> None:
    from ducat.wallet.v1 import wallet_pb2

    rows = random_rows(2000, 9)
    rows[17] = rows[17]._replace(amount_minor=10**9)
    rows[1999] = rows[1999]._replace(debit_id=rows[1999].credit_id)
    result = wallet_pb2.TransferBatchResult.FromString(driver.send(message(rows)))
    assert dict(zip(result.failed_rows, result.failed_results, strict=True)) == {
        17: TransferResult.INSUFFICIENT_FUNDS,
        1999: TransferResult.ACCOUNTS_SAME,
    }
    assert [one.shard for one in result.positions] == list(range(SHARDS))
    for one in result.positions:
        assert 0 < one.sequence_number <= driver.host.durable_sequence(one.shard)


def test_positions_include_the_credit_on_the_other_shard(driver: Driver) -> None:
    row = TransferRow(transfer_id(1), on_shard(1, SHARDS), on_shard(2, SHARDS), 5)
    positions = dict(driver.wait(driver.submit([row])).positions)
    assert set(positions) == {1, 2}
    assert positions[2] == driver.host.shards()[2].sequence


def test_the_number_of_shards_is_fixed_once_data_exist(tmp_path: Path) -> None:
    open_host(config(tmp_path, SHARDS)).close()
    with pytest.raises(ShardsMismatch, match="made for 4 shards, 2 are configured"):
        open_host(config(tmp_path, 2))


def test_holds_expire_on_every_shard(driver: Driver) -> None:
    holds = [
        TransferRow(transfer_id(n), one, SOURCE, 100, int(TransferFlags.HOLD), bytes(16), 10)
        for n, one in enumerate(PEOPLE)
    ]
    assert set(driver.transfers(holds)) == {1}
    driver.clock.set(NOW_NS + 20_000_000_000)
    driver.host.tick()
    for _ in range(200):
        if sum(one.hold_count for one in driver.host.shards()) == 0:
            break
        driver.take(5)
    assert sum(one.hold_count for one in driver.host.shards()) == 0


def test_a_debit_shard_that_went_back_in_time_does_not_take_old_credits_for_new_ones(processes: TwoProcesses) -> None:
    """Restored from an older copy it counts its sends from there again; the credit shard knows those numbers already and
    would answer that all is well, with nobody credited."""
    processes.go_back(0, 3)
    row = TransferRow(transfer_id(100), processes.rich, processes.poor, 50)
    processes.send([row], lose=False)
    for _ in range(500):
        if processes.one.host.gap_count(0) or processes.unsettled == 0:
            break
        processes.one.take(5)
    assert (processes.one.host.gap_count(0), processes.unsettled) == (1, 1)
    assert processes.one.transfers([row], settled=False) == [TransferResult.IN_FLIGHT]
    assert processes.two.balances([processes.poor]) == [30]
    (link,) = processes.one.host.links(0)
    assert (link.peer, link.sent, link.settled, link.received) == (1, 1, 0, 0)
    assert link.problem == "shard 1 has taken 3 transfers from here, this shard's log ends with number 1"
    assert [one.state for one in processes.one.host.shards()] == ["rewound"]
    assert processes.one.host.rewound_count == 1
    new = [TransferRow(transfer_id(200 + n), processes.rich, processes.poor, 50) for n in range(10)]
    assert processes.one.transfers(new) == [TransferResult.TOO_MANY_PENDING] * 10
    here = TransferRow(transfer_id(300), processes.rich, on_shard(0, 2, 1), 1)
    assert processes.one.transfers([here]) == [TransferResult.CREDIT_ACCOUNT_NOT_FOUND], "within the shard all goes on"
    processes.one.host.resend(0, 1)
    processes.one.take(20)
    assert [one for one in processes.one.host.outbound() if one[1] == "credits"] == []


def test_a_rewound_debit_shard_is_found_before_it_sends_more_than_it_had(processes: TwoProcesses) -> None:
    """With more new sends than were lost, the first answer would be of a number that it has reached again."""
    processes.go_back(0, 3)
    sent = processes.one.host.links(0)[0].sent
    rows = [TransferRow(transfer_id(100 + n), processes.rich, processes.poor, 50) for n in range(10)]
    assert processes.one.transfers(rows, settled=False) == [TransferResult.IN_FLIGHT] * 10
    processes.carry(
        processes.one, processes.two, "credits", lose=True
    )  # the relay holds it back until it has heard of the peer
    (theirs,) = processes.two.host.links(1)
    assert (theirs.received, theirs.settled, theirs.problem) == (3, 0, "")
    processes.one.host.compare_link(0, 1, theirs.received, theirs.settled, sent)
    assert "has taken 3 transfers" in processes.one.host.links(0)[0].problem
    more = [TransferRow(transfer_id(200), processes.rich, processes.poor, 50)]
    assert processes.one.transfers(more) == [TransferResult.TOO_MANY_PENDING]
    processes.one.host.resend(0, 1)
    processes.one.take(20)
    assert [one for one in processes.one.host.outbound() if one[1] == "credits"] == []
    assert processes.unsettled == 10
    assert processes.two.balances([processes.poor]) == [30]


def test_a_link_that_is_well_goes_on(processes: TwoProcesses) -> None:
    rows = [TransferRow(transfer_id(n), processes.rich, processes.poor, 10) for n in range(3)]
    processes.send(rows, lose=False)
    processes.settle()
    ours, theirs = processes.one.host.links(0)[0], processes.two.host.links(1)[0]
    processes.one.host.compare_link(0, 1, theirs.received, theirs.settled, ours.sent)
    processes.two.host.compare_link(1, 0, ours.received, ours.settled, theirs.sent)
    more = [TransferRow(transfer_id(10), processes.rich, processes.poor, 1)]
    processes.send(more, lose=False)
    processes.check([*rows, *more], [TransferResult.OK] * 4)
    assert [one.state for one in (*processes.one.host.shards(), *processes.two.host.shards())] == ["serving"] * 2


def test_a_credit_shard_that_went_back_in_time_says_so_and_takes_nothing(processes: TwoProcesses) -> None:
    processes.go_back(1, 3)
    row = TransferRow(transfer_id(100), processes.rich, processes.poor, 50)
    assert processes.one.transfers([row], settled=False) == [TransferResult.IN_FLIGHT]
    processes.carry(processes.one, processes.two, "credits")
    for _ in range(500):
        if processes.two.host.gap_count(1):
            break
        processes.two.take(5)
    (link,) = processes.two.host.links(1)
    assert link.problem == "shard 0 has settled 3 transfers to here, this shard's log ends with number 0"
    assert [one.state for one in processes.two.host.shards()] == ["rewound"]
    assert processes.two.balances([processes.poor]) == [0]
    assert processes.unsettled == 1


def test_a_rewound_shard_among_those_of_one_process_is_found_before_anything_moves(tmp_path: Path) -> None:
    driver = Driver(config(tmp_path, 2))
    rich, poor = on_shard(0, 2), on_shard(1, 2)
    may_overdraw = int(AccountFlags.MAY_OVERDRAW)
    assert driver.open_accounts([AccountRow(rich, "USD", may_overdraw), AccountRow(poor, "USD", may_overdraw)]) == [
        1,
        1,
    ]
    driver.close()
    shutil.copytree(tmp_path / "shard-0000", tmp_path / "old")
    driver = Driver(config(tmp_path, 2))
    assert driver.transfers([TransferRow(transfer_id(n), rich, poor, 10) for n in range(3)]) == [1] * 3
    assert driver.transfers([TransferRow(transfer_id(n), poor, rich, 1) for n in range(10, 12)]) == [1] * 2
    driver.close()
    shutil.rmtree(tmp_path / "shard-0000")
    (tmp_path / "old").rename(tmp_path / "shard-0000")
    for _ in range(2):  # a restart changes nothing
        driver = Driver(config(tmp_path, 2))
        assert [one.state for one in driver.host.shards()] == ["rewound", "serving"]
        assert driver.host.links(0)[0].problem == (
            "shard 1 has taken 3 transfers from here, this shard's log ends with number 0; "
            "shard 1 has settled 2 transfers to here, this shard's log ends with number 0"
        )
        rows = [TransferRow(transfer_id(100 + n), rich, poor, 50) for n in range(10)]
        assert driver.transfers(rows) == [TransferResult.TOO_MANY_PENDING] * 10
        assert driver.balances([rich, poor]) == [0, 28]
        driver.close()


def test_nobody_waits_for_ever_for_a_process_that_is_away(processes: TwoProcesses) -> None:
    """Rows that wait hold the room of all others, of every shard."""
    one = processes.one
    rows = [TransferRow(transfer_id(n), processes.rich, processes.poor, 1) for n in range(10)]
    waiting = one.submit(rows)
    (sent,) = processes.carry(one, processes.two, "credits", lose=True)
    repeated = one.submit(rows[:3])
    one.host.resend(0, 1)
    processes.carry(one, processes.two, "credits", lose=True)
    assert not one.answers
    one.clock.set(NOW_NS + 3 * 10**9)
    one.host.resend(0, 1)
    assert list(one.wait(waiting).codes) == [TransferResult.IN_FLIGHT] * 10
    assert list(one.wait(repeated).codes) == [TransferResult.IN_FLIGHT] * 3
    assert one.transfers([TransferRow(transfer_id(10), processes.rich, processes.poor, 1)]) == [
        TransferResult.IN_FLIGHT
    ]
    assert one.host.rows_in_flight == 0
    processes.two.host.deliver(*sent)
    processes.carry(processes.two, one, "outcomes")
    again = one.submit([TransferRow(transfer_id(11), processes.rich, processes.poor, 1)])
    one.take(50)
    assert again not in one.answers
    for _ in range(500):
        if again in one.answers:
            break
        for sender, receiver in ((one, processes.two), (processes.two, one)):
            for delivery in sender.host.outbound():
                receiver.host.deliver(*delivery)
            sender.take(5)
    assert list(one.wait(again).codes) == [TransferResult.OK]
    processes.settle()
    assert processes.two.balances([processes.poor]) == [12]


async def test_an_outcome_from_before_the_comparison_settles_nothing(processes: TwoProcesses) -> None:
    p = processes
    p.one.close()
    shutil.copytree(p.folder / "0", p.folder / "old")
    p.one = p.opened(0)
    lost = [TransferRow(transfer_id(n), p.rich, p.poor, 10) for n in range(3)]
    p.one.transfers(lost, settled=False)
    p.carry(p.one, p.two, "credits")
    outcomes = p.carry(p.two, p.one, "outcomes", lose=True)
    assert outcomes
    p.one.close()
    shutil.rmtree(p.folder / "0")
    (p.folder / "old").rename(p.folder / "0")
    p.one = p.opened(0)

    host: Any = SimpleNamespace(
        config=SimpleNamespace(data_dir=p.folder / "0"), links=p.one.host.links, native=p.one.host, shard_ids=[0]
    )
    relay = Relay(host, {1: "two"}, None)  # type: ignore[arg-type]
    servicer = RelayServicer(host, None, relay.believes)  # type: ignore[arg-type]
    new = [TransferRow(transfer_id(100 + n), p.rich, p.poor, 50) for n in range(5)]
    p.one.transfers(new, settled=False)
    request = relay_pb2.DeliverRequest()
    for destination, _, source, number, position, count, payload, after in outcomes:
        request.deliveries.add(
            destination_shard=destination,
            kind=relay_pb2.DELIVERY_KIND_OUTCOMES,
            source_shard=source,
            number=number,
            position=position,
            count=count,
            payload=payload,
            after_number=after,
        )
    await servicer.Deliver(request, None)
    p.one.take(50)
    (mine,) = p.one.host.links(0)
    assert (mine.sent, mine.settled) == (5, 0)
    assert set(p.one.transfers(new, settled=False)) == {TransferResult.IN_FLIGHT}


@pytest.mark.parametrize("whole", [False, True])
def test_numbers_kept_from_an_earlier_split_raise_no_alarm(processes: TwoProcesses, whole: bool) -> None:
    p = processes

    def host() -> Any:
        return SimpleNamespace(config=SimpleNamespace(data_dir=p.folder / "0"), links=p.one.host.links, shard_ids=[0])

    _Numbers(host(), 0, {1}).save()
    if whole:  # one process had all shards
        forget_numbers(host())
    p.send([TransferRow(transfer_id(n), p.rich, p.poor, 10) for n in range(3)], lose=False)
    p.settle()
    p.one.close()
    p.one = p.opened(0)
    sent = _Numbers(host(), 0, {1})[1]
    (theirs,) = p.two.host.links(1)
    assert sent == theirs.received == 3
    p.one.host.compare_link(0, 1, theirs.received, theirs.settled, sent)
    assert p.one.host.links(0)[0].problem == ""


def test_numbers_that_cannot_be_written_keep_the_peer_unknown(
    processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    p = processes
    host: Any = SimpleNamespace(
        config=SimpleNamespace(data_dir=p.folder / "0"), links=p.one.host.links, native=p.one.host, shard_ids=[0]
    )
    (link,) = p.two.host.links(1)
    theirs: Any = SimpleNamespace(
        shard=1, links=[SimpleNamespace(shard=0, received_number=link.received, settled_number=link.settled)]
    )
    with monkeypatch.context() as patch:
        patch.setattr("wallet_core.adapters.relay.write_whole", full)
        relay = Relay(host, {1: "two"}, None)  # type: ignore[arg-type]
        assert not relay._saved()
    assert relay._saved()
    with monkeypatch.context() as patch:
        patch.setattr("wallet_core.adapters.relay.write_whole", full)
        assert not relay._compare(theirs)
        assert not relay.believes(1)
    assert relay._compare(theirs)
    assert relay.believes(1)
