"""Bringing a shard back: newest good snapshot, then every frame behind it, each checked; then the log goes
on.

Rules: a snapshot that does not read back, or whose state does not have the digest it names, falls back to
the one before it, at last to an empty engine and the whole log (if retention kept it). Every frame must
continue the hash chain, must follow from the state (the engine checks each record), and must leave the state
with the digest that it names. The tail rule is the event log's (`wallet_core.event_log.file`). Nothing is
changed on disk before everything was read; then a snapshot that had to be passed over is renamed to `*.damaged`, so that
retention does not count on it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wallet_core.engine._engine import Engine
from wallet_core.event_log import (
    FileLog,
    FrameReader,
    FrameStore,
    LogDamaged,
    LogGap,
    lock_folder,
    open_log,
    settle_end,
)
from wallet_core.event_log._file import read_mark
from wallet_core.event_log.file import RECORD_BYTES, LogEnd, make_folder, open_reader, segment_file
from wallet_core.shard._host import (
    MemoryThread,
    ShardClock,
    ShardHost,
    load_image_done,
    load_image_piece,
    replay_frames,
)
from wallet_core.shard.identity import (
    KnownShard,
    check_partition,
    check_reach,
    prepare_shards,
    record_identities,
)
from wallet_core.shard.port import (
    RecoveryFailed,
    ShardHostConfig,
    default_shard_map,
    shard_folder,
)
from wallet_core.snapshot import (
    SnapshotDamaged,
    SnapshotHeader,
    read_header,
    read_pieces,
    set_aside,
    snapshot_files,
)

if TYPE_CHECKING:
    from wallet_core.event_log.kafka import KafkaLogConfig

__all__ = ["Progress", "RecoveredShard", "load_snapshot", "open_host", "rebuild", "recover_shard"]

_REPLAY_STEP_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a recovery is. `stage`: "snapshot" (done and total are bytes), "replay" (events done; total
    0 = unknown), "fetch" (events copied from the log's store), "damaged" (a snapshot, or a copy of the log, was set aside;
    `problem` says why), or "cut" (a torn tail was cut off a segment: from byte `done` to `total`; `problem` says it whole)."""

    shard: int
    stage: str
    done: int
    total: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RecoveredShard:
    """A shard ready to serve. `skipped`: snapshots that could not be used, and why; they were set aside."""

    shard: int
    engine: Engine
    log: FileLog
    snapshot_sequence: int
    replayed_events: int
    seconds: float
    tail_kept: str | None
    skipped: tuple[str, ...]


def new_engine(config: ShardHostConfig, shard: int) -> Engine:
    """An empty engine with the configured window of ids."""
    return Engine(
        shard,
        id_window_ms=config.id_window_ms,
        id_count_max=config.id_count_max,
        generation_ids=config.generation_ids,
        room_ids=config.room_ids,
        **config.engine_options,
    )


def load_snapshot(path: Path, engine: Engine, progress: Callable[[Progress], None] | None = None) -> SnapshotHeader:
    """Load a snapshot into an empty engine. Raises SnapshotDamaged; the engine is then of no use."""
    header = read_header(path)
    done = 0
    with MemoryThread(engine) as memory:
        for piece in read_pieces(path):
            if not load_image_piece(engine, piece, memory=memory):
                raise SnapshotDamaged(str(path), done, "the engine refuses a piece")
            done += len(piece)
            if progress is not None:
                progress(Progress(header.shard, "snapshot", done, header.file_bytes))
    if not load_image_done(engine):
        raise SnapshotDamaged(str(path), 0, "the state does not have the digest that the image names")
    if engine.state_digest() != header.digest or engine.status().sequence != header.sequence:
        raise SnapshotDamaged(str(path), 0, "the state is not the one that the header names")
    return header


@dataclass(frozen=True, slots=True)
class _Start:
    engine: Engine
    header: SnapshotHeader | None
    skipped: tuple[str, ...]
    damaged: tuple[Path, ...]  # the files of `skipped`


def _start_from(
    config: ShardHostConfig,
    shard: int,
    folder: Path,
    progress: Callable[[Progress], None] | None,
    upto_sequence: int = 2**64 - 1,
    upto_timestamp_ns: int = 2**64 - 1,
) -> _Start:
    """The newest snapshot at or below a bound that loads, else an empty engine."""
    skipped: list[str] = []
    damaged: list[Path] = []
    for one in snapshot_files(folder / "snapshots"):
        if one.sequence > upto_sequence:
            continue
        engine = new_engine(config, shard)
        try:
            header = read_header(one.path)
            if header.timestamp_ns > upto_timestamp_ns:
                continue
            if header.shard != shard:
                raise SnapshotDamaged(str(one.path), 8, f"it is of shard {header.shard}")
            header = load_snapshot(one.path, engine, progress)
            engine.set_id_window(config.id_window_ms)  # the image brought the one that it was made with
            return _Start(engine, header, tuple(skipped), tuple(damaged))
        except SnapshotDamaged as error:
            skipped.append(str(error))
            damaged.append(one.path)
    return _Start(new_engine(config, shard), None, tuple(skipped), tuple(damaged))


def _replay(
    engine: Engine,
    reader: FrameReader,
    shard: int,
    progress: Callable[[Progress], None] | None,
    upto_sequence: int = 2**64 - 1,
    upto_timestamp_ns: int = 2**64 - 1,
) -> int:
    """Replay what the reader has, reading ahead and touching memory in threads beside. Returns the number of events."""
    events, more = 0, True
    reader.read_ahead(True)
    try:
        with MemoryThread(engine) as memory:
            while more:
                _, count, more = replay_frames(
                    engine,
                    reader,
                    memory=memory,
                    upto_sequence=upto_sequence,
                    upto_timestamp_ns=upto_timestamp_ns,
                    bytes_max=_REPLAY_STEP_BYTES,
                )
                events += count
                if progress is not None:
                    progress(Progress(shard, "replay", events, 0))
    finally:
        reader.read_ahead(False)
    return events


def recover_shard(
    config: ShardHostConfig,
    shard: int,
    *,
    progress: Callable[[Progress], None] | None = None,
    check: Callable[[int], None] = lambda sequence: None,
) -> RecoveredShard:
    """Lock, load, replay, settle the tail, open for appending. With a log in Kafka the shard is taken over first, and the folder
    brought up to date with the partition. `check` takes the number of the last event before anything is opened for appending, and
    may refuse it. Raises LogLocked, LogDamaged, LogGap, LogFenced, StoreUnusable, RecoveryFailed, DiskNearlyFull, OSError."""
    began = time.monotonic()
    folder = shard_folder(config.data_dir, shard)
    make_folder(folder / "log")
    lock = lock_folder(folder)
    store: FrameStore | None = None
    try:
        start = _start_from(config, shard, folder, progress)
        engine, header = start.engine, start.header
        events = 0
        if config.kafka is not None:
            store = _take_over(config, config.kafka, shard, folder, start, progress)

        def visit(reader: FrameReader) -> None:
            nonlocal events
            events = _replay(engine, reader, shard, progress)

        try:
            end = settle_end(
                folder / "log",
                shard,
                from_sequence=header.sequence + 1 if header else 1,
                from_hash=header.frame_hash if header else None,
                visit=visit,
                direct=config.direct_io,
            )
        except LogGap as error:
            before = sorted((folder / "snapshots").glob("*.damaged"))
            problems = [*start.skipped, *(f"{one} was set aside before" for one in before)]
            if header is None and problems:
                raise LogDamaged(error.file, 0, f"{error}; no snapshot reads back: {'; '.join(problems)}") from error
            raise
        if end.next_sequence != engine.status().sequence + 1:
            raise RecoveryFailed(
                str(folder), 0, end.next_sequence, f"the log ends there, the engine is at {engine.status().sequence}"
            )
        if progress is not None and end.tail_kept:
            progress(_cut(shard, folder / "log", end))
        check(engine.status().sequence)
        set_aside(start.damaged)
        if progress is not None:
            for reason in start.skipped:
                progress(Progress(shard, "damaged", 0, 0, reason))
        held, lock = lock, -1  # the log's from here on, and let go of by it
        log = open_log(
            folder / "log",
            shard,
            end=end,
            lock=held,
            segment_bytes=config.segment_bytes,
            reserve_bytes=config.reserve_bytes,
            sync=config.sync and store is None,
            direct=config.direct_io,
            store=store,
        )
    except BaseException:
        if store is not None:
            store.close()
        if lock >= 0:
            os.close(lock)
        raise
    return RecoveredShard(
        *(shard, engine, log, header.sequence if header else 0, events, time.monotonic() - began),
        *(end.tail_kept, start.skipped),
    )


def _cut(shard: int, log: Path, end: LogEnd) -> Progress:
    kept = end.tail_kept or ""
    size = os.stat(kept).st_size
    return Progress(
        *(shard, "cut", end.offset, end.offset + size),
        f"{segment_file(log, end.segment_first)} at byte {end.offset}: {size} bytes behind event {end.next_sequence - 1} were not "
        f"whole and never acknowledged; they were cut off and are kept as {kept}",
    )


def _take_over(
    config: ShardHostConfig,
    kafka: KafkaLogConfig,
    shard: int,
    folder: Path,
    start: _Start,
    progress: Callable[[Progress], None] | None,
) -> FrameStore:
    """Own the shard's partition and bring the local log up to date with it."""
    from wallet_core.event_log.kafka import KafkaFrames, fetch_missing  # the driver is not loaded for nothing

    header = start.header
    begin = oldest = _end_at(header) if header else LogEnd(1, bytes(16), 0, 0, 0, 0, None)
    if header is not None:
        for one in snapshot_files(folder / "snapshots"):
            with contextlib.suppress(SnapshotDamaged):
                if one.path not in start.damaged and one.sequence < header.sequence:
                    oldest = _end_at(read_header(one.path))
    store = KafkaFrames(kafka, shard)
    try:
        aside = fetch_missing(
            store,
            folder / "log",
            begin,
            oldest,
            segment_bytes=config.segment_bytes,
            reserve_bytes=config.reserve_bytes,
            record_bytes=RECORD_BYTES,
            direct=config.direct_io,
            progress=None if progress is None else lambda done: progress(Progress(shard, "fetch", done, 0)),
        )
    except BaseException:
        store.close()
        raise
    if aside is not None and progress is not None:
        progress(Progress(shard, "damaged", 0, 0, f"the local log could not be used and is now {aside}"))
    return store


def _end_at(header: SnapshotHeader) -> LogEnd:
    return LogEnd(header.sequence + 1, header.frame_hash, header.epoch, header.timestamp_ns, 0, 0, None)


def rebuild(
    config: ShardHostConfig,
    shard: int,
    *,
    upto_sequence: int = 2**64 - 1,
    upto_timestamp_ns: int = 2**64 - 1,
    from_scratch: bool = False,
    as_found: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Engine, LogEnd]:
    """A shard's state as of a sequence number or a time (unix ns), from snapshot and log, without locking or
    changing anything: for balances as of then, for `verify` (from_scratch=True replays every frame that is
    kept), for tools beside a live server. The state is that of the last whole frame at or before the bound. as_found: of a shard that
    nobody runs, to the last frame that reads back, whatever the durable mark says.
    Raises as `recover_shard` does."""
    folder = shard_folder(config.data_dir, shard)
    bound = (upto_sequence, upto_timestamp_ns)
    start = (
        _Start(new_engine(config, shard), None, (), ())
        if from_scratch
        else _start_from(config, shard, folder, progress, *bound)
    )
    engine, header = start.engine, start.header
    reader = open_reader(
        folder / "log",
        shard,
        header.sequence + 1 if header else 1,
        from_hash=header.frame_hash if header else None,
        ahead=True,
    )
    if reader is None:
        return engine, LogEnd(engine.status().sequence + 1, bytes(16), 0, 0, 0, 0, None)
    mark = read_mark(folder / "log")
    if mark is not None and not as_found:  # beside a live server: what is not durable yet may be half written
        bound = (min(upto_sequence, mark[0]), upto_timestamp_ns)
    _replay(engine, reader, shard, progress, *bound)
    if reader.damage is not None and not as_found:
        raise LogDamaged(reader.file, reader.offset, reader.damage)
    end = LogEnd(
        *(reader.next_sequence, reader.last_hash or bytes(16), reader.epoch, reader.timestamp_ns),
        *(reader.segment_first, reader.offset, None),
    )
    return engine, end


def open_host(
    config: ShardHostConfig,
    *,
    clock: ShardClock | None = None,
    progress: Callable[[Progress], None] | None = None,
    known: Mapping[int, KnownShard] | None = None,
) -> ShardHost:
    """Recover this process's shards, several at a time, and make a host of them (not started yet). `known`: what PostgreSQL knows of
    them; a shard that is missing, foreign or behind is refused before anything is opened. Raises what `recover_shard` and
    `prepare_shards` raise, and StoreUnusable."""
    shard_ids = config.shard_ids or tuple(range(config.shard_count))
    look = check_partition if config.kafka is not None else _check_log
    checks = {shard: look(config, shard, (known or {}).get(shard)) for shard in shard_ids}
    identities = prepare_shards(config, known)
    if config.kafka is not None:
        from wallet_core.event_log.kafka import ensure_topic

        ensure_topic(config.kafka, config.shard_count)
    recovered: list[RecoveredShard] = []
    try:
        with ThreadPoolExecutor(max_workers=min(len(shard_ids), os.cpu_count() or 1)) as pool:
            futures = [
                pool.submit(recover_shard, config, shard, progress=progress, check=checks[shard]) for shard in shard_ids
            ]
            errors = []
            for future in futures:
                try:
                    recovered.append(future.result())
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise errors[0]
        record_identities(config.data_dir, config.shard_count, identities)
        host = ShardHost(
            [(one.shard, one.engine, one.log) for one in recovered],
            shard_count=config.shard_count,
            shard_map=config.shard_map or default_shard_map(config.shard_count),
            clock=clock,
            config=config,
            rows_in_flight_max=config.rows_in_flight_max,
            bytes_in_flight_max=config.bytes_in_flight_max,
        )
    except BaseException:
        for one in recovered:
            one.log.close()
        raise
    for one in recovered:
        host.note_snapshot(one.shard, one.snapshot_sequence)
    return host


def _check_log(config: ShardHostConfig, shard: int, known: KnownShard | None) -> Callable[[int], None]:
    return check_reach(shard, shard_folder(config.data_dir, shard), known)
