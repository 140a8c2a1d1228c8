"""An attempt: one order, refund or payout at one PSP, and its life as a table.

    SENDING ──ACCEPTED──► ACCEPTED          stored before the PSP is called
       │ ├────REJECTED──► REJECTED          (a crash in between: the PSP is asked first, then the same call again)
       │ └────NO_ANSWER─► UNKNOWN ──ACCEPTED/REJECTED──► as above
       ▲                     │
       └────NOT_FOUND────────┘              the PSP never saw it: send again, same idempotency key

NOT_SENT changes nothing: the request did not leave, or the PSP said "later"; the attempt is sent again on schedule. A PSP that
contradicts itself (REJECTED after ACCEPTED, ACCEPTED after REJECTED) is refused, so that a person sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kernel.state_table import StateTable

__all__ = ["ATTEMPT_TABLE", "Attempt", "AttemptEvent", "AttemptKind", "AttemptState"]


class AttemptKind(Enum):
    """What an attempt is for. The values are stored and equal those of ducat.executor.v1.AttemptKind."""

    ORDER = 1
    REFUND = 2
    PAYOUT = 3


class AttemptState(Enum):
    """The values are stored and equal those of ducat.executor.v1.AttemptState."""

    SENDING = 1
    ACCEPTED = 2
    REJECTED = 3
    UNKNOWN = 4


class AttemptEvent(Enum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    NO_ANSWER = "no_answer"
    NOT_SENT = "not_sent"
    NOT_FOUND = "not_found"


_S, _E = AttemptState, AttemptEvent

ATTEMPT_TABLE: StateTable[AttemptState, AttemptEvent] = StateTable(
    "attempt",
    AttemptState,
    AttemptEvent,
    {
        (_S.SENDING, _E.ACCEPTED): _S.ACCEPTED,
        (_S.SENDING, _E.REJECTED): _S.REJECTED,
        (_S.SENDING, _E.NO_ANSWER): _S.UNKNOWN,
        (_S.UNKNOWN, _E.ACCEPTED): _S.ACCEPTED,
        (_S.UNKNOWN, _E.REJECTED): _S.REJECTED,
        (_S.UNKNOWN, _E.NOT_FOUND): _S.SENDING,
    },
    ignored=frozenset(
        {
            (_S.SENDING, _E.NOT_SENT),
            (_S.SENDING, _E.NOT_FOUND),
            (_S.UNKNOWN, _E.NO_ANSWER),
            (_S.UNKNOWN, _E.NOT_SENT),
            (_S.ACCEPTED, _E.ACCEPTED),
            (_S.ACCEPTED, _E.NO_ANSWER),
            (_S.ACCEPTED, _E.NOT_SENT),
            (_S.ACCEPTED, _E.NOT_FOUND),
            (_S.REJECTED, _E.REJECTED),
            (_S.REJECTED, _E.NO_ANSWER),
            (_S.REJECTED, _E.NOT_SENT),
            (_S.REJECTED, _E.NOT_FOUND),
        }
    ),
)


@dataclass(slots=True)
class Attempt:
    """One stored attempt. Times are unix nanoseconds, 0 where not set."""

    kind: AttemptKind
    reference: str
    psp: str
    state: AttemptState
    psp_object_id: str = ""
    hosted_page_url: str = ""
    code: str = ""
    reason: str = ""
    compliance: bool = False
    call_count: int = 1
    poll_count: int = 0
    cancel_requested: bool = False
    create_time_ns: int = 0
    update_time_ns: int = 0
    next_poll_time_ns: int = 0
    traceparent: str = ""
    is_new: bool = False
    """True only in the answer of the statement that stored it."""
