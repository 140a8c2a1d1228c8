"""Starts `python -m MODULE` by forking a process that has imported the module already: 0.2 CPU seconds for a service in place of one.

For tests that start the same service again and again and look at what it does, not at how it is started. The server process has one
thread and has opened nothing, so a child is what a fresh interpreter would be after its imports. Killing a child is killing it: what
waits for it, a process of its own, only tells how it ended.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["ForkedProcess", "start"]

ROOT = Path(__file__).parents[1]
REQUEST_BYTES_MAX = 1 << 20
ALSO = {"ops": ("ops.wallet", "ops.feed", "ops.check", "ops.backup")}
"""What a module imports later."""


class ForkedProcess:
    """What `asyncio.create_subprocess_exec` would have given: pid, stdout, returncode, and its ways to end."""

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader | None, status: asyncio.StreamReader
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._ended = asyncio.create_task(self._see_end(status))

    async def _see_end(self, status: asyncio.StreamReader) -> int:
        self.returncode = int(await status.readline())
        return self.returncode

    async def wait(self) -> int:
        """The exit code; minus the signal's number where one ended it."""
        return await asyncio.shield(self._ended)

    async def communicate(self) -> tuple[bytes, bytes]:
        """All that it says, until its end."""
        said = await asyncio.gather(self.stdout.read(), *([self.stderr.read()] if self.stderr else []))
        await self.wait()
        return said[0], said[1] if self.stderr else b""

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


async def start(
    module: str, *words: str, env: Mapping[str, str] | None = None, keep_stderr: bool = False
) -> ForkedProcess:
    """`python -m module words…`; its stderr is the caller's, or a stream of its own."""
    request = json.dumps({"module": module, "words": words, "env": dict(os.environ if env is None else env)}).encode()
    pipes = [os.pipe() for _ in range(3 if keep_stderr else 2)]
    try:
        fds = [written for _, written in pipes] + ([] if keep_stderr else [2])
        _server(module).sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    finally:
        for _, written in pipes:
            os.close(written)
    status, stdout, *stderr = [await _reader(read) for read, _ in pipes]
    return ForkedProcess(int(await status.readline()), stdout, stderr[0] if stderr else None, status)


async def _reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
    )
    return reader


@cache
def _server(module: str) -> socket.socket:
    """The server that has imported `module`; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES_MAX)
    subprocess.Popen([sys.executable, __file__, module], stdin=theirs.fileno(), cwd=ROOT)
    theirs.close()
    return ours


def _serve(module: str) -> None:
    sys.path[0] = str(ROOT)
    import_module(f"{module}.__main__")
    del sys.modules[f"{module}.__main__"]  # a child runs it as its main program
    for imported in ALSO.get(module, ()):
        import_module(imported)
    signal.signal(signal.SIGCHLD, _reap)
    requests = socket.socket(fileno=os.dup(0))
    while True:
        request, ancillary, _, _ = requests.recvmsg(REQUEST_BYTES_MAX, socket.CMSG_SPACE(3 * 4))
        if not request:
            return
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        if os.fork() == 0:
            requests.close()
            _watch_child(request, *fds)
        for fd in fds:
            os.close(fd)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch_child(request: bytes, status: int, stdout: int, stderr: int) -> None:
    """Forks the child and tells its pid and how it ended. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _be_child(json.loads(request), stdout, stderr)
    os.close(stdout)
    os.close(stderr)
    os.write(status, f"{pid}\n".encode())
    _, ended = os.waitpid(pid, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    os._exit(0)


def _be_child(request: dict[str, Any], stdout: int, stderr: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(fd, place)
    for fd in (null, stdout, stderr):
        if fd > 2:
            os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    random.seed()
    sys.argv = [f"-m {request['module']}", *request["words"]]
    code = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
