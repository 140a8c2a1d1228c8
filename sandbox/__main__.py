"""`python -m sandbox`."""

from __future__ import annotations

from runtime.process import run
from runtime.settings import Settings
from sandbox.bootstrap import serve


async def main() -> None:
    await serve(Settings.load())


if __name__ == "__main__":
    run(main)
