# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The file backend of the event log, natively. The format is drawn in docs/event-log-format.md; the theory in short:

- Frames are copied into an aligned staging buffer, and a sync writes whole 4 KiB blocks past the page cache (O_DIRECT,
  where the file system has it) and then calls fdatasync. The page cache costs 2.5 ms of CPU a MiB here; this costs 0.1.
- The last, partly filled block is kept in memory and written again with the next group: same bytes, then new ones.
- Segments are allocated *and filled with zeros* ahead of time by a thread of their own: overwriting written blocks needs
  no journal commit, so that a 4 KiB fdatasync takes 0.14 ms instead of 0.28, and cannot meet a full disk.
- After each sync, and before anything is acknowledged, the durable sequence number goes to the side file `durable.mark`
  (two slots in turn). Each frame header carries it as well. Damage at or below the mark is refused, never cut off.
- The first failed or short write, or failed sync, poisons the log: no retry, no further acknowledgement.
- With a store (port.FrameStore, such as Kafka) a group's frames are made durable there first, and only then written here,
  without a sync: these files are then what readers read, and never hold a frame that the store does not.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EINVAL, EIO, ENOENT, ENOMEM, ENOSPC, errno
from libc.stdio cimport snprintf
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy, memmove, memset, strlen
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, UINT64_MAX

include "_checksum.pxi"

import contextlib
import os
import threading

from wallet_core.event_log.port import DiskNearlyFull, LogPoisoned

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdlib.h>
    #include <unistd.h>
    #include <sys/stat.h>
    #include <sys/statvfs.h>
    #include <time.h>

    #ifndef O_DIRECT
    #define O_DIRECT 040000
    #endif

    static int ducat_open(const char *path, int flags, int direct) {
        return open(path, flags | O_CLOEXEC | (direct ? O_DIRECT : 0), 0644);
    }
    static int64_t ducat_file_size(int fd) { struct stat s; return fstat(fd, &s) ? -1 : (int64_t)s.st_size; }
    static int64_t ducat_free_bytes(const char *path) {
        struct statvfs s;
        return statvfs(path, &s) ? -1 : (int64_t)s.f_bavail * (int64_t)s.f_frsize;
    }
    static void *ducat_aligned(size_t bytes) { void *p = 0; return posix_memalign(&p, 4096, bytes) ? 0 : p; }
    static void ducat_pause_ms(long ms) { struct timespec t = {ms / 1000, (ms % 1000) * 1000000}; nanosleep(&t, 0); }
    static int ducat_all_zero(const uint8_t *p, size_t n) {
        while (n && ((uintptr_t)p & 7)) { if (*p++) return 0; n--; }
        for (; n >= 64; p += 64, n -= 64) {
            const uint64_t *w = (const uint64_t *)p;
            if (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) return 0;
        }
        while (n--) if (*p++) return 0;
        return 1;
    }
    """
    int ducat_open(const char* path, int flags, int direct) noexcept nogil
    int64_t ducat_file_size(int fd) noexcept nogil
    int64_t ducat_free_bytes(const char* path) noexcept nogil
    void* ducat_aligned(size_t bytes) noexcept nogil
    void ducat_pause_ms(long ms) noexcept nogil
    int ducat_all_zero(const uint8_t* data, size_t length) noexcept nogil
    int O_RDONLY, O_RDWR, O_CREAT, O_TRUNC, O_DIRECTORY

cdef extern from "<unistd.h>" nogil:
    ssize_t c_pwrite "pwrite" (int fd, const void* data, size_t length, off_t offset)
    ssize_t c_pread "pread" (int fd, void* data, size_t length, off_t offset)
    int c_fdatasync "fdatasync" (int fd)
    int c_fsync "fsync" (int fd)
    int c_close "close" (int fd)
    int c_unlink "unlink" (const char* path)

cdef extern from "<fcntl.h>" nogil:
    int posix_fallocate(int fd, off_t offset, off_t length)

cdef extern from "<stdio.h>" nogil:
    int c_rename "rename" (const char* old, const char* new)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_cond_init(pthread_cond_t*, void*)
    int pthread_cond_destroy(pthread_cond_t*)
    int pthread_cond_wait(pthread_cond_t*, pthread_mutex_t*)
    int pthread_cond_broadcast(pthread_cond_t*)

ducat_crc_setup()
if not ducat_little_endian():
    raise ImportError("the event log is little endian, this machine is not")

cdef enum:
    MAGIC = 0x46435544            # "DUCF"
    MARK_MAGIC = 0x4D435544       # "DUCM"
    VERSION = 1
    MARK_BYTES = 64
    MARK_STRIDE = 512             # one slot a sector
    READ_BYTES = 2097152
    ZERO_BYTES = 1048576
    HEADROOM_BYTES = 1048576      # in front of what is read: for the start of a frame that began in the piece before
    FRAME_BYTES_MAX = 1073741824

cdef enum:
    CALL_WRITE = 0
    CALL_SYNC = 1
    CALL_ALLOCATE = 2
    CALL_STORE = 3                # not one of the system calls: its error is an object

cdef enum:
    PREPARE_IDLE = 0
    PREPARE_WANTED = 1
    PREPARE_RUNNING = 2
    PREPARE_READY = 3
    PREPARE_NO_SPACE = 4
    PREPARE_FAILED = 5

cdef enum:
    PREPARE_PACED = 0             # in step with the log
    PREPARE_EMERGENCY = 1         # at once, and from the reserve if need be
    PREPARE_FIRST = 2             # at once

cdef enum:
    AHEAD_READING = 1
    AHEAD_READ = 2
    AHEAD_DONE = 3                # and checked

cdef enum:
    DAMAGE_NONE = 0
    DAMAGE_HEADER = 1
    DAMAGE_BODY = 2
    DAMAGE_CHAIN = 3
    DAMAGE_SEQUENCE = 4
    DAMAGE_SHARD = 5
    DAMAGE_EPOCH = 6
    DAMAGE_SHORT = 7
    DAMAGE_TRAILING = 8
    DAMAGE_VERSION = 9
    DAMAGE_READ = 10

_CALL_NAMES = ("write", "fdatasync", "fallocate")
_DAMAGE_REASONS = {
    DAMAGE_HEADER: "the frame header does not match its checksum",
    DAMAGE_BODY: "the frame body does not match its checksum",
    DAMAGE_CHAIN: "the frame does not continue the hash chain",
    DAMAGE_SEQUENCE: "the frame's sequence number is not the next one",
    DAMAGE_SHARD: "the frame belongs to another shard",
    DAMAGE_EPOCH: "the frame's epoch is older than the frame before",
    DAMAGE_SHORT: "the file ends inside a frame",
    DAMAGE_TRAILING: "there is data behind the last frame",
    DAMAGE_VERSION: "the frame has a format version this program cannot read",
    DAMAGE_READ: "reading failed",
}

cdef packed struct Header:
    uint32_t magic
    uint16_t version
    uint16_t header_bytes
    uint16_t shard
    uint16_t flags
    uint32_t epoch
    uint64_t first_sequence
    uint32_t count
    uint32_t body_length
    uint64_t timestamp_ns
    uint64_t durable_sequence
    uint8_t previous_hash[16]
    uint8_t digest[16]
    uint16_t record_bytes
    uint16_t reserved_16
    uint32_t reserved_32
    uint32_t body_crc
    uint32_t header_crc

cdef packed struct Mark:
    uint32_t magic
    uint16_t version
    uint16_t shard
    uint32_t epoch
    uint32_t reserved
    uint64_t durable_sequence
    uint64_t segment_first
    uint64_t end_offset
    uint8_t frame_hash[16]
    uint32_t crc
    uint32_t padding

assert sizeof(Header) == FRAME_HEADER_BYTES and sizeof(Mark) == MARK_BYTES


def crc32c(const uint8_t[::1] data, uint32_t value=0):
    """CRC-32C of `data`, continuing `value`; in hardware where there is SSE 4.2."""
    cdef size_t length = data.shape[0]
    if length == 0:
        return value
    with nogil:
        value = ducat_crc32c(value, &data[0], length)
    return value


def crc32c_software(const uint8_t[::1] data, uint32_t value=0):
    """The same by tables; what runs where there is no SSE 4.2."""
    cdef size_t length = data.shape[0]
    return value if length == 0 else ducat_crc32c_software(value, &data[0], length)


def frame_hash(const uint8_t[::1] header):
    """First 16 bytes of SHA-256 over a frame's 96 header bytes (which hold the body's checksum and the state's digest)."""
    cdef uint8_t out[16]
    if header.shape[0] != FRAME_HEADER_BYTES:
        raise ValueError(f"a frame header has {FRAME_HEADER_BYTES} bytes, not {header.shape[0]}")
    ducat_sha256_16(&header[0], FRAME_HEADER_BYTES, out)
    return out[:16]


cdef inline uint64_t _align_down(uint64_t value) noexcept nogil:
    return value & ~<uint64_t>(BLOCK_BYTES - 1)


cdef inline uint64_t _align_up(uint64_t value) noexcept nogil:
    return (value + BLOCK_BYTES - 1) & ~<uint64_t>(BLOCK_BYTES - 1)


include "_writer.pxi"
include "_reader.pxi"
