"""`python -m ledger`: the ledger process."""

from __future__ import annotations

from ledger.bootstrap import main
from runtime.process import run

if __name__ == "__main__":
    run(main)
