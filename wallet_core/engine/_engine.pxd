# cython: language_level=3
"""The C API of the wallet engine: one deterministic state machine with one writer, no I/O, no clock.

Every method below may be called without the GIL. One thread at a time may call them, with one exception: after
`begin_image` another thread may call `read_image` while the writer goes on (see image.pyx).

Return codes of the apply family: 0 done · ENGINE_POISONED (-1) out of memory or an earlier failure, the state is no
longer to be trusted and everything is refused from now on · ENGINE_REFUSED (-2) the call as a whole contradicts the
state (gap in saga numbers, replayed record that cannot follow); for everything but replay nothing has been changed.

All events of one frame must come from calls with one and the same timestamp. The engine never lets its time run
backwards: it takes the greater of its own and the given time; `now_ns` tells which, and that belongs in the frame.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    EVENT_BYTES = 48            # one event record, see docs/event-records.md
    SHARD_COUNT_MAX = 256       # a shard number fits one byte of an event record
    SHARD_LOCAL = 0xFFFF        # credit_shards: the credit account lives here
    ENGINE_POISONED = -1
    ENGINE_REFUSED = -2
    IMAGE_PIECE_BYTES_MAX = 1048576 + 64   # read_image's buffer must hold this many bytes


cdef struct TransferColumns:
    uint32_t count
    const uint8_t* ids              # 16 bytes each
    const uint8_t* debit_ids        # 16 bytes each
    const uint8_t* credit_ids       # 16 bytes each
    const uint8_t* amounts          # int64 LE, may be unaligned
    const uint8_t* flags            # u16 LE, NULL = all 0
    const uint8_t* pending_ids      # 16 bytes each, NULL = all zero
    const uint8_t* timeouts_s       # u32 LE, NULL = all 0
    const uint8_t* codes            # u16 LE, NULL = all 0
    const uint8_t* credit_shards    # u16 LE, NULL = all SHARD_LOCAL
    const uint32_t* rows            # gather index into the columns above and into results, NULL = 0..count-1
    uint32_t chain_steps            # 1: from the coordinator of chains across shards, rows may have the flag CHAIN


cdef struct AccountColumns:
    uint32_t count
    const uint8_t* ids              # 16 bytes each
    const uint8_t* currencies       # 4 bytes each: three capital ASCII letters and NUL; ignored by updates, may then be NULL
    const uint8_t* flags            # u16 LE, NULL = all 0
    const uint8_t* overdraft_limits # int64 LE, NULL = all 0
    const uint8_t* balance_limits   # int64 LE, NULL = all 0 (no limit)
    const uint32_t* rows            # as above


cdef struct CreditColumns:          # saga step 2, numbers are first_number + index
    uint32_t count
    const uint8_t* ids              # transfer ids, 16 bytes each
    const uint8_t* credit_ids       # 16 bytes each
    const uint8_t* amounts          # int64 LE
    const uint8_t* currencies       # 4 bytes each
    const uint8_t* codes            # u16 LE, NULL = all 0


cdef struct Refusal:                # one credit that the credit shard refused
    uint64_t number                 # saga number
    uint8_t result                  # TransferResult
    uint8_t reserved[7]


cdef struct PendingSend:            # one debit whose saga is not settled, for the relay
    uint64_t number                 # saga number, per destination, from 1, without gaps
    uint64_t sequence               # of its MoneySent record: relay it only once that is durable
    uint8_t id[16]
    uint8_t credit_id[16]
    int64_t amount
    uint32_t currency               # the 4 bytes as they are
    uint32_t debit_ordinal
    uint16_t code
    uint8_t reserved[6]


cdef struct EventBuffer:            # owned by the caller (zero it first, free(data) last); the engine appends
    uint8_t* data
    size_t length                   # bytes used
    size_t capacity
    uint32_t count                  # records


cdef struct AccountState:
    uint8_t id[16]
    int64_t balance
    int64_t held_out
    int64_t held_in
    int64_t overdraft_limit
    int64_t balance_limit
    uint32_t currency
    uint32_t ordinal
    uint16_t flags


cdef struct HoldState:              # one active hold
    uint8_t id[16]
    uint8_t debit_id[16]
    uint8_t credit_id[16]
    uint64_t sequence               # of its HoldPlaced record
    int64_t amount
    uint64_t deadline_ms            # 0 = none
    uint16_t code
    uint16_t flags                  # CHAIN or 0


cdef struct CurrencyTotal:
    uint32_t currency
    uint32_t accounts
    int64_t balance                 # sum over all accounts but in-flight ones (wraps modulo 2^64 like all sums here)
    int64_t in_flight               # balance of the in-flight account
    int64_t held_out
    int64_t held_in


cdef struct EngineCounters:
    uint64_t sequence               # of the last event, 0 = none yet
    uint64_t now_ns
    uint64_t floor_ms               # transfer ids of this time or earlier are ID_TOO_OLD
    uint64_t account_count
    uint64_t hold_count             # active holds
    uint64_t id_count               # remembered transfer ids
    uint64_t generation_count
    uint64_t unsettled_count        # sends whose saga is not settled
    uint64_t refusal_count          # refused credits kept for their sources
    uint64_t repeated_count         # rows answered from the id table (not part of the state, starts at 0)
    uint64_t memory_bytes           # committed
    uint32_t poisoned


cdef class Engine:
    cdef void* _state               # EngineState*, see state.pyx
    cdef EventBuffer _buffer        # of the Python face

    # commands; results: one byte a row of the columns, written at results[row]
    cdef int apply_transfers(self, const TransferColumns* columns, uint64_t timestamp_ns,
                             uint8_t* results, EventBuffer* events) noexcept nogil
    cdef int apply_accounts(self, const AccountColumns* columns, bint update, uint64_t timestamp_ns,
                            uint8_t* results, EventBuffer* events) noexcept nogil
    # numbers at or below the source's cursor are answered again without effect; a gap is ENGINE_REFUSED
    cdef int apply_credits(self, uint16_t source_shard, uint64_t first_number, const CreditColumns* columns,
                           uint64_t timestamp_ns, uint8_t* results, EventBuffer* events) noexcept nogil
    # everything to destination up to upto_number is done, except refused (ascending), which is returned to its debit account
    cdef int apply_outcomes(self, uint16_t destination_shard, uint64_t upto_number,
                            const Refusal* refused, uint32_t refused_count,
                            uint64_t timestamp_ns, EventBuffer* events) noexcept nogil
    cdef int expire_holds(self, uint64_t timestamp_ns, EventBuffer* events) noexcept nogil
    cdef uint64_t next_deadline_ns(self) noexcept nogil      # 0 = no hold has one

    # replay of one frame body; every record is checked against the state before it is applied
    cdef int replay(self, const uint8_t* records, uint32_t count, uint64_t first_sequence,
                    uint64_t timestamp_ns) noexcept nogil
    cdef uint64_t replay_error_sequence(self) noexcept nogil  # of the record that contradicted, 0 = none
    cdef const char* replay_error_reason(self) noexcept nogil

    # what would be answered to rows that were applied or refused before; `otherwise` to all others. Returns how many are known
    cdef uint32_t answer_known(self, const TransferColumns* columns, uint8_t* results, uint8_t otherwise) noexcept nogil

    # reads
    cdef bint find_account(self, const uint8_t* account_id, AccountState* account) noexcept nogil
    cdef void prefetch_account(self, const uint8_t* account_id, bint record) noexcept nogil   # first without, then with `record`
    cdef bint account_at(self, uint32_t ordinal, AccountState* account) noexcept nogil
    cdef uint8_t find_result(self, const uint8_t* transfer_id) noexcept nogil    # TransferResult, 0 = not remembered
    cdef bint has_hold(self, const uint8_t* transfer_id) noexcept nogil          # still held, however old its id is
    cdef void digest(self, uint8_t* out) noexcept nogil       # 16 bytes
    cdef uint64_t sequence(self) noexcept nogil               # of the last event, 0 = none yet
    cdef void counters(self, EngineCounters* out) noexcept nogil
    # full scan; returns how many currencies there are (may exceed capacity: ask again with more)
    cdef uint32_t totals(self, CurrencyTotal* out, uint32_t capacity) noexcept nogil
    # active holds on a debit account, looked for in `slots` places from from_slot[0] on, which moves on (to 0 at the end);
    # stops before a place that finds no room in out
    cdef uint32_t read_holds(self, const uint8_t* debit_id, uint64_t* from_slot, uint64_t slots, HoldState* out,
                             uint32_t capacity) noexcept nogil
    cdef bint hold_placed_at(self, uint64_t sequence, HoldState* out) noexcept nogil    # is that hold still active?
    # recomputes the linear half of the digest from the accounts and compares
    cdef bint check_digest(self) noexcept nogil

    # Touching new memory costs several times what a transfer does. `prepare` does it for the ids (and accounts) to
    # come: call it once before serving, and then, whenever wants_memory says so, in one thread beside the writer's
    # (never in the one that answers). Without it everything works, with a pause of milliseconds now and then.
    cdef bint wants_memory(self) noexcept nogil
    cdef bint wants_room(self) noexcept nogil       # not yet all that room_ids asks for; no hurry
    cdef int prepare(self) noexcept nogil

    # for the relay
    cdef void send_span(self, uint16_t destination_shard, uint64_t* settled_number, uint64_t* last_number) noexcept nogil
    cdef uint32_t read_sends(self, uint16_t destination_shard, uint64_t from_number, uint32_t limit,
                             PendingSend* out) noexcept nogil
    cdef uint64_t credit_cursor(self, uint16_t source_shard) noexcept nogil      # last number applied or refused
    cdef uint32_t read_refusals(self, uint16_t source_shard, uint64_t from_number, uint32_t limit,
                                Refusal* out) noexcept nogil
    # the source has settled up to this number: its refusals up to there need not be kept (memory only, no event)
    cdef void forget_refusals(self, uint16_t source_shard, uint64_t upto_number) noexcept nogil

    # new sends to that shard are TOO_MANY_PENDING (not part of the state, and never logged); known ids are answered as ever
    cdef void refuse_sends(self, uint16_t destination_shard, bint refused) noexcept nogil

    # a consistent image without stopping the writer; a sequence of self-describing pieces (image.pyx)
    cdef bint prepare_image(self) noexcept nogil              # reader's thread, as long as it says so: memory for the writer
    cdef int begin_image(self) noexcept nogil                 # writer's thread, microseconds; ENGINE_REFUSED = one is open
    cdef int64_t read_image(self, uint8_t* buffer) noexcept nogil   # any one thread; bytes of the next piece, 0 = done, <0 failed
    cdef void end_image(self) noexcept nogil                  # writer's thread; also gives up an unfinished image
    cdef void release_image(self) noexcept nogil              # any thread, after end_image: gives its memory back
    # into a fresh engine: 0 ok, ENGINE_REFUSED = malformed piece; parameters come from the image
    cdef int load_piece(self, const uint8_t* piece, uint64_t length) noexcept nogil
    cdef int load_done(self) noexcept nogil                   # rebuilds the indexes, checks the digest

    # the Python face's own
    cdef tuple _outcome(self, int code, bytes results)
    cdef int _check(self, int code) except -1
    cdef void _clear(self) noexcept nogil
    cdef tuple _accounts(self, object ids, object currencies, object timestamp_ns, object flags, object overdraft_limits,
                         object balance_limits, bint update)
