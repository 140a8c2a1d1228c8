"""Risk: a backup that was written is not there, not whole, or not the one that was written. Both stores, one suite; S3 against
moto's server, also one that fails now and then."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from kernel.errors import DucatError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from runtime.backup import FolderStore, S3Store, Store, open_store
from runtime.backup import store as store_module
from runtime.settings import Settings

SECRET = "a-secret-that-nobody-may-see"


class FlakyS3:
    """moto's S3, as a server on the loopback; `fail(request)` says which requests get a 503."""

    def __init__(self) -> None:
        moto = DomainDispatcherApplication(create_backend_app)
        self.fail: Callable[[dict[str, Any]], bool] = lambda request: False
        self.failed = 0

        def application(request: dict[str, Any], start: Any) -> Any:
            if self.fail(request):
                self.failed += 1
                request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
                start("503 Slow Down", [("content-type", "text/plain"), ("content-length", "0")])
                return [b""]
            return moto(request, start)

        self.server = make_server("127.0.0.1", 0, application, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def s3() -> Iterator[FlakyS3]:
    server = FlakyS3()
    yield server
    server.close()


def s3_settings(s3: FlakyS3, **changes: str) -> Settings:
    values = {
        "backup_s3_endpoint": s3.url,
        "backup_s3_region": "eu-central-1",
        "backup_s3_access_key": "key",
        "backup_s3_secret_key": SECRET,
    } | changes
    return Settings.load(overrides=values, environ={})


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: FlakyS3) -> Store:
    s3.fail, s3.failed = lambda request: False, 0
    if request.param == "folder":
        return open_store(Settings.load(environ={}), str(tmp_path / "backups"))
    bucket = f"bucket-{abs(hash(request.node.name))}"
    found = open_store(s3_settings(s3), f"s3://{bucket}/some/prefix")
    assert isinstance(found, S3Store)
    found._client.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    return found


def names(store: Store, prefix: str = "") -> list[str]:
    return [one.name for one in store.objects(prefix)]


def test_what_is_put_is_there(store: Store) -> None:
    large = bytes(range(256)) * 80 * 1024  # 20 MiB: two parts of an upload
    store.put("a/b/large", io.BytesIO(large))
    store.put("a/empty", io.BytesIO(b""))
    store.put("b/other", io.BytesIO(b"other"))
    with store.open("a/b/large") as source:
        pieces = []
        while piece := source.read(700_000):
            pieces.append(piece)
    assert b"".join(pieces) == large
    assert [(one.name, one.size) for one in store.objects("a/")] == [("a/b/large", len(large)), ("a/empty", 0)]
    assert names(store) == ["a/b/large", "a/empty", "b/other"]
    store.put("b/other", io.BytesIO(b"replaced"))
    with store.open("b/other") as source:
        assert source.read() == b"replaced"
    store.delete(["a/b/large", "a/empty", "a/never-was"])
    assert names(store) == ["b/other"]


def test_what_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match="nowhere/at-all"):
        store.open("nowhere/at-all")
    assert store.objects("nowhere/") == []


class Broken(io.RawIOBase):
    """Gives some bytes, then fails."""

    def __init__(self, good_bytes: int) -> None:
        self.left = good_bytes

    def read(self, size: int = -1) -> bytes:
        if self.left <= 0:
            raise Unavailable("the source is gone")
        given = min(self.left, size if size > 0 else self.left)
        self.left -= given
        return bytes(given)


@pytest.mark.parametrize("good_bytes", [0, 1000, 20 * 1024 * 1024])
def test_a_put_that_fails_leaves_nothing(store: Store, good_bytes: int) -> None:
    store.put("kept", io.BytesIO(b"before"))
    for name in ("kept", "new"):
        with pytest.raises(Unavailable, match="the source is gone"):
            store.put(name, Broken(good_bytes))  # type: ignore[arg-type]
    assert names(store) == ["kept"]
    with store.open("kept") as source:
        assert source.read() == b"before"


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    FolderStore(tmp_path / "backups").put("one/two/file", io.BytesIO(b"x"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "backups").rglob("*")}
    assert modes == {"one": 0o700, "two": 0o700, "file": 0o600}
    assert (tmp_path / "backups").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/passwd", ""])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="relative"):
        FolderStore(tmp_path / "backups").put(name, io.BytesIO(b"x"))


@pytest.mark.parametrize("method", ["PUT", "GET", "POST"])
def test_a_server_that_fails_now_and_then_is_asked_again(s3: FlakyS3, method: str) -> None:
    s3.fail = lambda request: False
    store = open_store(s3_settings(s3), f"s3://flaky-{method.lower()}")
    assert isinstance(store, S3Store)
    store._client.create_bucket(
        Bucket=f"flaky-{method.lower()}", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )
    data = bytes(17 * 1024 * 1024)
    seen: dict[str, int] = {}

    def fail(request: dict[str, Any]) -> bool:
        if request["REQUEST_METHOD"] != method:
            return False
        key = f"{request['PATH_INFO']}?{request['QUERY_STRING']}"
        seen[key] = seen.get(key, 0) + 1
        return seen[key] == 1

    s3.fail, s3.failed = fail, 0
    store.put("large", io.BytesIO(data))
    with store.open("large") as source:
        assert source.read() == data
    assert names(store) == ["large"]
    store.delete(["large"])
    s3.fail = lambda request: False
    assert s3.failed >= 1
    assert names(store) == []


def test_a_server_that_never_answers_well_is_an_error(s3: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "S3_TRIES_MAX", 2)
    store = open_store(s3_settings(s3), "s3://bucket")
    s3.fail = lambda request: True
    try:
        for call in (
            lambda: store.put("one", io.BytesIO(b"x")),
            lambda: store.open("one"),
            lambda: store.objects(),
            lambda: store.delete(["one"]),
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert SECRET not in str(caught.value)
            assert "s3://bucket" in str(caught.value)
    finally:
        s3.fail = lambda request: False


def test_a_download_that_breaks_off_goes_on(s3: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_settings(s3), "s3://breaks")
    assert isinstance(store, S3Store)
    store._client.create_bucket(Bucket="breaks", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    data = bytes(range(256)) * 4096
    store.put("large", io.BytesIO(data))
    monkeypatch.setattr(store_module.time, "sleep", lambda seconds: None)
    with store.open("large") as source:
        first = source.read(300_000)

        class Cut:
            def read(self, size: int | None = None) -> bytes:
                raise OSError("connection reset")

            def close(self) -> None: ...

        source._body = Cut()  # type: ignore[attr-defined]
        rest = []
        while piece := source.read(300_000):
            rest.append(piece)
    assert first + b"".join(rest) == data


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_sees_nothing(s3: FlakyS3, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    s3.fail = lambda request: False
    monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DucatError, match="no such bucket"):
        open_store(s3_settings(s3), "s3://no-such-bucket").objects()


def test_a_bucket_that_is_not_there_is_said(s3: FlakyS3) -> None:
    s3.fail = lambda request: False
    store = open_store(s3_settings(s3), "s3://no-such-bucket")
    with pytest.raises(DucatError, match="no such bucket"):
        store.objects()
    with pytest.raises(DucatError, match=r"(?i)no.?such.?bucket"):
        store.put("one", io.BytesIO(b"x"))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "no place for backups"),
        ("gs://bucket/x", "folder or to s3://"),
        ("s3:///x", "folder or to s3://"),
        ("ftp://host/x", "folder or to s3://"),
    ],
)
def test_a_place_that_is_none_is_refused(target: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        open_store(Settings.load(environ={}), target)


def test_a_wrong_endpoint_is_refused(s3: FlakyS3) -> None:
    with pytest.raises(InvalidArgument, match="s3://bucket"):
        open_store(s3_settings(s3, backup_s3_endpoint="not a url"), "s3://bucket")


def test_without_boto3_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'ducat-payments\[s3\]'"):
        open_store(Settings.load(environ={}), "s3://bucket")


def test_the_secret_is_masked() -> None:
    settings = Settings.load(overrides={"backup_s3_secret_key": SECRET}, environ={})
    assert SECRET not in str(settings.describe())
    assert SECRET not in repr(settings)
