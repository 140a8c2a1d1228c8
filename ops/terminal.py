"""What a command prints of texts that others wrote: errors of peers, ids of messages, reasons, names."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["json_line", "printable"]

# Never within ASCII: json.dumps has escaped what is unprintable there.
_BEYOND_ASCII = re.compile(r"[^\x00-\x7e]")


def printable(text: str, *, keep: str = "") -> str:
    """`text` for a terminal: what is not printable (escape sequences, line breaks, marks that turn the direction of writing, halves of
    surrogate pairs) is shown, not obeyed. `keep`: signs that pass, such as the line breaks of a text of ours with others' words in it.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else _escaped(sign) for sign in text)


def json_line(record: Any) -> str:
    """`record` as one line of JSON that reads well and that no terminal obeys; the same value as without the escapes."""
    return _BEYOND_ASCII.sub(_json_escaped, json.dumps(record, ensure_ascii=False))


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def _json_escaped(found: re.Match[str]) -> str:
    sign = found[0]
    return sign if sign.isprintable() else json.dumps(sign)[1:-1]
