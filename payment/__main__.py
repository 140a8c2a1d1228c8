"""`python -m payment`: the payment process."""

from __future__ import annotations

from payment.bootstrap import main
from runtime.process import run

if __name__ == "__main__":
    run(main)
