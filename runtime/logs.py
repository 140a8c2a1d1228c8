"""Structured logs on stderr: one JSON object a line (or text for people), with time, level, process and trace_id;
never a secret.

`get_logger("payment")` → `.info("payment created", checkout_id=…)`. The event is a short sentence; facts are fields.
Loggers of libraries (uvicorn, aiohttp, asyncpg, grpc) come out in the same shape.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import sys
import traceback
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import structlog

from runtime import trace

__all__ = ["configure", "get_logger", "scrub"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_SECRET_KEY = re.compile(
    r"token|secret|password|api_key|authorization|signature|iban|account_number|card_number", re.IGNORECASE
)
_NOT_SECRET_KEY = frozenset({"token_name", "psp_token", "page_token"})
_SECRET_TEXT = re.compile(
    r"([?&]password=|Bearer\s+|\bsk_|\bwhsec_|://[^/@:\s\"]*:)[^\s\"'@/,}{)(\]\[\\]{4,}|(\bducat_)[\w-]{32,}"
)
_SECRET_MARKS = ("Bearer", "sk_", "whsec_", "://", "ducat_", "password=")
"""Without one of these a text has nothing that _SECRET_TEXT finds; looking for them costs a tenth of the expression."""
_ROW_BEGIN = "Failing row contains ("
_ROW = re.compile(r"Failing row contains \((?:.*\)|.*)", re.DOTALL)  # texts in it may hold line ends; it may be cut off
_process = ""
_encode_json = json.JSONEncoder(default=str, separators=(",", ":"), ensure_ascii=False).encode

EventDict = MutableMapping[str, Any]


def get_logger(name: str = "") -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry ``room = name``."""
    logger = structlog.get_logger(room=name) if name else structlog.get_logger()
    return cast("structlog.typing.FilteringBoundLogger", logger)


def configure(process: str, level: str = "info", format: str = "json", stream: TextIO | None = None) -> None:
    """Sets logging up for this operating-system process; may be called again."""
    global _process
    _process = process
    output = cast("TextIO", _Output(stream))
    render = _render_json if format == "json" else _render_text
    processors = [_add_facts, _mask_secrets, _format_exception, render]
    structlog.configure(
        processors=cast("list[structlog.typing.Processor]", processors),
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(_Formatter(processors))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(_LEVELS[level], logging.INFO))
    for noisy in ("uvicorn.access", "aiohttp.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Output:
    """Where lines go: the given stream, or what is stderr at that moment. A reader that is gone fails no call."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            (self._stream or sys.stderr).write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            (self._stream or sys.stderr).flush()


def scrub(text: str) -> str:
    """The text without bearer tokens, API keys and passwords in URLs."""
    for mark in _SECRET_MARKS:
        if mark in text:
            return _SECRET_TEXT.sub(r"\1\2****", text)
    return text


def _without_row(text: str) -> str:
    """PostgreSQL repeats a whole row in the error of a broken constraint: buyers' addresses, bank accounts."""
    return _ROW.sub("Failing row contains (…)", text) if _ROW_BEGIN in text else text


def _add_facts(_logger: Any, method: str, event: EventDict) -> EventDict:
    facts: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": "error" if method == "exception" else method,
        "process": _process,
    }
    trace_id = trace.trace_id()
    if trace_id:
        facts["trace_id"] = trace_id
    facts.update(event)
    return facts


def _mask_secrets(_logger: Any, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and _ROW_BEGIN in value:
            event[key] = _without_row(value)
        if _is_secret(key) and event[key]:
            event[key] = "****"
    return event


@functools.lru_cache(maxsize=1024)  # the names of fields are those in the code
def _is_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None and key not in _NOT_SECRET_KEY


def _format_exception(_logger: Any, _method: str, event: EventDict) -> EventDict:
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()[1]
    elif isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event["error"] = _without_row(f"{type(error).__name__}: {error}")
        event["traceback"] = _without_row("".join(traceback.format_exception(error)))
    return event


def _render_json(_logger: Any, _method: str, event: EventDict) -> str:
    return scrub(_encode_json(event))


def _render_text(_logger: Any, _method: str, event: EventDict) -> str:
    time, level, process = event.pop("time"), event.pop("level"), event.pop("process")
    message, trail = event.pop("event", ""), event.pop("traceback", "")
    facts = " ".join(f"{key}={value}" for key, value in event.items()).replace(
        "\n", "\\n"
    )  # a value cannot write a line of its own
    return scrub(f"{time[11:23]} {level:<7} {process:<8} {message} {facts}".rstrip() + (f"\n{trail}" if trail else ""))


class _Formatter(logging.Formatter):
    """Lines of the standard library's loggers in our shape."""

    def __init__(self, processors: list[Any]) -> None:
        super().__init__()
        self._processors = processors

    def format(self, record: logging.LogRecord) -> str:
        event: Any = {"room": record.name, "event": record.getMessage()}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for processor in self._processors:
            event = processor(None, record.levelname.lower(), event)
        return str(event)
