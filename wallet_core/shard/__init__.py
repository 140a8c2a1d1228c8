"""The shards of one process: native pipeline, recovery, and the asyncio face that the service stands on."""

from wallet_core.shard._host import ShardClock, ShardHost
from wallet_core.shard.host import WalletHost
from wallet_core.shard.port import (
    BatchInvalid,
    HostBusy,
    HostClosed,
    RecoveryFailed,
    ShardFailed,
    ShardHostConfig,
    ShardHostError,
)
from wallet_core.shard.recovery import Progress, ShardsMismatch, open_host, rebuild, recover_shard

__all__ = [
    "BatchInvalid",
    "HostBusy",
    "HostClosed",
    "Progress",
    "RecoveryFailed",
    "ShardClock",
    "ShardFailed",
    "ShardHost",
    "ShardHostConfig",
    "ShardHostError",
    "ShardsMismatch",
    "WalletHost",
    "open_host",
    "rebuild",
    "recover_shard",
]
