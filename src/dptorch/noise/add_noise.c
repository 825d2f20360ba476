/* One pass over a sum: noise from keystreams, added, and the division. Called from every thread of a
   team at once; each takes blocks until none is left. */

#include "kernels.h"

typedef struct {
    const uint8_t *keys;    /* 32 bytes each; their noise is added one after the other */
    int64_t key_count;      /* one, where there is a memory */
    const int64_t *blocks;  /* numbers of the blocks that are needed */
    int64_t block_count;
    float *const *data;     /* of each span, in the order of their places; null: only rows go on */
    const int64_t *starts;  /* place of the span's first number in the whole gradient */
    const int64_t *stops;
    const float *stddevs;   /* of each key's noise in each span */
    int64_t span_count;
    /* What noise that is correlated over steps keeps of earlier ones; without it there are no rows. */
    float *const *rows;     /* of each span, as long as it */
    int64_t row_count;
    int64_t sum_count;      /* what this step takes back, and later ones, of the rows that are there */
    const float *weights;   /* of each row in each sum */
    const float *decays;    /* of each row; null: the first becomes the step's own, the others stay */
    float divisor;          /* once all noise is added */
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

#define AT_A_TIME 4 /* rows in one pass over a sum: each pass reads and writes it */

/* Takes `count` rows back, one after the other; `first`: the sum is to begin with them. */
INLINED void take_back_body(float *restrict sum, float *const *rows, int64_t at,
                            const float *weights, int count, int first, int64_t size, int units) {
    (void)units;
    const float *r[AT_A_TIME];
    float w[AT_A_TIME];
    for (int j = 0; j < AT_A_TIME; j++) { /* those past the last are not read */
        r[j] = rows[j < count ? j : 0] + at;
        w[j] = weights[j < count ? j : 0];
    }
    const float *restrict a = r[0], *restrict b = r[1], *restrict c = r[2], *restrict d = r[3];
#define PASS(rest) \
    if (first) for (int64_t i = 0; i < size; i++) sum[i] = -(a[i] * w[0]) rest; \
    else for (int64_t i = 0; i < size; i++) sum[i] = sum[i] - a[i] * w[0] rest;
    if (count == 1) { PASS() }
    else if (count == 2) { PASS(- b[i] * w[1]) }
    else if (count == 3) { PASS(- b[i] * w[1] - c[i] * w[2]) }
    else { PASS(- b[i] * w[1] - c[i] * w[2] - d[i] * w[3]) }
#undef PASS
}

FOR_EVERY_CPU(take_back,
              (float *restrict sum, float *const *rows, int64_t at, const float *weights, int count,
               int first, int64_t size, int units),
              (sum, rows, at, weights, count, first, size, units))

INLINED void decay_body(float *restrict row, const float *restrict noise, float decay, int64_t size,
                        int units) {
    (void)units;
    for (int64_t i = 0; i < size; i++) row[i] = row[i] * decay + noise[i];
}

FOR_EVERY_CPU(decay,
              (float *restrict row, const float *restrict noise, float decay, int64_t size,
               int units),
              (row, noise, decay, size, units))

/* Sum number k: of the rows from the k-th on, whose place it is to take. */
static void take_all_back(const Noise *job, float *const *rows, int64_t at, int64_t k, float *sum,
                          int64_t size) {
    const float *weights = job->weights + k * job->row_count;
    for (int64_t j = k; j < job->row_count; j += AT_A_TIME) {
        int64_t left = job->row_count - j;
        take_back(sum, rows + j, at, weights + j, left < AT_A_TIME ? (int)left : AT_A_TIME, j == k,
                  size, job->units);
    }
}

/* The noise of a step from `made`, what is new of it, and from the rows, which go on to the next step. */
static void recur(const Noise *job, int64_t span, int64_t at, const float *made, float *noise,
                  int64_t size) {
    _Alignas(64) float later[AT_ONCE];
    float *const *rows = job->rows + span * job->row_count;
    take_all_back(job, rows, at, 0, noise, size);
    add(noise, made, 1.0f, 1.0f, size, job->units);
    for (int64_t k = 1; k < job->sum_count; k++) {
        take_all_back(job, rows, at, k, later, size);
        memcpy(rows[k] + at, later, size * sizeof *later);
    }
    if (!job->decays) memcpy(rows[0] + at, noise, size * sizeof *noise);
    else
        for (int64_t j = 0; j < job->row_count; j++)
            decay(rows[j] + at, noise, job->decays[j], size, job->units);
}

/* The numbers [place, place + AT_ONCE) of the sequence of a key, to the spans that have these places. */
static void spread(const Noise *job, int64_t key, int64_t span, int64_t place, const float *noise) {
    _Alignas(64) float recurred[AT_ONCE];
    int64_t stop = place + AT_ONCE;
    float divisor = key + 1 == job->key_count ? job->divisor : 1.0f;
    for (; span < job->span_count && job->starts[span] < stop; span++) {
        int64_t from = job->starts[span] > place ? job->starts[span] : place;
        int64_t to = job->stops[span] < stop ? job->stops[span] : stop;
        const float *added = noise + (from - place);
        if (job->row_count) {
            recur(job, span, from - job->starts[span], added, recurred, to - from);
            added = recurred;
        }
        if (job->data[span])
            add(job->data[span] + (from - job->starts[span]), added,
                job->stddevs[key * job->span_count + span], divisor, to - from, job->units);
    }
}

void add_noise(Noise *job) {
    _Alignas(64) int32_t bits[3][AT_ONCE];
    _Alignas(64) float made[2][AT_ONCE];
    Cipher ciphers[MOST_KEYS];
    for (int64_t key = 0; key < job->key_count; key++)
        expand_key(job->keys + 32 * key, job->units, &ciphers[key]);
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
            for (int64_t key = 0; key < job->key_count; key++) {
                for (int row = 0; row < 3; row++)
                    keystream(&ciphers[key], ((3 * block + row) * PAIRS + at) / 4,
                              (uint8_t *)bits[row], AT_ONCE / 4);
                normals(bits[0], bits[1], bits[2], made[0], made[1], AT_ONCE, job->units);
                for (int half = 0; half < 2; half++)
                    spread(job, key, span[half], place[half], made[half]);
            }
        }
    }
    volatile uint8_t *secret = (volatile uint8_t *)ciphers;
    for (int64_t i = 0; i < job->key_count * (int64_t)sizeof *ciphers; i++) secret[i] = 0;
}
