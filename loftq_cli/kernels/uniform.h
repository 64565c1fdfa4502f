/* One group of the uniform quantizer: scale * (code - zero). The same search as
 * numerics/quantizers/uniform.py, which is what runs if there is no compiler. */
#ifndef LOFTQ_UNIFORM_H
#define LOFTQ_UNIFORM_H

#include "common.h"

typedef struct {
    int32_t top;       /* the largest code */
    int32_t portable;  /* scales are rounded to portable ones */
    int32_t symmetric; /* the zero point is in the middle, and scales have either sign */
} Uniform;

static void uniform_products(const float *restrict u, int n, float inverse, float low, float high,
                             float *numerator, float *denominator) {
    float uq = 0.0f, qq = 0.0f;
    for (int i = 0; i < n; i++) {
        float q = rintf(u[i] * inverse);
        q = q < low ? low : q;
        q = q > high ? high : q;
        uq += u[i] * q;
        qq += q * q;
    }
    *numerator = uq;
    *denominator = qq;
}

static inline float clamped(float value, float low, float high) {
    return value < low ? low : value > high ? high : value;
}

static void uniform_encode(const float *restrict x, int n, float scale, float zero, float top,
                           uint8_t *restrict codes, float *restrict values) {
    float low = -zero, high = top - zero, divisor = scale == 0.0f ? 1.0f : scale;
    for (int i = 0; i < n; i++) {
        float q = rintf(x[i] / divisor);
        q = q < low ? low : q;
        q = q > high ? high : q;
        codes[i] = (uint8_t)(int32_t)(q + zero);
        values[i] = q * scale;
    }
}

/* Codes and values of x, each at a scale and a zero point of its own. */
static inline void uniform_each(const float *restrict x, int n, const float *restrict scales,
                                const float *restrict zeros, float top, uint8_t *restrict codes,
                                float *restrict values) {
    for (int i = 0; i < n; i++) {
        float low = -zeros[i], high = top - zeros[i];
        float q = rintf(x[i] / (scales[i] == 0.0f ? 1.0f : scales[i]));
        q = q < low ? low : q;
        q = q > high ? high : q;
        codes[i] = (uint8_t)(int32_t)(q + zeros[i]);
        values[i] = q * scales[i];
    }
}

/* One try at `at`: its products, and the scale and zero point if they gain more than `gain`. */
static inline void uniform_try(const float *restrict unit, int n, float at, float z, float top,
                               float *gain, float *scale, float *zero) {
    float numerator, denominator;
    uniform_products(unit, n, 1.0f / at, -z, top - z, &numerator, &denominator);
    float ratio = numerator / (denominator > TINY ? denominator : TINY);
    if (numerator * at > 0.0f && numerator * ratio > *gain) {
        *gain = numerator * ratio;
        *scale = ratio;
        *zero = z;
    }
}

/* Where a search begins: beside `start`, or at `step`. */
static inline float uniform_base(const float *start, float largest, float step) {
    float base = start ? fabsf(*start) / largest : step;
    if (!(base > TINY)) base = step;
    return base > 1.0f ? 1.0f : base; /* far too large, every code would stay at zero */
}

/* The zero point is chosen: the two integers around the best one. Returns the scale. */
static float uniform_search(const Search *search, const float *unit, int n, const float *start,
                            float largest, float low, float high, float top, float *zero) {
    float width = high - low, position = -low * top / width, step = width / top, gain = 0.0f;
    /* Zero point 0 is not used: if it would be nearest, widen the steps to keep the range. */
    if (rintf(position) < 1.0f && high > 0.0f) step = high / (top > 1.0f ? top - 1.0f : 1.0f);
    float base = uniform_base(start, largest, step), scale = base;
    *zero = clamped(rintf(position), 1.0f, top);
    for (int side = 0; side < 2; side++) {
        float z = clamped(side ? ceilf(position) : floorf(position), 1.0f, top);
        for (int g = 0; g < search->grid_size; g++)
            uniform_try(unit, n, base * search->grid[g], z, top, &gain, &scale, zero);
    }
    return scale;
}

/* The zero point is in the middle: scales of both signs. Returns the scale. */
static float symmetric_search(const Search *search, const float *unit, int n, const float *start,
                              float largest, float low, float high, float top, float *zero) {
    float z = (top + 1.0f) / 2.0f, above = z > 2.0f ? z - 1.0f : 1.0f, gain = 0.0f;
    float upright = -low / z > high / above ? -low / z : high / above;
    float mirrored = high / z > -low / above ? high / z : -low / above;
    float scale = mirrored < upright ? -mirrored : upright;
    *zero = z;
    for (int side = 0; side < 2; side++) {
        float base = uniform_base(start, largest, side ? mirrored : upright);
        for (int g = 0; g < search->grid_size; g++) {
            float at = base * search->grid[g];
            uniform_try(unit, n, side ? -at : at, z, top, &gain, &scale, zero);
        }
    }
    return scale;
}

/* Codes and values of x, n <= LARGEST_BLOCK; returns the scale as stored, `zero` the zero point.
 * `start`: the scale to begin beside, NULL for the step that keeps the range. The scale is NaN if
 * it does not fit its storage. */
static float uniform_fit(const Uniform *uniform, const Search *search, const float *restrict x,
                         int n, const float *start, uint8_t *codes, uint8_t *zero_point,
                         float *values) {
    float unit[LARGEST_BLOCK], a = largest(x, n), top = (float)uniform->top;
    float zero = uniform->symmetric ? (top + 1.0f) / 2.0f : 1.0f;
    if (a == 0.0f) {
        *zero_point = (uint8_t)zero;
        uniform_encode(x, n, 0.0f, zero, top, codes, values);
        return 0.0f;
    }
    float low = 0.0f, high = 0.0f;
    for (int i = 0; i < n; i++) {
        unit[i] = x[i] / a;
        low = unit[i] < low ? unit[i] : low;
        high = unit[i] > high ? unit[i] : high;
    }
    float scale = (uniform->symmetric ? symmetric_search : uniform_search)(
        search, unit, n, start, a, low, high, top, &zero);
    for (int r = 0; r < search->refinements; r++) {
        float numerator, denominator;
        uniform_products(unit, n, 1.0f / scale, -zero, top - zero, &numerator, &denominator);
        if (numerator * scale > 0.0f)
            scale = numerator / (denominator > TINY ? denominator : TINY);
    }
    scale *= a;
    if (uniform->portable) {
        scale = as_portable(scale);
        if (scale == 0.0f || isinf(scale)) return NAN;
    }
    *zero_point = (uint8_t)zero;
    uniform_encode(x, n, scale, zero, top, codes, values);
    return scale;
}

#endif
