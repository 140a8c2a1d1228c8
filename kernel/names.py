"""Names of wallet and ledger accounts. Both services derive them from the same facts, so they agree without asking
each other."""

from __future__ import annotations

__all__ = ["payout_clearing", "psp_clearing", "seller_disputes", "seller_wallet"]


def seller_wallet(seller_account: str, currency_code: str) -> str:
    """What we owe a seller in one currency."""
    return f"seller/{seller_account}/{currency_code}"


def seller_disputes(seller_account: str, currency_code: str) -> str:
    """What a seller owes us because a PSP took disputed payments back. May go below zero in the wallet, where a seller's
    wallet must not: a dispute cannot be refused for want of money."""
    return f"seller/{seller_account}/disputes/{currency_code}"


def psp_clearing(psp: str, currency_code: str) -> str:
    """What a PSP has captured for us and not settled yet. Striped over all shards in the wallet."""
    return f"psp/{psp}/clearing/{currency_code}"


def payout_clearing(psp: str, currency_code: str) -> str:
    """What a PSP has paid out for us. Striped over all shards in the wallet."""
    return f"psp/{psp}/payouts/{currency_code}"
