/* tr(M H M^T) of a bfloat16 matrix and symmetric bfloat16 moments, where the processor multiplies
 * pairs of bfloat16: a tile of M H is summed with M before it leaves the cache, and of H only what is
 * on and below the diagonal is read.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "common.h"
#include "pairs.h"
#include "transpose.h"

enum { DONE = 0, NO_MEMORY = 1 };

/* The fields of native_form.py's _Form, in its order. Both row-major. */
typedef struct {
    int64_t rows, columns;   /* columns: a multiple of 64 */
    int64_t group;           /* rows summed to one of `sums` */
    const uint16_t *matrix;  /* (rows, columns) */
    const uint16_t *moments; /* (columns, columns) */
    double *sums;            /* out, one a group */
} Form;

#ifdef HAS_PAIRS
#define TILE ACROSS_PAIRS

int loftq_has_form(void) { return 1; }

/* H[column + j][from + 2 i], H[..][.. + 1] as panel[i][j]. */
static void pack(const Form *s, int64_t column, int64_t from, int64_t depth, uint32_t *panel) {
    for (int j = 0; j < TILE; j += TURNED)
        for (int64_t i = 0; i < depth / 2; i += TURNED)
            transpose_16(s->moments + (column + j) * s->columns + from + 2 * i, s->columns / 2,
                         panel + i * TILE + j, TILE);
}

static void halve(uint32_t *panel, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t low = bfloat16_bits(0.5f * from_bfloat16((uint16_t)panel[i]));
        uint32_t high = bfloat16_bits(0.5f * from_bfloat16((uint16_t)(panel[i] >> 16)));
        panel[i] = low | high << 16;
    }
}

/* M[begin:end] cut into PAIR_DEPTH columns at a time, which lie together: rows as far apart as M's
 * would share a few sets of the first-level cache. */
static void cut(const Form *s, int64_t begin, int64_t end, uint16_t *pieces) {
    for (int64_t from = 0; from < s->columns; from += PAIR_DEPTH) {
        int64_t depth = s->columns - from < PAIR_DEPTH ? s->columns - from : PAIR_DEPTH;
        for (int64_t row = begin; row < end; row++, pieces += PAIR_DEPTH)
            memcpy(pieces, s->matrix + row * s->columns + from, (size_t)depth * 2);
    }
}

/* products = M[:, :column + TILE] H[:column + TILE, tile at `column`] of `height` rows, what is on
 * the diagonal counting half. */
static void multiply_column(Pairs *pairs, const Form *s, const uint16_t *pieces, int64_t height,
                            int64_t column, uint32_t *panel, float *products) {
    memset(products, 0, (size_t)(height * TILE) * sizeof(float));
    for (int64_t from = 0; from <= column; from += PAIR_DEPTH) {
        int64_t depth = column + TILE - from < PAIR_DEPTH ? column + TILE - from : PAIR_DEPTH;
        pack(s, column, from, depth, panel);
        if (from + depth > column) halve(panel + (column - from) / 2 * TILE, TILE / 2 * TILE);
        for (int64_t row = 0; row < height; row += pairs->rows) {
            int some = (int)(height - row < pairs->rows ? height - row : pairs->rows);
            multiply_pairs(pairs, pieces + from * height + row * PAIR_DEPTH, PAIR_DEPTH, some,
                           panel, depth, products + row * TILE);
        }
    }
}

/* Groups [first, last). */
int loftq_form(const Form *s, int64_t first, int64_t last) {
    uint32_t *panel = malloc(sizeof(uint32_t) * PAIR_DEPTH / 2 * TILE);
    float *products = malloc(sizeof(float) * (size_t)(s->group * TILE));
    int64_t depths = (s->columns + PAIR_DEPTH - 1) / PAIR_DEPTH;
    uint16_t *pieces = malloc((size_t)(s->group * depths * PAIR_DEPTH) * 2);
    int status = panel && products && pieces ? DONE : NO_MEMORY;
    Pairs pairs = begin_pairs();
    for (int64_t group = first; group < last && status == DONE; group++) {
        int64_t begin = group * s->group, end = begin + s->group;
        if (end > s->rows) end = s->rows;
        double total = 0.0;
        cut(s, begin, end, pieces);
        for (int64_t column = 0; column < s->columns; column += TILE) {
            float sums[TILE] = {0};
            multiply_column(&pairs, s, pieces, end - begin, column, panel, products);
            for (int64_t row = begin; row < end; row++) {
                const uint16_t *restrict across = s->matrix + row * s->columns + column;
                const float *restrict product = products + (row - begin) * TILE;
                for (int j = 0; j < TILE; j++) sums[j] += product[j] * from_bfloat16(across[j]);
            }
            for (int j = 0; j < TILE; j++) total += (double)sums[j];
        }
        s->sums[group] = 2.0 * total;
    }
    end_pairs(&pairs);
    free(panel);
    free(products);
    free(pieces);
    return status;
}
#else
int loftq_has_form(void) { return 0; }
int loftq_form(const Form *s, int64_t first, int64_t last) {
    (void)s, (void)first, (void)last;
    return DONE;
}
#endif
