"""A deterministic simulator of the wallet core: the real engine, log, snapshots and recovery over simulated
disks, network and clocks, all from one seed. docs/simulation.md is its handbook.

It is a room of `wallet_core`, not of the tests, because `ducat simulate` is a command for operators too."""

from wallet_core.simulation.shard import SimulatedShard
from wallet_core.simulation.simulation import Outcome, Simulation, run_seed
from wallet_core.simulation.world import Options, Violation

__all__ = ["Options", "Outcome", "SimulatedShard", "Simulation", "Violation", "run_seed"]
