"""Risk: wallet and ledger differ and no metric says so, or one says so for ever."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from prometheus_client import REGISTRY

from ledger.adapters import comparison_metrics
from ledger.adapters.comparison_metrics import LINES_MAX, SILENCE_S, ComparisonTold
from ledger.domain import Difference
from ledger.service import Comparison

SECOND_NS = 1_000_000_000


def found(*differences: Difference, problem: str = "", at_s: float = 1_000.0) -> Comparison:
    end_ns = int(at_s * SECOND_NS)
    return Comparison(problem, 10, len(differences), differences, (), 0, 0.0, end_ns - SECOND_NS, end_ns)


def differs(number: int, currency: str = "USD", by: int = 5) -> Difference:
    return Difference(f"seller/S{number}/{currency}", currency, 100 + by, 100)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ducat_ledger_{name}", labels)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, object]]]:
    told: list[tuple[str, str, dict[str, object]]] = []

    class Logger:
        def error(self, event: str, **fields: object) -> None:
            told.append(("error", event, fields))

        def warning(self, event: str, **fields: object) -> None:
            told.append(("warning", event, fields))

    monkeypatch.setattr(comparison_metrics, "_logger", Logger())
    return told


def test_differences_are_shown_at_once_and_gone_after_the_next_whole_comparison(
    lines: Sequence[tuple[str, str, dict[str, object]]],
) -> None:
    tell = ComparisonTold()
    one, two = differs(1, by=5), differs(2, by=-7)
    other = differs(3, "EUR", by=1)
    tell(found(one), [one], False)  # in the middle of a comparison
    assert (value("wallet_differences"), value("wallet_difference_minor", currency="USD")) == (1, 5)
    tell(found(one, two, other), [two, other], True)
    assert value("wallet_differences") == 3
    assert value("wallet_difference_minor", currency="USD") == 12  # of both signs, so they do not cancel each other out
    assert value("wallet_difference_minor", currency="EUR") == 1
    assert value("compare_timestamp_seconds") == 1_000
    assert [fields["account"] for _, _, fields in lines] == [one.account_name, two.account_name, other.account_name]
    tell(found(), [], False)  # the next one has only begun
    assert value("wallet_differences") == 3
    tell(found(at_s=1_060), [], True)
    assert (value("wallet_differences"), value("wallet_difference_minor", currency="USD")) == (0, 0)
    assert (value("wallet_difference_minor", currency="EUR"), value("compare_timestamp_seconds")) == (0, 1_060)


def test_lines_are_bounded(lines: Sequence[tuple[str, str, dict[str, object]]]) -> None:
    many = [differs(number) for number in range(LINES_MAX + 30)]
    ComparisonTold()(found(*many), many, True)
    assert len(lines) == LINES_MAX + 1
    assert lines[-1][2] == {"accounts": 30}


def test_no_verdict_for_long_is_an_error_of_its_own(lines: Sequence[tuple[str, str, dict[str, object]]]) -> None:
    tell = ComparisonTold()
    for at_s in (1_000, 1_060, 1_000 + SILENCE_S):
        tell(found(problem="the wallet does not answer", at_s=at_s), [], False)
    assert [(level, fields["silent_s"]) for level, _, fields in lines] == [
        ("warning", 0),
        ("warning", 60),
        ("error", SILENCE_S),
    ]
    assert value("compare_no_verdict") == 1
    tell(found(), [], True)
    assert value("compare_no_verdict") == 0
    tell(found(problem="again", at_s=9_000), [], False)
    assert lines[-1][0] == "warning"
