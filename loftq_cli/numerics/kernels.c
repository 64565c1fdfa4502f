/* Least-squares scale search, quantization and decoding of blocks, in one pass over each block.
 *
 * The same searches as quantizers.py (which is what runs where there is no compiler): a grid of
 * scales relative to the block's largest magnitude, then least-squares refinements. A block of 64
 * floats stays in registers and first-level cache through all of it.
 *
 * A matrix is `rows` runs of `columns` floats; blocks of `size` run along a row, the last one short.
 * Blocks over a flattened matrix are one row. [first, last) is the range of blocks to work on.
 */
#include <math.h>
#include <stdint.h>

#define TINY 1.17549435e-38f
#define UNROLL _Pragma("GCC unroll 16")

static float largest(const float *x, int n) {
    float a = 0.0f;
    for (int i = 0; i < n; i++) {
        float m = fabsf(x[i]);
        a = m > a ? m : a;
    }
    return a;
}

/* -- codebook ---------------------------------------------------------------------------------- */

/* Levels above a boundary replace those below: blends, not look-ups, for up to 16 levels. The local
 * copies matter: with loads inside the selection the compiler does not vectorize. */
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
    }

DEFINE_CODEBOOK(4)
DEFINE_CODEBOOK(8)
DEFINE_CODEBOOK(16)

/* More levels: the range is cut into cells with at most one boundary each (codebooks.make_table). */
typedef struct {
    const float *levels, *bounds;
    int count;
    float lowest, per_cell;
    int cells;
    const int32_t *cell_code;
    const float *cell_bound;
} Table;

static inline int32_t code_of(const Table *table, float y) {
    float position = (y - table->lowest) * table->per_cell;
    position = position > 0.0f ? position : 0.0f; /* NaN too: an index must stay in range */
    position = position > (float)(table->cells - 1) ? (float)(table->cells - 1) : position;
    int32_t cell = (int32_t)position;
    return table->cell_code[cell] + (y > table->cell_bound[cell]);
}

static void products(const Table *table, const float *restrict u, int n, float inverse,
                     float *numerator, float *denominator) {
    const float *levels = table->levels, *bounds = table->bounds;
    if (table->count == 4) products_4(u, n, inverse, levels, bounds, numerator, denominator);
    else if (table->count == 8) products_8(u, n, inverse, levels, bounds, numerator, denominator);
    else if (table->count == 16) products_16(u, n, inverse, levels, bounds, numerator, denominator);
    else {
        float uq = 0.0f, qq = 0.0f;
        for (int i = 0; i < n; i++) {
            float q = levels[code_of(table, u[i] * inverse)];
            uq += u[i] * q;
            qq += q * q;
        }
        *numerator = uq;
        *denominator = qq;
    }
}

static void encode(const Table *table, const float *restrict u, int n, float inverse, float scale,
                   uint8_t *restrict codes, float *restrict values) {
    const float *levels = table->levels, *bounds = table->bounds;
    if (table->count == 4) encode_4(u, n, inverse, scale, levels, bounds, codes, values);
    else if (table->count == 8) encode_8(u, n, inverse, scale, levels, bounds, codes, values);
    else if (table->count == 16) encode_16(u, n, inverse, scale, levels, bounds, codes, values);
    else
        for (int i = 0; i < n; i++) {
            int32_t c = code_of(table, u[i] * inverse);
            codes[i] = (uint8_t)c;
            values[i] = levels[c] * scale;
        }
}

/* The grid is of multiples of `start`, or of the largest magnitude where that is NULL. */
void loftq_codebook(const float *x, int64_t columns, int64_t size, int64_t first, int64_t last,
                    const float *levels, const float *bounds, int count, float lowest,
                    float per_cell, int cells, const int32_t *cell_code, const float *cell_bound,
                    const float *grid, int grid_size, int refinements, const float *start,
                    uint8_t *codes, float *scales, float *values) {
    const Table table = {levels, bounds, count, lowest, per_cell, cells, cell_code, cell_bound};
    int64_t groups = (columns + size - 1) / size;
    float unit[256];
    for (int64_t block = first; block < last; block++) {
        int64_t at = block / groups * columns + block % groups * size;
        int64_t left = columns - block % groups * size;
        int n = (int)(left < size ? left : size);
        const float *source = x + at;
        float a = largest(source, n), scale, numerator, denominator;
        if (a == 0.0f) { /* all zero: every level times zero */
            scales[block] = 0.0f;
            encode(&table, source, n, 1.0f, 0.0f, codes + at, values + at);
            continue;
        }
        for (int i = 0; i < n; i++) unit[i] = source[i] / a;
        float base = start ? start[block] / a : 1.0f, gain = 0.0f;
        if (!(base > TINY)) base = 1.0f;
        if (base > 2.0f) base = 2.0f; /* far too large, every code would stay zero */
        scale = base;
        for (int g = 0; g < grid_size; g++) {
            products(&table, unit, n, 1.0f / (base * grid[g]), &numerator, &denominator);
            float ratio = numerator / (denominator > TINY ? denominator : TINY);
            if (numerator > 0.0f && numerator * ratio > gain) {
                gain = numerator * ratio;
                scale = ratio;
            }
        }
        for (int r = 0; r < refinements; r++) {
            products(&table, unit, n, 1.0f / scale, &numerator, &denominator);
            if (numerator > 0.0f) scale = numerator / (denominator > TINY ? denominator : TINY);
        }
        scales[block] = a * scale;
        encode(&table, unit, n, 1.0f / scale, a * scale, codes + at, values + at);
    }
}

/* -- uniform ----------------------------------------------------------------------------------- */

static void offset_products(const float *restrict u, int n, float inverse, float low, float high,
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

static float clamped(float value, float low, float high) {
    return value < low ? low : value > high ? high : value;
}

/* First of two passes: the best scale (float32, not yet rounded for storage) and zero point. The
 * grid is of multiples of `start`, or of the min-max step where that is NULL. */
void loftq_uniform_fit(const float *x, int64_t columns, int64_t size, int64_t first, int64_t last,
                       int top, const float *grid, int grid_size, int refinements,
                       const float *start, float *absmax, float *scales,
                       float *zeros) {
    int64_t groups = (columns + size - 1) / size;
    float unit[256];
    for (int64_t block = first; block < last; block++) {
        int64_t at = block / groups * columns + block % groups * size;
        int64_t left = columns - block % groups * size;
        int n = (int)(left < size ? left : size);
        const float *source = x + at;
        float a = largest(source, n), scale, zero, numerator, denominator;
        absmax[block] = a;
        if (a == 0.0f) {
            scales[block] = 0.0f;
            zeros[block] = 1.0f;
            continue;
        }
        float low = 0.0f, high = 0.0f;
        for (int i = 0; i < n; i++) {
            unit[i] = source[i] / a;
            low = unit[i] < low ? unit[i] : low;
            high = unit[i] > high ? unit[i] : high;
        }
        float width = high - low, position = -low * top / width, step = width / top;
        /* Zero point 0 is not used: where it would be nearest, widen the steps to keep the range. */
        if (rintf(position) < 1.0f && high > 0.0f) step = high / (top > 1 ? top - 1 : 1);
        float base = start ? start[block] / a : step, gain = 0.0f;
        if (!(base > TINY)) base = step;
        if (base > 1.0f) base = 1.0f; /* far too large, every code would stay at zero */
        scale = base;
        zero = clamped(rintf(position), 1.0f, top);
        for (int side = 0; side < 2; side++) {
            float z = clamped(side ? ceilf(position) : floorf(position), 1.0f, top);
            for (int g = 0; g < grid_size; g++) {
                offset_products(unit, n, 1.0f / (base * grid[g]), -z, top - z, &numerator,
                                &denominator);
                float ratio = numerator / (denominator > TINY ? denominator : TINY);
                if (numerator > 0.0f && numerator * ratio > gain) {
                    gain = numerator * ratio;
                    scale = ratio;
                    zero = z;
                }
            }
        }
        for (int r = 0; r < refinements; r++) {
            offset_products(unit, n, 1.0f / scale, -zero, top - zero, &numerator, &denominator);
            if (numerator > 0.0f) scale = numerator / (denominator > TINY ? denominator : TINY);
        }
        scales[block] = a * scale;
        zeros[block] = zero;
    }
}

/* Second pass: codes and values at the scales as stored. */
void loftq_uniform_encode(const float *x, int64_t columns, int64_t size, int64_t first,
                          int64_t last, int top, const float *scales, const float *zeros,
                          uint8_t *codes, float *values) {
    int64_t groups = (columns + size - 1) / size;
    for (int64_t block = first; block < last; block++) {
        int64_t at = block / groups * columns + block % groups * size;
        int64_t left = columns - block % groups * size;
        int n = (int)(left < size ? left : size);
        float scale = scales[block], zero = zeros[block];
        float low = -zero, high = (float)top - zero, divisor = scale == 0.0f ? 1.0f : scale;
        const float *restrict source = x + at;
        uint8_t *restrict code = codes + at;
        float *restrict value = values + at;
        for (int i = 0; i < n; i++) {
            float q = rintf(source[i] / divisor);
            q = q < low ? low : q;
            q = q > high ? high : q;
            code[i] = (uint8_t)(int32_t)(q + zero);
            value[i] = q * scale;
        }
    }
}
