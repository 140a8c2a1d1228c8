"""A service: moves money between wallets by single gRPC calls, with the synchronous stubs under gevent."""

from __future__ import annotations

import os
import time
import uuid

from locust import User, constant, task

import ducat
from ducat.wallet.v1 import wallet_pb2
from kernel.ids import uuid7

ACCOUNT_COUNT = 20


class TransferUser(User):
    """Each task is one durable transfer between two of this user's own wallets."""

    wait_time = constant(0)
    weight = 1

    def on_start(self) -> None:
        self.channel = ducat.Client(wallet_address=os.environ.get("DUCAT_WALLET_ADDRESS", "127.0.0.1:50053"))
        self.accounts = [uuid.uuid4().bytes for _ in range(ACCOUNT_COUNT)]
        self.turn = 0
        self.channel.wallet.create_accounts(
            wallet_pb2.CreateAccountsRequest(
                accounts=[
                    wallet_pb2.AccountSpec(account_id=account, currency_code="USD", may_overdraw=True)
                    for account in self.accounts
                ]
            )
        )

    def on_stop(self) -> None:
        self.channel.close()

    @task
    def transfer(self) -> None:
        self.turn += 1
        started = time.perf_counter()
        error: Exception | None = None
        request = wallet_pb2.CreateTransfersRequest(
            transfers=[
                wallet_pb2.Transfer(
                    transfer_id=uuid7(time.time_ns() // 1_000_000, os.urandom(10)),
                    debit_account_id=self.accounts[self.turn % ACCOUNT_COUNT],
                    credit_account_id=self.accounts[(self.turn + 1) % ACCOUNT_COUNT],
                    amount_minor=1,
                )
            ]
        )
        try:
            answer = self.channel.wallet.create_transfers(request)
            if list(answer.results) != [wallet_pb2.TRANSFER_RESULT_OK]:
                error = RuntimeError(wallet_pb2.TransferResult.Name(answer.results[0]))
        except ducat.DucatError as problem:
            error = problem
        self.environment.events.request.fire(
            request_type="gRPC",
            name="CreateTransfers (1)",
            response_time=(time.perf_counter() - started) * 1000,
            response_length=0,
            exception=error,
            context={},
        )
