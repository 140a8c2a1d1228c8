"""One seed, from empty shards to the last check."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wallet_core.shard.port import ShardHostConfig
from wallet_core.shard.recovery import rebuild
from wallet_core.simulation.checks import (
    check_answers,
    check_books,
    check_chains,
    check_repeats,
    check_replay,
    check_twin,
)
from wallet_core.simulation.clients import Clients
from wallet_core.simulation.network import Network
from wallet_core.simulation.shard import SimulatedShard
from wallet_core.simulation.world import Options, Violation, World

__all__ = ["Outcome", "Simulation", "run_seed"]

CRASH_RATE = 0.02
FAULT_NS = (1_000_000, 25_000_000)
SEGMENT_BYTES = 64 * 1024
THAW_STEPS = 1_500
HOLD_NS_MAX = 60_000_000_000  # every hold with a timeout has expired by then
DEFAULTS = Options()
ENGINE_OPTIONS = {"accounts_max": 1 << 12, "holds_max": 1 << 12, "unsettled_max": 1 << 12}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed came to. `violation` is None when every rule held; `trace` is only kept if not."""

    seed: int
    steps: int
    counts: Counter[str]  # faults and other things, by kind
    transfers: int
    violation: Violation | None
    trace: tuple[str, ...]
    command: str


class Simulation:
    """One seed's world. `shard_class` is for tests that plant a mistake."""

    def __init__(
        self,
        seed: int,
        options: Options,
        folder: Path,
        shard_class: Callable[..., SimulatedShard] = SimulatedShard,
    ) -> None:
        self.world = world = World(seed, options)
        chance = world.chance
        small = chance() < 0.2  # a small memory for ids, so that ids become too old
        self.config = ShardHostConfig(
            data_dir=folder,
            shard_count=options.shards,
            segment_bytes=SEGMENT_BYTES,
            reserve_bytes=0,
            id_window_ms=120_000,
            id_count_max=128 if small else 1 << 14,
            generation_ids=32 if small else 1 << 10,
            engine_options=ENGINE_OPTIONS,
        )
        self.network = Network(world)
        self.crash_rate = CRASH_RATE * chance()
        self.shards: list[SimulatedShard] = []
        for shard in range(options.shards):
            self.shards.append(shard_class(world, self.network, self.config, shard, self.shards))
        self.clients = Clients(world, self.network, self.shards)
        world.after(world.between(*FAULT_NS), self._fault)

    def run(self) -> None:
        """Raises Violation."""
        world, options = self.world, self.world.options
        while world.steps < options.steps:
            world.step()
            if world.chance() < self.crash_rate:
                self._crash()
        self._heal()
        self._settle()
        world.now_ns += HOLD_NS_MAX
        self._settle(holds=True)
        models = check_books(self.shards)
        check_answers(self.clients.book, models)
        check_chains(self.clients, models)
        check_replay(self.shards)
        if world.seed % options.twin_every == 0:
            check_twin(self.shards)
        self._restart_all()
        check_replay(self.shards)
        if options.rebuild_every and world.seed % options.rebuild_every == 0:
            self._rebuild()
        self.world.counts["rows repeated at the end"] += check_repeats(self.clients, self.shards)

    def close(self) -> None:
        """Let go of the logs."""
        for shard in self.shards:
            if shard.up:
                if shard.writer is not None:
                    shard.writer.abandon()
                shard.log.close()
                shard.up = False
                del shard.engine, shard.log  # not only when the next collection comes

    # ---- faults ----

    def _crash(self) -> None:
        world = self.world
        power = world.chance() < 0.6
        if world.chance() < 0.1:
            world.fault("all shards crashed at once")
            hit = list(self.shards)
        else:
            hit = [self.shards[world.random.randrange(len(self.shards))]]
        for shard in hit:
            if shard.up:
                world.fault("power cut" if power else "process killed")
                shard.crash(power=power)

    def _fault(self) -> None:
        world = self.world
        if not world.faulty:
            return
        dice = world.chance()
        shard = self.shards[world.random.randrange(len(self.shards))]
        if self.clients.heavy and dice < 0.3:
            if shard.up:
                world.fault("disk full")
                shard.fill_disk(True)
                world.after(world.between(5_000_000, 60_000_000), shard.fill_disk, False)
        elif dice < 0.35:
            self.network.cut()
        elif dice < 0.6:
            world.fault("slow shard")
            shard.slow_until_ns = world.now_ns + world.between(2_000_000, 30_000_000)
        elif dice < 0.8:
            jump = world.between(100_000_000, 40_000_000_000)
            world.fault("clock jumped")
            world.note("clock: jumps by", jump // 1_000_000, "ms")
            world.now_ns += jump
        world.after(world.between(*FAULT_NS), self._fault)

    # ---- after the faults ----

    def _heal(self) -> None:
        world = self.world
        world.faulty, world.rot = False, 0.0
        world.note("faults stop, the network heals")
        for shard in self.shards:
            shard.slow_until_ns = 0
            shard.fill_disk(False)
        self.clients.thaw()

    def _settle(self, *, holds: bool = False) -> None:
        world = self.world
        bound = world.steps + world.options.drain_steps
        thaw_at = world.steps + THAW_STEPS
        while not (self._settled() and (not holds or self._holds_ended())):
            for _ in range(8):
                world.step()
            if world.steps > thaw_at:  # an old request that came late may have frozen an account again
                self.clients.thaw()
                thaw_at += THAW_STEPS
            if world.steps > bound:
                sent = {
                    (shard.shard, peer): shard.engine.sent(peer)
                    for shard in self.shards
                    if shard.up
                    for peer in range(len(self.shards))
                    if peer != shard.shard
                }
                raise Violation(
                    "a saga did not end",
                    f"{world.options.drain_steps} steps after the last fault: {self.clients.open} requests and "
                    f"{self.clients.coordinators.open} chains without an answer, (settled, sent) by (source, destination): {sent}",
                )

    def _settled(self) -> bool:
        return (
            self.clients.open == 0
            and self.clients.coordinators.all_ended()
            and all(
                shard.up
                and not shard.busy
                and shard.syncing is None
                and not shard.urgent
                and not shard.queue
                and shard.group.empty()
                and not shard.imaging
                and shard.engine.status().unsettled_count == 0
                for shard in self.shards
            )
        )

    def _holds_ended(self) -> bool:
        return all(shard.engine.next_deadline() == 0 for shard in self.shards)

    def _restart_all(self) -> None:
        self.world.rot = 0.3
        for shard in self.shards:
            shard.crash(power=True)
        bound = self.world.steps + self.world.options.drain_steps
        while not all(shard.up for shard in self.shards):
            self.world.step()
            if self.world.steps > bound:
                raise Violation("a shard does not come back", "")

    def _rebuild(self) -> None:
        for shard in self.shards:
            engine, _ = rebuild(self.config, shard.shard)
            if engine.state_digest() != shard.engine.state_digest():
                raise Violation("rebuilt state differs", f"shard {shard.shard}")
            self.world.counts["shards rebuilt beside"] += 1


def memory_folder() -> Path:
    """Where simulated disks keep their files: in memory where the machine has such a place."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def run_seed(
    seed: int,
    options: Options = DEFAULTS,
    shard_class: Callable[..., SimulatedShard] = SimulatedShard,
) -> Outcome:
    """Run one seed. A broken rule is in the outcome, not raised."""
    folder = Path(tempfile.mkdtemp(prefix="ducat-simulate-", dir=memory_folder()))
    violation: Violation | None = None
    simulation: Simulation | None = None
    try:
        simulation = Simulation(seed, options, folder, shard_class)
        simulation.run()
    except Violation as error:
        violation = error
    except Exception as error:  # the wallet's own refusal to go on, or a mistake of the simulator's
        where = traceback.extract_tb(error.__traceback__)[-1]
        violation = Violation(
            "unexpected error", f"{type(error).__name__}: {error} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        )
        violation.__cause__ = error
    finally:
        if simulation is not None:
            simulation.close()
        shutil.rmtree(folder, ignore_errors=True)
    assert simulation is not None
    world = simulation.world
    if violation is not None:  # the same words in every run
        violation = Violation(violation.rule, violation.detail.replace(f"{folder}/", ""))
    return Outcome(
        seed,
        world.steps,
        world.counts,
        len(simulation.clients.book.answers),
        violation,
        tuple(world.trace_lines()) if violation else (),
        f"ducat simulate --seed {seed} --shards {options.shards} --steps {options.steps}",
    )
