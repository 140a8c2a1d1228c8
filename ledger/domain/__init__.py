"""The rules of the ledger. Pure: no clock, no I/O, no generated stubs."""

from ledger.domain.accounts import AccountKind, AccountNameInvalid, Side, account_of_name, balance_minor
from ledger.domain.journal import EntryInvalid, JournalEntry, Posting
from ledger.domain.posting_rules import RULES, Fact, FactKind, PostingRule, entry_of
from ledger.domain.statement import (
    CurrencySums,
    Movement,
    Statement,
    StatementLine,
    TrialBalance,
    statement_of,
    trial_balance_of,
)

__all__ = [
    "RULES",
    "AccountKind",
    "AccountNameInvalid",
    "CurrencySums",
    "EntryInvalid",
    "Fact",
    "FactKind",
    "JournalEntry",
    "Movement",
    "Posting",
    "PostingRule",
    "Side",
    "Statement",
    "StatementLine",
    "TrialBalance",
    "account_of_name",
    "balance_minor",
    "entry_of",
    "statement_of",
    "trial_balance_of",
]
