# Active holds: dense 64-byte records, an index by id (post and void), one by sequence number (replay), and a heap by
# (deadline, sequence number) of those that expire. Included by _engine.pyx.

cdef inline bint heap_before(const HeapEntry* a, const HeapEntry* b) noexcept nogil:
    return a.deadline_ms < b.deadline_ms or (a.deadline_ms == b.deadline_ms and a.sequence < b.sequence)


cdef void heap_place(EngineState* e, uint64_t position, HeapEntry entry) noexcept nogil:
    # Puts entry where it belongs, starting at a free position.
    cdef uint64_t parent, child
    while position > 0:
        parent = (position - 1) // 2
        if not heap_before(&entry, &e.heap[parent]):
            break
        e.heap[position] = e.heap[parent]
        e.holds[e.heap[position].hold].heap_position = <uint32_t> position
        position = parent
    while True:
        child = 2 * position + 1
        if child >= e.heap_count:
            break
        if child + 1 < e.heap_count and heap_before(&e.heap[child + 1], &e.heap[child]):
            child += 1
        if not heap_before(&e.heap[child], &entry):
            break
        e.heap[position] = e.heap[child]
        e.holds[e.heap[position].hold].heap_position = <uint32_t> position
        position = child
    e.heap[position] = entry
    e.holds[entry.hold].heap_position = <uint32_t> position


cdef int heap_push(EngineState* e, uint32_t slot) noexcept nogil:
    cdef HeapEntry entry
    if du_arena_commit(&e.heap_memory, (e.heap_count + 1) * sizeof(HeapEntry), &e.budget) < 0:
        return -1
    entry.deadline_ms = e.holds[slot].deadline_ms
    entry.sequence = e.holds[slot].sequence
    entry.hold = slot
    e.heap_count += 1
    heap_place(e, e.heap_count - 1, entry)
    return 0


cdef void heap_remove(EngineState* e, uint32_t slot) noexcept nogil:
    cdef uint64_t position = e.holds[slot].heap_position
    e.heap_count -= 1
    if position != e.heap_count:
        heap_place(e, position, e.heap[e.heap_count])


cdef inline uint64_t sequence_hash(uint64_t sequence) noexcept nogil:
    return du_mum(sequence ^ K0, K1)


cdef int hold_add(EngineState* e, const Hold* hold) noexcept nogil:
    # Stores the record and moves the held amounts. heap_position of the argument is ignored. <0: out of memory.
    cdef uint32_t slot
    if e.hold_free != NONE:
        slot = e.hold_free
        if e.image != NULL:
            image_keep_hold(e, slot)
        e.hold_free = e.holds[slot].heap_position
    else:
        if e.hold_slots == e.holds_max or du_arena_commit(
                &e.holds_memory, (e.hold_slots + 1) * sizeof(Hold), &e.budget) < 0:
            return -1
        slot = <uint32_t> e.hold_slots
        e.hold_slots += 1
    e.holds[slot] = hold[0]
    e.holds[slot].heap_position = NONE
    if (index_insert(e, &e.holds_by_id, du_hash_id(hold.id0, hold.id1), slot) < 0
            or index_insert(e, &e.holds_by_sequence, sequence_hash(hold.sequence), slot) < 0):
        return -1
    if hold.deadline_ms != 0 and heap_push(e, slot) < 0:
        return -1
    e.hold_count += 1
    hold_amounts(e, hold.debit, hold.credit, hold.amount)
    return 0


cdef void hold_remove(EngineState* e, uint32_t slot) noexcept nogil:
    # Frees the record and the held amounts.
    cdef Hold* hold = &e.holds[slot]
    if e.image != NULL:
        image_keep_hold(e, slot)
    hold_amounts(e, hold.debit, hold.credit, -hold.amount)
    index_remove(e, &e.holds_by_id, du_hash_id(hold.id0, hold.id1), hold.id0, hold.id1)
    index_remove(e, &e.holds_by_sequence, sequence_hash(hold.sequence), hold.sequence, 0)
    if hold.deadline_ms != 0:
        heap_remove(e, slot)
    memset(hold, 0, sizeof(Hold))
    hold.heap_position = e.hold_free
    e.hold_free = slot
    e.hold_count -= 1


cdef inline uint32_t hold_by_id(const EngineState* e, uint64_t id0, uint64_t id1) noexcept nogil:
    return index_find(e, &e.holds_by_id, du_hash_id(id0, id1), id0, id1)


cdef inline uint32_t hold_by_sequence(const EngineState* e, uint64_t sequence) noexcept nogil:
    return index_find(e, &e.holds_by_sequence, sequence_hash(sequence), sequence, 0)


cdef inline uint64_t deadline_of(const EngineState* e, uint64_t timeout_s, uint32_t flags) noexcept nogil:
    # Rounded up, so that a hold never ends early. One of a chain does not end by itself: half of the chain would.
    return (e.now_ns + 999999) // 1000000 + timeout_s * 1000 if timeout_s and not flags & CHAIN else 0


cdef int holds_expire(EngineState* e, EventBuffer* events) noexcept nogil:
    # Holds whose deadline has come, by deadline, then by sequence number. Millions may come due at once, and a frame should
    # not hold them all: what is left ends with the next command, and cannot be posted or voided meanwhile.
    cdef Hold hold
    cdef uint32_t left = HOLDS_EXPIRED_MAX
    while left and e.heap_count and e.heap[0].deadline_ms <= e.now_ms:
        left -= 1
        if events_reserve(events, 1) < 0:
            return -1
        hold = e.holds[e.heap[0].hold]
        hold_remove(e, <uint32_t> e.heap[0].hold)
        ids_mark(e, hold.id0, hold.id1, STATE_EXPIRED, 0xFF)
        emit_money(e, events, KIND_HOLD_EXPIRED, hold.id0, hold.id1, hold.amount, hold.debit, hold.credit,
                   hold.sequence, hold.code, 0, 0)
    return 0


cdef void hold_copy(const EngineState* e, const Hold* hold, HoldState* out) noexcept nogil:
    memcpy(out.id, &hold.id0, 8)
    memcpy(out.id + 8, &hold.id1, 8)
    memcpy(out.debit_id, &e.accounts[hold.debit].id0, 8)
    memcpy(out.debit_id + 8, &e.accounts[hold.debit].id1, 8)
    memcpy(out.credit_id, &e.accounts[hold.credit].id0, 8)
    memcpy(out.credit_id + 8, &e.accounts[hold.credit].id1, 8)
    out.sequence = hold.sequence
    out.amount = hold.amount
    out.deadline_ms = hold.deadline_ms
    out.code = hold.code
    out.flags = hold.flags
