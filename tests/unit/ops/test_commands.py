"""Risk: a command that the documents name does not exist, takes other words, or fails with a traceback."""

from __future__ import annotations

import inspect
import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from kernel.errors import Unauthenticated
from ops.__main__ import COMMANDS, main
from ops.platform import PROCESSES, Platform
from runtime.security import TokenStore


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_runs_on_its_words_alone(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"ducat {name}" in capsys.readouterr().out
    run = getattr(import_module(f"ops.{name}"), "run", None)
    if run is not None:
        assert list(inspect.signature(run).parameters) == ["args"]


@pytest.mark.parametrize("words", [[], ["nothing"], ["token"], ["token", "create"], ["bus", "dead-letter", "burn"]])
def test_wrong_words_are_wrong_use(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: ducat" in capsys.readouterr().err


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n    {name} " not in shown] == []


def test_a_token_is_printed_once_works_and_can_be_revoked(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "create", "--name", "shop", "--scopes", "payments.*, payouts.read"]) == 0
    token = capsys.readouterr().out.strip()
    assert main(["token", "create", "--name", "robot", "--scopes", "*", "--expires", "2031-01-01T00:00:00Z"]) == 0
    capsys.readouterr()
    text = (elsewhere / "tokens.toml").read_text()
    assert token.startswith("ducat_")
    assert token not in text
    assert (elsewhere / "tokens.toml").stat().st_mode & 0o777 == 0o600
    caller = TokenStore("tokens.toml").authorize(f"Bearer {token}", "payments.write")
    assert caller.scopes == {"payments.*", "payouts.read"}

    assert main(["token", "list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "shop  payments.*,payouts.read",
        "robot  *  until 2031-01-01 00:00:00+00:00",
    ]
    assert main(["token", "revoke", "--name", "shop"]) == 0
    with pytest.raises(Unauthenticated):
        TokenStore("tokens.toml").authenticate(f"Bearer {token}")
    assert [row["name"] for row in tomllib.loads((elsewhere / "tokens.toml").read_text())["token"]] == ["robot"]


def test_revoking_keeps_what_a_person_wrote_around_the_entry(elsewhere: Path) -> None:
    file = elsewhere / "tokens.toml"
    main(["token", "create", "--name", "first", "--scopes", "*"])
    main(["token", "create", "--name", "second", "--scopes", "*"])
    file.write_text("# who may call\n" + file.read_text())
    assert main(["token", "revoke", "--name", "first"]) == 0
    assert file.read_text().startswith("# who may call\n")
    assert main(["token", "revoke", "--name", "second"]) == 0
    assert TokenStore(str(file)) is not None, "a file without tokens stays readable"


@pytest.mark.parametrize(
    "words",
    [
        ["create", "--name", "Shop!", "--scopes", "*"],
        ["create", "--name", "shop", "--scopes", "everything"],
        ["create", "--name", "shop", "--scopes", " , "],
        ["create", "--name", "shop", "--scopes", "*", "--expires", "tomorrow"],
        ["create", "--name", "shop", "--scopes", "*", "--expires", "2027-01-01T00:00:00"],
        ["revoke", "--name", "shop"],
        ["list"],
    ],
)
def test_wrong_token_words_store_nothing_and_say_why(
    words: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", *words]) == 2
    assert capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


def test_config_masks_every_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DUCAT_DATABASE_URL", "postgresql://ducat:hunter22hunter22@db/ducat")
    monkeypatch.setenv("DUCAT_AUTH_TOKEN", "ducat_0123456789abcdefghijklmnop")
    assert main(["config"]) == 0
    assert main(["config", "--json"]) == 0
    shown = capsys.readouterr().out
    assert not [secret for secret in ("hunter22", "0123456789abc", "sk_test", "whsec_sandbox") if secret in shown]


def test_a_wrong_setting_is_named_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DUCAT_BUS", "pigeons")
    assert main(["config"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ducat config: bus (from environment DUCAT_BUS): Input should be 'valkey' or 'kafka'"
    ]


def test_a_bus_that_does_not_run_is_said_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bus", "dead-letter", "list"]) == 1
    assert "start `ducat up`, or set DUCAT_DATA_DIR or DUCAT_REDIS_URL" in capsys.readouterr().err


def test_migrate_without_a_database_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate"]) == 2
    assert "DUCAT_DATABASE_URL" in capsys.readouterr().err


def test_the_platform_uses_the_servers_of_secrets_files_and_of_the_configuration_file(elsewhere: Path) -> None:
    """Risk: an embedded database is filled beside the one that the operator named."""
    (elsewhere / "url").write_text("postgresql://ducat@db.example/ducat\n")
    (elsewhere / "ducat.toml").write_text('redis_url = "redis://valkey.example"\ngateway_listen = "127.0.0.1:9180"\n')
    platform = Platform(elsewhere / "data", env={"DUCAT_DATABASE_URL_FILE": str(elsewhere / "url")})
    assert platform.settings.database_url == "postgresql://ducat@db.example/ducat"
    assert platform.settings.redis_url == "redis://valkey.example"
    assert platform.gateway_url == "http://127.0.0.1:9180"


def test_the_platform_keeps_chosen_addresses_and_says_https_where_it_serves_tls(elsewhere: Path) -> None:
    chosen = {
        "DUCAT_GATEWAY_URL": "https://pay.example",
        "DUCAT_TLS_CERT_FILE": "cert.pem",
        "DUCAT_TLS_KEY_FILE": "key.pem",
        "DUCAT_LEDGER_LISTEN": "127.0.0.1:7004",
        "DUCAT_WALLET_LISTEN": "0.0.0.0:7003",
    }
    platform = Platform(elsewhere / "data", env=chosen)
    assert platform.gateway_url == "https://pay.example"
    assert platform.sandbox_url == "https://127.0.0.1:8070"
    assert platform.grpc_address("ledger") == "127.0.0.1:7004"
    assert platform.grpc_address("wallet") == "localhost:7003"
    beside = Platform(elsewhere / "other", free_ports=True, env=chosen)
    assert beside.gateway_url == f"https://127.0.0.1:{beside.ports['gateway']}"
    assert beside.grpc_address("ledger") == f"127.0.0.1:{beside.ports['ledger']}"


def test_the_platform_starts_a_sandbox_only_where_a_psp_is_one(elsewhere: Path) -> None:
    """Risk: who configures only a real PSP, as docs/how-to/add-a-psp.md says, cannot start: the sandbox has nothing to play."""
    psp = {"name": "acme-eu", "adapter": "acme", "base_url": "https://api.acme.example"}
    secrets = {"api_key": "k", "payout_api_key": "k", "webhook_secret": "s"}
    real = Platform(elsewhere / "real", env={"DUCAT_PSPS": json.dumps([{**psp, **secrets}])})
    assert "sandbox" not in real.names
    assert set(PROCESSES) - set(real.names) == {"sandbox"}
    assert list(PROCESSES) == Platform(elsewhere / "development", env={}).names


def test_demo_names_a_missing_event_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--event", "nowhere.json"]) == 2
    assert "cannot read nowhere.json" in capsys.readouterr().err


def test_the_sample_event_is_the_one_of_the_requirements() -> None:
    event = json.loads((Path(__file__).parents[3] / "docs" / "examples" / "payment_event.json").read_text())
    assert set(event) == {"checkout_id", "buyer_info", "payment_orders"}
