"""The use cases of the ledger, and the ports that they own."""

from ledger.service.compare_wallet import (
    Books,
    CompareWallet,
    Comparison,
    ProcessProgress,
    Tell,
    Wallet,
    WalletLook,
    WalletProcess,
)
from ledger.service.ports import AccountRow, EntryRow, Journal, Received
from ledger.service.post_facts import EntryContradicted, PostFacts
from ledger.service.read_ledger import ReadLedger

__all__ = [
    "AccountRow",
    "Books",
    "CompareWallet",
    "Comparison",
    "EntryContradicted",
    "EntryRow",
    "Journal",
    "PostFacts",
    "ProcessProgress",
    "ReadLedger",
    "Received",
    "Tell",
    "Wallet",
    "WalletLook",
    "WalletProcess",
]
