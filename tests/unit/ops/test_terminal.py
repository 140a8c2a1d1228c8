"""Risk: a text of strangers (a reason, an id, a PSP's words) clears an operator's terminal, forges a line, or hides what it says."""

from __future__ import annotations

import json

import pytest

from ducat.payment.v1 import finding_pb2
from ops import payment
from ops.check import DIFFERS, Verdict, lines_of
from ops.terminal import json_line, printable

HOSTILE = ["\x1b[2J\x1b[H", "\x9b31m", "a\nall money is there", "\r", "\x7f", "\u202egnorw", "\u2028", "\ud800", "\x00"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_not_printable_is_shown(text: str) -> None:
    shown = printable(f"before {text} after")
    assert shown.isprintable()
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    line = json_line({"error": text, "name": "Jürgen 支払 – \\ \" '"})
    assert line.isprintable()
    assert json.loads(line) == {"error": text, "name": "Jürgen 支払 – \\ \" '"}


def test_what_is_printable_stays() -> None:
    text = "Jürgen 支払 🙂 – 'a' \\n"
    assert printable(text) == text
    assert text.split()[0] in json_line({"name": text})
    assert printable("one\ntwo\t", keep="\n") == "one\ntwo\\t"


@pytest.mark.parametrize("text", [text for text in HOSTILE if text != "\ud800"], ids=ascii)
def test_findings_of_before_the_rule_and_checks_are_shown_escaped(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = finding_pb2.Finding(finding_id="f", text=text, reference=text, reason=text, resolved_by=text)
    finding.resolve_time.GetCurrentTime()
    payment._show(finding, as_json=False)
    shown = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(shown) == 3
    lines = lines_of([Verdict("feeds", DIFFERS, text, [text], text)])
    assert len(lines) == 3
    assert all(line.isprintable() for line in shown + lines)
