"""What every Ducat process does the same way: logging, metrics, signals, dependencies, serving, stopping.

    async def main() -> None:
        settings = Settings.load()
        async with Process.start("ledger", settings) as process:
            pool = await process.postgres("ledger")
            bus = await process.bus()
            process.keep(lambda: bus.consume("payment.events", "ledger", handler), name="payment.events")
            await process.serve_grpc(settings.ledger_listen, [(servicer, add_to_server,
            "ducat.ledger.v1.LedgerService")], SCOPES)

    run(main)

The first SIGTERM or SIGINT stops gracefully: no new calls, running ones end, spawned tasks are cancelled, what was
opened is closed in reverse order, exit 0. A second one stops at once. A kept task that raises begins again; a spawned one
stops the process the same way, with exit 1, or 2 where the settings are wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kernel.errors import DucatError, NotPermitted, Unavailable
from runtime import logs, telemetry
from runtime.security import check_listen, reload_at_handshakes
from runtime.settings import Settings, SettingsInvalid, split_address
from runtime.supervise import keep_running

if TYPE_CHECKING:
    import asyncpg
    import grpc
    import redis.asyncio

    from runtime.bus import Bus
    from runtime.channel import Channel
    from runtime.grpc_server import Servicer
    from runtime.http_server import HttpLimits

__all__ = ["Process", "ProcessCrashed", "run"]

DEPENDENCY_WAIT_S = 60.0
"""How long a process waits for a database or a Valkey that does not answer yet before it gives up."""
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0
TASK_STOP_S = 5.0
"""How long spawned tasks may take to end after they were cancelled."""
CLOSE_S = 5.0
"""How long each thing that was opened may take to close: a pool whose server is gone must not keep a process that is to start again."""

_EXIT_AT_ONCE = 130
_logger = logs.get_logger("process")


class ProcessCrashed(Exception):
    """A spawned task ended with an error; the process cannot go on."""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs ``main`` on uvloop and exits: 0 after a graceful stop, 2 for wrong settings, 1 for anything else."""
    import uvloop

    logs.configure("ducat")  # until Process.start knows better
    try:
        uvloop.run(main())
    except SettingsInvalid as error:
        print(f"ducat: {error}", file=sys.stderr)  # noqa: T201 - for the person who started it
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(_EXIT_AT_ONCE)
    except (ProcessCrashed, DucatError) as error:
        _logger.error("stopped", reason=str(error))  # noqa: TRY400 - the reason says it all
        sys.exit(1)
    except Exception:
        _logger.exception("crashed")
        sys.exit(1)


class Process:
    """One running Ducat process. Make it with `Process.start` in an ``async with``."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None
        self._serving = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closers: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self._channels: dict[str, Channel] = {}
        self._signals: list[signal.Signals] = []
        self._main: asyncio.Task[Any] | None = None

    @classmethod
    def start(cls, name: str, settings: Settings) -> Process:
        """A process to be entered with ``async with``; ``name`` is one of settings.PROCESSES, or a tool's name."""
        return cls(name, settings)

    async def __aenter__(self) -> Process:
        logs.configure(self.name, self.settings.log_level, self.settings.log_format)
        if hasattr(self.settings, f"{self.name}_listen"):
            check_listen(self.name, self.settings.listen_of(self.name), self.settings)
        self._main = asyncio.current_task()
        self._catch_signals()
        try:
            self._start_telemetry()
            self._start_metrics()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        await self._close()
        if isinstance(self._failure, SettingsInvalid):
            raise self._failure
        if self._failure is not None:
            raise ProcessCrashed(f"{self.name}: {self._failure}") from self._failure
        if isinstance(error, asyncio.CancelledError) and self._stopping.is_set():
            if self._main is not None:
                self._main.uncancel()
            return True  # a signal came while we were starting
        return False

    # --- stopping

    @property
    def is_stopping(self) -> bool:
        """Whether a signal came or a task crashed."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Begins the graceful stop, as a signal does."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if not self._serving and self._main is not None:
            self._main.cancel()

    async def until_stopped(self) -> None:
        """Blocks until the process should stop. For processes that serve something else than gRPC or HTTP."""
        self._serving = True
        await self._stopping.wait()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            _logger.warning("stopping at once", signal=number.name)
            sys.stderr.flush()
            os._exit(_EXIT_AT_ONCE)
        _logger.info("stopping", signal=number.name)
        self.stop()

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread (tests)
                loop.add_signal_handler(number, self._on_signal, number)
                self._signals.append(number)

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=TASK_STOP_S)
            for task in late:
                _logger.warning("a task does not end", task=task.get_name())
        while self._closers:
            what, close = self._closers.pop()
            try:
                async with asyncio.timeout(CLOSE_S):
                    await close()
            except TimeoutError:
                _logger.warning("does not close in time, left as it is", what=what)
            except Exception:
                _logger.exception("cannot close", what=what)
        loop = asyncio.get_running_loop()
        while self._signals:
            loop.remove_signal_handler(self._signals.pop())

    def on_close(self, what: str, close: Callable[[], Awaitable[None]]) -> None:
        """Calls ``close`` when the process ends, in reverse order."""
        self._closers.append((what, close))

    # --- work

    def spawn(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Runs ``coroutine`` until the process stops. If it raises, the process stops with exit 1."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def keep(self, work: Callable[[], Awaitable[object]], *, name: str) -> asyncio.Task[Any]:
        """Runs `work()` until the process stops, again with backoff whenever it raises (runtime/supervise.py). Only wrong settings
        stop the process.

        For everything that goes on in the background and can begin anew.
        """
        return self.spawn(keep_running(name, work, fatal=(SettingsInvalid,)), name=name)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        trace = None if isinstance(error, SettingsInvalid) else error  # its text is for people
        _logger.error("a task crashed, so the process stops", task=task.get_name(), error=str(error), exc_info=trace)
        if self._failure is None:
            self._failure = error
        self.stop()

    def _start_telemetry(self) -> None:
        if self.settings.otel_endpoint:
            stop = telemetry.start(self.name, self.settings.otel_endpoint, use_proxy=self.settings.grpc_proxy)
            self.on_close("telemetry", _in_thread(stop))

    def _start_metrics(self) -> None:
        listen = self.settings.metrics_listen_of(self.name)
        if not listen:
            return
        from runtime.metrics import serve_metrics

        address, stop = serve_metrics(listen, self.settings)
        _logger.info("metrics", address=address)
        self.on_close("metrics", _in_thread(stop))

    # --- dependencies

    async def postgres(self, schema: str, *, server_settings: Mapping[str, str] | None = None) -> asyncpg.Pool:
        """A pool with search_path ``schema``; waits for the database; refuses to start when migrations are missing."""
        from runtime import migrations, postgres

        dsn = self._need("database_url")
        try:
            pool = await postgres.create_pool(
                dsn,
                schema,
                max_size=self.settings.postgres_connections_max,
                application_name=f"ducat-{self.name}",
                server_settings=server_settings,
            )
        except NotPermitted as error:
            raise SettingsInvalid(str(error)) from error
        self.on_close("postgres", pool.close)
        missing = await migrations.pending(pool, schema)
        if missing:
            raise SettingsInvalid(
                f"schema {schema} lacks {len(missing)} migrations ({missing[0]} is the first); run `ducat migrate`"
            )
        return pool

    async def bus(self) -> Bus:
        """The bus that the settings name."""
        from runtime.bus import BusPolicy, open_bus

        settings = self.settings
        policy = BusPolicy(
            delivery_count_max=settings.bus_delivery_count_max,
            claim_idle_ms=settings.bus_claim_idle_ms,
            group_idle_max_s=settings.bus_group_idle_max_s,
            stream_length_max=settings.bus_stream_length_max,
        )
        try:
            bus = await open_bus(
                settings.bus,
                redis_url=self._need("redis_url") if settings.bus == "valkey" else "",
                kafka_bootstrap=settings.kafka_bootstrap,
                policy=policy,
                name=self.name,
                examine=True,
            )
        except NotPermitted as error:
            raise SettingsInvalid(f"{error}; check DUCAT_REDIS_URL") from error
        self.on_close("bus", bus.close)
        return bus

    async def valkey(self) -> redis.asyncio.Redis:
        """A Valkey client; waits for the server."""
        import redis.exceptions

        client = self.valkey_client()
        async for attempt in _attempts("Valkey"):
            try:
                await client.ping()
                break
            except redis.exceptions.AuthenticationError as error:
                raise SettingsInvalid(f"Valkey refuses the connection: {error}; check DUCAT_REDIS_URL") from error
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
                await attempt(error)
        return client

    def valkey_client(self) -> redis.asyncio.Redis:
        """A Valkey client that connects when it is used."""
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        timeout_s = self.settings.redis_timeout_ms / 1000
        client = redis.asyncio.Redis.from_url(
            self._need("redis_url"),
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),  # a connection that was cut; who calls has its own backoff
        )
        self.on_close("valkey", client.aclose)
        return client

    async def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to another process, one for each address; see runtime/channel.py."""
        from runtime.channel import open_channel

        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, self.settings)
            self.on_close(f"channel {address}", channel.close)
        return channel

    def _need(self, name: str) -> str:
        value = str(getattr(self.settings, name))
        if not value:
            raise SettingsInvalid(
                f"{self.name} needs {name}: set DUCAT_{name.upper()}, or let `ducat up` start an embedded server"
            )
        return value

    # --- serving

    def ready(self, address: str) -> None:
        """Prints the one line on stdout that says that the process serves, and where."""
        # What was loaded by now stays: without it a full collection looks at some hundred thousand objects less (30 ms and more).
        gc.collect()
        gc.freeze()
        self.address = address
        print(f"ready {self.name} {address}", flush=True)  # noqa: T201 - the supervisor waits for it
        _logger.info("ready", address=address)

    async def serve_grpc(
        self,
        listen: str,
        servicers: Sequence[Servicer],
        scopes: Mapping[str, str],
        raw_handlers: Sequence[grpc.GenericRpcHandler] = (),
        unshielded: Collection[str] = (),
    ) -> None:
        """Serves until the process should stop, then ends gracefully. See runtime/grpc_server.py for what stands around
        a method.
        """
        from runtime.grpc_server import GrpcServer
        from runtime.metrics import RpcMetrics

        check_listen(self.name, listen, self.settings)
        metrics = RpcMetrics()
        server = GrpcServer(self.settings, servicers, scopes, raw_handlers, metrics, unshielded)
        try:
            address = await server.start(listen)
            self._serving = True
            if not self._stopping.is_set():
                self.ready(address)
            await self._stopping.wait()
            await server.stop()
        finally:
            metrics.close()

    async def serve_http(
        self, listen: str, app: Any, *, limits: HttpLimits | None = None, trusted_proxies: str = ""
    ) -> None:
        """Serves an ASGI application until the process should stop, then ends gracefully. See runtime/http_server.py for what
        bounds a client.
        """
        from runtime.http_server import make_server

        check_listen(self.name, listen, self.settings)
        settings = self.settings
        host, port = split_address(listen)
        listening = _bind(host, port, listen)
        real = listening.getsockname()[1]
        server = make_server(
            app,
            limits=limits,
            grace_s=settings.shutdown_grace_ms / 1000,
            trusted_proxies=trusted_proxies,
            cert_file=settings.tls_cert_file,
            key_file=settings.tls_key_file,
        )
        if server.config.ssl is not None:
            reload_at_handshakes(server.config.ssl, settings)
        self._serving = True
        loop = asyncio.get_running_loop()
        serving = loop.create_task(server.serve(sockets=[listening]), name="http")
        starting = loop.create_task(server.is_listening.wait())
        stopping = loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if server.is_listening.is_set() and not self._stopping.is_set():
                self.ready(f"[{host}]:{real}" if ":" in host else f"{host}:{real}")
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await serving
        finally:
            starting.cancel()
            stopping.cancel()
            listening.close()
        if not self._stopping.is_set():
            raise ProcessCrashed(f"{self.name}: the HTTP server ended by itself")


def _bind(host: str, port: int, listen: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise SettingsInvalid(
            f"cannot listen on {listen}: {error.strerror}; is something else there already?"
        ) from None
    return listening


def _in_thread(stop: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def close() -> None:
        await asyncio.to_thread(stop)

    return close


async def _attempts(what: str) -> AsyncIterator[Callable[[Exception], Awaitable[None]]]:
    """One attempt after another with growing, jittered pauses; raises Unavailable after DEPENDENCY_WAIT_S."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + DEPENDENCY_WAIT_S
    pause_s = BACKOFF_MIN_S

    async def failed(error: Exception) -> None:
        nonlocal pause_s
        if loop.time() >= give_up_s:
            raise Unavailable(f"{what} does not answer: {error}") from error
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    while True:
        yield failed
