# The appending side. Included by _file.pyx.

cdef class FileLog:
    """One shard's segments, open for appending at a known end. Made by `wallet_core.event_log.file.open_log`, which has
    read the log, settled the tail and taken the lock. `append` and `sync` belong to one thread at a time."""

    def __cinit__(self):
        self._fd = self._mark_fd = self._folder_fd = self._prepared_fd = self._lock_fd = -1
        self._closed = True
        pthread_mutex_init(&self._mutex, NULL)
        pthread_cond_init(&self._changed, NULL)

    def __init__(self, folder, *, int shard, uint32_t epoch, uint32_t record_bytes, uint64_t next_sequence,
                 bytes previous_hash, uint64_t segment_first, uint64_t end_offset, int lock_fd=-1,
                 uint64_t segment_bytes=268435456, uint64_t reserve_bytes=268435456, bint sync=True, bint direct=True,
                 store=None):
        cdef bytes path = os.fsencode(folder)
        cdef const uint8_t* hash_bytes = previous_hash
        cdef int64_t size
        if len(path) > 3700:
            raise ValueError(f"the folder name is longer than 3700 bytes: {folder}")
        if segment_bytes < 65536 or segment_bytes % BLOCK_BYTES:
            raise ValueError(f"segment_bytes must be a multiple of {BLOCK_BYTES} and at least 65536, not {segment_bytes}")
        if len(previous_hash) != 16:
            raise ValueError("previous_hash has 16 bytes")
        memcpy(self._folder, <const char*>path, len(path) + 1)
        self.folder, self.shard, self.epoch, self.record_bytes = os.fspath(folder), shard, epoch, record_bytes
        self.segment_bytes, self.reserve_bytes, self.sync_enabled, self.direct = segment_bytes, reserve_bytes, sync, direct
        self._next_sequence = next_sequence
        self._durable_sequence = self._staged_sequence = next_sequence - 1
        memcpy(self._previous_hash, hash_bytes, 16)
        memcpy(self._durable_hash, hash_bytes, 16)
        self._lock_fd = lock_fd
        self._closed = False
        self.store, self._stored = store, store is not None
        self._folder_fd = ducat_open(self._folder, O_RDONLY | O_DIRECTORY, 0)
        if self._folder_fd < 0:
            raise OSError(errno, os.strerror(errno), folder)
        for name in ("next.building", "next.ready"):       # of a life before: their room is needed
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, name))
        self._open_mark()
        if segment_first:
            self._continue_segment(segment_first, end_offset)
        elif self._roll_first() < 0:
            raise self.error()
        if self._write_mark() < 0 or c_fsync(self._mark_fd) != 0:
            raise OSError(errno, os.strerror(errno), os.path.join(self.folder, "durable.mark"))
        self._preparer = threading.Thread(target=self._prepare_thread, name=f"segment-{shard}", daemon=True)
        self._preparer.start()

    def _open_mark(self):
        cdef char path[4096]
        cdef uint8_t slots[2 * MARK_STRIDE]
        snprintf(path, 4096, b"%s/durable.mark", self._folder)
        self._mark_fd = ducat_open(path, O_RDWR | O_CREAT, 0)
        if self._mark_fd < 0:
            raise OSError(errno, os.strerror(errno), os.path.join(self.folder, "durable.mark"))
        if ducat_file_size(self._mark_fd) < 2 * MARK_STRIDE:
            memset(slots, 0, sizeof(slots))
            if c_pwrite(self._mark_fd, slots, sizeof(slots), 0) != sizeof(slots):
                raise OSError(errno or ENOSPC, "the durable mark could not be written", self.folder)
            c_fsync(self._mark_fd)
            c_fsync(self._folder_fd)

    def _continue_segment(self, uint64_t segment_first, uint64_t end_offset):
        """Take up an existing segment behind its last frame."""
        cdef char path[4096]
        cdef int64_t size
        cdef uint64_t base = _align_down(end_offset)
        self._segment_path(path, segment_first)
        self._fd = ducat_open(path, O_RDWR, self.direct)
        if self._fd < 0 and errno == EINVAL:
            self.direct = False
            self._fd = ducat_open(path, O_RDWR, 0)
        if self._fd < 0:
            raise OSError(errno, os.strerror(errno), os.fsdecode(<bytes>path))
        size = ducat_file_size(self._fd)
        if size < <int64_t>self.segment_bytes and size < <int64_t>_align_up(end_offset) + BLOCK_BYTES:
            # somebody cut the zeros off; room for at least one block is needed to go on here
            if posix_fallocate(self._fd, 0, self.segment_bytes) != 0:
                raise DiskNearlyFull(self.folder, ducat_free_bytes(self._folder), self.reserve_bytes)
            c_fsync(self._fd)
            size = ducat_file_size(self._fd)
        self._segment_first, self._segment_size = segment_first, _align_down(size)
        self._tail = self._durable_tail = end_offset
        if self._reserve_stage(1048576) < 0:
            raise MemoryError()
        self._stage_base, self._stage_length = base, end_offset - base
        if self._stage_length:
            memset(self._stage, 0, BLOCK_BYTES)
            if c_pread(self._fd, self._stage, BLOCK_BYTES, base) < <int64_t>self._stage_length:
                raise OSError(errno or EIO, "the last block could not be read back", os.fsdecode(<bytes>path))

    cdef void _segment_path(self, char* out, uint64_t first) noexcept nogil:
        snprintf(out, 4096, b"%s/%020llu.seg", self._folder, <unsigned long long>first)

    def _roll_first(self):
        """The first segment of a folder; nothing to sync before it."""
        cdef int fd = -1, code
        with nogil:
            code = self._reserve_stage(1048576)
            if code == 0:
                code = self._prepare_one(self.segment_bytes, PREPARE_FIRST, &fd)
        if code == ENOSPC:
            raise DiskNearlyFull(self.folder, ducat_free_bytes(self._folder), self.reserve_bytes)
        if code != 0:
            raise OSError(code if code > 0 else ENOMEM, os.strerror(code if code > 0 else ENOMEM), self.folder)
        self._prepared_fd, self._prepared_size, self._prepared = fd, self.segment_bytes, PREPARE_READY
        return self._roll(0)

    # ---- the appending thread ----

    cdef int append_frame(self, const FrameInfo* info, const uint8_t* body) noexcept nogil:
        """Stage one frame. 0, or -1: poisoned. `info.first_sequence` must be the next sequence number (else -2)."""
        cdef Header* header
        cdef uint64_t length = FRAME_HEADER_BYTES + ((<uint64_t>info.body_length + 7) & ~<uint64_t>7)
        cdef uint8_t* at
        if self._poisoned:
            return -1
        if info.first_sequence != self._next_sequence or info.count == 0 \
                or info.body_length != info.count * self.record_bytes:
            return -2
        if self._tail + length > self._segment_size:
            if self._roll(length) < 0:
                return -1
        if self._reserve_stage(_align_up(self._stage_length + length)) < 0:
            return self._poison(CALL_WRITE, ENOMEM)
        at = self._stage + self._stage_length
        header = <Header*>at
        memset(header, 0, FRAME_HEADER_BYTES)
        header.magic, header.version, header.header_bytes = MAGIC, VERSION, FRAME_HEADER_BYTES
        header.shard, header.epoch = self.shard, self.epoch
        header.first_sequence, header.count, header.body_length = info.first_sequence, info.count, info.body_length
        header.timestamp_ns, header.durable_sequence = info.timestamp_ns, self._durable_sequence
        memcpy(header.previous_hash, self._previous_hash, 16)
        memcpy(header.digest, info.digest, 16)
        header.record_bytes = <uint16_t>self.record_bytes
        memcpy(at + FRAME_HEADER_BYTES, body, info.body_length)
        memset(at + FRAME_HEADER_BYTES + info.body_length, 0, length - FRAME_HEADER_BYTES - info.body_length)
        header.body_crc = ducat_crc32c(0, at + FRAME_HEADER_BYTES, info.body_length)
        header.header_crc = ducat_crc32c(0, at, FRAME_HEADER_BYTES - 4)
        ducat_sha256_16(at, FRAME_HEADER_BYTES, self._previous_hash)
        self._stage_length += length
        self._dirty += length
        self._tail += length
        self._next_sequence += info.count
        self._staged_sequence = self._next_sequence - 1
        self.frame_count += 1
        self.appended_bytes += length
        return 0

    cdef int sync_frames(self) noexcept nogil:
        """Write what is staged, fdatasync, move the durable mark. 0, or -1: poisoned."""
        if self._poisoned:
            return -1
        if self._dirty == 0 and self._durable_sequence == self._staged_sequence:
            return 0
        if self._flush() < 0:
            return -1
        if self._tail > self._segment_size - self._segment_size // 4 * 3 and self._prepared == PREPARE_IDLE:
            self._want_next(0, PREPARE_PACED)
        return 0

    cdef int _flush(self) noexcept nogil:
        cdef uint64_t length = _align_up(self._stage_length), kept
        if self._dirty:
            if self._stored and self._store_frames() < 0:
                return -1
            memset(self._stage + self._stage_length, 0, length - self._stage_length)
            if self._call_write(self._fd, self._stage, length, self._stage_base) < 0:
                return -1
            kept = self._stage_length & (BLOCK_BYTES - 1)
            if kept and self._stage_length > BLOCK_BYTES:
                memmove(self._stage, self._stage + (self._stage_length - kept), kept)
            self._stage_base += self._stage_length - kept
            self._stage_length = kept
            self._dirty = 0
        if self.sync_enabled:
            while self._sync_held and not self._closing:
                ducat_pause_ms(1)
            if self._call_sync(self._fd) < 0:
                return -1
        self._durable_tail = self._tail
        memcpy(self._durable_hash, self._previous_hash, 16)
        self._durable_sequence = self._staged_sequence
        self.sync_count += 1
        return self._write_mark()

    cdef int _store_frames(self) noexcept nogil:
        """Give the frames since the last flush to the store; 0 once they are durable there. The only place where an appending
        thread takes the GIL: once a group."""
        cdef int code = 0
        with gil:
            try:
                self.store.append(PyMemoryView_FromMemory(
                    <char*>self._stage + (self._stage_length - self._dirty), <Py_ssize_t>self._dirty, PyBUF_READ))
            except BaseException as error:
                self._store_error = error
                code = -1
        return code if code == 0 else self._poison(CALL_STORE, 0)

    cdef int _write_mark(self) noexcept nogil:
        cdef Mark mark
        memset(&mark, 0, sizeof(mark))
        mark.magic, mark.version, mark.shard, mark.epoch = MARK_MAGIC, VERSION, self.shard, self.epoch
        mark.durable_sequence, mark.segment_first = self._durable_sequence, self._segment_first
        mark.end_offset = self._durable_tail
        memcpy(mark.frame_hash, self._durable_hash, 16)
        mark.crc = ducat_crc32c(0, <const uint8_t*>&mark, sizeof(mark) - 8)
        self._mark_count += 1
        if c_pwrite(self._mark_fd, &mark, sizeof(mark), (self._mark_count & 1) * MARK_STRIDE) != sizeof(mark):
            return self._poison(CALL_WRITE, errno)
        return 0

    cdef int _roll(self, uint64_t needed) noexcept nogil:
        """Finish the current segment (write, sync, mark) and go on in the prepared one, larger if one frame needs it."""
        cdef char old_path[4096]
        cdef char new_path[4096]
        cdef uint64_t wanted = needed if needed > self.segment_bytes else self.segment_bytes
        if self._fd >= 0:
            if (self._dirty or self._durable_sequence != self._staged_sequence) and self._flush() < 0:
                return -1
            if self.sync_enabled:
                c_fsync(self._mark_fd)
        pthread_mutex_lock(&self._mutex)
        self._hurry = 1
        while self._prepared == PREPARE_RUNNING or self._prepared == PREPARE_WANTED:
            pthread_cond_wait(&self._changed, &self._mutex)
        self._hurry = 0
        if self._prepared != PREPARE_READY or self._prepared_size < wanted:
            # nothing ready (a burst, a huge frame, or no room above the reserve): what is applied must be written, so the
            # reserve is used for it. New work is refused by `writable` meanwhile.
            if self._prepared_fd >= 0:
                c_close(self._prepared_fd)
                self._prepared_fd = -1
            self._prepare_wanted, self._prepare_emergency = _align_up(wanted), PREPARE_EMERGENCY
            self._prepared = PREPARE_WANTED
            pthread_cond_broadcast(&self._changed)
            while self._prepared == PREPARE_RUNNING or self._prepared == PREPARE_WANTED:
                pthread_cond_wait(&self._changed, &self._mutex)
        if self._prepared != PREPARE_READY:
            pthread_mutex_unlock(&self._mutex)
            return self._poison(CALL_ALLOCATE, self._prepare_errno)
        snprintf(old_path, 4096, b"%s/next.ready", self._folder)
        self._segment_path(new_path, self._next_sequence)
        if c_rename(old_path, new_path) != 0 or c_fsync(self._folder_fd) != 0:
            pthread_mutex_unlock(&self._mutex)
            return self._poison(CALL_ALLOCATE, errno)
        if self._fd >= 0:
            c_close(self._fd)
        self._fd, self._segment_size = self._prepared_fd, self._prepared_size
        self._segment_first = self._next_sequence
        self._prepared_fd, self._prepared = -1, PREPARE_IDLE
        pthread_mutex_unlock(&self._mutex)
        self._tail = self._durable_tail = self._stage_base = self._stage_length = 0
        return 0

    cdef int _reserve_stage(self, uint64_t length) noexcept nogil:
        cdef uint64_t capacity = self._stage_capacity if self._stage_capacity else BLOCK_BYTES
        cdef uint8_t* larger
        if length <= self._stage_capacity:
            return 0
        while capacity < length:
            capacity *= 2
        larger = <uint8_t*>ducat_aligned(capacity)
        if larger == NULL:
            return -1
        if self._stage != NULL:
            memcpy(larger, self._stage, self._stage_length)
            free(self._stage)
        self._stage, self._stage_capacity = larger, capacity
        return 0

    cdef int _poison(self, int call, int error_number) noexcept nogil:
        if not self._poisoned:
            self._poison_call, self._poison_errno = call, error_number
            self._poisoned = 1
        return -1

    # ---- system calls, with injectable faults ----

    cdef int64_t _call_write(self, int fd, const uint8_t* data, uint64_t length, uint64_t offset) noexcept nogil:
        cdef Fault* fault = &self._faults[CALL_WRITE]
        cdef uint64_t done = 0, limit = length
        cdef ssize_t part
        fault.calls += 1
        if fault.calls == fault.fail_at:
            if fault.error_number:
                return self._poison(CALL_WRITE, fault.error_number)
            # a torn write: some blocks arrive, the caller hears of it (through the page cache, which takes any length)
            limit = <uint64_t>fault.short_bytes if <uint64_t>fault.short_bytes < length else length
            part = self._write_part(data, limit, offset)
            return self._poison(CALL_WRITE, 0)
        part = c_pwrite(fd, data, length, <off_t>offset)
        if part != <ssize_t>length:
            return self._poison(CALL_WRITE, errno if part < 0 else 0)
        self.written_bytes += length
        return <int64_t>part

    cdef int64_t _write_part(self, const uint8_t* data, uint64_t length, uint64_t offset) noexcept nogil:
        cdef char path[4096]
        cdef int fd
        cdef ssize_t done
        self._segment_path(path, self._segment_first)
        fd = ducat_open(path, O_RDWR, 0)
        if fd < 0:
            return -1
        done = c_pwrite(fd, data, length, <off_t>offset)
        c_close(fd)
        return done

    cdef int _call_sync(self, int fd) noexcept nogil:
        cdef Fault* fault = &self._faults[CALL_SYNC]
        fault.calls += 1
        if fault.calls == fault.fail_at:
            return self._poison(CALL_SYNC, fault.error_number)
        if c_fdatasync(fd) != 0:
            return self._poison(CALL_SYNC, errno)
        return 0

    cdef int _call_allocate(self, int fd, uint64_t length) noexcept nogil:
        """0 or an errno."""
        cdef Fault* fault = &self._faults[CALL_ALLOCATE]
        fault.calls += 1
        if fault.fail_at and fault.calls >= fault.fail_at:
            return fault.error_number
        return posix_fallocate(fd, 0, <off_t>length)

    # ---- the next segment ----

    cdef bint writable(self) noexcept nogil:
        """False while the disk is nearly full: no next segment can be had and this one is in its last quarter."""
        if self._prepared == PREPARE_NO_SPACE or self._prepared == PREPARE_FAILED:
            return self._tail <= self._segment_size - self._segment_size // 4
        return True

    cdef void retry_space(self) noexcept nogil:
        """Look again whether there is room (any thread)."""
        pthread_mutex_lock(&self._mutex)
        if self._prepared == PREPARE_NO_SPACE or self._prepared == PREPARE_FAILED:
            self._prepare_wanted, self._prepare_emergency = self.segment_bytes, PREPARE_PACED
            self._prepared = PREPARE_WANTED
            pthread_cond_broadcast(&self._changed)
        pthread_mutex_unlock(&self._mutex)

    cdef void _want_next(self, uint64_t needed, int emergency) noexcept nogil:
        pthread_mutex_lock(&self._mutex)
        if self._prepared == PREPARE_IDLE:
            self._prepare_wanted = needed if needed > self.segment_bytes else self.segment_bytes
            self._prepare_emergency, self._prepared = emergency, PREPARE_WANTED
            pthread_cond_broadcast(&self._changed)
        pthread_mutex_unlock(&self._mutex)

    def _prepare_thread(self):
        with nogil:
            self._prepare_run()

    cdef void _prepare_run(self) noexcept nogil:
        cdef uint64_t size
        cdef int emergency, code, fd = -1
        pthread_mutex_lock(&self._mutex)
        while not self._closing:
            if self._prepared != PREPARE_WANTED:
                pthread_cond_wait(&self._changed, &self._mutex)
                continue
            self._prepared = PREPARE_RUNNING
            size, emergency = self._prepare_wanted, self._prepare_emergency
            pthread_mutex_unlock(&self._mutex)
            code = self._prepare_one(size, emergency, &fd)
            pthread_mutex_lock(&self._mutex)
            self._prepare_errno = code
            if code == 0:
                self._prepared_fd, self._prepared_size, self._prepared = fd, size, PREPARE_READY
            else:
                self._prepared = PREPARE_NO_SPACE if code == ENOSPC else PREPARE_FAILED
            pthread_cond_broadcast(&self._changed)
        if self._prepared == PREPARE_WANTED:
            self._prepared, self._prepare_errno = PREPARE_FAILED, EIO
            pthread_cond_broadcast(&self._changed)
        pthread_mutex_unlock(&self._mutex)

    cdef bint _ahead(self, uint64_t zeroed, uint64_t size) noexcept nogil:
        """Is the zeroing further than the log's own progress asks for? Then it rests, so that syncs have the disk."""
        cdef uint64_t first = self._segment_size // 4, tail = self._tail
        cdef uint64_t used = tail - first if tail > first else 0
        return zeroed // 1024 * 3 > size // 1024 // 4 + used // 1024 * 4 * 3 // 2

    cdef int _prepare_one(self, uint64_t size, int emergency, int* fd_out) noexcept nogil:
        """Allocate a segment, write zeros over all of it, sync it, name it next.ready. 0 or an errno."""
        cdef char building[4096]
        cdef char ready[4096]
        cdef uint8_t* zeros
        cdef uint64_t at = 0, part
        cdef int64_t free_bytes = ducat_free_bytes(self._folder)
        cdef int fd, code = 0
        if emergency != PREPARE_EMERGENCY and free_bytes >= 0 and <uint64_t>free_bytes < size + self.reserve_bytes:
            return ENOSPC
        snprintf(building, 4096, b"%s/next.building", self._folder)
        snprintf(ready, 4096, b"%s/next.ready", self._folder)
        fd = ducat_open(building, O_RDWR | O_CREAT | O_TRUNC, self.direct)
        if fd < 0 and errno == EINVAL:
            self.direct = False
            fd = ducat_open(building, O_RDWR | O_CREAT | O_TRUNC, 0)
        if fd < 0:
            return errno
        code = self._call_allocate(fd, size)
        if code == 0 and self.sync_enabled:
            zeros = <uint8_t*>ducat_aligned(ZERO_BYTES)
            if zeros == NULL:
                code = ENOMEM
            else:
                memset(zeros, 0, ZERO_BYTES)
                while at < size and code == 0:
                    part = size - at if size - at < ZERO_BYTES else ZERO_BYTES
                    if c_pwrite(fd, zeros, part, <off_t>at) != <ssize_t>part:
                        code = errno or ENOSPC
                    at += part
                    if emergency == PREPARE_PACED and at < size and code == 0:
                        if self._closing:
                            code = EIO
                        elif not self._hurry and self._ahead(at, size):
                            ducat_pause_ms(8)
                free(zeros)
        if code == 0 and (c_fsync(fd) != 0 or c_rename(building, ready) != 0 or c_fsync(self._folder_fd) != 0):
            code = errno or EIO
        if code != 0:
            c_close(fd)
            c_unlink(building)
            return code
        fd_out[0] = fd
        return 0

    # ---- the Python face ----

    @property
    def next_sequence(self):
        """Sequence number the next appended event must have."""
        return self._next_sequence

    @property
    def durable_sequence(self):
        """Last sequence number known to be on disk."""
        return self._durable_sequence

    @property
    def poisoned(self):
        """True after a failed write or sync."""
        return bool(self._poisoned)

    @property
    def nearly_full(self):
        """True while writes should be refused for want of disk."""
        return not self.writable()

    @property
    def position(self):
        """(durable sequence number, segment file, offset behind the durable frames, hash of the last of them)."""
        return (self._durable_sequence, os.path.join(self.folder, f"{self._segment_first:020d}.seg"), self._durable_tail,
                self._durable_hash[:16])

    def error(self):
        """What to raise once poisoned: LogPoisoned, or what the store failed with."""
        if self._store_error is not None:
            return self._store_error
        return LogPoisoned(os.path.join(self.folder, f"{self._segment_first:020d}.seg"),
                           _CALL_NAMES[self._poison_call], self._poison_errno)

    def append(self, uint64_t first_sequence, uint32_t count, uint64_t timestamp_ns, bytes digest, const uint8_t[::1] body):
        """Stage one frame of `count` records. Raises LogPoisoned; ValueError for a gap or a wrong length."""
        cdef FrameInfo info
        cdef int code
        cdef const uint8_t* digest_bytes = digest
        if self._closed:
            raise ValueError("the event log is closed")
        if len(digest) != 16:
            raise ValueError(f"a digest has 16 bytes, not {len(digest)}")
        if count == 0 or body.shape[0] != <Py_ssize_t>count * self.record_bytes:
            raise ValueError(f"{count} records of {self.record_bytes} bytes were announced, the body has {body.shape[0]}")
        info.first_sequence, info.timestamp_ns, info.count = first_sequence, timestamp_ns, count
        info.body_length = <uint32_t>body.shape[0]
        memcpy(info.digest, digest_bytes, 16)
        with nogil:
            code = self.append_frame(&info, &body[0])
        if code == -2:
            raise ValueError(f"the next sequence number is {self._next_sequence}, not {first_sequence}")
        if code < 0:
            raise self.error()

    def append_copy(self, const uint8_t[::1] frame):
        """Stage a whole frame (header, body, padding) as another writer made it: byte for byte, with its epoch. It must be a
        frame of this shard that continues the hash chain, else ValueError. Raises LogPoisoned."""
        cdef uint64_t length = <uint64_t>frame.shape[0]
        cdef const Header* header = <const Header*>&frame[0] if length >= FRAME_HEADER_BYTES else NULL
        cdef uint8_t* at
        cdef int code = 0
        if self._closed:
            raise ValueError("the event log is closed")
        if header == NULL or header.magic != MAGIC or header.version != VERSION or header.header_bytes != FRAME_HEADER_BYTES \
                or header.count == 0 or <uint64_t>header.count * header.record_bytes != header.body_length \
                or length != FRAME_HEADER_BYTES + ((<uint64_t>header.body_length + 7) & ~<uint64_t>7) \
                or ducat_crc32c(0, &frame[0], FRAME_HEADER_BYTES - 4) != header.header_crc \
                or ducat_crc32c(0, &frame[FRAME_HEADER_BYTES], header.body_length) != header.body_crc:
            raise ValueError(f"these {length} bytes are no frame")
        if header.shard != self.shard or header.record_bytes != self.record_bytes \
                or header.first_sequence != self._next_sequence or memcmp(header.previous_hash, self._previous_hash, 16) != 0:
            raise ValueError(f"a frame of shard {header.shard} that begins with event {header.first_sequence} does not continue "
                             f"the log of shard {self.shard} at event {self._next_sequence}")
        with nogil:
            if self._poisoned:
                code = -1
            elif self._tail + length > self._segment_size and self._roll(length) < 0:
                code = -1
            elif self._reserve_stage(_align_up(self._stage_length + length)) < 0:
                code = self._poison(CALL_WRITE, ENOMEM)
            else:
                at = self._stage + self._stage_length
                memcpy(at, &frame[0], length)
                ducat_sha256_16(at, FRAME_HEADER_BYTES, self._previous_hash)
                self._stage_length += length
                self._dirty += length
                self._tail += length
                self._next_sequence += header.count
                self._staged_sequence = self._next_sequence - 1
                self.frame_count += 1
                self.appended_bytes += length
        if code < 0:
            raise self.error()

    def sync(self):
        """Make everything appended durable; returns the durable position as `position` does. Raises LogPoisoned, or what the
        store raises."""
        cdef int code
        if self._closed:
            raise ValueError("the event log is closed")
        with nogil:
            code = self.sync_frames()
        if code < 0:
            raise self.error()
        return self.position

    def wait_prepared(self):
        """Wait until the segment preparer rests (tests, benchmarks)."""
        with nogil:
            pthread_mutex_lock(&self._mutex)
            while self._prepared == PREPARE_RUNNING or self._prepared == PREPARE_WANTED:
                pthread_cond_wait(&self._changed, &self._mutex)
            pthread_mutex_unlock(&self._mutex)

    def recheck_space(self):
        """Ask the preparer to look for room again."""
        with nogil:
            self.retry_space()

    def inject(self, str call, int64_t at, int error_number=0, int64_t short_bytes=0):
        """Tests: let the `at`-th call from now of "write", "fdatasync" or "fallocate" fail with an errno, or (write only,
        errno 0) write `short_bytes` and report a short write. fallocate goes on failing until `inject(call, 0)`."""
        cdef int index = _CALL_NAMES.index(call)
        self._faults[index].error_number, self._faults[index].short_bytes = error_number, short_bytes
        self._faults[index].fail_at = self._faults[index].calls + at if at else 0

    def hold_sync(self, bint held):
        """Tests: while held, fdatasync does not return."""
        self._sync_held = held

    def close(self):
        """Stop the preparer, write the mark durably, let go of files and lock. Unsynced frames are not written."""
        if self._closed:
            return
        self._closed = True
        with nogil:
            pthread_mutex_lock(&self._mutex)
            self._closing = 1
            pthread_cond_broadcast(&self._changed)
            pthread_mutex_unlock(&self._mutex)
        if self._preparer is not None:
            self._preparer.join()
        if self._mark_fd >= 0 and not self._poisoned and self.sync_enabled:
            with nogil:
                c_fsync(self._mark_fd)
        self._release()
        if self.store is not None:
            self.store.close()

    cdef void _release(self) noexcept:
        if self._fd >= 0:
            c_close(self._fd)
        if self._prepared_fd >= 0:
            c_close(self._prepared_fd)
        if self._mark_fd >= 0:
            c_close(self._mark_fd)
        if self._folder_fd >= 0:
            c_close(self._folder_fd)
        if self._lock_fd >= 0:
            c_close(self._lock_fd)
        self._fd = self._prepared_fd = self._mark_fd = self._folder_fd = self._lock_fd = -1

    def __dealloc__(self):
        self._release()
        free(self._stage)
        pthread_mutex_destroy(&self._mutex)
        pthread_cond_destroy(&self._changed)


def read_mark(folder):
    """The durable mark of a log folder: (durable sequence, epoch, segment's first sequence, end offset, frame hash), the
    newest slot that matches its checksum; None where there is none."""
    cdef bytes data
    cdef const Mark* mark
    cdef const uint8_t* base
    cdef int slot
    cdef tuple best = None, found   # typed: inference of these never ends in Cython 3.3.1
    try:
        with open(os.path.join(folder, "durable.mark"), "rb") as file:
            data = file.read(2 * MARK_STRIDE)
    except FileNotFoundError:
        return None
    base = data
    for slot in range(2):
        if len(data) < slot * MARK_STRIDE + MARK_BYTES:
            break
        mark = <const Mark*>(base + slot * MARK_STRIDE)
        if mark.magic != MARK_MAGIC or ducat_crc32c(0, <const uint8_t*>mark, sizeof(Mark) - 8) != mark.crc:
            continue
        found = (mark.durable_sequence, mark.epoch, mark.segment_first, mark.end_offset, mark.frame_hash[:16])
        if best is None or (found[1], found[0]) > (best[1], best[0]):
            best = found
    return best
