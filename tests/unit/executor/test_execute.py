"""An order sent twice in effect, an ambiguous answer taken for a failure, an attempt that nobody looks at again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from executor.domain.attempt import Attempt, AttemptKind, AttemptState
from executor.domain.command import (
    CancelOrder,
    Command,
    ExecuteOrder,
    ExecutePayout,
    ExecuteRefund,
    PayoutInstruction,
    Recipient,
)
from executor.domain.health import CLOSED, FAILURE_COUNT_OPEN, OPEN_S, OPEN_S_MAX, Health
from executor.domain.outcome import Accepted, Answer, NoAnswer, NotFound, NotificationKind, NotSent, Rejected
from executor.domain.routing import Capability, Provider
from executor.psp.base import PspBase
from executor.service.execute import BARRED_S, Executor, Policy
from executor.service.health_board import HealthBoard
from executor.service.notifications import Notifications
from executor.service.poller import IDLE_S, Poller
from executor.service.ports import Channel, Due, Event, Waiting
from kernel.clock import FixedClock
from kernel.errors import FailedPrecondition, Unavailable
from kernel.errors import NotFound as NotFoundError
from kernel.money import Money
from kernel.state_table import TransitionRefused

S = 1_000_000_000
ORDER = ExecuteOrder("ORD-1", "CHCKT-1", "SELL-1", Money("USD", 7500))
POLICY = Policy(unknown_schedule_s=[2, 5, 60], accepted_schedule_s=[900, 3600], sending_grace_s=30)
DONE = Accepted("pi_1", "http://pay/pi_1", NotificationKind.ORDER_PENDING)
PAID = Accepted("pi_1", "http://pay/pi_1", NotificationKind.ORDER_SUCCEEDED, Money("USD", 7500))


class FakeStore:
    """The store's rules in a dictionary."""

    def __init__(self) -> None:
        self.rows: dict[tuple[AttemptKind, str], tuple[Attempt, Command]] = {}
        self.events: list[Event] = []
        self.health: dict[str, Health] = {}
        self.psps_begun: list[str] = []

    async def begin(self, command: Command, psp: str, now_ns: int, next_ns: int, traceparent: str) -> Attempt:
        match command:
            case ExecuteOrder():
                key = (AttemptKind.ORDER, command.payment_order_id)
            case ExecuteRefund():
                key = (AttemptKind.REFUND, command.refund_id)
            case ExecutePayout():
                key = (AttemptKind.PAYOUT, command.reference)
        stored = self.rows.get(key)
        if stored is None:
            attempt = Attempt(*key, psp, AttemptState.SENDING, create_time_ns=now_ns, update_time_ns=now_ns)
            attempt.next_poll_time_ns = next_ns
            self.rows[key] = (attempt, command)
            return replace(attempt, is_new=True)
        attempt = stored[0]
        if attempt.state is AttemptState.SENDING:
            attempt.call_count += 1
        return replace(attempt)

    async def finish(self, attempt: Attempt, expected: AttemptState, events: Sequence[Event], traceparent: str) -> bool:
        key = (attempt.kind, attempt.reference)
        stored, command = self.rows[key]
        if stored.state is not expected or stored.psp != attempt.psp:
            return False
        self.rows[key] = (replace(attempt, cancel_requested=stored.cancel_requested, is_new=False), command)
        self.events += events
        return True

    async def reroute(self, attempt: Attempt, psp: str, now_ns: int) -> bool:
        stored, _ = self.rows[attempt.kind, attempt.reference]
        if stored.state is not AttemptState.SENDING or stored.psp != attempt.psp:
            return False
        stored.psp, stored.call_count = psp, stored.call_count + 1
        return True

    async def load(self, kind: AttemptKind, reference: str) -> Due | None:
        stored = self.rows.get((kind, reference))
        return None if stored is None else Due(replace(stored[0]), stored[1])

    async def claim_due(self, now_ns: int, lease_until_ns: int, count_max: int) -> tuple[list[Due], int]:
        due = []
        for attempt, command in self.rows.values():
            if attempt.next_poll_time_ns and attempt.next_poll_time_ns <= now_ns and len(due) < count_max:
                attempt.next_poll_time_ns = lease_until_ns
                due.append(Due(replace(attempt), command))
        times = [attempt.next_poll_time_ns for attempt, _ in self.rows.values() if attempt.next_poll_time_ns]
        return due, min(times, default=0)

    async def hasten(self, waiting: Sequence[Waiting], now_ns: int) -> None:
        for kind, reference, time_ns in waiting:
            attempt, _ = self.rows[kind, reference]
            if attempt.next_poll_time_ns == time_ns:
                attempt.next_poll_time_ns = now_ns

    async def settle(self, references: Sequence[tuple[AttemptKind, str]], now_ns: int) -> None:
        for key in references:
            if key in self.rows and self.rows[key][0].state is AttemptState.ACCEPTED:
                self.rows[key][0].next_poll_time_ns = 0

    async def request_cancel(self, payment_order_id: str, now_ns: int) -> Due | None:
        stored = self.rows.get((AttemptKind.ORDER, payment_order_id))
        if stored is None:
            return None
        stored[0].cancel_requested = True
        return Due(replace(stored[0]), stored[1])

    async def load_health(self) -> dict[str, Health]:
        return dict(self.health)

    async def save_health(self, psp: str, health: Health, now_ns: int) -> None:
        self.health[psp] = health


class FakePsp:
    """Answers what the test has written down, in order; the last one repeats."""

    def __init__(self, name: str = "a", *, weight: int = 1, lacks: Sequence[Capability] = ()) -> None:
        self.provider = Provider(name, frozenset(set(Capability) - set(lacks)), weight=weight)
        self.answers: dict[str, list[Answer]] = {"query": [NotFound()]}
        self.calls: list[str] = []

    def says(self, call: str, *answers: Answer) -> FakePsp:
        self.answers[call] = list(answers)
        return self

    async def _answer(self, call: str) -> Answer:
        self.calls.append(call)
        answers = self.answers[call]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def register_order(self, order: ExecuteOrder) -> Answer:
        return await self._answer("register")

    async def query_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        return await self._answer("query")

    async def cancel_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        return await self._answer("cancel")

    async def refund(self, refund: ExecuteRefund) -> Answer:
        return await self._answer("refund")

    async def query_refund(self, refund_id: str, psp_object_id: str) -> Answer:
        return await self._answer("query")

    async def payout(self, payout: PayoutInstruction) -> Answer:
        return await self._answer("payout")

    async def query_payout(self, reference: str, psp_object_id: str) -> Answer:
        return await self._answer("query")

    def verify(self, headers: Any, body: bytes, channel: Channel, now_s: int) -> None:
        return None

    def translate(self, body: bytes, channel: Channel) -> Any:
        return self.told

    async def close(self) -> None: ...


class FakeInstructions:
    def __init__(self) -> None:
        self.sendable = True

    async def read(self, reference: str) -> PayoutInstruction:
        if reference == "PO-none":
            raise NotFoundError("no such payout")
        return PayoutInstruction(reference, Money("USD", 750), Recipient("Jane", "US"), "work", sendable=self.sendable)


class World:
    def __init__(self, *psps: FakePsp) -> None:
        self.store = FakeStore()
        self.clock = FixedClock()
        self.instructions = FakeInstructions()
        self.woken: list[int] = []
        self.failures: list[BaseException] = []
        adapters: dict[str, Any] = {psp.provider.name: psp for psp in psps}
        self.health = HealthBoard(self.store, self.clock)
        self.executor = Executor(
            self.store, adapters, self.instructions, self.health, self.clock, POLICY, self.woken.append
        )
        self.notifications = Notifications(self.store, adapters, self.clock)
        self.poller = Poller(
            self.store,
            self.health,
            self.clock,
            self.executor.resume,
            lambda due, error, count: self.failures.append(error),
        )

    async def poll_after(self, seconds: float) -> None:
        self.clock.advance(seconds=seconds)
        await self.poller.poll_once()
        assert not self.failures, self.failures

    def row(self, reference: str = "ORD-1", kind: AttemptKind = AttemptKind.ORDER) -> Attempt:
        return self.store.rows[(kind, reference)][0]

    def told(self) -> list[str]:
        return [event.kind for event in self.store.events]

    def due_in_s(self, reference: str = "ORD-1", kind: AttemptKind = AttemptKind.ORDER) -> float | None:
        time_ns = self.row(reference, kind).next_poll_time_ns
        return (time_ns - self.clock.now_ns()) / S if time_ns else None


class TestOrders:
    async def test_registered(self) -> None:
        world = World(FakePsp().says("register", DONE))
        attempt = await world.executor.execute(ORDER)
        assert (attempt.state, attempt.psp_object_id) == (AttemptState.ACCEPTED, "pi_1")
        (event,) = world.store.events
        assert event.kind == "order_registered"
        assert event.fields == {
            "payment_order_id": "ORD-1", "psp": "a", "psp_token": "pi_1", "hosted_page_url": "http://pay/pi_1",
        }  # fmt: skip
        assert world.due_in_s() == 900

    @pytest.mark.parametrize("answer", [Accepted("i" * 256, "http://pay"), Accepted("pi_1", "http://" + "p" * 2_042)])
    async def test_an_answer_beyond_its_limits_is_malformed_and_nobody_knows_the_outcome(
        self, answer: Accepted
    ) -> None:
        """Risk: a payment that no list can show, or an order that is failed while the PSP has it."""
        world = World(FakePsp().says("register", answer).says("query", DONE))
        attempt = await world.executor.execute(ORDER)
        assert (attempt.state, attempt.psp_object_id, attempt.hosted_page_url) == (AttemptState.UNKNOWN, "", "")
        assert "malformed" in attempt.reason
        assert world.store.events == []

    async def test_what_is_just_within_its_limits_is_taken(self) -> None:
        world = World(FakePsp().says("register", Accepted("i" * 255, "http://" + "p" * 2_041)))
        assert (await world.executor.execute(ORDER)).state is AttemptState.ACCEPTED

    async def test_redelivered_after_the_end_calls_nobody(self) -> None:
        psp = FakePsp().says("register", DONE)
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.executor.execute(ORDER)
        assert psp.calls == ["register"]
        assert world.told() == ["order_registered"]

    async def test_redelivered_after_a_crash_calls_the_same_psp_again(self) -> None:
        a, b = FakePsp("a").says("register", DONE), FakePsp("b").says("register", DONE)
        world = World(a, b)
        await world.store.begin(ORDER, "b", world.clock.now_ns(), 1, "")
        attempt = await world.executor.execute(ORDER)
        assert (attempt.psp, attempt.call_count, a.calls, b.calls) == ("b", 2, [], ["query", "register"])

    async def test_redelivered_after_a_crash_is_not_sent_again_where_the_psp_has_it(self) -> None:
        """However late: the PSP may have forgotten the idempotency key, and a payout would be paid twice."""
        psp = FakePsp().says("register", DONE).says("payout", Accepted("po_2")).says("query", Accepted("po_1"))
        world = World(psp)
        for command in (ORDER, ExecutePayout("PO-1"), ExecuteRefund("REF-1", "ORD-1", "a", "pi_1", Money("USD", 1))):
            await world.store.begin(command, "a", world.clock.now_ns(), 1, "")
            world.clock.advance(seconds=3 * 86_400)
            attempt = await world.executor.execute(command)
            assert (attempt.state, attempt.psp_object_id) == (AttemptState.ACCEPTED, "po_1")
        assert psp.calls == ["query"] * 3

    async def test_redelivered_after_a_crash_is_not_sent_again_where_the_psp_does_not_say(self) -> None:
        psp = FakePsp().says("query", NoAnswer("timeout"))
        world = World(psp)
        await world.store.begin(ORDER, "a", world.clock.now_ns(), 1, "")
        assert (await world.executor.execute(ORDER)).state is AttemptState.UNKNOWN
        assert psp.calls == ["query"]

    async def test_rejected(self) -> None:
        world = World(FakePsp().says("register", Rejected("card_declined", "no")))
        attempt = await world.executor.execute(ORDER)
        assert attempt.state is AttemptState.REJECTED
        assert world.store.events[0].fields["code"] == "card_declined"
        assert world.due_in_s() is None

    async def test_nobody_takes_it(self) -> None:
        world = World(FakePsp())
        await world.executor.execute(replace(ORDER, psp="nobody"))
        assert world.told() == ["order_rejected"]
        assert "nobody" in str(world.store.events[0].fields["reason"])

    async def test_paid_already_when_the_answer_comes_late(self) -> None:
        world = World(FakePsp().says("register", PAID))
        await world.executor.execute(ORDER)
        assert world.told() == ["order_registered", "outcome_found"]
        assert world.due_in_s() is None


class TestUnknown:
    async def test_polled_on_schedule_until_it_is_known(self) -> None:
        psp = FakePsp().says("register", NoAnswer("timeout")).says("query", NoAnswer("timeout"))
        world = World(psp)
        assert (await world.executor.execute(ORDER)).state is AttemptState.UNKNOWN
        assert world.told() == []
        waits = []
        for _ in range(4):
            wait_s = world.due_in_s()
            assert wait_s is not None
            waits.append(wait_s)
            world.health._health.clear()  # the circuit has its own tests
            await world.poll_after(wait_s)
        assert waits == [2, 5, 60, 60]
        psp.says("query", DONE)
        world.health._health.clear()
        await world.poll_after(60)
        assert world.told() == ["order_registered"]
        assert world.row().state is AttemptState.ACCEPTED
        assert world.due_in_s() == 900

    async def test_never_seen_by_the_psp_is_sent_again(self) -> None:
        psp = FakePsp().says("register", NoAnswer("timeout"), DONE).says("query", NotFound())
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.poll_after(2)
        assert psp.calls == ["register", "query", "register"]
        assert world.row().call_count == 2
        assert world.told() == ["order_registered"]

    async def test_found_and_paid_tells_both(self) -> None:
        world = World(FakePsp().says("register", NoAnswer("timeout")).says("query", PAID))
        await world.executor.execute(ORDER)
        await world.poll_after(2)
        assert world.told() == ["order_registered", "outcome_found"]
        assert world.store.events[1].fields["kind"] == "order_succeeded"
        assert world.store.events[1].fields["amount"] == Money("USD", 7500)

    async def test_a_command_from_the_feed_is_not_sent_while_the_bus_has_it_sent(self) -> None:
        """Both bring it at once: whoever began sends it, and after its death the poller does."""
        psp = FakePsp().says("register", DONE)
        world = World(psp)
        await world.store.begin(ORDER, "a", world.clock.now_ns(), world.clock.now_ns() + 30 * S, "")
        attempt = await world.executor.execute(ORDER, takes_over=False)
        assert (attempt.state, psp.calls) == (AttemptState.SENDING, [])
        await world.poll_after(30)
        assert psp.calls == ["query", "register"]

    async def test_a_command_that_only_the_feed_has_is_sent(self) -> None:
        psp = FakePsp().says("register", DONE)
        assert (await World(psp).executor.execute(ORDER, takes_over=False)).state is AttemptState.ACCEPTED
        assert psp.calls == ["register"]

    async def test_a_redelivered_command_leaves_it_to_the_poller(self) -> None:
        psp = FakePsp().says("register", NoAnswer("timeout"))
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.executor.execute(ORDER)
        assert psp.calls == ["register"]

    async def test_a_psp_that_cannot_be_asked_is_sent_the_same_again(self) -> None:
        psp = FakePsp(lacks=[Capability.QUERY]).says("register", NoAnswer("timeout"), DONE)
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.poll_after(2)
        assert psp.calls == ["register", "register"]
        assert world.row().state is AttemptState.ACCEPTED

    async def test_an_abandoned_sending_is_found_by_the_poller(self) -> None:
        psp = FakePsp().says("register", DONE)
        world = World(psp)
        await world.store.begin(ORDER, "a", world.clock.now_ns(), world.clock.now_ns() + 30 * S, "")
        await world.poll_after(29)
        assert psp.calls == []
        await world.poll_after(1)
        assert psp.calls == ["query", "register"]
        assert world.told() == ["order_registered"]

    async def test_what_may_have_been_sent_to_a_psp_that_left_the_settings_is_not_refused(self) -> None:
        """Its hold would be released while the PSP pays."""
        world = World(FakePsp())
        await world.store.begin(ExecutePayout("PO-1"), "gone", world.clock.now_ns(), world.clock.now_ns() + 30 * S, "")
        await world.poll_after(30)
        assert world.row("PO-1", AttemptKind.PAYOUT).state is AttemptState.UNKNOWN
        assert world.told() == []

    async def test_nobody_took_it_and_the_process_died_before_it_said_so(self) -> None:
        world = World(FakePsp())
        await world.store.begin(replace(ORDER, psp="nobody"), "", world.clock.now_ns(), 1, "")
        await world.executor.execute(replace(ORDER, psp="nobody"))
        assert world.told() == ["order_rejected"]

    async def test_an_abandoned_payout_is_found_by_the_poller_and_not_sent_again(self) -> None:
        psp = FakePsp().says("query", Accepted("po_1"))
        world = World(psp)
        await world.store.begin(ExecutePayout("PO-1"), "a", world.clock.now_ns(), world.clock.now_ns() + 30 * S, "")
        await world.poll_after(3 * 86_400)
        assert psp.calls == ["query"]
        assert world.told() == ["payout_submitted"]

    async def test_a_psp_that_contradicts_itself_is_seen(self) -> None:
        psp = FakePsp().says("register", DONE)
        world = World(psp)
        attempt = await world.executor.execute(ORDER)
        with pytest.raises(TransitionRefused):
            await world.executor._conclude(attempt, ORDER, Rejected("x", "y"))

    async def test_two_executors_tell_once(self) -> None:
        world = World(FakePsp().says("register", DONE))
        slow = await world.store.begin(ORDER, "a", world.clock.now_ns(), 1, "")
        await world.executor.execute(ORDER)
        await world.executor._conclude(slow, ORDER, NoAnswer("timeout"))
        await world.executor._conclude(slow, ORDER, DONE)
        assert world.told() == ["order_registered"]
        assert world.row().state is AttemptState.ACCEPTED

    @pytest.mark.parametrize("late", [Rejected("x", "no"), NoAnswer("timeout"), DONE])
    async def test_a_late_answer_of_the_psp_before_says_nothing_of_the_one_that_has_it_now(self, late: Answer) -> None:
        world = World(FakePsp("a"), FakePsp("b"))
        here = await world.store.begin(ORDER, "a", world.clock.now_ns(), 1, "")
        elsewhere = await world.store.begin(ORDER, "a", world.clock.now_ns(), 1, "")
        assert await world.store.reroute(here, "b", world.clock.now_ns())
        after = await world.executor._conclude(elsewhere, ORDER, late)
        assert (after.psp, after.state, world.told()) == ("b", AttemptState.SENDING, [])
        await world.executor._conclude(replace(here, psp="b"), ORDER, DONE)
        assert (world.row().psp, world.row().state, world.told()) == ("b", AttemptState.ACCEPTED, ["order_registered"])


class TestNotSent:
    async def test_tried_again_on_schedule(self) -> None:
        psp = FakePsp().says("register", NotSent("refused"), NotSent("refused"), DONE)
        world = World(psp)
        attempt = await world.executor.execute(ORDER)
        assert attempt.state is AttemptState.SENDING
        assert world.due_in_s() == 2
        await world.poll_after(2)
        assert world.due_in_s() == 5
        await world.poll_after(5)
        assert world.told() == ["order_registered"]

    async def test_waits_as_long_as_the_psp_says(self) -> None:
        world = World(FakePsp().says("register", NotSent("slow down", 77, throttled=True)))
        await world.executor.execute(ORDER)
        assert world.due_in_s() == 77
        assert world.health.of("a").failure_count == 0

    async def test_the_next_psp_takes_a_first_call_that_never_left(self) -> None:
        a, b = FakePsp("a").says("register", NotSent("refused")), FakePsp("b").says("register", DONE)
        world = World(a, b)
        for number in range(8):
            attempt = await world.executor.execute(replace(ORDER, payment_order_id=f"ORD-{number}"))
            assert (attempt.state, attempt.psp) == (AttemptState.ACCEPTED, "b")
        assert a.calls

    async def test_the_next_psp_after_a_refusal_and_the_last_refusal_counts(self) -> None:
        a, b = FakePsp("a").says("register", Rejected("x", "a")), FakePsp("b").says("register", Rejected("x", "b"))
        world = World(a, b)
        attempt = await world.executor.execute(ORDER)
        assert (a.calls, b.calls) == (["register"], ["register"])
        assert world.store.events[0].fields["psp"] == attempt.psp

    async def test_never_another_psp_after_no_answer(self) -> None:
        a, b = FakePsp("a", weight=1000).says("register", NoAnswer("timeout")), FakePsp("b")
        world = World(a, b)
        attempt = await world.executor.execute(ORDER)
        assert (attempt.psp, attempt.state, b.calls) == ("a", AttemptState.UNKNOWN, [])

    async def test_never_another_psp_than_the_requested(self) -> None:
        a, b = FakePsp("a").says("register", NotSent("refused")), FakePsp("b")
        world = World(a, b)
        await world.executor.execute(replace(ORDER, psp="a"))
        assert b.calls == []

    async def test_never_another_psp_when_it_may_have_been_called_before(self) -> None:
        a, b = FakePsp("a").says("register", NotSent("refused")), FakePsp("b")
        world = World(a, b)
        await world.store.begin(ORDER, "a", world.clock.now_ns(), 1, "")  # a process that died, nobody knows where
        await world.executor.execute(ORDER)
        assert b.calls == []


class TestCircuit:
    async def test_opens_waits_and_recovers(self) -> None:
        psp = FakePsp().says("register", NotSent("refused"))
        world = World(psp)
        for number in range(FAILURE_COUNT_OPEN + 3):
            await world.executor.execute(replace(ORDER, payment_order_id=f"ORD-{number}"))
        assert len(psp.calls) == FAILURE_COUNT_OPEN
        assert world.health.unhealthy(["a"]) == {"a"}
        assert world.store.health["a"].failure_count == FAILURE_COUNT_OPEN
        psp.says("register", DONE)
        await world.poll_after(OPEN_S)
        assert world.health.unhealthy(["a"]) == frozenset()
        assert len(world.told()) == FAILURE_COUNT_OPEN + 3

    @pytest.mark.parametrize("answer", [NotSent("refused"), NoAnswer("timeout")], ids=["not sent", "unknown"])
    async def test_after_a_long_outage_nobody_waits_for_a_step_of_the_schedule(self, answer: Answer) -> None:
        psp = FakePsp().says("register", answer).says("query", answer)
        world = World(psp)
        count = FAILURE_COUNT_OPEN + 20
        for number in range(count):
            await world.executor.execute(replace(ORDER, payment_order_id=f"ORD-{number}"))
        for _ in range(90):
            await world.poll_after(60)
        assert len(psp.calls) < 90 + 2 * FAILURE_COUNT_OPEN, "one at a time finds out"
        assert world.told() == []
        psp.says("register", DONE).says("query", DONE)
        await world.poll_after(OPEN_S_MAX)
        assert len(world.told()) == count

    async def test_one_that_is_put_off_while_the_psp_comes_back_is_tried_at_once(self) -> None:
        psp = FakePsp().says("register", DONE)
        world = World(psp)
        down = Health(FAILURE_COUNT_OPEN, world.clock.now_ns() + 60 * S)
        world.store.health["a"] = down
        await world.health.refresh()
        finish = world.store.finish

        async def finish_late(*args: Any) -> bool:
            await world.health.record("a", DONE)
            return await finish(*args)

        world.store.finish = finish_late  # type: ignore[method-assign]
        await world.executor.execute(ORDER)
        assert world.told() == []
        assert world.clock.now_ns() in world.woken
        await world.poll_after(0)
        assert world.told() == ["order_registered"]

    async def test_what_another_executor_found_out_makes_them_due(self) -> None:
        world = World(FakePsp().says("register", DONE))
        world.store.health["a"] = Health(FAILURE_COUNT_OPEN, world.clock.now_ns() + 60 * S)
        await world.health.refresh()
        await world.executor.execute(ORDER)
        await world.poll_after(1)
        assert world.told() == []
        world.store.health["a"] = CLOSED
        await world.health.refresh()
        await world.poll_after(0)
        assert world.told() == ["order_registered"]

    async def test_one_that_somebody_has_in_hand_is_left_to_him(self) -> None:
        world = World(FakePsp().says("register", DONE))
        world.store.health["a"] = Health(FAILURE_COUNT_OPEN, world.clock.now_ns() + 60 * S)
        await world.health.refresh()
        await world.executor.execute(ORDER)
        world.row().next_poll_time_ns = lease_ns = world.clock.now_ns() + 55 * S
        await world.health.record("a", DONE)
        await world.poll_after(1)
        assert world.row().next_poll_time_ns == lease_ns

    async def test_one_that_never_left_looks_for_itself_where_nobody_else_asks(self) -> None:
        world = World(FakePsp().says("register", NotSent("refused")))
        for number in range(FAILURE_COUNT_OPEN + 1):
            await world.executor.execute(replace(ORDER, payment_order_id=f"ORD-{number}"))
        for _ in range(200):
            await world.poll_after(60)
            wait_s = world.due_in_s(f"ORD-{FAILURE_COUNT_OPEN}")
            assert wait_s is not None
            assert wait_s <= BARRED_S

    async def test_a_refusal_is_a_sign_of_life(self) -> None:
        psp = FakePsp().says("register", NotSent("refused"), Rejected("x", "y"))
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.executor.execute(replace(ORDER, payment_order_id="ORD-2"))
        assert world.health.of("a").failure_count == 0

    async def test_others_are_preferred(self) -> None:
        a, b = FakePsp("a", weight=1000), FakePsp("b").says("register", DONE)
        world = World(a, b)
        world.store.health["a"] = Health(FAILURE_COUNT_OPEN, world.clock.now_ns() + S)
        await world.health.refresh()
        assert (await world.executor.execute(ORDER)).psp == "b"
        assert a.calls == []


class TestPoller:
    async def test_attempts_that_meet_the_same_error_are_told_in_one_line(self) -> None:
        world = World(FakePsp().says("payout", NoAnswer("timeout")).says("query", NotFound()))
        for number in range(40):
            await world.executor.execute(ExecutePayout(f"PO-{number}"))
        told: list[tuple[str, str, int]] = []

        async def fails(due: Due) -> Attempt:
            raise Unavailable("payment does not answer" if due.attempt.reference != "PO-7" else "another")

        poller = Poller(
            world.store,
            world.health,
            world.clock,
            fails,
            lambda due, error, count: told.append((due.attempt.reference, str(error), count)),
        )
        world.clock.advance(seconds=OPEN_S_MAX)
        await poller.poll_once()
        assert told == [("PO-0", "payment does not answer", 39), ("PO-7", "another", 1)]

    async def test_what_becomes_due_while_it_polls_is_not_slept_through(self) -> None:
        world = World(FakePsp())
        claim_due, polls, told = world.store.claim_due, asyncio.Queue[int](), list[bool]()

        async def claim_and_be_told(now_ns: int, lease_until_ns: int, count_max: int) -> tuple[list[Due], int]:
            claimed = await claim_due(now_ns, lease_until_ns, count_max)
            if not told:
                told.append(True)
                world.poller.wake(now_ns)
            polls.put_nowait(now_ns)
            return claimed

        world.store.claim_due = claim_and_be_told  # type: ignore[method-assign]
        running = asyncio.create_task(world.poller.run())
        async with asyncio.timeout(IDLE_S / 2):
            for _ in range(2):
                await polls.get()
        running.cancel()


class TestCancel:
    async def test_at_once(self) -> None:
        canceled = Accepted("pi_1", kind=NotificationKind.ORDER_CANCELED)
        world = World(FakePsp().says("register", DONE).says("cancel", canceled))
        await world.executor.execute(ORDER)
        await world.executor.cancel(CancelOrder("ORD-1"))
        assert world.told() == ["order_registered", "outcome_found"]
        assert world.store.events[1].fields["kind"] == "order_canceled"

    async def test_unanswered_is_asked_again_soon(self) -> None:
        canceled = Accepted("pi_1", kind=NotificationKind.ORDER_CANCELED)
        psp = FakePsp().says("register", DONE).says("cancel", NoAnswer("timeout"), canceled)
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.executor.cancel(CancelOrder("ORD-1"))
        wait_s = world.due_in_s()
        assert wait_s is not None
        assert wait_s <= 5
        await world.poll_after(wait_s)
        assert world.told()[-1] == "outcome_found"

    async def test_nothing_was_ever_sent(self) -> None:
        assert await World(FakePsp()).executor.cancel(CancelOrder("ORD-1")) is None


class TestPayoutsAndRefunds:
    async def test_payout_outcomes(self) -> None:
        submitted = Accepted("po_1")
        for answer, told in (
            (submitted, ["payout_submitted"]),
            (Rejected("sanctions_match", "no", compliance=True), ["payout_rejected"]),
            (NoAnswer("timeout"), []),
        ):
            world = World(FakePsp().says("payout", answer).says("query", submitted))
            await world.executor.execute(ExecutePayout("PO-1"))
            assert world.told() == told
            if told == ["payout_rejected"]:
                assert world.store.events[0].fields["compliance"] is True
            if not told:
                await world.poll_after(2)
                assert world.told() == ["payout_submitted"]

    async def test_an_ended_payout_is_never_sent(self) -> None:
        psp = FakePsp()
        world = World(psp)
        world.instructions.sendable = False
        await world.executor.execute(ExecutePayout("PO-1"))
        assert psp.calls == []
        assert world.told() == []
        assert world.due_in_s("PO-1", AttemptKind.PAYOUT) is None

    async def test_an_unknown_payout_is_the_callers_mistake(self) -> None:
        with pytest.raises(NotFoundError):
            await World(FakePsp()).executor.execute(ExecutePayout("PO-none"))

    async def test_refund_goes_only_to_the_psp_that_has_the_payment(self) -> None:
        a, b = FakePsp("a", weight=1000), FakePsp("b").says("refund", Accepted("re_1"))
        world = World(a, b)
        await world.executor.execute(ExecuteRefund("REF-1", "ORD-1", "b", "pi_1", Money("USD", 1)))
        assert world.told() == ["refund_submitted"]
        assert a.calls == []


class TestWebhookNeverComes:
    async def test_asked_slowly_and_told(self) -> None:
        psp = FakePsp().says("register", DONE).says("query", DONE, PAID)
        world = World(psp)
        await world.executor.execute(ORDER)
        await world.poll_after(900)
        assert world.due_in_s() == 3600
        await world.poll_after(3600)
        assert world.told() == ["order_registered", "outcome_found"]
        assert world.due_in_s() is None

    async def test_a_webhook_that_came_spares_the_question(self) -> None:
        from executor.domain.outcome import Notification

        psp = FakePsp().says("register", DONE)
        psp.told = [Notification("evt_1", NotificationKind.ORDER_SUCCEEDED, "pi_1", "ORD-1", "x")]
        world = World(psp)
        await world.executor.execute(ORDER)
        world.notifications.verify("a", {}, b"", Channel.PAYMENT)
        await world.notifications.flush()
        assert world.due_in_s() is None

    async def test_a_reference_that_cannot_be_stored_spoils_no_group(self) -> None:
        """It was tried again each second for ever, and nothing else was noted any more."""
        from executor.domain.outcome import Notification

        psp = FakePsp()
        psp.told = [
            Notification(f"evt_{number}", NotificationKind.ORDER_SUCCEEDED, "pi_1", reference, "x")
            for number, reference in enumerate(["a\0b", "x" * 129, "ORD-1"])
        ]
        world = World(psp)
        noted: list[Any] = []

        async def settle(references: Sequence[tuple[AttemptKind, str]], now_ns: int) -> None:
            noted.extend(references)

        world.store.settle = settle  # type: ignore[method-assign]
        world.notifications.verify("a", {}, b"", Channel.PAYMENT)
        await world.notifications.flush()
        assert noted == [(AttemptKind.ORDER, "ORD-1")]

    async def test_an_unknown_psp_is_not_found(self) -> None:
        with pytest.raises(NotFoundError) as unknown:
            World(FakePsp()).notifications.verify("b", {}, b"", Channel.PAYMENT)
        assert unknown.value.reason == "PROVIDER_UNKNOWN"


class TestQuery:
    async def test_refresh_asks(self) -> None:
        world = World(FakePsp().says("register", DONE).says("query", PAID))
        await world.executor.execute(ORDER)
        await world.executor.query(AttemptKind.ORDER, "ORD-1", refresh=False)
        assert world.told() == ["order_registered"]
        await world.executor.query(AttemptKind.ORDER, "ORD-1", refresh=True)
        assert world.told() == ["order_registered", "outcome_found"]

    async def test_errors(self) -> None:
        world = World(FakePsp(lacks=[Capability.QUERY]).says("register", DONE))
        with pytest.raises(NotFoundError):
            await world.executor.query(AttemptKind.ORDER, "ORD-1", refresh=False)
        await world.executor.execute(ORDER)
        with pytest.raises(FailedPrecondition):
            await world.executor.query(AttemptKind.ORDER, "ORD-1", refresh=True)


async def test_one_attempt_that_fails_does_not_stop_the_others() -> None:
    psp = FakePsp().says("register", NotSent("refused"))
    world = World(psp, FakePsp("b", lacks=list(Capability)))
    for number in range(2):
        await world.executor.execute(replace(ORDER, payment_order_id=f"ORD-{number}"))
    calls = 0

    async def register(order: ExecuteOrder) -> Answer:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a bug")
        return DONE

    psp.register_order = register  # type: ignore[method-assign]
    world.clock.advance(seconds=2)
    await world.poller.poll_once()
    assert len(world.failures) == 1
    assert world.told() == ["order_registered"]


def test_the_base_adapter_is_an_adapter() -> None:
    from executor.service.ports import PspAdapter

    missing = [name for name in vars(PspAdapter) if not name.startswith("_") and not hasattr(PspBase, name)]
    assert missing == []
