"""One harness a backend: the same tests run over segment files and over a real Kafka broker."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from tests.unit.wallet_core.shard.host_fixtures import config as host_config
from wallet_core.event_log import FileLog, Frame, open_log, read_frames
from wallet_core.event_log.file import LogEnd
from wallet_core.event_log.kafka import KafkaFrames, KafkaLogConfig, KafkaPartition, ensure_topic, fetch_missing
from wallet_core.shard import ShardHostConfig
from wallet_core.shard.port import shard_folder

ROOT = Path(__file__).resolve().parents[3]
OWNER_PROCESS = Path(__file__).with_name("owner_process.py")
START = LogEnd(1, bytes(16), 0, 0, 0, 0, None)
SEGMENT = 1 << 18

_number = itertools.count(1)


class Harness:
    """A system of shards, and the nodes (folders) that own them one after the other."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def config(self, node: str, shard_count: int = 1, **options: Any) -> ShardHostConfig:
        return host_config(self.folder / node, shard_count, segment_bytes=SEGMENT, **options)

    def log_folder(self, node: str, shard: int = 0) -> Path:
        return shard_folder(self.folder / node, shard) / "log"

    def open(self, node: str) -> FileLog:
        """Own shard 0 on a node and open its log to append."""
        raise NotImplementedError

    def durable(self, node: str, shard: int = 0) -> list[Frame]:
        """The frames that count, from where they are durable."""
        raise NotImplementedError

    def carry(self, source: str, target: str, *, snapshots: bool) -> None:
        """What another node needs to take all shards over: everything durable, with or without snapshots."""
        raise NotImplementedError

    def damage(self, node: str, how: str) -> tuple[str, int]:
        """Damage the last durable frame of shard 0, whose owner is gone; returns place and offset that a refusal must name."""
        raise NotImplementedError

    def run_and_kill(self, node: str, shard_count: int, after_s: float) -> tuple[list[str], list[str]]:
        """An owner under load in a process of its own, killed: what it said before and after `after_s`."""
        words = [sys.executable, str(OWNER_PROCESS), str(self.folder / node), str(shard_count), *self.words()]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert child.stdout is not None
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(line.decode() for line in child.stdout or ()))
        reader.start()
        try:
            deadline = time.monotonic() + 60
            while not any(line.startswith("A ") for line in said):
                assert child.poll() is None, f"the owner did not start: {said}"
                assert time.monotonic() < deadline, f"the owner acknowledges nothing: {said}"
                time.sleep(0.005)
            time.sleep(after_s)
        finally:
            child.kill()
            child.wait()
            reader.join()
            child.stdout.close()
        whole = [line for line in said if line.endswith("\n")]
        return [one[2:-1] for one in whole if one[0] == "S"], [one[2:-1] for one in whole if one[0] == "A"]

    def words(self) -> list[str]:
        return []


class FileHarness(Harness):
    name = "file"

    def open(self, node: str) -> FileLog:
        return open_log(self.log_folder(node), 0, segment_bytes=SEGMENT, reserve_bytes=0)

    def durable(self, node: str, shard: int = 0) -> list[Frame]:
        return list(read_frames(self.log_folder(node, shard), shard))

    def carry(self, source: str, target: str, *, snapshots: bool) -> None:
        ignore = None if snapshots else shutil.ignore_patterns("*.snap")
        shutil.copytree(self.folder / source, self.folder / target, ignore=ignore)

    def damage(self, node: str, how: str) -> tuple[str, int]:
        frames = self.durable(node)
        [path] = sorted(self.log_folder(node).glob("*.seg"))
        offset = sum(96 + len(frame.body) + -len(frame.body) % 8 for frame in frames[:-1])
        data = bytearray(path.read_bytes())
        if how == "flipped":
            data[offset + 100] ^= 1
        elif how == "missing":
            data[offset:] = bytes(len(data) - offset)
        else:  # the frame before, once more
            length = 96 + len(frames[-2].body)
            data[offset:] = bytes(len(data) - offset)
            data[offset : offset + length] = data[offset - length : offset]
        path.write_bytes(data)
        return path.name, offset


class KafkaHarness(Harness):
    name = "kafka"

    def __init__(self, folder: Path, bootstrap: str) -> None:
        super().__init__(folder)
        self.kafka = KafkaLogConfig(bootstrap, topic=f"wallet.log.{os.getpid()}.{next(_number)}", timeout_ms=15_000)

    def config(self, node: str, shard_count: int = 1, **options: Any) -> ShardHostConfig:
        return replace(super().config(node, shard_count, **options), kafka=self.kafka)

    def open(self, node: str) -> FileLog:
        ensure_topic(self.kafka, 1)
        folder = self.log_folder(node)
        folder.mkdir(parents=True, exist_ok=True)
        store = KafkaFrames(self.kafka, 0)
        fetch_missing(store, folder, START, START, segment_bytes=SEGMENT, reserve_bytes=0, record_bytes=48)
        return open_log(folder, 0, segment_bytes=SEGMENT, reserve_bytes=0, sync=False, store=store)

    def durable(self, node: str, shard: int = 0) -> list[Frame]:
        owner = KafkaFrames(self.kafka, shard)  # a reader beside the owner may not see the last commit yet
        found = [one.frame for one in owner.read()]
        owner.close()
        return found

    def carry(self, source: str, target: str, *, snapshots: bool) -> None:
        for folder in (self.folder / source).glob("shard-*/snapshots"):
            if snapshots:
                shutil.copytree(folder, self.folder / target / folder.relative_to(self.folder / source))

    def damage(self, node: str, how: str) -> tuple[str, int]:
        """A broker does not change a record; what can go wrong is what gets into the partition, from a writer that nobody
        fences, or does not. The history is moved to a fresh topic, with its last frame changed."""
        frames = list(KafkaFrames(self.kafka, 0).read())
        values = [one.data for one in frames]
        changed = bytearray(values[-1])
        changed[100] ^= 1
        following = {"flipped": [bytes(changed)], "missing": [], "repeated": [values[-2]]}[how]
        self.kafka = replace(self.kafka, topic=f"{self.kafka.topic}.{how}")
        ensure_topic(self.kafka, 1)
        self.put([*values[:-1], *following], [one.frame.timestamp_ns for one in frames])
        return KafkaPartition(self.kafka, 0).place, len(values) - 2 + len(following)

    def put(self, values: list[bytes], times_ns: list[int]) -> None:
        """Records from a writer without transactions, which nothing fences."""
        producer = Producer({**self.kafka.client(), "acks": "all"})
        for value, time_ns in zip(values, times_ns, strict=False):
            producer.produce(self.kafka.topic, value=value, partition=0, timestamp=time_ns // 1_000_000)
        assert producer.flush(30) == 0

    def words(self) -> list[str]:
        return [self.kafka.bootstrap, self.kafka.topic]


@pytest.fixture(params=["file", pytest.param("kafka", marks=pytest.mark.kafka)])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    if request.param == "file":
        yield FileHarness(tmp_path)
    else:
        yield KafkaHarness(tmp_path, request.getfixturevalue("kafka_bootstrap"))


@pytest.fixture
def kafka_harness(kafka_bootstrap: str, tmp_path: Path) -> KafkaHarness:
    return KafkaHarness(tmp_path, kafka_bootstrap)
