# Transfers across shards. Included by _engine.pyx.
#
# Step 1, debit shard: MoneySent takes the amount into the shard's in-flight account and gives it the next number towards
# the destination. Sends stay in a queue per destination until they are settled; the relay reads them from there.
# Step 2, credit shard: apply_credits takes numbers in order, each once (one cursor a source), and credits or refuses.
# Step 3, debit shard: apply_outcomes returns what was refused and settles the rest.
#
# Queues are chunks behind a ring of pointers: nothing is copied as they grow but the ring, and a chunk goes when all its
# sends are settled. While an image is taken chunks are kept, because the image reads them without a lock.

cdef int send_add(EngineState* e, uint64_t destination, uint64_t sequence, uint64_t id0, uint64_t id1, uint64_t credit0,
                  uint64_t credit1, int64_t amount, uint32_t debit, uint32_t code) noexcept nogil:
    # The next send to a destination. <0: out of memory.
    cdef SendQueue* q = &e.sends[destination]
    cdef uint64_t number = q.last + 1
    cdef uint64_t chunk = number // SEND_CHUNK
    cdef PendingSend* send
    if q.ring_size == 0 or number % SEND_CHUNK == 0 or chunk_of(q, chunk) == NULL:
        if chunk_new(e, q, chunk) < 0:
            return -1
    send = &chunk_of(q, chunk).sends[number % SEND_CHUNK]
    memset(send, 0, sizeof(PendingSend))
    send.number = number
    send.sequence = sequence
    memcpy(send.id, &id0, 8)
    memcpy(send.id + 8, &id1, 8)
    memcpy(send.credit_id, &credit0, 8)
    memcpy(send.credit_id + 8, &credit1, 8)
    send.amount = amount
    send.currency = e.accounts[debit].currency
    send.debit_ordinal = debit
    send.code = <uint16_t> code
    q.last = number
    e.unsettled_count += 1
    return 0


cdef inline SendChunk* chunk_of(const SendQueue* q, uint64_t chunk) noexcept nogil:
    return q.ring[chunk & (q.ring_size - 1)]


cdef int chunk_new(EngineState* e, SendQueue* q, uint64_t chunk) noexcept nogil:
    # Room for the chunk that follows the last one.
    cdef SendChunk** ring
    cdef uint64_t size, i
    if q.ring_size == 0:
        q.kept = chunk
    if chunk - q.kept >= q.ring_size:
        size = 2 * q.ring_size if q.ring_size else 4
        ring = <SendChunk**> calloc(size, sizeof(SendChunk*))
        if ring == NULL:
            return -1
        for i in range(q.kept, chunk):
            ring[i & (size - 1)] = chunk_of(q, i)
        free(q.ring)
        q.ring = ring
        q.ring_size = size
    if du_budget_take(&e.budget, sizeof(SendChunk)) < 0:
        return -1
    q.ring[chunk & (q.ring_size - 1)] = <SendChunk*> malloc(sizeof(SendChunk))
    return -1 if chunk_of(q, chunk) == NULL else 0


cdef void sends_trim(EngineState* e, SendQueue* q) noexcept nogil:
    # Frees the chunks of which everything is settled.
    cdef uint64_t first = (q.settled + 1) // SEND_CHUNK
    if q.ring_size == 0 or e.image != NULL:
        return
    while q.kept < first:
        if chunk_of(q, q.kept) != NULL:
            free(chunk_of(q, q.kept))
            du_budget_give(&e.budget, sizeof(SendChunk))
            q.ring[q.kept & (q.ring_size - 1)] = NULL
        q.kept += 1


cdef void sends_free(SendQueue* q) noexcept nogil:
    cdef uint64_t i
    for i in range(q.ring_size):
        free(q.ring[i])
    free(q.ring)
    memset(q, 0, sizeof(SendQueue))


cdef inline PendingSend* send_at(const SendQueue* q, uint64_t number) noexcept nogil:
    # A send that is not settled.
    return &chunk_of(q, number // SEND_CHUNK).sends[number % SEND_CHUNK]


cdef int refusal_add(CreditCursor* cursor, uint64_t number, uint8_t result) noexcept nogil:
    cdef uint64_t capacity
    cdef Refusal* refusals
    if cursor.last == cursor.capacity:
        if cursor.first > cursor.capacity // 2:
            memmove(cursor.refusals, cursor.refusals + cursor.first, (cursor.last - cursor.first) * sizeof(Refusal))
            cursor.last -= cursor.first
            cursor.first = 0
        else:
            capacity = 2 * cursor.capacity if cursor.capacity else 64
            refusals = <Refusal*> realloc(cursor.refusals, capacity * sizeof(Refusal))
            if refusals == NULL:
                return -1
            cursor.refusals = refusals
            cursor.capacity = capacity
    memset(&cursor.refusals[cursor.last], 0, sizeof(Refusal))
    cursor.refusals[cursor.last].number = number
    cursor.refusals[cursor.last].result = result
    cursor.last += 1
    return 0


cdef uint64_t refusals_from(const CreditCursor* cursor, uint64_t number) noexcept nogil:
    # Index of the first kept refusal with that number or a greater one.
    cdef uint64_t low = cursor.first, high = cursor.last, middle
    while low < high:
        middle = (low + high) // 2
        if cursor.refusals[middle].number < number:
            low = middle + 1
        else:
            high = middle
    return low


cdef uint8_t credit_check(const EngineState* e, uint64_t credit0, uint64_t credit1, int64_t amount, uint32_t currency,
                          uint32_t* ordinal) noexcept nogil:
    # Step 2's guards: 7, 18, 19, 21, 23, 25, 26.
    cdef const Account* c
    cdef uint32_t in_flight
    if du_amount_invalid(amount):
        return AMOUNT_INVALID
    ordinal[0] = account_find(e, credit0, credit1)
    if ordinal[0] == NONE or e.accounts[ordinal[0]].flags & IN_FLIGHT_ACCOUNT:
        return CREDIT_ACCOUNT_NOT_FOUND
    c = &e.accounts[ordinal[0]]
    if c.currency != currency:
        return CURRENCY_MISMATCH
    if c.flags & CLOSED:
        return CREDIT_ACCOUNT_CLOSED
    if c.flags & FROZEN:
        return CREDIT_ACCOUNT_FROZEN
    if du_limit_exceeded(c.balance, c.held_in, c.balance_limit, amount):
        return BALANCE_LIMIT_EXCEEDED
    if du_credit_overflows(c.balance, c.held_in, amount):
        return BALANCE_OVERFLOW
    in_flight = in_flight_ordinal(e, currency)
    if in_flight == NONE:
        # the account being credited has the currency, so only a full table stands in the way
        return OK if in_flight_has_room(e, currency) else CREDIT_ACCOUNT_NOT_FOUND
    if du_debit_overflows(e.accounts[in_flight].balance, 0, amount):
        return BALANCE_OVERFLOW
    return OK


cdef int credits_apply(EngineState* e, uint64_t source, uint64_t first_number, const CreditColumns* c,
                       uint64_t timestamp_ns, uint8_t* results, EventBuffer* events) noexcept nogil:
    cdef CreditCursor* cursor
    cdef uint64_t i, at, number, ahead, id0, id1, code
    cdef uint32_t ordinal, in_flight, currency
    cdef int64_t amount
    cdef uint8_t result
    cdef size_t start = events.length
    if e.poisoned:
        return ENGINE_POISONED
    if source >= SHARD_COUNT_MAX or source == e.shard or first_number == 0:
        return ENGINE_REFUSED
    cursor = &e.cursors[source]
    if first_number > cursor.applied + 1:
        return ENGINE_REFUSED
    clock_advance(e, timestamp_ns)
    if holds_expire(e, events) < 0 or events_reserve(events, <uint64_t> 2 * c.count) < 0:
        return poison(e)
    for i in range(min(c.count, 32)):
        index_prefetch(&e.accounts_index, du_hash_id(du_load64(c.credit_ids + 16 * i), du_load64(c.credit_ids + 16 * i + 8)))
    for i in range(c.count):
        # index slots 32 rows ahead, account records 16 rows ahead
        ahead = i + 32
        if ahead < c.count:
            index_prefetch(&e.accounts_index, du_hash_id(
                du_load64(c.credit_ids + 16 * ahead), du_load64(c.credit_ids + 16 * ahead + 8)))
        ahead = i + 16
        if ahead < c.count:
            ordinal = index_candidate(&e.accounts_index, du_hash_id(
                du_load64(c.credit_ids + 16 * ahead), du_load64(c.credit_ids + 16 * ahead + 8)))
            if ordinal != NONE:
                du_prefetch(&e.accounts[ordinal])
        number = first_number + i
        if number <= cursor.applied:
            at = refusals_from(cursor, number)
            results[i] = OK
            if at < cursor.last and cursor.refusals[at].number == number:
                results[i] = cursor.refusals[at].result
            e.repeated_count += 1
            continue
        id0 = du_load64(c.ids + 16 * i)
        id1 = du_load64(c.ids + 16 * i + 8)
        amount = <int64_t> du_load64(c.amounts + 8 * i)
        currency = du_load32(c.currencies + 4 * i)
        code = du_load16(c.codes + 2 * i) if c.codes != NULL else 0
        result = credit_check(e, du_load64(c.credit_ids + 16 * i), du_load64(c.credit_ids + 16 * i + 8), amount, currency,
                              &ordinal)
        results[i] = result
        cursor.applied = number
        if result == OK:
            in_flight = in_flight_open(e, currency, events)
            if in_flight == NONE:
                return poison(e)
            move(e, in_flight, ordinal, amount)
            emit_money(e, events, KIND_MONEY_RECEIVED, id0, id1, amount, in_flight, ordinal, number, code, 0, source)
        else:
            if refusal_add(cursor, number, result) < 0:
                return poison(e)
            emit_money(e, events, KIND_CREDIT_REFUSED, id0, id1, amount, 0, 0, number, code, result, source)
    chain_digest(e, events, start)
    return 0


cdef inline bint unsettled_overflows(const Currency* currency, int64_t amount) noexcept nogil:
    # Whether one more send would bring more under way than can come back.
    return currency.unsettled > DU_UNSETTLED_MAX - amount


cdef inline bint send_return(EngineState* e, SendQueue* q, uint64_t number, uint8_t result) noexcept nogil:
    # The compensation of one send. It has no guard, because money must always come back: what is under way was bounded
    # when it was sent (docs/event-records.md, Limits). False: the state contradicts that, so it is not to be trusted.
    cdef const PendingSend* send = send_at(q, number)
    cdef const Account* a = &e.accounts[send.debit_ordinal]
    cdef uint32_t in_flight = in_flight_ordinal(e, send.currency)
    if not du_return_fits(a.balance, a.held_in, e.accounts[in_flight].balance, send.amount):
        return False
    move(e, in_flight, send.debit_ordinal, send.amount)
    ids_mark(e, du_load64(send.id), du_load64(send.id + 8), 0xFF, result)
    q.returned = number
    return True


cdef void sends_settle(EngineState* e, SendQueue* q, uint64_t upto) noexcept nogil:
    # Everything up to there is done; what was not returned is OK from now on.
    cdef uint64_t number
    cdef const PendingSend* send
    cdef IdEntry* entry
    cdef Currency* currency = NULL
    for number in range(q.settled + 1, min(q.settled + 16, upto) + 1):
        send = send_at(q, number)
        ids_prefetch(e, du_hash_id(du_load64(send.id), du_load64(send.id + 8)))
    for number in range(q.settled + 1, upto + 1):
        if number + 16 <= upto:
            send = send_at(q, number + 16)
            ids_prefetch(e, du_hash_id(du_load64(send.id), du_load64(send.id + 8)))
        send = send_at(q, number)
        if currency == NULL or currency.currency != send.currency:
            currency = currency_find(e, send.currency)
        currency.unsettled -= send.amount
        entry = ids_lookup(e, du_load64(send.id), du_load64(send.id + 8))
        if entry != NULL and entry.meta & 0xFF == IN_FLIGHT:
            if e.image != NULL:
                image_keep_id(e, entry)
            entry.meta = (entry.meta & ~(<uint64_t> 0xFF)) | OK
    e.unsettled_count -= upto - q.settled
    q.settled = upto
    sends_trim(e, q)


cdef int outcomes_apply(EngineState* e, uint64_t destination, uint64_t upto, const Refusal* refused, uint32_t refused_count,
                        uint64_t timestamp_ns, EventBuffer* events) noexcept nogil:
    cdef SendQueue* q
    cdef const PendingSend* send
    cdef uint64_t i, previous = 0
    cdef size_t start = events.length
    if e.poisoned:
        return ENGINE_POISONED
    if destination >= SHARD_COUNT_MAX or upto > e.sends[destination].last:
        return ENGINE_REFUSED
    q = &e.sends[destination]
    for i in range(refused_count):
        if refused[i].number <= previous or refused[i].number > upto or refused[i].result <= OK:
            return ENGINE_REFUSED
        previous = refused[i].number
    clock_advance(e, timestamp_ns)
    if holds_expire(e, events) < 0 or events_reserve(events, <uint64_t> refused_count + 1) < 0:
        return poison(e)
    if upto > q.settled:
        for i in range(refused_count):
            if refused[i].number <= q.settled:
                continue
            send = send_at(q, refused[i].number)
            if not send_return(e, q, send.number, refused[i].result):
                return poison(e)
            emit_money(e, events, KIND_MONEY_RETURNED, du_load64(send.id), du_load64(send.id + 8), send.amount,
                       in_flight_ordinal(e, send.currency), send.debit_ordinal, send.number, send.code,
                       refused[i].result, destination)
        sends_settle(e, q, upto)
        emit_money(e, events, KIND_SAGA_SETTLED, 0, 0, 0, 0, 0, upto, 0, 0, destination)
    chain_digest(e, events, start)
    return 0
