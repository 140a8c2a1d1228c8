"""The sandbox's HTTP face, called without a network: keys, idempotency, pages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox.bootstrap import Sandbox
from sandbox.psp import PspName
from sandbox.rules import Card
from sandbox.store import Task

NAME = PspName("sandbox", "http://psp/sandbox", "sk", "sk_payout", "whsec", "http://gateway/webhooks/sandbox")
OTHER = PspName("other", "http://psp/other", "sk_other", "sk_payout", "whsec", "http://gateway/webhooks/other")
INTENT = {
    "amount": 10000,
    "currency": "usd",
    "return_url": "http://shop/return?x=1#top",
    "metadata": {"payment_order_id": "ORD-<1>"},
    "description": "<script>alert(1)</script>",
    "statement_descriptor": 'Shop "&" Co',
}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body)
        return value


class Client:
    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    async def call(self, method: str, path: str, body: object = b"", **headers: str) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[dict[str, Any]] = []
        path, _, query = path.partition("?")
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": given}
        await self.sandbox.api(scope, receive, send)
        start, content = sent
        headers_sent = {name.decode(): value.decode() for name, value in start["headers"]}
        assert headers_sent["content-length"] == str(len(content["body"]))
        return Answer(start["status"], headers_sent, content["body"])

    async def create(self, key: str = "ORD-1", **changes: object) -> Answer:
        return await self.call(
            "POST", "/sandbox/v1/payment_intents", {**INTENT, **changes}, authorization="Bearer sk", idempotency_key=key
        )


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    sandbox = Sandbox(tmp_path / "s.sqlite", [NAME, OTHER])
    yield Client(sandbox)
    sandbox.store.close()


async def test_keys(client: Client) -> None:
    path = "/sandbox/v1/payment_intents"
    for headers in ({}, {"authorization": "Bearer sk_other"}, {"authorization": "sk"}, {"x_api_key": "sk"}):
        answer = await client.call("POST", path, INTENT, **headers)
        assert answer.status == 401
        assert answer.json()["error"]["type"] == "authentication_error"
    assert (await client.call("POST", "/sandbox/v1/payouts", {}, authorization="Bearer sk_payout")).status == 401
    assert (await client.call("POST", "/sandbox/v1/payouts", {}, x_api_key="sk_payout")).status == 400


async def test_idempotency_like_stripes(client: Client) -> None:
    first, second, other = await client.create(), await client.create(), await client.create(amount=5)
    assert (first.status, second.status, first.body) == (200, 200, second.body)
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert other.status == 400
    assert other.json()["error"]["type"] == "idempotency_error"
    assert (await client.create("ORD-2")).json()["id"] != first.json()["id"]


async def test_a_replay_is_the_first_answer_even_after_the_payment(client: Client) -> None:
    first = await client.create()
    await pay(client, first, "4242424242424242")
    assert (await client.create()).body == first.body


async def test_a_psp_name_is_a_world_of_its_own(client: Client) -> None:
    first = await client.create()
    assert (
        await client.call("GET", f"/other/v1/payment_intents/{first.json()['id']}", authorization="Bearer sk_other")
    ).status == 404
    assert (await client.call("GET", f"/other/pay/{first.json()['id']}")).status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nobody/v1/payment_intents", 404),
        ("GET", "/sandbox/v1/nothing", 404),
        ("GET", "/sandbox/v1/payment_intents", 400),
        ("PUT", "/sandbox/v1/payment_intents", 404),
        ("POST", "/sandbox/v1/refunds/x/cancel", 404),
        ("GET", "/sandbox/pay/pi_nothing", 404),
        ("GET", "/", 200),
        ("GET", "/healthz", 200),
        ("PUT", "/_control/faults", 405),
        ("GET", "/sandbox", 404),
        ("GET", "//", 404),
    ],
)
async def test_paths(client: Client, method: str, path: str, status: int) -> None:
    assert (await client.call(method, path, authorization="Bearer sk")).status == status


async def test_large_bodies_are_refused(client: Client) -> None:
    assert (
        await client.call("POST", "/sandbox/v1/payment_intents", b"x" * 70_000, authorization="Bearer sk")
    ).status == 413


async def pay(client: Client, created: Answer, card: str, **headers: str) -> Answer:
    path = created.json()["hosted_page_url"].removeprefix("http://psp")
    return await client.call("POST", path, f"card_number={card}".encode(), **headers)


class TestPage:
    async def test_says_what_is_paid_to_whom(self, client: Client) -> None:
        created = await client.create(amount=123456700, currency="kwd")
        page = await client.call("GET", created.json()["hosted_page_url"].removeprefix("http://psp"))
        text = page.body.decode()
        assert page.status == 200
        assert "123,456.700" in text
        assert "KWD" in text
        assert "Shop &quot;&amp;&quot; Co" in text
        assert "<script" not in text
        assert '<label for="card-number">' in text
        assert page.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in page.headers["content-security-policy"]

    async def test_back_to_the_shop_keeps_its_own_query(self, client: Client) -> None:
        created = await client.create()
        answer = await pay(client, created, "4242424242424242")
        expected = f"http://shop/return?x=1&payment_order_id=ORD-%3C1%3E&payment_intent={created.json()['id']}"
        assert (answer.status, answer.headers["location"]) == (303, expected)
        assert (await pay(client, created, "4242424242424242")).headers["location"] == expected

    @pytest.mark.parametrize("card", ["", "4242424242424241", "4111111111111111", "%00"])
    async def test_what_is_no_test_card_changes_nothing(self, client: Client, card: str) -> None:
        created = await client.create()
        answer = await pay(client, created, card)
        assert answer.status == 422
        assert 'role="alert"' in answer.body.decode()
        if card:
            assert card.encode() not in answer.body
        assert client.sandbox.store.count() == {"payment_intent requires_payment": 1}

    async def test_five_soft_declines_end_it(self, client: Client) -> None:
        created = await client.create()
        answers = [(await pay(client, created, "4000000000009995")).status for _ in range(5)]
        assert answers == [402, 402, 402, 402, 303]
        assert client.sandbox.store.count() == {"payment_intent failed": 1}

    async def test_a_decline_by_header(self, client: Client) -> None:
        created = await client.create()
        await pay(client, created, "4242424242424242", sandbox_fault="decline")
        assert client.sandbox.store.count() == {"payment_intent failed": 1}

    async def test_no_card_number_is_stored(self, client: Client, tmp_path: Path) -> None:
        created = await client.create()
        for card in ("4000000000009995", "4242424242424242"):
            await pay(client, created, card)
        stored = await asyncio.to_thread(lambda: b"".join(path.read_bytes() for path in tmp_path.iterdir()))
        assert b"ORD-<1>" in stored
        for card in (b"4000000000009995", b"4242424242424242"):
            assert card not in stored


class TestControl:
    async def test_faults_are_set_kept_and_cleared(self, client: Client, tmp_path: Path) -> None:
        answer = await client.call(
            "POST", "/_control/faults", {"decline": 1.0, "psp": "sandbox"}, authorization="Bearer sk"
        )
        assert answer.json() == {"sandbox": {"decline": 1.0, "slow_ms": 0, "seed": 0}}
        created = await client.create()
        await pay(client, created, "4242424242424242")
        assert client.sandbox.store.count() == {"payment_intent failed": 1}
        client.sandbox.store.close()
        client.sandbox = Sandbox(tmp_path / "s.sqlite", [NAME, OTHER])
        assert (await client.call("GET", "/_control/faults", authorization="Bearer sk_other")).json() == answer.json()
        assert (await client.call("DELETE", "/_control/faults", authorization="Bearer sk")).json() == {}
        assert (
            await client.call("POST", "/_control/faults", {"psp": "nobody"}, authorization="Bearer sk")
        ).status == 400

    @pytest.mark.parametrize("key", ["", "Bearer ", "Bearer sk_payout", "Bearer whsec", "sk"])
    @pytest.mark.parametrize("path", ["/_control/faults", "/_control/pending"])
    async def test_nobody_without_an_api_key_sets_or_sees_anything(self, client: Client, key: str, path: str) -> None:
        """Risk: whoever sees a hosted page, or a script in a buyer's browser, makes every payment fail."""
        nameless = PspName("nameless", "http://psp/nameless", "", "", "whsec", "http://gateway/webhooks/nameless")
        client.sandbox.api._names = {**client.sandbox.api._names, "nameless": nameless}
        for method in ("POST", "GET", "DELETE"):
            answer = await client.call(method, path, {"decline": 1.0}, authorization=key)
            assert answer.status == 401
        assert client.sandbox.psp.faults == {}

    async def test_error_after_has_acted_and_a_retry_gets_it(self, client: Client) -> None:
        assert (await client.create("ORD-fault", metadata={"sandbox_fault": "error_after"})).status == 500
        assert client.sandbox.store.count() == {"payment_intent requires_payment": 1}
        assert (await client.create("ORD-fault", metadata={"sandbox_fault": "error_after"})).status == 200


async def test_tasks_of_a_psp_that_left_the_settings_do_not_end_the_sandbox(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Risk: a renamed PSP with a payout under way, and the sandbox dies at each start."""
    store = client.sandbox.store
    task = store.add_task(0, "gone", "po_1", "", "processing")
    store.add_task(0, "gone", "pi_1", "http://127.0.0.1:9/webhooks/gone", "{}")
    postpone, postponed = store.postpone, asyncio.Event()
    monkeypatch.setattr(store, "postpone", lambda task: (postpone(task), postponed.set()))
    running = asyncio.create_task(client.sandbox.deliveries.run())
    await asyncio.wait(
        {running, asyncio.create_task(postponed.wait())}, timeout=10, return_when=asyncio.FIRST_COMPLETED
    )
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert task.id in [each.id for each in store.tasks()], "it is taken up again when the PSP is back"


async def test_an_event_and_its_change_are_one_transaction(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    created = await client.create()

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(client.sandbox.store, "add_task", fail)
    assert (await pay(client, created, "4242424242424242")).status == 500
    assert client.sandbox.store.count() == {"payment_intent requires_payment": 1}


async def test_a_refund_of_the_dashboard_names_nothing_of_the_merchant(client: Client) -> None:
    """What a platform cannot know beforehand: nobody asked it."""
    intent = (await client.create()).json()
    stored = client.sandbox.psp.get(NAME, "payment_intent", intent["id"])
    client.sandbox.psp.pay(NAME, stored, Card(), frozenset())
    control = {"authorization": "Bearer sk"}
    body = {"psp": "sandbox", "payment_intent": intent["id"], "amount": 2500}
    assert (await client.call("POST", "/_control/refunds", body)).status == 401
    first = await client.call("POST", "/_control/refunds", body, **control)
    second = await client.call("POST", "/_control/refunds", body, **control)
    assert (first.status, second.status) == (200, 200)
    assert first.json()["id"] != second.json()["id"], "two of the same amount are two"
    assert (first.json()["metadata"], first.json()["payment_intent"]) == ({}, intent["id"])
    rest = await client.call("POST", "/_control/refunds", {"psp": "sandbox", "payment_order_id": "ORD-<1>"}, **control)
    assert rest.json()["amount"] == 5000
    for wrong, status in (
        (body, 400),
        ({"psp": "nobody"}, 400),
        ({"psp": "sandbox"}, 400),
        ({"psp": "sandbox", "payment_order_id": "ORD-9"}, 400),
        ({"psp": "sandbox", "payment_intent": "pi_9"}, 404),
    ):
        assert (await client.call("POST", "/_control/refunds", wrong, **control)).status == status, wrong
    assert (await client.call("GET", "/_control/refunds", **control)).status == 405


async def test_a_refund_may_fail_after_it_was_called_paid(client: Client) -> None:
    intent = (await client.create()).json()
    psp = client.sandbox.psp
    psp.pay(NAME, psp.get(NAME, "payment_intent", intent["id"]), Card(), frozenset())
    body = {"psp": "sandbox", "payment_intent": intent["id"]}
    made = await client.call("POST", "/_control/refunds", body, authorization="Bearer sk", sandbox_fault="return")
    for status in ("succeeded", "failed"):
        psp.advance(NAME, Task(1, 0, "sandbox", made.json()["id"], "", status))
        assert psp.get(NAME, "refund", made.json()["id"]).status == status
    assert psp.get(NAME, "payment_intent", intent["id"]).private["refunded"] == 0
