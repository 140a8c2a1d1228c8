"""Reads payout instructions from the payment service."""

from __future__ import annotations

import grpc.aio

from ducat.payment.v1 import payment_service_pb2_grpc, payout_pb2
from executor.domain.command import PayoutInstruction, Recipient
from kernel.money import Money
from runtime.errors import typed_rpc_errors

__all__ = ["GrpcPayoutInstructions"]

_SENDABLE = frozenset(
    {
        payout_pb2.PAYOUT_STATE_PENDING,
        payout_pb2.PAYOUT_STATE_PROCESSING,
        payout_pb2.PAYOUT_STATE_COMPLETED,
    }
)
"""Later states than PENDING too: the webhook may be here before the PSP's answer to a call that is being made again."""

_ADDRESS = ("line1", "line2", "city", "region", "postal_code", "country_code")


class GrpcPayoutInstructions:
    """`executor.service.ports.PayoutInstructions` over gRPC; needs the scope `payouts.instruct`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = payment_service_pb2_grpc.PaymentServiceStub(channel)

    async def read(self, reference: str) -> PayoutInstruction:
        with typed_rpc_errors():
            answer: payout_pb2.GetPayoutInstructionResponse = await self._stub.GetPayoutInstruction(
                payout_pb2.GetPayoutInstructionRequest(reference=reference)
            )
        account = answer.recipient
        kind = account.WhichOneof("bank_identifier") or ""
        address = {name: getattr(account.address, name) for name in _ADDRESS if getattr(account.address, name)}
        return PayoutInstruction(
            reference=answer.reference,
            amount=Money(answer.amount.currency_code, answer.amount.amount_minor),
            recipient=Recipient(
                account_holder_name=account.account_holder_name,
                country_code=account.country_code,
                account_number=account.account_number,
                bank_name=account.bank_name,
                identifier_kind=kind,
                identifier=getattr(account, kind) if kind else "",
                bic=account.bic,
                address=address,
            ),
            purpose=answer.purpose,
            psp=answer.psp,
            sendable=answer.state in _SENDABLE,
        )
