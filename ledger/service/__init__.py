"""The use cases of the ledger, and the ports that they own."""

from ledger.service.ports import AccountRow, EntryRow, Journal, Received
from ledger.service.post_facts import EntryContradicted, PostFacts
from ledger.service.read_ledger import ReadLedger

__all__ = ["AccountRow", "EntryContradicted", "EntryRow", "Journal", "PostFacts", "ReadLedger", "Received"]
