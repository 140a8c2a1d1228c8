"""The services of the contract, each method once; ducat/_methods.py makes of it what either client calls."""

from __future__ import annotations

from ducat._methods import AsyncService, BidiStream, ServerStream, SyncService, Unary
from ducat.executor.v1 import executor_pb2
from ducat.ledger.v1 import ledger_pb2
from ducat.payment.v1 import finding_pb2, payment_pb2, payout_pb2
from ducat.wallet.v1 import shard_pb2, wallet_pb2

__all__ = [
    "AsyncExecutor",
    "AsyncLedger",
    "AsyncPayments",
    "AsyncShards",
    "AsyncWallet",
    "Executor",
    "Ledger",
    "Payments",
    "Shards",
    "Wallet",
]


class _PaymentsMethods:
    """ducat.payment.v1.PaymentService."""

    create_payment = Unary(payment_pb2.CreatePaymentRequest, payment_pb2.CreatePaymentResponse)
    get_payment = Unary(payment_pb2.GetPaymentRequest, payment_pb2.GetPaymentResponse)
    get_checkout_page = Unary(payment_pb2.GetCheckoutPageRequest, payment_pb2.GetCheckoutPageResponse)
    list_payments = Unary(payment_pb2.ListPaymentsRequest, payment_pb2.ListPaymentsResponse)
    cancel_payment = Unary(payment_pb2.CancelPaymentRequest, payment_pb2.CancelPaymentResponse)
    watch_payment = ServerStream(payment_pb2.WatchPaymentRequest, payment_pb2.WatchPaymentResponse)
    create_refund = Unary(payment_pb2.CreateRefundRequest, payment_pb2.CreateRefundResponse)
    get_refund = Unary(payment_pb2.GetRefundRequest, payment_pb2.GetRefundResponse)
    list_refunds = Unary(payment_pb2.ListRefundsRequest, payment_pb2.ListRefundsResponse)
    create_payout = Unary(payout_pb2.CreatePayoutRequest, payout_pb2.CreatePayoutResponse)
    get_payout = Unary(payout_pb2.GetPayoutRequest, payout_pb2.GetPayoutResponse)
    list_payouts = Unary(payout_pb2.ListPayoutsRequest, payout_pb2.ListPayoutsResponse)
    cancel_payout = Unary(payout_pb2.CancelPayoutRequest, payout_pb2.CancelPayoutResponse)
    get_payout_instruction = Unary(payout_pb2.GetPayoutInstructionRequest, payout_pb2.GetPayoutInstructionResponse)
    record_notification = Unary(payment_pb2.RecordNotificationRequest, payment_pb2.RecordNotificationResponse)
    list_findings = Unary(finding_pb2.ListFindingsRequest, finding_pb2.ListFindingsResponse)
    resolve_finding = Unary(finding_pb2.ResolveFindingRequest, finding_pb2.ResolveFindingResponse)


class _ExecutorMethods:
    """ducat.executor.v1.ExecutorService."""

    execute_order = Unary(executor_pb2.ExecuteOrderRequest, executor_pb2.ExecuteOrderResponse)
    execute_refund = Unary(executor_pb2.ExecuteRefundRequest, executor_pb2.ExecuteRefundResponse)
    execute_payout = Unary(executor_pb2.ExecutePayoutRequest, executor_pb2.ExecutePayoutResponse)
    query_attempt = Unary(executor_pb2.QueryAttemptRequest, executor_pb2.QueryAttemptResponse)
    verify_notification = Unary(executor_pb2.VerifyNotificationRequest, executor_pb2.VerifyNotificationResponse)
    list_providers = Unary(executor_pb2.ListProvidersRequest, executor_pb2.ListProvidersResponse)


class _WalletMethods:
    """ducat.wallet.v1.WalletService."""

    create_accounts = Unary(wallet_pb2.CreateAccountsRequest, wallet_pb2.CreateAccountsResponse)
    update_accounts = Unary(wallet_pb2.UpdateAccountsRequest, wallet_pb2.UpdateAccountsResponse)
    get_accounts = Unary(wallet_pb2.GetAccountsRequest, wallet_pb2.GetAccountsResponse)
    list_accounts = Unary(wallet_pb2.ListAccountsRequest, wallet_pb2.ListAccountsResponse)
    create_transfers = Unary(wallet_pb2.CreateTransfersRequest, wallet_pb2.CreateTransfersResponse)
    submit_transfers = BidiStream(wallet_pb2.SubmitTransfersRequest, wallet_pb2.SubmitTransfersResponse)
    get_transfers = Unary(wallet_pb2.GetTransfersRequest, wallet_pb2.GetTransfersResponse)
    list_account_transfers = Unary(wallet_pb2.ListAccountTransfersRequest, wallet_pb2.ListAccountTransfersResponse)
    get_balance = Unary(wallet_pb2.GetBalanceRequest, wallet_pb2.GetBalanceResponse)
    watch_events = ServerStream(wallet_pb2.WatchEventsRequest, wallet_pb2.WatchEventsResponse)


class _ShardsMethods:
    """ducat.wallet.v1.ShardService."""

    list_shards = Unary(shard_pb2.ListShardsRequest, shard_pb2.ListShardsResponse)
    create_snapshot = Unary(shard_pb2.CreateSnapshotRequest, shard_pb2.CreateSnapshotResponse, idempotent=False)
    list_snapshots = Unary(shard_pb2.ListSnapshotsRequest, shard_pb2.ListSnapshotsResponse)
    verify_shard = ServerStream(shard_pb2.VerifyShardRequest, shard_pb2.VerifyShardResponse)
    check_balances = Unary(shard_pb2.CheckBalancesRequest, shard_pb2.CheckBalancesResponse)
    rebuild_read_model = Unary(shard_pb2.RebuildReadModelRequest, shard_pb2.RebuildReadModelResponse)
    list_account_names = Unary(shard_pb2.ListAccountNamesRequest, shard_pb2.ListAccountNamesResponse)
    read_booked_balances = Unary(shard_pb2.ReadBookedBalancesRequest, shard_pb2.ReadBookedBalancesResponse)


class _LedgerMethods:
    """ducat.ledger.v1.LedgerService."""

    get_account = Unary(ledger_pb2.GetAccountRequest, ledger_pb2.GetAccountResponse)
    list_accounts = Unary(ledger_pb2.ListAccountsRequest, ledger_pb2.ListAccountsResponse)
    list_journal_entries = Unary(ledger_pb2.ListJournalEntriesRequest, ledger_pb2.ListJournalEntriesResponse)
    get_trial_balance = Unary(ledger_pb2.GetTrialBalanceRequest, ledger_pb2.GetTrialBalanceResponse)
    get_statement = Unary(ledger_pb2.GetStatementRequest, ledger_pb2.GetStatementResponse)
    import_settlement = Unary(ledger_pb2.ImportSettlementRequest, ledger_pb2.ImportSettlementResponse)
    list_breaks = Unary(ledger_pb2.ListBreaksRequest, ledger_pb2.ListBreaksResponse)
    resolve_break = Unary(ledger_pb2.ResolveBreakRequest, ledger_pb2.ResolveBreakResponse)
    compare_wallet = Unary(ledger_pb2.CompareWalletRequest, ledger_pb2.CompareWalletResponse)


class Payments(_PaymentsMethods, SyncService):
    """ducat.payment.v1.PaymentService, blocking."""


class AsyncPayments(_PaymentsMethods, AsyncService):
    """ducat.payment.v1.PaymentService, awaitable."""


class Executor(_ExecutorMethods, SyncService):
    """ducat.executor.v1.ExecutorService, blocking."""


class AsyncExecutor(_ExecutorMethods, AsyncService):
    """ducat.executor.v1.ExecutorService, awaitable."""


class Wallet(_WalletMethods, SyncService):
    """ducat.wallet.v1.WalletService, blocking."""


class AsyncWallet(_WalletMethods, AsyncService):
    """ducat.wallet.v1.WalletService, awaitable."""


class Shards(_ShardsMethods, SyncService):
    """ducat.wallet.v1.ShardService, blocking."""


class AsyncShards(_ShardsMethods, AsyncService):
    """ducat.wallet.v1.ShardService, awaitable."""


class Ledger(_LedgerMethods, SyncService):
    """ducat.ledger.v1.LedgerService, blocking."""


class AsyncLedger(_LedgerMethods, AsyncService):
    """ducat.ledger.v1.LedgerService, awaitable."""
