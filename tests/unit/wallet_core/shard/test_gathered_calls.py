"""CreateTransfers' short way: native parsing means the same as the protobuf library's, calls share a frame and keep apart."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest
from host_fixtures import NOW_NS, account, config, transfer_id

from ducat.wallet.v1 import wallet_pb2
from kernel.errors import Unavailable
from wallet_core.adapters.grpc import _row
from wallet_core.engine.codes import AccountFlags
from wallet_core.service.port import AccountRow, TransferRow
from wallet_core.shard import ShardClock, WalletHost

PEOPLE = [account(n) for n in range(10)]


async def opened(folder: Path, **options: object) -> WalletHost:
    host = await WalletHost.open(config(folder, **options), clock=ShardClock(NOW_NS))  # type: ignore[arg-type]
    flags = int(AccountFlags.MAY_OVERDRAW)
    assert set(await host.create_accounts([AccountRow(one, "USD", flags) for one in PEOPLE])) == {1}
    return host


def plain(number: int, **fields: object) -> wallet_pb2.Transfer:
    row = {
        "transfer_id": transfer_id(number),
        "debit_account_id": PEOPLE[number % 10],
        "credit_account_id": PEOPLE[(number + 1) % 10],
        "amount_minor": 1 + number,
    }
    return wallet_pb2.Transfer(**(row | fields))  # type: ignore[arg-type]


def request(*transfers: wallet_pb2.Transfer, settle: int = 0) -> bytes:
    return wallet_pb2.CreateTransfersRequest(transfers=transfers, settle=settle).SerializeToString()  # type: ignore[arg-type]


def results(answer: bytes) -> list[int]:
    return list(wallet_pb2.CreateTransfersResponse.FromString(answer).results)


def any_transfer(pick: random.Random, number: int) -> wallet_pb2.Transfer:
    kind = pick.choice([0, 0, 1, 2, 2, 3, 4])
    finishes = kind > 2
    return plain(
        pick.choice([number, number, number, pick.randrange(number + 1)]),
        amount_minor=pick.choice([0, 1, 5, -3, 2**62, 2**63 - 1, -(2**63)]),
        kind=kind,
        pending_id=transfer_id(pick.randrange(number + 1)) if finishes and pick.random() < 0.9 else b"",
        timeout_s=pick.choice([0, 0, 60, 2**32 - 1]),
        code=pick.choice([0, 7, 65535]),
        balancing_debit=pick.random() < 0.1,
        balancing_credit=pick.random() < 0.1,
        **({"debit_account_id": bytes(16), "credit_account_id": bytes(16)} if finishes and pick.random() < 0.5 else {}),
    )


@pytest.mark.parametrize("shards", [1, 4])
async def test_any_plain_row_means_the_same_on_both_ways(tmp_path: Path, shards: int) -> None:
    """Two wallets with one clock: one parses natively, the other gets the rows that the protobuf library reads."""
    short, long = await opened(tmp_path / "a", shard_count=shards), await opened(tmp_path / "b", shard_count=shards)
    pick = random.Random(7)
    seen: set[int] = set()
    for turn in range(150):
        sent = [any_transfer(pick, turn * 8 + n) for n in range(pick.randrange(1, 8))]
        answer = short.transfer_call(request(*sent, settle=pick.choice([0, 2])))
        if answer is None:  # an id that is empty or all zeros: the long way says what is wrong
            assert any(not each.pending_id and each.kind > 2 for each in sent)
            rows = [_row(n, each) for n, each in enumerate(sent)]
            got = list(await short.transfers(rows))
        else:
            got = results(await answer)
        want = await long.transfers([_row(n, each) for n, each in enumerate(sent)])
        assert got == list(want)
        seen.update(got)
    assert len(seen) >= 8
    assert await short.accounts(PEOPLE) == await long.accounts(PEOPLE)
    if shards == 1:  # between shards the order of events is nobody's choice, and the digest is that of an order
        assert short.shards()[0].digest == long.shards()[0].digest
    await short.close()
    await long.close()


async def test_what_the_short_way_does_not_take(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    good = request(plain(1))
    transfer = plain(1).SerializeToString()
    refused = [
        b"",
        request(plain(1), settle=1),
        request(plain(1, linked=True), plain(2)),
        request(plain(1, transfer_id=b"")),
        request(plain(1, transfer_id=bytes(16))),
        request(plain(1, debit_account_id=b"x" * 15)),
        request(plain(1, code=65536)),
        request(plain(1, kind=5)),
        request(*(plain(n) for n in range(257))),
        *(good[:cut] for cut in range(1, len(good))),
        b"\x0a\x7f" + transfer,  # a length beyond the end
        b"\x0a" + bytes([len(transfer) + 4]) + transfer + b"\x8a\x80\x80\x80",  # a tag that is cut
        b"\x0a" + bytes([len(transfer) + 6]) + transfer + b"\xa0\x80\x80\x80\x40\x01",  # field 4 beyond 32 bits
        good + b"\x1a\x00",  # a field that the contract does not have
        b"\x0d\x00\x00\x00\x00",
    ]
    for message in refused:
        assert host.transfer_call(message) is None, message.hex()
    before = host.shards()[0].sequence
    answer = host.transfer_call(request(*(plain(n) for n in range(256))))
    assert answer is not None
    assert results(await answer) == [1] * 256
    assert host.shards()[0].sequence == before + 256
    await host.close()


async def test_calls_share_a_frame_and_each_gets_its_own_results(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    frames = host.native.log(0).frame_count
    calls = [
        host.transfer_call(request(plain(10 * n), *([plain(10 * n + 1, amount_minor=0)] if n % 3 == 0 else [])))
        for n in range(100)
    ]
    answers = await asyncio.gather(*(call for call in calls if call is not None))
    assert len(answers) == 100
    for n, answer in enumerate(answers):
        assert results(answer)[0] == 1
        assert len(results(answer)) == (2 if n % 3 == 0 else 1)
        assert results(answer)[1:] != [1]
        [position] = wallet_pb2.CreateTransfersResponse.FromString(answer).positions
        assert position.sequence_number == host.durable_sequence(0)
    assert host.native.log(0).frame_count - frames == 1
    await host.close()


async def test_a_caller_that_leaves_takes_nobody_with_it(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    calls = [host.transfer_call(request(plain(n))) for n in range(3)]
    assert calls[1] is not None
    calls[1].cancel()
    got = await asyncio.gather(*(call for call in calls if call is not None), return_exceptions=True)
    assert isinstance(got[1], asyncio.CancelledError)
    assert [results(got[0]), results(got[2])] == [[1], [1]]  # type: ignore[arg-type]
    sequence = host.shards()[0].sequence
    assert await host.transfers([TransferRow(transfer_id(1), PEOPLE[1], PEOPLE[2], 2)]) == b"\x01"
    assert host.shards()[0].sequence == sequence  # it had been sent: the id is known, nothing is applied again
    await host.close()


async def test_without_room_the_long_way_waits(tmp_path: Path) -> None:
    host = await opened(tmp_path, rows_in_flight_max=10)
    calls = [host.transfer_call(request(*(plain(5 * n + i) for i in range(5)))) for n in range(8)]
    taken = [call for call in calls if call is not None]
    assert host.native.gathered_rows == 5 * len(taken)
    for answer in await asyncio.gather(*taken):
        assert results(answer) == [1] * 5
    assert host.native.gathered_rows == 0
    await host.close()


async def test_a_failed_sync_fails_every_call_gathered_or_under_way(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    host.native.log(0).inject("fdatasync", 1, errno.EIO)
    under_way = [host.transfer_call(request(plain(n))) for n in range(5)]
    answers = await asyncio.gather(*(call for call in under_way if call is not None), return_exceptions=True)
    assert len(answers) == 5
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert host.transfer_call(request(plain(9))) is None
    await host.close()


async def test_closing_answers_what_was_gathered(tmp_path: Path) -> None:
    host = await opened(tmp_path)
    call = host.transfer_call(request(plain(1)))
    assert call is not None
    await host.close()
    assert results(await call) == [1]


async def test_calls_wait_while_a_striped_account_is_being_opened(tmp_path: Path) -> None:
    """Until then its transfers would be routed as a plain account's, and their ids remembered on the wrong shard."""
    host = await opened(tmp_path, shard_count=4)
    before = host.transfer_call(request(plain(1)))
    assert before is not None
    flags = int(AccountFlags.MAY_OVERDRAW | AccountFlags.STRIPED)
    opening = asyncio.ensure_future(host.create_accounts([AccountRow(account(99), "USD", flags)]))
    await asyncio.sleep(0)
    assert host.native.gathered_rows == 0  # what came before stays before
    assert host.transfer_call(request(plain(2))) is None
    rows = host.transfers([TransferRow(transfer_id(3), account(99), PEOPLE[0], 5)])
    assert await asyncio.gather(opening, rows) == [b"\x01", b"\x01"]
    assert results(await before) == [1]
    same = plain(3, debit_account_id=account(99), credit_account_id=PEOPLE[0], amount_minor=5)
    again = host.transfer_call(request(same))
    assert again is not None
    assert results(await again) == [1]
    [state] = await host.accounts([account(99)])
    assert state is not None
    assert state.balance == -5  # once
    await host.close()
