"""Files into a store and back: compressed, in parts, each with its size and SHA-256, with memory that does not grow with the file."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from runtime.backup.manifest import BackupDamaged, Part
from runtime.backup.store import Store

__all__ = ["read_part", "store_parts", "verify_part"]

PART_BYTES_MAX = 1024 * 1024 * 1024
"""Of a file in one object; a larger file has several."""
CHUNK_BYTES = 1024 * 1024
LEVEL = 1
"""Of gzip: logs and tables shrink to about a third, and more effort hardly helps."""
_GZIP = 16 + zlib.MAX_WBITS


class _Compressed:
    """Reads at most `limit` bytes of `source`, gives them compressed, and knows afterwards what it gave."""

    def __init__(self, source: Callable[[int], bytes], limit: int) -> None:
        self._source, self._left = source, limit
        self._gzip = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP)
        self._hash = hashlib.sha256()
        self._ready = bytearray()
        self._ended = False
        self.bytes = self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def is_full(self) -> bool:
        """Whether it ended for the limit and not for the source."""
        return self._left == 0

    def read(self, size: int = -1) -> bytes:
        while not self._ended and (size < 0 or len(self._ready) < size):
            data = self._source(min(CHUNK_BYTES, self._left)) if self._left else b""
            self._left -= len(data)
            self.bytes += len(data)
            if data:
                self._ready += self._gzip.compress(data)
            else:
                self._ready += self._gzip.flush()
                self._ended = True
        given = bytes(self._ready if size < 0 else self._ready[:size])
        del self._ready[: len(given)]
        self._hash.update(given)
        self.size += len(given)
        return given


def store_parts(store: Store, name: str, source: Callable[[int], bytes], limit: int | None = None) -> list[Part]:
    """Stores what `source(size)` reads, at most `limit` bytes, as the objects `<name>.0.gz`, `<name>.1.gz` …; at least one."""
    parts: list[Part] = []
    left = limit
    while True:
        reader = _Compressed(source, PART_BYTES_MAX if left is None else min(left, PART_BYTES_MAX))
        object_name = f"{name}.{len(parts)}.gz"
        store.put(object_name, cast("BinaryIO", reader))
        parts.append(Part(object_name, reader.bytes, reader.size, reader.sha256))
        if left is not None:
            left -= reader.bytes
        if not reader.is_full or left == 0:
            return parts


def read_part(store: Store, part: Part) -> Iterator[bytes]:
    """The bytes of the file that a part holds. Raises BackupDamaged, at the latest after the last of them, and NotFound."""
    where = f"{store.place}/{part.object}"
    gzip = zlib.decompressobj(_GZIP)
    digest = hashlib.sha256()
    size = given = 0
    source: Any = store.open(part.object)
    try:
        while data := source.read(CHUNK_BYTES):
            size += len(data)
            digest.update(data)
            while not gzip.eof:
                piece = gzip.decompress(data, CHUNK_BYTES)
                data = gzip.unconsumed_tail
                given += len(piece)
                if piece:
                    yield piece
                if not data and len(piece) < CHUNK_BYTES:
                    break
    except zlib.error as error:
        raise BackupDamaged(f"{where}: cannot be decompressed ({error})") from error
    finally:
        source.close()
    if size != part.size:
        raise BackupDamaged(f"{where}: {size} bytes are there, {part.size} were written")
    if digest.hexdigest() != part.sha256:
        raise BackupDamaged(f"{where}: its SHA-256 is not the one of what was written")
    if not gzip.eof or given != part.bytes:
        raise BackupDamaged(f"{where}: holds {given} bytes of its file, not {part.bytes}")


def verify_part(store: Store, part: Part) -> None:
    """Reads a part to its end. Raises BackupDamaged, NotFound."""
    for _ in read_part(store, part):
        pass
