"""WalletService and ShardService.

CreateTransfers, SubmitTransfers, CreateAccounts and GetAccounts are served as raw bytes (`raw_handlers`): the first is the
unary hot path, the second carries batches of columns that only native code ever parses, and the others come with thousands
of accounts. Native code takes of them what is plain; the rest is parsed and checked here. Everything else is an ordinary
servicer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from ducat.wallet.v1 import shard_pb2, wallet_pb2, wallet_service_pb2_grpc
from kernel.errors import DucatError, FailedPrecondition, FieldViolation, InvalidArgument, NotFound, OutOfRange
from runtime.grpc_server import validate
from wallet_core.adapters.rows import batch_message, create_transfers_response, result_bytes
from wallet_core.engine.codes import AccountFlags, EventKind, TransferFlags
from wallet_core.engine.events import Event, unpack_events
from wallet_core.service.balance_check import BalanceReport
from wallet_core.service.booked import BookedBalances
from wallet_core.service.history import History
from wallet_core.service.port import ROW_COUNT_MAX, Host, ShardStatus, SnapshotInfo, TransferItem, TransferRow
from wallet_core.service.wallet import AccountSpec, AccountView, Wallet
from wallet_core.shard import ScrubStatus

__all__ = ["SCOPES", "UNSHIELDED", "ShardServicer", "WalletServicer"]

BATCHES_IN_FLIGHT_MAX = 32
"""Batches of one stream that are being applied or wait to be sent; more are not read, which slows their
sender."""
PAGE_SIZE_DEFAULT = 100
NAMES_PAGE_SIZE_DEFAULT = 2_000
WATCH_EVENT_COUNT_MAX = 512
"""Events in one WatchEventsResponse."""
WATCH_IDLE_S = 30.0
_SLOT_COUNT = 4096

_WALLET = "/ducat.wallet.v1.WalletService/"
_SHARD = "/ducat.wallet.v1.ShardService/"
SCOPES = {
    f"{_WALLET}CreateAccounts": "wallet.write",
    f"{_WALLET}UpdateAccounts": "wallet.write",
    f"{_WALLET}GetAccounts": "wallet.read",
    f"{_WALLET}ListAccounts": "wallet.read",
    f"{_WALLET}CreateTransfers": "wallet.write",
    f"{_WALLET}SubmitTransfers": "wallet.write",
    f"{_WALLET}GetTransfers": "wallet.read",
    f"{_WALLET}ListAccountTransfers": "wallet.read",
    f"{_WALLET}GetBalance": "wallet.read",
    f"{_WALLET}WatchEvents": "wallet.read",
    f"{_SHARD}ListShards": "wallet.read",
    f"{_SHARD}CreateSnapshot": "wallet.admin",
    f"{_SHARD}ListSnapshots": "wallet.read",
    f"{_SHARD}VerifyShard": "wallet.admin",
    f"{_SHARD}CheckBalances": "wallet.admin",
    f"{_SHARD}RebuildReadModel": "wallet.admin",
    f"{_SHARD}ListAccountNames": "wallet.read",
    f"{_SHARD}ReadBookedBalances": "wallet.read",
    **{
        f"/ducat.wallet.v1.RelayService/{method}": "wallet.relay"
        for method in ("Deliver", "ApplyStep", "ReadCurrencies", "ListChainMarks", "ReadCut", "ReadEvents")
    },
}
UNSHIELDED = (f"{_WALLET}CreateTransfers",)
"""A caller that goes away tears nothing: its transfers have been sent."""

_KIND_FLAGS = {
    wallet_pb2.TRANSFER_KIND_UNSPECIFIED: 0,
    wallet_pb2.TRANSFER_KIND_PLAIN: 0,
    wallet_pb2.TRANSFER_KIND_HOLD: int(TransferFlags.HOLD),
    wallet_pb2.TRANSFER_KIND_POST: int(TransferFlags.POST),
    wallet_pb2.TRANSFER_KIND_VOID: int(TransferFlags.VOID),
}
_LINKED = int(TransferFlags.LINKED)
_BALANCING_DEBIT = int(TransferFlags.BALANCING_DEBIT)
_BALANCING_CREDIT = int(TransferFlags.BALANCING_CREDIT)
_NO_ID = bytes(16)
_INT64_MAX = 2**63 - 1
_STATES = {
    "restoring": shard_pb2.SHARD_STATE_RESTORING,
    "serving": shard_pb2.SHARD_STATE_SERVING,
    "read-only": shard_pb2.SHARD_STATE_READ_ONLY,
    "poisoned": shard_pb2.SHARD_STATE_POISONED,
    "rewound": shard_pb2.SHARD_STATE_REWOUND,
}


class WalletServicer(wallet_service_pb2_grpc.WalletServiceServicer):
    """ducat.wallet.v1.WalletService."""

    def __init__(self, host: Host, wallet: Wallet, history: History) -> None:
        self._host = host
        self._wallet = wallet
        self._history = history

    def raw_handlers(self) -> list[grpc.GenericRpcHandler]:
        """The methods that are served as bytes."""
        return [
            grpc.method_handlers_generic_handler(
                "ducat.wallet.v1.WalletService",
                {
                    "CreateAccounts": grpc.unary_unary_rpc_method_handler(self.CreateAccounts),
                    "GetAccounts": grpc.unary_unary_rpc_method_handler(self.GetAccounts),
                    "CreateTransfers": grpc.unary_unary_rpc_method_handler(self.CreateTransfers),
                    "SubmitTransfers": grpc.stream_stream_rpc_method_handler(self.SubmitTransfers),
                },
            )
        ]

    # --- accounts

    async def CreateAccounts(self, raw: bytes, context: Any) -> bytes:  # type: ignore[override]
        """A serialized CreateAccountsRequest in, a serialized CreateAccountsResponse out."""
        if (answer := await self._host.account_message(raw)) is not None:
            return answer
        request = wallet_pb2.CreateAccountsRequest.FromString(raw)
        validate(request)
        results = await self._wallet.open_accounts([_spec(account) for account in request.accounts])
        return wallet_pb2.CreateAccountsResponse(results=list(results)).SerializeToString()  # type: ignore[arg-type]

    async def UpdateAccounts(
        self, request: wallet_pb2.UpdateAccountsRequest, context: Any
    ) -> wallet_pb2.UpdateAccountsResponse:
        results = await self._wallet.update_accounts([_spec(account) for account in request.accounts])
        return wallet_pb2.UpdateAccountsResponse(results=list(results))  # type: ignore[arg-type]

    async def GetAccounts(self, raw: bytes, context: Any) -> bytes:  # type: ignore[override]
        """A serialized GetAccountsRequest in, a serialized GetAccountsResponse out."""
        if (answer := await self._wallet.accounts_message(raw)) is not None:
            return answer
        request = wallet_pb2.GetAccountsRequest.FromString(raw)
        validate(request)
        views = await self._wallet.accounts(request.account_ids, request.names, _positions(request.at_least))
        return wallet_pb2.GetAccountsResponse(accounts=[_account(view) for view in views]).SerializeToString()

    async def ListAccounts(
        self, request: wallet_pb2.ListAccountsRequest, context: Any
    ) -> wallet_pb2.ListAccountsResponse:
        scope = f"accounts/{request.name_prefix}"
        after = _read_token(request.page_token, scope).decode("utf-8", "replace") if request.page_token else ""
        views, after = await self._wallet.list_accounts(
            request.name_prefix, after, request.page_size or PAGE_SIZE_DEFAULT
        )
        token = _page_token(after.encode(), scope) if after else ""
        return wallet_pb2.ListAccountsResponse(accounts=[_account(view) for view in views], next_page_token=token)

    async def GetBalance(self, request: wallet_pb2.GetBalanceRequest, context: Any) -> wallet_pb2.GetBalanceResponse:
        as_of = request.WhichOneof("as_of")
        if as_of is None:
            view = await self._wallet.account(request.account_id, request.name)
        else:
            key = self._wallet.account_key(request.account_id, request.name)
            if as_of == "time":
                past = await self._history.at_time(key, _time_ns(request.time))
            else:
                past = await self._history.at_position(key, request.position.shard, request.position.sequence_number)
            if past is None:
                raise NotFound(f"account {request.name or key.hex()} did not exist then")
            name = request.name or (await self._wallet.name_of(key))
            view = AccountView(past.state, name, past.positions)
        return wallet_pb2.GetBalanceResponse(account=_account(view))

    # --- transfers

    async def CreateTransfers(self, raw: bytes, context: Any) -> bytes:  # type: ignore[override]
        """A serialized CreateTransfersRequest in, a serialized CreateTransfersResponse out."""
        if (answer_soon := self._host.transfer_call(raw)) is not None:
            return await answer_soon
        request = wallet_pb2.CreateTransfersRequest.FromString(raw)
        transfers = request.transfers
        count = len(transfers)
        if not 0 < count <= ROW_COUNT_MAX:
            raise _wrong("transfers", f"expected 1 to {ROW_COUNT_MAX} rows, got {count}")
        rows = [_row(row, transfer) for row, transfer in enumerate(transfers)]
        if request.settle != wallet_pb2.SETTLE_MODE_DURABLE:
            done = await self._host.transfer_rows(rows)
            return create_transfers_response(done.codes, done.positions)
        message = batch_message(rows, request.settle)
        answer = wallet_pb2.TransferBatchResult.FromString(await self._host.transfer_batch(message))
        positions = [(position.shard, position.sequence_number) for position in answer.positions]
        return create_transfers_response(result_bytes(answer, count), positions)

    async def SubmitTransfers(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """Serialized SubmitTransfersRequest, answered by serialized SubmitTransfersResponse."""
        await _BatchStream(self._host, context).run()

    async def GetTransfers(
        self, request: wallet_pb2.GetTransfersRequest, context: Any
    ) -> wallet_pb2.GetTransfersResponse:
        items = await self._wallet.transfers(request.transfer_ids)
        return wallet_pb2.GetTransfersResponse(transfers=[_record(item) for item in items])

    async def ListAccountTransfers(
        self, request: wallet_pb2.ListAccountTransfersRequest, context: Any
    ) -> wallet_pb2.ListAccountTransfersResponse:
        key = self._wallet.account_key(request.account_id, request.name)
        scope = f"transfers/{key.hex()}"
        before = None
        if request.page_token:
            packed = _read_token(request.page_token, scope)
            if len(packed) != _BEFORE.size:
                raise _token_invalid()
            before = _BEFORE.unpack(packed)
        items, more = await self._wallet.account_transfers(
            key, before, request.page_size or PAGE_SIZE_DEFAULT, _positions(request.at_least)
        )
        token = _page_token(_BEFORE.pack(*more), scope) if more else ""
        return wallet_pb2.ListAccountTransfersResponse(
            transfers=[_record(item) for item in items], next_page_token=token
        )

    async def WatchEvents(
        self, request: wallet_pb2.WatchEventsRequest, context: Any
    ) -> AsyncIterator[wallet_pb2.WatchEventsResponse]:
        shard, account = request.shard, request.account_id
        _owned(self._host, shard)
        if account and len(account) != 16:
            raise _wrong("account_id", f"expected 16 bytes, got {len(account)}")
        durable = self._host.durable_sequence(shard)
        position = request.from_sequence_number or durable + 1
        oldest = self._host.first_sequence(shard)
        if position < oldest or position > durable + 1:
            raise OutOfRange(
                f"shard {shard} has events {oldest} to {durable}; {position} was asked for",
                metadata={"shard": str(shard), "first": str(oldest), "last": str(durable)},
            )
        end = request.end_sequence_number
        while not end or position <= end:
            durable = self._host.durable_sequence(shard)
            if durable < position:
                await self._host.wait_durable(shard, position - 1, WATCH_IDLE_S)
                continue
            position, events = await asyncio.to_thread(self._read_page, shard, position, account)
            while end and events and events[-1].sequence_number > end:
                events.pop()
            for start in range(0, len(events), WATCH_EVENT_COUNT_MAX):
                yield wallet_pb2.WatchEventsResponse(events=events[start : start + WATCH_EVENT_COUNT_MAX])

    def _read_page(self, shard: int, position: int, account: bytes) -> tuple[int, list[wallet_pb2.WalletEvent]]:
        """Some events from `position` on, and where to go on. Runs in a thread."""
        found: list[wallet_pb2.WalletEvent] = []
        for page in self._host.read_events(shard, position, WATCH_EVENT_COUNT_MAX):
            events = unpack_events(page.body, page.first_sequence)
            ordinals = {ordinal for event in events for ordinal in _ordinals(event)}
            ordered = list(ordinals)
            ids = dict(zip(ordered, self._host.account_keys(shard, ordered), strict=True)) if ordered else {}
            for event in events:
                if event.sequence < position:
                    continue
                debit, credit = _sides(event, ids)
                if not account or account in (debit, credit):
                    found.append(_wallet_event(shard, page.timestamp_ns, event, debit, credit))
            position = max(position, page.last_sequence + 1)
        return position, found


class _BatchStream:
    """One SubmitTransfers call: batches are read and submitted as they come, answers leave as they are ready.

    A malformed batch ends the call with its error, after the answers of every other batch that was read
    until then.
    """

    def __init__(self, host: Host, context: Any) -> None:
        self._host = host
        self._context = context
        self._answers: deque[bytes] = deque()
        self._in_flight = 0
        self._is_read = False
        self._error: BaseException | None = None
        self._something = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self) -> None:
        reader = asyncio.ensure_future(self._read())
        try:
            while True:
                while self._answers:
                    await self._context.write(self._answers.popleft())
                    self._room.set()
                if (self._is_read or self._error is not None) and not self._in_flight:
                    break
                self._something.clear()
                await self._something.wait()
        finally:
            reader.cancel()
        if self._error is not None:
            raise self._error

    async def _read(self) -> None:
        number = 0
        try:
            while self._error is None:
                raw = await self._context.read()
                if raw is grpc.aio.EOF:
                    break
                number += 1
                while self._in_flight + len(self._answers) >= BATCHES_IN_FLIGHT_MAX:
                    self._room.clear()
                    await self._room.wait()
                self._in_flight += 1
                try:
                    future = asyncio.ensure_future(self._host.transfer_batch(raw, wrapped=True))
                except BaseException:
                    self._in_flight -= 1
                    raise
                future.add_done_callback(partial(self._done, number))
        except Exception as error:  # whatever it is ends the call, after the answers
            self._fail(_named(error, number))
        finally:
            self._is_read = True
            self._something.set()

    def _done(self, number: int, future: asyncio.Future[bytes]) -> None:
        self._in_flight -= 1
        if future.cancelled():
            self._fail(asyncio.CancelledError())
        elif (error := future.exception()) is not None:
            self._fail(_named(error, number))
        else:
            self._answers.append(future.result())
        self._something.set()
        self._room.set()

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error


def _named(error: BaseException, number: int) -> BaseException:
    """Says which message of the stream was malformed."""
    if isinstance(error, InvalidArgument):
        error.metadata.setdefault("message_number", str(number))
        if error.violations:
            error.metadata.setdefault("field", error.violations[0].field)
    return error


class ShardServicer(wallet_service_pb2_grpc.ShardServiceServicer):
    """ducat.wallet.v1.ShardService."""

    def __init__(
        self,
        host: Host,
        wallet: Wallet,
        history: History,
        address: Callable[[], str],
        peers: Callable[[], Awaitable[Sequence[shard_pb2.Shard]]] | None = None,
        check: Callable[[], Awaitable[BalanceReport]] | None = None,
        scrubbed: Callable[[int], ScrubStatus] | None = None,
        *,
        owners: Mapping[int, str] | None = None,
        reset: Callable[[], Awaitable[int]] | None = None,
        booked: BookedBalances | None = None,
    ) -> None:
        """`address`: of this process. `peers`: the shards of the other processes as far as they answer; `owners`: shard → address of all
        of those. `check` adds up the balances of all shards. `scrubbed`: what the last reading of a shard's files found. `reset` empties
        the read model and says how many keys Valkey had. `booked`: None of a wallet that applies no events.
        """
        self._peers, self._check, self._scrubbed = peers, check, scrubbed
        self._owners, self._reset, self._booked_balances = dict(owners or {}), reset, booked
        self._host = host
        self._wallet = wallet
        self._history = history
        self._address = address

    async def ListShards(self, request: shard_pb2.ListShardsRequest, context: Any) -> shard_pb2.ListShardsResponse:
        shards = [self._shard(status) for status in self._host.shards()]
        if self._peers is not None and not request.local_only:
            shards += self._elsewhere(await self._peers())
            shards.sort(key=lambda shard: shard.shard)
        return shard_pb2.ListShardsResponse(shards=shards, slot_count=_SLOT_COUNT)

    def _elsewhere(self, answered: Sequence[shard_pb2.Shard]) -> list[shard_pb2.Shard]:
        """Every shard of the other processes: as its owner says it, at the address by which that was asked, or as unreachable."""
        found = {shard.shard: shard for shard in answered if shard.shard in self._owners}
        for shard, address in self._owners.items():
            if shard not in found:
                first, end = self._slots(shard)
                found[shard] = shard_pb2.Shard(
                    shard=shard,
                    state=shard_pb2.SHARD_STATE_UNREACHABLE,
                    first_slot=first,
                    end_slot=end,
                    problem=f"{address} does not answer, or does not own it",
                )
            found[shard].address = address
        return list(found.values())

    def _slots(self, shard: int) -> tuple[int, int]:
        """The first slot of a shard, and the one behind its last."""
        count = self._host.shard_count
        return -(-shard * _SLOT_COUNT // count), -(-(shard + 1) * _SLOT_COUNT // count)

    def _shard(self, status: ShardStatus) -> shard_pb2.Shard:
        first_slot, end_slot = self._slots(status.shard)
        links = self._host.links(status.shard)
        return shard_pb2.Shard(
            links=[
                shard_pb2.ShardLink(
                    shard=link.peer,
                    sent_number=link.sent,
                    settled_number=link.settled,
                    received_number=link.received,
                    problem=link.problem,
                )
                for link in links
            ],
            shard=status.shard,
            state=_STATES[status.state],
            address=self._address(),
            epoch=status.epoch,
            sequence_number=status.sequence,
            durable_sequence_number=status.durable_sequence,
            snapshot_sequence_number=status.snapshot_sequence,
            projected_sequence_number=self._wallet.projected(status.shard),
            digest=status.digest,
            account_count=status.account_count,
            log_bytes=status.log_bytes,
            first_slot=first_slot,
            end_slot=end_slot,
            problem="; ".join(link.problem for link in links if link.problem),
            read_model_problem=self._wallet.read_model_problem(status.shard),
            **self._scrub_fields(status.shard),
        )

    def _scrub_fields(self, shard: int) -> dict[str, Any]:
        scrub = self._scrubbed(shard) if self._scrubbed is not None else None
        if scrub is None:
            return {}
        fields: dict[str, Any] = {"scrub_problems": [str(one) for one in scrub.damage]}
        if scrub.end_time_ns:
            fields["scrub_time"] = _timestamp(scrub.end_time_ns)
        return fields

    async def CreateSnapshot(
        self, request: shard_pb2.CreateSnapshotRequest, context: Any
    ) -> shard_pb2.CreateSnapshotResponse:
        _owned(self._host, request.shard)
        taken = await self._host.snapshot(request.shard)
        answer = shard_pb2.CreateSnapshotResponse(snapshot=_snapshot(taken))
        if taken.writer is not None:
            before, beside = taken.writer
            answer.writer_before.CopyFrom(shard_pb2.WriterTimes(**asdict(before)))
            answer.writer_beside.CopyFrom(shard_pb2.WriterTimes(**asdict(beside)))
        return answer

    async def ListSnapshots(
        self, request: shard_pb2.ListSnapshotsRequest, context: Any
    ) -> shard_pb2.ListSnapshotsResponse:
        _owned(self._host, request.shard)
        found = await asyncio.to_thread(self._host.snapshots, request.shard)
        return shard_pb2.ListSnapshotsResponse(snapshots=[_snapshot(each) for each in found])

    async def VerifyShard(
        self, request: shard_pb2.VerifyShardRequest, context: Any
    ) -> AsyncIterator[shard_pb2.VerifyShardResponse]:
        _owned(self._host, request.shard)
        async for progress in self._history.verify(request.shard):
            yield shard_pb2.VerifyShardResponse(
                sequence_number=progress.sequence,
                end_sequence_number=progress.end_sequence,
                done=progress.done,
                ok=progress.ok,
                problem=progress.problem,
            )

    async def CheckBalances(
        self, request: shard_pb2.CheckBalancesRequest, context: Any
    ) -> shard_pb2.CheckBalancesResponse:
        if self._check is None:
            raise FailedPrecondition("this process does not reach all shards")
        report = await self._check()
        return shard_pb2.CheckBalancesResponse(
            ok=report.ok,
            balances=[
                shard_pb2.CurrencyBalance(
                    currency_code=one.currency,
                    balance_minor=one.balance,
                    in_flight_minor=one.in_flight,
                    imbalance_minor=one.imbalance,
                )
                for one in report.currencies
            ],
            positions=[
                wallet_pb2.ShardPosition(shard=shard, sequence_number=sequence) for shard, sequence in report.positions
            ],
            uneven_shards=[
                shard_pb2.UnevenShard(shard=shard, currency_code=currency, amount_minor=amount)
                for shard, currency, amount in report.uneven_shards
            ],
        )

    async def RebuildReadModel(
        self, request: shard_pb2.RebuildReadModelRequest, context: Any
    ) -> shard_pb2.RebuildReadModelResponse:
        if self._reset is None:
            raise FailedPrecondition("this wallet has no read model (wallet_projection is off, or wallet_alone is on)")
        return shard_pb2.RebuildReadModelResponse(removed_key_count=await self._reset())

    async def ListAccountNames(
        self, request: shard_pb2.ListAccountNamesRequest, context: Any
    ) -> shard_pb2.ListAccountNamesResponse:
        limit = request.page_size or NAMES_PAGE_SIZE_DEFAULT
        names = await self._booked().names(request.name_prefix, request.after_name, limit)
        return shard_pb2.ListAccountNamesResponse(names=names)

    async def ReadBookedBalances(
        self, request: shard_pb2.ReadBookedBalancesRequest, context: Any
    ) -> shard_pb2.ReadBookedBalancesResponse:
        booked = await self._booked().read(request.names)
        for name, state in booked.accounts:
            if not -_INT64_MAX <= state.balance <= _INT64_MAX:
                raise OutOfRange(f"account {name}: its balance, summed over all shards, does not fit 64 bits")
        return shard_pb2.ReadBookedBalancesResponse(
            balances=[
                shard_pb2.BookedBalance(name=name, currency_code=state.currency, balance_minor=state.balance)
                for name, state in booked.accounts
            ],
            applied=[
                shard_pb2.FeedRange(first_position=first, last_position=last)
                for first, last in booked.applied
                if first <= last
            ],
            positions=[
                wallet_pb2.ShardPosition(shard=shard, sequence_number=sequence) for shard, sequence in booked.positions
            ],
            start_time=_timestamp(booked.start_time_ns),
        )

    def _booked(self) -> BookedBalances:
        if self._booked_balances is None:
            raise FailedPrecondition("this wallet runs alone: it has no names and applies no events")
        return self._booked_balances


# --- messages in and out


def _row(row: int, transfer: wallet_pb2.Transfer) -> TransferRow:
    """The rules of wallet.proto, by hand: this is the hot path."""
    transfer_id, debit, credit = transfer.transfer_id, transfer.debit_account_id, transfer.credit_account_id
    pending, code = transfer.pending_id, transfer.code
    if len(transfer_id) != 16:
        raise _wrong(f"transfers[{row}].transfer_id", f"expected 16 bytes, got {len(transfer_id)}")
    if len(debit) != 16:
        debit = _empty_id(debit, row, "debit_account_id")
    if len(credit) != 16:
        credit = _empty_id(credit, row, "credit_account_id")
    if len(pending) != 16:
        pending = _empty_id(pending, row, "pending_id")
    if code > 0xFFFF:
        raise _wrong(f"transfers[{row}].code", f"expected 0 to 65535, got {code}")
    flags = _KIND_FLAGS.get(transfer.kind)
    if flags is None:
        raise _wrong(f"transfers[{row}].kind", f"{transfer.kind} is not a TransferKind")
    if transfer.linked:
        flags |= _LINKED
    if transfer.balancing_debit:
        flags |= _BALANCING_DEBIT
    if transfer.balancing_credit:
        flags |= _BALANCING_CREDIT
    return TransferRow(transfer_id, debit, credit, transfer.amount_minor, flags, pending, transfer.timeout_s, code)


def _empty_id(value: bytes, row: int, field: str) -> bytes:
    if value:
        raise _wrong(f"transfers[{row}].{field}", f"expected 16 bytes or none, got {len(value)}")
    return _NO_ID


def _spec(account: wallet_pb2.AccountSpec) -> AccountSpec:
    flags = 0
    if account.frozen:
        flags |= AccountFlags.FROZEN
    if account.closed:
        flags |= AccountFlags.CLOSED
    if account.may_overdraw:
        flags |= AccountFlags.MAY_OVERDRAW
    if account.striped:
        flags |= AccountFlags.STRIPED
    return AccountSpec(
        account.account_id,
        account.name,
        account.currency_code,
        int(flags),
        account.overdraft_limit_minor,
        account.balance_limit_minor,
    )


def _time_ns(time: Timestamp) -> int:
    """Unix nanoseconds. Raises InvalidArgument for what no clock says."""
    if not (0 <= time.seconds < 253_402_300_800 and 0 <= time.nanos < 1_000_000_000):
        raise _wrong("time", "expected a time from 1970 to 9999")
    return int(time.seconds) * 1_000_000_000 + int(time.nanos)


def _account(view: AccountView) -> wallet_pb2.Account:
    """Each shard keeps its figures within 64 bits; of a striped account their sums may be more."""
    state = view.state
    if not all(-_INT64_MAX <= figure <= _INT64_MAX for figure in (state.balance, state.held_out, state.held_in)):
        raise OutOfRange(
            f"account {view.name or state.id.hex()}: a figure, summed over all shards, does not fit 64 bits;"
            " ask for its parts by position"
        )
    return wallet_pb2.Account(
        account_id=state.id,
        name=view.name,
        currency_code=state.currency,
        balance_minor=state.balance,
        held_out_minor=state.held_out,
        held_in_minor=state.held_in,
        available_minor=min(state.available, _INT64_MAX),  # the overdraft limit alone may be that much
        overdraft_limit_minor=state.overdraft_limit,
        balance_limit_minor=state.balance_limit,
        frozen=state.has(AccountFlags.FROZEN),
        closed=state.has(AccountFlags.CLOSED),
        may_overdraw=state.has(AccountFlags.MAY_OVERDRAW),
        striped=state.has(AccountFlags.STRIPED),
        positions=[
            wallet_pb2.ShardPosition(shard=shard, sequence_number=sequence) for shard, sequence in view.positions
        ],
    )


def _record(item: TransferItem) -> wallet_pb2.TransferRecord:
    return wallet_pb2.TransferRecord(
        transfer_id=item.id,
        debit_account_id=item.debit_id,
        credit_account_id=item.credit_id,
        amount_minor=item.amount,
        kind=item.kind,  # type: ignore[arg-type]
        code=item.code,
        create_time=_timestamp(item.time_ns),
        shard=item.shard,
        sequence_number=item.sequence,
        result=item.result,  # type: ignore[arg-type]
    )


def _ordinals(event: Event) -> tuple[int, ...]:
    match event.kind:
        case EventKind.ACCOUNT_UPDATED | EventKind.ACCOUNT_OPENED:
            return ()
        case EventKind.MONEY_SENT:
            return (event.debit_ordinal,)
        case EventKind.TRANSFER_REFUSED | EventKind.CREDIT_REFUSED | EventKind.SAGA_SETTLED:
            return ()
    return event.debit_ordinal, event.credit_ordinal


def _sides(event: Event, keys: dict[int, tuple[bytes, str]]) -> tuple[bytes, bytes]:
    match event.kind:
        case EventKind.ACCOUNT_OPENED | EventKind.ACCOUNT_UPDATED:
            return event.id, b""
        case EventKind.MONEY_SENT:
            return keys[event.debit_ordinal][0], event.credit_id
        case EventKind.TRANSFER_REFUSED | EventKind.CREDIT_REFUSED | EventKind.SAGA_SETTLED:
            return b"", b""
    return keys[event.debit_ordinal][0], keys[event.credit_ordinal][0]


def _wallet_event(shard: int, time_ns: int, event: Event, debit: bytes, credit: bytes) -> wallet_pb2.WalletEvent:
    is_account = event.kind in (EventKind.ACCOUNT_OPENED, EventKind.ACCOUNT_UPDATED)
    return wallet_pb2.WalletEvent(
        shard=shard,
        sequence_number=event.sequence,
        create_time=_timestamp(time_ns),
        kind=int(event.kind),  # type: ignore[arg-type]
        transfer_id=b"" if is_account or event.kind == EventKind.SAGA_SETTLED else event.id,
        debit_account_id=debit,
        credit_account_id=credit,
        amount_minor=event.amount,
        code=event.code,
        result=event.result,  # type: ignore[arg-type]
    )


def _snapshot(info: SnapshotInfo) -> shard_pb2.Snapshot:
    return shard_pb2.Snapshot(
        shard=info.shard,
        sequence_number=info.sequence,
        file_name=info.file_name,
        size_bytes=info.size_bytes,
        digest=info.digest,
        create_time=_timestamp(info.create_time_ns),
    )


def _timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // 1_000_000_000, nanos=time_ns % 1_000_000_000)


def _positions(positions: Iterable[wallet_pb2.ShardPosition]) -> Sequence[tuple[int, int]]:
    return [(position.shard, position.sequence_number) for position in positions]


def _owned(host: Host, shard: int) -> None:
    if shard not in host.shard_ids:
        owned = ", ".join(map(str, host.shard_ids))
        raise FailedPrecondition(
            f"shard {shard} is not owned by this process (it has {owned}); ask ListShards for its address",
            reason="WRONG_SHARD",
            metadata={"shard": str(shard)},
        )


_BEFORE = struct.Struct(">QHQ")  # time_ns, shard, sequence number
_SCOPE_BYTES = 8


def _page_token(key: bytes, scope: str) -> str:
    """A token that only the same method with the same filter takes back."""
    return base64.urlsafe_b64encode(_scope_mark(scope) + key).decode().rstrip("=")


def _read_token(token: str, scope: str) -> bytes:
    try:
        packed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except ValueError:
        raise _token_invalid() from None
    if packed[:_SCOPE_BYTES] != _scope_mark(scope):
        raise _token_invalid()
    return packed[_SCOPE_BYTES:]


def _scope_mark(scope: str) -> bytes:
    return hashlib.sha256(scope.encode()).digest()[:_SCOPE_BYTES]


def _token_invalid() -> InvalidArgument:
    problem = "is not a token of this method with this filter; begin again without one"
    return InvalidArgument(
        f"page_token: {problem}",
        violations=[FieldViolation("page_token", problem)],
        reason="PAGE_TOKEN_INVALID",
    )


def _wrong(field: str, problem: str) -> DucatError:
    return InvalidArgument(f"{field}: {problem}", violations=[FieldViolation(field, problem)])
