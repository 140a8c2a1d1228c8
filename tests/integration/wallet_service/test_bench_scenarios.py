"""Risk: a benchmark of the wallet prints figures of something that did not happen, or other keys than the documents name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ducat.wallet.v1 import wallet_pb2
from loadtest.bench import client, host, wallet

KEYS = {
    "scenario",
    "accounts",
    "transfers",
    "transfers_per_second",
    "batch_ms",
    "cpu_seconds",
    "bytes_per_transfer",
    "limits",
    "ratios",
    "checks",
}


def smoke(name: str, tmp_path: Path) -> dict[str, Any]:
    report = wallet.run(name, smoke=True, data_dir=str(tmp_path))
    assert set(report) >= KEYS
    assert set(report["batch_ms"]) == {"p50", "p99", "max"}
    assert set(report["cpu_seconds"]) == {"client", "server"}
    assert set(report["checks"]) >= {"balances", "log"}
    assert report["checks"] == dict.fromkeys(report["checks"], True)
    assert json.loads(json.dumps(report)) == report
    return report


@pytest.mark.timeout(180)
def test_a_restore_is_measured_from_snapshot_and_log_and_from_the_log_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = smoke("restore", tmp_path)
    ways = report["restore"]
    assert set(ways) == {"snapshot_and_log", "log_alone"}
    events = wallet.SCENARIOS["restore"].smoke_accounts + wallet.SCENARIOS["restore"].smoke_transfers
    assert ways["log_alone"]["replayed_events"] == events
    assert 0 <= ways["snapshot_and_log"]["replayed_events"] < events
    wallet.print_report(report)
    assert "log_alone events_per_second" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(180)
def test_a_snapshot_is_taken_while_batches_are_under_way(tmp_path: Path) -> None:
    report = smoke("snapshot", tmp_path)
    taken = report["snapshot"]
    assert set(taken["delay_ms"]) == set(taken["batch_ms"]) == {"p50", "p99", "max"}
    assert taken["batches"] > 0
    assert taken["bytes"] > wallet.SCENARIOS["snapshot"].smoke_accounts * 64


def test_tigerbeetles_own_figure_is_taken_and_a_failure_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "data"
    folder.mkdir(parents=True)
    counts = wallet.Counts(accounts=10, transfers=20)
    monkeypatch.delenv("TIGERBEETLE", raising=False)
    assert wallet.tigerbeetle_ratio(folder, 1000.0, counts) == {}
    binary = tmp_path / "binary"
    monkeypatch.setenv("TIGERBEETLE", str(binary))
    binary.write_text(
        "#!/bin/sh\n"
        'test "$*" = "benchmark --account-count=10 --transfer-count=20" || exit 3\n'
        "touch data-file\n"
        "echo info >&2\n"
        "echo 'load accepted = 250 tx/s'\n"
    )
    binary.chmod(0o755)
    assert wallet.tigerbeetle_ratio(folder, 1000.0, counts) == {"tigerbeetle": 4.0}
    assert list(folder.parent.iterdir()) == [folder]
    binary.write_text("#!/bin/sh\necho 'load accepted = 250 tx/s'\necho no room >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*no room"):
        wallet.tigerbeetle_ratio(folder, 1000.0, counts)


def test_a_snapshots_delay_is_not_made_smaller_by_a_stall_that_happened_without_it() -> None:
    usual = [(n * 1.0, n * 1.0 + 0.010) for n in range(100)]
    usual[2] = (2.0, 2.9)  # a stall long before
    usual[98] = (98.0, 98.5)  # and one right before
    beside = [(100.0 + n, 100.0 + n + 0.040) for n in range(10)]
    found = wallet._beside(np.array(usual + beside), 99.5, 109.5)
    assert (found["batches"], found["batches_before"]) == (10, 10)
    assert found["before_ms"]["max"] == pytest.approx(500)
    assert found["delay_ms"] == {"p50": 30.0, "p99": 30.0, "max": 30.0}
    assert found["rate"] == pytest.approx(1.0, rel=0.1)


def test_a_restore_too_short_to_tell_from_an_empty_start_has_no_rate() -> None:
    limits = {"empty_start_spread_seconds": 0.1}
    assert wallet._rate(1_000, 0.5, limits) == 2_000
    assert wallet._rate(1_000, 0.4, limits) is None
    assert wallet._rate(1_000, -0.1, {"empty_start_spread_seconds": 0.0}) is None


def test_balances_read_without_messages_are_those_of_the_messages() -> None:
    numbers = np.array([*range(1_000), 9_999_999], dtype=np.uint64)
    ids = client.account_ids(numbers)
    figures = [0, 1, -1, 127, 128, 2**62, -(2**62), *(n * 977 - 400_000 for n in range(len(ids) - 7))]
    accounts = [
        wallet_pb2.Account(
            account_id=one.tobytes(),
            currency_code="USD",
            balance_minor=figure,
            available_minor=figure,
            may_overdraw=True,
            positions=[wallet_pb2.ShardPosition(shard=place % 3, sequence_number=10**7)],
        )
        for place, (one, figure) in enumerate(zip(ids, figures, strict=True))
    ]

    def read(some: list[wallet_pb2.Account]) -> list[int] | None:
        found = client.balances_in(wallet_pb2.GetAccountsResponse(accounts=some).SerializeToString(), ids)
        return None if found is None else found.tolist()

    assert read(accounts) == figures
    assert read(accounts[:-1]) is None
    assert read([*accounts[1:], accounts[0]]) is None
    assert read([*accounts, accounts[0]]) is None
    accounts[5].currency_code = "EUR"
    assert read(accounts) is None
    assert client.balances_in(b"", ids) is None
    bare = [wallet_pb2.Account(account_id=one.tobytes(), currency_code="USD") for one in ids]
    assert read(bare) == [0] * len(ids)


@pytest.mark.parametrize("wrong", [None, 0, 8_189, 8_190, 12_345, 2 * 8_190 - 1, 2 * 8_190, 2 * 8_190 + 6])
async def test_one_wrong_balance_among_all_is_seen(wrong: int | None) -> None:
    """In the first, a middle and the last call, at their edges and between; and none where none is wrong."""
    count = 2 * client.BATCH_ROWS + 7
    generator = client.Generator(client.Plan("", "", accounts=count, transfers=20_000))
    generator.batch(20_000)
    expected = generator.expected()
    stored = expected.copy()
    if wrong is not None:
        stored[wrong] += 1
    asked: list[int] = []

    async def get_accounts(request: bytes, **_: float) -> bytes:
        ids = wallet_pb2.GetAccountsRequest.FromString(request).account_ids
        numbers = [int.from_bytes(one[8:]) - client.ID_OFFSET for one in ids]
        asked.extend(numbers)
        accounts = [
            wallet_pb2.Account(account_id=one, currency_code="USD", balance_minor=int(stored[number]))
            for one, number in zip(ids, numbers, strict=True)
        ]
        return wallet_pb2.GetAccountsResponse(accounts=accounts).SerializeToString()

    channel: Any = SimpleNamespace(unary_unary=lambda *_: get_accounts)
    assert await client.check_balances(channel, generator, expected) is (wrong is None)
    assert sorted(asked) == list(range(count))


@pytest.mark.parametrize(
    ("changed", "is_passed"),
    [
        ({}, True),
        ({"failed_rows": 1}, False),
        ({"failed_rows": False}, False),
        ({"balances": False}, False),
        ({"log": 0}, False),
        ({"digest_after_restart": 1}, False),
    ],
)
def test_a_failed_check_fails_the_run(changed: dict[str, Any], is_passed: bool) -> None:
    checks = {"failed_rows": 0, "balances": True, "log": True, "digest_after_restart": True}
    assert host.passed(checks | changed) is is_passed


def test_a_transfer_that_is_doubled_or_missing_in_the_log_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def record(number: int, kind: int = 3) -> bytes:
        return client.transfer_id_column(number, 1, 1_800_000_000_000) + bytes(30) + bytes([kind, 0])

    def found(*numbers: int) -> bool:
        body = b"".join([record(7, kind=1), *(record(n, kind=9 if n % 2 else 3) for n in numbers)])
        monkeypatch.setattr(
            wallet, "_frames", lambda _: [SimpleNamespace(body=each) for each in (body, b"", record(9, kind=1))]
        )
        log = wallet.read_logs(tmp_path, 3)
        assert log.payload_bytes == 3 * 96 + len(body) + 48
        return log.has_all_transfers

    assert found(2, 0, 1)
    assert not found(0, 1)
    assert not found(0, 1, 1)
    assert not found(0, 1, 2, 2)
    assert not found(0, 1, 3)
    assert not found()
