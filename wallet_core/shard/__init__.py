"""The shards of one process: native pipeline, recovery, and the asyncio face that the service stands on."""

from wallet_core.shard._host import ShardClock, ShardHost
from wallet_core.shard.host import WalletHost
from wallet_core.shard.identity import (
    DatabaseBehind,
    DataFileDamaged,
    KnownShard,
    ShardBehind,
    ShardForeign,
    ShardMissing,
    ShardsMismatch,
)
from wallet_core.shard.port import (
    BatchInvalid,
    HostBusy,
    HostClosed,
    RecoveryFailed,
    ShardFailed,
    ShardHostConfig,
    ShardHostError,
)
from wallet_core.shard.recovery import Progress, open_host, rebuild, recover_shard
from wallet_core.shard.scrub import Damage, Scrubber, ScrubStatus

__all__ = [
    "BatchInvalid",
    "Damage",
    "DataFileDamaged",
    "DatabaseBehind",
    "HostBusy",
    "HostClosed",
    "KnownShard",
    "Progress",
    "RecoveryFailed",
    "ScrubStatus",
    "Scrubber",
    "ShardBehind",
    "ShardClock",
    "ShardFailed",
    "ShardForeign",
    "ShardHost",
    "ShardHostConfig",
    "ShardHostError",
    "ShardMissing",
    "ShardsMismatch",
    "WalletHost",
    "open_host",
    "rebuild",
    "recover_shard",
]
