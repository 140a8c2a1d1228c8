"""Transitions as a table: what an event does to a state is looked up, never decided in an `if`.

A pair that is in the table moves to its new state. A pair that is listed as ignored leaves the state alone: it is a
late, repeated or reordered fact. Every other pair is refused. `diagram()` draws the table for the docs, and a test
walks every state × event.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

__all__ = ["StateTable", "TransitionRefused"]

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class TransitionRefused(Exception):
    """This event may not happen in this state."""

    def __init__(self, name: str, state: Enum, event: Enum) -> None:
        super().__init__(f"{name}: {event.name} is not allowed in state {state.name}")
        self.state = state
        self.event = event


class StateTable(Generic[State, Event]):
    """The transitions of one kind of thing.

    ``transitions``: (state, event) → new state. ``ignored``: pairs that change nothing.
    """

    def __init__(
        self,
        name: str,
        states: type[State],
        events: type[Event],
        transitions: Mapping[tuple[State, Event], State],
        ignored: frozenset[tuple[State, Event]] = frozenset(),
    ) -> None:
        both = ignored & transitions.keys()
        if both:
            raise ValueError(f"{name}: both a transition and ignored: {sorted(str(pair) for pair in both)}")
        self.name = name
        self.states = states
        self.events = events
        self.transitions = dict(transitions)
        self.ignored = ignored
        moved_from = {state for state, _ in self.transitions}
        self.final = frozenset(state for state in states if state not in moved_from)

    def next(self, state: State, event: Event) -> State | None:
        """The new state, or None where the event changes nothing. Raises TransitionRefused for every other pair."""
        new = self.transitions.get((state, event))
        if new is not None:
            return new
        if (state, event) in self.ignored:
            return None
        raise TransitionRefused(self.name, state, event)

    def diagram(self) -> str:
        """The table as a Mermaid state diagram."""
        lines = ["stateDiagram-v2"]
        lines += [f"    {state.name} --> {new.name}: {event.name}" for (state, event), new in self.transitions.items()]
        return "\n".join(lines)
