"""A power cut: what the disk holds at one moment, without what was still in memory. The wallet runs on a file system in
an image file; the process is stopped, the image is copied as it is, and the copy is mounted and recovered. Needs root,
mount and mkfs.ext4; skipped with the reason where they are missing.

Each image is mounted in a mount namespace of the one process that uses it, which dies with this one: whatever ends a test, no mount and
no loop device is left behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from load_process import BATCH_ROWS, batch_id

from wallet_core.engine.codes import TransferResult

ROUNDS = int(os.environ.get("DUCAT_POWER_CUT_ROUNDS", "2"))
HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[3]
IMAGE_BYTES = 96 << 20
NEEDED = ("mount", "mkfs.ext4", "unshare", "setpriv")


def on_image(image: Path, folder: Path, script: str, *words: str) -> list[str]:
    """The command that runs a script of this folder with the image mounted on `folder`, visible to that process alone."""
    folder.mkdir(exist_ok=True)
    return [
        *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"),
        *("sh", "-c", 'mount -o loop "$1" "$2" && shift 2 && exec "$@"', "sh", str(image), str(folder)),
        *(sys.executable, str(HERE / script), f"{folder}/data", *words),
    ]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"a power cut is tested on a loop-mounted image: that needs root and {', '.join(NEEDED)}")
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True, capture_output=True)
    tried = subprocess.run(
        [*on_image(path, tmp_path / "try", "")[:-3], "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(
            f"a power cut is tested on a loop-mounted image, and this machine refuses one: {tried.stderr.strip()}"
        )
    return path


def run_and_cut(image: Path, folder: Path, round_number: int, after_s: float, *words: str) -> tuple[Path, set[bytes]]:
    """Run the load on the image and copy it under the stopped process. Returns the copy and what was acknowledged."""
    child = subprocess.Popen(
        on_image(image, folder, "load_process.py", "1", str(round_number), *words),
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


def recover(copy: Path, folder: Path, ids: list[bytes]) -> dict[str, Any]:
    """What a wallet that starts on the copy remembers."""
    done = subprocess.run(
        on_image(copy, folder, "recover_process.py"),
        input=b"".join(ids).hex() + "\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("words", [(), ("nodirect",)], ids=["direct", "page cache"])
def test_power_cut(image: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    seed = int(os.environ.get("DUCAT_KILL_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    for round_number in range(ROUNDS):
        copy, acknowledged = run_and_cut(image, tmp_path / "disk", round_number, rng.uniform(0.1, 0.5), *words)
        assert acknowledged
        found = recover(copy, tmp_path / "cut", sorted(acknowledged))
        assert "damaged" not in found, f"{found['damaged']}, seed {seed}"
        codes = bytes.fromhex(found["codes"])
        assert set(codes) == {TransferResult.OK}, f"{codes.count(0)} acknowledged transfers lost, seed {seed}"
        assert found["digests"]
        assert not any(found["sums"])
        image = copy  # and on from there


def test_this_harness_notices_a_log_that_does_not_sync(image: Path, tmp_path: Path) -> None:
    copy, acknowledged = run_and_cut(image, tmp_path / "disk", 0, 0.4, "nodirect", "nosync")
    found = recover(copy, tmp_path / "cut", sorted(acknowledged))
    if "damaged" not in found:  # or not even a log that can be opened
        assert 0 in bytes.fromhex(found["codes"]), (
            "without fdatasync acknowledged transfers must be missing after the cut"
        )


def test_whatever_ends_a_test_no_mount_is_left(image: Path, tmp_path: Path) -> None:
    """The test's own process is killed while its image is in use."""
    code = (
        "import subprocess, sys, time; child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE);"
        "print(child.stdout.readline().decode(), child.pid, flush=True); time.sleep(60)"
    )
    command = on_image(image, tmp_path / "disk", "load_process.py", "1", "0")
    dying = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert dying.stdout is not None
    assert dying.stdout.readline().startswith(b"ready ")
    dying.kill()
    dying.wait()
    dying.stdout.close()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    deadline = time.monotonic() + 20
    while str(image) in (said := subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
