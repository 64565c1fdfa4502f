#ifndef LOFTQ_COMMON_H
#define LOFTQ_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define TINY 1.17549435e-38f
#define LARGEST_BLOCK 256
#define UNROLL _Pragma("GCC unroll 16")

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 }; /* dtypes of what a kernel is given */

/* A grid of scales relative to a start, then least-squares refinements of the best. */
typedef struct {
    const float *grid;
    int32_t grid_size, refinements;
} Search;

static float largest(const float *x, int n) {
    float a = 0.0f;
    for (int i = 0; i < n; i++) {
        float m = fabsf(x[i]);
        a = m > a ? m : a;
    }
    return a;
}

/* To the nearest, ties to even; never called with NaN. */
static inline uint16_t bfloat16_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float from_bfloat16(uint16_t bits) {
    uint32_t u = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float as_bfloat16(float x) {
    return from_bfloat16(bfloat16_bits(x));
}

/* Finite values; the multiplication moves the exponent and makes subnormal ones normal. */
static inline float from_float16(uint16_t bits) {
    uint32_t u = (uint32_t)(bits & 0x7fffu) << 13;
    float x;
    memcpy(&x, &u, 4);
    x *= 0x1p112f;
    return bits & 0x8000u ? -x : x;
}

static inline float as_float16(float x) {
    float a = fabsf(x);
    if (a < 6.103515625e-05f) return rintf(x * 16777216.0f) / 16777216.0f; /* multiples of 2^-24 */
    if (!(a < 65520.0f)) return copysignf(INFINITY, x);
    uint32_t u;
    memcpy(&u, &x, 4);
    u = (u + 0xfffu + ((u >> 13) & 1u)) & ~0x1fffu;
    memcpy(&x, &u, 4);
    return x;
}

/* values[i] as `dtype` stores them. */
static inline void round_values(float *restrict values, int n, int32_t dtype) {
    if (dtype == BFLOAT16)
        for (int i = 0; i < n; i++) values[i] = as_bfloat16(values[i]);
    else if (dtype == FLOAT16)
        for (int i = 0; i < n; i++) values[i] = as_float16(values[i]);
}

/* Elements [at, at + n) of an array of `dtype`. */
static inline void widen(const void *array, int32_t dtype, int64_t at, int64_t n,
                         float *restrict out) {
    const uint16_t *restrict half = (const uint16_t *)array + at;
    if (dtype == FLOAT32) memcpy(out, (const float *)array + at, (size_t)n * sizeof(float));
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(half[i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = from_float16(half[i]);
}

/* The nearest portable scale (quantizers/portable.py): 7 significant bits, multiples of 2^-24; 0 or
 * infinite if x is too small or too large. */
static inline float as_portable(float x) {
    uint32_t u;
    if (fabsf(x) < 7.62939453125e-06f) return rintf(x * 16777216.0f) / 16777216.0f; /* 2^-17 */
    memcpy(&u, &x, 4);
    u = (u + 0xffffu + ((u >> 17) & 1u)) & ~0x1ffffu;
    memcpy(&x, &u, 4);
    return fabsf(x) > 65504.0f ? copysignf(INFINITY, x) : x;
}

#endif
