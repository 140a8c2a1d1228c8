# Accounts: opening, updating, finding. Included by _engine.pyx.

cdef inline uint32_t account_find(const EngineState* e, uint64_t id0, uint64_t id1) noexcept nogil:
    return index_find(e, &e.accounts_index, du_hash_id(id0, id1), id0, id1)


cdef inline uint64_t account_attributes(const Account* a) noexcept nogil:
    return du_attributes(a.id0, a.id1, a.currency, a.flags, <uint64_t> a.overdraft_limit, <uint64_t> a.balance_limit)


cdef inline bint id_is_in_flight(uint64_t id0, uint64_t id1) noexcept nogil:
    # "in-flight:"
    return id0 == <uint64_t> 0x6867696C662D6E69 and id1 & 0xFFFF == 0x3A74


cdef inline bint currency_is_valid(uint32_t currency) noexcept nogil:
    cdef uint32_t i, letter
    for i in range(3):
        letter = (currency >> (8 * i)) & 0xFF
        if letter < 0x41 or letter > 0x5A:
            return False
    return currency >> 24 == 0


cdef int account_add(EngineState* e, uint64_t id0, uint64_t id1, uint32_t currency, uint16_t flags,
                     int64_t overdraft_limit, int64_t balance_limit) noexcept nogil:
    # The next ordinal. <0: out of memory.
    cdef Account* a
    cdef uint64_t ordinal = e.account_count
    if du_arena_commit(&e.accounts_memory, (ordinal + 1) * sizeof(Account), &e.budget) < 0:
        return -1
    a = &e.accounts[ordinal]
    memset(a, 0, sizeof(Account))
    a.id0 = id0
    a.id1 = id1
    a.currency = currency
    a.flags = flags
    a.overdraft_limit = overdraft_limit
    a.balance_limit = balance_limit
    if index_insert(e, &e.accounts_index, du_hash_id(id0, id1), ordinal) < 0:
        return -1
    if flags & IN_FLIGHT_ACCOUNT:
        e.currencies[e.currency_count].currency = currency
        e.currencies[e.currency_count].in_flight = <uint32_t> ordinal
        e.currencies[e.currency_count].unsettled = 0
        e.currency_count += 1
    e.account_count += 1
    e.linear += account_attributes(a) * du_weight_attributes(ordinal)
    return 0


cdef inline void account_change(EngineState* e, uint64_t ordinal, uint16_t flags, int64_t overdraft_limit,
                                int64_t balance_limit) noexcept nogil:
    cdef Account* a = &e.accounts[ordinal]
    cdef uint64_t before = account_attributes(a)
    keep_account(e, ordinal)
    a.flags = flags
    a.overdraft_limit = overdraft_limit
    a.balance_limit = balance_limit
    e.linear += (account_attributes(a) - before) * du_weight_attributes(ordinal)


cdef inline void emit_account(EngineState* e, EventBuffer* events, uint32_t kind, uint64_t ordinal) noexcept nogil:
    cdef const Account* a = &e.accounts[ordinal]
    emit(e, events, a.id0, a.id1, <uint64_t> a.overdraft_limit, <uint64_t> a.balance_limit,
         ordinal | <uint64_t> a.currency << 32, a.flags | <uint64_t> kind << 48)


cdef Currency* currency_find(EngineState* e, uint32_t currency) noexcept nogil:
    # NULL = it has no in-flight account.
    cdef uint64_t i
    for i in range(e.currency_count):
        if e.currencies[i].currency == currency:
            return &e.currencies[i]
    return NULL


cdef inline uint32_t in_flight_ordinal(const EngineState* e, uint32_t currency) noexcept nogil:
    # The in-flight account of a currency, or NONE.
    cdef const Currency* found = currency_find(<EngineState*> e, currency)
    return NONE if found == NULL else found.in_flight


cdef inline bint in_flight_has_room(const EngineState* e, uint32_t currency) noexcept nogil:
    return in_flight_ordinal(e, currency) != NONE or (
        e.currency_count < CURRENCY_COUNT_MAX and e.account_count < e.accounts_max)


cdef uint32_t in_flight_open(EngineState* e, uint32_t currency, EventBuffer* events) noexcept nogil:
    # The in-flight account of a currency, opened where it is missing; NONE = out of memory. Room for its event is reserved.
    cdef uint32_t ordinal = in_flight_ordinal(e, currency)
    cdef uint64_t id1
    if ordinal != NONE:
        return ordinal
    ordinal = <uint32_t> e.account_count
    id1 = <uint64_t> 0x3A74 | <uint64_t> currency << 16 | (e.shard >> 8) << 48 | (e.shard & 0xFF) << 56
    if account_add(e, <uint64_t> 0x6867696C662D6E69, id1, currency, MAY_OVERDRAW | IN_FLIGHT_ACCOUNT, 0, 0) < 0:
        return NONE
    emit_account(e, events, KIND_ACCOUNT_OPENED, ordinal)
    return ordinal


cdef inline uint8_t account_fields_check(uint32_t flags, int64_t overdraft_limit, int64_t balance_limit) noexcept nogil:
    if flags & ~(<uint32_t> (FROZEN | CLOSED | MAY_OVERDRAW | STRIPED)):
        return ACCOUNT_FLAGS_INVALID
    if flags & STRIPED and not flags & MAY_OVERDRAW:
        return ACCOUNT_FLAGS_INVALID
    if overdraft_limit < 0 or balance_limit < 0 or (flags & STRIPED and (overdraft_limit or balance_limit)):
        return ACCOUNT_LIMIT_INVALID
    return ACCOUNT_OK


cdef uint8_t account_open_check(const EngineState* e, uint64_t id0, uint64_t id1, uint32_t currency, uint32_t flags,
                                int64_t overdraft_limit, int64_t balance_limit, bint* repeated) noexcept nogil:
    cdef uint32_t ordinal
    cdef const Account* a
    cdef uint8_t result
    repeated[0] = False
    if (id0 | id1) == 0 or (id0 & id1) == <uint64_t> -1 or id_is_in_flight(id0, id1):
        return ACCOUNT_ID_INVALID
    ordinal = account_find(e, id0, id1)
    if ordinal != NONE:
        a = &e.accounts[ordinal]
        repeated[0] = (a.currency == currency and a.flags == flags and a.overdraft_limit == overdraft_limit
                       and a.balance_limit == balance_limit)
        return ACCOUNT_OK if repeated[0] else ACCOUNT_ALREADY_EXISTS
    if not currency_is_valid(currency):
        return ACCOUNT_CURRENCY_INVALID
    if flags & CLOSED:
        return ACCOUNT_FLAGS_INVALID
    result = account_fields_check(flags, overdraft_limit, balance_limit)
    if result == ACCOUNT_OK and e.account_count >= e.accounts_max:
        return ACCOUNT_TOO_MANY
    return result


cdef uint8_t account_update_check(const EngineState* e, uint64_t id0, uint64_t id1, uint32_t flags, int64_t overdraft_limit,
                                  int64_t balance_limit, uint32_t* ordinal) noexcept nogil:
    cdef const Account* a
    cdef uint8_t result
    if (id0 | id1) == 0 or (id0 & id1) == <uint64_t> -1 or id_is_in_flight(id0, id1):
        return ACCOUNT_ID_INVALID
    result = account_fields_check(flags, overdraft_limit, balance_limit)
    if result != ACCOUNT_OK:
        return result
    ordinal[0] = account_find(e, id0, id1)
    if ordinal[0] == NONE:
        return ACCOUNT_NOT_FOUND
    a = &e.accounts[ordinal[0]]
    if (flags ^ a.flags) & STRIPED:
        return ACCOUNT_FLAGS_INVALID
    if flags & CLOSED and (a.balance or a.held_out or a.held_in):
        return ACCOUNT_BALANCE_NOT_ZERO
    return ACCOUNT_OK


cdef int accounts_apply(EngineState* e, const AccountColumns* c, bint update, uint64_t timestamp_ns, uint8_t* results,
                        EventBuffer* events) noexcept nogil:
    cdef uint64_t i, row, id0, id1
    cdef uint32_t currency, flags, ordinal
    cdef int64_t overdraft_limit, balance_limit
    cdef uint8_t result
    cdef bint repeated
    cdef const Account* a
    cdef const uint8_t* at
    cdef size_t start = events.length
    if e.poisoned:
        return ENGINE_POISONED
    clock_advance(e, timestamp_ns)
    if holds_expire(e, events) < 0 or events_reserve(events, c.count) < 0:
        return poison(e)
    for i in range(c.count):
        if i % BLOCK == 0:
            for row in range(i, min(i + BLOCK, <uint64_t> c.count)):
                at = c.ids + 16 * (c.rows[row] if c.rows != NULL else row)
                index_prefetch(&e.accounts_index, du_hash_id(du_load64(at), du_load64(at + 8)))
        row = c.rows[i] if c.rows != NULL else i
        id0 = du_load64(c.ids + 16 * row)
        id1 = du_load64(c.ids + 16 * row + 8)
        flags = du_load16(c.flags + 2 * row) if c.flags != NULL else 0
        overdraft_limit = <int64_t> du_load64(c.overdraft_limits + 8 * row) if c.overdraft_limits != NULL else 0
        balance_limit = <int64_t> du_load64(c.balance_limits + 8 * row) if c.balance_limits != NULL else 0
        if update:
            result = account_update_check(e, id0, id1, flags, overdraft_limit, balance_limit, &ordinal)
            if result == ACCOUNT_OK:
                a = &e.accounts[ordinal]
                if a.flags != flags or a.overdraft_limit != overdraft_limit or a.balance_limit != balance_limit:
                    account_change(e, ordinal, <uint16_t> flags, overdraft_limit, balance_limit)
                    emit_account(e, events, KIND_ACCOUNT_UPDATED, ordinal)
        else:
            currency = du_load32(c.currencies + 4 * row)
            result = account_open_check(e, id0, id1, currency, flags, overdraft_limit, balance_limit, &repeated)
            if repeated:
                e.repeated_count += 1
            elif result == ACCOUNT_OK:
                if account_add(e, id0, id1, currency, <uint16_t> flags, overdraft_limit, balance_limit) < 0:
                    return poison(e)
                emit_account(e, events, KIND_ACCOUNT_OPENED, e.account_count - 1)
        results[row] = result
    chain_digest(e, events, start)
    return 0
