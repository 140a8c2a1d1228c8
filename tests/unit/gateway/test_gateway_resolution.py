"""Risk: a resolution that no terminal should show, or that the contract refuses, passes the edge."""

from __future__ import annotations

import json
import re

import pytest

from gateway.adapters.openapi import _SCHEMAS
from gateway.domain import parse_resolution
from gateway.domain.finding import Resolution

PATTERN = re.compile(_SCHEMAS["Resolution"]["properties"]["reason"]["pattern"])


@pytest.mark.parametrize(
    "reason", ["a\nb", "\x1b[2J", "\x9b1m", "a\x7f", "a\n", "\x00a", "\x85 a", "\ud800", "a\udfffb"], ids=ascii
)
def test_control_characters_and_half_pairs_are_refused_by_name(reason: str) -> None:
    found = parse_resolution(json.dumps({"reason": reason, "request_id": "r-1"}).encode())
    assert isinstance(found, list)
    assert [(each.field, each.description) for each in found] == [
        ("reason", "has a control character or half of a surrogate pair")
    ]


@pytest.mark.parametrize("reason", ["refunded by hand", " a ", "支払 🙂", "ü\u00a0x"])
def test_words_pass_as_the_schema_says(reason: str) -> None:
    found = parse_resolution(json.dumps({"reason": reason, "request_id": "r-1"}).encode())
    assert found == Resolution(reason, "r-1")
    assert PATTERN.search(reason)


@pytest.mark.parametrize("reason", ["", "  ", "\t", "a\nb", "\x9b"])
def test_what_the_schema_excludes_is_refused(reason: str) -> None:
    assert isinstance(parse_resolution(json.dumps({"reason": reason, "request_id": "r-1"}).encode()), list)
    assert not PATTERN.search(reason)
