/* The float32 normal transform of dptorch.noise.normal, number for number.

   Only operations that IEEE 754 rounds correctly are used, in the order of the numpy version, and
   the compiler may not fuse or reorder them: both give the same bits on every machine. A change
   here is a change there. */

#include <math.h>

#include "kernels.h"

static inline int32_t bits_of(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
static inline float float_of(int32_t i) { float x; memcpy(&x, &i, 4); return x; }

static inline float quarter_sine(float y) {
    float w = y * y;
    return y * (w * (w * (w * (w * SINE_4 + SINE_3) + SINE_2) + SINE_1) + SINE_0);
}

INLINED void normals_body(const int32_t *restrict high, const int32_t *restrict low,
                          const int32_t *restrict turn, float *restrict first,
                          float *restrict second, int64_t pairs, int units) {
    (void)units;
    for (int64_t i = 0; i < pairs; i++) {
        int32_t sign = high[i] >> 31;
        int32_t rest = (int32_t)((uint32_t)(low[i] ^ sign) >> 1);
        float v = (float)(high[i] ^ sign) * 0x1p-32f + ((float)rest * 0x1p-63f + 0x1p-64f);
        float u = sign ? 1.0f - v : v;
        int32_t shifted = bits_of(u) - ROOT_HALF_BITS;
        int32_t exponent = shifted >> 23;
        float f = float_of((shifted & 0x7fffff) + ROOT_HALF_BITS) - 1.0f;
        f = exponent == 0 ? -v : f;
        float q = f / (f + 2.0f);
        float z = q * q;
        float twice_log = q * (z * (z * (z * LOG_3 + LOG_2) + LOG_1) + 4.0f);
        float radius = sqrtf((float)exponent * MINUS_TWICE_LOG_2 - twice_log);
        int32_t x = turn[i] & 0x3fffffff;
        float a = radius * quarter_sine(((float)x + 0.5f) * 0x1p-30f);
        float b = radius * quarter_sine(((float)(0x3fffffff - x) + 0.5f) * 0x1p-30f);
        first[i] = float_of(bits_of(a) ^ (turn[i] & INT32_MIN));
        second[i] = float_of(bits_of(b) ^ ((int32_t)((uint32_t)turn[i] << 1) & INT32_MIN));
    }
}

FOR_EVERY_CPU(normals,
              (const int32_t *restrict high, const int32_t *restrict low,
               const int32_t *restrict turn, float *restrict first, float *restrict second,
               int64_t pairs, int units),
              (high, low, turn, first, second, pairs, units))
