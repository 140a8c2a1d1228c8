# CRC-32C (Castagnoli) in hardware with a software fallback, and SHA-256 for frame hashes. Included by _file.pyx.
#
# A body of 400 KB is summed in three interleaved lanes (the crc32 instruction has a latency of three cycles and a
# throughput of one); lanes are joined by advancing a CRC over a fixed number of zero bytes with four table look-ups
# (Mark Adler's method). SHA-256 runs over 96 header bytes a frame, so a plain C version is enough.

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    #define DUCAT_LANE_BYTES 2048
    static uint32_t ducat_crc_table[8][256];
    static uint32_t ducat_crc_advance[4][256];
    static int ducat_crc_hardware = 0;

    static uint32_t ducat_crc_multiply(const uint32_t *matrix, uint32_t vector) {
        uint32_t sum = 0;
        for (; vector; vector >>= 1, matrix++) if (vector & 1) sum ^= *matrix;
        return sum;
    }

    static void ducat_crc_setup(void) {
        for (uint32_t n = 0; n < 256; n++) {
            uint32_t crc = n;
            for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >> 1) ^ 0x82f63b78u : crc >> 1;
            ducat_crc_table[0][n] = crc;
        }
        for (uint32_t n = 0; n < 256; n++)
            for (int k = 1; k < 8; k++)
                ducat_crc_table[k][n] = (ducat_crc_table[k - 1][n] >> 8) ^ ducat_crc_table[0][ducat_crc_table[k - 1][n] & 255];
        /* the operator "one zero bit", squared log2(8 * lane bytes) times, is "one lane of zero bytes" */
        uint32_t odd[32], even[32], *from = odd, *to = even;
        odd[0] = 0x82f63b78u;
        for (int n = 1; n < 32; n++) odd[n] = 1u << (n - 1);
        for (size_t bits = 1; bits < 8 * (size_t)DUCAT_LANE_BYTES; bits <<= 1) {
            for (int n = 0; n < 32; n++) to[n] = ducat_crc_multiply(from, from[n]);
            uint32_t *swap = from; from = to; to = swap;
        }
        for (uint32_t n = 0; n < 256; n++)
            for (int k = 0; k < 4; k++) ducat_crc_advance[k][n] = ducat_crc_multiply(from, n << (8 * k));
    #if defined(__x86_64__)
        __builtin_cpu_init();
        ducat_crc_hardware = __builtin_cpu_supports("sse4.2") ? 1 : 0;
    #endif
    }

    static uint32_t ducat_crc32c_software(uint32_t crc, const uint8_t *data, size_t length) {
        uint64_t word, value = crc ^ 0xffffffffu;
        while (length && ((uintptr_t)data & 7)) {
            value = ducat_crc_table[0][(value ^ *data++) & 255] ^ (value >> 8);
            length--;
        }
        for (; length >= 8; data += 8, length -= 8) {
            memcpy(&word, data, 8);   /* little endian only: setup refuses anything else */
            value ^= word;
            value = ducat_crc_table[7][value & 255] ^ ducat_crc_table[6][(value >> 8) & 255]
                  ^ ducat_crc_table[5][(value >> 16) & 255] ^ ducat_crc_table[4][(value >> 24) & 255]
                  ^ ducat_crc_table[3][(value >> 32) & 255] ^ ducat_crc_table[2][(value >> 40) & 255]
                  ^ ducat_crc_table[1][(value >> 48) & 255] ^ ducat_crc_table[0][value >> 56];
        }
        while (length--) value = ducat_crc_table[0][(value ^ *data++) & 255] ^ (value >> 8);
        return (uint32_t)value ^ 0xffffffffu;
    }

    #if defined(__x86_64__)
    static inline uint32_t ducat_crc_shift(uint32_t crc) {
        return ducat_crc_advance[0][crc & 255] ^ ducat_crc_advance[1][(crc >> 8) & 255]
             ^ ducat_crc_advance[2][(crc >> 16) & 255] ^ ducat_crc_advance[3][crc >> 24];
    }

    __attribute__((target("sse4.2")))
    static uint32_t ducat_crc32c_hardware(uint32_t crc, const uint8_t *data, size_t length) {
        uint64_t a = crc ^ 0xffffffffu, word;
        while (length && ((uintptr_t)data & 7)) { a = __builtin_ia32_crc32qi((uint32_t)a, *data++); length--; }
        while (length >= 3 * DUCAT_LANE_BYTES) {
            uint64_t b = 0, c = 0, x, y, z;
            for (const uint8_t *end = data + DUCAT_LANE_BYTES; data < end; data += 8) {
                memcpy(&x, data, 8);
                memcpy(&y, data + DUCAT_LANE_BYTES, 8);
                memcpy(&z, data + 2 * DUCAT_LANE_BYTES, 8);
                a = __builtin_ia32_crc32di(a, x);
                b = __builtin_ia32_crc32di(b, y);
                c = __builtin_ia32_crc32di(c, z);
            }
            a = ducat_crc_shift((uint32_t)a) ^ b;
            a = ducat_crc_shift((uint32_t)a) ^ c;
            data += 2 * DUCAT_LANE_BYTES;
            length -= 3 * DUCAT_LANE_BYTES;
        }
        for (; length >= 8; data += 8, length -= 8) { memcpy(&word, data, 8); a = __builtin_ia32_crc32di(a, word); }
        while (length--) a = __builtin_ia32_crc32qi((uint32_t)a, *data++);
        return (uint32_t)a ^ 0xffffffffu;
    }
    #else
    #define ducat_crc32c_hardware ducat_crc32c_software
    #endif

    static uint32_t ducat_crc32c(uint32_t crc, const uint8_t *data, size_t length) {
        return ducat_crc_hardware ? ducat_crc32c_hardware(crc, data, length) : ducat_crc32c_software(crc, data, length);
    }

    static const uint32_t ducat_sha_k[64] = {
        0x428a2f98,0x71374491,0xb5c0fbcf,0xe9b5dba5,0x3956c25b,0x59f111f1,0x923f82a4,0xab1c5ed5,
        0xd807aa98,0x12835b01,0x243185be,0x550c7dc3,0x72be5d74,0x80deb1fe,0x9bdc06a7,0xc19bf174,
        0xe49b69c1,0xefbe4786,0x0fc19dc6,0x240ca1cc,0x2de92c6f,0x4a7484aa,0x5cb0a9dc,0x76f988da,
        0x983e5152,0xa831c66d,0xb00327c8,0xbf597fc7,0xc6e00bf3,0xd5a79147,0x06ca6351,0x14292967,
        0x27b70a85,0x2e1b2138,0x4d2c6dfc,0x53380d13,0x650a7354,0x766a0abb,0x81c2c92e,0x92722c85,
        0xa2bfe8a1,0xa81a664b,0xc24b8b70,0xc76c51a3,0xd192e819,0xd6990624,0xf40e3585,0x106aa070,
        0x19a4c116,0x1e376c08,0x2748774c,0x34b0bcb5,0x391c0cb3,0x4ed8aa4a,0x5b9cca4f,0x682e6ff3,
        0x748f82ee,0x78a5636f,0x84c87814,0x8cc70208,0x90befffa,0xa4506ceb,0xbef9a3f7,0xc67178f2};
    #define DUCAT_ROR(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

    /* SHA-256 of at most 119 bytes, cut to its first 16 */
    static void ducat_sha256_16(const uint8_t *data, size_t length, uint8_t *out) {
        uint8_t block[128];
        uint32_t h[8] = {0x6a09e667,0xbb67ae85,0x3c6ef372,0xa54ff53a,0x510e527f,0x9b05688c,0x1f83d9ab,0x5be0cd19};
        size_t total = length < 56 ? 64 : 128;
        memset(block, 0, sizeof block);
        memcpy(block, data, length);
        block[length] = 0x80;
        block[total - 2] = (uint8_t)((length * 8) >> 8);
        block[total - 1] = (uint8_t)(length * 8);
        for (size_t at = 0; at < total; at += 64) {
            uint32_t w[64], s[8];
            for (int i = 0; i < 16; i++) w[i] = (uint32_t)block[at+4*i] << 24 | (uint32_t)block[at+4*i+1] << 16
                                              | (uint32_t)block[at+4*i+2] << 8 | block[at+4*i+3];
            for (int i = 16; i < 64; i++)
                w[i] = w[i-16] + w[i-7] + (DUCAT_ROR(w[i-15], 7) ^ DUCAT_ROR(w[i-15], 18) ^ (w[i-15] >> 3))
                     + (DUCAT_ROR(w[i-2], 17) ^ DUCAT_ROR(w[i-2], 19) ^ (w[i-2] >> 10));
            memcpy(s, h, sizeof s);
            for (int i = 0; i < 64; i++) {
                uint32_t t1 = s[7] + (DUCAT_ROR(s[4], 6) ^ DUCAT_ROR(s[4], 11) ^ DUCAT_ROR(s[4], 25))
                            + ((s[4] & s[5]) ^ (~s[4] & s[6])) + ducat_sha_k[i] + w[i];
                uint32_t t2 = (DUCAT_ROR(s[0], 2) ^ DUCAT_ROR(s[0], 13) ^ DUCAT_ROR(s[0], 22))
                            + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
                s[7] = s[6]; s[6] = s[5]; s[5] = s[4]; s[4] = s[3] + t1;
                s[3] = s[2]; s[2] = s[1]; s[1] = s[0]; s[0] = t1 + t2;
            }
            for (int i = 0; i < 8; i++) h[i] += s[i];
        }
        for (int i = 0; i < 4; i++) {
            out[4*i] = (uint8_t)(h[i] >> 24); out[4*i+1] = (uint8_t)(h[i] >> 16);
            out[4*i+2] = (uint8_t)(h[i] >> 8); out[4*i+3] = (uint8_t)h[i];
        }
    }

    static int ducat_little_endian(void) { const uint16_t one = 1; return *(const uint8_t *)&one; }
    """
    void ducat_crc_setup() noexcept nogil
    uint32_t ducat_crc32c(uint32_t crc, const uint8_t* data, size_t length) noexcept nogil
    uint32_t ducat_crc32c_software(uint32_t crc, const uint8_t* data, size_t length) noexcept nogil
    void ducat_sha256_16(const uint8_t* data, size_t length, uint8_t* out) noexcept nogil
    int ducat_little_endian() noexcept nogil
    int ducat_crc_hardware
