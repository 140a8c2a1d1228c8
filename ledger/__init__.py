"""The ledger: every movement of money as a balanced journal entry, written once, never changed."""
