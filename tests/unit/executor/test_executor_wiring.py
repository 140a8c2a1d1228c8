"""Risk: a setting of the executor is read and never reaches the PSP."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from executor.bootstrap import adapters_of, with_previous_secret
from runtime.settings import PspSettings, Settings, SettingsInvalid


def settings_with(webhook_secret: str, previous: str = "") -> Settings:
    psp = PspSettings(
        name="acme",
        adapter="sandbox",
        base_url="http://x/acme",
        api_key=SecretStr("k"),
        payout_api_key=SecretStr("p"),
        webhook_secret=SecretStr(webhook_secret),
        webhook_secret_previous=SecretStr(previous),
    )
    return Settings.load({"psps": [psp]}, environ={})


@pytest.mark.parametrize("previous", ["", "whsec_before"])
def test_an_adapter_that_verifies_does_not_start_without_a_webhook_secret(previous: str) -> None:
    with pytest.raises(SettingsInvalid, match="acme: webhook_secret is empty"):
        adapters_of(settings_with("", previous))


def test_a_secret_that_is_being_replaced_is_told_at_the_start() -> None:
    assert with_previous_secret(settings_with("whsec_new", "whsec_before")) == ["acme"]
    assert with_previous_secret(settings_with("whsec_new")) == []


async def test_what_the_buyer_reads_on_the_bank_statement_is_a_setting() -> None:
    settings = Settings.load({"statement_descriptor": "CORNER SHOP", "psp_timeout_ms": 1234}, environ={})
    adapters = adapters_of(settings)
    try:
        assert {adapter.config.statement_descriptor for adapter in adapters.values()} == {"CORNER SHOP"}
        assert {adapter.config.timeout_ms for adapter in adapters.values()} == {1234}
    finally:
        for adapter in adapters.values():
            await adapter.close()
