"""The platform on one machine: embedded servers and every process of Ducat, started, watched, restarted,
stopped in order.

`ducat up`, `ducat demo`, `ducat loadtest` and the end-to-end tests all stand on this one class, so what they run is
what users run.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import aiohttp

import ducat
import ducat.aio
from runtime.embedded import EmbeddedPostgres, EmbeddedValkey, ServerFailed, free_port, private_folder
from runtime.settings import Settings, split_address
from runtime.unfinished import check_finished

__all__ = ["PROCESSES", "DataFolderBusy", "Platform", "ProcessFailed"]

PROCESSES: dict[str, str] = {
    "wallet": "wallet_core",
    "ledger": "ledger",
    "payment": "payment",
    "executor": "executor",
    "sandbox": "sandbox",
    "gateway": "gateway",
}
"""Name of each process → the package that `python -m` runs."""

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
RESTART_DELAY_S_MIN = 0.2
RESTART_DELAY_S_MAX = 10.0
SERVER_LOOK_S = 0.25
EXIT_REFUSED = 2
"""Of a process whose settings, database or port are not as it needs them: another start would end the same way."""
RESTART_FORGET_S = 30.0
"""A process that ran this long starts again at the shortest delay."""

_PR_SET_PDEATHSIG = 1


class DataFolderBusy(Exception):
    """Another `ducat up` runs on the same data folder."""


class ProcessFailed(Exception):
    """A process or an embedded server did not become ready; the message has the end of its log."""


@dataclass
class ManagedProcess:
    """One child process and what is known of it."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log_path: Path
    child: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""
    restart_count: int = 0
    was_ready: bool = False
    is_refused: bool = False
    """It ended before it was ever ready, and said that starting it again cannot help."""
    started_at: float = 0.0

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child is not None and self.child.returncode is None else None


class Platform:
    """Everything on one machine.

    ``data_dir`` holds all data. ``free_ports`` picks free loopback ports instead of the well-known ones, so that
    several platforms run side by side. ``env`` is passed on to every process (DUCAT_… settings). ``executor_count``
    executors run side by side. ``log`` gets one line for each thing that happens. What the settings say (``env``,
    secrets files, ducat.toml) about servers and addresses holds here too. Raises SettingsInvalid.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        free_ports: bool = False,
        env: Mapping[str, str] | None = None,
        executor_count: int = 1,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.env = dict(env or {})
        self.log = log
        self.settings = Settings.load(environ=self.env)
        listens = {name: split_address(self.settings.listen_of(name)) for name in PROCESSES}
        self.hosts = {name: "127.0.0.1" if free_ports else host for name, (host, _) in listens.items()}
        self.ports = {name: free_port() if free_ports else port or free_port() for name, (_, port) in listens.items()}
        plays_sandbox = any(psp.adapter == "sandbox" for psp in self.settings.psps)
        self.names = [name for name in PROCESSES if name != "sandbox" or plays_sandbox]
        """The processes that are started: a sandbox only where a configured PSP is one."""
        self.executor_count = executor_count
        self.processes: dict[str, ManagedProcess] = {}
        self.postgres: EmbeddedPostgres | None = None
        self.valkey: EmbeddedValkey | None = None
        self.database_url = ""
        self.redis_url = ""
        self._free_ports = free_ports
        self._lock: IO[str] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False

    # Addresses

    @property
    def gateway_url(self) -> str:
        return self._url("gateway")

    @property
    def sandbox_url(self) -> str:
        return self._url("sandbox")

    def grpc_address(self, name: str) -> str:
        if self._is_given(f"{name}_address"):
            return str(getattr(self.settings, f"{name}_address"))
        return self._dialed(name)

    def client(self) -> ducat.aio.Client:
        """A client of every service, with the token and the certificates of the platform's own settings."""
        settings = self.settings
        tls = None
        if settings.tls_ca_file:
            tls = ducat.TLS(settings.tls_ca_file, settings.tls_cert_file or None, settings.tls_key_file or None)
        return ducat.aio.Client(
            payment_address=self.grpc_address("payment"),
            wallet_address=self.grpc_address("wallet"),
            ledger_address=self.grpc_address("ledger"),
            executor_address=self.grpc_address("executor"),
            token=settings.auth_token.get_secret_value(),
            tls=tls,
        )

    def http_session(self) -> aiohttp.ClientSession:
        """For calls to the gateway and the hosted pages; trusts the platform's own authority where it has one."""
        ca = self.settings.tls_ca_file
        context: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca) if ca else True
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), cookie_jar=aiohttp.DummyCookieJar())

    def http_headers(self) -> dict[str, str]:
        """What a call of the REST API carries; never send it to another origin than the gateway."""
        token = self.settings.auth_token.get_secret_value()
        return {"authorization": f"Bearer {token}"} if token else {}

    def _url(self, name: str) -> str:
        if self._is_given(f"{name}_url"):
            return str(getattr(self.settings, f"{name}_url"))
        return f"{'https' if self.settings.tls_cert_file else 'http'}://{self._dialed(name)}"

    def _is_given(self, setting: str) -> bool:
        """Whether somebody chose this address. On free ports nobody can have."""
        return not self._free_ports and setting in self.settings.model_fields_set

    def _dialed(self, name: str) -> str:
        host = self.hosts[name]
        if host in ("0.0.0.0", "::", "*"):  # noqa: S104 - compared, not bound
            host = "localhost"
        return _joined(host, self.ports[name])

    # Life

    async def start(self) -> None:
        """Takes the data folder, starts the servers, migrates the schemas, starts the processes and waits until all
        are ready."""
        self._take_data_folder()
        try:
            await self._start_servers()
            await self._migrate()
            self._watchers.append(asyncio.create_task(self._watch_servers(), name="watch servers"))
            for name in self.names:
                await self._start_group(name)
            for process in self.processes.values():
                await self._wait_first_ready(process)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops the edge, the inner processes, the servers, then lets the data folder go. Safe to call twice."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        edge = [process for process in self.processes.values() if process.name in ("gateway", "sandbox")]
        inner = [process for process in self.processes.values() if process not in edge]
        for wave in (edge, inner):  # First nothing new comes in, then what is under way ends.
            await asyncio.gather(*(self._stop_process(process) for process in wave))
        if self.valkey is not None:
            await asyncio.to_thread(self.valkey.stop)
        if self.postgres is not None:
            await asyncio.to_thread(self.postgres.stop)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def wait_ready(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until a process (again) takes calls."""
        await asyncio.wait_for(self.processes[name].ready.wait(), timeout_s)

    def kill(self, name: str) -> None:
        """SIGKILL to a process or an embedded server (`postgres`, `valkey`), as a crash would; it is started again."""
        servers = {"postgres": self.postgres, "valkey": self.valkey}
        if name in servers:
            server = servers[name]
            assert server is not None
            server.kill()
            return
        process = self.processes[name]
        process.ready.clear()
        if process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)

    def cpu_seconds(self) -> dict[str, float]:
        """User plus system CPU seconds so far of every process and of the embedded servers, from /proc; children
        included."""
        pids = {name: process.pid for name, process in self.processes.items()}
        pids["postgres"] = self.postgres.pid if self.postgres else None
        pids["valkey"] = self.valkey.pid if self.valkey else None
        return {name: _cpu_seconds_of(pid) for name, pid in pids.items() if pid is not None}

    # Steps of start

    def _take_data_folder(self) -> None:
        check_finished(self.data_dir)
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lock = (self.data_dir / "up.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise DataFolderBusy(
                f"{self.data_dir} is in use by {owner}; "
                "stop it first (Ctrl-C), or choose another folder with --data-dir"
            ) from error
        lock.seek(0)
        lock.truncate()
        lock.write(f"pid {os.getpid()}\n")
        lock.flush()
        self._lock = lock

    async def _start_servers(self) -> None:
        self.database_url = self.settings.database_url
        self.redis_url = self.settings.redis_url
        try:
            if not self.database_url:
                self.postgres = EmbeddedPostgres(self.data_dir / "postgres")
                self.database_url = await asyncio.to_thread(self.postgres.start)
                self.log("started embedded PostgreSQL")
            if not self.redis_url:
                self.valkey = EmbeddedValkey(self.data_dir / "valkey")
                self.redis_url = await asyncio.to_thread(self.valkey.start)
                self.log("started embedded Valkey")
        except ServerFailed as error:
            raise ProcessFailed(str(error)) from error

    async def _migrate(self) -> None:
        from runtime.migrations import MigrationFailed, migrate_all

        try:
            await migrate_all(self.database_url)
        except MigrationFailed as error:
            raise ProcessFailed(f"the database is not as it has to be: {error}; check DUCAT_DATABASE_URL") from error
        self.log("migrated the schemas")

    async def _watch_servers(self) -> None:
        """Starts an embedded server again when it has ended; its clients reconnect by themselves."""
        while True:
            await asyncio.sleep(SERVER_LOOK_S)
            for name, server in (("PostgreSQL", self.postgres), ("Valkey", self.valkey)):
                if server is not None and server.pid is None:
                    self.log(f"embedded {name} ended; starting it again")
                    try:
                        await asyncio.to_thread(server.start)
                    except (ServerFailed, OSError) as error:  # the next round tries again
                        self.log(f"embedded {name} does not start: {error}")
                        await asyncio.sleep(RESTART_DELAY_S_MAX)

    async def _start_group(self, name: str) -> None:
        count = self.executor_count if name == "executor" else 1
        group = [name, *(f"{name}-{number}" for number in range(2, count + 1))]
        for member in group:
            process = ManagedProcess(
                name=member,
                argv=[sys.executable, "-m", PROCESSES[name]],
                env=self._environment(name, member),
                log_path=self.data_dir / "logs" / f"{member}.log",
            )
            self.processes[member] = process
            await self._spawn(process)
            self._watchers.append(asyncio.create_task(self._watch(process), name=f"watch {member}"))

    def _environment(self, name: str, member: str) -> dict[str, str]:
        listen = {f"DUCAT_{key.upper()}_LISTEN": _joined(self.hosts[key], port) for key, port in self.ports.items()}
        if member != name:
            listen[f"DUCAT_{name.upper()}_LISTEN"] = _joined(self.hosts[name], 0)
        return {
            **os.environ,
            **self.env,
            **listen,
            **{
                f"DUCAT_{key.upper()}_ADDRESS": self.grpc_address(key)
                for key in ("payment", "executor", "wallet", "ledger")
            },
            "DUCAT_GATEWAY_URL": self.gateway_url,
            "DUCAT_SANDBOX_URL": self.sandbox_url,
            "DUCAT_DATA_DIR": str(self.data_dir),
            "DUCAT_DATABASE_URL": self.database_url,
            "DUCAT_REDIS_URL": self.redis_url,
            "PYTHONUNBUFFERED": "1",
            "GRPC_VERBOSITY": "ERROR",
        }

    # One process

    async def _spawn(self, process: ManagedProcess) -> None:
        private_folder(process.log_path.parent)
        process.ready.clear()
        process.started_at = time.monotonic()
        with process.log_path.open("ab") as log:
            process.child = await asyncio.create_subprocess_exec(
                *process.argv,
                env=process.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    async def _watch(self, process: ManagedProcess) -> None:
        delay_s = RESTART_DELAY_S_MIN
        while True:
            child = process.child
            assert child is not None
            assert child.stdout is not None
            while True:
                try:
                    line = await child.stdout.readline()
                except ValueError:  # longer than the stream's limit: none of ours, and no reason to watch no more
                    continue
                if not line:
                    break
                words = line.decode(errors="replace").split()
                if words[:1] == ["ready"]:
                    process.address = words[-1]
                    process.was_ready = True
                    process.ready.set()
            code = await child.wait()
            process.ready.clear()
            if self._stopping:
                return
            if code == EXIT_REFUSED and not process.was_ready:
                process.is_refused = True
                return
            if time.monotonic() - process.started_at > RESTART_FORGET_S:
                delay_s = RESTART_DELAY_S_MIN
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.log(f"{process.name} ended ({how}); starting it again in {delay_s:.1f} s; log: {process.log_path}")
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RESTART_DELAY_S_MAX)
            process.restart_count += 1
            while True:
                try:
                    await self._spawn(process)
                    break
                except OSError as error:  # no memory, no process slots: not for ever
                    self.log(f"{process.name} cannot be started ({error}); trying again in {delay_s:.1f} s")
                    await asyncio.sleep(delay_s)
                    delay_s = min(delay_s * 2, RESTART_DELAY_S_MAX)

    async def _wait_first_ready(self, process: ManagedProcess) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not process.ready.is_set():
            refused = next((one for one in self.processes.values() if one.is_refused), None)
            if refused is not None:
                raise ProcessFailed(f"{refused.name} refuses to start: {_reason(refused.log_path)}")
            if process.restart_count >= 3 or time.monotonic() > deadline:
                raise ProcessFailed(
                    f"{process.name} did not become ready; the end of its log:\n{_tail(process.log_path)}"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.ready.wait(), 0.25)
        self.log(f"started {process.name} at {process.address}")

    async def _stop_process(self, process: ManagedProcess) -> None:
        child = process.child
        if child is None or child.returncode is not None:
            return
        child.terminate()
        try:
            await asyncio.wait_for(child.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self.log(f"{process.name} did not stop in {STOP_TIMEOUT_S:.0f} s; killing it")
            child.kill()
            await child.wait()


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _die_with_parent() -> None:
    """In the child: the kernel ends it when the supervisor dies, however that happens. Linux only; elsewhere it does
    nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _reason(path: Path) -> str:
    """What a process said last."""
    lines = [line for line in _tail(path).splitlines() if line.strip()]
    return lines[-1].removeprefix("ducat: ") if lines else f"see {path}"


def _tail(path: Path, line_count: int = 25) -> str:
    if not path.exists():
        return "(no log)"
    return "\n".join(path.read_text(errors="replace").splitlines()[-line_count:])


def _cpu_seconds_of(pid: int) -> float:
    """CPU seconds of a process and of all its living and reaped descendants."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    queue = [pid]
    while queue:
        current = queue.pop()
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{current}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(fields[index]) for index in (11, 12, 13, 14)) / ticks
            for task in Path(f"/proc/{current}/task").iterdir():
                queue += [int(child) for child in (task / "children").read_text().split()]
    return total
