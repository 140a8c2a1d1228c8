"""What every PSP adapter must keep, run against the sandbox over HTTP."""

from __future__ import annotations

import json
import time

import aiohttp

from executor.domain.command import ExecuteOrder, ExecuteRefund, PayoutInstruction, Recipient
from executor.domain.outcome import Accepted, NoAnswer, NotFound, NotificationKind, NotSent, Rejected
from executor.psp.sandbox import SandboxPsp
from executor.service.ports import Channel
from kernel.money import Money
from tests.contract.psp.sandbox_server import API_KEY, Gateway, RunningSandbox

OPERATOR = {"authorization": f"Bearer {API_KEY}"}
PAYS, DECLINED, NO_FUNDS = "4242424242424242", "4000000000000002", "4000 0000 0000 9995"


def order(reference: str = "ORD-1", amount: Money | None = None) -> ExecuteOrder:
    return ExecuteOrder(reference, "CHCKT-1", "SELL-1", amount or Money("USD", 7500))


def payout(reference: str = "PAYOUT-1") -> PayoutInstruction:
    recipient = Recipient("Jane Doe", "US", "1234567890", "Anytown", "aba_routing_number", "021000021")
    return PayoutInstruction(reference, Money("USD", 750), recipient, "Freelance work")


async def pay(http: aiohttp.ClientSession, page: str, card: str) -> aiohttp.ClientResponse:
    return await http.post(page, data={"card_number": card}, allow_redirects=False)


async def registered(psp: SandboxPsp, reference: str = "ORD-1") -> Accepted:
    answer = await psp.register_order(order(reference))
    assert isinstance(answer, Accepted), answer
    return answer


class TestPayIn:
    async def test_happy_path_ends_in_a_verified_webhook(self, psp, http, gateway):
        answer = await registered(psp)
        assert answer.psp_object_id.startswith("pi_")
        response = await pay(http, answer.hosted_page_url, PAYS)
        assert response.status == 303
        assert response.headers["Location"] == (
            "http://127.0.0.1:9/payment/return?checkout_id=CHCKT-1"
            f"&payment_order_id=ORD-1&payment_intent={answer.psp_object_id}"
        )
        sink: Gateway = gateway[0]
        await sink.until(lambda gateway: len(gateway.calls) == 1)
        path, headers, body = sink.calls[0]
        assert path == "/webhooks/sandbox"
        psp.verify(headers, body, Channel.PAYMENT, int(time.time()))
        (told,) = psp.translate(body, Channel.PAYMENT)
        assert told.kind is NotificationKind.ORDER_SUCCEEDED
        assert told.merchant_reference == "ORD-1"
        assert told.psp_object_id == answer.psp_object_id
        assert told.amount == Money("USD", 7500)
        found = await psp.query_order("ORD-1", answer.psp_object_id)
        assert isinstance(found, Accepted)
        assert found.kind is NotificationKind.ORDER_SUCCEEDED

    async def test_amounts_keep_their_exponent(self, psp):
        for number, money in enumerate((Money("JPY", 75), Money("KWD", 75_123), Money("EUR", 1), Money("CLF", 12_345))):
            answer = await psp.register_order(order(f"ORD-{number}", money))
            assert isinstance(answer, Accepted), answer

    async def test_same_key_gives_the_same_intent(self, psp):
        assert (await registered(psp)).psp_object_id == (await registered(psp)).psp_object_id

    async def test_same_key_with_other_content_is_never_a_refusal(self, psp):
        await registered(psp)
        assert isinstance(await psp.register_order(order(amount=Money("USD", 1))), NoAnswer)

    async def test_decline_tells_the_reason(self, psp, http, gateway):
        answer = await registered(psp)
        assert (await pay(http, answer.hosted_page_url, DECLINED)).status == 303
        await gateway[0].until(lambda gateway: len(gateway.calls) == 1)
        (told,) = psp.translate(gateway[0].calls[0][2], Channel.PAYMENT)
        assert told.kind is NotificationKind.ORDER_FAILED
        assert told.code == "card_declined"
        assert told.reason
        page = await (await http.get(answer.hosted_page_url)).text()
        assert "Your bank declined this card." in page

    async def test_a_soft_decline_lets_another_card_pay(self, psp, http, gateway):
        answer = await registered(psp)
        refused = await pay(http, answer.hosted_page_url, NO_FUNDS)
        assert refused.status == 402
        assert "insufficient funds" in await refused.text()
        assert (await pay(http, answer.hosted_page_url, PAYS)).status == 303
        await gateway[0].until(lambda gateway: len(gateway.calls) == 1)
        assert gateway[0].types() == ["payment_intent.succeeded"]

    async def test_paying_twice_tells_once(self, psp, http, gateway):
        answer = await registered(psp)
        for _ in range(2):
            assert (await pay(http, answer.hosted_page_url, PAYS)).status == 303
        other = await registered(psp, "ORD-2")
        await pay(http, other.hosted_page_url, PAYS)
        await gateway[0].until(lambda gateway: len(gateway.calls) == 2)
        assert gateway[0].types() == ["payment_intent.succeeded"] * 2

    async def test_refusal_at_registration(self, psp):
        answer = await psp.register_order(order("ORD-fault-reject"))
        assert isinstance(answer, Rejected)
        assert answer.code == "account_closed"
        assert await psp.register_order(order("ORD-fault-reject")) == answer
        assert isinstance(await psp.query_order("ORD-fault-reject", ""), NotFound)

    async def test_cancel(self, psp, http, gateway):
        answer = await registered(psp)
        for _ in range(2):
            canceled = await psp.cancel_order("ORD-1", answer.psp_object_id)
            assert isinstance(canceled, Accepted)
            assert canceled.kind is NotificationKind.ORDER_CANCELED
        await gateway[0].until(lambda gateway: len(gateway.calls) == 1)
        assert gateway[0].types() == ["payment_intent.canceled"]

    async def test_cancel_of_a_paid_order_says_that_it_is_paid(self, psp, http):
        answer = await registered(psp)
        await pay(http, answer.hosted_page_url, PAYS)
        canceled = await psp.cancel_order("ORD-1", "")
        assert isinstance(canceled, Accepted)
        assert canceled.kind is NotificationKind.ORDER_SUCCEEDED

    async def test_wrong_api_key_refuses_no_order(self, sandbox: RunningSandbox):
        from dataclasses import replace

        stranger = SandboxPsp(replace(sandbox.config(), api_key="sk_other"))
        assert isinstance(await stranger.register_order(order()), NotSent)
        assert isinstance(await stranger.query_order("ORD-1", ""), NoAnswer)
        await stranger.close()


class TestAmbiguity:
    async def test_timeout_is_unknown_and_found_by_asking(self, sandbox: RunningSandbox):
        psp = SandboxPsp(sandbox.config(timeout_ms=200))
        assert isinstance(await psp.register_order(order("ORD-fault-timeout")), NoAnswer)
        found = await psp.query_order("ORD-fault-timeout", "")
        assert isinstance(found, Accepted)
        assert found.hosted_page_url
        again = await psp.register_order(order("ORD-fault-timeout"))
        assert isinstance(again, Accepted)
        assert again.psp_object_id == found.psp_object_id
        await psp.close()

    async def test_lost_request_is_unknown_then_not_found_then_sent_again(self, sandbox: RunningSandbox):
        psp = SandboxPsp(sandbox.config(timeout_ms=200))
        assert isinstance(await psp.register_order(order("ORD-fault-lost")), NoAnswer)
        assert isinstance(await psp.query_order("ORD-fault-lost", ""), NotFound)
        assert isinstance(await psp.register_order(order("ORD-fault-lost")), Accepted)
        await psp.close()

    async def test_500_after_acting_gives_the_same_intent_on_retry(self, psp):
        assert isinstance(await psp.register_order(order("ORD-fault-error_after")), NoAnswer)
        found = await psp.query_order("ORD-fault-error_after", "")
        again = await psp.register_order(order("ORD-fault-error_after"))
        assert isinstance(found, Accepted)
        assert isinstance(again, Accepted)
        assert again.psp_object_id == found.psp_object_id

    async def test_slow_answer_is_an_answer(self, sandbox: RunningSandbox, psp, http):
        async with http.post(f"{sandbox.url}/_control/faults", json={"slow_ms": 120}, headers=OPERATOR) as answer:
            assert answer.status == 200
        begin = time.monotonic()
        assert isinstance(await psp.register_order(order()), Accepted)
        assert time.monotonic() - begin >= 0.12

    async def test_no_connection_is_not_sent(self, sandbox: RunningSandbox):
        psp = SandboxPsp(sandbox.config(base_url="http://127.0.0.1:1/sandbox"))
        assert isinstance(await psp.register_order(order()), NotSent)
        await psp.close()

    async def test_throttled_says_when_to_come_back(self, psp):
        answer = await psp.register_order(order("ORD-fault-throttle"))
        assert isinstance(answer, NotSent)
        assert answer.throttled
        assert answer.retry_after_s == 1
        assert isinstance(await psp.register_order(order("ORD-fault-throttle")), Accepted)


class TestWebhooks:
    async def test_duplicates(self, psp, http, gateway):
        answer = await registered(psp, "ORD-fault-duplicate_webhooks")
        await pay(http, answer.hosted_page_url, PAYS)
        await gateway[0].until(lambda gateway: len(gateway.calls) == 3)
        told = [psp.translate(body, Channel.PAYMENT)[0] for _, _, body in gateway[0].calls]
        assert {each.kind for each in told} == {NotificationKind.ORDER_SUCCEEDED}
        assert len({each.psp_event_id for each in told}) == 2

    async def test_reordered(self, psp, http, gateway):
        answer = await registered(psp, "ORD-fault-reorder_webhooks")
        await pay(http, answer.hosted_page_url, PAYS)
        await gateway[0].until(lambda gateway: len(gateway.calls) == 2)
        told = [psp.translate(body, Channel.PAYMENT)[0].kind for _, _, body in gateway[0].calls]
        assert told == [NotificationKind.ORDER_SUCCEEDED, NotificationKind.ORDER_PENDING]

    async def test_refused_webhooks_come_again(self, psp, http, gateway):
        sink: Gateway = gateway[0]
        sink.refuse = True
        answer = await registered(psp)
        await pay(http, answer.hosted_page_url, PAYS)
        await _until_tried(http, answer.hosted_page_url)
        sink.refuse = False
        await sink.until(lambda gateway: len(gateway.calls) == 1)

    async def test_a_killed_sandbox_keeps_intents_and_undelivered_webhooks(self, sandbox, psp, http, gateway):
        sink: Gateway = gateway[0]
        sink.refuse = True
        open_order = await registered(psp, "ORD-2")
        answer = await registered(psp)
        await pay(http, answer.hosted_page_url, PAYS)
        await sandbox.kill()
        sink.refuse = False
        await sandbox.start()
        await sink.until(lambda gateway: len(gateway.calls) == 1)
        assert sink.types() == ["payment_intent.succeeded"]
        found = await psp.query_order("ORD-1", "")
        assert isinstance(found, Accepted)
        assert found.kind is NotificationKind.ORDER_SUCCEEDED
        assert (await registered(psp, "ORD-2")).psp_object_id == open_order.psp_object_id


class TestRefund:
    async def test_refund_ends_in_a_webhook(self, psp, http, gateway):
        answer = await registered(psp)
        await pay(http, answer.hosted_page_url, PAYS)
        refund = ExecuteRefund("REF-1", "ORD-1", "sandbox", answer.psp_object_id, Money("USD", 2500))
        first, second = await psp.refund(refund), await psp.refund(refund)
        assert isinstance(first, Accepted)
        assert isinstance(second, Accepted)
        assert first.psp_object_id == second.psp_object_id
        await gateway[0].until(lambda gateway: "refund.succeeded" in gateway.types())
        (told,) = psp.translate(gateway[0].calls[-1][2], Channel.PAYMENT)
        assert (told.kind, told.merchant_reference, told.amount) == (
            NotificationKind.REFUND_SUCCEEDED,
            "REF-1",
            Money("USD", 2500),
        )
        assert told.psp_payment_id == answer.psp_object_id
        found = await psp.query_refund("REF-1", "")
        assert isinstance(found, Accepted)
        assert found.kind is NotificationKind.REFUND_SUCCEEDED

    async def test_never_more_than_was_paid(self, psp, http):
        answer = await registered(psp)
        await pay(http, answer.hosted_page_url, PAYS)
        for number, kind in ((1, Accepted), (2, Rejected)):
            refund = ExecuteRefund(f"REF-{number}", "ORD-1", "sandbox", answer.psp_object_id, Money("USD", 5000))
            assert isinstance(await psp.refund(refund), kind)


class TestPayout:
    async def told(self, psp: SandboxPsp, gateway: Gateway, reference: str, count: int) -> list[NotificationKind]:
        answer = await psp.payout(payout(reference))
        assert isinstance(answer, Accepted), answer
        assert answer.psp_object_id.startswith("po_")
        await gateway.until(lambda gateway: len(gateway.calls) == count)
        kinds = []
        for path, headers, body in gateway.calls:
            assert path == "/webhooks/sandbox/payouts"
            psp.verify(headers, body, Channel.PAYOUT, int(time.time()))
            (told,) = psp.translate(body, Channel.PAYOUT)
            assert told.merchant_reference == reference
            assert told.amount == Money("USD", 750)
            kinds.append(told.kind)
        return kinds

    async def test_completes(self, psp, gateway):
        assert await self.told(psp, gateway[0], "PAYOUT-1", 2) == [
            NotificationKind.PAYOUT_PROCESSING,
            NotificationKind.PAYOUT_COMPLETED,
        ]
        found = await psp.query_payout("PAYOUT-1", "")
        assert isinstance(found, Accepted)
        assert found.kind is NotificationKind.PAYOUT_COMPLETED

    async def test_returned_by_the_bank(self, psp, gateway):
        assert (await self.told(psp, gateway[0], "PO-fault-return", 3))[-1] is NotificationKind.PAYOUT_RETURNED

    async def test_failed(self, psp, gateway):
        assert (await self.told(psp, gateway[0], "PO-fault-fail", 2))[-1] is NotificationKind.PAYOUT_FAILED

    async def test_rejected_by_compliance_later(self, psp, gateway):
        assert (await self.told(psp, gateway[0], "PO-fault-reject", 2))[-1] is NotificationKind.PAYOUT_REJECTED

    async def test_refused_by_compliance_at_once(self, psp):
        answer = await psp.payout(payout("PO-fault-block"))
        assert isinstance(answer, Rejected)
        assert answer.compliance

    async def test_idempotent_by_reference(self, psp, gateway):
        first, second = await psp.payout(payout()), await psp.payout(payout())
        assert isinstance(first, Accepted)
        assert isinstance(second, Accepted)
        assert first.psp_object_id == second.psp_object_id
        await gateway[0].until(lambda gateway: "payout.completed" in gateway.types())
        assert len(gateway[0].calls) == 2

    async def test_bad_bank_details_are_refused(self, psp):
        bad = Recipient("Jane Doe", "US", "1234567890", "Anytown", "aba_routing_number", "123456789")
        answer = await psp.payout(PayoutInstruction("PO-1", Money("USD", 750), bad, "Freelance work"))
        assert isinstance(answer, Rejected)
        assert answer.code == "bank_details_invalid"
        assert not answer.compliance


async def _until_tried(http: aiohttp.ClientSession, page: str) -> None:
    root = page.split("/sandbox/", 1)[0]
    for _ in range(100):
        answer = json.loads(await (await http.get(f"{root}/_control/pending", headers=OPERATOR)).text())
        if answer["pending"]:
            return
