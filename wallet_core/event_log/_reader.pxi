# The reading side: frames of one folder in order, checked. Included by _file.pyx.

cdef class FrameReader:
    """Reads the frames of a log folder in order from the segment that holds `from_sequence`, past the page cache where that
    is possible. `next` yields each frame once it has passed every check. Of frames wholly below
    `from_sequence` only the headers are checked. One thread at a time."""

    def __cinit__(self):
        self._fd = -1
        pthread_mutex_init(&self._mutex, NULL)
        pthread_cond_init(&self._changed, NULL)

    def __init__(self, folder, *, int shard, uint64_t first_segment, uint64_t from_sequence=1, bint direct=True,
                 bytes from_hash=None, bint ahead=False):
        cdef bytes path = os.fsencode(folder)
        cdef int i
        if len(path) > 3700:
            raise ValueError(f"the folder name is longer than 3700 bytes: {folder}")
        memcpy(self._folder, <const char*>path, len(path) + 1)
        self.folder, self.shard, self.damage = os.fspath(folder), shard, None
        self._direct = direct
        self._from_sequence, self._next_sequence = from_sequence, first_segment
        if first_segment == 1:
            memset(self._hash, 0, 16)
            self._hash_known = True
        if from_hash is not None:
            if len(from_hash) != 16:
                raise ValueError("from_hash has 16 bytes")
            memcpy(self._from_hash, <const uint8_t*>from_hash, 16)
            self._from_hash_given = True
        self._capacity = READ_BYTES
        self._raw = <uint8_t*>ducat_aligned(HEADROOM_BYTES + self._capacity)
        if self._raw == NULL:
            raise MemoryError()
        self._buffer = self._raw + HEADROOM_BYTES
        for i in range(AHEAD_PIECES if ahead else 0):
            self._ahead[i].raw = <uint8_t*>ducat_aligned(HEADROOM_BYTES + READ_BYTES)
            if self._ahead[i].raw == NULL:
                raise MemoryError()
        if self._open_segment(first_segment) != 1:
            raise OSError(self._io_errno or ENOENT, "the first segment cannot be opened", self.file)

    def __dealloc__(self):
        cdef int i
        if self._fd >= 0:
            c_close(self._fd)
        free(self._raw)
        for i in range(AHEAD_PIECES):
            free(self._ahead[i].raw)
        pthread_mutex_destroy(&self._mutex)
        pthread_cond_destroy(&self._changed)

    def read_ahead(self, bint on):
        """Start or stop the threads that read and check the next pieces meanwhile (only a reader made with ahead=True has
        them). They must be stopped before the reader is let go of."""
        if on and self._ahead[0].raw != NULL and self._ahead_threads is None:
            self._ahead_stop = 0
            self._ahead_threads = [threading.Thread(target=self._ahead_loop, name="read-ahead", daemon=True)
                                   for _ in range(AHEAD_THREADS)]
            for thread in self._ahead_threads:
                thread.start()
        elif not on and self._ahead_threads is not None:
            with nogil:
                self._ahead_settle()
                pthread_mutex_lock(&self._mutex)
                self._ahead_stop = 1
                pthread_cond_broadcast(&self._changed)
                pthread_mutex_unlock(&self._mutex)
            for thread in self._ahead_threads:
                thread.join()
            self._ahead_threads = None

    def _ahead_loop(self):
        with nogil:
            self._ahead_run()

    cdef void _ahead_run(self) noexcept nogil:
        """One of the threads: reads the next piece that nobody reads yet, then checks what has come, in order."""
        cdef AheadPiece* piece
        pthread_mutex_lock(&self._mutex)
        while not self._ahead_stop:
            if not self._ahead_on or self._ahead_count == AHEAD_PIECES or self._ahead_base >= self._segment_size:
                pthread_cond_wait(&self._changed, &self._mutex)
                continue
            piece = &self._ahead[(self._ahead_head + self._ahead_count) % AHEAD_PIECES]
            piece.base, piece.state = self._ahead_base, AHEAD_READING
            piece.length = <int64_t>_align_up(self._segment_size - self._ahead_base)
            if piece.length > READ_BYTES:
                piece.length = READ_BYTES
            self._ahead_base += <uint64_t>piece.length
            self._ahead_count += 1
            self._ahead_busy += 1
            pthread_mutex_unlock(&self._mutex)
            self._ahead_read(piece)
            pthread_mutex_lock(&self._mutex)
            piece.state = AHEAD_READ
            if not self._ahead_checking:
                self._ahead_check()
            self._ahead_busy -= 1
            pthread_cond_broadcast(&self._changed)
        pthread_mutex_unlock(&self._mutex)

    cdef void _ahead_read(self, AheadPiece* piece) noexcept nogil:
        """`length` bytes at `base`; length becomes what was read, -1 for an error."""
        cdef int64_t done = 0
        cdef ssize_t part = 0
        while done < piece.length:
            part = c_pread(self._fd, piece.raw + HEADROOM_BYTES + done, <size_t>(piece.length - done),
                           <off_t>(piece.base + <uint64_t>done))
            if part <= 0:
                break
            done += part
            if done & (BLOCK_BYTES - 1):
                break           # the file's ragged end
        piece.length = done if part >= 0 else -1

    cdef void _ahead_check(self) noexcept nogil:
        """Checks the pieces that have been read, in order. The mutex is held, and let go of meanwhile."""
        cdef AheadPiece* piece
        self._ahead_checking = 1
        while self._ahead_done < self._ahead_count:
            piece = &self._ahead[(self._ahead_head + self._ahead_done) % AHEAD_PIECES]
            if piece.state != AHEAD_READ:
                break
            pthread_mutex_unlock(&self._mutex)
            if piece.length > 0:
                self._sum(piece.raw + HEADROOM_BYTES, <uint64_t>piece.length)
            pthread_mutex_lock(&self._mutex)
            piece.sound = self._sum_sound
            piece.state = AHEAD_DONE
            self._ahead_done += 1
            pthread_cond_broadcast(&self._changed)
        self._ahead_checking = 0

    cdef void _sum(self, const uint8_t* data, uint64_t length) noexcept nogil:
        """The next bytes of the segment: walks from frame to frame and sums their bodies. Every frame that ends at or below
        `_sum_sound` matches its checksums; at the first that does not it stops for good, and `next` looks itself."""
        cdef const Header* header = <const Header*>self._sum_header
        cdef uint64_t part, end
        while length and not self._sum_lost:
            if self._sum_have < FRAME_HEADER_BYTES:
                part = FRAME_HEADER_BYTES - self._sum_have
                part = length if length < part else part
                memcpy(self._sum_header + self._sum_have, data, part)
                if self._sum_have + part == FRAME_HEADER_BYTES:
                    self._sum_crc = 0
                    self._sum_lost = header.magic != MAGIC \
                        or ducat_crc32c(0, self._sum_header, FRAME_HEADER_BYTES - 4) != header.header_crc
            else:
                end = FRAME_HEADER_BYTES + <uint64_t>header.body_length
                if self._sum_have < end:
                    part = end - self._sum_have
                    part = length if length < part else part
                    self._sum_crc = ducat_crc32c(self._sum_crc, data, part)
                    self._sum_lost = self._sum_have + part == end and self._sum_crc != header.body_crc
                else:
                    part = ((end + 7) & ~<uint64_t>7) - self._sum_have
                    part = length if length < part else part
                    self._sum_lost = not ducat_all_zero(data, part)
            self._sum_have += part
            data += part
            length -= part
            if not self._sum_lost and self._sum_have >= FRAME_HEADER_BYTES:
                end = FRAME_HEADER_BYTES + ((<uint64_t>header.body_length + 7) & ~<uint64_t>7)
                if self._sum_have == end:
                    self._sum_sound += end
                    self._sum_have = 0

    cdef void _ahead_begin(self) noexcept nogil:
        """Let the threads read what follows the buffer. The next frame begins in it."""
        cdef uint64_t base = self._buffer_base + self._buffer_length
        if self._ahead_threads is None or self._ahead_on or base >= self._segment_size or base & (BLOCK_BYTES - 1):
            return
        pthread_mutex_lock(&self._mutex)
        self._sum_sound, self._sum_have, self._sum_lost = self._offset, 0, 0
        self._sum(self._buffer + (self._offset - self._buffer_base), base - self._offset)
        self._sound = self._sum_sound
        self._ahead_base, self._ahead_on = base, 1
        pthread_cond_broadcast(&self._changed)
        pthread_mutex_unlock(&self._mutex)

    cdef void _ahead_settle(self) noexcept nogil:
        """Wait for what is being read, and forget it."""
        pthread_mutex_lock(&self._mutex)
        self._ahead_on = 0
        while self._ahead_busy:
            pthread_cond_wait(&self._changed, &self._mutex)
        self._ahead_head = self._ahead_count = self._ahead_done = 0
        pthread_mutex_unlock(&self._mutex)

    cdef bint _ahead_take(self, uint64_t base, uint64_t end) noexcept nogil:
        """Make the next piece read ahead the buffer, if it and the rest of the buffer hold base..end."""
        cdef uint64_t rest, follows = self._buffer_base + self._buffer_length
        cdef uint8_t* raw
        cdef AheadPiece* piece = &self._ahead[self._ahead_head]
        if not self._ahead_on:
            return False
        pthread_mutex_lock(&self._mutex)
        while self._ahead_done == 0 and (self._ahead_count or self._ahead_base < self._segment_size):
            pthread_cond_wait(&self._changed, &self._mutex)
        if self._ahead_done == 0 or piece.length <= 0 or piece.base != follows or base < self._buffer_base \
                or base > follows or follows - base > HEADROOM_BYTES or end > follows + <uint64_t>piece.length:
            pthread_mutex_unlock(&self._mutex)
            self._ahead_settle()
            return False
        rest = follows - base
        memcpy(piece.raw + HEADROOM_BYTES - rest, self._buffer + (base - self._buffer_base), rest)
        raw = self._raw
        self._raw, piece.raw = piece.raw, raw
        self._capacity = READ_BYTES
        self._buffer = self._raw + HEADROOM_BYTES - rest
        self._buffer_base, self._buffer_length = base, rest + <uint64_t>piece.length
        self._sound = piece.sound
        self.bytes_read += <uint64_t>piece.length
        self._ahead_head = (self._ahead_head + 1) % AHEAD_PIECES
        self._ahead_count -= 1
        self._ahead_done -= 1
        pthread_cond_broadcast(&self._changed)
        pthread_mutex_unlock(&self._mutex)
        return True

    cdef int _open_segment(self, uint64_t first) noexcept nogil:
        """1 opened, 0 there is none, -1 error."""
        cdef char path[4096]
        cdef int fd
        cdef int64_t size
        snprintf(path, 4096, b"%s/%020llu.seg", self._folder, <unsigned long long>first)
        fd = ducat_open(path, O_RDONLY, self._direct)
        if fd < 0 and errno == EINVAL and self._direct:
            self._direct = False
            fd = ducat_open(path, O_RDONLY, 0)
        if fd < 0:
            if errno == ENOENT:
                return 0
            self._io_errno = errno
            return -1
        size = ducat_file_size(fd)
        if size < 0:
            self._io_errno = errno
            c_close(fd)
            return -1
        if self._fd >= 0:
            self._ahead_settle()
            c_close(self._fd)
        self._fd = fd
        self._segment_first, self._segment_size = first, <uint64_t>size
        self._offset = self._buffer_base = self._buffer_length = self._sound = 0
        return 1

    cdef const uint8_t* _need(self, uint64_t offset, uint64_t length) noexcept nogil:
        """`length` bytes at `offset`, or NULL: the file ends before, or an error (then _io_errno is set)."""
        cdef uint64_t base, wanted, done
        cdef ssize_t part
        cdef uint8_t* larger
        if offset >= self._buffer_base and offset + length <= self._buffer_base + self._buffer_length:
            return self._buffer + (offset - self._buffer_base)
        if offset + length > self._segment_size:
            return NULL
        base = _align_down(offset)
        wanted = _align_up(offset + length - base)
        if self._ahead_take(base, offset + length):
            return self._buffer + (offset - self._buffer_base)
        if wanted > self._capacity:
            larger = <uint8_t*>ducat_aligned(HEADROOM_BYTES + wanted)
            if larger == NULL:
                self._io_errno = ENOMEM
                return NULL
            free(self._raw)
            self._raw, self._capacity = larger, wanted
        self._buffer = self._raw + HEADROOM_BYTES
        self._buffer_base, self._buffer_length = base, 0
        # a small first read, so that a reader of the live tail does not fetch megabytes of zeros; then whole buffers
        wanted = wanted if wanted > 65536 else 65536
        if self.bytes_read > 0 or base > 0:
            wanted = self._capacity
        if self._live and wanted > 262144 and _align_up(offset + length - base) <= 262144:
            wanted = 262144
        if self._small and wanted > 262144:
            wanted = _align_up(offset + length - base)
            if wanted < 262144:
                wanted = 262144
        if self._next_sequence < self._from_sequence:
            wanted = _align_up(offset + length - base)      # only headers are wanted yet
        if wanted > self._capacity:
            wanted = self._capacity
        if wanted > _align_up(self._segment_size - base):
            wanted = _align_up(self._segment_size - base)
        done = 0
        while done < offset + length - base:
            part = c_pread(self._fd, self._buffer + done, wanted - done, <off_t>(base + done))
            if part < 0:
                self._io_errno = errno
                return NULL
            if part == 0:
                break
            done += part
            if done & (BLOCK_BYTES - 1):
                break           # the file's ragged end
        self._buffer_length = done
        self.bytes_read += done
        if offset + length > base + done:
            return NULL
        if wanted >= READ_BYTES and offset == self._offset:
            self._ahead_begin()
        return self._buffer + (offset - base)

    cdef int next(self, FrameView* out, uint64_t limit_sequence) noexcept nogil:
        """1: `out` is the next frame; 0: no more (or the next is above limit_sequence); -1: see `damage`."""
        cdef const uint8_t* at
        cdef const Header* header
        cdef uint64_t length
        cdef int opened, skipped = 0
        if self._damage_code:
            return -1
        while True:
            if self._from_hash_given and self._next_sequence >= self._from_sequence:
                self._from_hash_given = False
                if self._hash_known and memcmp(self._hash, self._from_hash, 16) != 0 \
                        or self._next_sequence > self._from_sequence:
                    self._damage_code = DAMAGE_CHAIN
                    return -1
                memcpy(self._hash, self._from_hash, 16)
                self._hash_known = True
            if self._next_sequence > limit_sequence:
                return 0
            at = NULL
            if self._offset + FRAME_HEADER_BYTES <= self._segment_size:
                at = self._need(self._offset, FRAME_HEADER_BYTES)
            if at == NULL and self._io_errno:
                self._damage_code = DAMAGE_READ
                return -1
            if at == NULL or ducat_all_zero(at, FRAME_HEADER_BYTES):
                # the end of this segment: on to the next one if its name continues the sequence
                opened = 0
                if self._next_sequence != self._segment_first:
                    opened = self._open_segment(self._next_sequence)
                if opened < 0:
                    self._damage_code = DAMAGE_READ
                    return -1
                if opened == 1:
                    continue
                return 0
            header = <const Header*>at
            if header.magic != MAGIC or ducat_crc32c(0, at, FRAME_HEADER_BYTES - 4) != header.header_crc:
                self._damage_code = DAMAGE_HEADER
            elif header.version != VERSION or header.header_bytes != FRAME_HEADER_BYTES:
                self._damage_code = DAMAGE_VERSION
            elif header.shard != self.shard:
                self._damage_code = DAMAGE_SHARD
            elif header.first_sequence != self._next_sequence or header.count == 0 \
                    or <uint64_t>header.count * header.record_bytes != header.body_length:
                self._damage_code = DAMAGE_SEQUENCE
            elif header.epoch < self._epoch:
                self._damage_code = DAMAGE_EPOCH
            elif self._hash_known and memcmp(header.previous_hash, self._hash, 16) != 0:
                self._damage_code = DAMAGE_CHAIN
            if self._damage_code:
                return -1
            length = FRAME_HEADER_BYTES + ((<uint64_t>header.body_length + 7) & ~<uint64_t>7)
            if self._offset + length > self._segment_size:
                self._damage_code = DAMAGE_SHORT
                return -1
            if self._next_sequence + header.count <= self._from_sequence:
                # wholly below: the header is enough to follow the chain (`settle_end` from the beginning checks bodies too)
                ducat_sha256_16(at, FRAME_HEADER_BYTES, self._hash)
                self._hash_known = True
                self._epoch, self._timestamp_ns = header.epoch, header.timestamp_ns
                if header.durable_sequence > self._max_mark:
                    self._max_mark = header.durable_sequence
                self._next_sequence += header.count
                self._offset += length
                continue
            at = self._need(self._offset, length)
            if at == NULL:
                self._damage_code = DAMAGE_READ if self._io_errno else DAMAGE_SHORT
                return -1
            header = <const Header*>at
            if self._offset + length > self._sound \
                    and (ducat_crc32c(0, at + FRAME_HEADER_BYTES, header.body_length) != header.body_crc
                         or not ducat_all_zero(at + FRAME_HEADER_BYTES + header.body_length,
                                               length - FRAME_HEADER_BYTES - header.body_length)):
                self._damage_code = DAMAGE_BODY
                return -1
            ducat_sha256_16(at, FRAME_HEADER_BYTES, self._hash)
            self._hash_known = True
            self._epoch, self._timestamp_ns = header.epoch, header.timestamp_ns
            if header.durable_sequence > self._max_mark:
                self._max_mark = header.durable_sequence
            out.offset = self._offset
            self._offset += length
            self._next_sequence += header.count
            out.first_sequence, out.count, out.body_length = header.first_sequence, header.count, header.body_length
            out.timestamp_ns, out.durable_sequence = header.timestamp_ns, header.durable_sequence
            out.epoch, out.record_bytes = header.epoch, header.record_bytes
            out.header, out.body, out.digest = at, at + FRAME_HEADER_BYTES, header.digest
            memcpy(out.hash, self._hash, 16)
            return 1

    cdef void unread(self, const FrameView* view) noexcept nogil:
        """Step back before the frame that `next` just gave."""
        self._offset, self._next_sequence = view.offset, view.first_sequence
        memcpy(self._hash, (<const Header*>view.header).previous_hash, 16)

    cdef int _rest_is_zero(self) noexcept nogil:
        """1 if nothing but zeros follows the last frame of this segment, 0 if not, -1 if it cannot be read."""
        cdef uint64_t at = self._offset, part
        cdef const uint8_t* data
        while at < self._segment_size:
            part = self._capacity - BLOCK_BYTES if self._segment_size - at > self._capacity - BLOCK_BYTES \
                else self._segment_size - at
            data = self._need(at, part)
            if data == NULL:
                return -1
            if not ducat_all_zero(data, part):
                return 0
            at += part
        return 1

    # ---- the Python face ----

    @property
    def file(self):
        """The segment being read."""
        return os.path.join(self.folder, f"{self._segment_first or self._next_sequence:020d}.seg")

    @property
    def segment_first(self):
        """First sequence number of the segment being read (its name)."""
        return self._segment_first

    @property
    def segment_size(self):
        """Bytes of the segment being read."""
        return self._segment_size

    @property
    def offset(self):
        """Where the next frame begins, or the damage is."""
        return self._offset

    @property
    def next_sequence(self):
        """The sequence number that comes next."""
        return self._next_sequence

    @property
    def last_hash(self):
        """Hash of the last frame read; None before the first of a log that does not begin at 1."""
        return self._hash[:16] if self._hash_known else None

    @property
    def epoch(self):
        """Epoch of the last frame read."""
        return self._epoch

    @property
    def timestamp_ns(self):
        """Timestamp of the last frame read."""
        return self._timestamp_ns

    @property
    def mark(self):
        """The highest durable sequence number that a frame header names."""
        return self._max_mark

    def check_end(self):
        """After the last frame: look at what follows it. Sets `damage` if it is not zeros."""
        cdef int code
        with nogil:
            code = self._rest_is_zero()
        if code != 1:
            self._damage_code = DAMAGE_TRAILING if code == 0 else DAMAGE_READ
            self.describe()

    def describe(self):
        """The reason of the damage as text, or None."""
        if self._damage_code:
            self.damage = _DAMAGE_REASONS[self._damage_code]
            if self._damage_code == DAMAGE_READ and self._io_errno:
                self.damage += f" ({os.strerror(self._io_errno)})"
        return self.damage

    def skip_all(self):
        """Read and check to the end without looking at bodies; False if there is damage (see `damage`)."""
        cdef FrameView view
        cdef int code
        with nogil:
            while True:
                code = self.next(&view, UINT64_MAX)
                if code != 1:
                    break
        if code < 0:
            self.describe()
        return code == 0

    def skip(self, uint64_t limit_sequence, uint64_t bytes_max):
        """Read and check frames up to `limit_sequence`, until about `bytes_max` bytes were read from the disk; True where there may be
        more, False at the end or at damage (see `damage`)."""
        cdef FrameView view
        cdef int code = 1
        cdef uint64_t until = self.bytes_read + bytes_max
        self._small = True          # one frame, or 256 KiB, at once
        with nogil:
            while code == 1 and self.bytes_read < until:
                code = self.next(&view, limit_sequence)
        if code < 0:
            self.describe()
        return code == 1

    def read(self, uint64_t limit_sequence=UINT64_MAX):
        """The next frame as (first_sequence, count, timestamp_ns, durable_sequence, epoch, record_bytes, previous_hash,
        digest, body, hash, offset), or None at the end or at damage (see `damage`)."""
        cdef FrameView view
        cdef int code
        cdef const Header* header
        with nogil:
            code = self.next(&view, limit_sequence)
        if code < 0:
            self.describe()
        if code != 1:
            return None
        header = <const Header*>view.header
        return (view.first_sequence, view.count, view.timestamp_ns, view.durable_sequence, view.epoch, view.record_bytes,
                header.previous_hash[:16], header.digest[:16], view.body[:view.body_length], view.hash[:16], view.offset)

    def refresh(self):
        """Forget buffered bytes, so that frames appended meanwhile are seen; the position stays."""
        cdef int64_t size = ducat_file_size(self._fd)
        self._buffer_length = 0
        self._live = True
        if size >= 0:
            self._segment_size = <uint64_t>size

    def later_mark(self):
        """The highest durable sequence number in any intact frame header of the right shard behind the damage, 0 if none:
        what tells bit rot in the middle of the log from a torn tail."""
        cdef uint64_t at = (self._offset + 7) & ~<uint64_t>7, best = 0, part, inner
        cdef const uint8_t* data
        cdef const Header* header
        with nogil:
            while at + FRAME_HEADER_BYTES <= self._segment_size:
                part = self._capacity - BLOCK_BYTES
                if part > self._segment_size - at:
                    part = self._segment_size - at
                data = self._need(at, part)
                if data == NULL:
                    break
                inner = 0
                while inner + FRAME_HEADER_BYTES <= part:
                    header = <const Header*>(data + inner)
                    if header.magic == MAGIC and header.shard == self.shard \
                            and ducat_crc32c(0, data + inner, FRAME_HEADER_BYTES - 4) == header.header_crc \
                            and header.first_sequence >= self._next_sequence and header.durable_sequence > best:
                        best = header.durable_sequence
                    inner += 8
                if part < 2 * FRAME_HEADER_BYTES or at + part >= self._segment_size:
                    break
                at += (part - FRAME_HEADER_BYTES) & ~<uint64_t>7
        return best
