"""`python -m gateway`: the gateway process."""

from __future__ import annotations

from gateway.bootstrap import main
from runtime.process import run

if __name__ == "__main__":
    run(main)
