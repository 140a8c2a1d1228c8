"""What both embedded servers share: the life of the child process, ports, socket folders, generated passwords, and processes left by a
killed run."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "EmbeddedServer",
    "Owner",
    "ServerFailed",
    "child_command",
    "free_port",
    "kept_port",
    "kept_secret",
    "private_folder",
    "socket_folder",
    "stop_leftover",
    "tail",
]

SOCKET_PATH_BYTES_MAX = 100
"""A Unix socket address holds 107 bytes on Linux, 103 on macOS."""
LEFTOVER_STOP_S = 20.0
STOP_TIMEOUT_S = 30.0
READY_LOOK_S = 0.02
LOCK_WAIT_S = 20.0
"""After a SIGKILL the last processes of a PostgreSQL may still be ending."""
FREE_PORTS = range(18_000, 32_000)
CHILD = Path(__file__).with_name("_child.py")


class ServerFailed(RuntimeError):
    """An embedded server does not start; the message holds the end of its log."""


class EmbeddedServer:
    """A server that runs as a child process of ours, on a folder of its own. On Linux it stops when we die, however that happens."""

    name = ""
    """For people."""
    clean_stop = signal.SIGTERM
    """The signal that makes it write what is left to write and end."""

    def __init__(self, folder: str | Path, port: int) -> None:
        self.folder = Path(folder).absolute()
        self.data = self.folder / "data"
        self.log_file = self.folder / "log"
        self._wanted_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._port = 0
        self._password = ""

    @property
    def pid(self) -> int | None:
        """Process id of the server, None when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The child of the last start, for a supervisor that waits for its end."""
        return self._process

    def kill(self) -> None:
        """SIGKILL, as a crash would; for tests of recovery."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def _only_server(self) -> Iterator[None]:
        """Holds the lock of the folder, for the start. The server inherits it, with its children, and so it is held until the last of
        them has ended, wherever a server that was left behind cannot be found. Raises ServerFailed.
        """
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + LOCK_WAIT_S
            while not _is_locked_by_us(self._lock):
                if time.monotonic() > deadline:
                    raise ServerFailed(
                        f"a {self.name} of an earlier run still uses {self.folder}; stop it and start again, "
                        "or choose another data folder"
                    )
                time.sleep(READY_LOOK_S)
            yield
        finally:
            os.close(self._lock)
            self._lock = None

    def _spawn(self, command: list[str], owner: Owner | None = None, **options: Any) -> None:
        """Starts the child; its output goes to the log.

        The kernel takes the *thread* that forked for the parent: where that thread ended, the server would. So a thread of its own forks
        each server and lives as long as the server does.
        """
        started: Future[subprocess.Popen[bytes]] = Future()

        def keep() -> None:
            try:
                with _open_log(self.log_file) as log:
                    process = subprocess.Popen(  # noqa: S603
                        child_command(command, self.clean_stop, owner),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=() if self._lock is None else (self._lock,),
                        **options,
                    )
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(process)
            process.wait()

        try:
            threading.Thread(target=keep, name=f"embedded {self.name}", daemon=True).start()
        except RuntimeError as error:
            raise ServerFailed(f"{self.name} does not start: {error}") from error
        self._process = started.result()

    def _end(self, firmly: signal.Signals) -> None:
        """Ends the child, `firmly` where it does not end in time. No effect when it does not run."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(self.clean_stop)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(firmly)
            process.wait(STOP_TIMEOUT_S)

    def _wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Raises ServerFailed where the child ends, or is not ready in time."""
        process = self._process
        assert process is not None
        deadline = time.monotonic() + timeout_s
        while True:
            if process.poll() is not None:
                raise self._failed(f"ended with {process.returncode}")
            if is_ready():
                return
            if time.monotonic() > deadline:
                process.kill()
                raise self._failed(f"is not ready after {timeout_s:g} s")
            time.sleep(READY_LOOK_S)

    def _failed(self, how: str) -> ServerFailed:
        return ServerFailed(f"{self.name} {how}; end of {self.log_file}:\n{tail(self.log_file)}")


@dataclass(frozen=True)
class Owner:
    """Whom a server runs as, when we are root."""

    uid: int
    gid: int
    may_search: bool
    """Whether it needs CAP_DAC_READ_SEARCH to get to its folders."""


def child_command(command: list[str], at_our_death: signal.Signals, owner: Owner | None = None) -> list[str]:
    """`command`, by way of _child.py. A process that gave up its rights may not be able to run its own interpreter: without it then.

    Never without it for an `owner`: what is to run as somebody else would run as root.
    """
    if not (os.access(sys.executable, os.X_OK) and os.access(CHILD, os.R_OK)):
        if owner is not None:
            raise ServerFailed(
                f"{command[0]} must not run as root, and {sys.executable} or {CHILD} cannot be used to become uid {owner.uid}; "
                "make both readable and executable, or start as an ordinary user"
            )
        return command
    asked = {
        "parent": os.getpid(),
        "at_its_death": int(at_our_death),
        "owner": [owner.uid, owner.gid] if owner is not None else None,
        "may_search": owner is not None and owner.may_search,
    }
    return [sys.executable, "-I", "-S", str(CHILD), json.dumps(asked), *command]


def free_port() -> int:
    """A TCP port that is free on the loopback now, below those that outgoing connections get: one of them could otherwise take it
    before its server listens.
    """
    for port in random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerFailed(f"no port from {FREE_PORTS.start} to {FREE_PORTS.stop} is free on 127.0.0.1")


def kept_port(file: Path, wanted: int = 0) -> int:
    """The port of the last run when it is free, so that addresses survive a restart; else a new one, which is then kept."""
    kept = file.read_text() if file.exists() else ""
    candidates = [wanted] if wanted else [int(kept)] if kept.isdigit() and 1024 <= int(kept) < 65_536 else []
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                if wanted:
                    raise ServerFailed(f"port {wanted} is taken on 127.0.0.1; choose another or 0 for any") from None
                continue
        file.write_text(str(port))
        return port
    port = free_port()
    file.write_text(str(port))
    return port


def kept_secret(file: Path) -> str:
    """The password in `file` (mode 600), made up on the first call. It is there whole or not at all: with half of one no server starts."""
    if not file.exists():
        beside = file.with_name(f"{file.name}.new")
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_urlsafe(24))
            opened.flush()
            os.fsync(opened.fileno())
        beside.rename(file)
    return file.read_text()


def private_folder(folder: Path, owner: tuple[int, int] | None = None, mode: int = 0o700) -> Path:
    """Make `folder`, mode 700 (711: others may pass through); `owner` (uid, gid) gets this folder alone, never one above it."""
    folder.mkdir(parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) != mode:
        folder.chmod(mode)
    if owner is not None and folder.stat().st_uid != owner[0]:
        os.chown(folder, *owner)
    return folder


def socket_folder(home: Path, file_name: str, owner: tuple[int, int] | None = None) -> Path:
    """A private folder for a Unix socket: in `home`, or under the temporary folder where that path is too long for a socket."""
    folder = home / "socket"
    if len(os.fsencode(folder / file_name)) > SOCKET_PATH_BYTES_MAX:
        digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"ducat-{os.getuid()}-{digest}"
        if len(os.fsencode(folder / file_name)) > SOCKET_PATH_BYTES_MAX:
            folder = Path("/tmp") / folder.name  # noqa: S108 - mode 700 and ownership are checked below
        if folder.is_symlink() or (folder.exists() and folder.stat().st_uid not in {os.getuid(), *(owner or ())[:1]}):
            raise ServerFailed(f"{folder} belongs to someone else; remove it or use a shorter data folder")
    return private_folder(folder, owner)


def stop_leftover(pid: int, home: Path, how: signal.Signals) -> None:
    """Stop the server of a killed run if `pid` still is one: its working folder is `home`. Any other process is left alone."""
    if not _is_ours(pid, home):
        return
    deadline = time.monotonic() + LEFTOVER_STOP_S
    os.kill(pid, how)
    while _is_ours(pid, home):
        if time.monotonic() > deadline:
            raise ServerFailed(f"process {pid} of an earlier run still uses {home}; stop it and start again")
        time.sleep(0.05)


def _is_ours(pid: int, home: Path) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return False
        return Path(os.readlink(f"/proc/{pid}/cwd")) == home.resolve()
    except OSError:
        return False


def _is_locked_by_us(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _open_log(file: Path) -> BinaryIO:
    """To append to, mode 600: a statement that fails stands there with its data."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.fchmod(descriptor, 0o600)  # it may be older than the rule
    return os.fdopen(descriptor, "ab")


def tail(file: Path, line_count: int = 15) -> str:
    """The last lines of a log, for an error's message."""
    if not file.exists():
        return "(no log)"
    return "\n".join(file.read_text(errors="replace").splitlines()[-line_count:])
