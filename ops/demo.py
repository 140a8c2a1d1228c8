"""`ducat demo`: one checkout from JSON to credited wallets, a balanced ledger and a seller's payout, seen from outside.

The demo is a client like any other: it posts the payment event over HTTP, plays the buyer on the PSP's hosted page,
and reads the outcome over gRPC. It never looks into a database.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html.parser
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin

import aiohttp

import ducat.aio
import ducat.errors
from ducat.common.v1 import common_pb2
from ducat.ledger.v1 import ledger_pb2
from ducat.payment.v1 import payment_pb2, payout_pb2
from ducat.wallet.v1 import wallet_pb2
from kernel import names
from kernel.money import Money
from ops.platform import Platform, ProcessFailed
from ops.terminal import ducat_command, printable
from runtime.settings import Settings

__all__ = [
    "Books",
    "EventRefused",
    "Outcome",
    "add_parser",
    "pay_checkout",
    "payment_if_done",
    "play_buyer",
    "post_event",
    "read_books",
    "run",
    "run_checkout",
    "wait_for",
]

EXIT_OK, EXIT_FAILED, EXIT_INVALID = 0, 1, 2
WAIT_S_MAX = 60.0
SAMPLE = Path(__file__).with_name("payment_event.json")
POLL_S = 0.05
POLL_S_MAX = 0.5
POLL_GROWTH = 1.2
CARD_NUMBER = "4242424242424242"
BUYERS_AT_ONCE_MAX = 16

PAYOUT_STATES_FINAL = frozenset(
    {
        payout_pb2.PAYOUT_STATE_COMPLETED,
        payout_pb2.PAYOUT_STATE_FAILED,
        payout_pb2.PAYOUT_STATE_REJECTED,
        payout_pb2.PAYOUT_STATE_RETURNED,
        payout_pb2.PAYOUT_STATE_CANCELED,
    }
)
PAID_STATES = frozenset({payment_pb2.PAYMENT_ORDER_STATE_SUCCESS})


Seen = TypeVar("Seen")


class EventRefused(Exception):
    """The gateway refused the payment event; ``problem`` is its RFC 9457 document."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.status = status
        self.problem = problem


class DemoFailed(Exception):
    """Something that had to happen did not, in time; the message says what."""


@dataclass(frozen=True)
class Books:
    """Wallets and ledger at one moment. ``wallets``: name → (currency, balance); ``ledger``: name → credits less
    debits."""

    wallets: dict[str, tuple[str, int]]
    ledger: dict[str, int]
    trial_balance: dict[str, tuple[int, int]]
    held: bool

    def invariants(self) -> dict[str, bool]:
        """What must hold whatever happened."""
        sums: dict[str, int] = {}
        for currency, balance in self.wallets.values():
            sums[currency] = sums.get(currency, 0) + balance
        balances = {name: balance for name, (_, balance) in self.wallets.items()}
        return {
            "wallet_zero_sum": not any(sums.values()),
            "ledger_balanced": all(debit == credit for debit, credit in self.trial_balance.values()),
            "wallet_matches_ledger": all(
                balances.get(name, 0) == self.ledger.get(name, 0) for name in balances.keys() | self.ledger.keys()
            ),
        }


@dataclass
class Outcome:
    """What the demo saw at the end."""

    payment: payment_pb2.Payment
    books: Books
    payouts: list[payout_pb2.Payout] = field(default_factory=list)
    entries: list[ledger_pb2.JournalEntry] = field(default_factory=list)
    note: str = ""

    def invariants(self) -> dict[str, bool]:
        return self.books.invariants()

    def as_json(self) -> dict[str, Any]:
        return {
            "checkout_id": self.payment.checkout_id,
            "is_payment_done": self.payment.is_payment_done,
            "orders": [
                {
                    "payment_order_id": order.payment_order_id,
                    "state": order_state(order.state),
                    "psp": order.psp,
                    "psp_token": order.psp_token,
                    "failure_reason": order.failure_reason,
                }
                for order in self.payment.payment_orders
            ],
            "payouts": [
                {
                    "reference": payout.reference,
                    "state": payout_state(payout.state),
                    "amount_minor": payout.amount.amount_minor,
                    "currency": payout.amount.currency_code,
                }
                for payout in self.payouts
            ],
            "wallets": {name: balance for name, (_, balance) in sorted(self.books.wallets.items())},
            "trial_balance": {
                currency: {"debit": debit, "credit": credit}
                for currency, (debit, credit) in sorted(self.books.trial_balance.items())
            },
            "invariants": self.invariants(),
        }


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo", help="one checkout from JSON to a payout on a platform of its own, then stop"
    )
    parser.add_argument("--event", default=str(SAMPLE), help="file with the payment event (JSON); default: the sample")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--keep-data", action="store_true", help="leave the temporary data folder behind, for a look")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        body = Path(args.event).read_bytes()
    except OSError as error:
        print(
            f"demo: cannot read {args.event}: {error.strerror}; fix: make demo EVENT=path/to/payment_event.json",
            file=sys.stderr,
        )
        return EXIT_INVALID
    settings = Settings.load()
    # A database that outlives the demo needs a wallet log that does so too, or their books would part.
    keep = args.keep_data or bool(settings.database_url)
    folder = Path(settings.data_dir) / "demo" if settings.database_url else Path(tempfile.mkdtemp(prefix="ducat-demo-"))
    try:
        code, outcome = asyncio.run(_demo(body, folder))
    except KeyboardInterrupt:
        return 130
    finally:
        if keep:
            print(f"data kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json and outcome is not None:
        print(json.dumps(outcome.as_json()))  # the last line, whatever was said while stopping
    return code


async def _demo(body: bytes, folder: Path) -> tuple[int, Outcome | None]:
    started = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name.startswith("DUCAT_")}
    platform = Platform(folder, free_ports=True, env=environment, log=lambda line: print(f"  {line}"))
    try:
        print("starting the platform")
        await platform.start()
        print(
            f"ready after {time.monotonic() - started:.1f} s: gateway {platform.gateway_url}, "
            f"sandbox PSP {platform.sandbox_url}\n"
        )
        outcome = await run_checkout(platform, body, log=print)
        _print_outcome(outcome, time.monotonic() - started)
        return (EXIT_OK if all(outcome.invariants().values()) else EXIT_FAILED), outcome
    except EventRefused as refused:
        print(f"demo: the payment event is invalid (HTTP {refused.status}): {refused}", file=sys.stderr)
        for violation in refused.problem.get("violations", []):
            print(f"  {violation['field'] or '(body)'}: {violation['description']}", file=sys.stderr)
        print("nothing was stored", file=sys.stderr)
        return EXIT_INVALID, None
    except (DemoFailed, ProcessFailed, ducat.errors.DucatError, aiohttp.ClientError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_FAILED, None
    finally:
        await platform.stop()


async def run_checkout(platform: Platform, body: bytes, *, log: Callable[[str], None], pay_out: bool = True) -> Outcome:
    """Posts a payment event to a running platform, pays every order, waits for every effect, and pays half a wallet
    out."""
    async with (
        platform.http_session() as http,
        platform.client() as client,
    ):
        payment = await pay_checkout(platform, http, client, body, log=log)
        payouts, note = await _pay_half_out(client, payment) if pay_out else ([], "")
        outcome = await wait_for(lambda: _outcome_if_settled(client, payment), "the wallets to agree with the ledger")
        outcome.payouts, outcome.note = payouts, note
        references = [order.payment_order_id for order in payment.payment_orders] + [
            payout.reference for payout in payouts
        ]
        for reference in references:
            found = await client.ledger.list_journal_entries(
                ledger_pb2.ListJournalEntriesRequest(merchant_reference=reference)
            )
            outcome.entries += found.journal_entries
        return outcome


async def pay_checkout(
    platform: Platform,
    http: aiohttp.ClientSession,
    client: ducat.aio.Client,
    body: bytes,
    *,
    log: Callable[[str], None],
) -> payment_pb2.Payment:
    """Posts a payment event, pays every order, and waits until wallets and ledger have each of them. Others' accounts are not
    looked at."""
    checkout_id, checkout_url = await post_event(http, platform, body)
    log(f"checkout {checkout_id}: {checkout_url}")
    await play_buyer(http, client, checkout_id)
    payment = await wait_for(lambda: payment_if_done(client, checkout_id), f"payment {checkout_id} to be done")
    await wait_for(lambda: _captures_landed(client, payment), "wallets and ledger to have every paid order")
    return payment


# Steps


async def post_event(http: aiohttp.ClientSession, platform: Platform, body: bytes) -> tuple[str, str]:
    """The checkout's id and the address of its page. Raises EventRefused."""
    headers = {"content-type": "application/json", **platform.http_headers()}
    async with http.post(f"{platform.gateway_url}/v1/payments", data=body, headers=headers) as answer:
        document = json.loads(await answer.read())
        if answer.status not in (200, 201):
            raise EventRefused(answer.status, document)
        return str(document["checkout_id"]), str(document["checkout_url"])


async def play_buyer(http: aiohttp.ClientSession, client: ducat.aio.Client, checkout_id: str) -> None:
    """Opens each order's hosted page as soon as there is one, fills the form in and sends it, as a browser without
    JavaScript does."""
    gate = asyncio.Semaphore(BUYERS_AT_ONCE_MAX)
    visited: dict[str, asyncio.Task[None]] = {}

    async def visit(url: str) -> None:
        async with gate:
            await _pay_on_hosted_page(http, url)

    async def all_visited() -> bool:
        payment = (await client.payments.get_payment(payment_pb2.GetPaymentRequest(checkout_id=checkout_id))).payment
        for order in payment.payment_orders:
            if order.hosted_page_url and order.payment_order_id not in visited:
                visited[order.payment_order_id] = asyncio.create_task(visit(order.hosted_page_url))
        return all(
            order.payment_order_id in visited
            or (order.state != payment_pb2.PAYMENT_ORDER_STATE_NOT_STARTED and not order.hosted_page_url)
            for order in payment.payment_orders
        )

    await wait_for(all_visited, "a hosted page for every order")
    await asyncio.gather(*visited.values())


async def _pay_on_hosted_page(http: aiohttp.ClientSession, url: str) -> None:
    async with http.get(url) as page:
        text = await page.text()
        if page.status != 200:
            raise DemoFailed(f"hosted page {url} answered {page.status}")
    form = _Form()
    form.feed(text)
    if form.action is None:
        return  # Paid already, or ended otherwise: the page has nothing to fill in.
    fields = {**form.fields, **{name: value for name, value in _CARD.items() if name in form.fields}}
    async with http.post(urljoin(url, form.action), data=fields, allow_redirects=False) as answer:
        if answer.status not in (200, 302, 303, 402):
            raise DemoFailed(f"hosted page {url} answered {answer.status} to the card")
        back = answer.headers.get("location")
    if back:
        async with http.get(urljoin(url, back)) as page:
            await page.read()


_CARD = {
    "card_number": CARD_NUMBER,
    "expiry": "12/30",
    "cvc": "123",
    "name": "Jane Doe",
    "cardholder_name": "Jane Doe",
}


class _Form(html.parser.HTMLParser):
    """The first form of a page: where it goes and its fields with their values."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and self.action is None and values.get("method", "").lower() == "post":
            self.action = values.get("action", "")
        if tag in ("input", "button") and self.action is not None and values.get("name") and tag == "input":
            self.fields[values["name"]] = values.get("value", "")


async def payment_if_done(client: ducat.aio.Client, checkout_id: str) -> payment_pb2.Payment | None:
    """The payment, once all its orders have ended."""
    payment = (await client.payments.get_payment(payment_pb2.GetPaymentRequest(checkout_id=checkout_id))).payment
    return payment if payment.is_payment_done else None


async def _captures_landed(client: ducat.aio.Client, payment: payment_pb2.Payment) -> bool:
    for order in payment.payment_orders:
        if order.state in PAID_STATES:
            found = await client.ledger.list_journal_entries(
                ledger_pb2.ListJournalEntriesRequest(merchant_reference=order.payment_order_id)
            )
            if not found.journal_entries:
                return False
    wallets = {
        names.seller_wallet(order.seller_account, order.amount.currency_code)
        for order in payment.payment_orders
        if order.state in PAID_STATES
    }
    accounts = (await client.wallet.get_accounts(wallet_pb2.GetAccountsRequest(names=sorted(wallets)))).accounts
    balances = {account.name: account.balance_minor for account in accounts}
    for name in wallets:
        account = (await client.ledger.get_account(ledger_pb2.GetAccountRequest(name=name))).account
        if balances.get(name) != account.credit_minor - account.debit_minor:
            return False
    return True


async def _pay_half_out(client: ducat.aio.Client, payment: payment_pb2.Payment) -> tuple[list[payout_pb2.Payout], str]:
    paid = next(
        (order for order in payment.payment_orders if order.state in PAID_STATES and order.amount.amount_minor > 1),
        None,
    )
    if paid is None:
        return [], "no order was paid, so there is nothing to pay out"
    currency = paid.amount.currency_code
    wallet = names.seller_wallet(paid.seller_account, currency)
    account = (await client.wallet.get_accounts(wallet_pb2.GetAccountsRequest(names=[wallet]))).accounts[0]
    reference = f"PAYOUT-{payment.checkout_id}"[:128]

    async def final_payout() -> payout_pb2.Payout | None:
        payout = (await client.payments.get_payout(payout_pb2.GetPayoutRequest(reference=reference))).payout
        return payout if payout.state in PAYOUT_STATES_FINAL else None

    try:
        await final_payout()  # durable data: an earlier run may have made it, of another half
    except ducat.errors.NotFound:
        half = account.available_minor // 2
        if not half:
            return [], f"{wallet} has too little for a payout"
        await client.payments.create_payout(
            payout_pb2.CreatePayoutRequest(
                reference=reference,
                seller_account=paid.seller_account,
                amount=common_pb2.Money(currency_code=currency, amount_minor=half),
                recipient=_bank_account(currency),
                purpose=f"Seller payout for {payment.checkout_id}"[:200],
            )
        )

    return [await wait_for(final_payout, f"payout {reference} to end")], ""


def _bank_account(currency: str) -> payout_pb2.BankAccount:
    """A bank account that passes its country's checks."""
    common: dict[str, Any] = {"account_holder_name": "Jane Doe", "bank_name": "Anytown Bank"}
    address = payout_pb2.PostalAddress(line1="1 Main Street", city="Anytown", postal_code="10001")
    match currency:
        case "USD":
            address.country_code = "US"
            return payout_pb2.BankAccount(
                account_number="1234567890",
                country_code="US",
                aba_routing_number="021000021",
                address=address,
                **common,
            )
        case "GBP":
            address.country_code = "GB"
            return payout_pb2.BankAccount(
                account_number="66374958", country_code="GB", sort_code="089999", address=address, **common
            )
        case "INR":
            address.country_code = "IN"
            return payout_pb2.BankAccount(
                account_number="123456789012",
                country_code="IN",
                ifsc="HDFC0000123",
                address=address,
                **common,
            )
        case "AUD":
            address.country_code = "AU"
            return payout_pb2.BankAccount(
                account_number="123456789", country_code="AU", bsb="062000", address=address, **common
            )
        case _:
            address.country_code = "DE"
            return payout_pb2.BankAccount(country_code="DE", iban="DE89370400440532013000", address=address, **common)


async def _outcome_if_settled(client: ducat.aio.Client, payment: payment_pb2.Payment) -> Outcome | None:
    """Everything as it stands, once wallets and ledger agree and nothing is held any more."""
    books = await read_books(client)
    if books.held or not books.invariants()["wallet_matches_ledger"]:
        return None
    return Outcome(payment=payment, books=books)


async def read_books(client: ducat.aio.Client) -> Books:
    """Every named wallet account, every ledger account and the trial balance, page by page."""
    wallets: dict[str, tuple[str, int]] = {}
    held = False
    async for account in _accounts(client.wallet.list_accounts):
        wallets[account.name] = (account.currency_code, account.balance_minor)
        held = held or bool(account.held_out_minor or account.held_in_minor)
    ledger = {
        account.name: account.credit_minor - account.debit_minor
        async for account in _accounts(client.ledger.list_accounts)
    }
    trial = await client.ledger.get_trial_balance(ledger_pb2.GetTrialBalanceRequest())
    trial_balance = {line.currency_code: (line.debit_minor, line.credit_minor) for line in trial.lines}
    return Books(wallets=wallets, ledger=ledger, trial_balance=trial_balance, held=held)


async def _accounts(list_accounts: Callable[..., Awaitable[Any]]) -> AsyncIterator[Any]:
    """What a method that lists accounts has, from its first page to its last."""
    page_token = ""
    while True:
        page = await list_accounts(page_size=1000, page_token=page_token)
        for account in page.accounts:
            yield account
        page_token = page.next_page_token
        if not page_token:
            return


async def wait_for(look: Callable[[], Awaitable[Seen | None]], what: str) -> Seen:
    """Looks until there is something to see."""
    deadline, pause_s = time.monotonic() + WAIT_S_MAX, POLL_S
    while True:
        seen = await look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise DemoFailed(
                f"waited {WAIT_S_MAX:.0f} s in vain for {what}; `{ducat_command()} demo --keep-data` leaves its logs to look at"
            )
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * POLL_GROWTH, POLL_S_MAX)


# What people read


def order_state(state: int) -> str:
    return payment_pb2.PaymentOrderState.Name(state).removeprefix("PAYMENT_ORDER_STATE_")


def payout_state(state: int) -> str:
    return payout_pb2.PayoutState.Name(state).removeprefix("PAYOUT_STATE_")


def _print_outcome(outcome: Outcome, seconds: float) -> None:
    payment = outcome.payment
    start = payment.create_time.ToDatetime()
    entries = {entry.merchant_reference: entry for entry in outcome.entries}
    print(f"checkout {payment.checkout_id} done: {payment.is_payment_done}\n")
    for order in payment.payment_orders:
        amount = Money(order.amount.currency_code, order.amount.amount_minor)
        where = f"at {order.psp or '-'}  {order.psp_token}"
        print(f"order {order.payment_order_id}  {amount} for {order.seller_account} {where}")
        for change in order.history:
            print(
                f"  {_after(start, change.time.ToDatetime())}  {order_state(change.state):<12} {printable(change.cause)}"
            )
        if order.payment_order_id in entries:
            _print_entry(start, entries[order.payment_order_id])
        if order.failure_reason:
            print(f"  why: {printable(order.failure_reason)}")
    for payout in outcome.payouts:
        amount = Money(payout.amount.currency_code, payout.amount.amount_minor)
        where = f"at {payout.psp}  {payout.psp_payout_id}"
        print(f"\npayout {payout.reference}  {amount} from {payout.seller_account} {where}")
        for step in payout.history:
            print(f"  {_after(start, step.time.ToDatetime())}  {payout_state(step.state):<12} {printable(step.cause)}")
        if payout.reference in entries:
            _print_entry(start, entries[payout.reference])
        if payout.failure_reason:
            print(f"  why: {printable(payout.failure_reason)}")
    if outcome.note:
        print(f"\npayout: {outcome.note}")
    print("\nwallets")
    for name, (currency, balance) in sorted(outcome.books.wallets.items()):
        print(f"  {name:<44} {Money(currency, balance)!s:>20}")
    print("\ntrial balance                                               debit               credit")
    for currency, (debit, credit) in sorted(outcome.books.trial_balance.items()):
        print(f"  {currency:<40} {Money(currency, debit)!s:>22} {Money(currency, credit)!s:>20}")
    print("\ninvariants")
    for name, holds in outcome.invariants().items():
        print(f"  {name:<24} {'holds' if holds else 'BROKEN'}")
    print(f"\nfinished after {seconds:.1f} s")


def _print_entry(start: datetime, entry: ledger_pb2.JournalEntry) -> None:
    sides = ", ".join(
        f"{'Dr' if posting.side == ledger_pb2.POSTING_SIDE_DEBIT else 'Cr'} {posting.account_name}"
        for posting in entry.postings
    )
    print(f"  {_after(start, entry.create_time.ToDatetime())}  {'ledger':<12} {sides}")


def _after(start: datetime, moment: datetime) -> str:
    return f"+{max(0.0, (moment - start).total_seconds()) * 1000:7.0f} ms"


with contextlib.suppress(AttributeError):
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
