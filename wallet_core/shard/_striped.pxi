# Ids of striped accounts, for routing: few (clearing and fee accounts), asked for every row. Included by _host.pyx.

cdef class StripedSet:
    """Open addressing over 16-byte ids, at most half full. Changed by the loop thread only."""

    cdef uint8_t* ids
    cdef uint64_t mask
    cdef uint64_t count

    def __dealloc__(self):
        free(self.ids)

    cdef bint has(self, const uint8_t* id) noexcept nogil:
        cdef uint64_t at
        if self.count == 0 or ducat_zero_id(id):
            return False
        at = self.place(id)
        while not ducat_zero_id(self.ids + 16 * at):
            if ducat_same_id(self.ids + 16 * at, id):
                return True
            at = (at + 1) & self.mask
        return False

    cdef uint64_t place(self, const uint8_t* id) noexcept nogil:
        cdef uint64_t low
        memcpy(&low, id, 8)
        return (low * <uint64_t>0x9E3779B97F4A7C15 >> 20) & self.mask

    cdef int add(self, const uint8_t* id) except -1:
        cdef uint64_t at, old_mask = self.mask, i
        cdef uint8_t* old = self.ids
        if self.has(id) or ducat_zero_id(id):
            return 0
        if self.ids == NULL or 2 * (self.count + 1) > self.mask + 1:
            self.mask = 2 * (old_mask + 1) - 1 if old != NULL else 63
            self.ids = <uint8_t*>calloc(self.mask + 1, 16)
            if self.ids == NULL:
                self.ids, self.mask = old, old_mask
                raise MemoryError()
            if old != NULL:
                for i in range(old_mask + 1):
                    if not ducat_zero_id(old + 16 * i):
                        self.put(old + 16 * i)
                free(old)
        self.put(id)
        self.count += 1
        return 0

    cdef void put(self, const uint8_t* id) noexcept nogil:
        cdef uint64_t at = self.place(id)
        while not ducat_zero_id(self.ids + 16 * at):
            at = (at + 1) & self.mask
        memcpy(self.ids + 16 * at, id, 16)

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
