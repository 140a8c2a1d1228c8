"""Risk: a bus message that is delivered twice, late, or after a crash moves money twice, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ducat.event.v1 import event_pb2
from kernel.clock import FixedClock
from kernel.errors import FailedPrecondition, InvalidArgument, Unavailable
from kernel.ids import account_id, derived_event_id
from runtime.bus import Message
from tests.unit.wallet_core.service.memory_host import MemoryDirectory, MemoryHost
from wallet_core.adapters.bus import PaymentEvents
from wallet_core.engine.codes import AccountFlags, TransferResult
from wallet_core.service.flows import ATTEMPT_COUNT_MAX, Flows, capture, payout_hold
from wallet_core.service.port import AccountRow

NOW_NS = 1_753_056_000_000_000_000
SELLER = "seller/SELL-1/USD"
CLEARING = "psp/sandbox/clearing/USD"
PAYOUTS = "psp/sandbox/payouts/USD"


class RecordingBus:
    """Keeps what is published; fails the next publish when told to."""

    def __init__(self) -> None:
        self.published: list[Message] = []
        self.fail_next: Exception | None = None

    async def publish(self, messages) -> None:  # type: ignore[no-untyped-def]
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.published += messages

    def bodies(self) -> list[event_pb2.Envelope]:
        return [event_pb2.Envelope.FromString(message.payload) for message in self.published]


class World:
    """A wallet with a memory host behind the bus handler."""

    def __init__(self) -> None:
        self.clock = FixedClock(NOW_NS)
        self.host = MemoryHost(self.clock)
        self.directory = MemoryDirectory()
        self.bus = RecordingBus()
        self.past: dict[bytes, int] = {}
        self.restart()

    def restart(self) -> None:
        """A new process over the same durable state."""
        flows = Flows(self.host, self.directory, past=self.results_before)
        self.events = PaymentEvents(flows, self.bus, self.clock)  # type: ignore[arg-type]

    async def results_before(self, ids: Sequence[bytes]) -> dict[bytes, int]:
        return {each: self.past[each] for each in ids if each in self.past}

    async def handle(self, *messages: Message) -> None:
        await self.events.handle(messages)

    def balance(self, name: str) -> int:
        account = self.host._account(account_id(name))
        return 0 if account is None else account.balance

    def held_out(self, name: str) -> int:
        account = self.host._account(account_id(name))
        return 0 if account is None else account.held_out

    def check_zero_sum(self) -> None:
        assert set(self.host.totals().values()) <= {0}


def message(body: str, time_ns: int = NOW_NS, **fields: object) -> Message:
    amount = fields.pop("amount", 7_500)
    envelope = event_pb2.Envelope(event_id=derived_event_id(body, str(sorted(fields.items()))))
    envelope.occur_time.FromNanoseconds(time_ns)
    part = getattr(envelope, body)
    part.SetInParent()
    for name, value in fields.items():
        setattr(part, name, value)
    part.amount.currency_code, part.amount.amount_minor = "USD", amount
    part.seller_account = fields.get("seller_account", "SELL-1")
    part.psp = "sandbox"
    return Message("payment.events", "key", envelope.event_id, envelope.SerializeToString())


def captured(order: str = "ORD-1", **fields: object) -> Message:
    return message("payment_order_succeeded", payment_order_id=order, **fields)


def requested(reference: str = "PO-1", **fields: object) -> Message:
    return message("payout_requested", reference=reference, **fields)


def hold_id_of(envelope: event_pb2.Envelope) -> bytes:
    assert envelope.WhichOneof("body") == "funds_held"
    return envelope.funds_held.hold_id


@pytest.fixture
def world() -> World:
    return World()


async def test_a_capture_delivered_again_changes_nothing(world: World) -> None:
    await world.handle(captured(), captured())
    world.restart()
    await world.handle(captured())
    assert world.balance(SELLER) == 7_500
    assert world.balance(CLEARING) == -7_500
    assert world.directory.entries[account_id(SELLER)].name == SELLER
    world.check_zero_sum()


async def test_known_accounts_are_opened_and_named_only_once(world: World) -> None:
    await world.handle(captured("ORD-1"))
    await world.handle(*(captured(f"ORD-{number}") for number in range(2, 40)))
    assert world.host.account_call_count == 1
    world.restart()
    await world.handle(captured("ORD-50"))
    assert world.host.account_call_count == 2  # a restarted process asks once more for its part of the striped account
    before = {shard: world.host.durable_sequence(shard) for shard in (0, 1)}
    await world.handle(captured("ORD-50"))
    assert {shard: world.host.durable_sequence(shard) for shard in (0, 1)} == before


async def test_a_directory_restored_to_an_older_state_gets_its_names_again(world: World) -> None:
    """The account is in the log, its name was in PostgreSQL alone: without it nobody lists the account."""
    await world.handle(captured("ORD-1"))
    world.directory.entries.clear()
    world.restart()
    await world.handle(captured("ORD-2"))
    assert world.directory.entries[account_id(SELLER)].name == SELLER


async def test_the_name_is_written_before_the_account_is_opened(world: World) -> None:
    async def fail(rows, *, update=False):  # type: ignore[no-untyped-def]
        raise Unavailable("killed")

    opened, world.host.create_accounts = world.host.create_accounts, fail  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        await world.handle(captured())
    assert account_id(SELLER) in world.directory.entries
    world.host.create_accounts = opened  # type: ignore[method-assign]
    world.restart()
    await world.handle(captured())
    assert world.balance(SELLER) == 7_500


async def test_a_payout_that_completes_and_is_returned_keeps_the_sum_at_zero(world: World) -> None:
    await world.handle(captured())
    await world.handle(requested(amount=3_000))
    held = world.bus.bodies()[0]
    assert held.funds_held.purpose == event_pb2.FUNDS_PURPOSE_PAYOUT
    assert world.held_out(SELLER) == 3_000
    world.check_zero_sum()
    done = message("payout_completed", reference="PO-1", amount=3_000, hold_id=hold_id_of(held))
    await world.handle(done, done)
    assert (world.balance(SELLER), world.held_out(SELLER), world.balance(PAYOUTS)) == (4_500, 0, 3_000)
    back = message("payout_returned", reference="PO-1", amount=3_000)
    await world.handle(back)
    world.restart()
    await world.handle(done, back, requested(amount=3_000))
    assert (world.balance(SELLER), world.held_out(SELLER), world.balance(PAYOUTS)) == (7_500, 0, 0)
    world.check_zero_sum()


async def test_a_released_payout_frees_the_money_once(world: World) -> None:
    await world.handle(captured(), requested(amount=7_500))
    hold_id = hold_id_of(world.bus.bodies()[0])
    released = message("payout_released", reference="PO-1", amount=7_500, state="FAILED", hold_id=hold_id)
    later = message("payout_released", NOW_NS + 10**9, reference="PO-1", amount=7_500, state="FAILED", hold_id=hold_id)
    await world.handle(released, released, later)
    assert (world.balance(SELLER), world.held_out(SELLER)) == (7_500, 0)
    await world.handle(message("payout_released", reference="PO-2", amount=1, state="REJECTED"))
    assert (world.balance(SELLER), world.held_out(SELLER)) == (7_500, 0)


async def test_a_payout_beyond_the_balance_is_refused_and_stays_refused(world: World) -> None:
    await world.handle(captured(amount=100), requested("PO-9", amount=101))
    await world.handle(captured("ORD-2", amount=1_000))
    world.restart()
    await world.handle(requested("PO-9", amount=101))
    first, again = world.bus.bodies()
    assert first.funds_refused.result == "INSUFFICIENT_FUNDS"
    assert first.funds_refused.reference == "PO-9"
    assert again.funds_refused.result == "INSUFFICIENT_FUNDS"
    assert first.event_id == again.event_id
    assert world.held_out(SELLER) == 0


async def test_a_seller_without_wallet_is_refused_and_gets_none(world: World) -> None:
    await world.handle(requested("PO-3", seller_account="NOBODY"))
    assert world.bus.bodies()[0].funds_refused.result == "DEBIT_ACCOUNT_NOT_FOUND"
    assert world.host._account(account_id("seller/NOBODY/USD")) is None


async def test_refunds_hold_then_post_or_void_against_psp_clearing(world: World) -> None:
    await world.handle(captured())
    await world.handle(
        message("refund_requested", refund_id="RF-1", amount=500),
        message("refund_requested", refund_id="RF-2", amount=700),
    )
    first, second = world.bus.bodies()
    assert first.funds_held.purpose == event_pb2.FUNDS_PURPOSE_REFUND
    assert world.held_out(SELLER) == 1_200
    await world.handle(
        message("refund_completed", refund_id="RF-1", amount=500, succeeded=True, hold_id=hold_id_of(first)),
        message("refund_completed", refund_id="RF-2", amount=700, succeeded=False, hold_id=hold_id_of(second)),
        message("refund_completed", refund_id="RF-3", amount=700, succeeded=False),
    )
    assert (world.balance(SELLER), world.held_out(SELLER), world.balance(CLEARING)) == (7_000, 0, -7_000)
    world.check_zero_sum()


async def test_a_crash_between_effect_and_answer_publishes_the_same_answer_later(world: World) -> None:
    await world.handle(captured())
    world.bus.fail_next = Unavailable("bus is down")
    with pytest.raises(Unavailable):
        await world.handle(requested(amount=3_000))
    assert world.held_out(SELLER) == 3_000
    assert world.bus.published == []
    world.restart()
    await world.handle(requested(amount=3_000))
    await world.handle(requested(amount=3_000))
    first, again = world.bus.published
    assert first.message_id == again.message_id
    assert hold_id_of(world.bus.bodies()[0]) == hold_id_of(world.bus.bodies()[1])
    assert world.held_out(SELLER) == 3_000


async def _freeze(world: World, *, frozen: bool) -> None:
    flags = int(AccountFlags.FROZEN) if frozen else 0
    await world.host.create_accounts([AccountRow(account_id(SELLER), "USD", flags)], update=True)


async def test_a_capture_into_a_frozen_wallet_fails_loudly_and_lands_once_after_the_thaw(world: World) -> None:
    await world.handle(captured("ORD-0", amount=1))
    await _freeze(world, frozen=True)
    for _ in range(3):
        with pytest.raises(FailedPrecondition, match=r"capture of ORD-1 refused: CREDIT_ACCOUNT_FROZEN.*unfreeze"):
            await world.handle(captured())
    await _freeze(world, frozen=False)
    await world.handle(captured())
    assert world.balance(SELLER) == 7_501
    world.restart()
    await _freeze(world, frozen=True)
    await _freeze(world, frozen=False)
    await world.handle(captured(), captured())
    assert world.balance(SELLER) == 7_501
    world.check_zero_sum()


async def test_a_wallet_that_is_frozen_for_long_uses_up_no_ids(world: World) -> None:
    await world.handle(captured("ORD-0", amount=1))
    for _ in range(ATTEMPT_COUNT_MAX + 3):
        await _freeze(world, frozen=True)
        step = capture("ORD-1", "sandbox", "SELL-1", "USD", 7_500, NOW_NS // 1_000_000)
        ids = [step.transfer_id(attempt) for attempt in range(1, ATTEMPT_COUNT_MAX + 1)]
        assert len(set(ids)) == ATTEMPT_COUNT_MAX
        with pytest.raises(FailedPrecondition):
            await world.handle(captured())
        await _freeze(world, frozen=False)
    await world.handle(captured())
    assert world.balance(SELLER) == 7_501


async def test_an_event_older_than_the_id_window_is_never_applied_or_dropped_silently() -> None:
    world = World()
    await world.handle(captured("ORD-0", amount=1))
    world.clock.advance(seconds=8 * 86_400)
    await world.handle(captured("ORD-2", amount=1, time_ns=world.clock.now_ns()))
    with pytest.raises(FailedPrecondition, match=r"capture of ORD-1 refused: ID_TOO_OLD.*id window"):
        await world.handle(captured())
    assert world.balance(SELLER) == 2


async def test_an_old_event_that_the_read_model_knows_ends_as_it_did(world: World) -> None:
    await world.handle(captured("ORD-0", amount=1))
    later_ns = NOW_NS + 8 * 86_400 * 10**9
    world.clock.advance(seconds=8 * 86_400)
    await world.handle(captured("ORD-2", amount=1, time_ns=later_ns))
    time_ms = NOW_NS // 1_000_000
    step = capture("ORD-1", "sandbox", "SELL-1", "USD", 7_500, time_ms)
    hold = payout_hold("PO-1", "sandbox", "SELL-1", "USD", 100, time_ms)
    world.past = {
        step.transfer_id(1): TransferResult.CREDIT_ACCOUNT_FROZEN,
        step.transfer_id(2): TransferResult.OK,
        hold.transfer_id(1): TransferResult.INSUFFICIENT_FUNDS,
    }
    await world.handle(captured(), requested(amount=100))
    assert world.balance(SELLER) == 2, "nothing is applied again"
    assert [body.WhichOneof("body") for body in world.bus.bodies()] == ["funds_refused"], "answered as it was"
    del world.past[step.transfer_id(2)]
    with pytest.raises(FailedPrecondition, match="ID_TOO_OLD"):
        await world.handle(captured())


async def test_the_same_reference_with_other_content_is_refused_by_name(world: World) -> None:
    await world.handle(captured(amount=100))
    with pytest.raises(FailedPrecondition, match="capture of ORD-1 refused: ID_REUSED"):
        await world.handle(captured(amount=200))
    assert world.balance(SELLER) == 100


async def test_posting_a_hold_that_was_voided_fails_loudly(world: World) -> None:
    await world.handle(captured(), requested(amount=100))
    hold_id = hold_id_of(world.bus.bodies()[0])
    await world.handle(message("payout_released", reference="PO-1", amount=100, hold_id=hold_id))
    with pytest.raises(FailedPrecondition, match="payout-post of PO-1 refused: HOLD_ALREADY_VOIDED"):
        await world.handle(message("payout_completed", reference="PO-1", amount=100, hold_id=hold_id))
    assert world.balance(SELLER) == 7_500


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (Message("payment.events", "k", "m-1", b"\xff\xff"), "message m-1: payload is no"),
        (captured(amount=0), "expected a positive amount"),
        (message("payment_order_succeeded", 0, payment_order_id="ORD-1"), "occur_time is missing"),
        (message("payout_completed", reference="PO-1", hold_id=b"short"), "hold_id: expected 16 bytes, got 5"),
    ],
)
async def test_a_malformed_message_is_an_error_that_names_it(world: World, bad: Message, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        await world.handle(bad)
    assert world.host.transfer_row_count == 0


async def test_events_of_others_are_left_alone(world: World) -> None:
    envelope = event_pb2.Envelope(event_id="e")
    envelope.payment_completed.checkout_id = "C"
    await world.handle(Message("payment.events", "C", "e", envelope.SerializeToString()))
    assert world.host.transfer_row_count == 0
    assert world.bus.published == []


async def test_each_event_is_applied_by_the_process_that_owns_the_seller_and_by_no_other() -> None:
    home = MemoryHost(FixedClock(NOW_NS)).shard_of(account_id(SELLER))
    for owned, balance in ((home, 7_500), (1 - home, 0)):
        world = World()
        world.host = MemoryHost(world.clock, shard_count=2, owned=[owned])
        world.restart()
        await world.handle(captured(), requested(amount=100))
        assert len(world.bus.published) == (1 if balance else 0)
        if balance:
            assert (world.balance(SELLER), world.held_out(SELLER)) == (balance, 100)
        else:
            assert world.host.transfer_row_count == 0


# --- refunds that were made at the PSP

CLAIMS = "seller/SELL-1/disputes/USD"


def refund_message(body: str, amount: int, **fields: object) -> Message:
    return message(body, refund_id="sandbox:re_1", payment_order_id="ORD-1", amount=amount, **fields)


async def test_a_refund_that_the_wallet_does_not_cover_takes_what_is_there_and_claims_the_rest(world: World) -> None:
    await world.handle(captured(amount=7_500), requested(amount=1_500))
    await world.handle(refund_message("refund_requested", 7_500))
    refused = world.bus.bodies()[-1].funds_refused
    assert (refused.purpose, refused.reference) == (event_pb2.FUNDS_PURPOSE_REFUND, "sandbox:re_1")
    assert (refused.result, refused.available.amount_minor, refused.available.currency_code) == (
        "INSUFFICIENT_FUNDS",
        6_000,
        "USD",
    )
    again = refund_message("refund_requested", 6_000, hold_reference="sandbox:re_1/2")
    await world.handle(again)
    held = world.bus.bodies()[-1]
    assert held.funds_held.reference == "sandbox:re_1/2"
    assert len({each.event_id for each in world.bus.bodies()}) == len(world.bus.bodies())
    assert world.held_out(SELLER) == 7_500, "nobody can be paid out what the buyer has back"
    completed = refund_message("refund_completed", 6_000, hold_id=hold_id_of(held), succeeded=True)
    claimed = refund_message("refund_claimed", 1_500)
    for _ in range(3):
        await world.handle(again, completed, claimed)
        world.restart()
    assert (world.balance(SELLER), world.held_out(SELLER), world.balance(CLAIMS)) == (1_500, 1_500, -1_500)
    assert world.balance(CLEARING) == 0
    given_back = refund_message("refund_reversed", 6_000)
    withdrawn = refund_message("refund_reversed", 1_500, claimed=True)
    for _ in range(3):
        await world.handle(given_back, withdrawn)
        world.restart()
    assert (world.balance(SELLER), world.balance(CLAIMS), world.balance(CLEARING)) == (7_500, 0, -7_500)
    world.check_zero_sum()


async def test_a_refund_of_a_seller_without_a_wallet_or_with_a_frozen_one_has_nothing_available(world: World) -> None:
    await world.handle(refund_message("refund_requested", 100))
    assert world.bus.bodies()[-1].funds_refused.available.amount_minor == 0
    await world.handle(refund_message("refund_claimed", 100))
    assert world.balance(CLAIMS) == -100
    await world.handle(captured(amount=7_500))
    await _freeze(world, frozen=True)
    await world.handle(refund_message("refund_requested", 50, hold_reference="sandbox:re_1/2"))
    refused = world.bus.bodies()[-1].funds_refused
    assert (refused.result, refused.available.amount_minor) == ("DEBIT_ACCOUNT_FROZEN", 0)
    world.check_zero_sum()
