"""A power cut: what the disk holds at one moment, without what was still in memory. The wallet runs on a file system in
an image file; the process is stopped, the image is copied as it is, and the copy is mounted and recovered. Needs root,
mount and mkfs.ext4; skipped with the reason where they are missing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from load_process import BATCH_ROWS, batch_id, config

from wallet_core.engine.codes import TransferResult
from wallet_core.event_log import LogDamaged
from wallet_core.shard import ShardHost, open_host

ROUNDS = int(os.environ.get("DUCAT_POWER_CUT_ROUNDS", "2"))
ROOT = Path(__file__).resolve().parents[3]
IMAGE_BYTES = 96 << 20


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a loop-mounted image is needed: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)  # lazily: files may be open yet


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if os.geteuid() != 0 or shutil.which("mount") is None or shutil.which("mkfs.ext4") is None:
        pytest.skip("a power cut is tested on a loop-mounted image: that needs root, mount and mkfs.ext4")
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True, capture_output=True)
    return path


def run_and_cut(image: Path, folder: Path, round_number: int, after_s: float, *words: str) -> tuple[Path, set[bytes]]:
    """Run the load on the image and copy it under the stopped process. Returns the copy and what was acknowledged."""
    with mounted(image, folder) as disk:
        child = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parent / "load_process.py"),
                f"{disk}/data",
                "1",
                str(round_number),
                *words,
            ],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert child.stdout is not None
        try:
            ready = child.stdout.readline().decode()
            assert ready.startswith("ready "), ready
            os.set_blocking(child.stdout.fileno(), False)
            said, deadline = b"", time.monotonic() + after_s
            while time.monotonic() < deadline:
                said += child.stdout.read() or b""
                time.sleep(0.002)
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            said += child.stdout.read() or b""
            copy = image.with_suffix(f".{round_number}")
            shutil.copyfile(image, copy)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
    time_ms = int(ready.split()[1])
    acknowledged = set()
    for line in said.decode().split("\n")[:-1]:
        word = line.split()
        if word[0] == "A":
            acknowledged |= {batch_id(round_number, int(word[1]), row, time_ms) for row in range(BATCH_ROWS)}
    return copy, acknowledged


def remembered(host: ShardHost, ids: list[bytes]) -> bytes:
    codes = b""
    for at in range(0, len(ids), 8000):
        host.submit_results(at, ids[at : at + 8000])
        found: list[tuple[int, bytes]] = []
        while not found:
            found = host.completions()
        codes += found[0][1]
    return codes


@pytest.mark.parametrize("words", [(), ("nodirect",)], ids=["direct", "page cache"])
def test_power_cut(image: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    seed = int(os.environ.get("DUCAT_KILL_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    for round_number in range(ROUNDS):
        copy, acknowledged = run_and_cut(image, tmp_path / "disk", round_number, rng.uniform(0.1, 0.5), *words)
        assert acknowledged
        with mounted(copy, tmp_path / "cut") as disk:
            host = open_host(config(disk / "data", 1))
            host.start()
            codes = remembered(host, sorted(acknowledged))
            assert set(codes) == {TransferResult.OK}, f"{codes.count(0)} acknowledged transfers lost, seed {seed}"
            assert all(host.check_digests().values())
            for total in host.totals():
                assert total.balance + total.in_flight == 0
            host.close()
        image = copy  # and on from there


def test_this_harness_notices_a_log_that_does_not_sync(image: Path, tmp_path: Path) -> None:
    copy, acknowledged = run_and_cut(image, tmp_path / "disk", 0, 0.4, "nodirect", "nosync")
    with mounted(copy, tmp_path / "cut") as disk:
        try:
            host = open_host(config(disk / "data", 1))
        except (LogDamaged, OSError):
            return  # not even a log that can be opened
        host.start()
        codes = remembered(host, sorted(acknowledged))
        host.close()
        assert 0 in codes, "without fdatasync acknowledged transfers must be missing after the cut"
