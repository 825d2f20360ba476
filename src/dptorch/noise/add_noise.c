/* One pass over a sum: noise from the keystream, added, and the division. Called from every thread
   of a team at once; each takes blocks until none is left. */

#include "kernels.h"

typedef struct {
    const uint8_t *key;     /* 32 bytes */
    const int64_t *blocks;  /* numbers of the blocks that are needed */
    int64_t block_count;
    float *const *data;     /* of each span, in the order of their places */
    const int64_t *starts;  /* place of the span's first number in the whole gradient */
    const int64_t *stops;
    const float *stddevs;
    int64_t span_count;
    float divisor;
    int32_t units;
    int64_t next;           /* counts the blocks that are taken */
} Noise;

#define AT_ONCE 512 /* pairs: all that is in flight stays in the first-level cache */

/* The first span that ends after `place`. */
static int64_t span_at(const Noise *job, int64_t place) {
    int64_t low = 0, high = job->span_count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (job->stops[middle] > place) high = middle;
        else low = middle + 1;
    }
    return low;
}

INLINED void add_body(float *restrict to, const float *restrict noise, float stddev,
                      float divisor, int64_t size, int units) {
    (void)units;
    if (divisor == 1.0f)
        for (int64_t i = 0; i < size; i++) to[i] += noise[i] * stddev;
    else
        for (int64_t i = 0; i < size; i++) to[i] = (to[i] + noise[i] * stddev) / divisor;
}

FOR_EVERY_CPU(add,
              (float *restrict to, const float *restrict noise, float stddev,
               float divisor, int64_t size, int units),
              (to, noise, stddev, divisor, size, units))

/* The numbers [place, place + AT_ONCE) of the sequence, to the spans that have these places. */
static void spread(const Noise *job, int64_t span, int64_t place, const float *noise) {
    int64_t stop = place + AT_ONCE;
    for (; span < job->span_count && job->starts[span] < stop; span++) {
        int64_t from = job->starts[span] > place ? job->starts[span] : place;
        int64_t to = job->stops[span] < stop ? job->stops[span] : stop;
        add(job->data[span] + (from - job->starts[span]), noise + (from - place),
            job->stddevs[span], job->divisor, to - from, job->units);
    }
}

void add_noise(Noise *job) {
    _Alignas(64) int32_t bits[3][AT_ONCE];
    _Alignas(64) float made[2][AT_ONCE];
    Cipher cipher;
    expand_key(job->key, job->units, &cipher);
    for (;;) {
        int64_t taken = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (taken >= job->block_count) break;
        int64_t block = job->blocks[taken];
        for (int64_t at = 0; at < PAIRS; at += AT_ONCE) {
            int64_t place[2], span[2], wanted = 0;
            for (int half = 0; half < 2; half++) {
                place[half] = (2 * block + half) * PAIRS + at;
                span[half] = span_at(job, place[half]);
                wanted |= span[half] < job->span_count &&
                          job->starts[span[half]] < place[half] + AT_ONCE;
            }
            if (!wanted) continue;
            for (int row = 0; row < 3; row++)
                keystream(&cipher, ((3 * block + row) * PAIRS + at) / 4, (uint8_t *)bits[row],
                          AT_ONCE / 4);
            normals(bits[0], bits[1], bits[2], made[0], made[1], AT_ONCE,
                    job->units);
            for (int half = 0; half < 2; half++) spread(job, span[half], place[half], made[half]);
        }
    }
    volatile uint8_t *secret = cipher.round_keys;
    for (unsigned i = 0; i < sizeof cipher.round_keys; i++) secret[i] = 0;
}
