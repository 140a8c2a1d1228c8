"""Risk: who begins from examples/ in another language begins with something that does not work."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ducat.batch import transfer_ids
from ducat.wallet.v1 import wallet_pb2
from ops.demo import order_state
from ops.platform import Platform

pytestmark = pytest.mark.asyncio(loop_scope="session")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BIN = Path(sys.executable).parent
BUILD_TIMEOUT_S = 900
RUN_TIMEOUT_S = 180
SUM_MINOR = sum(1 + row % 100 for row in range(100_000))

IS_ALL = os.environ.pop("DUCAT_TEST_EXAMPLES", "") == "1"
"""Whether those that have to be built are tried too. Taken out, for what begins with DUCAT_ is a setting of the platform's processes."""

TOOLS = {"python": (), "go": ("go", "buf"), "node": ("node", "npm"), "java": ("java", "javac", "mvn")}
BUILD: dict[str, list[list[str]]] = {
    "python": [],
    "go": [["go", "generate"], ["go", "vet", "."], ["go", "build", "-o", os.devnull, "."]],
    "node": [["npm", "ci", "--no-audit", "--no-fund"]],
    "java": [["mvn", "-B", "-q", "compile"]],
}
RUN = {
    "python": ["python", "main.py"],
    "go": ["go", "run", "."],
    "node": ["npm", "start"],
    "java": ["mvn", "-B", "-q", "exec:java"],
}


@pytest.mark.timeout(BUILD_TIMEOUT_S + 2 * RUN_TIMEOUT_S + 60)
@pytest.mark.parametrize("language", TOOLS)
async def test_example_does_what_it_says_and_fails_where_it_cannot(platform: Platform, language: str) -> None:
    """Judged by the platform, not only by what the program says of itself."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    if TOOLS[language] and not IS_ALL:
        pytest.skip("has to be built: set DUCAT_TEST_EXAMPLES=1")
    missing = [tool for tool in TOOLS[language] if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    addresses = {name: platform.grpc_address(name) for name in ("payment", "wallet")}

    async def run(command: list[str], timeout_s: float, **others: str) -> subprocess.CompletedProcess[str]:
        given = {f"DUCAT_{name.upper()}_ADDRESS": address for name, address in (addresses | others).items()}
        return await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=EXAMPLES / language,
            env={**os.environ, **given, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    for command in BUILD[language]:
        built = await run(command, BUILD_TIMEOUT_S)
        assert built.returncode == 0, f"{' '.join(command)}\n{built.stdout}{built.stderr}"

    done = await run(RUN[language], RUN_TIMEOUT_S)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    for told in ("100000 transfers in", "INVALID_ARGUMENT", "payment_orders[0].amount.currency_code"):
        assert told in done.stdout
    async with platform.client() as client:
        accounts = (await client.wallet.list_accounts(name_prefix=f"example/example-{language}-")).accounts
        assert [account.balance_minor for account in accounts] == [-SUM_MINOR, SUM_MINOR]
        checkout_id = accounts[0].name.split("/")[1]
        payment = (await client.payments.get_payment(checkout_id=checkout_id)).payment
        assert [order_state(order.state) for order in payment.payment_orders] == ["CANCELED"]
        source, target = accounts
        # Other tests of this platform want the wallet to have what the ledger has, in every account with a name.
        back = wallet_pb2.Transfer(
            transfer_id=transfer_ids(1),
            debit_account_id=target.account_id,
            credit_account_id=source.account_id,
            amount_minor=SUM_MINOR,
        )
        assert list((await client.wallet.create_transfers(transfers=[back])).results) == [wallet_pb2.TRANSFER_RESULT_OK]

    failed = await run(RUN[language], RUN_TIMEOUT_S, wallet=addresses["payment"])  # where no wallet is
    print(failed.stdout, failed.stderr)
    assert failed.returncode == 1
    assert "not a method of this server" in failed.stderr + failed.stdout
