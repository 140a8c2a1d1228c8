# One shard's two threads. Included by _host.pyx.

cdef struct ImageInfo:
    uint64_t sequence
    uint64_t timestamp_ns
    uint32_t epoch
    uint8_t digest[16]
    uint8_t hash[16]

cdef struct TotalsPart:
    uint32_t count
    CurrencyTotal* totals

cdef struct ReadEntry:
    uint32_t id_index
    uint32_t found
    AccountState state


cdef enum:
    CLOCK_STEP_S_MAX = 3600                  # of the machine's clock that is followed

cdef class ShardClock:
    """Where shards get their time from: the machine's clock, or a time that a test sets.

    What a shard has written with a time stays so for ever: holds end, ids become too old. So a step of the machine's clock by
    more than an hour, which the clock that counts from the machine's start did not make, is not followed, in either direction: time goes on from before
    it, until the clock is back or the process is started again. Shards themselves never let time run backwards."""

    cdef int64_t fixed_ns
    cdef int64_t shift_ns                    # tests: as if the machine's clock had been set
    cdef int64_t base_ns                     # machine's clock - clock since its start, as it is followed; 0 = not looked yet
    cdef int64_t held_ns                     # the step that is not followed, 0 = none

    def __init__(self, int64_t fixed_ns=0):
        self.fixed_ns = fixed_ns

    def set(self, int64_t now_ns):
        """Stand still at this unix time; call the host's `tick` for holds to expire by it. 0: the machine's clock."""
        ducat_store_i64(&self.fixed_ns, now_ns)

    def shift(self, int64_t by_ns):
        """As if somebody set the machine's clock: from now on it is ahead by that much."""
        ducat_store_i64(&self.shift_ns, by_ns)

    @property
    def now_ns(self):
        """The time that shards would see now."""
        return self.now()

    @property
    def held_step_s(self):
        """By how many seconds the machine's clock is ahead of the shards' (negative: behind), if that is not followed; else 0."""
        self.now()
        return ducat_load_i64(&self.held_ns) / 1e9

    cdef int64_t now(self) noexcept nogil:
        cdef int64_t boot, base, step_max = <int64_t>CLOCK_STEP_S_MAX * 1000000000
        cdef int64_t followed = ducat_load_i64(&self.fixed_ns)
        if followed:
            return followed
        boot = ducat_boot_ns()
        base = ducat_now_ns() + ducat_load_i64(&self.shift_ns) - boot
        followed = ducat_load_i64(&self.base_ns)
        if followed == 0 or -step_max <= base - followed <= step_max:
            ducat_store_i64(&self.base_ns, base)
            ducat_store_i64(&self.held_ns, 0)
            return boot + base
        ducat_store_i64(&self.held_ns, base - followed)
        return boot + followed


cdef class Shard:
    """The engine and the log of one shard with their threads. Made and driven by ShardHost."""

    cdef Engine engine
    cdef FileLog log
    cdef ShardClock clock
    cdef HostCore* host
    cdef ShardCore core
    cdef uint16_t shard
    cdef int64_t now_ns
    cdef int64_t space_checked_ns
    cdef uint64_t sent[SHARDS_MAX]           # highest saga number handed to a delivery, by destination
    cdef WaitRing waiting[SHARDS_MAX]
    cdef uint64_t seen_settled[SHARDS_MAX]   # when the relay last asked whether a destination is stalled
    cdef uint64_t seen_last[SHARDS_MAX]
    cdef uint32_t stalled_count[SHARDS_MAX]  # times that it asked since anything was settled
    cdef int64_t stands_since_ns[SHARDS_MAX] # nothing has been settled since, though something was sent; 0 = it goes on
    cdef uint64_t stands_at[SHARDS_MAX]
    cdef uint8_t away[SHARDS_MAX]            # it stands for so long that nobody waits for it
    cdef LateWait* late
    cdef uint32_t late_count, late_capacity
    cdef PendingSend* sends
    cdef uint8_t* credit_results
    cdef Refusal* refusals
    cdef list threads
    cdef object snapshot_sequence

    def __cinit__(self):
        memset(&self.core, 0, sizeof(ShardCore))
        pthread_mutex_init(&self.core.mutex, NULL)
        ducat_cond_init(&self.core.work_ready)
        self.core.current = &self.core.groups[0]
        self.sends = <PendingSend*>malloc(DELIVERY_ROWS_MAX * sizeof(PendingSend))
        self.credit_results = <uint8_t*>malloc(DELIVERY_ROWS_MAX)
        self.refusals = <Refusal*>malloc(DELIVERY_ROWS_MAX * sizeof(Refusal))
        if self.sends == NULL or self.credit_results == NULL or self.refusals == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef int i
        cdef Work* work
        for i in range(2):
            free(self.core.groups[i].events.data)
            free(self.core.groups[i].frames)
            free(self.core.groups[i].dones)
            while self.core.groups[i].deliveries != NULL:
                work = self.core.groups[i].deliveries
                self.core.groups[i].deliveries = work.next
                work_free(work)
        while self.core.head != NULL:
            work = self.core.head
            self.core.head = work.next
            work_free(work)
        while self.core.urgent_head != NULL:
            work = self.core.urgent_head
            self.core.urgent_head = work.next
            work_free(work)
        for i in range(SHARDS_MAX):
            free(self.waiting[i].entries)
        free(self.late)
        free(self.sends)
        free(self.credit_results)
        free(self.refusals)
        pthread_mutex_destroy(&self.core.mutex)
        pthread_cond_destroy(&self.core.work_ready)

    # ---- the two threads ----
    #
    # Both do the same: apply work, or make a group durable. One thing of each kind at a time, so the engine and the log have
    # one user each. Whoever has applied and finds nothing further to apply commits by itself: a single transfer is handed over
    # to no other thread. Where there is more to apply, the other one commits meanwhile.

    def work_loop(self):
        ducat_name_thread(b"shard", self.shard)
        with nogil:
            self.work_run()

    cdef void work_run(self) noexcept nogil:
        cdef ShardCore* core = &self.core
        cdef bint more, room
        pthread_mutex_lock(&core.mutex)
        while not core.stopped:
            if core.syncing == NULL and not core.applying and not group_empty(core.current):
                core.syncing = core.current
                core.current = &core.groups[1] if core.current == &core.groups[0] else &core.groups[0]
            room = not (core.current.sealed or core.current.events.length >= GROUP_BYTES_MAX
                        or core.current.frame_count >= GROUP_FRAMES_MAX)
            more = room and not core.applying and (
                core.urgent_head != NULL or core.tick or (core.head != NULL and self.may_begin()))
            if core.syncing != NULL and not core.committing:
                if not (more and core.idle):
                    self.commit_group()
                    continue
                pthread_cond_signal(&core.work_ready)
            if more:
                self.apply_next()
                continue
            if core.closing and core.head == NULL and core.urgent_head == NULL and not core.applying \
                    and group_empty(core.current) and core.syncing == NULL:
                break
            self.rest()
        pthread_cond_broadcast(&core.work_ready)
        pthread_mutex_unlock(&core.mutex)

    cdef inline bint may_begin(self) noexcept nogil:
        return self.core.closing or self.core.away_count or self.core.counters.unsettled_count < UNSETTLED_MAX

    cdef void rest(self) noexcept nogil:
        """Wait for work, for the other thread, or until a hold expires. The mutex is held."""
        cdef ShardCore* core = &self.core
        cdef uint64_t deadline = 0
        cdef int64_t left
        if not core.applying and not core.tick and not core.closing and self.clock.fixed_ns == 0:
            deadline = self.engine.next_deadline_ns()
        if deadline:
            left = <int64_t>deadline - self.clock.now()
            if left <= 0:
                core.tick = 1
                return
        core.idle += 1
        if deadline:
            ducat_cond_wait_ns(&core.work_ready, &core.mutex, left)
        else:
            pthread_cond_wait(&core.work_ready, &core.mutex)
        core.idle -= 1

    cdef void apply_next(self) noexcept nogil:
        """One piece of work. The mutex is held."""
        cdef ShardCore* core = &self.core
        cdef Work* work = NULL
        cdef EngineCounters counters
        cdef uint8_t digest[16]
        cdef int kind
        cdef uint32_t rows
        cdef uint64_t cpu_ns = 0
        cdef int64_t began_ns = 0
        if core.urgent_head != NULL:
            work = core.urgent_head
            core.urgent_head = work.next
            if core.urgent_head == NULL:
                core.urgent_tail = NULL
            core.queued -= 1
        elif core.tick:
            core.tick = 0
            work = work_new(WORK_TICK, NULL)
            if work == NULL:
                return
        else:
            work = core.head
            core.head = work.next
            if core.head == NULL:
                core.tail = NULL
            core.queued -= 1
        core.applying = 1
        kind, rows = work.kind, work.columns.count
        pthread_mutex_unlock(&core.mutex)
        if kind == WORK_IMAGE_BEGIN or kind == WORK_IMAGE_END or (kind == WORK_TRANSFERS and rows >= TIMED_ROWS):
            began_ns, cpu_ns = ducat_monotonic_ns(), ducat_thread_ns()
        if self.apply_one(work) < 0:
            self.fail()
        if began_ns:
            cpu_ns = ducat_thread_ns() - cpu_ns
            began_ns = ducat_monotonic_ns() - began_ns
        if self.engine.wants_memory():
            self.ask_memory()
        work_free(work)
        self.engine.counters(&counters)
        self.engine.digest(digest)
        pthread_mutex_lock(&core.mutex)
        core.applying = 0
        if kind == WORK_IMAGE_BEGIN and core.current.sealed:
            core.imaging = 1
        if began_ns:
            self.note_apply(&core.times[core.imaging], kind, rows, cpu_ns, <uint64_t>began_ns)
        core.counters = counters
        memcpy(core.digest, digest, 16)

    cdef void note_apply(self, WriterTimes* times, int kind, uint32_t rows, uint64_t cpu_ns, uint64_t wall_ns) noexcept nogil:
        """The mutex is held."""
        if kind != WORK_TRANSFERS:
            times.pause += wall_ns
            times.pause_max = max(times.pause_max, wall_ns)
            return
        times.batches += 1
        times.rows += rows
        times.apply_cpu += cpu_ns
        times.apply_cpu_max = max(times.apply_cpu_max, cpu_ns)
        times.apply_max = max(times.apply_max, wall_ns)

    cdef void commit_group(self) noexcept nogil:
        """Make `syncing` durable. The mutex is held."""
        cdef ShardCore* core = &self.core
        cdef WriterTimes* times
        cdef int64_t began_ns = ducat_monotonic_ns()
        core.committing = 1
        if core.idle and (core.urgent_head != NULL or core.head != NULL or core.tick):
            pthread_cond_signal(&core.work_ready)
        pthread_mutex_unlock(&core.mutex)
        if self.commit(core.syncing) < 0:
            self.fail()
        pthread_mutex_lock(&core.mutex)
        times = &core.times[core.imaging]
        times.commits += 1
        times.commit_max = max(times.commit_max, <uint64_t>(ducat_monotonic_ns() - began_ns))
        core.syncing = NULL
        core.committing = 0

    cdef void ask_memory(self) noexcept nogil:
        """Let the memory thread touch what the engine will need next: page faults cost more than transfers."""
        if self.core.wants_memory:
            return
        pthread_mutex_lock(&self.host.mutex)
        self.core.wants_memory = 1
        pthread_cond_signal(&self.host.memory_wanted)
        pthread_mutex_unlock(&self.host.mutex)

    cdef int64_t now(self) noexcept nogil:
        cdef int64_t now = self.clock.now()
        if now > self.now_ns:
            self.now_ns = now
        return self.now_ns

    cdef int apply_one(self, Work* work) noexcept nogil:
        """0, or -1: this shard must stop."""
        cdef Group* group = self.core.current
        if work.kind == WORK_TRANSFERS:
            return self.apply_transfers(work, group)
        if work.kind == WORK_CREDITS:
            return self.apply_credits(work, group)
        if work.kind == WORK_OUTCOMES:
            return self.apply_outcomes(work, group)
        if work.kind == WORK_ACCOUNTS:
            return self.apply_accounts(work, group)
        if work.kind == WORK_READ:
            return self.read_accounts(work, group)
        if work.kind == WORK_RESULTS:
            return self.read_results(work, group)
        if work.kind == WORK_LOCATE:
            return self.locate(work)
        if work.kind == WORK_FORGET:
            self.engine.forget_refusals(work.peer, work.number)
            return 0
        if work.kind == WORK_RESEND:
            return self.resend(work, group)
        if work.kind == WORK_TICK:
            return self.expire(group)
        if work.kind == WORK_TOTALS:
            return self.read_totals(work, group)
        if work.kind == WORK_HOLDS:
            return self.read_chain_holds(work, group)
        if work.kind == WORK_CUT:
            return self.read_cut(work, group)
        if work.kind == WORK_CHECK:
            work.request.results[work.number] = 1 if self.engine.check_digest() else 0
            return self.finish_read(work.request, group)
        if work.kind == WORK_IMAGE_BEGIN:
            return self.begin_image(work, group)
        if work.kind == WORK_IMAGE_END:
            self.engine.end_image()
            request_done(self.host, work.request, 1)
            return 0
        return -1

    cdef int close_frame(self, Group* group, size_t offset, uint32_t count_before) noexcept nogil:
        """What was appended to the group's events since becomes one frame."""
        cdef uint32_t count = group.events.count - count_before, capacity
        cdef FrameEntry* larger
        cdef FrameEntry* entry
        cdef EngineCounters counters
        if count == 0:
            return 0
        if group.frame_count == group.frame_capacity:
            capacity = 2 * group.frame_capacity if group.frame_capacity else 64
            larger = <FrameEntry*>realloc(group.frames, capacity * sizeof(FrameEntry))
            if larger == NULL:
                return -1
            group.frames, group.frame_capacity = larger, capacity
        self.engine.counters(&counters)
        entry = &group.frames[group.frame_count]
        entry.offset = offset
        entry.info.first_sequence = counters.sequence - count + 1
        entry.info.timestamp_ns = counters.now_ns
        entry.info.count = count
        entry.info.body_length = <uint32_t>(group.events.length - offset)
        self.engine.digest(entry.info.digest)
        group.frame_count += 1
        return 0

    cdef int apply_transfers(self, Work* work, Group* group) noexcept nogil:
        cdef Request* request = work.request
        cdef size_t offset = group.events.length
        cdef uint32_t count_before = group.events.count
        cdef uint64_t repeated = self.core.counters.repeated_count
        cdef EngineCounters counters
        if not self.log.writable():
            return self.refuse_full_rows(work, group)
        if self.engine.apply_transfers(&work.columns, <uint64_t>self.now(), request.results, &group.events) < 0:
            return -1
        if self.close_frame(group, offset, count_before) < 0:
            return -1
        self.engine.counters(&counters)
        if counters.repeated_count != repeated:
            ducat_add_u32(&request.replayed, <uint32_t>(counters.repeated_count - repeated))
        ducat_max_u64(&request.positions[self.shard], counters.sequence)
        if work.columns.credit_shards != NULL and self.send_credits(work, group) < 0:
            return -1
        if counters.sequence <= self.log._durable_sequence and group_empty(group):
            request_done(self.host, request, 1)       # nothing new was written, and all that it saw is on disk
            return 0
        return group_done(group, request, 1)

    cdef int refuse_full_rows(self, Work* work, Group* group) noexcept nogil:
        """Other shards may apply their rows of the batch, so each row of this one says that it was not applied, or what it once
        was answered with. Where no shard knows or applied any, the batch as a whole is refused (_finish)."""
        cdef Request* request = work.request
        cdef uint32_t known = self.engine.answer_known(&work.columns, request.results, TOO_MANY_PENDING)
        ducat_add_u32(&request.refused_full, work.columns.count - known)
        self.look_for_room()
        if known == 0 or (self.core.counters.sequence <= self.log._durable_sequence and group_empty(group)):
            request_done(self.host, request, 1)
            return 0
        ducat_max_u64(&request.positions[self.shard], self.core.counters.sequence)
        return group_done(group, request, 1)

    cdef int refuse_full(self, Request* request) noexcept nogil:
        self.look_for_room()
        request.status = STATUS_DISK_NEARLY_FULL
        request_done(self.host, request, 1)
        return 0

    cdef void look_for_room(self) noexcept nogil:
        cdef int64_t now = ducat_monotonic_ns()
        if now - self.space_checked_ns > 200000000:
            self.space_checked_ns = now
            self.log.retry_space()

    cdef int apply_accounts(self, Work* work, Group* group) noexcept nogil:
        cdef AccountColumns columns
        cdef size_t offset = group.events.length
        cdef uint32_t count_before = group.events.count
        cdef Request* request = work.request
        if not self.log.writable():
            return self.refuse_full(request)
        memcpy(&columns, work.data, sizeof(AccountColumns))
        columns.rows, columns.count = work.columns.rows, work.columns.count
        # striped accounts are opened on every shard: each shard answers into results of its own
        if self.engine.apply_accounts(&columns, work.number != 0, <uint64_t>self.now(),
                                      request.results + <size_t>work.peer * request.count, &group.events) < 0:
            return -1
        if self.close_frame(group, offset, count_before) < 0:
            return -1
        ducat_max_u64(&request.positions[self.shard], self.engine.sequence())
        return group_done(group, request, 1)

    cdef int finish_read(self, Request* request, Group* group) noexcept nogil:
        """Answer a read once everything it saw is durable."""
        cdef uint64_t sequence = self.engine.sequence()
        ducat_max_u64(&request.positions[self.shard], sequence)
        if sequence <= self.log._durable_sequence and group_empty(group):
            request_done(self.host, request, 1)
            return 0
        return group_done(group, request, 1)

    cdef int read_accounts(self, Work* work, Group* group) noexcept nogil:
        cdef ReadEntry* entries = <ReadEntry*>work.request.extra
        cdef ReadEntry* entry
        cdef const uint8_t* ids = work.columns.ids
        cdef uint32_t i, start = 0, end
        cdef bint record
        while start < work.columns.count:
            end = min(start + READ_BLOCK, work.columns.count)
            for record in range(2):          # first the places in the index of a block, then the records
                for i in range(start, end):
                    self.engine.prefetch_account(ids + 16 * <size_t>entries[work.columns.rows[i]].id_index, record)
            for i in range(start, end):
                entry = &entries[work.columns.rows[i]]
                entry.found = self.engine.find_account(ids + 16 * <size_t>entry.id_index, &entry.state)
            start = end
        return self.finish_read(work.request, group)

    cdef int read_results(self, Work* work, Group* group) noexcept nogil:
        cdef uint32_t i
        cdef uint8_t* out = work.request.results + <size_t>work.peer * work.request.count
        for i in range(work.columns.count):
            out[i] = self.engine.find_result(work.columns.ids + 16 * <size_t>i)
        return self.finish_read(work.request, group)

    cdef int locate(self, Work* work) noexcept nogil:
        """Which holds of the batch are known here, or which posts and voids themselves; rows of other shards are left alone.
        The id of a hold may be forgotten while it is held, and before that of its post."""
        cdef Request* request = work.request
        cdef uint16_t* located = request.located
        cdef const uint8_t* hold_id
        cdef uint32_t row
        for row in range(request.count):
            if located[row] != LOCATE_WANTED:
                continue
            hold_id = request.columns.pending_ids + 16 * <size_t>row
            if self.engine.find_result(hold_id) or self.engine.has_hold(hold_id) \
                    or self.engine.find_result(request.columns.ids + 16 * <size_t>row):
                located[row] = self.shard
        request_done(self.host, request, 1)
        return 0

    cdef int read_totals(self, Work* work, Group* group) noexcept nogil:
        cdef TotalsPart* part = &(<TotalsPart*>work.request.extra)[work.number]
        cdef uint32_t capacity = 64, count
        while True:
            free(part.totals)
            part.totals = <CurrencyTotal*>malloc(capacity * sizeof(CurrencyTotal))
            if part.totals == NULL:
                return -1
            count = self.engine.totals(part.totals, capacity)
            if count <= capacity:
                break
            capacity = count
        part.count = count
        return self.finish_read(work.request, group)

    cdef int read_chain_holds(self, Work* work, Group* group) noexcept nogil:
        if chain_holds_read(self.engine, work.columns.ids, work.number, <Blob*>work.request.extra) < 0:
            return self.give_up_blob(work)
        return self.finish_read(work.request, group)

    cdef int read_cut(self, Work* work, Group* group) noexcept nogil:
        if cut_read(self.engine, self.host.shard_count, self.shard, <Blob*>work.request.extra) < 0:
            return self.give_up_blob(work)
        return self.finish_read(work.request, group)

    cdef int give_up_blob(self, Work* work) noexcept nogil:
        """No memory for an answer: that is no reason to stop the shard, whose state is as good as before."""
        cdef Blob* blob = <Blob*>work.request.extra
        free(blob.data)
        blob.data = NULL
        work.request.status = STATUS_ENGINE_FAILED
        request_done(self.host, work.request, 1)
        return 0

    cdef int expire(self, Group* group) noexcept nogil:
        cdef size_t offset = group.events.length
        cdef uint32_t count_before = group.events.count
        if self.engine.expire_holds(<uint64_t>self.now(), &group.events) < 0:
            return -1
        return self.close_frame(group, offset, count_before)

    cdef int begin_image(self, Work* work, Group* group) noexcept nogil:
        cdef ImageInfo* info = <ImageInfo*>work.request.extra
        cdef EngineCounters counters
        if self.engine.begin_image() < 0:
            work.request.status = STATUS_ENGINE_FAILED
            request_done(self.host, work.request, 1)
            return 0
        self.engine.counters(&counters)
        info.sequence, info.timestamp_ns, info.epoch = counters.sequence, counters.now_ns, self.log.epoch
        self.engine.digest(info.digest)
        group.sealed, group.image = 1, work.request
        return group_done(group, work.request, 1)

    # ---- sagas ----

    cdef int send_credits(self, Work* work, Group* group) noexcept nogil:
        """New sends of this batch become deliveries of this group; rows that wait for them are noted."""
        cdef uint32_t destination
        cdef Request* request = work.request
        for destination in range(self.host.shard_count):
            if destination != self.shard and self.send_to(<uint16_t>destination, work, group) < 0:
                return -1
        if request.settled:
            return self.note_late(work)
        return 0

    cdef int look_whether_it_stands(self, uint16_t destination, uint64_t settled, uint64_t last, Group* group) noexcept nogil:
        """After AWAY_AFTER_NS without progress its process is taken to be away: rows that wait for it are answered IN_FLIGHT
        (which they are), new ones at once, and the shard no longer waits for settlements before it takes further work."""
        cdef int64_t now = self.clock.now()
        if settled == last or settled != self.stands_at[destination] or self.stands_since_ns[destination] == 0:
            self.stands_at[destination] = settled
            self.stands_since_ns[destination] = now if settled < last else 0
            return 0
        if self.away[destination] or now - self.stands_since_ns[destination] < AWAY_AFTER_NS:
            return 0
        self.away[destination] = 1
        self.core.away_count += 1
        return self.let_go(destination, group)

    cdef int let_go(self, uint16_t destination, Group* group) noexcept nogil:
        cdef WaitRing* ring = &self.waiting[destination]
        cdef Waiting* waiting
        cdef uint64_t number = ring.first
        cdef uint32_t i
        while ring.size and number <= ring.last:
            waiting = &ring.entries[number & (ring.size - 1)]
            if waiting.request != NULL and group_done(group, waiting.request, 1) < 0:
                return -1
            waiting.request = NULL
            number += 1
        for i in range(self.late_count):       # whichever destination they wait for
            if group_done(group, self.late[i].request, 1) < 0:
                return -1
        self.late_count = 0
        return 0

    cdef void is_back(self, uint16_t destination) noexcept nogil:
        self.stands_since_ns[destination] = 0
        if self.away[destination]:
            self.away[destination] = 0
            self.core.away_count -= 1

    cdef int send_to(self, uint16_t destination, Work* work, Group* group) noexcept nogil:
        cdef uint64_t settled, last, number
        cdef uint32_t count, i, at = 0, row
        cdef Request* request = NULL if work == NULL else work.request
        cdef WaitRing* ring = &self.waiting[destination]
        cdef Waiting* waiting
        cdef const uint8_t* shards = NULL if work == NULL else work.columns.credit_shards
        cdef Work* delivery
        self.engine.send_span(destination, &settled, &last)
        number = self.sent[destination] + 1
        if number > last or ducat_load_int(&self.core.rewound[destination].sends_seen):
            return 0
        if ring.size == 0:
            ring.first = number
            ring.last = number - 1
        if wait_reserve(ring, last) < 0:
            return -1
        while number <= last:
            count = self.engine.read_sends(destination, number, DELIVERY_ROWS_MAX, self.sends)
            if count == 0:
                return -1
            delivery = self.pack_credits(count)
            if delivery == NULL:
                return -1
            delivery.peer, delivery.number, delivery.after = self.shard, number, settled
            group_deliver(group, destination, delivery)
            for i in range(count):
                waiting = &ring.entries[(number + i) & (ring.size - 1)]
                waiting.request = NULL
                if request != NULL and request.settled and not self.away[destination]:
                    while at < work.columns.count:
                        row = work.columns.rows[at] if work.columns.rows != NULL else at
                        at += 1
                        if request.results[row] == IN_FLIGHT \
                                and shards[2 * <size_t>row] == (destination & 0xFF) \
                                and shards[2 * <size_t>row + 1] == (destination >> 8) \
                                and ducat_same_id(self.sends[i].id, work.columns.ids + 16 * <size_t>row):
                            waiting.request, waiting.row = request, row
                            request.results[row] = IN_FLIGHT_WAITING
                            ducat_add_u32(&request.remaining, 1)
                            break
            number += count
            ring.last = number - 1
        self.sent[destination] = last
        return 0

    cdef Work* pack_credits(self, uint32_t count) noexcept nogil:
        """self.sends as credit columns: amounts, ids, credit ids, currencies, codes."""
        cdef Work* work = work_new(WORK_CREDITS, NULL)
        cdef uint8_t* at
        cdef uint32_t i
        cdef PendingSend* send
        if work == NULL:
            return NULL
        work.data = <uint8_t*>malloc(<size_t>count * CREDIT_ROW_BYTES)
        if work.data == NULL:
            free(work)
            return NULL
        at = work.data
        for i in range(count):
            send = &self.sends[i]
            memcpy(at + 8 * <size_t>i, &send.amount, 8)
            memcpy(at + 8 * <size_t>count + 16 * <size_t>i, send.id, 16)
            memcpy(at + 24 * <size_t>count + 16 * <size_t>i, send.credit_id, 16)
            memcpy(at + 40 * <size_t>count + 4 * <size_t>i, &send.currency, 4)
            memcpy(at + 44 * <size_t>count + 2 * <size_t>i, &send.code, 2)
        work.count = count
        return work

    cdef int note_late(self, Work* work) noexcept nogil:
        """Rows still IN_FLIGHT without a new send repeat an id whose saga is under way: wait for that saga."""
        cdef Request* request = work.request
        cdef uint32_t at, row, capacity
        cdef LateWait* larger
        for at in range(work.columns.count):
            row = work.columns.rows[at] if work.columns.rows != NULL else at
            if request.results[row] == IN_FLIGHT_WAITING:
                request.results[row] = IN_FLIGHT
            elif request.results[row] == IN_FLIGHT and self.core.away_count == 0:
                if self.late_count == self.late_capacity:
                    capacity = 2 * self.late_capacity if self.late_capacity else 64
                    larger = <LateWait*>realloc(self.late, capacity * sizeof(LateWait))
                    if larger == NULL:
                        return -1
                    self.late, self.late_capacity = larger, capacity
                self.late[self.late_count].request, self.late[self.late_count].row = request, row
                memcpy(self.late[self.late_count].id, work.columns.ids + 16 * <size_t>row, 16)
                self.late_count += 1
                ducat_add_u32(&request.remaining, 1)
        return 0

    cdef int apply_credits(self, Work* work, Group* group) noexcept nogil:
        """Saga step 2: credit or refuse, answer the source once that is durable. Outcomes can get lost between processes, so
        an outcome says from which number on it names every refusal: from what the source had settled, that is, also those of
        earlier deliveries; if they are many, from this delivery on, which is of use only to a source that has come so far.
        It reaches up to the cursor: a source whose log is older than that (restored from a copy) must not take what it sends
        now for what was credited before."""
        cdef CreditColumns columns
        cdef size_t offset = group.events.length, n = work.count
        cdef uint32_t count_before = group.events.count, refused
        cdef uint64_t upto, after = work.after
        cdef int code
        cdef Work* outcome
        self.engine.forget_refusals(work.peer, after)      # a FORGET may have got lost, and a recovery knows of none
        columns.count = work.count
        columns.amounts, columns.ids = work.data, work.data + 8 * n
        columns.credit_ids, columns.currencies, columns.codes = work.data + 24 * n, work.data + 40 * n, work.data + 44 * n
        upto = self.engine.credit_cursor(work.peer)
        if after > upto:
            self.note_credits_lost(work.peer, after, upto)
        code = self.engine.apply_credits(work.peer, work.number, &columns, <uint64_t>self.now(), self.credit_results,
                                         &group.events)
        if code == ENGINE_REFUSED:
            self.core.gap_count += 1       # a delivery got lost on the way: the source's relay sends again from the cursor
            return 0
        if code < 0 or self.close_frame(group, offset, count_before) < 0:
            return -1
        refused = self.engine.read_refusals(work.peer, after + 1, DELIVERY_ROWS_MAX, self.refusals)
        if refused == DELIVERY_ROWS_MAX \
                or (refused > REFUSALS_REPEATED_MAX and self.refusals[REFUSALS_REPEATED_MAX].number < work.number):
            after = work.number - 1
            refused = self.engine.read_refusals(work.peer, work.number, DELIVERY_ROWS_MAX, self.refusals)
        upto = self.engine.credit_cursor(work.peer)
        if refused == DELIVERY_ROWS_MAX:
            upto = self.refusals[refused - 1].number       # there may be more behind it
        outcome = work_new(WORK_OUTCOMES, NULL)
        if outcome == NULL:
            return -1
        outcome.peer, outcome.number, outcome.after, outcome.count = self.shard, upto, after, refused
        outcome.position = self.engine.sequence()
        if refused:
            outcome.data = <uint8_t*>malloc(refused * sizeof(Refusal))
            if outcome.data == NULL:
                free(outcome)
                return -1
            memcpy(outcome.data, self.refusals, refused * sizeof(Refusal))
        group_deliver(group, work.peer, outcome)
        return 0

    cdef int apply_outcomes(self, Work* work, Group* group) noexcept nogil:
        """Saga step 3: settle or return, and let the rows go that waited."""
        cdef size_t offset = group.events.length
        cdef uint32_t count_before = group.events.count, at = 0, i
        cdef int code
        cdef WaitRing* ring = &self.waiting[work.peer]
        cdef Refusal* refusals = <Refusal*>work.data
        cdef Waiting* waiting
        cdef Work* forget
        cdef uint8_t result
        cdef uint64_t settled, last
        self.engine.send_span(work.peer, &settled, &last)
        if work.number > last:
            self.note_sends_lost(work.peer, work.number, last)
        if ducat_load_int(&self.core.rewound[work.peer].sends_seen):
            self.core.gap_count += 1       # what it says is of sends that this shard knows nothing of
            return 0
        if work.after > settled:
            # an outcome before this one got lost, and with it perhaps a refusal: the sends are delivered again
            self.core.gap_count += 1
            return 0
        code = self.engine.apply_outcomes(work.peer, work.number, refusals, work.count, <uint64_t>self.now(), &group.events)
        if code == ENGINE_REFUSED:
            self.core.gap_count += 1
            return 0
        if code < 0 or self.close_frame(group, offset, count_before) < 0:
            return -1
        if work.number > settled:
            self.is_back(work.peer)
        while ring.size and ring.first <= ring.last and ring.first <= work.number:
            waiting = &ring.entries[ring.first & (ring.size - 1)]
            result = TRANSFER_OK
            while at < work.count and refusals[at].number < ring.first:
                at += 1
            if at < work.count and refusals[at].number == ring.first:
                result = refusals[at].result
            if waiting.request != NULL:
                waiting.request.results[waiting.row] = result
                ducat_max_u64(&waiting.request.positions[self.shard], self.engine.sequence())
                ducat_max_u64(&waiting.request.positions[work.peer], work.position)
                if group_done(group, waiting.request, 1) < 0:
                    return -1
            ring.first += 1
        i = 0
        while i < self.late_count:
            result = self.engine.find_result(self.late[i].id)
            if result == 0:
                result = IN_FLIGHT         # its id was forgotten meanwhile: that is all that is known of it
            elif result == IN_FLIGHT:
                i += 1
                continue
            self.late[i].request.results[self.late[i].row] = result
            if group_done(group, self.late[i].request, 1) < 0:
                return -1
            self.late_count -= 1
            self.late[i] = self.late[self.late_count]
        if work.count:
            forget = work_new(WORK_FORGET, NULL)
            if forget == NULL:
                return -1
            forget.peer, forget.number = self.shard, work.number
            group_deliver(group, work.peer, forget)
        return 0

    cdef int resend(self, Work* work, Group* group) noexcept nogil:
        """Deliver everything unsettled to a destination again, from the engine's own queue: after a restart, or for a relay
        that lost its connection, or if nothing comes back."""
        cdef uint64_t settled, last
        self.engine.send_span(work.peer, &settled, &last)
        if self.look_whether_it_stands(work.peer, settled, last, group) < 0:
            return -1
        if work.number and not self.stalled(work.peer, settled, last):
            return 0
        if self.waiting[work.peer].size == 0:
            self.waiting[work.peer].first = settled + 1
            self.waiting[work.peer].last = settled
            if last > settled and wait_reserve(&self.waiting[work.peer], last) < 0:
                return -1
            while self.waiting[work.peer].last < last:
                self.waiting[work.peer].last += 1
                self.waiting[work.peer].entries[
                    self.waiting[work.peer].last & (self.waiting[work.peer].size - 1)].request = NULL
            self.sent[work.peer] = last
        return self.deliver_again(work.peer, settled, last, group)

    cdef bint stalled(self, uint16_t destination, uint64_t settled, uint64_t last) noexcept nogil:
        """Has nothing been settled since the relay asked last, though something was sent before? True after one, two, four …
        questions without progress, so that a destination that is slow is not buried."""
        cdef uint32_t count = 0
        if settled == self.seen_settled[destination] and settled < self.seen_last[destination]:
            count = self.stalled_count[destination] + 1
        self.seen_settled[destination], self.seen_last[destination] = settled, last
        self.stalled_count[destination] = count
        return count and (count & (count - 1) == 0 or count % 32 == 0)

    cdef int deliver_again(self, uint16_t destination, uint64_t settled, uint64_t last, Group* group) noexcept nogil:
        cdef uint64_t number = settled + 1
        cdef uint32_t count
        cdef Work* delivery
        if ducat_load_int(&self.core.rewound[destination].sends_seen):
            return 0
        while number <= last:
            count = self.engine.read_sends(destination, number, DELIVERY_ROWS_MAX, self.sends)
            if count == 0:
                return -1
            delivery = self.pack_credits(count)
            if delivery == NULL:
                return -1
            delivery.peer, delivery.number, delivery.after = self.shard, number, settled
            group_deliver(group, destination, delivery)
            number += count
        return 0

    # A shard that was restored from a copy older than what it had acknowledged (docs/wallet.md). If its sends are lost, their
    # numbers are given again to others, and the peer would take those for known ones and answer that all is well. So from then
    # on nothing is sent to that peer, new sends are refused, and what it says is ignored. That the numbers end below the peer's
    # cursor stays true for as long as nothing is sent, so a restart finds it again. Lost credits do no harm: what follows is a gap.

    cdef void note_sends_lost(self, uint16_t peer, uint64_t expected, uint64_t found) noexcept nogil:
        cdef Rewound* rewound = &self.core.rewound[peer]
        pthread_mutex_lock(&self.host.mutex)
        if not rewound.sends_seen:
            rewound.sends_expected, rewound.sends_found = expected, found
            ducat_store_int(&rewound.sends_seen, 1)
            self.host.rewound_count += 1
        pthread_mutex_unlock(&self.host.mutex)
        self.engine.refuse_sends(peer, True)
        host_wake(self.host)

    cdef void note_credits_lost(self, uint16_t peer, uint64_t expected, uint64_t found) noexcept nogil:
        cdef Rewound* rewound = &self.core.rewound[peer]
        if ducat_load_int(&rewound.credits_seen):
            return
        pthread_mutex_lock(&self.host.mutex)
        rewound.credits_expected, rewound.credits_found = expected, found
        ducat_store_int(&rewound.credits_seen, 1)
        self.host.rewound_count += 1
        pthread_mutex_unlock(&self.host.mutex)
        host_wake(self.host)

    cdef void compare(self, uint16_t peer, uint64_t peer_received, uint64_t peer_settled, uint64_t sent) noexcept nogil:
        """What the peer had received from here and settled towards here, a moment ago; and what had been sent there before
        anything else was."""
        cdef uint64_t cursor = self.engine.credit_cursor(peer)
        if peer_received > sent:
            self.note_sends_lost(peer, peer_received, sent)
        if peer_settled > cursor:
            self.note_credits_lost(peer, peer_settled, cursor)

    # ---- group commit ----

    cdef int commit(self, Group* group) noexcept nogil:
        """Make a group durable, then tell everyone who waits for it."""
        cdef uint32_t i
        cdef Work* delivery
        if group.frame_count:
            for i in range(group.frame_count):
                if self.log.append_frame(&group.frames[i].info, group.events.data + group.frames[i].offset) < 0:
                    return -1
            if self.log.sync_frames() < 0:
                return -1
            if ducat_load_int(&self.host.watching):
                host_wake(self.host)
        if group.sealed:
            memcpy((<ImageInfo*>group.image.extra).hash, self.log._durable_hash, 16)
        while group.deliveries != NULL:
            delivery = group.deliveries
            group.deliveries = delivery.next
            host_deliver(self.host, <uint16_t>delivery.columns.count, delivery)
        group.deliveries_tail = NULL
        for i in range(group.done_count):
            request_done(self.host, group.dones[i].request, group.dones[i].decrement)
        group.done_count = group.frame_count = 0
        group.events.length = 0
        group.events.count = 0
        group.sealed, group.image = 0, NULL
        return 0

    cdef void fail(self) noexcept nogil:
        """Nothing further is applied or acknowledged by this process."""
        ducat_store_int(&self.host.failed, 1)
        pthread_mutex_lock(&self.core.mutex)
        self.core.stopped = 1
        pthread_cond_broadcast(&self.core.work_ready)
        pthread_mutex_unlock(&self.core.mutex)
        pthread_mutex_lock(&self.host.mutex)
        pthread_cond_broadcast(&self.host.finished)
        pthread_mutex_unlock(&self.host.mutex)
        host_wake(self.host)
