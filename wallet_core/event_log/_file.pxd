# The file backend at C level: one appending thread a log, no Python object a frame. Format: docs/event-log-format.md.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport off_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    FRAME_HEADER_BYTES = 96
    BLOCK_BYTES = 4096
    AHEAD_PIECES = 4
    AHEAD_THREADS = 2             # two reads under way: one leaves the disk idle between them

# what `append` is told of a frame; the log adds shard, epoch, marks, hashes and checksums
cdef struct FrameInfo:
    uint64_t first_sequence
    uint64_t timestamp_ns
    uint32_t count
    uint32_t body_length
    uint8_t digest[16]

# what `FrameReader.next` finds; pointers are into the reader's buffer and live until the next call
cdef struct FrameView:
    uint64_t first_sequence
    uint64_t timestamp_ns
    uint64_t durable_sequence
    uint32_t count
    uint32_t body_length
    uint32_t epoch
    uint32_t record_bytes
    uint64_t offset
    const uint8_t* header
    const uint8_t* body
    const uint8_t* digest
    uint8_t hash[16]

# a piece of a segment that a FrameReader reads ahead
cdef struct AheadPiece:
    uint8_t* raw          # HEADROOM_BYTES, then the bytes read
    uint64_t base         # their offset in the segment
    int64_t length        # < 0: reading failed
    uint64_t sound        # every frame that ends at or below matches its checksums
    int state             # AHEAD_*

cdef struct Fault:
    int64_t calls         # calls made so far
    int64_t fail_at       # the call that fails (0 = none)
    int error_number      # errno it fails with, 0 = succeed short
    int64_t short_bytes   # bytes a short write lets through

cdef class FileLog:
    cdef readonly object folder
    cdef readonly uint16_t shard
    cdef readonly uint32_t epoch
    cdef readonly uint32_t record_bytes
    cdef readonly uint64_t segment_bytes
    cdef readonly uint64_t reserve_bytes
    cdef readonly bint sync_enabled
    cdef readonly bint direct
    cdef readonly uint64_t sync_count
    cdef readonly uint64_t frame_count
    cdef readonly uint64_t written_bytes    # bytes handed to the disk, blocks rewritten counted again
    cdef readonly uint64_t appended_bytes   # bytes of frames
    cdef uint64_t _next_sequence            # of the next appended event
    cdef volatile uint64_t _durable_sequence
    cdef uint64_t _staged_sequence          # last sequence number in the staging buffer
    cdef uint8_t _previous_hash[16]
    cdef uint8_t _durable_hash[16]
    cdef char _folder[3840]
    cdef int _folder_fd
    cdef int _fd                            # current segment
    cdef int _mark_fd
    cdef int _lock_fd
    cdef uint64_t _mark_count
    cdef uint64_t _segment_first
    cdef uint64_t _segment_size             # bytes of the current segment file
    cdef uint64_t _tail                     # file offset behind the last appended frame
    cdef uint64_t _durable_tail
    cdef uint8_t* _stage                    # aligned; begins at file offset _stage_base (a block boundary)
    cdef uint64_t _stage_base
    cdef uint64_t _stage_length
    cdef uint64_t _stage_capacity
    cdef uint64_t _dirty                    # bytes in the stage that are not on disk yet
    cdef volatile int _poisoned
    cdef int _poison_call
    cdef int _poison_errno
    cdef Fault _faults[3]
    # the next segment, prepared ahead by its own thread
    cdef pthread_mutex_t _mutex
    cdef pthread_cond_t _changed
    cdef object _preparer
    cdef volatile int _prepared             # PREPARE_* state
    cdef int _prepared_fd
    cdef uint64_t _prepared_size
    cdef int _prepare_errno
    cdef uint64_t _prepare_wanted           # bytes the next segment needs
    cdef volatile int _prepare_emergency
    cdef volatile int _hurry                # the log waits for the segment: no more pauses
    cdef volatile int _closing
    cdef volatile int _sync_held            # tests: fdatasync waits while set
    cdef bint _closed
    cdef readonly object store              # where frames become durable (port.FrameStore); None: in these files
    cdef bint _stored                       # there is one
    cdef object _store_error                # what it failed with

    cdef int append_frame(self, const FrameInfo* info, const uint8_t* body) noexcept nogil
    cdef int sync_frames(self) noexcept nogil
    cdef bint writable(self) noexcept nogil
    cdef void retry_space(self) noexcept nogil
    cdef int _flush(self) noexcept nogil
    cdef int _store_frames(self) noexcept nogil
    cdef int _roll(self, uint64_t needed) noexcept nogil
    cdef int _reserve_stage(self, uint64_t length) noexcept nogil
    cdef int _poison(self, int call, int error_number) noexcept nogil
    cdef int _write_mark(self) noexcept nogil
    cdef int64_t _call_write(self, int fd, const uint8_t* data, uint64_t length, uint64_t offset) noexcept nogil
    cdef int64_t _write_part(self, const uint8_t* data, uint64_t length, uint64_t offset) noexcept nogil
    cdef int _call_sync(self, int fd) noexcept nogil
    cdef int _call_allocate(self, int fd, uint64_t length) noexcept nogil
    cdef void _want_next(self, uint64_t needed, int emergency) noexcept nogil
    cdef void _prepare_run(self) noexcept nogil
    cdef bint _ahead(self, uint64_t zeroed, uint64_t size) noexcept nogil
    cdef int _prepare_one(self, uint64_t size, int emergency, int* fd_out) noexcept nogil
    cdef void _segment_path(self, char* out, uint64_t first) noexcept nogil
    cdef void _release(self) noexcept

cdef class FrameReader:
    cdef readonly object folder
    cdef readonly uint16_t shard
    cdef readonly object damage              # reason, once next() has returned < 0
    cdef readonly uint64_t bytes_read
    cdef char _folder[3840]
    cdef int _fd
    cdef bint _direct
    cdef uint64_t _segment_first
    cdef uint64_t _segment_size
    cdef uint64_t _offset                    # of the next frame in the segment
    cdef uint64_t _next_sequence
    cdef uint64_t _from_sequence
    cdef uint64_t _max_mark
    cdef uint32_t _epoch
    cdef uint64_t _timestamp_ns
    cdef uint8_t _hash[16]                   # of the last frame read
    cdef bint _hash_known
    cdef uint8_t _from_hash[16]              # what the frame that ends at _from_sequence - 1 must hash to
    cdef bint _from_hash_given
    cdef uint8_t* _raw                       # HEADROOM_BYTES, then the bytes read
    cdef uint8_t* _buffer                    # where file offset _buffer_base is, inside _raw
    cdef uint64_t _capacity                  # of _raw behind the headroom
    cdef uint64_t _buffer_base
    cdef uint64_t _buffer_length
    cdef int _damage_code
    cdef int _io_errno
    cdef bint _live                          # reads the tail piece by piece
    cdef bint _small                         # small reads only, beside a writer
    # the pieces behind the buffered one, read and checked by threads of their own while this one is being replayed
    cdef pthread_mutex_t _mutex
    cdef pthread_cond_t _changed
    cdef object _ahead_threads
    cdef AheadPiece _ahead[AHEAD_PIECES]     # a ring: _ahead_count of them from _ahead_head on are asked for
    cdef int _ahead_head
    cdef int _ahead_count
    cdef int _ahead_done                     # of those, from the head on, read and checked
    cdef int _ahead_busy                     # threads at work
    cdef int _ahead_checking
    cdef int _ahead_on
    cdef int _ahead_stop
    cdef uint64_t _ahead_base                # of the piece to read next
    cdef uint64_t _sound                     # frames in the buffer that end at or below match their checksums
    # the frame that is being summed, see _sum
    cdef uint64_t _sum_sound                 # where it begins: all before match
    cdef uint64_t _sum_have                  # bytes of it seen so far
    cdef uint32_t _sum_crc
    cdef int _sum_lost
    cdef uint8_t _sum_header[FRAME_HEADER_BYTES]

    cdef int next(self, FrameView* out, uint64_t limit_sequence) noexcept nogil
    cdef void unread(self, const FrameView* view) noexcept nogil
    cdef int _open_segment(self, uint64_t first) noexcept nogil
    cdef const uint8_t* _need(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef int _rest_is_zero(self) noexcept nogil
    cdef void _ahead_run(self) noexcept nogil
    cdef void _ahead_read(self, AheadPiece* piece) noexcept nogil
    cdef void _ahead_check(self) noexcept nogil
    cdef void _ahead_begin(self) noexcept nogil
    cdef void _ahead_settle(self) noexcept nogil
    cdef bint _ahead_take(self, uint64_t base, uint64_t end) noexcept nogil
    cdef void _sum(self, const uint8_t* data, uint64_t length) noexcept nogil
