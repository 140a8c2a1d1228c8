"""The sandbox's doings: intents, payments, refunds, payouts, and the events that each of them sends.

Every change and the webhooks that tell it are one SQLite transaction. Idempotency keys work like Stripe's: the same key with the same
parameters gives the first answer again (`Replayed`), with others a 400 `idempotency_error`; refusals that were decided after the
parameters were found good are kept under the key as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kernel.money import Money
from sandbox import rules
from sandbox.faults import Faults
from sandbox.rules import ApiError, Card, Json
from sandbox.store import Store, Stored, Task, encode

__all__ = ["Answered", "PspName", "SandboxPsp", "amount_of"]

REORDER_DELAY_MS = 250


@dataclass(frozen=True, slots=True)
class PspName:
    """One PSP that the sandbox plays: its name, where it is reached, its keys, and where its webhooks go."""

    name: str
    base_url: str
    api_key: str
    payout_api_key: str
    webhook_secret: str
    webhook_url: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What a creating call answers. `replayed`: the key was used before."""

    stored: Stored
    replayed: bool

    def body(self) -> Json:
        """The first answer, or the refusal that was kept under the key (raised)."""
        refused = self.stored.private.get("refused")
        if refused is not None:
            raise ApiError(**refused)
        if not self.replayed:
            return self.stored.to_json()
        first = self.stored.to_json(rules.INITIAL_STATUS[self.stored.kind])
        for name in ("failure_code", "failure_message"):
            first.pop(name, None)
        return first


class SandboxPsp:
    """All PSP names over one store. `schedule` is told of each new task, after its commit."""

    def __init__(
        self,
        store: Store,
        *,
        now_ms: Callable[[], int],
        new_id: Callable[[str], str],
        schedule: Callable[[Task], None],
        payout_delay_ms: int,
    ) -> None:
        self._store = store
        self._now_ms = now_ms
        self._new_id = new_id
        self._schedule = schedule
        self._payout_delay_ms = payout_delay_ms
        self.faults: dict[str, Faults] = {}
        """Global faults by PSP name; under the empty name, those of all."""

    def faults_of(self, psp: PspName, reference: str, header: str, metadata: Mapping[str, str]) -> frozenset[str]:
        return self._faults(psp).of(reference, header, metadata)

    def slow_ms(self, psp: PspName) -> int:
        """How long a slow answer takes, where that was set."""
        return self._faults(psp).slow_ms

    def create_intent(self, psp: PspName, key: str, fields: Json, params: Json, faults: frozenset[str]) -> Answered:
        object_id = self._new_id("pi")
        body = {
            "amount": fields["amount"],
            "currency": fields["currency"],
            "description": fields["description"],
            "metadata": fields["metadata"],
            "statement_descriptor": fields["statement_descriptor"],
            "hosted_page_url": f"{psp.base_url}/pay/{object_id}",
            "created": self._now_ms() // 1000,
        }
        private: Json = {"return_url": fields["return_url"]}
        if faults:
            private["faults"] = sorted(faults)
        reference = fields["metadata"].get("payment_order_id", "")
        stored = self._new(object_id, psp, "payment_intent", reference, key, params, body, private)
        if "reject" in faults:
            _refuse(stored, 402, "card_error", "account_closed", "the merchant account cannot take this payment")
        return self._add(stored)

    def pay(self, psp: PspName, intent: Stored, card: Card, faults: frozenset[str]) -> None:
        """The buyer pays with a card. Sets `status` of a hard decline, counts a soft one, and sends the event."""
        if intent.status != "requires_payment":
            return
        faults |= frozenset(intent.private.get("faults", ()))
        if "decline" in faults and not card.code:
            card = Card("card_declined", "Your bank declined this card.", final=True)
        if not card.code:
            intent.status = "succeeded"
            self._change(psp, intent, "payment_intent.succeeded", faults)
            return
        tries = int(intent.private.get("card_try_count", 0)) + 1
        intent.private["card_try_count"] = tries
        if card.final or tries >= rules.CARD_TRY_COUNT_MAX:
            intent.status = "failed"
            intent.body.update(failure_code=card.code, failure_message=card.message)
            self._change(psp, intent, "payment_intent.payment_failed", faults)
        else:
            self._store.update(intent)

    def cancel_intent(self, psp: PspName, intent: Stored) -> None:
        """Idempotent. Raises ApiError where the intent is paid or failed."""
        if intent.status == "canceled":
            return
        if intent.status != "requires_payment":
            raise ApiError(
                400, "invalid_request_error", "intent_unexpected_state", f"the intent is {intent.status}", param="id"
            )
        intent.status = "canceled"
        self._change(psp, intent, "payment_intent.canceled", frozenset(intent.private.get("faults", ())))

    def create_refund(self, psp: PspName, key: str, fields: Json, params: Json, faults: frozenset[str]) -> Answered:
        before = self._store.by_key(psp.name, "refund", key) if key else None
        if before is not None:
            return _replay(before, _fingerprint(params))
        intent = self._store.get(psp.name, "payment_intent", fields["payment_intent"])
        if intent is None:
            raise ApiError(
                404, "invalid_request_error", "resource_missing", "no such payment intent", param="payment_intent"
            )
        if intent.status != "succeeded":
            raise ApiError(400, "invalid_request_error", "intent_unexpected_state", f"the intent is {intent.status}")
        left = intent.body["amount"] - int(intent.private.get("refunded", 0))
        amount = left if fields["amount"] is None else fields["amount"]
        if not 0 < amount <= left:
            raise ApiError(
                400,
                "invalid_request_error",
                "amount_too_large",
                f"{amount} is more than is left ({left})",
                param="amount",
            )
        body = {
            "amount": amount,
            "currency": intent.body["currency"],
            "payment_intent": intent.id,
            "reason": fields["reason"],
            "metadata": fields["metadata"],
            "created": self._now_ms() // 1000,
        }
        reference = fields["metadata"].get("refund_id", "")
        private = {"faults": sorted(faults)} if faults else {}
        stored = self._new(self._new_id("re"), psp, "refund", reference, key, params, body, private)
        intent.private["refunded"] = int(intent.private.get("refunded", 0)) + amount
        with self._store.transaction():
            self._store.add(stored)
            self._store.update(intent)
            task = self._advance_later(psp, stored, "failed" if "fail" in faults else "succeeded")
        self._schedule(task)
        return Answered(stored, replayed=False)

    def create_payout(self, psp: PspName, fields: Json, params: Json, faults: frozenset[str]) -> Answered:
        """Idempotent by `your_reference_id`."""
        reference = fields["your_reference_id"]
        body = {
            "amount": fields["amount"],
            "recipient": fields["recipient"],
            "purpose": fields["purpose"],
            "your_reference_id": reference,
            "created": self._now_ms() // 1000,
        }
        private: Json = {"callback_url": fields["callback_url"]}
        if faults:
            private["faults"] = sorted(faults)
        stored = self._new(self._new_id("po"), psp, "payout", reference, reference, params, body, private)
        if "block" in faults:
            _refuse(stored, 403, "compliance_error", "sanctions_match", "a compliance check refuses this recipient")
            return self._add(stored)
        task = None
        with self._store.transaction():
            added = self._store.add(stored)
            if added:
                task = self._advance_later(psp, stored, "processing")
        if task is not None:
            self._schedule(task)
        return Answered(stored, replayed=False) if added else self._before(stored)

    def get(self, psp: PspName, kind: str, object_id: str) -> Stored:
        stored = self._store.get(psp.name, kind, object_id)
        if stored is None or stored.status == "refused":
            raise ApiError(
                404, "invalid_request_error", "resource_missing", f"no such {kind}: {object_id[:64]}", param="id"
            )
        return stored

    def find(self, psp: PspName, kind: str, reference: str) -> list[Stored]:
        return self._store.by_reference(psp.name, kind, reference)

    def advance(self, psp: PspName, task: Task) -> None:
        """A payout or refund moves on by itself. The task goes in the same transaction."""
        kind = "payout" if task.object_id.startswith("po_") else "refund"
        stored = self._store.get(psp.name, kind, task.object_id)
        if stored is None:
            self._store.done([task.id])
            return
        stored.status = task.payload
        faults = frozenset(stored.private.get("faults", ()))
        failure = _FAILURES.get((kind, task.payload))
        if failure is not None:
            stored.body.update(failure_code=failure[0], failure_message=failure[1])
        following: list[Task] = []
        with self._store.transaction():
            self._store.done([task.id])
            self._store.update(stored)
            following += self._tell(psp, stored, f"{kind}.{task.payload}", faults)
            if kind == "refund" and task.payload == "failed":
                self._unrefund(psp, stored)
            after = _payout_after(task.payload, faults) if kind == "payout" else _refund_after(task.payload, faults)
            if after:
                following.append(self._advance_later(psp, stored, after))
        for each in following:
            self._schedule(each)

    def _unrefund(self, psp: PspName, refund: Stored) -> None:
        intent = self._store.get(psp.name, "payment_intent", refund.body["payment_intent"])
        if intent is not None:
            intent.private["refunded"] = int(intent.private["refunded"]) - refund.body["amount"]
            self._store.update(intent)

    def _change(self, psp: PspName, stored: Stored, event_type: str, faults: frozenset[str]) -> None:
        with self._store.transaction():
            self._store.update(stored)
            tasks = self._tell(psp, stored, event_type, faults)
        for task in tasks:
            self._schedule(task)

    def _tell(self, psp: PspName, stored: Stored, event_type: str, faults: frozenset[str]) -> list[Task]:
        """Inside a transaction: the deliveries of one event, as the faults want them."""
        url = stored.private.get("callback_url") or psp.webhook_url
        now_ms = self._now_ms()
        tasks = []

        def deliver(kind_of_event: str, status: str, delay_ms: int = 0, event_id: str = "") -> str:
            event_id = event_id or self._new_id("evt")
            event = {
                "id": event_id,
                "object": "event",
                "type": kind_of_event,
                "created": now_ms // 1000,
                "data": {"object": stored.to_json(status)},
            }
            tasks.append(self._store.add_task(now_ms + delay_ms, psp.name, stored.id, url, encode(event)))
            return event_id

        late = "reorder_webhooks" in faults
        if late and event_type == "payout.processing":
            deliver(event_type, stored.status, self._payout_delay_ms + REORDER_DELAY_MS)
        else:
            event_id = deliver(event_type, stored.status)
            if "duplicate_webhooks" in faults:
                deliver(event_type, stored.status, event_id=event_id)
                deliver(event_type, stored.status)
        if late and stored.kind == "payment_intent":
            deliver("payment_intent.processing", "processing", REORDER_DELAY_MS)
        return tasks

    def _advance_later(self, psp: PspName, stored: Stored, status: str) -> Task:
        return self._store.add_task(self._now_ms() + self._payout_delay_ms, psp.name, stored.id, "", status)

    def _new(
        self, object_id: str, psp: PspName, kind: str, reference: str, key: str, params: Json, body: Json, private: Json
    ) -> Stored:
        return Stored(
            object_id,
            psp.name,
            kind,
            reference,
            key or None,
            _fingerprint(params),
            rules.INITIAL_STATUS[kind],
            body,
            private,
        )

    def _add(self, stored: Stored) -> Answered:
        if self._store.add(stored):
            return Answered(stored, replayed=False)
        return self._before(stored)

    def _before(self, stored: Stored) -> Answered:
        before = self._store.by_key(stored.psp, stored.kind, stored.idempotency_key or "")
        assert before is not None
        return _replay(before, stored.fingerprint)

    def _faults(self, psp: PspName) -> Faults:
        return self.faults.get(psp.name) or self.faults.get("") or _NO_FAULTS


_NO_FAULTS = Faults()

_FAILURES = {
    ("payout", "failed"): ("account_closed", "The recipient's account is closed."),
    ("payout", "rejected"): ("sanctions_match", "A compliance check (AML, fraud, sanctions) refused the recipient."),
    ("payout", "returned"): ("returned_by_bank", "The recipient's bank sent the money back."),
    ("refund", "failed"): ("refund_declined", "The buyer's bank refused the refund."),
}


def _refund_after(status: str, faults: frozenset[str]) -> str:
    """The next status of a refund, or an empty text where it rests."""
    return "failed" if status == "succeeded" and "return" in faults else ""


def _payout_after(status: str, faults: frozenset[str]) -> str:
    """The next status of a payout, or an empty text where it rests."""
    if status == "processing":
        if "reject" in faults:
            return "rejected"
        return "failed" if "fail" in faults else "completed"
    return "returned" if status == "completed" and "return" in faults else ""


def _replay(before: Stored, fingerprint: bytes) -> Answered:
    if before.fingerprint != fingerprint:
        raise ApiError(
            400,
            "idempotency_error",
            "idempotency_key_reused",
            "this idempotency key was used before with other parameters; use another key, or the first parameters",
        )
    return Answered(before, replayed=True)


def _refuse(stored: Stored, status: int, error_type: str, code: str, message: str) -> None:
    stored.status = "refused"
    stored.private["refused"] = {"status": status, "error_type": error_type, "code": code, "message": message}


def _fingerprint(params: Json) -> bytes:
    return hashlib.blake2b(json.dumps(params, sort_keys=True).encode(), digest_size=16).digest()


def amount_of(intent: Stored) -> Money:
    """The amount that the page shows."""
    return Money(str(intent.body["currency"]).upper(), int(intent.body["amount"]))
