/* tr(M H M^T) of a bfloat16 matrix and symmetric bfloat16 moments, where the processor multiplies
 * pairs of bfloat16: a tile of M H is summed with M while it is in registers, and of H only what is
 * on and below the diagonal is read.
 */
#include <stdlib.h>

#include "common.h"

enum { DONE = 0, NO_MEMORY = 1 };

/* The fields of native_form.py's _Form, in its order. Both row-major. */
typedef struct {
    int64_t rows, columns;   /* columns: a multiple of 64 */
    int64_t group;           /* rows summed to one of `sums` */
    const uint16_t *matrix;  /* (rows, columns) */
    const uint16_t *moments; /* (columns, columns) */
    double *sums;            /* out, one a group */
} Form;

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>

#define TILE 64      /* columns of M H: four registers */
#define TILE_ROWS 6  /* 6 x 4 accumulators of 32 registers */
#define DEPTH 256    /* of a panel of H, which fills the first-level cache */

int loftq_has_form(void) { return 1; }

/* H[column + j][from + 2 i], H[..][.. + 1] as panel[i][j]. */
static void pack(const Form *s, int64_t column, int64_t from, int64_t depth, uint32_t *panel) {
    for (int j = 0; j < TILE; j++) {
        const uint16_t *row = s->moments + (column + j) * s->columns + from;
        for (int64_t i = 0; i < depth / 2; i++) memcpy(panel + i * TILE + j, row + 2 * i, 4);
    }
}

/* sum of (M[.., first:last] H[first:last, tile]) * M[.., tile] over `height` rows; `panel` begins
 * at `first`, `values` hold the rows from there, `across` from the tile's first column. */
static double multiply_tile(const uint16_t *const values[TILE_ROWS],
                            const uint16_t *const across[TILE_ROWS], int height,
                            const uint32_t *panel, int64_t depth) {
    __m512 sum[TILE_ROWS][4];
    UNROLL for (int i = 0; i < TILE_ROWS; i++)
        UNROLL for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth / 2; k++) {
        __m512i right[4];
        UNROLL for (int j = 0; j < 4; j++)
            right[j] = _mm512_loadu_si512(panel + k * TILE + 16 * j);
        UNROLL for (int i = 0; i < TILE_ROWS; i++) {
            int32_t pair;
            memcpy(&pair, values[i] + 2 * k, 4);
            __m512i left = _mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < 4; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
    double total = 0.0;
    for (int i = 0; i < height; i++) {
        __m512 row = _mm512_setzero_ps();
        for (int j = 0; j < 4; j++) {
            __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)(across[i] + 16 * j));
            __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
            row = _mm512_fmadd_ps(sum[i][j], _mm512_castsi512_ps(wide), row);
        }
        total += (double)_mm512_reduce_add_ps(row);
    }
    return total;
}

/* The part of the sum, over rows [begin, end), in which H[from:from + DEPTH, tile at `column`] is. */
static double multiply_panel(const Form *s, int64_t begin, int64_t end, int64_t column, int64_t from,
                             uint32_t *panel) {
    /* The tile on the diagonal counts once, those left of it twice. */
    int64_t left = column - from < DEPTH ? column - from : DEPTH;
    int64_t depth = column + TILE - from < DEPTH ? column + TILE - from : DEPTH;
    double total = 0.0;
    pack(s, column, from, depth, panel);
    for (int64_t row = begin; row < end; row += TILE_ROWS) {
        const uint16_t *values[TILE_ROWS], *diagonal[TILE_ROWS], *across[TILE_ROWS];
        int height = (int)(end - row < TILE_ROWS ? end - row : TILE_ROWS);
        for (int i = 0; i < TILE_ROWS; i++) {
            const uint16_t *start = s->matrix + (row + (i < height ? i : 0)) * s->columns;
            values[i] = start + from;
            diagonal[i] = start + from + left;
            across[i] = start + column;
        }
        if (left) total += 2.0 * multiply_tile(values, across, height, panel, left);
        if (depth > left)
            total += multiply_tile(diagonal, across, height, panel + left / 2 * TILE, depth - left);
    }
    return total;
}

/* Groups [first, last). */
int loftq_form(const Form *s, int64_t first, int64_t last) {
    uint32_t *panel = malloc(sizeof(uint32_t) * DEPTH / 2 * TILE);
    if (!panel) return NO_MEMORY;
    for (int64_t group = first; group < last; group++) {
        int64_t begin = group * s->group, end = begin + s->group;
        if (end > s->rows) end = s->rows;
        double total = 0.0;
        for (int64_t column = 0; column < s->columns; column += TILE)
            for (int64_t from = 0; from <= column; from += DEPTH)
                total += multiply_panel(s, begin, end, column, from, panel);
        s->sums[group] = total;
    }
    free(panel);
    return DONE;
}
#else
int loftq_has_form(void) { return 0; }
int loftq_form(const Form *s, int64_t first, int64_t last) {
    (void)s, (void)first, (void)last;
    return DONE;
}
#endif
