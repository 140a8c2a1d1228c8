"""Risk: a chain over two wallet processes is applied in part when one of them dies, and the balance check over both is blind
or cries wolf."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ducat.batch import transfer_ids
from ducat.wallet.v1 import shard_pb2, wallet_pb2
from kernel.ids import account_id
from ops.platform import free_port
from tests import prefork
from tests.integration.wallet_service.conftest import StartWallet, WalletProcess
from tests.integration.wallet_service.test_two_processes import NAMES, Pair, balance
from tests.integration.wallet_service.test_wallet_process import open_accounts

OK, LINKED_FAILED = wallet_pb2.TRANSFER_RESULT_OK, wallet_pb2.TRANSFER_RESULT_LINKED_FAILED
ROOT = Path(__file__).resolve().parents[3]


def chain(*legs: tuple[str, str, int]) -> list[wallet_pb2.Transfer]:
    ids = transfer_ids(len(legs))
    return [
        wallet_pb2.Transfer(
            transfer_id=ids[16 * n : 16 * n + 16],
            debit_account_id=account_id(debit),
            credit_account_id=account_id(credit),
            amount_minor=amount,
            linked=n < len(legs) - 1,
        )
        for n, (debit, credit, amount) in enumerate(legs)
    ]


async def submit(wallet: WalletProcess, rows: Sequence[wallet_pb2.Transfer]) -> list[int]:
    answer = await wallet.wallet.CreateTransfers(wallet_pb2.CreateTransfersRequest(transfers=rows), timeout=30)
    return list(answer.results)


async def submit_columns(wallet: WalletProcess, rows: Sequence[wallet_pb2.Transfer]) -> dict[int, int]:
    batch = wallet_pb2.TransferBatch(
        batch_id=1,
        ids=b"".join(row.transfer_id for row in rows),
        debit_account_ids=b"".join(row.debit_account_id for row in rows),
        credit_account_ids=b"".join(row.credit_account_id for row in rows),
        amounts_minor=[row.amount_minor for row in rows],
        flags=b"".join(int(row.linked).to_bytes(2, "little") for row in rows),
    )
    call = wallet.wallet.SubmitTransfers()
    await call.write(wallet_pb2.SubmitTransfersRequest(batch=batch))
    result = (await asyncio.wait_for(call.read(), 20)).result
    call.cancel()
    return dict(zip(result.failed_rows, result.failed_results, strict=True))


async def check(wallet: WalletProcess) -> shard_pb2.CheckBalancesResponse:
    return await wallet.shards.CheckBalances(shard_pb2.CheckBalancesRequest(), timeout=30)


async def test_chains_between_processes_are_all_or_nothing(start_wallet: StartWallet) -> None:
    pair = Pair(start_wallet)
    one, two = await pair.start(0), await pair.start(1)
    await open_accounts(one, NAMES[0], may_overdraw=True)
    await open_accounts(two, NAMES[1])
    here, there = NAMES[0], NAMES[1]

    rows = chain((here, there, 100), (there, here, 30))
    assert await submit(one, rows) == [LINKED_FAILED, wallet_pb2.TRANSFER_RESULT_INSUFFICIENT_FUNDS]
    assert (await balance(one, here), await balance(two, there)) == (0, 0)

    assert await submit(one, chain((here, there, 100), (here, there, 20))) == [OK, OK]
    rows = chain((there, here, 50), (there, here, 7))  # of the other process's accounts: its owner takes it
    assert await submit(one, rows) == [wallet_pb2.TRANSFER_RESULT_WRONG_SHARD] * 2
    assert await submit(two, rows) == [OK, OK]
    assert await submit_columns(one, chain((here, there, 1), (here, there, 2))) == {}
    assert (await balance(one, here), await balance(two, there)) == (-66, 66)
    for process in (one, two):
        report = await check(process)
        assert report.ok
        assert {entry.currency_code: entry.imbalance_minor for entry in report.balances} == {"USD": 0, "XXX": 0}
        assert len(report.positions) == 2

    await two.kill()
    down = chain((here, there, 10), (here, there, 10))
    assert await submit(one, down) == [LINKED_FAILED] * 2
    two = await pair.start(1)
    assert await submit(one, down) == [LINKED_FAILED] * 2
    assert (await balance(one, here), await balance(two, there)) == (-66, 66)


async def test_processes_that_die_under_chains_leave_nothing_half_done(start_wallet: StartWallet) -> None:
    pair = Pair(start_wallet)
    one, two = await pair.start(0), await pair.start(1)
    await open_accounts(one, NAMES[0], may_overdraw=True)
    await open_accounts(two, NAMES[1])
    sent = [chain((NAMES[0], NAMES[1], 1), (NAMES[0], NAMES[1], 1_000)) for _ in range(120)]
    tasks = [asyncio.ensure_future(submit(one, rows)) for rows in sent]
    await asyncio.sleep(0.15)
    await two.kill()
    two = await pair.start(1)
    await asyncio.sleep(0.2)
    await one.kill()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    one = await pair.start(0)
    ids = transfer_ids(len(sent))
    by_hand = [
        wallet_pb2.Transfer(
            transfer_id=ids[16 * n : 16 * n + 16],
            kind=wallet_pb2.TRANSFER_KIND_VOID,
            pending_id=rows[0].transfer_id,
        )
        for n, rows in enumerate(sent)
    ]
    told = set(await submit(one, by_hand))
    # A chain that had not begun when its process died left no hold: any shard may say so, also one that is not here.
    assert told <= {wallet_pb2.TRANSFER_RESULT_HOLD_NOT_FOUND, wallet_pb2.TRANSFER_RESULT_WRONG_SHARD}
    async with asyncio.timeout(40):  # marks that were left are ended after a grace period
        while True:
            account = (await one.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=NAMES[0]))).account
            other = (await two.wallet.GetBalance(wallet_pb2.GetBalanceRequest(name=NAMES[1]))).account
            if not account.held_out_minor and not other.held_in_minor:
                break
            await asyncio.sleep(0.2)
    again = [await submit(one, rows) for rows in sent]
    assert all(set(results) in ({OK}, {LINKED_FAILED}) for results in again)
    for before, after in zip(answers, again, strict=True):
        if isinstance(before, list) and set(before) in ({OK}, {LINKED_FAILED}):
            assert before == after
    applied = sum(results == [OK, OK] for results in again)
    assert (await balance(one, NAMES[0]), await balance(two, NAMES[1])) == (-1_001 * applied, 1_001 * applied)
    assert (await check(one)).ok


async def test_the_command_says_so_and_the_gauge_is_there(start_wallet: StartWallet) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    wallet = await start_wallet(wallet_check_interval_s=0.2, metrics_listen_wallet=metrics)
    await open_accounts(wallet, NAMES[0], may_overdraw=True)
    await open_accounts(wallet, NAMES[1])
    assert await submit(wallet, chain((NAMES[0], NAMES[1], 5), (NAMES[1], NAMES[0], 0))) != [OK, OK]
    assert await submit(wallet, chain((NAMES[0], NAMES[1], 5), (NAMES[0], NAMES[1], 6))) == [OK, OK]
    command = ("ops", "wallet", "check", "--json", "--address", wallet.address)
    process = await prefork.start(*command, env=wallet.env)
    printed, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    report = json.loads(printed)
    assert report["ok"] is True
    assert report["currencies"]["USD"] == {"balance_minor": 0, "in_flight_minor": 0, "imbalance_minor": 0}
    async with asyncio.timeout(20):
        while 'ducat_wallet_imbalance_minor{currency="USD"} 0.0' not in await asyncio.to_thread(read, metrics):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        text: str = answer.read().decode()
    return text
