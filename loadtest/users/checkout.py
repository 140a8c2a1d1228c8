"""A buyer: posts a checkout of two orders, pays both on the PSP's hosted page, and watches until the webhooks have
landed."""

from __future__ import annotations

import time
import uuid
from typing import Any
from urllib.parse import urljoin

import gevent
from locust import HttpUser, between, task

DONE_S_MAX = 30.0
POLL_S = 0.1
CARD = {"card_number": "4242424242424242", "expiry": "12/30", "cvc": "123", "name": "Load Tester"}
SELLER_COUNT = 200


class CheckoutUser(HttpUser):
    """Each task is one whole checkout; `checkout until done` is its time from the post to the last webhook's effect."""

    wait_time = between(0.1, 0.5)
    weight = 1

    def on_start(self) -> None:
        """The proxies of the environment are none of our business."""
        self.client.trust_env = False

    @task
    def checkout(self) -> None:
        started = time.perf_counter()
        checkout_id = f"LOAD-{uuid.uuid4()}"
        answer = self.client.post("/v1/payments", json=payment_event(checkout_id), name="POST /v1/payments")
        if answer.status_code != 201:
            return
        paid: set[str] = set()
        while time.perf_counter() - started < DONE_S_MAX:
            payment = self.client.get(f"/v1/payments/{checkout_id}", name="GET /v1/payments/{id}").json()
            for order in payment["payment_orders"]:
                if order["hosted_page_url"] and order["payment_order_id"] not in paid:
                    paid.add(order["payment_order_id"])
                    self.pay(order["hosted_page_url"])
            if payment["is_payment_done"]:
                failed = [order for order in payment["payment_orders"] if order["state"] != "SUCCESS"]
                self.report(started, RuntimeError(f"orders not paid: {failed}") if failed else None)
                return
            gevent.sleep(POLL_S)
        self.report(started, TimeoutError(f"checkout {checkout_id} was not done in {DONE_S_MAX:.0f} s"))

    def pay(self, url: str) -> None:
        self.client.get(url, name="hosted page")
        with self.client.post(
            url, data=CARD, name="hosted page: pay", allow_redirects=False, catch_response=True
        ) as answer:
            if answer.status_code not in (302, 303):
                answer.failure(f"expected a redirect to the return page, got {answer.status_code}")
                return
            answer.success()
            back = urljoin(url, answer.headers["location"])
        self.client.get(back, name="GET /payment/return")

    def report(self, started: float, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="E2E",
            name="checkout until done",
            response_time=(time.perf_counter() - started) * 1000,
            response_length=0,
            exception=error,
            context={},
        )


def payment_event(checkout_id: str) -> dict[str, Any]:
    """A checkout of two orders for two sellers."""
    number = uuid.UUID(checkout_id.removeprefix("LOAD-")).int
    return {
        "checkout_id": checkout_id,
        "buyer_info": {
            "buyer_id": f"BUYER-{number % 1000}",
            "name": "Load Tester",
            "email": "load@example.com",
        },
        "payment_orders": [
            {
                "seller_account": f"SELL-{(number + offset) % SELLER_COUNT}",
                "amount": f"{10 + number % 90}.{offset}5",
                "currency": "USD",
                "payment_order_id": f"{checkout_id}-{letter}",
            }
            for offset, letter in enumerate("AB")
        ],
    }
