"""Mistakes on purpose, one class each: what the simulator has to find. Nothing of this is in the product.

Mistakes of the pipeline override one step of the simulated shard. Mistakes inside the state machine are made
in the Python twin, which then stands in for the native engine: it gives the same events and digests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from wallet_core.engine.codes import EventKind, TransferFlags, TransferResult
from wallet_core.engine.events import Event
from wallet_core.engine.twin import Generation, Hold, Known, Row, Twin, id_time_ms
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
from wallet_core.event_log.file import _cut_tail, make_folder
from wallet_core.service import chain_rules
from wallet_core.simulation.shard import Group, SimulatedShard
from wallet_core.snapshot import SnapshotWriter, snapshot_files

F = TransferFlags


class AcknowledgesBeforeSync(SimulatedShard):
    """Answers leave as soon as the engine has decided."""

    def _applied(self) -> None:
        answers, self.group.answers = self.group.answers, []
        for request, result, sequence in answers:
            self._answer(request, result, sequence)


class ReadsWhatIsNotDurable(SimulatedShard):
    """Transfers wait for the sync, reads do not."""

    fault_rate_min = 0.1

    def _answer_when_durable(self, request: Any, result: Any) -> None:
        if request.call == "account":
            self._answer(request, result, self.sequence)
        else:
            super()._answer_when_durable(request, result)


class RelaysBeforeDurable(SimulatedShard):
    """Credits and outcomes leave as soon as the engine has decided."""

    def _applied(self) -> None:
        deliveries, self.group.deliveries = self.group.deliveries, []
        for destination, kind, arguments in deliveries:
            self.network.send(self.shard, destination, self.shards[destination].deliver, kind, arguments)


class ForgetsTheCompensation(SimulatedShard):
    """The outcome says how far the credit shard is, not what it refused."""

    def refusals(self, source: int, number: int, upto: int) -> list[tuple[int, int]]:
        return []


class NamesOnlyItsOwnRefusals(SimulatedShard):
    """An outcome names the refusals of its own delivery; those of an earlier one, whose outcome was lost,
    never reach the debit shard."""

    def refusals(self, source: int, number: int, upto: int) -> list[tuple[int, int]]:
        return [one for one in super().refusals(source, number, upto) if one[0] >= number]


class NeverDeliversAgain(SimulatedShard):
    """What a crash or the network took of a saga is not sent a second time."""

    def apply_resend(self, destination: int) -> None:
        pass


class GoesOnAfterAFailedSync(SimulatedShard):
    """The error is swallowed: the group is treated as durable."""

    fault_rate_min = 0.05

    def _write_failed(self, group: Group, error: LogPoisoned) -> None:
        if error.call == "fdatasync":
            self.durable_sequence = group.frames[-1].first_sequence + group.frames[-1].count - 1
            self.release(group)
        super()._write_failed(group, error)


class IgnoresTheDurableMark(SimulatedShard):
    """Recovery cuts off whatever does not read back, wherever it is."""

    def recover(self) -> tuple[Any, FileLog, int, tuple[str, ...]]:
        while True:
            try:
                return super().recover()
            except LogDamaged as damage:
                if not damage.file.endswith(".seg"):
                    raise
                _cut_tail(Path(damage.file), damage.offset)
                (self.folder / "log" / "durable.mark").unlink(missing_ok=True)


class SnapshotsWhatIsNotDurable(SimulatedShard):
    """The image is written at once, not after the group that it is of."""

    def apply_image(self) -> None:
        if self.imaging:
            return
        writer = SnapshotWriter(self.folder / "snapshots", self.shard)
        writer.begin(self.sequence, self.now_ns, self.log.epoch, self.engine.state_digest())
        self.engine.image_begin()
        while piece := self.engine.image_piece():
            writer.add(piece)
        self.engine.image_end()
        writer.finish(self.log.position[3])


class KeepsTooLittleLog(SimulatedShard):
    """Retention keeps one snapshot and the log behind it: a bad one has nothing to fall back to."""

    def retain(self) -> None:
        newest, *older = snapshot_files(self.folder / "snapshots")
        for one in older:
            one.path.unlink()
        delete_segments_below(self.folder / "log", newest.sequence)


# ---- mistakes inside the state machine ----


class TwinShard(SimulatedShard):
    """A shard whose state machine is a twin: no snapshots, replay in Python."""

    twin_class: type[Twin] = Twin

    def new_engine(self) -> Any:
        config = self.config
        return self.twin_class(
            self.shard,
            id_window_ms=config.id_window_ms,
            id_count_max=config.id_count_max,
            generation_ids=config.generation_ids,
            **config.engine_options,
        )

    def recover(self) -> tuple[Any, FileLog, int, tuple[str, ...]]:
        folder = self.folder / "log"
        make_folder(folder)
        lock = lock_folder(self.folder)
        engine = self.new_engine()

        def visit(reader: FrameReader) -> None:
            while (row := reader.read()) is not None:
                engine.replay_frame(row[8], row[0], row[2])

        try:
            end = settle_end(folder, self.shard, visit=visit)
            log = open_log(
                folder, self.shard, end=end, lock=lock, segment_bytes=self.config.segment_bytes, reserve_bytes=0
            )
        except BaseException:
            os.close(lock)
            raise
        return engine, log, 0, ()

    def apply_image(self) -> None:
        pass


class _ReceivesTwice(Twin):
    """A doubled credit is applied again: the cursor is not looked at."""

    def credits(self, source_shard: int, first_number: int, *columns: Any, **options: Any) -> tuple[bytes, bytes]:
        cursor = self.state.cursors.get(source_shard)
        if cursor is not None and first_number <= cursor.applied:
            cursor.applied = first_number - 1
        return super().credits(source_shard, first_number, *columns, **options)


class AppliesADoubledCredit(TwinShard):
    twin_class = _ReceivesTwice


class _LateCursor(Twin):
    """The cursor of a frame of credits is written with the next frame."""

    _late: dict[int, int] | None = None

    def replay_frame(self, records: bytes, first_sequence: int, timestamp_ns: int) -> None:
        for source, applied in (self._late or {}).items():
            self.state.cursors[source].applied = applied
        before = {source: cursor.applied for source, cursor in self.state.cursors.items()}
        super().replay_frame(records, first_sequence, timestamp_ns)
        self._late = {source: cursor.applied for source, cursor in self.state.cursors.items()}
        for source, cursor in self.state.cursors.items():
            cursor.applied = before.get(source, 0)


class AdvancesTheCursorLater(TwinShard):
    twin_class = _LateCursor


class _ShortMemory(Twin):
    """Generations of ids are dropped and the floor stays where it was."""

    def _remember(self, id_: bytes, known: Known) -> None:
        generations = self.state.generations
        if not generations or len(generations[-1].ids) == 8:
            if len(generations) == 2:
                del generations[0]
            generations.append(Generation())
        generations[-1].ids[id_] = known
        generations[-1].max_ms = max(generations[-1].max_ms, id_time_ms(id_))


class ForgetsIdsTooEarly(TwinShard):
    twin_class = _ShortMemory


class _KeepsTheHold(Twin):
    """A void releases the debit side only."""

    def _apply_finished(self, event: Event) -> None:
        hold = next(hold for hold in self.state.holds.values() if hold.sequence == event.hold_sequence)
        super()._apply_finished(event)
        if event.kind is EventKind.HOLD_VOIDED:
            self.state.accounts[hold.credit].held_in += hold.amount


class LeavesHalfAHold(TwinShard):
    twin_class = _KeepsTheHold


class _ForgetsRefusals(Twin):
    """State-dependent refusals are not remembered: the same id may succeed later."""

    def _refuse(self, row: Row, result: int) -> None:
        return


class ForgetsRefusedIds(TwinShard):
    twin_class = _ForgetsRefusals


class _ReturnsToNobody(Twin):
    """Refused sends are settled without giving the money back."""

    def outcomes(
        self, destination_shard: int, upto_number: int, refused: Iterable[tuple[int, int]], timestamp_ns: int
    ) -> bytes:
        return super().outcomes(destination_shard, upto_number, [], timestamp_ns)


class SettlesWithoutReturning(TwinShard):
    twin_class = _ReturnsToNobody


# ---- mistakes of chains across shards


class _KnowsBetter:
    """The rules of chains, but for one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(chain_rules, name)


class _DecidesInMemory(_KnowsBetter):
    def run(self, chain: chain_rules.Plan, now_ns: Any) -> Any:
        """Posts as soon as all holds are there; that it decided so is written nowhere."""
        answers = yield chain.tries
        if all(answer is not None and set(answer) == {1} for answer in answers):
            settled = yield from chain_rules._settle_all(chain.marks, now_ns(), committed=True)
            return chain_rules.End(bytes([1 if settled else 31]) * chain.count, True, settled)
        settled = yield from chain_rules._settle_all(chain.marks, now_ns(), committed=False)
        return chain_rules.End(chain_rules._refusals(chain, answers), False, settled)


class DecidesAChainInMemory(SimulatedShard):
    chain_rules = _DecidesInMemory()


class _AsksNobody(_KnowsBetter):
    def settle(self, mark: Any, shard_count: int, now_ns: Any) -> Any:
        """A mark that was left is voided: its coordinator is dead, so the chain must have failed."""
        return (yield from chain_rules._settle_all([mark], now_ns(), committed=False))


class VoidsALeftChainWithoutAsking(SimulatedShard):
    chain_rules = _AsksNobody()


class _HoldsForAWhile(Twin):
    """The holds of a chain expire after a second, so that none is left for ever."""

    def _deadline(self, row: Row) -> int:
        return super()._deadline(replace(row, flags=0, timeout_s=1) if row.flags & F.CHAIN else row)


class LetsTheHoldsOfAChainExpire(TwinShard):
    twin_class = _HoldsForAWhile


class _ObeysAnybody(Twin):
    """Who knows the id of a hold of a chain posts or voids it by hand."""

    def _may_end(self, known: Hold | Known, row: Row) -> bool:
        return True


class LetsCallersEndTheHoldsOfAChain(TwinShard):
    twin_class = _ObeysAnybody


class _BelievesAnyUse(_KnowsBetter):
    """An id of a decision that is used was used by the decision."""

    def run(self, chain: chain_rules.Plan, now_ns: Any) -> Any:
        return _unasked(chain_rules.run(chain, now_ns))

    def settle(self, mark: Any, shard_count: int, now_ns: Any) -> Any:
        return _unasked(chain_rules.settle(mark, shard_count, now_ns))


def _unasked(steps: Any) -> Any:
    """Answers the question for the decision's hold (to post 2 of it) by itself."""
    asks = next(steps)
    while True:
        row = asks[0].rows[0]
        is_probe = row.flags & F.POST and row.amount_minor == 2
        answers = [bytes([TransferResult.HOLD_AMOUNT_EXCEEDED])] if is_probe else (yield asks)
        try:
            asks = steps.send(answers)
        except StopIteration as stop:
            return stop.value


class TakesAnyUseOfADecisionForACommit(SimulatedShard):
    chain_rules = _BelievesAnyUse()


class _VoidsBeforeTheAbort(_KnowsBetter):
    def run(self, chain: chain_rules.Plan, now_ns: Any) -> Any:
        """Where a shard does not answer, the holds are voided; the decision stays open to whoever asks next."""
        answers = yield chain.tries
        if any(answer is None for answer in answers):
            settled = yield from chain_rules._settle_all(chain.marks, now_ns(), committed=False)
            return chain_rules.End(chain_rules._refusals(chain, answers), False, settled)
        steps = chain_rules.run(chain, now_ns)
        next(steps)
        asks = steps.send(answers)
        while True:
            try:
                asks = steps.send((yield asks))
            except StopIteration as stop:
                return stop.value


class VoidsBeforeTheAbortIsDurable(SimulatedShard):
    chain_rules = _VoidsBeforeTheAbort()


PLANTED: tuple[type[SimulatedShard], ...] = (
    AcknowledgesBeforeSync,
    ReadsWhatIsNotDurable,
    RelaysBeforeDurable,
    ForgetsTheCompensation,
    NamesOnlyItsOwnRefusals,
    NeverDeliversAgain,
    GoesOnAfterAFailedSync,
    IgnoresTheDurableMark,
    SnapshotsWhatIsNotDurable,
    KeepsTooLittleLog,
    AppliesADoubledCredit,
    AdvancesTheCursorLater,
    ForgetsIdsTooEarly,
    LeavesHalfAHold,
    ForgetsRefusedIds,
    SettlesWithoutReturning,
    DecidesAChainInMemory,
    VoidsALeftChainWithoutAsking,
    LetsTheHoldsOfAChainExpire,
    LetsCallersEndTheHoldsOfAChain,
    TakesAnyUseOfADecisionForACommit,
    VoidsBeforeTheAbortIsDurable,
)
