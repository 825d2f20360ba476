/* Norms of sums of outer products from Gram matrices; see gram.py, which this file agrees with up to
   rounding. Called from every thread of a team at once; each takes examples until none is left, or
   strips where there are few examples or large ones.

   A strip is ROWS rows of one example's Gram matrices, up to the diagonal, column after column. Where
   the number of positions is no multiple of ROWS, the first strip has fewer: it has the fewest columns.
   Of an example that does not fit the second-level cache, MOST strips are made at once, a block of
   columns at a time: each row that is read from the third-level cache then serves all of them. A strip's
   entries are dot products of the factors' rows, made in tiles (with AVX2 of TALL x WIDE, with AVX-512
   of ROWS x WIDE) whose sums stay in registers, over at most DEPTH columns of the factor at a time, so
   that what a strip reads stays in the first-level cache; its own rows are copied together, as rows
   whose distance is a power of two would drive each other out of the cache.

   Small examples are read about as fast as they are worked on, so while one is worked on the next is
   asked for, some cache lines before each tile. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "units.h"

int units_found(void) { return units_of_the_processor(); }

#if defined(__x86_64__)

#define ROWS 8
#define TALL 4
#define WIDE 3
#define DEPTH 512
#define LANES 8
#define PITCH (DEPTH + 16)
#define MOST 8   /* strips at once */
#define LARGE (1 << 18) /* floats of an example's wider factor from which on */
#define BLOCK 96 /* columns, a multiple of WIDE: BLOCK * DEPTH floats fit the second-level cache */
#define SHARE 4  /* examples for each thread from which on it takes whole ones */

typedef struct {
    const float *rows;        /* of one example: [T, columns] */
    int64_t columns, stride;  /* floats from a row to the next */
} Factor;

typedef struct {
    const float *left, *right;
    int64_t examples, positions, left_columns, right_columns;
    int64_t left_strides[2], right_strides[2]; /* floats from an example, a position to the next */
    double *sums;       /* [examples, strips] of products of Gram entries */
    float *lengths[2];  /* [examples, positions] of squared lengths: of left, of right */
    int64_t units;
    int64_t threads;    /* of the team */
    int64_t next;
} Gram;

/* Rows that will be read, as far as they have not been asked for yet. */
typedef struct {
    const char *row;
    int64_t rows, width, pitch, at; /* octets, but for the number of rows */
} Ahead;

static inline void ask_for(Ahead *a, int64_t lines) {
    while (lines-- > 0 && a->rows > 0) {
        __builtin_prefetch(a->row + a->at, 0, 2);
        a->at += 64;
        if (a->at >= a->width) {
            a->at = 0;
            a->row += a->pitch;
            a->rows--;
        }
    }
}

#define FAST __attribute__((target("avx2,fma")))
#define FASTER __attribute__((target("avx512f,avx2,fma")))

FAST static inline __m256i mask_of(int64_t left) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), lanes);
}

/* The sums of a's, b's, c's and d's lanes. */
FAST static inline __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

/* Add to `to`, columns ROWS apart, the products of rows a and b over `depth` columns. */
FAST static void tile(const float *a, const float *const b[WIDE], int64_t depth, float *to) {
    __m256 sums[TALL][WIDE];
    for (int i = 0; i < TALL; i++)
        for (int j = 0; j < WIDE; j++) sums[i][j] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        __m256 y[WIDE];
        for (int j = 0; j < WIDE; j++) y[j] = _mm256_loadu_ps(b[j] + k);
        for (int i = 0; i < TALL; i++) {
            __m256 x = _mm256_loadu_ps(a + i * PITCH + k);
            for (int j = 0; j < WIDE; j++) sums[i][j] = _mm256_fmadd_ps(x, y[j], sums[i][j]);
        }
    }
    if (k < depth) {
        __m256i mask = mask_of(depth - k);
        __m256 y[WIDE];
        for (int j = 0; j < WIDE; j++) y[j] = _mm256_maskload_ps(b[j] + k, mask);
        for (int i = 0; i < TALL; i++) {
            __m256 x = _mm256_maskload_ps(a + i * PITCH + k, mask);
            for (int j = 0; j < WIDE; j++) sums[i][j] = _mm256_fmadd_ps(x, y[j], sums[i][j]);
        }
    }
    for (int j = 0; j < WIDE; j++, to += ROWS) {
        __m128 found = totals(sums[0][j], sums[1][j], sums[2][j], sums[3][j]);
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), found));
    }
}

/* The sums of the lanes of eight vectors. */
FASTER static inline __m256 totals_512(const __m512 sums[ROWS]) {
    __m512 two[4], four[2];
    for (int i = 0; i < 4; i++) {
        __m512 a = sums[2 * i], b = sums[2 * i + 1];
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 2; i++) {
        __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44),
                               _mm512_shuffle_f32x4(four[0], four[1], 0xee));
    all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm512_castps512_ps256(_mm512_shuffle_f32x4(all, all, _MM_SHUFFLE(0, 0, 2, 0)));
}

/* `tile` of all ROWS rows. The compiler keeps the sums in registers if it unrolls both loops. */
FASTER static void tile_512(const float *a, const float *const b[WIDE], int64_t depth, float *to) {
    __m512 sums[WIDE][ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int j = 0; j < WIDE; j++) sums[j][i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 16) {
        __mmask16 mask = depth - k < 16 ? (1 << (depth - k)) - 1 : 0xffff;
        __m512 y[WIDE];
#pragma GCC unroll 3
        for (int j = 0; j < WIDE; j++) y[j] = _mm512_maskz_loadu_ps(mask, b[j] + k);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            __m512 x = _mm512_maskz_loadu_ps(mask, a + i * PITCH + k);
#pragma GCC unroll 3
            for (int j = 0; j < WIDE; j++) sums[j][i] = _mm512_fmadd_ps(x, y[j], sums[j][i]);
        }
    }
#pragma GCC unroll 3
    for (int j = 0; j < WIDE; j++, to += ROWS)
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), totals_512(sums[j])));
}

/* `count` strips of a factor's Gram matrix, of the rows from `start` on, columns up to the diagonal,
   into `gram` [count][columns, ROWS], `pitch` floats from one to the next. Rows before the first
   position and columns after the last repeat them. */
FAST static void strips(const Factor *f, int64_t start, int64_t count, int64_t positions, int wide,
                        float *gram, int64_t pitch, float *own, Ahead *ahead, int64_t lines) {
    int64_t last = positions - 1;
    int64_t parts = (f->columns + DEPTH - 1) / DEPTH;
    int64_t most = ((f->columns + parts - 1) / parts + LANES - 1) / LANES * LANES;
    memset(gram, 0, count * pitch * sizeof(float));
    for (int64_t from = 0; from < f->columns; from += most) {
        int64_t depth = f->columns - from < most ? f->columns - from : most;
        for (int64_t row = 0; row < count * ROWS; row++) {
            int64_t at = start + row < 0 ? 0 : start + row;
            memcpy(own + row * PITCH, f->rows + at * f->stride + from, depth * sizeof(float));
        }
        for (int64_t block = 0; block < start + count * ROWS; block += BLOCK)
            for (int64_t i = 0; i < count; i++) {
                int64_t first = start + i * ROWS, stop = first + ROWS;
                int64_t end = block + BLOCK < stop ? block + BLOCK : stop;
                for (int64_t column = block; column < end; column += WIDE) {
                    const float *b[WIDE], *a = own + i * ROWS * PITCH;
                    float *to = gram + i * pitch + column * ROWS;
                    for (int j = 0; j < WIDE; j++) {
                        int64_t at = column + j < last ? column + j : last;
                        b[j] = f->rows + at * f->stride + from;
                    }
                    ask_for(ahead, lines);
                    if (wide) tile_512(a, b, depth, to);
                    for (int64_t row = 0; !wide && row < ROWS; row += TALL)
                        if (column < first + row + TALL) /* not all above the diagonal */
                            tile(a + row * PITCH, b, depth, to + row);
                }
            }
    }
}

/* Add to `sums`, of each row, the products of x's and y's entries in `columns` columns. */
FAST static void products(const float *x, const float *y, int64_t columns, double sums[ROWS]) {
    __m256d total[2] = {_mm256_loadu_pd(sums), _mm256_loadu_pd(sums + 4)};
    for (int64_t i = 0; i < 2 * columns; i++)
        total[i % 2] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + 4 * i)),
                                       _mm256_cvtps_pd(_mm_loadu_ps(y + 4 * i)), total[i % 2]);
    _mm256_storeu_pd(sums, total[0]);
    _mm256_storeu_pd(sums + 4, total[1]);
}

FASTER static void products_512(const float *x, const float *y, int64_t columns, double sums[ROWS]) {
    __m512d even = _mm512_loadu_pd(sums), odd = _mm512_setzero_pd();
    for (int64_t i = 0; i < columns; i++) {
        __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(x + ROWS * i));
        __m512d b = _mm512_cvtps_pd(_mm256_loadu_ps(y + ROWS * i));
        if (i % 2) odd = _mm512_fmadd_pd(a, b, odd);
        else even = _mm512_fmadd_pd(a, b, even);
    }
    _mm512_storeu_pd(sums, _mm512_add_pd(even, odd));
}

/* The sum over one strip, whose Gram entries are x and y, and its rows' lengths. */
FAST static double sum_of(Gram *job, int64_t example, int64_t start, int wide, const float *x,
                          const float *y) {
    double below[ROWS] = {0}, sum = 0.0;
    (wide ? products_512 : products)(x, y, start < 0 ? 0 : start, below);
    for (int64_t row = start < 0 ? -start : 0; row < ROWS; row++) {
        int64_t diagonal = start + row;
        for (int64_t column = start < 0 ? 0 : start; column < diagonal; column++)
            below[row] += (double)x[column * ROWS + row] * y[column * ROWS + row];
        float of_left = x[diagonal * ROWS + row], of_right = y[diagonal * ROWS + row];
        /* What lies below the diagonal stands for its mirror image too. */
        sum += 2.0 * below[row] + (double)of_left * of_right;
        job->lengths[0][example * job->positions + diagonal] = of_left;
        job->lengths[1][example * job->positions + diagonal] = of_right;
    }
    return sum;
}

static Factor factor_of(const Gram *job, int64_t example, int right) {
    const float *rows = right ? job->right : job->left;
    const int64_t *strides = right ? job->right_strides : job->left_strides;
    Factor f = {rows + example * strides[0], right ? job->right_columns : job->left_columns, strides[1]};
    return f;
}

FAST void gram_norms(Gram *job) {
    int64_t positions = job->positions, of_each = (positions + ROWS - 1) / ROWS;
    int64_t columns = job->left_columns, of_right = job->right_columns;
    if (columns < of_right) columns = of_right;
    int small = positions * columns < LARGE;
    int64_t at_once = small ? 1 : MOST, bands = (of_each + at_once - 1) / at_once;
    int64_t pitch = (positions + ROWS + WIDE) * ROWS, copied = at_once * ROWS * PITCH;
    float *work = aligned_alloc(64, ((2 * at_once * pitch + copied) * sizeof(float) + 63) / 64 * 64);
    int wide = (job->units & AVX512) != 0;
    /* Whole examples where all threads get several. */
    int64_t taken_at_once = small && job->examples >= SHARE * job->threads ? bands : 1;
    int64_t tiles = of_each * (positions + ROWS) / 2 / WIDE + 1; /* of a factor, at least */
    for (;;) {
        int64_t taken = taken_at_once * __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (taken >= job->examples * bands) break;
        int64_t example = taken / bands; /* one after another: each fits the second-level cache */
        double *out = job->sums + example * of_each;
        if (!work) { /* such an example will be dropped */
            for (int64_t i = 0; i < of_each; i++) out[i] = NAN;
            continue;
        }
        Factor factors[2] = {factor_of(job, example, 0), factor_of(job, example, 1)};
        Ahead ahead[2] = {{0}, {0}};
        int64_t lines[2] = {0, 0}, next = example + job->threads; /* probably */
        for (int i = 0; taken_at_once > 1 && next < job->examples && i < 2; i++) {
            Factor f = factor_of(job, next, i);
            Ahead a = {(const char *)f.rows, positions, f.columns * 4, f.stride * 4, 0};
            ahead[i] = a;
            lines[i] = positions * ((f.columns + 15) / 16) / tiles + 1;
        }
        for (int64_t band = bands - 1 - taken % bands, last = band - taken_at_once; band > last; band--) {
            int64_t first = band * at_once; /* the longest first */
            int64_t count = of_each - first < at_once ? of_each - first : at_once;
            int64_t start = positions - (of_each - first) * ROWS; /* negative: rows before 0 are none */
            float *own = work, *grams[2] = {own + copied, own + copied + at_once * pitch};
            for (int i = 0; i < 2; i++)
                strips(&factors[i], start, count, positions, wide, grams[i], pitch, own, &ahead[i],
                       lines[i]);
            for (int64_t i = 0; i < count; i++)
                out[first + i] = sum_of(job, example, start + i * ROWS, wide, grams[0] + i * pitch,
                                        grams[1] + i * pitch);
        }
    }
    free(work);
}

#else

void gram_norms(void *job) { (void)job; }

#endif
