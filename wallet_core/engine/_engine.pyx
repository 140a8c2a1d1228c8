# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, embedsignature=True
# distutils: language = c
"""The native wallet engine. The theory is in the included files, the C interface in _engine.pxd, the oracle in twin.py."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from wallet_core.engine.views import (
    AccountView,
    Counters,
    CurrencyTotals,
    EnginePoisoned,
    EngineRefused,
    HoldView,
    SendView,
)

include "state.pyx"
include "index.pyx"
include "id_table.pyx"
include "accounts.pyx"
include "holds.pyx"
include "sagas.pyx"
include "transfers.pyx"
include "replay.pyx"
include "digest.pyx"
include "image.pyx"


cdef inline void account_copy(const EngineState* e, uint64_t ordinal, AccountState* out) noexcept nogil:
    cdef const Account* a = &e.accounts[ordinal]
    memcpy(out.id, a, 16)
    out.balance = a.balance
    out.held_out = a.held_out
    out.held_in = a.held_in
    out.overdraft_limit = a.overdraft_limit
    out.balance_limit = a.balance_limit
    out.currency = a.currency
    out.ordinal = <uint32_t> ordinal
    out.flags = a.flags


cdef inline EngineState* state(Engine self) noexcept nogil:
    return <EngineState*> self._state


cdef bytes column(str name, object data, uint64_t count, uint64_t unit):
    # The column's bytes, which must be count units long. None stays None.
    cdef bytes found
    if data is None:
        return None
    found = data if type(data) is bytes else bytes(data)
    if <uint64_t> PyBytes_GET_SIZE(found) != count * unit:
        raise ValueError(f"{name}: expected {count} x {unit} = {count * unit} bytes, got {len(found)}")
    return found


cdef inline const uint8_t* start_of(bytes data):
    if data is None:
        return NULL
    return <const uint8_t*> PyBytes_AS_STRING(data)


cdef uint64_t count_of(str name, object data) except? 0xFFFFFFFFFFFFFFFF:
    if len(data) % 16:
        raise ValueError(f"{name}: {len(data)} bytes are no multiple of 16")
    return <uint64_t> (len(data) // 16)


cdef bytes rows_of(object rows, uint64_t count):
    # u32 gather index, checked against the columns' length.
    import array

    packed = array.array("I", rows)
    for row in packed:
        if row >= count:
            raise ValueError(f"rows: {row} is not below {count}")
    return packed.tobytes()


cdef str currency_name(uint32_t currency):
    return (<bytes> (<char*> &currency)[:4]).rstrip(b"\0").decode("ascii", "replace")


cdef class Engine:
    """One shard's state machine.

    `id_window_ms`: how long a transfer id is remembered; `id_count_max` ids at most, in generations of
    `generation_ids` (at most 2**20; at least two generations). `accounts_max`, `holds_max`: address space is reserved for
    them. `unsettled_max`: sends towards one destination that are not settled. `memory_bytes_max`: 0 = no limit. `room_ids`: for
    how many ids `prepare` touches memory before they come (30 bytes each, whole generations, at least one).
    """

    def __cinit__(self, shard=0, *, id_window_ms=7 * 24 * 3600 * 1000, id_count_max=1 << 26, generation_ids=1 << 20,
                  accounts_max=1 << 28, holds_max=1 << 26, unsettled_max=1 << 22, memory_bytes_max=0, room_ids=0):
        if not 0 <= shard < SHARD_COUNT_MAX:
            raise ValueError(f"shard: {shard} is not in 0..{SHARD_COUNT_MAX - 1}")
        if not 1 <= generation_ids <= 1 << 20:
            raise ValueError(f"generation_ids: {generation_ids} is not in 1..{1 << 20}")
        if not 2 * generation_ids <= id_count_max <= generation_ids << 20:
            raise ValueError(f"id_count_max: {id_count_max} is not in {2 * generation_ids}..{generation_ids << 20}")
        if id_window_ms < 1:
            raise ValueError(f"id_window_ms: {id_window_ms} is not positive")
        for name, value in (("accounts_max", accounts_max), ("holds_max", holds_max)):
            if not 1 <= value <= 1 << 30:
                raise ValueError(f"{name}: {value} is not in 1..{1 << 30}")
        if not 1 <= unsettled_max <= 1 << 40:
            raise ValueError(f"unsettled_max: {unsettled_max} is not in 1..{1 << 40}")
        if not 0 <= room_ids <= 1 << 30:
            raise ValueError(f"room_ids: {room_ids} is not in 0..{1 << 30}")
        self._state = state_new(shard, id_window_ms, id_count_max, generation_ids, accounts_max, holds_max, unsettled_max,
                                memory_bytes_max, room_ids)
        self._buffer.data = NULL
        self._buffer.length = 0
        self._buffer.capacity = 0
        self._buffer.count = 0
        if self._state == NULL:
            raise MemoryError("wallet engine: no memory, or no address space, for an empty engine")

    def __dealloc__(self):
        state_free(state(self))
        free(self._buffer.data)

    # The C interface (see _engine.pxd).

    cdef int apply_transfers(self, const TransferColumns* columns, uint64_t timestamp_ns, uint8_t* results,
                             EventBuffer* events) noexcept nogil:
        return transfers_apply(state(self), columns, timestamp_ns, results, events)

    cdef uint32_t answer_known(self, const TransferColumns* columns, uint8_t* results, uint8_t otherwise) noexcept nogil:
        return transfers_known(state(self), columns, results, otherwise)

    cdef int apply_accounts(self, const AccountColumns* columns, bint update, uint64_t timestamp_ns, uint8_t* results,
                            EventBuffer* events) noexcept nogil:
        return accounts_apply(state(self), columns, update, timestamp_ns, results, events)

    cdef int apply_credits(self, uint16_t source_shard, uint64_t first_number, const CreditColumns* columns,
                           uint64_t timestamp_ns, uint8_t* results, EventBuffer* events) noexcept nogil:
        return credits_apply(state(self), source_shard, first_number, columns, timestamp_ns, results, events)

    cdef int apply_outcomes(self, uint16_t destination_shard, uint64_t upto_number, const Refusal* refused,
                            uint32_t refused_count, uint64_t timestamp_ns, EventBuffer* events) noexcept nogil:
        return outcomes_apply(state(self), destination_shard, upto_number, refused, refused_count, timestamp_ns, events)

    cdef int expire_holds(self, uint64_t timestamp_ns, EventBuffer* events) noexcept nogil:
        cdef EngineState* e = state(self)
        cdef size_t start = events.length
        if e.poisoned:
            return ENGINE_POISONED
        clock_advance(e, timestamp_ns)
        if holds_expire(e, events) < 0:
            return poison(e)
        chain_digest(e, events, start)
        return 0

    cdef uint64_t next_deadline_ns(self) noexcept nogil:
        cdef EngineState* e = state(self)
        return e.heap[0].deadline_ms * 1000000 if e.heap_count else 0

    cdef int replay(self, const uint8_t* records, uint32_t count, uint64_t first_sequence,
                    uint64_t timestamp_ns) noexcept nogil:
        return replay_apply(state(self), records, count, first_sequence, timestamp_ns)

    cdef uint64_t replay_error_sequence(self) noexcept nogil:
        return state(self).replay_error

    cdef const char* replay_error_reason(self) noexcept nogil:
        if state(self).replay_reason == NULL:
            return b""
        return state(self).replay_reason

    cdef bint find_account(self, const uint8_t* account_id, AccountState* account) noexcept nogil:
        cdef uint32_t ordinal = account_find(state(self), du_load64(account_id), du_load64(account_id + 8))
        if ordinal == NONE:
            return False
        account_copy(state(self), ordinal, account)
        return True

    cdef void prefetch_account(self, const uint8_t* account_id, bint record) noexcept nogil:
        cdef EngineState* e = state(self)
        cdef uint64_t hash = du_hash_id(du_load64(account_id), du_load64(account_id + 8))
        cdef uint32_t ordinal
        if not record:
            index_prefetch(&e.accounts_index, hash)
            return
        ordinal = index_candidate(&e.accounts_index, hash)
        if ordinal != NONE:
            du_prefetch(&e.accounts[ordinal])

    cdef bint account_at(self, uint32_t ordinal, AccountState* account) noexcept nogil:
        if ordinal >= state(self).account_count:
            return False
        account_copy(state(self), ordinal, account)
        return True

    cdef uint8_t find_result(self, const uint8_t* transfer_id) noexcept nogil:
        cdef const IdEntry* entry = ids_lookup(state(self), du_load64(transfer_id), du_load64(transfer_id + 8))
        return 0 if entry == NULL else entry.meta & 0xFF

    cdef bint has_hold(self, const uint8_t* transfer_id) noexcept nogil:
        return hold_by_id(state(self), du_load64(transfer_id), du_load64(transfer_id + 8)) != NONE

    cdef void digest(self, uint8_t* out) noexcept nogil:
        du_store64(out, state(self).linear)
        du_store64(out + 8, state(self).chain)

    cdef uint64_t sequence(self) noexcept nogil:
        return state(self).sequence

    cdef void counters(self, EngineCounters* out) noexcept nogil:
        cdef EngineState* e = state(self)
        cdef uint64_t i
        memset(out, 0, sizeof(EngineCounters))
        out.sequence = e.sequence
        out.now_ns = e.now_ns
        out.floor_ms = e.floor_ms
        out.account_count = e.account_count
        out.hold_count = e.hold_count
        out.id_count = e.id_count
        out.generation_count = e.generation_count
        out.unsettled_count = e.unsettled_count
        for i in range(SHARD_COUNT_MAX):
            out.refusal_count += e.cursors[i].last - e.cursors[i].first
        out.repeated_count = e.repeated_count
        out.memory_bytes = (e.budget.bytes)
        out.poisoned = e.poisoned

    cdef uint32_t totals(self, CurrencyTotal* out, uint32_t capacity) noexcept nogil:
        return totals_scan(state(self), out, capacity)

    cdef uint32_t read_holds(self, const uint8_t* debit_id, uint64_t* from_slot, uint64_t slots, HoldState* out,
                             uint32_t capacity) noexcept nogil:
        cdef EngineState* e = state(self)
        cdef uint32_t ordinal = account_find(e, du_load64(debit_id), du_load64(debit_id + 8)), count = 0
        cdef uint64_t slot = from_slot[0], end = min(from_slot[0] + slots, e.hold_slots)
        from_slot[0] = 0
        if ordinal == NONE:
            return 0
        while slot < end:
            if e.holds[slot].sequence and e.holds[slot].debit == ordinal:
                if count == capacity:
                    break
                hold_copy(e, &e.holds[slot], &out[count])
                count += 1
            slot += 1
        if slot < e.hold_slots:
            from_slot[0] = slot
        return count

    cdef bint hold_placed_at(self, uint64_t sequence, HoldState* out) noexcept nogil:
        cdef uint32_t slot = hold_by_sequence(state(self), sequence)
        if slot == NONE:
            return False
        hold_copy(state(self), &state(self).holds[slot], out)
        return True

    cdef bint check_digest(self) noexcept nogil:
        return linear_from_accounts(state(self)) == state(self).linear

    cdef bint wants_memory(self) noexcept nogil:
        return memory_wanted(state(self))

    cdef bint wants_room(self) noexcept nogil:
        return ready_is_below(state(self), state(self).ready_count)

    cdef int prepare(self) noexcept nogil:
        state(self).is_prepared = 1
        return memory_prepare(state(self))

    cdef void send_span(self, uint16_t destination_shard, uint64_t* settled_number, uint64_t* last_number) noexcept nogil:
        settled_number[0] = 0
        last_number[0] = 0
        if destination_shard < SHARD_COUNT_MAX:
            settled_number[0] = state(self).sends[destination_shard].settled
            last_number[0] = state(self).sends[destination_shard].last

    cdef uint32_t read_sends(self, uint16_t destination_shard, uint64_t from_number, uint32_t limit,
                             PendingSend* out) noexcept nogil:
        cdef const SendQueue* q
        cdef uint64_t number, count
        cdef uint32_t i
        if destination_shard >= SHARD_COUNT_MAX:
            return 0
        q = &state(self).sends[destination_shard]
        number = max(from_number, q.settled + 1)
        if number > q.last:
            return 0
        count = min(<uint64_t> limit, q.last - number + 1)
        for i in range(<uint32_t> count):
            memcpy(&out[i], send_at(q, number + i), sizeof(PendingSend))
        return <uint32_t> count

    cdef uint64_t credit_cursor(self, uint16_t source_shard) noexcept nogil:
        return state(self).cursors[source_shard].applied if source_shard < SHARD_COUNT_MAX else 0

    cdef uint32_t read_refusals(self, uint16_t source_shard, uint64_t from_number, uint32_t limit,
                                Refusal* out) noexcept nogil:
        cdef const CreditCursor* cursor
        cdef uint64_t at, count
        if source_shard >= SHARD_COUNT_MAX:
            return 0
        cursor = &state(self).cursors[source_shard]
        at = refusals_from(cursor, from_number)
        count = min(<uint64_t> limit, cursor.last - at)
        if count:
            memcpy(out, cursor.refusals + at, count * sizeof(Refusal))
        return <uint32_t> count

    cdef void forget_refusals(self, uint16_t source_shard, uint64_t upto_number) noexcept nogil:
        cdef CreditCursor* cursor
        if source_shard < SHARD_COUNT_MAX:
            cursor = &state(self).cursors[source_shard]
            cursor.first = refusals_from(cursor, upto_number + 1)

    cdef void refuse_sends(self, uint16_t destination_shard, bint refused) noexcept nogil:
        state(self).sends_refused[destination_shard] = refused

    cdef int begin_image(self) noexcept nogil:
        return image_begin(state(self))

    cdef int64_t read_image(self, uint8_t* buffer) noexcept nogil:
        return image_read(state(self), buffer)

    cdef void end_image(self) noexcept nogil:
        image_end(state(self))

    cdef void release_image(self) noexcept nogil:
        image_release(state(self))
        spares_free(state(self))

    cdef bint prepare_image(self) noexcept nogil:
        return image_prepare(state(self))

    cdef int load_piece(self, const uint8_t* piece, uint64_t length) noexcept nogil:
        return image_load_piece(state(self), piece, length)

    cdef int load_done(self) noexcept nogil:
        return image_load_done(state(self))

    # The Python face: for tests, tools and the twin. bytes in, (one result byte a row, event records) out.

    cdef tuple _outcome(self, int code, bytes results):
        self._check(code)
        return results, PyBytes_FromStringAndSize(<char*> self._buffer.data, <Py_ssize_t> self._buffer.length)

    cdef int _check(self, int code) except -1:
        if code == ENGINE_POISONED:
            raise EnginePoisoned("the engine is poisoned: out of memory or an earlier failure; restore it from snapshot and log")
        if code == ENGINE_REFUSED:
            raise EngineRefused("the call contradicts the engine's state; nothing was applied")
        return 0

    cdef void _clear(self) noexcept nogil:
        self._buffer.length = 0
        self._buffer.count = 0

    def transfers(self, ids, debit_ids, credit_ids, amounts, timestamp_ns, *, flags=None, pending_ids=None, timeouts_s=None,
                  codes=None, credit_shards=None, rows=None, bint chain_steps=False):
        cdef TransferColumns c
        cdef uint64_t count = count_of("ids", ids), now = timestamp_ns
        cdef bytes ids_ = column("ids", ids, count, 16)
        cdef bytes debit_ = column("debit_ids", debit_ids, count, 16)
        cdef bytes credit_ = column("credit_ids", credit_ids, count, 16)
        cdef bytes amounts_ = column("amounts", amounts, count, 8)
        cdef bytes flags_ = column("flags", flags, count, 2)
        cdef bytes pending_ = column("pending_ids", pending_ids, count, 16)
        cdef bytes timeouts_ = column("timeouts_s", timeouts_s, count, 4)
        cdef bytes codes_ = column("codes", codes, count, 2)
        cdef bytes shards_ = column("credit_shards", credit_shards, count, 2)
        cdef bytes rows_ = None if rows is None else rows_of(rows, count)
        cdef bytes results = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> count)
        cdef uint8_t* out = <uint8_t*> PyBytes_AS_STRING(results)
        cdef int code
        memset(out, 0, count)
        c.count = <uint32_t> (count if rows_ is None else len(rows_) // 4)
        c.ids = start_of(ids_)
        c.debit_ids = start_of(debit_)
        c.credit_ids = start_of(credit_)
        c.amounts = start_of(amounts_)
        c.flags = start_of(flags_)
        c.pending_ids = start_of(pending_)
        c.timeouts_s = start_of(timeouts_)
        c.codes = start_of(codes_)
        c.credit_shards = start_of(shards_)
        c.rows = <const uint32_t*> start_of(rows_)
        c.chain_steps = chain_steps
        self._clear()
        with nogil:
            code = self.apply_transfers(&c, now, out, &self._buffer)
        return self._outcome(code, results)

    def open_accounts(self, ids, currencies, timestamp_ns, *, flags=None, overdraft_limits=None, balance_limits=None):
        return self._accounts(ids, currencies, timestamp_ns, flags, overdraft_limits, balance_limits, False)

    def update_accounts(self, ids, timestamp_ns, *, flags=None, overdraft_limits=None, balance_limits=None):
        return self._accounts(ids, None, timestamp_ns, flags, overdraft_limits, balance_limits, True)

    cdef tuple _accounts(self, ids, currencies, timestamp_ns, flags, overdraft_limits, balance_limits, bint update):
        cdef AccountColumns c
        cdef uint64_t count = count_of("ids", ids), now = timestamp_ns
        cdef bytes ids_ = column("ids", ids, count, 16)
        cdef bytes currencies_ = column("currencies", currencies, count, 4)
        cdef bytes flags_ = column("flags", flags, count, 2)
        cdef bytes overdraft_ = column("overdraft_limits", overdraft_limits, count, 8)
        cdef bytes limits_ = column("balance_limits", balance_limits, count, 8)
        cdef bytes results = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> count)
        cdef uint8_t* out = <uint8_t*> PyBytes_AS_STRING(results)
        cdef int code
        c.count = <uint32_t> count
        c.ids = start_of(ids_)
        c.currencies = start_of(currencies_)
        c.flags = start_of(flags_)
        c.overdraft_limits = start_of(overdraft_)
        c.balance_limits = start_of(limits_)
        c.rows = NULL
        self._clear()
        with nogil:
            code = self.apply_accounts(&c, update, now, out, &self._buffer)
        return self._outcome(code, results)

    def credits(self, source_shard, first_number, ids, credit_ids, amounts, currencies, timestamp_ns, *, codes=None):
        cdef CreditColumns c
        cdef uint64_t count = count_of("ids", ids), now = timestamp_ns, first = first_number
        cdef uint16_t source = source_shard
        cdef bytes ids_ = column("ids", ids, count, 16)
        cdef bytes credit_ = column("credit_ids", credit_ids, count, 16)
        cdef bytes amounts_ = column("amounts", amounts, count, 8)
        cdef bytes currencies_ = column("currencies", currencies, count, 4)
        cdef bytes codes_ = column("codes", codes, count, 2)
        cdef bytes results = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> count)
        cdef uint8_t* out = <uint8_t*> PyBytes_AS_STRING(results)
        cdef int code
        c.count = <uint32_t> count
        c.ids = start_of(ids_)
        c.credit_ids = start_of(credit_)
        c.amounts = start_of(amounts_)
        c.currencies = start_of(currencies_)
        c.codes = start_of(codes_)
        self._clear()
        with nogil:
            code = self.apply_credits(source, first, &c, now, out, &self._buffer)
        return self._outcome(code, results)

    def outcomes(self, destination_shard, upto_number, refused, timestamp_ns):
        cdef list pairs = list(refused)
        cdef uint16_t destination = destination_shard
        cdef uint64_t upto = upto_number, now = timestamp_ns
        cdef uint32_t count = <uint32_t> len(pairs)
        cdef Refusal* refusals = <Refusal*> calloc(count + 1, sizeof(Refusal))
        cdef uint32_t i
        cdef int code
        if refusals == NULL:
            raise MemoryError
        try:
            for i in range(count):
                refusals[i].number = pairs[i][0]
                refusals[i].result = pairs[i][1]
            self._clear()
            with nogil:
                code = self.apply_outcomes(destination, upto, refusals, count, now, &self._buffer)
        finally:
            free(refusals)
        return self._outcome(code, b"")[1]

    def expire(self, timestamp_ns):
        cdef uint64_t now = timestamp_ns
        cdef int code
        self._clear()
        with nogil:
            code = self.expire_holds(now, &self._buffer)
        return self._outcome(code, b"")[1]

    def next_deadline(self):
        return self.next_deadline_ns()

    def replay_frame(self, records, first_sequence, timestamp_ns):
        cdef bytes body = records if type(records) is bytes else bytes(records)
        cdef uint64_t first = first_sequence, now = timestamp_ns
        cdef const uint8_t* start = start_of(body)
        cdef uint32_t count
        cdef int code
        if len(body) % EVENT_BYTES:
            raise ValueError(f"records: {len(body)} bytes are no multiple of {EVENT_BYTES}")
        count = <uint32_t> (len(body) // EVENT_BYTES)
        with nogil:
            code = self.replay(start, count, first, now)
        if code == ENGINE_REFUSED:
            raise EngineRefused(
                f"event {self.replay_error_sequence()} contradicts the state: {self.replay_error_reason().decode()}")
        self._check(code)

    def account(self, account_id):
        cdef AccountState a
        cdef bytes id_ = column("account_id", account_id, 1, 16)
        return account_view(&a) if self.find_account(start_of(id_), &a) else None

    def account_by_ordinal(self, ordinal):
        cdef AccountState a
        return account_view(&a) if self.account_at(ordinal, &a) else None

    def result(self, transfer_id):
        cdef bytes id_ = column("transfer_id", transfer_id, 1, 16)
        return self.find_result(start_of(id_))

    def state_digest(self):
        cdef uint8_t out[16]
        self.digest(out)
        return PyBytes_FromStringAndSize(<char*> out, 16)

    def verify_digest(self):
        cdef bint equal
        with nogil:
            equal = self.check_digest()
        return equal

    def status(self):
        cdef EngineCounters c
        self.counters(&c)
        return Counters(c.sequence, c.now_ns, c.floor_ms, c.account_count, c.hold_count, c.id_count, c.generation_count,
                        c.unsettled_count, c.refusal_count, c.repeated_count, c.memory_bytes, c.poisoned != 0)

    def currency_totals(self):
        cdef CurrencyTotal* out = <CurrencyTotal*> calloc(CURRENCY_COUNT_MAX, sizeof(CurrencyTotal))
        cdef uint32_t count, i
        if out == NULL:
            raise MemoryError
        try:
            with nogil:
                count = self.totals(out, CURRENCY_COUNT_MAX)
            return {
                currency_name(out[i].currency): CurrencyTotals(
                    out[i].accounts, out[i].balance, out[i].in_flight, out[i].held_out, out[i].held_in)
                for i in range(min(count, <uint32_t> CURRENCY_COUNT_MAX))
            }
        finally:
            free(out)

    def holds(self, debit_id):
        cdef bytes id_ = column("debit_id", debit_id, 1, 16)
        cdef HoldState out[64]
        cdef uint64_t slot = 0
        cdef uint32_t count, i
        cdef list found = []
        while True:
            count = self.read_holds(start_of(id_), &slot, 1 << 20, out, 64)
            for i in range(count):
                found.append(hold_view(&out[i]))
            if slot == 0:
                return sorted(found, key=by_sequence)

    def hold_at(self, sequence):
        cdef HoldState out
        return hold_view(&out) if self.hold_placed_at(sequence, &out) else None

    def set_id_window(self, uint64_t id_window_ms):
        """Of an image another window comes along. Any may follow on any: the floor never sinks, and below it nothing is let in."""
        if id_window_ms < 1:
            raise ValueError(f"id_window_ms: {id_window_ms} is not positive")
        state(self).id_window_ms = id_window_ms

    def prepare_memory(self):
        with nogil:
            self.prepare()

    def memory_wanted(self):
        return self.wants_memory()

    def room_wanted(self):
        return self.wants_room()

    def sent(self, destination_shard):
        cdef uint64_t settled, last
        self.send_span(destination_shard, &settled, &last)
        return settled, last

    def sends(self, destination_shard, from_number, limit):
        cdef PendingSend* out = <PendingSend*> calloc(limit + 1, sizeof(PendingSend))
        cdef uint32_t count, i
        if out == NULL:
            raise MemoryError
        try:
            count = self.read_sends(destination_shard, from_number, limit, out)
            return [
                SendView(out[i].number, out[i].sequence, <bytes> (<char*> out[i].id)[:16], <bytes> (<char*> out[i].credit_id)[:16],
                         out[i].amount, currency_name(out[i].currency), out[i].debit_ordinal, out[i].code)
                for i in range(count)
            ]
        finally:
            free(out)

    def cursor(self, source_shard):
        return self.credit_cursor(source_shard)

    def refusals(self, source_shard, from_number, limit):
        cdef Refusal* out = <Refusal*> calloc(limit + 1, sizeof(Refusal))
        cdef uint32_t count, i
        if out == NULL:
            raise MemoryError
        try:
            count = self.read_refusals(source_shard, from_number, limit, out)
            return [(out[i].number, out[i].result) for i in range(count)]
        finally:
            free(out)

    def forget(self, source_shard, upto_number):
        self.forget_refusals(source_shard, upto_number)

    def image_begin(self):
        self._check(self.begin_image())

    def image_piece(self):
        cdef bytes buffer = PyBytes_FromStringAndSize(NULL, IMAGE_PIECE_BYTES_MAX)
        cdef uint8_t* out = <uint8_t*> PyBytes_AS_STRING(buffer)
        cdef int64_t length
        with nogil:
            length = self.read_image(out)
        if length < 0:
            raise EngineRefused("no image is being taken, or it ran out of memory")
        return buffer[:length]

    def image_end(self):
        self.end_image()
        self.release_image()

    def load(self, piece):
        cdef bytes data = piece if type(piece) is bytes else bytes(piece)
        cdef const uint8_t* start = start_of(data)
        cdef uint64_t length = <uint64_t> len(data)
        cdef int code
        with nogil:
            code = self.load_piece(start, length)
        self._check(code)

    def loaded(self):
        cdef int code
        with nogil:
            code = self.load_done()
        self._check(code)


cdef object account_view(const AccountState* a):
    return AccountView(a.ordinal, <bytes> (<char*> a.id)[:16], currency_name(a.currency), a.balance, a.held_out, a.held_in,
                       a.overdraft_limit, a.balance_limit, a.flags)


cdef object hold_view(const HoldState* h):
    return HoldView(h.sequence, <bytes> (<char*> h.id)[:16], <bytes> (<char*> h.debit_id)[:16],
                    <bytes> (<char*> h.credit_id)[:16], h.amount, h.deadline_ms, h.code, h.flags)


def by_sequence(view):
    return view.sequence
