"""Wires the wallet: the only place that names concrete classes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ducat.wallet.v1 import relay_pb2_grpc, wallet_service_pb2_grpc
from kernel.clock import Clock, SystemClock
from kernel.errors import DucatError, FailedPrecondition
from runtime import logs, metrics
from runtime.bus.late import LateBus
from runtime.feed import Feeds
from runtime.inbox import InboxRecorder
from runtime.outbox import OutboxRelay
from runtime.postgres import Pool
from runtime.private_folder import close_folder
from runtime.process import Process
from runtime.settings import Settings, SettingsInvalid, split_address
from runtime.supervise import keep_running
from runtime.unfinished import check_finished
from wallet_core.adapters.alone import NoDirectory, NoReadModel
from wallet_core.adapters.archive import FileArchive
from wallet_core.adapters.bus import BATCH_MAX, CONSUMER, GROUP, TOPIC, OutboxAnswers, PaymentEvents
from wallet_core.adapters.directory import PostgresDirectory
from wallet_core.adapters.grpc import SCOPES, UNSHIELDED, ShardServicer, WalletServicer
from wallet_core.adapters.ownership import Ownership, ShardTaken
from wallet_core.adapters.peers import AllShards, Peers
from wallet_core.adapters.presence import Presence, adopt, known_shards
from wallet_core.adapters.read_model import PostgresStore, ReadModelReader, ValkeyStore, past_results
from wallet_core.adapters.rebuild import ReadModelReset, follow_resets
from wallet_core.adapters.relay import Relay, RelayServicer, forget_numbers, parse_peers, peer_shards
from wallet_core.adapters.snapshot_base import SnapshotBase, newest_base
from wallet_core.event_log import EventLogError
from wallet_core.service.balance_check import check_balances
from wallet_core.service.booked import BookedBalances
from wallet_core.service.chain_rules import ChainMark
from wallet_core.service.chains import Chains
from wallet_core.service.flows import Flows
from wallet_core.service.history import History
from wallet_core.service.port import ShardLink
from wallet_core.service.projector import Projector, Store
from wallet_core.service.wallet import Wallet
from wallet_core.shard import (
    Damage,
    Progress,
    Scrubber,
    ScrubStatus,
    ShardHostConfig,
    ShardHostError,
    WalletHost,
)
from wallet_core.shard.identity import read_identity
from wallet_core.shard.port import shard_folder
from wallet_core.snapshot import SnapshotDamaged

if TYPE_CHECKING:
    from wallet_core.event_log.kafka import KafkaLogConfig

__all__ = ["host_config", "main"]

_log = logs.get_logger("wallet")
_CHECKS_SKIPPED_MAX = 10
_CLOCK_LOOK_S = 5.0
_CLOCK_BEHIND_S = 60.0


@dataclass(frozen=True, slots=True)
class _Joined:
    """The wallet, and what makes it a part of the platform; a wallet that runs alone has none of that."""

    wallet: Wallet
    reset: ReadModelReset | None = None
    feeds: Feeds | None = None
    booked: BookedBalances | None = None


async def main(overrides: Mapping[str, Any] | None = None) -> None:
    """Runs the wallet until it is told to stop."""
    settings = Settings.load(overrides)
    async with Process.start("wallet", settings) as process:
        config = host_config(settings)
        pool = None if settings.wallet_alone else await process.postgres("wallet")
        if pool is not None and config.kafka is None:
            await _own_shards(process, config)
        host = await _open_host(config, pool)
        host.on_snapshot_failure = _log_snapshot_failure
        host.on_rewound = _tell_rewound()
        process.spawn(keep_running("clock", lambda: _watch_clock(host)), name="clock")
        process.on_close("shards", host.close)
        process.spawn(_stop_on_failure(host), name="shards")
        presence = await _note_presence(process, host, pool) if pool is not None else None
        clock = SystemClock()
        history = History(host, FileArchive(config), clock)
        joined = _Joined(Wallet(host, NoDirectory(), NoReadModel()))
        if pool is not None and presence is not None:
            joined = await _join(process, host, config, clock, pool, presence)
        peers = _peers(settings, config)
        relay = Relay(host, peers, process.channel) if peers else None
        if relay is not None:
            process.spawn(keep_running("relay", relay.run), name="relay")
        elif len(host.shard_ids) == config.shard_count:
            forget_numbers(host)
        elsewhere = Peers(peers, process.channel)
        chains = Chains(
            host,
            elsewhere,
            clock,
            on_blocked=_log_blocked,
            on_look_failed=_log_look_failed,
            on_taken=_log_accounts_taken,
            on_strange=_log_strange_marks,
        )
        if config.shard_count > 1:
            host.coordinate(chains.run)
            process.spawn(keep_running("chains", chains.watch), name="chains")
        shards = AllShards(host, elsewhere)
        if settings.wallet_check_interval_s and 0 in config.shard_ids:
            interval_s = settings.wallet_check_interval_s
            process.spawn(
                keep_running("balance-check", lambda: _keep_checking(host, shards, interval_s)), name="balance-check"
            )

        scrubber = _scrubber(host, settings)
        if settings.wallet_scrub_bytes_per_s:
            process.spawn(keep_running("scrub", scrubber.run), name="scrub")

        servicer = WalletServicer(host, joined.wallet, history)
        addresses = sorted(set(peers.values()))
        shard_servicer = ShardServicer(
            host,
            joined.wallet,
            history,
            lambda: _address(settings, process.address),
            lambda: peer_shards(addresses, process.channel),
            lambda: check_balances(shards),
            scrubbed=scrubber.status,
            owners=peers,
            reset=joined.reset.reset if joined.reset is not None else None,
            booked=joined.booked,
        )
        await process.serve_grpc(
            settings.wallet_listen,
            servicers=[
                (
                    servicer,
                    wallet_service_pb2_grpc.add_WalletServiceServicer_to_server,
                    "ducat.wallet.v1.WalletService",
                ),
                (
                    shard_servicer,
                    wallet_service_pb2_grpc.add_ShardServiceServicer_to_server,
                    "ducat.wallet.v1.ShardService",
                ),
                (
                    RelayServicer(host, chains, relay.believes if relay is not None else lambda _: True),
                    relay_pb2_grpc.add_RelayServiceServicer_to_server,
                    "ducat.wallet.v1.RelayService",
                ),
                *(joined.feeds.servicers if joined.feeds is not None else ()),
            ],
            scopes=SCOPES | (joined.feeds.scopes if joined.feeds is not None else {}),
            raw_handlers=servicer.raw_handlers(),
            unshielded=UNSHIELDED,
        )


async def _own_shards(process: Process, config: ShardHostConfig) -> None:
    """No other process serves these shards from now on. Raises FailedPrecondition."""
    ownership = Ownership(process.settings.database_url, config.shard_ids)
    process.on_close("shard locks", ownership.close)
    try:
        await ownership.take()
    except ShardTaken as error:
        raise FailedPrecondition(f"the wallet does not start: {error}") from error
    process.spawn(ownership.keep(), name="shard locks")


async def _open_host(config: ShardHostConfig, pool: Pool | None) -> WalletHost:
    """The shards, if they are those that PostgreSQL and the data folder know, and reach as far. Raises FailedPrecondition, which says
    what was expected, where, what is there, and the ways out."""
    check_finished(config.data_dir.parent)
    try:
        if config.data_dir.exists():  # it may be older than the rule
            close_folder(config.data_dir)
        known = await known_shards(pool) if pool is not None else None
        return await WalletHost.open(config, progress=_log_progress, known=known)
    except (ShardHostError, EventLogError, SnapshotDamaged) as error:
        raise FailedPrecondition(f"the wallet does not start: {error}") from error
    except OSError as error:
        place = error.filename or config.data_dir
        raise FailedPrecondition(
            f"the wallet does not start: {place}: {error.strerror or error}. The wallet needs its data folder {config.data_dir} to read "
            f"and to write: look at the mount, its options and the folder's owner"
        ) from error


async def _note_presence(process: Process, host: WalletHost, pool: Pool) -> Presence:
    """PostgreSQL learns of the shards that were opened, and hears from now on how far they are."""
    own = {shard: read_identity(shard_folder(host.config.data_dir, shard)) for shard in host.shard_ids}
    folders = {shard: shard_folder(host.config.data_dir, shard) for shard in host.shard_ids}
    presence = Presence(host, pool, {shard: one.identity for shard, one in own.items() if one is not None}, folders)
    try:
        await adopt(pool, presence.positions())
    except ShardHostError as error:
        raise FailedPrecondition(f"the wallet does not start: {error}") from error
    process.on_close("presence", presence.close)
    process.spawn(keep_running("presence", presence.keep), name="presence")
    return presence


async def _join(
    process: Process, host: WalletHost, config: ShardHostConfig, clock: Clock, pool: Pool, presence: Presence
) -> _Joined:
    """Names, read model and bus: the wallet as a part of the platform. None of it stops the shards, and neither Valkey nor the bus has to
    answer for them to serve."""
    settings = process.settings
    valkey = process.valkey_client()
    bus = LateBus(process.bus)
    process.spawn(keep_running("bus", bus.run), name="bus")
    directory = PostgresDirectory(pool)

    def find_base(shard: int, sequence: int | None) -> SnapshotBase | None:
        return newest_base(config, shard, sequence=sequence)

    stores: list[Store] = [PostgresStore(pool), ValkeyStore(valkey, find_base)] if settings.wallet_projection else []
    projector = _projector(host, stores)
    reset = ReadModelReset(pool, valkey, range(config.shard_count), projector) if stores else None
    if stores:
        host.retain = projector.projected
        process.spawn(keep_running("projector", projector.run), name="projector")
        process.spawn(keep_running("rebuild", lambda: follow_resets(settings.database_url, projector)), name="rebuild")
    flows = Flows(host, directory, past=past_results(pool))
    outbox_relay = OutboxRelay(pool, "wallet", bus)
    process.spawn(keep_running("outbox relay", outbox_relay.run), name="outbox relay")
    recorder = InboxRecorder(pool, CONSUMER, along=presence.along)
    events = PaymentEvents(flows, OutboxAnswers(pool, outbox_relay), clock, note=recorder.note)
    feeds = Feeds(process, pool, publishes=True)
    follower = feeds.follow(
        await process.channel(settings.payment_address),
        recorder,
        topic=TOPIC,
        consumer=CONSUMER,
        handler=events.handle,
        owns=events.owns,
        batch_max=BATCH_MAX,
        applied=events.applied,
    )
    group = _group(config)

    async def consume() -> None:
        await bus.consume(
            TOPIC,
            group,
            follower.batches(events.handle),
            batch_max=BATCH_MAX,
            on_gap=follower.on_gap,
            from_end=group != GROUP,  # a new split of the shards: what is past comes from the feed
        )

    process.spawn(keep_running("payment-events", consume), name="payment-events")
    wallet = Wallet(host, directory, ReadModelReader(pool, projector))
    return _Joined(wallet, reset, feeds, BookedBalances(host, directory, events, clock))


def _projector(host: WalletHost, stores: list[Store]) -> Projector:
    lag = metrics.gauge("ducat_wallet_projection_lag_events", "Durable events that the read model lacks.", ["shard"])
    problem = metrics.gauge(
        "ducat_wallet_read_model_problem",
        "1: the read model in that store does not follow the shard; `ducat wallet shards` says why.",
        ["shard", "store"],
    )
    failed = metrics.counter(
        "ducat_wallet_read_model_failures_total", "Tries of the read model that failed.", ["shard", "store"]
    )

    def note_failure(shard: int, store: str, _: str) -> None:
        problem.labels(str(shard), store).set(1)
        failed.labels(str(shard), store).inc()

    for shard in host.shard_ids:
        for store in stores:
            problem.labels(str(shard), store.name).set(0)
    return Projector(
        host,
        stores,
        is_busy=lambda: host.native.rows_in_flight > 0,
        on_progress=lambda shard, at, durable: lag.labels(str(shard)).set(durable - at),
        on_failure=note_failure,
        on_well=lambda shard, store: problem.labels(str(shard), store).set(0),
    )


def host_config(settings: Settings) -> ShardHostConfig:
    """The shards of this process. Raises SettingsInvalid."""
    return ShardHostConfig(
        data_dir=Path(settings.data_dir) / "wallet",
        shard_count=settings.wallet_shard_count,
        shard_ids=_shard_ids(settings.wallet_shards, settings.wallet_shard_count),
        segment_bytes=settings.wallet_segment_bytes,
        reserve_bytes=settings.wallet_disk_reserve_bytes,
        id_window_ms=settings.wallet_id_window_ms,
        room_ids=settings.wallet_room_ids,
        snapshot_events=settings.wallet_snapshot_events,
        snapshots_kept=settings.wallet_snapshots_kept,
        keep_history=settings.wallet_keep_history,
        kafka=_kafka_log(settings),
    )


def _kafka_log(settings: Settings) -> KafkaLogConfig | None:
    """Where the logs are if they are in Kafka."""
    if settings.wallet_log != "kafka":
        return None
    from wallet_core.event_log.kafka import KafkaLogConfig  # the driver is not loaded for nothing

    return KafkaLogConfig(
        settings.kafka_bootstrap,
        topic=settings.wallet_kafka_topic,
        min_insync_replicas=settings.wallet_kafka_min_insync_replicas,
        timeout_ms=settings.wallet_kafka_timeout_ms,
    )


def _shard_ids(text: str, count: int) -> tuple[int, ...]:
    """``"0-3,6"`` → (0, 1, 2, 3, 6); empty → all."""
    if not text:
        return tuple(range(count))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise SettingsInvalid(f'wallet_shards: expected numbers and ranges such as "0-3,6", got {text!r}')
        found.update(range(int(first), int(last or first) + 1))
    if not found or max(found) >= count:
        raise SettingsInvalid(f"wallet_shards: {text!r} names shards beyond wallet_shard_count = {count}")
    return tuple(sorted(found))


def _group(config: ShardHostConfig) -> str:
    """Processes that own different shards each read every event, and apply those of their own sellers."""
    if len(config.shard_ids) == config.shard_count:
        return GROUP
    return f"{GROUP}-{'-'.join(map(str, config.shard_ids))}"


def _peers(settings: Settings, config: ShardHostConfig) -> dict[int, str]:
    """Shard → address of those of other processes. Raises SettingsInvalid where one has no owner, or two."""
    try:
        peers = parse_peers(settings.wallet_peers, lambda text: _shard_ids(text, config.shard_count))
    except ValueError as error:
        raise SettingsInvalid(f"wallet_peers: {error}") from None
    missing = set(range(config.shard_count)) - set(config.shard_ids) - set(peers)
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        raise SettingsInvalid(
            f"wallet_shards and wallet_peers: nobody owns shard {names}; transfers to its accounts could never settle"
        )
    doubled = set(config.shard_ids) & set(peers)
    if doubled:
        raise SettingsInvalid(f"wallet_peers: shard {min(doubled)} is this process's own")
    return peers


async def _stop_on_failure(host: WalletHost) -> None:
    """Ends with the error of a poisoned shard, which stops the process: nothing more may be acknowledged."""
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(error: Exception) -> None:
        if not failed.done():
            failed.set_exception(error)

    host.on_failure = fail
    await failed


async def _keep_checking(host: WalletHost, shards: AllShards, interval_s: float) -> None:
    """Balances of all shards, every `interval_s`. A check looks at every account, so it waits for a moment when nothing is
    under way, at most ten intervals."""
    imbalance = metrics.gauge(
        "ducat_wallet_imbalance_minor",
        "All balances and money in flight of a currency; anything but 0 is wrong.",
        ["currency"],
    )
    last = metrics.gauge("ducat_wallet_balance_check_timestamp_seconds", "When the balances were added up last.")
    skipped = 0
    while True:
        await asyncio.sleep(interval_s)
        if host.native.rows_in_flight > 0 and skipped < _CHECKS_SKIPPED_MAX:
            skipped += 1
            continue
        skipped = 0
        try:
            report = await check_balances(shards)
        except DucatError as error:
            _log.warning("the balances could not be added up", error=str(error))
            continue
        for one in report.currencies:
            imbalance.labels(one.currency).set(one.imbalance)
        last.set_to_current_time()
        if not report.ok:
            _log.error(
                "balances and money in flight do not add up to zero",
                imbalances={one.currency: one.imbalance for one in report.currencies if one.imbalance},
                uneven_shards=[list(one) for one in report.uneven_shards],
                positions=dict(report.positions),
            )


def _address(settings: Settings, bound: str) -> str:
    """Where this process is reached: as it is configured, with the port that the system chose if it was asked to."""
    if split_address(settings.wallet_listen)[1] or not bound:
        return settings.wallet_address
    host = settings.wallet_address.rpartition(":")[0] or bound.rpartition(":")[0]
    return f"{host}:{bound.rpartition(':')[2]}"


def _tell_rewound() -> Callable[[int, ShardLink], None]:
    gauge = metrics.gauge(
        "ducat_wallet_rewound",
        "1: the shard's log is older than what it had acknowledged to that peer, restored from an old copy.",
        ["shard", "peer"],
    )

    def tell(shard: int, link: ShardLink) -> None:
        gauge.labels(str(shard), str(link.peer)).set(1)
        _log.error(
            "a shard is older than what it had acknowledged to another: it was restored from an old copy. "
            "What crosses between the two stands still; restore it from a newer copy",
            shard=shard,
            peer=link.peer,
            problem=link.problem,
        )

    return tell


async def _watch_clock(host: WalletHost) -> None:
    """Says when the machine's clock is not followed, and when a log is from the future."""
    held = metrics.gauge(
        "ducat_wallet_clock_held_seconds",
        "By how much the machine's clock was set and the shards' time was not; 0 = they agree.",
    )
    for one in host.native.shards():
        ahead_s = (one.now_ns - host.native.clock.now_ns) / 1e9
        if ahead_s > _CLOCK_BEHIND_S:
            _log.error(
                "the machine's clock is behind the shard's log: until it has caught up no hold ends by its deadline",
                shard=one.shard,
                behind_s=round(ahead_s),
            )
    told = False
    while True:
        step_s = host.native.clock.held_step_s
        held.set(step_s)
        if step_s and not told:
            _log.error(
                "the machine's clock was set by more than an hour: shards go on with the time from before. "
                "If the clock is right now, restart the wallet",
                step_s=round(step_s),
            )
        elif told and not step_s:
            _log.warning("the machine's clock is back")
        told = bool(step_s)
        await asyncio.sleep(_CLOCK_LOOK_S)


def _scrubber(host: WalletHost, settings: Settings) -> Scrubber:
    damaged = metrics.gauge(
        "ducat_wallet_scrub_damage", "Places in segments and snapshots of the shard that do not read back.", ["shard"]
    )
    ended = metrics.gauge(
        "ducat_wallet_scrub_timestamp_seconds",
        "When all segments and snapshots of the shard had last been read.",
        ["shard"],
    )
    for shard in host.shard_ids:
        damaged.labels(str(shard)).set(0)

    def tell_damage(shard: int, damage: Damage) -> None:
        damaged.labels(str(shard)).inc()
        _log.error(
            "damage on the disk: a segment or snapshot does not read back; restore it from a copy while there is one "
            "(docs/wallet.md, Damage on the disk)",
            shard=shard,
            file=damage.file,
            offset=damage.offset,
            problem=damage.reason,
        )

    def tell_round(shard: int, status: ScrubStatus) -> None:
        damaged.labels(str(shard)).set(len(status.damage))
        ended.labels(str(shard)).set(status.end_time_ns / 1e9)

    return Scrubber(
        host,
        bytes_per_s=settings.wallet_scrub_bytes_per_s,
        interval_s=settings.wallet_scrub_interval_h * 3600,
        on_damage=tell_damage,
        on_round=tell_round,
    )


def _log_blocked(mark: ChainMark, seconds: float) -> None:
    log = _log.warning if mark.complete else _log.error
    log(
        "a chain across shards cannot end yet: an account is frozen, or a process is down"
        if mark.complete
        else "a chain across shards waits for ever: it was tried, and some of its holds were posted or voided by hand",
        shard=mark.shard,
        mark=mark.id.hex(),
        holds=[id_.hex() for id_, _, _ in mark.holds[:8]],
        seconds=round(seconds),
    )


def _log_look_failed(error: Exception) -> None:
    _log.error("chains across shards that were left could not be looked at", error=f"{type(error).__name__}: {error}")


def _log_accounts_taken(ids: list[bytes]) -> None:
    _log.error(
        "chains across shards are refused: accounts that they need were opened by somebody else, with other flags",
        accounts=[id_.hex() for id_ in ids],
    )


def _log_strange_marks(amount: int) -> None:
    _log.error(
        "chain/marks holds what belongs to no chain that can be ended: holds of callers, or chains begun by a version without the "
        "flag CHAIN; what these hold stays held",
        amount=amount,
    )


def _log_snapshot_failure(shard: int, error: Exception) -> None:
    _log.warning("no snapshot could be taken", shard=shard, error=str(error))


def _log_progress(progress: Progress) -> None:
    if progress.stage == "damaged":
        _log.warning("damaged files were set aside", shard=progress.shard, problem=progress.problem)
        return
    if progress.stage == "cut":
        _log.warning("a torn tail was cut off", shard=progress.shard, problem=progress.problem)
        return
    _log.debug("recovering", shard=progress.shard, stage=progress.stage, done=progress.done, total=progress.total)
