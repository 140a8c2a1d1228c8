"""Risk: a text that a caller gives, and an operator reads later, carries control characters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from ducat.ledger.v1 import ledger_pb2
from ducat.payment.v1 import payment_service_pb2
from runtime.grpc_server import violations_of

WORDS = {"reason", "note", "purpose", "resolved_by"}
"""Names of fields with words for people, in requests."""


def texts() -> Iterator[Any]:
    for module in (payment_service_pb2, ledger_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                for field in method.input_type.fields:
                    if field.name in WORDS and field.type == FieldDescriptor.TYPE_STRING:
                        yield pytest.param(method.input_type, field.name, id=f"{method.name}.{field.name}")


def test_there_are_such_texts() -> None:
    assert {each.id for each in texts()} >= {
        "ResolveFinding.reason",
        "ResolveFinding.resolved_by",
        "CancelPayment.reason",
        "CreateRefund.reason",
        "CreatePayout.purpose",
        "CancelPayout.reason",
        "ResolveBreak.note",
    }


@pytest.mark.parametrize(("descriptor", "name"), list(texts()))
def test_control_characters_are_refused_with_the_name_of_the_field(descriptor: Any, name: str) -> None:
    def wrong(text: str) -> list[str]:
        request = descriptor._concrete_class(**{name: text})
        return [each.description for each in violations_of(request) if each.field == name]

    for text in ("a\nb", "\x1b[2J", "\x9b1m", "a\x7f", "a\n", "\t", "\x00", "\x85"):
        assert wrong(text) == ["has a control character, such as a line break; expected one line of text"], ascii(text)
    for text in ("looked into it – Jürgen", "支払 🙂", " "):
        assert wrong(text) == []
