"""Risk: wallet and ledger read the same events and end with different balances, as they once did after a dispute."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from kernel.ids import account_id
from ledger.adapters.bus import LedgerConsumer
from ledger.domain import Side
from ledger.service import PostFacts, Received
from payment.adapters.envelopes import encode
from payment.domain.notification import Notification, NotificationKind
from payment.domain.payment_order import PaymentOrder, PaymentOrderState
from runtime.bus import Message
from tests.unit.wallet_core.service.test_bus_flows import World, captured, hold_id_of, message, requested

K, S = NotificationKind, PaymentOrderState
NOW = datetime(2025, 7, 21, tzinfo=UTC)
SELLER = "seller/SELL-1/USD"
DISPUTES = "seller/SELL-1/disputes/USD"
CLEARING = "psp/sandbox/clearing/USD"


class Journal:
    """Keeps entries by their id, as the ledger's tables do."""

    def __init__(self) -> None:
        self.entries: dict[str, Received] = {}

    async def post(self, received: list[Received]) -> None:
        for each in received:
            known = self.entries.setdefault(each.entry.journal_entry_id, each)
            assert known.entry.content_digest() == each.entry.content_digest()

    def balances(self) -> Counter[str]:
        """Credits − debits by account: what the wallet's balance of the same name must be."""
        sums: Counter[str] = Counter()
        for each in self.entries.values():
            for posting in each.entry.postings:
                sums[posting.account_name] += (
                    posting.amount_minor if posting.side is Side.CREDIT else -posting.amount_minor
                )
        return sums


class Both:
    """A wallet and a ledger behind the same events."""

    def __init__(self) -> None:
        self.wallet = World()
        self.journal = Journal()
        self._ledger = LedgerConsumer(PostFacts(self.journal), pace_s=0)  # type: ignore[arg-type]

    async def handle(self, *messages: Message) -> None:
        await self.wallet.handle(*messages)
        await self._ledger.handle(messages)

    def agree(self) -> dict[str, int]:
        """The balances that both have; nothing else is open in either."""
        balances = self.journal.balances()
        names = {entry.name for entry in self.wallet.directory.entries.values()} | set(balances)
        assert {name: self.wallet.balance(name) for name in names} == {name: balances[name] for name in names}
        self.wallet.check_zero_sum()
        return {name: balance for name, balance in balances.items() if balance}


class Told:
    """An order that a PSP tells things about; what the payment service makes of each, as messages."""

    def __init__(self, order_id: str) -> None:
        self.order = PaymentOrder(order_id, "CH", "SELL-1", "USD", 7_500, S.EXECUTING, NOW, NOW, "sandbox", "pi")
        self.count = 0

    def tell(self, kind: NotificationKind, at: datetime = NOW) -> list[Message]:
        self.count += 1
        told = Notification("sandbox", f"evt_{self.count}", kind, "pi", self.order.payment_order_id, "USD", 7_500)
        self.order.notify(told, at)
        facts, self.order.facts = self.order.facts, []
        return [
            Message(topic, key, message_id, payload, traceparent)
            for topic, key, message_id, payload, traceparent in (encode(each, self.order, at) for each in facts)
        ]


async def test_a_dispute_takes_the_money_from_the_psp_and_claims_it_from_the_seller() -> None:
    both, order = Both(), Told("ORD-1")
    await both.handle(*order.tell(K.ORDER_SUCCEEDED))
    await both.handle(*order.tell(K.DISPUTE_OPENED))
    assert both.agree() == {SELLER: 7_500, DISPUTES: -7_500}
    await both.handle(*order.tell(K.DISPUTE_WON))
    assert both.agree() == {SELLER: 7_500, CLEARING: -7_500}


async def test_a_seller_who_was_paid_out_before_is_no_obstacle() -> None:
    both, order = Both(), Told("ORD-1")
    await both.handle(*order.tell(K.ORDER_SUCCEEDED))
    await both.handle(requested(amount=7_500))
    hold_id = hold_id_of(both.wallet.bus.bodies()[0])
    await both.handle(message("payout_completed", reference="PO-1", amount=7_500, hold_id=hold_id))
    await both.handle(*order.tell(K.DISPUTE_OPENED))
    await both.handle(*order.tell(K.DISPUTE_LOST))
    assert both.agree() == {DISPUTES: -7_500, "psp/sandbox/payouts/USD": 7_500}
    assert both.wallet.balance(SELLER) == 0


@pytest.mark.parametrize("opening_comes", [True, False])
async def test_a_loss_is_booked_once_whether_its_opening_came_or_not(opening_comes: bool) -> None:
    both, order = Both(), Told("ORD-1")
    await both.handle(*order.tell(K.ORDER_SUCCEEDED))
    if opening_comes:
        await both.handle(*order.tell(K.DISPUTE_OPENED))
    await both.handle(*order.tell(K.DISPUTE_LOST), *order.tell(K.DISPUTE_OPENED))
    assert both.agree() == {SELLER: 7_500, DISPUTES: -7_500}


async def test_an_order_that_is_disputed_again_within_one_moment_is_booked_again() -> None:
    both, order = Both(), Told("ORD-1")
    events = [K.ORDER_SUCCEEDED, K.DISPUTE_OPENED, K.DISPUTE_WON, K.DISPUTE_OPENED]
    sent = [each for kind in events for each in order.tell(kind)]
    for _ in range(2):  # a replay changes nothing
        await both.handle(*sent)
        both.wallet.restart()
        assert both.agree() == {SELLER: 7_500, DISPUTES: -7_500}


@pytest.mark.parametrize("seed", range(20))
async def test_any_history_of_captures_payouts_and_disputes_ends_the_same_in_both(seed: int) -> None:
    dice = random.Random(seed)
    both = Both()
    orders = [Told(f"ORD-{number}") for number in range(4)]
    kinds = [K.ORDER_SUCCEEDED, K.ORDER_FAILED, K.DISPUTE_OPENED, K.DISPUTE_WON, K.DISPUTE_LOST]
    sent: list[Message] = []
    for step in range(40):
        if dice.random() < 0.2:
            reference = f"PO-{step}"
            amount = dice.randint(1, 9_000)
            await both.handle(requested(reference, amount=amount))
            answer = both.wallet.bus.bodies()[-1]
            if answer.WhichOneof("body") == "funds_held":
                sent.append(message("payout_completed", reference=reference, amount=amount, hold_id=hold_id_of(answer)))
                await both.handle(sent[-1])
        else:
            told = dice.choice(orders).tell(dice.choice(kinds), NOW + timedelta(milliseconds=step // 8))
            sent += told
            if told:
                await both.handle(*told)
        if sent and dice.random() < 0.3:
            await both.handle(*dice.sample(sent, k=min(3, len(sent))))
    assert account_id(SELLER) in both.wallet.directory.entries or not sent
    both.agree()


async def test_this_check_notices_a_wallet_that_leaves_an_event_out() -> None:
    both = Both()
    await both.handle(captured())
    await both._ledger.handle([message("dispute_opened", payment_order_id="ORD-1")])
    with pytest.raises(AssertionError):
        both.agree()
