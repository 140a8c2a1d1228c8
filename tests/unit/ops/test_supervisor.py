"""Risk: the supervisor stops watching a process, which then hangs on its full pipe or is never started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from ops.platform import ManagedProcess, Platform


async def test_a_line_without_end_does_not_end_the_watch(tmp_path: Path) -> None:
    code = "print('x' * 300_000); print('ready thing 127.0.0.1:1', flush=True)"
    platform = Platform(tmp_path, free_ports=True, env={})
    process = ManagedProcess("thing", [sys.executable, "-c", code], dict(os.environ), tmp_path / "thing.log")
    await platform._spawn(process)
    watch = asyncio.create_task(platform._watch(process))
    try:
        await asyncio.wait_for(process.ready.wait(), 30)
        assert process.address == "127.0.0.1:1"
        assert not watch.done()
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        if process.pid is not None:
            process.child.kill()  # type: ignore[union-attr]
            await process.child.wait()  # type: ignore[union-attr]
