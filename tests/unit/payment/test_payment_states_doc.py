"""docs/payment-states.md is drawn from the tables.

Draw it again with `python tests/unit/payment/test_payment_states_doc.py`.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from kernel.state_table import StateTable
from payment.domain.payment_order import PAYMENT_ORDER_TABLE
from payment.domain.payout import PAYOUT_TABLE
from payment.domain.refund import REFUND_TABLE

DOC = Path(__file__).resolve().parents[3] / "docs" / "payment-states.md"

HEAD = """# States of orders, payouts and refunds

Drawn from the tables in `payment/domain`; `tests/unit/payment/test_payment_states_doc.py` holds this page to
them and draws it again. A pair of state and event that is in neither list of its section is refused: a caller
gets `FAILED_PRECONDITION`, a report of the executor or the wallet ends in the dead-letter topic, a notification
of a PSP is parked or flagged.

## Decisions

- **Late success.** A PSP that reports success after we called the order FAILED, CANCELED or EXPIRED has the
  buyer's money, so the order becomes SUCCESS and the seller is credited. `payment_completed` is not sent a
  second time.
- **Reordered and repeated notifications** are ignored pairs: failed, canceled or expired after SUCCESS changes
  nothing. Each notification is also stored once by (PSP, event id), in the transaction of its effect, so that a
  repeat cannot act even where the table would let it (a dispute that was won, opened "again" by an old
  webhook).
- **A notification that fits nothing yet** (its order is unknown here, or a dispute came before the success) is
  parked: stored, answered with 2xx, tried again when its PSP object becomes known, at once when the process
  that parked it applies the success, and on a schedule (after one to two minutes, then ever less often) for about
  eight days. We do not leave this to the PSP's retries, because some give up early.
- **A notification that contradicts us** is flagged: another amount or currency than the order has, a second
  payment of an order that is paid, or a payment that is another order's. Nothing is credited, no event goes out; a
  *finding* is kept, `attention` (and, unless the order is paid, `failure_reason`) says why, and a line at error level
  tells operators. Findings stand beside one another until each is resolved with a reason (`ducat payment findings`,
  `ducat payment resolve`, docs/rest.md); the same one, told again, is kept once. A notification that was parked for
  about eight days and still fits nothing becomes a finding too.
- **Another intent of the same order.** After a failover two PSPs may know an order. The end of an intent that
  is not the recorded one says nothing about the order; its success does: the order is captured there, and the
  recorded intent is canceled.
- **Cancel and expiry** of an order whose intent is known also go to the PSP. Where the intent becomes known
  only afterwards, the cancel follows it.
- **Payouts** ask for a hold first. A cancel is possible until the hold stands; a hold that arrives after the
  cancel is released. FAILED after COMPLETED means that the bank refused what the PSP had called paid: RETURNED.
  COMPLETED after FAILED, REJECTED or CANCELED is flagged, because the hold is gone. RETURNED before COMPLETED
  voids the hold, which has the same sum. What a PSP tells of a second payout under our reference is flagged:
  it may have been paid twice, and its failure must not give back what the first one took.
- **Disputes.** LOST may come without, or before, OPENED. WON counts only while DISPUTED, so that a lost dispute
  is never marked won by an old notification. A refund that was under way when a dispute came is added, and the
  dispute's state stays. A loss whose opening never came tells of the opening too, so that the money is booked. A
  dispute takes what refunds have left, never more: where the PSP names another amount, that is a finding.
- **A refund made at the PSP** (in its dashboard, say) is one object of the PSP, whatever event tells of it: the same
  refund told many times is booked once, two of the same amount are two. Its order is the one whose payment it gives
  back. The buyer has the money, so the refund begins as SUCCEEDED and the order is refunded at once; then the wallet is
  asked to hold the amount, so that no later payout can take it. Held: it is posted. Not covered: the wallet says what
  it has left, that is asked for instead (five tries, since payouts may be faster), and the rest is a claim on the
  seller. A refund that fails after all gives back what it took and withdraws what it claimed. Why ask first and not
  claim everything: a claim leaves the money in the wallet, where the next payout takes it.
- **Refunds that are never booked** are findings: more than is left of the order, another currency, no amount or no id,
  of an order that is not paid (also parked: it is booked when the success comes), of one that a dispute took already,
  and a success told after the failure of the same refund, which may be an old message or a new fact: a person decides.
"""


def render() -> str:
    parts = [HEAD]
    tables = {"Payment order": PAYMENT_ORDER_TABLE, "Payout": PAYOUT_TABLE, "Refund": REFUND_TABLE}
    parts += [_section(title, table) for title, table in tables.items()]
    return "\n".join(parts)


def _section(title: str, table: StateTable[Any, Any]) -> str:
    lines = [
        f"## {title}",
        "",
        "```mermaid",
        table.diagram(),
        "```",
        "",
        "| event | who says so | changes nothing in |",
    ]
    lines.append("|---|---|---|")
    for event in table.events:
        ignored = [state.name for state in table.states if (state, event) in table.ignored]
        lines.append(f"| {event.name} | {_words(event)} | {', '.join(ignored)} |")
    return "\n".join(lines) + "\n"


def _words(event: Enum) -> str:
    return str(event.value)


def test_the_page_is_the_tables() -> None:
    assert DOC.read_text() == render(), "draw it again: python tests/unit/payment/test_payment_states_doc.py"


if __name__ == "__main__":
    DOC.write_text(render())
