# Ids of striped accounts, for routing: few (clearing and fee accounts), asked for every row. Included by _host.pyx.

cdef enum:
    IS_STRIPED = 1
    IS_RESERVED = 2                  # only coordinators of chains name it


cdef class StripedSet:
    """Open addressing over 16-byte ids, at most half full. Changed by the loop thread only. Reserved accounts are in it as well,
    open or not: routing looks every account up here anyway."""

    cdef uint8_t* ids                # and behind them one byte each: what the id is
    cdef uint64_t mask
    cdef uint64_t count

    def __dealloc__(self):
        free(self.ids)

    cdef bint has(self, const uint8_t* id) noexcept nogil:
        return self.kind(id) & IS_STRIPED

    cdef uint8_t kind(self, const uint8_t* id) noexcept nogil:
        cdef uint64_t at
        if self.count == 0 or ducat_zero_id(id):
            return 0
        at = self.place(id)
        while not ducat_zero_id(self.ids + 16 * at):
            if ducat_same_id(self.ids + 16 * at, id):
                return self.ids[16 * (self.mask + 1) + at]
            at = (at + 1) & self.mask
        return 0

    cdef uint64_t place(self, const uint8_t* id) noexcept nogil:
        cdef uint64_t low
        memcpy(&low, id, 8)
        return (low * <uint64_t>0x9E3779B97F4A7C15 >> 20) & self.mask

    cdef int add(self, const uint8_t* id, uint8_t kind=IS_STRIPED) except -1:
        cdef uint64_t old_mask = self.mask, i
        cdef uint8_t* old = self.ids
        if ducat_zero_id(id):
            return 0
        if self.kind(id):
            self.put(id, kind)
            return 0
        if self.ids == NULL or 2 * (self.count + 1) > self.mask + 1:
            self.mask = 2 * (old_mask + 1) - 1 if old != NULL else 63
            self.ids = <uint8_t*>calloc(self.mask + 1, 17)
            if self.ids == NULL:
                self.ids, self.mask = old, old_mask
                raise MemoryError()
            if old != NULL:
                for i in range(old_mask + 1):
                    if not ducat_zero_id(old + 16 * i):
                        self.put(old + 16 * i, old[16 * (old_mask + 1) + i])
                free(old)
        self.put(id, kind)
        self.count += 1
        return 0

    cdef void put(self, const uint8_t* id, uint8_t kind) noexcept nogil:
        cdef uint64_t at = self.place(id)
        while not ducat_zero_id(self.ids + 16 * at) and not ducat_same_id(self.ids + 16 * at, id):
            at = (at + 1) & self.mask
        memcpy(self.ids + 16 * at, id, 16)
        self.ids[16 * (self.mask + 1) + at] |= kind

    cdef int collect(self, Engine engine, HostCore* host, dict engines) except -1:
        """Every striped account of a recovered engine. One that the shard of its slot has as a plain account, or not at all, was
        refused when somebody asked to stripe it, and routes as a plain one."""
        cdef EngineCounters counters
        cdef AccountState state, home_state
        cdef Engine home
        cdef uint32_t ordinal
        cdef bint found
        engine.counters(&counters)
        for ordinal in range(<uint32_t>counters.account_count):
            found = engine.account_at(ordinal, &state)
            if not found or not state.flags & ACCOUNT_STRIPED:
                continue
            home = engines.get(host.shard_of_slot[ducat_slot(state.id)])
            if home is None or (home.find_account(state.id, &home_state) and home_state.flags & ACCOUNT_STRIPED):
                self.add(state.id)
        return 0
