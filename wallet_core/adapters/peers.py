"""The shards of other processes, as chains across shards and the balance check need them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from ducat.wallet.v1 import relay_pb2, wallet_pb2
from ducat.wallet.v1.relay_pb2_grpc import RelayServiceStub
from runtime.errors import typed_rpc_errors
from wallet_core.adapters.relay import Dial, read_events
from wallet_core.adapters.rows import batch_message
from wallet_core.service.balance_check import ShardCut
from wallet_core.service.port import EventPage, TransferRow
from wallet_core.shard import WalletHost
from wallet_core.shard.port import RowsResult, ShardPosition, unpack_cut

__all__ = ["AllShards", "Peers"]

STEP_TIMEOUT_S = 2.0
CUT_TIMEOUT_S = 30.0
"""A cut looks at every account."""


class Peers:
    """Satisfies `wallet_core.service.chains.ChainPeers`. `owners`: shard → address."""

    def __init__(self, owners: Mapping[int, str], dial: Dial) -> None:
        self._owners, self._dial = dict(owners), dial

    async def stub(self, shard: int) -> Any:
        """Of the process that owns a shard."""
        return RelayServiceStub(await self._dial(self._owners[shard]))

    async def apply_step(self, shard: int, rows: Sequence[TransferRow], currencies: Sequence[str]) -> RowsResult:
        stub = await self.stub(shard)
        batch = wallet_pb2.TransferBatch.FromString(batch_message(rows))
        request = relay_pb2.ApplyStepRequest(shard=shard, currency_codes=currencies, batch=batch)
        answer = await _call(stub.ApplyStep(request, timeout=STEP_TIMEOUT_S))
        positions = tuple(ShardPosition(one.shard, one.sequence_number) for one in answer.positions)
        return RowsResult(answer.results, positions, 0)

    async def currencies(self, shard: int, ids: Sequence[bytes]) -> list[str]:
        stub = await self.stub(shard)
        request = relay_pb2.ReadCurrenciesRequest(account_ids=ids)
        return list((await _call(stub.ReadCurrencies(request, timeout=STEP_TIMEOUT_S))).currency_codes)

    async def mark_ids(self) -> tuple[set[bytes], set[int]]:
        found: set[bytes] = set()
        shards: set[int] = set()
        for address in set(self._owners.values()):
            stub: Any = RelayServiceStub(await self._dial(address))
            answer = await _call(stub.ListChainMarks(relay_pb2.ListChainMarksRequest(), timeout=CUT_TIMEOUT_S))
            found.update(answer.mark_ids)
            shards.update(answer.shards)
        return found, shards


class AllShards:
    """Satisfies `wallet_core.service.balance_check.CutSource`: those here, and those of the peers."""

    def __init__(self, host: WalletHost, peers: Peers) -> None:
        self._host, self._peers = host, peers
        self._here = frozenset(host.shard_ids)

    @property
    def shard_count(self) -> int:
        return self._host.shard_count

    async def cut(self, shard: int) -> ShardCut:
        if shard in self._here:
            return unpack_cut(shard, await self._host.cut(shard))
        stub = await self._peers.stub(shard)
        answer = await _call(stub.ReadCut(relay_pb2.ReadCutRequest(shard=shard), timeout=CUT_TIMEOUT_S))
        return unpack_cut(shard, answer.cut)

    async def durable(self, shard: int) -> int:
        if shard in self._here:
            return self._host.durable_sequence(shard)
        stub = await self._peers.stub(shard)
        answer = await _call(stub.ReadEvents(relay_pb2.ReadEventsRequest(shard=shard), timeout=STEP_TIMEOUT_S))
        return int(answer.durable_sequence_number)

    async def events(self, shard: int, after: int, limit: int) -> tuple[Sequence[EventPage], Mapping[int, str]]:
        if shard in self._here:
            return await read_events(self._host, shard, after + 1, limit)
        stub = await self._peers.stub(shard)
        request = relay_pb2.ReadEventsRequest(shard=shard, from_sequence_number=after + 1, limit=limit)
        answer = await _call(stub.ReadEvents(request, timeout=CUT_TIMEOUT_S))
        pages = [
            EventPage(frame.first_sequence_number, len(frame.records) // 48, 0, frame.records)
            for frame in answer.frames
        ]
        return pages, answer.currency_codes


async def _call(answer: Awaitable[Any]) -> Any:
    with typed_rpc_errors():
        return await answer
