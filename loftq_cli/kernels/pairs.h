/* Rows of bfloat16 times a panel of pairs of bfloat16, summed in float32: where the processor
 * multiplies such pairs, with tiles of its own (AMX) or in vectors (AVX-512).
 *
 * A panel holds of a matrix (depth, 64) the rows 2 k and 2 k + 1 in panel[k][0..63], the first of
 * the two in the lower half. */
#ifndef LOFTQ_PAIRS_H
#define LOFTQ_PAIRS_H

#include "common.h"

#define ACROSS_PAIRS 64 /* columns of a panel */
#define MOST_PAIR_ROWS 16
#define PAIR_DEPTH 256 /* of a panel that fills the first-level cache */

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define HAS_PAIRS 1
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_PAIR_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* How a thread multiplies: `rows` at a time, in tiles set up for `height` (0: none, in vectors). */
typedef struct {
    int rows, tiles, height;
} Pairs;

#ifdef HAS_PAIR_TILES
/* Tiles 0 to 3 are sums, 4 is the left side, 5 to 7 and once more 5 the panel. */
static void set_up_tiles(Pairs *pairs, int height) {
    struct {
        uint8_t palette, start, zeros[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = (uint8_t)(i < 5 ? height : 16);
    }
    _tile_loadconfig(&config);
    pairs->height = height;
}
#endif

/* Linux lends a process the tiles if it asks. */
static Pairs begin_pairs(void) {
    Pairs pairs = {6, 0, 0};
#ifdef HAS_PAIR_TILES
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0) {
        pairs.rows = MOST_PAIR_ROWS;
        pairs.tiles = 1;
    }
#endif
    return pairs;
}

static void end_pairs(const Pairs *pairs) {
#ifdef HAS_PAIR_TILES
    if (pairs->tiles) _tile_release();
#else
    (void)pairs;
#endif
}

/* Six rows, those from `height` on repeating the first: 6 x 4 accumulators of 32 registers. */
static void multiply_in_vectors(const uint16_t *left, int64_t stride, int height,
                                const uint32_t *panel, int64_t depth, float *out) {
    const uint16_t *rows[6];
    __m512 sum[6][4];
    UNROLL for (int i = 0; i < 6; i++) {
        rows[i] = left + (i < height ? i : 0) * stride;
        UNROLL for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < depth / 2; k++) {
        __m512i right[4];
        UNROLL for (int j = 0; j < 4; j++)
            right[j] = _mm512_loadu_si512(panel + k * ACROSS_PAIRS + 16 * j);
        UNROLL for (int i = 0; i < 6; i++) {
            int32_t pair;
            memcpy(&pair, rows[i] + 2 * k, 4);
            __m512i both = _mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < 4; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)both, (__m512bh)right[j]);
        }
    }
    UNROLL for (int i = 0; i < 6; i++)
        if (i < height)
            UNROLL for (int j = 0; j < 4; j++) {
                float *place = out + i * ACROSS_PAIRS + 16 * j;
                _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sum[i][j]));
            }
}

/* out[i][0..63] += sum_k left[i][k] panel[k][0..63] of `height` rows, at most pairs->rows, each
 * `stride` behind the one before; `depth` is a multiple of 32. */
static void multiply_pairs(Pairs *pairs, const uint16_t *left, int64_t stride, int height,
                           const uint32_t *panel, int64_t depth, float *out) {
#ifdef HAS_PAIR_TILES
    if (pairs->tiles) {
        if (pairs->height != height) set_up_tiles(pairs, height);
        const size_t step = ACROSS_PAIRS * 4;
        _tile_loadd(0, out, step);
        _tile_loadd(1, out + 16, step);
        _tile_loadd(2, out + 32, step);
        _tile_loadd(3, out + 48, step);
        for (int64_t k = 0; k < depth; k += 32) {
            const uint32_t *right = panel + k / 2 * ACROSS_PAIRS;
            _tile_loadd(4, left + k, (size_t)stride * 2);
            _tile_loadd(5, right, step);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, right + 16, step);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, right + 32, step);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, right + 48, step);
            _tile_dpbf16ps(3, 4, 5);
        }
        _tile_stored(0, out, step);
        _tile_stored(1, out + 16, step);
        _tile_stored(2, out + 32, step);
        _tile_stored(3, out + 48, step);
        return;
    }
#endif
    (void)pairs;
    multiply_in_vectors(left, stride, height, panel, depth, out);
}
#endif

#endif
