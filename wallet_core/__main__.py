"""`python -m wallet_core`: a wallet process."""

from __future__ import annotations

from runtime.process import run
from wallet_core.bootstrap import main

if __name__ == "__main__":
    run(main)
