# What the engine is made of: plain C memory, reached through one EngineState. Included by _engine.pyx.

cdef extern from "wallet_core/engine/native.h" nogil:
    const uint64_t K0
    const uint64_t K1
    ctypedef struct du_budget:
        uint64_t bytes
        uint64_t bytes_max
    ctypedef struct du_arena:
        uint8_t* base
        uint64_t reserved
        uint64_t committed
    bint du_likely(bint)
    bint du_unlikely(bint)
    uint64_t du_load64(const void*)
    uint32_t du_load32(const void*)
    uint16_t du_load16(const void*)
    void du_store64(void*, uint64_t)
    uint64_t du_bswap64(uint64_t)
    void du_prefetch(const void*)
    ctypedef struct du_bucket:
        uint32_t match
        uint32_t empty
    du_bucket du_bucket_look(const uint32_t* slots, uint32_t tag)
    uint32_t du_first_bit(uint32_t)
    void du_fence()
    uint64_t du_load_acquire(const uint64_t*)
    void du_store_release(uint64_t*, uint64_t)
    uint64_t du_range(uint64_t, uint64_t)
    uint64_t du_hash_id(uint64_t, uint64_t)
    uint64_t du_mum(uint64_t, uint64_t)
    uint64_t du_fingerprint(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t)
    uint64_t du_weight_balance(uint64_t)
    uint64_t du_weight_held_out(uint64_t)
    uint64_t du_weight_held_in(uint64_t)
    uint64_t du_weight_attributes(uint64_t)
    uint64_t du_attributes(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t)
    uint64_t du_chain_records(uint64_t, const uint8_t*, uint64_t)
    const int64_t DU_AMOUNT_MAX
    const int64_t DU_UNSETTLED_MAX
    bint du_amount_invalid(int64_t)
    bint du_return_fits(int64_t, int64_t, int64_t, int64_t)
    bint du_debit_overflows(int64_t, int64_t, int64_t)
    bint du_credit_overflows(int64_t, int64_t, int64_t)
    bint du_funds_short(int64_t, int64_t, int64_t, int64_t)
    bint du_limit_exceeded(int64_t, int64_t, int64_t, int64_t)
    int64_t du_within_funds(int64_t, int64_t, int64_t, int64_t)
    int64_t du_within_limit(int64_t, int64_t, int64_t, int64_t)
    int du_arena_open(du_arena*, uint64_t)
    void du_arena_close(du_arena*)
    int du_arena_commit(du_arena*, uint64_t, du_budget*)
    int du_budget_take(du_budget*, uint64_t)
    void du_budget_give(du_budget*, uint64_t)
    bint du_take(uint64_t*, uint64_t)
    void du_table_touch(void*, uint64_t)
    void du_table_populate(void*, uint64_t)
    void du_arena_touch(du_arena*, uint64_t, uint64_t)
    void* du_table_new(uint64_t, du_budget*)
    void du_table_free(void*, uint64_t, du_budget*)


cdef enum:
    NONE = 0xFFFFFFFF               # no ordinal, no hold, no slot
    ID_AHEAD_MS = 300000
    ID_EARLY_MS = 1000
    HOLDS_EXPIRED_MAX = 8190        # with one command; the rest with the next
    SEND_CHUNK = 1024               # sends in one chunk
    BLOCK = 32                      # account rows whose index slots are fetched together
    PREPARE_BYTES = 8388608         # account records touched ahead
    READY_MAX = 1024                # generations touched ahead
    BUCKET = 16                     # slots of the id table that are looked at together
    CURRENCY_COUNT_MAX = 1024
    INDEX_BITS_MIN = 10
    TOMBSTONE = 0xFFFFFFFF
    OVERLAY_SPARES = 512            # 64 MiB (image.pyx)
    RECORD_BYTES = 64               # of an Account and of a Hold: one cache line

    # account flags
    FROZEN = 1
    CLOSED = 2
    MAY_OVERDRAW = 4
    STRIPED = 8
    IN_FLIGHT_ACCOUNT = 16

    # transfer flags
    LINKED = 1
    HOLD = 2
    POST = 4
    VOID = 8
    BALANCING_DEBIT = 16
    BALANCING_CREDIT = 32
    CHAIN = 64

    # what a remembered id was, beside its result; and CHAIN, where its row had that flag
    STATE_PLAIN = 0
    STATE_HELD = 1
    STATE_POSTED = 2
    STATE_VOIDED = 3
    STATE_EXPIRED = 4

    # TransferResult
    OK = 1
    ID_INVALID = 2
    ID_TOO_OLD = 3
    ID_AHEAD = 4
    ID_REUSED = 5
    FLAGS_INVALID = 6
    AMOUNT_INVALID = 7
    PENDING_ID_INVALID = 8
    TIMEOUT_INVALID = 9
    ACCOUNTS_SAME = 10
    HOLD_NOT_FOUND = 11
    HOLD_ALREADY_POSTED = 12
    HOLD_ALREADY_VOIDED = 13
    HOLD_EXPIRED = 14
    HOLD_MISMATCH = 15
    HOLD_AMOUNT_EXCEEDED = 16
    DEBIT_ACCOUNT_NOT_FOUND = 17
    CREDIT_ACCOUNT_NOT_FOUND = 18
    CURRENCY_MISMATCH = 19
    DEBIT_ACCOUNT_CLOSED = 20
    CREDIT_ACCOUNT_CLOSED = 21
    DEBIT_ACCOUNT_FROZEN = 22
    CREDIT_ACCOUNT_FROZEN = 23
    INSUFFICIENT_FUNDS = 24
    BALANCE_LIMIT_EXCEEDED = 25
    BALANCE_OVERFLOW = 26
    LINKED_FAILED = 27
    CHAIN_OPEN = 28
    CROSS_SHARD_UNSUPPORTED = 30
    IN_FLIGHT = 31
    TOO_MANY_PENDING = 32

    # AccountResult
    ACCOUNT_OK = 1
    ACCOUNT_ID_INVALID = 2
    ACCOUNT_ALREADY_EXISTS = 3
    ACCOUNT_CURRENCY_INVALID = 4
    ACCOUNT_FLAGS_INVALID = 5
    ACCOUNT_LIMIT_INVALID = 6
    ACCOUNT_NOT_FOUND = 7
    ACCOUNT_BALANCE_NOT_ZERO = 8
    ACCOUNT_TOO_MANY = 10

    # EventKind
    KIND_ACCOUNT_OPENED = 1
    KIND_ACCOUNT_UPDATED = 2
    KIND_MONEY_MOVED = 3
    KIND_HOLD_PLACED = 4
    KIND_HOLD_POSTED = 5
    KIND_HOLD_VOIDED = 6
    KIND_HOLD_EXPIRED = 7
    KIND_TRANSFER_REFUSED = 8
    KIND_MONEY_SENT = 9
    KIND_MONEY_RECEIVED = 10
    KIND_CREDIT_REFUSED = 11
    KIND_SAGA_SETTLED = 12
    KIND_MONEY_RETURNED = 13


cdef struct Account:                # 64 bytes, one cache line
    uint64_t id0
    uint64_t id1
    int64_t balance
    int64_t held_out
    int64_t held_in
    int64_t overdraft_limit
    int64_t balance_limit
    uint32_t currency
    uint16_t flags
    uint16_t reserved


cdef struct Hold:                   # 64 bytes; id first, as in Account
    uint64_t id0
    uint64_t id1
    uint64_t sequence               # of its HoldPlaced record; 0 = free slot
    uint64_t deadline_ms            # 0 = none
    int64_t amount
    uint32_t debit
    uint32_t credit
    uint32_t heap_position          # NONE = not in the heap; in a free slot: the next free slot
    uint16_t code
    uint16_t flags                  # CHAIN: only rows with that flag post or void it
    uint64_t reserved


cdef struct HeapEntry:              # holds by (deadline, sequence)
    uint64_t deadline_ms
    uint64_t sequence
    uint64_t hold


cdef enum:
    KEY_ACCOUNT_ID = 0
    KEY_HOLD_ID = 1
    KEY_HOLD_SEQUENCE = 2


cdef struct Index:                  # id or sequence -> position; see index.pyx
    uint32_t* slots
    uint32_t* old                   # while it grows: the table before, read only but for tombstones
    uint64_t old_cursor             # its slots below are moved
    uint64_t used                   # slots of the current table that are not empty
    uint64_t live                   # keys
    uint64_t ready                  # a touched table, made by memory_prepare: its address | its bits; 0 = none
    uint32_t bits
    uint32_t old_bits
    uint32_t key


cdef struct IdEntry:                # 24 bytes
    uint64_t id0
    uint64_t id1
    uint64_t meta                   # fingerprint << 16 | state << 8 | result


cdef struct Generation:             # see id_table.pyx
    uint32_t* slots
    IdEntry* entries
    uint64_t serial
    uint64_t min_ms
    uint64_t max_ms
    uint64_t older_max_ms           # the greatest max_ms of all older generations; not of early ids'
    uint64_t count


cdef struct GenerationMemory:       # handed over between the writer and memory_prepare: 0 = nothing here
    uint64_t slots                  # uint32_t*, exchanged atomically; entries are valid while this is not 0
    uint64_t entries                # IdEntry*


cdef struct SendChunk:
    PendingSend sends[SEND_CHUNK]


cdef struct SendQueue:              # sends to one destination that are not settled: (settled, last]
    uint64_t settled
    uint64_t last
    uint64_t returned               # greatest number that was returned
    uint64_t kept                   # first chunk number (number / SEND_CHUNK) that is still allocated
    uint64_t ring_size              # power of two, 0 = none
    SendChunk** ring                # chunk number & (ring_size - 1)


cdef struct CreditCursor:           # what one source has sent us
    uint64_t applied
    Refusal* refusals
    uint64_t first                  # refusals[first:last] are kept
    uint64_t last
    uint64_t capacity


cdef struct Currency:
    uint32_t currency
    uint32_t in_flight              # ordinal
    int64_t unsettled               # sum of the sends that are not settled, to all destinations; at most DU_UNSETTLED_MAX


cdef struct UndoEntry:              # one member of the open chain
    uint32_t row                    # where its result goes
    uint32_t what
    uint64_t id0
    uint64_t id1
    uint64_t amount                 # as asked for, for the refusal record
    uint64_t fingerprint
    uint64_t flags
    uint64_t code
    int64_t moved
    uint32_t debit
    uint32_t credit
    Hold hold


cdef struct ImageState              # image.pyx


cdef struct EngineState:
    # accounts
    du_arena accounts_memory
    Account* accounts
    uint64_t account_count
    Index accounts_index
    # transfer ids
    Generation* generations         # those of early ids, then the others; oldest first, the last of each is open
    uint64_t generation_count
    uint64_t early_count
    uint64_t early_max_ms           # the greatest max_ms of those of early ids
    uint64_t lowest_max_ms          # the lowest max_ms of all but the last, or less
    uint64_t generation_serial
    uint64_t generation_slots
    GenerationMemory ready[READY_MAX]  # for the next generations: touched, slots empty; made by memory_prepare
    GenerationMemory dropped        # of a dropped generation: slots not empty
    uint64_t ready_count            # how many of them are wanted
    uint64_t room_ids               # for how many ids
    uint64_t is_prepared            # another thread makes memory ready: the writer may count on it a little
    uint64_t accounts_touched       # bytes of the account records that memory_prepare has touched
    uint64_t id_count
    # holds
    du_arena holds_memory
    Hold* holds
    uint64_t hold_slots
    uint64_t hold_count
    uint32_t hold_free
    Index holds_by_id
    Index holds_by_sequence
    du_arena heap_memory
    HeapEntry* heap
    uint64_t heap_count
    # sagas
    SendQueue sends[SHARD_COUNT_MAX]
    CreditCursor cursors[SHARD_COUNT_MAX]
    Currency currencies[CURRENCY_COUNT_MAX]
    uint64_t currency_count
    uint64_t unsettled_count
    # time, numbers, digest
    uint64_t sequence
    uint64_t now_ns
    uint64_t now_ms
    uint64_t floor_ms
    uint64_t linear
    uint64_t chain
    # parameters
    uint64_t shard
    uint64_t id_window_ms
    uint64_t generation_ids
    uint64_t generation_count_max
    uint64_t accounts_max
    uint64_t holds_max
    uint64_t unsettled_max
    # the rest
    uint8_t sends_refused[SHARD_COUNT_MAX]  # not part of the state: new sends to that shard are TOO_MANY_PENDING
    du_budget budget
    du_arena undo_memory
    UndoEntry* undo
    uint64_t undo_count
    uint64_t repeated_count
    uint64_t replay_error
    const char* replay_reason
    ImageState* image               # NULL = no image is being taken
    uint64_t spares[OVERLAY_SPARES] # a ring of OverlayChunk*, touched for the writer by the thread that reads the image
    uint64_t spares_made            # by that thread
    uint64_t spares_taken           # by the writer
    uint64_t image_ended            # ImageState* whose memory is still to be given back, 0 = none
    # while an image is loaded: the last piece's kind, and what its header promises
    uint32_t load_stage
    uint64_t load_pieces
    uint64_t load_header[18]
    uint64_t load_linear
    uint64_t load_accounts
    uint64_t load_holds
    uint64_t load_generations
    uint64_t load_early
    uint64_t load_last[SHARD_COUNT_MAX]
    uint32_t poisoned


cdef inline int poison(EngineState* e) noexcept nogil:
    e.poisoned = 1
    return ENGINE_POISONED


cdef EngineState* state_new(uint64_t shard, uint64_t id_window_ms, uint64_t id_count_max, uint64_t generation_ids,
                            uint64_t accounts_max, uint64_t holds_max, uint64_t unsettled_max,
                            uint64_t memory_bytes_max, uint64_t room_ids) noexcept nogil:
    cdef EngineState* e = <EngineState*> calloc(1, sizeof(EngineState))
    if e == NULL:
        return NULL
    e.budget.bytes_max = memory_bytes_max
    e.shard = shard
    e.hold_free = NONE
    e.room_ids = room_ids
    if state_configure(e, id_window_ms, id_count_max // generation_ids, generation_ids,
                       accounts_max, holds_max, unsettled_max) < 0:
        state_free(e)
        return NULL
    return e


cdef int state_configure(EngineState* e, uint64_t id_window_ms, uint64_t generation_count_max, uint64_t generation_ids,
                         uint64_t accounts_max, uint64_t holds_max, uint64_t unsettled_max) noexcept nogil:
    # Sets the parameters of an engine that holds nothing yet.
    e.id_window_ms = id_window_ms
    e.generation_ids = generation_ids
    e.generation_count_max = generation_count_max
    e.accounts_max = accounts_max
    e.holds_max = holds_max
    e.unsettled_max = unsettled_max
    e.generation_slots = (generation_ids + generation_ids // 2) // BUCKET * BUCKET + 2 * BUCKET
    # no more than will ever be remembered; where memory is bounded it is not spent on what may never come
    e.ready_count = 1
    if e.budget.bytes_max == 0:
        e.ready_count = min(max((e.room_ids + generation_ids - 1) // generation_ids, 1), generation_count_max, READY_MAX)
    du_arena_close(&e.accounts_memory)
    du_arena_close(&e.holds_memory)
    du_arena_close(&e.heap_memory)
    du_arena_close(&e.undo_memory)
    free(e.generations)
    e.generations = <Generation*> calloc(generation_count_max + 1, sizeof(Generation))
    if (e.generations == NULL
            or du_arena_open(&e.accounts_memory, accounts_max * sizeof(Account)) < 0
            or du_arena_open(&e.holds_memory, holds_max * sizeof(Hold)) < 0
            or du_arena_open(&e.heap_memory, holds_max * sizeof(HeapEntry)) < 0
            or du_arena_open(&e.undo_memory, (<uint64_t> 1 << 32) * 4) < 0):
        return poison(e)
    e.accounts = <Account*> e.accounts_memory.base
    e.holds = <Hold*> e.holds_memory.base
    e.heap = <HeapEntry*> e.heap_memory.base
    e.undo = <UndoEntry*> e.undo_memory.base
    if (index_open(e, &e.accounts_index, KEY_ACCOUNT_ID, INDEX_BITS_MIN) < 0
            or index_open(e, &e.holds_by_id, KEY_HOLD_ID, INDEX_BITS_MIN) < 0
            or index_open(e, &e.holds_by_sequence, KEY_HOLD_SEQUENCE, INDEX_BITS_MIN) < 0):
        return poison(e)
    return 0


cdef void state_free(EngineState* e) noexcept nogil:
    cdef uint64_t i
    if e == NULL:
        return
    image_end(e)
    image_release(e)
    spares_free(e)
    for i in range(e.generation_count):
        generation_free(e, &e.generations[i])
    memory_forget(e)
    free(e.generations)
    index_close(e, &e.accounts_index)
    index_close(e, &e.holds_by_id)
    index_close(e, &e.holds_by_sequence)
    for i in range(SHARD_COUNT_MAX):
        sends_free(&e.sends[i])
        free(e.cursors[i].refusals)
    du_arena_close(&e.accounts_memory)
    du_arena_close(&e.holds_memory)
    du_arena_close(&e.heap_memory)
    du_arena_close(&e.undo_memory)
    free(e)


cdef inline void keep_account(EngineState* e, uint64_t ordinal) noexcept nogil:
    # Call before changing an account: an image in progress keeps the record as it was.
    if du_unlikely(e.image != NULL):
        image_keep_account(e, ordinal)


cdef inline int events_reserve(EventBuffer* events, uint64_t count) noexcept nogil:
    # Room for count more records.
    cdef size_t wanted = events.length + count * EVENT_BYTES
    cdef uint8_t* data
    if wanted <= events.capacity:
        return 0
    if wanted < 2 * events.capacity:
        wanted = 2 * events.capacity
    if wanted < 4096:
        wanted = 4096
    data = <uint8_t*> realloc(events.data, wanted)
    if data == NULL:
        return -1
    events.data = data
    events.capacity = wanted
    return 0


cdef inline void emit(EngineState* e, EventBuffer* events, uint64_t w0, uint64_t w1, uint64_t w2, uint64_t w3,
                      uint64_t w4, uint64_t w5) noexcept nogil:
    # One record of six words; room was reserved.
    cdef uint8_t* p = events.data + events.length
    du_store64(p, w0)
    du_store64(p + 8, w1)
    du_store64(p + 16, w2)
    du_store64(p + 24, w3)
    du_store64(p + 32, w4)
    du_store64(p + 40, w5)
    events.length += EVENT_BYTES
    events.count += 1
    e.sequence += 1


cdef inline void emit_money(EngineState* e, EventBuffer* events, uint32_t kind, uint64_t id0, uint64_t id1,
                            int64_t amount, uint64_t debit, uint64_t credit, uint64_t aux, uint64_t code,
                            uint64_t fingerprint, uint64_t last) noexcept nogil:
    emit(e, events, id0, id1, <uint64_t> amount, debit | credit << 32, aux | code << 48,
         fingerprint | <uint64_t> kind << 48 | last << 56)


cdef inline void chain_digest(EngineState* e, EventBuffer* events, size_t start) noexcept nogil:
    # The chained half of the digest over the records since start; called once, when they can no longer be rolled back.
    e.chain = du_chain_records(e.chain, events.data + start, (events.length - start) // EVENT_BYTES)


cdef inline void clock_advance(EngineState* e, uint64_t timestamp_ns) noexcept nogil:
    # Time never runs backwards; the id floor follows it.
    if timestamp_ns > e.now_ns:
        e.now_ns = timestamp_ns
        e.now_ms = timestamp_ns // 1000000
    if e.now_ms > e.id_window_ms and e.now_ms - e.id_window_ms > e.floor_ms:
        e.floor_ms = e.now_ms - e.id_window_ms
        generations_drop_old(e)


# Balance changes. Each keeps the linear half of the digest; amounts may be negative (rollback).

cdef inline void move(EngineState* e, uint64_t debit, uint64_t credit, int64_t amount) noexcept nogil:
    keep_account(e, debit)
    keep_account(e, credit)
    e.accounts[debit].balance -= amount
    e.accounts[credit].balance += amount
    e.linear += <uint64_t> amount * (du_weight_balance(credit) - du_weight_balance(debit))


cdef inline void hold_amounts(EngineState* e, uint64_t debit, uint64_t credit, int64_t amount) noexcept nogil:
    keep_account(e, debit)
    keep_account(e, credit)
    e.accounts[debit].held_out += amount
    e.accounts[credit].held_in += amount
    e.linear += <uint64_t> amount * (du_weight_held_out(debit) + du_weight_held_in(credit))
