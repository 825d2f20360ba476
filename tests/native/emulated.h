/* The vector instructions that the C sources of dptorch use, in plain C, by Intel's intrinsics guide
   and FIPS 197: for a processor that has none of them. */

#ifndef DPTORCH_EMULATED_H
#define DPTORCH_EMULATED_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A vector of so many octets, by the lanes that it may have. */
#define VECTOR(name, size)                                                                    \
    typedef union {                                                                           \
        uint8_t u8[size];                                                                     \
        uint32_t u32[size / 4];                                                               \
        uint64_t u64[size / 8];                                                               \
        float f32[size / 4];                                                                  \
        double f64[size / 8];                                                                 \
    } name;
VECTOR(__m128, 16)
VECTOR(__m128i, 16)
VECTOR(__m256, 32)
VECTOR(__m256d, 32)
VECTOR(__m256i, 32)
VECTOR(__m512, 64)
VECTOR(__m512d, 64)
VECTOR(__m512i, 64)
typedef uint16_t __mmask16;

/* An instruction whose lane i is `value`. */
#define LANEWISE(type, name, parameters, lane, value)                                         \
    static inline type name parameters {                                                      \
        type r;                                                                               \
        for (int i = 0; i < (int)(sizeof r / sizeof *r.lane); i++) r.lane[i] = value;         \
        return r;                                                                             \
    }
/* One that copies octets. */
#define LOAD(type, name, from)                                                                \
    static inline type name(from *p) { type r; memcpy(&r, p, sizeof r); return r; }
#define STORE(type, name, to)                                                                 \
    static inline void name(to *p, type a) { memcpy(p, &a, sizeof a); }
#define CAST(type, name, from)                                                                \
    static inline type name(from a) { type r; memcpy(&r, &a, sizeof r); return r; }

LOAD(__m128i, _mm_loadu_si128, const __m128i)
LOAD(__m256i, _mm256_loadu_si256, const __m256i)
LOAD(__m512i, _mm512_loadu_si512, const void)
LOAD(__m128, _mm_loadu_ps, const float)
LOAD(__m256, _mm256_loadu_ps, const float)
LOAD(__m256d, _mm256_loadu_pd, const double)
LOAD(__m512d, _mm512_loadu_pd, const double)
STORE(__m128i, _mm_storeu_si128, __m128i)
STORE(__m256i, _mm256_storeu_si256, __m256i)
STORE(__m512i, _mm512_storeu_si512, void)
STORE(__m128, _mm_storeu_ps, float)
STORE(__m256, _mm256_storeu_ps, float)
STORE(__m256d, _mm256_storeu_pd, double)
STORE(__m512d, _mm512_storeu_pd, double)
CAST(__m128, _mm256_castps256_ps128, __m256)
CAST(__m256, _mm512_castps512_ps256, __m512)
CAST(__m512, _mm512_castpd_ps, __m512d)
CAST(__m512d, _mm512_castps_pd, __m512)

/* Integers. */
LANEWISE(__m256i, _mm256_setzero_si256, (void), u64, 0)
LANEWISE(__m512i, _mm512_setzero_si512, (void), u64, 0)
LANEWISE(__m128i, _mm_xor_si128, (__m128i a, __m128i b), u64, a.u64[i] ^ b.u64[i])
LANEWISE(__m256i, _mm256_xor_si256, (__m256i a, __m256i b), u64, a.u64[i] ^ b.u64[i])
LANEWISE(__m512i, _mm512_xor_si512, (__m512i a, __m512i b), u64, a.u64[i] ^ b.u64[i])
LANEWISE(__m256i, _mm256_add_epi32, (__m256i a, __m256i b), u32, a.u32[i] + b.u32[i])
LANEWISE(__m512i, _mm512_add_epi32, (__m512i a, __m512i b), u32, a.u32[i] + b.u32[i])
LANEWISE(__m256i, _mm256_add_epi64, (__m256i a, __m256i b), u64, a.u64[i] + b.u64[i])
LANEWISE(__m512i, _mm512_add_epi64, (__m512i a, __m512i b), u64, a.u64[i] + b.u64[i])
LANEWISE(__m256i, _mm256_mul_epu32, (__m256i a, __m256i b), u64, (uint64_t)a.u32[2 * i] * b.u32[2 * i])
LANEWISE(__m512i, _mm512_mul_epu32, (__m512i a, __m512i b), u64, (uint64_t)a.u32[2 * i] * b.u32[2 * i])
LANEWISE(__m256i, _mm256_srli_epi64, (__m256i a, int n), u64, a.u64[i] >> n)
LANEWISE(__m512i, _mm512_srli_epi64, (__m512i a, unsigned n), u64, a.u64[i] >> n)
LANEWISE(__m256i, _mm256_broadcastsi128_si256, (__m128i a), u64, a.u64[i % 2])
LANEWISE(__m512i, _mm512_broadcast_i32x4, (__m128i a), u64, a.u64[i % 2])
LANEWISE(__m256i, _mm256_set1_epi32, (int a), u32, (uint32_t)a)
LANEWISE(__m256i, _mm256_cmpgt_epi32, (__m256i a, __m256i b), u32,
         (int32_t)a.u32[i] > (int32_t)b.u32[i] ? 0xffffffff : 0)
LANEWISE(__m128i, _mm_shuffle_epi32, (__m128i a, int order), u32, a.u32[order >> 2 * i & 3])
LANEWISE(__m128i, _mm_slli_si128, (__m128i a, int n), u8, i < n ? 0 : a.u8[i - n])

static inline __m128i _mm_set_epi64x(int64_t b, int64_t a) {
    return (__m128i){.u64 = {(uint64_t)a, (uint64_t)b}};
}
static inline __m256i _mm256_set_epi64x(int64_t d, int64_t c, int64_t b, int64_t a) {
    return (__m256i){.u64 = {(uint64_t)a, (uint64_t)b, (uint64_t)c, (uint64_t)d}};
}
static inline __m512i _mm512_set_epi64(int64_t h, int64_t g, int64_t f, int64_t e, int64_t d,
                                       int64_t c, int64_t b, int64_t a) {
    return (__m512i){.u64 = {(uint64_t)a, (uint64_t)b, (uint64_t)c, (uint64_t)d, (uint64_t)e,
                             (uint64_t)f, (uint64_t)g, (uint64_t)h}};
}
static inline __m256i _mm256_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h) {
    return (__m256i){.u32 = {(uint32_t)a, (uint32_t)b, (uint32_t)c, (uint32_t)d, (uint32_t)e,
                             (uint32_t)f, (uint32_t)g, (uint32_t)h}};
}
static inline int64_t _mm512_reduce_add_epi64(__m512i a) {
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++) sum += a.u64[i];
    return (int64_t)sum;
}

/* Floating point. */
LANEWISE(__m256, _mm256_setzero_ps, (void), f32, 0.0f)
LANEWISE(__m512, _mm512_setzero_ps, (void), f32, 0.0f)
LANEWISE(__m512d, _mm512_setzero_pd, (void), f64, 0.0)
LANEWISE(__m128, _mm_add_ps, (__m128 a, __m128 b), f32, a.f32[i] + b.f32[i])
LANEWISE(__m256, _mm256_add_ps, (__m256 a, __m256 b), f32, a.f32[i] + b.f32[i])
LANEWISE(__m512, _mm512_add_ps, (__m512 a, __m512 b), f32, a.f32[i] + b.f32[i])
LANEWISE(__m512d, _mm512_add_pd, (__m512d a, __m512d b), f64, a.f64[i] + b.f64[i])
LANEWISE(__m256, _mm256_fmadd_ps, (__m256 a, __m256 b, __m256 c), f32, fmaf(a.f32[i], b.f32[i], c.f32[i]))
LANEWISE(__m512, _mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c), f32, fmaf(a.f32[i], b.f32[i], c.f32[i]))
LANEWISE(__m256d, _mm256_fmadd_pd, (__m256d a, __m256d b, __m256d c), f64, fma(a.f64[i], b.f64[i], c.f64[i]))
LANEWISE(__m512d, _mm512_fmadd_pd, (__m512d a, __m512d b, __m512d c), f64, fma(a.f64[i], b.f64[i], c.f64[i]))
LANEWISE(__m256d, _mm256_cvtps_pd, (__m128 a), f64, a.f32[i])
LANEWISE(__m512d, _mm512_cvtps_pd, (__m256 a), f64, a.f32[i])
LANEWISE(__m128, _mm256_extractf128_ps, (__m256 a, int half), f32, a.f32[4 * half + i])
LANEWISE(__m256, _mm256_maskload_ps, (const float *p, __m256i mask), f32, mask.u32[i] >> 31 ? p[i] : 0.0f)
LANEWISE(__m512, _mm512_maskz_loadu_ps, (__mmask16 mask, const float *p), f32, mask >> i & 1 ? p[i] : 0.0f)

/* In each 128 bits: sums of neighbours, of a and then of b. */
static inline __m256 _mm256_hadd_ps(__m256 a, __m256 b) {
    __m256 r;
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r.f32[i + j] = a.f32[i + 2 * j] + a.f32[i + 2 * j + 1];
            r.f32[i + 2 + j] = b.f32[i + 2 * j] + b.f32[i + 2 * j + 1];
        }
    return r;
}
/* In each 128 bits: the lower or the upper lanes of a and b, in turn. */
#define UNPACK(type, name, lane, width, from)                                                 \
    LANEWISE(type, name, (type a, type b), lane,                                              \
             (i % 2 ? b : a).lane[i / width * width + from + i % width / 2])
UNPACK(__m512, _mm512_unpacklo_ps, f32, 4, 0)
UNPACK(__m512, _mm512_unpackhi_ps, f32, 4, 2)
UNPACK(__m512d, _mm512_unpacklo_pd, f64, 2, 0)
UNPACK(__m512d, _mm512_unpackhi_pd, f64, 2, 1)

#define _MM_SHUFFLE(d, c, b, a) ((d) << 6 | (c) << 4 | (b) << 2 | (a))
/* Parts of 128 bits: two of a, two of b. */
LANEWISE(__m512, _mm512_shuffle_f32x4, (__m512 a, __m512 b, int order), f32,
         (i < 8 ? a : b).f32[(order >> i / 4 * 2 & 3) * 4 + i % 4])

/* AES, FIPS 197. */
static uint8_t s_box[256];

__attribute__((constructor)) static void make_s_box(void) {
    /* p runs through the powers of 3 in GF(2^8), q through those of its inverse. */
    uint8_t p = 1, q = 1;
    do {
        p = (uint8_t)(p ^ p << 1 ^ (p & 0x80 ? 0x1b : 0));
        q ^= (uint8_t)(q << 1);
        q ^= (uint8_t)(q << 2);
        q ^= (uint8_t)(q << 4);
        if (q & 0x80) q ^= 0x09;
        uint8_t x = q;
        for (int i = 1; i <= 4; i++) x ^= (uint8_t)(q << i | q >> (8 - i));
        s_box[p] = x ^ 0x63;
    } while (p != 1);
    s_box[0] = 0x63;
}

static inline uint8_t times_two(uint8_t a) { return (uint8_t)(a << 1 ^ (a & 0x80 ? 0x1b : 0)); }

/* One round of one block; the last mixes no columns. */
static inline void aes_round(uint8_t *to, const uint8_t *from, const uint8_t *key, int last) {
    uint8_t s[16];
    for (int i = 0; i < 16; i++) s[i] = s_box[from[(i + i % 4 * 4) % 16]]; /* rows shifted */
    for (int column = 0; column < 16; column += 4)
        for (int i = 0; i < 4; i++) {
            const uint8_t *c = s + column;
            uint8_t a = c[i], b = c[(i + 1) % 4], mixed = (uint8_t)(
                times_two(a) ^ times_two(b) ^ b ^ c[(i + 2) % 4] ^ c[(i + 3) % 4]);
            to[column + i] = (last ? a : mixed) ^ key[column + i];
        }
}

#define ROUND(type, name, last)                                                               \
    static inline type name(type a, type key) {                                               \
        type r;                                                                               \
        for (int i = 0; i < (int)sizeof r; i += 16) aes_round(r.u8 + i, a.u8 + i, key.u8 + i, last); \
        return r;                                                                             \
    }
ROUND(__m128i, _mm_aesenc_si128, 0)
ROUND(__m128i, _mm_aesenclast_si128, 1)
ROUND(__m256i, _mm256_aesenc_epi128, 0)
ROUND(__m256i, _mm256_aesenclast_epi128, 1)
ROUND(__m512i, _mm512_aesenc_epi128, 0)
ROUND(__m512i, _mm512_aesenclast_epi128, 1)

static inline uint32_t sub_word(uint32_t a) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i += 8) r |= (uint32_t)s_box[a >> i & 0xff] << i;
    return r;
}
static inline __m128i _mm_aeskeygenassist_si128(__m128i a, int constant) {
    __m128i r;
    for (int i = 0; i < 4; i += 2) {
        uint32_t x = sub_word(a.u32[i + 1]);
        r.u32[i] = x;
        r.u32[i + 1] = (x >> 8 | x << 24) ^ (uint32_t)constant;
    }
    return r;
}

#endif
