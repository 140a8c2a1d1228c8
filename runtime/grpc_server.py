"""The gRPC server of every process.

What stands around a servicer's method, from the outside in; each is one small function below:

    shed           more than grpc_concurrency_max at once → UNAVAILABLE, before anything is parsed. What processes ask of one another
                   (INTERNAL_SCOPES, INTERNAL_SERVICES) has a room of its own, and health needs none: callers cannot starve it
    trace          bind the caller's traceparent, or start one
    authorize      token and scope; with authentication on, a method without a scope entry is refused
    rate           more than grpc_caller_rate_max a second of one token → RESOURCE_EXHAUSTED
    parse          the message is parsed here, so that nobody without a token can make us parse one; where there are tokens, calls
                   without a known one are refused before their message has come (`_RawHandlers`)
    validate       protovalidate rules of the .proto → INVALID_ARGUMENT with one violation a field
    deadline       request_deadline_ms where the caller set none
    shield         a unary method that may change something runs to its end even when its caller gives up
    errors         whatever is raised → the table of runtime/errors.py; a bug is logged and gives nothing away
    metrics        count and latency by method and code

They are not grpc.aio interceptors: those cost a coroutine and a closure each, each call, and run only after the
message has been parsed. Instead every method is wrapped once, when the server starts (`_Guard.unary`,
`_Guard.stream`); the cost is a few microseconds a call (tests/integration/runtime/test_grpc_overhead.py measures it).

Cancellation: gRPC cancels a handler when its caller's deadline passes or its caller goes away, which could be between
a commit and the line after it. So unary methods run in a task of their own, shielded; only the wait for it is
cancelled. Methods that by their name (AIP-131, 132) only read, Get and List, are cancelled with their caller: nobody
wants their answer. Streams are cancelled too; what must not be torn in them, the servicer wraps in `shielded(…)`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from protovalidate import collect_violations

from kernel.errors import (
    DeadlineExceeded,
    DucatError,
    FieldViolation,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from runtime import errors, telemetry, trace
from runtime.errors import RETRY_AFTER_KEY
from runtime.logs import get_logger
from runtime.metrics import RpcMetrics
from runtime.rates import CallerRates
from runtime.security import TokenStore, server_credentials, set_current_caller
from runtime.settings import Settings, SettingsInvalid, split_address

__all__ = ["GrpcServer", "Servicer", "shielded", "validate", "violations_of"]

KEEPALIVE_MIN_MS = 10_000
"""Clients may ping this often (channel.KEEPALIVE_TIME_MS is 30 s); more often is answered by too_many_pings."""
METADATA_BYTES_MAX = 16 * 1024
CONNECTIONS_MAX = 4_096
STREAMS_PER_CONNECTION_MAX = 4_096
"""RPCs of one connection that are open at once; a client queues what is above. More than all budgets of a gateway together, so that
its health checks and webhooks never wait behind its callers."""
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"
"""The contract's pattern of texts that people read on a terminal; what breaks it is said in words."""
MESSAGE_TIMEOUT_S = 2.0
"""Within which the message of a health check must come: it needs no token, and gRPC keeps what has come of it."""
HANDSHAKE_TIMEOUT_MS = 10_000
"""From the connection to the end of the HTTP/2 handshake."""
RETRY_AFTER_S = 1
"""What we ask of callers that were shed."""
INTERNAL_SCOPES = frozenset({"notifications.write", "payouts.instruct", "wallet.relay"})
INTERNAL_SERVICES = ("/ducat.event.v1.FeedService/",)
HEALTH_DRAIN_S = 0.05
"""Between NOT_SERVING and the end of accepting calls, so that a watching balancer can turn away."""

_READ_PREFIXES = ("Get", "List")
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/"
_OK = grpc.StatusCode.OK.name
_CANCELLED = grpc.StatusCode.CANCELLED.name

Servicer = tuple[object, Callable[[Any, Any], None], str]
"""A servicer, the generated `add_…Servicer_to_server`, and the full name of its service."""

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Status: TypeAlias = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]
_T = TypeVar("_T")
_logger = get_logger("rpc")
_left_running: set[asyncio.Future[Any]] = set()
"""Keeps them alive: the event loop holds tasks only weakly."""


async def shielded(awaitable: Awaitable[_T]) -> _T:
    """Awaits what must run to its end once begun (a commit), even where the caller of the RPC goes away meanwhile."""
    task = asyncio.ensure_future(awaitable)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            _left_running.add(task)
            task.add_done_callback(_left_running.discard)
            task.add_done_callback(_log_failure)
        raise


def _log_failure(task: asyncio.Future[Any]) -> None:
    """A task that nobody awaits any more must not fail in silence."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, DucatError):
        _logger.error("a call that its caller had left failed", exc_info=error)


def violations_of(message: Message) -> list[FieldViolation]:
    """The field rules of the .proto that a message breaks."""
    return [_violation(each) for each in collect_violations(message)]


def _violation(violation: Any) -> FieldViolation:
    proto = violation.proto
    path = ""
    for element in proto.field.elements if proto.field is not None else ():
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None and subscript.field in {"index", "int_key", "uint_key", "bool_key", "string_key"}:
            path += f"[{subscript.value}]"
    if proto.rule_id == "string.pattern" and PRINTABLE in proto.message:
        return FieldViolation(path, "has a control character, such as a line break; expected one line of text")
    return FieldViolation(path, proto.message or f"breaks the rule {proto.rule_id}")


def validate(request: Message) -> None:
    """The validate step, for a method that is served as raw bytes and parses them itself. Raises InvalidArgument."""
    violations = collect_violations(request)
    if violations:
        found = [_violation(each) for each in violations]
        first = found[0]
        raise InvalidArgument(
            f"{first.field}: {first.description}" if first.field else first.description, violations=found
        )


class _Room:
    """Calls of one kind that run at once."""

    def __init__(self, running_max: int) -> None:
        self.running_max = running_max
        self.running = 0

    def overloaded(self) -> Unavailable:
        return Unavailable(
            f"more than {self.running_max} calls at once; retry with backoff",
            reason="OVERLOADED",
            metadata={
                "limit": "grpc_concurrency_max",
                "limit_value": str(self.running_max),
                RETRY_AFTER_KEY: str(RETRY_AFTER_S),
            },
        )


class _Guard:
    """Everything that stands around the servicers' methods."""

    def __init__(
        self,
        settings: Settings,
        scopes: Mapping[str, str],
        tokens: TokenStore | None,
        metrics: RpcMetrics,
        unshielded: Collection[str] = (),
    ) -> None:
        self._scopes = scopes
        self._unshielded = frozenset(unshielded)
        self._tokens = tokens
        self._metrics = metrics
        self._deadline_s = settings.request_deadline_ms / 1000
        self._rooms = {
            (is_internal, is_stream): _Room(settings.grpc_concurrency_max)
            for is_internal in (False, True)
            for is_stream in (False, True)
        }
        self._rates = CallerRates(settings.grpc_caller_rate_max)
        metrics.in_flight = lambda: sum(room.running for room in self._rooms.values())
        self._tasks: set[asyncio.Task[Any]] = set()
        self.scopeless: list[str] = []

    # --- wrapping, once a method

    def wrap(self, method: str, handler: _Handler) -> _Handler:
        """The handler with everything around it."""
        behaviour = _behaviour_of(handler)
        if not _is_served(method, behaviour):
            return self._refusing(method)
        if method not in self._scopes:
            self.scopeless.append(method)
        if telemetry.spans is not None:
            behaviour = telemetry.spans.server(method, behaviour)
        if not handler.request_streaming and not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(self.unary(method, handler, behaviour))
        if not handler.response_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self.stream(method, behaviour), handler.request_deserializer, handler.response_serializer
            )
        if not handler.request_streaming:
            parse = handler.request_deserializer
            return grpc.unary_stream_rpc_method_handler(
                self.stream(method, behaviour, parse or _as_it_is), None, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(
            self.stream(method, behaviour), handler.request_deserializer, handler.response_serializer
        )

    def unary(
        self, method: str, handler: _Handler, behaviour: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[..., Awaitable[bytes]]:
        """A unary method: raw bytes in, raw bytes out."""
        parse = handler.request_deserializer or _as_it_is
        serialize = handler.response_serializer or _as_it_is
        is_message = handler.request_deserializer is not None
        shield = not method.rpartition("/")[2].startswith(_READ_PREFIXES) and method not in self._unshielded
        scope = self._scopes.get(method)
        room = self._room(method, scope, is_stream=False)
        record = self._metrics.record

        async def call(raw: bytes, context: Any) -> bytes:
            begin_s = time.perf_counter()
            code = _OK
            room.running += 1
            try:
                if room.running > room.running_max:
                    raise room.overloaded()
                self._authorize(method, scope, _trace(context.invocation_metadata()))
                request = parse(raw)
                if is_message:
                    validate(request)
                left_s = None if context.time_remaining() is not None else self._deadline_s
                if shield:
                    response = await self._run_shielded(behaviour(request, context), left_s)
                elif left_s is not None:
                    async with asyncio.timeout(left_s):
                        response = await behaviour(request, context)
                else:
                    response = await behaviour(request, context)
                return serialize(response)
            except BaseException as error:
                code, status = self._judge(method, context, error)
                if status is None:
                    raise
                await context.abort(*status)
                raise
            finally:
                room.running -= 1
                record(method, code, begin_s)

        return call

    def stream(
        self,
        method: str,
        behaviour: Callable[..., Any],
        parse: Callable[[bytes], Any] | None = None,
    ) -> Callable[..., Awaitable[Any]]:
        """A method with a stream on either side, or both. ``parse`` is given where the request is one message."""
        scope = self._scopes.get(method)
        room = self._room(method, scope, is_stream=True)
        generates = inspect.isasyncgenfunction(behaviour)

        async def call(requests: Any, context: Any) -> Any:
            begin_s = time.perf_counter()
            code = _OK
            room.running += 1
            try:
                if room.running > room.running_max:
                    raise room.overloaded()
                self._authorize(method, scope, _trace(context.invocation_metadata()))
                if parse is not None:
                    requests = parse(requests)
                    if parse is not _as_it_is:
                        validate(requests)
                if not generates:
                    return await behaviour(requests, context)
                async for response in behaviour(requests, context):
                    await context.write(response)
                return None
            except BaseException as error:
                code, status = self._judge(method, context, error)
                if status is None:
                    raise
                await context.abort(*status)
                raise
            finally:
                room.running -= 1
                self._metrics.record(method, code, begin_s)

        return call

    def _refusing(self, method: str) -> _Handler:
        """A method of the contract that the servicer does not serve."""

        async def behaviour(_request: Any, _context: Any) -> Any:
            raise Unimplemented(f"{method[1:]} is part of the contract, but this server does not serve it yet")

        return grpc.stream_stream_rpc_method_handler(self.stream(method, behaviour))

    def refused(self, method: str) -> _Handler:
        """A method for a caller whose token is not known: `authorize` refuses it before its message has come."""

        async def behaviour(_request: Any, _context: Any) -> Any:
            raise Unavailable("the tokens of this server have just changed; try again")

        return grpc.stream_stream_rpc_method_handler(self.stream(method, behaviour))

    def is_known(self, metadata: Any) -> bool:
        """Whether a call's head carries a token that is known here."""
        if self._tokens is None:
            return True
        authorization = ""
        for key, value in metadata or ():
            if key == "authorization":
                authorization = value
        try:
            self._tokens.authenticate(authorization)
        except Unauthenticated:
            return False
        return True

    def unknown(self, method: str) -> _Handler:
        """A method that no servicer has."""

        async def behaviour(_request: Any, _context: Any) -> Any:
            raise Unimplemented(f"{method[1:]} is not a method of this server; ask its reflection service for the list")

        return grpc.stream_stream_rpc_method_handler(
            self.stream("/unknown", behaviour)
        )  # one label: callers choose the names

    # --- the steps, each call

    def _room(self, method: str, scope: str | None, *, is_stream: bool) -> _Room:
        return self._rooms[_is_internal(method, scope), is_stream]

    def _authorize(self, method: str, scope: str | None, authorization: str) -> None:
        if self._tokens is None:
            return
        if scope is None:
            self._tokens.authenticate(authorization)
            raise PermissionDenied(f"{method[1:]} has no scope on this server, so nobody may call it")
        caller = self._tokens.authorize(authorization, scope)
        set_current_caller(caller.name)
        if self._rates.per_s and not _is_internal(method, scope):
            wait_s = self._rates.spend(caller.name)
            if wait_s:
                raise ResourceExhausted(
                    f"more than {self._rates.per_s:g} calls a second of token {caller.name!r}; slow down",
                    metadata={"limit": "grpc_caller_rate_max", RETRY_AFTER_KEY: str(math.ceil(wait_s))},
                )

    async def _run_shielded(self, work: Coroutine[Any, Any, Any], left_s: float | None) -> Any:
        """Runs ``work`` in a task of its own. Where its caller goes away or the deadline passes, only the wait ends.

        By hand instead of asyncio.shield: half the callbacks.
        """
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        waiter = loop.create_future()

        def done(_task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not waiter.done():
                waiter.set_result(None)

        def expire() -> None:
            if not waiter.done():
                waiter.set_exception(TimeoutError())

        self._tasks.add(task)
        task.add_done_callback(done)
        timer = None if left_s is None else loop.call_later(left_s, expire)
        try:
            await waiter
        except (asyncio.CancelledError, TimeoutError):
            if not task.done():
                task.add_done_callback(_log_failure)
                raise
        finally:
            if timer is not None:
                timer.cancel()
        return task.result()

    def _judge(self, method: str, context: Any, error: BaseException) -> tuple[str, _Status | None]:
        """The code's name, and the status to end the call with; None where the call has ended already or the process
        must.
        """
        if isinstance(error, asyncio.CancelledError):
            return _CANCELLED, None
        if isinstance(error, grpc.aio.AbortError):
            code = context.code()
            return (code.name if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN.name), None
        if not isinstance(error, Exception):
            return grpc.StatusCode.UNKNOWN.name, None
        known = _known(error)
        code, message, details = errors.to_status(known)
        if isinstance(known, Internal):
            _logger.error("call failed", method=method, exc_info=error)
        elif known is not error:
            _logger.warning("call refused", method=method, code=code.name, error=f"{type(error).__name__}: {error}")
        return code.name, (code, message, ((errors.DETAILS_KEY, details),))

    async def drain(self, grace_s: float) -> None:
        """Waits for the shielded calls whose callers have left."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)


def _soon(handler: _Handler) -> _Handler:
    """A method for everybody, whose one message must come within MESSAGE_TIMEOUT_S."""
    behaviour, parse = _behaviour_of(handler), handler.request_deserializer
    assert parse is not None

    async def call(_requests: Any, context: Any) -> Any:
        try:
            async with asyncio.timeout(MESSAGE_TIMEOUT_S):
                raw = await context.read()
            request = parse(raw) if isinstance(raw, bytes) else None
        except (TimeoutError, DecodeError):
            request = None
        if request is None:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"expected one message within {MESSAGE_TIMEOUT_S:g} s"
            )
        answer = await behaviour(request, context)
        if answer is not None:
            await context.write(answer)

    return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)


def _is_internal(method: str, scope: str | None) -> bool:
    """Whether only our own processes call a method."""
    return scope in INTERNAL_SCOPES or method.startswith(INTERNAL_SERVICES)


def _as_it_is(raw: Any) -> Any:
    return raw


def _trace(metadata: Any) -> str:
    """Binds the caller's trace; returns its authorization header. One pass over the metadata serves both."""
    traceparent = authorization = ""
    for key, value in metadata:
        if key == "traceparent":
            traceparent = value
        elif key == "authorization":
            authorization = value
    trace.set_current(traceparent)
    return authorization


def _known(error: Exception) -> DucatError:
    if isinstance(error, DecodeError):
        return InvalidArgument("the request is not a message of this method's type")
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(
            "the server's deadline passed; the outcome is unknown: retry with the same idempotency key"
        )
    return errors.as_ducat_error(error)


def _behaviour_of(handler: _Handler) -> Callable[..., Any]:
    behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    assert behaviour is not None
    return behaviour


def _is_served(method: str, behaviour: Callable[..., Any]) -> bool:
    """False for a method that the servicer inherits from its generated base. Anything else must be asynchronous."""
    if getattr(behaviour, "__module__", "").endswith("_pb2_grpc"):
        return False
    if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
        raise TypeError(f"{method}: {behaviour!r} must be `async def`")
    return True


class _Collector:
    """Stands in for a server while the generated code registers a servicer, and keeps what it registers."""

    def __init__(self) -> None:
        self.handlers: dict[str, _Handler] = {}

    def add_generic_rpc_handlers(self, _handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Older generated code knows only this one; ours also calls the next, with the same methods."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, _Handler]) -> None:
        for name, handler in handlers.items():
            self.handlers[f"/{service}/{name}"] = handler


class _Details:
    """What a GenericRpcHandler is asked with."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


class _RawHandlers(grpc.GenericRpcHandler):
    """Methods that are served as raw bytes, and the answer for those that nobody serves. Wraps each method once.

    Where there are tokens every method comes through here (`add`), since this is asked when a call's head has come. gRPC reads
    the message of a unary call before it calls the method: who has no token could make us keep as many as it likes, half sent.
    """

    METHODS_MAX = 256

    def __init__(self, guard: _Guard, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._guard = guard
        self._handlers = handlers
        self._wrapped: dict[str, _Handler] = {}
        self._refused: dict[str, _Handler] = {}

    def add(self, service: str, wrapped: Mapping[str, _Handler]) -> None:
        """Methods of a servicer, by their names; they are wrapped already."""
        self._wrapped.update({f"/{service}/{name}": handler for name, handler in wrapped.items()})

    def find(self, method: str) -> _Handler | None:
        for handler in self._handlers:
            found = handler.service(_Details(method))  # type: ignore[arg-type]
            if found is not None:
                return found
        return None

    def service(self, details: grpc.HandlerCallDetails) -> _Handler | None:
        method = details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            if method.startswith((_HEALTH, _REFLECTION)):
                return None
            found = self.find(method)
            wrapped = self._guard.unknown(method) if found is None else self._guard.wrap(method, found)
            if found is None or len(self._wrapped) >= self.METHODS_MAX:
                return wrapped
            self._wrapped[method] = wrapped
        if self._guard.is_known(details.invocation_metadata):
            return wrapped
        if method not in self._refused:
            self._refused[method] = self._guard.refused(method)
        return self._refused[method]


class GrpcServer:
    """One listening gRPC server: the servicers with everything around them, health and reflection.

    ``scopes`` maps ``/package.Service/Method`` to the scope that a token needs. ``raw_handlers`` serve methods as
    bytes and win over a servicer's method of the same name. ``unshielded`` names unary methods that are torn by
    nothing when they are cancelled with their caller, and save the task of their own.
    """

    def __init__(
        self,
        settings: Settings,
        servicers: Sequence[Servicer],
        scopes: Mapping[str, str],
        raw_handlers: Sequence[grpc.GenericRpcHandler] = (),
        metrics: RpcMetrics | None = None,
        unshielded: Collection[str] = (),
    ) -> None:
        self._settings = settings
        self._servicers = servicers
        self._scopes = scopes
        self._raw_handlers = raw_handlers
        self._metrics = metrics or RpcMetrics(registry=None)
        self._unshielded = unshielded
        self.address = ""

    async def start(self, listen: str) -> str:
        """Listens and serves; returns the real address. Raises SettingsInvalid where it cannot listen."""
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        settings = self._settings
        tokens = TokenStore(settings.auth_tokens_file) if settings.auth_tokens_file else None
        self._guard = _Guard(settings, self._scopes, tokens, self._metrics, self._unshielded)
        self._server = grpc.aio.server(options=_options(settings))
        raw = _RawHandlers(self._guard, self._raw_handlers)
        for servicer, add_to_server, service in self._servicers:
            collector = _Collector()
            add_to_server(servicer, collector)
            wrapped = {}
            for method, handler in collector.handlers.items():
                wrapped[method.rpartition("/")[2]] = self._guard.wrap(method, raw.find(method) or handler)
            if tokens is None:
                self._server.add_registered_method_handlers(service, wrapped)
            else:
                raw.add(service, wrapped)
        if tokens is not None and self._guard.scopeless:
            _logger.warning("methods without a scope: every call of them is refused", methods=self._guard.scopeless)
        self._health = health.aio.HealthServicer()
        collector = _Collector()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, collector)
        self._server.add_registered_method_handlers(
            "grpc.health.v1.Health", {name.rpartition("/")[2]: _soon(each) for name, each in collector.handlers.items()}
        )
        self._health_status = health_pb2.HealthCheckResponse
        names = ["", *(service for _, _, service in self._servicers)]
        if tokens is None:
            self._add_reflection(names[1:])
        self._server.add_generic_rpc_handlers((raw,))
        host, _ = split_address(listen)
        port = self._listen(listen)
        await self._server.start()
        for name in names:
            await self._health.set(name, self._health_status.SERVING)
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self.address

    def _listen(self, listen: str) -> int:
        credentials = server_credentials(self._settings)
        try:
            if credentials is None:
                return self._server.add_insecure_port(listen)
            return self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise SettingsInvalid(f"cannot listen on {listen}: {error}; is something else there already?") from None

    def _add_reflection(self, names: Sequence[str]) -> None:
        from importlib import import_module

        from grpc_reflection.v1alpha import reflection

        for _, add_to_server, _ in self._servicers:  # generated gRPC code does not import the file of its own service
            if add_to_server.__module__.endswith("_pb2_grpc"):
                import_module(add_to_server.__module__.removesuffix("_grpc"))
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME, "grpc.health.v1.Health"], self._server)

    async def set_serving(self, serving: bool, service: str = "") -> None:
        """What the health service answers for ``service`` ("" = the whole process)."""
        await self._health.set(service, self._health_status.SERVING if serving else self._health_status.NOT_SERVING)

    async def stop(self, grace_s: float | None = None) -> None:
        """NOT_SERVING, a short wait, no new calls; running ones get ``grace_s`` to end (default shutdown_grace_ms)."""
        grace_s = self._settings.shutdown_grace_ms / 1000 if grace_s is None else grace_s
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(min(HEALTH_DRAIN_S, grace_s))
        await self._server.stop(grace_s)
        await self._guard.drain(grace_s)


def _options(settings: Settings) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.grpc_message_bytes_max),
        ("grpc.max_send_message_length", settings.grpc_message_bytes_max),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MIN_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MIN_MS),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
