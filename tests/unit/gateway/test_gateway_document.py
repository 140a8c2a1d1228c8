"""Risk: money through a float, a key that hides another, a document that costs more to refuse than to take."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.document import DEPTH_MAX, JsonObject, NumberText, kind_of, read_document


def test_numbers_keep_their_text() -> None:
    document = read_document(b'{"a": 75.00, "b": 1e999999, "c": 100000000000000000000000000000000000001, "d": -0}')
    assert document == {"a": "75.00", "b": "1e999999", "c": "100000000000000000000000000000000000001", "d": "-0"}
    assert {type(value) for value in document.values()} == {NumberText}


def test_text_is_not_a_number() -> None:
    assert type(read_document(b'{"a": "75.00"}')["a"]) is str


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"\xff\xfe", "not UTF-8: byte 0 is 0xff"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\x00"', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"9" * 5000 + b"x", "not JSON"),
    ],
)
def test_what_is_no_document_is_refused_as_a_whole(body: bytes, message: str) -> None:
    violations = read_document(body)
    assert isinstance(violations, list)
    assert [violation.field for violation in violations] == ["$"]
    assert message in violations[0].description


def test_a_repeated_key_is_seen_at_any_level() -> None:
    document = read_document(b'{"a": {"b": 1, "c": 2, "b": 3, "b": 4}, "d": 5}')
    assert type(document) is dict
    assert isinstance(document["a"], JsonObject)
    assert document["a"].repeated == ("b",)


def test_depth_is_bounded_and_brackets_in_text_do_not_count() -> None:
    deepest = b"[" * DEPTH_MAX + b"]" * DEPTH_MAX
    assert isinstance(read_document(deepest), tuple)
    for too_deep in (b"[" + deepest + b"]", b"[" * 100_000, b'{"a":' * 50_000, b'"\\"", [' * 50_000):
        violations = read_document(too_deep)
        assert isinstance(violations, list)
    assert read_document(json.dumps({"a": "[{" * 200 + '\\"[' * 200}).encode()) == {"a": "[{" * 200 + '\\"[' * 200}
    assert isinstance(read_document(b"[" + b",".join([b"[]"] * 500) + b"]"), tuple)


@pytest.mark.parametrize(
    "body",
    [b'"' + b'\\"' * 131_000, b'"' + b'\\"' * 131_000 + b"\\" + b"[" * 40, b'"[' * 131_000, b"[" * 262_000],
)
def test_refusing_is_linear(body: bytes) -> None:
    begin_s = time.process_time()
    read_document(body)
    assert time.process_time() - begin_s < 1.0


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_json_writes_is_read(value: object) -> None:
    document = read_document(json.dumps(value).encode())
    assert (list(document) if isinstance(document, tuple) else document) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    read_document(body)


def test_kinds_in_words() -> None:
    values = [None, True, NumberText("1"), "1", {}, []]
    assert [kind_of(value) for value in values] == [
        "null",
        "true or false",
        "a number",
        "text",
        "an object",
        "a list",
    ]
