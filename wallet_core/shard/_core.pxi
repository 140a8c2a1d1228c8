# What the pipeline is made of: plain C memory, shared by the loop thread and the threads of all
# shards. Included by _host.pyx.
#
#   loop thread --Work--> queue --applying thread--> Group (events, done entries, deliveries) --committing thread--> disk
#        ^                                                                                             |
#        +---- completion list + eventfd <------------------------------- done entries ---------------+
#                                              other shards' queues <---- deliveries -----------------+
#
# A shard has two threads; either may apply and either may commit, one of each at a time (_shard.pxi).
#
# Ownership: a Work belongs to the queue, then to the thread that applies it, which frees it. A Group belongs to the thread
# that applies while it is `current`, to the one that commits while it is `syncing`. A Request belongs to whoever brings
# `remaining` to 0, then to the completion list, then to the loop thread, which frees it. Locks are held for pointer work only.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #include <time.h>
    #include <errno.h>
    #include <unistd.h>
    #include <pthread.h>
    #include <sys/eventfd.h>
    #include <stdio.h>
    #if defined(__linux__)
    #include <sys/prctl.h>
    #endif

    #define ducat_sub(p, n) __atomic_sub_fetch((p), (n), __ATOMIC_ACQ_REL)
    #define ducat_add(p, n) __atomic_add_fetch((p), (n), __ATOMIC_ACQ_REL)
    static inline uint64_t ducat_thread_ns(void) {      /* CPU time of the calling thread, 0.7 us a call */
        struct timespec t;
        if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)) return 0;
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline void ducat_max_u64(uint64_t *p, uint64_t v) {
        uint64_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
        while (old < v && !__atomic_compare_exchange_n(p, &old, v, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    }
    #define ducat_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define ducat_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    static inline void ducat_name_thread(const char *what, int number) {
        char name[16]; snprintf(name, sizeof name, "%s-%d", what, number);
    #if defined(__linux__)
        prctl(PR_SET_NAME, name);
    #endif
    }
    static inline int64_t ducat_now_ns(void) {
        struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    static inline int64_t ducat_monotonic_ns(void) {
        struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    static inline void ducat_rest_us(long us) { struct timespec t = {0, us * 1000}; nanosleep(&t, NULL); }
    /* like the monotonic clock, and it goes on while the machine sleeps */
    static inline int64_t ducat_boot_ns(void) {
    #if defined(CLOCK_BOOTTIME)
        struct timespec t; clock_gettime(CLOCK_BOOTTIME, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    #else
        return ducat_monotonic_ns();
    #endif
    }
    /* for ducat_cond_wait_ns, which must not wait longer because somebody sets the clock back */
    static inline void ducat_cond_init(pthread_cond_t *cond) {
        pthread_condattr_t monotonic;
        pthread_condattr_init(&monotonic);
        pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
        pthread_cond_init(cond, &monotonic);
        pthread_condattr_destroy(&monotonic);
    }
    /* waits at most wait_ns */
    static inline void ducat_cond_wait_ns(pthread_cond_t *cond, pthread_mutex_t *mutex, int64_t wait_ns) {
        struct timespec t;
        int64_t at = ducat_monotonic_ns() + (wait_ns < 0 ? 0 : wait_ns);
        t.tv_sec = at / 1000000000; t.tv_nsec = at % 1000000000;
        pthread_cond_timedwait(cond, mutex, &t);
    }
    static inline uint32_t ducat_slot(const uint8_t *id) { return (((uint32_t)id[14] << 8) | id[15]) & 0x0FFF; }
    static inline int ducat_same_id(const uint8_t *a, const uint8_t *b) { return memcmp(a, b, 16) == 0; }
    static inline int ducat_zero_id(const uint8_t *a) { uint64_t x, y; memcpy(&x, a, 8); memcpy(&y, a + 8, 8); return !(x | y); }
    /* index of the first byte that is not 1 at or after `at`, or `count` */
    static inline uint32_t ducat_next_failed(const uint8_t *results, uint32_t at, uint32_t count) {
        uint64_t word;
        while (at < count && (at & 7)) { if (results[at] != 1) return at; at++; }
        while (at + 8 <= count) {
            memcpy(&word, results + at, 8);
            if (word != 0x0101010101010101ull) break;
            at += 8;
        }
        while (at < count && results[at] == 1) at++;
        return at;
    }
    """
    void ducat_max_u64(uint64_t*, uint64_t) noexcept nogil
    uint32_t ducat_sub_u32 "ducat_sub" (uint32_t*, uint32_t) noexcept nogil
    uint32_t ducat_add_u32 "ducat_add" (uint32_t*, uint32_t) noexcept nogil
    int64_t ducat_sub_i64 "ducat_sub" (int64_t*, int64_t) noexcept nogil
    int64_t ducat_add_i64 "ducat_add" (int64_t*, int64_t) noexcept nogil
    int64_t ducat_load_i64 "ducat_load" (int64_t*) noexcept nogil
    void ducat_store_i64 "ducat_store" (int64_t*, int64_t) noexcept nogil
    uint64_t ducat_load_u64 "ducat_load" (uint64_t*) noexcept nogil
    void ducat_store_u64 "ducat_store" (uint64_t*, uint64_t) noexcept nogil
    int ducat_load_int "ducat_load" (int*) noexcept nogil
    void ducat_store_int "ducat_store" (int*, int) noexcept nogil
    int64_t ducat_now_ns() noexcept nogil
    uint64_t ducat_thread_ns() noexcept nogil
    void ducat_name_thread(const char*, int) noexcept nogil
    int64_t ducat_monotonic_ns() noexcept nogil
    void ducat_rest_us(long) noexcept nogil
    int64_t ducat_boot_ns() noexcept nogil
    void ducat_cond_init(pthread_cond_t*) noexcept nogil
    void ducat_cond_wait_ns(pthread_cond_t*, pthread_mutex_t*, int64_t) noexcept nogil
    uint32_t ducat_slot(const uint8_t*) noexcept nogil
    bint ducat_same_id(const uint8_t*, const uint8_t*) noexcept nogil
    bint ducat_zero_id(const uint8_t*) noexcept nogil
    uint32_t ducat_next_failed(const uint8_t*, uint32_t, uint32_t) noexcept nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_cond_init(pthread_cond_t*, void*)
    int pthread_cond_destroy(pthread_cond_t*)
    int pthread_cond_wait(pthread_cond_t*, pthread_mutex_t*)
    int pthread_cond_signal(pthread_cond_t*)
    int pthread_cond_broadcast(pthread_cond_t*)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int, int)
    int EFD_NONBLOCK, EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write" (int, const void*, size_t)
    ssize_t c_read "read" (int, void*, size_t)
    int c_close "close" (int)

cdef enum:
    SHARDS_MAX = SHARD_COUNT_MAX
    SLOT_COUNT = 4096
    ROWS_MAX = 8190                  # rows of one message
    GROUP_BYTES_MAX = 8388608        # events of one group commit; nothing is applied above this until the disk is done
    GROUP_FRAMES_MAX = 4096
    READ_BLOCK = 32                  # accounts that are looked for together
    CALL_ROWS_MAX = 256              # rows of one CreateTransfersRequest that travels with others
    DELIVERY_ROWS_MAX = 8190         # credits in one delivery
    REFUSALS_REPEATED_MAX = 256      # refusals of earlier deliveries that an outcome names again
    IMAGE_REST_US = 1000             # after each piece of an image, while requests are under way
    TIMED_ROWS = 256                 # batches of so many transfers are timed (WriterTimes)
    UNSETTLED_MAX = 1048576          # sends under way a shard; above it new transfers wait for settlements
    AWAY_AFTER_NS = 2000000000       # a destination that settles nothing for so long is not waited for

cdef enum WorkKind:
    WORK_TRANSFERS
    WORK_ACCOUNTS
    WORK_READ
    WORK_RESULTS
    WORK_LOCATE
    WORK_TOTALS
    WORK_HOLDS                       # chain marks and the holds that they stand for (_chains.pxi)
    WORK_CUT                         # everything the balance check needs of a shard, at one event (_chains.pxi)
    WORK_CHECK
    WORK_IMAGE_BEGIN
    WORK_IMAGE_END
    WORK_CREDITS                     # urgent: saga step 2
    WORK_OUTCOMES                    # urgent: saga step 3
    WORK_FORGET                      # urgent: the source has settled
    WORK_RESEND                      # urgent: deliver unsettled sends to a destination again (number 1: if they are stalled)
    WORK_TICK

cdef enum RequestStatus:
    STATUS_OK = 0
    STATUS_DISK_NEARLY_FULL = 1
    STATUS_ENGINE_FAILED = 2
    STATUS_CLOSED = 3

cdef enum RequestShape:
    SHAPE_MESSAGE = 0                # TransferBatch bytes in, TransferBatchResult bytes out
    SHAPE_WRAPPED = 1                # the same inside SubmitTransfersRequest / Response
    SHAPE_ROWS = 2
    SHAPE_ACCOUNTS = 3
    SHAPE_READ = 4
    SHAPE_RESULTS = 5
    SHAPE_TOTALS = 6
    SHAPE_CHECK = 7
    SHAPE_IMAGE = 8
    SHAPE_CALLS = 9                  # CreateTransfersRequests in, CreateTransfersResponses out
    SHAPE_HOLDS = 10
    SHAPE_CUT = 11
    SHAPE_ACCOUNT_MESSAGE = 12       # CreateAccountsRequest bytes in, CreateAccountsResponse bytes out
    SHAPE_READ_MESSAGE = 13          # GetAccountsRequest bytes in, an AccountsRead out

cdef struct Request:
    uint64_t ticket
    int shape
    int status
    uint64_t batch_id
    uint32_t count
    uint32_t remaining               # parts and saga rows that are not done
    uint32_t replayed
    uint32_t refused_full            # rows that a shard did not apply because its disk is nearly full
    uint32_t settled                 # 1: wait for sagas
    int waiter                       # 1: a thread waits for it (finished), 0: completion list
    int finished
    int locating                     # 1: holds are being looked for; not submitted yet
    int striping                     # 1: opens striped accounts; until it is done nobody knows where their transfers go
    uint64_t bytes_held              # for back-pressure
    uint8_t* results
    void* extra                      # shape's own memory (freed with the request)
    uint8_t* spare                   # gathered columns (freed with the request)
    void* message                    # PyObject*: what the columns point into
    TransferColumns columns
    uint32_t* row_index              # rows sorted by shard, all parts
    uint8_t* credit_shards           # u16 a row
    uint64_t* positions              # one a shard, 0 = not touched
    uint16_t* located                # shard of each row's hold, where rows do not name accounts
    uint64_t* before                 # one a shard: its durable sequence number before the reading
    uint32_t part_count
    uint32_t entry_count
    Request* next

cdef struct Work:
    int kind
    Request* request
    TransferColumns columns
    uint16_t peer                    # source or destination shard of a delivery
    uint32_t count
    uint64_t number                  # first saga number, or upto
    uint64_t after                   # credits: the source has settled up to it; outcomes: every refusal above it is named
    uint64_t position                # outcomes: the credit shard's sequence number that includes them
    uint8_t* data                    # delivery's own memory
    Work* next

cdef struct FrameEntry:
    size_t offset
    FrameInfo info

cdef struct DoneEntry:
    Request* request
    uint32_t decrement

cdef struct Group:
    EventBuffer events
    FrameEntry* frames
    uint32_t frame_count, frame_capacity
    DoneEntry* dones
    uint32_t done_count, done_capacity
    Work* deliveries                 # in order, sent once the group is durable
    Work* deliveries_tail
    int sealed                       # an image begins behind it: no further frame
    Request* image                   # gets the hash of the group's last frame

# a row of a saga that somebody waits for; number = ring position
cdef struct Waiting:
    Request* request                 # NULL: nobody waits
    uint32_t row

cdef struct WaitRing:
    Waiting* entries
    uint64_t size                    # power of two
    uint64_t first                   # lowest number not settled
    uint64_t last                    # highest number sent

cdef struct LateWait:                # a repeated id whose saga is still under way
    Request* request
    uint32_t row
    uint8_t id[16]

cdef struct WriterTimes:             # what the writer's threads did in some time, in ns; cpu: of the thread, so what it waited for is not in it
    uint64_t batches, rows           # of at least TIMED_ROWS transfers
    uint64_t apply_cpu, apply_cpu_max, apply_max
    uint64_t commits, commit_max
    uint64_t pause, pause_max        # in the writer's thread, for nothing but a snapshot: to begin and to end its image

# Nothing of a log that was restored whole can look like this: it is older than what it had acknowledged to this peer.
cdef struct Rewound:
    int sends_seen                   # the peer has taken sends up to `sends_expected`, this log ends with `sends_found`
    int credits_seen                 # the peer has settled credits up to `credits_expected`, this log has them to `credits_found`
    uint64_t sends_expected
    uint64_t sends_found
    uint64_t credits_expected
    uint64_t credits_found

cdef struct ShardCore:
    pthread_mutex_t mutex
    pthread_cond_t work_ready        # both threads wait here
    Work* urgent_head
    Work* urgent_tail
    Work* head
    Work* tail
    int present                      # this process owns the shard
    int closing
    int idle                         # threads that wait
    int applying                     # one thread is
    int committing                   # the other (or the only busy) one is
    int stopped                      # poisoned: nothing further is applied
    int away_count                   # destinations that are not waited for; the apply thread's
    int wants_memory                 # under the host's mutex: the engine asks for new memory to be touched
    int tick
    uint16_t shard
    Group groups[2]
    Group* current
    Group* syncing                   # is being made durable, or waits for a thread that does
    # published after each piece of work, for status
    EngineCounters counters
    uint8_t digest[16]
    uint64_t queued
    WriterTimes times[2]             # since the last snapshot was done, and beside the one that is being written
    WriterTimes told[2]              # the same of the last one that is done
    int imaging                      # 1: a snapshot is being written
    uint64_t gap_count               # deliveries that did not follow the cursor (a relay resends)
    Rewound rewound[SHARDS_MAX]      # by peer; under the host's mutex, `seen` atomically

cdef struct HostCore:
    pthread_mutex_t mutex
    pthread_cond_t finished          # waiter requests
    Request* done_head
    Request* done_tail
    pthread_cond_t memory_wanted     # the memory thread waits here
    int event_fd
    int failed                       # a shard is poisoned
    int closing
    int rewound_count                # findings in all shards' `rewound`
    int watching                     # somebody waits for durable sequence numbers: wake the loop at each sync
    int64_t rows_held                # rows and bytes of requests under way
    int64_t bytes_held
    uint32_t shard_count
    uint16_t shard_of_slot[SLOT_COUNT]
    ShardCore* shards[SHARDS_MAX]
    Work* outbound_head              # deliveries for shards of other processes
    Work* outbound_tail


cdef void request_free(Request* request) noexcept nogil:
    if request != NULL:
        free(request.results)
        free(request.extra)
        free(request.spare)
        free(request.row_index)
        free(request.credit_shards)
        free(request.positions)
        free(request.located)
        free(request.before)
        free(request)


cdef void work_free(Work* work) noexcept nogil:
    if work != NULL:
        free(work.data)
        free(work)


cdef Work* work_new(int kind, Request* request) noexcept nogil:
    cdef Work* work = <Work*>calloc(1, sizeof(Work))
    if work != NULL:
        work.kind, work.request = kind, request
    return work


cdef void shard_push(ShardCore* core, Work* work, bint urgent) noexcept nogil:
    """Hand work to a shard's threads."""
    work.next = NULL
    pthread_mutex_lock(&core.mutex)
    if urgent:
        if core.urgent_tail == NULL:
            core.urgent_head = work
        else:
            core.urgent_tail.next = work
        core.urgent_tail = work
    else:
        if core.tail == NULL:
            core.head = work
        else:
            core.tail.next = work
        core.tail = work
    core.queued += 1
    pthread_cond_signal(&core.work_ready)
    pthread_mutex_unlock(&core.mutex)


cdef void host_wake(HostCore* host) noexcept nogil:
    cdef uint64_t one = 1
    c_write(host.event_fd, &one, 8)


cdef void host_complete(HostCore* host, Request* request) noexcept nogil:
    """A request is done; called by whoever brought `remaining` to zero."""
    cdef bint wake
    request.next = NULL
    pthread_mutex_lock(&host.mutex)
    if request.waiter:
        request.finished = 1
        pthread_cond_broadcast(&host.finished)
        pthread_mutex_unlock(&host.mutex)
        return
    wake = host.done_head == NULL
    if host.done_tail == NULL:
        host.done_head = request
    else:
        host.done_tail.next = request
    host.done_tail = request
    pthread_mutex_unlock(&host.mutex)
    if wake:
        host_wake(host)


cdef inline void request_done(HostCore* host, Request* request, uint32_t parts) noexcept nogil:
    if ducat_sub_u32(&request.remaining, parts) == 0:
        host_complete(host, request)


cdef void host_deliver(HostCore* host, uint16_t destination, Work* work) noexcept nogil:
    """Saga traffic to another shard: its queue if it lives here, else the outbound list that a relay drains."""
    cdef bint wake
    cdef ShardCore* core = host.shards[destination] if destination < SHARDS_MAX else NULL
    if core != NULL:
        shard_push(core, work, True)
        return
    work.columns.count = destination       # the relay's address
    work.next = NULL
    pthread_mutex_lock(&host.mutex)
    wake = host.outbound_head == NULL
    if host.outbound_tail == NULL:
        host.outbound_head = work
    else:
        host.outbound_tail.next = work
    host.outbound_tail = work
    pthread_mutex_unlock(&host.mutex)
    if wake:
        host_wake(host)


cdef int group_done(Group* group, Request* request, uint32_t parts) noexcept nogil:
    cdef uint32_t capacity
    cdef DoneEntry* larger
    if group.done_count and group.dones[group.done_count - 1].request == request:
        group.dones[group.done_count - 1].decrement += parts
        return 0
    if group.done_count == group.done_capacity:
        capacity = 2 * group.done_capacity if group.done_capacity else 64
        larger = <DoneEntry*>realloc(group.dones, capacity * sizeof(DoneEntry))
        if larger == NULL:
            return -1
        group.dones, group.done_capacity = larger, capacity
    group.dones[group.done_count].request = request
    group.dones[group.done_count].decrement = parts
    group.done_count += 1
    return 0


cdef void group_deliver(Group* group, uint16_t destination, Work* work) noexcept nogil:
    work.columns.count = destination       # until it is handed over
    work.next = NULL
    if group.deliveries_tail == NULL:
        group.deliveries = work
    else:
        group.deliveries_tail.next = work
    group.deliveries_tail = work


cdef inline bint group_empty(Group* group) noexcept nogil:
    return group.frame_count == 0 and group.done_count == 0 and group.deliveries == NULL


cdef int wait_reserve(WaitRing* ring, uint64_t upto) noexcept nogil:
    """Room for numbers first..upto."""
    cdef uint64_t size = ring.size if ring.size else 1024, at
    cdef Waiting* larger
    if upto - ring.first + 1 <= ring.size:
        return 0
    while upto - ring.first + 1 > size:
        size *= 2
    larger = <Waiting*>calloc(size, sizeof(Waiting))
    if larger == NULL:
        return -1
    at = ring.first
    while at <= ring.last and ring.size:
        larger[at & (size - 1)] = ring.entries[at & (ring.size - 1)]
        at += 1
    free(ring.entries)
    ring.entries, ring.size = larger, size
    return 0
