"""Settings: which layer wins, what is refused and how it is said, and that no secret is ever shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.settings import (
    DEVELOPMENT_SECRETS,
    PROCESSES,
    Settings,
    SettingsInvalid,
    is_loopback,
    mask,
    split_address,
)

SECRET = "whsec_0123456789abcdef_live"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def psp(**changes: Any) -> dict[str, Any]:
    return {
        "name": "stripe",
        "adapter": "stripe",
        "base_url": "https://api.example",
        "api_key": "sk_live_0123456789abcdef",
        "payout_api_key": "sk_live_fedcba9876543210",
        "webhook_secret": SECRET,
        **changes,
    }


@pytest.mark.parametrize(
    "wrong", ["SHOP", "S" * 23, "12345678", "Café Paris", 'the "shop"', "a<b>c", "it's a shop", "5 * shop"]
)
def test_a_statement_descriptor_that_card_schemes_refuse_is_refused_here(wrong: str) -> None:
    """Risk: every payment of a shop is refused by its PSP, one by one, after the start."""
    with pytest.raises(SettingsInvalid, match="statement_descriptor"):
        Settings.load({"statement_descriptor": wrong}, environ={})
    assert (
        Settings.load({"statement_descriptor": "My Shop (EU) & Co."}, environ={}).statement_descriptor[:7] == "My Shop"
    )


def test_layers_flags_over_environment_over_secret_files_over_file_over_defaults(elsewhere: Path) -> None:
    (elsewhere / "level").write_text("error\n")
    (elsewhere / "ducat.toml").write_text('log_level = "warning"\n')
    environ: dict[str, str] = {}
    seen = []
    for add in (
        {},
        {"DUCAT_LOG_LEVEL_FILE": str(elsewhere / "level")},
        {"DUCAT_LOG_LEVEL": "debug"},
    ):
        environ |= add
        seen.append(Settings.load(environ=environ).log_level)
    seen.append(Settings.load({"log_level": "info"}, environ=environ).log_level)
    assert seen == ["warning", "error", "debug", "info"]
    assert Settings.load({"log_level": None}, environ=environ).log_level == "debug", "a flag that was not given"
    (elsewhere / "ducat.toml").unlink()
    assert Settings.load(environ={}).log_level == "info"


def test_describe_says_where_each_value_comes_from(elsewhere: Path) -> None:
    (elsewhere / "secret").write_text("ducat_0123456789abcdefghij\n")
    (elsewhere / "own.toml").write_text('bus_claim_idle_ms = 700\nauth_token_file = "secret"\n')
    settings = Settings.load(
        {"data_dir": "here"}, environ={"DUCAT_CONFIG_FILE": "own.toml", "DUCAT_WALLET_SHARD_COUNT": "4"}
    )
    rows = {row.name: row for row in settings.describe()}
    assert set(rows) == set(Settings.model_fields)
    assert all(row.help for row in rows.values())
    assert (rows["data_dir"].source, rows["data_dir"].value) == ("flag", "here")
    assert (rows["wallet_shard_count"].source, rows["wallet_shard_count"].value) == (
        "environment DUCAT_WALLET_SHARD_COUNT",
        4,
    )
    assert (rows["bus_claim_idle_ms"].source, rows["bus_claim_idle_ms"].value) == ("own.toml", 700)
    assert (rows["auth_token"].source, rows["auth_token"].value) == ("own.toml", "****ghij")
    assert settings.auth_token.get_secret_value() == "ducat_0123456789abcdefghij"
    assert rows["log_format"].source == "default"


def test_secrets_masked_everywhere_they_could_be_printed() -> None:
    settings = Settings.load(
        {
            "psps": [psp()],
            "auth_token": "ducat_" + "t" * 30,
            "database_url": "postgresql://ducat:hunter2secret@db:5432/ducat",
            "redis_url": "redis://valkey:6379?db=0&password=hunter2secret&protocol=3",
        },
        environ={},
    )
    shown = json.dumps(settings.masked(), default=str) + str(settings.describe()) + repr(settings) + str(settings)
    for secret in ("sk_live_0123456789abcdef", "sk_live_fedcba9876543210", SECRET, "t" * 30, "hunter2secret"):
        assert secret not in shown
    assert "postgresql://ducat:****@db:5432/ducat" in shown
    assert "redis://valkey:6379?db=0&password=****&protocol=3" in shown
    assert "****live" in shown


@pytest.mark.parametrize(
    ("secret", "shown"), [("", ""), ("short", "****"), ("x" * 19, "****"), ("0123456789abcdefWXYZ", "****WXYZ")]
)
def test_mask_keeps_the_end_of_long_secrets_only(secret: str, shown: str) -> None:
    assert mask(secret) == shown


def test_an_unknown_key_in_the_file_is_named_with_a_guess(elsewhere: Path) -> None:
    (elsewhere / "ducat.toml").write_text("wallet_shard_cuont = 4\n")
    with pytest.raises(
        SettingsInvalid, match=r"ducat.toml: unknown key `wallet_shard_cuont`; did you mean `wallet_shard_count`"
    ):
        Settings.load(environ={})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("= nonsense", "not TOML"),
        ('auth_token = "a"\nauth_token_file = "b"', "both `auth_token` and `auth_token_file`"),
        ('auth_token_file = "/nowhere/token"', "cannot be read"),
        ("grpc_concurrency_max = 0", "grpc_concurrency_max"),
        ('payment_listen = "everywhere"', "expected host:port"),
        ('tls_cert_file = "a.pem"', "belong together"),
        ("tls_client_auth = true", "tls_ca_file"),
        ('bus = "kafka"', "bus = kafka needs kafka_bootstrap"),
        ('wallet_log = "kafka"', "wallet_log = kafka needs kafka_bootstrap"),
        ('[[psps]]\nname = "Stripe!"', "psps.0.name"),
        ('[[psps]]\nname = "a"\nsecret = "b"', "psps.0.secret"),
    ],
)
def test_wrong_files_are_refused_and_said_so(elsewhere: Path, content: str, said: str) -> None:
    (elsewhere / "ducat.toml").write_text(content)
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load(environ={})
    assert said in str(caught.value)


def test_a_wrong_value_is_never_repeated_because_it_may_be_a_secret() -> None:
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load(environ={"DUCAT_PSPS": json.dumps([psp(weight=SECRET)])})
    assert "psps.0.weight" in str(caught.value)
    assert "DUCAT_PSPS" in str(caught.value)
    assert SECRET not in str(caught.value)
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load(environ={"DUCAT_PSPS": SECRET})
    assert SECRET not in str(caught.value)


def test_a_flag_that_is_no_setting_is_refused() -> None:
    with pytest.raises(SettingsInvalid, match=r"--log-levle.*`log_level`"):
        Settings.load({"log_levle": "info"}, environ={})


def test_a_named_file_that_is_missing_is_an_error_but_a_missing_default_file_is_not() -> None:
    Settings.load(environ={})
    with pytest.raises(SettingsInvalid, match=r"other.toml: no such file"):
        Settings.load(environ={"DUCAT_CONFIG_FILE": "other.toml"})


def test_psps_come_from_the_file_with_their_secrets_in_files(elsewhere: Path) -> None:
    (elsewhere / "key").write_text("sk_live_0123456789abcdef\n")
    (elsewhere / "ducat.toml").write_text(
        '[[psps]]\nname = "stripe"\nadapter = "stripe"\nbase_url = "https://api.example"\napi_key_file = "key"\n'
        'payout_api_key_file = "key"\nwebhook_secret = "whsec_own"\n'
        'webhook_secret_previous_file = "key"\ncurrency_codes = ["USD", "JPY"]\nweight = 3\n'
    )
    (only,) = Settings.load(environ={}).psps
    assert only.api_key.get_secret_value() == "sk_live_0123456789abcdef"
    assert only.webhook_secret_previous.get_secret_value() == "sk_live_0123456789abcdef"
    assert "0123456789abcdef" not in repr(only)
    assert (only.name, only.currency_codes, only.weight) == ("stripe", ["USD", "JPY"], 3)


def test_psp_currencies_must_exist_and_names_must_differ() -> None:
    with pytest.raises(SettingsInvalid, match="currency_codes"):
        Settings.load({"psps": [psp(currency_codes=["USDX"])]}, environ={})
    with pytest.raises(SettingsInvalid, match="names must differ"):
        Settings.load({"psps": [psp(), psp()]}, environ={})


def test_defaults_follow_what_they_are_derived_from() -> None:
    settings = Settings.load(
        {"wallet_listen": "0.0.0.0:7", "sandbox_url": "http://127.0.0.1:9", "ledger_listen": "127.0.0.1:8"}, environ={}
    )
    assert settings.wallet_address == "localhost:7"
    assert settings.ledger_address == "127.0.0.1:8"
    assert [each.base_url for each in settings.psps] == ["http://127.0.0.1:9/sandbox", "http://127.0.0.1:9/sandbox2"]


def test_development_secrets_are_recognized() -> None:
    settings = Settings.load(environ={})
    assert settings.has_development_secrets()
    assert {settings.psps[0].api_key.get_secret_value()} <= DEVELOPMENT_SECRETS
    assert not Settings.load({"psps": [psp()]}, environ={}).has_development_secrets()
    old = psp(webhook_secret_previous="whsec_sandbox_dev")
    assert Settings.load({"psps": [old]}, environ={}).has_development_secrets()


def test_environment_carries_all_settings_to_a_child() -> None:
    settings = Settings.load({"psps": [psp()], "wallet_shard_count": 8, "tls_client_auth": False}, environ={})
    again = Settings.load(environ=settings.environment())
    for name in Settings.model_fields:
        assert getattr(again, name) == getattr(settings, name), name


def test_every_process_has_its_addresses() -> None:
    settings = Settings.load(environ={})
    for process in PROCESSES:
        assert is_loopback(settings.listen_of(process))
        assert settings.metrics_listen_of(process) == ""


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:80", True),
        ("127.255.0.3:80", True),
        ("localhost:80", True),
        ("[::1]:80", True),
        ("0.0.0.0:80", False),
        ("[::]:80", False),
        ("10.1.2.3:80", False),
        ("127.evil.example.com:80", False),
        ("127.0.0.1.evil.com:80", False),
        ("localhost.evil.com:80", False),
    ],
)
def test_loopback_is_recognized_and_nothing_that_looks_like_it(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize("wrong", ["", "127.0.0.1", ":80", "host:", "host:port", "host:70000", "host:-1"])
def test_addresses_are_host_and_port(wrong: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        split_address(wrong)


def test_a_pool_that_the_outbox_relay_would_use_up_is_refused() -> None:
    with pytest.raises(SettingsInvalid, match="postgres_connections_max"):
        Settings.load({"postgres_connections_max": 1}, environ={})
