"""Risk: a check passes over a process that does not run, or a restore ends well although something differs."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from ducat.event.v1 import feed_pb2, feed_pb2_grpc
from ducat.ledger.v1 import ledger_pb2, ledger_pb2_grpc
from ducat.wallet.v1 import shard_pb2, wallet_service_pb2_grpc
from ops import backup
from ops.check import DIFFERS, OK, SILENT_S, UNKNOWN, Verdict, lines_of, record_of, run_checks, verdict_of
from ops.platform import Platform
from runtime.settings import Settings


class Feeds(feed_pb2_grpc.FeedServiceServicer):
    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {"wallet": (7, ""), "ledger": (7, ""), "executor": (3, "")}
        self.missing: dict[str, int] = {}
        self.asked_s = 1.0

    async def ListFeedConsumers(self, request: Any, context: Any) -> feed_pb2.ListFeedConsumersResponse:
        answer = feed_pb2.ListFeedConsumersResponse()
        for name, (proven, problem) in self.rows.items():
            one = answer.consumers.add(
                topic="payment.events", consumer=name, proven_position=proven, head_position=7, problem=problem
            )
            one.missing_count = self.missing.get(name, 0)
            one.update_time.FromSeconds(int(time.time() - self.asked_s))
        return answer


class Shards(wallet_service_pb2_grpc.ShardServiceServicer):
    async def CheckBalances(self, request: Any, context: Any) -> shard_pb2.CheckBalancesResponse:
        return shard_pb2.CheckBalancesResponse(ok=True)


class Ledger(ledger_pb2_grpc.LedgerServiceServicer):
    def __init__(self) -> None:
        self.differences: list[ledger_pb2.AccountDifference] = []

    async def GetTrialBalance(self, request: Any, context: Any) -> ledger_pb2.GetTrialBalanceResponse:
        return ledger_pb2.GetTrialBalanceResponse(balanced=True)

    async def CompareWallet(self, request: Any, context: Any) -> ledger_pb2.CompareWalletResponse:
        return ledger_pb2.CompareWalletResponse(
            complete=True, differences=self.differences, difference_count=len(self.differences)
        )


class World:
    def __init__(self, settings: Settings, feeds: Feeds, ledger: Ledger) -> None:
        self.settings, self.feeds, self.ledger = settings, feeds, ledger


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Payment, wallet and ledger at one address; no executor answers."""
    server = grpc.aio.server()
    feeds, ledger = Feeds(), Ledger()
    feed_pb2_grpc.add_FeedServiceServicer_to_server(feeds, server)
    wallet_service_pb2_grpc.add_ShardServiceServicer_to_server(Shards(), server)
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(ledger, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    here = f"127.0.0.1:{port}"
    settings = Settings(payment_address=here, wallet_address=here, ledger_address=here, executor_address="127.0.0.1:1")
    yield World(settings, feeds, ledger)
    await server.stop(0)


async def test_without_an_executor_what_runs_is_checked_and_nothing_is_missed(world: World) -> None:
    found = await run_checks(world.settings, wait_s=0, without=("executor",))
    assert {one.name: one.verdict for one in found} == dict.fromkeys(
        ("wallet", "ledger", "wallet = ledger", "feeds"), OK
    )
    assert verdict_of(found) == OK
    assert {row["consumer"] for row in record_of(found)["feeds"]["consumers"]} == {"wallet", "ledger"}
    found = await run_checks(world.settings, wait_s=0)
    assert verdict_of(found) == UNKNOWN, "a process that should run and does not is no good news"


async def test_psp_clearing_that_differs_and_a_feed_that_diverged_are_seen_without_an_executor(world: World) -> None:
    account = ledger_pb2.AccountDifference(
        account_name="psp/sandbox/clearing/USD",
        wallet_balance_minor=-500,
        ledger_balance_minor=-400,
        difference_minor=-100,
    )
    world.ledger.differences = [account]
    world.feeds.rows["wallet"] = (3, "it is another feed now")
    found = await run_checks(world.settings, wait_s=0, without=("executor",))
    assert verdict_of(found) == DIFFERS
    shown = "\n".join(lines_of(found))
    assert "psp/sandbox/clearing/USD: wallet -500, ledger -400, difference -100" in shown
    assert "it is another feed now" in shown


async def test_what_is_missing_at_last_differs(world: World) -> None:
    world.feeds.rows["ledger"] = (6, "")
    found = await run_checks(world.settings, wait_s=0, without=("executor",))
    assert {one.name: one.verdict for one in found}["feeds"] == UNKNOWN
    assert "ledger of payment.events has proven 6 of 7" in "\n".join(lines_of(found))


@pytest.mark.parametrize(("asked_s", "verdict"), [(1.0, DIFFERS), (SILENT_S + 1, UNKNOWN)])
async def test_what_a_consumer_that_does_not_run_lacks_is_not_lost(world: World, asked_s: float, verdict: str) -> None:
    world.feeds.rows["wallet"], world.feeds.missing["wallet"], world.feeds.asked_s = (6, ""), 1, asked_s
    found = await run_checks(world.settings, wait_s=0, without=("executor",))
    assert verdict_of(found) == verdict
    assert ("does its process run?" in "\n".join(lines_of(found))) is (verdict == UNKNOWN)


async def test_a_process_that_is_down_is_named_and_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.check.DOWN_S", 0.0)
    async with asyncio.timeout(30):
        found = await run_checks(world.settings, wait_s=1000)
    assert verdict_of(found) == UNKNOWN
    assert "executor cannot be asked" in next(one.text for one in found if one.name == "feeds")


@pytest.mark.parametrize(("verdict", "code"), [(OK, 0), (DIFFERS, 1), (UNKNOWN, 2)])
async def test_a_restore_ends_as_the_checks_say(
    verdict: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> None: ...

    async def found(settings: Settings, *, wait_s: float, without: tuple[str, ...]) -> list[Verdict]:
        assert without == ("executor",)
        assert settings.feed_check_interval_s == 1
        return [Verdict("wallet", OK, "well"), Verdict("feeds", verdict, "so it is", ["a line"])]

    kept = SimpleNamespace(
        name="one", shard_count=2, missing_shards=[], last_time_ns=10**18, postgres=SimpleNamespace(embedded=True)
    )
    monkeypatch.setattr(backup, "_find", lambda *_: kept)
    monkeypatch.setattr(backup, "_target", lambda *_: (None, {}))
    monkeypatch.setattr(backup, "run_checks", found)
    monkeypatch.setattr(backup._Restore, "lay_postgres", lambda *_: None)
    monkeypatch.setattr(backup._Restore, "recover_all", nothing)
    monkeypatch.setattr(Platform, "start", nothing)
    monkeypatch.setattr(Platform, "stop", nothing)
    words = ("restore", "--from", str(tmp_path / "store"), "--to", str(tmp_path / "target"))
    parser = argparse.ArgumentParser()
    backup.add_parser(parser.add_subparsers())
    args = parser.parse_args(["backup", *words])
    assert await asyncio.to_thread(args.run, args) == code
    shown = capsys.readouterr().out
    assert "a line" in shown
    assert ("do not take payments" in shown) == bool(code)
