"""The executor over gRPC: verifies and translates webhook calls."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC

import grpc
import grpc.aio

from ducat.executor.v1.executor_pb2 import Notification as NotificationMessage
from ducat.executor.v1.executor_pb2 import VerifyNotificationRequest
from ducat.executor.v1.executor_pb2_grpc import ExecutorServiceStub
from payment.domain.notification import Notification, NotificationKind
from runtime.errors import from_rpc_error

__all__ = ["ExecutorClient", "clean", "kind_of"]


class ExecutorClient:
    """Implements payment.service.ports.NotificationVerifier."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._verify = ExecutorServiceStub(channel).VerifyNotification

    async def verify(self, psp: str, body: bytes, headers: Mapping[str, str], channel: int) -> list[Notification]:
        """Raises PermissionDenied for a signature that does not hold, InvalidArgument, Unavailable; see the
        executor's contract.
        """
        request = VerifyNotificationRequest(psp=psp, body=body, headers=headers, channel=channel)  # type: ignore[arg-type]
        try:
            response = await self._verify(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return [_notification_of(psp, each) for each in response.notifications]


def kind_of(number: int) -> NotificationKind:
    """A kind that a newer executor knows and we do not means nothing to us."""
    try:
        return NotificationKind(number)
    except ValueError:
        return NotificationKind.UNKNOWN


def clean(text: str) -> str:
    """Text of a PSP without the character NUL, which PostgreSQL cannot store: it must not make a webhook fail for ever."""
    return text.replace("\0", "") if "\0" in text else text


def _notification_of(psp: str, message: NotificationMessage) -> Notification:
    has_amount = message.HasField("amount")
    return Notification(
        psp=psp,
        psp_event_id=clean(message.psp_event_id),
        kind=kind_of(message.kind),
        psp_object_id=clean(message.psp_object_id),
        merchant_reference=clean(message.merchant_reference),
        currency_code=clean(message.amount.currency_code) if has_amount else "",
        amount_minor=message.amount.amount_minor if has_amount else None,
        code=clean(message.code),
        reason=clean(message.reason),
        psp_type=clean(message.psp_type),
        occur_time=message.occur_time.ToDatetime(UTC) if message.HasField("occur_time") else None,
        psp_payment_id=clean(message.psp_payment_id),
    )
