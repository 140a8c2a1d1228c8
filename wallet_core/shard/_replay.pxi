# Replay of a log into an engine. Included by _host.pyx.

cdef class MemoryThread:
    """Touches the memory that an engine asks for beside its replay (Engine.prepare). A context manager."""

    cdef Engine engine
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed
    cdef int wanted, stopping
    cdef object thread

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.changed, NULL)

    def __init__(self, Engine engine not None):
        self.engine = engine

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)
        pthread_cond_destroy(&self.changed)

    def __enter__(self):
        self.thread = threading.Thread(target=self.loop, name="memory", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        pthread_mutex_lock(&self.mutex)
        self.stopping = 1
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)
        self.thread.join()

    def loop(self):
        with nogil:
            pthread_mutex_lock(&self.mutex)
            while not self.stopping:
                if not self.wanted:
                    pthread_cond_wait(&self.changed, &self.mutex)
                    continue
                pthread_mutex_unlock(&self.mutex)
                self.engine.prepare()
                pthread_mutex_lock(&self.mutex)
                self.wanted = 0
            pthread_mutex_unlock(&self.mutex)

    cdef void ask(self) noexcept nogil:
        if self.wanted:
            return
        pthread_mutex_lock(&self.mutex)
        self.wanted = 1
        pthread_cond_signal(&self.changed)
        pthread_mutex_unlock(&self.mutex)


def replay_frames(Engine engine not None, FrameReader reader not None, *, MemoryThread memory=None, uint64_t upto_sequence=UINT64_MAX,
                  uint64_t upto_timestamp_ns=UINT64_MAX, uint64_t bytes_max=UINT64_MAX):
    """Replay what the reader has next, checking every frame's digest. Stops at the log's end (or damage, see the reader),
    before the first frame above `upto_sequence` or later than `upto_timestamp_ns`, or after about `bytes_max` bytes (for
    progress). Returns (frames, events, more: bool). Raises RecoveryFailed. The GIL is released meanwhile."""
    cdef FrameView view
    cdef uint8_t digest[16]
    cdef uint64_t frames = 0, events = 0, done = 0
    cdef int code = 0, problem = 0
    cdef bint helped = memory is not None
    with nogil:
        while done < bytes_max:
            code = reader.next(&view, upto_sequence)
            if code != 1:
                break
            if view.first_sequence <= engine.sequence():
                problem = 3            # a snapshot inside a frame cannot be
                break
            if view.timestamp_ns > upto_timestamp_ns or view.first_sequence + view.count - 1 > upto_sequence:
                reader.unread(&view)
                code = 0
                break
            if view.record_bytes != EVENT_BYTES:
                problem = 4
                break
            if engine.replay(view.body, view.count, view.first_sequence, view.timestamp_ns) < 0:
                problem = 1
                break
            engine.digest(digest)
            if memcmp(digest, view.digest, 16) != 0:
                problem = 2
                break
            if helped and engine.wants_memory():
                memory.ask()
            frames += 1
            events += view.count
            done += view.body_length
    if problem == 1:
        reason = (<bytes>engine.replay_error_reason()).decode("ascii", "replace")
        raise port.RecoveryFailed(reader.file, view.offset, engine.replay_error_sequence() or view.first_sequence,
                                  f"the engine cannot follow this event: {reason}")
    if problem == 2:
        raise port.RecoveryFailed(reader.file, view.offset, view.first_sequence,
                                  f"after this frame the state's digest is {digest[:16].hex()}, the frame says "
                                  f"{(<bytes>view.digest[:16]).hex()}")
    if problem == 3:
        raise port.RecoveryFailed(reader.file, view.offset, view.first_sequence, "the snapshot ends inside this frame")
    if problem == 4:
        raise port.RecoveryFailed(reader.file, view.offset, view.first_sequence,
                                  f"records of {view.record_bytes} bytes, this engine reads {EVENT_BYTES}")
    if code < 0:
        reader.describe()
    return frames, events, code == 1


def load_image_piece(Engine engine not None, const uint8_t[::1] piece not None, *, MemoryThread memory=None):
    """Give a fresh engine the next piece of an image; False if it refuses it. The GIL is released meanwhile. `memory` must
    have ended before load_image_done."""
    cdef int code
    cdef bint helped = memory is not None
    if piece.shape[0] == 0:
        return False
    with nogil:
        code = engine.load_piece(&piece[0], <uint64_t>piece.shape[0])
        if code == 0 and helped and engine.wants_memory():
            memory.ask()
    return code == 0


def load_image_done(Engine engine not None):
    """The image is complete: rebuild indexes, check the digest; False if it does not match."""
    cdef int code
    with nogil:
        code = engine.load_done()
    return code == 0
