# Replay: events back into state. Every record is checked against the state it finds before it is applied, with the same
# guards that let it be written (pair assertions); the first that contradicts stops the replay and poisons the engine,
# with its sequence number and the reason. Included by _engine.pyx.

cdef enum:
    REPLAY_AHEAD = 16               # records whose memory is on its way


cdef struct Record:
    uint64_t id0
    uint64_t id1
    int64_t amount
    uint32_t debit
    uint32_t credit
    uint64_t aux
    uint64_t code
    uint64_t fingerprint
    uint32_t kind
    uint32_t last


cdef inline void record_read(const uint8_t* p, Record* r) noexcept nogil:
    cdef uint64_t w3 = du_load64(p + 24), w4 = du_load64(p + 32), w5 = du_load64(p + 40)
    r.id0 = du_load64(p)
    r.id1 = du_load64(p + 8)
    r.amount = <int64_t> du_load64(p + 16)
    r.debit = <uint32_t> w3
    r.credit = <uint32_t> (w3 >> 32)
    r.aux = w4 & <uint64_t> 0xFFFFFFFFFFFF
    r.code = w4 >> 48
    r.fingerprint = w5 & <uint64_t> 0xFFFFFFFFFFFF
    r.kind = (w5 >> 48) & 0xFF
    r.last = <uint32_t> (w5 >> 56)


cdef inline const char* replay_accounts(const EngineState* e, const Record* r) noexcept nogil:
    cdef uint8_t result
    if r.debit >= e.account_count or r.credit >= e.account_count or r.debit == r.credit:
        return b"accounts"
    if du_amount_invalid(r.amount):
        return b"amount"
    result = flags_check(&e.accounts[r.debit], &e.accounts[r.credit])
    if result != OK:
        return b"currency or account flags"
    return NULL


cdef inline const char* replay_id(EngineState* e, const Record* r, uint64_t state, uint64_t result) noexcept nogil:
    # Remembers the id of a command; it must be new.
    cdef uint64_t free_slot = 0
    cdef uint64_t hash = du_hash_id(r.id0, r.id1)
    if du_unlikely(not id_is_v7(r.id0, r.id1)):
        return b"transfer id"
    if du_unlikely(ids_find(e, r.id0, r.id1, hash, &free_slot) != NULL):
        return b"transfer id was there before"
    if du_unlikely(ids_insert(e, r.id0, r.id1, hash, free_slot, r.fingerprint, state, result) < 0):
        return b"out of memory"
    return NULL


cdef const char* replay_account(EngineState* e, const uint8_t* p, bint opened) noexcept nogil:
    cdef uint64_t id0 = du_load64(p), id1 = du_load64(p + 8)
    cdef int64_t overdraft_limit = <int64_t> du_load64(p + 16), balance_limit = <int64_t> du_load64(p + 24)
    cdef uint32_t ordinal = du_load32(p + 32), currency = du_load32(p + 36)
    cdef uint32_t flags = du_load16(p + 40)
    cdef uint32_t found
    cdef bint repeated
    if du_load16(p + 42) or du_load16(p + 44) or p[47]:
        return b"unused bytes"
    if opened:
        if ordinal != e.account_count:
            return b"account ordinal"
        if id_is_in_flight(id0, id1):
            if (flags != (MAY_OVERDRAW | IN_FLIGHT_ACCOUNT) or in_flight_ordinal(e, currency) != NONE
                    or <uint32_t> (id1 >> 16) != currency or not in_flight_has_room(e, currency)):
                return b"in-flight account"
        elif (account_open_check(e, id0, id1, currency, flags, overdraft_limit, balance_limit, &repeated) != ACCOUNT_OK
              or repeated):
            return b"account"
        if account_add(e, id0, id1, currency, <uint16_t> flags, overdraft_limit, balance_limit) < 0:
            return b"out of memory"
        return NULL
    if (account_update_check(e, id0, id1, flags, overdraft_limit, balance_limit, &found) != ACCOUNT_OK or found != ordinal
            or e.accounts[found].currency != currency):
        return b"account update"
    account_change(e, ordinal, <uint16_t> flags, overdraft_limit, balance_limit)
    return NULL


cdef inline const char* replay_moved(EngineState* e, const Record* r) noexcept nogil:
    cdef const char* reason = replay_accounts(e, r)
    if du_unlikely(reason != NULL):
        return reason
    if du_unlikely(r.last & (HOLD | POST | VOID | 0xC0) or r.aux
                   or (e.accounts[r.debit].flags | e.accounts[r.credit].flags) & IN_FLIGHT_ACCOUNT):
        return b"flags"
    if du_unlikely(money_check(&e.accounts[r.debit], &e.accounts[r.credit], r.amount) != OK):
        return b"funds or limits"
    reason = replay_id(e, r, STATE_PLAIN, OK)
    if du_unlikely(reason != NULL):
        return reason
    move(e, r.debit, r.credit, r.amount)
    return NULL


cdef const char* replay_placed(EngineState* e, const Record* r) noexcept nogil:
    cdef Hold hold
    cdef const char* reason = replay_accounts(e, r)
    if reason != NULL:
        return reason
    if r.last & (HOLD | POST | VOID | 0x80) != HOLD or (r.aux and r.aux <= e.now_ms):
        return b"flags or deadline"
    if r.last & CHAIN and (r.last & (BALANCING_DEBIT | BALANCING_CREDIT) or r.aux):
        return b"flags or deadline"
    if (e.accounts[r.debit].flags | e.accounts[r.credit].flags) & IN_FLIGHT_ACCOUNT or e.hold_count >= e.holds_max:
        return b"accounts"
    if money_check(&e.accounts[r.debit], &e.accounts[r.credit], r.amount) != OK:
        return b"funds or limits"
    if hold_by_id(e, r.id0, r.id1) != NONE:
        return b"hold was there before"
    reason = replay_id(e, r, STATE_HELD | r.last & CHAIN, OK)
    if reason != NULL:
        return reason
    memset(&hold, 0, sizeof(Hold))
    hold.id0 = r.id0
    hold.id1 = r.id1
    hold.sequence = e.sequence
    hold.deadline_ms = r.aux
    hold.amount = r.amount
    hold.debit = r.debit
    hold.credit = r.credit
    hold.code = <uint16_t> r.code
    hold.flags = <uint16_t> (r.last & CHAIN)
    if hold_add(e, &hold) < 0:
        return b"out of memory"
    return NULL


cdef const char* replay_finished(EngineState* e, const Record* r) noexcept nogil:
    # Posted, voided, expired.
    cdef uint32_t slot = hold_by_sequence(e, r.aux)
    cdef Hold hold
    cdef const char* reason
    if slot == NONE:
        return b"hold not found"
    hold = e.holds[slot]
    if hold.debit != r.debit or hold.credit != r.credit:
        return b"hold's accounts"
    if r.amount <= 0 or r.amount > hold.amount or (r.kind != KIND_HOLD_POSTED and r.amount != hold.amount):
        return b"hold's amount"
    if r.kind == KIND_HOLD_EXPIRED:
        if e.heap_count == 0 or e.heap[0].hold != slot or e.heap[0].deadline_ms > e.now_ms:
            return b"hold is not the next to expire"
        if r.id0 != hold.id0 or r.id1 != hold.id1 or r.code != hold.code or r.fingerprint or r.last:
            return b"hold's id"
    else:
        if r.last & (HOLD | POST | VOID | 0xF0) != (POST if r.kind == KIND_HOLD_POSTED else VOID) | hold.flags:
            return b"flags"
        if r.kind == KIND_HOLD_POSTED and flags_check(&e.accounts[r.debit], &e.accounts[r.credit]) != OK:
            return b"account flags"
        reason = replay_id(e, r, STATE_PLAIN | r.last & CHAIN, OK)
        if reason != NULL:
            return reason
    hold_remove(e, slot)
    if r.kind == KIND_HOLD_POSTED:
        move(e, r.debit, r.credit, r.amount)
        ids_mark(e, hold.id0, hold.id1, STATE_POSTED, 0xFF)
    else:
        ids_mark(e, hold.id0, hold.id1, STATE_VOIDED if r.kind == KIND_HOLD_VOIDED else STATE_EXPIRED, 0xFF)
    return NULL


cdef const char* replay_refused(EngineState* e, const Record* r) noexcept nogil:
    if r.debit or r.credit or r.aux < HOLD_NOT_FOUND or r.aux > LINKED_FAILED:
        return b"result"
    return replay_id(e, r, STATE_PLAIN | r.last & CHAIN, r.aux)


cdef const char* replay_sent(EngineState* e, const uint8_t* p) noexcept nogil:
    cdef Record r
    cdef uint64_t credit0, credit1
    cdef Currency* currency
    cdef const Account* d
    cdef const char* reason
    record_read(p, &r)
    memcpy(&credit0, p + 28, 8)
    memcpy(&credit1, p + 36, 8)
    r.code = du_load16(p + 44)
    if r.debit >= e.account_count:
        return b"accounts"
    d = &e.accounts[r.debit]
    currency = currency_find(e, d.currency)
    if du_amount_invalid(r.amount) or currency == NULL or d.flags & (CLOSED | FROZEN | IN_FLIGHT_ACCOUNT) or r.last == e.shard:
        return b"accounts"
    if money_check(d, &e.accounts[currency.in_flight], r.amount) != OK or unsettled_overflows(currency, r.amount):
        return b"funds or limits"
    r.fingerprint = du_fingerprint(d.id0, d.id1, credit0, credit1, <uint64_t> r.amount, r.code << 16, 0, 0)
    reason = replay_id(e, &r, STATE_PLAIN, IN_FLIGHT)
    if reason != NULL:
        return reason
    if send_add(e, r.last, e.sequence, r.id0, r.id1, credit0, credit1, r.amount, r.debit, <uint32_t> r.code) < 0:
        return b"out of memory"
    move(e, r.debit, currency.in_flight, r.amount)
    currency.unsettled += r.amount
    return NULL


cdef const char* replay_credit(EngineState* e, const Record* r) noexcept nogil:
    # Received or refused, on the credit shard.
    cdef CreditCursor* cursor = &e.cursors[r.last]
    if r.aux != cursor.applied + 1 or r.last == e.shard:
        return b"saga number"
    if r.kind == KIND_CREDIT_REFUSED:
        if r.fingerprint <= OK or r.fingerprint > 0xFF or r.debit or r.credit:
            return b"result"
        if refusal_add(cursor, r.aux, <uint8_t> r.fingerprint) < 0:
            return b"out of memory"
        cursor.applied = r.aux
        return NULL
    if r.fingerprint or r.debit >= e.account_count or not e.accounts[r.debit].flags & IN_FLIGHT_ACCOUNT:
        return b"in-flight account"
    if replay_accounts(e, r) != NULL or e.accounts[r.credit].flags & IN_FLIGHT_ACCOUNT:
        return b"accounts"
    if money_check(&e.accounts[r.debit], &e.accounts[r.credit], r.amount) != OK:
        return b"limits"
    move(e, r.debit, r.credit, r.amount)
    cursor.applied = r.aux
    return NULL


cdef const char* replay_returned(EngineState* e, const Record* r) noexcept nogil:
    cdef SendQueue* q = &e.sends[r.last]
    cdef const PendingSend* send
    if r.aux <= q.settled or r.aux > q.last or r.aux <= q.returned:
        return b"saga number"
    if r.fingerprint <= OK or r.fingerprint > 0xFF:
        return b"result"
    send = send_at(q, r.aux)
    if (du_load64(send.id) != r.id0 or du_load64(send.id + 8) != r.id1 or send.amount != r.amount or send.code != r.code
            or send.debit_ordinal != r.credit or in_flight_ordinal(e, send.currency) != r.debit):
        return b"the transfer that was sent"
    if not send_return(e, q, r.aux, <uint8_t> r.fingerprint):
        return b"overflow"
    return NULL


cdef const char* replay_settled(EngineState* e, const Record* r) noexcept nogil:
    cdef SendQueue* q = &e.sends[r.last]
    if r.aux <= q.settled or r.aux > q.last or q.returned > r.aux:
        return b"saga number"
    if r.id0 or r.id1 or r.amount or r.debit or r.credit or r.code or r.fingerprint:
        return b"unused bytes"
    sends_settle(e, q, r.aux)
    return NULL


cdef const char* replay_record(EngineState* e, const uint8_t* p) noexcept nogil:
    cdef Record r
    record_read(p, &r)
    if r.kind == KIND_ACCOUNT_OPENED or r.kind == KIND_ACCOUNT_UPDATED:
        return replay_account(e, p, r.kind == KIND_ACCOUNT_OPENED)
    if r.kind == KIND_HOLD_PLACED:
        return replay_placed(e, &r)
    if r.kind == KIND_HOLD_POSTED or r.kind == KIND_HOLD_VOIDED or r.kind == KIND_HOLD_EXPIRED:
        return replay_finished(e, &r)
    if r.kind == KIND_TRANSFER_REFUSED:
        return replay_refused(e, &r)
    if r.kind == KIND_MONEY_SENT:
        return replay_sent(e, p)
    if r.kind == KIND_MONEY_RECEIVED or r.kind == KIND_CREDIT_REFUSED:
        return replay_credit(e, &r)
    if r.kind == KIND_MONEY_RETURNED:
        return replay_returned(e, &r)
    if r.kind == KIND_SAGA_SETTLED:
        return replay_settled(e, &r)
    return b"unknown kind"


cdef inline void replay_prefetch(const EngineState* e, const uint8_t* p) noexcept nogil:
    cdef uint64_t hash = du_hash_id(du_load64(p), du_load64(p + 8))
    cdef uint32_t ordinal
    if du_unlikely(p[46] == KIND_ACCOUNT_OPENED):
        index_prefetch(&e.accounts_index, hash)
        return
    ids_prefetch(e, hash)
    ordinal = du_load32(p + 24)
    if ordinal < e.account_count:
        du_prefetch(&e.accounts[ordinal])
    ordinal = du_load32(p + 28)
    if ordinal < e.account_count:
        du_prefetch(&e.accounts[ordinal])


cdef int replay_apply(EngineState* e, const uint8_t* records, uint32_t count, uint64_t first_sequence,
                      uint64_t timestamp_ns) noexcept nogil:
    cdef uint64_t i
    cdef const uint8_t* p
    cdef const char* reason = NULL
    cdef Record r
    if e.poisoned:
        return ENGINE_POISONED
    if first_sequence != e.sequence + 1:
        e.replay_error = first_sequence
        e.replay_reason = b"sequence number"
        poison(e)
        return ENGINE_REFUSED
    clock_advance(e, timestamp_ns)
    if du_unlikely(e.accounts_index.old != NULL):
        index_move(e, &e.accounts_index, 4096)
    for i in range(min(<uint64_t> REPLAY_AHEAD, count)):
        replay_prefetch(e, records + i * EVENT_BYTES)
    for i in range(count):
        # one record's memory is asked for while another is applied: bursts of requests wait for each other
        if i + REPLAY_AHEAD < count:
            replay_prefetch(e, records + (i + REPLAY_AHEAD) * EVENT_BYTES)
        p = records + i * EVENT_BYTES
        e.sequence += 1
        if du_likely(p[46] == KIND_MONEY_MOVED):
            record_read(p, &r)
            reason = replay_moved(e, &r)
        else:
            reason = replay_record(e, p)
        if du_unlikely(reason != NULL):
            e.replay_error = e.sequence
            e.replay_reason = reason
            poison(e)
            return ENGINE_REFUSED
    e.chain = du_chain_records(e.chain, records, count)
    return 0
