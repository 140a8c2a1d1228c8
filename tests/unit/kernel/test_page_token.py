"""Risk: a page token that reads what it must not, or that makes a list fail as if it were our bug."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.errors import InvalidArgument
from kernel.page_token import page_token, position_of_token
from payment.service.page_token import position_of


@given(st.text(max_size=40), st.text(max_size=10))
def test_only_our_own_token_of_the_same_filter_is_taken(token: str, merchant_reference: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        position_of_token(token, "entries", merchant_reference)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


@given(
    st.text(min_size=1, max_size=200, alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.text(max_size=20),
)
def test_a_token_gives_its_position_back(position: str, prefix: str) -> None:
    assert position_of_token(page_token(position, "accounts", prefix), "accounts", prefix) == position
    with pytest.raises(InvalidArgument):
        position_of_token(page_token(position, "accounts", prefix), "accounts", prefix + "x")


@pytest.mark.parametrize("position", [b"a\0b", b"\xff", b"", "9" * 5000, "99999999999999999999/x", "-1e9/x", "/x", "x"])
def test_a_forged_position_is_refused_not_a_failure(position: bytes | str) -> None:
    body = position.encode() if isinstance(position, str) else position
    checksum = hashlib.sha256(b"payments/" + b"\0" + body).digest()[:8]
    with pytest.raises(InvalidArgument) as caught:
        position_of(base64.urlsafe_b64encode(checksum + body).decode(), "payments/")
    assert caught.value.reason == "PAGE_TOKEN_INVALID"
