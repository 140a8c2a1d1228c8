"""Attempts and PSP health in PostgreSQL.

An order costs two statements, one before and one after its call to the PSP. They are shared: while one statement is under way,
whatever else wants to be stored waits and goes in the next one, together (`_Grouped`). The orders of one checkout begin
together, and their answers come within a millisecond or two of each other, so the first result waits up to LINGER_S for the
others that are still out. One that is alone never waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

import asyncpg

from executor.adapters.messages import encode
from executor.domain.attempt import Attempt, AttemptKind, AttemptState
from executor.domain.command import Command, ExecuteOrder, ExecutePayout, ExecuteRefund
from executor.domain.health import Health
from executor.service.ports import Due, Event, Waiting
from kernel.money import Money
from runtime.outbox import OutboxRelay
from runtime.postgres import KeptConnections, Pool

__all__ = ["GROUP_MAX", "PostgresAttemptStore"]

GROUP_MAX = 64
"""Attempts in one statement."""
LINGER_S = 0.002
LINGER_FOR_S = 0.25
"""A result does not wait for a call that has been out longer than this."""

_COLUMNS = """kind, reference, psp, state, psp_object_id, hosted_page_url, code, reason, compliance, call_count, poll_count,
    cancel_requested, create_time, update_time, next_poll_time, traceparent, checkout_id, seller_account,
    payment_order_id, psp_token, currency_code, amount_minor, requested_psp, buyer_email, page_key"""

_BEGIN = """
INSERT INTO executor.attempt AS a (kind, reference, psp, state, checkout_id, seller_account, payment_order_id, psp_token,
    currency_code, amount_minor, requested_psp, buyer_email, page_key, traceparent, create_time, update_time, next_poll_time)
SELECT kind, reference, psp, 1, checkout_id, seller_account, payment_order_id, psp_token,
    currency_code, amount_minor, requested_psp, buyer_email, page_key, traceparent, now, now, next_poll_time
FROM unnest($1::smallint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bigint[],
    $10::text[], $11::text[], $12::text[], $13::text[], $14::timestamptz[], $15::timestamptz[])
    AS t (kind, reference, psp, checkout_id, seller_account, payment_order_id, psp_token, currency_code, amount_minor,
    requested_psp, buyer_email, page_key, traceparent, now, next_poll_time)
ON CONFLICT (kind, reference) DO UPDATE
    SET call_count = a.call_count + CASE a.state WHEN 1 THEN 1 ELSE 0 END, update_time = excluded.update_time
RETURNING kind, reference, psp, state, psp_object_id, hosted_page_url, code, reason, compliance, call_count, poll_count,
    cancel_requested, create_time, update_time, next_poll_time, traceparent, xmax = 0 AS is_new
"""

# A cancel that came while the PSP was being called makes the accepted attempt due at once.
_FINISH = """
WITH updated AS (
    UPDATE executor.attempt AS a SET
        state = t.state, psp_object_id = t.psp_object_id, hosted_page_url = t.hosted_page_url, code = t.code,
        reason = t.reason, compliance = t.compliance, call_count = t.call_count, poll_count = t.poll_count,
        update_time = t.update_time,
        next_poll_time = CASE WHEN a.cancel_requested AND t.state = 2 AND a.state <> 2 AND t.next_poll_time IS NOT NULL
            THEN t.update_time ELSE t.next_poll_time END
    FROM unnest($1::smallint[], $2::text[], $3::smallint[], $4::text[], $5::smallint[], $6::text[], $7::text[], $8::text[],
        $9::text[], $10::boolean[], $11::integer[], $12::integer[], $13::timestamptz[], $14::timestamptz[])
        AS t (kind, reference, expected, psp, state, psp_object_id, hosted_page_url, code, reason, compliance, call_count,
        poll_count, update_time, next_poll_time)
    WHERE a.kind = t.kind AND a.reference = t.reference AND a.state = t.expected AND a.psp = t.psp
    RETURNING a.kind, a.reference
), sent AS (
    INSERT INTO executor.outbox (topic, key, message_id, payload, traceparent)
    SELECT 'executor.events', e.key, e.message_id, e.payload, e.traceparent
    FROM unnest($15::smallint[], $16::text[], $17::text[], $18::text[], $19::bytea[], $20::text[]) WITH ORDINALITY
        AS e (kind, reference, key, message_id, payload, traceparent, position)
    JOIN updated USING (kind, reference)
    ORDER BY e.position
    RETURNING position
)
SELECT kind, reference, CASE WHEN $21 AND EXISTS (SELECT FROM sent) THEN pg_notify('executor_outbox', '') END FROM updated
"""

_CLAIM = f"""
WITH due AS (
    SELECT kind, reference FROM executor.attempt WHERE next_poll_time <= $1
    ORDER BY next_poll_time LIMIT $3 FOR UPDATE SKIP LOCKED
)
UPDATE executor.attempt AS a SET next_poll_time = $2 FROM due
WHERE a.kind = due.kind AND a.reference = due.reference
RETURNING {", ".join(f"a.{column.strip()}" for column in _COLUMNS.split(","))}
"""  # noqa: S608

_LOAD = f"SELECT {_COLUMNS} FROM executor.attempt WHERE kind = $1 AND reference = $2"  # noqa: S608

# Whoever asks for the cancel calls the PSP now; the poller takes over where that process dies.
_REQUEST_CANCEL = f"""
UPDATE executor.attempt SET cancel_requested = true, update_time = $2,
    next_poll_time = CASE state WHEN 2 THEN $2::timestamptz + interval '5 seconds' ELSE next_poll_time END
WHERE kind = 1 AND reference = $1 RETURNING {_COLUMNS}
"""  # noqa: S608

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class PostgresAttemptStore:
    """`executor.service.ports.AttemptStore` over the schema `executor`.

    `relay`: this process's outbox relay. While it is the active one it is woken directly, which saves a NOTIFY.
    """

    def __init__(self, pool: Pool | KeptConnections, relay: OutboxRelay | None = None) -> None:
        self._pool = pool
        self._relay = relay
        self._out: dict[Hashable, float] = {}
        self._begin: _Grouped[tuple[Any, ...], Attempt] = _Grouped(self._begin_all, lambda row: row[:2])
        self._finish: _Grouped[tuple[tuple[Any, ...], list[tuple[Any, ...]]], bool] = _Grouped(
            self._finish_all, lambda item: item[0][:2], self._others_are_out
        )

    async def begin(self, command: Command, psp: str, now_ns: int, next_poll_time_ns: int, traceparent: str) -> Attempt:
        row = (*_row_of(command, psp), traceparent, _time(now_ns), _time(next_poll_time_ns))
        attempt = await self._begin.submit(row)
        if attempt.state is AttemptState.SENDING:
            self._out[row[:2]] = asyncio.get_running_loop().time()
        return attempt

    async def finish(self, attempt: Attempt, expected: AttemptState, events: Sequence[Event], traceparent: str) -> bool:
        row = (
            attempt.kind.value,
            attempt.reference,
            expected.value,
            attempt.psp,
            attempt.state.value,
            attempt.psp_object_id,
            attempt.hosted_page_url,
            attempt.code,
            attempt.reason,
            attempt.compliance,
            attempt.call_count,
            attempt.poll_count,
            _time(attempt.update_time_ns),
            _time(attempt.next_poll_time_ns) if attempt.next_poll_time_ns else None,
        )
        sent = [
            (
                attempt.kind.value,
                attempt.reference,
                event.key,
                event.event_id,
                encode(event, attempt.update_time_ns, traceparent),
                traceparent,
            )
            for event in events
        ]
        self._out.pop(row[:2], None)
        return await self._finish.submit((row, sent))

    async def reroute(self, attempt: Attempt, psp: str, now_ns: int) -> bool:
        updated = await self._pool.fetch(
            """UPDATE executor.attempt SET psp = $4, call_count = call_count + 1, update_time = $5
               WHERE kind = $1 AND reference = $2 AND state = 1 AND psp = $3 RETURNING reference""",
            attempt.kind.value,
            attempt.reference,
            attempt.psp,
            psp,
            _time(now_ns),
        )
        return bool(updated)

    def _others_are_out(self) -> bool:
        """True where a PSP has been called lately whose answer is not here yet."""
        oldest = asyncio.get_running_loop().time() - LINGER_FOR_S
        while self._out:
            key = next(iter(self._out))
            if self._out[key] >= oldest:
                return True
            del self._out[key]
        return False

    async def load(self, kind: AttemptKind, reference: str) -> Due | None:
        row = await self._pool.fetchrow(_LOAD, kind.value, reference)
        return None if row is None else _due(row)

    async def claim_due(self, now_ns: int, lease_until_ns: int, count_max: int) -> tuple[list[Due], int]:
        rows = await self._pool.fetch(_CLAIM, _time(now_ns), _time(lease_until_ns), count_max)
        if rows:
            return [_due(row) for row in rows], 0
        next_time = await self._pool.fetchval(
            "SELECT min(next_poll_time) FROM executor.attempt WHERE next_poll_time IS NOT NULL"
        )
        return [], 0 if next_time is None else _ns(next_time)

    async def hasten(self, waiting: Sequence[Waiting], now_ns: int) -> None:
        kinds, references, times_ns = zip(*waiting, strict=True)
        await self._pool.execute(
            """UPDATE executor.attempt AS a SET next_poll_time = $4
               FROM unnest($1::smallint[], $2::text[], $3::timestamptz[]) AS t (kind, reference, next_poll_time)
               WHERE a.kind = t.kind AND a.reference = t.reference AND a.next_poll_time = t.next_poll_time""",
            [kind.value for kind in kinds],
            references,
            [_time(time_ns) for time_ns in times_ns],
            _time(now_ns),
        )

    async def settle(self, references: Sequence[tuple[AttemptKind, str]], now_ns: int) -> None:
        await self._pool.execute(
            """UPDATE executor.attempt AS a SET update_time = $3,
                   next_poll_time = CASE a.kind WHEN 3 THEN $3::timestamptz + interval '1 day' END
               FROM unnest($1::smallint[], $2::text[]) AS t (kind, reference)
               WHERE a.kind = t.kind AND a.reference = t.reference AND a.state = 2 AND a.next_poll_time IS NOT NULL""",
            [kind.value for kind, _ in references],
            [reference for _, reference in references],
            _time(now_ns),
        )

    async def request_cancel(self, payment_order_id: str, now_ns: int) -> Due | None:
        row = await self._pool.fetchrow(_REQUEST_CANCEL, payment_order_id, _time(now_ns))
        return None if row is None else _due(row)

    async def load_health(self) -> dict[str, Health]:
        rows = await self._pool.fetch("SELECT psp, failure_count, open_until_time, probing FROM executor.psp_health")
        return {
            row["psp"]: Health(
                row["failure_count"],
                0 if row["open_until_time"] is None else _ns(row["open_until_time"]),
                row["probing"],
            )
            for row in rows
        }

    async def save_health(self, psp: str, health: Health, now_ns: int) -> None:
        await self._pool.execute(
            """INSERT INTO executor.psp_health VALUES ($1, $2, $3, $4, $5) ON CONFLICT (psp) DO UPDATE SET
               failure_count = excluded.failure_count, open_until_time = excluded.open_until_time,
               probing = excluded.probing, update_time = excluded.update_time""",
            psp,
            health.failure_count,
            _time(health.open_until_ns) if health.open_until_ns else None,
            health.probing,
            _time(now_ns),
        )

    async def _begin_all(self, rows: list[tuple[Any, ...]]) -> list[Attempt]:
        stored = await self._pool.fetch(_BEGIN, *_columns(rows))
        by_key = {(row["kind"], row["reference"]): row for row in stored}
        return [_attempt(by_key[row[:2]], is_new=by_key[row[:2]]["is_new"]) for row in rows]

    async def _finish_all(self, items: list[tuple[tuple[Any, ...], list[tuple[Any, ...]]]]) -> list[bool]:
        events = [event for _, sent in items for event in sent]
        event_columns = _columns(events) if events else [[], [], [], [], [], []]
        is_relay_here = self._relay is not None and self._relay.is_active
        updated = await self._pool.fetch(
            _FINISH, *_columns([row for row, _ in items]), *event_columns, not is_relay_here
        )
        if events and self._relay is not None:
            self._relay.wake()
        keys = {(row["kind"], row["reference"]) for row in updated}
        return [row[:2] in keys for row, _ in items]


class _Grouped(Generic[_Item, _Result]):
    """One statement at a time; what arrives meanwhile goes together in the next, each key once. While `lingers()`, a first item
    waits a little for company. A group that fails for a reason of one of its rows is done again row by row, so that only that
    one fails."""

    def __init__(
        self,
        run: Callable[[list[_Item]], Awaitable[list[_Result]]],
        key: Callable[[_Item], Hashable],
        lingers: Callable[[], bool] = lambda: False,
    ) -> None:
        self._run = run
        self._key = key
        self._lingers = lingers
        self._waiting: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def submit(self, item: _Item) -> _Result:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._task is None:
            if len(self._waiting) < GROUP_MAX and self._lingers():
                if self._timer is None:
                    self._timer = loop.call_later(LINGER_S, self._start)
            else:
                self._start()
        return await future

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self._waiting:
                await self._do(self._take())
        finally:
            self._task = None

    def _take(self) -> list[tuple[_Item, asyncio.Future[_Result]]]:
        group: list[tuple[_Item, asyncio.Future[_Result]]] = []
        keys: set[Hashable] = set()
        later: list[tuple[_Item, asyncio.Future[_Result]]] = []
        while self._waiting and len(group) < GROUP_MAX:
            each = self._waiting.popleft()
            if each[1].cancelled():
                continue
            key = self._key(each[0])
            if key in keys:
                later.append(each)
                continue
            keys.add(key)
            group.append(each)
        self._waiting.extendleft(reversed(later))
        return group

    async def _do(self, group: list[tuple[_Item, asyncio.Future[_Result]]]) -> None:
        if not group:
            return
        try:
            results = await self._run([item for item, _ in group])
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
            if len(group) == 1:
                _fail(group, error)
                return
            for each in group:
                await self._do([each])
        except BaseException as error:
            _fail(group, error if isinstance(error, Exception) else asyncio.CancelledError())
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), result in zip(group, results, strict=True):
                if not future.done():
                    future.set_result(result)


def _fail(group: Sequence[tuple[Any, asyncio.Future[Any]]], error: BaseException) -> None:
    for _, future in group:
        if future.done():
            continue
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        else:
            future.set_exception(error)


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _row_of(command: Command, psp: str) -> tuple[Any, ...]:
    """kind, reference, psp, checkout_id, seller_account, payment_order_id, psp_token, currency_code, amount_minor,
    requested_psp, buyer_email, page_key."""
    match command:
        case ExecuteOrder():
            amount = command.amount
            return (
                AttemptKind.ORDER.value,
                command.payment_order_id,
                psp,
                command.checkout_id,
                command.seller_account,
                "",
                "",
                amount.currency_code,
                amount.amount_minor,
                command.psp,
                command.buyer_email,
                command.page_key,
            )
        case ExecuteRefund():
            amount = command.amount
            return (
                AttemptKind.REFUND.value,
                command.refund_id,
                psp,
                "",
                "",
                command.payment_order_id,
                command.psp_token,
                amount.currency_code,
                amount.amount_minor,
                command.psp,
                "",
                "",
            )
        case ExecutePayout():
            return (AttemptKind.PAYOUT.value, command.reference, psp, "", "", "", "", "", 0, "", "", "")


def _due(row: asyncpg.Record) -> Due:
    attempt = _attempt(row, is_new=False)
    command: Command
    match attempt.kind:
        case AttemptKind.ORDER:
            command = ExecuteOrder(
                attempt.reference,
                row["checkout_id"],
                row["seller_account"],
                Money(row["currency_code"], row["amount_minor"]),
                row["requested_psp"],
                row["buyer_email"],
                row["page_key"],
            )
        case AttemptKind.REFUND:
            command = ExecuteRefund(
                attempt.reference,
                row["payment_order_id"],
                row["requested_psp"],
                row["psp_token"],
                Money(row["currency_code"], row["amount_minor"]),
            )
        case AttemptKind.PAYOUT:
            command = ExecutePayout(attempt.reference)
    return Due(attempt, command)


def _attempt(row: asyncpg.Record, *, is_new: bool) -> Attempt:
    next_poll_time = row["next_poll_time"]
    return Attempt(
        AttemptKind(row["kind"]),
        row["reference"],
        row["psp"],
        AttemptState(row["state"]),
        row["psp_object_id"],
        row["hosted_page_url"],
        row["code"],
        row["reason"],
        row["compliance"],
        row["call_count"],
        row["poll_count"],
        row["cancel_requested"],
        _ns(row["create_time"]),
        _ns(row["update_time"]),
        0 if next_poll_time is None else _ns(next_poll_time),
        row["traceparent"],
        is_new,
    )


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _time(time_ns: int) -> datetime:
    return _EPOCH + timedelta(microseconds=time_ns // 1000)


def _ns(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND * 1000
