/* The instruction sets of the processor that the loops of dptorch choose by; `Units` of compiler.py. */

#ifndef DPTORCH_UNITS_H
#define DPTORCH_UNITS_H

enum { AES = 1, AVX2 = 2, AVX512 = 4, VAES = 8 };

#if defined(__x86_64__)
#include <immintrin.h>

static inline int units_of_the_processor(void) {
    __builtin_cpu_init();
    int found = 0;
    if (__builtin_cpu_supports("aes") && __builtin_cpu_supports("sse4.1")) found |= AES;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= AVX2;
    if (__builtin_cpu_supports("avx512f")) found |= AVX512;
    if (__builtin_cpu_supports("vaes")) found |= VAES;
    return found;
}
#else
static inline int units_of_the_processor(void) { return 0; }
#endif

#endif
