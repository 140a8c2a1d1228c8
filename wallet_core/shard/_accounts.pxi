# ducat.wallet.v1.CreateAccountsRequest and GetAccountsRequest straight from their protobuf bytes, and the answers straight
# into them. Included by _host.pyx.
#
# Only what means the same to everybody is taken: every row has an id of 16 bytes and no name, unknown fields are skipped.
# Whatever else a message has (a name, a striped account to open, a position to wait for, a rule of the contract that it
# breaks, bytes that the protobuf library might refuse) leaves it untaken, and its caller goes the long way, where the
# protobuf library reads it and says what is wrong.

cdef enum:
    ACCOUNT_FROZEN = 1
    ACCOUNT_CLOSED = 2
    ACCOUNT_MAY_OVERDRAW = 4
    ACCOUNT_BYTES_MAX = 132          # of an Account behind its length, without name and positions
    POSITION_BYTES_MAX = 20          # of one of its positions
    NAME_BYTES_MAX = 1 << 16         # a longer name (no caller can have given one) is answered the long way
    EVERY_SHARD = 0xFFFF             # home of a striped account
    ENTRY_NONE = 0xFFFFFFFF


cdef inline const uint8_t* parse_plain_varint(const uint8_t* at, const uint8_t* end, uint64_t* out) noexcept nogil:
    """Behind the varint, or NULL: also where it is longer than need be, or has more than 64 bits."""
    cdef const uint8_t* start = at
    if at < end and at[0] < 0x80:
        out[0] = at[0]
        return at + 1
    at = parse_varint(at, end, out)
    if at != NULL and (at[-1] == 0 or (at - start == 10 and at[-1] > 1)):
        return NULL
    return at


cdef inline const uint8_t* parse_tag(const uint8_t* at, const uint8_t* end, uint64_t* tag) noexcept nogil:
    at = parse_plain_varint(at, end, tag)
    return NULL if at == NULL or tag[0] < 8 or tag[0] >> 32 else at


cdef inline const uint8_t* parse_length(const uint8_t* at, const uint8_t* end, uint64_t* length) noexcept nogil:
    at = parse_plain_varint(at, end, length)
    return NULL if at == NULL or length[0] > <uint64_t>(end - at) else at


cdef const uint8_t* parse_skip(const uint8_t* at, const uint8_t* end, uint64_t tag) noexcept nogil:
    """Behind a field that is not known, or NULL; groups are not skipped."""
    cdef uint64_t value
    if tag & 7 == 0:
        return parse_plain_varint(at, end, &value)
    if tag & 7 == 2:
        at = parse_length(at, end, &value)
        return NULL if at == NULL else at + value
    value = 8 if tag & 7 == 1 else 4 if tag & 7 == 5 else 0
    return at + value if value and value <= <uint64_t>(end - at) else NULL


cdef bint parse_account_spec(const uint8_t* at, const uint8_t* end, uint8_t* id, uint8_t* currency, uint16_t* flags,
                             int64_t* overdraft, int64_t* limit) noexcept nogil:
    """One wallet.v1.AccountSpec into the columns; False where it is not plain."""
    cdef uint64_t tag, value, i
    cdef uint16_t flag
    cdef bint named = False
    memset(currency, 0, 4)
    flags[0], overdraft[0], limit[0] = 0, 0, 0
    while at < end:
        at = parse_tag(at, end, &tag)
        if at == NULL:
            return False
        if tag == 0x0A or tag == 0x12 or tag == 0x1A:
            at = parse_length(at, end, &value)
            if at == NULL:
                return False
            if tag == 0x0A:
                if value != 16:
                    return False
                memcpy(id, at, 16)
                named = True
            elif tag == 0x12 and value:
                return False
            elif tag == 0x1A:
                if value > 3:
                    return False
                memset(currency, 0, 4)
                for i in range(value):
                    if at[i] & 0x80:
                        return False
                    currency[i] = at[i]
            at += value
        elif tag & 7 == 0 and 0x20 <= tag <= 0x48:
            at = parse_plain_varint(at, end, &value)
            if at == NULL:
                return False
            if tag == 0x20:
                overdraft[0] = <int64_t>value
            elif tag == 0x28:
                limit[0] = <int64_t>value
            else:
                flag = ACCOUNT_MAY_OVERDRAW if tag == 0x30 else ACCOUNT_STRIPED if tag == 0x38 \
                    else ACCOUNT_FROZEN if tag == 0x40 else ACCOUNT_CLOSED
                flags[0] = flags[0] | flag if value else flags[0] & ~flag
        else:
            at = parse_skip(at, end, tag)
            if at == NULL:
                return False
    return named and not flags[0] & ACCOUNT_STRIPED


cdef uint32_t parse_count(const uint8_t* at, uint64_t length) noexcept nogil:
    """How many times a message has field 1 with a length, 1 to ROWS_MAX; 0 where that cannot be told, or is beyond it."""
    cdef const uint8_t* end = at + length
    cdef uint64_t tag
    cdef uint32_t count = 0
    while at < end:
        at = parse_tag(at, end, &tag)
        if at != NULL:
            at = parse_skip(at, end, tag)
        if at == NULL:
            return 0
        count += tag == 0x0A
    return count if count <= ROWS_MAX else 0


cdef bint parse_account_specs(const uint8_t* at, uint64_t length, uint32_t count, uint8_t* data) noexcept nogil:
    """The rows of a CreateAccountsRequest that has passed `parse_count` into the columns of `submit_accounts`: overdraft limits,
    balance limits, ids, currencies, flags. False where one is not plain."""
    cdef const uint8_t* end = at + length
    cdef uint64_t tag = 0, value = 0
    cdef size_t n = count, i = 0
    while at < end:
        at = parse_tag(at, end, &tag)
        if tag != 0x0A:
            at = parse_skip(at, end, tag)
            continue
        at = parse_length(at, end, &value)
        if not parse_account_spec(at, at + value, data + 16 * n + 16 * i, data + 32 * n + 4 * i,
                                  <uint16_t*>(data + 36 * n) + i, <int64_t*>data + i, <int64_t*>(data + 8 * n) + i):
            return False
        at += value
        i += 1
    return True


cdef bint parse_account_ids(const uint8_t* at, uint64_t length, uint8_t* ids) noexcept nogil:
    """The ids of a GetAccountsRequest that has passed `parse_count`. False where it has anything but ids of 16 bytes."""
    cdef const uint8_t* end = at + length
    cdef uint64_t tag = 0, value = 0
    while at < end:
        at = parse_tag(at, end, &tag)
        if tag == 0x0A:
            at = parse_length(at, end, &value)
            if value != 16:
                return False
            memcpy(ids, at, 16)
            ids += 16
            at += 16
        elif tag == 0x12 or tag == 0x1A:       # names, positions
            return False
        else:
            at = parse_skip(at, end, tag)
    return True


cdef bytes build_account_results(const uint8_t* codes, uint32_t count):
    """The serialized CreateAccountsResponse. Each code is below 128, so its varint is the byte itself."""
    cdef bytes out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(1 + varint_bytes(count) + count))
    cdef uint8_t* at = <uint8_t*>PyBytes_AS_STRING(out)
    at[0] = 0x0A
    memcpy(put_varint(at + 1, count), codes, count)
    return out


cdef inline uint8_t* put_figure(uint8_t* at, uint8_t tag, int64_t value) noexcept nogil:
    if value == 0:
        return at
    at[0] = tag
    return put_varint(at + 1, <uint64_t>value)


cdef uint8_t* put_read_position(uint8_t* at, uint32_t shard, uint64_t sequence) noexcept nogil:
    """Field 14 of an Account."""
    at[0] = 0x72
    at[1] = <uint8_t>((1 + varint_bytes(shard) if shard else 0) + (1 + varint_bytes(sequence) if sequence else 0))
    at = put_figure(at + 2, 0x08, shard)
    return put_figure(at, 0x10, <int64_t>sequence)


cdef inline bint figure_fits(int64_t value) noexcept nogil:
    """What the contract's figures may be: within 64 bits on either side of zero."""
    return value != <int64_t>0x8000000000000000


cdef inline bint figures_add(int64_t* sum, int64_t value) noexcept nogil:
    """False where the sum does not fit."""
    cdef int64_t total = <int64_t>(<uint64_t>sum[0] + <uint64_t>value)
    if (sum[0] ^ total) & (value ^ total) < 0:
        return False
    sum[0] = total
    return True


cdef class AccountsRead:
    """Accounts as they were read, until somebody says what their names are."""

    cdef ReadEntry* entries
    cdef uint32_t* order             # entries in the order of the request; of a striped account the first, which has the sums
    cdef uint64_t* before            # durable sequence number of each shard before the reading
    cdef HostCore* core
    cdef object host                 # keeps `core`
    cdef uint32_t count
    cdef bint fits

    def __dealloc__(self):
        free(self.entries)
        free(self.order)
        free(self.before)

    @property
    def ids(self):
        """The ids of those that exist, in the order of the request."""
        cdef uint32_t i
        cdef list found = []
        for i in range(self.count):
            found.append(self.entries[self.order[i]].state.id[:16])
        return found

    def message(self, dict names not None):
        """A serialized GetAccountsResponse. `names`: of those ids that have one. None where a figure, summed over shards, does
        not fit, or a name is too long."""
        cdef Py_ssize_t size = 0, one = ACCOUNT_BYTES_MAX + 4 + POSITION_BYTES_MAX
        cdef uint32_t i
        cdef bytes name = b"", out
        cdef list written = None
        cdef uint8_t* start
        cdef uint8_t* at
        cdef AccountState* state
        if not self.fits:
            return None
        for i in range(self.count):
            size += one
            if self.entries[self.order[i]].state.flags & ACCOUNT_STRIPED:
                size += <Py_ssize_t>self.core.shard_count * POSITION_BYTES_MAX
        if names:
            written = []
            for i in range(self.count):
                name = (<str>names.get(self.entries[self.order[i]].state.id[:16], "")).encode()
                if len(name) > NAME_BYTES_MAX:
                    return None
                size += len(name) + 4
                written.append(name)
        start = <uint8_t*>malloc(size + 1)
        if start == NULL:
            raise MemoryError()
        try:
            at = start
            for i in range(self.count):
                state = &self.entries[self.order[i]].state
                if written is not None:
                    name = <bytes>written[i]
                at = self.put(at, state, <const uint8_t*>PyBytes_AS_STRING(name), <uint64_t>len(name))
                if at == NULL:
                    return None
            return PyBytes_FromStringAndSize(<char*>start, at - start)
        finally:
            free(start)

    cdef uint8_t* put(self, uint8_t* at, const AccountState* state, const uint8_t* name, uint64_t name_length) noexcept nogil:
        """One Account as field 1; NULL where a figure does not fit."""
        cdef uint8_t* body = at + 2      # most are shorter than 128 bytes
        cdef uint8_t* end = body
        cdef int64_t available = state.balance
        cdef uint64_t length
        cdef uint32_t shard, width
        if not (figure_fits(state.balance) and figure_fits(state.held_out) and figure_fits(state.held_in)):
            return NULL
        if not figures_add(&available, -state.held_out):
            return NULL
        if not figures_add(&available, state.overdraft_limit):
            available = 0x7FFFFFFFFFFFFFFF       # the overdraft limit, never below zero, may alone be that much
        end[0], end[1] = 0x0A, 16
        memcpy(end + 2, state.id, 16)
        end += 18
        if name_length:
            end[0] = 0x12
            end = put_varint(end + 1, name_length)
            memcpy(end, name, name_length)
            end += name_length
        width = 0
        while width < 4 and (state.currency >> 8 * width) & 0xFF:
            width += 1
        if width:
            end[0], end[1] = 0x1A, <uint8_t>width
            memcpy(end + 2, &state.currency, width)
            end += 2 + width
        end = put_figure(end, 0x20, state.balance)
        end = put_figure(end, 0x28, state.held_out)
        end = put_figure(end, 0x30, state.held_in)
        end = put_figure(end, 0x38, available)
        end = put_figure(end, 0x40, state.overdraft_limit)
        end = put_figure(end, 0x48, state.balance_limit)
        end = put_figure(end, 0x50, (state.flags & ACCOUNT_FROZEN) != 0)
        end = put_figure(end, 0x58, (state.flags & ACCOUNT_CLOSED) != 0)
        end = put_figure(end, 0x60, (state.flags & ACCOUNT_MAY_OVERDRAW) != 0)
        end = put_figure(end, 0x68, (state.flags & ACCOUNT_STRIPED) != 0)
        if state.flags & ACCOUNT_STRIPED:
            for shard in range(self.core.shard_count):
                if self.core.shards[shard] != NULL:
                    end = put_read_position(end, shard, self.before[shard])
        else:
            shard = self.core.shard_of_slot[ducat_slot(state.id)]
            end = put_read_position(end, shard, self.before[shard])
        length = <uint64_t>(end - body)
        width = <uint32_t>varint_bytes(length) - 1
        if width:
            memmove(body + width, body, length)
        at[0] = 0x0A
        put_varint(at + 1, length)
        return end + width


cdef int gather_read(AccountsRead read, uint32_t rows, uint32_t entry_count) except -1:
    """The entries of what exists in the order of the request; those of a striped account are added up."""
    cdef uint32_t* first = <uint32_t*>malloc(4 * <size_t>rows + 4)
    cdef uint32_t i, row
    cdef AccountState* sum
    cdef AccountState* part
    cdef ReadEntry* dense
    if first == NULL:
        raise MemoryError()
    memset(first, 0xFF, 4 * <size_t>rows)
    read.order, read.fits = first, True
    for i in range(entry_count):
        if not read.entries[i].found:
            continue
        row = read.entries[i].id_index
        if first[row] == ENTRY_NONE:
            first[row] = i
            continue
        sum, part = &read.entries[first[row]].state, &read.entries[i].state
        if not (figures_add(&sum.balance, part.balance) and figures_add(&sum.held_out, part.held_out)
                and figures_add(&sum.held_in, part.held_in)):
            read.fits = False
    for row in range(rows):
        if first[row] != ENTRY_NONE:
            first[read.count] = first[row]
            read.count += 1
    if read.count < entry_count:
        # what waits for names is not counted as under way any more: it should not keep what nobody will look at
        dense = <ReadEntry*>malloc(read.count * sizeof(ReadEntry) + 1)
        if dense == NULL:
            raise MemoryError()
        for i in range(read.count):
            dense[i] = read.entries[first[i]]
            first[i] = i
        free(read.entries)
        read.entries = dense
    return 0
