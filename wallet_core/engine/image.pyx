# A consistent image of the state while the writer goes on, and loading one. Included by _engine.pyx.
#
# begin_image (between two calls of the writer, microseconds) notes how long every list is and keeps a copy of what is
# small. From then on a reader in another thread copies the dense memory piece by piece, without any lock, so that what it
# copies may be newer than the image or even torn. To make up for that, the writer, before it first changes a record that
# the reader may not have passed yet, puts the record as it was into the *overlay* (one bit a record says that it is
# there). The overlay is written after everything else and, when loaded, laid over it.
#
# So the writer pays one branch per change while no image is taken, and at most one 80-byte copy per record and image, into
# memory that the reader has touched: up to 64 MiB before the image begins (prepare_image), more with every piece that it reads.
# Copying whole chunks on write was rejected: with 10 M accounts and random transfers the first batch alone touches
# 16,000 chunks of any size (64 MiB of 4 KiB chunks, 10 ms), fork() likewise. See docs/decisions/0002-wallet-engine.md.
#
# An image is a sequence of pieces. A piece is a header of 32 bytes and `count` units, little endian:
#
#     0:4 magic "DIMG" · 4:8 kind u32 · 8:16 index u64 · 16:24 first u64 · 24:32 count u64 · units
#
#   kind        index              first             unit
#   1 header    0                  0                 u64: version, shard, sequence, now_ns, floor_ms, linear and chained half
#                                                    of the digest, id_window_ms, generation_count_max, generation_ids,
#                                                    accounts_max, holds_max, unsettled_max, account_count, hold_slots,
#                                                    generation_count, first generation's serial, and since version 2:
#                                                    how many of the generations, the first ones, are of early ids
#   2 accounts  0                  ordinal           64 bytes: Account (state.pyx)
#   3 ids       generation serial  position          24 bytes: IdEntry
#   4 holds     0                  slot              64 bytes: Hold
#   5 span      destination        0                 u64: settled, last, returned
#   6 sends     destination        saga number       72 bytes: PendingSend (_engine.pxd)
#   7 cursor    source             applied number    16 bytes: Refusal
#   8 overlay   0                  0                 80 bytes: kind u32, position u32, generation serial u64, 64 bytes before
#                                                    the change. A record may be named twice: apply last to first
#   9 end       0                  pieces before it  none
#
# Header first, end last, overlay after everything else. Indexes, the heap and generations' time ranges are rebuilt.

cdef enum:
    PIECE_MAGIC = 0x474D4944
    PIECE_HEADER = 1
    PIECE_ACCOUNTS = 2
    PIECE_IDS = 3
    PIECE_HOLDS = 4
    PIECE_SPAN = 5
    PIECE_SENDS = 6
    PIECE_CURSOR = 7
    PIECE_OVERLAY = 8
    PIECE_END = 9
    PIECE_PAYLOAD_MAX = 1048576
    HEADER_WORDS = 18
    HEADER_WORDS_1 = 17             # of version 1
    IMAGE_VERSION = 2
    PIECE_PAYLOAD = 262144          # of the long lists: the thread that reads rests between two pieces while commits are under way
    OVERLAY_ENTRIES = 1637          # 128 KiB a chunk
    SPARES_A_PIECE = 2


cdef struct PieceHeader:
    uint32_t magic
    uint32_t kind
    uint64_t index
    uint64_t first
    uint64_t count


cdef struct OverlayEntry:           # 80 bytes
    uint32_t kind
    uint32_t position
    uint64_t serial
    uint8_t before[64]


cdef struct OverlayChunk:
    OverlayChunk* older
    uint64_t count
    OverlayEntry entries[OVERLAY_ENTRIES]


cdef struct ImageQueue:
    uint64_t settled
    uint64_t last
    uint64_t returned
    uint64_t first_chunk
    SendChunk** chunks              # those of settled + 1 … last


cdef struct ImageCursor:
    uint64_t applied
    uint64_t count
    Refusal* refusals


cdef struct ImageState:
    uint64_t header[HEADER_WORDS]
    uint64_t account_count
    uint64_t accounts_done          # written by the reader, read by the writer
    uint8_t* account_bits
    uint64_t hold_slots
    uint64_t holds_done
    uint8_t* hold_bits
    Generation* generations
    uint8_t* dropped                # per generation: the engine has forgotten it, the image must free it
    uint64_t generation_count
    uint64_t generations_done
    ImageQueue queues[SHARD_COUNT_MAX]
    ImageCursor cursors[SHARD_COUNT_MAX]
    uint64_t newest                 # OverlayChunk*, published by the writer
    uint64_t failed                 # out of memory: the image is no good, the engine is
    # where the reader is
    uint64_t pieces                 # read so far
    uint32_t stage
    uint64_t index
    uint64_t first
    OverlayChunk* overlay


cdef OverlayChunk* overlay_chunk(EngineState* e) noexcept nogil:
    # An empty chunk: one that the reader has touched, or a new one.
    cdef uint64_t taken = e.spares_taken
    cdef OverlayChunk* chunk
    if du_load_acquire(&e.spares_made) == taken:
        return <OverlayChunk*> malloc(sizeof(OverlayChunk))
    chunk = <OverlayChunk*> e.spares[taken % OVERLAY_SPARES]
    du_store_release(&e.spares_taken, taken + 1)
    return chunk


cdef uint64_t overlay_prepare(EngineState* e, uint64_t count) noexcept nogil:
    # In the reader's thread: up to `count` chunks more for the writer. Returns how many there was room for.
    cdef uint64_t done = 0
    cdef OverlayChunk* chunk
    while done < count and e.spares_made - du_load_acquire(&e.spares_taken) < OVERLAY_SPARES:
        chunk = <OverlayChunk*> malloc(sizeof(OverlayChunk))
        if chunk == NULL:
            break
        du_table_touch(chunk, sizeof(OverlayChunk))
        e.spares[e.spares_made % OVERLAY_SPARES] = <uint64_t> chunk
        du_store_release(&e.spares_made, e.spares_made + 1)
        done += 1
    return done


cdef bint image_prepare(EngineState* e) noexcept nogil:
    # Before image_begin: memory for what the writer will have to keep at once. True: there is more to do.
    cdef uint64_t wanted = (e.account_count + e.hold_slots) // OVERLAY_ENTRIES + 1
    cdef uint64_t have = e.spares_made - du_load_acquire(&e.spares_taken)
    return have < min(wanted, <uint64_t> OVERLAY_SPARES) and overlay_prepare(e, SPARES_A_PIECE) != 0


cdef void spares_free(EngineState* e) noexcept nogil:
    # No image is under way, and nobody begins one meanwhile.
    while e.spares_taken != e.spares_made:
        free(<void*> e.spares[e.spares_taken % OVERLAY_SPARES])
        e.spares_taken += 1


cdef OverlayEntry* overlay_add(EngineState* e, uint32_t kind, uint64_t position) noexcept nogil:
    cdef ImageState* image = e.image
    cdef OverlayChunk* chunk = <OverlayChunk*> image.newest
    cdef OverlayEntry* entry
    if chunk == NULL or chunk.count == OVERLAY_ENTRIES:
        chunk = overlay_chunk(e)
        if chunk == NULL:
            du_store_release(&image.failed, 1)
            return NULL
        chunk.count = 0
        chunk.older = <OverlayChunk*> image.newest
        du_store_release(&image.newest, <uint64_t> chunk)
    entry = &chunk.entries[chunk.count]
    entry.kind = kind
    entry.position = <uint32_t> position
    entry.serial = 0
    return entry


cdef inline void overlay_done(EngineState* e) noexcept nogil:
    # The entry is complete; only after this may the record change.
    cdef OverlayChunk* chunk = <OverlayChunk*> e.image.newest
    du_store_release(&chunk.count, chunk.count + 1)
    du_fence()


cdef inline void keep_record(EngineState* e, uint32_t kind, uint64_t position, uint64_t count, const uint64_t* done,
                             uint8_t* bits, const void* record) noexcept nogil:
    cdef OverlayEntry* entry
    if position >= count or position < du_load_acquire(done) or bits[position >> 3] >> (position & 7) & 1:
        return
    bits[position >> 3] |= <uint8_t> (1 << (position & 7))
    entry = overlay_add(e, kind, position)
    if entry != NULL:
        memcpy(entry.before, record, RECORD_BYTES)
        overlay_done(e)


cdef void image_keep_account(EngineState* e, uint64_t ordinal) noexcept nogil:
    keep_record(e, PIECE_ACCOUNTS, ordinal, e.image.account_count, &e.image.accounts_done, e.image.account_bits,
                &e.accounts[ordinal])


cdef void image_keep_hold(EngineState* e, uint64_t slot) noexcept nogil:
    keep_record(e, PIECE_HOLDS, slot, e.image.hold_slots, &e.image.holds_done, e.image.hold_bits, &e.holds[slot])


cdef void image_keep_id(EngineState* e, const IdEntry* id_entry) noexcept nogil:
    # Entries change seldom (a hold ends, a saga settles), so there is no bit for them: every change is kept.
    cdef ImageState* image = e.image
    cdef const Generation* g
    cdef OverlayEntry* entry
    cdef uint64_t i
    for i in range(image.generation_count):
        g = &image.generations[i]
        if g.entries <= id_entry < g.entries + g.count:
            if i < du_load_acquire(&image.generations_done):
                return
            entry = overlay_add(e, PIECE_IDS, <uint64_t> (id_entry - g.entries))
            if entry != NULL:
                memset(entry.before, 0, 64)
                entry.serial = image.header[16] + i
                memcpy(entry.before, &id_entry.meta, 8)
                overlay_done(e)
            return


cdef bint image_pins_generation(EngineState* e, const Generation* g) noexcept nogil:
    cdef uint64_t i
    if e.image == NULL:
        return False
    for i in range(e.image.generation_count):
        if e.image.generations[i].serial == g.serial:
            e.image.dropped[i] = 1
            return True
    return False


cdef int image_begin(EngineState* e) noexcept nogil:
    cdef ImageState* image
    cdef uint64_t i
    if e.poisoned:
        return ENGINE_POISONED
    if e.image != NULL:
        return ENGINE_REFUSED
    image = <ImageState*> calloc(1, sizeof(ImageState))
    if image == NULL:
        return ENGINE_REFUSED
    image.header[0] = IMAGE_VERSION
    image.header[1] = e.shard
    image.header[2] = e.sequence
    image.header[3] = e.now_ns
    image.header[4] = e.floor_ms
    image.header[5] = e.linear
    image.header[6] = e.chain
    image.header[7] = e.id_window_ms
    image.header[8] = e.generation_count_max
    image.header[9] = e.generation_ids
    image.header[10] = e.accounts_max
    image.header[11] = e.holds_max
    image.header[12] = e.unsettled_max
    image.header[13] = e.account_count
    image.header[14] = e.hold_slots
    image.header[15] = e.generation_count
    image.header[16] = e.generation_serial - e.generation_count     # in an image serials have no gaps
    image.header[17] = e.early_count
    image.account_count = e.account_count
    image.hold_slots = e.hold_slots
    image.generation_count = e.generation_count
    image.stage = PIECE_HEADER
    e.image = image
    image.account_bits = <uint8_t*> du_table_new(image.account_count // 8 + 1, &e.budget)
    image.hold_bits = <uint8_t*> du_table_new(image.hold_slots // 8 + 1, &e.budget)
    image.generations = <Generation*> calloc(image.generation_count + 1, sizeof(Generation))
    image.dropped = <uint8_t*> calloc(image.generation_count + 1, 1)
    if image.account_bits == NULL or image.hold_bits == NULL or image.generations == NULL or image.dropped == NULL:
        image_end(e)
        return ENGINE_REFUSED
    memcpy(image.generations, e.generations, image.generation_count * sizeof(Generation))
    for i in range(SHARD_COUNT_MAX):
        if image_begin_queue(&image.queues[i], &e.sends[i]) < 0 or image_begin_cursor(&image.cursors[i], &e.cursors[i]) < 0:
            image_end(e)
            return ENGINE_REFUSED
    return 0


cdef int image_begin_queue(ImageQueue* to, const SendQueue* q) noexcept nogil:
    cdef uint64_t chunk, last_chunk
    to.settled = q.settled
    to.last = q.last
    to.returned = q.returned
    if q.last == q.settled:
        return 0
    to.first_chunk = (q.settled + 1) // SEND_CHUNK
    last_chunk = q.last // SEND_CHUNK
    to.chunks = <SendChunk**> calloc(last_chunk - to.first_chunk + 1, sizeof(SendChunk*))
    if to.chunks == NULL:
        return -1
    for chunk in range(to.first_chunk, last_chunk + 1):
        to.chunks[chunk - to.first_chunk] = chunk_of(q, chunk)
    return 0


cdef int image_begin_cursor(ImageCursor* to, const CreditCursor* cursor) noexcept nogil:
    to.applied = cursor.applied
    to.count = cursor.last - cursor.first
    if to.count == 0:
        return 0
    to.refusals = <Refusal*> malloc(to.count * sizeof(Refusal))
    if to.refusals == NULL:
        return -1
    memcpy(to.refusals, cursor.refusals + cursor.first, to.count * sizeof(Refusal))
    return 0


cdef void image_end(EngineState* e) noexcept nogil:
    # The writer is done with it. What it held may be hundreds of megabytes, and giving them back takes the machine tens of
    # milliseconds: that is left to image_release in another thread.
    cdef ImageState* image = e.image
    cdef uint64_t i
    if image == NULL:
        return
    e.image = NULL
    for i in range(SHARD_COUNT_MAX):
        sends_trim(e, &e.sends[i])
    image_release(e)
    du_store_release(&e.image_ended, <uint64_t> image)


cdef void image_release(EngineState* e) noexcept nogil:
    # Frees the image that ended last. Any thread, and the writer if nobody did.
    cdef uint64_t ended = du_load_acquire(&e.image_ended)
    if ended != 0 and du_take(&e.image_ended, ended):
        image_free(e, <ImageState*> ended)


cdef void image_free(EngineState* e, ImageState* image) noexcept nogil:
    cdef OverlayChunk* chunk
    cdef OverlayChunk* older
    cdef uint64_t i
    chunk = <OverlayChunk*> image.newest
    while chunk != NULL:
        older = chunk.older
        free(chunk)
        chunk = older
    if image.account_bits != NULL:
        du_table_free(image.account_bits, image.account_count // 8 + 1, &e.budget)
    if image.hold_bits != NULL:
        du_table_free(image.hold_bits, image.hold_slots // 8 + 1, &e.budget)
    if image.dropped != NULL:
        for i in range(image.generation_count):
            if image.dropped[i]:
                generation_free(e, &image.generations[i])
    free(image.generations)
    free(image.dropped)
    for i in range(SHARD_COUNT_MAX):
        free(image.queues[i].chunks)
        free(image.cursors[i].refusals)
    free(image)


cdef int64_t piece_write(uint8_t* buffer, uint32_t kind, uint64_t index, uint64_t first, uint64_t count, const void* units,
                         uint64_t unit_bytes) noexcept nogil:
    cdef PieceHeader header
    header.magic = PIECE_MAGIC
    header.kind = kind
    header.index = index
    header.first = first
    header.count = count
    memcpy(buffer, &header, sizeof(PieceHeader))
    if count * unit_bytes:
        memcpy(buffer + sizeof(PieceHeader), units, count * unit_bytes)
    return <int64_t> (sizeof(PieceHeader) + count * unit_bytes)


cdef int64_t image_read(EngineState* e, uint8_t* buffer) noexcept nogil:
    cdef int64_t length = image_read_piece(e, buffer)
    if length > 0:
        e.image.pieces += 1
    return length


cdef int64_t image_read_piece(EngineState* e, uint8_t* buffer) noexcept nogil:
    # The next piece. May run beside the writer; touches nothing of the writer's but dense records and what begin kept.
    cdef ImageState* image = e.image
    cdef const Generation* g
    cdef ImageQueue* q
    cdef ImageCursor* cursor
    cdef PendingSend* out
    cdef OverlayChunk* chunk
    cdef uint64_t first, count, i
    cdef int64_t length
    if image == NULL or du_load_acquire(&image.failed):
        return ENGINE_REFUSED
    if image.stage < PIECE_CURSOR:
        overlay_prepare(e, SPARES_A_PIECE)
    if image.stage == PIECE_HEADER:
        du_table_populate(image.account_bits, image.account_count // 8 + 1)
        du_table_populate(image.hold_bits, image.hold_slots // 8 + 1)
        image.stage = PIECE_ACCOUNTS
        return piece_write(buffer, PIECE_HEADER, 0, 0, HEADER_WORDS, image.header, 8)
    if image.stage == PIECE_ACCOUNTS:
        first = image.accounts_done
        if first < image.account_count:
            count = min(image.account_count - first, <uint64_t> (PIECE_PAYLOAD // RECORD_BYTES))
            length = piece_write(buffer, PIECE_ACCOUNTS, 0, first, count, &e.accounts[first], RECORD_BYTES)
            du_fence()
            du_store_release(&image.accounts_done, first + count)
            return length
        image.stage = PIECE_IDS
    if image.stage == PIECE_IDS:
        if image.generations_done < image.generation_count:
            g = &image.generations[image.generations_done]
            first = image.first
            count = min(g.count - first, <uint64_t> (PIECE_PAYLOAD // sizeof(IdEntry)))
            length = piece_write(buffer, PIECE_IDS, image.header[16] + image.generations_done, first, count,
                                 g.entries + first, sizeof(IdEntry))
            image.first += count
            if image.first == g.count:
                image.first = 0
                du_fence()
                du_store_release(&image.generations_done, image.generations_done + 1)
            return length
        image.stage = PIECE_HOLDS
    if image.stage == PIECE_HOLDS:
        first = image.holds_done
        if first < image.hold_slots:
            count = min(image.hold_slots - first, <uint64_t> (PIECE_PAYLOAD // RECORD_BYTES))
            length = piece_write(buffer, PIECE_HOLDS, 0, first, count, &e.holds[first], RECORD_BYTES)
            du_fence()
            du_store_release(&image.holds_done, first + count)
            return length
        image.stage = PIECE_SPAN
    if image.stage == PIECE_SPAN:
        while image.index < SHARD_COUNT_MAX and image.queues[image.index].last == 0:
            image.index += 1
        if image.index < SHARD_COUNT_MAX:
            q = &image.queues[image.index]
            image.index += 1
            return piece_write(buffer, PIECE_SPAN, image.index - 1, 0, 3, &q.settled, 8)
        image.index = 0
        image.first = 0
        image.stage = PIECE_SENDS
    if image.stage == PIECE_SENDS:
        while image.index < SHARD_COUNT_MAX:
            q = &image.queues[image.index]
            if image.first == 0:
                image.first = q.settled + 1
            if image.first > q.last:
                image.index += 1
                image.first = 0
                continue
            first = image.first
            count = min(q.last - first + 1, <uint64_t> (PIECE_PAYLOAD_MAX // sizeof(PendingSend)))
            length = piece_write(buffer, PIECE_SENDS, image.index, first, count, NULL, 0)
            out = <PendingSend*> (buffer + sizeof(PieceHeader))
            for i in range(count):
                memcpy(&out[i], &q.chunks[(first + i) // SEND_CHUNK - q.first_chunk].sends[(first + i) % SEND_CHUNK],
                       sizeof(PendingSend))
            image.first += count
            return length + <int64_t> (count * sizeof(PendingSend))
        image.index = 0
        image.first = 0
        image.stage = PIECE_CURSOR
    if image.stage == PIECE_CURSOR:
        while image.index < SHARD_COUNT_MAX:
            cursor = &image.cursors[image.index]
            if cursor.applied == 0 or (image.first and image.first == cursor.count):
                image.index += 1
                image.first = 0
                continue
            first = image.first
            count = min(cursor.count - first, <uint64_t> (PIECE_PAYLOAD_MAX // sizeof(Refusal)))
            length = piece_write(buffer, PIECE_CURSOR, image.index, cursor.applied, count, cursor.refusals + first,
                                 sizeof(Refusal))
            image.first += count
            if image.first == cursor.count:
                image.index += 1
                image.first = 0
            return length
        image.stage = PIECE_OVERLAY
        du_fence()
        image.overlay = <OverlayChunk*> du_load_acquire(&image.newest)
        if du_load_acquire(&image.failed):
            return ENGINE_REFUSED
    if image.stage == PIECE_OVERLAY:
        chunk = image.overlay
        if chunk != NULL:
            image.overlay = chunk.older
            return piece_write(buffer, PIECE_OVERLAY, 0, 0, du_load_acquire(&chunk.count), chunk.entries,
                               sizeof(OverlayEntry))
        image.stage = PIECE_END
        return piece_write(buffer, PIECE_END, 0, image.pieces, 0, NULL, 0)
    return 0


# Loading. Everything that comes in is checked: an image may be damaged or of another version.

cdef int image_load_header(EngineState* e, const uint64_t* words, uint64_t count) noexcept nogil:
    cdef uint64_t early_count = words[17] if words[0] == IMAGE_VERSION else 0
    if (count != (HEADER_WORDS_1 if words[0] == 1 else HEADER_WORDS) or words[0] == 0 or words[0] > IMAGE_VERSION
            or words[1] != e.shard or e.load_stage != 0):
        return ENGINE_REFUSED
    if (words[8] < 2 or words[8] > 1 << 20 or words[9] == 0 or words[9] > 1 << 20 or words[10] == 0 or words[10] > 1 << 30
            or words[11] == 0 or words[11] > 1 << 30 or words[13] > words[10] or words[14] > words[11]
            or words[15] > words[8] or early_count > words[15]):
        return ENGINE_REFUSED
    memory_forget(e)                        # generations may have another size here
    if state_configure(e, words[7], words[8], words[9], words[10], words[11], words[12]) < 0:
        return ENGINE_POISONED
    e.sequence = words[2]
    e.now_ns = words[3]
    e.now_ms = words[3] // 1000000
    e.floor_ms = words[4]
    e.load_linear = words[5]
    e.chain = words[6]
    e.load_accounts = words[13]
    e.load_holds = words[14]
    e.load_generations = words[15]
    e.generation_serial = words[16]
    e.load_early = early_count
    e.load_stage = PIECE_HEADER
    e.load_pieces = 1
    return 0


cdef int image_load_ids(EngineState* e, uint64_t serial, uint64_t first, uint64_t count, const void* units) noexcept nogil:
    cdef Generation* g
    if first == 0:
        if serial != e.generation_serial or e.generation_count == e.load_generations:
            return ENGINE_REFUSED
        if generation_open(e, False) < 0:
            return poison(e)
    if e.generation_count == 0:
        return ENGINE_REFUSED
    g = &e.generations[e.generation_count - 1]
    if g.serial != serial or g.count != first or count == 0 or count > e.generation_ids - first:
        return ENGINE_REFUSED
    memcpy(g.entries + first, units, count * sizeof(IdEntry))
    g.count += count
    return 0


cdef int image_load_sends(EngineState* e, uint64_t destination, uint64_t first, uint64_t count,
                          const PendingSend* sends) noexcept nogil:
    cdef PendingSend send
    cdef SendQueue* q
    cdef uint64_t i, credit0, credit1
    if destination >= SHARD_COUNT_MAX:
        return ENGINE_REFUSED
    q = &e.sends[destination]
    for i in range(count):
        memcpy(&send, &sends[i], sizeof(PendingSend))
        if send.number != q.last + 1 or send.number != first + i or send.debit_ordinal >= e.account_count:
            return ENGINE_REFUSED
        if send_add(e, destination, send.sequence, du_load64(send.id), du_load64(send.id + 8), du_load64(send.credit_id),
                    du_load64(send.credit_id + 8), send.amount, send.debit_ordinal, send.code) < 0:
            return poison(e)
        # account records may still be torn, the send's own field is not
        send_at(q, send.number).currency = send.currency
    return 0


cdef int image_load_overlay(EngineState* e, uint64_t count, const OverlayEntry* entries) noexcept nogil:
    cdef OverlayEntry entry
    cdef Generation* g
    cdef uint64_t at
    while count > 0:
        count -= 1
        memcpy(&entry, &entries[count], sizeof(OverlayEntry))
        if entry.kind == PIECE_ACCOUNTS and entry.position < e.account_count:
            memcpy(&e.accounts[entry.position], entry.before, RECORD_BYTES)
        elif entry.kind == PIECE_HOLDS and entry.position < e.hold_slots:
            memcpy(&e.holds[entry.position], entry.before, RECORD_BYTES)
        elif entry.kind == PIECE_IDS and e.generation_count:
            at = entry.serial - e.generations[0].serial
            if at >= e.generation_count or entry.position >= e.generations[at].count:
                return ENGINE_REFUSED
            g = &e.generations[at]
            memcpy(&g.entries[entry.position].meta, entry.before, 8)
        else:
            return ENGINE_REFUSED
    return 0


cdef int image_load_piece(EngineState* e, const uint8_t* piece, uint64_t length) noexcept nogil:
    cdef PieceHeader header
    cdef uint64_t unit
    cdef uint64_t span[3]
    cdef const uint8_t* units
    cdef CreditCursor* cursor
    cdef Refusal refusal
    cdef uint64_t i
    if e.poisoned:
        return ENGINE_POISONED
    if length < sizeof(PieceHeader) or length > IMAGE_PIECE_BYTES_MAX:
        return ENGINE_REFUSED
    memcpy(&header, piece, sizeof(PieceHeader))
    units = piece + sizeof(PieceHeader)
    if header.magic != PIECE_MAGIC or header.kind == 0 or header.kind > PIECE_END:
        return ENGINE_REFUSED
    unit = (8 if header.kind == PIECE_HEADER or header.kind == PIECE_SPAN
            else sizeof(IdEntry) if header.kind == PIECE_IDS
            else sizeof(PendingSend) if header.kind == PIECE_SENDS
            else sizeof(Refusal) if header.kind == PIECE_CURSOR
            else sizeof(OverlayEntry) if header.kind == PIECE_OVERLAY
            else RECORD_BYTES)
    if header.count > PIECE_PAYLOAD_MAX or length != sizeof(PieceHeader) + header.count * unit:
        return ENGINE_REFUSED
    if header.kind == PIECE_HEADER:
        if header.count > HEADER_WORDS or header.count < HEADER_WORDS_1:
            return ENGINE_REFUSED
        memcpy(e.load_header, units, header.count * 8)
        return image_load_header(e, e.load_header, header.count)
    if e.load_stage == 0 or e.load_stage == PIECE_END or header.kind < e.load_stage:
        return ENGINE_REFUSED
    e.load_stage = header.kind
    e.load_pieces += 1
    if header.kind == PIECE_ACCOUNTS:
        if header.first != e.account_count or header.count > e.load_accounts - e.account_count:
            return ENGINE_REFUSED
        if du_arena_commit(&e.accounts_memory, (header.first + header.count) * sizeof(Account), &e.budget) < 0:
            return poison(e)
        memcpy(&e.accounts[header.first], units, header.count * RECORD_BYTES)
        e.account_count += header.count
        return 0
    if header.kind == PIECE_IDS:
        return image_load_ids(e, header.index, header.first, header.count, units)
    if header.kind == PIECE_HOLDS:
        if header.first != e.hold_slots or header.count > e.load_holds - e.hold_slots:
            return ENGINE_REFUSED
        if du_arena_commit(&e.holds_memory, (header.first + header.count) * sizeof(Hold), &e.budget) < 0:
            return poison(e)
        memcpy(&e.holds[header.first], units, header.count * RECORD_BYTES)
        e.hold_slots += header.count
        return 0
    if header.kind == PIECE_SPAN:
        if header.index >= SHARD_COUNT_MAX or header.count != 3:
            return ENGINE_REFUSED
        memcpy(span, units, 24)
        if span[0] > span[1] or span[2] > span[1]:
            return ENGINE_REFUSED
        # the sends that follow lead up to last
        e.sends[header.index].settled = span[0]
        e.sends[header.index].last = span[0]
        e.sends[header.index].returned = span[2]
        e.load_last[header.index] = span[1]
        return 0
    if header.kind == PIECE_SENDS:
        return image_load_sends(e, header.index, header.first, header.count, <const PendingSend*> units)
    if header.kind == PIECE_CURSOR:
        if header.index >= SHARD_COUNT_MAX or header.index == e.shard:
            return ENGINE_REFUSED
        cursor = &e.cursors[header.index]
        if cursor.applied and (cursor.applied != header.first or header.count == 0):
            return ENGINE_REFUSED
        cursor.applied = header.first
        for i in range(header.count):
            memcpy(&refusal, units + i * sizeof(Refusal), sizeof(Refusal))
            if refusal.number > cursor.applied or refusal.result <= OK or (
                    cursor.last and refusal.number <= cursor.refusals[cursor.last - 1].number):
                return ENGINE_REFUSED
            if refusal_add(cursor, refusal.number, refusal.result) < 0:
                return poison(e)
        return 0
    if header.kind == PIECE_OVERLAY:
        return image_load_overlay(e, header.count, <const OverlayEntry*> units)
    return 0 if header.first == e.load_pieces - 1 else ENGINE_REFUSED


cdef int image_load_done(EngineState* e) noexcept nogil:
    cdef uint64_t i
    if e.poisoned:
        return ENGINE_POISONED
    if (e.load_stage != PIECE_END or e.account_count != e.load_accounts or e.hold_slots != e.load_holds
            or e.generation_count != e.load_generations):
        return ENGINE_REFUSED
    for i in range(SHARD_COUNT_MAX):
        if e.sends[i].last != e.load_last[i]:
            return ENGINE_REFUSED
    if load_accounts_index(e) < 0 or load_ids(e) < 0 or load_holds(e) < 0:
        return poison(e)
    if not load_unsettled(e):
        e.replay_reason = b"sends of the image"
        poison(e)
        return ENGINE_REFUSED
    e.linear = linear_from_accounts(e)
    if e.linear != e.load_linear:
        e.replay_reason = b"digest of the image"
        poison(e)
        return ENGINE_REFUSED
    return 0


cdef int load_accounts_index(EngineState* e) noexcept nogil:
    cdef uint64_t i
    cdef uint64_t count = e.account_count
    cdef const Account* a
    if index_reserve(e, &e.accounts_index, count) < 0:
        return -1
    for i in range(count):
        if i + 24 < count:
            a = &e.accounts[i + 24]
            index_prefetch(&e.accounts_index, du_hash_id(a.id0, a.id1))
        a = &e.accounts[i]
        table_put(e.accounts_index.slots, e.accounts_index.bits, du_hash_id(a.id0, a.id1), i)
        if a.flags & IN_FLIGHT_ACCOUNT:
            if e.currency_count == CURRENCY_COUNT_MAX:
                return -1
            e.currencies[e.currency_count].currency = a.currency
            e.currencies[e.currency_count].in_flight = <uint32_t> i
            e.currency_count += 1
    e.accounts_index.used = count
    e.accounts_index.live = count
    return 0


cdef int load_ids(EngineState* e) noexcept nogil:
    cdef uint64_t i, k, hash, ms
    cdef Generation* g
    cdef const IdEntry* entry
    for k in range(e.generation_count):
        g = &e.generations[k]
        for i in range(g.count):
            if i + 16 < g.count:
                entry = &g.entries[i + 16]
                du_prefetch(&g.slots[id_bucket(e, du_hash_id(entry.id0, entry.id1))])
            entry = &g.entries[i]
            hash = du_hash_id(entry.id0, entry.id1)
            g.slots[bucket_free(e, g, hash)] = <uint32_t> (id_tag(hash) << 20 | i)
            ms = id_time_ms(entry.id0)
            g.min_ms = min(g.min_ms, ms)
            g.max_ms = max(g.max_ms, ms)
        e.id_count += g.count
    e.early_count = e.load_early
    generations_relink(e)
    return 0


cdef bint load_unsettled(EngineState* e) noexcept nogil:
    # Adds up what is under way. False: a send that no engine would have let go.
    cdef uint64_t i, number
    cdef const PendingSend* send
    cdef Currency* currency
    for i in range(SHARD_COUNT_MAX):
        for number in range(e.sends[i].settled + 1, e.sends[i].last + 1):
            send = send_at(&e.sends[i], number)
            currency = currency_find(e, send.currency)
            if currency == NULL or du_amount_invalid(send.amount) or unsettled_overflows(currency, send.amount):
                return False
            currency.unsettled += send.amount
    return True


cdef int load_holds(EngineState* e) noexcept nogil:
    # Free slots are linked anew, lowest first.
    cdef uint64_t slot = e.hold_slots
    cdef Hold* hold
    # a position must fit the bits of its index, however few of the slots are in use
    if index_reserve(e, &e.holds_by_id, slot) < 0 or index_reserve(e, &e.holds_by_sequence, slot) < 0:
        return -1
    while slot > 0:
        slot -= 1
        hold = &e.holds[slot]
        if hold.sequence == 0:
            memset(hold, 0, sizeof(Hold))
            hold.heap_position = e.hold_free
            e.hold_free = <uint32_t> slot
            continue
        if hold.debit >= e.account_count or hold.credit >= e.account_count or hold.flags & ~CHAIN:
            return -1
        hold.heap_position = NONE
        if (index_insert(e, &e.holds_by_id, du_hash_id(hold.id0, hold.id1), slot) < 0
                or index_insert(e, &e.holds_by_sequence, sequence_hash(hold.sequence), slot) < 0):
            return -1
        if hold.deadline_ms != 0 and heap_push(e, <uint32_t> slot) < 0:
            return -1
        e.hold_count += 1
    return 0
