"""A real Apache Kafka broker for the tests, from the jars that tests/kafka/pom.xml names: one KRaft node, one JVM with a small heap.

DUCAT_KAFKA_BOOTSTRAP names a broker that runs already. Without it, and without Java 17, Maven or the jars, tests marked `kafka` are skipped
with the reason.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.embedded import free_port

POM = Path(__file__).parent / "kafka" / "pom.xml"
RESOLVE_TIMEOUT_S = 240
START_TIMEOUT_S = 60
PR_SET_PDEATHSIG = 1
JVM = (
    *("java", "-Xms128m", "-Xmx320m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"),
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)

SETTINGS = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
log.dirs={folder}/data
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
group.min.session.timeout.ms=500
auto.create.topics.enable=false
num.network.threads=2
num.io.threads=2
log.cleaner.dedupe.buffer.size=2097152
"""


class KafkaMissing(Exception):
    """What this machine lacks for a broker."""


class KafkaBroker:
    """One broker. `start` after `kill` brings the same one back: same port, same data."""

    def __init__(self, folder: Path, class_path: str) -> None:
        self._folder = folder
        self._class_path = class_path
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> str:
        settings = self._folder / "server.properties"
        if not settings.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            settings.write_text(SETTINGS.format(port=self._port, controller_port=free_port(), folder=self._folder))
            cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
            self._run("kafka.tools.StorageTool", "format", "-t", cluster, "--standalone", "-c", str(settings))
        log = self._folder / "log"
        with log.open("ab") as opened:
            self._process = subprocess.Popen(
                [*JVM, "-cp", self._class_path, "kafka.Kafka", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=opened,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
                preexec_fn=_die_with_the_tests,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise KafkaMissing(f"the Kafka broker does not start; its log ends with: {log.read_text()[-1500:]}")
            with socket.socket() as probe:
                probe.settimeout(0.5)
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return self.bootstrap
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """A clean stop; SIGKILL when it takes too long."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def _run(self, *words: str) -> None:
        done = subprocess.run(
            [*JVM, "-cp", self._class_path, *words], capture_output=True, text=True, check=False, cwd=self._folder
        )
        if done.returncode != 0:
            raise KafkaMissing(f"{words[0]} failed: {(done.stderr or done.stdout)[-1500:]}")


def _die_with_the_tests() -> None:
    """A run that is killed cannot stop its broker: the kernel does (Linux), for a JVM that is left behind keeps costing CPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def class_path(folder: Path) -> str:
    """The broker's jars, resolved by Maven: from its local store where they are, else downloaded. Raises KafkaMissing.

    Kept in `folder`, for Maven takes longer than the broker; asked again where the POM is another or a jar is gone.
    """
    for program in ("java", "mvn"):
        if shutil.which(program) is None:
            raise KafkaMissing(f"{program} is not installed")
    output = folder / f"class_path-{hashlib.sha256(POM.read_bytes()).hexdigest()[:16]}"
    if output.exists() and all(Path(jar).exists() for jar in output.read_text().strip().split(os.pathsep)):
        return output.read_text().strip()
    resolved = output.with_suffix(".new")
    command = [
        *("mvn", "-B", "-q", "-f", str(POM), "dependency:build-classpath", f"-Dmdep.outputFile={resolved}"),
    ]
    said = ""
    for extra in (["-o"], []):
        try:
            done = subprocess.run(
                [*command, *extra], capture_output=True, text=True, timeout=RESOLVE_TIMEOUT_S, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired:
            raise KafkaMissing(f"Maven did not resolve the broker's jars within {RESOLVE_TIMEOUT_S} s") from None
        if done.returncode == 0 and resolved.exists():
            resolved.rename(output)
            return output.read_text().strip()
        said = (done.stdout + done.stderr).strip()
    raise KafkaMissing(f"Maven cannot resolve the broker's jars: {said[-400:]}")


@pytest.fixture(scope="session")
def kafka_broker(server_folder: Path, pytestconfig: pytest.Config) -> Iterator[KafkaBroker | None]:
    """The session's broker, which a test may kill and start again; None for a given one. Skips the test where there is none."""
    if os.environ.get("DUCAT_KAFKA_BOOTSTRAP"):
        yield None
        return
    cache = getattr(pytestconfig, "cache", None)
    kept = cache.mkdir("kafka") if cache is not None else server_folder
    try:
        broker = KafkaBroker(server_folder / "kafka", class_path(kept))
        broker.start()
    except KafkaMissing as error:
        pytest.skip(f"no Kafka broker: {error}")
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def kafka_bootstrap(kafka_broker: KafkaBroker | None) -> str:
    """Where the broker listens."""
    return kafka_broker.bootstrap if kafka_broker is not None else os.environ["DUCAT_KAFKA_BOOTSTRAP"]
