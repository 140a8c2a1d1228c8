"""Risk: a message that the field rules let through is answered by INTERNAL."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from ducat.payment.v1 import payout_pb2
from kernel.errors import InvalidArgument
from payment.adapters.grpc import _payout_request


@pytest.mark.parametrize(
    "time",
    [Timestamp(seconds=2**62), Timestamp(seconds=-(2**40)), Timestamp(seconds=2**40), Timestamp(seconds=1, nanos=-5)],
)
def test_a_schedule_time_that_is_no_time_is_the_callers_mistake(time: Timestamp) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _payout_request(payout_pb2.CreatePayoutRequest(schedule_time=time))
    assert [each.field for each in caught.value.violations] == ["schedule_time"]


def test_the_first_and_the_last_time_are_times() -> None:
    for seconds in (-62_135_596_800, 253_402_300_799):
        request = payout_pb2.CreatePayoutRequest(schedule_time=Timestamp(seconds=seconds))
        assert _payout_request(request).schedule_time is not None
