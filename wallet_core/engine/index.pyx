# An open-addressed index from a key to a position in dense records, that grows without a pause. Included by _engine.pyx.
#
# A slot is 32 bits: position + 1 in the low `bits`, and above it as many tag bits of the key's hash as fit. So 10 M
# accounts need 64 MiB, sixteen slots lie in a cache line, and a wrong tag spares nearly every visit to a record that is
# not the one. 0 is an empty slot, all ones a tombstone (only holds are ever removed).
#
# Positions must be below 2^bits. They are: the records are as dense as the index was full at its fullest.
#
# Growing: a table of the next size is allocated and the old one is moved to it a few slots at every insert and every
# apply call. Meanwhile a lookup asks the new table first, then the old one. Load is at most 0.6; up to 0.75 where another
# thread is making the next table (index_prepare) and has not finished: the writer would wait longer for the pages of one of
# its own (16 MiB were 77 ms) than some longer probes cost.

cdef inline uint64_t index_hash_at(EngineState* e, uint32_t key, uint64_t position) noexcept nogil:
    if key == KEY_ACCOUNT_ID:
        return du_hash_id(e.accounts[position].id0, e.accounts[position].id1)
    if key == KEY_HOLD_ID:
        return du_hash_id(e.holds[position].id0, e.holds[position].id1)
    return du_mum(e.holds[position].sequence ^ K0, K1)


cdef int index_open(EngineState* e, Index* index, uint32_t key, uint32_t bits) noexcept nogil:
    index_close(e, index)
    index.key = key
    index.bits = bits
    index.slots = <uint32_t*> du_table_new(sizeof(uint32_t) << bits, &e.budget)
    return -1 if index.slots == NULL else 0


cdef void index_close(EngineState* e, Index* index) noexcept nogil:
    if index.slots != NULL:
        du_table_free(index.slots, sizeof(uint32_t) << index.bits, &e.budget)
    if index.old != NULL:
        du_table_free(index.old, sizeof(uint32_t) << index.old_bits, &e.budget)
    index_drop_ready(e, index)
    memset(index, 0, sizeof(Index))


cdef inline uint32_t slot_value(uint64_t hash, uint64_t position, uint32_t bits) noexcept nogil:
    return <uint32_t> (hash << bits) | <uint32_t> (position + 1)


cdef inline uint32_t slot_position(uint32_t value, uint32_t bits) noexcept nogil:
    return (value & ((<uint32_t> 1 << bits) - 1)) - 1


cdef inline bint slot_tag_equal(uint32_t value, uint64_t hash, uint32_t bits) noexcept nogil:
    return ((value ^ <uint32_t> (hash << bits)) >> bits) == 0


cdef inline void index_prefetch(const Index* index, uint64_t hash) noexcept nogil:
    du_prefetch(&index.slots[hash >> (64 - index.bits)])
    if du_unlikely(index.old != NULL):
        du_prefetch(&index.old[hash >> (64 - index.old_bits)])


cdef inline uint32_t index_candidate(const Index* index, uint64_t hash) noexcept nogil:
    # The first position with the right tag, not yet compared with the key; NONE while the index grows.
    cdef uint64_t mask = (<uint64_t> 1 << index.bits) - 1
    cdef uint64_t slot = hash >> (64 - index.bits)
    cdef uint32_t value
    if du_unlikely(index.old != NULL):
        return NONE
    while True:
        value = index.slots[slot]
        if value == 0:
            return NONE
        if slot_tag_equal(value, hash, index.bits) and value != TOMBSTONE:
            return slot_position(value, index.bits)
        slot = (slot + 1) & mask


cdef inline bint key_equal(const EngineState* e, uint32_t key, uint64_t position, uint64_t k0, uint64_t k1) noexcept nogil:
    if key == KEY_ACCOUNT_ID:
        return e.accounts[position].id0 == k0 and e.accounts[position].id1 == k1
    if key == KEY_HOLD_ID:
        return e.holds[position].id0 == k0 and e.holds[position].id1 == k1
    return e.holds[position].sequence == k0


cdef uint32_t* table_find(const EngineState* e, uint32_t* slots, uint32_t bits, uint32_t key, uint64_t hash,
                          uint64_t k0, uint64_t k1) noexcept nogil:
    cdef uint64_t mask = (<uint64_t> 1 << bits) - 1
    cdef uint64_t slot = hash >> (64 - bits)
    cdef uint32_t value
    while True:
        value = slots[slot]
        if value == 0:
            return NULL
        if value != TOMBSTONE and slot_tag_equal(value, hash, bits) and key_equal(e, key, slot_position(value, bits), k0, k1):
            return &slots[slot]
        slot = (slot + 1) & mask


cdef uint32_t index_find(const EngineState* e, const Index* index, uint64_t hash, uint64_t k0, uint64_t k1) noexcept nogil:
    # Position of the key, or NONE.
    cdef uint32_t* found = table_find(e, index.slots, index.bits, index.key, hash, k0, k1)
    if found != NULL:
        return slot_position(found[0], index.bits)
    if index.old != NULL:
        found = table_find(e, index.old, index.old_bits, index.key, hash, k0, k1)
        if found != NULL:
            return slot_position(found[0], index.old_bits)
    return NONE


cdef inline void table_put(uint32_t* slots, uint32_t bits, uint64_t hash, uint64_t position) noexcept nogil:
    cdef uint64_t mask = (<uint64_t> 1 << bits) - 1
    cdef uint64_t slot = hash >> (64 - bits)
    while slots[slot] != 0:
        slot = (slot + 1) & mask
    slots[slot] = slot_value(hash, position, bits)


cdef void index_move(EngineState* e, Index* index, uint64_t slot_count) noexcept nogil:
    # Moves the next slots of the old table; frees it after the last.
    cdef uint64_t end, start, i
    cdef uint64_t size = <uint64_t> 1 << index.old_bits
    cdef uint32_t value
    while slot_count and index.old != NULL:
        start = index.old_cursor
        end = min(start + min(slot_count, <uint64_t> 64), size)
        slot_count -= min(slot_count, <uint64_t> 64)
        for i in range(start, end):
            value = index.old[i]
            if value != 0 and value != TOMBSTONE:
                if index.key == KEY_ACCOUNT_ID:
                    du_prefetch(&e.accounts[slot_position(value, index.old_bits)])
                else:
                    du_prefetch(&e.holds[slot_position(value, index.old_bits)])
        for i in range(start, end):
            value = index.old[i]
            if value != 0 and value != TOMBSTONE:
                value = slot_position(value, index.old_bits)
                table_put(index.slots, index.bits, index_hash_at(e, index.key, value), value)
                index.used += 1
        index.old_cursor = end
        # the moved keys must be found in one table only, or a removed key would come back from the other: see index_remove
        if end == size:
            du_table_free(index.old, sizeof(uint32_t) << index.old_bits, &e.budget)
            index.old = NULL


cdef inline bint index_waits(const EngineState* e, const Index* index) noexcept nogil:
    return (e.is_prepared and index.key == KEY_ACCOUNT_ID and index.bits >= 16 and du_load_acquire(&index.ready) == 0
            and (index.used + 1) * 4 <= <uint64_t> 3 << index.bits)


cdef int index_insert(EngineState* e, Index* index, uint64_t hash, uint64_t position) noexcept nogil:
    # The key must not be there yet; its record must be. <0: out of memory.
    cdef uint32_t* bigger
    cdef uint32_t bits
    if index.old != NULL:
        index_move(e, index, 16)
    elif (index.used + 1) * 5 > (<uint64_t> 3 << index.bits) and not index_waits(e, index):
        bits = index.bits + 1
        if index.live * 10 < (<uint64_t> 3 << index.bits):
            bits = index.bits               # full of tombstones: clean up at the same size
        bigger = index_take_ready(index, bits)
        if bigger == NULL:
            index_drop_ready(e, index)
            bigger = <uint32_t*> du_table_new(sizeof(uint32_t) << bits, &e.budget)
        if bigger == NULL:
            return -1
        index.old = index.slots
        index.old_bits = index.bits
        index.old_cursor = 0
        index.slots = bigger
        index.bits = bits
        index.used = 0
        index_move(e, index, 16)
    table_put(index.slots, index.bits, hash, position)
    index.used += 1
    index.live += 1
    return 0


# The next table may be made and touched ahead of time by memory_prepare's thread. It is handed over as one word, the
# address with the table's bits in its lowest six, since the writer may have grown the index by itself meanwhile.

cdef uint32_t* index_take_ready(Index* index, uint32_t bits) noexcept nogil:
    cdef uint64_t ready = du_load_acquire(&index.ready)
    if ready & 63 != bits or not du_take(&index.ready, ready):
        return NULL
    return <uint32_t*> (ready & ~(<uint64_t> 63))


cdef void index_drop_ready(EngineState* e, Index* index) noexcept nogil:
    cdef uint64_t ready = du_load_acquire(&index.ready)
    if ready != 0 and du_take(&index.ready, ready):
        du_table_free(<void*> (ready & ~(<uint64_t> 63)), sizeof(uint32_t) << (ready & 63), &e.budget)


cdef inline bint index_wants_memory(const Index* index) noexcept nogil:
    return index.bits >= 16 and index.live * 2 > <uint64_t> 1 << index.bits and du_load_acquire(&index.ready) == 0


cdef int index_prepare(EngineState* e, Index* index) noexcept nogil:
    cdef uint32_t bits = index.bits + 1
    cdef uint64_t bytes = <uint64_t> sizeof(uint32_t) << bits
    cdef void* table = du_table_new(bytes, &e.budget)
    if table == NULL:
        return -1
    du_table_touch(table, bytes)
    du_store_release(&index.ready, <uint64_t> table | bits)
    return 0


cdef void index_remove(EngineState* e, Index* index, uint64_t hash, uint64_t k0, uint64_t k1) noexcept nogil:
    # The key must be there, and its record too. Both tables may name it.
    cdef uint32_t* found = table_find(e, index.slots, index.bits, index.key, hash, k0, k1)
    if found != NULL:
        found[0] = TOMBSTONE
    if index.old != NULL:
        found = table_find(e, index.old, index.old_bits, index.key, hash, k0, k1)
        if found != NULL:
            found[0] = TOMBSTONE
    index.live -= 1


cdef int index_reserve(EngineState* e, Index* index, uint64_t count) noexcept nogil:
    # An empty index with room for count keys at once (loading an image).
    cdef uint32_t bits = INDEX_BITS_MIN
    cdef uint32_t key = index.key
    while (count + 1) * 5 > (<uint64_t> 3 << bits):
        bits += 1
    return index_open(e, index, key, bits)
