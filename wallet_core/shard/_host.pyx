# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The native pipeline of a process's shards: threads that apply and commit, group commit, sagas between shards.

One loop thread submits and takes completions; each shard has two threads. While one of them writes and syncs
a group of frames, the other applies the next one; a single transfer is applied and committed by the same thread. A result is completed only after the frame that it
depends on is durable; so is everything a read saw. No Python object is touched per transfer: messages are parsed in
place, split by gather indexes, and their results written into one array.

Sagas ride on the group commit: the sends of a group leave for their destination once the group is durable, the outcomes
come back once the destination's group is, and rows that wait for them (SETTLED) complete when the debit shard has made
the outcome durable. After a restart every shard delivers what is unsettled again; cursors make that harmless.
Deliveries to shards of other processes go through `outbound` and `deliver`, the seam for a relay.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, UINT64_MAX
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from wallet_core.engine._engine cimport (
    ENGINE_REFUSED,
    EVENT_BYTES,
    IMAGE_PIECE_BYTES_MAX,
    SHARD_COUNT_MAX,
    SHARD_LOCAL,
    AccountColumns,
    CreditColumns,
    CurrencyTotal,
    Engine,
    EngineCounters,
    EventBuffer,
    HoldState,
    PendingSend,
    Refusal,
    TransferColumns,
)
from wallet_core.engine._engine cimport AccountState
from wallet_core.event_log._file cimport FileLog, FrameInfo, FrameReader, FrameView

import os
import threading
from dataclasses import replace

from wallet_core.event_log.port import DiskNearlyFull
from wallet_core.shard import port

cdef enum:
    TRANSFER_OK = 1
    WRONG_SHARD = 29
    CROSS_SHARD_UNSUPPORTED = 30
    IN_FLIGHT = 31
    IN_FLIGHT_WAITING = 254          # only while a batch is under way
    SET_ASIDE = 253                  # a row of a chain across shards: only while a batch is being routed
    CHAIN_OPEN = 28
    TOO_MANY_PENDING = 32
    ACCOUNT_WRONG_SHARD = 9
    FLAG_LINKED = 1
    FLAG_CHAIN = 64
    FLAG_POST_OR_VOID = 12
    ACCOUNT_STRIPED = 8
    ROOM_LOOK_NS = 500000000         # how often the memory thread looks whether a shard is at rest
    LOCATE_NONE = 0xFFFF
    LOCATE_WANTED = 0xFFFE
    CREDIT_ROW_BYTES = 46            # amount 8, id 16, credit id 16, currency 4, code 2

include "_core.pxi"
include "_parse.pxi"
include "_chains.pxi"
include "_shard.pxi"
include "_striped.pxi"
include "_accounts.pxi"
include "_replay.pxi"

_PARSE_REASONS = {
    PARSE_CUT: "the message ends inside a field",
    PARSE_TAG: "the message has an invalid field number",
    PARSE_WIRE_TYPE: "a field has another type than in the contract",
    PARSE_MEMORY: "out of memory",
}


cdef inline void place_row(uint32_t* row_index, ReadEntry* found, uint32_t at, uint32_t row) noexcept nogil:
    """A row of accounts is the `at`-th of all parts. Read ones have an entry each."""
    if found == NULL:
        row_index[at] = row
    else:
        found[at].id_index = row
        row_index[at] = at


cdef class ShardHost:
    """The shards of one process, opened and recovered (`wallet_core.shard.recovery.open_host`). `submit_*`, `completions`
    and `close` belong to one thread, the loop's; `call_*` may be used by any thread but that one blocks."""

    cdef HostCore core
    cdef dict _shards
    cdef list _order
    cdef StripedSet _striped
    cdef ShardClock _clock
    cdef bint _started, _closed
    cdef object _memory_thread
    cdef int _images                 # being taken
    cdef volatile int _images_stopped
    cdef CallRow* _call_rows         # of the calls that are being gathered
    cdef uint32_t _call_row_count, _call_row_capacity
    cdef list _call_counts           # rows of each of them
    cdef list _callers               # who waits for each of them
    cdef list _chains                # set aside: (request, first row, rows, routes)
    cdef readonly bint coordinated   # chains across shards are set aside for `chains`, not refused
    cdef public size_t blob_bytes_max    # of one answer to submit_chain_holds and submit_cut; beyond that it is given up
    cdef Request* _parked            # located and not routed yet, oldest first
    cdef Request* _parked_tail
    cdef uint32_t _opening           # requests under way that open striped accounts
    cdef readonly uint32_t shard_count
    cdef readonly int64_t rows_in_flight_max
    cdef readonly int64_t bytes_in_flight_max
    cdef readonly object config

    def __cinit__(self):
        memset(&self.core, 0, sizeof(HostCore))
        self.core.event_fd = -1
        pthread_mutex_init(&self.core.mutex, NULL)
        pthread_cond_init(&self.core.finished, NULL)
        ducat_cond_init(&self.core.memory_wanted)

    def __init__(self, shards, *, uint32_t shard_count, shard_map, ShardClock clock=None, config=None,
                 int64_t rows_in_flight_max=64 * ROWS_MAX, int64_t bytes_in_flight_max=64 * 1024 * 1024):
        """`shards`: (shard, engine, log) triples, recovered and at the same sequence number."""
        cdef Shard made
        cdef Engine engine
        cdef FileLog log
        cdef int slot
        if not 1 <= shard_count < SHARDS_MAX:
            raise ValueError(f"shard_count must be 1..{SHARDS_MAX - 1}, not {shard_count}")
        if len(shard_map) != SLOT_COUNT:
            raise ValueError(f"a shard map has {SLOT_COUNT} entries, not {len(shard_map)}")
        for slot in range(SLOT_COUNT):
            if not 0 <= shard_map[slot] < shard_count:
                raise ValueError(f"slot {slot} is mapped to shard {shard_map[slot]} of {shard_count}")
            self.core.shard_of_slot[slot] = shard_map[slot]
        self.core.shard_count = self.shard_count = shard_count
        self.core.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.core.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.rows_in_flight_max, self.bytes_in_flight_max = rows_in_flight_max, bytes_in_flight_max
        self.config, self.blob_bytes_max = config, 1 << 30
        self._clock = clock if clock is not None else ShardClock()
        self._striped = StripedSet()
        self._call_counts, self._callers = [], []
        self._shards, self._order, self._chains = {}, [], []
        for shard, engine, log in shards:
            if shard in self._shards or not 0 <= shard < shard_count:
                raise ValueError(f"shard {shard} is given twice or is not one of {shard_count}")
            if engine.sequence() + 1 != log._next_sequence:
                raise ValueError(f"shard {shard}: the engine is at {engine.sequence()}, the log at {log._next_sequence - 1}")
            made = Shard()
            made.engine, made.log, made.clock, made.shard = engine, log, self._clock, shard
            made.host = &self.core
            made.core.shard, made.core.present = shard, 1
            with nogil:
                engine.prepare()       # before anybody waits for an answer
                while engine.wants_room() and engine.prepare() >= 0:
                    pass
            engine.counters(&made.core.counters)
            engine.digest(made.core.digest)
            made.now_ns = <int64_t>made.core.counters.now_ns
            made.snapshot_sequence = 0
            self._shards[shard] = made
            self._order.append(made)
        engines = {made.shard: made.engine for made in self._order}
        for made in self._order:
            self.core.shards[made.shard] = &made.core
            self._striped.collect(made.engine, &self.core, engines)

    def __dealloc__(self):
        cdef Request* request
        cdef Work* work
        while self.core.done_head != NULL:
            request = self.core.done_head
            self.core.done_head = request.next
            if request.message != NULL:
                Py_DECREF(<object>request.message)
            request_free(request)
        while self._parked != NULL:
            request = self._parked
            self._parked = request.next
            self._drop(request)
        while self.core.outbound_head != NULL:
            work = self.core.outbound_head
            self.core.outbound_head = work.next
            work_free(work)
        free(self._call_rows)
        if self.core.event_fd >= 0:
            c_close(self.core.event_fd)
        pthread_mutex_destroy(&self.core.mutex)
        pthread_cond_destroy(&self.core.finished)
        pthread_cond_destroy(&self.core.memory_wanted)

    # ---- life ----

    def start(self):
        """Start the threads and deliver what was unsettled."""
        cdef Shard shard
        cdef Work* work
        cdef uint32_t destination
        if self._started:
            return
        self._started = True
        self._compare_links()
        self._memory_thread = threading.Thread(target=self._memory_loop, name="memory", daemon=True)
        self._memory_thread.start()
        for shard in self._order:
            shard.threads = [threading.Thread(target=shard.work_loop, name=f"shard-{shard.shard}", daemon=True) for _ in range(2)]
            for thread in shard.threads:
                thread.start()
        if self.shard_count > 1:
            for shard in self._order:
                for destination in range(self.shard_count):
                    if destination != shard.shard:
                        self.resend(shard.shard, destination)

    cdef int _compare_links(self) except -1:
        """Which of the shards here are older than others of them? Before anything moves."""
        cdef Shard shard, peer
        cdef uint64_t settled, last, peer_settled
        for shard in self._order:
            for peer in self._order:
                if shard.shard != peer.shard:
                    peer.engine.send_span(shard.shard, &peer_settled, &last)
                    shard.engine.send_span(peer.shard, &settled, &last)
                    shard.compare(peer.shard, peer.engine.credit_cursor(shard.shard), peer_settled, last)
        return 0

    def close(self):
        """Drain what was submitted, sync, join the threads, close the logs. Sagas that are still under way go on after the
        next start. Requests that did not finish (only after a failure) are never completed."""
        cdef Shard shard
        if self._closed:
            return
        if self._images:
            raise RuntimeError("an image is being taken: stop_images first, and wait for its thread")
        self._closed = True
        self.core.closing = 1
        for shard in self._order:
            with nogil:
                pthread_mutex_lock(&shard.core.mutex)
                shard.core.closing = 1
                pthread_cond_broadcast(&shard.core.work_ready)
                pthread_mutex_unlock(&shard.core.mutex)
        if self._started:
            for shard in self._order:
                for thread in shard.threads:
                    thread.join()
            with nogil:
                pthread_mutex_lock(&self.core.mutex)
                pthread_cond_broadcast(&self.core.memory_wanted)
                pthread_mutex_unlock(&self.core.mutex)
            self._memory_thread.join()
        for shard in self._order:
            shard.log.close()

    def _memory_loop(self):
        """One thread beside the writers: touches memory that engines ask for (Engine.prepare), at once what they will need
        next, and while a shard has nothing to do the rest of the room that it was given.
        """
        cdef Shard shard, found
        cdef list order = self._order
        while True:
            found = None
            pthread_mutex_lock(&self.core.mutex)
            for shard in order:
                if shard.core.wants_memory:
                    found = shard
                    break
            pthread_mutex_unlock(&self.core.mutex)
            if found is not None:
                with nogil:
                    found.engine.prepare()
                pthread_mutex_lock(&self.core.mutex)
                found.core.wants_memory = 0
                pthread_mutex_unlock(&self.core.mutex)
                continue
            for shard in order:
                if shard.engine.wants_room() and (found is None or shard.core.idle == 2):
                    found = shard
            with nogil:
                pthread_mutex_lock(&self.core.mutex)
                if not self.core.closing and not self._any_wants_memory():
                    if found is None:
                        pthread_cond_wait(&self.core.memory_wanted, &self.core.mutex)
                    else:
                        ducat_cond_wait_ns(&self.core.memory_wanted, &self.core.mutex, ROOM_LOOK_NS)
                pthread_mutex_unlock(&self.core.mutex)
            if self.core.closing:
                return
            if found is not None and found.core.idle == 2 and not found.core.wants_memory:
                with nogil:
                    found.engine.prepare()

    cdef bint _any_wants_memory(self) noexcept nogil:
        cdef uint32_t shard
        for shard in range(self.core.shard_count):
            if self.core.shards[shard] != NULL and self.core.shards[shard].wants_memory:
                return True
        return False

    def fileno(self):
        """An eventfd, readable when there are completions, outbound deliveries, or a failure."""
        return self.core.event_fd

    @property
    def failed(self):
        """True once a shard is poisoned: nothing further will complete, the process must stop."""
        return bool(ducat_load_int(&self.core.failed))

    def failure(self):
        """The error that stopped the host: LogPoisoned or ShardFailed; None while all is well."""
        cdef Shard shard
        if not ducat_load_int(&self.core.failed):
            return None
        for shard in self._order:
            if shard.log._poisoned:
                return shard.log.error()
        for shard in self._order:
            if shard.core.stopped:
                return port.ShardFailed(shard.shard, "out of memory, or the engine refused what cannot be refused")
        return port.HostClosed("a shard stopped")

    @property
    def clock(self):
        """The clock of the shards' threads."""
        return self._clock

    @property
    def shard_ids(self):
        """The shards of this process."""
        return tuple(self._shards)

    def log(self, int shard):
        """One shard's event log (tests, status)."""
        return (<Shard>self._shards[shard]).log

    def tick(self):
        """Let every shard look at the clock (holds expire); only needed with a clock that stands still."""
        cdef Shard shard
        for shard in self._order:
            pthread_mutex_lock(&shard.core.mutex)
            shard.core.tick = 1
            pthread_cond_signal(&shard.core.work_ready)
            pthread_mutex_unlock(&shard.core.mutex)

    # ---- requests ----

    cdef Request* _new(self, uint64_t ticket, int shape, uint32_t count, uint64_t bytes_held, object message,
                       size_t results, bint always=False) except NULL:
        cdef Request* request
        if not self._started or self._closed:
            raise port.HostClosed("the shard host is not running")
        if ducat_load_int(&self.core.failed):
            raise port.HostClosed(f"the shard host stopped: {self.failure()}")
        if not always and self.core.rows_held and (self.core.rows_held + count > self.rows_in_flight_max
                                    or self.core.bytes_held + <int64_t>bytes_held > self.bytes_in_flight_max):
            raise port.HostBusy(
                f"{self.core.rows_held} rows and {self.core.bytes_held} bytes are under way, the limits are "
                f"{self.rows_in_flight_max} and {self.bytes_in_flight_max}; take completions first")
        request = <Request*>calloc(1, sizeof(Request))
        if request == NULL:
            raise MemoryError()
        request.positions = <uint64_t*>calloc(self.shard_count, 8)
        request.results = <uint8_t*>calloc(results + 8, 1)
        if request.positions == NULL or request.results == NULL:
            request_free(request)
            raise MemoryError()
        request.ticket, request.shape, request.count, request.bytes_held = ticket, shape, count, bytes_held
        if message is not None:
            Py_INCREF(message)
            request.message = <void*><PyObject*>message
        return request

    cdef void _admit(self, Request* request) noexcept:
        """Count a request against the limits."""
        self.core.rows_held += request.count
        self.core.bytes_held += request.bytes_held

    cdef void _drop(self, Request* request) noexcept:
        """Give up a request that was never submitted."""
        if request.message != NULL:
            Py_DECREF(<object>request.message)
        request_free(request)

    def submit_message(self, uint64_t ticket, message not None, *, bint wrapped=False):
        """A serialized TransferBatch, bytes or memoryview (wrapped: a SubmitTransfersRequest around it). The completion's result is a serialized
        TransferBatchResult (SubmitTransfersResponse). Raises BatchInvalid, HostBusy, HostClosed; nothing is applied then."""
        cdef Batch batch
        cdef Request* request
        cdef uint32_t count
        cdef int code = 0
        cdef const uint8_t[::1] view = message      # the object itself is kept until the request is done
        cdef uint64_t length = <uint64_t>view.shape[0], held = length
        cdef const uint8_t* data = &view[0] if length else NULL
        if wrapped:
            code = parse_unwrap(&data, &length)
        if code == 0:
            code = parse_batch(data, length, &batch)
        else:
            memset(&batch, 0, sizeof(batch))
        try:
            if code:
                raise port.BatchInvalid("message", _PARSE_REASONS[code])
            count = self._check_batch(&batch)
            request = self._new(ticket, SHAPE_WRAPPED if wrapped else SHAPE_MESSAGE, count, held, message, count)
        except BaseException:
            free(batch.amounts_own)
            free(batch.timeouts_own)
            raise
        request.batch_id = batch.batch_id
        request.settled = 1 if batch.settle != 1 else 0
        self._take_columns(request, &batch)
        self._submit_transfers(request)

    cdef uint32_t _check_batch(self, Batch* batch) except 0:
        cdef uint64_t count = batch.ids_length // 16
        if batch.ids_length % 16:
            raise port.BatchInvalid("ids", f"{batch.ids_length} bytes is not a multiple of 16")
        if count == 0:
            raise port.BatchInvalid("ids", "the batch has no rows")
        if count > ROWS_MAX:
            raise port.BatchInvalid("ids", f"{count} rows, at most {ROWS_MAX} are allowed")
        self._check_column("debit_account_ids", batch.debit_length, count, 16, False)
        self._check_column("credit_account_ids", batch.credit_length, count, 16, False)
        self._check_column("amounts_minor", batch.amounts_length, count, 8, False)
        self._check_column("flags", batch.flags_length, count, 2, True)
        self._check_column("pending_ids", batch.pending_length, count, 16, True)
        self._check_column("timeouts_s", batch.timeouts_length, count, 4, True)
        self._check_column("codes", batch.codes_length, count, 2, True)
        if batch.settle > 2:
            raise port.BatchInvalid("settle", f"{batch.settle} is no SettleMode")
        return <uint32_t>count

    cdef int _check_column(self, str name, uint64_t length, uint64_t count, uint64_t width, bint optional) except -1:
        if optional and length == 0:
            return 0
        if length % width:
            raise port.BatchInvalid(name, f"{length} bytes is not a multiple of {width}")
        if length != count * width:
            raise port.BatchInvalid(name, f"{length // width} rows, but ids has {count}")
        return 0

    cdef void _take_columns(self, Request* request, Batch* batch) noexcept:
        request.columns.count = request.count
        request.columns.ids, request.columns.debit_ids, request.columns.credit_ids = batch.ids, batch.debit_ids, batch.credit_ids
        request.columns.amounts = batch.amounts
        request.columns.flags = batch.flags if batch.flags_length else NULL
        request.columns.pending_ids = batch.pending_ids if batch.pending_length else NULL
        request.columns.timeouts_s = batch.timeouts if batch.timeouts_length else NULL
        request.columns.codes = batch.codes if batch.codes_length else NULL
        request.spare = batch.amounts_own
        request.extra = batch.timeouts_own

    def submit_columns(self, uint64_t ticket, bytes ids not None, bytes debit_ids not None, bytes credit_ids not None,
                       bytes amounts not None, *, bytes flags=b"", bytes pending_ids=b"", bytes timeouts_s=b"",
                       bytes codes=b"", bint settled=True):
        """Packed columns (as in TransferBatch, amounts int64 LE). The completion's result is a RowsResult."""
        cdef Batch batch
        cdef Request* request
        cdef uint32_t count
        cdef tuple kept = (ids, debit_ids, credit_ids, amounts, flags, pending_ids, timeouts_s, codes)
        memset(&batch, 0, sizeof(batch))
        batch.ids, batch.ids_length = <const uint8_t*>PyBytes_AS_STRING(ids), len(ids)
        batch.debit_ids, batch.debit_length = <const uint8_t*>PyBytes_AS_STRING(debit_ids), len(debit_ids)
        batch.credit_ids, batch.credit_length = <const uint8_t*>PyBytes_AS_STRING(credit_ids), len(credit_ids)
        batch.amounts, batch.amounts_length = <const uint8_t*>PyBytes_AS_STRING(amounts), len(amounts)
        batch.flags, batch.flags_length = <const uint8_t*>PyBytes_AS_STRING(flags), len(flags)
        batch.pending_ids, batch.pending_length = <const uint8_t*>PyBytes_AS_STRING(pending_ids), len(pending_ids)
        batch.timeouts, batch.timeouts_length = <const uint8_t*>PyBytes_AS_STRING(timeouts_s), len(timeouts_s)
        batch.codes, batch.codes_length = <const uint8_t*>PyBytes_AS_STRING(codes), len(codes)
        count = self._check_batch(&batch)
        request = self._new(ticket, SHAPE_ROWS, count, 64 * <uint64_t>count, kept, count)
        request.settled = settled
        self._take_columns(request, &batch)
        self._submit_transfers(request)

    def submit_rows(self, uint64_t ticket, rows, *, bint settled=True, bint chain_steps=False):
        """Transfers as tuples in the order of TransferRow (id, debit, credit, amount[, flags, pending id, timeout, code]).
        The completion's result is a RowsResult. Raises BatchInvalid naming the row. chain_steps: from the coordinator of chains, so
        that rows may have the flag CHAIN, their own chains must be of one shard, and the limits of what is under way do not count."""
        cdef Request* request
        cdef uint32_t count = len(rows), i = 0
        cdef uint8_t* data
        cdef int64_t amount
        cdef uint16_t flags, code
        cdef uint32_t timeout_s
        cdef Py_ssize_t width
        cdef size_t n = count
        if count == 0:
            raise port.BatchInvalid("rows", "the batch has no rows")
        if count > ROWS_MAX:
            raise port.BatchInvalid("rows", f"{count} rows, at most {ROWS_MAX} are allowed")
        request = self._new(ticket, SHAPE_ROWS, count, 128 * <uint64_t>count, None, count, chain_steps)
        try:
            data = <uint8_t*>malloc(80 * n)
            if data == NULL:
                raise MemoryError()
            request.spare = data
            for row in rows:
                width = len(row)
                if width < 4 or width > 8:
                    raise port.BatchInvalid(f"rows[{i}]", f"{width} fields, 4 to 8 are expected")
                self._put_id(data + 8 * n + 16 * <size_t>i, row[0], i, "id")
                self._put_id(data + 24 * n + 16 * <size_t>i, row[1], i, "debit_account_id")
                self._put_id(data + 40 * n + 16 * <size_t>i, row[2], i, "credit_account_id")
                flags = code = 0
                timeout_s = 0
                try:
                    amount = row[3]
                    if width > 4:
                        flags = row[4]
                    if width > 6:
                        timeout_s = row[6]
                    if width > 7:
                        code = row[7]
                except (OverflowError, TypeError) as error:
                    raise port.BatchInvalid(f"rows[{i}]", f"a number does not fit its column: {error}") from None
                memcpy(data + 8 * <size_t>i, &amount, 8)
                if width > 5:
                    self._put_id(data + 56 * n + 16 * <size_t>i, row[5], i, "pending_id")
                else:
                    memset(data + 56 * n + 16 * <size_t>i, 0, 16)
                memcpy(data + 72 * n + 4 * <size_t>i, &timeout_s, 4)
                memcpy(data + 76 * n + 2 * <size_t>i, &flags, 2)
                memcpy(data + 78 * n + 2 * <size_t>i, &code, 2)
                i += 1
        except BaseException:
            self._drop(request)
            raise
        request.settled, request.columns.chain_steps = settled, chain_steps
        self._point_columns(request, data)
        self._submit_transfers(request)

    def gather_call(self, bytes message not None, caller):
        """Take the rows of a serialized CreateTransfersRequest to those that `submit_calls` will submit; the number of its rows.
        0: nothing was taken, since a row is linked or malformed, or there are more than 256, or it does not wait for sagas."""
        cdef uint32_t count, capacity
        cdef CallRow* larger
        if self._call_row_count + CALL_ROWS_MAX > ROWS_MAX:
            return 0
        if self._call_row_count + CALL_ROWS_MAX > self._call_row_capacity:
            capacity = 2 * self._call_row_capacity + CALL_ROWS_MAX
            larger = <CallRow*>realloc(self._call_rows, capacity * sizeof(CallRow))
            if larger == NULL:
                raise MemoryError()
            self._call_rows, self._call_row_capacity = larger, capacity
        count = parse_call(<const uint8_t*>PyBytes_AS_STRING(message), <uint64_t>len(message),
                           self._call_rows + self._call_row_count, CALL_ROWS_MAX)
        if count:
            self._call_row_count += count
            self._call_counts.append(count)
            self._callers.append(caller)
        return count

    @property
    def gathered_rows(self):
        """Rows of calls that are gathered and not submitted yet."""
        return self._call_row_count

    def drop_calls(self):
        """Forget what was gathered; returns the callers."""
        cdef list callers = self._callers
        self._call_counts, self._callers, self._call_row_count = [], [], 0
        return callers

    def submit_calls(self, uint64_t ticket):
        """Submit what was gathered as one request; returns the callers. The completion's result is a list of serialized
        CreateTransfersResponses in their order. Raises HostBusy, HostClosed: everything stays gathered then."""
        cdef Request* request
        cdef uint32_t count = self._call_row_count, i
        cdef size_t n = count
        cdef uint8_t* data
        cdef CallRow* row
        cdef uint32_t* counts
        request = self._new(ticket, SHAPE_CALLS, count, 128 * <uint64_t>count, None, count)
        data = request.spare = <uint8_t*>malloc(80 * n + 8)
        counts = <uint32_t*>malloc(4 * <size_t>len(self._call_counts) + 4)
        request.extra = counts
        if data == NULL or counts == NULL:
            self._drop(request)
            raise MemoryError()
        for i in range(count):
            row = &self._call_rows[i]
            memcpy(data + 8 * <size_t>i, &row.amount, 8)
            memcpy(data + 8 * n + 16 * <size_t>i, row.id, 16)
            memcpy(data + 24 * n + 16 * <size_t>i, row.debit_id, 16)
            memcpy(data + 40 * n + 16 * <size_t>i, row.credit_id, 16)
            memcpy(data + 56 * n + 16 * <size_t>i, row.pending_id, 16)
            memcpy(data + 72 * n + 4 * <size_t>i, &row.timeout_s, 4)
            memcpy(data + 76 * n + 2 * <size_t>i, &row.flags, 2)
            memcpy(data + 78 * n + 2 * <size_t>i, &row.code, 2)
        for i in range(<uint32_t>len(self._call_counts)):
            counts[i] = self._call_counts[i]
        request.entry_count = <uint32_t>len(self._call_counts)
        request.settled = 1
        self._point_columns(request, data)
        self._submit_transfers(request)
        return self.drop_calls()

    cdef void _point_columns(self, Request* request, uint8_t* data) noexcept:
        """The columns of rows that were gathered: amounts, ids, debits, credits, holds, timeouts, flags, codes."""
        cdef size_t n = request.count
        request.columns.count = request.count
        request.columns.amounts, request.columns.ids = data, data + 8 * n
        request.columns.debit_ids, request.columns.credit_ids = data + 24 * n, data + 40 * n
        request.columns.pending_ids, request.columns.timeouts_s = data + 56 * n, data + 72 * n
        request.columns.flags, request.columns.codes = data + 76 * n, data + 78 * n

    cdef int _put_id(self, uint8_t* out, object value, uint32_t row, str name) except -1:
        if type(value) is not bytes or len(<bytes>value) != 16:
            raise port.BatchInvalid(f"rows[{row}].{name}", "16 bytes are expected")
        memcpy(out, PyBytes_AS_STRING(<bytes>value), 16)
        return 0

    # ---- routing ----

    cdef int _submit_transfers(self, Request* request) except -1:
        """Send the rows to their shards; with one shard there is nothing to route."""
        cdef Work* work
        cdef uint32_t row, wanted = 0
        cdef uint16_t* located
        cdef Shard shard
        self._admit(request)
        if self.shard_count == 1:
            work = work_new(WORK_TRANSFERS, request)
            if work == NULL:
                self._unadmit(request)
                raise MemoryError()
            work.columns = request.columns
            request.remaining = 1
            shard_push(self.core.shards[0], work, False)
            return 0
        if request.columns.flags != NULL and request.columns.pending_ids != NULL:
            for row in range(request.count):
                if request.columns.flags[2 * <size_t>row] & FLAG_POST_OR_VOID and self._wants_locating(request, row):
                    wanted += 1
        if wanted == 0:
            return self._route(request)
        # a post or void that does not name both its accounts: ask the shards which of them knows the hold
        located = <uint16_t*>malloc(2 * <size_t>request.count)
        if located == NULL:
            self._unadmit(request)
            raise MemoryError()
        for row in range(request.count):
            located[row] = LOCATE_NONE
            if request.columns.flags[2 * <size_t>row] & FLAG_POST_OR_VOID and self._wants_locating(request, row):
                located[row] = LOCATE_WANTED
        request.located = located
        request.locating = 1
        request.remaining = <uint32_t>len(self._order)
        for shard in self._order:
            work = work_new(WORK_LOCATE, request)
            if work == NULL:
                raise MemoryError()
            shard_push(&shard.core, work, False)
        return 0

    cdef bint _wants_locating(self, Request* request, uint32_t row) noexcept nogil:
        return ducat_zero_id(request.columns.debit_ids + 16 * <size_t>row) \
            or ducat_zero_id(request.columns.credit_ids + 16 * <size_t>row)

    cdef void _unadmit(self, Request* request) noexcept:
        self.core.rows_held -= request.count
        self.core.bytes_held -= request.bytes_held
        self._drop(request)

    cdef int _route(self, Request* request) except -1:
        """Home shard and credit shard of each row; then one gather index a shard."""
        cdef uint32_t count = request.count, row, shard, parts = 0, at, chain_end, aside = 0
        cdef size_t n = count
        cdef uint16_t* home
        cdef uint16_t* credit
        cdef uint32_t starts[SHARDS_MAX + 1]
        cdef uint32_t filled[SHARDS_MAX]
        cdef Work* works[SHARDS_MAX]
        cdef Work* work
        cdef bint split, barred, coordinated = self.coordinated and not request.columns.chain_steps
        cdef uint8_t code
        request.row_index = <uint32_t*>malloc(4 * n)
        request.credit_shards = <uint8_t*>malloc(2 * n)
        home = <uint16_t*>malloc(2 * n)
        if request.row_index == NULL or request.credit_shards == NULL or home == NULL:
            free(home)
            self._unadmit(request)
            raise MemoryError()
        credit = <uint16_t*>request.credit_shards
        memset(starts, 0, sizeof(starts))
        with nogil:
            for row in range(count):
                if self._home_of(request, row, &home[row], &credit[row]) & IS_RESERVED and coordinated:
                    request.results[row], home[row] = CROSS_SHARD_UNSUPPORTED, LOCATE_NONE
            if request.columns.flags != NULL:
                row = 0
                while row < count:
                    if not request.columns.flags[2 * <size_t>row] & FLAG_LINKED:
                        row += 1
                        continue
                    chain_end = row
                    barred = home[row] == LOCATE_NONE
                    split = coordinated and credit[row] != SHARD_LOCAL
                    while chain_end < count and request.columns.flags[2 * <size_t>chain_end] & FLAG_LINKED:
                        chain_end += 1
                        barred |= chain_end < count and home[chain_end] == LOCATE_NONE
                        if chain_end < count and (home[chain_end] != home[row] or (coordinated and credit[chain_end] != SHARD_LOCAL)):
                            split = True
                    code = CROSS_SHARD_UNSUPPORTED
                    split |= barred
                    if coordinated and not barred:
                        code = CHAIN_OPEN if chain_end == count else \
                            WRONG_SHARD if self.core.shards[home[row]] == NULL else SET_ASIDE
                    aside += split and code == SET_ASIDE
                    while row <= chain_end and row < count:
                        if split:
                            request.results[row] = code
                            if code != SET_ASIDE:
                                home[row] = LOCATE_NONE
                        row += 1
            for row in range(count):
                if home[row] == LOCATE_NONE or request.results[row] == SET_ASIDE:
                    continue
                if self.core.shards[home[row]] == NULL:
                    request.results[row], home[row] = WRONG_SHARD, LOCATE_NONE
                    continue
                starts[home[row] + 1] += 1
            for shard in range(self.shard_count):
                starts[shard + 1] += starts[shard]
                filled[shard] = starts[shard]
            for row in range(count):
                if home[row] != LOCATE_NONE and request.results[row] != SET_ASIDE:
                    request.row_index[filled[home[row]]] = row
                    filled[home[row]] += 1
        if aside:
            try:
                self._set_aside(request, home, credit)
            except BaseException:
                free(home)
                self._unadmit(request)
                raise
        free(home)
        for shard in range(self.shard_count):
            if starts[shard + 1] == starts[shard]:
                continue
            work = work_new(WORK_TRANSFERS, request)
            if work == NULL:
                for at in range(parts):
                    work_free(works[at])
                if aside:
                    del self._chains[-<Py_ssize_t>aside:]
                self._unadmit(request)
                raise MemoryError()
            work.columns = request.columns
            work.columns.rows, work.columns.count = request.row_index + starts[shard], starts[shard + 1] - starts[shard]
            work.columns.credit_shards = request.credit_shards
            work.peer = <uint16_t>shard
            works[parts] = work
            parts += 1
        if parts + aside == 0:
            request.remaining = 0
            host_complete(&self.core, request)
            return 0
        request.remaining = parts + aside
        for at in range(parts):
            shard_push(self.core.shards[works[at].peer], works[at], False)
        return 0

    # ---- chains across shards ----

    def coordinate(self, reserved):
        """From now on chains across shards are set aside for `chains`, and rows of callers that name a reserved account are
        CROSS_SHARD_UNSUPPORTED, with the whole chain that they are in."""
        self.reserve(reserved)
        self.coordinated = True

    def reserve(self, ids):
        """Further accounts that only coordinators of chains may name."""
        for one in ids:
            if type(one) is not bytes or len(<bytes>one) != 16:
                raise port.BatchInvalid("ids", "16 bytes each are expected")
            self._striped.add(<const uint8_t*>PyBytes_AS_STRING(<bytes>one), IS_RESERVED)

    cdef int _set_aside(self, Request* request, const uint16_t* home, const uint16_t* credit) except -1:
        """Rows that were marked SET_ASIDE, chain by chain, for a coordinator. Each counts as a part of the request."""
        cdef uint32_t row = 0, first
        cdef list rows, routes, chains = []
        while row < request.count:
            if request.results[row] != SET_ASIDE:
                row += 1
                continue
            first, rows, routes = row, [], []
            while True:
                rows.append(self._row(request, row))
                routes.append((home[row], credit[row] if credit[row] != SHARD_LOCAL else home[row]))
                request.results[row] = IN_FLIGHT
                row += 1
                if not request.columns.flags[2 * <size_t>row - 2] & FLAG_LINKED:
                    break
            chains.append((<size_t>request, first, rows, routes))
        self._chains += chains
        return 0

    cdef object _row(self, Request* request, uint32_t row):
        cdef const TransferColumns* c = &request.columns
        cdef int64_t amount
        cdef uint16_t flags = 0, code = 0
        cdef uint32_t timeout_s = 0
        memcpy(&amount, c.amounts + 8 * <size_t>row, 8)
        memcpy(&flags, c.flags + 2 * <size_t>row, 2)
        if c.timeouts_s != NULL:
            memcpy(&timeout_s, c.timeouts_s + 4 * <size_t>row, 4)
        if c.codes != NULL:
            memcpy(&code, c.codes + 2 * <size_t>row, 2)
        return port.TransferRow(
            c.ids[16 * <size_t>row:16 * <size_t>row + 16], c.debit_ids[16 * <size_t>row:16 * <size_t>row + 16],
            c.credit_ids[16 * <size_t>row:16 * <size_t>row + 16], amount, flags,
            c.pending_ids[16 * <size_t>row:16 * <size_t>row + 16] if c.pending_ids != NULL else bytes(16), timeout_s, code)

    def chains(self):
        """Takes the chains that were set aside: (token, first row, rows, [(shard of the row, shard of its credit account)]).
        Each must be answered once by `finish_chain`."""
        cdef list found = self._chains
        if found:
            self._chains = []
        return found

    @property
    def has_chains(self):
        """Whether `chains` would give any."""
        return len(self._chains) > 0

    def finish_chain(self, size_t token, uint32_t first, bytes codes not None, positions=()):
        """What became of a chain that was set aside: one TransferResult a row, and (shard, sequence number) pairs."""
        cdef Request* request = <Request*>token
        memcpy(request.results + first, PyBytes_AS_STRING(codes), len(codes))
        for shard, sequence in positions:
            if 0 <= shard < <int>self.shard_count:
                ducat_max_u64(&request.positions[<int>shard], sequence)
        request_done(&self.core, request, 1)

    def submit_chain_holds(self, uint64_t ticket, int shard, bytes marks_id not None, uint64_t from_slot):
        """Some of the marks on an account, each behind the holds that it stands for. The completion's result is bytes (port.unpack_holds)."""
        self._submit_blob(ticket, shard, SHAPE_HOLDS, WORK_HOLDS, marks_id, from_slot)

    def submit_cut(self, uint64_t ticket, int shard):
        """A shard's sums and its links to the others after one event. The completion's result is bytes (port.unpack_cut)."""
        self._submit_blob(ticket, shard, SHAPE_CUT, WORK_CUT, b"", 0)

    cdef int _submit_blob(self, uint64_t ticket, int shard, int shape, int kind, bytes account, uint64_t number) except -1:
        cdef Shard one = self._shards[shard]
        cdef Request* request = self._new(ticket, shape, 1, 0, account, 1, kind == WORK_HOLDS)  # chains end whatever else waits
        cdef Work* work = work_new(kind, request)
        request.extra = calloc(1, sizeof(Blob))
        if work == NULL or request.extra == NULL:
            free(work)
            self._drop(request)
            raise MemoryError()
        (<Blob*>request.extra).limit = self.blob_bytes_max
        work.columns.ids = <const uint8_t*>PyBytes_AS_STRING(account)
        work.number = number
        request.remaining = 1
        self._admit(request)
        shard_push(&one.core, work, False)
        return 0

    cdef bytes _finish_blob(self, Request* request):
        cdef Blob* blob = <Blob*>request.extra
        try:
            return PyBytes_FromStringAndSize(<char*>blob.data, <Py_ssize_t>blob.length)
        finally:
            free(blob.data)
            blob.data = NULL

    cdef uint8_t _home_of(self, Request* request, uint32_t row, uint16_t* home, uint16_t* credit) noexcept nogil:
        """The debit account's shard; a striped one has a part everywhere, then the credit account's; of two striped ones the
        transfer id decides (of a post or void: the hold's id, so that it finds the hold). Returns what the accounts are."""
        cdef const uint8_t* debit_id = request.columns.debit_ids + 16 * <size_t>row
        cdef const uint8_t* credit_id = request.columns.credit_ids + 16 * <size_t>row
        cdef const uint8_t* id = request.columns.ids + 16 * <size_t>row
        cdef uint8_t debit_kind = self._striped.kind(debit_id), credit_kind = self._striped.kind(credit_id)
        credit[0] = SHARD_LOCAL
        if request.located != NULL and request.located[row] != LOCATE_NONE:
            # nobody knows the hold: any shard may say so, always the same one
            home[0] = request.located[row] if request.located[row] != LOCATE_WANTED \
                else self.core.shard_of_slot[ducat_slot(request.columns.pending_ids + 16 * <size_t>row)]
            return debit_kind | credit_kind
        if not debit_kind & IS_STRIPED:
            home[0] = self.core.shard_of_slot[ducat_slot(debit_id)]
            if not credit_kind & IS_STRIPED:
                credit[0] = self.core.shard_of_slot[ducat_slot(credit_id)]
                if credit[0] == home[0]:
                    credit[0] = SHARD_LOCAL
            return debit_kind | credit_kind
        if not credit_kind & IS_STRIPED:
            home[0] = self.core.shard_of_slot[ducat_slot(credit_id)]
            return debit_kind | credit_kind
        if request.columns.flags != NULL and request.columns.flags[2 * <size_t>row] & FLAG_POST_OR_VOID \
                and request.columns.pending_ids != NULL:
            id = request.columns.pending_ids + 16 * <size_t>row
        home[0] = self.core.shard_of_slot[ducat_slot(id)]
        return debit_kind | credit_kind

    # ---- accounts and reads ----

    def submit_accounts(self, uint64_t ticket, rows, *, bint update=False, bint always=False):
        """Open (or update) accounts; tuples in the order of AccountRow. A striped account is opened on every shard of this
        process. The completion's result is an AccountsResult. always: the limits of what is under way do not count."""
        cdef Request* request
        cdef uint32_t count = len(rows), i = 0
        cdef size_t n = count
        cdef uint8_t* data
        cdef int64_t overdraft, limit
        cdef uint16_t flags
        if count == 0:
            raise port.BatchInvalid("rows", "the batch has no rows")
        if count > ROWS_MAX:
            raise port.BatchInvalid("rows", f"{count} rows, at most {ROWS_MAX} are allowed")
        request = self._new(ticket, SHAPE_ACCOUNTS, count, 64 * <uint64_t>count, None, n * len(self._order), always)
        try:
            data = <uint8_t*>malloc(38 * n)
            if data == NULL:
                raise MemoryError()
            request.spare = data
            for row in rows:
                self._put_id(data + 16 * n + 16 * <size_t>i, row[0], i, "id")
                try:
                    currency = row[1].encode("ascii")
                    flags = row[2] if len(row) > 2 else 0
                    overdraft = row[3] if len(row) > 3 else 0
                    limit = row[4] if len(row) > 4 else 0
                except (OverflowError, TypeError, UnicodeError, AttributeError) as error:
                    raise port.BatchInvalid(f"rows[{i}]", f"a field does not fit its column: {error}") from None
                memset(data + 32 * n + 4 * <size_t>i, 0, 4)
                memcpy(data + 32 * n + 4 * <size_t>i, <const char*>currency, min(<size_t>len(currency), 4))
                memcpy(data + 8 * <size_t>i, &overdraft, 8)
                memcpy(data + 8 * n + 8 * <size_t>i, &limit, 8)
                memcpy(data + 36 * n + 2 * <size_t>i, &flags, 2)
                i += 1
        except BaseException:
            self._drop(request)
            raise
        self._submit_accounts(request, data, update)

    def submit_account_message(self, uint64_t ticket, bytes message not None):
        """A serialized CreateAccountsRequest; the completion's result is a serialized CreateAccountsResponse. False: nothing was
        taken, since a row has a name or no id of 16 bytes, is striped, reserved or malformed, or there are not 1 to 8,190."""
        cdef const uint8_t* at = <const uint8_t*>PyBytes_AS_STRING(message)
        cdef uint64_t length = <uint64_t>len(message)
        cdef uint32_t count = parse_count(at, length)
        cdef size_t n = count, i
        cdef uint8_t* data
        cdef Request* request
        if count == 0:
            return False
        data = <uint8_t*>malloc(38 * n)
        if data == NULL:
            raise MemoryError()
        if not parse_account_specs(at, length, count, data):
            free(data)
            return False
        if self.coordinated:
            for i in range(n):
                if self._striped.kind(data + 16 * n + 16 * i) & IS_RESERVED:
                    free(data)
                    return False
        try:
            request = self._new(ticket, SHAPE_ACCOUNT_MESSAGE, count, 64 * <uint64_t>count, None, n * len(self._order))
        except BaseException:
            free(data)
            raise
        request.spare = data
        self._submit_accounts(request, data, False)
        return True

    cdef int _submit_accounts(self, Request* request, uint8_t* data, bint update) except -1:
        """Columns: overdraft limits, balance limits, ids, currencies, flags."""
        cdef AccountColumns columns
        cdef size_t n = request.count, i
        cdef bint striping
        memset(&columns, 0, sizeof(columns))
        columns.count = request.count
        columns.overdraft_limits, columns.balance_limits, columns.ids = data, data + 8 * n, data + 16 * n
        columns.currencies, columns.flags = data + 32 * n, data + 36 * n
        request.columns.ids, request.columns.flags = columns.ids, columns.flags
        if self.shard_count > 1 and not update:
            for i in range(n):
                if columns.flags[2 * i] & ACCOUNT_STRIPED:
                    request.striping = 1
        striping = request.striping
        self._submit_parts(request, WORK_ACCOUNTS, &columns, update)
        self._opening += striping
        return 0

    cdef int _submit_parts(self, Request* request, int kind, AccountColumns* columns, bint update) except -1:
        """Account rows to their shards, rows of striped accounts to every shard."""
        cdef uint32_t count = request.count, row, shard, parts = 0, at, entries = 0, everywhere = 0
        cdef size_t n = count
        cdef uint16_t* home = <uint16_t*>malloc(2 * n)
        cdef uint32_t counts[SHARDS_MAX]
        cdef uint32_t filled[SHARDS_MAX]     # where the next row of a shard goes
        cdef Work* works[SHARDS_MAX]
        cdef ShardCore* pushes[SHARDS_MAX]
        cdef Work* work
        cdef const uint8_t* ids = request.columns.ids
        cdef ReadEntry* found = NULL
        self._admit(request)
        memset(counts, 0, sizeof(counts))
        if home != NULL:
            for row in range(count):
                home[row] = self.core.shard_of_slot[ducat_slot(ids + 16 * <size_t>row)]
                if self._striped.has(ids + 16 * <size_t>row) or (
                        kind == WORK_ACCOUNTS and not update and request.columns.flags[2 * <size_t>row] & ACCOUNT_STRIPED):
                    home[row] = EVERY_SHARD
                    everywhere += 1
                else:
                    counts[home[row]] += 1
        for shard in range(self.shard_count):
            if self.core.shards[shard] != NULL:
                counts[shard] += everywhere
                filled[shard] = entries
                entries += counts[shard]
        request.row_index = <uint32_t*>malloc(4 * <size_t>entries + 4)
        if kind == WORK_READ:
            found = <ReadEntry*>calloc(<size_t>entries + 1, sizeof(ReadEntry))
            request.extra = found
        if home == NULL or request.row_index == NULL or (kind == WORK_READ and found == NULL):
            free(home)
            self._unadmit(request)
            raise MemoryError()
        for shard in range(self.shard_count):
            if self.core.shards[shard] == NULL or counts[shard] == 0:
                continue
            work = work_new(kind, request)
            if work != NULL and kind == WORK_ACCOUNTS:
                work.data = <uint8_t*>malloc(sizeof(AccountColumns))
            if work == NULL or (kind == WORK_ACCOUNTS and work.data == NULL):
                work_free(work)
                for at in range(parts):
                    work_free(works[at])
                free(home)
                self._unadmit(request)
                raise MemoryError()
            if kind == WORK_ACCOUNTS:
                memcpy(work.data, columns, sizeof(AccountColumns))
            work.columns.ids, work.columns.count = ids, counts[shard]
            work.columns.rows = request.row_index + filled[shard]
            # a row of one shard only is answered there: without striped ones all shards answer into the same results
            work.peer, work.number = <uint16_t>parts if everywhere else 0, update
            works[parts], pushes[parts] = work, self.core.shards[shard]
            parts += 1
        for row in range(count):
            if home[row] != EVERY_SHARD:
                if self.core.shards[home[row]] != NULL:
                    place_row(request.row_index, found, filled[home[row]], row)
                    filled[home[row]] += 1
                continue
            for shard in range(self.shard_count):
                if self.core.shards[shard] != NULL:
                    place_row(request.row_index, found, filled[shard], row)
                    filled[shard] += 1
        free(home)
        request.entry_count = entries
        request.part_count = parts if everywhere else 1
        if parts == 0:
            host_complete(&self.core, request)
            return 0
        request.remaining = parts
        for at in range(parts):
            shard_push(pushes[at], works[at], False)
        return 0

    def submit_read(self, uint64_t ticket, ids, *, bint always=False):
        """Read accounts; the completion's result is a ReadResult of what is durable. At most 8,190 ids. always: the limits of
        what is under way do not count."""
        self._submit_read(ticket, ids, 0, always)

    cdef Request* _submit_read(self, uint64_t ticket, object ids, int waiter, bint always=False) except NULL:
        cdef bytes packed = b"".join(ids)
        cdef uint32_t count = len(ids)
        cdef Request* request
        if count == 0 or count > ROWS_MAX or <uint32_t>len(packed) != 16 * count:
            raise port.BatchInvalid("ids", f"1 to {ROWS_MAX} ids of 16 bytes are expected")
        request = self._new(ticket, SHAPE_READ, count, 64 * <uint64_t>count, packed, 0, always)
        request.waiter = waiter
        request.columns.ids = <const uint8_t*>PyBytes_AS_STRING(packed)
        self._submit_parts(request, WORK_READ, NULL, False)
        return request

    def submit_read_message(self, uint64_t ticket, bytes message not None):
        """A serialized GetAccountsRequest; the completion's result is an AccountsRead. False: nothing was taken, since it has
        anything but 1 to 8,190 ids of 16 bytes, or one lives in another process."""
        cdef const uint8_t* at = <const uint8_t*>PyBytes_AS_STRING(message)
        cdef uint64_t length = <uint64_t>len(message)
        cdef uint32_t count = parse_count(at, length), row
        cdef uint8_t* ids
        cdef Request* request
        cdef Shard shard
        if count == 0:
            return False
        ids = <uint8_t*>malloc(16 * <size_t>count)
        if ids == NULL:
            raise MemoryError()
        if not parse_account_ids(at, length, ids):
            free(ids)
            return False
        for row in range(count):
            if self.core.shards[self.core.shard_of_slot[ducat_slot(ids + 16 * <size_t>row)]] == NULL \
                    and not self._striped.has(ids + 16 * <size_t>row):
                free(ids)
                return False
        try:
            request = self._new(ticket, SHAPE_READ_MESSAGE, count, 64 * <uint64_t>count, None, 0)
        except BaseException:
            free(ids)
            raise
        request.spare = ids
        request.columns.ids = ids
        request.before = <uint64_t*>calloc(self.shard_count, 8)
        if request.before == NULL:
            self._drop(request)
            raise MemoryError()
        for shard in self._order:
            request.before[shard.shard] = shard.log._durable_sequence
        self._submit_parts(request, WORK_READ, NULL, False)
        return True

    def submit_results(self, uint64_t ticket, ids):
        """What became of transfers: the completion's result is bytes, one TransferResult an id, 0 = not remembered."""
        self._submit_results(ticket, ids, 0)

    cdef Request* _submit_results(self, uint64_t ticket, object ids, int waiter) except NULL:
        cdef bytes packed = b"".join(ids)
        cdef uint32_t count = len(ids)
        cdef Request* request
        if count == 0 or count > ROWS_MAX or <uint32_t>len(packed) != 16 * count:
            raise port.BatchInvalid("ids", f"1 to {ROWS_MAX} ids of 16 bytes are expected")
        request = self._new(ticket, SHAPE_RESULTS, count, 16 * <uint64_t>count, packed, count * len(self._order))
        request.waiter = waiter
        request.columns.ids = <const uint8_t*>PyBytes_AS_STRING(packed)
        self._admit(request)
        self._push_all(request, WORK_RESULTS)
        return request

    def submit_totals(self, uint64_t ticket):
        """The completion's result is a list of CurrencyTotals over this process's shards (a full scan of the accounts)."""
        self._submit_all(ticket, SHAPE_TOTALS, WORK_TOTALS, 0)

    def submit_check(self, uint64_t ticket):
        """Recompute every shard's state digest; the completion's result is {shard: bool}."""
        self._submit_all(ticket, SHAPE_CHECK, WORK_CHECK, 0)

    cdef Request* _submit_all(self, uint64_t ticket, int shape, int kind, int waiter) except NULL:
        cdef Request* request = self._new(ticket, shape, 1, 0, None, len(self._order))
        request.waiter = waiter
        if shape == SHAPE_TOTALS:
            request.extra = calloc(len(self._order), sizeof(TotalsPart))
            if request.extra == NULL:
                self._drop(request)
                raise MemoryError()
        self._admit(request)
        self._push_all(request, kind)
        return request

    cdef int _push_all(self, Request* request, int kind) except -1:
        cdef Shard shard
        cdef Work* work
        cdef uint32_t part = 0
        request.part_count = request.remaining = <uint32_t>len(self._order)
        for shard in self._order:
            work = work_new(kind, request)
            if work == NULL:
                raise MemoryError()
            work.columns = request.columns
            work.columns.count = request.count
            work.peer, work.number = <uint16_t>part, part
            part += 1
            shard_push(&shard.core, work, False)
        return 0

    # ---- completions ----

    def completions(self):
        """Take what is done: a list of (ticket, result). A result may be an exception instance (DiskNearlyFull)."""
        cdef Request* request
        cdef Request* following
        cdef uint64_t drained
        cdef list done = []
        c_read(self.core.event_fd, &drained, 8)
        pthread_mutex_lock(&self.core.mutex)
        request = self.core.done_head
        self.core.done_head = self.core.done_tail = NULL
        pthread_mutex_unlock(&self.core.mutex)
        while request != NULL:
            following = request.next
            if request.locating:
                self._park(request)
            else:
                done.append((request.ticket, self._finish(request)))
            request = following
        self._route_parked(done)
        return done

    cdef void _park(self, Request* request) noexcept:
        request.next = NULL
        if self._parked == NULL:
            self._parked = request
        else:
            self._parked_tail.next = request
        self._parked_tail = request

    cdef int _route_parked(self, list done) except -1:
        """Send on what was located, in order; not while striped accounts are being opened: a transfer that went where a plain
        account lives would be sent elsewhere when it is repeated, and move the money twice."""
        cdef Request* request
        cdef bint over = self._closed or ducat_load_int(&self.core.failed)
        while self._parked != NULL and (over or self._opening == 0):
            request = self._parked
            self._parked = request.next
            request.next = NULL
            request.locating = 0
            if over:                       # nothing of it was applied
                request.status = STATUS_CLOSED
                done.append((request.ticket, self._finish(request)))
            else:
                self._route(request)
        return 0

    cdef object _finish(self, Request* request):
        """The Python result of a finished request, which is freed."""
        cdef object result
        cdef bytes codes
        try:
            if request.status == STATUS_DISK_NEARLY_FULL or (request.refused_full and request.refused_full == request.count):
                result = self._nearly_full()
            elif request.status != STATUS_OK:
                result = port.HostClosed("the request was given up")
            elif request.shape <= SHAPE_WRAPPED:
                result = build_result(request, self.shard_count)
            elif request.shape == SHAPE_ROWS:
                result = port.RowsResult(
                    PyBytes_FromStringAndSize(<char*>request.results, request.count), self._positions(request),
                    request.replayed)
            elif request.shape == SHAPE_CALLS:
                result = build_call_results(request, self.shard_count)
            elif request.shape == SHAPE_ACCOUNTS:
                result = self._finish_accounts(request)
            elif request.shape == SHAPE_READ:
                result = self._finish_read(request)
            elif request.shape == SHAPE_ACCOUNT_MESSAGE:
                codes = self._account_codes(request)
                result = build_account_results(<const uint8_t*>PyBytes_AS_STRING(codes), request.count)
            elif request.shape == SHAPE_READ_MESSAGE:
                result = self._finish_read_message(request)
            elif request.shape == SHAPE_RESULTS:
                result = self._finish_results(request)
            elif request.shape == SHAPE_TOTALS:
                result = self._finish_totals(request)
            elif request.shape == SHAPE_HOLDS or request.shape == SHAPE_CUT:
                result = self._finish_blob(request)
            elif request.shape == SHAPE_CHECK:
                result = {(<Shard>self._order[i]).shard: request.results[i] == 1 for i in range(len(self._order))}
            else:
                result = None
        finally:
            if request.striping:
                self._opening -= 1
            self._unadmit(request)
        return result

    cdef tuple _positions(self, Request* request):
        cdef uint32_t shard
        cdef list found = []
        for shard in range(self.shard_count):
            if request.positions[shard]:
                found.append(port.ShardPosition(shard, request.positions[shard]))
        return tuple(found)

    cdef object _nearly_full(self):
        cdef Shard shard
        for shard in self._order:
            if not shard.log.writable():
                try:
                    space = os.statvfs(shard.log.folder)
                    free_bytes = space.f_bavail * space.f_frsize
                except OSError:
                    free_bytes = 0
                return DiskNearlyFull(shard.log.folder, free_bytes, shard.log.reserve_bytes)
        return DiskNearlyFull("", 0, 0)

    cdef object _finish_accounts(self, Request* request):
        return port.AccountsResult(self._account_codes(request), self._positions(request))

    cdef AccountsRead _finish_read_message(self, Request* request):
        cdef AccountsRead read = AccountsRead.__new__(AccountsRead)
        read.entries, request.extra = <ReadEntry*>request.extra, NULL
        read.before, request.before = request.before, NULL
        read.core, read.host = &self.core, self
        gather_read(read, request.count, request.entry_count)
        return read

    cdef bytes _account_codes(self, Request* request):
        """One code a row: the worst of its parts (OK only if every shard says OK)."""
        cdef uint32_t row, part
        cdef uint8_t code, one
        cdef bytes codes = PyBytes_FromStringAndSize(NULL, request.count)
        cdef uint8_t* out = <uint8_t*>PyBytes_AS_STRING(codes)
        for row in range(request.count):
            code = 0
            for part in range(request.part_count):
                one = request.results[<size_t>part * request.count + row]
                if one and (code == 0 or code == TRANSFER_OK):
                    code = one
            out[row] = code if code else ACCOUNT_WRONG_SHARD
            if out[row] == TRANSFER_OK and request.columns.flags[2 * <size_t>row] & ACCOUNT_STRIPED:
                self._striped.add(request.columns.ids + 16 * <size_t>row)
        return codes

    cdef object _finish_read(self, Request* request):
        cdef ReadEntry* entries = <ReadEntry*>request.extra
        cdef AccountState* state
        cdef uint32_t i
        cdef list found = [None] * request.count
        for i in range(request.entry_count):
            if not entries[i].found:
                continue
            state = &entries[i].state
            before = found[entries[i].id_index]
            if before is None:
                found[entries[i].id_index] = port.AccountState(
                    state.id[:16], _currency(state.currency), state.balance, state.held_out, state.held_in,
                    state.overdraft_limit, state.balance_limit, state.flags)
            else:
                found[entries[i].id_index] = replace(
                    before, balance=before.balance + state.balance, held_out=before.held_out + state.held_out,
                    held_in=before.held_in + state.held_in)
        return port.ReadResult(tuple(found), self._positions(request))

    cdef object _finish_results(self, Request* request):
        """A cross-shard transfer is known on its debit shard; the others do not know it."""
        cdef uint32_t row, part
        cdef uint8_t one
        cdef bytes codes = PyBytes_FromStringAndSize(NULL, request.count)
        cdef uint8_t* out = <uint8_t*>PyBytes_AS_STRING(codes)
        for row in range(request.count):
            out[row] = 0
            for part in range(request.part_count):
                one = request.results[<size_t>part * request.count + row]
                if one and (out[row] == 0 or one == TRANSFER_OK):
                    out[row] = one
        return codes

    cdef object _finish_totals(self, Request* request):
        cdef TotalsPart* parts = <TotalsPart*>request.extra
        cdef CurrencyTotal* total
        cdef uint32_t part, i
        cdef dict sums = {}
        cdef list row
        for part in range(request.part_count):
            for i in range(parts[part].count):
                total = &parts[part].totals[i]
                row = sums.setdefault(_currency(total.currency), [0, 0, 0, 0, 0])
                row[0] += total.accounts
                row[1] += total.balance
                row[2] += total.in_flight
                row[3] += total.held_out
                row[4] += total.held_in
            free(parts[part].totals)
            parts[part].totals = NULL
        return [port.CurrencyTotals(currency, *sums[currency]) for currency in sorted(sums)]

    # ---- blocking calls, for any thread but the loop's ----

    cdef int _wait(self, Request* request) except -1:
        cdef int finished = 0, failed = 0
        with nogil:
            pthread_mutex_lock(&self.core.mutex)
            while not request.finished and not ducat_load_int(&self.core.failed):
                pthread_cond_wait(&self.core.finished, &self.core.mutex)
            finished = request.finished
            pthread_mutex_unlock(&self.core.mutex)
        if not finished:
            raise self.failure()
        return 0

    def account(self, bytes account_id not None):
        """One account as it stands durably, or None. Blocks until what was read is durable."""
        cdef Request* request = self._submit_read(0, [account_id], 1)
        self._wait(request)
        return self._finish(request).accounts[0]

    def totals(self):
        """CurrencyTotals over this process's shards. Blocks."""
        cdef Request* request = self._submit_all(0, SHAPE_TOTALS, WORK_TOTALS, 1)
        self._wait(request)
        return self._finish(request)

    def check_digests(self):
        """{shard: does the state digest match a recomputation}. Blocks."""
        cdef Request* request = self._submit_all(0, SHAPE_CHECK, WORK_CHECK, 1)
        self._wait(request)
        return self._finish(request)

    # ---- status ----

    def shards(self):
        """The status of every shard of this process."""
        cdef Shard shard
        cdef EngineCounters counters
        cdef uint8_t digest[16]
        cdef uint64_t queued
        cdef list found = []
        for shard in self._order:
            pthread_mutex_lock(&shard.core.mutex)
            counters = shard.core.counters
            memcpy(digest, shard.core.digest, 16)
            queued = shard.core.queued
            pthread_mutex_unlock(&shard.core.mutex)
            state = "poisoned" if shard.core.stopped or shard.log._poisoned else \
                "read-only" if not shard.log.writable() else \
                "rewound" if self._is_rewound(shard) else "serving"
            found.append(port.ShardFigures(
                shard=shard.shard, state=state, epoch=shard.log.epoch, sequence=counters.sequence,
                durable_sequence=shard.log._durable_sequence, snapshot_sequence=shard.snapshot_sequence,
                digest=digest[:16], account_count=counters.account_count, log_bytes=shard.log.appended_bytes,
                hold_count=counters.hold_count, id_count=counters.id_count, unsettled_count=counters.unsettled_count,
                memory_bytes=counters.memory_bytes, sync_count=shard.log.sync_count, frame_count=shard.log.frame_count,
                queued_count=queued, now_ns=counters.now_ns))
        return found

    cdef bint _is_rewound(self, Shard shard):
        cdef uint32_t peer
        for peer in range(self.shard_count):
            if shard.core.rewound[peer].sends_seen or shard.core.rewound[peer].credits_seen:
                return True
        return False

    def links(self, int shard):
        """How a shard stands with every other shard of the system."""
        cdef Shard one = self._shards[shard]
        cdef Rewound* rewound
        cdef uint64_t settled, last
        cdef uint16_t peer
        cdef list found = []
        for peer in range(self.shard_count):
            if peer == one.shard:
                continue
            rewound = &one.core.rewound[peer]
            one.engine.send_span(peer, &settled, &last)
            problem = []
            if ducat_load_int(&rewound.sends_seen):
                problem.append(f"shard {peer} has taken {rewound.sends_expected} transfers from here, this shard's log ends with "
                               f"number {rewound.sends_found}")
            if ducat_load_int(&rewound.credits_seen):
                problem.append(f"shard {peer} has settled {rewound.credits_expected} transfers to here, this shard's log ends "
                               f"with number {rewound.credits_found}")
            found.append(port.ShardLink(peer, last, settled, one.engine.credit_cursor(peer), "; ".join(problem)))
        return found

    def compare_link(self, int shard, int peer, uint64_t received, uint64_t settled, uint64_t sent):
        """What the peer, a shard of another process, had received from a shard here, and settled towards it, a moment ago; and
        the number of the last transfer that had been sent there before anything new was: received beyond it means that this
        shard's log is older than the peer's."""
        (<Shard>self._shards[shard]).compare(<uint16_t>peer, received, settled, sent)

    @property
    def rewound_count(self):
        """Grows with every link that turns out to have a problem."""
        return ducat_load_int(&self.core.rewound_count)

    def durable_sequence(self, int shard):
        """The last durable sequence number of one shard."""
        return (<Shard>self._shards[shard]).log._durable_sequence

    def watch(self, bint on):
        """While on, the eventfd wakes the loop after every sync (somebody waits for a durable sequence number)."""
        ducat_store_int(&self.core.watching, on)

    def foreign_shard(self, ids):
        """The shard of the first id that does not live in this process, -1 if all do (striped accounts do)."""
        cdef uint16_t home
        for one in ids:
            if type(one) is not bytes or len(<bytes>one) != 16:
                raise port.BatchInvalid("ids", "16 bytes each are expected")
            home = self.core.shard_of_slot[ducat_slot(<const uint8_t*>PyBytes_AS_STRING(<bytes>one))]
            if self.core.shards[home] == NULL and not self._striped.has(<const uint8_t*>PyBytes_AS_STRING(<bytes>one)):
                return home
        return -1

    @property
    def rows_in_flight(self):
        """Rows of requests under way."""
        return self.core.rows_held

    @property
    def bytes_in_flight(self):
        """Bytes of requests under way."""
        return self.core.bytes_held

    # ---- snapshots ----

    def image(self, int shard, sink):
        """Write a consistent image of one shard while it goes on: calls `sink.begin(sequence, timestamp_ns, epoch, digest)`,
        `sink.add(piece: memoryview)` for each piece and `sink.finish(frame_hash)`, all on the calling thread, which is not
        the loop's. Returns the sequence number. Raises RuntimeError if an image is being taken already."""
        cdef Shard one = self._shards[shard]
        cdef Request* request = self._new(0, SHAPE_IMAGE, 0, 0, None, 0)
        cdef Work* work
        cdef ImageInfo info
        if self._images_stopped:
            self._drop(request)
            raise port.HostClosed("the shard host is closing")
        request.extra = calloc(1, sizeof(ImageInfo))
        work = work_new(WORK_IMAGE_BEGIN, request)
        if work == NULL or request.extra == NULL:
            free(work)
            self._drop(request)
            raise MemoryError()
        request.waiter, request.remaining = 1, 1
        self._images += 1
        try:
            with nogil:
                while ducat_load_i64(&self.core.rows_held) > 0 and one.engine.prepare_image():
                    ducat_rest_us(IMAGE_REST_US)
            shard_push(&one.core, work, False)
            self._wait(request)
            if request.status:
                self._drop(request)
                raise RuntimeError(f"an image of shard {shard} is being taken already")
            memcpy(&info, request.extra, sizeof(info))
            self._drop(request)
            try:
                self._read_image(one, sink, &info)
            finally:
                self._image_done(one)
        finally:
            self._images -= 1
        one.snapshot_sequence = info.sequence
        return info.sequence

    cdef int _read_image(self, Shard one, object sink, const ImageInfo* info) except -1:
        cdef int64_t length
        cdef uint8_t[::1] view
        cdef uint8_t* at
        try:
            sink.begin(info.sequence, info.timestamp_ns, info.epoch, info.digest[:16])
            buffer = bytearray(IMAGE_PIECE_BYTES_MAX)
            view = buffer
            at = &view[0]
            readable = memoryview(buffer)
            while True:
                with nogil:
                    length = one.engine.read_image(at)
                    if length > 0 and ducat_load_i64(&self.core.rows_held) > 0:
                        ducat_rest_us(IMAGE_REST_US)      # a snapshot is in no hurry, commits are
                if length <= 0:
                    break
                if self._images_stopped:
                    raise port.HostClosed("the shard host is closing")
                sink.add(readable[:length])
            if length < 0:
                raise RuntimeError(f"the image of shard {one.shard} could not be read")
        finally:
            self._end_image(one)
        sink.finish(info.hash[:16])
        return 0

    cdef void _image_done(self, Shard one):
        pthread_mutex_lock(&one.core.mutex)
        memcpy(one.core.told, one.core.times, sizeof(one.core.told))
        memset(one.core.times, 0, sizeof(one.core.times))
        one.core.imaging = 0
        pthread_mutex_unlock(&one.core.mutex)

    def writer_times(self, int shard):
        """What a shard's writer did between the last two snapshots, and beside the last one: how long batches and commits
        took, and how long it did nothing but begin and end the image."""
        cdef Shard one = self._shards[shard]
        cdef WriterTimes told[2]
        pthread_mutex_lock(&one.core.mutex)
        memcpy(told, one.core.told, sizeof(told))
        pthread_mutex_unlock(&one.core.mutex)
        return tuple(port.WriterTimes(
            batches=told[i].batches, rows=told[i].rows, apply_cpu_ns=told[i].apply_cpu,
            apply_cpu_ns_max=told[i].apply_cpu_max, apply_ns_max=told[i].apply_max, commits=told[i].commits,
            commit_ns_max=told[i].commit_max, pause_ns=told[i].pause, pause_ns_max=told[i].pause_max) for i in range(2))

    cdef int _end_image(self, Shard shard) except -1:
        cdef Request* request = <Request*>calloc(1, sizeof(Request))
        cdef Work* work = work_new(WORK_IMAGE_END, request)
        if request == NULL or work == NULL:
            raise MemoryError()
        request.waiter, request.remaining = 1, 1
        shard_push(&shard.core, work, False)
        self._wait(request)
        request_free(request)
        with nogil:
            shard.engine.release_image()
        return 0

    def note_snapshot(self, int shard, uint64_t sequence):
        """Recovery tells which snapshot it began from."""
        (<Shard>self._shards[shard]).snapshot_sequence = sequence

    def stop_images(self):
        """Let images that are being taken end with HostClosed, and begin no further ones (before `close`)."""
        self._images_stopped = 1

    # ---- the relay's seam ----

    def resend(self, int shard, int destination, *, bint stalled=False):
        """Let a shard deliver everything unsettled towards `destination` again (start-up, a relay that reconnects). stalled:
        only if nothing has been settled since this was called last; ever more rarely while that lasts."""
        cdef Work* work
        cdef Shard one = self._shards[shard]
        if stalled and one.core.counters.unsettled_count == 0:
            return
        work = work_new(WORK_RESEND, NULL)
        if work == NULL:
            raise MemoryError()
        work.peer, work.number = <uint16_t>destination, stalled
        shard_push(&one.core, work, True)

    def outbound(self):
        """Deliveries for shards of other processes: (destination, kind, source, number, position, count, payload, after), in
        order for each pair of shards. kind: "credits", "outcomes" or "forget"."""
        cdef Work* work
        cdef Work* following
        cdef list found = []
        cdef Py_ssize_t length
        pthread_mutex_lock(&self.core.mutex)
        work = self.core.outbound_head
        self.core.outbound_head = self.core.outbound_tail = NULL
        pthread_mutex_unlock(&self.core.mutex)
        while work != NULL:
            following = work.next
            length = <Py_ssize_t>work.count * (CREDIT_ROW_BYTES if work.kind == WORK_CREDITS else sizeof(Refusal))
            found.append((
                work.columns.count,
                "credits" if work.kind == WORK_CREDITS else "outcomes" if work.kind == WORK_OUTCOMES else "forget",
                work.peer, work.number, work.position, work.count if work.kind != WORK_FORGET else 0,
                PyBytes_FromStringAndSize(<char*>work.data, length) if work.data != NULL else b"", work.after))
            work_free(work)
            work = following
        return found

    def deliver(self, int destination, str kind, int source, uint64_t number, uint64_t position, uint32_t count,
                bytes payload not None, uint64_t after=0):
        """A delivery that another process's `outbound` gave, for a shard of this one. Only durable sends may be delivered,
        which `outbound` guarantees. Doubled, late and lost deliveries are harmless; a gap is ignored until the source resends."""
        cdef Work* work
        cdef int code = WORK_CREDITS if kind == "credits" else WORK_OUTCOMES if kind == "outcomes" else WORK_FORGET
        cdef Py_ssize_t length = <Py_ssize_t>count * (CREDIT_ROW_BYTES if code == WORK_CREDITS else sizeof(Refusal))
        if kind not in ("credits", "outcomes", "forget"):
            raise ValueError(f"kind {kind!r} is not known")
        if destination not in self._shards:
            raise ValueError(f"shard {destination} does not live here")
        if not 0 <= source < <int>self.shard_count or source == destination:
            raise ValueError(f"source shard {source} is not another shard")
        if len(payload) != length or count > DELIVERY_ROWS_MAX or (code == WORK_CREDITS and count == 0):
            raise ValueError(f"{count} rows and {len(payload)} bytes do not belong together")
        if after and after >= number:
            raise ValueError(f"saga numbers from {number} on do not follow number {after}" if code == WORK_CREDITS
                             else f"an outcome up to number {number} cannot begin after {after}")
        work = work_new(code, NULL)
        if work == NULL:
            raise MemoryError()
        work.peer, work.number, work.position, work.count = <uint16_t>source, number, position, count
        work.after = after
        if length:
            work.data = <uint8_t*>malloc(length)
            if work.data == NULL:
                free(work)
                raise MemoryError()
            memcpy(work.data, PyBytes_AS_STRING(payload), length)
        shard_push(&(<Shard>self._shards[destination]).core, work, True)

    def account_keys(self, int shard, ordinals):
        """(id, currency) of accounts by their ordinals on a shard: neither ever changes, so no thread is asked. LookupError
        for one that does not exist."""
        cdef Shard one = self._shards[shard]
        cdef AccountState state
        cdef list found = []
        for ordinal in ordinals:
            if ordinal >= one.core.counters.account_count or not one.engine.account_at(ordinal, &state):
                raise LookupError(f"shard {shard} has no account with ordinal {ordinal}")
            found.append((state.id[:16], _currency(state.currency)))
        return found

    def gap_count(self, int shard):
        """Deliveries that did not continue the cursor and were dropped."""
        return (<Shard>self._shards[shard]).core.gap_count


cdef str _currency(uint32_t currency):
    return currency.to_bytes(4, "little").rstrip(b"\0").decode("ascii", "replace")
