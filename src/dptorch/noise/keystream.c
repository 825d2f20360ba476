/* The AES-256 counter-mode keystream of dptorch.noise.keystream, on processors with AES
   instructions. Block i is the encryption of i as a 128-bit big-endian number. */

#include "kernels.h"

int units_found(void) { return units_of_the_processor(); }

#if defined(__x86_64__)

#define ONE __attribute__((target("aes,sse4.1")))
#define TWO __attribute__((target("vaes,aes,avx2")))
#define FOUR __attribute__((target("vaes,aes,avx512f")))
#define LANES 8 /* in flight: an instruction takes several cycles, and they overlap */
/* Number i < 32 as the last byte of a block's number, where the number of the first is a multiple of
   32: nothing is carried, and one exclusive or replaces the conversion of each number. */
#define PLACE(i) ((int64_t)((uint64_t)(i) << 56))

/* FIPS 197, section 5.2, for 8 words of key: every second round key also takes the S-box. */
ONE static inline __m128i next_key(__m128i key, __m128i mixed) {
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
    return _mm_xor_si128(key, mixed);
}

#define TWO_KEYS(i, constant)                                                             \
    k[i] = next_key(k[i - 2], _mm_shuffle_epi32(                                          \
                                  _mm_aeskeygenassist_si128(k[i - 1], constant), 0xff));  \
    if (i < 14)                                                                           \
        k[i + 1] = next_key(k[i - 1], _mm_shuffle_epi32(                                  \
                                          _mm_aeskeygenassist_si128(k[i], 0), 0xaa));

ONE void expand_key(const uint8_t secret[32], int units, Cipher *cipher) {
    __m128i k[16];
    k[0] = _mm_loadu_si128((const __m128i *)secret);
    k[1] = _mm_loadu_si128((const __m128i *)(secret + 16));
    TWO_KEYS(2, 0x01)
    TWO_KEYS(4, 0x02)
    TWO_KEYS(6, 0x04)
    TWO_KEYS(8, 0x08)
    TWO_KEYS(10, 0x10)
    TWO_KEYS(12, 0x20)
    TWO_KEYS(14, 0x40)
    memcpy(cipher->round_keys, k, sizeof cipher->round_keys);
    cipher->units = units;
}

ONE static void by_one(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    __m128i k[15], x[LANES];
    memcpy(k, cipher->round_keys, sizeof k);
    for (int64_t at = 0; at < blocks; at += LANES) {
        __m128i start = _mm_xor_si128(_mm_set_epi64x(__builtin_bswap64(first + at), 0), k[0]);
        for (int i = 0; i < LANES; i++) x[i] = _mm_xor_si128(start, _mm_set_epi64x(PLACE(i), 0));
        for (int round = 1; round < 14; round++)
            for (int i = 0; i < LANES; i++) x[i] = _mm_aesenc_si128(x[i], k[round]);
        for (int i = 0; i < LANES; i++)
            _mm_storeu_si128((__m128i *)(out + 16 * (at + i)), _mm_aesenclast_si128(x[i], k[14]));
    }
}

/* Two blocks in each instruction. */
TWO static void by_two(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    __m256i k[15], x[LANES];
    for (int i = 0; i < 15; i++)
        k[i] = _mm256_broadcastsi128_si256(((const __m128i *)cipher->round_keys)[i]);
    for (int64_t at = 0; at < blocks; at += 2 * LANES) {
        __m256i start = _mm256_broadcastsi128_si256(
            _mm_set_epi64x(__builtin_bswap64(first + at), 0));
        start = _mm256_xor_si256(start, k[0]);
        for (int i = 0; i < LANES; i++)
            x[i] = _mm256_xor_si256(
                start, _mm256_set_epi64x(PLACE(2 * i + 1), 0, PLACE(2 * i), 0));
        for (int round = 1; round < 14; round++)
            for (int i = 0; i < LANES; i++) x[i] = _mm256_aesenc_epi128(x[i], k[round]);
        for (int i = 0; i < LANES; i++)
            _mm256_storeu_si256((__m256i *)(out + 16 * (at + 2 * i)),
                                _mm256_aesenclast_epi128(x[i], k[14]));
    }
}

/* Four. */
FOUR static void by_four(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    __m512i k[15], x[LANES];
    for (int i = 0; i < 15; i++)
        k[i] = _mm512_broadcast_i32x4(((const __m128i *)cipher->round_keys)[i]);
    for (int64_t at = 0; at < blocks; at += 4 * LANES) {
        __m512i start = _mm512_broadcast_i32x4(
            _mm_set_epi64x(__builtin_bswap64(first + at), 0));
        start = _mm512_xor_si512(start, k[0]);
        for (int i = 0; i < LANES; i++)
            x[i] = _mm512_xor_si512(
                start, _mm512_set_epi64(PLACE(4 * i + 3), 0, PLACE(4 * i + 2), 0,
                                        PLACE(4 * i + 1), 0, PLACE(4 * i), 0));
        for (int round = 1; round < 14; round++)
            for (int i = 0; i < LANES; i++) x[i] = _mm512_aesenc_epi128(x[i], k[round]);
        for (int i = 0; i < LANES; i++)
            _mm512_storeu_si512(out + 16 * (at + 4 * i), _mm512_aesenclast_epi128(x[i], k[14]));
    }
}

void keystream(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    int units = cipher->units;
    if (units & VAES && units & AVX512) by_four(cipher, first, out, blocks);
    else if (units & VAES && units & AVX2) by_two(cipher, first, out, blocks);
    else by_one(cipher, first, out, blocks);
}

#else

void expand_key(const uint8_t secret[32], int units, Cipher *cipher) {
    (void)secret, (void)units, (void)cipher;
}
void keystream(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    (void)cipher, (void)first, (void)out, (void)blocks;
}

#endif
