"""The store's own promises, against a real PostgreSQL: an answer of one PSP never ends the attempt of another."""

from __future__ import annotations

from dataclasses import replace

from executor.adapters.postgres import PostgresAttemptStore
from executor.domain.attempt import AttemptKind, AttemptState
from executor.domain.command import ExecuteOrder, ExecutePayout
from kernel.money import Money
from runtime.postgres import KeptConnections, create_pool

NOW_NS = 1_753_056_000_000_000_000
DAY_NS = 86_400 * 1_000_000_000
ORDER = ExecuteOrder("ORD-1", "CHCKT-1", "SELL-1", Money("USD", 7500), page_key="a" * 32)


async def test_a_late_answer_of_the_psp_before_does_not_end_a_rerouted_attempt(postgres_dsn: str) -> None:
    async with await create_pool(postgres_dsn, "executor") as pool:
        kept = KeptConnections(pool)  # as the process has it
        store = PostgresAttemptStore(kept)
        first = await store.begin(ORDER, "a", NOW_NS, NOW_NS, "")
        assert first.is_new
        assert await store.reroute(first, "b", NOW_NS)
        assert not await store.reroute(first, "c", NOW_NS)
        late = replace(first, state=AttemptState.REJECTED, code="x")
        assert not await store.finish(late, AttemptState.SENDING, (), "")
        taken = replace(first, psp="b", state=AttemptState.ACCEPTED, psp_object_id="pi_1", call_count=2)
        assert await store.finish(taken, AttemptState.SENDING, (), "")
        assert not await store.reroute(taken, "c", NOW_NS)
        stored = await store.load(AttemptKind.ORDER, "ORD-1")
        assert stored is not None
        assert (stored.attempt.psp, stored.attempt.state, stored.attempt.call_count) == ("b", AttemptState.ACCEPTED, 2)
        assert stored.command == ORDER, "what is sent again is what was sent"
        await kept.close()


async def test_only_what_nobody_has_in_hand_is_hastened(postgres_dsn: str) -> None:
    async with await create_pool(postgres_dsn, "executor") as pool:
        store = PostgresAttemptStore(pool)
        put_off_ns = NOW_NS + DAY_NS + 1_234_567_891
        for command in (ORDER, ExecutePayout("PO-1")):
            begun = await store.begin(command, "a", NOW_NS, NOW_NS, "")
            assert await store.finish(replace(begun, next_poll_time_ns=put_off_ns), AttemptState.SENDING, (), "")
        waiting = [(AttemptKind.ORDER, "ORD-1", put_off_ns), (AttemptKind.PAYOUT, "PO-1", put_off_ns - 1_000)]
        await store.hasten(waiting, NOW_NS + 1_000_000)
        due, _ = await store.claim_due(NOW_NS + 2_000_000, NOW_NS + DAY_NS, 10)
        assert [each.attempt.reference for each in due] == ["ORD-1"]
        await store.hasten(waiting, NOW_NS + 1_000_000)
        assert await store.claim_due(NOW_NS + 2_000_000, NOW_NS + DAY_NS, 10) == ([], NOW_NS + DAY_NS)


async def test_a_settled_payout_is_asked_for_once_more_and_an_order_is_not(postgres_dsn: str) -> None:
    async with await create_pool(postgres_dsn, "executor") as pool:
        store = PostgresAttemptStore(pool)
        for command in (ORDER, ExecutePayout("PO-1")):
            begun = await store.begin(command, "a", NOW_NS, NOW_NS, "")
            accepted = replace(begun, state=AttemptState.ACCEPTED, psp_object_id="x_1", next_poll_time_ns=NOW_NS)
            assert await store.finish(accepted, AttemptState.SENDING, (), "")
        await store.settle([(AttemptKind.ORDER, "ORD-1"), (AttemptKind.PAYOUT, "PO-1")], NOW_NS)
        order = await store.load(AttemptKind.ORDER, "ORD-1")
        payout = await store.load(AttemptKind.PAYOUT, "PO-1")
        assert order is not None
        assert payout is not None
        assert (order.attempt.next_poll_time_ns, payout.attempt.next_poll_time_ns) == (0, NOW_NS + DAY_NS)
