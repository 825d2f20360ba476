/* What the C sources of dptorch.noise share. */

#ifndef DPTORCH_KERNELS_H
#define DPTORCH_KERNELS_H

#include <stdint.h>
#include <string.h>

#include "units.h"

/* `name`, a loop that the compiler makes vectors of, for each size of vector: the body is
   `name##_body`, which must be inlined to be compiled for it. `units` is among its parameters. */
#if defined(__x86_64__)
#define FOR_EVERY_CPU(name, parameters, arguments)                                            \
    __attribute__((target("avx512f"))) static void name##_avx512 parameters {                 \
        name##_body arguments;                                                                \
    }                                                                                         \
    __attribute__((target("avx2"))) static void name##_avx2 parameters {                      \
        name##_body arguments;                                                                \
    }                                                                                         \
    void name parameters {                                                                    \
        if (units & AVX512) name##_avx512 arguments;                                          \
        else if (units & AVX2) name##_avx2 arguments;                                         \
        else name##_body arguments;                                                           \
    }
#else
#define FOR_EVERY_CPU(name, parameters, arguments) \
    void name parameters { name##_body arguments; }
#endif
#define INLINED static inline __attribute__((always_inline))

typedef struct {
    _Alignas(16) uint8_t round_keys[15 * 16];
    int units;
} Cipher;

void expand_key(const uint8_t secret[32], int units, Cipher *cipher);
/* Blocks [first, first + blocks) of the keystream; both are multiples of 32. */
void keystream(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks);

void normals(const int32_t *restrict high, const int32_t *restrict low,
             const int32_t *restrict turn, float *restrict first, float *restrict second,
             int64_t pairs, int units);

#endif
