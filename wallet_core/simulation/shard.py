"""One shard in the simulation: the real engine, the real log writer and recovery, and the pipeline between
them as events of the scheduler.

The pipeline follows `wallet_core/shard/_shard.pxi` step by step: work is applied one piece at a time and
becomes frames of the current group; while a group is written and synced, the next one fills; answers and
deliveries to other shards belong to a group and leave once it is durable. Each step is a method of its own,
so that a test can plant a mistake by overriding one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wallet_core.engine._engine import Engine
from wallet_core.engine.codes import TransferFlags
from wallet_core.engine.views import EngineRefused, HoldView
from wallet_core.event_log import (
    FileLog,
    FrameReader,
    LogDamaged,
    LogPoisoned,
    delete_segments_below,
    lock_folder,
    open_log,
    settle_end,
)
from wallet_core.event_log.file import make_folder
from wallet_core.service import chain_rules
from wallet_core.service.chain_rules import ChainMark
from wallet_core.shard._host import replay_frames
from wallet_core.shard.port import RecoveryFailed, ShardHostConfig, shard_folder
from wallet_core.shard.recovery import _start_from, new_engine, recover_shard
from wallet_core.simulation.disk import SimulatedDisk
from wallet_core.simulation.network import CLIENTS, Network
from wallet_core.simulation.world import Violation, World
from wallet_core.snapshot import SnapshotWriter, delete_older, set_aside, snapshot_files

__all__ = ["DISK_FULL", "AppliedFrame", "Request", "SimulatedShard", "delivery_columns"]

EVENT_BYTES = 48
FRAME_BYTES = 96 + 8
GROUP_FRAMES_MAX = 12
APPLY_NS = (5_000, 60_000)
WRITE_NS = (5_000, 80_000)
SYNC_NS = (50_000, 900_000)
RESTART_NS = (300_000, 8_000_000)
PIECE_NS = (20_000, 300_000)
RELAY_NS = (4_000_000, 12_000_000)
TICK_NS = (8_000_000, 30_000_000)
SNAPSHOT_NS = (4_000_000, 36_000_000)
SLOW_FACTOR = 30
#: What a client hears while the disk is nearly full: nothing was applied.
DISK_FULL = b"full"


@dataclass(slots=True, eq=False)
class Request:
    """What a client asks of one shard: `arguments` go to the engine's method `call`."""

    shard: int
    call: str  # "transfers", "open_accounts", "update_accounts", "account"
    columns: tuple[bytes, ...]
    options: dict[str, Any] = field(default_factory=dict)
    keys: list[tuple[Any, ...]] = field(default_factory=list)  # of transfers: the content of each row
    client: int = 0
    attempts: int = 0
    answered: bool = False
    crosses: bool = False
    final: bytes = b""
    asker: int = CLIENTS
    reply: Callable[[Request, Any], None] | None = None  # of others than clients


@dataclass(slots=True)
class AppliedFrame:
    """One frame as the engine made it."""

    first_sequence: int
    count: int
    timestamp_ns: int
    digest: bytes
    body: bytes


@dataclass(slots=True)
class Group:
    """What one sync makes durable, and what may leave then."""

    frames: list[AppliedFrame] = field(default_factory=list)
    answers: list[tuple[Request, Any, int]] = field(default_factory=list)
    deliveries: list[tuple[int, str, tuple[Any, ...]]] = field(default_factory=list)
    image: tuple[int, int, int, bytes] | None = None  # sequence, timestamp, epoch, digest

    def empty(self) -> bool:
        return not (self.frames or self.answers or self.deliveries or self.image)


def delivery_columns(sends: Sequence[Any]) -> tuple[Any, ...]:
    """Sends as the columns that `Engine.credits` takes: first number, ids, credit ids, amounts, currencies,
    codes."""
    return (
        sends[0].number,
        b"".join([send.id for send in sends]),
        b"".join([send.credit_id for send in sends]),
        b"".join([send.amount.to_bytes(8, "little", signed=True) for send in sends]),
        b"".join([send.currency.encode("ascii") + b"\0" for send in sends]),
        b"".join([send.code.to_bytes(2, "little") for send in sends]),
    )


def _codes(results: bytes) -> str:
    return results.hex() if len(results) <= 16 else f"({len(results)} rows)"


class SimulatedShard:
    """A shard that is up or down, and everything that has to survive it for the checks: what it applied,
    what it ever told anybody."""

    chain_rules: Any = chain_rules
    fault_rate_min = 0.004  # of a write that fails, and of a crash between a write and its sync

    def __init__(
        self, world: World, network: Network, config: ShardHostConfig, shard: int, shards: list[SimulatedShard]
    ) -> None:
        self.world, self.network, self.config, self.shard, self.shards = world, network, config, shard, shards
        self.folder: Path = shard_folder(config.data_dir, shard)
        self.disk = SimulatedDisk(world, self.folder)
        self.answer: Callable[[Request, Any], None] = lambda request, result: None
        # for the checks, over all lives
        self.frames: list[AppliedFrame] = []  # applied, in order; what a crash took is cut off
        self.known_sequence = 0  # the highest sequence number that anybody outside may rely on
        self.fault_rate = self.fault_rate_min + 0.02 * world.chance() * world.chance()
        self.snapshots_taken = 0  # since the last one that was damaged
        # this life
        self.life = 0
        self.up = False
        self.engine: Engine
        self.log: FileLog
        self._reset()
        self._start()
        self.world.after(world.between(*RELAY_NS), self._relay)
        self.world.after(world.between(*TICK_NS), self._tick)
        self.world.after(world.between(*SNAPSHOT_NS), self._ask_snapshot)

    def _reset(self) -> None:
        self.urgent: deque[tuple[Any, ...]] = deque()
        self.queue: deque[tuple[Any, ...]] = deque()
        self.group = Group()
        self.syncing: Group | None = None
        self.busy = False
        self.sent: dict[int, int] = {}
        self.settled_seen: dict[int, int] = {}
        self.writer: SnapshotWriter | None = None
        self.imaging = False
        self.slow_until_ns = 0
        self.refusals_repeated_max = (self.shard + self.life) % 4  # of the real one: 256
        self.skew_ns = self.world.between(0, 2_000_000_000) if self.world.faulty else 2_000_000_000

    # ---- life and death ----

    def new_engine(self) -> Engine:
        """An empty engine of this shard."""
        return new_engine(self.config, self.shard)

    def recover(self) -> tuple[Engine, FileLog, int, tuple[str, ...]]:
        """Engine, log, sequence number of the snapshot, snapshots that did not read back. One time in
        eight by `recover_shard` itself; else by the functions that it is made of, without the threads that it
        starts to read ahead (three starts of a thread cost more than the recovery of such a small shard)."""
        if self.world.chance() < 0.125:
            found = recover_shard(self.config, self.shard)
            engine, log, tail_kept = found.engine, found.log, found.tail_kept
            snapshot_sequence, skipped = found.snapshot_sequence, found.skipped
        else:
            engine, log, snapshot_sequence, skipped, tail_kept = self._recover_in_this_thread()
        if tail_kept is not None:
            self.world.fault("torn tail cut off")
        return engine, log, snapshot_sequence, skipped

    def _recover_in_this_thread(self) -> tuple[Engine, FileLog, int, tuple[str, ...], str | None]:
        config, folder = self.config, self.folder / "log"
        make_folder(folder)
        lock = lock_folder(self.folder)
        try:
            start = _start_from(config, self.shard, self.folder, None)
            header, engine = start.header, start.engine

            def visit(reader: FrameReader) -> None:
                replay_frames(engine, reader)

            end = settle_end(
                folder,
                self.shard,
                from_sequence=header.sequence + 1 if header else 1,
                from_hash=header.frame_hash if header else None,
                visit=visit,
            )
            set_aside(start.damaged)
            log = open_log(
                folder,
                self.shard,
                end=end,
                lock=lock,
                segment_bytes=config.segment_bytes,
                reserve_bytes=config.reserve_bytes,
            )
        except BaseException:
            os.close(lock)
            raise
        return engine, log, header.sequence if header else 0, start.skipped, end.tail_kept

    def crash(self, *, power: bool) -> None:
        """The process dies; what was not durable may be gone."""
        if not self.up:
            return
        self.world.note(f"shard {self.shard}: {'power cut' if power else 'killed'}")
        self.up = False
        self.life += 1
        if self.writer is not None:
            self.writer.abandon()
            if self.world.chance() < 0.5:  # what a dead writer leaves
                (self.folder / "snapshots" / f"{self.known_sequence:020d}.building").write_bytes(b"DUCS")
            self.world.fault("crash during a snapshot")
        self.log.close()
        self.disk.crash(power=power)
        del self.engine, self.log
        self._reset()
        self.world.after(self.world.between(*RESTART_NS), self._start)

    def _start(self) -> None:
        if self.up:
            return
        if self.world.faulty and self.life and self.world.chance() < 0.15:
            self._start_damaged()
        rotten = self.world.chance() < self.world.rot and self.disk.flip_snapshot_bit(self.snapshots_taken)
        engine, log, snapshot_sequence, skipped = self.recover()
        if rotten:
            self.world.fault("snapshot bit flipped")
            if not skipped:
                log.close()
                raise Violation("damaged snapshot used", f"shard {self.shard}: {rotten[0]} byte {rotten[1]}")
            if Path(rotten[0]).exists():
                log.close()
                raise Violation(
                    "damaged snapshot kept", f"shard {self.shard}: {rotten[0]} counts as one to fall back to"
                )
            self.snapshots_taken = 1
        self._check_recovered(engine, snapshot_sequence)
        self.engine, self.log = engine, log
        self.sequence = engine.status().sequence
        self.now_ns: int = engine.status().now_ns
        self.durable_sequence = self.sequence
        self.known_sequence = self.sequence
        self.disk.opened(log)
        self.up = True
        self.world.note(f"shard {self.shard}: up at", self.sequence, "snapshot", snapshot_sequence)
        for destination in range(self.config.shard_count):
            if destination != self.shard:
                self.sent[destination] = engine.sent(destination)[1]
                self.urgent.append(("resend", destination))
        self._kick()

    def _start_damaged(self) -> None:
        """A bit of a durable frame flips while the shard is down: recovery must refuse, and change nothing."""
        flipped = self.disk.flip_log_bit(self.shard)
        if flipped is None:
            return
        self.world.fault("log bit flipped")
        self.world.note(f"shard {self.shard}: bit flipped in", flipped[0].rsplit("/", 1)[1], "at byte", flipped[1])
        try:
            _, log, _, _ = self.recover()
        except (LogDamaged, RecoveryFailed):
            self.disk.restore_byte(*flipped)
            return
        log.close()
        raise Violation(
            "damage accepted", f"shard {self.shard}: a flipped bit of a durable frame, {flipped[0]} byte {flipped[1]}"
        )

    def _check_recovered(self, engine: Engine, snapshot_sequence: int) -> None:
        """Nothing that anybody was told is lost; nothing is there that was not sent; the state is the one
        that was."""
        found = engine.status().sequence
        if found < self.known_sequence:
            raise Violation(
                "lost acknowledgement",
                f"shard {self.shard} recovered to event {found}, but events up to {self.known_sequence} were known outside",
            )
        while self.frames and self.frames[-1].first_sequence > found:
            self.frames.pop()
        last = self.frames[-1] if self.frames else None
        last_sequence = last.first_sequence + last.count - 1 if last else 0
        if found != last_sequence:
            raise Violation(
                "recovered more than was sent", f"shard {self.shard}: event {found}, sent frames end at {last_sequence}"
            )
        if last is not None and engine.state_digest() != last.digest:
            raise Violation(
                "recovered state differs",
                f"shard {self.shard} at event {found}: digest {engine.state_digest().hex()}, it was {last.digest.hex()}",
            )
        if not engine.verify_digest():
            raise Violation("digest", f"shard {self.shard}: the running digest does not match the state")

    # ---- work comes in ----

    def receive(self, request: Request) -> None:
        """From the network: a client's request."""
        if not self.up:
            self.world.fault("message to a dead shard")
            return
        self.queue.append(("request", request))
        self._kick()

    def deliver(self, kind: str, arguments: tuple[Any, ...]) -> None:
        """From the network: a saga step of another shard."""
        if not self.up:
            self.world.fault("message to a dead shard")
            return
        self.urgent.append((kind, *arguments))
        self._kick()

    def _delay(self, span: tuple[int, int]) -> int:
        delay = self.world.between(*span)
        return delay * SLOW_FACTOR if self.world.now_ns < self.slow_until_ns else delay

    def _kick(self) -> None:
        if not self.busy and self.up and (self.urgent or self.queue) and self._room():
            self.busy = True
            self.world.after(self._delay(APPLY_NS), self._apply, self.life)

    def _room(self) -> bool:
        return self.group.image is None and len(self.group.frames) < GROUP_FRAMES_MAX

    # ---- the apply thread ----

    def _apply(self, life: int) -> None:
        if life != self.life:
            return
        self.busy = False
        work = self.urgent.popleft() if self.urgent else self.queue.popleft()
        self.now_ns = max(self.now_ns, self.world.now_ns + self.skew_ns)
        getattr(self, f"apply_{work[0]}")(*work[1:])
        self._applied()
        self._hand_over()
        self._kick()

    def _applied(self) -> None:
        """After each piece of work; nothing may leave yet."""

    def close_frame(self, body: bytes) -> None:
        """Events become one frame of the current group."""
        if not body:
            return
        count = len(body) // EVENT_BYTES
        frame = AppliedFrame(self.sequence + 1, count, self.now_ns, self.engine.state_digest(), body)
        self.sequence += count
        self.frames.append(frame)
        self.group.frames.append(frame)

    def apply_request(self, request: Request) -> None:
        """A client's batch."""
        engine, group = self.engine, self.group
        if request.call == "account":
            view = engine.account(request.columns[0])
            self._answer_when_durable(request, (self.sequence, view))
            return
        if request.call == "marks":
            self._answer_when_durable(request, self.marks())
            return
        if self.log.nearly_full:
            self.world.fault("write refused, disk nearly full")
            self._answer(request, DISK_FULL, 0)
            return
        results, events = getattr(engine, request.call)(*request.columns, self.now_ns, **request.options)
        self.close_frame(events)
        self.world.note(f"shard {self.shard}:", request.call, _codes(results), "events up to", self.sequence)
        if request.crosses:
            for destination in range(self.config.shard_count):
                if destination != self.shard:
                    settled, last = engine.sent(destination)
                    first = max(self.sent[destination], settled) + 1
                    if last >= first:
                        self.send_credits(destination, settled, first, last, group)
                        self.sent[destination] = last
        self._answer_when_durable(request, results)

    def marks(self) -> list[ChainMark]:
        """What is left of chains across shards here: marks with their holds, decisions without."""
        found = []
        for mark in self.engine.holds(chain_rules.MARKS):
            if not mark.flags & TransferFlags.CHAIN:
                continue
            legs = self._legs(mark)
            holds = tuple((leg.id, leg.debit_id, leg.credit_id) for leg in legs)
            found.append(ChainMark(self.shard, mark.id, holds, len(holds) == mark.amount - 1))
        return found

    def _legs(self, mark: HoldView) -> list[HoldView]:
        """The holds that were placed just before a mark."""
        legs: list[HoldView] = []
        for back in range(1, mark.amount):
            leg = self.engine.hold_at(mark.sequence - back)
            if leg is None or not leg.flags & TransferFlags.CHAIN or leg.debit_id == chain_rules.MARKS:
                break
            legs.insert(0, leg)
        return legs

    def send_credits(self, destination: int, settled: int, number: int, last: int, group: Group) -> None:
        """Sends become deliveries of this group, which say how far this shard has settled."""
        while number <= last:
            sends = self.engine.sends(destination, number, self.world.random.randrange(1, 24))
            group.deliveries.append((destination, "credits", (self.shard, settled, *delivery_columns(sends))))
            number += len(sends)

    def apply_credits(
        self,
        source: int,
        settled: int,
        number: int,
        ids: bytes,
        credit_ids: bytes,
        amounts: bytes,
        currencies: bytes,
        codes: bytes,
    ) -> None:
        """Saga step 2: each number once, in order; the outcome leaves once it is durable. It names every refusal since
        the source had settled, of earlier deliveries too, because their outcomes may be lost; if those are too many, only
        its own, and says so."""
        self.engine.forget(source, settled)
        try:
            results, events = self.engine.credits(
                source, number, ids, credit_ids, amounts, currencies, self.now_ns, codes=codes
            )
        except EngineRefused:
            self.world.fault("delivery with a gap ignored")
            return
        self.close_frame(events)
        upto = number + len(results) - 1
        self.world.note(f"shard {self.shard}: credits from {source}:", f"{number}..{upto}", results.hex())
        refused = self.refusals(source, number, upto)
        if len([one for one in refused if one[0] < number]) > self.refusals_repeated_max:
            settled, refused = number - 1, [one for one in refused if one[0] >= number]
        self.group.deliveries.append((source, "outcomes", (self.shard, settled, upto, refused)))

    def refusals(self, source: int, number: int, upto: int) -> list[tuple[int, int]]:
        """Every refusal up to there that the source may not know yet."""
        return [one for one in self.engine.refusals(source, 1, 1 << 16) if one[0] <= upto]

    def apply_outcomes(self, destination: int, after: int, upto: int, refused: list[tuple[int, int]]) -> None:
        """Saga step 3: return what was refused, settle the rest."""
        if after > self.engine.sent(destination)[0]:
            self.world.fault("outcome with a gap ignored")
            return
        try:
            events = self.engine.outcomes(destination, upto, refused, self.now_ns)
        except EngineRefused:
            raise Violation(
                "an outcome of an unknown send",
                f"shard {destination} settles up to {upto}, shard {self.shard} sent {self.engine.sent(destination)}",
            ) from None
        self.close_frame(events)
        self.world.note(f"shard {self.shard}: settled by {destination} up to", upto, "refused", refused)
        if refused:
            self.group.deliveries.append((destination, "forget", (self.shard, upto)))

    def apply_forget(self, source: int, upto: int) -> None:
        """The source has settled that far, durably."""
        self.engine.forget(source, upto)

    def apply_resend(self, destination: int) -> None:
        """Deliver what is not settled again."""
        settled, last = self.engine.sent(destination)
        if last > settled:
            self.world.fault("unsettled sends delivered again")
            self.send_credits(destination, settled, settled + 1, last, self.group)
            self.sent[destination] = last

    def apply_tick(self) -> None:
        """Holds expire."""
        self.close_frame(self.engine.expire(self.now_ns))

    def apply_image(self) -> None:
        """A snapshot of the state as it is now; it is written once the group is durable."""
        if self.imaging:
            return
        self.engine.image_begin()
        self.imaging = True
        self.group.image = (self.sequence, self.now_ns, self.log.epoch, self.engine.state_digest())

    def _answer_when_durable(self, request: Request, result: Any) -> None:
        if self.sequence <= self.durable_sequence and self.group.empty():
            self._answer(request, result, self.sequence)
        else:
            self.group.answers.append((request, result, self.sequence))

    def _answer(self, request: Request, result: Any, sequence: int) -> None:
        self.known_sequence = max(self.known_sequence, sequence)
        self.network.send(self.shard, request.asker, request.reply or self.answer, request, result)

    # ---- the sync thread ----

    def _hand_over(self) -> None:
        if self.syncing is None and not self.group.empty():
            self.syncing, self.group = self.group, Group()
            self.world.after(self._delay(WRITE_NS), self._write, self.life)

    def _write(self, life: int) -> None:
        if life != self.life:
            return
        group = self.syncing
        assert group is not None
        if not group.frames:
            self._synced(life)
            return
        length = sum([FRAME_BYTES + len(frame.body) for frame in group.frames])
        self.disk.begin(length)
        if self.world.faulty and self.world.chance() < self.fault_rate:
            self.disk.fail_write(self.log, length)
        try:
            for frame in group.frames:
                self.log.append(frame.first_sequence, frame.count, frame.timestamp_ns, frame.digest, frame.body)
            position = self.log.sync()
        except LogPoisoned as error:
            self.disk.written(self.log.position)
            self._write_failed(group, error)
            return
        self.log.wait_prepared()
        self.disk.written(position)
        self.world.after(self._delay(SYNC_NS), self._synced, life)
        if self.world.faulty and self.world.chance() < self.fault_rate:
            self.world.fault("crash between write and sync")
            self.crash(power=self.world.chance() < 0.7)

    def _write_failed(self, group: Group, error: LogPoisoned) -> None:
        """Nothing is acknowledged, nothing is tried again: the process stops. Its page cache lies, the disk
        may hold anything of the write."""
        self.crash(power=True)

    def _synced(self, life: int) -> None:
        if life != self.life:
            return
        group = self.syncing
        assert group is not None
        self.disk.synced()
        if group.frames:
            self.durable_sequence = self.known_sequence = group.frames[-1].first_sequence + group.frames[-1].count - 1
        self.release(group)
        if group.image is not None:
            self._image_begin(group.image)
        self.syncing = None
        self._hand_over()
        self._kick()

    def release(self, group: Group) -> None:
        """The group is durable: what belongs to it may leave."""
        for destination, kind, arguments in group.deliveries:
            self.network.send(self.shard, destination, self.shards[destination].deliver, kind, arguments)
        for request, result, sequence in group.answers:
            self._answer(request, result, sequence)

    # ---- snapshots ----

    def _ask_snapshot(self) -> None:
        if self.up and self.world.faulty:
            self.queue.append(("image",))
            self._kick()
        if self.world.faulty:
            self.world.after(self.world.between(*SNAPSHOT_NS), self._ask_snapshot)

    def _image_begin(self, image: tuple[int, int, int, bytes]) -> None:
        frame_hash: bytes = self.log.position[3]
        self.writer = SnapshotWriter(self.folder / "snapshots", self.shard)
        self.writer.begin(*image)
        self.world.after(self._delay(PIECE_NS), self._image_piece, self.life, frame_hash)

    def _image_piece(self, life: int, frame_hash: bytes) -> None:
        if life != self.life:
            return
        assert self.writer is not None
        piece = self.engine.image_piece()
        if piece:
            self.writer.add(piece)
            self.world.after(self._delay(PIECE_NS), self._image_piece, life, frame_hash)
            return
        self.engine.image_end()
        self.writer.finish(frame_hash)
        self.writer, self.imaging = None, False
        self.snapshots_taken += 1
        self.world.counts["snapshot taken during load"] += 1
        self.world.note(f"shard {self.shard}: snapshot taken")
        self.retain()

    def retain(self) -> None:
        """The log is kept back to the second newest snapshot."""
        oldest = delete_older(self.folder / "snapshots", 2)
        if oldest and delete_segments_below(self.folder / "log", oldest):
            self.world.counts["segments deleted by retention"] += 1

    # ---- timers ----

    def _relay(self) -> None:
        """Sends that nobody answered since last time are delivered again."""
        if self.up:
            for destination, last in self.sent.items():
                settled, _ = self.engine.sent(destination)
                if settled < last and self.settled_seen.get(destination) == settled:
                    self.urgent.append(("resend", destination))
                self.settled_seen[destination] = settled
            self._kick()
        self.world.after(self.world.between(*RELAY_NS), self._relay)

    def _tick(self) -> None:
        if self.up:
            deadline = self.engine.next_deadline()
            if deadline and deadline <= self.world.now_ns + self.skew_ns:
                self.urgent.append(("tick",))
                self._kick()
        self.world.after(self.world.between(*TICK_NS), self._tick)

    def fill_disk(self, full: bool) -> None:
        """No room for another segment, or room again."""
        if self.up:
            self.log.inject("fallocate", 1 if full else 0, 28)
            self.log.recheck_space()
            self.log.wait_prepared()

    def latest_snapshot(self) -> int:
        """Sequence number of the newest snapshot, 0 if there is none."""
        found = snapshot_files(self.folder / "snapshots")
        return found[0].sequence if found else 0
