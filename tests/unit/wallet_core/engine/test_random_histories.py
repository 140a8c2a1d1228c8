"""Engine and twin agree on every result, event and digest of random histories; logs and images give the state back."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.wallet_core.engine.world import (
    ACCOUNT_FLAGS,
    ACCOUNTS,
    AMOUNTS,
    CURRENCIES,
    GENERATION_IDS,
    GENERATIONS,
    GREAT_AMOUNTS,
    LIMITS,
    ROOM,
    SHAPES,
    STEPS_NS,
    TIMEOUTS,
    WINDOWS_MS,
    World,
)

SEEDS = int(os.environ.get("DUCAT_ENGINE_SEEDS", "40"))
SEED_FIRST = int(os.environ.get("DUCAT_ENGINE_SEED_FIRST", "0"))
STEPS = 60


def row_specs(amounts: list[int]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(
        st.sampled_from(SHAPES),
        st.integers(0, 30),
        st.integers(0, ACCOUNTS + 1),
        st.integers(0, ACCOUNTS + 1),
        st.sampled_from(amounts),
        st.sampled_from(TIMEOUTS),
        st.sampled_from([0, 0, 1]),
    )


account_specs = st.tuples(
    st.integers(0, ACCOUNTS + 1),
    st.sampled_from(CURRENCIES),
    st.sampled_from(ACCOUNT_FLAGS),
    st.sampled_from(LIMITS),
    st.sampled_from(LIMITS),
)
shards = st.sampled_from([0, 1])


class Histories(RuleBasedStateMachine):
    """Short histories that hypothesis can make shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[World] = []

    @initialize(
        generation_ids=st.sampled_from(GENERATION_IDS),
        generations=st.sampled_from(GENERATIONS),
        window_ms=st.sampled_from(WINDOWS_MS),
        room=st.sampled_from(ROOM),
        overdrawing=st.sampled_from([1, 3]),
    )
    def start(self, **parameters: int) -> None:
        self.worlds.append(World(**parameters))

    @property
    def world(self) -> World:
        return self.worlds[0]

    @rule(
        shard=shards,
        specs=st.lists(row_specs(AMOUNTS), min_size=1, max_size=12),
        step=st.sampled_from(STEPS_NS),
        gather=st.booleans(),
        closed=st.sampled_from([True] * 9 + [False]),
        chain_steps=st.booleans(),
    )
    def transfers(self, **drawn: Any) -> None:
        self.world.transfers(**drawn)

    @rule(
        shard=shards,
        specs=st.lists(row_specs(GREAT_AMOUNTS), min_size=1, max_size=6),
        step=st.sampled_from(STEPS_NS),
        chain_steps=st.booleans(),
    )
    def great_transfers(self, **drawn: Any) -> None:
        self.world.transfers(gather=False, closed=True, **drawn)

    @rule(shard=shards, specs=st.lists(account_specs, min_size=1, max_size=4), update=st.booleans())
    def accounts(self, **drawn: Any) -> None:
        self.world.accounts(**drawn)

    @rule(shard=shards, step=st.sampled_from(STEPS_NS))
    def expire(self, **drawn: Any) -> None:
        self.world.expire(**drawn)

    @rule(source=shards, start=st.integers(-2, 1), limit=st.integers(1, 5))
    def relay_credits(self, **drawn: Any) -> None:
        self.world.relay_credits(**drawn)

    @rule(source=shards, back=st.integers(0, 3), lie=st.booleans())
    def relay_outcomes(self, **drawn: Any) -> None:
        self.world.relay_outcomes(**drawn)

    @rule(shard=shards)
    def begin_image(self, shard: int) -> None:
        self.world.begin_image(shard)

    @rule(shard=shards, pieces=st.integers(1, 6))
    def read_image(self, **drawn: Any) -> None:
        self.world.read_image(**drawn)

    @rule(shard=shards)
    def end_image(self, shard: int) -> None:
        self.world.end_image(shard)

    @invariant()
    def check(self) -> None:
        for world in self.worlds:
            world.check()

    def teardown(self) -> None:
        for world in self.worlds:
            world.finish()


Histories.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
TestHistories = Histories.TestCase


def play(world: World, random: Random, amounts: list[int] = AMOUNTS) -> None:
    """One random step, with the weights of a busy shard."""
    pick = random.choice
    shard = pick([0, 1])
    specs: list[tuple[Any, ...]]
    match pick(
        ["transfers"] * 10 + ["accounts", "expire"] + ["credits", "outcomes"] * 3 + ["begin", "read", "read", "end"]
    ):
        case "transfers":
            specs = [
                (
                    pick(SHAPES),
                    random.randint(0, 30),
                    random.randint(0, ACCOUNTS + 1),
                    random.randint(0, ACCOUNTS + 1),
                    pick(amounts),
                    pick(TIMEOUTS),
                    int(random.random() < 0.25),
                )
                for _ in range(random.randint(1, 12))
            ]
            chance = random.random
            world.transfers(shard, specs, pick(STEPS_NS), chance() < 0.1, chance() < 0.95, chance() < 0.5)
        case "accounts":
            specs = [
                (random.randint(0, ACCOUNTS + 1), pick(CURRENCIES), pick(ACCOUNT_FLAGS), pick(LIMITS), pick(LIMITS))
                for _ in range(random.randint(1, 4))
            ]
            world.accounts(shard, specs, random.random() < 0.5)
        case "expire":
            world.expire(shard, pick(STEPS_NS))
        case "credits":
            world.relay_credits(shard, random.randint(-2, 1), random.randint(1, 5))
        case "outcomes":
            world.relay_outcomes(shard, random.randint(0, 3), random.random() < 0.1)
        case "begin":
            world.begin_image(shard)
        case "read":
            world.read_image(shard, random.randint(1, 6))
        case "end":
            world.end_image(shard)


@pytest.mark.parametrize("seed", range(SEED_FIRST, SEED_FIRST + SEEDS))
def test_long_history(seed: int) -> None:
    """Replay a failure with DUCAT_ENGINE_SEED_FIRST=<seed> DUCAT_ENGINE_SEEDS=1."""
    random = Random(seed)
    pick = random.choice
    world = World(pick(GENERATION_IDS), pick(GENERATIONS), pick(WINDOWS_MS), pick(ROOM))
    for _ in range(STEPS):
        play(world, random)
        world.check()
    world.finish()


@pytest.mark.parametrize("seed", range(SEED_FIRST, SEED_FIRST + SEEDS))
def test_long_history_near_the_bounds(seed: int) -> None:
    """Accounts, in-flight accounts and what is under way are full most of the time, and money still comes back."""
    random = Random(seed)
    world = World(1000, 9, 7 * 86_400_000, 100, overdrawing=3)
    for _ in range(STEPS):
        play(world, random, GREAT_AMOUNTS)
        world.check()
    world.finish()
