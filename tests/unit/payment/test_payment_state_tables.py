"""Every state with every event, for each table; and the risks that the tables exist for."""

from __future__ import annotations

from typing import Any

import pytest

from ducat.executor.v1 import executor_pb2
from ducat.payment.v1 import finding_pb2, payment_pb2, payout_pb2
from kernel.state_table import StateTable, TransitionRefused
from payment.domain.finding import FindingKind, FindingSubject
from payment.domain.notification import NotificationKind
from payment.domain.payment_order import (
    OPEN_STATES,
    PAID_STATES,
    PAYMENT_ORDER_TABLE,
    PaymentOrderEvent,
    PaymentOrderState,
)
from payment.domain.payout import PAYOUT_TABLE, PayoutEvent, PayoutState
from payment.domain.refund import REFUND_TABLE, RefundEvent, RefundState

Paid, Order = PaymentOrderState, PaymentOrderEvent
P, PE = PayoutState, PayoutEvent
R, RE = RefundState, RefundEvent

# One letter a pair, states across in the order of their numbers: a state's own letter moves there, "." changes
# nothing, "x" is refused. Written by hand from the design, not from the tables: the tables must agree with it.
ORDER_LETTERS = dict(zip("NESFCXPRDL", Paid, strict=True))
ORDER_MATRIX = {
    #                                   NESFCXPRDL
    Order.REGISTERED:                     "E.........",
    Order.REJECTED:                       "F.........",
    Order.SUCCEEDED:                      "SS.SSS....",
    Order.FAILED:                         "FF........",
    Order.CANCELED:                       "CC........",
    Order.EXPIRED:                        "XX........",
    Order.PENDING:                        "..........",
    Order.CANCEL_REQUESTED:               "C.........",
    Order.TIMED_OUT:                      "XX........",
    Order.REFUNDED_IN_PART:               "xxPxxxPxDL",
    Order.REFUNDED_IN_FULL:               "xxRxxxR.DL",
    Order.REFUND_FAILED_IN_PART:          "xxxxxxPPDL",
    Order.REFUND_FAILED:                  "xxxxxxSSDL",
    Order.DISPUTE_OPENED:                 "xxDxxxDD..",
    Order.DISPUTE_WON:                    "xx.xxx..Sx",
    Order.DISPUTE_WON_PARTIALLY_REFUNDED: "xx.xxx..Px",
    Order.DISPUTE_WON_REFUNDED:           "xx.xxx..Rx",
    Order.DISPUTE_LOST:                   "xxLxxxLLL.",
}  # fmt: skip
PAYOUT_LETTERS = dict(zip("ASHPOCFJRN", P, strict=True))
PAYOUT_MATRIX = {
    #                         ASHPOCFJRN   (A approval, O processing, C completed, J rejected, R returned, N canceled)
    PE.APPROVED:             "H........x",
    PE.APPROVED_FOR_LATER:   "S........x",
    PE.APPROVAL_REFUSED:     "Nxxxxxxxx.",
    PE.DUE:                  ".H........",
    PE.CANCEL_REQUESTED:     "NNNxxxxxx.",
    PE.FUNDS_HELD:           "xxP.......",
    PE.FUNDS_REFUSED:        "xxFxxx..x.",
    PE.SUBMITTED:            "xxxP.....x",
    PE.PSP_REJECTED:         "xxxFFx..xx",
    PE.COMPLIANCE_REJECTED:  "xxxJJx..xx",
    PE.PROCESSING:           "xxxO.....x",
    PE.COMPLETED:            "xxxCC.xx.x",
    PE.FAILED:               "xxxFFR...x",
    PE.RETURNED:             "xxxRRR...x",
}  # fmt: skip
REFUND_LETTERS = dict(zip("PESF", R, strict=True))
REFUND_MATRIX = {
    #                  PESF
    RE.FUNDS_HELD:    "P...",
    RE.FUNDS_REFUSED: "Fx..",
    RE.SUBMITTED:     "E...",
    RE.REJECTED:      "FFx.",
    RE.SUCCEEDED:     "SS.x",
    RE.FAILED:        "FFF.",
}  # fmt: skip

TABLES = [
    (PAYMENT_ORDER_TABLE, ORDER_MATRIX, ORDER_LETTERS),
    (PAYOUT_TABLE, PAYOUT_MATRIX, PAYOUT_LETTERS),
    (REFUND_TABLE, REFUND_MATRIX, REFUND_LETTERS),
]
PAIRS = [
    pytest.param(table, state, event, matrix[event][index], letters, id=f"{table.name}-{state.name}-{event.name}")
    for table, matrix, letters in TABLES
    for event in table.events
    for index, state in enumerate(table.states)
]


@pytest.mark.parametrize(("table", "state", "event", "expected", "letters"), PAIRS)
def test_every_state_with_every_event(
    table: StateTable[Any, Any], state: Any, event: Any, expected: str, letters: dict[str, Any]
) -> None:
    if expected == "x":
        with pytest.raises(TransitionRefused):
            table.next(state, event)
    elif expected == ".":
        assert table.next(state, event) is None
    else:
        assert table.next(state, event) is letters[expected]


def test_paid_money_is_never_forgotten() -> None:
    for (state, event), new in PAYMENT_ORDER_TABLE.transitions.items():
        if state in PAID_STATES:
            assert new in PAID_STATES, (state, event)


def test_every_unpaid_state_takes_a_success() -> None:
    for state in PAYMENT_ORDER_TABLE.states:
        if state not in PAID_STATES:
            assert PAYMENT_ORDER_TABLE.next(state, Order.SUCCEEDED) is Paid.SUCCESS


def test_a_closed_order_never_opens_again() -> None:
    for (state, _), new in PAYMENT_ORDER_TABLE.transitions.items():
        assert state in OPEN_STATES or new not in OPEN_STATES


def test_success_is_entered_once_only_from_unpaid_states_a_won_dispute_or_a_failed_refund() -> None:
    entries = {(state, event) for (state, event), new in PAYMENT_ORDER_TABLE.transitions.items() if new is Paid.SUCCESS}
    assert {event for _, event in entries} == {Order.SUCCEEDED, Order.DISPUTE_WON, Order.REFUND_FAILED}
    assert not {state for state, event in entries if event is Order.SUCCEEDED} & PAID_STATES


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (Paid, payment_pb2.PaymentOrderState, "PAYMENT_ORDER_STATE_"),
        (P, payout_pb2.PayoutState, "PAYOUT_STATE_"),
        (R, payment_pb2.RefundState, "REFUND_STATE_"),
        (FindingKind, finding_pb2.FindingKind, "FINDING_KIND_"),
        (FindingSubject, finding_pb2.FindingSubject, "FINDING_SUBJECT_"),
        (NotificationKind, executor_pb2.NotificationKind, "NOTIFICATION_KIND_"),
    ],
)
def test_numbers_are_those_of_the_contract(ours: Any, theirs: Any, prefix: str) -> None:
    contract = {name.removeprefix(prefix): number for name, number in theirs.items()}
    domain = {state.name: int(state) for state in ours}
    domain["UNSPECIFIED"] = domain.pop("UNKNOWN", 0)
    assert domain == contract
