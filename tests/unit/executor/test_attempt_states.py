"""A state that an attempt must never reach: every state × event."""

from __future__ import annotations

import itertools

import pytest

from executor.domain.attempt import ATTEMPT_TABLE, AttemptEvent, AttemptKind, AttemptState
from kernel.state_table import TransitionRefused

S, E = AttemptState, AttemptEvent
SAME, REFUSED = "same", "refused"

EXPECTED: dict[AttemptState, dict[AttemptEvent, object]] = {
    S.SENDING: {
        E.ACCEPTED: S.ACCEPTED,
        E.REJECTED: S.REJECTED,
        E.NO_ANSWER: S.UNKNOWN,
        E.NOT_SENT: SAME,
        E.NOT_FOUND: SAME,
    },
    S.UNKNOWN: {
        E.ACCEPTED: S.ACCEPTED,
        E.REJECTED: S.REJECTED,
        E.NO_ANSWER: SAME,
        E.NOT_SENT: SAME,
        E.NOT_FOUND: S.SENDING,
    },
    S.ACCEPTED: {E.ACCEPTED: SAME, E.REJECTED: REFUSED, E.NO_ANSWER: SAME, E.NOT_SENT: SAME, E.NOT_FOUND: SAME},
    S.REJECTED: {E.ACCEPTED: REFUSED, E.REJECTED: SAME, E.NO_ANSWER: SAME, E.NOT_SENT: SAME, E.NOT_FOUND: SAME},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(AttemptState, AttemptEvent)))
def test_every_state_and_event(state: AttemptState, event: AttemptEvent) -> None:
    expected = EXPECTED[state][event]
    if expected is REFUSED:
        with pytest.raises(TransitionRefused):
            ATTEMPT_TABLE.next(state, event)
    else:
        assert ATTEMPT_TABLE.next(state, event) is (None if expected is SAME else expected)


def test_no_answer_never_rejects() -> None:
    assert all(ATTEMPT_TABLE.transitions.get((state, E.NO_ANSWER)) is not S.REJECTED for state in AttemptState)


def test_stored_numbers_are_those_of_the_contract() -> None:
    from ducat.executor.v1 import executor_pb2

    for state in AttemptState:
        assert executor_pb2.AttemptState.Value(f"ATTEMPT_STATE_{state.name}") == state.value
    for kind in AttemptKind:
        assert executor_pb2.AttemptKind.Value(f"ATTEMPT_KIND_{kind.name}") == kind.value
