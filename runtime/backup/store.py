"""Where backups lie: objects by name, in a folder or in an S3-compatible bucket.

An object is written once, whole or not at all, and durable when `put` returns; only `manifest.json` is ever replaced.
Names are relative, with `/` between their parts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

from kernel.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from runtime.private_folder import close_folder, sync_folder
from runtime.settings import Settings

__all__ = ["FolderStore", "ObjectInfo", "S3Store", "Store", "open_store"]

CHUNK_BYTES = 1024 * 1024
S3_PART_BYTES = 16 * 1024 * 1024
"""One part of a multipart upload. S3 takes 10,000 of them, far more than one object of ours has."""
S3_UPLOADS_AT_ONCE = 2
S3_TRIES_MAX = 6
S3_TIMEOUT_S = 60
S3_DELETE_MAX = 1000
"""Keys in one request to delete; the protocol's limit."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object. `time`: when it was written, unix seconds by the store's clock."""

    name: str
    size: int
    time: float


class Store(Protocol):
    """A place for backups. Every method may raise Unavailable where the place cannot be reached."""

    @property
    def place(self) -> str:
        """The place for people."""

    def put(self, name: str, source: BinaryIO) -> None:
        """Store what `source` reads to its end."""

    def open(self, name: str) -> BinaryIO:
        """A stream to read once. Raises NotFound."""

    def objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose name begins with `prefix`, by name."""

    def delete(self, names: list[str]) -> None:
        """Remove objects; a name that is not there is no error."""


def open_store(settings: Settings, target: str = "") -> Store:
    """The store that `target` (a folder, or s3://bucket/prefix) names, else the settings' `backup_target`. Raises InvalidArgument,
    FailedPrecondition."""
    place = target or settings.backup_target
    if not place:
        raise InvalidArgument(
            "no place for backups: give a folder or s3://bucket/prefix, or set backup_target in the settings"
        )
    if "://" not in place:
        return FolderStore(Path(place))
    parts = urlsplit(place)
    if parts.scheme == "file" and not parts.netloc:
        return FolderStore(Path(parts.path))
    if parts.scheme != "s3" or not parts.netloc:
        raise InvalidArgument(f"backups go to a folder or to s3://bucket/prefix, not to {place!r}")
    return S3Store(parts.netloc, parts.path.strip("/"), settings)


class FolderStore:
    """A folder, mode 700, files 600: a mounted disk of another machine, best."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    @property
    def place(self) -> str:
        return str(self._folder)

    def put(self, name: str, source: BinaryIO) -> None:
        path = self._path(name)
        made = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            self._make_folder(path.parent)
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
                made.rename(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    made.unlink()
                raise
            sync_folder(path.parent)
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror or error}") from error

    def open(self, name: str) -> BinaryIO:
        try:
            return open(self._path(name), "rb")
        except FileNotFoundError:
            raise NotFound(f"{self._path(name)}: no such file; the backup is not whole") from None
        except OSError as error:
            raise Unavailable(f"{self._path(name)} cannot be read: {error.strerror or error}") from error

    def objects(self, prefix: str = "") -> list[ObjectInfo]:
        if not self._folder.is_dir():
            return []
        found = []
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            if name.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if path.is_file():
                        status = path.stat()
                        found.append(ObjectInfo(name, status.st_size, status.st_mtime))
        return sorted(found, key=lambda one: one.name)

    def delete(self, names: list[str]) -> None:
        folders = set()
        for name in names:
            path = self._path(name)
            path.unlink(missing_ok=True)
            folders |= {folder for folder in path.parents if self._folder in folder.parents}
        for folder in sorted(folders, key=lambda one: -len(one.parts)):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def _path(self, name: str) -> Path:
        path = self._folder / name
        if not name or ".." in path.parts or not path.is_relative_to(self._folder):
            raise InvalidArgument(f"an object's name is relative and without .., not {name!r}")
        return path

    def _make_folder(self, folder: Path) -> None:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(missing):
            close_folder(one)
            sync_folder(one.parent)


class S3Store:
    """A bucket of anything that speaks S3, by way of boto3 (`pip install ducat-payments[s3]`), which signs, splits large objects, tries
    again and follows the usual chain for credentials where the settings have none."""

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        try:
            import boto3
            import botocore.config
            import botocore.exceptions
            from boto3.exceptions import S3UploadFailedError
            from boto3.s3.transfer import TransferConfig
        except ImportError as error:
            raise FailedPrecondition(
                "s3:// needs boto3, which is not installed; fix: pip install 'ducat-payments[s3]'"
            ) from error
        self._errors: tuple[type[Exception], ...] = (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            S3UploadFailedError,
        )
        self._transfer = TransferConfig(
            multipart_threshold=S3_PART_BYTES,
            multipart_chunksize=S3_PART_BYTES,
            max_concurrency=S3_UPLOADS_AT_ONCE,
            num_download_attempts=S3_TRIES_MAX,
        )
        secret = settings.backup_s3_secret_key.get_secret_value()
        endpoint = settings.backup_s3_endpoint
        try:
            self._client: Any = boto3.session.Session().client(
                "s3",
                endpoint_url=endpoint or None,
                region_name=settings.backup_s3_region or None,
                aws_access_key_id=settings.backup_s3_access_key or None,
                aws_secret_access_key=secret or None,
                config=botocore.config.Config(
                    retries={"total_max_attempts": S3_TRIES_MAX, "mode": "standard"},
                    proxies={},  # those of the environment are not for us
                    connect_timeout=S3_TIMEOUT_S,
                    read_timeout=S3_TIMEOUT_S,
                    # a server of one's own has one name, not one a bucket, and not every one knows the newer checksums
                    s3={"addressing_style": "path"} if endpoint else None,
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (*self._errors, ValueError) as error:
            raise InvalidArgument(f"s3://{bucket}: {error}") from error

    @property
    def place(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(self, name: str, source: BinaryIO) -> None:
        with self._mapped(name):
            self._client.upload_fileobj(_Plain(source), self._bucket, self._prefix + name, Config=self._transfer)

    def open(self, name: str) -> BinaryIO:
        with self._mapped(name):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
        return cast("BinaryIO", _Body(self, name, answer["Body"], answer["ContentLength"]))

    def objects(self, prefix: str = "") -> list[ObjectInfo]:
        found = []
        with self._mapped(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for one in page.get("Contents", ()):
                    name = one["Key"].removeprefix(self._prefix)
                    found.append(ObjectInfo(name, one["Size"], one["LastModified"].timestamp()))
        return sorted(found, key=lambda one: one.name)

    def delete(self, names: list[str]) -> None:
        for at in range(0, len(names), S3_DELETE_MAX):
            keys = [{"Key": self._prefix + name} for name in names[at : at + S3_DELETE_MAX]]
            with self._mapped(names[at]):
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
            for error in answer.get("Errors", ()):
                raise Unavailable(f"{self.place}/{error.get('Key')} cannot be removed: {error.get('Code')}")

    def open_from(self, name: str, offset: int) -> Any:
        """The object's bytes from `offset` on."""
        with self._mapped(name):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name, Range=f"bytes={offset}-")[
                "Body"
            ]

    @contextlib.contextmanager
    def _mapped(self, name: str) -> Iterator[None]:
        """boto3's errors as ours. They name bucket, key and what the server said, never a credential."""
        try:
            yield
        except self._errors as error:
            where = f"{self.place}/{name}" if name else self.place
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404"):
                raise NotFound(f"{where}: no such object; the backup is not whole") from error
            if code == "NoSuchBucket":
                raise NotFound(f"{self.place}: no such bucket; make it first") from error
            if code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403"):
                raise FailedPrecondition(
                    f"{where}: refused ({code}); check backup_s3_access_key and backup_s3_secret_key, and what they may do"
                ) from error
            raise Unavailable(f"{where}: {error}") from error


class _Plain:
    """Hides everything but `read`, so that boto3 streams and does not look for a length."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def read(self, size: int = -1) -> bytes:
        return self._source.read(size)


class _Body:
    """A download that goes on where its connection was lost."""

    def __init__(self, store: S3Store, name: str, body: Any, length: int) -> None:
        self._store, self._name, self._body, self._length = store, name, body, length
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        for number in range(1, S3_TRIES_MAX + 1):
            try:
                data: bytes = self._body.read(None if size < 0 else size)
            except Exception as error:  # urllib3's and botocore's, which share no root
                if number == S3_TRIES_MAX:
                    raise Unavailable(f"{self._store.place}/{self._name}: the download broke off: {error}") from error
                time.sleep(0.2 * 2**number)
                self._body = self._store.open_from(self._name, self._at)
                continue
            self._at += len(data)
            return data
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._body.close()

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
