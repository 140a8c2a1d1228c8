"""Payouts over a real database: idempotency, hold, PSP, release, return, cancel, schedule."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kernel.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from kernel.state_table import TransitionRefused
from payment.domain.bank_account import BankAccount, PostalAddress
from payment.domain.notification import Notification, NotificationKind, Outcome
from payment.domain.payout import PayoutState
from payment.domain.reports import FundsHeld, FundsRefused, PayoutRejected, PayoutSubmitted
from payment.service.payouts import Payouts
from payment.service.ports import PayoutFilter

if TYPE_CHECKING:
    from tests.integration.payment.conftest import Service

from tests.integration.payment.conftest import HOLD, payout_request

S, K = PayoutState, NotificationKind


def told(kind: NotificationKind, event_id: str, reference: str = "PO-1", **values: Any) -> Notification:
    values = {
        "psp_object_id": f"po_{reference}",
        "merchant_reference": reference,
        "currency_code": "USD",
        "amount_minor": 750,
        **values,
    }
    return Notification("sandbox", event_id, kind, **values)


async def hold(service: Service, reference: str = "PO-1") -> None:
    await service.reports.apply("wallet.events", [(f"held-{reference}", FundsHeld(reference, HOLD))])


async def submit(service: Service, reference: str = "PO-1") -> None:
    await service.reports.apply(
        "executor.events", [(f"sub-{reference}", PayoutSubmitted(reference, "sandbox", f"po_{reference}"))]
    )


async def test_a_replay_gets_its_answer_also_when_the_settings_have_changed(service: Service) -> None:
    first, _ = await service.payouts.create(payout_request(psp="sandbox2"))
    later = Payouts(service.store, service.clock, providers={"sandbox": frozenset({"EUR"})})
    again, replayed = await later.create(payout_request(psp="sandbox2"))
    assert (again.reference, again.create_time, replayed) == (first.reference, first.create_time, True)
    with pytest.raises(InvalidArgument, match="sandbox2"):
        await later.create(payout_request("PO-2", psp="sandbox2"))


async def test_held_submitted_completed_returned(service: Service) -> None:
    created, replayed = await service.payouts.create(payout_request(), "00-" + "b" * 32 + "-0-01")
    assert (created.state, created.psp, replayed) == (S.HOLDING, "sandbox", False)
    stored = await service.payouts.get("PO-1")
    assert (stored.recipient, stored.history) == (created.recipient, created.history)
    await hold(service)
    await submit(service)
    await service.tell(told(K.PAYOUT_PROCESSING, "evt_1"))
    await service.tell(told(K.PAYOUT_COMPLETED, "evt_2"))
    payout = await service.payouts.get("PO-1")
    assert (payout.state, payout.psp_payout_id, payout.hold_id) == (S.COMPLETED, "po_PO-1", HOLD)
    await service.tell(told(K.PAYOUT_RETURNED, "evt_3", reason="account closed"))
    assert (await service.payouts.get("PO-1")).failure_reason == "account closed"
    sent = await service.outbox()
    assert [(topic, each.WhichOneof("body")) for topic, each in sent] == [
        ("payment.events", "payout_requested"),
        ("payment.commands", "execute_payout"),
        ("payment.events", "payout_completed"),
        ("payment.events", "payout_returned"),
    ]
    assert sent[2][1].payout_completed.hold_id == HOLD
    assert {each.traceparent for _, each in sent} == {"00-" + "b" * 32 + "-0-01"}
    assert [change.cause for change in (await service.payouts.get("PO-1")).history] == [
        "created",
        "funds_held",
        "payout_submitted",
        "notification evt_1",
        "notification evt_2",
        "notification evt_3",
    ]


async def test_twenty_creates_at_once_store_one_and_other_content_is_a_mismatch(service: Service) -> None:
    results = await asyncio.gather(*(service.payouts.create(payout_request()) for _ in range(20)))
    assert [replayed for _, replayed in results].count(False) == 1
    with pytest.raises(AlreadyExists) as caught:
        await service.payouts.create(replace(payout_request(), amount_minor=751))
    assert caught.value.reason == "IDEMPOTENCY_MISMATCH"
    assert await service.said() == ["payout_requested"]


async def test_bad_details_store_nothing_and_say_which_field(service: Service) -> None:
    account = BankAccount("Jane Doe", "US", "aba_routing_number", "123456789", "1234567890")
    with pytest.raises(InvalidArgument) as caught:
        await service.payouts.create(payout_request(recipient=account))
    assert caught.value.reason == "BANK_DETAILS_INVALID"
    assert [each.field for each in caught.value.violations] == ["recipient.aba_routing_number"]
    with pytest.raises(InvalidArgument) as caught:
        await service.payouts.create(replace(payout_request(recipient=account), amount_minor=0))
    assert caught.value.reason == "INVALID_ARGUMENT"
    with pytest.raises(NotFound):
        await service.payouts.get("PO-1")


async def test_every_bank_field_survives_the_database(service: Service) -> None:
    address = PostalAddress("Main St 1", "3rd floor", "Anytown", "CA", "90210", "US")
    account = BankAccount("Jané", "GB", "sort_code", "08-99-99", "663749", "DEUTDEFF", "Bänk", address)
    await service.payouts.create(payout_request(recipient=account))
    stored = (await service.payouts.get("PO-1")).recipient
    assert stored == replace(account, bank_code="089999", account_number="00663749")


async def test_funds_refused_ends_it_without_a_release(service: Service) -> None:
    await service.payouts.create(payout_request())
    await service.reports.apply("wallet.events", [("m1", FundsRefused("PO-1", "EXCEEDS_BALANCE"))])
    payout = await service.payouts.get("PO-1")
    assert (payout.state, payout.failure_reason) == (S.FAILED, "the wallet refused: exceeds balance")
    assert await service.said() == ["payout_requested"]


@pytest.mark.parametrize(("compliance", "state"), [(True, S.REJECTED), (False, S.FAILED)])
async def test_a_rejection_releases_the_hold_once(service: Service, compliance: bool, state: PayoutState) -> None:
    await service.payouts.create(payout_request())
    await hold(service)
    reject = PayoutRejected("PO-1", "sandbox", "sanctions", "on a list", compliance)
    await asyncio.gather(*(service.reports.apply("executor.events", [(f"m{n % 2}", reject)]) for n in range(8)))
    assert (await service.payouts.get("PO-1")).state is state
    assert await service.said() == ["payout_requested", "execute_payout", "payout_released"]
    released = (await service.outbox())[-1][1].payout_released
    assert (released.state, released.hold_id, released.reason) == (state.name, HOLD, "on a list (sanctions)")


async def test_a_replay_of_the_wallets_events_changes_nothing(service: Service) -> None:
    await service.payouts.create(payout_request())
    for _ in range(3):
        await hold(service)
    await service.reports.apply("wallet.events", [("other-id", FundsHeld("PO-1", HOLD))])
    assert await service.said() == ["payout_requested", "execute_payout"]


async def test_a_cancel_during_the_hold_releases_it(service: Service) -> None:
    await service.payouts.create(payout_request())
    payout = await service.payouts.cancel("PO-1", "typing error")
    assert (payout.state, payout.failure_reason) == (S.CANCELED, "typing error")
    assert (await service.payouts.cancel("PO-1", "again")) == payout
    await hold(service)
    await hold(service)
    assert await service.said() == ["payout_requested", "payout_released"]
    assert (await service.outbox())[-1][1].payout_released.hold_id == HOLD


async def test_a_cancel_after_the_hold_is_refused_with_the_state(service: Service) -> None:
    await service.payouts.create(payout_request())
    await hold(service)
    with pytest.raises(FailedPrecondition) as caught:
        await service.payouts.cancel("PO-1", "")
    assert (caught.value.reason, caught.value.metadata) == ("INVALID_STATE", {"state": "PENDING"})
    with pytest.raises(NotFound):
        await service.payouts.cancel("PO-none", "")


async def test_cancel_and_hold_that_race_end_in_one_of_two_ways(service: Service) -> None:
    for number in range(10):
        reference = f"PO-{number}"
        await service.payouts.create(payout_request(reference))
        await asyncio.gather(service.payouts.cancel(reference, ""), hold(service, reference), return_exceptions=True)
        state = (await service.payouts.get(reference)).state
        said = [each for _, each in await service.outbox() if reference in str(each)]
        last = str(said[-1].WhichOneof("body"))
        assert (state, last) in {(S.CANCELED, "payout_released"), (S.PENDING, "execute_payout")}


async def test_completion_after_the_release_is_flagged_for_operators(service: Service) -> None:
    await service.payouts.create(payout_request())
    await hold(service)
    await service.tell(told(K.PAYOUT_FAILED, "evt_1"))
    assert (await service.tell(told(K.PAYOUT_COMPLETED, "evt_2"))).ignored == 1
    payout = await service.payouts.get("PO-1")
    assert payout.state is S.FAILED
    assert "its hold is released" in payout.attention
    assert [outcome for outcome, *_ in service.reported] == [Outcome.FLAGGED]
    assert (await service.said())[-1] == "payout_released"


async def test_a_notification_is_found_by_the_psps_id_alone(service: Service) -> None:
    await service.payouts.create(payout_request())
    await hold(service)
    assert (await service.tell(told(K.PAYOUT_COMPLETED, "evt_1", merchant_reference=""))).ignored == 1
    await submit(service)  # makes the PSP's id known, so the parked one fits
    assert (await service.payouts.get("PO-1")).state is S.COMPLETED
    assert (await service.tell(told(K.PAYOUT_RETURNED, "evt_2", merchant_reference=""))).applied == 1


async def test_a_report_that_the_table_refuses_raises(service: Service) -> None:
    await service.payouts.create(payout_request())
    with pytest.raises(TransitionRefused):
        await submit(service)
    with pytest.raises(NotFound):
        await hold(service, "PO-none")
    assert await service.pool.fetchval("SELECT count(*) FROM payment.inbox") == 0


async def test_scheduled_payouts_start_when_due_and_once(service: Service) -> None:
    now = datetime.fromtimestamp(service.clock.now_ns() / 1e9, UTC)
    payout, _ = await service.payouts.create(payout_request(schedule_time=now + timedelta(hours=1)))
    assert payout.state is S.SCHEDULED
    await service.timers.run_once()
    assert await service.said() == []
    service.clock.advance(seconds=3601)
    await asyncio.gather(*(service.timers.start_due_payouts() for _ in range(3)))
    assert (await service.payouts.get("PO-1")).state is S.HOLDING
    assert await service.said() == ["payout_requested"]
    assert (await service.outbox())[0][1].occur_time.ToMilliseconds() == service.clock.now_ns() // 1_000_000


async def test_lists_by_seller_and_state(service: Service) -> None:
    for number in range(5):
        await service.payouts.create(payout_request(f"PO-{number}"))
        service.clock.advance(seconds=1)
    await service.payouts.cancel("PO-3", "")
    page, token = await service.payouts.list(PayoutFilter(), 2, "")
    assert [each.reference for each in page] == ["PO-4", "PO-3"]
    page, token = await service.payouts.list(PayoutFilter(), 3, token)
    assert ([each.reference for each in page], token) == (["PO-2", "PO-1", "PO-0"], "")
    page, _ = await service.payouts.list(PayoutFilter(state=S.CANCELED), 0, "")
    assert [each.reference for each in page] == ["PO-3"]
    assert await service.payouts.list(PayoutFilter(seller_account="SELL-9"), 0, "") == ([], "")
