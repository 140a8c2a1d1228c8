"""Linked chains are all or nothing; holds take money once and give it back in time."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tests.unit.wallet_core.engine.harness import (
    MS,
    NOW,
    AccountRow,
    Pair,
    account_id,
    read_pieces,
    transfer_columns,
    transfer_id,
)
from wallet_core.engine.codes import HOLDS_EXPIRED_MAX, EventKind, TransferFlags, TransferResult
from wallet_core.engine.events import unpack_events
from wallet_core.engine.twin import Row, fingerprint_of

F, R = TransferFlags, TransferResult
BANK, ANN, BOB = map(account_id, range(3))
NOBODY = account_id(9)
Z = bytes(16)
SECOND = 1000 * MS


@pytest.fixture
def pair() -> Pair:
    pair = Pair()
    pair.open([AccountRow(BANK, flags=4), AccountRow(ANN), AccountRow(BOB)])
    pair.transfer(Row(transfer_id(1), BANK, ANN, 100))
    return pair


def balances(pair: Pair) -> list[tuple[int, int, int]]:
    accounts = [pair.engine.account(id_) for id_ in (BANK, ANN, BOB)]
    return [(a.balance, a.held_out, a.held_in) for a in accounts if a]


def kinds(pair: Pair, frame: int = -1) -> list[EventKind]:
    return [event.kind for event in unpack_events(pair.frames[frame].body, 1)]


def test_a_chain_that_holds_is_one_frame(pair: Pair) -> None:
    rows = [Row(transfer_id(2), ANN, BOB, 60, F.LINKED), Row(transfer_id(3), BOB, BANK, 60)]
    assert pair.transfers(rows) == [R.OK, R.OK]
    assert kinds(pair) == [EventKind.MONEY_MOVED] * 2
    assert balances(pair) == [(-40, 0, 0), (40, 0, 0), (0, 0, 0)]
    assert pair.transfers(rows) == [R.OK, R.OK], "the whole chain again: the same answers, no effect"
    pair.check_replay()


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_chain_that_fails_leaves_nothing_behind(pair: Pair, failing: int) -> None:
    hold, post, void = transfer_id(10), transfer_id(11), transfer_id(12)
    assert pair.transfer(Row(void, ANN, BOB, 7, F.HOLD, timeout_s=5)) == R.OK
    before, digest = balances(pair), pair.engine.state_digest()[:8]
    rows = [
        Row(hold, ANN, BOB, 50, F.HOLD | F.LINKED, timeout_s=9),
        Row(post, Z, Z, 20, F.POST | F.LINKED, hold),
        Row(transfer_id(13), Z, Z, 0, F.VOID | F.LINKED, void),
        Row(transfer_id(14), BOB, BANK, 20),
    ]
    rows[failing] = Row(rows[failing].id, NOBODY, BOB, 1, rows[failing].flags & F.LINKED)
    expected = [R.LINKED_FAILED] * 4
    expected[failing] = R.DEBIT_ACCOUNT_NOT_FOUND
    assert pair.transfers(rows) == expected
    assert balances(pair) == before
    assert pair.engine.state_digest()[:8] == digest
    assert kinds(pair) == [EventKind.TRANSFER_REFUSED] * 4
    assert pair.transfers(rows) == expected, "the whole chain again: the same answers"
    assert pair.engine.status().hold_count == 1
    assert pair.transfer(Row(transfer_id(15), Z, Z, 0, F.POST, void)) == R.OK, "the void did not happen"
    pair.check_agreement()
    pair.check_replay()
    pair.check_image()


def test_a_chain_that_the_batch_cuts_off_is_not_touched(pair: Pair) -> None:
    rows = [Row(transfer_id(2), ANN, BOB, 1), Row(transfer_id(3), ANN, BOB, 1, F.LINKED)]
    rows += [Row(transfer_id(4), ANN, BOB, 1, F.LINKED)]
    assert pair.transfers(rows) == [R.OK, R.CHAIN_OPEN, R.CHAIN_OPEN]
    assert pair.transfers([*rows[1:], Row(transfer_id(5), ANN, BOB, 1)]) == [R.OK] * 3, "not remembered"


def test_chains_follow_the_gather_index(pair: Pair) -> None:
    rows = [Row(transfer_id(2), ANN, BOB, 1), Row(transfer_id(3), ANN, NOBODY, 1), Row(transfer_id(4), ANN, BOB, 1, 1)]
    assert pair.transfers(rows, gather=[2, 1]) == [0, R.CREDIT_ACCOUNT_NOT_FOUND, R.LINKED_FAILED]


def test_a_member_that_was_done_before_counts_as_done(pair: Pair) -> None:
    done = Row(transfer_id(2), ANN, BOB, 10, F.LINKED)
    assert pair.transfers([done, Row(transfer_id(3), ANN, BOB, 10)]) == [R.OK, R.OK]
    assert pair.transfers([done, Row(transfer_id(4), ANN, NOBODY, 1)]) == [R.OK, R.CREDIT_ACCOUNT_NOT_FOUND]
    assert pair.transfers([done, Row(transfer_id(5), ANN, BOB, 1)]) == [R.OK, R.OK]
    assert balances(pair)[2] == (21, 0, 0)


def test_the_same_id_twice_in_a_failing_chain(pair: Pair) -> None:
    row = Row(transfer_id(2), ANN, BOB, 10, F.LINKED)
    last = Row(transfer_id(3), ANN, NOBODY, 10)
    assert pair.transfers([row, row, last]) == [R.LINKED_FAILED, R.LINKED_FAILED, R.CREDIT_ACCOUNT_NOT_FOUND]
    pair.check_replay()


def test_chains_do_not_cross_shards(pair: Pair) -> None:
    rows = [Row(transfer_id(2), ANN, BOB, 1, F.LINKED), Row(transfer_id(3), ANN, BOB, 1, credit_shard=1)]
    assert pair.transfers(rows) == [R.LINKED_FAILED, R.CROSS_SHARD_UNSUPPORTED]


def test_a_chain_longer_than_any_block(pair: Pair) -> None:
    rows = [Row(transfer_id(100 + i), ANN, BOB, 1, F.LINKED) for i in range(99)]
    good = [*rows, Row(transfer_id(300), BOB, ANN, 99)]
    assert pair.transfers(good) == [R.OK] * 100
    rows = [Row(transfer_id(400 + i), ANN, BOB, 1, F.LINKED) for i in range(101)]
    assert pair.transfers([*rows, Row(transfer_id(600), BOB, ANN, 1)])[100] == R.INSUFFICIENT_FUNDS
    assert balances(pair)[1:] == [(100, 0, 0), (0, 0, 0)]
    pair.check_replay()


def test_a_hold_counts_against_both_sides(pair: Pair) -> None:
    assert pair.update([AccountRow(BOB, balance_limit=80)]) == [1]
    assert pair.transfer(Row(transfer_id(2), ANN, BOB, 70, F.HOLD)) == R.OK
    assert balances(pair)[1:] == [(100, 70, 0), (0, 0, 70)]
    assert pair.transfer(Row(transfer_id(3), ANN, BANK, 31)) == R.INSUFFICIENT_FUNDS
    assert pair.transfer(Row(transfer_id(4), ANN, BOB, 11)) == R.BALANCE_LIMIT_EXCEEDED
    assert pair.transfer(Row(transfer_id(5), Z, Z, 30, F.POST, transfer_id(2))) == R.OK
    assert balances(pair)[1:] == [(70, 0, 0), (30, 0, 0)]


def test_a_hold_ends_once(pair: Pair) -> None:
    for n, flag in ((10, F.POST), (20, F.VOID)):
        hold = transfer_id(n)
        assert pair.transfer(Row(hold, ANN, BOB, 10, F.HOLD)) == R.OK
        assert pair.transfer(Row(transfer_id(n + 1), BANK, Z, 0, F.POST, hold)) == R.HOLD_MISMATCH
        assert pair.transfer(Row(transfer_id(n + 2), Z, ANN, 0, F.VOID, hold)) == R.HOLD_MISMATCH
        assert pair.transfer(Row(transfer_id(n + 3), Z, Z, 9, F.VOID, hold)) == R.HOLD_MISMATCH
        assert pair.transfer(Row(transfer_id(n + 4), Z, Z, 11, F.POST, hold)) == R.HOLD_AMOUNT_EXCEEDED
        assert pair.transfer(Row(transfer_id(n + 5), ANN, BOB, 0, flag, hold)) == R.OK
        ended = R.HOLD_ALREADY_POSTED if flag == F.POST else R.HOLD_ALREADY_VOIDED
        assert pair.transfer(Row(transfer_id(n + 6), Z, Z, 0, F.POST, hold)) == ended
        assert pair.transfer(Row(transfer_id(n + 7), Z, Z, 0, F.VOID, hold)) == ended
        assert pair.transfer(Row(hold, ANN, BOB, 10, F.HOLD)) == R.OK, "the hold itself did succeed"
    pair.check_replay()


def test_void_passes_where_post_is_refused(pair: Pair) -> None:
    assert pair.transfer(Row(transfer_id(2), ANN, BOB, 10, F.HOLD)) == R.OK
    assert pair.update([AccountRow(ANN, flags=1)]) == [1]
    assert pair.transfer(Row(transfer_id(3), Z, Z, 0, F.POST, transfer_id(2))) == R.DEBIT_ACCOUNT_FROZEN
    assert pair.transfer(Row(transfer_id(4), Z, Z, 0, F.VOID, transfer_id(2))) == R.OK


def test_holds_expire_by_deadline_then_by_age(pair: Pair) -> None:
    rows = [Row(transfer_id(10 + i), ANN, BOB, i + 1, F.HOLD, timeout_s=s) for i, s in enumerate([3, 1, 2, 1, 0])]
    assert pair.transfers(rows) == [R.OK] * 5
    assert pair.expire(NOW + SECOND - MS) == b""
    assert pair.engine.next_deadline() >= NOW + SECOND, "never early, though deadlines are whole milliseconds"
    assert pair.engine.next_deadline() < NOW + SECOND + MS
    events = unpack_events(pair.expire(NOW + 9 * SECOND), 1)
    assert [event.amount for event in events] == [2, 4, 3, 1]
    assert balances(pair)[1] == (100, 5, 0), "no timeout, no end"
    assert pair.engine.next_deadline() == 0
    assert pair.transfer(Row(transfer_id(20), Z, Z, 0, F.POST, transfer_id(10)), NOW + 9 * SECOND) == R.HOLD_EXPIRED
    pair.check_replay()


def test_any_command_finds_due_holds_expired(pair: Pair) -> None:
    assert pair.transfer(Row(transfer_id(2), ANN, BOB, 100, F.HOLD, timeout_s=1)) == R.OK
    late = NOW + 2 * SECOND
    assert pair.transfer(Row(transfer_id(3, late // MS), ANN, BOB, 100), late) == R.OK
    assert kinds(pair) == [EventKind.HOLD_EXPIRED, EventKind.MONEY_MOVED]


def test_time_never_runs_backwards(pair: Pair) -> None:
    pair.expire(NOW + 10 * SECOND)
    assert pair.transfer(Row(transfer_id(2), ANN, BOB, 1, F.HOLD, timeout_s=1), NOW) == R.OK
    assert pair.engine.next_deadline() >= NOW + 11 * SECOND
    assert pair.now_ns == NOW + 10 * SECOND


def test_too_many_holds_is_an_answer_that_may_change() -> None:
    pair = Pair(parameters={"holds_max": 2})
    pair.open([AccountRow(BANK, flags=4), AccountRow(ANN)])
    rows = [Row(transfer_id(i), BANK, ANN, 1, F.HOLD) for i in range(3)]
    assert pair.transfers(rows) == [R.OK, R.OK, R.TOO_MANY_PENDING]
    assert pair.transfer(Row(transfer_id(9), Z, Z, 0, F.VOID, rows[0].id)) == R.OK
    assert pair.transfer(rows[2]) == R.OK


def test_many_holds_come_and_go() -> None:
    """Slots, both indexes with their tombstones, and the heap, over several doublings."""
    pair = Pair()
    pair.open([AccountRow(BANK, flags=4), AccountRow(ANN)])
    number = 0
    held: list[bytes] = []
    for round_ in range(12):
        rows = [Row(transfer_id(number + i), BANK, ANN, 1, F.HOLD, timeout_s=1 + i * 7 % 90) for i in range(300)]
        number += 300
        held += [row.id for row in rows]
        ends, held = held[::2], held[1::2]
        voids = [Row(transfer_id(number + i), Z, Z, 0, F.VOID, id_) for i, id_ in enumerate(ends)]
        number += len(voids)
        assert set(pair.transfers(rows)) == {R.OK}
        assert set(pair.transfers(voids)) == {R.OK}
        if round_ % 4 == 3:
            pair.check_image()
    assert pair.engine.status().hold_count == len(held)
    pair.expire(NOW + 100 * SECOND)
    assert pair.engine.status().hold_count == 0
    pair.check_agreement()


def test_holds_end_while_their_index_grows() -> None:
    """Two holds come for each that ends, so that slots move to the next table while others are removed from both."""
    pair = Pair()
    pair.open([AccountRow(BANK, flags=4), AccountRow(ANN)])
    random, held, number = Random(5), [], 0
    for _ in range(30):
        rows = []
        for i in range(120):
            number += 1
            if i % 3 == 2:
                ended = held.pop(random.randrange(len(held)))
                rows.append(Row(transfer_id(number), Z, Z, 0, F.VOID, ended))
            else:
                rows.append(Row(transfer_id(number), BANK, ANN, 1, F.HOLD))
                held.append(rows[-1].id)
        assert set(pair.transfers(rows)) == {R.OK}
    number += 1
    posts = [Row(transfer_id(number + i), Z, Z, 0, F.POST, id_) for i, id_ in enumerate(held)]
    assert set(pair.transfers(posts)) == {R.OK}
    assert pair.engine.status().hold_count == 0
    pair.check_replay()


# ---- holds of chains across shards belong to their coordinator


def test_holds_of_chains_do_not_exist_for_callers(pair: Pair) -> None:
    """Neither while they are held nor once they are over, whatever a caller names: the answer never tells more than that of an id
    that nobody has."""
    nobodys = transfer_id(99)
    rows = [Row(transfer_id(i), ANN, BOB, 10, F.HOLD | F.CHAIN, timeout_s=7) for i in (2, 3, 4)]
    assert pair.transfers(rows, chain_steps=True) == [R.OK] * 3
    before = balances(pair)
    number = 100

    def by_hand() -> None:
        nonlocal number
        for hold in (transfer_id(2), transfer_id(3), transfer_id(4), nobodys):
            for kind in (F.POST, F.VOID):
                for accounts in ((Z, Z), (ANN, BOB), (BOB, BANK)):
                    for amount in (0, 4, 10, 11):
                        number += 1
                        assert (
                            pair.transfer(Row(transfer_id(number), *accounts, amount, kind, hold)) == R.HOLD_NOT_FOUND
                        )
        # in a chain of one shard as well
        number += 2
        chain = [Row(transfer_id(number), Z, Z, 0, F.VOID | F.LINKED, transfer_id(2))]
        assert pair.transfers([*chain, Row(transfer_id(number - 1), BANK, ANN, 1)]) == [
            R.HOLD_NOT_FOUND,
            R.LINKED_FAILED,
        ]

    by_hand()
    assert balances(pair) == before
    ends = [Row(transfer_id(12), Z, Z, 0, F.POST | F.CHAIN, transfer_id(2))]
    ends += [Row(transfer_id(13), ANN, BOB, 0, F.VOID | F.CHAIN, transfer_id(3))]
    assert pair.transfers(ends, chain_steps=True) == [R.OK] * 2
    by_hand()
    again = [Row(transfer_id(14), Z, Z, 0, F.POST | F.CHAIN, transfer_id(2))]
    again += [Row(transfer_id(15), Z, Z, 0, F.POST | F.CHAIN, transfer_id(3))]
    again += [Row(transfer_id(16), Z, Z, 11, F.POST | F.CHAIN, transfer_id(4))]
    expected = [R.HOLD_ALREADY_POSTED, R.HOLD_ALREADY_VOIDED, R.HOLD_AMOUNT_EXCEEDED]
    assert pair.transfers(again, chain_steps=True) == expected
    pair.check_agreement()
    pair.check_replay()
    pair.check_image()


def test_a_caller_who_repeats_a_step_exactly_does_not_learn_its_result(pair: Pair) -> None:
    step = Row(transfer_id(2), ANN, BOB, 10, F.HOLD | F.CHAIN, timeout_s=7)
    refused = Row(transfer_id(3), ANN, BOB, 10_000, F.HOLD | F.CHAIN)
    assert pair.transfers([step, refused], chain_steps=True) == [R.OK, R.INSUFFICIENT_FUNDS]
    for row in (step, refused, replace(step, amount=11)):
        assert pair.transfer(row) == R.FLAGS_INVALID
        broken = [Row(transfer_id(5), ANN, ANN, 1, F.LINKED), row]
        assert pair.transfers(broken) == [R.ACCOUNTS_SAME, R.FLAGS_INVALID]
    assert pair.transfers([step, refused], chain_steps=True) == [R.OK, R.INSUFFICIENT_FUNDS]
    pair.check_replay()


def test_chains_do_not_end_holds_of_callers(pair: Pair) -> None:
    assert pair.transfer(Row(transfer_id(2), ANN, BOB, 10, F.HOLD)) == R.OK
    for number, kind in enumerate((F.POST, F.VOID), 10):
        step = Row(transfer_id(number), Z, Z, 0, kind | F.CHAIN, transfer_id(2))
        assert pair.transfers([step], chain_steps=True) == [R.HOLD_NOT_FOUND]
    assert pair.transfer(Row(transfer_id(12), Z, Z, 0, F.VOID, transfer_id(2))) == R.OK
    step = Row(transfer_id(13), Z, Z, 0, F.VOID | F.CHAIN, transfer_id(2))
    assert pair.transfers([step], chain_steps=True) == [R.HOLD_NOT_FOUND]
    pair.check_replay()


def test_a_hold_of_a_chain_has_no_deadline(pair: Pair) -> None:
    """Its timeout is content only: another one under the same id is another command."""
    hold = Row(transfer_id(2), ANN, BOB, 10, F.HOLD | F.CHAIN, timeout_s=1)
    assert pair.transfers([hold], chain_steps=True) == [R.OK]
    assert pair.engine.next_deadline() == 0
    pair.expire(NOW + 3_600 * SECOND)
    assert balances(pair)[1] == (100, 10, 0)
    assert pair.transfers([hold, replace(hold, timeout_s=2)], chain_steps=True) == [R.OK, R.ID_REUSED]
    pair.check_replay()
    pair.check_image()


def test_an_id_of_a_chain_and_one_of_a_caller_are_never_the_same_command(pair: Pair) -> None:
    """Though the fingerprints agree: a fingerprint is no secret and may be aimed at."""
    step = Row(transfer_id(2), ANN, BOB, 10, F.HOLD | F.CHAIN)
    columns = transfer_columns([step])
    wanted = fingerprint_of(step)
    pair.twin.transfers(timestamp_ns=NOW, chain_steps=True, **columns)
    known = pair.twin.state.generations[-1].ids[step.id]
    assert (known.fingerprint, known.flags) == (wanted, F.CHAIN)
    meta = (wanted << 16 | (1 | F.CHAIN) << 8 | R.OK).to_bytes(8, "little")
    pair.engine.transfers(timestamp_ns=NOW, chain_steps=True, **columns)
    pair.engine.image_begin()
    pieces = b"".join(read_pieces(pair.engine))
    pair.engine.image_end()
    assert step.id + meta in pieces


def test_a_callers_flag_in_a_broken_chain_is_no_right(pair: Pair) -> None:
    """Rows behind the one that failed are refused before all else is looked at, and remembered; not under this flag."""
    rows = [Row(transfer_id(2), NOBODY, BOB, 1, F.LINKED), Row(transfer_id(3), ANN, BOB, 1, F.HOLD | F.CHAIN)]
    assert pair.transfers(rows) == [R.DEBIT_ACCOUNT_NOT_FOUND, R.FLAGS_INVALID]
    step = Row(transfer_id(4), Z, Z, 0, F.VOID | F.CHAIN, transfer_id(3))
    assert pair.transfers([step], chain_steps=True) == [R.HOLD_NOT_FOUND]
    assert pair.transfers(rows[1:], chain_steps=True) == [R.OK]
    pair.check_replay()
    pair.check_image()


def test_a_chain_taken_back_gives_its_holds_back_as_they_were(pair: Pair) -> None:
    assert pair.transfers([Row(transfer_id(2), ANN, BOB, 10, F.HOLD | F.CHAIN)], chain_steps=True) == [R.OK]
    rows = [
        Row(transfer_id(3), Z, Z, 0, F.POST | F.CHAIN | F.LINKED, transfer_id(2)),
        Row(transfer_id(4), ANN, BOB, 5, F.HOLD | F.CHAIN | F.LINKED),
        Row(transfer_id(5), NOBODY, BOB, 5, F.HOLD | F.CHAIN),
    ]
    expected = [R.LINKED_FAILED, R.LINKED_FAILED, R.DEBIT_ACCOUNT_NOT_FOUND]
    assert pair.transfers(rows, chain_steps=True) == expected
    assert pair.transfers(rows, chain_steps=True) == expected
    assert pair.transfer(Row(transfer_id(6), Z, Z, 0, F.VOID, transfer_id(2))) == R.HOLD_NOT_FOUND
    assert pair.transfers([Row(transfer_id(7), Z, Z, 0, F.VOID | F.CHAIN, transfer_id(2))], chain_steps=True) == [R.OK]
    pair.check_agreement()
    pair.check_replay()
    pair.check_image()


def test_holds_that_end_at_once_are_spread_over_frames_and_are_over_for_everybody() -> None:
    """A frame with millions of events would stop the shard; a hold that is still to be released is as good as ended."""
    pair = Pair()
    pair.open([AccountRow(BANK, flags=4), AccountRow(ANN)])
    count = 2 * HOLDS_EXPIRED_MAX + 5
    holds = [Row(transfer_id(10 + i), BANK, ANN, 1, F.HOLD, timeout_s=1) for i in range(count)]
    for at in range(0, count, 4000):
        assert set(pair.transfers(holds[at : at + 4000])) == {R.OK}
    over = NOW + 2 * SECOND
    post = Row(transfer_id(1), Z, Z, 0, F.POST, holds[-1].id)
    void = Row(transfer_id(2), Z, Z, 0, F.VOID, holds[-2].id)
    assert pair.transfers([post, void], over) == [R.HOLD_EXPIRED, R.HOLD_EXPIRED]
    assert kinds(pair) == [EventKind.HOLD_EXPIRED] * HOLDS_EXPIRED_MAX + [EventKind.TRANSFER_REFUSED] * 2
    assert pair.engine.status().hold_count == HOLDS_EXPIRED_MAX + 5
    assert pair.engine.next_deadline() <= over, "more is to be done at once"
    assert len(pair.expire(over)) == 48 * HOLDS_EXPIRED_MAX
    assert len(pair.expire(over)) == 48 * 5
    assert pair.expire(over) == b""
    assert pair.transfers([post, void], over) == [R.HOLD_EXPIRED, R.HOLD_EXPIRED]
    assert balances(pair) == [(0, 0, 0), (0, 0, 0)]
    pair.check_agreement()
    pair.check_replay()
