"""What business events do to wallets: each becomes at most one transfer, under an id derived from the event
itself.

    event                     transfer                                       id kind        a refusal is
    payment_order_succeeded   psp clearing → seller wallet                   capture        a failure
    payout_requested          hold  seller wallet → payout clearing          payout-hold    an answer
    payout_completed          post that hold                                 payout-post    a failure
    payout_released           void that hold (nothing where none was)        payout-void    a failure
    payout_returned           payout clearing → seller wallet                payout-return  a failure
    refund_requested          hold  seller wallet → psp clearing             refund-hold    an answer
    refund_completed          post or void that hold                         refund-post …  a failure
    refund_claimed            seller disputes → psp clearing                 refund-claim   a failure
    refund_reversed           psp clearing → seller wallet                   refund-return  a failure
    refund_reversed, claimed  psp clearing → seller disputes                 refund-unclaim a failure
    dispute_opened            seller disputes → psp clearing                 dispute        a failure
    dispute_closed, won       psp clearing → seller disputes                 dispute-won    a failure

A replay finds every id applied and changes nothing. A refusal that is a failure (a frozen wallet, say) is
remembered with its id for as long as the id window lasts, so asking again under the same id could never
succeed, not even after the wallet is thawed. Such a step therefore counts attempts: attempt n has an id of
its own, n + 1 is tried only when n was refused *and* its cause is gone, and a replay walks the same attempts
to the same end. So the money moves once, and a dead-lettered message can be retried once its cause is
mended.

An event that is older than the id window may come again (an inbox that was lost, a feed that was accepted). What the
read model has of its ids says what became of it then; where it has none, nobody can tell, and it is a failure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from kernel.errors import FailedPrecondition, Unavailable
from kernel.ids import account_id, derived_transfer_id
from kernel.names import payout_clearing, psp_clearing, seller_disputes, seller_wallet
from wallet_core.engine.codes import AccountFlags, AccountResult, TransferFlags, TransferResult
from wallet_core.service.port import (
    ID_NONE,
    ROW_COUNT_MAX,
    SLOT_COUNT,
    AccountRow,
    Directory,
    Host,
    NamedAccount,
    TransferRow,
    slot_of,
)

__all__ = [
    "ATTEMPT_COUNT_MAX",
    "Flows",
    "Outcome",
    "Step",
    "capture",
    "dispute_opened",
    "dispute_won",
    "payout_hold",
    "payout_post",
    "payout_return",
    "payout_void",
    "refund_claim",
    "refund_hold",
    "refund_post",
    "refund_return",
    "refund_unclaim",
    "refund_void",
]

ATTEMPT_COUNT_MAX = 32
"""Ids that one step may use up."""
KNOWN_ACCOUNT_COUNT_MAX = 50_000
"""Names whose accounts are known to be open; the oldest are asked about again."""

_OK = TransferResult.OK
_CLEARING = AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED
_CLAIM = AccountFlags.MAY_OVERDRAW
_POSTED = frozenset({TransferResult.HOLD_ALREADY_POSTED})
_VOIDED = frozenset({TransferResult.HOLD_ALREADY_VOIDED, TransferResult.HOLD_EXPIRED})
_NONE: frozenset[TransferResult] = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """One transfer that a business event asks for. `done` are refusals that say that the effect is there
    already. One side is the seller's, the other a clearing account; `opens_seller`: the seller's is the credit
    side, and opened where it is missing; `seller_flags`: opened in any case, with these flags."""

    kind: str
    reference: str
    time_ms: int
    debit: str
    credit: str
    currency: str
    amount_minor: int
    flags: int = 0
    pending_id: bytes = ID_NONE
    opens_seller: bool = False
    seller_flags: int = 0
    refusal_is_answer: bool = False
    done: frozenset[TransferResult] = _NONE

    def transfer_id(self, attempt: int = 1) -> bytes:
        """The id of the n-th attempt, from 1."""
        kind = self.kind if attempt == 1 else f"{self.kind}.{attempt}"
        return derived_transfer_id(self.time_ms, kind, self.reference)


Past = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, int]]]
"""What the read model has of ids of transfers: their results. Raises Unavailable."""


async def _no_past(ids: Sequence[bytes]) -> Mapping[bytes, int]:
    return {}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step: applied (result OK), or refused where a refusal is an answer."""

    step: Step
    transfer_id: bytes
    result: TransferResult


def capture(order: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A buyer paid: what the PSP now has for us is the seller's."""
    debit, credit = psp_clearing(psp, currency), seller_wallet(seller, currency)
    return Step("capture", order, time_ms, debit, credit, currency, amount, opens_seller=True)


def payout_hold(reference: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A payout was asked for: hold the money. A seller who never earned anything has no wallet, which
    refuses it."""
    return _hold("payout-hold", reference, payout_clearing(psp, currency), seller, currency, amount, time_ms)


def payout_post(
    reference: str, psp: str, seller: str, currency: str, amount: int, time_ms: int, hold_id: bytes
) -> Step:
    """The payout arrived: the held money is gone."""
    return _post("payout-post", reference, payout_clearing(psp, currency), seller, currency, amount, time_ms, hold_id)


def payout_void(reference: str, psp: str, seller: str, currency: str, time_ms: int, hold_id: bytes) -> Step:
    """The payout did not happen: release the hold."""
    return _void("payout-void", reference, payout_clearing(psp, currency), seller, currency, time_ms, hold_id)


def payout_return(reference: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A completed payout came back from the bank."""
    debit, credit = payout_clearing(psp, currency), seller_wallet(seller, currency)
    return Step("payout-return", reference, time_ms, debit, credit, currency, amount, opens_seller=True)


def refund_hold(refund: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A refund was asked for: hold the money."""
    return _hold("refund-hold", refund, psp_clearing(psp, currency), seller, currency, amount, time_ms)


def refund_post(refund: str, psp: str, seller: str, currency: str, amount: int, time_ms: int, hold_id: bytes) -> Step:
    """The buyer has the money back."""
    return _post("refund-post", refund, psp_clearing(psp, currency), seller, currency, amount, time_ms, hold_id)


def refund_void(refund: str, psp: str, seller: str, currency: str, time_ms: int, hold_id: bytes) -> Step:
    """The refund failed: release the hold."""
    return _void("refund-void", refund, psp_clearing(psp, currency), seller, currency, time_ms, hold_id)


def refund_claim(refund: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """The buyer has money back that the seller's wallet did not cover: the seller owes it."""
    debit, credit = seller_disputes(seller, currency), psp_clearing(psp, currency)
    return Step("refund-claim", refund, time_ms, debit, credit, currency, amount, seller_flags=_CLAIM)


def refund_return(refund: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A refund failed after it was posted: the seller has the money again."""
    debit, credit = psp_clearing(psp, currency), seller_wallet(seller, currency)
    return Step("refund-return", refund, time_ms, debit, credit, currency, amount, opens_seller=True)


def refund_unclaim(refund: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A refund failed after it was claimed: the seller owes it no more."""
    debit, credit = psp_clearing(psp, currency), seller_disputes(seller, currency)
    return Step(
        "refund-unclaim", refund, time_ms, debit, credit, currency, amount, opens_seller=True, seller_flags=_CLAIM
    )


def dispute_opened(order: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """A PSP took a disputed payment back: the seller owes it, whatever is left in the wallet."""
    debit, credit = seller_disputes(seller, currency), psp_clearing(psp, currency)
    return Step("dispute", order, time_ms, debit, credit, currency, amount, seller_flags=_CLAIM)


def dispute_won(order: str, psp: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    """The PSP gave it back."""
    debit, credit = psp_clearing(psp, currency), seller_disputes(seller, currency)
    return Step("dispute-won", order, time_ms, debit, credit, currency, amount, opens_seller=True, seller_flags=_CLAIM)


def _hold(kind: str, reference: str, credit: str, seller: str, currency: str, amount: int, time_ms: int) -> Step:
    debit = seller_wallet(seller, currency)
    flags = TransferFlags.HOLD
    return Step(kind, reference, time_ms, debit, credit, currency, amount, flags, refusal_is_answer=True)


def _post(
    kind: str, reference: str, credit: str, seller: str, currency: str, amount: int, time_ms: int, hold_id: bytes
) -> Step:
    debit = seller_wallet(seller, currency)
    return Step(kind, reference, time_ms, debit, credit, currency, amount, TransferFlags.POST, hold_id, done=_POSTED)


def _void(kind: str, reference: str, credit: str, seller: str, currency: str, time_ms: int, hold_id: bytes) -> Step:
    debit = seller_wallet(seller, currency)
    return Step(kind, reference, time_ms, debit, credit, currency, 0, TransferFlags.VOID, hold_id, done=_VOIDED)


class Flows:
    """Runs steps: opens the accounts that they need, submits all of them as one batch, judges every
    result."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        *,
        past: Past = _no_past,
        known_account_count_max: int = KNOWN_ACCOUNT_COUNT_MAX,
    ) -> None:
        self._host = host
        self._past = past
        self._directory = directory
        self._ids: dict[str, bytes] = {}
        self._open: dict[str, None] = {}
        self._known_max = known_account_count_max

    def owns(self, step: Step) -> bool:
        """Whether the seller's account lives on a shard of this process. Clearing accounts are striped: they
        have a part here."""
        seller = step.credit if step.opens_seller else step.debit
        return slot_of(self._id(seller)) * self._host.shard_count // SLOT_COUNT in self._host.shard_ids

    async def available(self, name: str) -> int:
        """What an account of this process has left to spend, in minor units; 0 where there is none."""
        (state,) = await self._host.accounts([self._id(name)])
        return max(state.available, 0) if state is not None else 0

    async def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Every step's outcome, in order; all are durable. Steps that reach the same shard apply in this
        order.

        Raises FailedPrecondition naming the first step that failed for good (all the others have been
        applied: run them again, they change nothing), Unavailable where a later try can help.
        """
        missing = self._not_known_open(steps)
        if missing:
            await self._open_accounts(missing)
        outcomes: list[Outcome] = []
        for start in range(0, len(steps), ROW_COUNT_MAX):
            part = steps[start : start + ROW_COUNT_MAX]
            rows = [self._row(step, 1) for step in part]
            results = await self._host.transfers(rows)
            for step, row, result in zip(part, rows, results, strict=True):
                if result == _OK:
                    outcomes.append(Outcome(step, row.id, _OK))
                else:
                    outcomes.append(await self._refused(step, row, TransferResult(result)))
        return outcomes

    def _id(self, name: str) -> bytes:
        found = self._ids.get(name)
        if found is None:
            if len(self._ids) >= 2 * self._known_max:
                self._ids.clear()
            found = self._ids[name] = account_id(name)
        return found

    def _row(self, step: Step, attempt: int) -> TransferRow:
        return TransferRow(
            step.transfer_id(attempt),
            self._id(step.debit),
            self._id(step.credit),
            step.amount_minor,
            step.flags,
            step.pending_id,
        )

    def _not_known_open(self, steps: Sequence[Step]) -> dict[str, tuple[str, int]]:
        known = self._open
        missing: dict[str, tuple[str, int]] = {}
        for step in steps:
            seller, clearing = (step.credit, step.debit) if step.opens_seller else (step.debit, step.credit)
            if clearing not in known:
                missing[clearing] = (step.currency, _CLEARING)
            if (step.opens_seller or step.seller_flags) and seller not in known:
                missing[seller] = (step.currency, step.seller_flags)
        return missing

    async def _open_accounts(self, missing: dict[str, tuple[str, int]]) -> None:
        """The name goes into the directory first: an account that is open always has its name there."""
        plain = [name for name, (_, flags) in missing.items() if not flags & AccountFlags.STRIPED]
        states = await self._host.accounts([self._id(name) for name in plain]) if plain else []
        there = {name for name, state in zip(plain, states, strict=True) if state is not None}
        # Also the names of those that are there: a directory that was restored to an older state lacks them.
        await self._directory.add(
            [NamedAccount(self._id(name), name, currency) for name, (currency, _) in missing.items()]
        )
        names = [name for name in missing if name not in there]  # a striped one may have no part here yet: always asked
        if names:
            rows = [AccountRow(self._id(name), missing[name][0], missing[name][1]) for name in names]
            results = await self._host.create_accounts(rows)
            for name, result in zip(names, results, strict=True):
                if result not in (AccountResult.OK, AccountResult.ALREADY_EXISTS):
                    told = AccountResult(result).name
                    raise FailedPrecondition(f"account {name} could not be opened: {told}", metadata={"result": told})
        for name in missing:
            self._open[name] = None
        while len(self._open) > self._known_max:
            del self._open[next(iter(self._open))]

    async def _refused(self, step: Step, row: TransferRow, result: TransferResult) -> Outcome:
        """An answer, a failure, or the next attempt. See the module's text."""
        attempt = 1
        while True:
            if result in step.done:
                return Outcome(step, row.id, _OK)
            if result == TransferResult.ID_TOO_OLD and (before := await self._outcome_before(step)) is not None:
                return before
            if result not in _REMEMBERED:
                raise _failure(step, row, result)
            if step.refusal_is_answer:
                return Outcome(step, row.id, result)
            if attempt == ATTEMPT_COUNT_MAX or not await self._cause_is_gone(row, result):
                raise _failure(step, row, result)
            attempt += 1
            row = self._row(step, attempt)
            result = TransferResult((await self._host.transfers([row]))[0])
            if result == _OK:
                return Outcome(step, row.id, _OK)

    async def _outcome_before(self, step: Step) -> Outcome | None:
        """What the read model says of a step whose ids the shards have forgotten; None where it says nothing."""
        ids = [step.transfer_id(attempt) for attempt in range(1, ATTEMPT_COUNT_MAX + 1)]
        results = await self._past(ids)
        applied = next((each for each in ids if results.get(each) == _OK), None)
        if applied is not None:
            return Outcome(step, applied, _OK)
        if step.refusal_is_answer and ids[0] in results:
            return Outcome(step, ids[0], TransferResult(results[ids[0]]))
        return None

    async def _cause_is_gone(self, row: TransferRow, result: TransferResult) -> bool:
        debit, credit = await self._host.accounts([row.debit_id, row.credit_id])
        if debit is None or credit is None:
            return False
        match result:
            case TransferResult.DEBIT_ACCOUNT_FROZEN:
                return not debit.has(AccountFlags.FROZEN)
            case TransferResult.CREDIT_ACCOUNT_FROZEN:
                return not credit.has(AccountFlags.FROZEN)
            case TransferResult.DEBIT_ACCOUNT_NOT_FOUND | TransferResult.CREDIT_ACCOUNT_NOT_FOUND:
                return True
            case TransferResult.BALANCE_LIMIT_EXCEEDED:
                limit = credit.balance_limit
                return limit == 0 or credit.balance + credit.held_in + row.amount_minor <= limit
        return False


_REMEMBERED = frozenset(range(TransferResult.HOLD_NOT_FOUND, TransferResult.LINKED_FAILED + 1))
"""Results that depend on the state and stay with their id."""
_LATER = frozenset({TransferResult.WRONG_SHARD, TransferResult.TOO_MANY_PENDING, TransferResult.ID_AHEAD})
_WHAT_TO_DO = {
    TransferResult.ID_TOO_OLD: (
        "the event is older than the wallet's id window, so whether it was applied is no longer known here; where the shard"
        " was accepted or restored to before it, start the wallet once with a longer DUCAT_WALLET_ID_WINDOW_MS (ids that were"
        " forgotten stay refused), then `ducat feed retry`; else compare ledger and wallet, settle the difference by hand"
    ),
    TransferResult.ID_REUSED: "another event with the same kind, reference and time moved other money; compare both",
    TransferResult.DEBIT_ACCOUNT_FROZEN: "unfreeze the debit account, then retry the message",
    TransferResult.CREDIT_ACCOUNT_FROZEN: "unfreeze the credit account, then retry the message",
    TransferResult.BALANCE_LIMIT_EXCEEDED: "raise the credit account's balance limit, then retry the message",
    TransferResult.HOLD_NOT_FOUND: "no such hold on this shard; compare the payment's hold id with the wallet's events",
}


def _failure(step: Step, row: TransferRow, result: TransferResult) -> Exception:
    text = (
        f"{step.kind} of {step.reference} refused: {result.name}"
        f" ({step.debit} → {step.credit}, {step.amount_minor} {step.currency} minor, transfer {row.id.hex()})"
    )
    if result in _WHAT_TO_DO:
        text = f"{text}: {_WHAT_TO_DO[result]}"
    if result in _LATER:
        return Unavailable(text, metadata={"result": result.name})
    return FailedPrecondition(text, metadata={"result": result.name, "reference": step.reference})
