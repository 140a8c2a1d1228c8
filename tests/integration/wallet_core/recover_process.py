"""Recovers a wallet's folder and says what it remembers: `python recover_process.py FOLDER`, transfer ids as one line of hex on stdin.

One line of JSON on stdout: {"codes": hex of one TransferResult an id, "digests": bool, "sums": [balance + in flight of each currency]},
or {"damaged": text} for a log that cannot be opened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from load_process import config

from wallet_core.event_log import LogDamaged
from wallet_core.shard import ShardHost, open_host

IDS_AT_ONCE = 8_000


def remembered(host: ShardHost, ids: list[bytes]) -> bytes:
    codes = b""
    for at in range(0, len(ids), IDS_AT_ONCE):
        host.submit_results(at, ids[at : at + IDS_AT_ONCE])
        found: list[tuple[int, bytes]] = []
        while not found:
            found = host.completions()
        codes += found[0][1]
    return codes


def main(folder: Path, ids: list[bytes]) -> dict[str, object]:
    try:
        host = open_host(config(folder, 1))
    except (LogDamaged, OSError) as error:
        return {"damaged": str(error)}
    host.start()
    try:
        return {
            "codes": remembered(host, ids).hex(),
            "digests": all(host.check_digests().values()),
            "sums": [total.balance + total.in_flight for total in host.totals()],
        }
    finally:
        host.close()


if __name__ == "__main__":
    packed = bytes.fromhex(sys.stdin.readline())
    print(json.dumps(main(Path(sys.argv[1]), [packed[at : at + 16] for at in range(0, len(packed), 16)])))
