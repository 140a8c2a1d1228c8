"""The simulator finds mistakes: each planted one within a bounded number of seeds."""

from __future__ import annotations

import pytest

from tests.simulation import planted
from wallet_core.simulation import Options, SimulatedShard, run_seed

SEEDS_MAX = 120
_CHAINS = {
    "half a chain",
    "conservation",
    "lost acknowledgement",
    "a repeated id is answered differently",
    "a saga did not end",
}
#: What the mistake shows itself by: the rule that is broken.
RULES: dict[type[SimulatedShard], set[str]] = {
    planted.AcknowledgesBeforeSync: {"lost acknowledgement"},
    planted.ReadsWhatIsNotDurable: {"lost acknowledgement"},
    planted.RelaysBeforeDurable: {
        "an outcome of an unknown send",
        "a saga did not end",
        "a saga changed on its way",
        "conservation",
    },
    planted.ForgetsTheCompensation: {"conservation"},
    planted.NamesOnlyItsOwnRefusals: {"conservation"},
    planted.NeverDeliversAgain: {"a saga did not end"},
    planted.GoesOnAfterAFailedSync: {"lost acknowledgement", "conservation"},
    planted.IgnoresTheDurableMark: {"damage accepted", "lost acknowledgement"},
    planted.SnapshotsWhatIsNotDurable: {"unexpected error", "recovered more than was sent"},
    planted.KeepsTooLittleLog: {"unexpected error"},
    planted.AppliesADoubledCredit: {"double effect", "unexpected error"},  # or the restart refuses to replay it
    planted.AdvancesTheCursorLater: {"double effect", "replay differs", "a saga did not end"},
    planted.ForgetsIdsTooEarly: {"double effect", "one id, two contents", "a repeated id is answered differently"},
    planted.LeavesHalfAHold: {"balance"},
    planted.ForgetsRefusedIds: {"lost acknowledgement", "a repeated id is answered differently"},
    planted.SettlesWithoutReturning: {"conservation"},
    planted.DecidesAChainInMemory: _CHAINS,
    planted.VoidsALeftChainWithoutAsking: _CHAINS,
    planted.LetsTheHoldsOfAChainExpire: _CHAINS,
    planted.LetsCallersEndTheHoldsOfAChain: _CHAINS,
    planted.TakesAnyUseOfADecisionForACommit: _CHAINS,
    planted.VoidsBeforeTheAbortIsDurable: _CHAINS,
}
#: The real state machine refuses to replay what these two do.
_NOT_REBUILT = Options(rebuild_every=0)
OPTIONS = {
    planted.KeepsTooLittleLog: Options(heavy_share=1.0, steps=600),
    planted.LetsTheHoldsOfAChainExpire: _NOT_REBUILT,
    planted.LetsCallersEndTheHoldsOfAChain: _NOT_REBUILT,
}
#: Tried first where it takes many: a seed that found it.
SEEDS = {
    planted.ReadsWhatIsNotDurable: 20,
    planted.NamesOnlyItsOwnRefusals: 66,
    planted.DecidesAChainInMemory: 23,
    planted.LetsTheHoldsOfAChainExpire: 6,
    planted.LetsCallersEndTheHoldsOfAChain: 3,
    planted.TakesAnyUseOfADecisionForACommit: 33,
    planted.VoidsBeforeTheAbortIsDurable: 59,
}


def test_every_planted_mistake_is_tried() -> None:
    assert set(RULES) == set(planted.PLANTED)


@pytest.mark.parametrize("mistake", planted.PLANTED, ids=lambda mistake: mistake.__name__)
def test_is_found(mistake: type[SimulatedShard]) -> None:
    for seed in (*filter(None, [SEEDS.get(mistake)]), *range(SEEDS_MAX)):
        outcome = run_seed(seed, OPTIONS.get(mistake, Options()), mistake)
        if outcome.violation is not None:
            assert outcome.violation.rule in RULES[mistake], str(outcome.violation)
            assert outcome.trace
            assert f"--seed {seed} " in outcome.command
            return
    pytest.fail(f"{mistake.__name__} was not found in {SEEDS_MAX} seeds")
