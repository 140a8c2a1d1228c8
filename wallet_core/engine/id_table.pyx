# The memory of transfer ids, bounded by a window. Included by _engine.pyx.
#
# Ids live in generations of a fixed size. A generation is a dense list of entries in order of insertion (24 bytes: id,
# fingerprint, state, result), and a table of 32-bit slots over it (12 bits of hash as a tag, 20 bits position; a tag is
# never 0, so 0 is empty) in buckets of one cache line. An id is in the bucket that its hash names or, where that was full,
# in one of the next. A new id touches one cache line of the small table and the end of the list; nothing is ever rehashed;
# an image writes the lists as they are.
#
# Every generation knows the range of its ids' times. A lookup visits the open generation and those whose range covers the
# id's time, which for ids in rough order of time is one or two.
#
# The floor: ids of that time or earlier are refused, so what is known of them may be forgotten. It follows the clock
# (id_window_ms) and, when there are more generations than generation_count_max, the latest time in the one that is dropped:
# that whose latest time is the lowest.
#
# Early ids, more than ID_EARLY_MS ahead of the engine's time (a client's clock is wrong), have generations of their own. Among
# the others a single one would give its generation a latest time in the future, and with it the floor, which honest ids would
# then be below; and every lookup would have to visit every generation. They may fill a quarter of the memory with times that
# are still to come; beyond, new ones are ID_AHEAD. Once their time has come their generations are dropped like any other.

cdef inline uint64_t id_time_ms(uint64_t id0) noexcept nogil:
    return du_bswap64(id0) >> 16


cdef inline bint id_is_v7(uint64_t id0, uint64_t id1) noexcept nogil:
    # byte 6 = 0x7., byte 8 = 0b10......
    return (id0 >> 52) & 0xF == 7 and (id1 >> 6) & 3 == 2


cdef inline bint id_is_early(const EngineState* e, uint64_t ms) noexcept nogil:
    return ms > e.now_ms + ID_EARLY_MS


cdef inline uint64_t id_tag(uint64_t hash) noexcept nogil:
    cdef uint64_t tag = hash & 0xFFF
    return tag if tag != 0 else 1


cdef inline uint64_t id_bucket(const EngineState* e, uint64_t hash) noexcept nogil:
    # The first slot of the bucket that the hash names.
    return du_range(hash, e.generation_slots // BUCKET) * BUCKET


cdef inline uint64_t bucket_after(const EngineState* e, uint64_t slot) noexcept nogil:
    return slot + BUCKET if slot + BUCKET < e.generation_slots else 0


cdef inline uint64_t bucket_free(const EngineState* e, const Generation* g, uint64_t hash) noexcept nogil:
    # Where an id would go that is not there.
    cdef uint64_t slot = id_bucket(e, hash)
    cdef uint32_t empty = du_bucket_look(&g.slots[slot], 0).empty
    while du_unlikely(empty == 0):
        slot = bucket_after(e, slot)
        empty = du_bucket_look(&g.slots[slot], 0).empty
    return slot + du_first_bit(empty)


cdef inline void ids_prefetch(const EngineState* e, uint64_t hash) noexcept nogil:
    if du_likely(e.generation_count != 0):
        du_prefetch(&e.generations[e.generation_count - 1].slots[id_bucket(e, hash)])


cdef inline IdEntry* generation_find(const EngineState* e, const Generation* g, uint64_t id0, uint64_t id1, uint64_t hash,
                                     uint64_t* free_slot) noexcept nogil:
    cdef uint64_t slot = id_bucket(e, hash)
    cdef uint32_t tag = <uint32_t> id_tag(hash)
    cdef du_bucket found
    cdef IdEntry* entry
    while True:
        found = du_bucket_look(&g.slots[slot], tag)
        while du_unlikely(found.match != 0):
            entry = &g.entries[g.slots[slot + du_first_bit(found.match)] & 0xFFFFF]
            if entry.id0 == id0 and entry.id1 == id1:
                return entry
            found.match &= found.match - 1
        if du_likely(found.empty != 0):
            free_slot[0] = slot + du_first_bit(found.empty)
            return NULL
        slot = bucket_after(e, slot)


cdef inline IdEntry* generation_visit(const EngineState* e, const Generation* g, uint64_t id0, uint64_t id1, uint64_t hash,
                                      uint64_t ms) noexcept nogil:
    # As generation_find, of one that is not open: an id of another time cannot be in it.
    cdef uint64_t unused
    return generation_find(e, g, id0, id1, hash, &unused) if g.min_ms <= ms <= g.max_ms else NULL


cdef IdEntry* ids_find_older(const EngineState* e, uint64_t id0, uint64_t id1, uint64_t hash, uint64_t ms) noexcept nogil:
    cdef uint64_t i = e.generation_count - 1
    cdef IdEntry* entry
    while i > e.early_count and e.generations[i].older_max_ms >= ms:
        i -= 1
        entry = generation_visit(e, &e.generations[i], id0, id1, hash, ms)
        if entry != NULL:
            return entry
    i = e.early_count if e.early_max_ms >= ms else 0
    while i > 0:
        i -= 1
        entry = generation_visit(e, &e.generations[i], id0, id1, hash, ms)
        if entry != NULL:
            return entry
    return NULL


cdef inline IdEntry* ids_find(const EngineState* e, uint64_t id0, uint64_t id1, uint64_t hash, uint64_t* free_slot) noexcept nogil:
    # The entry of an id, or NULL and the slot of the open generation where it would go.
    cdef uint64_t ms
    cdef IdEntry* entry
    cdef const Generation* g
    if du_unlikely(e.generation_count == 0):
        return NULL
    g = &e.generations[e.generation_count - 1]
    entry = generation_find(e, g, id0, id1, hash, free_slot)
    if entry != NULL:
        return entry
    ms = id_time_ms(id0)
    if du_likely(g.older_max_ms < ms and e.early_max_ms < ms):
        return NULL
    return ids_find_older(e, id0, id1, hash, ms)


cdef inline IdEntry* ids_lookup(const EngineState* e, uint64_t id0, uint64_t id1) noexcept nogil:
    cdef uint64_t unused
    return ids_find(e, id0, id1, du_hash_id(id0, id1), &unused)


cdef void generation_free(EngineState* e, Generation* g) noexcept nogil:
    du_table_free(g.slots, e.generation_slots * sizeof(uint32_t), &e.budget)
    du_table_free(g.entries, e.generation_ids * sizeof(IdEntry), &e.budget)


# Memory for generations. Touching new memory costs more than everything else that is done for an id, so another thread
# than the writer's may do that ahead of time (memory_prepare): `ready_count` generations stand ready when there is time for
# it, and under load new ones are made when the last is near. A place of GenerationMemory is filled by one side only when it
# is empty, and emptied by an atomic exchange.

cdef int memory_new(EngineState* e, Generation* g) noexcept nogil:
    g.slots = <uint32_t*> du_table_new(e.generation_slots * sizeof(uint32_t), &e.budget)
    if g.slots == NULL:
        return -1
    g.entries = <IdEntry*> du_table_new(e.generation_ids * sizeof(IdEntry), &e.budget)
    if g.entries == NULL:
        du_table_free(g.slots, e.generation_slots * sizeof(uint32_t), &e.budget)
        return -1
    return 0


cdef inline void memory_offer(GenerationMemory* memory, uint32_t* slots, IdEntry* entries) noexcept nogil:
    memory.entries = <uint64_t> entries
    du_store_release(&memory.slots, <uint64_t> slots)


cdef bint memory_take(GenerationMemory* memory, Generation* g) noexcept nogil:
    # Entries are read before the slots are given up: after that the other side may fill the place again.
    cdef uint64_t slots = du_load_acquire(&memory.slots)
    if slots == 0:
        return False
    g.entries = <IdEntry*> memory.entries
    return du_take(&memory.slots, slots) and memory_taken(g, slots)


cdef inline bint memory_taken(Generation* g, uint64_t slots) noexcept nogil:
    g.slots = <uint32_t*> slots
    return True


cdef void memory_free(EngineState* e, GenerationMemory* memory) noexcept nogil:
    cdef Generation g
    if memory_take(memory, &g):
        generation_free(e, &g)


cdef void memory_forget(EngineState* e) noexcept nogil:
    # No other thread makes memory now.
    cdef uint64_t i
    for i in range(READY_MAX):
        memory_free(e, &e.ready[i])
    memory_free(e, &e.dropped)


cdef bint ready_is_below(const EngineState* e, uint64_t count) noexcept nogil:
    # Whether fewer than `count` generations stand ready.
    cdef uint64_t i, left = 0
    for i in range(e.ready_count):
        left += du_load_acquire(&e.ready[i].slots) != 0
        if left == count:
            return False
    return True


cdef bint ready_take(EngineState* e, Generation* g) noexcept nogil:
    cdef uint64_t i
    for i in range(e.ready_count):
        if memory_take(&e.ready[i], g):
            return True
    return False


cdef int ready_make(EngineState* e) noexcept nogil:
    # One generation more; 1: there were enough. <0: out of memory.
    cdef Generation g
    cdef uint64_t i = 0
    while i < e.ready_count and du_load_acquire(&e.ready[i].slots) != 0:
        i += 1
    if i == e.ready_count:
        return 1
    memset(&g, 0, sizeof(Generation))
    if memory_take(&e.dropped, &g):
        memset(g.slots, 0, e.generation_slots * sizeof(uint32_t))
    else:
        if memory_new(e, &g) < 0:
            return -1
        du_table_touch(g.slots, e.generation_slots * sizeof(uint32_t))
        du_table_touch(g.entries, e.generation_ids * sizeof(IdEntry))
    memory_offer(&e.ready[i], g.slots, g.entries)
    return 0


cdef inline bint loading_accounts(const EngineState* e) noexcept nogil:
    # An image is being loaded, its accounts come next, and memory is not bounded.
    return (e.load_stage == 1 or e.load_stage == 2) and e.budget.bytes_max == 0     # PIECE_HEADER, PIECE_ACCOUNTS


cdef bint memory_wanted(const EngineState* e) noexcept nogil:
    cdef uint64_t used = e.account_count * sizeof(Account)
    if du_unlikely(loading_accounts(e)):
        return e.accounts_touched < min(used + 16 * PREPARE_BYTES, e.load_accounts * sizeof(Account))
    if ready_is_below(e, min(e.ready_count, 2)) or index_wants_memory(&e.accounts_index):
        return True
    return used >= 4 * PREPARE_BYTES and used + PREPARE_BYTES // 2 > e.accounts_touched and e.budget.bytes_max == 0


cdef int memory_prepare(EngineState* e) noexcept nogil:
    # In one thread beside the writer's. <0: out of memory (the writer will find out itself if it really needs it).
    cdef uint64_t used
    if loading_accounts(e):
        used = max(e.accounts_touched, e.account_count * sizeof(Account))
        e.accounts_touched = max(used, min(used + 4 * PREPARE_BYTES, e.load_accounts * sizeof(Account)))
        du_arena_touch(&e.accounts_memory, used, e.accounts_touched)
        return 0
    if index_wants_memory(&e.accounts_index) and index_prepare(e, &e.accounts_index) < 0:
        return -1
    if ready_make(e) < 0:
        return -1
    used = e.account_count * sizeof(Account)
    if used >= 4 * PREPARE_BYTES and e.budget.bytes_max == 0:
        used = min(used + PREPARE_BYTES, e.accounts_max * sizeof(Account))
        if used > e.accounts_touched:
            du_arena_touch(&e.accounts_memory, max(e.accounts_touched, e.account_count * sizeof(Account)), used)
            e.accounts_touched = used
    return 0


cdef void generation_drop(EngineState* e, uint64_t at) noexcept nogil:
    # Forgets a generation. One is kept as the memory of the next, so that a full engine asks for none.
    cdef Generation* g = &e.generations[at]
    e.id_count -= g.count
    if not image_pins_generation(e, g):     # else the image frees it
        if du_load_acquire(&e.dropped.slots) == 0:
            memory_offer(&e.dropped, g.slots, g.entries)
        else:
            generation_free(e, g)
    e.generation_count -= 1
    if at < e.early_count:
        e.early_count -= 1
    memmove(g, g + 1, (e.generation_count - at) * sizeof(Generation))


cdef void generations_relink(EngineState* e) noexcept nogil:
    # What lookups and drops know of all generations. lowest_max_ms may be too low later on: the open one of early ids grows.
    cdef uint64_t i
    cdef uint64_t greatest = 0
    e.early_max_ms = 0
    e.lowest_max_ms = <uint64_t> -1
    for i in range(e.generation_count):
        if i < e.early_count:
            e.early_max_ms = max(e.early_max_ms, e.generations[i].max_ms)
        else:
            e.generations[i].older_max_ms = greatest
            greatest = max(greatest, e.generations[i].max_ms)
        if i + 1 < e.generation_count:
            e.lowest_max_ms = min(e.lowest_max_ms, e.generations[i].max_ms)


cdef void generations_drop_old(EngineState* e) noexcept nogil:
    # After the floor rose with time: whole generations below it, but never the open one of ids that are not early.
    cdef uint64_t i = 0
    if e.lowest_max_ms > e.floor_ms:
        return
    while i + 1 < e.generation_count:
        if e.generations[i].max_ms <= e.floor_ms:
            generation_drop(e, i)
        else:
            i += 1
    generations_relink(e)


cdef void generation_drop_lowest(EngineState* e, uint64_t count) noexcept nogil:
    # Of the first count generations the one with the lowest latest time, which becomes the floor.
    cdef uint64_t i, at = 0
    for i in range(1, count):
        if e.generations[i].max_ms < e.generations[at].max_ms:
            at = i
    e.floor_ms = max(e.floor_ms, e.generations[at].max_ms)
    generation_drop(e, at)


cdef bint early_has_room(const EngineState* e) noexcept nogil:
    # Whether one more early id can be remembered: a generation is open, or not too many have times that are still to come.
    cdef uint64_t i, coming = 0
    if e.early_count and e.generations[e.early_count - 1].count < e.generation_ids:
        return True
    for i in range(e.early_count):
        coming += e.generations[i].max_ms > e.now_ms
    return coming < max(e.generation_count_max // 4, <uint64_t> 1)


cdef Generation* early_generation(EngineState* e, uint64_t id0, uint64_t id1, uint64_t hash, uint64_t ms,
                                  uint64_t* free_slot) noexcept nogil:
    # Where an early id goes; NULL: out of memory.
    cdef Generation* g
    if e.early_count == 0 or e.generations[e.early_count - 1].count == e.generation_ids:
        if generation_open(e, True) < 0:
            return NULL
    g = &e.generations[e.early_count - 1]
    generation_find(e, g, id0, id1, hash, free_slot)
    e.early_max_ms = max(e.early_max_ms, ms)
    return g


cdef int generation_open(EngineState* e, bint early) noexcept nogil:
    # Early ones are first in the list, the open one last of its kind.
    cdef Generation opened
    cdef Generation* g
    if e.generation_count == e.generation_count_max:
        generation_drop_lowest(e, e.generation_count - 1 if early else e.generation_count)
    g = &e.generations[e.generation_count]
    memset(g, 0, sizeof(Generation))
    if not ready_take(e, g):
        if memory_take(&e.dropped, g):
            memset(g.slots, 0, e.generation_slots * sizeof(uint32_t))
        elif memory_new(e, g) < 0:
            return -1
    g.serial = e.generation_serial
    g.min_ms = <uint64_t> -1
    e.generation_serial += 1
    e.generation_count += 1
    if early:
        opened = g[0]
        g = &e.generations[e.early_count]
        memmove(g + 1, g, (e.generation_count - 1 - e.early_count) * sizeof(Generation))
        g[0] = opened
        e.early_count += 1
    generations_relink(e)
    return 0


cdef inline int ids_insert(EngineState* e, uint64_t id0, uint64_t id1, uint64_t hash, uint64_t free_slot,
                           uint64_t fingerprint, uint64_t state, uint64_t result) noexcept nogil:
    # An id that ids_find did not find; free_slot as it was given there. <0: out of memory. An early one for which there is no
    # room (the log is of an engine that let it in) goes where the others are.
    cdef Generation* g
    cdef IdEntry* entry
    cdef uint64_t ms = id_time_ms(id0)
    if du_unlikely(id_is_early(e, ms) and e.generation_count and early_has_room(e)):
        g = early_generation(e, id0, id1, hash, ms, &free_slot)
        if g == NULL:
            return -1
    else:
        if du_unlikely(e.generation_count == 0 or e.generations[e.generation_count - 1].count == e.generation_ids):
            if generation_open(e, False) < 0:
                return -1
            free_slot = id_bucket(e, hash)
        g = &e.generations[e.generation_count - 1]
    entry = &g.entries[g.count]
    entry.id0 = id0
    entry.id1 = id1
    entry.meta = fingerprint << 16 | state << 8 | result
    g.slots[free_slot] = <uint32_t> (id_tag(hash) << 20 | g.count)
    g.count += 1
    e.id_count += 1
    if ms > g.max_ms:
        g.max_ms = ms
    if ms < g.min_ms:
        g.min_ms = ms
    return 0


cdef void ids_mark(EngineState* e, uint64_t id0, uint64_t id1, uint64_t state, uint64_t result) noexcept nogil:
    # Changes what is remembered of an id, if it still is; state or result 0xFF = leave. What never changes is whose it is (CHAIN).
    cdef IdEntry* entry = ids_lookup(e, id0, id1)
    cdef uint64_t meta
    if entry == NULL:
        return
    if e.image != NULL:
        image_keep_id(e, entry)
    meta = entry.meta
    if state != 0xFF:
        meta = (meta & ~(<uint64_t> 0xFF00) | meta & <uint64_t> CHAIN << 8) | state << 8
    if result != 0xFF:
        meta = (meta & ~(<uint64_t> 0xFF)) | result
    entry.meta = meta
