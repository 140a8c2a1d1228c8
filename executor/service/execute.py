"""Run a command at its PSP, once in effect however often it is asked for.

    execute → begin (SENDING stored) → _send → _call the PSP → _conclude (result and event stored together)

A crash between `begin` and `_conclude` leaves SENDING: the redelivered command, or the poller, asks the PSP first and makes the same
call again, under the same idempotency key, only where the PSP does not have it. The key alone would not do: PSPs forget keys after a
day or so, and a payout sent again after that is paid twice. What the PSP did not answer becomes UNKNOWN and belongs to the poller
(`resume`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from executor.domain.attempt import ATTEMPT_TABLE, Attempt, AttemptEvent, AttemptKind, AttemptState
from executor.domain.command import CancelOrder, Command, ExecuteOrder, ExecutePayout, ExecuteRefund, PayoutInstruction
from executor.domain.outcome import Accepted, Answer, NoAnswer, NotFound, NotSent, Rejected, bounded, event_of
from executor.domain.routing import Capability, candidates, takes
from executor.domain.schedule import next_time_ns
from executor.service.health_board import HealthBoard
from executor.service.ports import AttemptStore, Due, Event, PayoutInstructions, PspAdapter
from kernel.clock import Clock
from kernel.errors import FailedPrecondition
from kernel.errors import NotFound as NotFoundError
from kernel.ids import derived_event_id

__all__ = ["BARRED_S", "Executor", "Policy"]

BARRED_S = 600
"""How long an attempt that never left, because its PSP did not answer others, waits at most before it looks for itself."""

_CONCLUDE_TRY_COUNT_MAX = 4


@dataclass(frozen=True, slots=True)
class Policy:
    """When to ask again. `sending_grace_s`: how long a SENDING attempt is left to the process that sends it."""

    unknown_schedule_s: Sequence[float]
    accepted_schedule_s: Sequence[float]
    sending_grace_s: float


_CAPABILITIES = {
    AttemptKind.ORDER: Capability.PAY_IN,
    AttemptKind.REFUND: Capability.REFUND,
    AttemptKind.PAYOUT: Capability.PAYOUT,
}


class Executor:
    """The use cases. `wake(time_ns)` is told of each attempt that the poller has to look at then."""

    def __init__(
        self,
        store: AttemptStore,
        adapters: Mapping[str, PspAdapter],
        instructions: PayoutInstructions,
        health: HealthBoard,
        clock: Clock,
        policy: Policy,
        wake: Callable[[int], None],
    ) -> None:
        self._store = store
        self._adapters = adapters
        self._providers = [adapter.provider for adapter in adapters.values()]
        self._instructions = instructions
        self._health = health
        self._clock = clock
        self._policy = policy
        self._wake = wake

    async def execute(self, command: Command, traceparent: str = "", *, takes_over: bool = True) -> Attempt:
        """Runs a command; idempotent by its reference. The attempt as stored afterwards, in whatever state.

        `takes_over`: whether an attempt that is being sent is taken for abandoned by a process that died. Where it is not, and is left
        to whoever sends it, the poller looks after it when that one fails.
        """
        instruction = None
        if isinstance(command, ExecutePayout):
            instruction = await self._instructions.read(command.reference)
        psps = self._candidates(command, instruction)
        now_ns = self._clock.now_ns()
        grace_ns = now_ns + int(self._policy.sending_grace_s * 1e9)
        attempt = await self._store.begin(command, psps[0] if psps else "", now_ns, grace_ns, traceparent)
        if attempt.state is not AttemptState.SENDING:
            return attempt
        if not attempt.is_new:
            return await self._ask_then_send(attempt, command) if takes_over else attempt
        if instruction is not None and not instruction.sendable:
            return await self._abandon(attempt, command)
        return await self._send(attempt, command, psps, instruction)

    async def resume(self, due: Due) -> Attempt:
        """What the poller does with an attempt whose time has come."""
        attempt, command = due.attempt, due.command
        match attempt.state:
            case AttemptState.SENDING:
                attempt.call_count += 1
                return await self._ask_then_send(attempt, command)
            case AttemptState.UNKNOWN:
                answer = await self._query(attempt)
                attempt = await self._conclude(attempt, command, answer)
                if attempt.state is AttemptState.SENDING:  # the PSP never saw it
                    attempt.call_count += 1
                    return await self._send_again(attempt, command)
                return attempt
            case AttemptState.ACCEPTED:
                answer = await (self._cancel(attempt) if attempt.cancel_requested else self._query(attempt))
                return await self._conclude(attempt, command, answer)
        return attempt

    async def cancel(self, command: CancelOrder) -> Attempt | None:
        """Cancels an order at its PSP, now or as soon as the PSP is known to have it; None where nothing was ever sent."""
        due = await self._store.request_cancel(command.payment_order_id, self._clock.now_ns())
        if due is None or due.attempt.state is not AttemptState.ACCEPTED:
            return due.attempt if due else None
        return await self._conclude(due.attempt, due.command, await self._cancel(due.attempt))

    async def query(self, kind: AttemptKind, reference: str, *, refresh: bool) -> Attempt:
        """The stored attempt; with `refresh` after asking the PSP. Raises NotFound."""
        due = await self._store.load(kind, reference)
        if due is None:
            raise NotFoundError(f"no {kind.name.lower()} {reference!r} was ever sent to a PSP")
        if not refresh or due.attempt.state not in (AttemptState.UNKNOWN, AttemptState.ACCEPTED):
            return due.attempt
        if not self._can(due.attempt, Capability.QUERY):
            raise FailedPrecondition(
                f"PSP {due.attempt.psp} cannot be asked",
                reason="PROVIDER_UNSUPPORTED",
                metadata={"capability": "query"},
            )
        return await self._conclude(due.attempt, due.command, await self._query(due.attempt))

    # --- sending

    async def _ask_then_send(self, attempt: Attempt, command: Command) -> Attempt:
        """For a SENDING attempt that may have been sent before, nobody knows: sent only where the PSP says that it does not have it. One
        whose PSP has left the settings stays unknown until it is back.
        """
        adapter = self._adapters.get(attempt.psp)
        if attempt.psp and (adapter is None or Capability.QUERY in adapter.provider.capabilities):
            answer = await self._query(attempt)
            if not isinstance(answer, NotFound):
                return await self._conclude(attempt, command, answer)
        return await self._send_again(attempt, command)

    async def _send_again(self, attempt: Attempt, command: Command) -> Attempt:
        instruction = None
        if isinstance(command, ExecutePayout):
            instruction = await self._instructions.read(command.reference)
            if not instruction.sendable:
                return await self._abandon(attempt, command)
        return await self._send(attempt, command, [], instruction)

    async def _send(
        self, attempt: Attempt, command: Command, psps: Sequence[str], instruction: PayoutInstruction | None
    ) -> Attempt:
        """Calls the attempt's PSP. Where that one certainly did not act, this is the first call and routing was free, the next PSP's
        turn comes; which one is stored before it is called."""
        answer = await self._call(attempt, command, instruction)
        if attempt.is_new:
            for psp in psps[1:]:
                if not isinstance(answer, Rejected | NotSent):
                    break
                now_ns = self._clock.now_ns()
                if not await self._store.reroute(attempt, psp, now_ns):
                    break
                attempt = replace(attempt, psp=psp, call_count=attempt.call_count + 1, update_time_ns=now_ns)
                answer = await self._call(attempt, command, instruction)
        return await self._conclude(attempt, command, answer)

    async def _call(self, attempt: Attempt, command: Command, instruction: PayoutInstruction | None) -> Answer:
        adapter = self._adapters.get(attempt.psp)
        if adapter is None:
            what = f"PSP {attempt.psp!r} is not configured" if attempt.psp else self._nobody(command, instruction)
            return Rejected("provider_unknown" if attempt.psp else "no_provider", what)
        if not await self._health.may_call(attempt.psp):
            return _barred(attempt.psp)
        match command:
            case ExecuteOrder():
                answer = await adapter.register_order(command)
            case ExecuteRefund():
                answer = await adapter.refund(command)
            case ExecutePayout():
                assert instruction is not None
                answer = await adapter.payout(instruction)
        await self._record(attempt.psp, answer)
        return answer

    def _candidates(self, command: Command, instruction: PayoutInstruction | None) -> list[str]:
        match command:
            case ExecuteOrder():
                capability, currency, requested = Capability.PAY_IN, command.amount.currency_code, command.psp
                reference = command.payment_order_id
            case ExecuteRefund():  # only the PSP that has the payment can send it back
                return (
                    [command.psp] if self._takes(command.psp, Capability.REFUND, command.amount.currency_code) else []
                )
            case ExecutePayout():
                assert instruction is not None
                capability, currency = Capability.PAYOUT, instruction.amount.currency_code
                requested, reference = instruction.psp, command.reference
        return candidates(
            self._providers,
            reference=reference,
            currency_code=currency,
            capability=capability,
            requested=requested,
            unhealthy=self._health.unhealthy(self._adapters),
        )

    def _takes(self, psp: str, capability: Capability, currency_code: str) -> bool:
        adapter = self._adapters.get(psp)
        return adapter is not None and takes(adapter.provider, capability, currency_code)

    def _can(self, attempt: Attempt, capability: Capability) -> bool:
        adapter = self._adapters.get(attempt.psp)
        return adapter is not None and capability in adapter.provider.capabilities

    def _nobody(self, command: Command, instruction: PayoutInstruction | None) -> str:
        match command:
            case ExecutePayout():
                assert instruction is not None
                requested, currency, what = instruction.psp, instruction.amount.currency_code, "payout"
            case ExecuteOrder():
                requested, currency, what = command.psp, command.amount.currency_code, "pay_in"
            case ExecuteRefund():
                requested, currency, what = command.psp, command.amount.currency_code, "refund"
        if requested:
            return f"PSP {requested!r} is not configured, or cannot {what} in {currency}"
        return f"no configured PSP can {what} in {currency}"

    # --- asking

    async def _query(self, attempt: Attempt) -> Answer:
        adapter = self._adapters.get(attempt.psp)
        if adapter is None:
            return NoAnswer(f"PSP {attempt.psp!r} is not configured any more")
        if Capability.QUERY not in adapter.provider.capabilities:  # the idempotency key makes sending again a question
            return (
                NotFound() if attempt.state is AttemptState.UNKNOWN else NoAnswer(f"PSP {attempt.psp} cannot be asked")
            )
        if not await self._health.may_call(attempt.psp):
            return _barred(attempt.psp)
        match attempt.kind:
            case AttemptKind.ORDER:
                answer = await adapter.query_order(attempt.reference, attempt.psp_object_id)
            case AttemptKind.REFUND:
                answer = await adapter.query_refund(attempt.reference, attempt.psp_object_id)
            case AttemptKind.PAYOUT:
                answer = await adapter.query_payout(attempt.reference, attempt.psp_object_id)
        await self._record(attempt.psp, answer)
        return answer

    async def _cancel(self, attempt: Attempt) -> Answer:
        adapter = self._adapters.get(attempt.psp)
        if adapter is None or Capability.CANCEL not in adapter.provider.capabilities:
            return await self._query(attempt)
        if not await self._health.may_call(attempt.psp):
            return _barred(attempt.psp)
        answer = await adapter.cancel_order(attempt.reference, attempt.psp_object_id)
        await self._record(attempt.psp, answer)
        return answer

    async def _record(self, psp: str, answer: Answer) -> None:
        await self._health.record(psp, answer)
        self._wake_recovered()

    def _wake_recovered(self) -> None:
        if self._health.recovered():
            self._wake(self._clock.now_ns())

    # --- storing

    async def _conclude(self, attempt: Attempt, command: Command, answer: Answer) -> Attempt:
        """Stores what the answer says with its event. Where another executor was faster, its result is looked at first."""
        answer = bounded(answer)
        for _ in range(_CONCLUDE_TRY_COUNT_MAX):
            after, events = self._after(attempt, answer)
            if await self._store.finish(after, attempt.state, events, attempt.traceparent):
                if after.next_poll_time_ns:
                    self._wake(after.next_poll_time_ns)
                    if isinstance(answer, NotSent | NoAnswer) and self._waits(after, answer):
                        self._health.wait(after)
                        self._wake_recovered()
                return after
            stored = await self._store.load(attempt.kind, attempt.reference)
            assert stored is not None, f"attempt {attempt.kind.name} {attempt.reference} is gone"
            if stored.attempt.psp != attempt.psp:  # routed on meanwhile: this is no answer of the PSP that has it now
                return stored.attempt
            attempt = stored.attempt
        return attempt

    def _after(self, attempt: Attempt, answer: Answer) -> tuple[Attempt, list[Event]]:
        """The attempt after an answer, and what to tell. Raises TransitionRefused where the PSP contradicts itself."""
        now_ns = self._clock.now_ns()
        new = ATTEMPT_TABLE.next(attempt.state, event_of(answer))
        after = replace(attempt, state=new or attempt.state, update_time_ns=now_ns)
        events: list[Event] = []
        match answer:
            case Accepted():
                if new is AttemptState.ACCEPTED:
                    after.psp_object_id, after.hosted_page_url = answer.psp_object_id, answer.hosted_page_url
                    after.code = after.reason = ""
                    after.poll_count = -1
                    events.append(_registered(after))
                if answer.kind.is_final and attempt.state is not AttemptState.REJECTED:
                    events.append(_found(after, answer))
                    after.next_poll_time_ns = 0
                else:
                    after.poll_count += 1
                    schedule = (
                        self._policy.unknown_schedule_s if after.cancel_requested else self._policy.accepted_schedule_s
                    )
                    after.next_poll_time_ns = next_time_ns(schedule, after.poll_count, now_ns)
            case Rejected():
                if new is AttemptState.REJECTED:
                    after.code, after.reason, after.compliance = answer.code, answer.reason, answer.compliance
                    events.append(_rejected(after))
                after.next_poll_time_ns = 0
            case NoAnswer() | NotSent():
                self._postpone(attempt, after, answer, now_ns, first=new is AttemptState.UNKNOWN)
            case NotFound():
                self._postpone(attempt, after, NoAnswer("the PSP does not have it"), now_ns, first=False)
        return after, events

    def _postpone(
        self, attempt: Attempt, after: Attempt, answer: NoAnswer | NotSent, now_ns: int, *, first: bool
    ) -> None:
        if attempt.state is AttemptState.REJECTED:
            after.next_poll_time_ns = 0
            return
        is_known = attempt.state is AttemptState.ACCEPTED
        if not is_known:
            after.reason = answer.reason
        barred = isinstance(answer, NotSent) and answer.barred
        after.poll_count = 0 if first else attempt.poll_count + (not barred)
        schedule = self._policy.accepted_schedule_s if _is_slow(attempt) else self._policy.unknown_schedule_s
        at_least_s = answer.retry_after_s if isinstance(answer, NotSent) else 0.0
        # a first NOT_SENT waits the schedule's first step, like a first UNKNOWN
        step = (
            after.poll_count - 1 if event_of(answer) is AttemptEvent.NOT_SENT and after.poll_count else after.poll_count
        )
        after.next_poll_time_ns = next_time_ns(schedule, step, now_ns, at_least_s=at_least_s)
        if self._waits(after, answer):
            # Whoever has called asks first when the PSP may be back; its answer makes all others due (`HealthBoard.recovered`).
            latest_ns = now_ns + (BARRED_S if barred else 0) * 1_000_000_000
            open_until_ns = self._health.open_until_ns(attempt.psp)
            after.next_poll_time_ns = max(min(after.next_poll_time_ns, latest_ns), open_until_ns)

    def _waits(self, attempt: Attempt, answer: NoAnswer | NotSent) -> bool:
        """Whether it is the PSP's outage that an attempt is put off for."""
        barred = isinstance(answer, NotSent) and answer.barred
        return not _is_slow(attempt) and (barred or not self._health.is_healthy(attempt.psp))

    async def _abandon(self, attempt: Attempt, command: Command) -> Attempt:
        """A payout that the payment service has ended meanwhile is not sent (any more), and nobody waits for an event."""
        after = replace(
            attempt,
            state=AttemptState.REJECTED,
            code="not_sendable",
            reason="the payment service has ended it",
            next_poll_time_ns=0,
            update_time_ns=self._clock.now_ns(),
        )
        await self._store.finish(after, attempt.state, (), attempt.traceparent)
        return after


_REGISTERED = {
    AttemptKind.ORDER: ("order_registered", "payment_order_id", "psp_token"),
    AttemptKind.REFUND: ("refund_submitted", "refund_id", "psp_refund_id"),
    AttemptKind.PAYOUT: ("payout_submitted", "reference", "psp_payout_id"),
}
_REJECTED = {
    AttemptKind.ORDER: ("order_rejected", "payment_order_id"),
    AttemptKind.REFUND: ("refund_rejected", "refund_id"),
    AttemptKind.PAYOUT: ("payout_rejected", "reference"),
}


def _barred(psp: str) -> NotSent:
    return NotSent(f"PSP {psp} does not answer; waiting for it to recover", throttled=True, barred=True)


def _is_slow(attempt: Attempt) -> bool:
    """The PSP has it and tells its end by webhook; asking is for the case that none comes."""
    return attempt.state is AttemptState.ACCEPTED and not attempt.cancel_requested


def _registered(attempt: Attempt) -> Event:
    kind, reference_field, object_field = _REGISTERED[attempt.kind]
    fields: dict[str, object] = {
        reference_field: attempt.reference,
        "psp": attempt.psp,
        object_field: attempt.psp_object_id,
    }
    if attempt.kind is AttemptKind.ORDER:
        fields["hosted_page_url"] = attempt.hosted_page_url
    return Event(kind, attempt.reference, derived_event_id(kind, attempt.reference), fields)


def _rejected(attempt: Attempt) -> Event:
    kind, reference_field = _REJECTED[attempt.kind]
    fields: dict[str, object] = {
        reference_field: attempt.reference,
        "psp": attempt.psp,
        "code": attempt.code,
        "reason": attempt.reason,
    }
    if attempt.kind is AttemptKind.PAYOUT:
        fields["compliance"] = attempt.compliance
    return Event(kind, attempt.reference, derived_event_id(kind, attempt.reference), fields)


def _found(attempt: Attempt, answer: Accepted) -> Event:
    object_kind = attempt.kind.name.lower()
    fields: dict[str, object] = {
        "psp": attempt.psp,
        "psp_object_id": answer.psp_object_id,
        "merchant_reference": attempt.reference,
        "object_kind": object_kind,
        "kind": answer.kind.value,
        "code": answer.code,
        "reason": answer.reason,
    }
    if answer.amount is not None:
        fields["amount"] = answer.amount
    event_id = derived_event_id("outcome_found", f"{object_kind}/{attempt.reference}/{answer.kind.value}")
    return Event("outcome_found", attempt.reference, event_id, fields)
