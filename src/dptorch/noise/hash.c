/* NH, the first stage of dptorch.noise.fingerprint: two sums of products for each chunk of words.
   Called from every thread of a team at once; each takes chunks until none is left. */

#include "kernels.h"

typedef struct {
    const uint32_t *const *words; /* of each message */
    const int64_t *sizes;
    const int64_t *chunks;        /* number of its first chunk; at the end, of all chunks */
    int64_t count;
    const uint32_t *key;          /* CHUNK + 2 words */
    uint64_t *sums;               /* two for each chunk */
    int64_t units;
    int64_t next;
} Hash;

static void chunk(const uint32_t *m, const uint32_t *key, int64_t pairs, uint64_t *sums) {
    uint64_t first = 0, second = 0;
    for (int64_t i = 0; i < pairs; i++) {
        first += (uint64_t)(m[2 * i] + key[2 * i]) * (m[2 * i + 1] + key[2 * i + 1]);
        second += (uint64_t)(m[2 * i] + key[2 * i + 2]) * (m[2 * i + 1] + key[2 * i + 3]);
    }
    sums[0] += first;
    sums[1] += second;
}

#if defined(__x86_64__)
/* Four pairs at a time: the first word of each is the lower half of a lane. */
__attribute__((target("avx2"))) static void chunk_avx2(const uint32_t *m, const uint32_t *key,
                                                       int64_t pairs, uint64_t *sums) {
    __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t i = 0;
    for (; i + 4 <= pairs; i += 4) {
        __m256i words = _mm256_loadu_si256((const __m256i *)(m + 2 * i));
        for (int pass = 0; pass < 2; pass++) {
            __m256i k = _mm256_loadu_si256((const __m256i *)(key + 2 * (i + pass)));
            __m256i keyed = _mm256_add_epi32(words, k);
            __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            total[pass] = _mm256_add_epi64(total[pass], product);
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        uint64_t lanes[4];
        _mm256_storeu_si256((__m256i *)lanes, total[pass]);
        for (int lane = 0; lane < 4; lane++) sums[pass] += lanes[lane];
    }
    chunk(m + 2 * i, key + 2 * i, pairs - i, sums);
}

/* Eight. */
__attribute__((target("avx512f"))) static void chunk_avx512(const uint32_t *m, const uint32_t *key,
                                                            int64_t pairs, uint64_t *sums) {
    __m512i total[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 8 <= pairs; i += 8) {
        __m512i words = _mm512_loadu_si512(m + 2 * i);
        for (int pass = 0; pass < 2; pass++) {
            __m512i keyed = _mm512_add_epi32(words, _mm512_loadu_si512(key + 2 * (i + pass)));
            __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
            total[pass] = _mm512_add_epi64(total[pass], product);
        }
    }
    for (int pass = 0; pass < 2; pass++)
        sums[pass] += (uint64_t)_mm512_reduce_add_epi64(total[pass]);
    chunk(m + 2 * i, key + 2 * i, pairs - i, sums);
}
#else
#define chunk_avx2 chunk
#define chunk_avx512 chunk
#endif

void hash_words(Hash *job) {
    int64_t message = 0;
    for (;;) {
        int64_t taken = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (taken >= job->chunks[job->count]) break;
        while (job->chunks[message + 1] <= taken) message++;
        int64_t start = (taken - job->chunks[message]) * CHUNK;
        int64_t size = job->sizes[message] - start;
        if (size > CHUNK) size = CHUNK;
        const uint32_t *words = job->words[message] + start;
        uint64_t *sums = job->sums + 2 * taken;
        sums[0] = sums[1] = 0;
        (job->units & AVX512 ? chunk_avx512 : job->units & AVX2 ? chunk_avx2 : chunk)(
            words, job->key, size / 2, sums);
        if (size % 2) { /* the last word, beside a zero */
            const uint32_t *key = job->key + size - 1;
            sums[0] += (uint64_t)(words[size - 1] + key[0]) * key[1];
            sums[1] += (uint64_t)(words[size - 1] + key[2]) * key[3];
        }
    }
}
