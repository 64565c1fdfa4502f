/* One pass of an alternation step over a range of rows: subtract the previous product, search for
 * scales, quantize, leave the new residual behind. A group of rows stays in the second-level cache
 * through all of it, a block of 64 in the first.
 */
#include <stdlib.h>

#include "codebook.h"
#include "common.h"
#include "product.h"
#include "uniform.h"

enum { DONE = 0, NO_MEMORY = 1, SCALE_LOST = 2 };

/* The fields of native_sweep.py's _Sweep, in its order. All matrices are row-major, and float32 where
 * nothing else is said. */
typedef struct {
    int64_t rows, columns;
    int64_t group;       /* rows of one group; groups begin at block boundaries */
    int64_t size;        /* elements of a block, the last one short */
    int32_t flattened;   /* blocks run over the flattened matrix, else along each row */
    int32_t store;       /* dtype that the values are rounded to before they are subtracted */
    int32_t kind;        /* dtype of `weight` */
    const Codebook *codebook; /* or NULL */
    Uniform uniform;
    Search search;
    int32_t rank;        /* of the product; 0: there is none */
    const float *left;   /* (rows, rank) */
    const float *tiles;  /* [columns / 64][rank][64] */
    float beyond;        /* the target is weight - product - beyond * (product - before) */
    int32_t before_rank; /* 0: `before` is zero */
    const float *before_left, *before_tiles;
    const void *weight;
    float *residual;     /* in: of the previous step; out: weight - values */
    uint16_t *narrow;      /* out: the residual in bfloat16, or NULL */
    void *remains;       /* out: residual - product, or NULL */
    int32_t half_remains; /* they are bfloat16, not float32 */
    const float *start;  /* the previous step's scales, or NULL */
    int32_t fixed;       /* search for nothing: `start` and `zeros` are the scales and zero points */
    uint8_t *codes;      /* out; NULL: quantize nothing, only sum */
    float *scales;
    uint8_t *zeros;      /* with `fixed` in, else out */
    double *sums;        /* out, two a group: squares of residual - product, and of the new one */
} Sweep;

/* Rows [first, last) of the weight: where they are float32, else in `buffer`. */
static const float *weight_rows(const Sweep *s, int64_t first, int64_t last, float *buffer) {
    int64_t at = first * s->columns, count = (last - first) * s->columns;
    if (s->kind == FLOAT32) return (const float *)s->weight + at;
    widen(s->weight, s->kind, at, count, buffer);
    return buffer;
}

/* TILE_ROWS rows of left x tile, those beyond `last` repeating the first. */
static void tile_of(const float *left, const float *tiles, int rank, int64_t row, int64_t last,
                    int64_t column, float product[TILE_ROWS][TILE]) {
    const float *rows[TILE_ROWS];
    for (int i = 0; i < TILE_ROWS; i++) rows[i] = left + (row + i < last ? row + i : row) * rank;
    multiply_tile(rows, tiles + column * rank, rank, product);
}

/* target = weight - product, or beyond it, of rows [first, last), where `weight` and `target` begin;
 * returns the sum of squares of residual - product. */
static double subtract_product(const Sweep *s, int64_t first, int64_t last,
                               const float *all_weights, float *target) {
    double total = 0.0;
    for (int64_t column = 0; column < s->columns; column += TILE) {
        int width = (int)(s->columns - column < TILE ? s->columns - column : TILE);
        for (int64_t row = first; row < last; row += TILE_ROWS) {
            float product[TILE_ROWS][TILE], before[TILE_ROWS][TILE] = {{0}};
            int height = (int)(last - row < TILE_ROWS ? last - row : TILE_ROWS);
            tile_of(s->left, s->tiles, s->rank, row, last, column, product);
            if (s->before_rank && s->codes)
                tile_of(s->before_left, s->before_tiles, s->before_rank, row, last, column, before);
            for (int i = 0; i < height; i++) {
                int64_t at = (row + i) * s->columns + column, here = at - first * s->columns;
                const float *restrict weight = all_weights + here;
                const float *restrict residual = s->residual + at;
                float *restrict out = target + here;
                for (int j = 0; j < width; j++) {
                    double rest = (double)(residual[j] - product[i][j]);
                    total += rest * rest;
                }
                if (s->remains && s->half_remains) {
                    uint16_t *restrict half = (uint16_t *)s->remains + at;
                    for (int j = 0; j < width; j++)
                        half[j] = bfloat16_bits(residual[j] - product[i][j]);
                } else if (s->remains) {
                    float *restrict rest = (float *)s->remains + at;
                    for (int j = 0; j < width; j++) rest[j] = residual[j] - product[i][j];
                }
                if (s->codes)
                    for (int j = 0; j < width; j++)
                        out[j] = weight[j] - product[i][j] -
                                 s->beyond * (product[i][j] - before[i][j]);
            }
        }
    }
    return total;
}

/* residual = weight - values, as stored; returns its sum of squares. */
static double subtract_values(const Sweep *s, int64_t at, int n, const float *restrict weight,
                              float *restrict values) {
    float *restrict residual = s->residual + at;
    double total = 0.0;
    round_values(values, n, s->store);
    for (int i = 0; i < n; i++) {
        float rest = weight[i] - values[i];
        residual[i] = rest;
        total += (double)rest * (double)rest;
    }
    if (s->narrow) {
        uint16_t *restrict narrow = s->narrow + at;
        for (int i = 0; i < n; i++) narrow[i] = bfloat16_bits(residual[i]);
    }
    return total;
}

/* One run of `length` elements that begins at block `block` and element `at`. */
static int quantize_run(const Sweep *s, const float *weight, const float *target, int64_t at,
                        int64_t length, int64_t block, double *total) {
    float values[LARGEST_BLOCK];
    for (int64_t offset = 0; offset < length; offset += s->size, block++) {
        int n = (int)(length - offset < s->size ? length - offset : s->size);
        const float *start = s->start ? s->start + block : NULL, *x = target + offset;
        uint8_t *codes = s->codes + at + offset, *zero = s->codebook ? NULL : s->zeros + block;
        float scale;
        if (s->fixed) {
            scale = *start;
            if (s->codebook) codebook_at(s->codebook, x, n, scale, codes, values);
            else uniform_encode(x, n, scale, (float)*zero, (float)s->uniform.top, codes, values);
        } else if (s->codebook)
            scale = codebook_fit(s->codebook, &s->search, x, n, start, codes, values);
        else
            scale = uniform_fit(&s->uniform, &s->search, x, n, start, codes, zero, values);
        if (s->uniform.portable && isnan(scale)) return SCALE_LOST;
        s->scales[block] = scale;
        *total += subtract_values(s, at + offset, n, weight + offset, values);
    }
    return DONE;
}

/* Groups [first, last). */
int loftq_sweep(const Sweep *s, int64_t first, int64_t last) {
    size_t size = (size_t)(s->group * s->columns) * sizeof(float);
    float *target_buffer = s->rank && s->codes ? malloc(size) : NULL;
    float *weight_buffer = s->kind != FLOAT32 && s->codes ? malloc(size) : NULL;
    int status = DONE;
    if ((s->rank && s->codes && !target_buffer) || (s->kind != FLOAT32 && s->codes && !weight_buffer))
        status = NO_MEMORY;
    for (int64_t group = first; group < last && status == DONE; group++) {
        int64_t begin = group * s->group, end = begin + s->group;
        if (end > s->rows) end = s->rows;
        int64_t at = begin * s->columns;
        double *sums = s->sums + 2 * group;
        const float *weight = s->codes ? weight_rows(s, begin, end, weight_buffer) : NULL;
        const float *target = weight;
        sums[0] = sums[1] = 0.0;
        if (s->rank) {
            sums[0] = subtract_product(s, begin, end, weight, target_buffer);
            target = target_buffer;
        }
        if (!s->codes) continue;
        if (s->flattened) {
            int64_t length = (end - begin) * s->columns;
            status = quantize_run(s, weight, target, at, length, at / s->size, &sums[1]);
        } else {
            int64_t blocks = (s->columns + s->size - 1) / s->size;
            for (int64_t row = begin; row < end && status == DONE; row++) {
                int64_t here = (row - begin) * s->columns;
                status = quantize_run(s, weight + here, target + here, row * s->columns, s->columns,
                                      row * blocks, &sums[1]);
            }
        }
    }
    free(weight_buffer);
    free(target_buffer);
    return status;
}
