"""Embedded servers: data survives a kill, what a killed run left is cleaned up, nothing is opened to strangers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from runtime.embedded import EmbeddedPostgres, EmbeddedValkey, ServerFailed


async def query(dsn: str, statement: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_postgres_keeps_what_was_committed_through_sigkill(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "pg")
    dsn = server.start()
    try:
        assert [await query(dsn, f"SHOW {name}") for name in ("fsync", "synchronous_commit", "full_page_writes")] == [
            "on"
        ] * 3
        await query(dsn, "CREATE TABLE kept AS SELECT 7 AS value")
        assert await query(server.tcp_dsn, "SELECT value FROM kept") == 7
        killed_pid = server.pid
        server.kill()
        assert server.pid is None
        assert server.start() == dsn, "the address must survive a restart"
        assert server.pid != killed_pid
        assert await query(dsn, "SELECT value FROM kept") == 7
        # A second object on the same folder, as after SIGKILL of the supervisor: the orphan is stopped first.
        second = EmbeddedPostgres(tmp_path / "pg")
        assert second.start() == dsn
        assert server.pid is None
        assert await query(dsn, "SELECT value FROM kept") == 7
        second.stop()
        assert second.pid is None
    finally:
        server.stop()


async def test_postgres_takes_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "pg").mkdir(mode=0o755)  # as older versions left them
    (tmp_path / "pg" / "log").touch(mode=0o644)
    server = EmbeddedPostgres(tmp_path / "pg", is_durable=False)
    server.start()
    try:
        without_password = server.tcp_dsn.replace(server.tcp_dsn.split(":")[2].split("@")[0], "wrong")
        with pytest.raises(asyncpg.InvalidPasswordError):
            await query(without_password, "SELECT 1")
        for folder in (server.data, tmp_path / "pg" / "socket"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "pg").stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
        for file in ("password", "log"):
            assert stat.S_IMODE((tmp_path / "pg" / file).stat().st_mode) == 0o600
        if os.geteuid() == 0:
            assert server.data.stat().st_uid != 0
            assert tmp_path.stat().st_uid == 0  # noqa: ASYNC240
    finally:
        server.stop()


async def test_postgres_starts_below_a_folder_that_only_root_can_enter(tmp_path: Path) -> None:
    private = tmp_path / "home"
    private.mkdir(mode=0o700)
    server = EmbeddedPostgres(private / "data" / "pg", is_durable=False)
    dsn = server.start()
    try:
        assert await query(dsn, "SELECT 1") == 1
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    finally:
        server.stop()


async def test_postgres_with_a_long_path_keeps_its_socket_short(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / ("d" * 60) / ("e" * 60) / "pg", is_durable=False)
    dsn = server.start()
    try:
        assert await query(dsn, "SELECT 1") == 1
    finally:
        server.stop()


async def test_postgres_moves_when_its_port_is_taken_while_it_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Risk: a port is picked, initdb takes its seconds, and somebody else listens there by then."""
    server = EmbeddedPostgres(tmp_path / "pg", is_durable=False)
    with socket.socket() as taken:
        initialize = server._initialize

        def initialize_and_lose_the_port(*arguments: Any) -> None:
            initialize(*arguments)
            taken.bind(("127.0.0.1", server._port))
            taken.listen()

        monkeypatch.setattr(server, "_initialize", initialize_and_lose_the_port)
        dsn = server.start()
        try:
            assert await query(dsn, "SELECT 1") == 1
            assert await query(server.tcp_dsn, "SELECT 1") == 1
            assert server._port != taken.getsockname()[1]
            assert (tmp_path / "pg" / "port").read_text() == str(server._port)
        finally:
            server.stop()


async def test_initdb_that_was_killed_half_way_starts_again(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "pg", is_durable=False)
    server.data.mkdir(parents=True)
    (server.data / "PG_VERSION").write_text("18")
    (tmp_path / "pg" / "initializing").touch()
    dsn = server.start()
    try:
        assert await query(dsn, "SELECT 1") == 1
        assert not (tmp_path / "pg" / "initializing").exists()
    finally:
        server.stop()


def test_valkey_keeps_what_was_acknowledged_through_sigkill(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "vk")
    url = server.start()
    try:
        with redis.Redis.from_url(url) as client:
            assert client.config_get("appendfsync")["appendfsync"] == "always"
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            client.set("kept", "7")
        server.kill()
        assert server.start() == url
        second = EmbeddedValkey(tmp_path / "vk")
        assert second.start() == url
        assert server.pid is None
        with redis.Redis.from_url(second.tcp_url) as client:
            assert client.get("kept") == b"7"
        with (
            pytest.raises(redis.AuthenticationError),
            redis.Redis(port=int(second.tcp_url.rpartition(":")[2])) as client,
        ):
            client.ping()
        assert stat.S_IMODE((tmp_path / "vk" / "password").stat().st_mode) == 0o600
        second.stop()
        assert second.pid is None
    finally:
        server.stop()


def test_valkey_password_is_in_no_argument(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / "vk")
    server.start()
    try:
        password = (tmp_path / "vk" / "password").read_text()
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    finally:
        server.stop()


def test_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerFailed, match="is taken"):
            EmbeddedValkey(tmp_path / "vk", port=taken.getsockname()[1]).start()


def test_a_valkey_that_ends_at_once_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Risk: the configuration is written to a child that is gone, and a broken pipe is all that anybody learns."""
    binary = tmp_path / "valkey"
    binary.write_text("#!/bin/sh\necho no such library\nexit 3\n")
    binary.chmod(0o755)
    monkeypatch.setattr("runtime.embedded.valkey.get_binary_path", lambda: binary)
    monkeypatch.setattr(EmbeddedValkey, "_configuration", lambda _self: "#" * 1_000_000)  # more than a pipe holds
    with pytest.raises(ServerFailed, match=r"(?s)ended with 3.*no such library"):
        EmbeddedValkey(tmp_path / "vk").start()


def test_a_server_without_a_thread_is_a_server_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Risk: what watches the servers knows ServerFailed and OSError, and ends at anything else."""

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as during:
        during.setattr(threading.Thread, "start", start)
        with pytest.raises(ServerFailed, match="can't start new thread"):
            EmbeddedValkey(tmp_path / "vk").start()


@pytest.mark.parametrize("kind", [EmbeddedValkey, EmbeddedPostgres])
def test_two_servers_never_share_a_folder(
    kind: type[EmbeddedPostgres | EmbeddedValkey], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Risk: where a server that was left behind cannot be found, a second one writes into its files."""
    monkeypatch.setattr("runtime.embedded._server._is_ours", lambda *_: False)  # as without /proc
    monkeypatch.setattr("runtime.embedded._server.LOCK_WAIT_S", 0.1)
    first, second = kind(tmp_path), kind(tmp_path)
    first.start()
    try:
        with pytest.raises(ServerFailed, match=f"still uses {tmp_path}; stop it"):
            second.start()
        assert second.pid is None
    finally:
        first.stop()
    second.start()
    second.stop()


PARENT = """
import signal, sys, threading
from pathlib import Path
import redis
from runtime.embedded import EmbeddedPostgres, EmbeddedValkey

home = Path(sys.argv[1])
servers = [EmbeddedPostgres(home / "pg"), EmbeddedValkey(home / "vk")]
for server in servers:
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
redis.Redis.from_url(servers[1].url).set("kept", "7")
print(*(server.pid for server in servers), flush=True)
signal.pause()
"""
"""Starts both in threads that end: what the kernel calls the parent of a child is a thread."""


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_servers_stop_cleanly_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Risk: each killed run leaves a PostgreSQL and a Valkey behind, until the machine is full of them."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    servers = EmbeddedPostgres(tmp_path / "pg"), EmbeddedValkey(tmp_path / "vk")
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.6)  # a Valkey that was told to end takes some tenths of a second
        assert all(map(is_running, pids)), "the servers must outlive the threads that started them"
        assert servers[1].running_url(), "and answer"
    finally:
        parent.kill()
        parent.wait()
    try:
        deadline = time.monotonic() + 20
        while any(map(is_running, pids)):
            assert time.monotonic() < deadline, f"left behind: {[pid for pid in pids if is_running(pid)]}"
            time.sleep(0.05)
        dsn, url = (server.start() for server in servers)
        assert asyncio.run(query(dsn, "SELECT 1")) == 1
        with redis.Redis.from_url(url) as client:
            assert client.get("kept") == b"7"
        assert "not properly shut down" not in servers[0].log_file.read_text(), "a stop without a recovery afterwards"
    finally:
        for server in servers:
            server.stop()


def _start_both_as_nobody(home: Path) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for server in (EmbeddedPostgres(home / "pg", is_durable=False), EmbeddedValkey(home / "vk")):
        server.start()
        assert os.stat(server.data).st_uid == 65534
        server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_both_start_for_an_ordinary_user(server_folder: Path) -> None:
    """Forked, not executed: an ordinary user may not be able to run this very interpreter."""
    home = server_folder / "ordinary"
    home.mkdir()
    os.chown(home, 65534, 65534)
    child = multiprocessing.get_context("fork").Process(target=_start_both_as_nobody, args=(home,))
    child.start()
    child.join(60)
    assert child.exitcode == 0, (home / "pg" / "log").read_text() if (home / "pg" / "log").exists() else "no log"
