/* Gradients of a layer norm's shift and scale, of each example: sums over its positions of the output
   gradients, and of their products with the normalised input, in one pass over both. Called from every
   thread of a team at once; each takes examples until none is left.

   Rows are added up in float32, a few at a time, and what they come to in float64. */

#include <stdint.h>
#include <stdlib.h>
#include <math.h>

#include "units.h"

int units_found(void) { return units_of_the_processor(); }

#if defined(__x86_64__)

#define ROWS 4   /* at once */
#define MOST 64  /* in float32, a multiple of ROWS */

typedef struct {
    const float *gradients, *inputs; /* [examples, positions, columns] */
    const float *means, *scales;     /* [examples, positions]; scales are inverse deviations */
    int64_t examples, positions, columns;
    float *of_shift, *of_scale;      /* [examples, columns] */
    int64_t units;
    int64_t next;
} Sums;

/* Add up to ROWS rows to `shift` and `scale`. */
static inline __attribute__((always_inline)) void add(const Sums *job, int64_t row, int64_t rows,
                                                      float *restrict shift, float *restrict scale) {
    int64_t columns = job->columns;
    const float *restrict g = job->gradients + row * columns, *restrict x = job->inputs + row * columns;
    const float *mean = job->means + row, *by = job->scales + row;
    if (rows == ROWS) {
        float m0 = mean[0], m1 = mean[1], m2 = mean[2], m3 = mean[3];
        float b0 = by[0], b1 = by[1], b2 = by[2], b3 = by[3];
        for (int64_t i = 0; i < columns; i++) {
            float g0 = g[i], g1 = g[i + columns], g2 = g[i + 2 * columns], g3 = g[i + 3 * columns];
            shift[i] += (g0 + g1) + (g2 + g3);
            scale[i] += (g0 * ((x[i] - m0) * b0) + g1 * ((x[i + columns] - m1) * b1)) +
                        (g2 * ((x[i + 2 * columns] - m2) * b2) + g3 * ((x[i + 3 * columns] - m3) * b3));
        }
        return;
    }
    for (int64_t r = 0; r < rows; r++, g += columns, x += columns)
        for (int64_t i = 0; i < columns; i++) {
            shift[i] += g[i];
            scale[i] += g[i] * ((x[i] - mean[r]) * by[r]);
        }
}

static inline __attribute__((always_inline)) void sums(Sums *job) {
    int64_t columns = job->columns, positions = job->positions;
    float *part = malloc(2 * columns * sizeof(float));
    double *all = malloc(2 * columns * sizeof(double));
    for (;;) {
        int64_t example = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (example >= job->examples) break;
        float *shift = job->of_shift + example * columns, *scale = job->of_scale + example * columns;
        if (!part || !all) { /* such an example will be dropped */
            for (int64_t i = 0; i < columns; i++) shift[i] = scale[i] = NAN;
            continue;
        }
        for (int64_t i = 0; i < 2 * columns; i++) all[i] = 0.0;
        for (int64_t from = 0; from < positions; from += MOST) {
            int64_t to = positions - from < MOST ? positions : from + MOST;
            for (int64_t i = 0; i < 2 * columns; i++) part[i] = 0.0f;
            for (int64_t t = from; t < to; t += ROWS)
                add(job, example * positions + t, to - t < ROWS ? to - t : ROWS, part, part + columns);
            for (int64_t i = 0; i < 2 * columns; i++) all[i] += part[i];
        }
        for (int64_t i = 0; i < columns; i++) {
            shift[i] = (float)all[i];
            scale[i] = (float)all[columns + i];
        }
    }
    free(part);
    free(all);
}

__attribute__((target("avx512f,avx2,fma"))) static void sums_512(Sums *job) { sums(job); }
__attribute__((target("avx2,fma"))) static void sums_256(Sums *job) { sums(job); }

void norm_sums(Sums *job) { (job->units & AVX512 ? sums_512 : sums_256)(job); }

#else

void norm_sums(void *job) { (void)job; }

#endif
