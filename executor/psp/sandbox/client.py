"""Calls to the sandbox PSP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar
from urllib.parse import quote

from executor.domain.command import ExecuteOrder, ExecuteRefund, PayoutInstruction
from executor.domain.outcome import Accepted, Answer, Notification, Rejected
from executor.psp.base import Capabilities, Http, HttpAnswer, PspBase, PspConfig
from executor.psp.sandbox import translate, webhook
from executor.psp.sandbox.capabilities import CAPABILITIES
from executor.service.ports import Channel

__all__ = ["SandboxPsp"]


class SandboxPsp(PspBase):
    """The sandbox, over HTTP."""

    capabilities: ClassVar[Capabilities] = CAPABILITIES

    def __init__(self, config: PspConfig) -> None:
        super().__init__(config)
        self._http = Http(config.base_url, config.timeout_ms, proxy=config.proxy)
        self._headers = {"Authorization": f"Bearer {config.api_key}", "Content-Type": "application/json"}
        self._payout_headers = {"X-API-Key": config.payout_api_key, "Content-Type": "application/json"}

    async def register_order(self, order: ExecuteOrder) -> Answer:
        try:
            body = translate.intent_body(order, self.config, CAPABILITIES)
        except ValueError as error:
            return Rejected("amount_unsupported", str(error))
        return await self._act("/v1/payment_intents", order.payment_order_id, body)

    async def query_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        path = _path("payment_intents", psp_object_id, "payment_order_id", payment_order_id)
        return await self._ask(path, self._headers)

    async def cancel_order(self, payment_order_id: str, psp_object_id: str) -> Answer:
        if not psp_object_id:
            found = await self.query_order(payment_order_id, "")
            if not isinstance(found, Accepted):
                return found
            psp_object_id = found.psp_object_id
        path = f"/v1/payment_intents/{quote(psp_object_id, safe='')}/cancel"
        answered = await self._act(path, payment_order_id, b"{}", of_key="/cancel")
        if isinstance(answered, Rejected):  # paid or ended meanwhile: say how it stands
            return await self.query_order(payment_order_id, psp_object_id)
        return answered

    async def refund(self, refund: ExecuteRefund) -> Answer:
        return await self._act("/v1/refunds", refund.refund_id, translate.refund_body(refund, CAPABILITIES))

    async def query_refund(self, refund_id: str, psp_object_id: str) -> Answer:
        return await self._ask(_path("refunds", psp_object_id, "refund_id", refund_id), self._headers)

    async def payout(self, payout: PayoutInstruction) -> Answer:
        body = translate.payout_body(payout, self.config, CAPABILITIES)
        answered = await self._http.call("POST", "/v1/payouts", self._payout_headers, body)
        return translate.answer(answered, CAPABILITIES) if isinstance(answered, HttpAnswer) else answered

    async def query_payout(self, reference: str, psp_object_id: str) -> Answer:
        return await self._ask(_path("payouts", psp_object_id, "your_reference_id", reference), self._payout_headers)

    def verify(self, headers: Mapping[str, str], body: bytes, channel: Channel, now_s: int) -> None:
        webhook.verify(headers, body, self.config.webhook_secrets, now_s)

    def translate(self, body: bytes, channel: Channel) -> Sequence[Notification]:
        return translate.notifications(body, CAPABILITIES)

    async def close(self) -> None:
        await self._http.close()

    async def _act(self, path: str, reference: str, body: bytes, *, of_key: str = "") -> Answer:
        """Our reference is the idempotency key. What else is done to it has an `of_key` with a slash, which no quoted reference has."""
        headers = {**self._headers, "Idempotency-Key": quote(reference, safe=":._-") + of_key}
        answered = await self._http.call("POST", path, headers, body)
        return translate.answer(answered, CAPABILITIES) if isinstance(answered, HttpAnswer) else answered

    async def _ask(self, path: str, headers: Mapping[str, str]) -> Answer:
        answered = await self._http.call("GET", path, headers)
        return translate.query_answer(answered, CAPABILITIES) if isinstance(answered, HttpAnswer) else answered


def _path(collection: str, psp_object_id: str, key: str, reference: str) -> str:
    if psp_object_id:
        return f"/v1/{collection}/{quote(psp_object_id, safe='')}"
    return f"/v1/{collection}?{key}={quote(reference, safe='')}"
