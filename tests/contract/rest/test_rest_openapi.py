"""Risk: a document that promises something else than the code does; an input that gives a 5xx.

schemathesis generates good and bad requests of every operation from the document, against the real application behind
its real HTTP server; the payment service is a fake behind a real gRPC server: only the gateway is under test.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from ducat.payment.v1 import finding_pb2, payment_pb2, payout_pb2
from gateway.adapters.openapi import OPENAPI
from gateway.adapters.routes import ROUTES
from gateway.domain import payment_event, payout_request
from runtime.grpc_server import PRINTABLE
from tests.integration.gateway.fake_payment import GOOD_SIGNATURE, FakePayment, serving

ROOT = Path(__file__).parents[3]
EXAMPLE_COUNT_MAX = 30
"""Of each operation and mode; the whole file stays below 40 s."""

NUMBERS = itertools.count(1)

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(OPENAPI)
SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def gateway_url() -> Iterator[str]:
    """The gateway in a thread with an event loop of its own; schemathesis is synchronous."""
    ready: list[str] = []
    is_up = threading.Event()
    stop: list[Any] = []

    fake = FakePayment()
    fake.findings["f1"] = finding_pb2.Finding(finding_id="f1", kind="FINDING_KIND_PAID_TWICE")

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            ready.append(await stack.enter_async_context(serving(fake)))
            stopping = asyncio.Event()
            stop.append((asyncio.get_running_loop(), stopping))
            is_up.set()
            await stopping.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert is_up.wait(10)
    yield ready[0]
    loop, stopping = stop[0]
    loop.call_soon_threadsafe(stopping.set)
    thread.join(10)


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLE_COUNT_MAX,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_every_operation_does_what_the_document_says(case: schemathesis.Case, gateway_url: str) -> None:
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE:
        make_answerable(case)
    headers = {"Sandbox-Signature": GOOD_SIGNATURE} if "/webhooks/" in case.operation.path else {}
    case.call_and_validate(base_url=gateway_url, checks=CHECKS, headers=headers)


def make_answerable(case: schemathesis.Case) -> None:
    """Names what exists and asks for what is new, so that 200 and 201 are checked too, not only 404 and 409."""
    if "finding_id" in case.path_parameters and next(NUMBERS) % 2:
        case.path_parameters["finding_id"] = "f1"
    if "psp" in case.path_parameters:
        case.path_parameters["psp"] = "sandbox"
    for name in ("checkout_id", "your_reference_id"):
        if isinstance(case.body, dict) and name in case.body:
            case.body[name] = f"NEW-{next(NUMBERS)}"


def test_the_document_has_every_route_and_no_other() -> None:
    documented = {
        (method.upper(), path, operation["operationId"])
        for path, methods in OPENAPI["paths"].items()
        for method, operation in methods.items()
    }
    assert documented == {(route.method, route.path, route.operation) for route in ROUTES}


def rule_of(message: Any, path: str) -> tuple[Any, bool]:
    """The protovalidate rules of a text field, and whether it may be empty by its pattern."""
    descriptor = message.DESCRIPTOR
    *outer, last = path.split(".")
    for name in outer:
        descriptor = descriptor.fields_by_name[name].message_type
    rules = rules_of(descriptor.fields_by_name[last])
    return rules.string, rules.required


@functools.cache
def options_of_fields() -> tuple[Any, Any]:
    """google.protobuf.FieldOptions in a pool that knows the option `buf.validate.field`, and that option."""
    vendored, well_known = ROOT / "proto" / "vendor", Path(protoc.__file__).parent / "_proto"
    with tempfile.NamedTemporaryFile() as described:
        arguments = [f"-I{vendored}", f"-I{well_known}", "--include_imports", f"--descriptor_set_out={described.name}"]
        assert protoc.main(["protoc", *arguments, "buf/validate/validate.proto"]) == 0
        files = descriptor_pb2.FileDescriptorSet.FromString(described.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    options = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FieldOptions"))
    message_factory.GetMessageClassesForFiles(["buf/validate/validate.proto"], pool)
    return options, pool.FindExtensionByName("buf.validate.field")


def rules_of(field: Any) -> Any:
    """What the proto demands of a field, from its stub's descriptor."""
    options, extension = options_of_fields()
    return options.FromString(field.GetOptions().SerializeToString()).Extensions[extension]


@pytest.mark.parametrize(
    ("message", "rules"),
    [
        (payment_pb2.CreatePaymentRequest, payment_event.TEXT_RULES),
        (payout_pb2.CreatePayoutRequest, payout_request.TEXT_RULES),
    ],
)
def test_the_text_rules_are_those_of_the_proto(message: Any, rules: dict[str, Any]) -> None:
    for path, rule in rules.items():
        proto, _ = rule_of(message, path)
        assert rule.is_required == (proto.min_len > 0), path
        if proto.HasField("max_len"):
            assert rule.length_max == proto.max_len, path
        if rule.pattern is not None:
            assert f"^{rule.pattern.pattern}$" == proto.pattern, path
        else:  # the edge takes control characters in no text
            assert proto.pattern in ("", PRINTABLE), path


def test_the_limit_of_orders_is_that_of_the_proto() -> None:
    field = payment_pb2.CreatePaymentRequest.DESCRIPTOR.fields_by_name["payment_orders"]
    assert rules_of(field).repeated.max_items == payment_event.ORDERS_MAX


def test_every_field_of_the_proto_is_in_the_json() -> None:
    """A field that the contract grows must not be forgotten here. What REST leaves out on purpose is named."""
    left_out = {"schedule_time"}
    for message, rules, renamed in (
        (payment_pb2.CreatePaymentRequest, payment_event.TEXT_RULES, {"buyer_info", "payment_orders"}),
        (payout_pb2.CreatePayoutRequest, payout_request.TEXT_RULES, {"amount", "recipient"}),
    ):
        covered = {re.split(r"\.", path)[0] for path in rules} | renamed | left_out
        assert {field.name for field in message.DESCRIPTOR.fields} <= covered
