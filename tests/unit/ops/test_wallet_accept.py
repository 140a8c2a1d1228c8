"""Risk: `ducat wallet accept` speaks of loss where nothing is lost, or hides what is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.wallet import _accept_lines
from wallet_core.adapters.accept import Found
from wallet_core.adapters.presence import Lacking

NOW_NS = 1_800_000_000 * 10**9
HOUR_NS = 3_600 * 10**9
WINDOW_MS = 24 * 3_600_000


def said(sequence: int, lacks: Lacking | None, *, age_h: int = 1) -> str:
    time_ns = NOW_NS - age_h * HOUR_NS if sequence else 0
    found = Found(0, Path("/data/shard-0000"), sequence, time_ns, "one", "the log as it is")
    return "\n".join(_accept_lines(found, lacks, WINDOW_MS, NOW_NS))


@pytest.mark.parametrize("seen", [None, 0, 7, 20])
def test_nothing_is_lost_and_that_is_said(seen: int | None) -> None:
    text = said(20, Lacking(seen, 0, 0))
    assert "nothing is lost and nothing is applied again" in text
    assert "start the wallet" in text
    for word in ("gRPC", "refused (ID_TOO_OLD)", "only copy", "not in the log"):
        assert word not in text


def test_what_is_lacking_is_counted_and_what_comes_back_is_told() -> None:
    text = said(20, Lacking(25, 3, 12))
    assert "5 events are not in the log (events 21 to 25)" in text
    assert "the read model has 3 transfers of them, which go to a file first" in text
    assert "12 messages of payment.events" in text
    assert "ID_TOO_OLD" not in text, "they are young enough"
    assert "came over gRPC, if anything did, is lost" in text
    assert "only copy of what is lost" in text
    assert "1 events are not in the log (event 21)" in said(20, Lacking(21, 0, 1))


@pytest.mark.parametrize(("sequence", "age_h"), [(20, 25), (0, 0)])
def test_messages_that_may_be_too_old_are_told(sequence: int, age_h: int) -> None:
    text = said(sequence, Lacking(25, 0, 12), age_h=age_h)
    assert "older than the wallet's id window (24 h, DUCAT_WALLET_ID_WINDOW_MS)" in text


def test_no_message_comes_again_where_none_was_recorded() -> None:
    text = said(20, Lacking(25, 0, 0))
    assert "none is applied again" in text
    assert "ID_TOO_OLD" not in text


def test_without_a_database_nothing_is_claimed() -> None:
    text = said(20, None)
    assert "cannot be told from here" in text
    assert "lost" not in text
