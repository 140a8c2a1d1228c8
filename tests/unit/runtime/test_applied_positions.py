"""Risk: a position counts as applied that is not, so wallet and ledger are compared at different places."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.feed import AppliedPositions

POSITIONS = st.integers(-1, 24)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), POSITIONS),
        st.tuples(st.just("advance"), POSITIONS),
        st.tuples(st.just("load"), st.tuples(st.integers(0, 24), st.sets(st.integers(1, 24)))),
    ),
    max_size=40,
)


@given(STEPS)
def test_it_is_a_set_of_positions(steps: list[tuple[str, object]]) -> None:
    applied, expected = AppliedPositions(), set[int]()
    for step, value in steps:
        if step == "load":
            last, holes = value  # type: ignore[misc]
            applied.load(last, sorted(holes))
            expected = set(range(1, last + 1)) - holes
        elif step == "add":
            applied.add(value)  # type: ignore[arg-type]
            expected |= {value} if value > 0 else set()  # type: ignore[operator,assignment]
        else:
            applied.advance(value)  # type: ignore[arg-type]
            expected |= set(range(1, value + 1))  # type: ignore[operator]
        prefix = next(n for n in range(26) if n + 1 not in expected)
        assert applied.prefix == prefix
        assert applied.extras() == tuple(sorted(n for n in expected if n > prefix))
        assert [n for n in range(-1, 26) if n in applied] == sorted(expected)
        assert [n for first, last in applied.ranges() for n in range(first, last + 1)] == sorted(expected)
        assert all(a[1] + 1 < b[0] for a, b in zip(applied.ranges(), applied.ranges()[1:], strict=False))
