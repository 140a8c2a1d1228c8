"""Reads a JSON document without losing anything: numbers keep their text (no float, ever), repeated keys are seen.

A document that is no JSON, or is nested too deep, gives one violation of the field `$` (the whole document).
"""

from __future__ import annotations

import json
import re
from typing import Any

from kernel.errors import FieldViolation

__all__ = ["DEPTH_MAX", "DOCUMENT", "JsonObject", "NumberText", "kind_of", "read_document"]

DOCUMENT = "$"
"""The path of the document as a whole."""
DEPTH_MAX = 32

# A string is skipped whole. The possessive `*+` and the optional closing quote keep the scan linear on any input.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


class NumberText(str):
    """A JSON number, as it was written."""

    __slots__ = ()


class JsonObject(dict[str, Any]):
    """An object in which a key came twice; ``repeated`` has those keys. An object without such keys is a plain dict."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated = tuple(dict.fromkeys(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]


class _ConstantFound(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else JsonObject(pairs)


def _constant(name: str) -> Any:
    raise _ConstantFound(name)


_decode = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=NumberText, parse_int=NumberText, parse_constant=_constant
).decode


def read_document(body: bytes) -> Any | list[FieldViolation]:
    """The document (dict, list, str, NumberText, bool or None), or what is wrong with it as a list of FieldViolation.

    A document that is itself a list comes back as a tuple, so that the two cannot be mixed up.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        return _refused(f"is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}")
    if text.count("[") + text.count("{") > DEPTH_MAX and _depth(text) > DEPTH_MAX:
        return _refused(f"is nested deeper than {DEPTH_MAX} levels")
    try:
        document = _decode(text)
    except _ConstantFound as error:
        return _refused(f"is not JSON: {error} is no JSON number")
    except json.JSONDecodeError as error:
        return _refused(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        return _refused(f"is nested deeper than {DEPTH_MAX} levels")
    return tuple(document) if isinstance(document, list) else document


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, NumberText):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, dict) else "a list"


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        first = match[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


def _refused(description: str) -> list[FieldViolation]:
    return [FieldViolation(DOCUMENT, f"the body {description}")]
