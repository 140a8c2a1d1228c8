"""Risk: with several wallet processes an operator's command asks the wrong one, or passes a part for the whole."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest

from ducat.wallet.v1 import shard_pb2
from ops.__main__ import main as ducat
from ops.platform import free_port
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.integration.wallet_service.test_two_processes import NAMES, Pair, batches, send_all
from tests.integration.wallet_service.test_wallet_process import open_accounts

CLEARING = "psp/sandbox/clearing/USD"


class Operator:
    """Types commands, with no other settings than an address: neither databases nor a data folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.address = ""

    async def type(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capsys.readouterr()
        try:
            code = await asyncio.to_thread(ducat, ["wallet", *words, "--address", self.address])
        except SystemExit as wrong_use:
            code = int(str(wrong_use.code))
        said = self._capsys.readouterr()
        # The command's loop has ended beside the test's own in one process: grpc.aio's poller may still call it, which no operator sees.
        lines = [line for line in said.err.splitlines() if "PollerCompletionQueue" not in line]
        assert "Traceback" not in "\n".join(lines)
        return code, said.out, said.err

    async def json(self, *words: str) -> tuple[int, list[dict[str, Any]], str]:
        code, out, err = await self.type(*words, "--json")
        return code, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def operator(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Operator:
    for name in ("DUCAT_DATABASE_URL", "DUCAT_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    return Operator(capsys)


async def pair_with_money(start_wallet: StartWallet) -> Pair:
    """300 from shard 0 to shard 1, and a striped account that has a part on each."""
    pair = Pair(start_wallet)
    one, two = await pair.start(0), await pair.start(1)
    for process, name in ((one, NAMES[0]), (two, NAMES[1])):
        await open_accounts(process, name, may_overdraw=True)
        await open_accounts(process, CLEARING, may_overdraw=True, striped=True)
    assert await send_all(one, batches(300, 2, 1)) == set()
    await move(one, NAMES[0], 11)
    await move(two, NAMES[1], 31)
    return pair


async def move(process: WalletProcess, seller: str, amount: int) -> None:
    """From the striped account to a seller."""
    from ducat.batch import transfer_batches, transfer_ids
    from kernel.ids import account_id

    made = list(transfer_batches(transfer_ids(1), account_id(CLEARING), account_id(seller), [amount], first_batch_id=9))
    assert await send_all(process, made) == set()


async def test_every_command_asks_the_owner_and_names_what_is_missing(
    start_wallet: StartWallet, operator: Operator
) -> None:
    pair = await pair_with_money(start_wallet)
    for shard in (0, 1):  # any node will do
        operator.address = pair.address(shard)
        code, shards, _ = await operator.json("shards")
        assert (code, [one["state"] for one in shards]) == (0, ["serving", "serving"])
        assert [one["address"] for one in shards] == [pair.address(0), pair.address(1)]
        for seller, expected in ((NAMES[0], -289), (NAMES[1], 331), (CLEARING, -42)):
            code, (balance,), _ = await operator.json("balance", seller)
            assert (code, balance["balance_minor"]) == (0, expected)
    code, history, _ = await operator.json("history", CLEARING)
    assert (code, history[-1]["balance_minor"]) == (0, -42)
    code, events, _ = await operator.json("events", "--shard", "0")
    assert (code, {event["shard"] for event in events}) == (0, {0})
    assert [one["shard"] for one in (await operator.json("snapshot"))[1]] == [0, 1]
    assert {one["shard"] for one in (await operator.json("snapshots"))[1]} == {0, 1}
    assert [one["ok"] for one in (await operator.json("verify"))[1]] == [True, True]
    code, (check,), _ = await operator.json("check")
    assert (code, check["ok"], set(check["positions"])) == (0, True, {"0", "1"})
    code, rebuilt, _ = await operator.json("rebuild")
    assert (code, rebuilt[-1]["done"]) == (0, True)
    code, (part,), _ = await operator.json("balance", CLEARING, "--at", f"1:{shards[1]['durable']}")
    assert (code, part["balance_minor"]) == (0, -31)

    await pair.processes[1].kill()
    operator.address = pair.address(0)
    code, shards, _ = await operator.json("shards")
    assert (code, [one["state"] for one in shards]) == (1, ["serving", "unreachable"])
    assert (shards[1]["address"], shards[1]["durable"]) == (pair.address(1), None)
    assert pair.address(1) in shards[1]["problems"][0]
    assert f"shard 1: {pair.address(1)} does not answer" in (await operator.type("shards"))[1]
    assert (await operator.json("balance", NAMES[0]))[0] == 0
    code, (clearing,), err = await operator.json("balance", CLEARING)
    assert (code, clearing["balance_minor"]) == (1, -11)
    assert "without the part on shard 1, which is unreachable" in err
    for words in (("balance", NAMES[1]), ("history", NAMES[1]), ("events", "--shard", "1"), ("check",)):
        code, out, err = await operator.type(*words)
        assert (code, out, len(err.splitlines())) == (1, "", 1), (words, out, err)
        assert "shard 1" in err
        assert pair.address(1) in err
    for command in ("snapshot", "snapshots", "verify"):
        code, rows, err = await operator.json(command)
        assert (code, {row["shard"] for row in rows}) == (1, {0})
        assert "shard 1 is unreachable" in err
    code, rebuilt, err = await operator.json("rebuild")
    assert (code, rebuilt[-1]["done"]) == (1, True)
    assert "shard 1 is filled when its owner is back" in err

    operator.address = pair.address(1)  # the dead one
    for command in ("shards", "check", "rebuild", "verify"):
        code, out, err = await operator.type(command)
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert f"no wallet answers at {pair.address(1)}" in err

    two = await pair.start(1)  # its part of the read model was emptied while it was away
    operator.address = pair.address(0)
    async with asyncio.timeout(20):
        while [one["lag"] for one in (await operator.json("shards"))[1]] != [0, 0]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert (await operator.json("balance", CLEARING))[1][0]["balance_minor"] == -42
    two.process.send_signal(signal.SIGSTOP)  # it is there and says nothing
    try:
        code, shards, _ = await operator.json("shards")
        assert (code, [one["state"] for one in shards]) == (1, ["serving", "unreachable"])
    finally:
        two.process.send_signal(signal.SIGCONT)


MISTAKES = (
    (("events", "--shard", "-1"), "expected a number from 0 to 65535"),
    (("events", "--from", "99999999999999999999999"), "expected a number"),
    (("history", NAMES[0], "--limit", "-1"), "expected a number"),
    (("check", "--every", "nan"), "expected seconds"),
    (("verify", "--shard", "7"), "knows no shard 7"),
    (("balance", NAMES[0], "--at", "99999999999999999999999"), "--at 99999999999999999999999: expected a time"),
    (("balance", NAMES[0], "--at", "0:99999999999999999999999"), "expected a time"),
    (("balance", NAMES[0], "--at", "0001-01-01T00:00:00"), "expected a time"),
    (("balance", "\udcff"), "expected a name"),
    (("balance", ""), "account_id"),
    (("restore", "--shard", "0", "--from", "/nowhere"), "/nowhere"),
)


async def test_mistakes_are_one_line_and_no_traceback(start_wallet: StartWallet, operator: Operator) -> None:
    """And the map of this one names its own address as the owner of shard 1, which it is not."""
    address = f"127.0.0.1:{free_port()}"
    await start_wallet(wallet_shard_count=2, wallet_shards=0, wallet_listen=address, wallet_peers=f"1={address}")
    operator.address = address
    code, shards, _ = await operator.json("shards")
    assert (code, [one["state"] for one in shards]) == (1, ["serving", "unreachable"])
    assert "does not own it" in shards[1]["problems"][0]
    for words, said in MISTAKES:
        code, out, err = await operator.type(*words)
        assert (code in (1, 2), out) == (True, ""), (words, out)
        assert said in err, (words, err)


def test_the_states_of_a_shard_are_told_apart() -> None:
    from ops.wallet import _problems

    rewound = shard_pb2.Shard(state=shard_pb2.SHARD_STATE_REWOUND, links=[shard_pb2.ShardLink(problem="older")])
    assert "A shard went back in time" in _problems(rewound)[0]
    waits = shard_pb2.Shard(state=shard_pb2.SHARD_STATE_SERVING, read_model_problem="Valkey: TimeoutError")
    assert _problems(waits) == ["the read model waits, the shard goes on: Valkey: TimeoutError"]
    assert _problems(shard_pb2.Shard(state=shard_pb2.SHARD_STATE_SERVING)) == []
