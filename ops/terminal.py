"""What a command prints of texts that others wrote: errors of peers, ids of messages, reasons, names."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ducat_command", "json_line", "near", "printable", "table"]

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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` (at least one, all with the same keys) under their keys; numbers at the right, nothing as a dash."""
    texts = [["-" if value is None else printable(str(value)) for value in row.values()] for row in rows]
    heads = [name.replace("_", " ") for name in rows[0]]
    widths = [max(len(text) for text in column) for column in zip(heads, *texts, strict=True)]
    numbers = [isinstance(value, int | float) for value in rows[0].values()]
    lines = []
    for line in (heads, *texts):
        cells = zip(line, widths, numbers, strict=True)
        lines.append(
            "  ".join(
                text.rjust(width) if is_number else text.ljust(width) for text, width, is_number in cells
            ).rstrip()
        )
    return "\n".join(lines)


def ducat_command() -> str:
    """How to type `ducat` here: by its name where the shell finds it, else by its path."""
    beside = Path(sys.executable).with_name("ducat")
    found = shutil.which("ducat")
    return "ducat" if found and Path(found).samefile(beside) else near(beside)


def near(path: Path) -> str:
    """A path as one types it from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def _json_escaped(found: re.Match[str]) -> str:
    sign = found[0]
    return sign if sign.isprintable() else json.dumps(sign)[1:-1]
