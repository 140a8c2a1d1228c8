# ducat.wallet.v1.TransferBatch and CreateTransfersRequest straight from their protobuf bytes, and the answers straight into them.
# Included by _host.pyx. Unknown fields are skipped; of a repeated singular field the last one wins; packed columns that
# come in pieces, or unpacked, are put together in a buffer of the request's own.

cdef struct Batch:
    uint64_t batch_id
    const uint8_t* ids
    const uint8_t* debit_ids
    const uint8_t* credit_ids
    const uint8_t* amounts
    const uint8_t* flags
    const uint8_t* pending_ids
    const uint8_t* timeouts
    const uint8_t* codes
    uint64_t ids_length, debit_length, credit_length, amounts_length, flags_length, pending_length, timeouts_length
    uint64_t codes_length
    uint64_t settle
    uint8_t* amounts_own             # put together from pieces
    uint8_t* timeouts_own

cdef enum ParseError:
    PARSE_OK = 0
    PARSE_CUT = 1
    PARSE_TAG = 2
    PARSE_WIRE_TYPE = 3
    PARSE_MEMORY = 4


cdef inline const uint8_t* parse_varint(const uint8_t* at, const uint8_t* end, uint64_t* out) noexcept nogil:
    """Behind the varint, or NULL."""
    cdef uint64_t value = 0
    cdef int shift = 0
    while at < end and shift < 64:
        value |= <uint64_t>(at[0] & 0x7F) << shift
        if at[0] < 0x80:
            out[0] = value
            return at + 1
        at += 1
        shift += 7
    return NULL


cdef int parse_append(const uint8_t** column, uint64_t* length, uint8_t** own, const uint8_t* piece,
                      uint64_t piece_length) noexcept nogil:
    cdef uint8_t* larger
    if length[0] == 0:
        column[0], length[0] = piece, piece_length
        return 0
    if length[0] + piece_length > ROWS_MAX * 16:
        length[0] += piece_length          # too many rows: refused by the length check, nothing need be copied
        return 0
    larger = <uint8_t*>realloc(own[0], length[0] + piece_length)
    if larger == NULL:
        return -1
    if own[0] == NULL:
        memcpy(larger, column[0], length[0])
    memcpy(larger + length[0], piece, piece_length)
    own[0] = larger
    column[0] = larger
    length[0] += piece_length
    return 0


cdef int parse_batch(const uint8_t* at, uint64_t length, Batch* out) noexcept nogil:
    cdef const uint8_t* end = at + length
    cdef uint64_t tag, value
    cdef uint32_t field, wire
    memset(out, 0, sizeof(Batch))
    while at < end:
        at = parse_varint(at, end, &tag)
        if at == NULL:
            return PARSE_CUT
        field, wire = <uint32_t>(tag >> 3), <uint32_t>(tag & 7)
        if field == 0 or tag >> 32:
            return PARSE_TAG
        if wire == 0:
            at = parse_varint(at, end, &value)
            if at == NULL:
                return PARSE_CUT
            if field == 1:
                out.batch_id = value
            elif field == 10:
                out.settle = value
            elif field <= 9:
                return PARSE_WIRE_TYPE
        elif wire == 2:
            at = parse_varint(at, end, &value)
            if at == NULL or value > <uint64_t>(end - at):
                return PARSE_CUT
            if field == 2:
                out.ids, out.ids_length = at, value
            elif field == 3:
                out.debit_ids, out.debit_length = at, value
            elif field == 4:
                out.credit_ids, out.credit_length = at, value
            elif field == 5:
                if parse_append(&out.amounts, &out.amounts_length, &out.amounts_own, at, value) < 0:
                    return PARSE_MEMORY
            elif field == 6:
                out.flags, out.flags_length = at, value
            elif field == 7:
                out.pending_ids, out.pending_length = at, value
            elif field == 8:
                if parse_append(&out.timeouts, &out.timeouts_length, &out.timeouts_own, at, value) < 0:
                    return PARSE_MEMORY
            elif field == 9:
                out.codes, out.codes_length = at, value
            elif field == 1 or field == 10:
                return PARSE_WIRE_TYPE
            at += value
        elif wire == 1:
            if end - at < 8:
                return PARSE_CUT
            if field == 5:
                if parse_append(&out.amounts, &out.amounts_length, &out.amounts_own, at, 8) < 0:
                    return PARSE_MEMORY
            elif field <= 10:
                return PARSE_WIRE_TYPE
            at += 8
        elif wire == 5:
            if end - at < 4:
                return PARSE_CUT
            if field == 8:
                if parse_append(&out.timeouts, &out.timeouts_length, &out.timeouts_own, at, 4) < 0:
                    return PARSE_MEMORY
            elif field <= 10:
                return PARSE_WIRE_TYPE
            at += 4
        else:
            return PARSE_WIRE_TYPE
    return PARSE_OK


cdef int parse_unwrap(const uint8_t** data, uint64_t* length) noexcept nogil:
    """From SubmitTransfersRequest to the TransferBatch inside (field 1); 0 or a ParseError. Only one is taken."""
    cdef const uint8_t* at = data[0]
    cdef const uint8_t* end = at + length[0]
    cdef uint64_t tag, value
    data[0], length[0] = end, 0
    while at < end:
        at = parse_varint(at, end, &tag)
        if at == NULL:
            return PARSE_CUT
        if tag & 7 == 0:
            at = parse_varint(at, end, &value)
            if at == NULL:
                return PARSE_CUT
        elif tag & 7 == 2:
            at = parse_varint(at, end, &value)
            if at == NULL or value > <uint64_t>(end - at):
                return PARSE_CUT
            if tag >> 3 == 1:
                data[0], length[0] = at, value
            at += value
        elif tag & 7 == 1 and end - at >= 8:
            at += 8
        elif tag & 7 == 5 and end - at >= 4:
            at += 4
        else:
            return PARSE_WIRE_TYPE
    return PARSE_OK


cdef struct CallRow:                 # one row of a CreateTransfersRequest
    int64_t amount
    uint8_t id[16]
    uint8_t debit_id[16]
    uint8_t credit_id[16]
    uint8_t pending_id[16]
    uint32_t timeout_s
    uint16_t flags
    uint16_t code


cdef bint parse_call_row(const uint8_t* at, const uint8_t* end, CallRow* row) noexcept nogil:
    """One wallet.v1.Transfer; False where it is not plain: linked, malformed, out of a column's range, an unknown kind."""
    cdef uint64_t tag, value
    cdef uint32_t field
    cdef uint8_t* out
    memset(row, 0, sizeof(CallRow))
    while at < end:
        at = parse_varint(at, end, &tag)
        if at == NULL:
            return False
        field = <uint32_t>(tag >> 3)
        at = parse_varint(at, end, &value)
        if at == NULL or tag >> 32:
            return False
        if tag & 7 == 2:
            if field == 1:
                out = row.id
            elif field == 2:
                out = row.debit_id
            elif field == 3:
                out = row.credit_id
            elif field == 6:
                out = row.pending_id
            else:
                return False
            if value != 16 or value > <uint64_t>(end - at):
                return False
            memcpy(out, at, 16)
            at += 16
        elif tag & 7 == 0:
            if field == 4:
                row.amount = <int64_t>value
            elif field == 5 and value <= 4:
                row.flags = (row.flags & ~14) | (0 if value < 2 else 1 << (value - 1))
            elif field == 7 and value >> 32 == 0:
                row.timeout_s = <uint32_t>value
            elif field == 8 and value >> 16 == 0:
                row.code = <uint16_t>value
            elif field == 10:
                row.flags = (row.flags & ~16) | (16 if value else 0)
            elif field == 11:
                row.flags = (row.flags & ~32) | (32 if value else 0)
            else:
                return False
        else:
            return False
    return not ducat_zero_id(row.id)


cdef uint32_t parse_call(const uint8_t* at, uint64_t length, CallRow* rows, uint32_t count_max) noexcept nogil:
    """A wallet.v1.CreateTransfersRequest that settles; the number of its rows, 0 where they are not all plain or too many."""
    cdef const uint8_t* end = at + length
    cdef uint64_t tag, value
    cdef uint32_t count = 0
    while at < end:
        at = parse_varint(at, end, &tag)
        if at == NULL:
            return 0
        at = parse_varint(at, end, &value)
        if at == NULL:
            return 0
        if tag == 0x0A:
            if value > <uint64_t>(end - at) or count == count_max or not parse_call_row(at, at + value, &rows[count]):
                return 0
            at += value
            count += 1
        elif tag != 0x10 or (value != 0 and value != 2):
            return 0
    return count


cdef inline uint64_t varint_bytes(uint64_t value) noexcept nogil:
    cdef uint64_t count = 1
    while value >= 0x80:
        value >>= 7
        count += 1
    return count


cdef inline uint8_t* put_varint(uint8_t* at, uint64_t value) noexcept nogil:
    while value >= 0x80:
        at[0] = <uint8_t>(value | 0x80)
        at += 1
        value >>= 7
    at[0] = <uint8_t>value
    return at + 1


cdef inline uint64_t position_bytes(uint32_t shard, uint64_t sequence) noexcept nogil:
    return 1 + varint_bytes(sequence) + (1 + varint_bytes(shard) if shard else 0)


cdef uint8_t* put_position(uint8_t* at, uint32_t shard, uint64_t sequence) noexcept nogil:
    """A wallet.v1.ShardPosition behind its length."""
    at = put_varint(at, position_bytes(shard, sequence))
    if shard:
        at[0] = 0x08
        at = put_varint(at + 1, shard)
    at[0] = 0x10
    return put_varint(at + 1, sequence)


cdef list build_call_results(Request* request, uint32_t shard_count):
    """A serialized CreateTransfersResponse for each call whose rows the request has, in their order."""
    cdef uint32_t* counts = <uint32_t*>request.extra
    cdef uint64_t positions = 0, one
    cdef uint32_t shard, call, at_row = 0
    cdef uint8_t* at
    cdef bytes out
    cdef list results = []
    for shard in range(shard_count):
        if request.positions[shard]:
            one = position_bytes(shard, request.positions[shard])
            positions += 1 + varint_bytes(one) + one
    for call in range(request.entry_count):
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(1 + varint_bytes(counts[call]) + counts[call] + positions))
        at = <uint8_t*>PyBytes_AS_STRING(out)
        at[0] = 0x0A
        at = put_varint(at + 1, counts[call])
        memcpy(at, request.results + at_row, counts[call])     # each is below 128, so its varint is the byte itself
        at += counts[call]
        at_row += counts[call]
        for shard in range(shard_count):
            if request.positions[shard]:
                at[0] = 0x12
                at = put_position(at + 1, shard, request.positions[shard])
        results.append(out)
    return results


cdef bytes build_result(Request* request, uint32_t shard_count):
    """The serialized TransferBatchResult, or SubmitTransfersResponse around it."""
    cdef uint64_t inner = 0, one, total
    cdef uint32_t failed = 0, row, shard
    cdef uint8_t* at
    cdef uint8_t* rows_at
    cdef bytes out
    row = ducat_next_failed(request.results, 0, request.count)
    while row < request.count:
        failed += 1
        row = ducat_next_failed(request.results, row + 1, request.count)
    if request.batch_id:
        inner += 1 + varint_bytes(request.batch_id)
    if request.count:
        inner += 1 + varint_bytes(request.count)
    if request.replayed:
        inner += 1 + varint_bytes(request.replayed)
    if failed:
        inner += 1 + varint_bytes(4 * <uint64_t>failed) + 4 * <uint64_t>failed + 1 + varint_bytes(failed) + failed
    for shard in range(shard_count):
        if request.positions[shard]:
            one = position_bytes(shard, request.positions[shard])
            inner += 1 + varint_bytes(one) + one
    total = inner if request.shape == SHAPE_MESSAGE else 1 + varint_bytes(inner) + inner
    out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
    at = <uint8_t*>PyBytes_AS_STRING(out)
    if request.shape == SHAPE_WRAPPED:
        at[0] = 0x0A
        at = put_varint(at + 1, inner)
    if request.batch_id:
        at[0] = 0x08
        at = put_varint(at + 1, request.batch_id)
    if request.count:
        at[0] = 0x10
        at = put_varint(at + 1, request.count)
    if request.replayed:
        at[0] = 0x18
        at = put_varint(at + 1, request.replayed)
    if failed:
        at[0] = 0x22
        at = put_varint(at + 1, 4 * <uint64_t>failed)
        rows_at = at
        at += 4 * <uint64_t>failed
        at[0] = 0x2A
        at = put_varint(at + 1, failed)
        row = ducat_next_failed(request.results, 0, request.count)
        while row < request.count:
            memcpy(rows_at, &row, 4)
            rows_at += 4
            at[0] = request.results[row]
            at += 1
            row = ducat_next_failed(request.results, row + 1, request.count)
    for shard in range(shard_count):
        if request.positions[shard]:
            at[0] = 0x32
            at = put_position(at + 1, shard, request.positions[shard])
    return out
