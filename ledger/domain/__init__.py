"""The rules of the ledger. Pure: no clock, no I/O, no generated stubs."""

from ledger.domain.accounts import (
    CHART_PREFIXES,
    AccountKind,
    AccountNameInvalid,
    Side,
    account_of_name,
    balance_minor,
)
from ledger.domain.comparison import (
    Applied,
    Difference,
    LateEntry,
    Progress,
    applied_by_all,
    differences_of,
    lacking,
)
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
    "CHART_PREFIXES",
    "RULES",
    "AccountKind",
    "AccountNameInvalid",
    "Applied",
    "CurrencySums",
    "Difference",
    "EntryInvalid",
    "Fact",
    "FactKind",
    "JournalEntry",
    "LateEntry",
    "Movement",
    "Posting",
    "PostingRule",
    "Progress",
    "Side",
    "Statement",
    "StatementLine",
    "TrialBalance",
    "account_of_name",
    "applied_by_all",
    "balance_minor",
    "differences_of",
    "entry_of",
    "lacking",
    "statement_of",
    "trial_balance_of",
]
