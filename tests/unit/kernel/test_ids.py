"""Risk: an id that differs between processes or replays, so that money moves twice."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import ids


def test_derived_transfer_id_is_a_version_7_uuid_of_the_facts_time() -> None:
    value = ids.derived_transfer_id(1_753_056_000_123, "capture", "ORD-123-A")
    parsed = uuid.UUID(bytes=value)
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert ids.time_ms_of(value) == 1_753_056_000_123


def test_derived_ids_are_the_same_for_ever() -> None:
    # Golden: these values are stored in event logs; a change here would double money on a replay.
    assert ids.derived_transfer_id(1_753_056_000_123, "capture", "ORD-123-A").hex() == GOLDEN_TRANSFER_ID
    assert ids.account_id("seller/SELL-XYZ-1/USD").hex() == GOLDEN_ACCOUNT_ID
    assert ids.derived_event_id("capture", "ORD-123-A") == GOLDEN_EVENT_ID


@given(st.text())
def test_an_account_id_is_the_uuid_of_version_5_of_its_name(name: str) -> None:
    assert ids.account_id(name) == uuid.uuid5(ids.ACCOUNT_NAMESPACE, name).bytes


def test_kind_reference_and_time_each_change_the_id() -> None:
    base = ids.derived_transfer_id(1, "capture", "A")
    others = {
        ids.derived_transfer_id(2, "capture", "A"),
        ids.derived_transfer_id(1, "refund", "A"),
        ids.derived_transfer_id(1, "capture", "B"),
    }
    assert base not in others
    assert len(others) == 3


def test_uuid7_refuses_what_would_not_be_one() -> None:
    assert uuid.UUID(bytes=ids.uuid7(5, b"\xff" * 10)).version == 7
    with pytest.raises(ValueError, match="10 bytes"):
        ids.uuid7(5, b"")
    with pytest.raises(ValueError, match="time_ms"):
        ids.uuid7(0, bytes(10))
    with pytest.raises(ValueError, match="time_ms"):
        ids.uuid7(1 << 48, bytes(10))


GOLDEN_TRANSFER_ID = "01982a47b87b7b4f8939554fb129ce93"
GOLDEN_ACCOUNT_ID = "966741c5a4715827a8ed45db1b337188"
GOLDEN_EVENT_ID = "fe9b845c-3deb-5cf5-8924-84ae38cbc2f5"
