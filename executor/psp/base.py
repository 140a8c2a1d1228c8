"""What every PSP's folder builds on: its configuration, a base that says "not implemented", HTTP whose failures are values, amounts.

An adapter is `PspBase` with the calls that the PSP has, a declared `Capabilities`, a `verify` without a permissive default and a pure
`translate` with one status table, in which a status that is not listed means pending.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from executor.domain.command import ExecuteOrder, ExecuteRefund, PayoutInstruction
from executor.domain.outcome import Answer, NoAnswer, Notification, NotSent
from executor.domain.routing import Capability, Provider
from executor.service.ports import Channel, PspAdapter
from kernel.errors import InvalidArgument, PermissionDenied, Unimplemented
from kernel.money import CURRENCY_EXPONENTS, Money
from runtime import http_client
from runtime.http_client import HttpPool

__all__ = [
    "BODY_BYTES_MAX",
    "CONNECTION_COUNT_MAX",
    "SIGNATURE_TOLERANCE_S",
    "Capabilities",
    "Http",
    "HttpAnswer",
    "PspAdapter",
    "PspBase",
    "PspConfig",
    "encode_json",
    "signature_refused",
    "verify_timestamped_hmac",
]

BODY_BYTES_MAX = 1_048_576
"""Largest answer that we read from a PSP."""
CONNECTION_COUNT_MAX = 64
"""Connections to one PSP."""
SIGNATURE_TOLERANCE_S = 300
"""How old, or how far ahead, a signed webhook may be."""
SIGNATURE_COUNT_MAX = 8
RETRY_AFTER_S_MAX = 3_600.0
"""Longest wait that a PSP's Retry-After may ask of us; after that we ask again whatever it said."""

encode_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class PspConfig:
    """One configured PSP: what an operator sets, and our own URLs that the PSP must know."""

    name: str
    base_url: str
    api_key: str = field(repr=False)
    payout_api_key: str = field(repr=False)
    webhook_secret: str = field(repr=False)
    return_url: str
    payout_callback_url: str
    statement_descriptor: str
    timeout_ms: int
    currency_codes: frozenset[str] = frozenset()
    weight: int = 1
    webhook_secret_previous: str = field(default="", repr=False)
    proxy: str = field(default="", repr=False)
    """URL of the proxy that it is called through; empty = none."""

    @property
    def webhook_secrets(self) -> tuple[str, ...]:
        """What may have signed a webhook: the secret and, while it is being replaced, the one before. None without a secret."""
        if not self.webhook_secret:
            return ()
        return tuple(filter(None, (self.webhook_secret, self.webhook_secret_previous)))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a PSP can do. `exponents` lists only the currencies in which its API counts other decimals than ISO 4217."""

    operations: frozenset[Capability]
    currency_codes: frozenset[str] = frozenset()
    exponents: Mapping[str, int] = field(default_factory=dict)

    def provider(self, config: PspConfig) -> Provider:
        """The PSP as routing sees it: what it can do, narrowed to the currencies that the operator configured."""
        currency_codes = self.currency_codes
        if config.currency_codes:
            currency_codes = currency_codes & config.currency_codes if currency_codes else config.currency_codes
        return Provider(config.name, self.operations, currency_codes, config.weight)

    def amount_to_psp(self, money: Money) -> int:
        """The amount in the PSP's own smallest unit. ValueError where it cannot be said exactly there."""
        theirs = self.exponents.get(money.currency_code)
        if theirs is None:
            return money.amount_minor
        ours = CURRENCY_EXPONENTS[money.currency_code]
        if theirs >= ours:
            return money.amount_minor * int(10 ** (theirs - ours))
        amount, rest = divmod(money.amount_minor, 10 ** (ours - theirs))
        if rest:
            raise ValueError(f"{money} has more decimals than this PSP takes for {money.currency_code} ({theirs})")
        return int(amount)

    def amount_from_psp(self, currency_code: str, amount: int) -> Money:
        """The PSP's amount as money. ValueError for an unknown currency or a part of a minor unit."""
        code = currency_code.upper()
        ours = CURRENCY_EXPONENTS.get(code)
        if ours is None:
            raise ValueError(f"unknown currency {currency_code!r}")
        theirs = self.exponents.get(code, ours)
        if ours >= theirs:
            return Money(code, amount * int(10 ** (ours - theirs)))
        minor, rest = divmod(amount, 10 ** (theirs - ours))
        if rest:
            raise ValueError(f"{amount} {code} is not a whole number of minor units")
        return Money(code, int(minor))


class PspBase:
    """An adapter that can do nothing yet: each call that a PSP does not have stays "not implemented"."""

    capabilities: ClassVar[Capabilities] = Capabilities(frozenset())

    def __init__(self, config: PspConfig) -> None:
        self.config = config
        self._provider = self.capabilities.provider(config)

    @property
    def provider(self) -> Provider:
        return self._provider

    async def register_order(self, order: ExecuteOrder) -> Answer:
        raise self._not_implemented(Capability.PAY_IN)

    async def query_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        raise self._not_implemented(Capability.QUERY)

    async def cancel_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        raise self._not_implemented(Capability.CANCEL)

    async def refund(self, refund: ExecuteRefund) -> Answer:
        raise self._not_implemented(Capability.REFUND)

    async def query_refund(self, refund_id: str, psp_object_id: str) -> Answer:
        raise self._not_implemented(Capability.QUERY)

    async def payout(self, payout: PayoutInstruction) -> Answer:
        raise self._not_implemented(Capability.PAYOUT)

    async def query_payout(self, reference: str, psp_object_id: str) -> Answer:
        raise self._not_implemented(Capability.QUERY)

    def verify(self, headers: Mapping[str, str], body: bytes, channel: Channel, now_s: int) -> None:
        raise signature_refused(f"{self.config.name}: this adapter cannot verify webhooks, so it accepts none")

    def translate(self, body: bytes, channel: Channel) -> Sequence[Notification]:
        raise InvalidArgument(f"{self.config.name}: this adapter translates no webhooks")

    async def close(self) -> None:
        return None

    def _not_implemented(self, capability: Capability) -> Unimplemented:
        return Unimplemented(
            f"PSP {self.config.name} cannot {capability.value}",
            reason="PROVIDER_UNSUPPORTED",
            metadata={"psp": self.config.name, "capability": capability.value},
        )


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer: any status."""

    status: int
    body: bytes
    retry_after_s: float = 0.0

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty one where it is something else."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


class Http:
    """Calls to one PSP over kept-alive connections. What goes wrong is a value: `NotSent` only where the request certainly never
    left, `NoAnswer` for everything after that. Every POST carries an idempotency key (see runtime/http_client.py)."""

    def __init__(
        self, base_url: str, timeout_ms: int, *, connection_count_max: int = CONNECTION_COUNT_MAX, proxy: str = ""
    ) -> None:
        self._base_url = base_url
        self._proxy = proxy
        self._timeout_s = timeout_ms / 1000
        self._connection_count_max = connection_count_max
        self._pool: HttpPool | None = None

    async def call(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> HttpAnswer | NoAnswer | NotSent:
        """One request. `path` is already percent-encoded."""
        pool = self._pool or self._open()
        try:
            reply = await pool.request(method, path, headers, body)
        except http_client.NotSent as error:
            return NotSent(str(error))
        except http_client.NoReply as error:
            return NoAnswer(str(error))
        return HttpAnswer(reply.status, reply.body, _seconds(reply.headers.get("retry-after", "")))

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

    def _open(self) -> HttpPool:
        self._pool = HttpPool(
            self._base_url,
            timeout_s=self._timeout_s,
            connection_count_max=self._connection_count_max,
            body_bytes_max=BODY_BYTES_MAX,
            proxy=self._proxy,
        )
        return self._pool


def verify_timestamped_hmac(header: str, body: bytes, secrets: Sequence[str], now_s: int, *, name: str) -> None:
    """Verifies `t=<unix>,v1=<hex>[,v1=<hex>…]` over the raw body, as Stripe signs: hex HMAC-SHA256 of ``{t}.{body}``.

    Other schemes than v1 are ignored; any of several v1 may match, with any of the secrets (one that is being replaced, on their side or
    on ours); compared in constant time. Raises PermissionDenied with SIGNATURE_INVALID.
    Source: Stripe, "Verify webhook signatures manually".
    """
    if not secrets or not all(secrets):
        raise signature_refused("no webhook secret is configured, so no webhook is accepted")
    if not header:
        raise signature_refused(f"header {name} is missing")
    timestamp = ""
    signatures: list[str] = []
    for part in header.split(","):
        key, _, value = part.strip().partition("=")
        if key == "t":
            if timestamp:
                raise signature_refused(f"header {name} has more than one timestamp")
            timestamp = value
        elif key == "v1":
            signatures.append(value)
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 12):
        raise signature_refused(f"header {name} has no timestamp")
    if not signatures or len(signatures) > SIGNATURE_COUNT_MAX:
        raise signature_refused(
            f"header {name}: expected 1 to {SIGNATURE_COUNT_MAX} v1 signatures, got {len(signatures)}"
        )
    matches = False
    for secret in secrets:
        expected = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest().encode()
        for signature in signatures:
            matches |= hmac.compare_digest(expected, signature.encode("utf-8", "surrogateescape"))
    if not matches:
        raise signature_refused(f"header {name}: no v1 signature matches the body")
    if abs(now_s - int(timestamp)) > SIGNATURE_TOLERANCE_S:
        raise signature_refused(
            f"header {name}: the timestamp is {now_s - int(timestamp)} s off, more than {SIGNATURE_TOLERANCE_S}"
        )


def signature_refused(message: str) -> PermissionDenied:
    return PermissionDenied(message, reason="SIGNATURE_INVALID")


def _seconds(text: str) -> float:
    return min(float(text), RETRY_AFTER_S_MAX) if text.isascii() and text.isdigit() and len(text) < 7 else 0.0
