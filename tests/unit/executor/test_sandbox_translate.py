"""Misread PSP answers: unknown statuses, odd shapes, amounts in other exponents."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.domain.command import ExecuteOrder, PayoutInstruction, Recipient
from executor.domain.outcome import Accepted, NoAnswer, NotFound, NotificationKind, Rejected
from executor.domain.routing import Capability
from executor.psp.base import RETRY_AFTER_S_MAX, Capabilities, HttpAnswer, PspBase, PspConfig, _seconds
from executor.psp.registry import ADAPTERS
from executor.psp.sandbox import SandboxPsp, translate
from executor.psp.sandbox.capabilities import CAPABILITIES
from kernel.errors import DucatError, InvalidArgument, Unimplemented
from kernel.money import CURRENCY_EXPONENTS, Money

CONFIG = PspConfig("sandbox", "http://x/sandbox", "k", "p", "s", "http://x/r", "http://x/p", "Your Shop Name", 1000)


def answered(status: int, body: object) -> HttpAnswer:
    return HttpAnswer(status, json.dumps(body).encode())


def event(event_type: str, **fields: object) -> bytes:
    return json.dumps(
        {"id": "evt_1", "type": event_type, "created": 5, "data": {"object": {"id": "pi_1", **fields}}}
    ).encode()


def test_the_intent_is_that_of_the_requirements() -> None:
    order = ExecuteOrder("ORD-123-A", "CHCKT-20250721-ABCD-1234", "SELL-XYZ-1", Money("USD", 10000))
    assert json.loads(translate.intent_body(order, CONFIG, CAPABILITIES)) == {
        "amount": 10000,
        "currency": "usd",
        "payment_method_types": ["card"],
        "description": "Payment for order ORD-123-A",
        "metadata": {
            "payment_order_id": "ORD-123-A",
            "checkout_id": "CHCKT-20250721-ABCD-1234",
            "seller_id": "SELL-XYZ-1",
        },
        "return_url": "http://x/r?checkout_id=CHCKT-20250721-ABCD-1234",
        "statement_descriptor": "Your Shop Name",
    }
    with_page = json.loads(translate.intent_body(replace(order, page_key="a" * 32), CONFIG, CAPABILITIES))
    assert with_page["return_url"] == f"http://x/r?key={'a' * 32}", "nothing that can be guessed"


def test_the_payout_is_that_of_the_requirements() -> None:
    recipient = Recipient(
        "Jane Doe",
        "US",
        "1234567890",
        "Anytown National Bank",
        "aba_routing_number",
        "021000021",
        address={"city": "X"},
    )
    payout = PayoutInstruction(
        "PAYOUT-ABC-789", Money("USD", 750), recipient, "Freelance project payment for Order #456"
    )
    assert json.loads(translate.payout_body(payout, CONFIG, CAPABILITIES)) == {
        "amount": {"value": 750, "currency": "USD"},
        "recipient_details": {
            "type": "bank_account",
            "account_holder_name": "Jane Doe",
            "country": "US",
            "account_number": "1234567890",
            "bank_name": "Anytown National Bank",
            "routing_number": "021000021",
            "address": {"city": "X"},
        },
        "purpose": "Freelance project payment for Order #456",
        "your_reference_id": "PAYOUT-ABC-789",
        "callback_url": "http://x/p",
    }
    for secret in ("Jane", "1234567890", "021000021"):
        assert secret not in repr(payout)


@pytest.mark.parametrize("status", ["requires_action", "succeeded_maybe", "", None, 7])
def test_unknown_statuses_mean_pending(status: object) -> None:
    body = {"id": "pi_1", "object": "payment_intent", "status": status}
    for read in (translate.answer, translate.query_answer):
        answer = read(answered(200, body), CAPABILITIES)
        assert isinstance(answer, Accepted)
        assert not answer.kind.is_final


def test_unknown_events_change_nothing() -> None:
    (told,) = translate.notifications(event("payment_intent.blessed"), CAPABILITIES)
    assert told.kind is NotificationKind.UNSPECIFIED
    assert told.psp_type == "payment_intent.blessed"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{}", b"null", b'{"id":"a"}', b"\xff", b'{"id":1,"type":2,"data":{"object":{"id":3}}}'),
        *(event("x", id="p" * 256), event("x" * 256)),  # ids are indexed: one without end could not be stored
    ],
)
def test_what_is_no_webhook_is_the_callers_mistake(body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        translate.notifications(body, CAPABILITIES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount": 7500.0, "currency": "usd"},
        {"amount": "75.00", "currency": "usd"},
        {"amount": True, "currency": "usd"},
        {"amount": 7500, "currency": "usdt"},
        {"amount": 7500, "currency": "u\udfffd"},
        {"amount": 7500},
        {"currency": "usd"},
        {"amount": 10**30, "currency": "usd"},
        {"amount": {"value": 7500.5, "currency": "USD"}},
    ],
)
def test_an_amount_that_cannot_be_read_is_told_as_zero_and_never_as_none(wrong: dict[str, object]) -> None:
    """None would mean that the PSP tells no amount, and the order would be credited in full."""
    (told,) = translate.notifications(event("payment_intent.succeeded", **wrong), CAPABILITIES)
    assert told.amount is not None
    assert told.amount.amount_minor == 0
    assert told.amount.currency_code.isprintable()


def test_no_amount_is_none() -> None:
    (told,) = translate.notifications(event("payment_intent.succeeded"), CAPABILITIES)
    assert told.amount is None


@pytest.mark.parametrize("created", ["-1", "1e3", "true", "9" * 30, '"now"'])
def test_a_time_that_no_message_can_carry_is_the_callers_mistake(created: str) -> None:
    body = f'{{"id":"evt_1","type":"payment_intent.succeeded","created":{created},"data":{{"object":{{"id":"pi_1"}}}}}}'
    with pytest.raises(InvalidArgument):
        translate.notifications(body.encode(), CAPABILITIES)


def test_half_a_surrogate_pair_does_not_make_a_webhook_fail_for_ever() -> None:
    thing = r'{"id":"pi_\ud800","object":"payment_intent","failure_message":"\udfff","metadata":{"payment_order_id":"O\ud800"}}'
    body = rf'{{"id":"evt_\ud800","type":"payment_intent.succeeded","created":1,"data":{{"object":{thing}}}}}'
    (told,) = translate.notifications(body.encode(), CAPABILITIES)
    for text in (told.psp_event_id, told.psp_object_id, told.merchant_reference, told.reason):
        text.encode()


def test_a_nul_in_a_psps_words_does_not_make_an_attempt_fail_for_ever() -> None:
    answer = translate.answer(
        answered(402, {"error": {"type": "card\0error", "code": "de\0clined", "message": "no\0"}}), CAPABILITIES
    )
    assert isinstance(answer, Rejected)
    assert "\0" not in answer.code + answer.reason
    taken = translate.answer(answered(200, {"id": "pi\0", "hosted_page_url": "http://x/\0"}), CAPABILITIES)
    assert isinstance(taken, Accepted)
    assert "\0" not in taken.psp_object_id + taken.hosted_page_url


def test_an_answer_nested_without_end_is_no_crash() -> None:
    with pytest.raises(InvalidArgument):
        translate.notifications(b"[" * 200_000, CAPABILITIES)
    assert isinstance(translate.answer(HttpAnswer(200, b"[" * 200_000), CAPABILITIES), NoAnswer)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["id", "type", "data", "object", "amount", "currency", "metadata", "created", "value", "status"]
                ),
                inner,
            )
        ),
    )
)
def test_no_json_crashes_the_translation(value: object) -> None:
    body = json.dumps(value).encode()
    with contextlib.suppress(DucatError):
        translate.notifications(body, CAPABILITIES)
    for status in (200, 402, 404, 500):
        translate.answer(HttpAnswer(status, body), CAPABILITIES)
        translate.query_answer(HttpAnswer(status, body), CAPABILITIES)


def test_a_success_without_an_object_is_no_success() -> None:
    assert isinstance(translate.answer(answered(200, {}), CAPABILITIES), NoAnswer)
    assert isinstance(translate.answer(HttpAnswer(200, b"<html>"), CAPABILITIES), NoAnswer)


def test_a_question_never_rejects() -> None:
    for status in (400, 401, 403, 409, 429, 500):
        assert isinstance(translate.query_answer(answered(status, {}), CAPABILITIES), NoAnswer)
    assert isinstance(translate.query_answer(answered(404, {}), CAPABILITIES), NotFound)
    assert isinstance(translate.query_answer(answered(200, {"data": []}), CAPABILITIES), NotFound)


def test_a_refusal_keeps_code_and_words() -> None:
    error = {"error": {"type": "card_error", "code": "account_closed", "message": "closed"}}
    assert translate.answer(answered(402, error), CAPABILITIES) == Rejected("account_closed", "closed")


class TestExponents:
    STRIPE_LIKE = Capabilities(frozenset(), exponents={"UGX": 2, "ISK": 2, "CLP": 2, "IDR": 0})

    def test_more_decimals_at_the_psp(self) -> None:
        assert self.STRIPE_LIKE.amount_to_psp(Money("UGX", 75)) == 7500
        assert self.STRIPE_LIKE.amount_from_psp("ugx", 7500) == Money("UGX", 75)
        with pytest.raises(ValueError, match="whole number"):
            self.STRIPE_LIKE.amount_from_psp("ugx", 7501)

    def test_fewer_decimals_at_the_psp(self) -> None:
        assert self.STRIPE_LIKE.amount_to_psp(Money("IDR", 7500)) == 75
        with pytest.raises(ValueError, match="more decimals"):
            self.STRIPE_LIKE.amount_to_psp(Money("IDR", 7501))

    @given(st.sampled_from(sorted(CURRENCY_EXPONENTS)), st.integers(1, 10**15))
    def test_iso_currencies_come_back_as_they_went(self, code: str, amount: int) -> None:
        money = Money(code, amount)
        assert CAPABILITIES.amount_from_psp(code.lower(), CAPABILITIES.amount_to_psp(money)) == money


async def test_what_a_psp_lacks_says_so() -> None:
    with pytest.raises(Unimplemented) as lacking:
        await PspBase(CONFIG).query_order("ORD-1", "")
    assert lacking.value.reason == "PROVIDER_UNSUPPORTED"

    from dataclasses import replace

    provider = SandboxPsp(replace(CONFIG, currency_codes=frozenset({"EUR"}))).provider
    assert provider.currency_codes == {"EUR"}
    assert Capability.PAYOUT in provider.capabilities
    assert set(ADAPTERS) >= {"sandbox"}


async def test_no_order_can_take_the_idempotency_key_of_another_ones_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    async def call(_http: object, _method: str, _path: str, headers: dict[str, str], _body: bytes = b"") -> NoAnswer:
        keys.append(headers["Idempotency-Key"])
        return NoAnswer("")

    monkeypatch.setattr("executor.psp.base.Http.call", call)
    psp = SandboxPsp(CONFIG)
    await psp.cancel_order("ORD-1", "pi_1")
    for order_id in ("cancel-ORD-1", keys[0]):
        await psp.register_order(ExecuteOrder(order_id, "CHCKT-1", "SELL-1", Money("USD", 1)))
    assert keys[1] == "cancel-ORD-1"
    assert len(set(keys)) == 3


def test_a_psp_cannot_put_an_order_off_for_days() -> None:
    assert _seconds("999999") == RETRY_AFTER_S_MAX
    assert _seconds("7") == 7
