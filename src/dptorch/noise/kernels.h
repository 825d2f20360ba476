/* What the C sources of dptorch.noise share. */

#ifndef DPTORCH_KERNELS_H
#define DPTORCH_KERNELS_H

#include <stdint.h>
#include <string.h>

/* Vector units that not every processor has: chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

typedef struct {
    _Alignas(16) uint8_t round_keys[15 * 16];
    int wide;
} Cipher;

int has_cipher(void);
void expand_key(const uint8_t secret[32], Cipher *cipher);
/* Blocks [first, first + blocks) of the keystream; a multiple of 16 of them. */
void keystream(const Cipher *cipher, uint64_t first, uint8_t *out, int64_t blocks);

void normals(const int32_t *restrict high, const int32_t *restrict low,
             const int32_t *restrict turn, float *restrict first, float *restrict second,
             int64_t pairs);

#endif
