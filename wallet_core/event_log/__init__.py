"""A shard's event log: the port, the frame format, and the file backend."""

from wallet_core.event_log._file import FileLog, FrameReader, crc32c, frame_hash
from wallet_core.event_log.file import (
    LogEnd,
    LogTail,
    delete_segments_below,
    durable_position,
    lock_folder,
    open_log,
    read_frames,
    segments,
    settle_end,
)
from wallet_core.event_log.format import FrameInvalid, pack_frame, unpack_frame
from wallet_core.event_log.port import (
    DiskNearlyFull,
    DurablePosition,
    EventLog,
    EventLogError,
    Frame,
    LogDamaged,
    LogGap,
    LogLocked,
    LogPoisoned,
)

__all__ = [
    "DiskNearlyFull",
    "DurablePosition",
    "EventLog",
    "EventLogError",
    "FileLog",
    "Frame",
    "FrameInvalid",
    "FrameReader",
    "LogDamaged",
    "LogEnd",
    "LogGap",
    "LogLocked",
    "LogPoisoned",
    "LogTail",
    "crc32c",
    "delete_segments_below",
    "durable_position",
    "frame_hash",
    "lock_folder",
    "open_log",
    "pack_frame",
    "read_frames",
    "segments",
    "settle_end",
    "unpack_frame",
]
