"""What a PSP's answer means, and what its notifications say.

The rule that everything else rests on: an answer that we did not get is not a failure. A timeout, a connection that broke after the
request left, a 5xx: the PSP may or may not have acted, so the attempt is UNKNOWN until the PSP says which. Only a request that
certainly never left, and only a PSP that certainly did not act, may be treated as "not sent".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from executor.domain.attempt import AttemptEvent
from kernel.money import Money

__all__ = [
    "Accepted",
    "Answer",
    "NoAnswer",
    "NotFound",
    "NotSent",
    "Notification",
    "NotificationKind",
    "Rejected",
    "answer_from_http_error",
    "bounded",
    "event_of",
]


class NotificationKind(Enum):
    """The names are those of ducat.executor.v1.NotificationKind; the values are its lower-case text in ducat.event.v1.OutcomeFound."""

    UNSPECIFIED = "unspecified"
    ORDER_SUCCEEDED = "order_succeeded"
    ORDER_FAILED = "order_failed"
    ORDER_CANCELED = "order_canceled"
    ORDER_EXPIRED = "order_expired"
    ORDER_PENDING = "order_pending"
    REFUND_SUCCEEDED = "refund_succeeded"
    REFUND_FAILED = "refund_failed"
    PAYOUT_PROCESSING = "payout_processing"
    PAYOUT_COMPLETED = "payout_completed"
    PAYOUT_FAILED = "payout_failed"
    PAYOUT_REJECTED = "payout_rejected"
    PAYOUT_RETURNED = "payout_returned"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_WON = "dispute_won"
    DISPUTE_LOST = "dispute_lost"

    @property
    def is_final(self) -> bool:
        """True where nothing more has to be asked about the order, refund or payout."""
        return self in _FINAL


_FINAL = frozenset(
    {
        NotificationKind.ORDER_SUCCEEDED,
        NotificationKind.ORDER_FAILED,
        NotificationKind.ORDER_CANCELED,
        NotificationKind.ORDER_EXPIRED,
        NotificationKind.REFUND_SUCCEEDED,
        NotificationKind.REFUND_FAILED,
        NotificationKind.PAYOUT_COMPLETED,
        NotificationKind.PAYOUT_FAILED,
        NotificationKind.PAYOUT_REJECTED,
        NotificationKind.PAYOUT_RETURNED,
    }
)


@dataclass(frozen=True, slots=True)
class Notification:
    """One fact that a PSP told, verified and translated."""

    psp_event_id: str
    kind: NotificationKind
    psp_object_id: str
    merchant_reference: str
    psp_type: str
    amount: Money | None = None
    code: str = ""
    reason: str = ""
    occur_time_ns: int = 0
    psp_payment_id: str = ""
    """Of a refund: the PSP's id of the payment whose money goes back."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The PSP has it. `kind` says how far it is: UNSPECIFIED or a kind that is not final means still under way."""

    psp_object_id: str
    hosted_page_url: str = ""
    kind: NotificationKind = NotificationKind.UNSPECIFIED
    amount: Money | None = None
    code: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The PSP refuses; final. `compliance`: an AML, fraud or sanctions check refused."""

    code: str
    reason: str
    compliance: bool = False


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The PSP may or may not have acted."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotSent:
    """The PSP certainly did not act: the request never left, or the PSP said "later". Send again after `retry_after_s` or on schedule."""

    reason: str
    retry_after_s: float = 0.0
    throttled: bool = False
    """True where the PSP is well and only asks for less; it does not count against its health."""
    barred: bool = False
    """True where nothing was tried, because this PSP does not answer others: it costs no step of the schedule."""


@dataclass(frozen=True, slots=True)
class NotFound:
    """Answer to a query: the PSP does not have it."""


Answer = Accepted | Rejected | NoAnswer | NotSent | NotFound

PSP_OBJECT_ID_LENGTH_MAX = 255
HOSTED_PAGE_URL_LENGTH_MAX = 2_048
"""Both are kept for ever and told in every list of payments."""


def bounded(answer: Answer) -> Answer:
    """The answer, or NoAnswer where it accepts with an id or an address beyond the limits: it is malformed, so nobody knows what the
    PSP did, and it is asked again.
    """
    if isinstance(answer, Accepted):
        for name, text, length_max in (
            ("id of the object", answer.psp_object_id, PSP_OBJECT_ID_LENGTH_MAX),
            ("hosted_page_url", answer.hosted_page_url, HOSTED_PAGE_URL_LENGTH_MAX),
        ):
            if len(text) > length_max:
                return NoAnswer(f"malformed: the PSP's {name} has {len(text)} characters, more than {length_max}")
    return answer


_EVENTS: dict[type, AttemptEvent] = {
    Accepted: AttemptEvent.ACCEPTED,
    Rejected: AttemptEvent.REJECTED,
    NoAnswer: AttemptEvent.NO_ANSWER,
    NotSent: AttemptEvent.NOT_SENT,
    NotFound: AttemptEvent.NOT_FOUND,
}


def event_of(answer: Answer) -> AttemptEvent:
    """What an answer does to an attempt."""
    return _EVENTS[type(answer)]


_IDEMPOTENCY_CODES = frozenset({"idempotency_error", "idempotency_key_in_use"})


def answer_from_http_error(
    status: int, *, error_type: str, code: str, reason: str, retry_after_s: float = 0.0
) -> Rejected | NoAnswer | NotSent:
    """What an HTTP status outside 2xx means for a request that was sent with an idempotency key.

    429: the PSP did not act. 401: our key is wrong, which no order should die of; the PSP did not act. 408, 5xx and 3xx: nobody knows.
    409 and an idempotency error say that the PSP has something under our key, or is at it, so it must be asked. Any other 4xx is a
    refusal.
    Source: Stripe's "Advanced error handling" (a 500 is indeterminate; 429, 401 are not saved under the key).
    """
    reason = reason or f"HTTP {status}"
    if status == 429:
        return NotSent(reason, retry_after_s, throttled=True)
    if status == 401:
        return NotSent(f"the PSP does not accept our API key: {reason}", retry_after_s)
    if status < 400 or status >= 500 or status in (408, 409):
        return NoAnswer(f"HTTP {status}: {reason}")
    if error_type in _IDEMPOTENCY_CODES or code in _IDEMPOTENCY_CODES:
        return NoAnswer(reason)
    return Rejected(code or error_type or f"http_{status}", reason, compliance=error_type == "compliance_error")
