"""One description of a method serves both clients: a descriptor that gives a sync client a blocking call and an asyncio
client an awaitable one, typed by the request and response classes.

Retries, in `_Attempts`: only unary methods, and only where a repetition cannot do a thing twice. Every method of the
contract that changes something carries its own idempotency key, so UNAVAILABLE, UNKNOWN and DEADLINE_EXCEEDED are
tried again within the call's own deadline; a method that is declared with ``idempotent=False`` is never repeated. A
stream is never repeated: its caller alone knows how far it had come.
"""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

import grpc
import grpc.aio

from ducat.config import Config
from ducat.errors import DucatError, error_of

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = ["AsyncService", "AsyncStream", "BidiStream", "ServerStream", "Stream", "SyncService", "Unary"]

_Request = TypeVar("_Request", bound="Message")
_Response = TypeVar("_Response", bound="Message")
_RequestIn = TypeVar("_RequestIn", bound="Message", contravariant=True)
_ResponseOut = TypeVar("_ResponseOut", bound="Message", covariant=True)

_REPEATABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
_ATTEMPT_S_MIN = 0.01
"""A try with less time than this left is not begun."""


class SyncService:
    """A service of a sync client."""

    def __init__(self, name: str, channel: Callable[[], grpc.Channel], config: Config) -> None:
        self._name = name
        self._channel = channel
        self._config = config


class AsyncService:
    """A service of an asyncio client."""

    def __init__(self, name: str, channel: Callable[[], grpc.aio.Channel], config: Config) -> None:
        self._name = name
        self._channel = channel
        self._config = config


class _Attempts:
    """What both clients share of one call: how much time is left, and whether and when to try again."""

    def __init__(self, config: Config, method: str, idempotent: bool, timeout_s: float | None) -> None:
        self._retry = config.retry
        self._method = method
        self._idempotent = idempotent
        self._end_s = time.monotonic() + (config.timeout_s if timeout_s is None else timeout_s)
        self._failures = 0
        self.trace_id = os.urandom(16).hex()

    def left_s(self) -> float:
        """Seconds until the call's deadline."""
        return max(self._end_s - time.monotonic(), 0.0)

    def pause_s(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next try. Raises the typed error where there is none."""
        self._failures += 1
        code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
        pause_s = self._retry.pause_s(self._failures, random.random())  # noqa: S311 - jitter
        again = (
            self._idempotent
            and code in _REPEATABLE
            and self._failures <= self._retry.count_max
            and self.left_s() > pause_s + _ATTEMPT_S_MIN
        )
        if not again:
            raise self.error(error) from error
        return pause_s

    def error(self, error: grpc.RpcError) -> DucatError:
        """The typed error of this call."""
        return error_of(error, method=self._method, trace_id=self.trace_id)


class SyncUnary(Protocol[_RequestIn, _ResponseOut]):
    """A unary method: takes the request message, or its fields by name; ``timeout_s`` is for all tries together."""

    def __call__(
        self, request: _RequestIn | None = None, /, *, timeout_s: float | None = None, **fields: Any
    ) -> _ResponseOut: ...


class AsyncUnary(Protocol[_RequestIn, _ResponseOut]):
    """A unary method: takes the request message, or its fields by name; ``timeout_s`` is for all tries together."""

    async def __call__(
        self, request: _RequestIn | None = None, /, *, timeout_s: float | None = None, **fields: Any
    ) -> _ResponseOut: ...


class SyncServerStream(Protocol[_RequestIn, _Response]):
    """A method that answers with a stream; without ``timeout_s`` it runs until it ends or is cancelled."""

    def __call__(
        self, request: _RequestIn | None = None, /, *, timeout_s: float | None = None, **fields: Any
    ) -> Stream[_Response]: ...


class AsyncServerStream(Protocol[_RequestIn, _Response]):
    """A method that answers with a stream; without ``timeout_s`` it runs until it ends or is cancelled."""

    def __call__(
        self, request: _RequestIn | None = None, /, *, timeout_s: float | None = None, **fields: Any
    ) -> AsyncStream[_Response]: ...


class SyncBidiStream(Protocol[_RequestIn, _Response]):
    """A method with a stream each way."""

    def __call__(self, requests: Iterable[_RequestIn], /, *, timeout_s: float | None = None) -> Stream[_Response]: ...


class AsyncBidiStream(Protocol[_RequestIn, _Response]):
    """A method with a stream each way."""

    def __call__(
        self, requests: AsyncIterable[_RequestIn] | Iterable[_RequestIn], /, *, timeout_s: float | None = None
    ) -> AsyncStream[_Response]: ...


class Stream(Generic[_Response]):
    """Messages as they come. Leaving the ``with`` block, or `cancel`, ends the call."""

    def __init__(self, call: Any, attempts: _Attempts) -> None:
        self._call = call
        self._attempts = attempts

    def __iter__(self) -> Iterator[_Response]:
        return self

    def __next__(self) -> _Response:
        try:
            message: _Response = next(self._call)
        except grpc.RpcError as error:
            raise self._attempts.error(error) from error
        return message

    def cancel(self) -> None:
        """Ends the call."""
        self._call.cancel()

    def __enter__(self) -> Stream[_Response]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncStream(Generic[_Response]):
    """Messages as they come. Leaving the ``async with`` block, or `cancel`, ends the call."""

    def __init__(self, call: Any, attempts: _Attempts) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._attempts = attempts

    def __aiter__(self) -> AsyncIterator[_Response]:
        return self

    async def __anext__(self) -> _Response:
        try:
            message: _Response = await self._messages.__anext__()
        except grpc.RpcError as error:
            raise self._attempts.error(error) from error
        return message

    def cancel(self) -> None:
        """Ends the call."""
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream[_Response]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class _Method(ABC, Generic[_Request, _Response]):
    """A method of the contract. Its name is the attribute's, in the contract's spelling."""

    kind = ""

    def __init__(self, request: type[_Request], response: type[_Response], *, idempotent: bool = True) -> None:
        self.request = request
        self.response = response
        self.idempotent = idempotent
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name
        self.name = "".join(part.capitalize() for part in name.split("_"))

    def bind(self, service: SyncService | AsyncService) -> Any:
        """What calls this method on a channel; made once a service object."""
        path = f"/{service._name}/{self.name}"
        multicallable = getattr(service._channel(), self.kind)(
            path, request_serializer=self.request.SerializeToString, response_deserializer=self.response.FromString
        )
        make = self.call_async if isinstance(service, AsyncService) else self.call_sync
        call = make(multicallable, service._config, path[1:])
        vars(service)[self.attribute] = call  # next time the attribute is found before this descriptor
        return call

    @abstractmethod
    def call_sync(self, multicallable: Any, config: Config, path: str) -> Any:
        """For a sync client."""

    @abstractmethod
    def call_async(self, multicallable: Any, config: Config, path: str) -> Any:
        """For an asyncio client."""

    def _message(self, request: _Request | None, fields: dict[str, Any]) -> _Request:
        if request is None:
            return self.request(**fields)
        if fields:
            raise TypeError(f"{self.attribute}: give the request message or its fields, not both")
        if not isinstance(request, self.request):
            raise TypeError(f"{self.attribute}: expected a {self.request.__name__}, got {type(request).__name__}")
        return request


class Unary(_Method[_Request, _Response]):
    """One request, one response."""

    kind = "unary_unary"

    @overload
    def __get__(self, service: None, owner: type) -> Unary[_Request, _Response]: ...
    @overload
    def __get__(self, service: SyncService, owner: type) -> SyncUnary[_Request, _Response]: ...
    @overload
    def __get__(self, service: AsyncService, owner: type) -> AsyncUnary[_Request, _Response]: ...
    def __get__(self, service: SyncService | AsyncService | None, owner: type) -> Any:
        return self if service is None else self.bind(service)

    def call_sync(self, multicallable: Any, config: Config, path: str) -> SyncUnary[_Request, _Response]:
        def call(request: _Request | None = None, /, *, timeout_s: float | None = None, **fields: Any) -> _Response:
            message = self._message(request, fields)
            attempts = _Attempts(config, path, self.idempotent, timeout_s)
            while True:
                try:
                    response: _Response = multicallable(
                        message, timeout=attempts.left_s(), metadata=config.metadata(attempts.trace_id)
                    )
                except grpc.RpcError as error:
                    time.sleep(attempts.pause_s(error))
                else:
                    return response

        return call

    def call_async(self, multicallable: Any, config: Config, path: str) -> AsyncUnary[_Request, _Response]:
        from asyncio import sleep

        async def call(
            request: _Request | None = None, /, *, timeout_s: float | None = None, **fields: Any
        ) -> _Response:
            message = self._message(request, fields)
            attempts = _Attempts(config, path, self.idempotent, timeout_s)
            while True:
                try:
                    response: _Response = await multicallable(
                        message, timeout=attempts.left_s(), metadata=config.metadata(attempts.trace_id)
                    )
                except grpc.RpcError as error:
                    await sleep(attempts.pause_s(error))
                else:
                    return response

        return call


class ServerStream(_Method[_Request, _Response]):
    """One request, a stream of responses."""

    kind = "unary_stream"

    @overload
    def __get__(self, service: None, owner: type) -> ServerStream[_Request, _Response]: ...
    @overload
    def __get__(self, service: SyncService, owner: type) -> SyncServerStream[_Request, _Response]: ...
    @overload
    def __get__(self, service: AsyncService, owner: type) -> AsyncServerStream[_Request, _Response]: ...
    def __get__(self, service: SyncService | AsyncService | None, owner: type) -> Any:
        return self if service is None else self.bind(service)

    def call_sync(self, multicallable: Any, config: Config, path: str) -> SyncServerStream[_Request, _Response]:
        def call(
            request: _Request | None = None, /, *, timeout_s: float | None = None, **fields: Any
        ) -> Stream[_Response]:
            attempts = _Attempts(config, path, False, timeout_s)
            started = multicallable(
                self._message(request, fields), timeout=timeout_s, metadata=config.metadata(attempts.trace_id)
            )
            return Stream(started, attempts)

        return call

    def call_async(self, multicallable: Any, config: Config, path: str) -> AsyncServerStream[_Request, _Response]:
        def call(
            request: _Request | None = None, /, *, timeout_s: float | None = None, **fields: Any
        ) -> AsyncStream[_Response]:
            attempts = _Attempts(config, path, False, timeout_s)
            started = multicallable(
                self._message(request, fields), timeout=timeout_s, metadata=config.metadata(attempts.trace_id)
            )
            return AsyncStream(started, attempts)

        return call


class BidiStream(_Method[_Request, _Response]):
    """A stream each way."""

    kind = "stream_stream"

    @overload
    def __get__(self, service: None, owner: type) -> BidiStream[_Request, _Response]: ...
    @overload
    def __get__(self, service: SyncService, owner: type) -> SyncBidiStream[_Request, _Response]: ...
    @overload
    def __get__(self, service: AsyncService, owner: type) -> AsyncBidiStream[_Request, _Response]: ...
    def __get__(self, service: SyncService | AsyncService | None, owner: type) -> Any:
        return self if service is None else self.bind(service)

    def call_sync(self, multicallable: Any, config: Config, path: str) -> SyncBidiStream[_Request, _Response]:
        def call(requests: Iterable[_Request], /, *, timeout_s: float | None = None) -> Stream[_Response]:
            attempts = _Attempts(config, path, False, timeout_s)
            started = multicallable(iter(requests), timeout=timeout_s, metadata=config.metadata(attempts.trace_id))
            return Stream(started, attempts)

        return call

    def call_async(self, multicallable: Any, config: Config, path: str) -> AsyncBidiStream[_Request, _Response]:
        def call(
            requests: AsyncIterable[_Request] | Iterable[_Request], /, *, timeout_s: float | None = None
        ) -> AsyncStream[_Response]:
            attempts = _Attempts(config, path, False, timeout_s)
            started = multicallable(requests, timeout=timeout_s, metadata=config.metadata(attempts.trace_id))
            return AsyncStream(started, attempts)

        return call
