"""What the read model needs of a snapshot: the accounts' sums and the amounts of open holds, streamed from
its file.

The pieces are those of docs in wallet_core/engine/image.pyx. A record that changed while the image was taken
has its true value in the overlay, at the end of the file; where it is there twice, the earlier entry counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wallet_core.projection import Changes
from wallet_core.shard.port import ShardHostConfig, shard_folder
from wallet_core.snapshot import SnapshotDamaged, check, read_pieces, snapshot_files

__all__ = ["SnapshotBase", "newest_base"]

CHUNK_COUNT = 2_048
"""Accounts, or holds, in one step."""

_PIECE = struct.Struct("<IIQQQ")  # magic, kind, index, first, count
_ACCOUNT = struct.Struct("<16sqqqqq3sxHH")  # id, balance, held out, held in, two limits, currency, flags
_HOLD = struct.Struct("<16sQQqIIIHHQ")  # id, sequence of its HoldPlaced, deadline, amount, …
_OVERLAY = struct.Struct("<IIQ64s")  # kind, position, serial, the record before
_ACCOUNTS, _HOLDS, _OVERLAYS = 2, 4, 8
assert _ACCOUNT.size == _HOLD.size == 64


@dataclass(frozen=True, slots=True)
class SnapshotBase:
    """One snapshot that reads back."""

    shard: int
    sequence: int
    path: Path

    def steps(self) -> Iterator[Changes]:
        """The state in steps that add up, always the same ones. Blocks on the disk."""
        overlay: dict[tuple[int, int], bytes] = {}
        for piece in read_pieces(self.path):
            _, kind, _, _, count = _PIECE.unpack_from(piece)
            if kind == _OVERLAYS:
                for number in range(count):
                    of, position, _, before = _OVERLAY.unpack_from(piece, _PIECE.size + number * _OVERLAY.size)
                    if of in (_ACCOUNTS, _HOLDS):
                        overlay.setdefault((of, position), before)
        step = Changes(self.shard, 0, self.sequence)
        for piece in read_pieces(self.path):
            _, kind, _, first, count = _PIECE.unpack_from(piece)
            if kind not in (_ACCOUNTS, _HOLDS):
                continue
            for number in range(count):
                record = overlay.get((kind, first + number))
                at = _PIECE.size + number * 64
                if kind == _ACCOUNTS:
                    self._add_account(step, record or bytes(piece[at : at + 64]))
                else:
                    self._add_hold(step, record or bytes(piece[at : at + 64]))
                if len(step.opened) + len(step.placed) >= CHUNK_COUNT:
                    yield step
                    step = Changes(self.shard, 0, self.sequence)
        yield step

    def _add_account(self, step: Changes, record: bytes) -> None:
        account, balance, held_out, held_in, _, _, currency, _, _ = _ACCOUNT.unpack(record)
        step.opened[account] = currency.decode("ascii")
        step.balances[account] = [balance, held_out, held_in]

    def _add_hold(self, step: Changes, record: bytes) -> None:
        _, sequence, _, amount, _, _, _, _, _, _ = _HOLD.unpack(record)
        if sequence:
            step.placed.append((sequence, amount))


def newest_base(config: ShardHostConfig, shard: int, *, sequence: int | None = None) -> SnapshotBase | None:
    """The newest snapshot whose every checksum holds, or the one of `sequence`; None where there is none.
    Blocks on the disk."""
    for one in snapshot_files(shard_folder(config.data_dir, shard) / "snapshots"):
        if sequence is not None and one.sequence != sequence:
            continue
        try:
            check(one.path)
        except (SnapshotDamaged, OSError):
            continue
        return SnapshotBase(shard, one.sequence, one.path)
    return None
