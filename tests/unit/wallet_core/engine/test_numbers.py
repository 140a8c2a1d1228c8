"""Numbers that logs and wires hold for ever: a change here breaks what is stored."""

from __future__ import annotations

import re
from pathlib import Path

import wallet_core.engine
from wallet_core.engine import codes

ENGINE = Path(wallet_core.engine.__file__).parent


def test_the_engines_numbers_are_those_of_codes() -> None:
    """state.pyx repeats the numbers for C; nobody keeps them equal but this."""
    text = (ENGINE / "state.pyx").read_text()
    found = dict(re.findall(r"^    ([A-Z_]+) = (\d+)\b", text, re.MULTILINE))
    account_names = {"TOO_MANY_ACCOUNTS": "ACCOUNT_TOO_MANY"}
    for member in codes.TransferResult:
        assert member.name == "WRONG_SHARD" or int(found[member.name]) == member
    for result in codes.AccountResult:
        name = account_names.get(result.name, f"ACCOUNT_{result.name}")
        assert result.name == "WRONG_SHARD" or int(found[name]) == result
    for kind in codes.EventKind:
        assert int(found[f"KIND_{kind.name}"]) == kind
    for transfer_flag in codes.TransferFlags:
        assert int(found[str(transfer_flag.name)]) == transfer_flag
    for account_flag in codes.AccountFlags:
        name = str(account_flag.name)
        assert int(found["IN_FLIGHT_ACCOUNT" if name == "IN_FLIGHT" else name]) == account_flag
    assert int(found["ID_AHEAD_MS"]) == codes.ID_AHEAD_MS


def test_numbers_never_change() -> None:
    assert [member.name for member in codes.TransferResult][:10] == [
        "OK",
        "ID_INVALID",
        "ID_TOO_OLD",
        "ID_AHEAD",
        "ID_REUSED",
        "FLAGS_INVALID",
        "AMOUNT_INVALID",
        "PENDING_ID_INVALID",
        "TIMEOUT_INVALID",
        "ACCOUNTS_SAME",
    ]
    assert [int(member) for member in codes.TransferResult] == list(range(1, 33))
    assert [int(member) for member in codes.AccountResult] == list(range(1, 11))
    assert [int(member) for member in codes.EventKind] == list(range(1, 14))
    assert codes.in_flight_account_id(b"USD\0", 7) == b"in-flight:USD\0\x00\x07"


def test_the_engine_touches_nothing_outside() -> None:
    """No clock, file, randomness, thread or log in the native sources: time and ids are arguments."""
    forbidden = re.compile(
        r"\b(time|random|os|threading|socket|logging|asyncio|open|fopen|clock_gettime|rand)\b\s*[.(]"
    )
    for source in [*ENGINE.glob("*.pyx"), *ENGINE.glob("*.pxd"), ENGINE / "native.h", ENGINE / "twin.py"]:
        code = re.sub(r"#.*|/\*.*?\*/", "", source.read_text())
        assert not forbidden.search(code), source
