"""Tokens, scopes, and where a process may listen."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kernel.errors import PermissionDenied, Unauthenticated
from runtime import security
from runtime.security import Caller, TokenStore, check_listen, create_token
from runtime.settings import Settings, SettingsInvalid

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Clocks:
    """Unix time and monotonic time that stand still until they are moved."""

    def __init__(self) -> None:
        self.seconds = NOW.timestamp()

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "tokens.toml")


def store(path: str, clock: Callable[[], float] | None = None) -> TokenStore:
    clock = clock or Clocks()
    return TokenStore(path, clock, clock)


@pytest.mark.parametrize(
    ("scopes", "asked", "allowed"),
    [
        (["payments.write"], "payments.write", True),
        (["payments.write"], "payments.read", False),
        (["payments.*"], "payments.read", True),
        (["payments.*"], "payouts.read", False),
        (["payments.*"], "paymentsx.read", False),
        (["*"], "wallet.admin", True),
        ([], "payments.read", False),
    ],
)
def test_scopes(scopes: list[str], asked: str, allowed: bool) -> None:
    assert Caller("x", frozenset(scopes)).allows(asked) is allowed


def test_a_token_is_known_by_its_hash_alone(path: str) -> None:
    token = create_token(path, "gateway", ["payments.*", "notifications.write"])
    content = Path(path).read_text()
    assert token not in content
    assert token.removeprefix("ducat_") not in content
    assert oct(os.stat(path).st_mode & 0o777) == "0o600"
    caller = store(path).authorize(f"Bearer {token}", "payments.write")
    assert (caller.name, caller.scopes) == ("gateway", {"payments.*", "notifications.write"})
    assert store(path).authenticate(f"bearer {token}").name == "gateway"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Basic {token}", "{token}", "Bearer {token}x", "Bearer ducat_", "Bearer \x00"],
)
def test_a_wrong_token_is_refused_without_a_hint(path: str, authorization: str) -> None:
    token = create_token(path, "gateway", ["*"])
    with pytest.raises(Unauthenticated) as caught:
        store(path).authenticate(authorization.format(token=token))
    assert token not in caught.value.message
    assert "gateway" not in caught.value.message


def test_a_missing_scope_is_named(path: str) -> None:
    token = create_token(path, "reader", ["payments.read"])
    with pytest.raises(PermissionDenied) as caught:
        store(path).authorize(f"Bearer {token}", "payments.write")
    assert caught.value.metadata == {"scope": "payments.write", "caller": "reader"}


def test_a_token_ends_at_its_time(path: str) -> None:
    token = create_token(path, "short", ["*"], NOW + timedelta(seconds=10))
    clock = Clocks()
    tokens = store(path, clock)
    tokens.authenticate(f"Bearer {token}")
    clock.seconds += 10
    with pytest.raises(Unauthenticated, match="expired"):
        tokens.authenticate(f"Bearer {token}")


def test_reload_new_tokens_are_known_and_removed_ones_refused_within_a_second(path: str) -> None:
    first = create_token(path, "first", ["*"])
    clock = Clocks()
    tokens = store(path, clock)
    Path(path).unlink()
    second = create_token(path, "second", ["*"])
    tokens.authenticate(f"Bearer {first}")
    clock.seconds += security.RELOAD_INTERVAL_S
    assert tokens.authenticate(f"Bearer {second}").name == "second"
    with pytest.raises(Unauthenticated):
        tokens.authenticate(f"Bearer {first}")


@pytest.mark.parametrize("damage", ["[[token", "", None])
def test_reload_of_a_broken_file_keeps_the_old_tokens_but_an_empty_one_revokes(path: str, damage: str | None) -> None:
    token = create_token(path, "first", ["*"])
    clock = Clocks()
    tokens = store(path, clock)
    if damage is None:
        Path(path).unlink()
    else:
        Path(path).write_text(damage)
    clock.seconds += 5
    if damage == "":
        with pytest.raises(Unauthenticated):
            tokens.authenticate(f"Bearer {token}")
    else:
        assert tokens.authenticate(f"Bearer {token}").name == "first"


def test_looking_for_changes_is_paced(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = create_token(path, "first", ["*"])
    clock = Clocks()
    tokens = store(path, clock)
    looks = []
    monkeypatch.setattr(security, "_version_of", lambda _path: looks.append(1) or None)
    for _ in range(100):
        tokens.authenticate(f"Bearer {token}")
    assert len(looks) == 0
    clock.seconds += 1
    for _ in range(100):
        try:
            tokens.authenticate(f"Bearer {token}")
        except Unauthenticated:
            pytest.fail("the old tokens stay in force")
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('name = "x"', "only [[token]]"),
        ("token = [1]", "only [[token]]"),
        ('[[token]]\nname = "Bad Name"\nsha256 = ""\nscopes = []', "name"),
        ('[[token]]\nname = "x"\nsha256 = "short"\nscopes = []', "sha256"),
        (f'[[token]]\nname = "x"\nsha256 = "{"a" * 64}"\nscopes = ["everything"]', "scopes"),
        (f'[[token]]\nname = "x"\nsha256 = "{"a" * 64}"\nscopes = []\nexpire_time = 2027-01-01T00:00:00', "offset"),
        (f'[[token]]\nname = "x"\nsha256 = "{"a" * 64}"\nscopes = []\nscope = []', "unknown key `scope`"),
        (f'[[token]]\nname = "x"\nsha256 = "{"a" * 64}"\nscopes = []\n' * 2, "twice"),
    ],
)
def test_a_wrong_tokens_file_stops_the_start_and_names_the_place(path: str, content: str, said: str) -> None:
    Path(path).write_text(content)
    with pytest.raises(SettingsInvalid) as caught:
        TokenStore(path)
    assert said in str(caught.value)
    assert path in str(caught.value)


def test_a_missing_tokens_file_stops_the_start(path: str) -> None:
    with pytest.raises(SettingsInvalid, match="cannot be read"):
        TokenStore(path)


@pytest.mark.parametrize(("name", "scopes"), [("Bad Name", ["*"]), ("x", ["everything"]), ("x", ["payments.*.*"])])
def test_no_token_with_a_wrong_name_or_scope_is_made(path: str, name: str, scopes: list[str]) -> None:
    with pytest.raises(SettingsInvalid):
        create_token(path, name, scopes)
    assert not Path(path).exists()


def test_a_name_is_given_once(path: str) -> None:
    create_token(path, "gateway", ["*"])
    before = Path(path).read_text()
    with pytest.raises(SettingsInvalid, match="exists"):
        create_token(path, "gateway", ["*"])
    assert Path(path).read_text() == before


OWN = [
    {
        "name": "stripe",
        "adapter": "stripe",
        "base_url": "https://api.example",
        "api_key": "k",
        "payout_api_key": "p",
        "webhook_secret": "w",
    }
]
TLS = {"tls_cert_file": "cert.pem", "tls_key_file": "key.pem"}


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        ({}, ["TLS", "authentication", "development secrets"]),
        ({"psps": OWN}, ["TLS", "authentication"]),
        ({"psps": OWN, **TLS}, ["authentication"]),
        ({"psps": OWN, "auth_tokens_file": "t"}, ["TLS"]),
        ({**TLS, "auth_tokens_file": "t"}, ["development secrets"]),
        ({**TLS, "auth_tokens_file": "t", "psps": OWN}, []),
    ],
)
def test_listen_beyond_loopback_only_with_tls_authentication_and_own_secrets(
    overrides: dict[str, Any], missing: list[str]
) -> None:
    settings = Settings.load({"payment_listen": "0.0.0.0:50051", **overrides}, environ={})
    if not missing:
        check_listen("payment", settings.payment_listen, settings)
        return
    with pytest.raises(SettingsInvalid) as caught:
        check_listen("payment", settings.payment_listen, settings)
    for each in ("TLS", "authentication", "development secrets"):
        assert (each in str(caught.value)) is (each in missing), str(caught.value)


def test_listen_on_loopback_needs_nothing() -> None:
    settings = Settings.load(environ={})
    check_listen("payment", settings.payment_listen, settings)


def test_development_secrets_are_refused_even_where_only_another_process_is_beyond_loopback() -> None:
    settings = Settings.load({"gateway_listen": "0.0.0.0:8080"}, environ={})
    with pytest.raises(SettingsInvalid, match="gateway would listen beyond loopback"):
        check_listen("executor", settings.executor_listen, settings)
