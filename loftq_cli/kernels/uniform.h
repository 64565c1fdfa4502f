/* One group of the uniform quantizer: scale * (code - zero). The same search as
 * uniform_quantizer.py, which is what runs where there is no compiler. */
#ifndef LOFTQ_UNIFORM_H
#define LOFTQ_UNIFORM_H

#include "common.h"

typedef struct {
    int32_t top;         /* the largest code */
    int32_t half_scales; /* scales are stored as float16 */
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

/* Codes and values of x, n <= LARGEST_BLOCK; returns the scale as stored, `zero` the zero point.
 * `start`: the scale to begin beside, NULL for the min-max step. The scale is NaN where it does not
 * fit its storage. */
static float uniform_fit(const Uniform *uniform, const Search *search, const float *restrict x,
                         int n, const float *start, uint8_t *codes, uint8_t *zero_point,
                         float *values) {
    float unit[LARGEST_BLOCK], a = largest(x, n), numerator, denominator;
    float top = (float)uniform->top;
    if (a == 0.0f) {
        *zero_point = 1;
        uniform_encode(x, n, 0.0f, 1.0f, top, codes, values);
        return 0.0f;
    }
    float low = 0.0f, high = 0.0f;
    for (int i = 0; i < n; i++) {
        unit[i] = x[i] / a;
        low = unit[i] < low ? unit[i] : low;
        high = unit[i] > high ? unit[i] : high;
    }
    float width = high - low, position = -low * top / width, step = width / top;
    /* Zero point 0 is not used: where it would be nearest, widen the steps to keep the range. */
    if (rintf(position) < 1.0f && high > 0.0f) step = high / (top > 1.0f ? top - 1.0f : 1.0f);
    float base = start ? *start / a : step, gain = 0.0f;
    if (!(base > TINY)) base = step;
    if (base > 1.0f) base = 1.0f; /* far too large, every code would stay at zero */
    float scale = base, zero = clamped(rintf(position), 1.0f, top);
    for (int side = 0; side < 2; side++) {
        float z = clamped(side ? ceilf(position) : floorf(position), 1.0f, top);
        for (int g = 0; g < search->grid_size; g++) {
            float inverse = 1.0f / (base * search->grid[g]);
            uniform_products(unit, n, inverse, -z, top - z, &numerator, &denominator);
            float ratio = numerator / (denominator > TINY ? denominator : TINY);
            if (numerator > 0.0f && numerator * ratio > gain) {
                gain = numerator * ratio;
                scale = ratio;
                zero = z;
            }
        }
    }
    for (int r = 0; r < search->refinements; r++) {
        uniform_products(unit, n, 1.0f / scale, -zero, top - zero, &numerator, &denominator);
        if (numerator > 0.0f) scale = numerator / (denominator > TINY ? denominator : TINY);
    }
    scale *= a;
    if (uniform->half_scales) {
        scale = as_float16(scale);
        if (scale == 0.0f || isinf(scale)) return NAN;
    }
    *zero_point = (uint8_t)zero;
    uniform_encode(x, n, scale, zero, top, codes, values);
    return scale;
}

#endif
