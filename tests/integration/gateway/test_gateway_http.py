"""Risk: an answer that lies, a 5xx that a stranger can cause, a webhook that is acknowledged too early."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ducat.payment.v1 import finding_pb2
from gateway.adapters import app, exchange
from gateway.adapters.routes import ROUTES
from kernel.errors import (
    DeadlineExceeded,
    FieldViolation,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from runtime import http_server
from runtime.security import create_token
from tests.integration.gateway.fake_payment import GOOD_SIGNATURE, FakePayment, page_key_of, serving

EVENT: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[3] / "docs" / "examples" / "payment_event.json").read_bytes()
)
PAYOUT: dict[str, Any] = {
    "seller_account": "SELL-XYZ-1",
    "amount": {"value": 37.5, "currency": "USD"},
    "recipient_details": {
        "account_holder_name": "Jane Doe",
        "account_number": "0001234567",
        "routing_number": "021000021",
        "address": {"city": "Anytown"},
    },
    "purpose": "Order 456",
    "your_reference_id": "PAYOUT-ABC-789",
}
CHECKOUT_ID = EVENT["checkout_id"]
PAGE = f"/checkout/{page_key_of(CHECKOUT_ID)}"
SIGNED = {"Sandbox-Signature": GOOD_SIGNATURE}


@pytest.fixture
def fake() -> FakePayment:
    return FakePayment()


@pytest.fixture
async def url(fake: FakePayment) -> AsyncIterator[str]:
    async with serving(fake) as address:
        yield address


@pytest.fixture
async def http(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url) as session:
        yield session


async def problem_in(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The problem document of an answer, checked for its form."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = await answer.json(content_type=None)
    assert problem["status"] == answer.status
    assert problem["trace_id"] == answer.headers["x-trace-id"]
    assert problem["type"].startswith("urn:ducat:problem:")
    assert {"title", "detail", "instance", "reason"} <= problem.keys()
    return problem


# --- payments


async def test_a_payment_is_created_replayed_and_refused(http: aiohttp.ClientSession) -> None:
    created = await http.post("/v1/payments", json=EVENT)
    assert created.status == 201
    assert created.headers["location"] == f"/v1/payments/{CHECKOUT_ID}"
    payment = await created.json()
    assert payment["checkout_id"] == CHECKOUT_ID
    assert payment["is_payment_done"] is False
    assert payment["create_time"] == "2025-07-21T00:00:00Z"
    assert payment["payment_orders"][0] == {
        "payment_order_id": "ORD-123-A",
        "seller_account": "SELL-XYZ-1",
        "amount": "75.00",
        "amount_minor": 7500,
        "currency": "USD",
        "state": "NOT_STARTED",
        "psp": "",
        "psp_token": "",
        "hosted_page_url": "",
        "failure_reason": "",
        "refunded": "0.00",
        "refunded_minor": 0,
        "refunds": [],
        "attention": "",
    }
    assert payment["findings"] == []

    replayed = await http.post("/v1/payments", json=EVENT)
    assert replayed.status == 200
    assert replayed.headers["idempotent-replayed"] == "true"
    assert await replayed.json() == payment

    other = copy.deepcopy(EVENT)
    other["payment_orders"][0]["amount"] = "75.01"
    refused = await http.post("/v1/payments", json=other)
    assert refused.status == 409
    assert (await problem_in(refused))["reason"] == "IDEMPOTENCY_MISMATCH"

    read = await http.get(f"/v1/payments/{CHECKOUT_ID}")
    assert read.status == 200
    assert await read.json() == payment
    missing = await http.get("/v1/payments/nobody")
    assert missing.status == 404
    assert (await problem_in(missing))["reason"] == "NOT_FOUND"


async def test_every_wrong_field_is_named_and_nothing_is_stored(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    event = copy.deepcopy(EVENT)
    event["payment_orders"][1].update(amount=-1, currency="usd")
    event["extra"] = 1
    answer = await http.post("/v1/payments", json=event)
    assert answer.status == 400
    problem = await problem_in(answer)
    assert problem["reason"] == "INVALID_ARGUMENT"
    fields = [violation["field"] for violation in problem["violations"]]
    assert fields == ["extra", "payment_orders[1].currency", "payment_orders[1].amount"]
    assert fake.payments == {}


async def test_field_paths_of_the_payment_service_become_those_of_the_json(
    http: aiohttp.ClientSession, fake: FakePayment
) -> None:
    def refuse(*paths: str) -> None:
        fake.failure = InvalidArgument("no", violations=[FieldViolation(path, "wrong") for path in paths])

    refuse(
        "payment_orders[1].amount.amount_minor", "payment_orders[0].amount.currency_code", "payment_orders[0].psp", "x"
    )
    problem = await problem_in(await http.post("/v1/payments", json=EVENT))
    assert [each["field"] for each in problem["violations"]] == [
        "payment_orders[1].amount",
        "payment_orders[0].currency",
        "payment_orders[0].psp",
        "x",
    ]
    refuse("reference", "amount.amount_minor", "recipient.aba_routing_number", "recipient.iban", "recipient", "purpose")
    problem = await problem_in(await http.post("/v1/payouts", json=PAYOUT))
    assert [each["field"] for each in problem["violations"]] == [
        "your_reference_id",
        "amount.value",
        "recipient_details.routing_number",
        "recipient_details.iban",
        "recipient_details",
        "purpose",
    ]


async def test_a_payout_is_created_replayed_and_read_masked(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    created = await http.post("/v1/payouts", json=PAYOUT)
    assert created.status == 201
    assert created.headers["location"] == "/v1/payouts/PAYOUT-ABC-789"
    payout = await created.json()
    assert payout["amount"] == {"value": "37.50", "currency": "USD"}
    assert payout["amount_minor"] == 3750
    assert payout["state"] == "HOLDING"
    assert payout["recipient_details"]["account_number"] == "4567"
    assert payout["recipient_details"]["country_code"] == "US"
    assert payout["recipient_details"]["address"]["city"] == "Anytown"
    request = fake.requests["payout PAYOUT-ABC-789"]
    assert request.recipient.aba_routing_number == "021000021"

    replayed = await http.post("/v1/payouts", json=PAYOUT)
    assert (replayed.status, replayed.headers["idempotent-replayed"]) == (200, "true")
    assert (await http.post("/v1/payouts", json={**PAYOUT, "purpose": "other"})).status == 409
    assert await (await http.get("/v1/payouts/PAYOUT-ABC-789")).json() == payout
    assert (await http.get("/v1/payouts/nobody")).status == 404


# --- webhooks


async def test_a_webhook_is_passed_on_as_it_came(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    body = b'{"id": "evt_1",\n "amount": 1.10, "x": "\xc3\xa9\x00\xff"}'
    headers = {**SIGNED, "Content-Type": "application/octet-stream", "X-Two": "a, b", "Cookie": "secret=1"}
    answer = await http.post("/webhooks/sandbox", data=body, headers=headers)
    assert answer.status == 200
    assert await answer.json() == {"applied_count": 1, "duplicate_count": 0, "ignored_count": 0}
    (request,) = fake.notifications
    assert request.body == body
    assert request.headers["sandbox-signature"] == GOOD_SIGNATURE
    assert request.headers["x-two"] == "a, b"
    assert request.headers["content-type"] == "application/octet-stream"
    assert "cookie" not in request.headers
    assert all(name == name.lower() for name in request.headers)
    assert request.channel == 1

    assert (await http.post("/webhooks/sandbox/payouts", data=body, headers=SIGNED)).status == 200
    assert fake.notifications[1].channel == 2


async def test_a_bad_signature_is_refused(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    answer = await http.post("/webhooks/sandbox", data=b"{}", headers={"Sandbox-Signature": "t=1,v1=bad"})
    assert answer.status == 403
    assert (await problem_in(answer))["reason"] == "SIGNATURE_INVALID"
    assert (await http.post("/webhooks/sandbox", data=b"{}")).status == 403
    assert fake.notifications == []


@pytest.mark.parametrize("path", ["/webhooks/nobody", "/webhooks/UPPER", "/webhooks/%00", "/webhooks/" + "a" * 65])
async def test_an_unknown_psp_is_not_found(http: aiohttp.ClientSession, path: str) -> None:
    answer = await http.post(path, data=b"{}", headers=SIGNED)
    assert answer.status == 404
    assert (await problem_in(answer))["reason"] == "PROVIDER_UNKNOWN"


async def test_no_2xx_while_the_payment_service_is_down(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    for failure, status in (
        (Unavailable("down"), 503),
        (DeadlineExceeded("late"), 504),
        (ResourceExhausted("full"), 429),
        (Internal("bug"), 500),
    ):
        fake.failure = failure
        answer = await http.post("/webhooks/sandbox", data=b"{}", headers=SIGNED)
        assert answer.status == status
        await problem_in(answer)
        if status != 500:
            assert int(answer.headers["retry-after"]) > 0
    fake.failure = None
    assert (await http.post("/webhooks/sandbox", data=b"{}", headers=SIGNED)).status == 200


async def test_a_webhook_has_bounded_headers(http: aiohttp.ClientSession) -> None:
    many = {f"X-Header-{number}": "1" for number in range(80)}
    answer = await http.post("/webhooks/sandbox", data=b"{}", headers={**SIGNED, **many})
    assert answer.status == 431
    await problem_in(answer)


async def test_nobody_listens_where_the_payment_service_should_be() -> None:
    async with serving(FakePayment(), is_down=True) as url, aiohttp.ClientSession(url) as http:
        for method, path in (
            ("POST", "/v1/payments"),
            ("GET", "/v1/payments/x"),
            ("POST", "/webhooks/sandbox"),
            ("POST", "/webhooks/sandbox/payouts"),
            ("GET", "/readyz"),
        ):
            answer = await http.request(method, path, json=EVENT if method == "POST" else None)
            assert answer.status == 503, path
            assert (await problem_in(answer))["reason"] == "UNAVAILABLE"
            assert "retry-after" in answer.headers
        assert (await http.get("/healthz")).status == 200


async def test_what_is_not_served_yet_says_so(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    fake.failure = Unimplemented("later")
    answer = await http.post("/v1/payouts", json=PAYOUT)
    assert answer.status == 501
    assert (await problem_in(answer))["reason"] == "UNIMPLEMENTED"


# --- bounds


async def test_bodies_are_bounded_and_typed(fake: FakePayment) -> None:
    async with serving(fake, body_bytes_max=1024) as url, aiohttp.ClientSession(url) as http:
        answer = await http.post("/v1/payments", data=b"x" * 1025, headers={"Content-Type": "application/json"})
        assert answer.status == 413
        await problem_in(answer)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(64):
                yield b"[" * 1024

        answer = await http.post("/v1/payments", data=chunks(), headers={"Content-Type": "application/json"})
        assert answer.status == 413
        assert (await http.post("/webhooks/sandbox", data=b"x" * 1025, headers=SIGNED)).status == 413

        for media_type in (
            "text/plain",
            "application/xml",
            "application/json; charset=latin-1",
            "application/jsonx",
            "",
        ):
            answer = await http.post("/v1/payments", data=b"{}", headers={"Content-Type": media_type})
            assert answer.status == 415, media_type
            await problem_in(answer)
        for path in ("/v1/payments", "/webhooks/sandbox"):
            for encoding in ("gzip", "identity, GZIP", "br", "x"):
                headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
                answer = await http.post(path, data=b"{}", headers=headers)
                assert (answer.status, answer.headers["accept-encoding"]) == (415, "identity"), encoding
        for media_type in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
            headers = {"Content-Type": media_type, "Content-Encoding": "identity"}
            assert (await http.post("/v1/payments", data=b"{}", headers=headers)).status == 400


class SlowPayment(FakePayment):
    """Holds callers' calls until it is told to go on; notifications pass."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self.held = 0

    async def GetPayment(self, request: Any, context: Any) -> Any:
        self.held += 1
        await self.go_on.wait()
        return await super().GetPayment(request, context)


async def test_held_calls_take_nothing_from_webhooks_and_health() -> None:
    """Before: 2,000 slow calls, and liveness, readiness and webhooks got 503 like everything else."""
    slow = SlowPayment()
    async with (
        serving(slow, gateway_caller_rate_max=0) as url,
        aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http,
        aiohttp.ClientSession(url) as other,
    ):

        async def call(number: int) -> tuple[int, str]:
            async with http.get(f"/v1/payments/{number}") as answer:
                return answer.status, answer.headers.get("retry-after", "")

        calls = [asyncio.ensure_future(call(number)) for number in range(2_000)]
        try:
            async with asyncio.timeout(30):
                while slow.held < 512 or sum(call.done() for call in calls) < 2_000 - 512:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for method, path in (("POST", "/webhooks/sandbox"), ("GET", "/healthz"), ("GET", "/readyz")):
                async with asyncio.timeout(2), other.request(method, path, headers=SIGNED) as answer:
                    assert answer.status == 200, path
            assert (await other.get("/openapi.json")).status == 200
            assert {call.result() for call in calls if call.done()} == {(503, "2")}
            answer = await other.get("/v1/payments/x")
            assert (await problem_in(answer))["reason"] == "OVERLOADED"
        finally:
            slow.go_on.set()
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers.count((404, "")) == 512


async def test_bodies_that_come_slowly_take_no_room(fake: FakePayment) -> None:
    limits = {"gateway_webhook_concurrency_max": 1, "gateway_api_concurrency_max": 1}
    async with serving(fake, **limits) as url, aiohttp.ClientSession(url) as http:
        host, port = url.removeprefix("http://").split(":")
        writers = []
        for path in ("/webhooks/sandbox", "/v1/payments"):
            for _ in range(5):
                _, writer = await asyncio.open_connection(host, int(port))
                head = (
                    f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
                )
                writer.write(head.encode())
                writers.append(writer)
        assert (await http.post("/webhooks/sandbox", data=b"{}", headers=SIGNED)).status == 200
        assert (await http.post("/v1/payments", json=EVENT)).status == 201
        for writer in writers:
            writer.close()


async def test_callers_who_ask_too_often_get_429_each_for_itself(fake: FakePayment, tmp_path: Path) -> None:
    path = str(tmp_path / "tokens.toml")
    tokens = [create_token(path, name, ["payments.*"]) for name in ("one", "two")]
    limits = {"gateway_caller_rate_max": 1, "gateway_address_rate_max": 2, "auth_tokens_file": path}
    async with serving(fake, **limits) as url, aiohttp.ClientSession(url) as http:
        for token in tokens:
            statuses = []
            for _ in range(4):
                answer = await http.get("/v1/payments/x", headers={"Authorization": f"Bearer {token}"})
                statuses.append(answer.status)
            assert statuses == [404, 404, 429, 429]
            assert 1 <= int(answer.headers["retry-after"]) <= 2
            assert (await problem_in(answer))["reason"] == "OVERLOADED"
        webhooks = [await http.post("/webhooks/sandbox", data=b"{}", headers=SIGNED) for _ in range(6)]
        assert [answer.status for answer in webhooks].count(429) >= 1
        assert {answer.status for answer in webhooks[:4]} == {200}
        for _ in range(20):
            assert (await http.get("/healthz")).status == 200


async def test_readiness_names_what_is_missing_and_asks_once(fake: FakePayment) -> None:
    async with serving(fake, is_down=True) as url, aiohttp.ClientSession(url) as http:
        answers = await asyncio.gather(*(http.get("/readyz") for _ in range(20)))
        assert {answer.status for answer in answers} == {503}
        assert "payment" in (await problem_in(answers[0]))["detail"]
    asked = 0

    async def check() -> None:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()

    readiness = app.Readiness({"payment": check})
    assert await asyncio.gather(*(readiness.missing() for _ in range(20))) == [["payment"]] * 20
    assert await readiness.missing() == ["payment"]
    assert asked == 1, "a stranger who asks often costs payment nothing"


async def test_a_signature_in_a_trailer_is_none(url: str, fake: FakePayment) -> None:
    answer = await exchange_raw(
        url,
        b"POST /webhooks/sandbox HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: sandbox-signature\r\n\r\n"
        b"2\r\n{}\r\n0\r\nSandbox-Signature: " + GOOD_SIGNATURE.encode() + b"\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 403")
    assert not fake.notifications


async def exchange_raw(url: str, *parts: bytes, wait_s: float = 9.0) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(wait_s):
            return await reader.read(65_536)
    except ConnectionError:
        return b""  # closed while we were still sending: what it said is lost
    finally:
        writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/payments/%00%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/payments/%ed%a0%80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /checkout/" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /payment/return?" + b"a=1&" * 500 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /payment/return?checkout_id=%ff%00&payment_order_id=%ed%a0%80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\ntraceparent: \xff\xfe\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"POST /v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\n{}   ",
        b"POST /v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: \xff\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /webhooks/sandbox HTTP/1.1\r\nHost: x\r\nX-\xc3\xa9: \xff\x01\r\nContent-Length: 0\r\n\r\n",
        b"POST /webhooks/sandbox HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nX-A: \xe2\x82\xac\r\n\r\n",
        b"HEAD /checkout/x HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_strange_requests_never_give_a_5xx(url: str, request_bytes: bytes) -> None:
    answer = await exchange_raw(url, request_bytes)
    assert answer.startswith(b"HTTP/1.1 "), answer
    assert 200 <= int(answer.split()[1]) < 500, answer[:200]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"NaN",
        b'{"checkout_id": "\\ud800"}',
        b'{"payment_orders": [{"amount": 1e999999, "currency": "USD"}]}',
        b'{"payment_orders": [{"amount": ' + b"9" * 10_000 + b', "currency": "USD"}]}',
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b'{"\\u0000": "\\u0000", "\\udfff": 1}',
    ],
)
async def test_strange_bodies_are_a_400(http: aiohttp.ClientSession, body: bytes) -> None:
    for path in ("/v1/payments", "/v1/payouts"):
        answer = await http.post(path, data=body, headers={"Content-Type": "application/json"})
        assert answer.status == 400
        problem = await problem_in(answer)
        assert problem["violations"]
        json.dumps(problem).encode()


async def test_a_head_that_does_not_end_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many_headers = [b"GET / HTTP/1.1\r\n", *(b"X-A: " + b"a" * 8_000 + b"\r\n" for _ in range(20))]
    one_value = [b"GET / HTTP/1.1\r\nX-A: ", *(b"a" * 8_000 for _ in range(20))]
    for endless in (many_headers, one_value):
        answer = await exchange_raw(url, *endless)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431")
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    assert (await exchange_raw(url, b"GET / HT")).startswith(b"HTTP/1.1 408")
    assert (await exchange_raw(url)).startswith(b"HTTP/1.1 408")


def problem_of_raw(answer: bytes) -> dict[str, Any]:
    """The problem document of a raw answer, checked as `problem_in` does."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert headers["content-type"] == "application/problem+json"
    assert int(headers["content-length"]) == len(body)
    problem: dict[str, Any] = json.loads(body)
    assert (problem["status"], problem["trace_id"]) == (int(status.split()[1]), headers["x-trace-id"])
    assert len(problem["trace_id"]) == 32
    return problem


async def test_what_is_refused_before_it_is_a_request_is_a_problem_document_too(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_http = problem_of_raw(await exchange_raw(url, b"\x00\x01\x02\r\n\r\n"))
    assert (no_http["status"], no_http["reason"]) == (400, "INVALID_ARGUMENT")
    assert no_http["trace_id"] != problem_of_raw(await exchange_raw(url, b"nonsense\r\n\r\n"))["trace_id"]
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    assert problem_of_raw(await exchange_raw(url, b"GET / HT"))["detail"].endswith("within 0.05 s")
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 10.0)
    monkeypatch.setattr(http_server, "HEAD_BYTES_MAX", 1_000)
    assert problem_of_raw(await exchange_raw(url, b"GET / HTTP/1.1\r\nX-A: " + b"a" * 2_000))["status"] == 431


async def test_too_many_connections_get_a_problem_document_until_some_leave(fake: FakePayment) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    for limit, status in (("gateway_connections_max", 503), ("gateway_connections_per_address_max", 429)):
        async with serving(fake, **{limit: 2}) as address:
            host, port = address.removeprefix("http://").split(":")
            idle = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
            refused = await exchange_raw(address, request)
            problem = problem_of_raw(refused)
            assert (problem["status"], problem["reason"]) == (status, "OVERLOADED")
            assert b"retry-after: 2" in refused.lower()
            alive = await exchange_raw(address, request.replace(b"openapi.json", b"healthz"))
            assert alive.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in alive
            for _, writer in idle:
                writer.close()
                await writer.wait_closed()
            last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(9):
                while not (await exchange_raw(address, last)).startswith(b"HTTP/1.1 200"):  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(0.01)


async def test_the_second_head_of_a_connection_is_bounded_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in await reader.readuntil(b'{"status":"ok"}')
    writer.write(b"GET /hea")
    async with asyncio.timeout(9):
        assert (await reader.read(1000)).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_a_body_that_does_not_end_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_TIMEOUT_S", 0.05)
    head = b"POST /v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    assert (await exchange_raw(url, head + b"{")).startswith(b"HTTP/1.1 408")


# --- methods, headers, tokens, health


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/payments", "POST"),
        ("DELETE", "/v1/payments/x", "GET, HEAD"),
        ("PUT", "/webhooks/sandbox", "POST"),
        ("POST", "/checkout/x", "GET, HEAD"),
        ("OPTIONS", "/healthz", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_names_the_right_ones(
    http: aiohttp.ClientSession, method: str, path: str, allowed: str
) -> None:
    answer = await http.request(method, path)
    assert answer.status == 405
    assert answer.headers["allow"] == allowed
    await problem_in(answer)


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/payments/", "/v1/payments/a/b", "/checkout/", "/webhooks"])
async def test_a_path_that_is_not_ours(http: aiohttp.ClientSession, path: str) -> None:
    answer = await http.get(path)
    assert answer.status == 404
    await problem_in(answer)


async def test_head_is_get_without_a_body(http: aiohttp.ClientSession) -> None:
    head = await http.head("/")
    get = await http.get("/")
    assert head.status == get.status == 200
    assert head.headers["content-length"] == get.headers["content-length"] != "0"
    assert await head.read() == b""


async def test_every_answer_is_closed_to_browsers_and_traceable(http: aiohttp.ClientSession) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for path in ("/", "/healthz", "/nothing", "/checkout/nobody", "/v1/payments/nobody", "/openapi.json"):
        answer = await http.get(path, headers={"traceparent": traceparent})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-trace-id"] == "0af7651916cd43dd8448eb211c80319c"
        assert answer.headers["traceparent"] == traceparent
        assert "server" not in answer.headers
    assert len((await http.get("/")).headers["x-trace-id"]) == 32


async def test_https_deployments_say_so() -> None:
    async with serving(FakePayment(), gateway_url="https://pay.example") as url, aiohttp.ClientSession(url) as http:
        assert "max-age" in (await http.get("/")).headers["strict-transport-security"]


async def test_tokens_guard_the_api_and_leave_buyers_and_psps_alone(tmp_path: Path, fake: FakePayment) -> None:
    path = str(tmp_path / "tokens.toml")
    reader = create_token(path, "reader", ["payments.read"])
    writer = create_token(path, "writer", ["payments.*"])

    def bearer(token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    async with serving(fake, auth_tokens_file=path) as url, aiohttp.ClientSession(url) as http:
        answer = await http.post("/v1/payments", json=EVENT)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        await problem_in(answer)
        assert (await http.post("/v1/payments", json=EVENT, headers=bearer("wrong"))).status == 401
        answer = await http.post("/v1/payments", json=EVENT, headers=bearer(reader))
        assert answer.status == 403
        assert (await problem_in(answer))["reason"] == "SCOPE_MISSING"
        assert (await http.post("/v1/payments", json=EVENT, headers=bearer(writer))).status == 201
        assert (await http.get(f"/v1/payments/{CHECKOUT_ID}", headers=bearer(reader))).status == 200
        assert (await http.get(PAGE)).status == 200
        assert (await http.post("/webhooks/sandbox", data=b"{}", headers=SIGNED)).status == 200
        assert (await http.get("/healthz")).status == 200


async def test_health_and_readiness(http: aiohttp.ClientSession) -> None:
    assert await (await http.get("/healthz")).json() == {"status": "ok"}
    assert await (await http.get("/readyz")).json() == {"status": "ready"}


# --- pages


async def test_the_checkout_page_shows_where_to_pay_each_order(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    await http.post("/v1/payments", json=EVENT)
    payment = fake.payments[CHECKOUT_ID]
    first, second = payment.payment_orders
    first.state, first.hosted_page_url = "PAYMENT_ORDER_STATE_EXECUTING", "http://psp.example/pay/pi_1?a=1&b=2"
    answer = await http.get(PAGE)
    page = await answer.text()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert 'href="http://psp.example/pay/pi_1?a=1&amp;b=2"' in page
    assert "Pay 75.00 USD" in page
    assert "100.00 USD" in page
    assert "2 orders to pay" in page
    assert 'http-equiv="refresh"' in page
    assert "data-live" in page

    first.state = "PAYMENT_ORDER_STATE_SUCCESS"
    second.state, second.failure_reason = "PAYMENT_ORDER_STATE_FAILED", "Card <b>declined</b>"
    payment.is_payment_done = True
    page = await (await http.get(PAGE)).text()
    assert "1 of 2 orders paid" in page
    assert "Card &lt;b&gt;declined&lt;/b&gt;" in page
    assert "refresh" not in page
    assert "<script" not in page
    assert "href=" not in page


async def test_the_headline_tells_each_end_apart(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    await http.post("/v1/payments", json=EVENT)
    payment = fake.payments[CHECKOUT_ID]
    payment.is_payment_done = True
    for states, headline in (
        (("SUCCESS", "SUCCESS"), "Payment complete"),
        (("SUCCESS", "REFUNDED"), "Payment closed"),
        (("SUCCESS", "EXPIRED"), "1 of 2 orders paid"),
        (("FAILED", "CANCELED"), "None of the orders was paid"),
    ):
        for order, state in zip(payment.payment_orders, states, strict=True):
            order.state = f"PAYMENT_ORDER_STATE_{state}"
        assert headline in await (await http.get(PAGE)).text()


async def test_a_page_never_links_to_anything_but_the_web(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    await http.post("/v1/payments", json=EVENT)
    for url in ("javascript:alert(1)", "data:text/html,x", "//evil", "http://", "http://[", ""):
        for order in fake.payments[CHECKOUT_ID].payment_orders:
            order.state, order.hosted_page_url = "PAYMENT_ORDER_STATE_EXECUTING", url
        page = await (await http.get(PAGE)).text()
        assert "href=" not in page, url


async def test_style_and_script_are_allowed_by_their_hashes_only(http: aiohttp.ClientSession) -> None:
    await http.post("/v1/payments", json=EVENT)
    answer = await http.get(PAGE)
    page = await answer.text()
    policy = answer.headers["content-security-policy"]
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert " style=" not in page
    assert not re.search(r"\son\w+=", page)


async def test_the_return_page_reads_the_state_and_changes_nothing(
    http: aiohttp.ClientSession, fake: FakePayment
) -> None:
    await http.post("/v1/payments", json=EVENT)
    path = f"/payment/return?key={page_key_of(CHECKOUT_ID)}&payment_order_id=ORD-123-A&payment_intent=pi_1"
    before = fake.payments[CHECKOUT_ID].SerializeToString()
    fake.payments[CHECKOUT_ID].payment_orders[0].state = "PAYMENT_ORDER_STATE_EXECUTING"
    waiting = await (await http.get(path)).text()
    assert "Waiting for the payment provider" in waiting
    assert "data-live" in waiting

    fake.payments[CHECKOUT_ID].payment_orders[0].state = "PAYMENT_ORDER_STATE_SUCCESS"
    paid = await (await http.get(path)).text()
    assert "Paid" in paid
    assert "75.00 USD for order ORD-123-A" in paid
    assert "1 more order to pay" in paid
    assert f'href="{PAGE}"' in paid
    assert "data-live" not in paid

    refused = fake.payments[CHECKOUT_ID].payment_orders[0]
    refused.state, refused.failure_reason = "PAYMENT_ORDER_STATE_FAILED", "Your card was declined."
    failed = await (await http.get(path)).text()
    assert "Payment not made" in failed
    assert "75.00 USD for order ORD-123-A: your card was declined." in failed

    refused.state, refused.failure_reason = "PAYMENT_ORDER_STATE_NOT_STARTED", ""
    assert fake.payments[CHECKOUT_ID].SerializeToString() == before


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?",
        "?checkout_id=",
        "?checkout_id=nobody",
        "?key=",
        "?key=a%00b",
        "?key=nobody",
        f"?checkout_id={CHECKOUT_ID}",
        "?payment_order_id=ORD-1",
        "?%ff=%ff",
    ],
)
async def test_the_return_page_works_without_anything_known(http: aiohttp.ClientSession, query: str) -> None:
    answer = await http.get(f"/payment/return{query}")
    assert answer.status == 200
    assert "Thank you" in await answer.text()


async def test_buyers_see_pages_and_not_problem_documents(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    answer = await http.get("/checkout/nobody")
    assert answer.status == 404
    assert "There is no such checkout" in await answer.text()
    fake.failure = Unavailable("down")
    for path in ("/checkout/x", "/payment/return?key=x"):
        answer = await http.get(path)
        assert answer.status == 503
        assert "refresh" in await answer.text()
        assert "retry-after" in answer.headers


async def test_nothing_that_can_be_guessed_shows_a_checkout(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    """Risk: whoever knows or guesses an order number sees sellers, amounts and pay links. Walks every route without a scope."""
    await http.post("/v1/payments", json=EVENT)
    order = fake.payments[CHECKOUT_ID].payment_orders[0]
    order.state, order.hosted_page_url = "PAYMENT_ORDER_STATE_EXECUTING", "http://psp.example/pay/pi_1"
    order.psp_token = "pi_1"
    assert order.seller_account in await (await http.get(PAGE)).text()
    guesses = [
        CHECKOUT_ID,
        order.payment_order_id,
        "pi_1",
        page_key_of(CHECKOUT_ID)[:-1],
        page_key_of(CHECKOUT_ID).upper(),
    ]
    secrets = [order.seller_account, "Checkout CH", "psp.example", "2 orders"]
    names = ("key", "checkout_id", "payment_order_id", "payment_intent", "order")
    open_routes = [route for route in ROUTES if not route.scope and route.method == "GET"]
    assert {route.operation for route in open_routes} >= {"show_checkout", "show_return"}
    for route in open_routes:
        for guess in guesses:
            path = re.sub(r"\{\w+\}", guess, route.path)
            for query in ("", *(f"?{name}={guess}" for name in names)):
                text = await (await http.get(path + query)).text()
                assert not [each for each in secrets if each in text], (path, query)


async def test_the_old_address_answers_like_a_wrong_key(http: aiohttp.ClientSession) -> None:
    await http.post("/v1/payments", json=EVENT)
    answers = set()
    for key in (CHECKOUT_ID, "nobody", "0" * 32, "a" * 200, "%00"):
        answer = await http.get(f"/checkout/{key}")
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _OF_ONE_ANSWER}
        answers.add((answer.status, await answer.text(), str(sorted(kept.items()))))
    assert len(answers) == 1
    assert answers.pop()[0] == 404


async def test_pages_are_neither_kept_nor_indexed_nor_told_to_others(http: aiohttp.ClientSession) -> None:
    await http.post("/v1/payments", json=EVENT)
    for path in (PAGE, f"/payment/return?key={page_key_of(CHECKOUT_ID)}", "/checkout/nobody"):
        answer = await http.get(path)
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-robots-tag"] == "noindex, nofollow"
        assert '<meta name="robots" content="noindex, nofollow">' in await answer.text()


_OF_ONE_ANSWER = ("date", "traceparent", "x-trace-id")


# --- findings


def a_finding() -> finding_pb2.Finding:
    finding = finding_pb2.Finding(
        finding_id="f1",
        kind="FINDING_KIND_AMOUNT_MISMATCH",
        subject="FINDING_SUBJECT_ORDER",
        reference="ORD-123-A",
        checkout_id=CHECKOUT_ID,
        text="sandbox says paid 100 USD",
        ours={"amount_minor": "7500"},
        theirs={"amount_minor": "100"},
    )
    finding.create_time.FromMilliseconds(1_753_056_000_000)
    return finding


async def test_findings_are_listed_by_their_filters(http: aiohttp.ClientSession, fake: FakePayment) -> None:
    fake.findings["f1"] = a_finding()
    query = {
        "page_size": "7",
        "page_token": "t",
        "open_only": "true",
        "kind": "AMOUNT_MISMATCH",
        "subject": "ORDER",
        "psp": "sandbox",
        "seller_account": "S",
        "reference": "R",
        "checkout_id": "C",
        "start_time": "2026-01-31T12:00:00Z",
        "end_time": "2026-01-31T13:00:00+01:00",
    }
    answer = await http.get("/v1/findings", params=query)
    assert answer.status == 200
    found = await answer.json()
    assert found["next_page_token"] == "next"
    assert found["findings"][0]["kind"] == "AMOUNT_MISMATCH"
    assert (found["findings"][0]["ours"], found["findings"][0]["resolve_time"]) == ({"amount_minor": "7500"}, None)
    (asked,) = fake.finding_queries
    assert (asked.page_size, asked.page_token, asked.open_only, asked.psp) == (7, "t", True, "sandbox")
    assert (asked.kind, asked.subject) == (1, 1)
    assert (asked.seller_account, asked.reference, asked.checkout_id) == ("S", "R", "C")
    assert asked.start_time == asked.end_time
    assert (await http.get("/v1/findings")).status == 200
    assert fake.finding_queries[1] == finding_pb2.ListFindingsRequest()


@pytest.mark.parametrize(
    "query",
    [
        "page_size=0",
        "page_size=501",
        "page_size=x",
        "page_size=%D9%A3",
        "open_only=yes",
        "kind=NOTHING",
        "kind=UNSPECIFIED",
        "psp=a&psp=b",
        "subject=x",
        "start_time=yesterday",
        "start_time=2026-01-31",
        "end_time=0001-01-01T00:00:00%2B14:00",
        "opn_only=true",
        "psp=" + "x" * 65,
        "psp=%ff",
        "psp=",
        "start_time=20260131T120000Z",
        "&".join(f"a{number}=1" for number in range(40)),
        "psp=" + "x" * 5000,
    ],
)
async def test_a_filter_that_is_not_understood_is_refused_not_left_out(
    http: aiohttp.ClientSession, fake: FakePayment, query: str
) -> None:
    answer = await http.get(f"/v1/findings?{query}")
    assert answer.status == 400
    await problem_in(answer)
    assert fake.finding_queries == []


async def test_a_finding_is_resolved_with_a_reason_in_the_name_of_the_caller(fake: FakePayment, tmp_path: Path) -> None:
    tokens = str(tmp_path / "tokens.toml")
    writer = create_token(tokens, "jane", ["payments.write"])
    reader = create_token(tokens, "joe", ["payments.read"])
    fake.findings["f1"] = a_finding()
    body = {"reason": "a test of the PSP", "request_id": "R-1"}
    async with serving(fake, auth_tokens_file=tokens) as url, aiohttp.ClientSession(url) as http:
        assert (await http.post("/v1/findings/f1:resolve", json=body)).status == 401
        assert (await http.post("/v1/findings/f1:resolve", json=body, headers=_bearer(reader))).status == 403
        assert (await http.get("/v1/findings", headers=_bearer(writer))).status == 403
        answer = await http.post("/v1/findings/f1:resolve", json=body, headers=_bearer(writer))
        assert answer.status == 200
        found = await answer.json()
        assert (found["resolved_by"], found["reason"]) == ("jane", "a test of the PSP")
        assert found["resolve_time"] == "2025-07-21T00:00:00Z"
        assert (await http.post("/v1/findings/f2:resolve", json=body, headers=_bearer(writer))).status == 404


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        "null",
        '{"reason": "", "request_id": "R"}',
        '{"reason": " ", "request_id": "R"}',
        '{"reason": 5, "request_id": "R"}',
        '{"reason": "\\ud800", "request_id": "R"}',
        '{"reason": "x", "request_id": 5}',
        '{"reason": "x", "request_id": "a b"}',
        '{"reason": "x", "request_id": "R", "resolved_by": "me"}',
        '{"reason": "x", "reason": "y", "request_id": "R"}',
    ],
)
async def test_a_resolution_that_is_not_whole_is_refused(
    http: aiohttp.ClientSession, fake: FakePayment, body: str
) -> None:
    fake.findings["f1"] = a_finding()
    answer = await http.post("/v1/findings/f1:resolve", data=body, headers={"content-type": "application/json"})
    assert answer.status == 400
    await problem_in(answer)
    assert not fake.findings["f1"].HasField("resolve_time")


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}
