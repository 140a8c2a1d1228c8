# Transfers: the guards in their documented order, then the line after which nothing may fail, then the effects.
# Included by _engine.pyx.
#
# Every row passes three stations, a few rows apart, so that the memory it will need is on its way while others are worked
# on: (1) read the columns, hash, prefetch the index slots; (2) look at the slots, prefetch the account records; (3) apply,
# in order. Nothing that stations 1 and 2 find out can become wrong before station 3: accounts that are opened meanwhile
# are in-flight accounts, which no transfer may name.

cdef enum:
    RING_MASK = 15                  # rows between station 1 and 3, a power of two - 1
    HASH_AHEAD = 12
    FETCH_AHEAD = 6
    # what came of a row
    REPEATED = 1                    # answered from the id table
    STATELESS = 2                   # refused, not remembered
    REFUSED = 3                     # refused, to be remembered
    DONE = 4
    # what an undo entry takes back
    UNDO_NOTHING = 0                # a repeated row
    UNDO_MOVE = 1
    UNDO_HOLD = 2
    UNDO_POST = 3
    UNDO_VOID = 4


cdef struct Transfer:
    uint64_t id0
    uint64_t id1
    uint64_t debit0
    uint64_t debit1
    uint64_t credit0
    uint64_t credit1
    uint64_t pending0
    uint64_t pending1
    int64_t amount
    uint64_t id_hash
    uint64_t debit_hash
    uint64_t credit_hash
    uint64_t fingerprint
    uint64_t free_slot
    int64_t moved
    uint32_t row
    uint32_t flags
    uint32_t timeout_s
    uint32_t code
    uint32_t credit_shard
    uint32_t debit                  # ordinals; after pass 2 candidates
    uint32_t credit
    uint32_t hold                   # slot
    uint32_t outcome


cdef inline void transfer_read(const TransferColumns* c, uint64_t i, Transfer* t) noexcept nogil:
    cdef uint64_t row = c.rows[i] if c.rows != NULL else i
    t.row = <uint32_t> row
    t.id0 = du_load64(c.ids + 16 * row)
    t.id1 = du_load64(c.ids + 16 * row + 8)
    t.debit0 = du_load64(c.debit_ids + 16 * row)
    t.debit1 = du_load64(c.debit_ids + 16 * row + 8)
    t.credit0 = du_load64(c.credit_ids + 16 * row)
    t.credit1 = du_load64(c.credit_ids + 16 * row + 8)
    t.amount = <int64_t> du_load64(c.amounts + 8 * row)
    t.flags = du_load16(c.flags + 2 * row) if c.flags != NULL else 0
    t.timeout_s = du_load32(c.timeouts_s + 4 * row) if c.timeouts_s != NULL else 0
    t.code = du_load16(c.codes + 2 * row) if c.codes != NULL else 0
    t.credit_shard = du_load16(c.credit_shards + 2 * row) if c.credit_shards != NULL else SHARD_LOCAL
    if c.pending_ids != NULL:
        t.pending0 = du_load64(c.pending_ids + 16 * row)
        t.pending1 = du_load64(c.pending_ids + 16 * row + 8)
    else:
        t.pending0 = 0
        t.pending1 = 0


cdef inline uint32_t transfer_account(const EngineState* e, uint32_t candidate, uint64_t hash, uint64_t id0, uint64_t id1) noexcept nogil:
    # The ordinal that a transfer may use under this id, or NONE.
    cdef const Account* a
    if du_unlikely(candidate == NONE):
        candidate = index_find(e, &e.accounts_index, hash, id0, id1)
        if candidate == NONE:
            return NONE
    a = &e.accounts[candidate]
    if du_unlikely(a.id0 != id0 or a.id1 != id1):
        candidate = index_find(e, &e.accounts_index, hash, id0, id1)
        if candidate == NONE:
            return NONE
        a = &e.accounts[candidate]
    if du_unlikely(a.flags & IN_FLIGHT_ACCOUNT):
        return NONE
    return candidate


cdef inline uint8_t flags_check(const Account* d, const Account* c) noexcept nogil:
    # 19 to 23
    if du_likely(d.currency == c.currency and not (d.flags | c.flags) & (CLOSED | FROZEN)):
        return OK
    if d.currency != c.currency:
        return CURRENCY_MISMATCH
    if d.flags & CLOSED:
        return DEBIT_ACCOUNT_CLOSED
    if c.flags & CLOSED:
        return CREDIT_ACCOUNT_CLOSED
    if d.flags & FROZEN:
        return DEBIT_ACCOUNT_FROZEN
    return CREDIT_ACCOUNT_FROZEN


cdef inline uint8_t money_check(const Account* d, const Account* c, int64_t amount) noexcept nogil:
    # 24 to 26
    if not d.flags & MAY_OVERDRAW and du_funds_short(d.balance, d.held_out, d.overdraft_limit, amount):
        return INSUFFICIENT_FUNDS
    if du_unlikely(du_limit_exceeded(c.balance, c.held_in, c.balance_limit, amount)):
        return BALANCE_LIMIT_EXCEEDED
    if du_unlikely(du_debit_overflows(d.balance, d.held_out, amount) or du_credit_overflows(c.balance, c.held_in, amount)):
        return BALANCE_OVERFLOW
    return OK


cdef uint8_t balancing_amount(const Account* d, const Account* c, uint32_t flags, int64_t* amount) noexcept nogil:
    # As much as the limits allow, up to the amount asked for (0 = no maximum). Where there is neither, an account that may
    # overdraw gives what it has, and one without a limit is not filled up from it.
    if amount[0] == 0:
        amount[0] = DU_AMOUNT_MAX
        if flags & BALANCING_DEBIT:
            if d.flags & MAY_OVERDRAW:
                amount[0] = du_within_funds(d.balance, d.held_out, 0, amount[0])
                if amount[0] < 1:
                    return INSUFFICIENT_FUNDS
        elif c.balance_limit == 0 and d.flags & MAY_OVERDRAW:
            return BALANCE_OVERFLOW
    if flags & BALANCING_DEBIT and not d.flags & MAY_OVERDRAW:
        amount[0] = du_within_funds(d.balance, d.held_out, d.overdraft_limit, amount[0])
        if amount[0] < 1:
            return INSUFFICIENT_FUNDS
    if flags & BALANCING_CREDIT and c.balance_limit != 0:
        amount[0] = du_within_limit(c.balance, c.held_in, c.balance_limit, amount[0])
        if amount[0] < 1:
            return BALANCE_LIMIT_EXCEEDED
    return OK


cdef inline uint8_t row_check(const EngineState* e, const Transfer* t, bint chained, bint chain_steps) noexcept nogil:
    # 6 to 10, then 28 to 32 (28 is found before): what the row says, whatever the accounts hold.
    cdef uint32_t kinds = t.flags & (HOLD | POST | VOID)
    cdef bint finishing = kinds == POST or kinds == VOID
    if du_likely(t.flags == 0 and not du_amount_invalid(t.amount) and (t.pending0 | t.pending1) == 0 and t.timeout_s == 0
                 and t.credit_shard == SHARD_LOCAL and (t.debit0 != t.credit0 or t.debit1 != t.credit1)):
        return OK
    if t.flags & ~(<uint32_t> 127) or kinds & (kinds - 1) or (finishing and t.flags & (BALANCING_DEBIT | BALANCING_CREDIT)):
        return FLAGS_INVALID
    if t.flags & CHAIN and (not chain_steps or kinds == 0 or t.flags & (BALANCING_DEBIT | BALANCING_CREDIT)):
        return FLAGS_INVALID
    if du_amount_invalid(t.amount) and not (
            t.amount == 0 and (finishing or t.flags & (BALANCING_DEBIT | BALANCING_CREDIT))):
        return AMOUNT_INVALID
    if finishing:
        if not id_is_v7(t.pending0, t.pending1) or (t.pending0 == t.id0 and t.pending1 == t.id1):
            return PENDING_ID_INVALID
    elif t.pending0 | t.pending1:
        return PENDING_ID_INVALID
    if t.timeout_s and kinds != HOLD:
        return TIMEOUT_INVALID
    if t.debit0 == t.credit0 and t.debit1 == t.credit1 and not (finishing and (t.debit0 | t.debit1) == 0):
        return ACCOUNTS_SAME
    if t.credit_shard != SHARD_LOCAL:
        if t.flags or chained or t.credit_shard >= SHARD_COUNT_MAX or t.credit_shard == e.shard:
            return CROSS_SHARD_UNSUPPORTED
        if (e.sends[t.credit_shard].last - e.sends[t.credit_shard].settled >= e.unsettled_max
                or e.sends_refused[t.credit_shard]):
            return TOO_MANY_PENDING
    if kinds == HOLD and e.hold_count >= e.holds_max:
        return TOO_MANY_PENDING
    return OK


cdef uint8_t finishing_check(const EngineState* e, Transfer* t) noexcept nogil:
    # A post or void: 11 to 16, then for a post 20 to 23. Nothing else can fail: the money is held. To a row without the flag
    # CHAIN the holds with it do not exist, not even once they are over, and the other way round.
    cdef const Hold* hold
    cdef const IdEntry* entry
    cdef uint64_t state
    cdef uint8_t result
    t.hold = hold_by_id(e, t.pending0, t.pending1)
    if t.hold == NONE:
        entry = ids_lookup(e, t.pending0, t.pending1)
        if entry != NULL:
            state = (entry.meta >> 8 ^ t.flags & CHAIN) & 0xFF
            if state == STATE_POSTED:
                return HOLD_ALREADY_POSTED
            if state == STATE_VOIDED:
                return HOLD_ALREADY_VOIDED
            if state == STATE_EXPIRED:
                return HOLD_EXPIRED
        return HOLD_NOT_FOUND
    hold = &e.holds[t.hold]
    if (hold.flags ^ t.flags) & CHAIN:
        return HOLD_NOT_FOUND
    if du_unlikely(hold.deadline_ms != 0 and hold.deadline_ms <= e.now_ms):
        return HOLD_EXPIRED             # it is among those that end with the next command
    t.debit = hold.debit
    t.credit = hold.credit
    t.moved = t.amount if t.amount else hold.amount
    if (t.debit0 | t.debit1) and (e.accounts[t.debit].id0 != t.debit0 or e.accounts[t.debit].id1 != t.debit1):
        return HOLD_MISMATCH
    if (t.credit0 | t.credit1) and (e.accounts[t.credit].id0 != t.credit0 or e.accounts[t.credit].id1 != t.credit1):
        return HOLD_MISMATCH
    if t.flags & VOID:
        return OK if t.moved == hold.amount else HOLD_MISMATCH
    if t.moved > hold.amount:
        return HOLD_AMOUNT_EXCEEDED
    result = flags_check(&e.accounts[t.debit], &e.accounts[t.credit])
    return result


cdef uint8_t sending_check(const EngineState* e, Transfer* t) noexcept nogil:
    # The debit side of a transfer whose credit account lives on another shard: 17, 20, 22, 24, 26.
    cdef const Account* d
    cdef const Currency* currency
    t.debit = transfer_account(e, t.debit, t.debit_hash, t.debit0, t.debit1)
    if t.debit == NONE:
        return DEBIT_ACCOUNT_NOT_FOUND
    d = &e.accounts[t.debit]
    if d.flags & CLOSED:
        return DEBIT_ACCOUNT_CLOSED
    if d.flags & FROZEN:
        return DEBIT_ACCOUNT_FROZEN
    if not d.flags & MAY_OVERDRAW and du_funds_short(d.balance, d.held_out, d.overdraft_limit, t.amount):
        return INSUFFICIENT_FUNDS
    if du_debit_overflows(d.balance, d.held_out, t.amount):
        return BALANCE_OVERFLOW
    currency = currency_find(<EngineState*> e, d.currency)
    if currency == NULL:
        return OK if in_flight_has_room(e, d.currency) else TOO_MANY_PENDING
    if du_credit_overflows(e.accounts[currency.in_flight].balance, 0, t.amount) or unsettled_overflows(currency, t.amount):
        return BALANCE_OVERFLOW
    return OK


cdef inline uint8_t moving_check(const EngineState* e, Transfer* t) noexcept nogil:
    # A plain transfer or a hold: 17 to 26.
    cdef const Account* d
    cdef const Account* c
    cdef uint8_t result
    t.debit = transfer_account(e, t.debit, t.debit_hash, t.debit0, t.debit1)
    if du_unlikely(t.debit == NONE):
        return DEBIT_ACCOUNT_NOT_FOUND
    t.credit = transfer_account(e, t.credit, t.credit_hash, t.credit0, t.credit1)
    if du_unlikely(t.credit == NONE):
        return CREDIT_ACCOUNT_NOT_FOUND
    d = &e.accounts[t.debit]
    c = &e.accounts[t.credit]
    result = flags_check(d, c)
    if du_unlikely(result != OK):
        return result
    t.moved = t.amount
    if du_unlikely(t.flags & (BALANCING_DEBIT | BALANCING_CREDIT)):
        result = balancing_amount(d, c, t.flags, &t.moved)
        if result != OK:
            return result
    return money_check(d, c, t.moved)


cdef inline UndoEntry* undo_push(EngineState* e, const Transfer* t, uint32_t what) noexcept nogil:
    # NULL: out of memory.
    cdef UndoEntry* undo
    if du_arena_commit(&e.undo_memory, (e.undo_count + 1) * sizeof(UndoEntry), &e.budget) < 0:
        return NULL
    undo = &e.undo[e.undo_count]
    e.undo_count += 1
    undo.row = t.row
    undo.what = what
    undo.id0 = t.id0
    undo.id1 = t.id1
    undo.amount = <uint64_t> t.amount
    undo.fingerprint = t.fingerprint
    undo.flags = t.flags
    undo.code = t.code
    undo.moved = t.moved
    undo.debit = t.debit
    undo.credit = t.credit
    return undo


cdef inline int transfer_move(EngineState* e, Transfer* t, bint chained, EventBuffer* events) noexcept nogil:
    if chained and undo_push(e, t, UNDO_MOVE) == NULL:
        return -1
    if ids_insert(e, t.id0, t.id1, t.id_hash, t.free_slot, t.fingerprint, STATE_PLAIN, OK) < 0:
        return -1
    move(e, t.debit, t.credit, t.moved)
    emit_money(e, events, KIND_MONEY_MOVED, t.id0, t.id1, t.moved, t.debit, t.credit, 0, t.code, t.fingerprint, t.flags)
    return 0


cdef int transfer_hold(EngineState* e, Transfer* t, bint chained, EventBuffer* events) noexcept nogil:
    cdef Hold hold
    if chained and undo_push(e, t, UNDO_HOLD) == NULL:
        return -1
    if ids_insert(e, t.id0, t.id1, t.id_hash, t.free_slot, t.fingerprint, STATE_HELD | t.flags & CHAIN, OK) < 0:
        return -1
    memset(&hold, 0, sizeof(Hold))
    hold.id0 = t.id0
    hold.id1 = t.id1
    hold.sequence = e.sequence + 1
    hold.deadline_ms = deadline_of(e, t.timeout_s, t.flags)
    hold.amount = t.moved
    hold.debit = t.debit
    hold.credit = t.credit
    hold.code = <uint16_t> t.code
    hold.flags = <uint16_t> (t.flags & CHAIN)
    if hold_add(e, &hold) < 0:
        return -1
    emit_money(e, events, KIND_HOLD_PLACED, t.id0, t.id1, t.moved, t.debit, t.credit, hold.deadline_ms, t.code,
               t.fingerprint, t.flags)
    return 0


cdef int transfer_finish(EngineState* e, Transfer* t, bint chained, EventBuffer* events) noexcept nogil:
    # Post or void.
    cdef bint post = t.flags & POST != 0
    cdef UndoEntry* undo
    cdef Hold hold = e.holds[t.hold]
    if chained:
        undo = undo_push(e, t, UNDO_POST if post else UNDO_VOID)
        if undo == NULL:
            return -1
        undo.hold = hold
    if ids_insert(e, t.id0, t.id1, t.id_hash, t.free_slot, t.fingerprint, STATE_PLAIN | t.flags & CHAIN, OK) < 0:
        return -1
    hold_remove(e, t.hold)
    ids_mark(e, hold.id0, hold.id1, STATE_POSTED if post else STATE_VOIDED, 0xFF)
    if post:
        move(e, t.debit, t.credit, t.moved)
    emit_money(e, events, KIND_HOLD_POSTED if post else KIND_HOLD_VOIDED, t.id0, t.id1, t.moved, t.debit, t.credit,
               hold.sequence, t.code, t.fingerprint, t.flags)
    return 0


cdef int transfer_send(EngineState* e, Transfer* t, EventBuffer* events) noexcept nogil:
    cdef uint32_t in_flight = in_flight_open(e, e.accounts[t.debit].currency, events)
    if in_flight == NONE:
        return -1
    if ids_insert(e, t.id0, t.id1, t.id_hash, t.free_slot, t.fingerprint, STATE_PLAIN, IN_FLIGHT) < 0:
        return -1
    if send_add(e, t.credit_shard, e.sequence + 1, t.id0, t.id1, t.credit0, t.credit1, t.amount, t.debit, t.code) < 0:
        return -1
    move(e, t.debit, in_flight, t.amount)
    currency_find(e, e.accounts[t.debit].currency).unsettled += t.amount
    emit(e, events, t.id0, t.id1, <uint64_t> t.amount, t.debit | t.credit0 << 32, t.credit0 >> 32 | t.credit1 << 32,
         t.credit1 >> 32 | <uint64_t> t.code << 32 | <uint64_t> KIND_MONEY_SENT << 48 | <uint64_t> t.credit_shard << 56)
    return 0


cdef inline void transfer_refuse(EngineState* e, uint64_t id0, uint64_t id1, uint64_t amount, uint64_t fingerprint,
                                 uint64_t flags, uint64_t code, uint64_t result, EventBuffer* events) noexcept nogil:
    emit(e, events, id0, id1, amount, 0, result | code << 48,
         fingerprint | <uint64_t> KIND_TRANSFER_REFUSED << 48 | flags << 56)


cdef inline int transfer_apply(EngineState* e, Transfer* t, bint chained, bint broken, bint chain_steps, uint8_t* result,
                               EventBuffer* events) noexcept nogil:
    # One row. Refusals are left to the caller to record (t.outcome == REFUSED). <0: out of memory.
    cdef uint64_t ms
    cdef IdEntry* entry
    t.outcome = STATELESS
    if du_unlikely(not id_is_v7(t.id0, t.id1)):
        result[0] = ID_INVALID
        return 0
    ms = id_time_ms(t.id0)
    if du_unlikely(ms <= e.floor_ms):
        result[0] = ID_TOO_OLD
        return 0
    if du_unlikely(ms > e.now_ms + ID_AHEAD_MS):
        result[0] = ID_AHEAD
        return 0
    entry = ids_find(e, t.id0, t.id1, t.id_hash, &t.free_slot)
    if du_unlikely(entry != NULL):
        if t.flags & CHAIN and not chain_steps:     # before its content is compared with what is remembered
            result[0] = FLAGS_INVALID
            return 0
        if entry.meta >> 16 != t.fingerprint or (entry.meta >> 8 ^ t.flags) & CHAIN:
            result[0] = ID_REUSED
            return 0
        e.repeated_count += 1
        t.outcome = REPEATED
        result[0] = entry.meta & 0xFF
        return 0
    if du_unlikely(id_is_early(e, ms) and not early_has_room(e)):
        result[0] = ID_AHEAD
        return 0
    if du_unlikely(broken):
        if t.flags & CHAIN and not chain_steps:     # or an id could be used up with a flag that its caller may not use
            result[0] = FLAGS_INVALID
            return 0
        t.outcome = REFUSED
        result[0] = LINKED_FAILED
        return 0
    result[0] = row_check(e, t, chained, chain_steps)
    if du_unlikely(result[0] != OK):
        return 0
    if du_likely(t.credit_shard == SHARD_LOCAL and not t.flags & (HOLD | POST | VOID)):
        result[0] = moving_check(e, t)
        if du_likely(result[0] == OK):
            t.outcome = DONE
            return transfer_move(e, t, chained, events)
    elif t.credit_shard != SHARD_LOCAL:
        result[0] = sending_check(e, t)
        if result[0] == TOO_MANY_PENDING:
            return 0
        if result[0] == OK:
            t.outcome = DONE
            result[0] = IN_FLIGHT
            return transfer_send(e, t, events)
    elif t.flags & HOLD:
        result[0] = moving_check(e, t)
        if result[0] == OK:
            t.outcome = DONE
            return transfer_hold(e, t, chained, events)
    else:
        result[0] = finishing_check(e, t)
        if result[0] == OK:
            t.outcome = DONE
            return transfer_finish(e, t, chained, events)
    t.outcome = REFUSED
    return 0


cdef int chain_rollback(EngineState* e, uint8_t* results, EventBuffer* events, size_t start, uint32_t count,
                        uint64_t sequence) noexcept nogil:
    # Takes back what the open chain did, latest first, and refuses its members. <0: out of memory.
    cdef uint64_t i = e.undo_count
    cdef UndoEntry* undo
    cdef const IdEntry* entry
    while i > 0:
        i -= 1
        undo = &e.undo[i]
        if undo.what == UNDO_MOVE:
            move(e, undo.debit, undo.credit, -undo.moved)
        elif undo.what == UNDO_HOLD:
            hold_remove(e, hold_by_id(e, undo.id0, undo.id1))
        elif undo.what != UNDO_NOTHING:
            if undo.what == UNDO_POST:
                move(e, undo.debit, undo.credit, -undo.moved)
            if hold_add(e, &undo.hold) < 0:
                return -1
            ids_mark(e, undo.hold.id0, undo.hold.id1, STATE_HELD, 0xFF)
    events.length = start
    events.count = count
    e.sequence = sequence
    for i in range(e.undo_count):
        undo = &e.undo[i]
        if undo.what == UNDO_NOTHING:
            # the id may be that of an earlier member, refused a moment ago
            entry = ids_lookup(e, undo.id0, undo.id1)
            if entry != NULL:
                results[undo.row] = entry.meta & 0xFF
            continue
        ids_mark(e, undo.id0, undo.id1, STATE_PLAIN, LINKED_FAILED)
        results[undo.row] = LINKED_FAILED
        transfer_refuse(e, undo.id0, undo.id1, undo.amount, undo.fingerprint, undo.flags, undo.code, LINKED_FAILED, events)
    e.undo_count = 0
    return 0


cdef uint64_t open_chain_start(const TransferColumns* c) noexcept nogil:
    # Index of the first row of a chain that the batch's end cuts off, else count.
    cdef uint64_t i = c.count
    if c.flags == NULL:
        return i
    while i > 0 and du_load16(c.flags + 2 * (c.rows[i - 1] if c.rows != NULL else i - 1)) & LINKED:
        i -= 1
    return i


cdef inline void transfer_hash(const EngineState* e, const TransferColumns* c, uint64_t i, Transfer* t) noexcept nogil:
    transfer_read(c, i, t)
    t.debit_hash = du_hash_id(t.debit0, t.debit1)
    t.credit_hash = du_hash_id(t.credit0, t.credit1)
    t.id_hash = du_hash_id(t.id0, t.id1)
    index_prefetch(&e.accounts_index, t.debit_hash)
    index_prefetch(&e.accounts_index, t.credit_hash)
    ids_prefetch(e, t.id_hash)
    t.fingerprint = du_fingerprint(t.debit0, t.debit1, t.credit0, t.credit1, <uint64_t> t.amount,
                                   t.flags | <uint64_t> t.code << 16 | <uint64_t> t.timeout_s << 32,
                                   t.pending0, t.pending1)


cdef inline void transfer_fetch(const EngineState* e, Transfer* t) noexcept nogil:
    t.debit = index_candidate(&e.accounts_index, t.debit_hash)
    t.credit = index_candidate(&e.accounts_index, t.credit_hash)
    if du_likely(t.debit != NONE):
        du_prefetch(&e.accounts[t.debit])
    if du_likely(t.credit != NONE):
        du_prefetch(&e.accounts[t.credit])


cdef int transfers_apply(EngineState* e, const TransferColumns* c, uint64_t timestamp_ns, uint8_t* results,
                         EventBuffer* events) noexcept nogil:
    cdef Transfer ring[RING_MASK + 1]
    cdef Transfer* t
    cdef uint64_t i
    cdef uint64_t hashed = 0, fetched = 0
    cdef uint64_t open_from = open_chain_start(c)
    cdef uint8_t result = 0
    cdef bint chained = False, broken = False
    cdef size_t start = events.length
    cdef size_t chain_start = 0
    cdef uint32_t chain_count = 0
    cdef uint64_t chain_sequence = 0
    if e.poisoned:
        return ENGINE_POISONED
    clock_advance(e, timestamp_ns)
    if du_unlikely(e.accounts_index.old != NULL):
        index_move(e, &e.accounts_index, 4096)
    # a row makes one record, a sent one perhaps an in-flight account's before it
    if holds_expire(e, events) < 0 or events_reserve(events, <uint64_t> 2 * c.count) < 0:
        return poison(e)
    for i in range(c.count):
        while hashed < c.count and hashed <= i + HASH_AHEAD:
            transfer_hash(e, c, hashed, &ring[hashed & RING_MASK])
            hashed += 1
        while fetched < c.count and fetched <= i + FETCH_AHEAD:
            transfer_fetch(e, &ring[fetched & RING_MASK])
            fetched += 1
        t = &ring[i & RING_MASK]
        if du_unlikely(i >= open_from):
            results[t.row] = CHAIN_OPEN
            continue
        if du_unlikely(t.flags & LINKED and not chained):
            chained = True
            broken = False
            chain_start = events.length
            chain_count = events.count
            chain_sequence = e.sequence
            e.undo_count = 0
        if transfer_apply(e, t, chained, broken, c.chain_steps != 0, &result, events) < 0:
            return poison(e)
        results[t.row] = result
        if du_unlikely(chained and not broken and result != OK):
            broken = True
            if chain_rollback(e, results, events, chain_start, chain_count, chain_sequence) < 0:
                return poison(e)
        if du_unlikely(t.outcome == REFUSED):
            # the id's place in the open generation is still free: nothing was inserted since it was looked up
            if ids_insert(e, t.id0, t.id1, t.id_hash, t.free_slot, t.fingerprint,
                          STATE_PLAIN | t.flags & CHAIN, result) < 0:
                return poison(e)
            transfer_refuse(e, t.id0, t.id1, <uint64_t> t.amount, t.fingerprint, t.flags, t.code, result, events)
        if du_unlikely(chained):
            if not broken and t.outcome == REPEATED and undo_push(e, t, UNDO_NOTHING) == NULL:
                return poison(e)
            if not t.flags & LINKED:
                chained = False
                broken = False
    chain_digest(e, events, start)
    return 0


cdef uint32_t transfers_known(const EngineState* e, const TransferColumns* c, uint8_t* results, uint8_t otherwise) noexcept nogil:
    # Changes nothing.
    cdef Transfer t
    cdef uint64_t i
    cdef uint32_t known = 0
    cdef const IdEntry* entry
    for i in range(c.count):
        transfer_hash(e, c, i, &t)
        entry = ids_lookup(e, t.id0, t.id1)
        if entry == NULL:
            results[t.row] = otherwise
            continue
        known += 1
        results[t.row] = <uint8_t> (entry.meta & 0xFF)
        if entry.meta >> 16 != t.fingerprint or (entry.meta >> 8 ^ t.flags) & CHAIN:
            results[t.row] = ID_REUSED
    return known
