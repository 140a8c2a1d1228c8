"""Risk: a setting of the executor is read and never reaches the PSP."""

from __future__ import annotations

from executor.bootstrap import adapters_of
from runtime.settings import Settings


async def test_what_the_buyer_reads_on_the_bank_statement_is_a_setting() -> None:
    settings = Settings.load({"statement_descriptor": "CORNER SHOP", "psp_timeout_ms": 1234}, environ={})
    adapters = adapters_of(settings)
    try:
        assert {adapter.config.statement_descriptor for adapter in adapters.values()} == {"CORNER SHOP"}
        assert {adapter.config.timeout_ms for adapter in adapters.values()} == {1234}
    finally:
        for adapter in adapters.values():
            await adapter.close()
