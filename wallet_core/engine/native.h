/* What Cython cannot say: 128-bit products, checked arithmetic, prefetch, fences, memory that grows without moving.
 *
 * An arena reserves address space once (no memory) and is made usable from the front as it grows. So nothing is ever
 * copied, a pointer into it stays good, and there is no pause; where the machine refuses memory, commit says so.
 */
#ifndef DUCAT_ENGINE_NATIVE_H
#define DUCAT_ENGINE_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wallet engine reads its columns and records as little endian memory"
#endif

#define K0 0x9E3779B97F4A7C15ULL
#define K1 0xD1B54A32D192ED03ULL
#define K2 0xA0761D6478BD642FULL
#define K3 0xE7037ED1A0B428DBULL
#define K4 0x8EBC6AF09C88C6E3ULL
#define K5 0x589965CC75374CC3ULL
#define K6 0x1D8E4E27C47D124FULL
#define K7 0xEB44ACCAB455D165ULL

#define du_likely(x) __builtin_expect(!!(x), 1)
#define du_unlikely(x) __builtin_expect(!!(x), 0)

static inline uint64_t du_load64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline uint32_t du_load32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint16_t du_load16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline void du_store64(void *p, uint64_t v) { memcpy(p, &v, 8); }
static inline uint64_t du_bswap64(uint64_t v) { return __builtin_bswap64(v); }
/* The empty asm: gcc takes a function that only prefetches for one without effect, and leaves out the call. */
static inline void du_prefetch(const void *p) { __builtin_prefetch(p, 1, 3); __asm__ volatile ("" : : "r" (p)); }

/* Stores before are seen by whoever sees a store after. */
static inline void du_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline uint64_t du_load_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
/* p from v to 0, by one thread only */
static inline int du_take(uint64_t *p, uint64_t v) {
    return __atomic_compare_exchange_n(p, &v, 0, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline void du_store_release(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

static inline uint64_t du_mum(uint64_t a, uint64_t b) {
    unsigned __int128 p = (unsigned __int128)a * b;
    return (uint64_t)p ^ (uint64_t)(p >> 64);
}
/* hash * size / 2^64: a slot below size */
static inline uint64_t du_range(uint64_t hash, uint64_t size) {
    return (uint64_t)(((unsigned __int128)hash * size) >> 64);
}
/* Where an id falls in a table is different in every process, or a caller who chooses ids could let them all fall into one
 * place (32,760 such accounts took 7 s to open, the next ones longer each). It changes no result, record or digest. */
static uint64_t du_seed0 = K0, du_seed1 = K1;
__attribute__((constructor)) static void du_seed(void) {
#ifdef __linux__
    const uint8_t *random = (const uint8_t *)getauxval(AT_RANDOM);
    if (random) { du_seed0 ^= du_load64(random); du_seed1 ^= du_load64(random + 8); }
#endif
}
static inline uint64_t du_hash_id(uint64_t id0, uint64_t id1) { return du_mum(id0 ^ du_seed0, id1 ^ du_seed1); }

/* A bucket of 16 slots, one cache line. `match` has a bit for every slot whose tag (the upper 12 bits) is `tag`, `empty` for
 * every slot that is 0. Without a branch: which of 16 slots is the next free one cannot be guessed, and a wrong guess costs
 * more than all of them. */
typedef struct { uint32_t match, empty; } du_bucket;
static inline du_bucket du_bucket_look(const uint32_t *slots, uint32_t tag) {
    du_bucket found;
#ifdef __SSE2__
    const __m128i wanted = _mm_set1_epi32((int)tag), zero = _mm_setzero_si128();
    __m128i v0 = _mm_load_si128((const __m128i *)slots), v1 = _mm_load_si128((const __m128i *)slots + 1);
    __m128i v2 = _mm_load_si128((const __m128i *)slots + 2), v3 = _mm_load_si128((const __m128i *)slots + 3);
#define DU_NARROW(a, b, c, d) (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d)))
#define DU_TAG(v) _mm_cmpeq_epi32(_mm_srli_epi32(v, 20), wanted)
#define DU_ZERO(v) _mm_cmpeq_epi32(v, zero)
    found.match = DU_NARROW(DU_TAG(v0), DU_TAG(v1), DU_TAG(v2), DU_TAG(v3));
    found.empty = DU_NARROW(DU_ZERO(v0), DU_ZERO(v1), DU_ZERO(v2), DU_ZERO(v3));
#undef DU_NARROW
#undef DU_TAG
#undef DU_ZERO
#else
    found.match = found.empty = 0;
    for (uint32_t i = 0; i < 16; i++) {
        found.match |= (uint32_t)(slots[i] >> 20 == tag) << i;
        found.empty |= (uint32_t)(slots[i] == 0) << i;
    }
#endif
    return found;
}
static inline uint32_t du_first_bit(uint32_t bits) { return (uint32_t)__builtin_ctz(bits); }

/* docs/event-records.md: Fingerprint */
static inline uint64_t du_fingerprint(uint64_t d0, uint64_t d1, uint64_t c0, uint64_t c1, uint64_t amount, uint64_t w,
                                      uint64_t p0, uint64_t p1) {
    uint64_t h1 = du_mum(d0 ^ K0, d1 ^ K1), h2 = du_mum(c0 ^ K2, c1 ^ K3), h3 = du_mum(amount ^ K4, w ^ K5);
    if (du_unlikely((p0 | p1) != 0)) h3 ^= du_mum(p0 ^ K6, p1 ^ K7);
    return du_mum(h1 + h3, h2 ^ K1) >> 16;
}

/* docs/event-records.md: Digest */
static inline uint64_t du_weight_balance(uint64_t ordinal) { return du_mum(ordinal + K0, K1); }
static inline uint64_t du_weight_held_out(uint64_t ordinal) { return du_mum(ordinal + K0, K2); }
static inline uint64_t du_weight_held_in(uint64_t ordinal) { return du_mum(ordinal + K0, K3); }
static inline uint64_t du_weight_attributes(uint64_t ordinal) { return du_mum(ordinal + K0, K4); }
static inline uint64_t du_attributes(uint64_t id0, uint64_t id1, uint64_t currency, uint64_t flags, uint64_t overdraft,
                                     uint64_t limit) {
    return du_mum(id0 ^ K2, id1 ^ K3) + du_mum((currency | flags << 32) ^ K4, (overdraft * K5 + limit) ^ K6);
}
static inline uint64_t du_chain_records(uint64_t chain, const uint8_t *p, uint64_t count) {
    for (; count; count--, p += 48) {
        uint64_t r = du_mum(du_load64(p) ^ K0, du_load64(p + 8) ^ K1) ^ du_mum(du_load64(p + 16) ^ K2, du_load64(p + 24) ^ K3)
                   ^ du_mum(du_load64(p + 32) ^ K4, du_load64(p + 40) ^ K5);
        chain = du_mum(chain ^ r, K6) + K7;
    }
    return chain;
}

/* Money. An amount is 1 to DU_AMOUNT_MAX. A command may bring balance - held_out down to -DU_AMOUNT_MAX and
 * balance + held_in up to DU_AMOUNT_MAX; the other half of int64 is kept for sends that come back, of which at most
 * DU_UNSETTLED_MAX a currency are under way, so that a return always fits (docs/event-records.md, Limits). Hence none of
 * the sums below overflows. held_in needs no guard of its own: it is at most 2 * DU_AMOUNT_MAX, because no balance that
 * can be held for is below -DU_AMOUNT_MAX. */
#define DU_AMOUNT_MAX (((int64_t)1 << 62) - 1)
#define DU_UNSETTLED_MAX ((int64_t)1 << 62)
static inline int du_amount_invalid(int64_t amount) { return (uint64_t)amount - 1 >= (uint64_t)DU_AMOUNT_MAX; }
static inline int du_debit_overflows(int64_t balance, int64_t held_out, int64_t amount) {
    return balance - held_out < amount - DU_AMOUNT_MAX || held_out > INT64_MAX - amount;
}
static inline int du_credit_overflows(int64_t balance, int64_t held_in, int64_t amount) {
    return balance + held_in > DU_AMOUNT_MAX - amount;
}
/* What every history keeps true when a send comes back. */
static inline int du_return_fits(int64_t balance, int64_t held_in, int64_t in_flight, int64_t amount) {
    int64_t t;
    return (__int128)balance + held_in + amount <= INT64_MAX && !__builtin_sub_overflow(in_flight, amount, &t);
}
static inline int du_funds_short(int64_t balance, int64_t held_out, int64_t overdraft, int64_t amount) {
    return (__int128)balance - held_out + overdraft < amount;
}
static inline int du_limit_exceeded(int64_t balance, int64_t held_in, int64_t limit, int64_t amount) {
    return limit != 0 && (__int128)balance + held_in + amount > limit;
}
static inline int64_t du_clamp(__int128 room, int64_t amount) {
    return room < 0 ? 0 : room < amount ? (int64_t)room : amount;
}
static inline int64_t du_within_funds(int64_t balance, int64_t held_out, int64_t overdraft, int64_t amount) {
    return du_clamp((__int128)balance - held_out + overdraft, amount);
}
static inline int64_t du_within_limit(int64_t balance, int64_t held_in, int64_t limit, int64_t amount) {
    return du_clamp((__int128)limit - balance - held_in, amount);
}

/* Memory. A budget counts what is committed; bytes_max 0 = as much as the machine gives. */
typedef struct { uint64_t bytes, bytes_max; } du_budget;
typedef struct { uint8_t *base; uint64_t reserved, committed, touched; } du_arena;

#define DU_HUGE ((uint64_t)2 << 20)
#define DU_PAGE ((uint64_t)64 << 10)

/* Atomic: memory is also prepared by another thread than the writer's. */
static inline void du_budget_give(du_budget *budget, uint64_t bytes) {
    __atomic_fetch_sub(&budget->bytes, bytes, __ATOMIC_RELAXED);
}
static inline int du_budget_take(du_budget *budget, uint64_t bytes) {
    uint64_t now = __atomic_add_fetch(&budget->bytes, bytes, __ATOMIC_RELAXED);
    if (budget->bytes_max && now > budget->bytes_max) { du_budget_give(budget, bytes); return -1; }
    return 0;
}

static inline int du_arena_open(du_arena *arena, uint64_t bytes) {
    uint64_t reserved = ((bytes + DU_HUGE - 1) & ~(DU_HUGE - 1)) + DU_HUGE;
    void *p = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { memset(arena, 0, sizeof *arena); return -1; }
    uint64_t lead = (DU_HUGE - ((uint64_t)(uintptr_t)p & (DU_HUGE - 1))) & (DU_HUGE - 1);
    if (lead) munmap(p, lead);
    arena->base = (uint8_t *)p + lead;
    arena->reserved = reserved - lead;
    arena->committed = arena->touched = 0;
    return 0;
}
static inline void du_arena_close(du_arena *arena) {
    if (arena->base) munmap(arena->base, arena->reserved);
    memset(arena, 0, sizeof *arena);
}
/* Doubles up to 32 MiB a step, so that a small engine stays small and a large one asks seldom. What du_arena_touch has made
 * usable is taken without asking: the kernel would let us wait while other memory of the process is being found. */
static inline int du_arena_commit(du_arena *arena, uint64_t bytes, du_budget *budget) {
    if (du_likely(bytes <= arena->committed)) return 0;
    uint64_t touched = __atomic_load_n(&arena->touched, __ATOMIC_ACQUIRE);
    if (bytes <= touched && !du_budget_take(budget, touched - arena->committed)) {
        arena->committed = touched;
        return 0;
    }
    uint64_t step = arena->committed < DU_PAGE ? DU_PAGE : arena->committed;
    if (step > 16 * DU_HUGE) step = 16 * DU_HUGE;
    uint64_t wanted = arena->committed + step;
    if (wanted < bytes) wanted = bytes;
    wanted = (wanted + DU_PAGE - 1) & ~(DU_PAGE - 1);
    if (wanted > arena->reserved) wanted = arena->reserved;
    if (wanted < bytes || du_budget_take(budget, wanted - arena->committed)) return -1;
    if (mprotect(arena->base + arena->committed, wanted - arena->committed, PROT_READ | PROT_WRITE)) return -1;
#ifdef MADV_HUGEPAGE
    if (wanted >= 2 * DU_HUGE) {
        uint64_t from = arena->committed < 2 * DU_HUGE ? 0 : arena->committed;
        madvise(arena->base + (from & ~(DU_HUGE - 1)), wanted - (from & ~(DU_HUGE - 1)), MADV_HUGEPAGE);
    }
#endif
    arena->committed = wanted;
    return 0;
}

/* A zeroed table. */
static inline void *du_table_new(uint64_t bytes, du_budget *budget) {
    if (du_budget_take(budget, bytes)) return NULL;
    uint64_t lead = 0, size = bytes;
    if (bytes >= DU_HUGE) size = bytes + DU_HUGE;
    uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { du_budget_give(budget, bytes); return NULL; }
    if (bytes >= DU_HUGE) {
        lead = (DU_HUGE - ((uint64_t)(uintptr_t)p & (DU_HUGE - 1))) & (DU_HUGE - 1);
        uint64_t used = (bytes + 4095) & ~(uint64_t)4095;
        if (lead) munmap(p, lead);
        if (size - lead > used) munmap(p + lead + used, size - lead - used);
        p += lead;
#ifdef MADV_HUGEPAGE
        madvise(p, used, MADV_HUGEPAGE);
#endif
    }
    return p;
}
static inline void du_table_free(void *p, uint64_t bytes, du_budget *budget) {
    if (!p) return;
    munmap(p, (bytes + 4095) & ~(uint64_t)4095);
    du_budget_give(budget, bytes);
}

/* Makes the machine find the pages of a table now. */
static inline void du_table_touch(void *p, uint64_t bytes) {
    for (uint64_t i = 0; i < bytes; i += 4096) ((volatile uint8_t *)p)[i] = 0;
}
/* The same for memory that another thread may be using; best effort. */
static inline void du_table_populate(void *p, uint64_t bytes) {
#ifdef MADV_POPULATE_WRITE
    madvise(p, (bytes + 4095) & ~(uint64_t)4095, MADV_POPULATE_WRITE);
#else
    (void)p; (void)bytes;
#endif
}
/* The same for a part of an arena, which the writer may be using; best effort. In pieces, since whoever maps memory meanwhile
 * waits for one of them. */
static inline void du_arena_touch(du_arena *arena, uint64_t from, uint64_t to) {
#ifdef MADV_POPULATE_WRITE
    from &= ~(DU_HUGE - 1);
    to = (to + DU_HUGE - 1) & ~(DU_HUGE - 1);
    if (to > arena->reserved) to = arena->reserved;
    if (from >= to || mprotect(arena->base + from, to - from, PROT_READ | PROT_WRITE)) return;
    madvise(arena->base + from, to - from, MADV_HUGEPAGE);
    for (uint64_t at = from; at < to; at += DU_HUGE)
        madvise(arena->base + at, to - at < DU_HUGE ? to - at : DU_HUGE, MADV_POPULATE_WRITE);
    uint64_t usable = __atomic_load_n(&arena->committed, __ATOMIC_RELAXED); /* only grows */
    if (usable < arena->touched) usable = arena->touched;
    if (from <= usable && to > arena->touched) __atomic_store_n(&arena->touched, to, __ATOMIC_RELEASE);
#else
    (void)arena; (void)from; (void)to;
#endif
}

#endif
