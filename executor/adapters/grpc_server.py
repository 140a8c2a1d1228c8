"""ducat.executor.v1.ExecutorService over the use cases."""

from __future__ import annotations

from collections.abc import Mapping

from grpc import aio

from ducat.common.v1 import common_pb2
from ducat.executor.v1 import executor_pb2, executor_pb2_grpc
from ducat.payment.v1 import payment_pb2
from executor.adapters.messages import execute_order, execute_payout, execute_refund, money, set_time
from executor.domain.attempt import Attempt, AttemptKind
from executor.domain.health import is_healthy
from executor.domain.outcome import Notification, NotificationKind
from executor.service.execute import Executor
from executor.service.health_board import HealthBoard
from executor.service.notifications import Notifications
from executor.service.ports import Channel, PspAdapter
from kernel.errors import FieldViolation, InvalidArgument
from kernel.money import AMOUNT_MINOR_MAX, CURRENCY_EXPONENTS
from runtime import trace

__all__ = ["SCOPES", "SERVICE_NAME", "ExecutorServicer"]

SERVICE_NAME = "ducat.executor.v1.ExecutorService"
REFERENCE_LENGTH_MAX = 128
"""As the attempt table has it."""
_WRITES = ("ExecuteOrder", "ExecuteRefund", "ExecutePayout")
_READS = ("QueryAttempt", "VerifyNotification", "ListProviders")
SCOPES: dict[str, str] = {
    **{f"/{SERVICE_NAME}/{method}": "executor.write" for method in _WRITES},
    **{f"/{SERVICE_NAME}/{method}": "executor.read" for method in _READS},
}

_KINDS = {kind: executor_pb2.NotificationKind.Value(f"NOTIFICATION_KIND_{kind.name}") for kind in NotificationKind}
_CHANNELS: Mapping[int, Channel] = {
    payment_pb2.NOTIFICATION_CHANNEL_UNSPECIFIED: Channel.PAYMENT,
    payment_pb2.NOTIFICATION_CHANNEL_PAYMENT: Channel.PAYMENT,
    payment_pb2.NOTIFICATION_CHANNEL_PAYOUT: Channel.PAYOUT,
}

_Context = aio.ServicerContext[object, object]


class ExecutorServicer(executor_pb2_grpc.ExecutorServiceServicer):
    """Errors are kernel.errors; the runtime maps them."""

    def __init__(
        self,
        executor: Executor,
        notifications: Notifications,
        health: HealthBoard,
        adapters: Mapping[str, PspAdapter],
    ) -> None:
        self._executor = executor
        self._notifications = notifications
        self._health = health
        self._adapters = adapters

    async def ExecuteOrder(
        self, request: executor_pb2.ExecuteOrderRequest, context: _Context
    ) -> executor_pb2.ExecuteOrderResponse:
        _check("order.payment_order_id", request.order.payment_order_id, "order.amount", request.order.amount)
        attempt = await self._executor.execute(execute_order(request.order), trace.current())
        return executor_pb2.ExecuteOrderResponse(attempt=_attempt(attempt))

    async def ExecuteRefund(
        self, request: executor_pb2.ExecuteRefundRequest, context: _Context
    ) -> executor_pb2.ExecuteRefundResponse:
        _check("refund.refund_id", request.refund.refund_id, "refund.amount", request.refund.amount)
        attempt = await self._executor.execute(execute_refund(request.refund), trace.current())
        return executor_pb2.ExecuteRefundResponse(attempt=_attempt(attempt))

    async def ExecutePayout(
        self, request: executor_pb2.ExecutePayoutRequest, context: _Context
    ) -> executor_pb2.ExecutePayoutResponse:
        attempt = await self._executor.execute(execute_payout(request.payout), trace.current())
        return executor_pb2.ExecutePayoutResponse(attempt=_attempt(attempt))

    async def QueryAttempt(
        self, request: executor_pb2.QueryAttemptRequest, context: _Context
    ) -> executor_pb2.QueryAttemptResponse:
        kind = AttemptKind(request.kind)
        attempt = await self._executor.query(kind, request.merchant_reference, refresh=request.refresh)
        return executor_pb2.QueryAttemptResponse(attempt=_attempt(attempt))

    async def VerifyNotification(
        self, request: executor_pb2.VerifyNotificationRequest, context: _Context
    ) -> executor_pb2.VerifyNotificationResponse:
        channel = _CHANNELS.get(request.channel, Channel.PAYMENT)
        notifications = self._notifications.verify(request.psp, request.headers, request.body, channel)
        return executor_pb2.VerifyNotificationResponse(notifications=[_notification(each) for each in notifications])

    async def ListProviders(
        self, request: executor_pb2.ListProvidersRequest, context: _Context
    ) -> executor_pb2.ListProvidersResponse:
        await self._health.refresh()
        response = executor_pb2.ListProvidersResponse()
        for name, adapter in sorted(self._adapters.items()):
            health = self._health.of(name)
            response.providers.add(
                name=name,
                currency_codes=sorted(adapter.provider.currency_codes),
                capabilities=sorted(capability.value for capability in adapter.provider.capabilities),
                healthy=is_healthy(health),
                failure_count=health.failure_count,
            )
        return response


def _check(id_field: str, reference: str, amount_field: str, amount: common_pb2.Money) -> None:
    """The events that these requests carry have no field rules: on the bus, a rule would only make dead letters."""
    violations = []
    if not 1 <= len(reference) <= REFERENCE_LENGTH_MAX:
        violations.append(FieldViolation(id_field, f"must have 1 to {REFERENCE_LENGTH_MAX} characters"))
    if amount.currency_code not in CURRENCY_EXPONENTS:
        violations.append(FieldViolation(f"{amount_field}.currency_code", "must be an ISO 4217 code such as USD"))
    if not 1 <= amount.amount_minor <= AMOUNT_MINOR_MAX:
        violations.append(FieldViolation(f"{amount_field}.amount_minor", f"must be from 1 to {AMOUNT_MINOR_MAX}"))
    if violations:
        first = violations[0]
        raise InvalidArgument(f"{first.field}: {first.description}", violations=violations)


def _attempt(attempt: Attempt) -> executor_pb2.Attempt:
    message = executor_pb2.Attempt(
        merchant_reference=attempt.reference,
        kind=attempt.kind.value,  # type: ignore[arg-type]
        psp=attempt.psp,
        state=attempt.state.value,  # type: ignore[arg-type]
        psp_object_id=attempt.psp_object_id,
        hosted_page_url=attempt.hosted_page_url,
        code=attempt.code,
        reason=attempt.reason,
        call_count=attempt.call_count,
        compliance=attempt.compliance,
    )
    set_time(message.create_time, attempt.create_time_ns)
    set_time(message.update_time, attempt.update_time_ns)
    if attempt.next_poll_time_ns:
        set_time(message.next_poll_time, attempt.next_poll_time_ns)
    return message


def _notification(notification: Notification) -> executor_pb2.Notification:
    message = executor_pb2.Notification(
        psp_event_id=notification.psp_event_id,
        kind=_KINDS[notification.kind],  # type: ignore[arg-type]
        psp_object_id=notification.psp_object_id,
        merchant_reference=notification.merchant_reference,
        code=notification.code,
        reason=notification.reason,
        psp_type=notification.psp_type,
        psp_payment_id=notification.psp_payment_id,
    )
    if notification.amount is not None:
        message.amount.CopyFrom(money(notification.amount))
    if notification.occur_time_ns:
        set_time(message.occur_time, notification.occur_time_ns)
    return message
