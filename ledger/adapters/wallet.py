"""ledger.service.Wallet over the wallet's gRPC: which processes there are, which accounts, what they hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio

from ducat.wallet.v1 import shard_pb2, wallet_service_pb2_grpc
from kernel.errors import DucatError, Unavailable
from ledger.domain import Applied
from ledger.service import WalletLook, WalletProcess
from runtime.errors import typed_rpc_errors

__all__ = ["GrpcWallet"]

TIMEOUT_S = 10.0
Dial = Callable[[str], Awaitable[grpc.aio.Channel]]


class GrpcWallet:
    """Asks the process at `address` for the others."""

    def __init__(self, address: str, dial: Dial) -> None:
        self._address, self._dial = address, dial

    async def processes(self) -> list[WalletProcess]:
        answer = await self._call(self._address, "ListShards", shard_pb2.ListShardsRequest())
        slots: dict[str, list[tuple[int, int]]] = {}
        end = 0
        for shard in sorted(answer.shards, key=lambda one: one.first_slot):
            if shard.first_slot != end:
                break
            end = shard.end_slot
            slots.setdefault(shard.address, []).append((shard.first_slot, shard.end_slot))
        if end != answer.slot_count:
            raise Unavailable(f"the wallet process that owns slot {end} does not answer; see `ducat wallet shards`")
        if len(slots) == 1:  # the one that was asked, however it calls itself
            slots = {self._address: next(iter(slots.values()))}
        return [WalletProcess(address, tuple(owned), answer.slot_count) for address, owned in slots.items()]

    async def names(self, prefix: str, after: str, limit: int) -> list[str]:
        request = shard_pb2.ListAccountNamesRequest(name_prefix=prefix, after_name=after, page_size=limit)
        return list((await self._call(self._address, "ListAccountNames", request)).names)

    async def look(self, process: WalletProcess, names: Sequence[str]) -> WalletLook:
        request = shard_pb2.ReadBookedBalancesRequest(names=names)
        answer = await self._call(process.address, "ReadBookedBalances", request)
        return WalletLook(
            balances={one.name: one.balance_minor for one in answer.balances},
            applied=Applied.of((one.first_position, one.last_position) for one in answer.applied),
            start_time_ns=answer.start_time.ToNanoseconds(),
        )

    async def _call(self, address: str, method: str, request: Any) -> Any:
        stub: Any = wallet_service_pb2_grpc.ShardServiceStub(await self._dial(address))
        try:
            with typed_rpc_errors():
                return await getattr(stub, method)(request, timeout=TIMEOUT_S)
        except DucatError as error:
            raise Unavailable(f"the wallet at {address} does not answer {method}: {error}") from error
