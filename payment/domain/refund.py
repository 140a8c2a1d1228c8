"""The life of a refund. Its use cases are not served yet; the table is what they will go through."""

from __future__ import annotations

from enum import Enum, IntEnum

from kernel.state_table import StateTable

__all__ = ["REFUND_TABLE", "RefundEvent", "RefundState"]


class RefundState(IntEnum):
    """The numbers are those of ducat.payment.v1.RefundState."""

    PENDING = 1
    EXECUTING = 2
    SUCCEEDED = 3
    FAILED = 4


class RefundEvent(Enum):
    """What can happen to a refund, and who says so."""

    FUNDS_HELD = "wallet: the seller's money is held"
    FUNDS_REFUSED = "wallet: not covered"
    SUBMITTED = "executor: the PSP has it"
    REJECTED = "executor: the PSP refuses it"
    SUCCEEDED = "PSP: the money is back with the buyer"
    FAILED = "PSP: it failed"


_S, _E = RefundState, RefundEvent

REFUND_TABLE: StateTable[RefundState, RefundEvent] = StateTable(
    "refund",
    RefundState,
    RefundEvent,
    {
        (_S.PENDING, _E.FUNDS_HELD): _S.PENDING,
        (_S.PENDING, _E.FUNDS_REFUSED): _S.FAILED,
        (_S.PENDING, _E.SUBMITTED): _S.EXECUTING,
        (_S.PENDING, _E.REJECTED): _S.FAILED,
        (_S.PENDING, _E.SUCCEEDED): _S.SUCCEEDED,
        (_S.PENDING, _E.FAILED): _S.FAILED,
        (_S.EXECUTING, _E.REJECTED): _S.FAILED,
        (_S.EXECUTING, _E.SUCCEEDED): _S.SUCCEEDED,
        (_S.EXECUTING, _E.FAILED): _S.FAILED,
        # Banks send refunds back days after the PSP called them paid.
        (_S.SUCCEEDED, _E.FAILED): _S.FAILED,
    },
    ignored=frozenset(
        {
            (_S.EXECUTING, _E.FUNDS_HELD),
            (_S.EXECUTING, _E.SUBMITTED),
            (_S.SUCCEEDED, _E.FUNDS_HELD),
            (_S.SUCCEEDED, _E.SUBMITTED),
            (_S.SUCCEEDED, _E.SUCCEEDED),
            (_S.FAILED, _E.FUNDS_HELD),
            (_S.FAILED, _E.FUNDS_REFUSED),
            (_S.FAILED, _E.SUBMITTED),
            (_S.FAILED, _E.REJECTED),
            (_S.FAILED, _E.FAILED),
        }
    ),
)
