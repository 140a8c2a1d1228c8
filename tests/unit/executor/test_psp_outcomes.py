"""An answer that we did not get must never fail an order."""

from __future__ import annotations

import pytest

from executor.domain.outcome import NoAnswer, NotificationKind, NotSent, Rejected, answer_from_http_error


def classify(status: int, error_type: str = "", code: str = "", retry_after_s: float = 0.0) -> object:
    return answer_from_http_error(status, error_type=error_type, code=code, reason="why", retry_after_s=retry_after_s)


@pytest.mark.parametrize("status", [500, 501, 502, 503, 504, 599, 408, 409, 301, 302, 307, 100])
def test_nobody_knows(status: int) -> None:
    assert isinstance(classify(status), NoAnswer)


@pytest.mark.parametrize("status", [400, 402, 403, 404, 410, 422])
def test_refusals(status: int) -> None:
    assert classify(status, "card_error", "card_declined") == Rejected("card_declined", "why")


def test_throttled_is_not_sent_and_keeps_the_wait() -> None:
    assert classify(429, retry_after_s=7) == NotSent("why", 7, throttled=True)


def test_our_wrong_key_kills_no_order() -> None:
    assert isinstance(classify(401), NotSent)


@pytest.mark.parametrize(
    ("status", "error_type", "code"), [(400, "idempotency_error", ""), (409, "", "idempotency_key_in_use")]
)
def test_an_idempotency_error_says_that_the_psp_has_something(status: int, error_type: str, code: str) -> None:
    assert isinstance(classify(status, error_type, code), NoAnswer)


def test_compliance_is_told_apart() -> None:
    answer = classify(403, "compliance_error", "sanctions_match")
    assert isinstance(answer, Rejected)
    assert answer.compliance


def test_kinds_are_those_of_the_contract() -> None:
    from ducat.executor.v1 import executor_pb2

    names = {name.removeprefix("NOTIFICATION_KIND_") for name in executor_pb2.NotificationKind.keys()}  # noqa: SIM118
    assert names == {kind.name for kind in NotificationKind}
    assert all(kind.value == kind.name.lower() for kind in NotificationKind)
    assert not NotificationKind.UNSPECIFIED.is_final
    assert not NotificationKind.ORDER_PENDING.is_final
    assert not NotificationKind.PAYOUT_PROCESSING.is_final
