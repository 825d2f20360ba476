/* The AES-256 counter-mode keystream of dptorch.noise.keystream, on processors with AES
   instructions. Block i is the encryption of i as a 128-bit big-endian number. */

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AES __attribute__((target("aes,sse4.1")))
#define WIDE __attribute__((target("vaes,aes,avx2")))
#define LANES 8 /* blocks in flight: an instruction takes several cycles, and they overlap */

int has_cipher(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("aes") && __builtin_cpu_supports("sse4.1");
}

static int has_wide_cipher(void) {
    return __builtin_cpu_supports("vaes") && __builtin_cpu_supports("avx2");
}

/* FIPS 197, section 5.2, for 8 words of key: every second round key also takes the S-box. */
AES static inline __m128i next_key(__m128i key, __m128i mixed) {
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

AES void expand_key(const uint8_t secret[32], Cipher *cipher) {
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
    cipher->wide = has_wide_cipher();
}

AES static void by_one(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    __m128i k[15], x[LANES];
    memcpy(k, cipher->round_keys, sizeof k);
    for (int64_t at = 0; at < blocks; at += LANES) {
        for (int i = 0; i < LANES; i++)
            x[i] = _mm_xor_si128(_mm_set_epi64x(__builtin_bswap64(first + at + i), 0), k[0]);
        for (int round = 1; round < 14; round++)
            for (int i = 0; i < LANES; i++) x[i] = _mm_aesenc_si128(x[i], k[round]);
        for (int i = 0; i < LANES; i++)
            _mm_storeu_si128((__m128i *)(out + 16 * (at + i)), _mm_aesenclast_si128(x[i], k[14]));
    }
}

/* Two blocks in each instruction. */
WIDE static void by_two(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    __m256i k[15], x[LANES];
    for (int i = 0; i < 15; i++)
        k[i] = _mm256_broadcastsi128_si256(((const __m128i *)cipher->round_keys)[i]);
    for (int64_t at = 0; at < blocks; at += 2 * LANES) {
        for (int i = 0; i < LANES; i++) {
            uint64_t n = first + at + 2 * i;
            x[i] = _mm256_set_epi64x(__builtin_bswap64(n + 1), 0, __builtin_bswap64(n), 0);
            x[i] = _mm256_xor_si256(x[i], k[0]);
        }
        for (int round = 1; round < 14; round++)
            for (int i = 0; i < LANES; i++) x[i] = _mm256_aesenc_epi128(x[i], k[round]);
        for (int i = 0; i < LANES; i++)
            _mm256_storeu_si256((__m256i *)(out + 16 * (at + 2 * i)),
                                _mm256_aesenclast_epi128(x[i], k[14]));
    }
}

void keystream(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    (cipher->wide ? by_two : by_one)(cipher, first, out, blocks);
}

#else

int has_cipher(void) { return 0; }
void expand_key(const uint8_t secret[32], Cipher *cipher) { (void)secret, (void)cipher; }
void keystream(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks) {
    (void)cipher, (void)first, (void)out, (void)blocks;
}

#endif
