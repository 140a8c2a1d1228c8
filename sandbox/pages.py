"""The hosted payment page: plain HTML, no script, usable with a keyboard and a screen reader."""

from __future__ import annotations

from html import escape

from sandbox.psp import amount_of
from sandbox.store import Stored

__all__ = ["index_page", "outcome_page", "payment_page"]

_STYLE = """
:root{color-scheme:light dark;--ink:#16202b;--soft:#5a6775;--line:#d5dbe2;--card:#fff;--back:#eef1f5;--accent:#1f5eff;
--accent-ink:#fff;--bad:#b3261e;--bad-back:#fdeceb;--good:#156c3f;--note:#fff6dd;--note-ink:#6b4e00}
@media (prefers-color-scheme:dark){:root{--ink:#e8edf3;--soft:#9aa7b5;--line:#35414e;--card:#1a222b;--back:#10161d;
--accent:#6d97ff;--accent-ink:#0b1220;--bad:#ff9c94;--bad-back:#3a1a18;--good:#6fd3a0;--note:#33290f;--note-ink:#f0d48a}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:27rem;margin:0 auto;padding:2.5rem 1rem 3rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1.75rem;
box-shadow:0 1px 2px rgb(0 0 0/.05),0 12px 32px rgb(0 0 0/.06)}
.brand{display:flex;justify-content:space-between;align-items:center;gap:1rem;color:var(--soft);font-size:.875rem;
margin:0 .25rem .9rem}
.badge{background:var(--note);color:var(--note-ink);border-radius:99px;padding:.1rem .7rem;font-weight:600;font-size:.78rem}
.to{font-size:1rem;font-weight:500;color:var(--soft);margin:0}
hr{border:0;border-top:1px solid var(--line);margin:1.2rem 0}
.amount{font-size:2.25rem;font-weight:650;letter-spacing:-.02em;line-height:1.2;margin:.15rem 0 .35rem;
font-variant-numeric:tabular-nums}
.amount small{font-size:1.1rem;font-weight:500;color:var(--soft);letter-spacing:0}
.for{margin:0;color:var(--soft)}
form{margin:1.5rem 0 0}
label{display:block;font-weight:600;font-size:.9rem;margin:0 0 .35rem}
input{width:100%;font:inherit;font-variant-numeric:tabular-nums;color:inherit;background:transparent;
border:1px solid var(--line);border-radius:9px;padding:.7rem .8rem}
input:focus-visible,button:focus-visible,a:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
input[aria-invalid=true]{border-color:var(--bad)}
.row{display:grid;grid-template-columns:1fr 1fr;gap:.8rem;margin-top:.9rem}
button,.button{display:block;width:100%;margin-top:1.4rem;border:0;border-radius:9px;padding:.85rem 1rem;font:inherit;
font-weight:650;text-align:center;text-decoration:none;background:var(--accent);color:var(--accent-ink);cursor:pointer}
button:hover,.button:hover{filter:brightness(1.07)}
.error{background:var(--bad-back);color:var(--bad);border-radius:9px;padding:.7rem .85rem;margin:1.4rem 0 0;font-weight:500}
.hint{color:var(--soft);font-size:.85rem;margin:1.1rem 0 0}
table{width:100%;border-collapse:collapse;margin-top:1.4rem;font-size:.85rem;color:var(--soft)}
caption{text-align:left;font-weight:600;padding-bottom:.3rem}
td{border-top:1px solid var(--line);padding:.4rem 0}
td:last-child{text-align:right}
code{font-family:ui-monospace,SFMono-Regular,Menlo,monospace}
.good{color:var(--good)}.bad{color:var(--bad)}
.outcome{font-size:1.35rem;margin:.2rem 0 .5rem}
"""


def _page(title: str, body: str) -> bytes:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="robots" content="noindex"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>"
    ).encode()


def _amount(intent: Stored) -> tuple[str, str]:
    """`75.00` with its thousands parted, and the currency's code."""
    number, _, code = str(amount_of(intent)).partition(" ")
    whole, dot, rest = number.partition(".")
    return f"{int(whole):,}{dot}{rest}", code


def _summary(intent: Stored, tag: str, verb: str) -> str:
    merchant = intent.body["statement_descriptor"] or "the merchant"
    number, code = _amount(intent)
    description = intent.body["description"]
    return (
        f'<{tag} class="to">{verb} {escape(merchant)}</{tag}><p class="amount">{number} <small>{escape(code)}</small></p>'
        + (f'<p class="for">{escape(description)}</p>' if description else "")
    )


def _brand(psp: str) -> str:
    return (
        f'<div class="brand"><span>{escape(psp.capitalize())} payments</span><span class="badge">Test mode</span></div>'
    )


def payment_page(psp: str, intent: Stored, *, error: str = "") -> bytes:
    """The form. `error`: why the last try did not pay, in words for the buyer."""
    alert = f'<p class="error" role="alert" id="card-error">{escape(error)}</p>' if error else ""
    invalid = ' aria-invalid="true" aria-describedby="card-error"' if error else ""
    amount = " ".join(_amount(intent))
    body = f"""{_brand(psp)}<section class="card">{_summary(intent, "h1", "Pay")}{alert}
<form method="post">
<label for="card-number">Card number</label>
<input id="card-number" name="card_number" inputmode="numeric" maxlength="23" placeholder="4242 4242 4242 4242" required autofocus{invalid}>
<div class="row"><div><label for="expiry">Expiry (MM/YY)</label><input id="expiry" name="expiry" inputmode="numeric"
maxlength="5" placeholder="12/34"></div><div><label for="cvc">Security code</label><input id="cvc" name="cvc"
inputmode="numeric" maxlength="4" placeholder="123"></div></div>
<button type="submit">Pay {amount}</button></form>
<p class="hint">Your card goes only to this page and is kept nowhere.</p></section>
<table><caption>Test cards</caption>
<tr><td><code>4242 4242 4242 4242</code></td><td>pays</td></tr>
<tr><td><code>4000 0000 0000 0002</code></td><td>is declined for good</td></tr>
<tr><td><code>4000 0000 0000 9995</code></td><td>has no funds; try another</td></tr></table>"""
    return _page(f"Pay {amount}", body)


_OUTCOMES = {
    "succeeded": ("good", "Payment received", "Thank you. You can close this page or go back to the shop."),
    "failed": ("bad", "Payment declined", "No money was taken."),
    "canceled": ("bad", "Payment canceled", "The shop canceled this payment. No money was taken."),
}


def outcome_page(psp: str, intent: Stored, back_url: str) -> bytes:
    """What became of an intent that is final."""
    tone, title, text = _OUTCOMES.get(intent.status, ("bad", "Payment closed", "This payment cannot be paid any more."))
    reason = intent.body.get("failure_message", "")
    if intent.status == "failed" and reason:
        text = f"{reason} {text}"
    role = "status" if tone == "good" else "alert"
    body = f"""{_brand(psp)}<section class="card"><div role="{role}"><h1 class="outcome {tone}">{title}</h1>
<p class="for">{escape(text)}</p></div><hr>{_summary(intent, "h2", "To")}
<a class="button" href="{escape(back_url)}">Back to the shop</a></section>"""
    return _page(title, body)


def index_page(names: list[str], counts: dict[str, int], pending_count: int) -> bytes:
    """What this server is, for a person who opens its root."""
    rows = "".join(f"<tr><td>{escape(kind)}</td><td>{count}</td></tr>" for kind, count in sorted(counts.items()))
    listed = ", ".join(f"<code>/{escape(name)}</code>" for name in names)
    body = f"""{_brand("Sandbox")}<section class="card"><h1 class="outcome">Sandbox PSP</h1>
<p class="for">Plays {listed}. No money moves here.</p>
<table><caption>Objects</caption>{rows}<tr><td>webhooks and payouts under way</td><td>{pending_count}</td></tr></table>
</section>"""
    return _page("Sandbox PSP", body)
