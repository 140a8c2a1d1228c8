"""`python -m executor`: the executor process."""

from __future__ import annotations

from executor.bootstrap import serve
from runtime.process import run
from runtime.settings import Settings


async def main() -> None:
    await serve(Settings.load())


if __name__ == "__main__":
    run(main)
