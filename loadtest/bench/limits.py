"""What the machine itself allows, measured beside every benchmark: syncs, bandwidth, empty gRPC."""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

__all__ = ["CHANNEL_OPTIONS", "disk_limits", "echo_server", "fresh_memory_bytes_per_second", "main"]

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
SYNC_S = 1.0
SMALL_BYTES, LARGE_BYTES = 4096, 1 << 20
FRESH_BYTES = 64 << 20


def disk_limits(folder: Path) -> dict[str, float]:
    """fdatasyncs a second after 4 KiB writes, and bytes a second at 1 MiB writes with an fdatasync each, in that
    folder.
    """
    return {
        "fdatasync_4k_per_second": _writes_per_second(folder / "limit-4k", SMALL_BYTES),
        "fdatasync_1m_bytes_per_second": _writes_per_second(folder / "limit-1m", LARGE_BYTES) * LARGE_BYTES,
    }


def fresh_memory_bytes_per_second() -> float:
    """How fast memory that nothing has used yet becomes usable. Where a hypervisor hands it out page by page that is a limit
    of its own: every new transfer id needs 30 bytes of it, whatever the engine does.
    """
    memory = mmap.mmap(-1, FRESH_BYTES)
    try:
        memory.madvise(getattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NORMAL))
        started = time.perf_counter()
        for at in range(0, FRESH_BYTES, mmap.PAGESIZE):
            memory[at] = 1
        return FRESH_BYTES / (time.perf_counter() - started)
    finally:
        memory.close()


def _writes_per_second(path: Path, size: int) -> float:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        length = 64 * LARGE_BYTES
        os.posix_fallocate(file, 0, length)
        os.fsync(file)
        block, offset, count = os.urandom(size), 0, 0
        started = time.perf_counter()
        while time.perf_counter() - started < SYNC_S:
            os.pwrite(file, block, offset)
            os.fdatasync(file)
            offset = (offset + size) % length
            count += 1
        return count / (time.perf_counter() - started)
    finally:
        os.close(file)
        path.unlink()


class _Echo(grpc.GenericRpcHandler):
    """An empty unary call, and a stream that answers every message with the same few bytes: gRPC with the engine
    left out.
    """

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == "/bench.Echo/Unary":
            return grpc.unary_unary_rpc_method_handler(_unary)
        if handler_call_details.method == "/bench.Echo/Stream":
            return grpc.stream_stream_rpc_method_handler(_stream)
        return None


async def _unary(request: bytes, context: Any) -> bytes:
    return request


async def _stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield b"\x0a\x00"


async def echo_server() -> None:
    """Serves until stdin ends; prints its port."""
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready echo 127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


def main() -> None:
    import uvloop

    uvloop.run(echo_server())


if __name__ == "__main__":
    main()
