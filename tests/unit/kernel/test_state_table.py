"""Risk: a transition that is decided somewhere else than in the table."""

from __future__ import annotations

from enum import Enum

import pytest

from kernel.clock import FixedClock, SystemClock
from kernel.errors import DucatError, FieldViolation, InvalidArgument, NotFound
from kernel.names import payout_clearing, psp_clearing, seller_wallet
from kernel.state_table import StateTable, TransitionRefused


class Light(Enum):
    RED = 1
    GREEN = 2
    BROKEN = 3


class Happening(Enum):
    TURN = 1
    HIT = 2


TABLE = StateTable(
    "light",
    Light,
    Happening,
    {
        (Light.RED, Happening.TURN): Light.GREEN,
        (Light.GREEN, Happening.TURN): Light.RED,
        (Light.RED, Happening.HIT): Light.BROKEN,
    },
    frozenset({(Light.BROKEN, Happening.HIT)}),
)


def test_every_pair_moves_is_ignored_or_is_refused() -> None:
    def outcome(state: Light, event: Happening) -> Light | str | None:
        try:
            return TABLE.next(state, event)
        except TransitionRefused as refused:
            return f"refused {refused.event.name} in {refused.state.name}"

    assert {(state, event): outcome(state, event) for state in Light for event in Happening} == {
        (Light.RED, Happening.TURN): Light.GREEN,
        (Light.RED, Happening.HIT): Light.BROKEN,
        (Light.GREEN, Happening.TURN): Light.RED,
        (Light.GREEN, Happening.HIT): "refused HIT in GREEN",
        (Light.BROKEN, Happening.TURN): "refused TURN in BROKEN",
        (Light.BROKEN, Happening.HIT): None,
    }


def test_final_states_and_diagram_come_from_the_table() -> None:
    assert TABLE.final == {Light.BROKEN}
    assert "RED --> GREEN: TURN" in TABLE.diagram()


def test_a_pair_cannot_be_both_a_transition_and_ignored() -> None:
    pair = (Light.RED, Happening.TURN)
    with pytest.raises(ValueError, match="both a transition and ignored"):
        StateTable("light", Light, Happening, {pair: Light.GREEN}, frozenset({pair}))


def test_errors_carry_reason_metadata_and_fields() -> None:
    error = InvalidArgument("bad", violations=[FieldViolation("a.b", "must be c")], metadata={"k": "v"})
    assert (error.reason, error.metadata, error.violations[0].field) == ("INVALID_ARGUMENT", {"k": "v"}, "a.b")
    assert NotFound("no").reason == "NOT_FOUND"
    assert DucatError("x", reason="OTHER").reason == "OTHER"


def test_account_names_and_clocks() -> None:
    assert seller_wallet("SELL-1", "USD") == "seller/SELL-1/USD"
    assert psp_clearing("sandbox", "USD") == "psp/sandbox/clearing/USD"
    assert payout_clearing("sandbox", "USD") == "psp/sandbox/payouts/USD"
    clock = FixedClock(1)
    clock.advance(seconds=2)
    assert clock.now_ns() == 2_000_000_001
    assert SystemClock().now_ns() > 1_700_000_000_000_000_000
