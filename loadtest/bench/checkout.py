"""CPU of a whole checkout: every process of the platform, by name, for each two-order checkout from the post to the
ledger entry.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp

import ducat.aio
from ops.demo import Books, read_books
from ops.platform import Platform

__all__ = ["print_report", "run"]

POLL_S = 0.1
DONE_S_MAX = 60.0
SELLER_COUNT = 100
WARM_UP = 20
CARD = {"card_number": "4242424242424242", "expiry": "12/30", "cvc": "123", "name": "Jane Doe"}


def run(count: int, at_once: int, executors: int = 1) -> dict[str, Any]:
    """Runs `count` checkouts of two orders, `at_once` at a time; CPU milliseconds a checkout by process, and the
    invariants.
    """
    with tempfile.TemporaryDirectory(prefix="ducat-bench-") as folder:
        return asyncio.run(_run(Path(folder), count, at_once, executors))


async def _run(folder: Path, count: int, at_once: int, executors: int) -> dict[str, Any]:
    platform = Platform(folder, free_ports=True, executor_count=executors)
    await platform.start()
    try:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
            await _checkouts(http, platform, WARM_UP, at_once)
            await asyncio.sleep(1.0)
            before, started = platform.cpu_seconds(), time.perf_counter()
            took_ms = await _checkouts(http, platform, count, at_once)
            seconds = time.perf_counter() - started
            books = await _settled(platform)
            after = platform.cpu_seconds()
        idle_started = platform.cpu_seconds()
        await asyncio.sleep(3.0)
        idle_ended = platform.cpu_seconds()
    finally:
        await platform.stop()
    spent_ms = {name: (after[name] - before.get(name, 0.0)) * 1000 / count for name in after}
    took_ms.sort()
    return {
        "checkouts": count,
        "at_once": at_once,
        "seconds": seconds,
        "checkouts_per_second": count / seconds,
        "checkout_ms": {
            "p50": took_ms[count // 2],
            "p99": took_ms[min(count - 1, count * 99 // 100)],
            "max": took_ms[-1],
        },
        "cpu_ms_per_checkout": spent_ms,
        "cpu_ms_per_checkout_total": sum(spent_ms.values()),
        "cpu_ms_per_checkout_without_sandbox": sum(ms for name, ms in spent_ms.items() if name != "sandbox"),
        "idle_cpu_percent": {name: (idle_ended[name] - idle_started.get(name, 0.0)) / 3.0 * 100 for name in idle_ended},
        "checks": books.invariants(),
    }


async def _checkouts(http: aiohttp.ClientSession, platform: Platform, count: int, at_once: int) -> list[float]:
    gate = asyncio.Semaphore(at_once)

    async def one() -> float:
        async with gate:
            started = time.perf_counter()
            await asyncio.wait_for(_checkout(http, platform.gateway_url), DONE_S_MAX)
            return (time.perf_counter() - started) * 1000

    return list(await asyncio.gather(*(one() for _ in range(count))))


async def _checkout(http: aiohttp.ClientSession, gateway_url: str) -> None:
    """What a shop and a buyer do: post, open each hosted page, pay, come back, look until it is done."""
    number = uuid.uuid4()
    event = {
        "checkout_id": f"BENCH-{number}",
        "buyer_info": {"buyer_id": "BUYER-1", "name": "Jane Doe", "email": "jane.doe@example.com"},
        "payment_orders": [
            {
                "seller_account": f"SELL-{(number.int + offset) % SELLER_COUNT}",
                "amount": "75.00",
                "currency": "USD",
                "payment_order_id": f"BENCH-{number}-{offset}",
            }
            for offset in range(2)
        ],
    }
    async with http.post(f"{gateway_url}/v1/payments", json=event) as answer:
        if answer.status != 201:
            raise RuntimeError(f"POST /v1/payments: {answer.status} {await answer.text()}")
    paid: set[str] = set()
    while True:
        async with http.get(f"{gateway_url}/v1/payments/BENCH-{number}") as answer:
            payment = json.loads(await answer.read())
        if payment["is_payment_done"]:
            return
        pages = [order["hosted_page_url"] for order in payment["payment_orders"] if order["hosted_page_url"]]
        await asyncio.gather(*(_pay(http, url) for url in pages if url not in paid))
        paid.update(pages)
        await asyncio.sleep(POLL_S)


async def _pay(http: aiohttp.ClientSession, url: str) -> None:
    async with http.get(url) as page:
        await page.read()
    async with http.post(url, data=CARD, allow_redirects=False) as answer:
        back = answer.headers["location"]
    async with http.get(back) as page:
        await page.read()


async def _settled(platform: Platform) -> Books:
    async with ducat.aio.Client(
        wallet_address=platform.grpc_address("wallet"), ledger_address=platform.grpc_address("ledger")
    ) as client:
        for _ in range(100):
            books = await read_books(client)
            if all(books.invariants().values()) and not books.held:
                break
            await asyncio.sleep(0.2)
        return books


def print_report(report: dict[str, Any]) -> None:
    """The same figures for people."""
    print(f"{report['checkouts']} checkouts of two orders, {report['at_once']} at once: {report['seconds']:.1f} s, "
          f"{report['checkouts_per_second']:.1f} a second")  # fmt: skip
    print("  checkout ms  " + ", ".join(f"{name} {value:.0f}" for name, value in report["checkout_ms"].items()))
    print("  CPU ms a checkout")
    for name, value in sorted(report["cpu_ms_per_checkout"].items(), key=lambda item: -item[1]):
        print(f"    {name:<12} {value:6.2f}   idle {report['idle_cpu_percent'].get(name, 0.0):.1f} % of a core")
    print(f"    {'total':<12} {report['cpu_ms_per_checkout_total']:6.2f}")
    print(f"    {'less sandbox':<12} {report['cpu_ms_per_checkout_without_sandbox']:6.2f}")
    for name, holds in report["checks"].items():
        print(f"  {name} {'holds' if holds else 'BROKEN'}")
