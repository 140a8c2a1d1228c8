"""An order that goes to a PSP which cannot take it, or to another one at each try."""

from __future__ import annotations

from collections import Counter

from executor.domain.routing import Capability, Provider, candidates

PAY_IN = frozenset({Capability.PAY_IN})
A, B = Provider("a", PAY_IN), Provider("b", PAY_IN)
EUROPE = Provider("europe", PAY_IN, frozenset({"EUR"}))
REFUNDS = Provider("refunds", frozenset({Capability.REFUND}))


def route(*providers: Provider, reference: str = "ORD-1", currency: str = "USD", **named: object) -> list[str]:
    return candidates(
        providers,
        reference=reference,
        currency_code=currency,
        capability=Capability.PAY_IN,
        **named,  # type: ignore[arg-type]
    )


def test_stable_and_independent_of_the_order_of_configuration() -> None:
    for number in range(50):
        assert route(A, B, reference=f"ORD-{number}") == route(B, A, reference=f"ORD-{number}")


def test_currency_and_capability() -> None:
    assert route(EUROPE, REFUNDS) == []
    assert route(EUROPE, REFUNDS, currency="EUR") == ["europe"]


def test_the_requested_psp_or_none() -> None:
    assert route(A, B, requested="b") == ["b"]
    assert route(A, B, requested="b", unhealthy=frozenset({"b"})) == ["b"]
    assert route(A, EUROPE, requested="europe") == []
    assert route(A, requested="nobody") == []


def test_unhealthy_ones_come_last_but_stay() -> None:
    for number in range(20):
        assert route(A, B, reference=f"ORD-{number}", unhealthy=frozenset({"a"})) == ["b", "a"]


def test_weights_share_the_orders() -> None:
    heavy = Provider("heavy", PAY_IN, weight=3)
    first = Counter(route(heavy, A, reference=f"ORD-{number}")[0] for number in range(2000))
    assert 1350 < first["heavy"] < 1650


def test_weight_zero_takes_only_what_asks_for_it() -> None:
    drained = Provider("drained", PAY_IN, weight=0)
    assert route(drained, A) == ["a"]
    assert route(drained) == []
    assert route(drained, A, requested="drained") == ["drained"]


def test_a_psp_that_goes_moves_only_its_own_share() -> None:
    c = Provider("c", PAY_IN)
    for number in range(200):
        with_c, without = route(A, B, c, reference=f"O{number}"), route(A, B, reference=f"O{number}")
        assert [name for name in with_c if name != "c"] == without
