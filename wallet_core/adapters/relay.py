"""Carries sagas between wallet processes: what the shards here have for shards elsewhere, and the other way
round.

A shard's log is its outbox: whatever is not settled can be read from it again (`resend`). So the relay keeps
no state: it sends in order, and after any failure it drops what it had, waits, and lets the shards send
again everything unsettled. Receivers apply each saga number once and ignore gaps, so neither a lost nor a
doubled delivery does harm.

An outcome that gets lost is not sent again by itself: the debit shard, which lacks it, sends the credits again and is
answered anew. That is what the look every `LOOK_S` is for: it finds what was taken by the peer long ago and never settled.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import grpc
import grpc.aio
import structlog

from ducat.wallet.v1 import relay_pb2, shard_pb2, wallet_pb2, wallet_service_pb2_grpc
from ducat.wallet.v1.relay_pb2_grpc import RelayServiceServicer, RelayServiceStub
from kernel.errors import FailedPrecondition, InvalidArgument
from wallet_core.adapters.rows import batch_rows
from wallet_core.service.balance_check import saga_accounts
from wallet_core.service.chains import Chains
from wallet_core.service.port import EventPage
from wallet_core.shard import WalletHost
from wallet_core.shard.identity import read_numbers, write_whole
from wallet_core.shard.port import shard_folder

__all__ = ["Dial", "Relay", "RelayServicer", "forget_numbers", "parse_peers", "peer_shards", "read_events"]

BYTES_MAX = 2 * 1024 * 1024
"""Payload of one call."""
DELIVERY_COUNT_MAX = 1024
QUEUE_BYTES_MAX = 64 * 1024 * 1024
"""What waits for one peer; above it is dropped, and read again from the logs later."""
DELIVER_TIMEOUT_S = 5.0
LIST_TIMEOUT_S = 2.0
LOOK_S = 1.0
"""How often it is asked whether anything that was sent does not settle; it is sent again after 1 to 2 of these."""
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_COMPARE_WARN = 4

_KIND_NAMES: dict[int, Literal["credits", "outcomes", "forget"]] = {
    relay_pb2.DELIVERY_KIND_CREDITS: "credits",
    relay_pb2.DELIVERY_KIND_OUTCOMES: "outcomes",
    relay_pb2.DELIVERY_KIND_FORGET: "forget",
}
_KINDS = {name: number for number, name in _KIND_NAMES.items()}
_log = structlog.get_logger("wallet.relay")
Dial = Callable[[str], Awaitable[grpc.aio.Channel]]


class Relay:
    """The sending side. `peers`: shard → address of the process that owns it.

    Money goes to a peer's shard only once that has said how far it has come with the shards here: one that was restored from an old
    copy gives numbers again that the peer knows already. To tell that even where new transfers were taken before the peer answered,
    and where the process dies meanwhile, the numbers that it started with are kept in the shard's folder until the two have agreed.
    """

    def __init__(self, host: WalletHost, peers: Mapping[int, str], dial: Dial) -> None:
        self._host = host
        self._peers = dict(peers)
        self._dial = dial
        self._queues = {address: _Queue() for address in set(self._peers.values())}
        host.on_outbound = self.take
        self._unknown = set(self._peers)
        self._sent = {shard: _Numbers(host, shard, self._unknown) for shard in host.shard_ids}
        self._save_warned = False
        self._saved()

    def believes(self, shard: int) -> bool:
        """May outcomes of a peer's shard be applied? Not before the numbers agree: an old one would settle transfers that the
        peer never saw. What is dropped is asked for again, since the sends are delivered once the two have compared."""
        if shard in self._unknown:
            self._queues[self._peers[shard]].asked.set()
        return shard not in self._unknown

    def _saved(self) -> bool:
        """Are the numbers on the disk as they should be? Says once that they cannot be written."""
        try:
            for numbers in self._sent.values():
                numbers.save()
        except OSError as error:
            if not self._save_warned:
                _log.warning(
                    "sent.json cannot be written; no money is sent to new peers until it can", error=str(error)
                )
            self._save_warned = True
            return False
        return True

    def take(self, deliveries: Sequence[Any]) -> None:
        """What the shards have for others, as `ShardHost.outbound` gives it."""
        for destination, kind, source, number, position, count, payload, after in deliveries:
            if kind == "credits" and destination in self._unknown:
                self._queues[self._peers[destination]].asked.set()
                continue  # it is given out again
            address = self._peers.get(destination)
            if address is None:
                _log.error("a shard without owner", shard=destination)
                continue
            self._queues[address].put(
                relay_pb2.Delivery(
                    destination_shard=destination,
                    kind=_KINDS[kind],  # type: ignore[arg-type]
                    source_shard=source,
                    number=number,
                    position=position,
                    count=count,
                    payload=payload,
                    after_number=after,
                )
            )

    async def run(self) -> None:
        """Delivers until cancelled."""
        self.take(self._host.native.outbound())  # what the shards had before anybody listened
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look())
            for address, queue in self._queues.items():
                group.create_task(self._deliver_to(address, queue))
                group.create_task(self._compare_with(address))

    async def _compare_with(self, address: str) -> None:
        """Once there is money for a peer: until it has said how all its shards stand with those here."""
        await self._queues[address].asked.wait()
        missing = {shard for shard, owner in self._peers.items() if owner == address}
        for failures in itertools.count():
            for theirs in await peer_shards([address], self._dial) if self._saved() else ():
                if theirs.shard in missing and self._compare(theirs):
                    missing.remove(theirs.shard)
            if not missing:
                return
            if failures == _COMPARE_WARN:
                _log.warning("a peer does not answer; no money is sent to its shards", address=address)
            await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])

    def _compare(self, theirs: shard_pb2.Shard) -> bool:
        native = self._host.native
        for link in theirs.links:
            if (numbers := self._sent.get(link.shard)) is not None:
                sent = numbers[theirs.shard]
                native.compare_link(link.shard, theirs.shard, link.received_number, link.settled_number, sent)
                if link.received_number <= sent:
                    numbers.forget(theirs.shard)
        if not self._saved():
            return False
        self._unknown.discard(theirs.shard)
        for shard in self._host.shard_ids:
            native.resend(shard, theirs.shard)
        return True

    async def _deliver_to(self, address: str, queue: _Queue) -> None:
        stub = RelayServiceStub(await self._dial(address))
        failures = 0
        while True:
            if queue.is_spilled:
                self._send_again(address, queue)
            deliveries = await queue.take()
            queue.is_under_way = True
            try:
                await stub.Deliver(relay_pb2.DeliverRequest(deliveries=deliveries), timeout=DELIVER_TIMEOUT_S)
                failures = 0
            except grpc.aio.AioRpcError as error:
                delay = RETRY_S[min(failures, len(RETRY_S) - 1)]
                failures += 1
                if failures in (1, len(RETRY_S)):
                    _log.warning("a peer does not take deliveries", address=address, code=error.code().name)
                await asyncio.sleep(delay)
                self._send_again(address, queue)
            finally:
                queue.is_under_way = False

    async def _look(self) -> None:
        """Sends again what the peers took and never answered."""
        while True:
            await asyncio.sleep(LOOK_S)
            for shard in self._host.shard_ids:
                for destination, address in self._peers.items():
                    if not self._queues[address].is_busy:
                        self._host.native.resend(shard, destination, stalled=True)

    def _send_again(self, address: str, queue: _Queue) -> None:
        """Forgets what waits for a peer; the shards give it out again, in order."""
        queue.clear()
        for shard in self._host.shard_ids:
            for destination, owner in self._peers.items():
                if owner == address:
                    self._host.native.resend(shard, destination)


class _Numbers:
    """Of one shard: the last transfer that it had sent to each peer before it took new ones. In a file until the peer agrees."""

    def __init__(self, host: WalletHost, shard: int, peers: Iterable[int]) -> None:
        self._path = shard_folder(host.config.data_dir, shard) / "sent.json"
        self._kept: dict[str, int] = read_numbers(self._path)
        self._numbers: dict[int, int] = {}
        links = {link.peer: link for link in host.links(shard)}
        for peer in peers:
            link = links[peer]
            kept = self._kept.get(str(peer), link.sent)
            # outcomes are believed only between shards that agreed: one beyond the number kept means that they did since
            self._numbers[peer] = link.sent if link.settled > kept else min(link.sent, kept)
        self._open = {str(peer): number for peer, number in self._numbers.items()}

    def __getitem__(self, peer: int) -> int:
        return self._numbers[peer]

    def forget(self, peer: int) -> None:
        """The peer knows no more than this shard."""
        self._open.pop(str(peer), None)

    def save(self) -> None:
        """Raises OSError."""
        if self._open != self._kept:
            write_whole(self._path, json.dumps(self._open) + "\n")
            self._kept = dict(self._open)


def forget_numbers(host: WalletHost) -> None:
    """For a process that owns all shards: they compared when it started, and numbers kept from before say nothing later."""
    for shard in host.shard_ids:
        (shard_folder(host.config.data_dir, shard) / "sent.json").unlink(missing_ok=True)


class _Queue:
    """Deliveries that wait for one peer."""

    def __init__(self) -> None:
        self._waiting: deque[relay_pb2.Delivery] = deque()
        self._bytes = 0
        self._some = asyncio.Event()
        self.asked = asyncio.Event()  # there is money for it
        self.is_spilled = False
        self.is_under_way = False  # a call is, or is to be tried again

    @property
    def is_busy(self) -> bool:
        """Something is on its way to the peer, or waits for it."""
        return self.is_under_way or bool(self._waiting)

    def put(self, delivery: relay_pb2.Delivery) -> None:
        if self.is_spilled or self._bytes > QUEUE_BYTES_MAX:
            self.is_spilled = True  # from here on there would be a gap
        else:
            self._waiting.append(delivery)
            self._bytes += len(delivery.payload)
        self._some.set()

    def clear(self) -> None:
        self._waiting.clear()
        self._bytes = 0
        self.is_spilled = False

    async def take(self) -> list[relay_pb2.Delivery]:
        """The next ones, as many as one call may carry; waits for the first."""
        while not self._waiting:
            self._some.clear()
            await self._some.wait()
        taken: list[relay_pb2.Delivery] = []
        size = 0
        while self._waiting and len(taken) < DELIVERY_COUNT_MAX:
            size += len(self._waiting[0].payload)
            if taken and size > BYTES_MAX:
                break
            delivery = self._waiting.popleft()
            self._bytes -= len(delivery.payload)
            taken.append(delivery)
        return taken


class RelayServicer(RelayServiceServicer):
    """The receiving side: ducat.wallet.v1.RelayService."""

    def __init__(self, host: WalletHost, chains: Chains, believes: Callable[[int], bool] = lambda _: True) -> None:
        self._host, self._chains, self._believes = host, chains, believes

    async def ApplyStep(self, request: relay_pb2.ApplyStepRequest, context: Any) -> relay_pb2.ApplyStepResponse:  # noqa: N802
        self._own(request.shard)
        done = await self._chains.apply_step(request.shard, batch_rows(request.batch), request.currency_codes)
        positions = [wallet_pb2.ShardPosition(shard=one[0], sequence_number=one[1]) for one in done.positions]
        return relay_pb2.ApplyStepResponse(results=done.codes, positions=positions)

    async def ReadCurrencies(  # noqa: N802
        self, request: relay_pb2.ReadCurrenciesRequest, context: Any
    ) -> relay_pb2.ReadCurrenciesResponse:
        return relay_pb2.ReadCurrenciesResponse(currency_codes=await self._chains.currencies(request.account_ids))

    async def ListChainMarks(  # noqa: N802
        self, request: relay_pb2.ListChainMarksRequest, context: Any
    ) -> relay_pb2.ListChainMarksResponse:
        marks = await self._chains.mark_ids()
        return relay_pb2.ListChainMarksResponse(mark_ids=marks, shards=self._host.shard_ids)

    async def ReadCut(self, request: relay_pb2.ReadCutRequest, context: Any) -> relay_pb2.ReadCutResponse:  # noqa: N802
        self._own(request.shard)
        return relay_pb2.ReadCutResponse(cut=await self._host.cut(request.shard))

    async def ReadEvents(self, request: relay_pb2.ReadEventsRequest, context: Any) -> relay_pb2.ReadEventsResponse:  # noqa: N802
        self._own(request.shard)
        answer = relay_pb2.ReadEventsResponse(durable_sequence_number=self._host.durable_sequence(request.shard))
        if request.from_sequence_number:
            pages, currencies = await read_events(
                self._host, request.shard, request.from_sequence_number, request.limit
            )
            for page in pages:
                answer.frames.add(first_sequence_number=page.first_sequence, records=page.body)
            answer.currency_codes.update(currencies)
        return answer

    def _own(self, shard: int) -> None:
        if shard not in self._host.shard_ids:
            raise FailedPrecondition(
                f"shard {shard} is not owned by this process", reason="WRONG_SHARD", metadata={"shard": str(shard)}
            )

    async def Deliver(self, request: relay_pb2.DeliverRequest, context: Any) -> relay_pb2.DeliverResponse:  # noqa: N802
        for place, one in enumerate(request.deliveries):
            self._own(one.destination_shard)
            if one.kind == relay_pb2.DELIVERY_KIND_OUTCOMES and not self._believes(one.source_shard):
                continue
            try:
                self._host.native.deliver(
                    one.destination_shard,
                    _KIND_NAMES[one.kind],
                    one.source_shard,
                    one.number,
                    one.position,
                    one.count,
                    one.payload,
                    one.after_number,
                )
            except (ValueError, OverflowError) as error:
                raise InvalidArgument(f"deliveries[{place}]: {error}") from error
        return relay_pb2.DeliverResponse()


async def read_events(
    host: WalletHost, shard: int, from_sequence: int, limit: int
) -> tuple[list[EventPage], dict[int, str]]:
    """Events of a shard that lives here, with the currencies of the accounts in its saga records."""
    pages = await asyncio.to_thread(host.read_events, shard, from_sequence, limit)
    ordinals = saga_accounts(pages)
    keys = host.account_keys(shard, ordinals)
    return pages, {ordinal: currency for ordinal, (_, currency) in zip(ordinals, keys, strict=True)}


async def peer_shards(addresses: Sequence[str], dial: Dial) -> list[shard_pb2.Shard]:
    """The shards of other processes; those of a process that does not answer are left out."""

    async def ask(address: str) -> list[shard_pb2.Shard]:
        stub = wallet_service_pb2_grpc.ShardServiceStub(await dial(address))
        try:
            answer = await stub.ListShards(shard_pb2.ListShardsRequest(local_only=True), timeout=LIST_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return []
        return list(answer.shards)

    return [shard for shards in await asyncio.gather(*map(ask, addresses)) for shard in shards]


def parse_peers(text: str, parse_shards: Callable[[str], Sequence[int]]) -> dict[int, str]:
    """``"2-3=10.0.0.2:50053 4=10.0.0.3:50053"`` → shard → address. Raises ValueError."""
    peers: dict[int, str] = {}
    for part in text.split():
        shards, equals, address = part.partition("=")
        if not equals or not address:
            raise ValueError(f'expected SHARDS=HOST:PORT, separated by spaces, got "{part}"')
        for shard in parse_shards(shards):
            if shard in peers:
                raise ValueError(f"shard {shard} is named twice")
            peers[shard] = address
    return peers
