/* Rows of B (rows x rank) times A (rank x columns), a tile of 4 x 64 at a time in registers.
 *
 * A comes in tiles of 64 columns, [tile][rank][64], padded with zeros: read row by row at its own
 * stride, the 64 x 64 floats of a tile would share a few sets of the first-level cache. */
#ifndef LOFTQ_PRODUCT_H
#define LOFTQ_PRODUCT_H

#include "common.h"

#define TILE 64
#define TILE_ROWS 4
#if defined(__AVX512F__)
#define LANES 16 /* 4 x 4 accumulators of 32 registers */
#define ACROSS 4
#else
#define LANES 8 /* 4 x 2 accumulators of 16 registers; narrower machines split them */
#define ACROSS 2
#endif

/* Left to itself the compiler loads `right` anew for every row, and loads are the bottleneck. */
#if defined(__AVX512F__)
#define IN_REGISTER(lane) __asm__("" : "+v"(lane))
#else
#define IN_REGISTER(lane) (void)0
#endif

typedef float Lane __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* product[i][0..63] = sum_k rows[i][k] * tile[k][0..63] */
static void multiply_tile(const float *const rows[TILE_ROWS], const float *restrict tile, int rank,
                          float product[TILE_ROWS][TILE]) {
    for (int column = 0; column < TILE; column += LANES * ACROSS) {
        Lane sum[TILE_ROWS][ACROSS];
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            UNROLL for (int j = 0; j < ACROSS; j++) sum[i][j] = (Lane){0};
        for (int k = 0; k < rank; k++) {
            const float *source = tile + (int64_t)k * TILE + column;
            Lane right[ACROSS];
            UNROLL for (int j = 0; j < ACROSS; j++) {
                right[j] = *(const Lane *)(source + j * LANES);
                IN_REGISTER(right[j]);
            }
            UNROLL for (int i = 0; i < TILE_ROWS; i++) {
                Lane left = rows[i][k] + (Lane){0};
                UNROLL for (int j = 0; j < ACROSS; j++) sum[i][j] += left * right[j];
            }
        }
        UNROLL for (int i = 0; i < TILE_ROWS; i++)
            UNROLL for (int j = 0; j < ACROSS; j++)
                *(Lane *)(product[i] + column + j * LANES) = sum[i][j];
    }
}

#endif
