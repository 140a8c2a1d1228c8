"""What the engine and its twin answer, and what they raise."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "AccountView",
    "Counters",
    "CurrencyTotals",
    "EngineError",
    "EnginePoisoned",
    "EngineRefused",
    "HoldView",
    "SendView",
]

# EngineError
# ├── EngineRefused     the call contradicts the state; nothing was changed (a replay that does this also
# poisons)
# └── EnginePoisoned    out of memory or a failed replay, now or earlier; throw the engine away and restore


class EngineError(Exception):
    """The engine did not do what it was asked."""


class EngineRefused(EngineError):
    """The call as a whole contradicts the state, for example a gap in saga numbers."""


class EnginePoisoned(EngineError):
    """The engine's state is not to be trusted any more: everything is refused."""


class AccountView(NamedTuple):
    """One account; amounts in minor units."""

    ordinal: int
    id: bytes
    currency: str
    balance: int
    held_out: int
    held_in: int
    overdraft_limit: int
    balance_limit: int
    flags: int


class SendView(NamedTuple):
    """One debit whose saga is not settled; sequence is that of its MoneySent record."""

    number: int
    sequence: int
    id: bytes
    credit_id: bytes
    amount: int
    currency: str
    debit_ordinal: int
    code: int


class HoldView(NamedTuple):
    """One active hold; sequence is that of its HoldPlaced record, deadline_ms 0 = none, flags TransferFlags.CHAIN or 0."""

    sequence: int
    id: bytes
    debit_id: bytes
    credit_id: bytes
    amount: int
    deadline_ms: int
    code: int
    flags: int


class CurrencyTotals(NamedTuple):
    """Sums over all accounts of one currency on this shard; balance leaves out the in-flight account."""

    accounts: int
    balance: int
    in_flight: int
    held_out: int
    held_in: int


class Counters(NamedTuple):
    """Where the engine stands."""

    sequence: int
    now_ns: int
    floor_ms: int
    account_count: int
    hold_count: int
    id_count: int
    generation_count: int
    unsettled_count: int
    refusal_count: int
    repeated_count: int
    memory_bytes: int
    poisoned: bool
