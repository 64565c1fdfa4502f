/* One block of a codebook quantizer: scale * levels[code]. The same search as
 * codebook_quantizer.py, which is what runs where there is no compiler. */
#ifndef LOFTQ_CODEBOOK_H
#define LOFTQ_CODEBOOK_H

#include "common.h"

/* With more than 16 levels the range is cut into cells with at most one boundary each
 * (codebooks.make_table). */
typedef struct {
    const float *levels, *bounds;
    int32_t count;
    float lowest, per_cell;
    int32_t cells;
    const int32_t *cell_code;
    const float *cell_bound;
} Codebook;

/* Up to 16 levels: levels above a boundary replace those below, blends instead of look-ups. The
 * local copies matter: with loads inside the selection the compiler does not vectorize. */
#define DEFINE_CODEBOOK(COUNT)                                                                     \
    static void products_##COUNT(const float *restrict u, int n, float inverse,                    \
                                 const float *levels, const float *bounds, float *numerator,       \
                                 float *denominator) {                                             \
        float uq = 0.0f, qq = 0.0f, level[COUNT], bound[COUNT - 1];                                \
        UNROLL for (int k = 0; k < COUNT; k++) level[k] = levels[k];                               \
        UNROLL for (int k = 0; k < COUNT - 1; k++) bound[k] = bounds[k];                           \
        for (int i = 0; i < n; i++) {                                                              \
            float y = u[i] * inverse, q = level[0];                                                \
            UNROLL for (int k = 0; k < COUNT - 1; k++) q = y > bound[k] ? level[k + 1] : q;        \
            uq += u[i] * q;                                                                        \
            qq += q * q;                                                                           \
        }                                                                                          \
        *numerator = uq;                                                                           \
        *denominator = qq;                                                                         \
    }                                                                                              \
    static void encode_##COUNT(const float *restrict u, int n, float inverse, float scale,         \
                               const float *levels, const float *bounds, uint8_t *restrict codes,  \
                               float *restrict values) {                                           \
        float level[COUNT], bound[COUNT - 1];                                                      \
        UNROLL for (int k = 0; k < COUNT; k++) level[k] = levels[k] * scale;                       \
        UNROLL for (int k = 0; k < COUNT - 1; k++) bound[k] = bounds[k];                           \
        for (int i = 0; i < n; i++) {                                                              \
            float y = u[i] * inverse, q = level[0];                                                \
            int32_t c = 0;                                                                         \
            UNROLL for (int k = 0; k < COUNT - 1; k++) {                                           \
                q = y > bound[k] ? level[k + 1] : q;                                               \
                c = y > bound[k] ? k + 1 : c;                                                      \
            }                                                                                      \
            codes[i] = (uint8_t)c;                                                                 \
            values[i] = q;                                                                         \
        }                                                                                          \
    }                                                                                              \
    static void each_##COUNT(const float *restrict x, int n, const float *restrict scales,         \
                             const float *levels, const float *bounds, uint8_t *restrict codes,    \
                             float *restrict values) {                                             \
        float level[COUNT], bound[COUNT - 1];                                                      \
        UNROLL for (int k = 0; k < COUNT; k++) level[k] = levels[k];                               \
        UNROLL for (int k = 0; k < COUNT - 1; k++) bound[k] = bounds[k];                           \
        for (int i = 0; i < n; i++) {                                                              \
            float y = x[i] / (scales[i] == 0.0f ? 1.0f : scales[i]), q = level[0];                 \
            int32_t c = 0;                                                                         \
            UNROLL for (int k = 0; k < COUNT - 1; k++) {                                           \
                q = y > bound[k] ? level[k + 1] : q;                                               \
                c = y > bound[k] ? k + 1 : c;                                                      \
            }                                                                                      \
            codes[i] = (uint8_t)c;                                                                 \
            values[i] = q * scales[i];                                                             \
        }                                                                                          \
    }

DEFINE_CODEBOOK(4)
DEFINE_CODEBOOK(8)
DEFINE_CODEBOOK(16)

static inline int32_t code_of(const Codebook *book, float y) {
    float position = (y - book->lowest) * book->per_cell;
    position = position > 0.0f ? position : 0.0f; /* NaN too: an index must stay in range */
    position = position > (float)(book->cells - 1) ? (float)(book->cells - 1) : position;
    int32_t cell = (int32_t)position;
    return book->cell_code[cell] + (y > book->cell_bound[cell]);
}

static void codebook_products(const Codebook *book, const float *restrict u, int n, float inverse,
                              float *numerator, float *denominator) {
    const float *levels = book->levels, *bounds = book->bounds;
    if (book->count == 4) products_4(u, n, inverse, levels, bounds, numerator, denominator);
    else if (book->count == 8) products_8(u, n, inverse, levels, bounds, numerator, denominator);
    else if (book->count == 16) products_16(u, n, inverse, levels, bounds, numerator, denominator);
    else {
        float uq = 0.0f, qq = 0.0f;
        for (int i = 0; i < n; i++) {
            float q = levels[code_of(book, u[i] * inverse)];
            uq += u[i] * q;
            qq += q * q;
        }
        *numerator = uq;
        *denominator = qq;
    }
}

static void codebook_encode(const Codebook *book, const float *restrict u, int n, float inverse,
                            float scale, uint8_t *restrict codes, float *restrict values) {
    const float *levels = book->levels, *bounds = book->bounds;
    if (book->count == 4) encode_4(u, n, inverse, scale, levels, bounds, codes, values);
    else if (book->count == 8) encode_8(u, n, inverse, scale, levels, bounds, codes, values);
    else if (book->count == 16) encode_16(u, n, inverse, scale, levels, bounds, codes, values);
    else
        for (int i = 0; i < n; i++) {
            int32_t c = code_of(book, u[i] * inverse);
            codes[i] = (uint8_t)c;
            values[i] = levels[c] * scale;
        }
}

/* Codes and values of x, n <= LARGEST_BLOCK, at a given scale. */
static void codebook_at(const Codebook *book, const float *restrict x, int n, float scale,
                        uint8_t *codes, float *values) {
    float unit[LARGEST_BLOCK], divisor = scale == 0.0f ? 1.0f : scale;
    for (int i = 0; i < n; i++) unit[i] = x[i] / divisor;
    codebook_encode(book, unit, n, 1.0f, scale, codes, values);
}

/* Codes and values of x, each at a scale of its own. */
static inline void codebook_each(const Codebook *book, const float *restrict x, int n,
                                 const float *restrict scales, uint8_t *restrict codes,
                                 float *restrict values) {
    const float *levels = book->levels, *bounds = book->bounds;
    if (book->count == 4) each_4(x, n, scales, levels, bounds, codes, values);
    else if (book->count == 8) each_8(x, n, scales, levels, bounds, codes, values);
    else if (book->count == 16) each_16(x, n, scales, levels, bounds, codes, values);
    else
        for (int i = 0; i < n; i++) {
            int32_t c = code_of(book, x[i] / (scales[i] == 0.0f ? 1.0f : scales[i]));
            codes[i] = (uint8_t)c;
            values[i] = levels[c] * scales[i];
        }
}

/* Codes and values of x, n <= LARGEST_BLOCK; returns the scale. `start`: the scale to begin beside,
 * NULL for the largest magnitude. */
static float codebook_fit(const Codebook *book, const Search *search, const float *restrict x, int n,
                          const float *start, uint8_t *codes, float *values) {
    float unit[LARGEST_BLOCK], a = largest(x, n), numerator, denominator;
    if (a == 0.0f) { /* all zero: every level times zero */
        codebook_encode(book, x, n, 1.0f, 0.0f, codes, values);
        return 0.0f;
    }
    for (int i = 0; i < n; i++) unit[i] = x[i] / a;
    float base = start ? *start / a : 1.0f, gain = 0.0f;
    if (!(fabsf(base) > TINY)) base = 1.0f;
    if (fabsf(base) > 2.0f) base = 2.0f; /* far too large, every code would stay zero */
    float scale = base;
    for (int g = 0; g < search->grid_size; g++) {
        float candidate = base * search->grid[g];
        codebook_products(book, unit, n, 1.0f / candidate, &numerator, &denominator);
        float ratio = numerator / (denominator > TINY ? denominator : TINY);
        if (ratio * candidate > 0.0f && numerator * ratio > gain) {
            gain = numerator * ratio;
            scale = ratio;
        }
    }
    for (int r = 0; r < search->refinements; r++) {
        codebook_products(book, unit, n, 1.0f / scale, &numerator, &denominator);
        float ratio = numerator / (denominator > TINY ? denominator : TINY);
        if (ratio * scale > 0.0f) scale = ratio;
    }
    codebook_encode(book, unit, n, 1.0f / scale, a * scale, codes, values);
    return a * scale;
}

#endif
