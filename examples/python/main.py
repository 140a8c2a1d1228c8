"""Creates a payment and watches it, sends 100,000 transfers as columns, and reads the details of an error.

Exit code 0 means that everything came out as it should. See ../README.md.
"""

from __future__ import annotations

import os
import sys
import time
import uuid

import ducat
from ducat.batch import account_ids, failed_transfers, transfer_batches, transfer_ids
from ducat.common.v1 import common_pb2
from ducat.ids import account_id
from ducat.payment.v1 import payment_pb2
from ducat.wallet.v1 import wallet_pb2

TRANSFER_COUNT = 100_000
WATCH_TIMEOUT_S = 30
SUBMIT_TIMEOUT_S = 60
RUN = f"example-python-{uuid.uuid4().hex[:12]}"
"""Part of every id, so that the program can run again and again."""


def main() -> None:
    """Runs the parts against a platform. Beyond loopback, add tls=ducat.TLS(): the token is a secret."""
    with ducat.Client(
        payment_address=os.environ.get("DUCAT_PAYMENT_ADDRESS", "127.0.0.1:50051"),
        wallet_address=os.environ.get("DUCAT_WALLET_ADDRESS", "127.0.0.1:50053"),
        token=os.environ.get("DUCAT_AUTH_TOKEN", ""),
    ) as client:
        create_and_watch(client)
        submit_transfers(client)
        read_error(client)


def order(currency_code: str) -> payment_pb2.PaymentOrderSpec:
    """An order of 75.00 of a currency with two decimals."""
    return payment_pb2.PaymentOrderSpec(
        payment_order_id=f"{RUN}-order",
        seller_account="SELL-1",
        amount=common_pb2.Money(currency_code=currency_code, amount_minor=7500),
    )


def create_and_watch(client: ducat.Client) -> None:
    """A payment that nobody pays: the program cancels it, and the stream ends because it is done."""
    buyer = payment_pb2.BuyerInfo(buyer_id="BUYER-1")
    # The checkout_id is the idempotency key: sent again with the same content, this creates nothing new.
    created = client.payments.create_payment(checkout_id=RUN, buyer_info=buyer, payment_orders=[order("USD")])
    print(f"payment {RUN}: the buyer pays at {created.payment.checkout_url}")
    state = payment_pb2.PAYMENT_ORDER_STATE_UNSPECIFIED
    is_canceled = False
    with client.payments.watch_payment(checkout_id=RUN, timeout_s=WATCH_TIMEOUT_S) as changes:
        for change in changes:
            state = change.payment.payment_orders[0].state
            print(f"payment {RUN}: {payment_pb2.PaymentOrderState.Name(state)}")
            if not is_canceled:
                client.payments.cancel_payment(checkout_id=RUN, reason="example")
                is_canceled = True
    check("state of the order", payment_pb2.PAYMENT_ORDER_STATE_CANCELED, state)


def submit_transfers(client: ducat.Client) -> None:
    """From one account to another, 8,190 rows a message, all on one stream."""
    # The test vector of Account.account_id in ducat/wallet/v1/wallet.proto.
    vector = uuid.UUID(bytes=account_id("seller/SELL-XYZ-1/USD"))
    check("id of an account", uuid.UUID("966741c5-a471-5827-a8ed-45db1b337188"), vector)
    source, target = f"example/{RUN}/source", f"example/{RUN}/target"
    opened = client.wallet.create_accounts(
        accounts=[
            wallet_pb2.AccountSpec(account_id=account_id(source), name=source, currency_code="USD", may_overdraw=True),
            wallet_pb2.AccountSpec(account_id=account_id(target), name=target, currency_code="USD"),
        ]
    )
    check("opened accounts", [wallet_pb2.ACCOUNT_RESULT_OK] * 2, list(opened.results))

    amounts = [1 + row % 100 for row in range(TRANSFER_COUNT)]
    batches = transfer_batches(
        transfer_ids(TRANSFER_COUNT),
        account_ids([source]) * TRANSFER_COUNT,
        account_ids([target]) * TRANSFER_COUNT,
        amounts,
    )
    begin_s = time.perf_counter()
    row_count = 0
    requests = (wallet_pb2.SubmitTransfersRequest(batch=batch) for batch in batches)
    with client.wallet.submit_transfers(requests, timeout_s=SUBMIT_TIMEOUT_S) as answers:
        for answer in answers:  # in any order: batch_id says which
            check(f"failed rows of batch {answer.result.batch_id}", [], failed_transfers(answer.result))
            row_count += answer.result.row_count
    seconds = time.perf_counter() - begin_s
    check("transfers", TRANSFER_COUNT, row_count)
    print(f"{TRANSFER_COUNT} transfers in {seconds:.2f} s: {TRANSFER_COUNT / seconds:.0f} a second, all durable")

    accounts = client.wallet.get_accounts(names=[source, target]).accounts
    balances = {account.name: account.balance_minor for account in accounts}
    print(f"balances: {balances}")
    check("balances", {source: -sum(amounts), target: sum(amounts)}, balances)


def read_error(client: ducat.Client) -> None:
    """The client has decoded google.rpc.ErrorInfo and BadRequest: they are `reason` and `violations`."""
    try:
        client.payments.create_payment(
            checkout_id=f"{RUN}-bad",
            buyer_info=payment_pb2.BuyerInfo(buyer_id="BUYER-1"),
            payment_orders=[order("dollars")],
        )
    except ducat.errors.InvalidArgument as error:
        for violation in error.violations:
            print(f"refused: {error.reason}, {violation.field}: {violation.description}")
        check("reason", "INVALID_ARGUMENT", error.reason)
        fields = [violation.field for violation in error.violations]
        check("fields", ["payment_orders[0].amount.currency_code"], fields)
    else:
        sys.exit("a payment in the currency 'dollars' was not refused")


def check(what: str, expected: object, got: object) -> None:
    """Ends the program where something came out otherwise."""
    if expected != got:
        sys.exit(f"{what}: expected {expected}, got {got}")


if __name__ == "__main__":
    try:
        main()
    except ducat.DucatError as error:
        sys.exit(f"{error.method}: {error}")
