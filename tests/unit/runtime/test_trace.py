"""The trace id that follows a payment."""

from __future__ import annotations

import asyncio

import pytest

from runtime import trace

GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_bind_is_undone_at_the_end_of_the_block() -> None:
    assert trace.current() == ""
    with trace.bind(GIVEN) as bound:
        assert bound == trace.current() == GIVEN
        assert trace.trace_id() == "4bf92f3577b34da6a3ce929d0e0e4736"
        with trace.bind() as inner:
            assert inner[:35] != GIVEN[:35]
        assert trace.current() == GIVEN
    assert trace.current() == ""
    assert trace.trace_id() == ""


def test_child_keeps_trace_and_flags_and_has_a_span_of_its_own() -> None:
    with trace.bind(GIVEN):
        first, second = trace.child(), trace.child()
    for each in (first, second):
        assert each[:36] == GIVEN[:36]
        assert each[52:] == GIVEN[52:]
    assert len({first, second, GIVEN}) == 3


def test_child_outside_of_any_trace_starts_one() -> None:
    with trace.bind(trace.child()) as bound:
        assert trace.current() == bound != ""


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "nonsense",
        GIVEN.upper(),
        GIVEN + "-more",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        'x"\n{}' + GIVEN,
    ],
)
def test_a_malformed_traceparent_starts_a_new_trace(malformed: str) -> None:
    with trace.bind(malformed) as bound:
        assert bound != malformed
        assert len(bound) == 55
        assert len(trace.trace_id()) == 32


def test_new_ones_differ() -> None:
    assert len({trace.new() for _ in range(100)}) == 100


async def test_tasks_inherit_and_do_not_leak() -> None:
    async def look() -> str:
        before = trace.current()
        trace.set_current("")
        return before

    with trace.bind(GIVEN):
        assert await asyncio.create_task(look()) == GIVEN
        assert trace.current() == GIVEN


def test_ensure_keeps_what_is_there() -> None:
    with trace.bind(GIVEN):
        assert trace.ensure() == GIVEN
