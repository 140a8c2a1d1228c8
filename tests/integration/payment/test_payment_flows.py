"""Pay-ins over a real database: idempotency, concurrency, replays, webhooks in any order, expiry, cancel, reads."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kernel.errors import AlreadyExists, InvalidArgument, NotFound
from kernel.ids import derived_event_id
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payment_order import PaymentOrderState
from payment.domain.reports import OrderRegistered, OrderRejected, OutcomeFound
from payment.domain.requests import OrderSpec
from payment.service.payments import Payments
from payment.service.ports import PaymentFilter, PspObjectTaken
from runtime.outbox import OutboxRelay
from runtime.postgres import create_pool
from tests.integration.payment.conftest import FakeBus, Service, checkout, paid

S, K = PaymentOrderState, NotificationKind


async def states(service: Service, checkout_id: str = "CH-1") -> list[PaymentOrderState]:
    return [order.state for order in (await service.payments.get(checkout_id)).orders]


# --- the whole way


async def test_two_orders_paid_end_to_end(service: Service) -> None:
    created, replayed = await service.payments.create(checkout(("A", 7500), ("B", 2500)), "00-" + "a" * 32 + "-0-01")
    assert not replayed
    assert await service.payments.get("CH-1") == created
    commands = await service.outbox()
    assert [(topic, each.execute_order.payment_order_id) for topic, each in commands] == [
        ("payment.commands", "A"),
        ("payment.commands", "B"),
    ]
    assert commands[0][1].execute_order.amount.amount_minor == 7500
    assert commands[0][1].execute_order.buyer_email == "jane@example.com"
    await service.pool.execute("DELETE FROM payment.outbox")

    await service.register("A", "B")
    assert await states(service) == [S.EXECUTING, S.EXECUTING]
    assert (await service.payments.get("CH-1")).orders[1].hosted_page_url == "http://pay/B"
    assert await service.said() == []

    service.clock.advance(seconds=5)
    assert (await service.tell(paid("A", 7500))).applied == 1
    assert not (await service.payments.get("CH-1")).is_done
    assert (await service.tell(paid("B", 2500))).applied == 1
    payment = await service.payments.get("CH-1")
    assert payment.is_done
    assert [(change.state, change.cause) for change in payment.orders[0].history] == [
        (S.NOT_STARTED, "created"),
        (S.EXECUTING, "order_registered"),
        (S.SUCCESS, "notification evt_A (payment_intent.succeeded)"),
    ]
    events = await service.outbox()
    assert await service.said() == ["payment_order_succeeded", "payment_order_succeeded", "payment_completed"]
    first = events[0][1]
    assert first.event_id == derived_event_id("payment_order_succeeded", "A")
    assert first.traceparent == "00-" + "a" * 32 + "-0-01"
    assert first.occur_time.ToMilliseconds() == service.clock.now_ns() // 1_000_000
    body = first.payment_order_succeeded
    assert (body.checkout_id, body.seller_account, body.psp, body.psp_token) == ("CH-1", "SELL-A", "sandbox", "pi_A")
    assert (body.amount.currency_code, body.amount.amount_minor) == ("USD", 7500)


async def test_the_outbox_leaves_by_the_bus_in_order(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 2)))
    bus = FakeBus()
    relay = OutboxRelay(service.pool, "payment", bus)
    running = asyncio.ensure_future(relay.run())
    try:
        async with asyncio.timeout(60):
            await bus.holds(2)
            await service.register("A", "B")
            await service.tell(paid("A", 1), paid("B", 2))
            await bus.holds(5)
    finally:
        running.cancel()
    assert [(message.topic, message.key) for message in bus.published] == [
        ("payment.commands", "A"),
        ("payment.commands", "B"),
        ("payment.events", "CH-1"),
        ("payment.events", "CH-1"),
        ("payment.events", "CH-1"),
    ]


# --- create: idempotency and refusals


async def test_same_content_is_the_same_payment_and_other_content_a_mismatch(service: Service) -> None:
    first, _ = await service.payments.create(checkout(("A", 1)))
    service.clock.advance(seconds=60)
    again, replayed = await service.payments.create(checkout(("A", 1)))
    assert replayed
    assert again == first
    with pytest.raises(AlreadyExists) as caught:
        await service.payments.create(checkout(("A", 2)))
    assert caught.value.reason == "IDEMPOTENCY_MISMATCH"
    assert await service.said() == ["execute_order"]


async def test_a_replay_gets_its_answer_also_when_the_settings_have_changed(service: Service) -> None:
    """Risk: the PSP that a caller named leaves the settings, and a retry of an old checkout is called invalid."""
    request = checkout(("A", 1), ("B", 1))
    request = replace(request, orders=tuple(replace(order, psp="sandbox2") for order in request.orders))
    first, _ = await service.payments.create(request)
    later = Payments(
        service.store,
        service.changes,
        service.clock,
        providers={"sandbox": frozenset({"EUR"})},
        orders_max=1,
        expiry=timedelta(days=1),
    )
    assert await later.create(request) == (first, True)
    for other in (replace(request, checkout_id="CH-2"), replace(request, orders=request.orders[:1])):
        with pytest.raises(InvalidArgument):
            await later.create(other)


async def test_twenty_creates_at_once_store_one(service: Service) -> None:
    results = await asyncio.gather(
        *(service.payments.create(checkout(("A", 1), ("B", 2))) for _ in range(20)),
        *(service.payments.create(checkout(("A", 1), ("B", 3))) for _ in range(20)),
        return_exceptions=True,
    )
    good = [each for each in results if not isinstance(each, BaseException)]
    assert all(isinstance(each, AlreadyExists) for each in results if isinstance(each, BaseException))
    assert len(good) == 20
    assert [replayed for _, replayed in good].count(False) == 1
    assert await service.said() == ["execute_order", "execute_order"]


async def test_order_ids_of_another_checkout_store_nothing(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    with pytest.raises(InvalidArgument) as caught:
        await service.payments.create(checkout(("B", 1), ("A", 1), checkout_id="CH-2"))
    assert [each.field for each in caught.value.violations] == ["payment_orders[1].payment_order_id"]
    with pytest.raises(NotFound):
        await service.payments.get("CH-2")
    assert await service.said() == ["execute_order"]


async def test_used_ids_are_named_beside_the_other_violations(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    with pytest.raises(InvalidArgument) as caught:
        await service.payments.create(checkout(("A", 1), ("B", 0), checkout_id="CH-2"))
    assert [each.field for each in caught.value.violations] == [
        "payment_orders[1].amount.amount_minor",
        "payment_orders[0].payment_order_id",
    ]


async def test_checkouts_that_fight_for_the_same_order_ids_end_with_one_winner(service: Service) -> None:
    ids = [f"O{n}" for n in range(10)]
    requests = []
    for number in range(12):
        shuffled = random.Random(number).sample(ids, len(ids))
        requests.append(checkout(*((each, 1) for each in shuffled), checkout_id=f"CH-{number}"))
    results = await asyncio.gather(*map(service.payments.create, requests), return_exceptions=True)
    assert sum(not isinstance(each, BaseException) for each in results) == 1
    for each in results:
        if isinstance(each, BaseException):
            assert isinstance(each, InvalidArgument)
            assert len(each.violations) == 10
    assert await service.pool.fetchval("SELECT count(*) FROM payment.payment_event") == 1


# --- notifications


async def test_the_same_webhook_a_hundred_times_at_once_has_one_effect(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    await service.register("A")
    processes = [service, service.another(), service.another()]
    counts = await asyncio.gather(*(processes[n % 3].notifications.apply([paid("A", 1)]) for n in range(100)))
    assert sum(each.applied for each in counts) == 1
    assert sum(each.duplicate for each in counts) == 99
    assert await service.said() == ["execute_order", "payment_order_succeeded", "payment_completed"]


async def test_a_hundred_event_objects_for_one_change_have_one_effect(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    await service.register("A")
    processes = [service, service.another(), service.another()]
    counts = await asyncio.gather(
        *(processes[n % 3].notifications.apply([paid("A", 1, f"evt_{n}")]) for n in range(100))
    )
    assert sum(each.applied for each in counts) == 1
    assert sum(each.ignored for each in counts) == 99
    assert (await service.said()).count("payment_order_succeeded") == 1


async def test_forty_orders_that_end_at_once_complete_the_payment_once(service: Service) -> None:
    orders = [(f"O{n:02d}", 100 + n) for n in range(40)]
    await service.payments.create(checkout(*orders))
    await service.register(*(order_id for order_id, _ in orders))
    processes = [service.another() for _ in range(8)]
    await asyncio.gather(*(processes[n % 8].notifications.apply([paid(*order)]) for n, order in enumerate(orders)))
    assert (await service.payments.get("CH-1")).is_done
    said = await service.said()
    assert said.count("payment_completed") == 1
    assert said.count("payment_order_succeeded") == 40


async def test_batches_that_overlap_in_any_order_do_not_deadlock(service: Service) -> None:
    for number in range(6):
        await service.payments.create(checkout((f"O{number}", 100), (f"P{number}", 100), checkout_id=f"CH-{number}"))
    reports = [
        (f"m-{kind}{number}", OrderRegistered(f"{kind}{number}", "sandbox", f"pi_{kind}{number}", "http://x"))
        for number in range(6)
        for kind in "OP"
    ]
    done = [paid(f"{kind}{number}", 100) for number in range(6) for kind in "OP"]

    def shuffled(items: list[Any], seed: int) -> list[Any]:
        return random.Random(seed).sample(items, len(items))

    await asyncio.gather(
        *(service.reports.apply("executor.events", shuffled(reports, seed)) for seed in range(5)),
        *(service.another().notifications.apply(shuffled(done, seed)) for seed in range(5)),
    )
    for number in range(6):
        payment = await service.payments.get(f"CH-{number}")
        assert payment.is_done
        assert [order.psp_token for order in payment.orders] == [f"pi_O{number}", f"pi_P{number}"]
    said = await service.said()
    assert (said.count("payment_order_succeeded"), said.count("payment_completed")) == (12, 6)


async def test_webhook_before_the_registration_is_matched_by_our_reference(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    assert (await service.tell(paid("A", 1))).applied == 1
    await service.register("A")
    payment = await service.payments.get("CH-1")
    assert (payment.orders[0].state, payment.orders[0].psp_token, payment.is_done) == (S.SUCCESS, "pi_A", True)


async def test_webhook_of_an_unknown_intent_is_parked_and_applied_when_the_intent_becomes_known(
    service: Service,
) -> None:
    await service.payments.create(checkout(("A", 1)))
    early = paid("A", 1, merchant_reference="")
    assert (await service.tell(early)).ignored == 1
    assert [(outcome, subject) for outcome, _, subject in service.reported] == [(Outcome.PARKED, None)]
    assert await states(service) == [S.NOT_STARTED]
    await service.register("A")
    assert await states(service) == [S.SUCCESS]
    assert (await service.tell(early)).duplicate == 1
    assert (await service.said()).count("payment_order_succeeded") == 1


async def test_parked_notifications_are_tried_again_on_a_schedule(service: Service) -> None:
    early = paid("A", 1, event_id="evt_early")
    await service.tell(early)
    assert await service.notifications.retry_parked() == 0  # not due yet
    await service.payments.create(checkout(("A", 1)))
    service.clock.advance(seconds=61)
    await service.timers.run_once()
    assert await states(service) == [S.SUCCESS]
    row = await service.pool.fetchrow("SELECT outcome, attempt_count FROM payment.psp_notification")
    assert tuple(row) == (Outcome.APPLIED, 1)


async def test_parked_notifications_are_tried_less_and_less_often(service: Service) -> None:
    await service.tell(paid("NOBODY", 1))
    waits = []
    for _ in range(12):
        wait = await service.pool.fetchval("SELECT next_attempt_time FROM payment.psp_notification")
        now = datetime.fromtimestamp(service.clock.now_ns() / 1e9, UTC)
        waits.append(round((wait - now).total_seconds()))
        service.clock.advance(seconds=(wait - now).total_seconds() + 1)
        await service.notifications.retry_parked()
    assert waits[:4] == [60, 120, 240, 480]
    assert waits[-1] == 6 * 3600
    assert len(service.reported) == 13


@pytest.mark.parametrize("where", ["here", "another process"])
async def test_a_dispute_before_the_success_waits_for_it(service: Service, where: str) -> None:
    await service.payments.create(checkout(("A", 1)))
    await service.register("A")
    dispute = paid("A", 1, "evt_dispute", kind=K.DISPUTE_OPENED)
    assert (await service.tell(dispute)).ignored == 1
    if where == "here":  # the success itself wakes it
        await service.tell(paid("A", 1))
        while (worker := service.notifications._worker) is not None:
            await worker
    else:
        await service.another().tell(paid("A", 1))
        assert await states(service) == [S.SUCCESS]
        service.clock.advance(seconds=61)
        assert await service.notifications.retry_parked() == 1
    assert await states(service) == [S.DISPUTED]
    assert (await service.said())[-1] == "dispute_opened"
    won = paid("A", 1, "evt_won", kind=K.DISPUTE_WON)
    assert (await service.tell(won)).applied == 1
    assert (await service.tell(dispute)).duplicate == 1  # the table alone would open the dispute again
    assert await states(service) == [S.SUCCESS]


@pytest.mark.parametrize("first", [K.ORDER_FAILED, K.ORDER_CANCELED, K.ORDER_EXPIRED])
async def test_late_success_credits_and_completes_once(service: Service, first: NotificationKind) -> None:
    await service.payments.create(checkout(("A", 1)))
    await service.register("A")
    await service.tell(paid("A", 1, "evt_1", kind=first))
    assert (await service.payments.get("CH-1")).is_done
    await service.tell(paid("A", 1, "evt_2"))
    await service.tell(paid("A", 1, "evt_3", kind=first))
    assert await states(service) == [S.SUCCESS]
    assert (await service.payments.get("CH-1")).is_done
    assert await service.said() == [
        "execute_order",
        "payment_order_closed",
        "payment_completed",
        "payment_order_succeeded",
    ]


@pytest.mark.parametrize("wrong", [{"amount_minor": 99}, {"currency_code": "EUR"}])
async def test_a_wrong_amount_is_stored_flagged_and_not_credited(service: Service, wrong: dict[str, Any]) -> None:
    await service.payments.create(checkout(("A", 100)))
    await service.register("A")
    assert (await service.tell(replace(paid("A", 100, "evt_bad"), **wrong))).ignored == 1
    order = (await service.payments.get("CH-1")).orders[0]
    assert order.state is S.EXECUTING
    assert "not credited" in order.attention
    assert order.failure_reason == order.attention
    assert await service.said() == ["execute_order"]
    assert [outcome for outcome, *_ in service.reported] == [Outcome.FLAGGED]
    assert await service.pool.fetchval("SELECT outcome FROM payment.psp_notification") == Outcome.FLAGGED
    assert (await service.tell(replace(paid("A", 100, "evt_bad"), **wrong))).duplicate == 1
    assert (await service.tell(paid("A", 100))).applied == 1


async def assert_paid_by_another(service: Service, event_id: str) -> None:
    """B was not credited, an operator sees why, and the notification is stored as flagged."""
    order = (await service.payments.get("CH-1")).orders[1]
    assert (order.state in (S.NOT_STARTED, S.EXECUTING), order.attention) == (
        True,
        "sandbox says paid by pi_A, which is the payment of order A: not credited",
    )
    outcome, told, subject = service.reported[-1]
    assert (outcome, told.psp_event_id, subject.payment_order_id) == (Outcome.FLAGGED, event_id, "B")  # type: ignore[union-attr]
    assert (await service.said()).count("payment_order_succeeded") <= 1


@pytest.mark.parametrize("registered", [("A",), ("A", "B")])
async def test_a_success_by_the_payment_of_another_order_is_stored_flagged_and_not_credited(
    service: Service, registered: tuple[str, ...]
) -> None:
    """Risk: the unique index on the PSP's id answers such a webhook with 500, for ever."""
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    await service.register(*registered)
    wrong = paid("B", 1, "evt_wrong", psp_object_id="pi_A")
    assert (await service.tell(wrong)).ignored == 1
    await assert_paid_by_another(service, "evt_wrong")
    assert await service.pool.fetchval("SELECT outcome FROM payment.psp_notification") == Outcome.FLAGGED
    assert (await service.tell(wrong)).duplicate == 1
    assert (await service.tell(paid("A", 1), paid("B", 1))).applied == 2
    assert await states(service) == [S.SUCCESS, S.SUCCESS]


async def test_two_orders_that_one_payment_paid_in_one_call_credit_the_first(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    counts = await service.tell(paid("A", 1), paid("B", 1, psp_object_id="pi_A"))
    assert (counts.applied, counts.ignored) == (1, 1)
    await assert_paid_by_another(service, "evt_B")
    assert await states(service) == [S.SUCCESS, S.NOT_STARTED]


async def test_two_orders_that_one_payment_paid_at_the_same_moment_credit_one(service: Service) -> None:
    """Two processes that cannot see each other's decision: the index decides, the loser looks again."""
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    calls = [paid(order, 1, f"evt_{order}_{turn}", psp_object_id="pi_X") for turn in range(5) for order in ("A", "B")]
    processes = [service.another() for _ in calls]
    results = await asyncio.gather(
        *(each.notifications.apply([call]) for each, call in zip(processes, calls, strict=True))
    )
    assert sum(each.applied for each in results) == 1
    assert sorted(await states(service)) == [S.NOT_STARTED, S.SUCCESS]
    flagged = [what for each in processes for what in each.reported]
    assert len(flagged) == 5
    assert {outcome for outcome, *_ in flagged} == {Outcome.FLAGGED}


async def test_an_outcome_found_by_the_payment_of_another_order_is_flagged(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    await service.register("A")
    found = OutcomeFound(replace(paid("B", 1), psp_event_id="", psp_object_id="pi_A"))
    await service.reports.apply("executor.events", [("m1", found)])
    await assert_paid_by_another(service, "")


async def test_a_psp_that_registers_two_orders_under_one_id_is_an_error_with_the_id(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    await service.register("A")
    with pytest.raises(PspObjectTaken, match="pi_A"):
        await service.reports.apply("executor.events", [("m1", OrderRegistered("B", "sandbox", "pi_A", "http://x"))])


async def test_unknown_types_are_stored_and_change_nothing(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    odd = paid("A", 1, "evt_odd", kind=K.UNKNOWN)
    refund = paid("R-1", 1, "evt_refund", kind=K.REFUND_SUCCEEDED)
    assert (await service.tell(odd, refund, odd)).ignored == 2
    assert await states(service) == [S.NOT_STARTED]
    rows = await service.pool.fetch("SELECT psp_event_id, outcome FROM payment.psp_notification ORDER BY 1")
    assert [tuple(row) for row in rows] == [("evt_odd", Outcome.IGNORED), ("evt_refund", Outcome.PARKED)]


async def test_a_notification_without_an_id_is_refused(service: Service) -> None:
    with pytest.raises(InvalidArgument):
        await service.tell(Notification("sandbox", "", K.ORDER_SUCCEEDED))
    assert (await service.tell()).applied == 0


async def test_seeded_storms_of_duplicates_and_reorderings_end_the_same(service: Service) -> None:
    processes = [service, service.another(), service.another()]
    for seed in range(8):
        rng = random.Random(seed)
        ids = [f"S{seed}-{n}" for n in range(4)]
        await service.payments.create(checkout(*((each, 100) for each in ids), checkout_id=f"CH-{seed}"))
        steps: list[Any] = []
        for each in ids:
            steps += [("register", each)] * rng.randint(1, 3)
            steps += [paid(each, 100, f"evt_{each}_p", kind=K.ORDER_PENDING)]
            steps += [paid(each, 100, f"evt_{each}_{n}") for n in range(rng.randint(1, 3))]
            steps += [paid(each, 100, f"evt_{each}_f", kind=K.ORDER_FAILED)] * rng.randint(0, 2)
        rng.shuffle(steps)

        async def take(process: Service, step: Any) -> None:
            if isinstance(step, tuple):
                await process.register(step[1])
            else:
                await process.notifications.apply([step])

        await asyncio.gather(*(take(processes[n % 3], step) for n, step in enumerate(steps)))
        assert await states(service, f"CH-{seed}") == [S.SUCCESS] * 4, f"seed {seed}"
    said = await service.said()
    assert (said.count("payment_order_succeeded"), said.count("payment_completed")) == (32, 8)


async def test_calls_that_share_a_transaction_get_their_own_counts_and_their_own_failure(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    poison = replace(paid("A", 1, "evt_poison"), psp_type="\0")  # PostgreSQL cannot hold it
    calls = [[paid("A", 1)], [poison], [paid("B", 1), paid("A", 1)], [paid("NOBODY", 1)], [paid("B", 2, "evt_B2")]]
    results = await asyncio.gather(*map(service.notifications.apply, calls), return_exceptions=True)
    first, failed, third, unknown, wrong = results
    assert isinstance(failed, Exception)
    counted = [(each.applied, each.duplicate, each.ignored) for each in (first, third, unknown, wrong)]  # type: ignore[union-attr]
    assert counted == [(1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 0, 1)]
    assert await states(service) == [S.SUCCESS, S.SUCCESS]


async def test_a_caller_that_gave_up_does_not_spoil_the_others(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    first = asyncio.ensure_future(service.notifications.apply([paid("A", 1)]))
    second = asyncio.ensure_future(service.notifications.apply([paid("B", 1)]))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).applied == 1
    assert await states(service) == [S.SUCCESS, S.SUCCESS]


# --- reports of the executor


async def test_a_replay_of_the_bus_from_zero_changes_nothing(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 2)))
    batch = [
        ("m1", OrderRegistered("A", "sandbox", "pi_A", "http://x")),
        ("m2", OrderRejected("B", "sandbox", "declined", "no")),
    ]
    await service.reports.apply("executor.events", batch)
    before = (await service.payments.get("CH-1"), await service.said())
    for replay in (batch, batch[:1], batch[::-1], [*batch, *batch]):
        await service.reports.apply("executor.events", replay)
    assert (await service.payments.get("CH-1"), await service.said()) == before
    assert before[1][2:] == ["payment_order_closed"]


async def test_a_crash_before_the_commit_leaves_nothing_and_the_replay_does_it_all(service: Service) -> None:
    """The inbox row, the state and the outbox row stand or fall together."""
    await service.payments.create(checkout(("A", 1)))
    await service.pool.execute(
        "CREATE FUNCTION payment.crash() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'crash'; END $$;"
        "CREATE TRIGGER crash BEFORE INSERT ON payment.outbox EXECUTE FUNCTION payment.crash()"
    )
    reject = [("m1", OrderRejected("A", "sandbox", "declined", "no"))]
    with pytest.raises(Exception, match="crash"):
        await service.reports.apply("executor.events", reject)
    with pytest.raises(Exception, match="crash"):
        await service.notifications.apply([paid("A", 1)])
    with pytest.raises(Exception, match="crash"):
        await service.payments.create(checkout(("Z", 1), checkout_id="CH-Z"))
    assert await states(service) == [S.NOT_STARTED]
    assert await service.pool.fetchval("SELECT count(*) FROM payment.inbox") == 0
    assert await service.pool.fetchval("SELECT count(*) FROM payment.psp_notification") == 0
    assert await service.pool.fetchval("SELECT count(*) FROM payment.payment_event") == 1
    await service.pool.execute("DROP TRIGGER crash ON payment.outbox")
    await service.reports.apply("executor.events", reject)
    assert await states(service) == [S.FAILED]
    assert (await service.tell(paid("A", 1))).applied == 1
    assert await states(service) == [S.SUCCESS]


async def test_an_outcome_found_by_asking_counts_as_the_psp_saying_so(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    found = OutcomeFound(replace(paid("A", 1), psp_event_id=""))
    await service.reports.apply("executor.events", [("m1", found)])
    assert await states(service) == [S.SUCCESS]
    history = (await service.payments.get("CH-1")).orders[0].history
    assert history[-1].cause == "found at sandbox: order_succeeded"


async def test_an_outcome_that_contradicts_is_flagged(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    found = OutcomeFound(replace(paid("A", 2), psp_event_id=""))
    await service.reports.apply("executor.events", [("m1", found)])
    assert await states(service) == [S.NOT_STARTED]
    assert [outcome for outcome, *_ in service.reported] == [Outcome.FLAGGED]


async def test_a_report_about_nothing_of_ours_raises_and_blocks_nothing(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    stray = ("m1", OrderRegistered("STRAY", "sandbox", "pi_S", "http://x"))
    good = ("m2", OrderRegistered("A", "sandbox", "pi_A", "http://x"))
    with pytest.raises(NotFound):
        await service.reports.apply("executor.events", [stray, good])
    assert await states(service) == [S.NOT_STARTED]
    await service.reports.apply("executor.events", [good])
    assert await states(service) == [S.EXECUTING]
    await service.reports.apply("executor.events", [])


# --- cancel, expiry


async def test_cancel_ends_what_no_psp_has_and_asks_the_psp_for_the_rest(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 2), ("C", 3)))
    await service.register("A", "B")
    await service.tell(paid("A", 1))
    canceled = await service.payments.cancel("CH-1", "out of stock")
    assert [order.state for order in canceled.orders] == [S.SUCCESS, S.EXECUTING, S.CANCELED]
    assert not canceled.is_done
    again = await service.payments.cancel("CH-1", "out of stock")
    assert again == canceled
    said = (await service.said())[3:]
    assert said == ["payment_order_succeeded", "cancel_order", "payment_order_closed"]
    command = (await service.outbox())[4][1].cancel_order
    assert (command.payment_order_id, command.psp, command.psp_token) == ("B", "sandbox", "pi_B")
    await service.tell(paid("B", 2, kind=K.ORDER_CANCELED))
    assert (await service.payments.get("CH-1")).is_done
    with pytest.raises(NotFound):
        await service.payments.cancel("CH-none", "")


async def test_a_cancel_that_races_the_success_never_loses_the_money(service: Service) -> None:
    for number in range(10):
        order_id, checkout_id = f"O{number}", f"CH-{number}"
        await service.payments.create(checkout((order_id, 1), checkout_id=checkout_id))
        await asyncio.gather(
            service.payments.cancel(checkout_id, ""),
            service.another().register(order_id),
            service.another().notifications.apply([paid(order_id, 1)]),
        )
        assert await states(service, checkout_id) == [S.SUCCESS]
    said = await service.said()
    assert (said.count("payment_order_succeeded"), said.count("payment_completed")) == (10, 10)


async def test_unpaid_orders_expire_once_and_paid_ones_do_not(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 2), ("C", 3)))
    await service.register("A", "B")
    await service.tell(paid("A", 1))
    await service.timers.run_once()
    assert await states(service) == [S.SUCCESS, S.EXECUTING, S.NOT_STARTED]
    service.clock.advance(seconds=86_401)
    assert sorted(await asyncio.gather(*(service.timers.expire_unpaid() for _ in range(3))))[-1] == 1
    assert await states(service) == [S.SUCCESS, S.EXPIRED, S.EXPIRED]
    assert await service.timers.expire_unpaid() == 0
    said = await service.said()
    assert (said.count("payment_order_closed"), said.count("cancel_order"), said.count("payment_completed")) == (
        2,
        1,
        1,
    )
    await service.register("C")  # its intent is known only now: nobody may pay it any more
    assert (await service.outbox())[-1][1].cancel_order.psp_token == "pi_C"


# --- reads


async def test_pages_hold_every_payment_once_newest_first(service: Service) -> None:
    for number in range(7):
        await service.payments.create(checkout((f"O{number}", 1), checkout_id=f"CH-{number}"))
        if number % 2:
            service.clock.advance(seconds=1)
    seen: list[str] = []
    token, pages = "", 0
    while True:
        page, token = await service.payments.list(PaymentFilter(), 3, token)
        seen += [each.checkout_id for each in page]
        pages += 1
        if pages == 1:  # a newcomer during the walk changes nothing of it
            service.clock.advance(seconds=9)
            await service.payments.create(checkout(("NEW", 1), checkout_id="CH-NEW"))
        if not token:
            break
    assert seen == ["CH-6", "CH-5", "CH-4", "CH-3", "CH-2", "CH-1", "CH-0"]
    assert pages == 3


async def test_filters_of_the_list(service: Service) -> None:
    await service.payments.create(checkout(("A", 1), ("B", 1)))
    await service.payments.create(checkout(("C", 1), checkout_id="CH-2"))
    await service.tell(paid("C", 1))

    async def ids(**wanted: Any) -> list[str]:
        page, _ = await service.payments.list(PaymentFilter(**wanted), 0, "")
        return sorted(each.checkout_id for each in page)

    assert await ids() == ["CH-1", "CH-2"]
    assert await ids(buyer_id="BUYER-1") == ["CH-1", "CH-2"]
    assert await ids(buyer_id="BUYER-2") == []
    assert await ids(buyer_id="\0") == []
    assert await ids(seller_account="SELL-B") == ["CH-1"]
    assert await ids(open_only=True) == ["CH-1"]
    page, token = await service.payments.list(PaymentFilter(), 1, "")
    assert [order.payment_order_id for each in page for order in each.orders] == ["C"]
    with pytest.raises(InvalidArgument) as caught:
        await service.payments.list(PaymentFilter(open_only=True), 1, token)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


async def test_watch_shows_every_last_state_until_the_payment_is_done(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    seen: list[PaymentOrderState] = []
    steps = {
        S.NOT_STARTED: lambda: service.register("A"),
        S.EXECUTING: lambda: service.notifications.apply([paid("A", 1)]),
    }
    async with asyncio.timeout(60), aclosing(service.payments.watch("CH-1")) as stream:
        async for payment in stream:
            state = payment.orders[0].state
            seen.append(state)
            if state in steps:
                await steps[state]()
    assert seen == [S.NOT_STARTED, S.EXECUTING, S.SUCCESS]
    for unknown in ("CH-none", "CH-\0"):
        with pytest.raises(NotFound):
            async for _ in service.payments.watch(unknown):
                pass


async def test_watch_survives_the_loss_of_its_connection(service: Service) -> None:
    await service.payments.create(checkout(("A", 1)))
    async with asyncio.timeout(60), aclosing(service.payments.watch("CH-1")) as stream:
        assert (await anext(stream)).orders[0].state is S.NOT_STARTED
        await service.pool.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
        )
        await service.register("A")
        assert (await anext(stream)).orders[0].state is S.EXECUTING


async def test_limits_of_one_checkout(service: Service) -> None:
    many = tuple(OrderSpec(f"O{n}", "S", "USD", 1) for n in range(101))
    with pytest.raises(InvalidArgument) as caught:
        await service.payments.create(replace(checkout(("A", 1)), orders=many))
    assert [each.field for each in caught.value.violations] == ["payment_orders"]
    created, _ = await service.payments.create(replace(checkout(("A", 1)), orders=many[:100]))
    assert [order.payment_order_id for order in (await service.payments.get("CH-1")).orders] == [
        order.payment_order_id for order in created.orders
    ]
    assert created.create_time + timedelta(days=1) == await service.pool.fetchval(
        "SELECT expire_time FROM payment.payment_event"
    )


@pytest.mark.parametrize("connections", [1, 4, 6])
async def test_a_small_pool_serves_everybody(postgres_dsn: str, connections: int) -> None:
    """Connections that stay with the store must never leave a caller, or a timer, waiting for ever."""
    pool = await create_pool(postgres_dsn, "payment", max_size=connections)
    service = Service.over(pool, postgres_dsn)
    async with asyncio.timeout(60):
        await asyncio.gather(
            *(service.payments.create(checkout((f"O{n}", 1), checkout_id=f"CH-{n}")) for n in range(40))
        )
        await asyncio.gather(*(service.notifications.apply([paid(f"O{n}", 1)]) for n in range(40)))
        await service.timers.run_once()
        assert await pool.fetchval("SELECT count(*) FROM payment.payment_event WHERE is_payment_done") == 40
        await service.store.close()
        await pool.close()
