"""Forged webhooks."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from pydantic import SecretStr

from executor.bootstrap import adapters_of
from executor.psp.base import SIGNATURE_TOLERANCE_S, PspBase, PspConfig
from executor.psp.sandbox import SandboxPsp
from executor.service.ports import Channel
from kernel.errors import PermissionDenied
from runtime.settings import PspSettings, Settings
from sandbox.deliveries import sign

NOW = 1_753_056_000
BODY = b'{"id":"evt_1","type":"payment_intent.succeeded"}'
SECRET = "whsec_unit"


def config(secret: str = SECRET, previous: str = "") -> PspConfig:
    urls = ("http://x/r", "http://x/p")
    return PspConfig(
        "sandbox", "http://x/sandbox", "k", "p", secret, *urls, "SHOP", 1000, webhook_secret_previous=previous
    )


def verify(header: str | None, body: bytes = BODY, now_s: int = NOW, secret: str = SECRET, previous: str = "") -> None:
    headers = {} if header is None else {"sandbox-signature": header}
    SandboxPsp(config(secret, previous)).verify(headers, body, Channel.PAYMENT, now_s)


def v1(secret: str = SECRET, time_s: int = NOW, body: bytes = BODY) -> str:
    return hmac.new(secret.encode(), f"{time_s}.".encode() + body, hashlib.sha256).hexdigest()


def test_what_the_sandbox_signs_is_accepted() -> None:
    verify(sign(SECRET, BODY, NOW))


@pytest.mark.parametrize(
    ("secret", "previous", "secrets"),
    [("", "", ()), ("", "old", ()), ("new", "", ("new",)), ("new", "old", ("new", "old"))],
)
def test_without_a_secret_there_is_none_to_match(secret: str, previous: str, secrets: tuple[str, ...]) -> None:
    assert config(secret, previous).webhook_secrets == secrets


@pytest.mark.parametrize("other", ["0" * 64, "", "ü", "x"])
def test_any_of_several_v1_may_match(other: str) -> None:
    verify(f"t={NOW},v1={other},v1={v1()}")
    verify(f"t={NOW}, v1={v1()}, v1={other}, v0=whatever")


@pytest.mark.parametrize("drift", [-SIGNATURE_TOLERANCE_S, SIGNATURE_TOLERANCE_S])
def test_within_tolerance(drift: int) -> None:
    verify(sign(SECRET, BODY, NOW), now_s=NOW + drift)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        f"t={NOW}",
        f"v1={v1()}",
        f"t=,v1={v1()}",
        f"t=x,v1={v1()}",
        f"t=-1,v1={v1()}",
        f"t={NOW},v0={v1()}",
        f"t={NOW},v1=",
        f"t={NOW},v1={v1().upper()}",
        f"t={NOW},v1={v1()[:-1]}",
        f"t={NOW},v1={v1('whsec_other')}",
        f"t={NOW + 1},v1={v1()}",
        f"t={NOW},t={NOW + 1},v1={v1()}",
        f"t={NOW}," + ",".join(["v1=" + "0" * 64] * 8) + f",v1={v1()}",
        f"t={'9' * 5000},v1={v1()}",
        f"t=１７５３０５６０００,v1={v1()}",
    ],
)
def test_refused(header: str | None) -> None:
    with pytest.raises(PermissionDenied) as refused:
        verify(header)
    assert refused.value.reason == "SIGNATURE_INVALID"


def test_altered_body() -> None:
    with pytest.raises(PermissionDenied):
        verify(sign(SECRET, BODY, NOW), body=BODY + b" ")


@pytest.mark.parametrize("drift", [-SIGNATURE_TOLERANCE_S - 1, SIGNATURE_TOLERANCE_S + 1])
def test_too_old_or_from_the_future(drift: int) -> None:
    with pytest.raises(PermissionDenied):
        verify(sign(SECRET, BODY, NOW), now_s=NOW + drift)


def test_an_empty_secret_accepts_nothing() -> None:
    with pytest.raises(PermissionDenied):
        verify(sign("", BODY, NOW), secret="")


@pytest.mark.parametrize("signer", [SECRET, "whsec_before"])
def test_both_secrets_count_while_one_is_being_replaced(signer: str) -> None:
    """Risk: webhooks are refused from the moment the PSP has the new secret until every executor has."""
    verify(sign(signer, BODY, NOW), previous="whsec_before")
    verify(f"t={NOW},v1={v1('whsec_third')},v1={v1(signer)}", previous="whsec_before")


@pytest.mark.parametrize("signer", ["whsec_before", "whsec_third", ""])
def test_after_that_only_the_new_one_counts(signer: str) -> None:
    with pytest.raises(PermissionDenied):
        verify(sign(signer, BODY, NOW))
    if signer != "whsec_before":
        with pytest.raises(PermissionDenied):
            verify(sign(signer, BODY, NOW), previous="whsec_before")


@pytest.mark.parametrize("signer", ["whsec_before", ""])
def test_a_previous_secret_alone_accepts_nothing(signer: str) -> None:
    with pytest.raises(PermissionDenied):
        verify(sign(signer, BODY, NOW), secret="", previous="whsec_before")


def test_the_settings_reach_the_adapter() -> None:
    psp = PspSettings(
        name="acme",
        adapter="sandbox",
        base_url="http://x/acme",
        api_key=SecretStr("k"),
        payout_api_key=SecretStr("p"),
        webhook_secret=SecretStr(SECRET),
        webhook_secret_previous=SecretStr("whsec_before"),
    )
    adapter = adapters_of(Settings.load({"psps": [psp.model_dump()]}, environ={}))["acme"]
    for signer in (SECRET, "whsec_before"):
        adapter.verify({"sandbox-signature": sign(signer, BODY, NOW)}, BODY, Channel.PAYMENT, NOW)


def test_an_adapter_without_verification_accepts_nothing() -> None:
    with pytest.raises(PermissionDenied):
        PspBase(config()).verify({}, b"", Channel.PAYMENT, NOW)


def test_config_shows_no_secret() -> None:
    assert SECRET not in repr(config())
    assert "whsec_before" not in repr(config(previous="whsec_before"))
