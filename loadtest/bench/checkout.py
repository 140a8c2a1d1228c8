"""CPU of a whole checkout: every process of the platform, by name, for each two-order checkout from the post to the
ledger entry; and, at half of the rate that this run reached, how long a paid order takes to be in the wallet.

The second figure begins with the buyer's card going to the PSP and ends when the wallet's own event stream tells the bench
of the credit. So it holds the PSP's work and the stream's as well: it is an upper bound of "webhook received → wallet
credited", which no process could time alone.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import ducat.aio
from ducat.wallet.v1 import wallet_pb2
from ops.demo import Books, read_books
from ops.platform import Platform

__all__ = ["print_report", "run"]

LOOK_S = 0.1
"""Between the shop's post and its first look at the payment; the wait doubles from look to look."""
HALF_LOAD_S = 8.0
"""How long checkouts arrive at half load."""
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
            done = await _checkouts(http, platform, count, at_once)
            seconds = time.perf_counter() - started
            books = await _settled(platform)
            after = platform.cpu_seconds()
            await asyncio.sleep(3.0)
            idle_ended = platform.cpu_seconds()
            half = await _half_load(http, platform, count / seconds / 2)
            books = await _settled(platform)
    finally:
        await platform.stop()
    spent_ms = {name: (after[name] - before.get(name, 0.0)) * 1000 / count for name in after}
    return {
        "checkouts": count,
        "at_once": at_once,
        "seconds": seconds,
        "checkouts_per_second": count / seconds,
        "checkout_ms": _quantiles([each.took_ms for each in done]),
        "looks_per_checkout": sum(each.looks for each in done) / count,
        "cpu_ms_per_checkout": spent_ms,
        "cpu_ms_per_checkout_total": sum(spent_ms.values()),
        "cpu_ms_per_checkout_without_sandbox": sum(ms for name, ms in spent_ms.items() if name != "sandbox"),
        "half_load": half,
        "idle_cpu_percent": {name: (idle_ended[name] - after.get(name, 0.0)) / 3.0 * 100 for name in idle_ended},
        "checks": books.invariants(),
    }


@dataclass(slots=True)
class _Done:
    """What one checkout took, how often the shop looked at it, and when the card of each amount was sent."""

    took_ms: float = 0.0
    looks: int = 0
    paid_s: dict[int, float] = field(default_factory=dict)


async def _checkouts(http: aiohttp.ClientSession, platform: Platform, count: int, at_once: int) -> list[_Done]:
    gate = asyncio.Semaphore(at_once)

    async def one() -> _Done:
        async with gate:
            return await asyncio.wait_for(_checkout(http, platform.gateway_url, (7_500, 7_500)), DONE_S_MAX)

    return list(await asyncio.gather(*(one() for _ in range(count))))


async def _half_load(http: aiohttp.ClientSession, platform: Platform, rate: float) -> dict[str, Any]:
    """Checkouts that arrive at `rate` a second whatever becomes of those before. Each order has an amount of its own, by which the
    wallet's events are known."""
    count = max(1, int(rate * HALF_LOAD_S))
    credited_s: dict[int, float] = {}
    async with platform.client() as client:
        watching = [
            asyncio.create_task(_watch_credits(client, shard, credited_s))
            for shard in range(platform.settings.wallet_shard_count)
        ]
        await asyncio.sleep(0.2)  # the streams begin with the newest event
        running = []
        started = time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            amounts = 1_000_000 + 2 * number, 1_000_001 + 2 * number
            running.append(asyncio.create_task(_checkout(http, platform.gateway_url, amounts)))
        async with asyncio.timeout(DONE_S_MAX):
            done = await asyncio.gather(*running)
            paid_s = {amount: at_s for each in done for amount, at_s in each.paid_s.items()}
            while len(credited_s) < len(paid_s):  # noqa: ASYNC110 - filled by two watchers, and only at the end
                await asyncio.sleep(0.05)
        for watcher in watching:
            watcher.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return {
        "checkouts_per_second": rate,
        "orders": len(paid_s),
        "checkout_ms": _quantiles([each.took_ms for each in done]),
        "card_to_wallet_ms": _quantiles([(credited_s[amount] - at_s) * 1000 for amount, at_s in paid_s.items()]),
    }


async def _watch_credits(client: ducat.aio.Client, shard: int, credited_s: dict[int, float]) -> None:
    async with client.wallet.watch_events(wallet_pb2.WatchEventsRequest(shard=shard)) as responses:
        async for response in responses:
            now_s = time.perf_counter()
            for event in response.events:
                if event.kind == wallet_pb2.EVENT_KIND_MONEY_MOVED and event.amount_minor >= 1_000_000:
                    credited_s.setdefault(event.amount_minor, now_s)


def _quantiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "p50": values[len(values) // 2],
        "p99": values[min(len(values) - 1, len(values) * 99 // 100)],
        "max": values[-1],
    }


async def _checkout(http: aiohttp.ClientSession, gateway_url: str, amounts: tuple[int, ...]) -> _Done:
    """What a shop and a buyer do: post, open each hosted page, pay, come back, look until it is done."""
    done = _Done()
    started = time.perf_counter()
    number = uuid.uuid4()
    event = {
        "checkout_id": f"BENCH-{number}",
        "buyer_info": {"buyer_id": "BUYER-1", "name": "Jane Doe", "email": "jane.doe@example.com"},
        "payment_orders": [
            {
                "seller_account": f"SELL-{(number.int + offset) % SELLER_COUNT}",
                "amount": f"{amount // 100}.{amount % 100:02}",
                "currency": "USD",
                "payment_order_id": f"BENCH-{number}-{offset}",
            }
            for offset, amount in enumerate(amounts)
        ],
    }
    async with http.post(f"{gateway_url}/v1/payments", json=event) as answer:
        if answer.status != 201:
            raise RuntimeError(f"POST /v1/payments: {answer.status} {await answer.text()}")
    paid: set[str] = set()
    while True:
        await asyncio.sleep(LOOK_S * 2**done.looks)
        async with http.get(f"{gateway_url}/v1/payments/BENCH-{number}") as answer:
            payment = json.loads(await answer.read())
        done.looks += 1
        if payment["is_payment_done"]:
            done.took_ms = (time.perf_counter() - started) * 1000
            return done
        pages = {
            order["hosted_page_url"]: order["amount_minor"]
            for order in payment["payment_orders"]
            if order["hosted_page_url"] and order["hosted_page_url"] not in paid
        }
        await asyncio.gather(*(_pay(http, url, amount, done) for url, amount in pages.items()))
        paid.update(pages)


async def _pay(http: aiohttp.ClientSession, url: str, amount: int, done: _Done) -> None:
    async with http.get(url) as page:
        await page.read()
    done.paid_s[amount] = time.perf_counter()
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
    half = report["half_load"]
    print(f"  the shop looked {report['looks_per_checkout']:.1f} times a checkout")
    print(f"  at half of that rate, card sent → wallet credited, ms, {half['orders']} orders: "
          + ", ".join(f"{name} {value:.0f}" for name, value in half["card_to_wallet_ms"].items()))  # fmt: skip
    print("  CPU ms a checkout")
    for name, value in sorted(report["cpu_ms_per_checkout"].items(), key=lambda item: -item[1]):
        print(f"    {name:<12} {value:6.2f}   idle {report['idle_cpu_percent'].get(name, 0.0):.1f} % of a core")
    print(f"    {'total':<12} {report['cpu_ms_per_checkout_total']:6.2f}")
    print(f"    {'less sandbox':<12} {report['cpu_ms_per_checkout_without_sandbox']:6.2f}")
    for name, holds in report["checks"].items():
        print(f"  {name} {'holds' if holds else 'BROKEN'}")
