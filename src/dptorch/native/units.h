/* The instruction sets of the processor that the loops of dptorch choose by; `Units` of compiler.py. */

#ifndef DPTORCH_UNITS_H
#define DPTORCH_UNITS_H

enum { AES = 1, AVX2 = 2, AVX512 = 4, VAES = 8 };

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

static inline int units_of_the_processor(void) {
    __builtin_cpu_init();
    int found = 0;
    unsigned a, b, c, d;
    /* By their bits: clang's __builtin_cpu_supports does not know all of these by name. */
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & bit_AES) && (c & bit_SSE4_1)) found |= AES;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= AVX2;
    if (__builtin_cpu_supports("avx512f")) found |= AVX512;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & 1u << 9)) found |= VAES;
    return found;
}
#else
static inline int units_of_the_processor(void) { return 0; }
#endif

#endif
