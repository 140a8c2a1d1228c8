# What chains across shards and the balance check read of a shard, on its apply thread. Included by _host.pyx.
#
# Both answers are packed records, little endian, that wallet_core/shard/port.py unpacks:
#   holds   where to go on (u64, 0 = the end), then one HoldState a hold: every mark, behind the holds that it stands for.
#           Only holds with the flag CHAIN, which nobody but the coordinator can place
#   cut     sequence u64, currencies u64; a currency: name u32, 0 u32, balance i64, in flight i64;
#           then for each other shard: shard u64, settled u64, sent u64, received u64, sends u64, refusals u64;
#           a send: amount i64, currency u32, 0 u32; a refusal: number u64, result u64

cdef enum:
    HOLD_SLOTS_A_LOOK = 32768        # 2 MiB of records: the writer's pause
    HOLDS_A_LOOK = 256
    LEGS_MAX = 1024                  # chain_rules.LEG_COUNT_MAX: a row of a chain has one hold on a shard

cdef struct Blob:
    uint8_t* data
    size_t length, capacity, limit

cdef struct CutCurrency:
    uint32_t currency
    uint32_t reserved
    int64_t balance
    int64_t in_flight

cdef struct CutLink:
    uint64_t shard
    uint64_t settled
    uint64_t sent
    uint64_t received
    uint64_t sends
    uint64_t refusals

cdef struct CutSend:
    int64_t amount
    uint32_t currency
    uint32_t reserved


cdef int blob_add(Blob* blob, const void* data, size_t length) noexcept nogil:
    cdef size_t capacity = blob.capacity if blob.capacity else 1024
    cdef uint8_t* larger
    if blob.length + length > blob.limit:
        return -1
    if blob.length + length > blob.capacity:
        while capacity < blob.length + length:
            capacity *= 2
        larger = <uint8_t*>realloc(blob.data, capacity)
        if larger == NULL:
            return -1
        blob.data, blob.capacity = larger, capacity
    memcpy(blob.data + blob.length, data, length)
    blob.length += length
    return 0


cdef int chain_holds_read(Engine engine, const uint8_t* marks_id, uint64_t from_slot, Blob* blob) noexcept nogil:
    """Some marks (holds on the account of marks), each behind those of the amount - 1 holds that its frame placed just before it.
    What begins a step of chains is never in the middle of another one, so they end where anything else comes: there is nothing
    then that could be taken for a part of this chain. One that stands for more than a chain can have comes alone."""
    cdef HoldState marks[HOLDS_A_LOOK]
    cdef HoldState leg
    cdef uint64_t slot = from_slot, sequence, least
    cdef uint32_t count = engine.read_holds(marks_id, &slot, HOLD_SLOTS_A_LOOK, marks, HOLDS_A_LOOK), i
    if blob_add(blob, &slot, 8) < 0:
        return -1
    for i in range(count):
        if not marks[i].flags & FLAG_CHAIN:
            continue
        sequence = least = marks[i].sequence
        if <uint64_t>marks[i].amount - 1 <= min(<uint64_t>LEGS_MAX, sequence):
            least -= <uint64_t>marks[i].amount - 1
        while sequence > least and engine.hold_placed_at(sequence - 1, &leg) and leg.flags & FLAG_CHAIN \
                and not ducat_same_id(leg.debit_id, marks_id):
            sequence -= 1
        while sequence < marks[i].sequence:
            if engine.hold_placed_at(sequence, &leg) and blob_add(blob, &leg, sizeof(HoldState)) < 0:
                return -1
            sequence += 1
        if blob_add(blob, &marks[i], sizeof(HoldState)) < 0:
            return -1
    return 0


cdef int cut_read(Engine engine, uint32_t shard_count, uint16_t own, Blob* blob) noexcept nogil:
    """The sums by currency, and for each other shard what was sent, settled and received, all after the same event."""
    cdef CurrencyTotal* totals = NULL
    cdef PendingSend* sends = <PendingSend*>malloc(1024 * sizeof(PendingSend))
    cdef Refusal* refusals = <Refusal*>malloc(1024 * sizeof(Refusal))
    cdef uint32_t capacity = 64, count, i, shard, got
    cdef uint64_t sequence = engine.sequence(), number, refused_from
    cdef size_t at
    cdef CutCurrency currency
    cdef CutLink link
    cdef CutSend send
    cdef int code = -1
    memset(&currency, 0, sizeof(currency))
    memset(&send, 0, sizeof(send))
    while True:
        free(totals)
        totals = <CurrencyTotal*>malloc(capacity * sizeof(CurrencyTotal))
        if totals == NULL or sends == NULL or refusals == NULL:
            break
        count = engine.totals(totals, capacity)
        if count > capacity:
            capacity = count
            continue
        number = count
        if blob_add(blob, &sequence, 8) < 0 or blob_add(blob, &number, 8) < 0:
            break
        for i in range(count):
            currency.currency, currency.balance = totals[i].currency, totals[i].balance
            currency.in_flight = totals[i].in_flight
            if blob_add(blob, &currency, sizeof(currency)) < 0:
                break
        else:
            code = 0
        break
    for shard in range(shard_count if code == 0 else 0):
        if shard == own:
            continue
        memset(&link, 0, sizeof(link))
        link.shard = shard
        engine.send_span(<uint16_t>shard, &link.settled, &link.sent)
        link.received = engine.credit_cursor(<uint16_t>shard)
        at = blob.length
        if blob_add(blob, &link, sizeof(link)) < 0:
            code = -1
            break
        number = link.settled + 1
        while code == 0 and number <= link.sent:
            got = engine.read_sends(<uint16_t>shard, number, 1024, sends)
            if got == 0:
                code = -1
            for i in range(got):
                send.amount, send.currency = sends[i].amount, sends[i].currency
                if blob_add(blob, &send, sizeof(send)) < 0:
                    code = -1
            number += got
            link.sends += got
        refused_from = 1
        while code == 0:
            got = engine.read_refusals(<uint16_t>shard, refused_from, 1024, refusals)
            if got == 0:
                break
            for i in range(got):
                number = refusals[i].result
                if blob_add(blob, &refusals[i].number, 8) < 0 or blob_add(blob, &number, 8) < 0:
                    code = -1
            refused_from = refusals[got - 1].number + 1
            link.refusals += got
        if code == 0:
            memcpy(blob.data + at, &link, sizeof(link))
    free(totals)
    free(sends)
    free(refusals)
    return code
